"""ReLU networks trained to the global optimum, and the derivatives of what they predict.

Oracles: cvxpy with Clarabel for the optimal value, over all patterns and over some; central differences of networks
trained again on moved data with their own patterns; the Jacobian of the optimality conditions by automatic
differentiation for the linear solve. ``test_relu_oracle.py`` holds an oracle in another language of arrays.
"""

import math
import warnings
from collections.abc import Callable

import cvxpy as cp
import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from difflayers import SolveWarning, Status
from difflayers.relu import (
    ADMM,
    AugmentedLagrangian,
    ConvexReLUHead,
    ConvexReLUSolution,
    Hinge,
    InteriorPoint,
    LInf,
    Logistic,
    Squared,
    beta_max,
    convex_gated_relu,
    convex_relu,
    convex_relu_ex,
    enumerate_gates,
    minimal_network,
    predict,
    robust_convex_relu,
    sample_gates,
    to_network,
)
from difflayers.relu import _relu_problem as problem_of_engine


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(seed: int, n: int, d: int, *, bias: bool = False, signs: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Data with a bend, labels, weights."""
    X = normal(seed, n, d)
    if bias:
        X = torch.cat([X[:, 1:], torch.ones(n, 1, dtype=X.dtype)], -1)
    y = torch.sin(2 * X[:, 0]) + X[:, -1].abs() + 0.3 * normal(seed + 1, n)
    return X, (y - y.mean()).sign() if signs else y, 0.5 + normal(seed + 2, n).abs()


def neurons(found: ConvexReLUSolution) -> Tensor:
    assert found.w is not None
    return torch.cat([found.v, found.w], -2)


def clarabel(X: Tensor, y: Tensor, s: Tensor, beta: float, M: Tensor, logistic: bool) -> float:
    mask, data = M.double().numpy(), X.numpy()
    v, w = (cp.Variable((M.shape[1], X.shape[1])) for _ in range(2))
    f = cp.sum(cp.multiply(mask, data @ (v - w).T), axis=1)
    each = cp.logistic(-cp.multiply(y.numpy(), f)) if logistic else cp.square(f - y.numpy()) / 2
    cells = [cp.multiply(2 * mask - 1, data @ u.T) >= 0 for u in (v, w)]
    norms = cp.sum(cp.norm(v, axis=1)) + cp.sum(cp.norm(w, axis=1))
    task = cp.Problem(cp.Minimize(s.numpy() @ each + beta * norms), cells)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    return float(task.value)


CASES = [
    # samples, inputs, sampled gates (None: all), beta over beta_max
    (8, 2, None, 0.1),
    (10, 2, None, 0.01),
    (7, 3, None, 0.02),
    (25, 4, 30, 0.05),
    (40, 3, 12, 0.3),
    (12, 2, 5, 0.95),
]


@pytest.mark.parametrize("logistic", [False, True], ids=["squared", "logistic"])
@pytest.mark.parametrize(("n", "d", "count", "fraction"), CASES)
def test_value_is_that_of_clarabel_and_of_the_network(
    n: int, d: int, count: int | None, fraction: float, logistic: bool
):
    X, y, s = data(n, n, d, signs=logistic)
    gates = enumerate_gates(X) if count is None else sample_gates(X, count, generator=torch.Generator().manual_seed(n))
    loss = Logistic() if logistic else Squared()
    beta = fraction * float(beta_max(X, y, gates, sample_weight=s, loss=loss))
    found = convex_relu(X, y, beta, gates, sample_weight=s, loss=loss)
    expected = clarabel(X, y, s, beta, gates.patterns, logistic)
    assert math.isclose(float(found.objective), expected, rel_tol=1e-7)
    assert 0 <= float(found.gap) <= 1e-9 * expected
    assert float(found.objective - found.gap) <= expected * (1 + 1e-9)
    sides = 2 * gates.patterns.double() - 1
    assert found.w is not None
    assert all(float((sides * (X @ u.mT)).amin()) >= -1e-12 for u in (found.v, found.w))
    # the network itself, on its own patterns, has this objective, with weight decay for the penalty
    network = to_network(found)
    f = predict(found, X)
    assert torch.allclose(network(X), f, atol=1e-12)
    each = torch.nn.functional.softplus(-y * f) if logistic else (f - y) ** 2 / 2
    decay = (network.weight.square().sum() + network.output.square().sum()) / 2
    assert torch.isclose((s * each).sum() + beta * decay, found.objective, rtol=1e-10)
    # never above its relaxation, and minimal
    gated = convex_gated_relu(X, y, beta, gates, sample_weight=s, loss=loss)
    assert float(gated.objective) <= expected * (1 + 1e-9)
    again = minimal_network(found, X)
    assert int((neurons(again) != 0).any(-1).sum()) == int((neurons(found) != 0).any(-1).sum()) <= n


def differences(fn: Callable[..., Tensor], inputs: list[Tensor], which: int, step: float) -> tuple[Tensor, float]:
    """A direction in one input, and the slope of `fn` along it, to fourth order."""
    direction = normal(100 + which, *inputs[which].shape)

    def at(t: float) -> float:
        moved = [a + t * step * direction if i == which else a for i, a in enumerate(inputs)]
        return float(fn(*moved))

    return direction, (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


@pytest.mark.parametrize(
    ("seed", "n", "d", "bias", "beta"),
    [(1, 6, 2, False, 0.1), (2, 6, 2, True, 0.1), (4, 6, 3, True, 0.2), (12, 12, 3, False, 1.0)],
)
def test_gradients_are_differences_of_networks_trained_again(seed: int, n: int, d: int, bias: bool, beta: float):
    X, y, s = data(seed, n, d, bias=bias)
    query, weights = normal(seed + 5, 5, d), normal(seed + 6, 5)

    def predicted(X: Tensor, y: Tensor, s: Tensor, beta: Tensor) -> Tensor:
        found = convex_relu(X, y, beta, enumerate_gates(X.detach()), sample_weight=s)
        return predict(found, query) @ weights

    def optimal(X: Tensor, y: Tensor, s: Tensor, beta: Tensor) -> Tensor:
        return convex_relu(X, y, beta, enumerate_gates(X.detach()), sample_weight=s).objective

    inputs = [t.requires_grad_() for t in (X, y, s, torch.tensor(beta, dtype=torch.float64))]
    found = convex_relu(X, y, inputs[3], enumerate_gates(X.detach()), sample_weight=s)
    on_kink = (X @ neurons(found).mT).abs() < 1e-12
    assert (on_kink & (neurons(found) != 0).any(-1)).any(), "the case is meant to have kinks on points"
    assert float(found.margin) > 1e-5  # type: ignore[arg-type]
    for fn, accuracy in ((predicted, 1e-6), (optimal, 1e-8)):
        gradients = torch.autograd.grad(fn(*inputs), inputs)
        plain = [t.detach() for t in inputs]
        for i, g in enumerate(gradients):
            direction, expected = differences(fn, plain, i, 1e-6 if fn is predicted else 1e-5)
            assert math.isclose(float((g * direction).sum()), expected, rel_tol=accuracy, abs_tol=accuracy)


@pytest.mark.parametrize(("n", "d"), [(40, 2), (8, 4)], ids=["the Hessian", "the saddle form"])
def test_linear_solve_inverts_the_jacobian_of_the_optimality_conditions(n: int, d: int):
    X, y, s = data(n, n, d)
    gates = sample_gates(X, 10, generator=torch.Generator().manual_seed(0))
    args = (X, y, s, torch.tensor(0.3, dtype=torch.float64), gates.patterns)
    value, info, factors = problem_of_engine._solve(Squared(), InteriorPoint(), *args)
    kinks = problem_of_engine.Neurons.of(value, d).kinks
    assert info.status == Status.CONVERGED
    assert kinks.any()
    used = factors[1]
    assert (int(used.sum()) * d <= n) == (n == 40)
    J = jacrev(lambda v: problem_of_engine._residual(Squared(), v, *args))(value)
    for transpose in (False, True):
        # inactive neurons do not move, and nothing depends on their part of a cotangent
        active = (value[:, :d] != 0).any(-1, keepdim=True)
        rhs = torch.where(active, normal(n, *value.shape), 0)
        x, solved = problem_of_engine._linear_solve(Squared(), value, args, factors, rhs, transpose)
        flat = J.reshape(value.numel(), value.numel())
        found = (flat.mT if transpose else flat) @ x.flatten()
        found = torch.where(active, found.reshape(value.shape), 0)
        assert torch.allclose(found, rhs, atol=1e-9)
        assert solved.status == Status.CONVERGED


def test_points_that_coincide_on_a_kink_share_its_multiplier():
    X, y, s = data(2, 6, 2, bias=True)
    found = convex_relu(X, y, 0.1, enumerate_gates(X), sample_weight=s)
    p = neurons(found)
    point, _ = ((X @ p.mT).abs() < 1e-12).logical_and((p != 0).any(-1)).nonzero()[0]
    # the point on the kink twice, with half the weight each: the same network, and the same derivative of both together
    twice = torch.cat([X, X[point : point + 1]]), torch.cat([y, y[point : point + 1]])
    half = s.clone()
    half[point] /= 2
    half = torch.cat([half, half[point : point + 1]])
    query = normal(5, 4, 2)

    def gradient(X: Tensor, y: Tensor, s: Tensor) -> Tensor:
        X = X.clone().requires_grad_()
        found = convex_relu(X, y, 0.1, enumerate_gates(X.detach()), sample_weight=s)
        return torch.autograd.grad(predict(found, query).sum(), X)[0]

    once, both = gradient(X, y, s), gradient(*twice, half)
    assert torch.allclose(both[point], both[-1], atol=1e-8)
    assert torch.allclose(both[point] + both[-1], once[point], atol=1e-8)


def test_fit_responds_to_labels_as_a_projection_would():
    X, y, _ = data(11, 12, 3, bias=True)
    gates = enumerate_gates(X)
    H = torch.autograd.functional.hessian(lambda y: convex_relu(X, y, 0.1, gates).objective, y)
    assert torch.allclose(H, H.mT, atol=1e-10)
    eigenvalues = torch.linalg.eigvalsh(H)
    assert float(eigenvalues.amin()) > -1e-9
    assert float(eigenvalues.amax()) < 1 + 1e-9
    assert 1 < float((1 - eigenvalues).sum()) < 12  # degrees of freedom


def test_elements_of_a_batch_have_their_own_neurons_and_kinks():
    X, y = normal(1, 5, 9, 2), normal(2, 5, 9)
    beta = torch.tensor([0.01, 0.1, 0.5, 2.0, 100.0], dtype=torch.float64)
    gates = normal(3, 7, 2)
    X.requires_grad_()
    found = convex_relu(X, y, beta, gates)
    active = (neurons(found) != 0).any(-1).sum(-1)
    assert active[-1] == 0
    assert len(set(active.tolist())) > 2
    weights = normal(4, *neurons(found).shape)
    (together,) = torch.autograd.grad((neurons(found) * weights).sum(), X)
    for i in range(5):
        alone = X[i].detach().requires_grad_()
        one = neurons(convex_relu(alone, y[i], beta[i], gates))
        assert torch.allclose(one, neurons(found)[i], atol=1e-10)
        assert torch.allclose(torch.autograd.grad((one * weights[i]).sum(), alone)[0], together[i], atol=1e-7)
    assert not together[-1].any()


def test_neurons_on_a_border_are_in_the_first_of_their_cells():
    # what the derivative of the array means must not depend on which neighbour a solver chose
    X, y, s = data(2, 6, 2, bias=True)
    gates = enumerate_gates(X)
    places = set()
    for step in (0.0, 1e-7, -1e-7, 1e-6):
        found = convex_relu(X + step * normal(3, 6, 2), y, 0.1, gates, sample_weight=s)
        places.add(tuple((neurons(found) != 0).any(-1).tolist()))
    assert len(places) == 1


@pytest.mark.parametrize("solver", [ADMM(penalty=1.0), AugmentedLagrangian()])
def test_first_order_solvers_find_the_network(solver: ADMM | AugmentedLagrangian):
    X, y, s = data(21, 8, 2)
    gates = enumerate_gates(X)
    exact, found = (convex_relu(X, y, 0.5, gates, sample_weight=s, solver=each) for each in (None, solver))
    if isinstance(solver, ADMM):  # its thousandth, made exact by Newton's method on the right neurons and kinks
        assert torch.allclose(neurons(found), neurons(exact), atol=1e-9)
        assert float(found.gap) < 1e-9
    else:
        assert math.isclose(float(found.objective), float(exact.objective), rel_tol=1e-3)
        assert float(found.objective - found.gap) <= float(exact.objective)
    warm = convex_relu_ex(X, y, 0.5, gates, sample_weight=s, solver=solver, warm_start=exact)
    cold = convex_relu_ex(X, y, 0.5, gates, sample_weight=s, solver=solver)
    assert warm.converged.all()
    assert int(warm.steps) <= int(cold.steps)


def test_a_solver_that_stops_early_says_so():
    X, y, s = data(21, 20, 3)
    gates = sample_gates(X, 12, generator=torch.Generator().manual_seed(1))
    with pytest.warns(SolveWarning, match="convex_relu"):
        found = convex_relu(X, y, 0.05, gates, sample_weight=s, solver=InteriorPoint(max_steps=3))
    best = float(convex_relu(X, y, 0.05, gates, sample_weight=s).objective)
    assert float(found.gap) > 1e-6
    assert float(found.objective - found.gap) <= best * (1 + 1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_head_without_gates_learns_its_weight_decay(bias: bool):
    X, y, _ = data(31, 10, 2)
    vectors = normal(32, 8, 3 if bias else 2)
    head = ConvexReLUHead(0.3, vectors, gated=False, learn_beta=True, bias=bias)
    query = normal(33, 4, 2)
    assert head.log_beta is not None
    (slope,) = torch.autograd.grad(head(X, y, query).sum(), head.log_beta)

    def at(beta: float) -> float:
        return float(ConvexReLUHead(beta, vectors, gated=False, bias=bias)(X, y, query).sum())

    expected = (at(0.3 * math.exp(1e-5)) - at(0.3 * math.exp(-1e-5))) / 2e-5
    assert math.isclose(float(slope), expected, rel_tol=1e-6, abs_tol=1e-8)
    assert "gated=False" in repr(head)


def test_what_is_no_solver_is_refused():
    X, y, _ = data(1, 5, 2)
    with pytest.raises(ValueError, match=r"solver: expected InteriorPoint\(\), ADMM\(\), .* got 'scs'"):
        convex_relu(X, y, 0.1, normal(2, 4, 2), solver="scs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="X: expected finite"):
        convex_relu(X * torch.nan, y, 0.1, normal(2, 4, 2))


def test_dependent_neurons_have_no_derivative():
    # two equal columns of activations can only come from a point that was not pruned: the solve says so
    X, y, s = data(2, 6, 2, bias=True)
    args = (X, y, s, torch.tensor(0.1, dtype=torch.float64), enumerate_gates(X).patterns)
    value, _, factors = problem_of_engine._solve(Squared(), InteriorPoint(), *args)
    doubled = value.clone()
    one = int((value[:, :2] != 0).any(-1).nonzero()[0])
    # its neighbour takes half of it
    index, used = problem_of_engine.active_blocks(value[:, :2])
    assert bool(used.any())
    assert one in index
    doubled[one] /= 2
    zero = (value[:, :2] == 0).all(-1).nonzero()[0]
    M = args[4].clone()
    M[:, int(zero) % M.shape[1]] = M[:, one % M.shape[1]]
    doubled[int(zero)] = doubled[one]
    problem = problem_of_engine.ConeProblem(X, y, s, args[3], M.double(), Squared())
    u = problem_of_engine.Neurons.of(doubled, 2)
    index, used = problem_of_engine.active_blocks(u.p)
    _, spoilt = problem_of_engine._factorise(Squared(), u, problem, index, used)
    assert bool(spoilt.singular)
    assert not bool(problem_of_engine.hessian.Factors(*factors[3:]).singular)


@pytest.mark.parametrize("loss", [Squared(), Logistic()], ids=["squared", "logistic"])
@pytest.mark.parametrize(("n", "d"), [(7, 1), (8, 2), (20, 4)])
def test_beta_max_is_where_the_network_vanishes(loss: Squared | Logistic, n: int, d: int):
    X, y, s = data(n, n, d, signs=isinstance(loss, Logistic))
    gates = sample_gates(X, 10, generator=torch.Generator().manual_seed(0))
    top = beta_max(X, y, gates, sample_weight=s, loss=loss, gated=False)
    assert top <= beta_max(X, y, gates, sample_weight=s, loss=loss) * (1 + 1e-12)
    for factor, zero in ((1 + 1e-6, True), (1 - 1e-3, False)):
        found = convex_relu(X.requires_grad_(), y, top.detach() * factor, gates, sample_weight=s, loss=loss)
        assert bool((neurons(found) == 0).all()) == zero
        if zero:
            assert not torch.autograd.grad(neurons(found).sum(), X)[0].any()


def test_robustness_is_the_robust_program():
    X, y, _ = data(3, 8, 2, bias=True)
    gates = enumerate_gates(X)
    ball = LInf(0.01, fixed_columns=(-1,))
    found, expected = convex_relu(X, y, 0.1, gates, robustness=ball), robust_convex_relu(X, y, 0.1, gates, ball)
    assert torch.equal(found.objective, expected.objective)
    assert float(found.objective) > float(convex_relu(X, y, 0.1, gates).objective)
    with pytest.raises(
        ValueError, match="warm_start: expected None with robustness or the hinge loss, got ConvexReLUSolution"
    ):
        convex_relu(X, y, 0.1, gates, robustness=ball, warm_start=found)


def test_hinge_loss_has_a_value_with_its_gradient_and_no_derivative_of_neurons():
    X, y, s = data(3, 10, 2, signs=True)
    gates = enumerate_gates(X)
    y.requires_grad_()
    found = convex_relu(X, y, 0.2, gates, sample_weight=s, loss=Hinge())
    f = predict(found, X)
    worth = (s * (1 - y * f).clamp(min=0)).sum() + 0.2 * neurons(found).norm(dim=-1).sum()
    assert math.isclose(worth.item(), found.objective.item(), rel_tol=1e-8)
    (slope,) = torch.autograd.grad(found.objective, y, retain_graph=True)
    direction = normal(4, 10)

    def at(t: float) -> float:
        return float(convex_relu(X, y.detach() + t * direction, 0.2, gates, sample_weight=s, loss=Hinge()).objective)

    assert math.isclose(float(slope @ direction), (at(1e-4) - at(-1e-4)) / 2e-4, rel_tol=1e-5)
    with pytest.raises(RuntimeError, match="have no derivative here"):
        torch.autograd.grad(found.v.sum(), y)


def test_single_precision_keeps_its_digits_where_beta_is_small():
    X, y, _ = data(5, 40, 4)
    gates = sample_gates(X, 30, generator=torch.Generator().manual_seed(5))
    query, weights = normal(7, 20, 4), normal(6, 20)  # at points of the data the network has kinks

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in (X, y, torch.tensor(1e-3, dtype=X.dtype))]
        found = convex_relu(inputs[0], inputs[1], inputs[2], gates.vectors.to(dtype))
        return torch.autograd.grad(predict(found, query.to(dtype)) @ weights.to(dtype), inputs)

    for narrow, wide in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert narrow.dtype == torch.float32
        assert float((narrow - wide).norm()) <= 1e-3 * float(wide.norm())


def test_rows_of_very_different_length_are_not_called_solved():
    X, y, _ = data(9, 9, 3)
    X[0] *= 1e8
    with pytest.warns(SolveWarning, match="convex_relu"):
        found = convex_relu(X, y, 0.05, sample_gates(X, 10, generator=torch.Generator().manual_seed(5)))
    assert float(found.gap) > 0.1


def test_a_start_of_another_size_is_refused():
    X, y, _ = data(1, 5, 2)
    gates = normal(2, 4, 2)
    several = convex_relu(X, y, torch.tensor([0.1, 0.2], dtype=X.dtype), gates)
    with pytest.raises(ValueError, match="warm_start: expected no more batch dimensions"):
        convex_relu(X, y, 0.1, gates, solver=ADMM(), warm_start=several)
    with pytest.raises(ValueError, match="warm_start: expected a ConvexReLUSolution or None, got str"):
        convex_relu(X, y, 0.1, gates, warm_start="earlier")  # type: ignore[arg-type]
