"""Oracles: Cover's formula in general position; random search, and integer grids whose faces all degenerate."""

import itertools
import math

import pytest
import torch
from torch.func import grad

from difflayers.relu import LInf, enumerate_gates, narrow_gates, sample_gates


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def columns(patterns: torch.Tensor) -> set[tuple[bool, ...]]:
    return {tuple(c) for c in patterns.mT.tolist()}


def check(X: torch.Tensor, gates) -> None:
    heights = X @ gates.vectors.mT
    assert torch.equal(heights >= 0, gates.patterns)
    assert len(columns(gates.patterns)) == gates.patterns.shape[1]
    strict = heights[(X != 0).any(-1)]
    assert strict.numel() == 0 or strict.abs().min() > 1e-9
    assert torch.allclose(gates.vectors.norm(dim=-1), torch.ones(len(gates.vectors), dtype=X.dtype))


@pytest.mark.parametrize(("n", "d"), [(1, 1), (4, 1), (1, 3), (2, 5), (7, 2), (300, 2), (9, 3), (9, 4), (8, 6)])
def test_general_position_has_covers_number(n: int, d: int):
    X = normal(n + d, n, d)
    gates = enumerate_gates(X)
    check(X, gates)
    # in one dimension all rows are parallel
    rank, rows = min(n, d), 1 if d == 1 else n
    assert gates.patterns.shape == (n, 2 * sum(math.comb(rows - 1, k) for k in range(rank)))


def test_gates_of_data_that_are_differentiated():
    X, own = normal(12, 6, 3), []

    def total(X: torch.Tensor) -> torch.Tensor:
        gates = enumerate_gates(X)
        assert torch.equal(gates.vectors, own[0].vectors) and torch.equal(gates.patterns, own[0].patterns)
        assert torch.equal(narrow_gates(X, gates, LInf(0.2)), narrow_gates(X, own[0], LInf(0.2)))
        return (X @ gates.vectors.mT).relu().sum()

    own.append(enumerate_gates(X))
    narrow = narrow_gates(X, own[0], LInf(0.2))
    assert narrow.any() and not narrow.all()
    assert torch.allclose(grad(total)(X), own[0].patterns.double() @ own[0].vectors)


GRID = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=3)), dtype=torch.float64)
SQUARE = torch.tensor(list(itertools.product([0.0, 1.0, 2.0], repeat=2)), dtype=torch.float64)


@pytest.mark.parametrize(
    "X",
    [
        GRID,  # the origin and opposite points among them
        torch.cat([SQUARE, torch.ones(9, 1, dtype=torch.float64)], 1),  # points on common lines, with a bias
        torch.cat([normal(9, 5, 3), 2 * normal(9, 5, 3), torch.zeros(2, 3, dtype=torch.float64)]),
        normal(1, 6, 2) @ normal(2, 2, 4),  # rank 2 in 4 dimensions
        1e9 * normal(3, 6, 3),
        1e-9 * normal(3, 6, 3),
        normal(3, 6, 3).float(),
    ],
    ids=["grid", "collinear", "parallel and zero", "rank", "huge", "tiny", "float32"],
)
def test_degenerate_positions_have_the_patterns_that_random_search_finds(X: torch.Tensor):
    gates = enumerate_gates(X)
    if X.dtype == torch.float64 and X.abs().max() < 10 and X.abs().max() > 0.1:
        check(X, gates)
    g = normal(7, 200_000, X.shape[1]).to(X.dtype)
    heights = X @ g.mT
    there = (X != 0).any(-1, keepdim=True)
    strict = ((heights.abs() > 1e-6 * X.abs().max()) | ~there).all(0)
    found = torch.unique((heights >= 0)[:, strict], dim=1)
    assert columns(gates.patterns) == columns(found)


def test_zero_data_has_one_pattern():
    gates = enumerate_gates(torch.zeros(3, 2))
    assert gates.patterns.all()
    assert gates.patterns.shape == (3, 1)


def test_too_many_patterns_are_refused():
    with pytest.raises(
        ValueError, match=r"X: expected data with at most 100 activation patterns, got 30 different rows"
    ):
        enumerate_gates(normal(0, 30, 4), max_patterns=100)


def test_sampled_gates_are_different_and_repeatable():
    X = normal(4, 12, 3)
    draw = lambda count, **more: sample_gates(X, count, generator=torch.Generator().manual_seed(1), **more)  # noqa: E731
    gates = draw(20)
    check(X, gates)
    assert gates.patterns.shape == (12, 20)
    assert torch.equal(draw(20).vectors, gates.vectors)
    assert columns(draw(10**4).patterns) <= columns(enumerate_gates(X).patterns)
    both = draw(20, complements=True)
    check(X, both)
    assert torch.equal(both.vectors[:20], gates.vectors)
    assert columns(both.patterns) == columns(gates.patterns) | columns(~gates.patterns)


def test_more_gates_than_patterns_gives_all_there_are():
    X = normal(5, 4, 2)
    assert columns(sample_gates(X, 1000).patterns) == columns(enumerate_gates(X).patterns)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (torch.zeros(3), r"X: expected shape \(n, d\)"),
        (torch.zeros(0, 2), r"X: expected shape \(n, d\) with at least one row"),
        (torch.full((2, 2), math.nan), "X: expected finite numbers"),
        (torch.zeros(2, 2, dtype=torch.long), "X: expected a floating-point tensor"),
    ],
)
def test_bad_data_is_refused(X: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        enumerate_gates(X)
    with pytest.raises(ValueError, match=message):
        sample_gates(X, 3)


def test_counts_are_checked():
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        sample_gates(torch.ones(2, 2), 0)
    with pytest.raises(ValueError, match="max_draws: expected at least 0, got -1"):
        sample_gates(torch.ones(2, 2), 1, max_draws=-1)


@pytest.mark.parametrize("make", [enumerate_gates, lambda X: sample_gates(X, 3)])
def test_data_that_vmap_batches_are_refused(make):
    def patterns(X: torch.Tensor) -> torch.Tensor:
        return make(X).patterns

    with pytest.raises(ValueError, match="X: expected data that vmap does not batch, got shape"):
        torch.func.vmap(patterns, randomness="same")(torch.ones(2, 4, 3))
