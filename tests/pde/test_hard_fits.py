"""Fits that are hard for damped Gauss-Newton: heavy rows, smooth bases, and residuals that bend sharply or jump.

Oracle: scipy.optimize.least_squares with tight tolerances on the stacked residuals; a heavy row is a condition that
holds; the gradient by autograd; and for basis functions that are nearly equal, the same fit in their difference.
"""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares as scipy_least_squares
from torch import Tensor

from difflayers.implicit import GaussNewton
from difflayers.pde import residual_least_squares, residual_least_squares_ex, safe_power

F64 = torch.float64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def burgers(u: Tensor, f: Tensor) -> Tensor:
    return u[..., 1] + u[..., 0] * u[..., 2] - 0.1 * u[..., 3] - f


def sorption(u: Tensor, f: Tensor) -> Tensor:
    return u[..., 1] - 0.25 / (1 + 2.2 * safe_power(u[..., 0], -0.126, 1e-6)) * u[..., 3] - f


def network(seed: int, points: int, width: int) -> tuple[Tensor, Tensor]:
    """Terms u, u_t, u_x, u_xx of smooth random ridge functions, and their values on the sides t = 0 and x = 0."""
    W, b = 0.7 * normal(seed, 2, width), normal(seed + 1, width)
    X = torch.rand(points, 2, generator=torch.Generator().manual_seed(seed + 2), dtype=F64)
    t = torch.tanh(X @ W + b)
    slope = 1 - t**2
    terms = torch.stack([t, slope * W[0], slope * W[1], -2 * t * slope * W[1] ** 2], 1)
    sides = torch.cat([X[:30] * torch.tensor([0.0, 1.0], dtype=F64), X[:30] * torch.tensor([1.0, 0.0], dtype=F64)])
    return terms, torch.tanh(sides @ W + b)


def best_of_scipy(F, B: Tensor, f: Tensor, A: Tensor, y: Tensor, ridge: float) -> float:
    def stacked(w: np.ndarray) -> np.ndarray:
        w = torch.from_numpy(w)
        r = F(torch.einsum("ntk,k->nt", B, w), f)
        return torch.cat([r, A @ w - y, math.sqrt(ridge) * w]).numpy()

    start = np.zeros(B.shape[-1])
    options = {"xtol": 1e-14, "ftol": 1e-14, "gtol": 1e-14, "x_scale": "jac", "max_nfev": 300}
    return min(scipy_least_squares(stacked, start, method=m, **options).cost for m in ("lm", "trf"))


def objective(F, w: Tensor, B: Tensor, f: Tensor, A: Tensor, y: Tensor, ridge: float) -> float:
    r = F(torch.einsum("ntk,k->nt", B, w), f)
    return float((r.square().sum() + (A @ w - y).square().sum() + ridge * w.square().sum()) / 2)


def test_a_row_that_outweighs_the_equation_does_not_slow_it_down():
    B, f = normal(0, 12, 8, 4, 5), normal(1, 12, 8)
    A, y = normal(2, 12, 1, 5), normal(3, 12, 1)
    weights = torch.full((1,), 1e6, dtype=F64)
    found = residual_least_squares_ex(B, burgers, f, rows=(A, y, weights), ridge=1e-2)
    assert found.converged.all() and found.steps.max() <= 60
    for e in range(12):
        w = found.value[e]
        assert (A[e] @ w - y[e]).abs() < 1e-8
        held = residual_least_squares_ex(B[e], burgers, f[e], equality=(A[e], y[e]), ridge=1e-2, init=w)
        assert held.converged and (held.value - w).abs().max() < 1e-5


def test_rows_of_weight_1e8_hold_and_leave_the_equation_its_digits():
    B, f = normal(4, 40, 8, 4, 5), normal(5, 40, 8).requires_grad_()
    A, y = normal(6, 40, 1, 5), normal(7, 40, 1)
    found = residual_least_squares_ex(B, burgers, f, rows=(A, y, torch.full((1,), 1e8, dtype=F64)), ridge=1e-2)
    assert found.converged.all() and found.steps.max() <= 60
    held = residual_least_squares_ex(B, burgers, f, equality=(A, y), ridge=1e-2, init=found.value)
    assert held.converged.all() and (held.value - found.value).abs().max() < 1e-11
    slopes = [torch.autograd.grad(s.value.sin().sum(), f)[0] for s in (found, held)]
    assert (slopes[0] - slopes[1]).abs().max() < 1e-9 * slopes[1].abs().max()


def test_large_misfits_take_tens_of_steps():
    """Damping that falls with every step that gains anything took up to 200 here, and on average twice as many."""
    bend = lambda u, f: torch.exp(u[..., 0]) - 0.5 * u[..., 2] - f  # noqa: E731
    quartic = lambda u, f: u[..., 0] ** 2 * u[..., 1] ** 2 + 0.5 * u[..., 2] - f  # noqa: E731
    for F, points in ((bend, 15), (quartic, 8), (burgers, 15)):
        B, f = normal(8, 100, points, 4, 5), normal(9, 100, points)
        found = residual_least_squares_ex(B, F, f, ridge=1e-2)
        assert found.converged.all() and found.steps.max() < 100 and found.steps.double().mean() <= 20


@pytest.mark.parametrize("curvature", [None, GaussNewton()])
@pytest.mark.parametrize("exact", [False, True])
def test_nearly_equal_basis_functions_keep_the_digits_of_the_gradient(exact, curvature):
    """``b1 w1 + b2 w2 = b1 (w1 + w2) + (b2 - b1) / e (e w2)``, where the difference of the two is without rounding."""
    e = 2.0**-18
    apart = normal(10, 12, 4, 3)
    B = torch.stack([apart[..., 0], apart[..., 0] + e * apart[..., 1], apart[..., 2]], -1)
    apart = torch.stack([B[..., 0], (B[..., 1] - B[..., 0]) / e, B[..., 2]], -1)
    c, slopes = normal(11, 3), []
    for basis, functional in ((B, torch.stack([c[0], c[0] + e * c[1], c[2]])), (apart, c)):
        f = normal(12, 12).requires_grad_()
        row = basis[:1, 0], torch.ones(1, dtype=F64)
        options = {} if curvature is None else {"curvature": curvature}
        w = residual_least_squares(basis, burgers, f, equality=row if exact else None, **options)
        slopes.append(torch.autograd.grad(functional @ w, f)[0])
    assert (slopes[0] - slopes[1]).abs().max() < 2e-8 * slopes[1].abs().max()


@pytest.mark.parametrize("jump", [lambda u: torch.where(u > 0.5, 3.0, 0.0), lambda u: torch.floor(3 * u)])
def test_a_jump_is_not_linear(jump):
    """Its derivative is the same everywhere."""
    F = lambda u, p: u[..., 1] - u[..., 0] + p["on"] * jump(u[..., 2]) - p["f"]  # noqa: E731
    B, f = normal(13, 8, 12, 4, 4), normal(14, 8, 12)
    on = torch.ones(8, 1, dtype=F64)
    on[3] = 0
    found = residual_least_squares_ex(B, F, {"on": on, "f": f})
    assert found.linear.tolist() == [e == 3 for e in range(8)]
    assert found.converged[3] and found.steps[3] == 1
    for e in range(8):
        w = found.value[e].detach().requires_grad_()
        value = F(torch.einsum("ntk,k->nt", B[e], w), {"on": on[e], "f": f[e]}).square().sum() / 2
        assert not found.converged[e] or torch.autograd.grad(value, w)[0].norm() < 1e-8


@pytest.mark.parametrize("F", [torch.log, torch.sqrt, torch.reciprocal])
def test_a_residual_that_is_nan_where_it_is_looked_at_is_not_linear(F):
    found = residual_least_squares_ex(
        normal(15, 12, 2, 3), lambda u, f: F(u[..., 0] + 0.5) + u[..., 1] - f, normal(16, 12)
    )
    assert not found.linear


def test_smooth_networks_as_a_basis_take_few_steps_to_the_minimum_of_scipy():
    for seed in (10, 20, 30):
        B, sides = network(seed, 300, 12)
        A, y = 3 * sides, 3 * torch.sin(4 * sides[:, 0])
        f = 0.1 * normal(seed + 3, 300)
        for ridge in (1e-8, 1e-3):
            found = residual_least_squares_ex(B, burgers, f, rows=(A, y), ridge=ridge)
            assert found.converged and found.steps <= 40
            expected = best_of_scipy(burgers, B, f, A, y, ridge)
            assert objective(burgers, found.value, B, f, A, y, ridge) <= expected * (1 + 1e-8)


def test_a_cusp_in_the_residual_ends_no_worse_than_scipy():
    """``(u + 1e-6)^-0.126``, frozen below zero, changes its slope by five orders of magnitude where the field is 0."""
    B, sides = network(40, 200, 8)
    A, y = 3 * sides, 3 * torch.cat([torch.full((30,), 0.1, dtype=F64), torch.ones(30, dtype=F64)])
    f = torch.zeros(200, dtype=F64)
    found = residual_least_squares_ex(B, sorption, f, rows=(A, y), ridge=1e-8)
    expected = best_of_scipy(sorption, B, f, A, y, 1e-8)
    assert objective(sorption, found.value, B, f, A, y, 1e-8) <= expected * (1 + 1e-3)
