"""Paths along weight decay.

Oracles: each network solved alone from zero over all gates; concavity and the slope of the optimal value.
"""

import itertools

import pytest
import torch
from torch import Tensor

from difflayers.relu import (
    FISTA,
    Hinge,
    InteriorPoint,
    Logistic,
    RegularizationPath,
    beta_max,
    convex_gated_relu,
    convex_relu,
    follow_path,
    predict,
    regularization_path,
    sample_gates,
)
from difflayers.relu._regularization_path import _Path


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y, S = normal(1, 20, 3), normal(2, 20), 0.2 + normal(3, 20).abs()
GATES = sample_gates(X, 40, generator=torch.Generator().manual_seed(0))
GRID = {"n_betas": 8, "smallest": 0.1}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("loss", [None, Logistic()])
def test_networks_are_those_of_cold_solves_over_all_gates(gated: bool, loss):
    y = Y.sign() if loss else Y
    path = regularization_path(X, y, gates=GATES, gated=gated, sample_weight=S, loss=loss, **GRID)
    solve = convex_gated_relu if gated else convex_relu
    assert path.neurons[0] == 0 and path.neurons[-1] > 3
    for beta, objective, penalty, one in zip(path.betas, path.objective, path.penalty, path.solutions, strict=True):
        cold = solve(X, y, beta, GATES, sample_weight=S, loss=loss)
        assert torch.isclose(objective, cold.objective, rtol=1e-8)
        assert torch.allclose(predict(one, X), predict(cold, X), atol=1e-7)
        assert float(one.gap) <= 1e-6 * float(objective)
        assert torch.equal(one.gates.patterns, GATES.patterns)
        norms = one.v.norm(dim=-1).sum() + (0 if gated else one.w.norm(dim=-1).sum())
        assert torch.isclose(penalty, norms)


def test_optimal_value_is_concave_with_the_penalty_as_slope():
    path = regularization_path(X, Y, gates=GATES, sample_weight=S, n_betas=40, smallest=0.01)
    rises = -path.objective.diff() / -path.betas.diff()
    assert bool((rises >= 0).all()) and bool((rises.diff() >= -1e-12).all())
    # chords of a concave function lie between the slopes at their ends
    assert bool((path.penalty[:-1] <= rises + 1e-9).all()) and bool((rises <= path.penalty[1:] + 1e-9).all())
    for k in (10, 25):
        beta, h = float(path.betas[k]), 1e-5
        ends = [convex_gated_relu(X, Y, beta + e, GATES, sample_weight=S).objective for e in (h, -h)]
        assert float((ends[0] - ends[1]) / (2 * h)) == pytest.approx(float(path.penalty[k]), rel=1e-6)


@pytest.mark.parametrize("gated", [True, False])
def test_grid_begins_where_the_network_becomes_zero(gated: bool):
    top = float(regularization_path(X, Y, gates=GATES, gated=gated, n_betas=2, smallest=0.5).betas[0])
    solve = convex_gated_relu if gated else convex_relu
    assert not bool(solve(X, Y, 1.001 * top, GATES).v.any())
    below = solve(X, Y, 0.99 * top, GATES)
    assert bool(below.v.any()) or bool(below.w.any())
    assert top <= float(beta_max(X, Y, GATES)) * (1 + 1e-12) or not gated


def test_screening_leaves_gates_out():
    options = {"gates": GATES, "n_betas": 25, "smallest": 0.2}
    every = list(follow_path(X, Y, screening=False, **options))
    screened = list(follow_path(X, Y, **options))
    assert {point.gates for point in every} == {40}
    assert sum(point.gates for point in screened) < 0.7 * sum(point.gates for point in every)

    for a, b in zip(screened, every, strict=True):
        assert torch.isclose(a.solution.objective, b.solution.objective, rtol=1e-8)
        assert torch.allclose(predict(a.solution, X), predict(b.solution, X), atol=1e-7)


@pytest.mark.parametrize("gated", [True, False])
def test_gates_left_out_wrongly_come_back(monkeypatch: pytest.MonkeyPatch, gated: bool):
    def too_strong(self: _Path, solution, beta: Tensor, before: Tensor) -> Tensor:
        return torch.arange(40) == 0

    options = {"gates": GATES, "gated": gated, "n_betas": 4, "smallest": 0.1}
    every = regularization_path(X, Y, screening=False, **options)
    monkeypatch.setattr(_Path, "strong", too_strong)
    found = regularization_path(X, Y, **options)
    assert torch.allclose(found.objective, every.objective, rtol=1e-8)
    for a, b in zip(found.solutions, every.solutions, strict=True):
        assert torch.allclose(predict(a, X), predict(b, X), atol=1e-7)
        assert float(a.gap) <= 1e-6 * float(a.objective)


def test_an_interrupted_path_goes_on():
    whole = regularization_path(X, Y, gates=GATES, **GRID)
    first = list(itertools.islice(follow_path(X, Y, gates=GATES, **GRID), 5))
    rest = list(follow_path(X, Y, gates=GATES, start=first[-1], **GRID))
    both = RegularizationPath.of([*first, *rest])
    assert torch.equal(both.betas, whole.betas)
    assert torch.allclose(both.objective, whole.objective, rtol=1e-9)
    assert torch.equal(both.neurons, whole.neurons)


def test_betas_of_any_order_and_far_above_the_largest():
    path = regularization_path(X, Y, [0.3, 1e4, 3.0], gates=GATES)
    assert path.betas.tolist() == [1e4, 3.0, 0.3]
    assert path.neurons[0] == 0
    for beta, objective in zip(path.betas, path.objective, strict=True):
        assert torch.isclose(objective, convex_gated_relu(X, Y, beta, GATES).objective, rtol=1e-8)


def test_gradients_flow_to_the_data():
    y = Y.clone().requires_grad_()
    path = regularization_path(X, y, [2.0, 0.5], gates=GATES)
    for one in path.solutions:
        (g,) = torch.autograd.grad(one.objective, y, retain_graph=True)
        assert torch.allclose(g, (y - predict(one, X)).detach(), atol=1e-8)
    weights = normal(5, 40, 3)
    (g,) = torch.autograd.grad((path.solutions[1].v * weights).sum(), y)
    twin = Y.clone().requires_grad_()
    (expected,) = torch.autograd.grad((convex_gated_relu(X, twin, 0.5, GATES).v * weights).sum(), twin)
    assert torch.allclose(g, expected, atol=1e-7)


def test_single_precision():
    path = regularization_path(X.float(), Y.float(), gates=GATES.vectors.float(), **GRID)
    wide = regularization_path(X, Y, gates=GATES, **GRID)
    assert path.objective.dtype == torch.float32
    assert torch.allclose(path.objective.double(), wide.objective, rtol=1e-4)


def test_labels_of_zero():
    path = regularization_path(X, 0 * Y, gates=GATES, **GRID)
    assert not bool(path.neurons.any()) and not bool(path.objective.any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": [1.0, 0.0]}, "betas: expected numbers more than 0"),
        ({"betas": torch.ones(2, 2, dtype=torch.float64)}, "betas: expected numbers more than 0"),
        ({"n_betas": 1}, "n_betas: expected at least 2, got 1"),
        ({"smallest": 1.0}, r"smallest: expected a number in \(0, 1\), got 1"),
        ({"loss": Hinge()}, "screening: expected False for Hinge"),
        ({"solver": FISTA(), "gated": False}, "solver: expected one of ReLU networks, got FISTA"),
        ({"solver": InteriorPoint()}, "solver: expected one of gated networks, got InteriorPoint"),
        ({"X": X.expand(2, 20, 3)}, "X: expected 2 dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, message: str):
    given = {"X": X, "y": Y.sign(), "gates": GATES} | options
    with pytest.raises(ValueError, match=message):
        regularization_path(given.pop("X"), given.pop("y"), **given)
    with pytest.raises(ValueError, match="points: expected at least one"):
        RegularizationPath.of([])
