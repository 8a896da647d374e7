"""The set of optimal networks.

Oracles: corners by enumeration of all bases, with slopes and projections onto cells by cvxpy; the training problem of
the paper itself, with a linear function of the neurons maximised over all its optima (cvxpy, Clarabel); the rules by
cvxpy; closed forms where gates are equal or data have a symmetry.
"""

import itertools
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

from difflayers.relu import (
    ConvexReLUSolution,
    Gates,
    Hinge,
    Logistic,
    OptimalSet,
    convex_gated_relu,
    convex_relu,
    enumerate_gates,
    optimal_set,
    predict,
)
from difflayers.relu._one_network import nearest_in_cell
from difflayers.relu._polytope import Polytope


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


X, Y, QUERY = torch.nn.functional.pad(normal(1, 8, 2), (0, 1), value=1.0), normal(2, 8), normal(3, 40, 3)
VECTORS = normal(4, 120, 3)  # many of them with equal patterns
BETA = 0.1
ANGLES = torch.arange(5, dtype=torch.float64) * 2 * math.pi / 5
PENTAGON, ONES = torch.stack([ANGLES.cos(), ANGLES.sin()], 1), torch.ones(5, dtype=torch.float64)


def gated(**options) -> OptimalSet:
    return optimal_set(convex_gated_relu(X, Y, BETA, VECTORS, **options), X, Y, BETA, **options)


def symmetric() -> OptimalSet:
    """A ReLU network on a pentagon with equal labels: turned by a fifth it is as good."""
    return optimal_set(convex_relu(PENTAGON, ONES, BETA, enumerate_gates(PENTAGON)), PENTAGON, ONES, BETA)


def members(networks: OptimalSet, query: Tensor) -> list[ConvexReLUSolution]:
    chosen = [networks.select(rule) for rule in ("least_squares", "least_sum", "largest_sum", "least_maximum")]
    drawn = networks.extreme_points(6, generator=generator()) + networks.sample(6, generator=generator())
    return [
        networks.center(),
        networks.minimum_norm(),
        networks.best_on(query, query[:, 0]),
        networks.network(networks.amounts),
        *chosen,
        *drawn,
    ]


def penalty(solution: ConvexReLUSolution) -> float:
    both = solution.v if solution.w is None else torch.cat([solution.v, solution.w])
    return float(both.norm(dim=-1).sum())


def active(solution: ConvexReLUSolution) -> int:
    both = solution.v if solution.w is None else torch.cat([solution.v, solution.w])
    return int((both != 0).any(-1).sum())


# -------------------------------------------------------------------------------------------------------------- members


def test_members_of_a_gated_set_cost_and_fit_the_same_and_differ_elsewhere():
    best, networks = convex_gated_relu(X, Y, BETA, VECTORS), gated()
    assert networks.dimension > 10 and not networks.is_unique
    assert f"dimension={networks.dimension}" in repr(networks)
    for one in members(networks, QUERY):
        assert one.w is None and bool((one.v.norm(dim=-1) >= 0).all())
        loss = ((predict(one, X) - Y) ** 2).sum() / 2
        assert abs(float(loss) + BETA * penalty(one) - float(best.objective)) <= 1e-8 * float(best.objective)
        assert torch.isclose(one.objective, best.objective, rtol=1e-8)
        assert float(one.gap) <= 1e-8
        assert torch.allclose(predict(one, X), predict(best, X), atol=1e-9)
    corners = networks.extreme_points(6, generator=generator())
    spread = torch.stack([predict(one, QUERY) for one in corners]).std(0)
    assert float(spread.max()) > 0.1


def test_members_of_a_relu_set_keep_to_their_cells_and_differ_elsewhere():
    networks, gates = symmetric(), enumerate_gates(PENTAGON)
    best = convex_relu(PENTAGON, ONES, BETA, gates)
    side = 2 * gates.patterns.to(PENTAGON.dtype) - 1
    assert not networks.is_unique
    fits = []
    for one in members(networks, QUERY[:, :2]):
        assert one.w is not None
        for p in (one.v, one.w):
            assert float((side * (PENTAGON @ p.mT)).amin()) >= -1e-12
        loss = ((predict(one, PENTAGON) - ONES) ** 2).sum() / 2
        assert abs(float(loss) + BETA * penalty(one) - float(best.objective)) <= 1e-8 * float(best.objective)
        assert torch.allclose(predict(one, PENTAGON), predict(best, PENTAGON), atol=1e-9)
        fits.append(predict(one, QUERY[:, :2]))
    assert float(torch.stack(fits).std(0).max()) > 1e-2


def test_a_relu_set_holds_the_turned_network():
    networks = symmetric()
    corner = networks.extreme_points(1, generator=generator())[0]
    assert corner.w is not None and not bool(corner.w.any())
    c, s = float(PENTAGON[1, 0]), float(PENTAGON[1, 1])
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    turned = corner.v[(corner.v != 0).any(-1)] @ turn.mT
    heights = QUERY[:, :2] @ networks.directions.mT
    # the turned network's fit elsewhere is that of some member: least squares over members finds it
    target = (QUERY[:, :2] @ turned.mT).relu().sum(-1)
    assert heights.shape[1] == len(networks.blocks)
    found = networks.best_on(QUERY[:, :2], target)
    assert torch.allclose(predict(found, QUERY[:, :2]), target, atol=1e-8)


@pytest.mark.parametrize("loss", [None, Logistic()])
def test_weights_and_losses(loss):
    y, s = Y.sign() if loss else Y, torch.tensor([2.0, 0.0, 1.0, 1.0, 0.5, 1.0, 1.0, 3.0], dtype=torch.float64)
    best = convex_gated_relu(X, y, 0.1, VECTORS, sample_weight=s, loss=loss)
    networks = optimal_set(best, X, y, 0.1, sample_weight=s, loss=loss)
    assert networks.dimension > 0
    free = []
    for one in networks.extreme_points(8, generator=generator()):
        assert torch.isclose(one.objective, best.objective, rtol=1e-8)
        assert torch.allclose(predict(one, X)[s > 0], predict(best, X)[s > 0], atol=1e-8)
        free.append(float(predict(one, X)[1]))
    assert max(free) - min(free) > 1e-3  # the sample without weight


def test_equal_gates_share_one_neuron_in_any_way():
    """n = 1 neuron, three gates of one pattern: the set is a triangle, its least norm in the middle."""
    data, label = torch.tensor([[1.0, 1.0], [2.0, 1.0]], dtype=torch.float64), normal(0, 2).abs()
    vectors = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    networks = optimal_set(convex_gated_relu(data, label, 0.1, vectors), data, label, 0.1)
    assert networks.dimension == 2
    assert len(networks.extreme_points(40, generator=generator())) == 3
    for middle in (networks.minimum_norm().v, networks.center().v):
        assert torch.allclose(middle, middle.mean(0).expand(3, -1), atol=1e-9)
    shares = torch.stack([one.v.norm(dim=-1) for one in networks.sample(3000, generator=generator(), steps=30)])
    shares = shares / shares.sum(-1, keepdim=True)
    # a uniform point of a triangle has mean 1/3 and variance 1/18 in each coordinate
    assert torch.allclose(shares.mean(0), torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.02)
    assert torch.allclose(shares.var(0), torch.full((3,), 1 / 18, dtype=torch.float64), atol=0.005)


def test_above_the_largest_beta_nothing_but_zero():
    networks = optimal_set(convex_gated_relu(X, Y, 1e3, VECTORS), X, Y, 1e3)
    assert networks.is_unique and not len(networks.blocks)
    for one in members(networks, QUERY):
        assert not bool(one.v.any())


def test_a_unique_network_is_found_unique():
    best = convex_gated_relu(X, Y, BETA, enumerate_gates(X).vectors[::7])
    networks = optimal_set(best, X, Y, BETA)
    assert networks.is_unique
    for one in members(networks, QUERY):
        assert torch.allclose(one.v, best.v, atol=1e-10)


def test_random_draws_follow_the_generator():
    networks = gated()
    for draw in (networks.sample, networks.extreme_points):
        twice = [draw(2, generator=generator(5)) for _ in range(2)]
        assert all(torch.equal(a.v, b.v) for a, b in zip(*twice, strict=True))
        assert not torch.equal(draw(1, generator=generator(6))[0].v, twice[0][0].v)


def test_slack_buys_other_networks_of_the_same_fit():
    vectors = enumerate_gates(X).vectors[::3]
    best = convex_gated_relu(X, Y, BETA, vectors)
    networks = optimal_set(best, X, Y, BETA, slack=0.3)
    assert networks.dimension > 0
    most = 0.0
    for one in networks.extreme_points(20, generator=generator()):
        assert torch.allclose(predict(one, X), predict(best, X), atol=1e-9)
        assert penalty(one) <= penalty(best) / 0.7
        most = max(most, penalty(one))
    assert most > penalty(best) * (1 + 1e-6)


def test_single_precision():
    x, y, vectors = X.float(), Y.float(), VECTORS.float()
    best = convex_gated_relu(x, y, BETA, vectors)
    networks = optimal_set(best, x, y, BETA)
    assert networks.dimension == gated().dimension
    for one in members(networks, QUERY.float()):
        assert one.v.dtype == torch.float32
        assert torch.isclose(one.objective, best.objective, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------------- oracles


def all_corners(columns: np.ndarray, fit: np.ndarray) -> list[np.ndarray]:
    """Every non-negative solution of ``columns a = fit`` with independent columns."""
    found: list[np.ndarray] = []
    m, rank = columns.shape[1], np.linalg.matrix_rank(columns, tol=1e-9)
    for size in range(1, rank + 1):
        for subset in itertools.combinations(range(m), size):
            some = columns[:, subset]
            if np.linalg.matrix_rank(some, tol=1e-9) < size:
                continue
            a = np.zeros(m)
            a[list(subset)] = np.linalg.lstsq(some, fit, rcond=None)[0]
            right = np.abs(columns @ a - fit).max() < 1e-8 and a.min() > -1e-9
            if right and not any(np.abs(a - other).max() < 1e-6 for other in found):
                found.append(a)
    return found


def test_corners_are_all_corners():
    data, y, beta = normal(11, 4, 2), normal(12, 4), 0.1
    vectors = normal(13, 12, 2)
    best = convex_gated_relu(data, y, beta, vectors)
    networks = optimal_set(best, data, y, beta)
    # slopes from the definition, gate by gate
    nu = (y - predict(best, data)).numpy()
    columns, blocks = [], []
    for i, g in enumerate(vectors.numpy()):
        Z = data.numpy() * (data.numpy() @ g >= 0)[:, None]
        q = Z.T @ nu
        if np.linalg.norm(q) > beta * (1 - 1e-7):
            columns.append(Z @ q / np.linalg.norm(q))
            blocks.append(i)
    assert networks.blocks.tolist() == blocks
    expected = all_corners(np.stack(columns, 1), predict(best, data).numpy())
    assert len(expected) > 3
    found = networks.extreme_points(300, generator=generator())
    assert len(found) == len(expected)
    for one in found:
        a = one.v.norm(dim=-1)[networks.blocks].numpy()
        assert min(np.abs(a - corner).max() for corner in expected) < 1e-7


@pytest.mark.parametrize("relu", [False, True])
def test_support_in_random_directions_is_that_of_the_training_problem(relu: bool):
    """A linear function of all neurons, maximised over the optima of the program itself.

    That program has no interior, which costs the conic solver digits: they are told by its own tolerance.
    """
    if relu:
        data, y, vectors, networks = PENTAGON, ONES, enumerate_gates(PENTAGON).vectors, symmetric()
        best = convex_relu(data, y, BETA, vectors)
    else:
        data, y, vectors = X, Y, VECTORS[:40]
        best = convex_gated_relu(data, y, BETA, vectors)
        networks = optimal_set(best, data, y, BETA)
    M = (data @ vectors.mT >= 0).double().numpy()
    Z = [M[:, [i]] * data.numpy() for i in range(len(vectors))]
    blocks = [cp.Variable(data.shape[1]) for _ in range((1 + relu) * len(Z))]
    signs = [1.0] * len(Z) + [-1.0] * (relu * len(Z))
    fit = sum(s * z @ p for s, z, p in zip(signs, Z * (1 + relu), blocks, strict=True))
    total = sum(cp.norm(p) for p in blocks)
    limits = [fit == predict(best, data).numpy(), total <= penalty(best) * (1 + 1e-9)]
    if relu:
        sides = [(2 * M[:, [i]] - 1) * data.numpy() for i in range(len(Z))]
        limits += [K @ p >= 0 for K, p in zip(sides * 2, blocks, strict=True)]
    for seed in range(3):
        c = normal(20 + seed, len(blocks), data.shape[1])
        problem = cp.Problem(cp.Maximize(sum(a @ p for a, p in zip(c.numpy(), blocks, strict=True))), limits)
        problem.solve(solver=cp.CLARABEL)
        cost = (c[networks.blocks] * networks.directions).sum(-1)
        value = float((networks._polytope.corner(-cost) * cost).sum())
        assert value == pytest.approx(problem.value, abs=3e-3)


def test_nearest_points_of_cells():
    data = normal(30, 9, 3)
    for seed in range(6):
        a, on = normal(40 + seed, 3), (data @ normal(50 + seed, 3) >= 0).double()
        point, border = nearest_in_cell(a, data, on)
        u = cp.Variable(3)
        side = ((2 * on - 1).unsqueeze(-1) * data).numpy()
        cp.Problem(cp.Minimize(cp.sum_squares(u - a.numpy())), [side @ u >= 0]).solve(solver=cp.CLARABEL)
        assert np.abs(u.value - point.numpy()).max() < 1e-6
        assert float((border @ point).abs().sum()) < 1e-12


def _rules(c: cp.Expression) -> dict[str, cp.Minimize]:
    return {
        "least_squares": cp.Minimize(cp.sum_squares(c)),
        "least_sum": cp.Minimize(cp.sum(c)),
        "largest_sum": cp.Minimize(-cp.sum(c)),
        "least_maximum": cp.Minimize(cp.max(c)),
    }


@pytest.mark.parametrize("make", [gated, symmetric])
def test_rules_choose_what_they_say(make):
    networks = make()
    data = PENTAGON if make is symmetric else X
    columns = networks._columns.numpy()
    size = np.linalg.norm(columns, axis=0)
    a = cp.Variable(len(size), nonneg=True)
    fit = [columns @ a == columns @ networks.amounts.numpy()]

    def amounts(one: ConvexReLUSolution) -> np.ndarray:
        both = one.v if one.w is None else torch.cat([one.v, one.w])
        return both.norm(dim=-1)[networks.blocks].numpy()

    for rule, goal in _rules(cp.multiply(size, a)).items():
        problem = cp.Problem(goal, fit)
        problem.solve(solver=cp.CLARABEL)
        a.value = amounts(networks.select(rule))
        assert problem.objective.value == pytest.approx(problem.value, rel=1e-6), rule
    problem = cp.Problem(cp.Minimize(cp.sum_squares(a)), fit)
    problem.solve(solver=cp.CLARABEL)
    assert np.abs(a.value - amounts(networks.minimum_norm())).max() < 1e-5
    points, target, weight = QUERY[:, : data.shape[1]], normal(6, 40), normal(7, 40).abs()
    # heights of single neurons, by the predictions of networks of one neuron
    eye = torch.eye(len(size), dtype=torch.float64)
    heights = torch.stack([predict(networks.network(e), points) for e in eye], 1).numpy()
    goal = cp.Minimize(cp.sum(cp.multiply(weight.numpy(), cp.square(heights @ a - target.numpy()))))
    problem = cp.Problem(goal, fit)
    least = problem.solve(solver=cp.CLARABEL)
    found = predict(networks.best_on(points, target, sample_weight=weight), points)
    assert float((weight * (found - target) ** 2).sum()) == pytest.approx(least, rel=1e-6)


def test_dependent_neurons_do_not_make_a_corner_move():
    """With ``z_3 = 2 z_1 - z_2`` and a fit of z_2 alone, independence of all columns is too much to ask for."""
    columns = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
    for point, dimension in (([0.0, 1.0, 0.0], 0), ([1.0, 0.0, 0.0], 1), ([0.2, 0.4, 0.4], 1)):
        assert Polytope(columns, torch.tensor(point, dtype=torch.float64), 1e-9).dimension == dimension


# --------------------------------------------------------------------------------------------------------------- misuse


def _one() -> ConvexReLUSolution:
    return convex_gated_relu(X, Y, BETA, VECTORS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optimal_set(_one(), X, Y, 2 * BETA), "solution: expected an optimal network of this problem"),
        (lambda: optimal_set(_one(), X, Y + 1, BETA), "solution: expected an optimal network of this problem"),
        (lambda: optimal_set(_one(), X, Y, BETA, loss=Hinge()), "loss: expected a smooth loss"),
        (lambda: optimal_set(_one(), X, Y, BETA, slack=1.0), r"slack: expected None or a number in \[0, 1\)"),
        (lambda: optimal_set(_one(), X, Y.expand(2, 8), BETA), "y: expected 1 dimensions"),
        (lambda: optimal_set(_one()._replace(v=_one().v[None]), X, Y, BETA), "solution: expected one network"),
        (lambda: optimal_set(_one()._replace(gates=Gates(VECTORS[:5], X > 0)), X, Y, BETA), "solution: expected shape"),
        (lambda: gated().select("smallest"), "rule: expected one of least_squares"),
        (lambda: gated().sample(0), "count: expected at least 1, got 0"),
        (lambda: gated().sample(1, steps=0), "steps: expected at least 1, got 0"),
        (lambda: gated().network(torch.ones(3)), "amounts: expected shape"),
        (lambda: gated().best_on(QUERY[:, :2], Y), "X: expected shape"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
