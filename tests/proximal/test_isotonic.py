"""Isotonic regression: against scikit-learn, against a conic solver, and by its optimality conditions."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from difflayers.proximal import project_isotonic, prox_tv1d


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(x: Tensor, w: Tensor | None = None, *, increasing: bool = True) -> Tensor:
    from sklearn.isotonic import isotonic_regression

    rows = [
        isotonic_regression(row, sample_weight=None if w is None else w[i].numpy(), increasing=increasing)
        for i, row in enumerate(x.numpy())
    ]
    return torch.from_numpy(np.stack(rows))


SIGNALS = {
    "noise": lambda n: normal(3, n),
    "rounded": lambda n: normal(3, n).round(),
    "falling": lambda n: normal(3, n).sort(-1, descending=True).values,
    "rising": lambda n: normal(3, n).sort(-1).values,
    "walk": lambda n: normal(3, n).cumsum(-1),
    "alternating": lambda n: torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(n)[:n].expand(3, n),
    "growing": lambda n: -(2.0 ** torch.arange(n, dtype=torch.float64).clamp_max(900)).expand(3, n),
    "heavy tails": lambda n: torch.exp(20 * normal(3, n)) * normal(3, n, seed=1).sign(),
    "small on large": lambda n: 1e9 + 1e-3 * normal(3, n),
    "one far away": lambda n: torch.cat([normal(3, n - 1), torch.full((3, 1), -1e12, dtype=torch.float64)], -1),
}


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 64, 200])
@pytest.mark.parametrize("signal", SIGNALS)
def test_equals_pool_adjacent_violators(signal: str, n: int):
    x = SIGNALS[signal](n)
    w = normal(3, n, seed=2).exp()
    scale = x.abs().amax()
    for z, expected in [
        (project_isotonic(x), reference(x)),
        (project_isotonic(x, weights=w), reference(x, w)),
        (project_isotonic(x, decreasing=True), reference(x, increasing=False)),
    ]:
        assert ((z - expected).abs().amax() / scale).item() < 1e-14


def test_equals_conic_solver():
    import cvxpy as cp

    x, w = normal(12), normal(12, seed=1).exp()
    z = cp.Variable(12)
    objective = cp.sum_squares(cp.multiply(np.sqrt(w.numpy()), z - x.numpy())) / 2
    cp.Problem(cp.Minimize(objective), [cp.diff(z) >= 0]).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
    )
    torch.testing.assert_close(project_isotonic(x, weights=w), torch.from_numpy(z.value), atol=1e-7, rtol=0)


def test_scale_and_weights_of_any_size():
    x, w = normal(4, 50), torch.exp(8 * normal(4, 50, seed=1))
    z = project_isotonic(x, weights=w)
    torch.testing.assert_close(z, reference(x, w), atol=1e-12, rtol=0)
    for scale in (1e-9, 1e9):
        torch.testing.assert_close(project_isotonic(scale * x, weights=scale * w) / scale, z, atol=1e-12, rtol=0)


def test_derivative_is_that_of_the_reference():
    x, w, g, d, e = (normal(2, 9, seed=seed) for seed in range(5))
    w = w.exp()
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    by_x, by_w = torch.autograd.grad(project_isotonic(leaves[0], weights=leaves[1]), leaves, g)
    h = 1e-6

    def slope(move_x: Tensor, move_w: Tensor) -> float:
        return ((reference(x + move_x, w + move_w) - reference(x - move_x, w - move_w)) * g).sum().item() / (2 * h)

    assert (by_x * d).sum().item() == pytest.approx(slope(h * d, 0 * e), abs=1e-6)
    assert (by_w * e).sum().item() == pytest.approx(slope(0 * d, h * e), abs=1e-6)


def test_ties_are_one_block():
    x = torch.tensor([1.0, 1.0, 0.5, 1.5], dtype=torch.float64)  # 1 and the mean of 1 and 0.5; 1 and 1.5 apart
    J = torch.autograd.functional.jacobian(project_isotonic, x)
    torch.testing.assert_close(J[:3, :3], torch.full((3, 3), 1 / 3, dtype=torch.float64))
    tied = torch.autograd.functional.jacobian(project_isotonic, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(tied, torch.full((4, 4), 0.25, dtype=torch.float64))
    # the mean of 0.1, 0.3, 0.2 is 0.2 up to rounding
    near = torch.tensor([0.2, 0.3, 0.1, 0.2], dtype=torch.float64)
    J = torch.autograd.functional.jacobian(project_isotonic, near)
    torch.testing.assert_close(J, torch.full((4, 4), 0.25, dtype=torch.float64))


def test_single_precision_is_right_to_its_rounding():
    x = normal(5, 1000)
    z = project_isotonic(x.float())
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.double(), project_isotonic(x.float().double()), atol=1e-6, rtol=0)


def test_an_element_with_nan_keeps_it_to_itself():
    x = normal(3, 20)
    spoilt = x.clone()
    spoilt[1, 5] = math.nan
    z = project_isotonic(spoilt)
    assert z[1].isnan().all()
    assert (z[[0, 2]] == project_isotonic(x)[[0, 2]]).all()


def test_dim_and_batch_shape():
    x = normal(2, 5, 3)
    torch.testing.assert_close(project_isotonic(x, dim=1), project_isotonic(x.movedim(1, -1)).movedim(-1, 1))
    w = normal(5, 1).exp()
    torch.testing.assert_close(
        project_isotonic(x, weights=w, dim=-2), project_isotonic(x.mT, weights=w.mT.expand(2, 3, 5)).mT
    )


@pytest.mark.parametrize("weights", [0.0, -1.0, math.nan])
def test_weights_must_be_positive(weights: float):
    with pytest.raises(ValueError, match="weights: expected more than 0"):
        project_isotonic(normal(3), weights=weights)


def slow_rises() -> dict[str, Tensor]:
    steps = torch.arange(20_000, dtype=torch.float64)
    return {
        "time stamps": 1.7e9 + steps * 1e-6,
        "time stamps with duplicates": 1.7e9 + (steps * 0.7).floor() * 1e-6,
        "pairs": 1e6 + (steps // 2) * 1e-9,
        "last digits": 1 + steps * 1e-15,
    }


@pytest.mark.parametrize("name", slow_rises())
def test_a_slow_rise_is_no_tie(name):
    """Neighbours a few rounding units apart are not one block, let alone all of them together."""
    x = slow_rises()[name].requires_grad_()
    z = project_isotonic(x)
    assert torch.equal(z, x)
    assert torch.equal(torch.autograd.grad(z[5], x)[0] != 0, x == x[5])
    smooth, x = prox_tv1d(x.detach(), 1e-30), x.detach()
    assert float((smooth - x).abs().max()) <= 4 * torch.finfo(x.dtype).eps * float(x.max())
