"""Pruning: optimal, and below what is optimal.

Oracles: least squares and non-negative least squares by scipy, every subset of neurons by brute force.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

from difflayers.relu import (
    ConvexReLUSolution,
    Gates,
    Hinge,
    Logistic,
    TwoLayerReLU,
    _approximate_pruning,
    convex_gated_relu,
    convex_relu,
    enumerate_gates,
    from_network,
    minimal_network,
    optimal_set,
    predict,
    prune_network,
    to_network,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y, S = normal(1, 12, 2), normal(2, 12), 0.2 + normal(3, 12).abs()
GATES = enumerate_gates(X)
BETA = 0.05
SCORES = ["norm", "fit", "gradient", "residual"]
SOLVERS = [convex_gated_relu, convex_relu]
ANGLES = torch.arange(5, dtype=torch.float64) * 2 * math.pi / 5
PENTAGON = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def both(solution: ConvexReLUSolution) -> Tensor:
    return solution.v if solution.w is None else torch.cat([solution.v, solution.w])


def active(solution: ConvexReLUSolution) -> list[int]:
    return (both(solution) != 0).any(-1).nonzero().squeeze(-1).tolist()


def columns(solution: ConvexReLUSolution, data: Tensor) -> np.ndarray:
    """Contributions of the active neurons, from their definition."""
    M = (data @ solution.gates.vectors.mT >= 0).double()
    parts = [M * (data @ solution.v.mT)] + ([] if solution.w is None else [-M * (data @ solution.w.mT)])
    return torch.cat(parts, 1)[:, active(solution)].numpy()


# -------------------------------------------------------------------------------------------------------- below minimal


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("weights", [None, S])
def test_correction_gives_the_nearest_fit_that_rescaling_reaches(solve, score: str, weights):
    best = solve(X, Y, BETA, GATES, sample_weight=weights)
    root = torch.ones_like(Y).numpy() if weights is None else weights.sqrt().numpy()
    Z, fit = columns(best, X) * root[:, None], predict(best, X).numpy() * root
    options = {"score": score, "sample_weight": weights}
    for neurons in range(len(active(best)) - 1, 0, -1):
        pruned = prune_network(best, X, Y, BETA, neurons=neurons, **options)
        plain = prune_network(best, X, Y, BETA, neurons=neurons, correct=False, **options)
        # as far as the best from all 2^a choices of neurons allows, and as near as those that were chosen reach
        distance = lambda one: float(np.linalg.norm(predict(one, X).numpy() * root - fit))  # noqa: E731
        subsets = itertools.combinations(range(Z.shape[1]), neurons)
        nearest = min(np.linalg.norm(Z[:, s] @ np.linalg.lstsq(Z[:, s], fit, rcond=None)[0] - fit) for s in subsets)
        assert distance(pruned) >= nearest - 1e-9
        chosen = columns(pruned, X) * root[:, None]
        reach = np.linalg.norm(chosen @ np.linalg.lstsq(chosen, fit, rcond=None)[0] - fit)
        assert distance(pruned) == pytest.approx(reach, abs=1e-9)
        # the neurons that stay without correction, corrected, fit no worse
        kept = columns(plain, X) * root[:, None]
        assert np.linalg.norm(kept @ np.linalg.lstsq(kept, fit, rcond=None)[0] - fit) <= distance(plain) + 1e-12
        assert len(active(plain)) == neurons and len(active(pruned)) <= neurons


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("score", SCORES)
def test_one_neuron_less_is_never_worse_with_correction(solve, score: str):
    for seed in range(6):
        y = normal(20 + seed, 12)
        best = solve(X, y, BETA, GATES)
        plain, corrected = (
            prune_network(best, X, y, BETA, neurons=len(active(best)) - 1, score=score, correct=correct)
            for correct in (False, True)
        )
        errors = [float((predict(one, X) - predict(best, X)).norm()) for one in (plain, corrected)]
        assert errors[1] <= errors[0] + 1e-12


def test_scores_are_what_they_say():
    best = convex_gated_relu(X, Y, BETA, GATES)
    on, Z = active(best), columns(best, X)
    nu = (Y - predict(best, X)).numpy()
    rest = [np.delete(Z, i, 1) for i in range(len(on))]
    scores = {
        "norm": best.v[on].norm(dim=-1).numpy(),
        "fit": np.linalg.norm(Z, axis=0),
        "gradient": np.abs(nu @ Z),
        "residual": [
            np.linalg.norm(r @ np.linalg.lstsq(r, z, rcond=None)[0] - z) for r, z in zip(rest, Z.T, strict=True)
        ],
    }
    for score, values in scores.items():
        pruned = prune_network(best, X, Y, BETA, neurons=len(on) - 1, score=score, correct=False)
        dropped = set(on) - set(active(pruned))
        if score == "gradient":  # beta times the norms, up to rounding
            assert np.allclose(values, BETA * scores["norm"])
        assert dropped == {on[int(np.argmin(values))]}


@pytest.mark.parametrize("loss", [None, Logistic()])
def test_relu_networks_stay_relu_networks(loss):
    y = Y.sign() if loss else Y
    best = convex_relu(X, y, 0.01, GATES, loss=loss)
    side = 2 * GATES.patterns.double() - 1
    for neurons in range(len(active(best)) + 1):
        pruned = prune_network(best, X, y, 0.01, neurons=neurons, loss=loss)
        assert pruned.w is not None
        for p in (pruned.v, pruned.w):
            assert float((side * (X @ p.mT)).amin()) >= -1e-9
        network = to_network(pruned)
        assert torch.allclose(network(X), predict(pruned, X), atol=1e-12)
        value = loss.value(network(X), y).sum() if loss else ((network(X) - y) ** 2).sum() / 2
        decay = sum((p**2).sum() for p in network.parameters()) * 0.01 / 2
        assert torch.isclose(pruned.objective, value + decay)
        assert pruned.objective >= best.objective * (1 - 1e-9)
        assert float(pruned.gap) >= float(pruned.objective - best.objective) - 1e-9


def test_a_scale_below_zero_turns_the_output_of_a_relu_neuron(monkeypatch: pytest.MonkeyPatch):
    """Of ``(x^T p)_+ - (x^T (2 p + e))_+`` the second is dropped: what is left is about ``-(x^T p)_+``."""
    p, e = normal(8, 2), 1e-2 * normal(9, 2)
    given = from_network(TwoLayerReLU(torch.stack([p, 2 * p + e]), torch.tensor([1.0, -1.0]).double()), X, Y, BETA)
    monkeypatch.setattr(_approximate_pruning, "_scores", lambda *_: torch.tensor([1.0, 0.0]))
    pruned = prune_network(given, X, Y, BETA, neurons=1)
    assert pruned.w is not None and not bool(pruned.v.any())
    fit = predict(given, X)
    one = (X @ p).relu()
    nearest = one * (one @ fit) / (one @ one)
    assert torch.allclose(predict(pruned, X), nearest, atol=1e-12)
    assert float((nearest - fit).norm()) < 0.05 * float(fit.norm())


def test_nothing_is_left_of_a_network_without_neurons():
    best = convex_gated_relu(X, Y, BETA, GATES)
    empty = prune_network(best, X, Y, BETA, neurons=0)
    assert not bool(empty.v.any())
    assert torch.isclose(empty.objective, (Y**2).sum() / 2)


# -------------------------------------------------------------------------------------------------- at or above minimal


def crowded(solve) -> tuple[ConvexReLUSolution, Tensor, Tensor]:
    """An optimal network with many more neurons than needed."""
    if solve is convex_relu:
        data, y = PENTAGON, torch.ones(5, dtype=torch.float64)
        best = convex_relu(data, y, BETA, enumerate_gates(data))
    else:
        data, y = X, Y
        best = convex_gated_relu(data, y, BETA, normal(7, 150, 2))
    return optimal_set(best, data, y, BETA).center(), data, y


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("correct", [True, False])
def test_pruning_costs_nothing_until_the_network_is_minimal(solve, correct: bool):
    loose, data, y = crowded(solve)
    least = len(active(minimal_network(loose, data)))
    assert len(active(loose)) > least
    for neurons in range(least, len(active(loose)) + 2):
        pruned = prune_network(loose, data, y, BETA, neurons=neurons, correct=correct)
        assert len(active(pruned)) <= neurons
        assert torch.isclose(pruned.objective, loose.objective, rtol=1e-9)
        assert torch.allclose(predict(pruned, data), predict(loose, data), atol=1e-8)
    below = prune_network(loose, data, y, BETA, neurons=least - 1, correct=correct)
    assert float(below.objective) > float(loose.objective) * (1 + 1e-6)


@pytest.mark.parametrize("solve", SOLVERS)
def test_networks_that_are_small_enough_come_back_as_they_are(solve):
    best = solve(X, Y, BETA, GATES)
    assert torch.equal(both(prune_network(best, X, Y, BETA, neurons=100)), both(best))


# ---------------------------------------------------------------------------------------------------------- brute force


def smallest_subset(Z: np.ndarray, fit: np.ndarray) -> int:
    """How many columns a non-negative combination needs to give the fit."""
    for size in range(Z.shape[1] + 1):
        for subset in itertools.combinations(range(Z.shape[1]), size):
            left = nnls(Z[:, subset], fit)[1] if size else np.linalg.norm(fit)
            if left < 1e-9 * np.linalg.norm(fit):
                return size
    raise AssertionError("the columns do not give the fit")


@pytest.mark.parametrize("solve", SOLVERS)
def test_minimal_networks_cannot_lose_a_neuron(solve):
    loose, data, _ = crowded(solve)
    minimal = minimal_network(loose, data)
    Z = columns(minimal, data)
    assert smallest_subset(Z, predict(minimal, data).numpy()) == Z.shape[1] < len(active(loose))


@pytest.mark.parametrize("solve", SOLVERS)
def test_no_optimal_network_in_general_position_is_smaller(solve):
    """All optimal networks at once: every subset of the neurons that may be active in one of them."""
    for seed in range(4):
        data, y, beta = normal(30 + seed, 5, 2), normal(40 + seed, 5), 0.1
        gates = enumerate_gates(data)
        best = solve(data, y, beta, gates)
        networks = optimal_set(best, data, y, beta)
        units = torch.eye(len(networks.blocks), dtype=torch.float64)
        ones = [networks.network(unit) for unit in units]
        Z = np.concatenate([columns(one, data) for one in ones], 1)
        minimal = minimal_network(networks.center(), data)
        assert len(active(minimal)) == smallest_subset(Z, predict(best, data).numpy())


def test_in_special_position_minimal_is_not_smallest():
    """Corners of the set for a pentagon have four or five neurons: dropping none is possible in either."""
    loose, data, y = crowded(convex_relu)
    corners = optimal_set(loose, data, y, BETA).extreme_points(20, generator=torch.Generator().manual_seed(0))
    assert {len(active(corner)) for corner in corners} == {4, 5}
    for corner in corners:
        assert smallest_subset(columns(corner, data), predict(corner, data).numpy()) == len(active(corner))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neurons": -1}, "neurons: expected at least 0, got -1"),
        ({"neurons": 1, "score": "size"}, "score: expected one of norm, fit, gradient, residual, got 'size'"),
        ({"neurons": 1, "loss": Hinge()}, "loss: expected a smooth loss"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, message: str):
    best = convex_gated_relu(X, Y, BETA, GATES)
    with pytest.raises(ValueError, match=message):
        prune_network(best, X, Y.sign(), BETA, **options)


def test_data_of_another_problem_are_refused():
    # a gap is a promise about the problem that the solution was trained on
    X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y, gates = X[:, 0].abs(), torch.randn(8, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = convex_relu(X, y, 0.1, gates)
    for changed in ((X, y, 0.2), (X, -y, 0.1), (X.flip(0), y, 0.1)):
        with pytest.raises(ValueError, match="solution: expected the one of this X, y, beta"):
            prune_network(found, *changed, neurons=1)


@pytest.mark.parametrize("seed", range(20))
def test_neurons_that_reach_zero_together_do_so_exactly(seed: int):
    """Four linear units with ``p_1 + p_2 = p_3 + p_4``: one pair can go, up to rounding that depends on the axes."""
    axes = torch.linalg.qr(normal(seed, 3, 3)).Q
    v = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 2]], dtype=torch.float64) @ axes
    gates = Gates(axes[:1].expand(4, 3), torch.ones(3, 4, dtype=torch.bool))
    zero = torch.zeros((), dtype=torch.float64)
    minimal = minimal_network(ConvexReLUSolution(v, None, zero, zero, gates), normal(seed + 100, 3, 3))
    assert len(active(minimal)) == 2
    torch.testing.assert_close(minimal.v.sum(0), v.sum(0), rtol=1e-10, atol=1e-10)
