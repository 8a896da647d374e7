"""Which inequalities hold a point: in any units, beside large gradients, and with bad numbers.

Oracle: the projection onto bounds, min |y - s x|^2 / 2 subject to y <= s, is y = s min(x, 1), whose derivative in x is
s where x < 1 and 0 where x > 1; with upper = sum(y) the hypergradient is that.
"""

from __future__ import annotations

import pytest
import torch

from difflayers.bilevel import Bilevel, hypergradient


def total(x, y, batch):
    return y.sum()


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("lower", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("row", [1e-6, 1.0, 1e6])
def test_units_do_not_matter(size, lower, row):
    problem = Bilevel(
        total,
        lambda x, y, batch: lower * (y - size * x).square().sum() / 2,
        constraint=lambda x, y: row * (y - size),
    )
    x = torch.tensor([3.0, 0.5, 1.5], dtype=torch.float64)
    found = hypergradient(problem, x, size * x.clamp(max=1))
    torch.testing.assert_close(found.grad / size, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), atol=1e-8, rtol=0)


def test_all_at_a_bound_of_zero():
    problem = Bilevel(total, lambda x, y, batch: (y - x).square().sum() / 2, constraint=lambda x, y: y)
    x = torch.tensor([1e-7, 2.0], dtype=torch.float64)
    assert hypergradient(problem, x, torch.zeros_like(x)).grad.abs().max() < 1e-12
    free = torch.tensor([-1.0, -2e-3], dtype=torch.float64)
    torch.testing.assert_close(hypergradient(problem, free, free).grad, torch.ones_like(free))


@pytest.mark.parametrize("dtype, above", [(torch.float64, 1e-6), (torch.float32, 4e-3)])
def test_small_multipliers_beside_large_ones(dtype, above):
    problem = Bilevel(total, lambda x, y, batch: (y - x).square().sum() / 2, constraint=lambda x, y: y - 1)
    x = torch.tensor([1000.0 if dtype == torch.float64 else 3.0, 1 + above, 0.5], dtype=dtype)
    found = hypergradient(problem, x, x.clamp(max=1))
    torch.testing.assert_close(found.grad, torch.tensor([0.0, 0.0, 1.0], dtype=dtype), atol=1e-6, rtol=0)


def test_a_row_near_its_bound_without_a_multiplier_is_absent():
    problem = Bilevel(total, lambda x, y, batch: (y - x).square().sum() / 2, constraint=lambda x, y: y - 1)
    x = torch.tensor([1 - 1e-7, 1.0], dtype=torch.float64)
    torch.testing.assert_close(hypergradient(problem, x, x).grad, torch.ones_like(x))


@pytest.mark.parametrize("where", ["x", "y"])
@pytest.mark.parametrize("kind", ["free", "bound", "box", "blocks"])
def test_nan_is_refused_by_name(where, kind):
    """The Hessian is constant: no product shows what came in."""
    options = {
        "free": {},
        "bound": {"constraint": lambda x, y: y - 1},
        "box": {"project_lower": lambda y, x: y.clamp(-1, 1)},
        "blocks": {"blocks": 2},
    }[kind]
    sum_ = (lambda t: t.square().sum(-1)) if kind == "blocks" else (lambda t: t.square().sum())
    problem = Bilevel(lambda x, y, b: sum_(y), lambda x, y, b: sum_(y - x), **options)
    at = {"x": torch.tensor([0.5, 0.2], dtype=torch.float64), "y": torch.tensor([0.5, 0.2], dtype=torch.float64)}
    if kind == "blocks":
        at["y"] = at["y"].repeat(2, 1)
    at[where].view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=rf"^{where}: expected finite numbers"):
        hypergradient(problem, at["x"], at["y"])


def test_a_point_outside_of_the_set_is_refused():
    problem = Bilevel(total, lambda x, y, batch: (y - x).square().sum() / 2, project_lower=lambda y, x: y.clamp(-1, 1))
    with pytest.raises(ValueError, match=r"y: expected a point of the set .* one 0\.5 away"):
        hypergradient(problem, torch.tensor([1.5, 0.5]), torch.tensor([1.5, 0.5]))
