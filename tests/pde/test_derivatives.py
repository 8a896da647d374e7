"""Derivative terms of basis functions.

Oracles, written before the code: derivatives by hand of exponentials times sines; numpy's polynomial derivatives; the
order at which errors of finite differences fall when the spacing is halved; central differences in the parameters of a
network.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from difflayers.pde import Box, FiniteDifference, Grid, Heat, Jvp, NavierStokes2D, Sobol, Spectral

F64 = torch.float64
LIKE = torch.zeros((), dtype=F64)
PDE = Heat()
RATES = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
NAMES = ("u", "u_t", "u_x", "u_xx", "u_tx", "u_ttx", "u_xxxx")


def waves(point: Tensor) -> Tensor:
    """``exp(a t) sin(k x + a)``, k = 1, 2, 3."""
    t, x = point.unbind()
    return torch.exp(RATES * t) * torch.sin(torch.arange(1, 4, dtype=F64) * x + RATES)


def waves_by_hand(points: Tensor) -> np.ndarray:
    """``(N, T, K)``."""
    t, x = points.numpy().T[..., None]
    a, k = RATES.numpy(), np.arange(1, 4)
    e, s, c = np.exp(a * t), np.sin(k * x + a), np.cos(k * x + a)
    return np.stack([e * s, a * e * s, k * e * c, -(k**2) * e * s, a * k * e * c, a**2 * k * e * c, k**4 * e * s], -2)


def test_jvp_against_closed_forms():
    points = Sobol(40).interior(PDE, LIKE).points
    got = Jvp().terms(waves, points, PDE, NAMES)
    expected = waves_by_hand(points)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10, atol=1e-10)


def test_jvp_of_batches_experts_and_fields():
    pde = NavierStokes2D()
    points = torch.stack([Sobol(5, seed=s).interior(pde, LIKE).points for s in (0, 1)])  # two experts
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=F64)[:, None, None]  # three samples in front of them

    def basis(point: Tensor) -> Tensor:
        t, x, y = point.unbind()
        w, psi = torch.stack([x**3 * y, t * x]), torch.stack([y**2 * t, x * y * t])
        return scale * torch.stack([w, psi])

    got = Jvp().terms(basis, points, pde, ("w_xx", "psi_y", "w"))
    t, x, y = points.unbind(-1)
    one = torch.stack(
        [torch.stack([6 * x * y, 0 * x], -1), torch.stack([2 * y * t, x * t], -1), torch.stack([x**3 * y, t * x], -1)],
        -2,
    )
    assert got.shape == (3, 2, 5, 3, 2)
    torch.testing.assert_close(got, scale[..., None, None] * one, rtol=1e-12, atol=1e-12)


def test_gradients_of_terms_in_the_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    points = Sobol(6).interior(PDE, LIKE).points

    def loss() -> Tensor:
        return (Jvp().terms(net, points, PDE, ("u", "u_t", "u_xx")) ** 2).sum()

    g = torch.autograd.grad(loss(), net[0].weight)[0]
    with torch.no_grad():
        for i, j in ((0, 0), (3, 1)):
            values = []
            for h in (1e-5, -2e-5):
                net[0].weight[i, j] += h
                values.append(loss().item())
            net[0].weight[i, j] += 1e-5
            assert g[i, j].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-7)


def test_spectral_against_closed_forms():
    grid = Grid(PDE.domain, periodic=("x",), spacing="chebyshev", t=18, x=16)
    got = Spectral(grid).terms(waves, grid.interior(PDE, LIKE), PDE, NAMES[:5])
    expected = waves_by_hand(grid.points(LIKE))[:, :5]
    assert np.abs(got.numpy() - expected).max() <= 1e-10 * np.abs(expected).max()


def test_spectral_in_space_with_an_odd_number_of_nodes_and_batches():
    grid = Grid(PDE.domain, periodic=("x",), spacing="chebyshev", t=16, x=15)
    values = torch.vmap(waves)(grid.points(LIKE)).unflatten(0, grid.shape)
    batch = torch.stack([values, -2 * values])
    got = Spectral(grid).terms(batch, None, PDE, ("u_xx", "u_t"))
    expected = torch.from_numpy(waves_by_hand(grid.points(LIKE))[:, [3, 1]])
    torch.testing.assert_close(got, torch.stack([expected, -2 * expected]), rtol=0, atol=1e-9)


def _error(derivatives, grid: Grid, name: str) -> float:
    got = derivatives.terms(waves, grid.interior(PDE, LIKE), PDE, (name,))[:, 0]
    return float(np.abs(got.numpy() - waves_by_hand(grid.points(LIKE))[:, NAMES.index(name)]).max())


@pytest.mark.parametrize("accuracy", [2, 4])
@pytest.mark.parametrize("name", ["u_t", "u_x", "u_xx", "u_tx"])
@pytest.mark.parametrize("kind", ["uniform", "periodic", "stretched"])
def test_finite_differences_converge_at_their_order(accuracy: int, name: str, kind: str):
    errors = []
    for n in (81, 161):
        x = n
        if kind == "stretched":
            s = torch.linspace(0, 1, n, dtype=F64)
            x = 2 * math.pi * (s + 0.1 * torch.sin(2 * math.pi * s))
        grid = Grid(PDE.domain, periodic=("x",) if kind == "periodic" else (), t=n, x=x)
        errors.append(_error(FiniteDifference(grid, accuracy), grid, name))
    assert math.log2(errors[0] / errors[1]) > accuracy - 0.35
    size = np.abs(waves_by_hand(grid.points(LIKE))[:, NAMES.index(name)]).max()
    assert errors[1] < 0.05 * size


def test_finite_differences_are_exact_for_polynomials():
    s = torch.tensor([0.0, 0.3, 0.5, 1.2, 1.9, 2.3, 3.0], dtype=F64)
    line = FiniteDifference(Grid(Box(x=(0.0, 3.0)), x=s))
    poly = np.polynomial.Polynomial([1.0, -2.0, 0.5, 3.0])
    for order in (1, 2):
        values = torch.from_numpy(poly(s.numpy())) if order == 2 else torch.from_numpy(poly.cutdeg(2)(s.numpy()))
        expected = (poly if order == 2 else poly.cutdeg(2)).deriv(order)(s.numpy())
        np.testing.assert_allclose((line.matrix(0, order) @ values).numpy(), expected, rtol=1e-11, atol=1e-11)


def test_faces_of_a_grid_are_picked():
    grid = Grid(PDE.domain, t=6, x=7)
    derivatives = FiniteDifference(grid)
    whole = derivatives.terms(waves, grid.interior(PDE, LIKE), PDE, ("u_x",)).reshape(6, 7, 1, 3)
    face = derivatives.terms(waves, grid.face(PDE, 1, True, LIKE), PDE, ("u_x",))
    assert torch.equal(face, whole[:, -1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Jvp().terms(torch.zeros(3), torch.zeros(2, 2), PDE, ("u",)), "basis: expected a function of a point"),
        (lambda: Jvp().terms(lambda p: p[0], torch.zeros(2, 2), PDE, ("u",)), r"basis: expected shape \(\*batch, K\)"),
        (lambda: Jvp().terms(lambda p: p.float(), torch.zeros(2, 2, dtype=F64), PDE, ("u",)), "expected torch.float64"),
        (lambda: FiniteDifference(Grid(PDE.domain, t=4, x=4), 3), "accuracy: expected an even number"),
        (lambda: FiniteDifference(Grid(PDE.domain, t=2, x=9)).matrix(0, 2), "grid: expected at least 4 nodes"),
        (lambda: Spectral(Grid(PDE.domain, t=20, x=20)).matrix(0, 1), 'grid: expected spacing="chebyshev"'),
        (
            lambda: Spectral(Grid(PDE.domain, t=4, x=5)).terms(torch.zeros(5, 4, 2), None, PDE, ("u",)),
            r"basis: expected shape \(\*batch, 4, 5, K\), got \(5, 4, 2\)",
        ),
    ],
)
def test_bad_input_is_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_basis_may_be_the_same_everywhere():
    points = Sobol(5).interior(PDE, LIKE).points
    got = Jvp().terms(lambda point: torch.ones(2, 3, dtype=F64), points, PDE, ("u", "u_x"))
    assert got.shape == (2, 5, 2, 3)
    assert bool((got[..., 0, :] == 1).all()) and bool((got[..., 1, :] == 0).all())
