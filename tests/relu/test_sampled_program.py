"""The sampled convex program.

Oracles: scikit-learn's Lasso on the matrix of activations, cvxpy with Clarabel for the logistic loss, the enumerated
optimum of the convex ReLU program as the limit, the decayed loss of the network itself, central differences.
"""

import warnings

import cvxpy as cp
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import Tensor

from difflayers import SolveWarning, Status
from difflayers.relu import (
    FISTA,
    Logistic,
    convex_relu,
    enumerate_gates,
    minimal_network,
    predict,
    sample_directions,
    sampled_convex_program,
    sampled_convex_program_ex,
    to_network,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(seed: int, n: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points, labels with a bend, weights."""
    X = normal(seed, n, d)
    return X, torch.sin(2 * X[:, 0]) + X[:, -1].abs() + 0.2 * normal(seed + 1, n), 0.5 + normal(seed + 2, n).abs()


def directions(X: Tensor, count: int, seed: int = 0) -> Tensor:
    return sample_directions(X, count, generator=torch.Generator().manual_seed(seed))


def activations(X: Tensor, U: Tensor) -> Tensor:
    return torch.where(X @ U.mT > 0, X @ U.mT, 0)


@pytest.mark.parametrize(("n", "d", "count", "beta"), [(20, 2, 15, 0.3), (30, 4, 25, 0.05), (15, 3, 60, 1.0)])
def test_squared_loss_is_the_lasso_of_scikit_learn(n: int, d: int, count: int, beta: float):
    X, y, s = data(n, n, d)
    U = directions(X, count)
    found = sampled_convex_program(X, y, beta, 3 * U, sample_weight=s)
    root = s.sqrt()
    model = Lasso(alpha=beta / n, fit_intercept=False, tol=1e-14, max_iter=10**6)
    model.fit((root[:, None] * activations(X, U)).numpy(), (root * y).numpy())
    expected = torch.from_numpy(model.coef_)
    assert torch.allclose((found.v - found.w), expected[:, None] * U, atol=1e-7)
    assert not (found.v.any(-1) & found.w.any(-1)).any()
    assert 0 <= float(found.gap) < 1e-10
    f = activations(X, U) @ expected
    value = (s * (f - y) ** 2).sum() / 2 + beta * expected.abs().sum()
    assert torch.isclose(found.objective, value, rtol=1e-9)


def test_logistic_value_is_that_of_clarabel():
    X, y, s = data(3, 25, 3)
    y, U = (y - y.mean()).sign(), directions(X, 40)
    found = sampled_convex_program(X, y, 0.2, U, sample_weight=s, loss=Logistic())
    a = cp.Variable(40)
    each = cp.logistic(-cp.multiply(y.numpy(), activations(X, U).numpy() @ a))
    task = cp.Problem(cp.Minimize(s.numpy() @ each + 0.2 * cp.norm1(a)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    assert abs(float(found.objective) - task.value) < 1e-7 * task.value
    assert float(found.gap) < 1e-9


def test_value_is_that_of_the_network_and_its_weight_decay():
    X, y, _ = data(4, 20, 2)
    found = sampled_convex_program(X, y, 0.1, directions(X, 100))
    network, query = to_network(found), normal(9, 50, 2)
    decay = sum((p**2).sum() for p in network.parameters())
    assert torch.isclose(((network(X) - y) ** 2).sum() / 2 + 0.05 * decay, found.objective, rtol=1e-12)
    assert torch.allclose(network(query), predict(found, query), atol=1e-12)


def test_value_falls_to_the_enumerated_optimum():
    X, y, _ = data(5, 15, 2)
    best = float(convex_relu(X, y, 0.1, enumerate_gates(X)).objective)
    U = directions(X, 3000)
    values = [float(sampled_convex_program(X, y, 0.1, U[:count]).objective) for count in (10, 100, 3000)]
    assert values == sorted(values, reverse=True)
    assert all(value >= best * (1 - 1e-8) for value in values)
    assert values[0] > best * 1.01
    assert values[-1] < best * 1.0005


@pytest.mark.parametrize("loss", [None, Logistic()])
def test_directions_of_the_optimum_give_the_optimum(loss):
    X, y, s = data(6, 15, 2)
    y = y if loss is None else (y - y.mean()).sign()
    best = convex_relu(X, y, 0.1, enumerate_gates(X), sample_weight=s, loss=loss)
    neurons = torch.cat([best.v, best.w])
    found = sampled_convex_program(X, y, 0.1, neurons[neurons.any(-1)], sample_weight=s, loss=loss)
    assert torch.isclose(found.objective, best.objective, rtol=1e-7)
    assert torch.allclose(predict(found, X), predict(best, X), atol=1e-4)


@pytest.mark.parametrize("loss", [None, Logistic()])
def test_derivatives_are_those_of_resolved_programs(loss):
    X, y, s = data(7, 12, 3)
    y = y if loss is None else (y - y.mean()).sign()
    U, query, beta = directions(X, 300), normal(8, 5, 3), torch.tensor(0.1, dtype=torch.float64)

    def answer(*inputs: Tensor) -> Tensor:
        X, s, beta, U = inputs
        found = sampled_convex_program(X, y, beta, U, sample_weight=s, loss=loss)
        return predict(found, query).sum() + found.objective

    inputs = [t.clone().requires_grad_() for t in (X, s, beta, U)]
    grads = torch.autograd.grad(answer(*inputs), inputs)
    for i, grad in enumerate(grads):
        step = 1e-6 * normal(20 + i, *inputs[i].shape)
        up, down = ([t.detach() + sign * step if k == i else t for k, t in enumerate(inputs)] for sign in (1, -1))
        difference = (answer(*up) - answer(*down)) / 2
        assert torch.isclose((grad * step).sum(), difference, rtol=1e-6, atol=1e-13)


def test_repeated_directions_are_pruned_and_differentiable():
    X, y, _ = data(8, 10, 2)
    U = directions(X, 20)
    once = sampled_convex_program(X, y, 0.1, U)
    y = y.clone().requires_grad_()
    thrice = sampled_convex_program(X, y, 0.1, torch.cat([U, 2 * U, U]))
    assert torch.isclose(once.objective, thrice.objective, rtol=1e-12)
    used = (thrice.v - thrice.w).any(-1)
    assert int(used.sum()) == int((once.v - once.w).any(-1).sum())
    assert torch.isfinite(torch.autograd.grad(predict(thrice, X).sum(), y)[0]).all()
    assert float(thrice.margin) < 1e-9 < float(once.margin)


def test_at_most_as_many_neurons_as_samples():
    # two samples and one cell: activations of any three directions depend on each other
    X, y = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    angle = torch.linspace(0.1, 1.4, 50, dtype=torch.float64)
    found = sampled_convex_program(X, y, 1e-3, torch.stack([angle.cos(), angle.sin()], -1))
    assert int(found.v.any(-1).sum() + found.w.any(-1).sum()) <= 2
    assert torch.equal(minimal_network(found, X).v, found.v)


def test_a_weight_of_two_is_a_sample_twice():
    X, y, _ = data(9, 10, 2)
    s = torch.ones(10, dtype=torch.float64)
    s[3] = 2
    U = directions(X, 50)
    a = sampled_convex_program(X, y, 0.1, U, sample_weight=s)
    b = sampled_convex_program(torch.cat([X, X[3:4]]), torch.cat([y, y[3:4]]), 0.1, U)
    assert torch.allclose(a.v, b.v, atol=1e-10)
    assert torch.isclose(a.objective, b.objective, rtol=1e-12)


def test_network_is_zero_from_the_largest_useful_beta_on():
    X, y, _ = data(10, 10, 2)
    U = directions(X, 50)
    top = float((activations(X, U).mT @ y).abs().amax())
    X.requires_grad_()
    found = sampled_convex_program(X, y, top * 1.0001, U)
    assert not found.v.any() and not found.w.any()
    assert not torch.autograd.grad((found.v + found.w).sum(), X)[0].any()
    found = sampled_convex_program(X, y, top * 0.999, U)
    assert found.v.any() or found.w.any()


def test_gap_is_a_true_bound_far_from_the_optimum():
    X, y, _ = data(11, 20, 2)
    U = directions(X, 60)
    best = float(sampled_convex_program(X, y, 0.1, U).objective)
    with pytest.warns(SolveWarning):
        found = sampled_convex_program(X, y, 0.1, U, solver=FISTA(max_steps=2))
    assert float(found.gap) > 1e-3
    assert float(found.objective - found.gap) <= best <= float(found.objective)


def test_warm_start_saves_steps():
    X, y, _ = data(12, 40, 4)
    U = directions(X, 200)
    cold = sampled_convex_program_ex(X, y, 0.1, U)
    warm = sampled_convex_program_ex(X, y, 0.1, U, warm_start=cold)
    assert int(warm.steps) < int(cold.steps)
    assert torch.allclose(warm.value.v, cold.value.v, atol=1e-10)
    assert int(warm.status) == Status.CONVERGED


def test_single_precision_and_batches():
    X, y, _ = data(13, 2 * 12, 2)
    X, y, beta = X.reshape(2, 12, 2), y.reshape(2, 12), torch.tensor([0.1, 0.5], dtype=torch.float64)
    U = directions(X, 40)
    both = sampled_convex_program(X, y, beta, U)
    single = sampled_convex_program(X.float(), y.float(), beta.float(), U.float())
    assert single.v.dtype == single.objective.dtype == torch.float32
    assert torch.allclose(single.v.double(), both.v, atol=1e-4)
    for i in range(2):
        alone = sampled_convex_program(X[i], y[i], beta[i], U)
        assert torch.allclose(both.v[i], alone.v, atol=1e-12)
        assert torch.isclose(both.objective[i], alone.objective, rtol=1e-12)


def test_directions_are_uniform_on_the_sphere():
    X = normal(0, 4, 3)
    U = directions(X, 20_000)
    assert torch.allclose(U.norm(dim=-1), torch.ones(20_000, dtype=torch.float64))
    # in three dimensions every coordinate is uniform on [-1, 1] (Archimedes)
    for coordinate in U.mT:
        assert torch.allclose(coordinate.sort().values, torch.linspace(-1, 1, 20_000, dtype=torch.float64), atol=0.03)
    assert torch.equal(U, directions(X, 20_000))


def test_bad_input_is_named():
    X, y, _ = data(14, 6, 2)
    U = directions(X, 5)
    with pytest.raises(ValueError, match="directions: expected a tensor, got int"):
        sampled_convex_program(X, y, 0.1, 7)
    with pytest.raises(ValueError, match="directions: expected finite numbers, got 1 NaN or Inf of 10"):
        sampled_convex_program(X, y, 0.1, torch.where(U[0, 0] == U, torch.nan, U))
    with pytest.raises(ValueError, match="X: expected finite numbers, got 1 NaN or Inf of 12"):
        sampled_convex_program(torch.where(X[0, 0] == X, -torch.inf, X), y, 0.1, U)
    with pytest.raises(ValueError, match=r"solver: expected FISTA\(\) or None"):
        sampled_convex_program(X, y, 0.1, U, solver="lasso")
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        sample_directions(X, 0)


def test_neighbours_among_thousands_of_directions():
    x = 4 * torch.rand(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 2
    X, y = torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1), torch.sin(2 * x[:, 0]) * torch.cos(x[:, 1])
    found = sampled_convex_program_ex(X, y, 0.02, directions(X, 1500, 2))
    assert int(found.status) == Status.CONVERGED
    assert float(found.value.gap) < 1e-9 * float(found.value.objective)
