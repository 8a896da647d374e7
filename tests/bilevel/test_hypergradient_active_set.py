"""Which inequalities hold a point: in any units, beside large gradients, and with bad numbers.

Oracle: the projection onto bounds, min |y - s x|^2 / 2 subject to y <= s, is y = s min(x, 1), whose derivative in x is
s where x < 1 and 0 where x > 1; with upper = sum(y) the hypergradient is that.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from difflayers import SolveWarning
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


def test_a_small_multiplier_beside_a_stiff_row():
    """Multipliers 2e-5 and 2e6: both rows hold, y = (x0, 1, 1)."""
    k = torch.tensor([1.0, 1e-3, 1e3], dtype=torch.float64)
    problem = Bilevel(total, lambda x, y, batch: (k * (y - x).square()).sum(), constraint=lambda x, y: y[1:] - 1)
    x = torch.tensor([1.0, 1.01, 1e3], dtype=torch.float64)
    expected = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(hypergradient(problem, x, x.clamp(max=1)).grad, expected, atol=1e-8, rtol=0)


def test_a_row_near_its_bound_without_a_multiplier_is_absent():
    problem = Bilevel(total, lambda x, y, batch: (y - x).square().sum() / 2, constraint=lambda x, y: y - 1)
    x = torch.tensor([1 - 1e-7, 1.0], dtype=torch.float64)
    torch.testing.assert_close(hypergradient(problem, x, x).grad, torch.ones_like(x))


@pytest.mark.parametrize("error", [1e-6, 1e-3, 1e-2])
@pytest.mark.parametrize("above", [2.0, 0.05, 5e-3])
def test_an_inexact_point_keeps_its_rows(error, above):
    """y = (1, 0.5) is off in the coordinate that is free: the other stays at its bound, multiplier `above`."""
    problem = Bilevel(total, lambda x, y, batch: (y - x).square().sum() / 2, constraint=lambda x, y: y - 1)
    x = torch.tensor([1 + above, 0.5], dtype=torch.float64)
    y = torch.tensor([1.0, 0.5 + error], dtype=torch.float64)
    doubt = above <= 10 * error
    with pytest.warns(SolveWarning, match=r"whether rows \[0\]") if doubt else contextlib.nullcontext():
        found = hypergradient(problem, x, y)
    torch.testing.assert_close(found.grad, torch.tensor([0.0, 1.0], dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_of_parallel_rows_the_nearest_holds(order):
    """y1 <= x2 holds y1 = 1; y1 <= 2 x2 + 1e-3 is 1.001 away, which is little next to y0 = 1e6."""
    problem = Bilevel(
        total,
        lambda x, y, batch: (y - x[:2]).square().sum() / 2,
        constraint=lambda x, y: torch.stack([y[1] - x[2], y[1] - 2 * x[2] - 1e-3])[order],
    )
    x, y = torch.tensor([1e6, 3.0, 1.0], dtype=torch.float64), torch.tensor([1e6, 1.0], dtype=torch.float64)
    expected = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(hypergradient(problem, x, y).grad, expected, atol=1e-9, rtol=0)


def test_nan_in_an_x_of_the_upper_level_alone():
    for blocks in (None, 3):
        problem = Bilevel(
            lambda x, y, batch: y.sum(-1) + x[2],
            lambda x, y, batch: (y - x[:2]).square().sum(-1) / 2,
            blocks=blocks,
        )
        y = torch.tensor([1.0, 2.0]) if blocks is None else torch.tensor([1.0, 2.0]).repeat(3, 1)
        with pytest.raises(ValueError, match=r"^x: expected finite numbers"):
            hypergradient(problem, torch.tensor([1.0, 2.0, torch.nan]), y)


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
