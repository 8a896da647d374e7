"""Closed-form solutions.

Oracles: the equations themselves, by automatic differentiation; explicit finite volumes; quadrature of the mass; the
balance at a moving front; a textbook number for Burgers' equation (C. Basdevant and others, 1986); a travelling front.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from difflayers.pde import (
    advection_solution,
    barenblatt_solution,
    heat_solution,
    inviscid_burgers_solution,
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


def finite_volumes(potential, largest: float, left, start: float, end: float, length: float, cells: int):
    """``u_t = K(u)_xx`` by explicit finite volumes, with ``u`` on the left given: nothing of the closed forms."""
    h, t, u = length / cells, start, np.zeros(cells)
    while t < end:
        dt = min(0.2 * h**2 / largest, end - t)
        K = potential(np.concatenate([[left(t)], u, u[-1:]]))
        flux = -np.diff(K) / h
        flux[0] *= 2  # from the wall to the first centre
        u, t = u - dt * np.diff(flux) / h, t + dt
    return torch.from_numpy((np.arange(cells) + 0.5) * h), torch.from_numpy(u)


@pytest.mark.parametrize("m", [1.0, 2.0])
def test_the_front_is_that_of_finite_volumes(m):
    x, u = finite_volumes(lambda u: u ** (m + 1) / (m + 1), m * 0.4, lambda t: (m * t) ** (1 / m), 0.0, 0.4, 0.6, 60)
    assert float((u - porous_medium_solution(x, 0.4, m)).abs().mean()) < 2e-3
    assert float(u.mean()) * 0.6 == pytest.approx(float(porous_medium_mass(number(0.4), m)), abs=1e-3)


@pytest.mark.parametrize("u_star", [0.5, 0.7])
def test_the_shock_is_that_of_finite_volumes(u_star):
    """The enthalpy form: the potential is flat below the threshold."""
    x, u = finite_volumes(lambda u: np.maximum(u - u_star, 0), 1.0, lambda t: 1.0, 0.0, 0.06, 0.5, 80)
    assert float((u - stefan_solution(x, 0.06, u_star)).abs().mean()) < 5e-3
    assert float(u.mean()) * 0.5 == pytest.approx(float(stefan_mass(number(0.06), u_star)), abs=1e-4)


def test_derivatives_of_the_shock_in_its_threshold():
    x = line(0.01, 0.4, 9)
    for f in (lambda v: stefan_mass(number(0.1), v), lambda v: stefan_solution(x, 0.1, v).sum()):
        v, h = number(0.6).requires_grad_(), 1e-4
        (first,) = torch.autograd.grad(f(v), v, create_graph=True)
        (second,) = torch.autograd.grad(first, v)
        low, middle, high = (float(f(number(0.6 + k * h))) for k in (-1, 0, 1))
        assert first.item() == pytest.approx((high - low) / (2 * h), rel=1e-6)
        assert second.item() == pytest.approx((high - 2 * middle + low) / h**2, rel=1e-4)


def test_not_a_number_stays_one():
    x = torch.tensor([0.1, math.nan, 0.9], dtype=torch.float64)
    for u in (
        porous_medium_solution(x, 0.5, 2.0),
        barenblatt_solution(x, 0.5, 2.0),
        stefan_solution(x, 0.1, 0.6),
        advection_solution(x, 0.1, 2.0),
        inviscid_burgers_solution(x, 0.1, 2.0),
    ):
        assert torch.isnan(u).tolist() == [False, True, False]


def test_closed_forms_refuse():
    x = line(0, 1, 3)
    with pytest.raises(ValueError, match=r"t: expected at least 0, got -0\.5"):
        porous_medium_solution(x, -0.5, 2.0)
    with pytest.raises(ValueError, match="t: expected at least 0"):
        stefan_mass(-x, 0.6)
    with pytest.raises(ValueError, match="speed: expected more than 0, got -1"):
        advection_solution(x, 0.5, -1.0)
    with pytest.raises(ValueError, match=r"speed: expected a bound of .initial., got 1\.0 where that is 3"):
        viscous_burgers_solution(x, 0.5, 0.1, initial=lambda y: 3 + 0 * y, potential=lambda y: 3 * y)


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
