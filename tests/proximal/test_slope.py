"""The prox of the sorted l1 norm: against a conic solver, its special cases, and its kinks."""

import numpy as np
import pytest
import torch
from torch import Tensor

from difflayers.proximal import project_l1_ball, prox_l1, prox_slope


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def falling(n: int, seed: int = 9) -> Tensor:
    return normal(n, seed=seed).abs().sort(descending=True).values


def reference(x: Tensor, t: float, weights: Tensor) -> Tensor:
    """The sorted l1 norm as a sum of `sum_largest`."""
    import cvxpy as cp

    n, w = len(x), np.append(weights.numpy(), 0.0)
    z = cp.Variable(n)
    penalty = sum((w[k] - w[k + 1]) * cp.sum_largest(cp.abs(z), k + 1) for k in range(n))
    cp.Problem(cp.Minimize(t * penalty + cp.sum_squares(z - x.numpy()) / 2)).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13
    )
    return torch.from_numpy(z.value)


@pytest.mark.parametrize("t", [0.1, 0.7, 3.0])
def test_equals_conic_solver(t: float):
    x, w = normal(10), falling(10)
    torch.testing.assert_close(prox_slope(x, t, w), reference(x, t, w), atol=1e-7, rtol=0)


def test_ties_equal_conic_solver():
    x = torch.tensor([2.0, -2.0, 1.0, 1.0, -0.5, 0.0], dtype=torch.float64)
    w = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.25, 0.0], dtype=torch.float64)
    torch.testing.assert_close(prox_slope(x, 0.8, w), reference(x, 0.8, w), atol=1e-7, rtol=0)


def test_equal_weights_are_soft_thresholding():
    x, t = normal(4, 30).round(decimals=1), torch.tensor([0.0, 0.1, 0.5, 9.0], dtype=torch.float64)
    leaves = x.clone().requires_grad_()
    for weights in (2.0, torch.full((30,), 2.0, dtype=torch.float64)):
        z, expected = prox_slope(leaves, t, weights), prox_l1(leaves, t, weights=2.0)
        torch.testing.assert_close(z, expected, atol=1e-14, rtol=0)
        g = normal(4, 30, seed=3)
        found = [torch.autograd.grad(v, leaves, g, retain_graph=True)[0] for v in (z, expected)]
        assert (found[0] - found[1])[x != 0].abs().amax().item() == 0


def test_a_single_weight_is_the_largest_entry():
    x = normal(3, 8)
    one = torch.zeros(8, dtype=torch.float64)
    one[0] = 1
    torch.testing.assert_close(prox_slope(x, 0.6, one), x - project_l1_ball(x, 0.6), atol=1e-14, rtol=0)


def test_derivatives_of_a_block():
    x = torch.tensor([3.0, -2.9, 1.0, 0.1], dtype=torch.float64)
    t, w = torch.tensor(0.5, dtype=torch.float64), torch.tensor([2.0, 1.0, 0.5, 0.4], dtype=torch.float64)
    J, by_t, by_w = torch.autograd.functional.jacobian(prox_slope, (x, t, w))
    half, zero = 0.5, 0.0
    expected = [[half, -half, zero, zero], [-half, half, zero, zero], [zero, zero, 1.0, zero], [zero] * 4]
    torch.testing.assert_close(J, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(by_t, torch.tensor([-1.5, 1.5, -0.5, 0.0], dtype=torch.float64))
    expected = [[-0.25, -0.25, 0, 0], [0.25, 0.25, 0, 0], [0, 0, -0.5, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(by_w, torch.tensor(expected, dtype=torch.float64))


def test_derivative_is_that_of_the_reference():
    x, w, g, d = normal(6), falling(6), normal(6, seed=1), normal(6, seed=2)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(prox_slope(leaf, 0.5, w), leaf, g)
    h = 1e-4  # piecewise linear: only the solver's own error is divided
    slope = (reference(x + h * d, 0.5, w) - reference(x - h * d, 0.5, w)) / (2 * h)
    assert (found * d).sum().item() == pytest.approx((slope * g).sum().item(), abs=1e-6)


def test_kinks_are_joint_blocks():
    # magnitudes less weights are equal, so the entries just meet
    x = torch.tensor([3.0, 2.0], dtype=torch.float64)
    w = torch.tensor([2.0, 1.0], dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda x: prox_slope(x, 1.0, w), x)
    torch.testing.assert_close(J, torch.full((2, 2), 0.5, dtype=torch.float64))
    assert torch.autograd.functional.jacobian(lambda x: prox_slope(x, 2.0, w), x).abs().amax().item() == 0


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_scales(scale: float):
    x, w = normal(3, 40), falling(40)
    torch.testing.assert_close(prox_slope(scale * x, scale, w) / scale, prox_slope(x, 1.0, w), atol=1e-13, rtol=0)


def test_weights_along_another_dim():
    x, w = normal(5, 3), falling(5)
    torch.testing.assert_close(prox_slope(x, 0.4, w.unsqueeze(-1), dim=0), prox_slope(x.T, 0.4, w).T)
    with pytest.raises(ValueError, match="weights: expected entries that do not rise along dim 0, got 4"):
        prox_slope(x, 0.4, w.flip(0).unsqueeze(-1), dim=0)


def test_rising_weights_are_found_along_a_positive_dim():
    x = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rising = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="weights: expected entries that do not rise along dim"):
        prox_slope(x, 1.0, rising, dim=1)
    falling = rising.flip(0) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)  # which rises along another one
    assert torch.equal(prox_slope(x, 1.0, falling, dim=1), prox_slope(x, 1.0, falling, dim=-2))
