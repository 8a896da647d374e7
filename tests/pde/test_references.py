"""Reference solutions.

Oracles: the equations themselves, by automatic differentiation of the closed forms and by quadrature of their mass; the
balance at a moving front; a textbook number for Burgers' equation (C. Basdevant and others, 1986); the sine series of
the linear case of diffusion-sorption; flows whose advection vanishes, so that they are known exactly; and convergence
at the expected order.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from difflayers.pde import (
    advection_solution,
    barenblatt_solution,
    cached_reference,
    diffusion_sorption_reference,
    gaussian_random_field,
    heat_solution,
    inviscid_burgers_solution,
    navier_stokes_reference,
    porous_medium_mass,
    porous_medium_solution,
    stefan_mass,
    stefan_solution,
    viscous_burgers_solution,
)


def line(low: float, high: float, n: int) -> Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def conduction(solution, flux_of, x: Tensor, t: float) -> Tensor:
    """``u_t - (k(u) u_x)_x`` by automatic differentiation."""
    x, time = x.clone().requires_grad_(), torch.full_like(x, t).requires_grad_()
    u = solution(x, time)
    u_t, u_x = torch.autograd.grad(u.sum(), (time, x), create_graph=True)
    (flux_x,) = torch.autograd.grad((flux_of(u) * u_x).sum(), x)
    return (u_t - flux_x).detach()


@pytest.mark.parametrize(
    ("solution", "conductivity", "inside"),
    [
        (lambda x, t: heat_solution(x, t, 3.0), lambda u: 3.0, (0.0, 6.0)),
        (lambda x, t: porous_medium_solution(x, t, 1.0), lambda u: u, (0.0, 0.69)),
        (lambda x, t: porous_medium_solution(x, t, 3.5), lambda u: u**3.5, (0.0, 0.69)),
        (lambda x, t: barenblatt_solution(x, t, 2.0, 0.4), lambda u: u**2, (-1.1, 1.1)),
        (lambda x, t: stefan_solution(x, t, 0.6), lambda u: 1.0, (0.01, 0.6)),
    ],
)
def test_closed_forms_solve_their_equation(solution, conductivity, inside):
    x = line(*inside, 41)
    assert float(solution(x, number(0.7)).abs().min()) >= 0 and float(solution(x, number(0.7)).abs().max()) > 0.1
    assert float(conduction(solution, conductivity, x, 0.7).abs().max()) < 1e-10


def test_fronts_stand_where_they_should():
    x = line(0, 1, 1001)
    for m in (1.0, 2.0, 5.0):
        u = porous_medium_solution(x, 0.5, m)
        assert bool((u[x >= 0.5] == 0).all()) and bool((u[x < 0.5] > 0).all())
        assert float(u[0]) == pytest.approx((m * 0.5) ** (1 / m))
    assert float(porous_medium_solution(x, 0.0, 2.0).abs().max()) == 0
    assert stefan_solution(x, 0.0, 0.6).tolist()[:2] == [1.0, 0.0]
    u = stefan_solution(x, 0.05, number(0.6))
    ends = u[u > 0][-1]
    assert float(ends) == pytest.approx(0.6, abs=2e-3) and float(u[0]) == 1


@pytest.mark.parametrize("u_star", [0.05, 0.5, 0.6, 0.95])
def test_balance_at_the_shock_of_stefan(u_star):
    """The shock moves as fast as the flux that arrives fills the jump."""
    t = 0.08
    x = line(0, 3, 300_001)
    u = stefan_solution(x, t, u_star)
    shock = float(x[u > 0][-1])
    near = torch.tensor([shock - 1e-5], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(stefan_solution(near, t, u_star).sum(), near)
    assert -float(slope) == pytest.approx(u_star * shock / (2 * t), rel=1e-3)
    assert float(torch.trapezoid(u, x)) == pytest.approx(float(stefan_mass(number(t), u_star)), abs=1e-5)


def test_mass_of_the_porous_medium():
    # x = t - s^m, so that the integrand is smooth at the front
    for m in (1.0, 2.5, 6.0):
        t = 0.8
        s = line(0, t ** (1 / m), 20_001)
        u = porous_medium_solution(t - s**m, t, m)
        found = float(torch.trapezoid(u * m * s ** (m - 1), s))
        assert found == pytest.approx(float(porous_medium_mass(number(t), m)), rel=1e-6)
    x = line(-8, 8, 160_001)
    hills = [float(torch.trapezoid(barenblatt_solution(x, t, 2.0), x)) for t in (0.5, 4.0)]
    assert hills[0] == pytest.approx(hills[1], rel=1e-5)


def test_gradients_pass_the_front():
    x = line(0, 1, 21).requires_grad_()
    t, m = number(0.5).requires_grad_(), number(2.0).requires_grad_()
    for u in (porous_medium_solution(x, t, m), barenblatt_solution(x, t, m, 0.1), stefan_solution(x, t, 0.6)):
        found = torch.autograd.grad(u.sum(), (x, t, m), materialize_grads=True)
        assert all(bool(torch.isfinite(g).all()) for g in found)


def test_steps_and_ramps():
    x = line(0, 1, 100_001)
    for t in (0.0, 0.2, 1.0):
        assert float(torch.trapezoid(advection_solution(x, t, 2.0), x)) == pytest.approx(
            0.5 + min(2 * t, 0.5), abs=1e-5
        )
    x, a = line(-1, 1, 200_001), 3.0
    for t in (0.0, 0.2, 1 / 3, 0.5, 0.9):
        mass = float(torch.trapezoid(inviscid_burgers_solution(x, t, a), x))
        assert mass == pytest.approx(a / 2 * (1 + a * t), abs=1e-4), t
    ramp = line(-0.35, -0.02, 20)
    assert float(conduction_free(lambda x, t: inviscid_burgers_solution(x, t, a), ramp, 0.2).abs().max()) < 1e-12
    assert inviscid_burgers_solution(line(0.2, 0.3, 2), 0.5, a).tolist() == [3.0, 0.0]  # the shock is at 0.25


def conduction_free(solution, x: Tensor, t: float, viscosity: float = 0.0) -> Tensor:
    """``u_t + u u_x - nu u_xx`` by automatic differentiation."""
    x, time = x.clone().requires_grad_(), torch.full_like(x, t).requires_grad_()
    u = solution(x, time)
    u_t, u_x = torch.autograd.grad(u.sum(), (time, x), create_graph=True)
    u_xx = torch.autograd.grad(u_x.sum(), x)[0] if viscosity else 0
    return (u_t + u * u_x - viscosity * u_xx).detach()


def test_viscous_burgers():
    nu = 0.02
    x = line(-1, 1, 41)
    found = conduction_free(lambda x, t: viscous_burgers_solution(x, t, nu), x, 0.4, nu)
    assert float(found.abs().max()) < 1e-9
    assert torch.equal(viscous_burgers_solution(x, 0.0, nu), -torch.sin(math.pi * x))
    coarse, fine = (viscous_burgers_solution(x, 0.4, nu, nodes=k) for k in (501, 2001))
    assert float((coarse - fine).abs().max()) < 1e-12
    # the largest slope is that of the tabulated benchmark
    zero = number(0.0).requires_grad_()
    u = viscous_burgers_solution(zero, 1.6037 / math.pi, 0.01 / math.pi, nodes=8001)
    assert float(torch.autograd.grad(u, zero)[0]) == pytest.approx(-152.00516, abs=1e-4)
    # a step of heights 1 and 0 becomes the travelling front
    step = viscous_burgers_solution(
        x, 20.0, 0.1, initial=lambda y: (y < -10).double(), potential=lambda y: (y + 10).clamp_max(0), nodes=20001
    )
    assert float((step - 1 / (1 + torch.exp(x / 0.2))).abs().max()) < 1e-5


# ------------------------------------------------------------------------------------------------- diffusion-sorption


def linear_series(x: np.ndarray, t: float, start: float, D: float, sign: float, factor: float) -> np.ndarray:
    """``(1 + factor) u_t = D u_xx``, ``u(0) = 1``, ``u(1) = sign D u_x(1)``: steady state and sine series."""
    slope = -1 / (1 - sign * D)
    steady = 1 + slope * x
    fine = np.linspace(0, 1, 20001)
    total = steady.copy()
    for k in range(1, 60):
        root = brentq(
            lambda z: np.sin(z) - sign * D * z * np.cos(z), (k - 0.5) * np.pi + 1e-9, (k + 0.5) * np.pi - 1e-9
        )
        wave = np.sin(root * fine)
        weight = np.trapezoid((start - 1 - slope * fine) * wave, fine) / np.trapezoid(wave**2, fine)
        total += weight * np.sin(root * x) * np.exp(-(root**2) * D * t / (1 + factor))
    return total


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_linear_diffusion_sorption(sign):
    options = {
        "exponent": 1.0,
        "freundlich": 2e-5,
        "outflow_sign": sign,
        "times": [0.0, 100.0, 500.0],
        "diffusion": 1e-2,
    }
    factor = 0.71 / 0.29 * 2880 * 2e-5
    errors = []
    for cells in (20, 40):
        x, t, u = diffusion_sorption_reference(0.2, cells=cells, **options)
        exact = [linear_series(x.numpy(), s, 0.2, 1e-2, sign, factor) for s in t.tolist()[1:]]
        errors.append(np.abs(u.numpy()[1:] - exact).max())
    assert errors[1] < 2e-5
    assert errors[0] / errors[1] > 3.5, "second order"


def test_diffusion_sorption_converges():
    found = [diffusion_sorption_reference(0.1, cells=k, times=[0.0, 200.0, 500.0])[2] for k in (16, 32, 64, 128)]
    # means over pairs of cells are the cells of the coarser grid, to second order
    gaps = [float((b.unflatten(-1, (-1, 2)).mean(-1) - a)[1:].abs().max()) for a, b in pairwise(found)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[1] / gaps[2] > 3
    assert gaps[2] < 2e-3
    loose = diffusion_sorption_reference(0.1, cells=64, times=[0.0, 200.0, 500.0], rtol=1e-5)[2]
    assert 1e-9 < float((loose - found[2]).abs().max()) < 1e-3
    assert bool((found[-1].diff(dim=-1) < 1e-12).all()), "monotone in x"


def test_diffusion_sorption_refuses():
    with pytest.raises(ValueError, match=r"initial: expected at least 0, got -0\.1"):
        diffusion_sorption_reference(-0.1, cells=8)
    with pytest.raises(ValueError, match="times: expected increasing times"):
        diffusion_sorption_reference(0.1, cells=8, times=[0.0, 2.0, 1.0])
    with pytest.raises(ValueError, match="porosity: expected a number between"):
        diffusion_sorption_reference(0.1, cells=8, porosity=0.0)


# ------------------------------------------------------------------------------------------------------ Navier-Stokes


def torus(n: int) -> tuple[Tensor, Tensor]:
    place = torch.arange(n, dtype=torch.float64) / n
    return place[:, None], place[None, :]


def test_a_decaying_vortex_is_exact():
    x, y = torus(24)
    start = torch.cos(2 * math.pi * x) * torch.cos(2 * math.pi * y)
    found = navier_stokes_reference(torch.stack([start, 2 * start]), [0.0, 0.3, 1.0], 0.01)
    for i, t in enumerate((0.0, 0.3, 1.0)):
        exact = start * math.exp(-8 * math.pi**2 * 0.01 * t)
        assert float((found[0, i] - exact).abs().max()) < 1e-12
        assert float((found[1, i] - 2 * exact).abs().max()) < 1e-12


def test_a_ripple_in_a_shear():
    """To first order in eps: ``w = a cos(2 pi y) + eps cos(4 pi x)`` changes at the rate ``-u w_x - v w_y``.

    The streams are ``a cos(2 pi y) / (4 pi^2)`` and ``eps cos(4 pi x) / (16 pi^2)``, so that ``u = psi_y`` is
    ``-a sin(2 pi y) / (2 pi)`` and ``v = -psi_x`` is ``eps sin(4 pi x) / (4 pi)``.
    """
    n, a, eps, dt = 32, 3.0, 1e-6, 1e-4
    x, y = torus(n)
    start = a * torch.cos(2 * math.pi * y) + eps * torch.cos(4 * math.pi * x)
    moved = navier_stokes_reference(start, [0.0, dt, 2 * dt], 0.0)
    rate = (4 * moved[1] - moved[2] - 3 * moved[0]) / (2 * dt)  # of second order
    u, v = -a * torch.sin(2 * math.pi * y) / (2 * math.pi), eps * torch.sin(4 * math.pi * x) / (4 * math.pi)
    w_x, w_y = -4 * math.pi * eps * torch.sin(4 * math.pi * x), -2 * math.pi * a * torch.sin(2 * math.pi * y)
    assert float((rate + u * w_x + v * w_y).abs().max()) < 1e-4 * eps < eps < float(rate.abs().max())


def test_forcing_of_one_mode():
    x, y = torus(16)
    force, nu = 0.5 * torch.sin(2 * math.pi * (x + y)), 0.02
    found = navier_stokes_reference(torch.zeros(16, 16).double(), [0.5, 2.0], nu, forcing=force)
    rate = nu * 8 * math.pi**2
    for i, t in enumerate((0.5, 2.0)):
        assert float((found[i] - force * (1 - math.exp(-rate * t)) / rate).abs().max()) < 1e-6


def test_navier_stokes_converges_and_conserves():
    start = 3 * gaussian_random_field(32, seed=1, modes=5)
    kept = navier_stokes_reference(start, [0.0, 0.5], 0.0, courant=0.25)
    enstrophy = kept.square().mean((-2, -1))
    assert float((enstrophy[1] / enstrophy[0] - 1).abs()) < 1e-6
    assert float(kept.mean((-2, -1)).abs().max()) < 1e-13
    finest = navier_stokes_reference(start, [0.5], 1e-3, courant=0.1)
    errors = [float((navier_stokes_reference(start, [0.5], 1e-3, courant=c) - finest).abs().max()) for c in (0.8, 0.4)]
    assert errors[0] / errors[1] > 8, "fourth order in time"
    wide = navier_stokes_reference(3 * gaussian_random_field(64, seed=1, modes=5), [0.5], 5e-3, courant=0.4)
    same = navier_stokes_reference(start, [0.5], 5e-3, courant=0.4)
    assert float((wide[:, ::2, ::2] - same).abs().max()) < 1e-3 * float(same.abs().max())


def test_random_fields():
    fields = gaussian_random_field(16, seed=3, length=0.15, count=400)
    assert torch.equal(fields[0], gaussian_random_field(16, seed=3, length=0.15))
    assert torch.allclose(gaussian_random_field(32, seed=3, length=0.15)[::2, ::2], fields[0], atol=1e-13)
    assert float(fields.mean((-2, -1)).abs().max()) < 1e-13
    assert float((fields.square().mean() - 1).abs()) < 0.05
    # correlation over 1/8 of the torus: the kernel, less its mean over the torus
    kernel = (
        sum(np.exp(-((1 / 8 - i) ** 2 + j**2) / (2 * 0.15**2)) for i in range(-3, 4) for j in range(-3, 4)),
        sum(np.exp(-(i**2 + j**2) / (2 * 0.15**2)) for i in range(-3, 4) for j in range(-3, 4)),
    )
    mean = 2 * math.pi * 0.15**2
    expected = (kernel[0] - mean) / (kernel[1] - mean)
    assert float((fields * fields.roll(2, 1)).mean()) == pytest.approx(expected, abs=0.05)


# -------------------------------------------------------------------------------------------------------------- cache


def test_cache(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "soil.pt"
    first = cached_reference(file, diffusion_sorption_reference, 0.1, cells=8, times=3)
    written = file.read_bytes()
    again = cached_reference(file, diffusion_sorption_reference, 0.1, times=3, cells=8)
    assert isinstance(again, tuple) and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert file.read_bytes() == written
    other = cached_reference(file, diffusion_sorption_reference, 0.2, cells=8, times=3)
    assert not torch.equal(other[2], first[2])
    assert file.read_bytes() != written and [p.name for p in file.parent.iterdir()] == ["soil.pt"]
    field = gaussian_random_field(8, seed=0, modes=2)
    flow = cached_reference(tmp_path / "flow.pt", navier_stokes_reference, field, [0.1], 0.1)
    assert torch.equal(cached_reference(tmp_path / "flow.pt", navier_stokes_reference, field, [0.1], 0.1), flow)
    file.write_text("something else")
    with pytest.raises(ValueError, match="path: expected a file of cached_reference"):
        cached_reference(file, diffusion_sorption_reference, 0.1, cells=8, times=3)
