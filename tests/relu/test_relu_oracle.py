"""`convex_relu` against certified optima of a solver of its own, and against differences of them.

Oracle: `tests/relu/relu_oracle.py`, written from the docstrings before the code of the layer was read: own patterns,
Clarabel, Newton in long double and a duality gap at rounding. Its differences enumerate, solve and polish anew at
every point and are right to about 1e-10; they are checked here against its own envelope gradients, and it itself
against CVXPY, descent on the non-convex loss and all small subsets of cells.
"""

import functools
import itertools
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor

from difflayers.relu import (
    ConvexReLUSolution,
    TwoLayerReLU,
    convex_relu,
    enumerate_gates,
    from_network,
    minimal_network,
    predict,
    to_network,
)
from tests.relu import relu_oracle as oracle
from tests.relu.relu_oracle import Data

# seed, inputs, points, bias, beta / beta_max, what is done to the data
PROBLEMS = {
    "plane": (37, 2, 6, False, 0.03, ""),
    "line with bias": (28, 2, 7, True, 0.03, ""),
    "six neurons of four opposite pairs": (2, 2, 8, False, 0.01, ""),
    "eight neurons of six opposite pairs": (36, 2, 8, True, 0.002, ""),
    "space": (43, 3, 6, False, 0.05, ""),
    "space with bias": (0, 3, 7, True, 0.02, ""),
    "a weight of zero": (64, 2, 6, True, 0.03, "zero"),
    "a weight of zero in space": (19, 3, 6, False, 0.05, "zero"),
    "duplicates": (59, 2, 6, True, 0.03, "duplicates"),
    "kink on duplicates": (39, 2, 6, False, 0.05, "duplicates"),
    "parallel points": (42, 2, 6, False, 0.05, "parallel"),
    "a point at the origin": (61, 2, 6, False, 0.05, "origin"),
    "little decay": (32, 2, 6, False, 0.001, ""),
    "just under beta_max": (11, 2, 6, False, 0.98, ""),
    "just over beta_max": (11, 2, 6, False, 1.01, ""),
    "a neuron close to the border of its cell": (9, 2, 6, False, 0.4, ""),
}
# where one row moving alone breaks a kink, so that no derivative exists: the rows of X to leave out
BROKEN = {"kink on duplicates": [0, 1], "a point at the origin": [1]}


@functools.cache
def problem(name: str) -> Data:
    seed, d, n, bias, fraction, change = PROBLEMS[name]
    rng = np.random.default_rng(seed)
    X, y, s = rng.standard_normal((n, d)).round(2), rng.standard_normal(n).round(2), rng.uniform(0.5, 2, n).round(2)
    if bias:
        X[:, -1] = 1
    if change == "zero":
        s[2] = 0
    if change == "duplicates":
        X[1] = X[0]
    if change == "parallel":
        X[1], X[3] = 2 * X[0], -X[2]
    if change == "origin":
        X[1] = 0
    data = Data(X, y, s, 1.0)
    return data._replace(beta=round(fraction * oracle.beta_max(data), 4))


@functools.cache
def optimum(name: str) -> oracle.Optimum:
    return oracle.solve(problem(name))


@functools.cache
def queries(name: str) -> np.ndarray:
    """Four points away from the kinks of all neurons that an optimal network can have."""
    found = np.random.default_rng(99).standard_normal((200, problem(name).X.shape[1])).round(2)
    heights = np.abs(found @ optimum(name).directions.T) / np.linalg.norm(found, axis=1, keepdims=True)
    return found[(heights > 0.05).all(1)][:4]


@functools.cache
def differences(name: str) -> dict[str, np.ndarray]:
    """Derivatives of the objective and of the predictions, first and then the others, in the last dimensions."""
    return oracle.gradient(
        problem(name), lambda data, best: np.append(oracle.predict(best, queries(name)), best.objective)
    )


def array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def comparable(name: str, key: str, *slopes: object) -> list[np.ndarray]:
    """The slopes in double, without the rows that have no derivative."""
    out = [array(slope) if isinstance(slope, Tensor) else np.float64(slope) for slope in slopes]
    return [np.delete(slope, BROKEN.get(name, []), axis=0) for slope in out] if key == "X" else out


def tensors(data: Data) -> dict[str, Tensor]:
    return {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in data._asdict().items()}


def train(X: Tensor, y: Tensor, s: Tensor, beta: Tensor) -> ConvexReLUSolution:
    return convex_relu(X, y, beta, enumerate_gates(X.detach()), sample_weight=s)


def neurons(network: ConvexReLUSolution) -> tuple[np.ndarray, np.ndarray]:
    both = [array(v[v.norm(dim=-1) > 0]) for v in (network.v, network.w)]
    return np.concatenate(both), np.repeat([1.0, -1.0], [len(v) for v in both])


# ------------------------------------------------------------------------------------------------ the oracle itself


@pytest.mark.parametrize(("n", "d"), [(1, 2), (5, 2), (9, 2), (4, 3), (7, 3)])
def test_cells_are_as_many_as_covers_formula_says(n: int, d: int):
    X = np.random.default_rng(n).standard_normal((n, d))
    assert len(oracle.cells(X)) == 2 * sum(math.comb(n - 1, k) for k in range(d))


@pytest.mark.parametrize("name", ["line with bias", "space", "duplicates"])
def test_objective_is_that_of_cvxpy(name: str):
    X, y, s, beta = problem(name)
    masks = oracle.cells(X)
    V, W = cp.Variable((len(masks), X.shape[1])), cp.Variable((len(masks), X.shape[1]))
    fit = cp.sum(cp.multiply(masks.T, X @ (V - W).T), axis=1)
    signs = np.where(masks.T, 1, -1)
    loss = cp.sum(cp.multiply(s / 2, cp.square(fit - y))) + beta * cp.sum(cp.norm(cp.vstack([V, W]), axis=1))
    program = cp.Problem(cp.Minimize(loss), [cp.multiply(signs, X @ V.T) >= 0, cp.multiply(signs, X @ W.T) >= 0])
    program.solve(solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    assert math.isclose(program.value, optimum(name).objective, rel_tol=1e-9)


@pytest.mark.parametrize("name", ["plane", "line with bias", "space"])
def test_descent_on_the_network_reaches_the_optimum_and_never_less(name: str):
    data = problem(name)
    reached, best = oracle.descend(data, width=len(data.y) + 1, starts=20), float(optimum(name).objective)
    assert reached.min() >= best * (1 - 1e-12)
    assert reached.min() <= best * (1 + 1e-5)


@pytest.mark.parametrize("name", PROBLEMS)
def test_differences_of_the_optimal_value_are_its_envelope_gradient(name: str):
    for key, slope in oracle.envelope(problem(name), optimum(name)).items():
        difference, slope = comparable(name, key, differences(name)[key][-1], slope)
        assert np.allclose(difference, slope, rtol=1e-9, atol=1e-10), key


def test_no_smaller_set_of_cells_reaches_the_optimum():
    rng = np.random.default_rng(6)
    data = Data(rng.standard_normal((4, 2)), rng.standard_normal(4), np.ones(4), 0.1)
    best = oracle.solve(data)
    (size,) = oracle.minimal_sizes(data, best)
    assert size == 3
    masks, signs = oracle.both_signs(oracle.cells(data.X))
    for count in (size - 1, size):
        subsets = map(list, itertools.combinations(range(len(masks)), count))
        least = min(oracle.interior_point(data, masks[part], signs[part])[1] for part in subsets)
        assert (least < float(best.objective) + 1e-7) == (count == size)


# ---------------------------------------------------------------------------------------------------- the optimum


@pytest.mark.parametrize("name", PROBLEMS)
def test_network_is_the_optimum(name: str):
    data, best = problem(name), optimum(name)
    network = train(**tensors(data))
    value, gap = network.objective.item(), network.gap.item()
    assert math.isclose(value, best.objective, rel_tol=1e-12)
    assert 0 <= gap <= 1e-11 * value
    assert value - gap <= float(best.objective) * (1 + 1e-14)
    # each neuron in its cell, and the objective that of the network that the neurons make
    signs = np.where(array(network.gates.patterns), 1, -1)
    for p in (array(network.v), array(network.w)):
        scale = np.linalg.norm(data.X, axis=1)[:, None] * np.linalg.norm(p, axis=1)
        assert (signs * (data.X @ p.T) >= -1e-14 * scale).all()
    assert math.isclose(value, oracle.objective(data, *neurons(network)), rel_tol=1e-14)


@pytest.mark.parametrize("name", PROBLEMS)
def test_predictions_are_those_of_the_optimum(name: str):
    points = np.random.default_rng(5).standard_normal((20, problem(name).X.shape[1]))
    assert oracle.spread(problem(name), optimum(name), points) < 1e-9, "not unique: nothing to compare"
    network, truth = train(**tensors(problem(name))), np.float64(oracle.predict(optimum(name), points))
    assert np.allclose(array(predict(network, torch.tensor(points))), truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_network_is_minimal(name: str):
    sizes = oracle.minimal_sizes(problem(name), optimum(name))
    assert len(neurons(train(**tensors(problem(name))))[0]) in sizes


@pytest.mark.parametrize("name", [name for name in PROBLEMS if "over" not in name])
def test_pruning_a_network_of_all_possible_neurons_keeps_the_objective(name: str):
    data, best = problem(name), optimum(name)
    A, fit = oracle.parts(data, best)
    # the optimum with the largest smallest neuron: t <= amounts
    wide = np.column_stack([A, np.zeros(len(fit))])
    below = np.column_stack([-np.eye(A.shape[1]), np.ones(A.shape[1])])
    cost = -np.eye(A.shape[1] + 1)[-1]
    amounts = optimize.linprog(cost, A_ub=below, b_ub=np.zeros(len(below)), A_eq=wide, b_eq=fit).x[:-1]
    # and each neuron in three unequal parts
    parts = np.outer([0.2, 0.3, 0.5], amounts)
    weight = np.sqrt(parts).reshape(-1, 1) * np.tile(best.directions, (3, 1))
    network = TwoLayerReLU(torch.tensor(weight), torch.tensor((np.sqrt(parts) * best.direction_signs).ravel()))
    X, y, s, beta = (x.detach() for x in tensors(data).values())
    large = from_network(network, X, y, beta, sample_weight=s)
    small = minimal_network(large, X)
    assert math.isclose(large.objective.item(), best.objective, rel_tol=1e-9)
    assert math.isclose(small.objective.item(), best.objective, rel_tol=1e-9)
    assert len(neurons(small)[0]) in oracle.minimal_sizes(data, best)
    assert np.allclose(np.float64(oracle.predict(best, data.X)), array(predict(small, X)), atol=1e-8)
    again = to_network(small)
    assert torch.allclose(again(X), predict(small, X), atol=1e-12)


@pytest.mark.parametrize(("inputs", "labels"), [(1e6, 1e-5), (1e-4, 1e7)])
def test_scales_of_inputs_and_labels(inputs: float, labels: float):
    X, y, s, beta = problem("plane")
    scaled = Data(inputs * X, labels * y, s, inputs * labels * beta)
    network = train(**tensors(scaled))
    assert math.isclose(network.objective.item(), labels**2 * optimum("plane").objective, rel_tol=1e-11)
    truth = labels * np.float64(oracle.predict(optimum("plane"), queries("plane")))
    assert np.allclose(array(predict(network, torch.tensor(inputs * queries("plane")))), truth, rtol=1e-9)


# ---------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_of_predictions_are_differences_of_solved_problems(name: str):
    inputs = tensors(problem(name))
    truth = differences(name)
    for i, prediction in enumerate(predict(train(**inputs), torch.tensor(queries(name)))):
        slopes = torch.autograd.grad(prediction, list(inputs.values()), retain_graph=True)
        for key, slope in zip(inputs, slopes, strict=True):
            mine, right = comparable(name, key, slope, truth[key][i])
            assert np.allclose(mine, right, rtol=1e-8, atol=1e-8 * np.abs(right).max() + 1e-10), (key, i)


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_of_the_objective_are_those_of_the_envelope(name: str):
    inputs = tensors(problem(name))
    truth = oracle.envelope(problem(name), optimum(name))
    slopes = torch.autograd.grad(train(**inputs).objective, list(inputs.values()))
    for key, slope in zip(inputs, slopes, strict=True):
        mine, right = comparable(name, key, slope, truth[key])
        assert np.allclose(mine, right, rtol=1e-10, atol=1e-11 * (1 + np.abs(right).max())), key


def test_duplicates_on_a_kink_have_the_derivative_of_moving_together():
    name = "kink on duplicates"
    data = problem(name)
    assert optimum(name).kinks[:, :2].any()
    inputs = tensors(data)
    network = train(**inputs)
    values = [*predict(network, torch.tensor(queries(name))), network.objective]
    together = np.array([array(torch.autograd.grad(v, inputs["X"], retain_graph=True)[0])[:2].sum(0) for v in values])
    for column in range(2):

        def along(t: float, column: int = column) -> np.ndarray:
            X = data.X.copy()
            X[:2, column] += t
            best = oracle.solve(data._replace(X=X))
            return np.append(oracle.predict(best, queries(name)), best.objective)

        truth = np.float64(oracle.difference(along, 1e-4))
        assert np.allclose(together[:, column], truth, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["plane", "six neurons of four opposite pairs"])
def test_hessian_vector_products_in_the_labels(name: str):
    inputs = tensors(problem(name))
    cotangent = np.array([0.7, -1.1, 0.4, 0.9])
    direction = np.random.default_rng(3).standard_normal(len(problem(name).y))
    value = predict(train(**inputs), torch.tensor(queries(name))) @ torch.tensor(cotangent)
    (slope,) = torch.autograd.grad(value, inputs["y"], create_graph=True)
    (mine,) = torch.autograd.grad(slope @ torch.tensor(direction), inputs["y"])
    truth = oracle.curvature(
        problem(name), lambda best: cotangent @ oracle.predict(best, queries(name)), direction, step=1e-3
    )
    assert np.allclose(array(mine), np.float64(truth), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_second_derivatives_along_lines_through_all_inputs(name: str, seed: int):
    data = problem(name)
    rng = np.random.default_rng(seed)
    step = Data(*(0.1 * rng.standard_normal(np.shape(x)) for x in data[:3]), 0.1 * data.beta * rng.standard_normal())
    step = step._replace(s=np.where(data.s > 0, step.s, 0))
    step.X[BROKEN.get(name, [])] = 0
    cotangent = rng.standard_normal(4)

    def along(t: float) -> np.ndarray:
        best = oracle.solve(Data(*(x + t * dx for x, dx in zip(data, step, strict=True))))
        return np.array([cotangent @ oracle.predict(best, queries(name)), best.objective])

    truth = np.float64(oracle.second_difference(along, 2e-3))
    inputs = tensors(data)
    network = train(**inputs)
    prediction = predict(network, torch.tensor(queries(name))) @ torch.tensor(cotangent)
    for value, right in zip((prediction, network.objective), truth, strict=True):
        slopes = torch.autograd.grad(value, list(inputs.values()), create_graph=True)
        steps = [torch.tensor(dx) for dx in step]
        slope = sum((a * b).sum() for a, b in zip(slopes, steps, strict=True))
        twice = torch.autograd.grad(slope, list(inputs.values()), retain_graph=True, materialize_grads=True)
        mine = sum((a * b).sum() for a, b in zip(twice, steps, strict=True))
        assert math.isclose(mine.item(), right, rel_tol=1e-6, abs_tol=1e-7)
