"""Numerical reference solutions.

Oracles: the sine series of the linear case of diffusion-sorption; flows whose advection vanishes, so that they are
known exactly; and convergence at the expected order.
"""

import functools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from difflayers.pde import (
    cached_reference,
    diffusion_sorption_reference,
    gaussian_random_field,
    navier_stokes_reference,
)

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


def test_what_memory_holds_does_not_matter(monkeypatch):
    """SciPy's integrator subtracts differences that it has not filled yet."""
    plain = diffusion_sorption_reference(0.1, cells=8, times=[0.0, 200.0, 500.0])[2]
    empty = np.empty
    for pattern in (0x7FF0000000000001, 0x7FEFFFFFFFFFFFFF):  # a signalling NaN, the largest number

        def dirty(*args, pattern=pattern, **kwargs):
            out = empty(*args, **kwargs)
            if out.dtype == np.float64:
                out.view(np.int64)[...] = pattern
            return out

        monkeypatch.setattr(np, "empty", dirty)
        again = diffusion_sorption_reference(0.1, cells=8, times=[0.0, 200.0, 500.0])[2]
        monkeypatch.undo()
        assert torch.equal(plain, again)


def test_diffusion_sorption_refuses():
    with pytest.raises(ValueError, match=r"initial: expected at least 0, got -0\.1"):
        diffusion_sorption_reference(-0.1, cells=8)
    with pytest.raises(ValueError, match="times: expected increasing times"):
        diffusion_sorption_reference(0.1, cells=8, times=[0.0, 2.0, 1.0])
    with pytest.raises(ValueError, match="porosity: expected a number between"):
        diffusion_sorption_reference(0.1, cells=8, porosity=0.0)
    with pytest.raises(ValueError, match=r"initial: expected a number or shape \(8,\), got shape \(7,\)"):
        diffusion_sorption_reference(torch.zeros(7), cells=8)
    with pytest.raises(ValueError, match="freundlich: expected at least 0, got -1"):
        diffusion_sorption_reference(0.1, cells=8, freundlich=-1.0)
    with pytest.raises(ValueError, match="end: expected more than 0, got nan"):
        diffusion_sorption_reference(0.1, cells=8, end=math.nan)


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


def test_batches_of_flows_and_forcings():
    start = gaussian_random_field(8, seed=0, modes=2, count=2)
    force = gaussian_random_field(8, seed=1, modes=2, count=3).unsqueeze(1)
    found = navier_stokes_reference(start, [0.0, 0.1], 0.1, forcing=force)
    assert found.shape == (3, 2, 2, 8, 8)
    one = navier_stokes_reference(start[1], [0.0, 0.1], 0.1, forcing=force[2, 0])
    assert float((found[2, 1] - one).abs().max()) < 1e-7
    assert navier_stokes_reference(start[:0], [0.0, 0.1], 0.1).shape == (0, 2, 8, 8)
    half = navier_stokes_reference(start.half(), [0.1], 0.1)
    assert half.dtype == torch.float16 and float((half - navier_stokes_reference(start, [0.1], 0.1)).abs().max()) < 5e-3
    with pytest.raises(ValueError, match=r"forcing: expected batch dimensions that broadcast with \(2,\), got \(3,\)"):
        navier_stokes_reference(start, [0.1], 0.1, forcing=force[:, 0])
    with pytest.raises(ValueError, match=r"forcing: expected dtype torch\.float64"):
        navier_stokes_reference(start, [0.1], 0.1, forcing=force.float())
    for times in ([math.nan], [math.inf], [0.1, math.inf]):
        with pytest.raises(ValueError, match="times: expected increasing times"):
            navier_stokes_reference(start, times, 0.1)
    with pytest.raises(RuntimeError, match="diverged before time 5"):
        navier_stokes_reference(1e3 * gaussian_random_field(32, seed=1, modes=5), [5.0], 0.0, courant=50.0)


def test_random_fields_longer_than_the_torus():
    """Nothing but the lowest modes is left."""
    fields = gaussian_random_field(16, seed=0, length=20.0, count=300)
    assert bool(torch.isfinite(fields).all()) and float((fields.square().mean() - 1).abs()) < 0.15
    assert float((fields - fields[:, :1] - fields[:, :, :1] + fields[:, :1, :1]).abs().max()) < 1e-12


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


def test_cache_refuses_what_it_could_not_compare(tmp_path):
    file = tmp_path / "field.pt"
    for make in (lambda: torch.zeros(2), functools.partial(gaussian_random_field, 8, seed=0)):
        with pytest.raises(ValueError, match="make: expected a function of a module's top level"):
            cached_reference(file, make)
    with pytest.raises(ValueError, match="seed: expected tensors, numbers, strings"):
        cached_reference(file, gaussian_random_field, 8, seed=object())
    assert not file.exists()
    first = cached_reference(file, gaussian_random_field, 8, seed=0, length=np.float64(0.3))  # read again, not refused
    assert torch.equal(cached_reference(file, gaussian_random_field, 8, seed=0, length=0.3), first)
    with pytest.raises(ValueError, match="make: expected a function that returns a tensor"):
        cached_reference(file, math.sqrt, 4.0)


def test_cache_keeps_what_it_was_given_and_no_more(tmp_path):
    field = torch.zeros(1000, 8, 8, dtype=torch.float64, requires_grad=True)[0]
    file = tmp_path / "flow.pt"
    for _ in range(2):
        assert not cached_reference(file, navier_stokes_reference, field, [0.1], 0.1).requires_grad
    assert file.stat().st_size < 20_000  # of a view, not of all that is behind it
