"""Derivatives of a trained network in weight decay and labels.

Oracles: central differences of networks trained again; autograd through the layer; properties of hat matrices.
"""

import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from difflayers.relu import (
    ConvexReLUSolution,
    Hinge,
    Logistic,
    convex_gated_relu,
    convex_relu,
    optimal_set,
    predict,
    sample_gates,
    sensitivity,
)
from difflayers.relu._losses import Huber


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y, S = normal(1, 10, 3), normal(2, 10), 0.3 + normal(3, 10).abs()
GATES = sample_gates(X, 14, generator=torch.Generator().manual_seed(0))  # of all, optimal networks are not unique
BETA = torch.tensor(0.2, dtype=torch.float64)
SOLVERS = [convex_gated_relu, convex_relu]


def neurons(solution: ConvexReLUSolution) -> Tensor:
    return solution.v if solution.w is None else torch.cat([solution.v, solution.w])


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("loss", [None, Logistic(), Huber(0.5)])
def test_derivatives_are_differences_of_networks_trained_again(solve, loss):
    y, h = Y * 1.5 if loss is None else Y.sign() + 0.2 * Y, 1e-6

    def train(y: Tensor, beta: Tensor) -> ConvexReLUSolution:
        return solve(X, y, beta, GATES, sample_weight=S, loss=loss)

    best = train(y, BETA)
    moves = sensitivity(best, X, y, BETA, sample_weight=S, loss=loss)
    assert int((neurons(best) != 0).any(-1).sum()) >= 2 and float(best.margin) > 1e-5
    by_beta = moves.v_by_beta if moves.w_by_beta is None else torch.cat([moves.v_by_beta, moves.w_by_beta])
    by_label = moves.v_by_label if moves.w_by_label is None else torch.cat([moves.v_by_label, moves.w_by_label])
    up, down = train(y, BETA + h), train(y, BETA - h)
    assert torch.allclose(by_beta, (neurons(up) - neurons(down)) / (2 * h), atol=1e-6)
    assert torch.allclose(moves.fit_by_beta, (predict(up, X) - predict(down, X)) / (2 * h), atol=1e-6)
    for k in range(0, len(y), 3):
        step = torch.zeros_like(y).index_fill(0, torch.tensor(k), h)
        up, down = train(y + step, BETA), train(y - step, BETA)
        assert torch.allclose(by_label[..., k], (neurons(up) - neurons(down)) / (2 * h), atol=1e-6)
        assert torch.allclose(moves.fit_by_label[:, k], (predict(up, X) - predict(down, X)) / (2 * h), atol=1e-6)


@pytest.mark.parametrize("solve", SOLVERS)
def test_derivatives_are_those_of_the_layer(solve):
    def fit(y: Tensor, beta: Tensor) -> Tensor:
        return predict(solve(X, y, beta, GATES, sample_weight=S), X)

    moves = sensitivity(solve(X, Y, BETA, GATES, sample_weight=S), X, Y, BETA, sample_weight=S)
    by_label, by_beta = jacrev(fit, (0, 1))(Y, BETA)
    assert torch.allclose(moves.fit_by_label, by_label, atol=1e-9)
    assert torch.allclose(moves.fit_by_beta, by_beta, atol=1e-9)


@pytest.mark.parametrize("solve", SOLVERS)
def test_hat_matrix(solve):
    moves = sensitivity(solve(X, Y, BETA, GATES), X, Y, BETA)
    assert torch.allclose(moves.hat_matrix, moves.hat_matrix.mT, atol=1e-10)
    values = torch.linalg.eigvalsh(moves.hat_matrix)
    assert float(values.min()) > -1e-10 and float(values.max()) < 1 + 1e-10
    assert torch.equal(moves.hat_matrix, moves.fit_by_label)
    assert torch.equal(moves.leverage, moves.hat_matrix.diagonal())
    assert torch.isclose(moves.degrees_of_freedom, values.sum())
    tight = sensitivity(solve(X, Y, 1e-4, GATES), X, Y, 1e-4)
    assert tight.degrees_of_freedom > moves.degrees_of_freedom > 0


def test_degrees_of_freedom_of_other_losses_count_parameters():
    y = Y.sign()
    moves = sensitivity(convex_gated_relu(X, y, BETA, GATES, loss=Logistic()), X, y, BETA, loss=Logistic())
    values = torch.linalg.eigvals(moves.hat_matrix)
    assert float(values.imag.abs().max()) < 1e-10
    assert float(values.real.min()) > -1e-10 and float(values.real.max()) < 1 + 1e-10
    assert 0 < float(moves.degrees_of_freedom) < len(X)


def test_a_linear_problem_has_the_trace_of_ridge_like_shrinkage():
    """One gate, open everywhere, d = 1: ``u = (x^T y - beta) / x^T x``, the fit has one degree of freedom."""
    x, y, one = normal(5, 6, 1).abs(), normal(6, 6).abs(), torch.ones(1, 1, dtype=torch.float64)
    moves = sensitivity(convex_gated_relu(x, y, 0.1, one), x, y, 0.1)
    assert torch.allclose(moves.hat_matrix, x @ x.mT / (x * x).sum(), atol=1e-12)
    assert torch.allclose(moves.v_by_beta, -1 / (x * x).sum(), atol=1e-12)
    assert float(moves.degrees_of_freedom) == pytest.approx(1)


@pytest.mark.parametrize("solve", SOLVERS)
def test_zero_network_does_not_move(solve):
    moves = sensitivity(solve(X, Y, 1e3, GATES), X, Y, 1e3)
    assert all(not bool(t.any()) for t in moves if t is not None)


def test_single_precision():
    x, y = X.float(), Y.float()
    gates = GATES.vectors.float()
    moves = sensitivity(convex_gated_relu(x, y, 0.2, gates), x, y, 0.2)
    wide = sensitivity(convex_gated_relu(X, Y, 0.2, GATES), X, Y, 0.2)
    assert moves.hat_matrix.dtype == torch.float32
    assert torch.allclose(moves.hat_matrix.double(), wide.hat_matrix, atol=1e-3)


def test_what_does_not_fit_is_refused():
    best = convex_gated_relu(X, Y, BETA, normal(7, 200, 3))
    loose = optimal_set(best, X, Y, BETA).center()
    with pytest.raises(ValueError, match="solution: expected a minimal network"):
        sensitivity(loose, X, Y, BETA)
    with pytest.raises(ValueError, match="loss: expected a smooth loss"):
        sensitivity(best, X, Y.sign(), BETA, loss=Hinge())
    with pytest.raises(ValueError, match="X: expected 2 dimensions"):
        sensitivity(best, X.expand(2, 10, 3), Y, BETA)
