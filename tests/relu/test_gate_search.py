"""Growing gates. Oracles: the optimum over all enumerated patterns, and the dual constraint on a fine grid."""

import math

import pytest
import torch
from torch import Tensor

from difflayers.relu import (
    Logistic,
    beta_max,
    convex_gated_relu,
    convex_relu,
    enumerate_gates,
    grow_gates,
    predict,
    sample_gates,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(seed: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    X = normal(seed, n, d)
    return X, torch.sin(2 * X[:, 0]) + X[:, -1].abs()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("logistic", [False, True], ids=["squared", "logistic"])
@pytest.mark.parametrize(("n", "d", "gated"), [(20, 2, False), (14, 3, False), (20, 2, True)])
def test_reaches_the_optimum_over_all_patterns(n: int, d: int, gated: bool, logistic: bool):
    X, y = data(n, n, d)
    y, loss = ((y - y.mean()).sign(), Logistic()) if logistic else (y, None)
    s, every = 0.5 + normal(1, n).abs(), enumerate_gates(X)
    beta = 0.03 * float(beta_max(X, y, every, sample_weight=s, loss=loss))
    first = sample_gates(X, 2, generator=generator())
    found = grow_gates(X, y, beta, first, sample_weight=s, loss=loss, gated=gated, generator=generator())
    best = (convex_gated_relu if gated else convex_relu)(X, y, beta, every, sample_weight=s, loss=loss)
    assert found.settled
    assert torch.isclose(found.network.objective, best.objective, rtol=1e-7)
    assert float(found.objectives[0]) > 1.01 * float(best.objective)
    assert (found.objectives.diff() <= 1e-8 * found.objectives[:-1]).all()
    assert torch.equal(found.objectives[-1], found.network.objective)
    # the given gates stay, all patterns differ, and not all were needed
    assert torch.equal(found.network.gates.vectors[:2], first.vectors)
    patterns = found.network.gates.patterns
    assert torch.unique(patterns, dim=1).shape[1] == patterns.shape[1] <= every.patterns.shape[1]
    if not gated:
        assert patterns.shape[1] < every.patterns.shape[1] / 2


def test_no_direction_violates_the_dual_constraint_afterwards():
    X, y = data(3, 30, 2)
    found = grow_gates(X, y, 0.3, sample_gates(X, 1, generator=generator()), generator=generator())
    nu = y - predict(found.network, X)
    angle = torch.linspace(0, 2 * math.pi, 20_001, dtype=torch.float64)
    heights = nu @ (X @ torch.stack([angle.cos(), angle.sin()])).relu()
    assert float(heights.abs().max()) <= 0.3 * (1 + 1e-5)
    assert float(heights.abs().max()) >= 0.3 * (1 - 1e-3)


def test_objective_falls_by_rounds_and_the_limit_is_reported():
    X, y = data(4, 40, 3)
    first = sample_gates(X, 1, generator=generator())
    short = grow_gates(X, y, 0.1, first, rounds=2, most=3, generator=generator())
    assert not short.settled and len(short.objectives) == 3
    assert short.network.gates.vectors.shape[0] <= 7
    assert (short.objectives.diff() < 0).all()
    longer = grow_gates(X, y, 0.1, first, rounds=4, most=3, generator=generator())
    assert torch.allclose(longer.objectives[:3], short.objectives, rtol=1e-12)
    assert longer.objectives[-1] < short.objectives[-1]


def test_nothing_is_added_to_all_patterns_or_above_the_largest_beta():
    X, y = data(5, 10, 2)
    every = enumerate_gates(X)
    done = grow_gates(X, y, 0.1, every, generator=generator())
    assert done.settled and len(done.objectives) == 1
    one = every.vectors[:1]
    zero = grow_gates(X, y, 1.001 * beta_max(X, y, every), one, generator=generator())
    assert zero.settled and zero.network.gates.vectors.shape == (1, 2) and not zero.network.v.any()


def test_vectors_are_strictly_inside_their_cells():
    X, y = data(6, 25, 3)
    found = grow_gates(X, y, 0.05, X[:1], rounds=3, generator=generator())
    vectors = found.network.gates.vectors[1:]
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(len(vectors), dtype=torch.float64))
    sines = (X / X.norm(dim=-1, keepdim=True)) @ vectors.mT
    assert float(sines.abs().min()) > 1e-6


def test_hostile_data_and_derivative():
    X, y = data(7, 12, 2)
    X[0], X[1] = 0, X[2]
    y.requires_grad_()
    found = grow_gates(X, y, 0.1, X.new_tensor([[1.0, 0.0]]), generator=generator())
    every = enumerate_gates(X)
    best = convex_relu(X, y, 0.1, every)
    assert torch.isclose(found.network.objective, best.objective, rtol=1e-7)
    a, b = (torch.autograd.grad(one.objective, y)[0] for one in (found.network, best))
    assert torch.allclose(a, b, atol=1e-4)
    single = grow_gates(X.float(), y.detach().float(), 0.1, X.new_tensor([[1.0, 0.0]]).float(), generator=generator())
    assert single.network.v.dtype == torch.float32
    assert torch.isclose(single.network.objective.double(), best.objective.detach(), rtol=1e-4)


def test_bad_input_is_named():
    X, y = data(8, 6, 2)
    with pytest.raises(ValueError, match=r"X: expected shape \(n, d\), got \(1, 6, 2\)"):
        grow_gates(X[None], y, 0.1, X[:1])
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        grow_gates(X, y, 0.1, X[:1], rounds=0)
    with pytest.raises(ValueError, match="rtol: expected more than 0, got 0"):
        grow_gates(X, y, 0.1, X[:1], rtol=0)
    with pytest.raises(ValueError, match="beta: expected more than 0, got 0"):
        grow_gates(X, y, 0.0, X[:1])
