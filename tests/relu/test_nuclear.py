"""Gated ReLU networks with vector outputs.

Oracles: CVXPY's nuclear norm with Clarabel for objective and fit; the scalar layer for one output and for labels of
rank one; a closed form for one gate with orthonormal data; central differences of the solved problem for derivatives;
descent on the ordinary network's own decayed loss for what the optimum is an optimum of.
"""

import copy
import pickle
import warnings

import cvxpy as cp
import pytest
import torch
from torch import Tensor

from difflayers import SolveWarning, Status
from difflayers.proximal import prox_nuclear
from difflayers.relu import (
    FISTA,
    VectorGatedReLU,
    beta_max_vector,
    convex_gated_relu,
    convex_gated_relu_vector,
    convex_gated_relu_vector_ex,
    enumerate_gates,
    predict,
    predict_vector,
    sample_gates,
    to_network_vector,
)
from difflayers.relu._nuclear_solver import prune
from difflayers.relu._nuclear_task import NuclearTask, ranks


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y, WEIGHTS = normal(1, 12, 3), normal(2, 12, 2), 0.5 + normal(3, 12).abs()
GATES = sample_gates(X, 8, generator=torch.Generator().manual_seed(4))
MOST = float(beta_max_vector(X, Y, GATES, sample_weight=WEIGHTS))


def clarabel(X: Tensor, Y: Tensor, beta: float, gates: Tensor, weights: Tensor) -> tuple[float, Tensor]:
    """The optimal value and the fit, which is unique."""
    masks = (X @ gates.mT >= 0).double()
    U = [cp.Variable((X.shape[1], Y.shape[1])) for _ in range(masks.shape[1])]
    fit = sum((masks[:, i : i + 1] * X).numpy() @ u for i, u in enumerate(U))
    loss = cp.sum_squares(cp.multiply(weights.sqrt().unsqueeze(-1).numpy(), fit - Y.numpy())) / 2
    problem = cp.Problem(cp.Minimize(loss + beta * sum(cp.normNuc(u) for u in U)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an accuracy that it may just miss
        problem.solve(solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    return problem.value, torch.from_numpy(fit.value)


@pytest.mark.parametrize("share", [0.7, 0.1, 0.01])
def test_equals_a_conic_solver(share: float):
    best = convex_gated_relu_vector(X, Y, share * MOST, GATES, sample_weight=WEIGHTS)
    value, fit = clarabel(X, Y, share * MOST, GATES.vectors, WEIGHTS)
    assert float(best.objective) == pytest.approx(value, rel=1e-8)
    assert torch.allclose(predict_vector(best, X), fit, atol=1e-5)
    assert 0 <= float(best.gap) <= 1e-11 * value


def test_equals_a_conic_solver_with_more_outputs_than_inputs_and_all_gates():
    X, Y = normal(5, 7, 2), normal(6, 7, 4)
    gates = enumerate_gates(X)
    best = convex_gated_relu_vector(X, Y, 0.3, gates)
    value, fit = clarabel(X, Y, 0.3, gates.vectors, torch.ones(7, dtype=torch.float64))
    assert float(best.objective) == pytest.approx(value, rel=1e-8)
    assert torch.allclose(predict_vector(best, X), fit, atol=1e-5)


def test_gap_is_a_bound_at_any_point():
    """A solver stopped early reports a gap that reaches below the optimum."""
    optimum = float(convex_gated_relu_vector(X, Y, 0.05 * MOST, GATES).objective)
    for steps in (1, 3, 10, 30):
        early = convex_gated_relu_vector_ex(X, Y, 0.05 * MOST, GATES, solver=FISTA(max_steps=steps)).value
        assert float(early.objective) >= optimum * (1 - 1e-12)
        assert float(early.objective - early.gap) <= optimum * (1 + 1e-12)


def test_one_output_is_the_scalar_layer():
    y = Y[:, :1].clone().requires_grad_()
    data = X.clone().requires_grad_()
    for beta in (0.5, 0.05):
        vector = convex_gated_relu_vector(data, y, beta, GATES, sample_weight=WEIGHTS)
        scalar = convex_gated_relu(data, y.squeeze(-1), beta, GATES, sample_weight=WEIGHTS)
        assert torch.allclose(vector.neurons.squeeze(-1), scalar.v, rtol=0, atol=1e-9)
        assert torch.allclose(vector.objective, scalar.objective, rtol=1e-12)
        got = torch.autograd.grad(vector.neurons.sin().sum(), [data, y])
        expected = torch.autograd.grad(scalar.v.sin().sum(), [data, y])
        assert all(torch.allclose(g, e, atol=1e-8) for g, e in zip(got, expected, strict=True))


def test_labels_of_rank_one_are_scalar_labels():
    """Y = y b^T with a unit b is trained as y: U_i = u_i b^T."""
    b = torch.tensor([0.6, 0.8], dtype=torch.float64)
    y = Y[:, 0]
    vector = convex_gated_relu_vector(X, y.unsqueeze(-1) * b, 0.2, GATES)
    scalar = convex_gated_relu(X, y, 0.2, GATES)
    assert torch.allclose(vector.neurons, scalar.v.unsqueeze(-1) * b, rtol=0, atol=1e-9)


def test_one_open_gate_on_orthonormal_data_is_a_soft_threshold():
    X = torch.linalg.qr(normal(7, 4, 3).abs() + torch.eye(4, 3, dtype=torch.float64)).Q
    gate = torch.linalg.pinv(X) @ torch.ones(4, 1, dtype=torch.float64)  # open on the first three at least
    X = X * (X @ gate).sign()
    Q, Y = torch.linalg.qr(X).Q, normal(8, 4, 3)
    X = Q * (Q @ (Q.mT @ torch.ones(4, 1, dtype=torch.float64))).sign()
    best = convex_gated_relu_vector(X, Y, 0.4, (X.mT @ torch.ones(4, 1, dtype=torch.float64)).mT)
    assert bool(best.gates.patterns.all())
    assert torch.allclose(best.neurons[0], prox_nuclear(X.mT @ Y, 0.4), rtol=0, atol=1e-12)


def test_the_ordinary_network_predicts_and_costs_the_same():
    best = convex_gated_relu_vector(X, Y, 0.1, GATES)
    network = to_network_vector(best)
    query = normal(9, 30, 3)
    assert torch.allclose(network(query), predict_vector(best, query), atol=1e-12)
    decayed = ((network(X) - Y) ** 2).sum() / 2 + 0.1 / 2 * sum((p**2).sum() for p in network.parameters())
    assert torch.isclose(decayed, best.objective, rtol=1e-12)
    assert "units=" in repr(network)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(query), network(query))


def test_no_descent_is_better():
    best = float(convex_gated_relu_vector(X, Y, 0.3, GATES).objective)
    found = []
    for seed in range(3):
        gates = GATES.vectors.repeat(2, 1)
        network = VectorGatedReLU(gates, 0.5 * normal(10 + seed, 16, 3), 0.5 * normal(20 + seed, 16, 2))
        optimiser = torch.optim.LBFGS(network.parameters(), max_iter=300, line_search_fn="strong_wolfe")

        def loss(network: VectorGatedReLU = network) -> Tensor:
            decay = sum((p**2).sum() for p in network.parameters())
            return ((network(X) - Y) ** 2).sum() / 2 + 0.3 / 2 * decay

        def closure(network: VectorGatedReLU = network, optimiser: torch.optim.Optimizer = optimiser) -> Tensor:
            optimiser.zero_grad()
            value = loss(network)
            value.backward()
            return value

        optimiser.step(closure)
        found.append(float(loss(network).detach()))
    assert best * (1 - 1e-9) <= min(found) <= best * 1.01


def test_shared_units_cost_less_than_neurons_of_every_output():
    together = convex_gated_relu_vector(X, Y, 0.3, GATES).objective
    apart = convex_gated_relu(X, Y.mT, 0.3, GATES).objective.sum()
    assert together < apart


# ---------------------------------------------------------------------------------------------------------- derivatives


def fit_of(X: Tensor, Y: Tensor, s: Tensor, beta: Tensor) -> Tensor:
    return predict_vector(convex_gated_relu_vector(X, Y, beta, GATES, sample_weight=s), X)


@pytest.mark.parametrize("beta", [0.5, 0.05])
def test_derivatives_are_central_differences(beta: float):
    point = [X, Y, WEIGHTS, torch.tensor(beta, dtype=torch.float64)]
    data = [t.clone().requires_grad_() for t in point]
    way, h = [normal(30 + i, *t.shape) for i, t in enumerate(point)], 1e-6 * beta
    cotangent = normal(40, *Y.shape)
    grads = torch.autograd.grad((fit_of(*data) * cotangent).sum(), data)
    for i in range(4):
        ends = [
            (fit_of(*(t + sign * h * w if j == i else t for j, (t, w) in enumerate(zip(point, way, strict=True)))))
            for sign in (1, -1)
        ]
        expected = ((ends[0] - ends[1]) * cotangent).sum() / (2 * h)
        assert torch.isclose((grads[i] * way[i]).sum(), expected, rtol=1e-5, atol=1e-6)


def test_second_derivatives_and_forward_mode():
    x, y, beta = X[:5].clone().requires_grad_(), Y[:5].clone().requires_grad_(), torch.tensor(0.3).double()

    def neurons(x: Tensor, y: Tensor) -> Tensor:
        return convex_gated_relu_vector(x, y, beta, GATES.vectors[:4]).neurons

    assert torch.autograd.gradcheck(neurons, (x, y), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(neurons, (x, y), fast_mode=True)


def test_the_fit_moves_with_labels_as_a_symmetric_contraction():
    J = torch.func.jacrev(lambda y: predict_vector(convex_gated_relu_vector(X, y, 0.2, GATES), X))(Y).reshape(24, 24)
    assert torch.allclose(J, J.mT, atol=1e-9)
    values = torch.linalg.eigvalsh((J + J.mT) / 2)
    assert float(values[0]) >= -1e-9 and float(values[-1]) <= 1 + 1e-9


def test_a_third_derivative_is_refused():
    y = Y.clone().requires_grad_()
    g = convex_gated_relu_vector(X, y, 0.2, GATES).neurons.sum()
    for _ in range(2):
        (g,) = torch.autograd.grad(g, y, create_graph=True)
        g = g.square().sum()
    with pytest.raises(RuntimeError, match="not of third"):
        torch.autograd.grad(g, y)


def test_envelope():
    """The value's gradient in beta is the penalty, in Y the weighted residual, in weights half its square."""
    data = [t.clone().requires_grad_() for t in (Y, WEIGHTS, torch.tensor(0.2).double())]
    best = convex_gated_relu_vector(X, data[0], data[2], GATES, sample_weight=data[1])
    g_y, g_s, g_beta = torch.autograd.grad(best.objective, data)
    rest = (Y - predict_vector(best, X)).detach()
    assert torch.allclose(g_y, WEIGHTS.unsqueeze(-1) * rest, atol=1e-12)
    assert torch.allclose(g_s, rest.square().sum(-1) / 2, atol=1e-12)
    assert torch.isclose(g_beta, torch.linalg.svdvals(best.neurons.detach()).sum(), rtol=1e-12)


# ----------------------------------------------------------------------------------------------------------- hard cases


def test_beta_max_is_where_the_network_vanishes():
    for share, zero in ((1 + 1e-9, True), (1 - 1e-6, False)):
        y, beta = Y.clone().requires_grad_(), torch.tensor(share * MOST, dtype=torch.float64, requires_grad=True)
        best = convex_gated_relu_vector(X, y, beta, GATES, sample_weight=WEIGHTS)
        assert bool((best.neurons == 0).all()) == zero
        grads = torch.autograd.grad(best.neurons.sum(), [y, beta])
        assert all(bool((g == 0).all()) == zero for g in grads)
        assert bool(best.gap <= 1e-12 * best.objective)


def test_equal_singular_values_have_a_derivative():
    """Orthonormal data with labels whose product has equal singular values: one block, Z^T Y = 2 I."""
    X = torch.eye(3, dtype=torch.float64)
    gate = torch.ones(1, 3, dtype=torch.float64)
    Y = (2 * torch.eye(3, dtype=torch.float64)).requires_grad_()
    best = convex_gated_relu_vector(X, Y, 0.5, gate).neurons
    assert torch.allclose(best[0], 1.5 * torch.eye(3, dtype=torch.float64), atol=1e-12)
    way = normal(50, 3, 3)
    got = torch.func.jvp(lambda y: convex_gated_relu_vector(X, y, 0.5, gate).neurons[0], (Y.detach(),), (way,))[1]
    expected = torch.func.jvp(lambda y: prox_nuclear(y, 0.5), (Y.detach(),), (way,))[1]
    assert torch.allclose(got, expected, atol=1e-10)


def test_repeated_gates_and_dependent_units_leave_a_minimal_network():
    """Twice the same gates: the optimum is no other, and still has a derivative."""
    once = convex_gated_relu_vector(X, Y, 0.1, GATES)
    vectors = GATES.vectors.repeat(2, 1)
    y = Y.clone().requires_grad_()
    twice = convex_gated_relu_vector(X, y, 0.1, vectors)
    assert torch.isclose(twice.objective, once.objective, rtol=1e-12)
    assert torch.allclose(predict_vector(twice, X), predict_vector(once, X), atol=1e-10)
    assert bool(torch.isfinite(torch.autograd.grad(twice.neurons.sum(), y)[0]).all())


def test_pruning_keeps_fit_and_penalty_of_an_optimum_and_lowers_ranks():
    """An optimum shared out between two copies of its gates, and more units than the data can tell apart."""
    best = convex_gated_relu_vector(X, Y, 0.1, GATES)
    M = best.gates.patterns.double()
    ones, beta = torch.ones(1, 12, dtype=torch.float64), torch.full((1,), 0.1, dtype=torch.float64)
    task = NuclearTask(X[None], torch.cat([M, M], 1)[None], Y[None], ones, beta)
    shared = torch.cat([0.3 * best.neurons, 0.7 * best.neurons])[None]
    pruned = prune(task, shared)
    assert torch.allclose(task.fit(pruned), task.fit(shared), atol=1e-10)
    assert torch.isclose(torch.linalg.svdvals(pruned).sum(), torch.linalg.svdvals(best.neurons).sum(), rtol=1e-10)
    assert int(ranks(pruned).sum()) == int(ranks(best.neurons).sum())
    few = NuclearTask(*(t[:, :3] for t in (task.X, task.M, task.Y, task.s)), beta)
    wild = normal(70, 1, 16, 3, 2)
    pruned = prune(few, wild)
    r = ranks(pruned)
    assert int((r * (r + 1) // 2).sum()) <= 6
    assert torch.allclose(few.fit(pruned), few.fit(wild), atol=1e-9)
    assert torch.linalg.svdvals(pruned).sum() < torch.linalg.svdvals(wild).sum()


def test_an_optimum_in_the_middle_of_others_is_pruned():
    """Gates that split the data in two and one open on all of it: X^T (Y - F) may be met in many ways."""
    x = torch.tensor([[1.0, 0.2], [1.0, -0.3], [-1.0, 0.1], [-1.0, -0.4]], dtype=torch.float64)
    gates = enumerate_gates(x)
    y = normal(51, 4, 2)
    y = y - x @ torch.linalg.lstsq(x, y).solution  # X^T Y = 0: the patterns of g and -g have opposite slopes
    leaf = y.clone().requires_grad_()
    best = convex_gated_relu_vector(x, leaf, 0.2, gates)
    active = torch.linalg.matrix_rank(best.neurons.detach())
    assert int((active * (active + 1) // 2).sum()) <= 8
    value, fit = clarabel(x, y, 0.2, gates.vectors, torch.ones(4, dtype=torch.float64))
    assert float(best.objective.detach()) == pytest.approx(value, rel=1e-8)
    assert torch.allclose(predict_vector(best, x), fit, atol=1e-5)
    assert bool(torch.isfinite(torch.autograd.grad(best.neurons.sum(), leaf)[0]).all())


def test_batches_equal_loops_whatever_their_ranks():
    beta = torch.tensor([2.0, 0.2, 0.02], dtype=torch.float64)
    together = convex_gated_relu_vector(X, Y, beta, GATES)
    for b, neurons in zip(beta, together.neurons, strict=True):
        assert torch.allclose(neurons, convex_gated_relu_vector(X, Y, b, GATES).neurons, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_scales(scale: float):
    plain = convex_gated_relu_vector(X, Y, 0.2, GATES).neurons
    labels = convex_gated_relu_vector(X, scale * Y, scale * 0.2, GATES).neurons
    assert torch.allclose(labels / scale, plain, atol=1e-9)
    data = convex_gated_relu_vector(scale * X, Y, scale * 0.2, GATES).neurons
    assert torch.allclose(data * scale, plain, atol=1e-9)


def test_small_beta_is_solved_or_reported():
    found = convex_gated_relu_vector_ex(X, Y, torch.tensor([1e-2, 1e-3, 1e-4]).double() * MOST, GATES)
    honest = found.residual < 1e-9
    assert torch.equal(honest, found.status == Status.CONVERGED)
    assert bool(honest[:2].all())


def test_warm_start_and_starving():
    best = convex_gated_relu_vector(X, Y, 0.1, GATES)
    warm = convex_gated_relu_vector_ex(X, Y, 0.101, GATES, warm_start=best)
    cold = convex_gated_relu_vector_ex(X, Y, 0.101, GATES)
    assert torch.allclose(warm.value.neurons, cold.value.neurons, atol=1e-10)
    with pytest.warns(SolveWarning, match="convex_gated_relu_vector"):
        convex_gated_relu_vector(X, Y, 0.1, GATES, solver=FISTA(max_steps=2))


def test_float32_stays_and_is_right():
    best = convex_gated_relu_vector(X.float(), Y.float(), 0.1, GATES.vectors.float())
    assert best.neurons.dtype == best.objective.dtype == best.gap.dtype == torch.float32
    assert torch.allclose(best.neurons.double(), convex_gated_relu_vector(X, Y, 0.1, GATES).neurons, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: convex_gated_relu_vector(X, Y[:5], 0.1, GATES),
            r"Y: expected shape \(12,\) in its last dimension but",
        ),
        (lambda: convex_gated_relu_vector(X, Y[:, :0], 0.1, GATES), "Y: expected at least one output"),
        (lambda: convex_gated_relu_vector(X, Y, 0.0, GATES), "beta: expected more than 0, got 0"),
        (lambda: convex_gated_relu_vector(X, Y.float(), 0.1, GATES), "Y: expected dtype"),
        (lambda: convex_gated_relu_vector(X, Y, 0.1, GATES, solver=3), r"solver: expected FISTA\(\)"),
        (lambda: convex_gated_relu_vector(X * torch.nan, Y, 0.1, GATES), "X: expected finite numbers"),
        (
            lambda: convex_gated_relu_vector(
                X, Y, 0.1, GATES, warm_start=convex_gated_relu_vector(X, Y, 0.1, GATES.vectors[:3])
            ),
            r"warm_start: expected shape \(8, 3, 2\)",
        ),
        (lambda: predict_vector(convex_gated_relu_vector(X, Y, 0.1, GATES), normal(0, 3, 5)), "X: expected 3 columns"),
        (lambda: to_network_vector(convex_gated_relu_vector(X, Y.expand(2, 12, 2), 0.1, GATES)), "one network"),
        (
            lambda: VectorGatedReLU(normal(0, 2, 3), normal(0, 2, 3), normal(0, 3, 2)),
            r"output: expected shape \(2, c\)",
        ),
        (lambda: VectorGatedReLU(normal(0, 2, 2), normal(0, 2, 3), normal(0, 2, 2)), r"gates: expected shape \(2, 3\)"),
        (lambda: to_network_vector(convex_gated_relu_vector(X, Y, 0.1, GATES))(normal(0, 4)), "x: expected 3 entries"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_output_of_the_scalar_layer_predicts_the_same():
    one = convex_gated_relu_vector(X, Y[:, :1], 0.2, GATES)
    query = normal(60, 10, 3)
    expected = predict(convex_gated_relu(X, Y[:, 0], 0.2, GATES), query)
    assert torch.allclose(predict_vector(one, query).squeeze(-1), expected, atol=1e-9)
