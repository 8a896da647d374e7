"""Quadrature rules as rows of a conservation.

Oracles: integrals of polynomials and trigonometric functions by hand; one slice at a time.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from difflayers.pde import conservation_operator, conserve


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64, device="cpu")


def test_rules_integrate_what_they_should():
    grid = torch.tensor([0.0, 0.3, 0.4, 1.0], dtype=torch.float64)
    line = 2 * grid + 1
    assert float(conservation_operator(grid)[0] @ line) == pytest.approx(2.0)
    left, right = (float(conservation_operator(grid, rule)[0] @ grid) for rule in ("left", "right"))
    assert left == pytest.approx(0.3 * 0.1 + 0.4 * 0.6)
    assert right == pytest.approx(0.3 * 0.3 + 0.4 * 0.1 + 1.0 * 0.6)
    circle = torch.arange(8, dtype=torch.float64) * 2 * math.pi / 8
    row = conservation_operator(circle, "periodic", period=2 * math.pi)[0]
    assert float(row @ (3 + circle.cos() + (2 * circle).sin())) == pytest.approx(6 * math.pi)
    assert float(row.sum()) == pytest.approx(2 * math.pi)
    uneven = conservation_operator(torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64), "periodic", period=1.0)
    assert uneven[0].tolist() == pytest.approx([0.3, 0.25, 0.45])


def test_slices_are_blocks_of_one_vector():
    grid = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    G, row = conservation_operator(grid, slices=2), conservation_operator(grid)
    assert torch.equal(G, torch.block_diag(row, row))
    mean, variance, b = normal(0, 2, 3), normal(1, 2, 3).square(), normal(2, 2, 1)
    together = conserve(mean.flatten(), variance.flatten(), b.flatten(), G)
    apart = conserve(mean, variance, b, row)
    for a, e in zip(together, apart, strict=True):
        assert torch.allclose(a, e.flatten(), atol=1e-13)


@pytest.mark.parametrize(("rule", "period"), list(itertools.product(["trapezoid", "left", "right"], [1.0])))
def test_a_period_belongs_to_a_circle(rule, period):
    grid = torch.linspace(0, 0.9, 4)
    with pytest.raises(ValueError, match=f"period: expected None for the rule '{rule}'"):
        conservation_operator(grid, rule, period=period)
    with pytest.raises(ValueError, match="period: expected more than the length"):
        conservation_operator(grid, "periodic", period=0.5)
    with pytest.raises(ValueError, match="period: expected a length, got inf"):
        conservation_operator(grid, "periodic", period=math.inf)
    with pytest.raises(ValueError, match='rule: expected "trapezoid"'):
        conservation_operator(grid, "simpson")
    with pytest.raises(ValueError, match="slices: expected None or an integer of at least 1, got True"):
        conservation_operator(grid, slices=True)
