"""Robust convex ReLU networks against brute force over the adversary.

Oracles: cvxpy with Clarabel, with the worst case written corner by corner of the ball (no dual norm), and without any
for the plain program; an attack on the trained network itself, over a fine grid of the ball with its corners; linear
programs of scipy for the width of cells; central differences of re-solved problems for derivatives of the value.
"""

import itertools
import math
import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor
from torch.func import jacfwd, jvp

from difflayers import SolveError, SolveWarning, Status
from difflayers.relu import (
    L2,
    ClarabelSolver,
    ConvexReLUSolution,
    Gates,
    Hinge,
    LInf,
    Logistic,
    Squared,
    certified_margin,
    convex_gated_relu,
    enumerate_gates,
    narrow_gates,
    predict,
    robust_convex_relu,
    robust_convex_relu_ex,
    to_network,
)

LOSSES = [Squared(), Hinge(), Logistic()]


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def data(seed: int, n: int, d: int, loss, *, bias: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Points, labels (signs for margins), weights."""
    X = normal(seed, n, d)
    if bias:
        X[:, -1] = 1
    y = normal(seed + 100, n)
    return X, y if isinstance(loss, Squared) else y.sign(), 0.5 + normal(seed + 200, n).abs()


def corners(epsilon: float, d: int, fixed: tuple[int, ...] = ()) -> list[np.ndarray]:
    sides = [(0.0,) if j in fixed or j - d in fixed else (-epsilon, epsilon) for j in range(d)]
    return [np.array(c) for c in itertools.product(*sides)]


def by_cvxpy(X, y, s, beta, M, loss, moves) -> float:
    """The program of section 3, with one copy of everything for each of the adversary's `moves`."""
    X, y, s, M = (t.numpy() for t in (X, y, s, M))
    (n, d), P = X.shape, M.shape[1]
    v, w = cp.Variable((P, d)), cp.Variable((P, d))
    total = beta * (cp.sum(cp.norm(v, 2, axis=1)) + cp.sum(cp.norm(w, 2, axis=1)))
    rules = []
    E, moves = 2.0 * M - 1, np.stack(moves)
    for k in range(n):
        x = X[k] + moves
        q = (v - w).T @ M[k].astype(float)
        rules += [cp.multiply(np.tile(E[k], (len(x), 1)), x @ p.T) >= 0 for p in (v, w)]
        worst = cp.max(cp.abs(x @ q - y[k]) if isinstance(loss, Squared) else -y[k] * (x @ q))
        if isinstance(loss, Squared):
            worst = cp.square(worst) / 2
        else:
            worst = cp.pos(1 + worst) if isinstance(loss, Hinge) else cp.logistic(worst)
        total = total + s[k] * worst
    problem = cp.Problem(cp.Minimize(total), rules)
    problem.solve(solver="CLARABEL", tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    return float(problem.value)


def grid(epsilon: float, d: int, ball, points: int = 9) -> Tensor:
    """A fine grid of the ball, corners included."""
    steps = torch.linspace(-epsilon, epsilon, points, dtype=torch.float64)
    moves = torch.cartesian_prod(*[steps] * d).reshape(-1, d)
    if ball is L2:
        length = moves.norm(dim=-1, keepdim=True)
        moves = torch.where(length > epsilon, moves * (epsilon / torch.where(length > 0, length, 1)), moves)
    return moves


def attacked(network, X: Tensor, y: Tensor, moves: Tensor) -> Tensor:
    """The least margin over all moves."""
    return torch.stack([y * network(X + move) for move in moves]).amin(0)


# -------------------------------------------------------------------------------------------------------------- optima


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize(("seed", "d", "epsilon"), [(0, 2, 0.1), (1, 3, 0.05), (2, 2, 0.2)])
def test_the_objective_is_the_optimum_against_all_corners(loss, seed, d, epsilon):
    X, y, s = data(seed, 5, d, loss)
    gates = enumerate_gates(X)
    gates = Gates(gates.vectors[:9], gates.patterns[:, :9])
    found = robust_convex_relu(X, y, 0.1, gates, LInf(epsilon), sample_weight=s, loss=loss)
    expected = by_cvxpy(X, y, s, 0.1, gates.patterns, loss, corners(epsilon, d))
    assert found.objective.item() == pytest.approx(expected, rel=1e-7)
    assert 0 <= found.gap <= 1e-7
    assert found.objective - found.gap <= expected * (1 + 1e-7)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_a_fixed_column_is_not_perturbed(loss):
    X, y, s = data(5, 5, 3, loss, bias=True)
    G = normal(6, 5, 3)
    found = robust_convex_relu(X, y, 0.05, G, LInf(0.2, fixed_columns=(-1,)), sample_weight=s, loss=loss)
    expected = by_cvxpy(X, y, s, 0.05, X @ G.mT >= 0, loss, corners(0.2, 3, (-1,)))
    assert found.objective.item() == pytest.approx(expected, rel=1e-7)
    every = robust_convex_relu(X, y, 0.05, G, LInf(0.2), sample_weight=s, loss=loss)
    assert every.objective > found.objective + 1e-3, "an adversary who moves the bias too can do more"


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("ball", [LInf, L2])
def test_no_perturbation_is_the_plain_program(loss, ball):
    X, y, s = data(7, 6, 3, loss, bias=True)
    G = normal(8, 6, 3)
    expected = by_cvxpy(X, y, s, 0.1, X @ G.mT >= 0, loss, [np.zeros(3)])
    for robustness in (ball(0.0), ball(0.3, fixed_columns=(0, 1, 2))):
        found = robust_convex_relu(X, y, 0.1, G, robustness, sample_weight=s, loss=loss)
        assert found.objective.item() == pytest.approx(expected, rel=1e-7)


def test_the_round_ball_lies_between_its_square_neighbours():
    X, y, _ = data(9, 5, 2, Squared())
    gates = enumerate_gates(X)
    value = lambda ball: robust_convex_relu(X, y, 0.1, gates, ball).objective.item()  # noqa: E731
    inner, round_one, outer = value(LInf(0.1 / math.sqrt(2))), value(L2(0.1)), value(LInf(0.1))
    assert inner < round_one < outer
    moves = [0.1 * np.array([math.cos(a), math.sin(a)]) for a in np.arange(64) * (2 * math.pi / 64)]
    inside = by_cvxpy(X, y, torch.ones(5), 0.1, gates.patterns, Squared(), moves)
    outside = by_cvxpy(X, y, torch.ones(5), 0.1, gates.patterns, Squared(), [m / math.cos(math.pi / 64) for m in moves])
    assert inside - 1e-8 <= round_one <= outside + 1e-8
    assert outside - inside < 1e-2


def test_a_batch_is_its_elements():
    X, y = normal(10, 2, 1, 4, 2), normal(11, 3, 4)
    beta, epsilon = torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([0.02, 0.05, 0.1]).double()
    G = normal(12, 4, 2)
    found = robust_convex_relu(X, y, beta, G, LInf(epsilon))
    assert found.objective.shape == found.gap.shape == (2, 3)
    assert found.v.shape == found.w.shape == (2, 3, 4, 2)
    for i, j in itertools.product(range(2), range(3)):
        alone = robust_convex_relu(X[i, 0], y[j], float(beta[j]), G, LInf(float(epsilon[j])))
        torch.testing.assert_close(found.objective[i, j], alone.objective)


def test_a_weight_counts_samples():
    X, y, _ = data(13, 4, 2, Hinge())
    G, ball = normal(14, 4, 2), LInf(0.05)
    weighted = robust_convex_relu(X, y, 0.1, G, ball, sample_weight=X.new_tensor([2, 1, 1, 1]), loss=Hinge())
    twice = robust_convex_relu(torch.cat([X, X[:1]]), torch.cat([y, y[:1]]), 0.1, G, ball, loss=Hinge())
    torch.testing.assert_close(weighted.objective, twice.objective, rtol=1e-8, atol=0)


def test_equal_gates_count_once():
    X, y, _ = data(17, 5, 2, Squared())
    G = normal(18, 4, 2)
    once = robust_convex_relu(X, y, 0.1, G, LInf(0.05))
    twice = robust_convex_relu(X, y, 0.1, torch.cat([G, 2 * G]), LInf(0.05))
    torch.testing.assert_close(twice.objective, once.objective, rtol=1e-9, atol=0)
    assert bool(once.v.any())
    assert not bool(twice.v[4:].any() | twice.w[4:].any())


def test_the_value_falls_neither_with_epsilon_nor_with_beta():
    X, y, _ = data(15, 6, 2, Logistic())
    gates = enumerate_gates(X)
    value = lambda b, e: robust_convex_relu(X, y, b, gates, LInf(e), loss=Logistic()).objective.item()  # noqa: E731
    for values in ([value(0.1, e) for e in (0.0, 0.02, 0.05, 0.1)], [value(b, 0.05) for b in (0.05, 0.1, 0.2, 0.4)]):
        assert all(np.diff(values) > 1e-4)


def test_the_gap_is_a_bound_for_a_starved_solver_too():
    X, y, _ = data(16, 6, 2, Hinge())
    gates = enumerate_gates(X)
    best = robust_convex_relu(X, y, 0.1, gates, LInf(0.05), loss=Hinge())
    for steps in (3, 5, 8):
        early = robust_convex_relu_ex(
            X, y, 0.1, gates, LInf(0.05), loss=Hinge(), solver=ClarabelSolver(max_steps=steps)
        )
        value = early.value
        assert value.objective >= best.objective - 1e-9, "neurons are put back into their cells, so no value lies below"
        assert value.objective - value.gap <= best.objective + 1e-9
        E = torch.where(gates.patterns, 1.0, -1.0)
        for p in (value.v, value.w):
            assert bool((E * (X @ p.mT) >= 0.05 * p.abs().sum(-1) - 1e-12).all())
        assert bool(early.converged) == bool(early.residual <= 1e-7)
    with pytest.warns(SolveWarning, match="stopped after 3 steps"):
        robust_convex_relu(X, y, 0.1, gates, LInf(0.05), loss=Hinge(), solver=ClarabelSolver(max_steps=3))


# ------------------------------------------------------------------------------------------------------------- margins


@pytest.mark.parametrize("ball", [LInf, L2])
@pytest.mark.parametrize("d", [2, 3])
def test_the_certified_margin_is_that_of_the_best_attack_on_training_points(d, ball):
    X, y, _ = data(20 + d, 7, d, Hinge())
    epsilon = 0.08
    found = robust_convex_relu(X, y, 0.01, enumerate_gates(X), ball(epsilon), loss=Hinge())
    network = to_network(found)
    certified = certified_margin(found, X, y, ball(epsilon))
    worst = attacked(network, X, y, grid(epsilon, d, ball))
    assert bool((certified <= worst + 1e-9).all())
    if ball is LInf:  # whose corners are on the grid
        torch.testing.assert_close(certified, worst, rtol=0, atol=1e-9)
    else:
        q = torch.where(found.gates.patterns.unsqueeze(-1), found.v - found.w, 0).sum(-2)
        move = -epsilon * y.unsqueeze(-1) * torch.nn.functional.normalize(q, dim=-1)
        torch.testing.assert_close(certified, y * network(X + move), rtol=0, atol=1e-9)
    each = (1 - certified).clamp(min=0).sum() + 0.01 * (found.v.norm(dim=-1) + found.w.norm(dim=-1)).sum()
    torch.testing.assert_close(each, found.objective, rtol=0, atol=1e-8)
    assert float((certified - y * predict(found, X)).max()) < -0.01, "the adversary has something to win"


def test_the_squared_loss_pays_for_the_worst_residual():
    X, y, _ = data(25, 6, 2, Squared())
    found = robust_convex_relu(X, y, 0.05, enumerate_gates(X), LInf(0.1))
    network = to_network(found)
    worst = torch.stack([(network(X + move) - y).abs() for move in grid(0.1, 2, LInf)]).amax(0)
    each = worst.square().sum() / 2 + 0.05 * (found.v.norm(dim=-1) + found.w.norm(dim=-1)).sum()
    torch.testing.assert_close(each, found.objective, rtol=0, atol=1e-9)


@pytest.mark.parametrize("ball", [LInf, L2])
def test_the_certified_margin_holds_everywhere(ball):
    p = normal(30, 2, 6, 2)
    nothing = p.new_zeros(())
    network = ConvexReLUSolution(p[0], p[1], nothing, nothing, Gates(p[0], nothing > 0))
    X, y = normal(31, 60, 2), normal(32, 60)
    for epsilon in (0.0, 0.1, 0.5, 3.0):
        certified = certified_margin(network, X, y, ball(epsilon))
        worst = attacked(lambda x: predict(network, x), X, y, grid(epsilon, 2, ball, 21))
        assert bool((certified <= worst + 1e-12).all())
    torch.testing.assert_close(certified_margin(network, X, y, ball(0.0)), y * predict(network, X))
    tight = certified_margin(network, X, y, ball(0.1))
    worst = attacked(lambda x: predict(network, x), X, y, grid(0.1, 2, ball, 21))
    assert float((tight >= worst - 1e-3).double().mean()) > 0.3, "exact where no neuron changes sides"


def test_the_certified_margin_leaves_fixed_columns_alone():
    p, nothing = normal(33, 2, 4, 3), torch.zeros((), dtype=torch.float64)
    network = ConvexReLUSolution(p[0], p[1], nothing, nothing, Gates(p[0], nothing > 0))
    X, y = normal(34, 20, 3), normal(35, 20).sign()
    moves = torch.nn.functional.pad(grid(0.2, 2, LInf), (0, 1))
    certified = certified_margin(network, X, y, LInf(0.2, fixed_columns=(2,)))
    assert bool((certified <= attacked(lambda x: predict(network, x), X, y, moves) + 1e-12).all())
    assert bool((certified > certified_margin(network, X, y, LInf(0.2))).all())


def test_a_gated_network_has_no_margin():
    X, y, _ = data(36, 4, 2, Hinge())
    gated = convex_gated_relu(X, y, 0.1, normal(37, 3, 2))
    with pytest.raises(ValueError, match="solution: expected a ReLU network, got a gated one"):
        certified_margin(gated, X, y, LInf(0.1))


# ------------------------------------------------------------------------------------------------------- narrow cells


def radius(X: Tensor, pattern: Tensor) -> float:
    """The largest epsilon for which a neuron keeps its side on all balls, by a linear program."""
    n, d = X.shape
    K = (torch.where(pattern, 1.0, -1.0).unsqueeze(-1) * X).numpy()
    rows = np.hstack([-K, K, np.ones((n, 1))])  # t <= K (a - b), sum(a + b) <= 1
    rows = np.vstack([rows, np.append(np.ones(2 * d), 0)])
    found = linprog(np.append(np.zeros(2 * d), -1), rows, np.append(np.zeros(n), 1), bounds=[(0, None)] * (2 * d + 1))
    return -found.fun


def test_narrow_gates_are_those_whose_largest_ball_is_smaller():
    X = normal(40, 6, 3)
    gates = enumerate_gates(X)
    radii = torch.tensor([radius(X, pattern) for pattern in gates.patterns.mT])
    assert len(radii) == 32
    for epsilon in (0.0, *radii.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist(), 10.0):
        assert torch.equal(narrow_gates(X, gates, LInf(epsilon)), radii <= epsilon)
    batch = narrow_gates(X, gates, LInf(radii.median() * torch.tensor([0.5, 2.0], dtype=torch.float64)))
    assert batch.shape == (2, 32)
    assert batch.sum(-1).tolist() == [int((radii <= radii.median() * f).sum()) for f in (0.5, 2.0)]
    assert narrow_gates(torch.zeros(0, 2, 3), torch.ones(4, 3), LInf(0.1)).shape == (0, 4)


def test_neurons_of_narrow_gates_are_zero_and_others_are_in_their_cells():
    X, y, _ = data(41, 6, 3, Squared())
    gates = enumerate_gates(X)
    narrow = narrow_gates(X, gates, LInf(0.1))
    assert 0 < int(narrow.sum()) < len(narrow)
    found = robust_convex_relu(X, y, 0.01, gates, LInf(0.1))
    E = torch.where(gates.patterns, 1.0, -1.0).double()
    for p in (found.v, found.w):
        assert not bool(p[narrow].any())
        assert bool((E * (X @ p.mT) >= 0.1 * p.abs().sum(-1) - 1e-13).all())
    assert bool((found.v != 0).any())


@pytest.mark.parametrize("on_failure", ["raise", "nan", "ignore"])
def test_a_zero_network_is_explained_where_every_cell_is_too_narrow(on_failure):
    X, y, _ = data(42, 5, 2, Squared())
    X, epsilon = torch.stack([X, X]), torch.tensor([100.0, 0.01]).double().requires_grad_()
    with pytest.warns(UserWarning, match=r"in 1 of 2 batch elements the cells of all 10 gates are too narrow"):
        found = robust_convex_relu(X, y, 0.1, enumerate_gates(X[0]), LInf(epsilon), on_failure=on_failure)
    assert not bool(found.v[0].any() | found.w[0].any())
    assert bool(found.v[1].any())
    torch.testing.assert_close(found.objective[0].detach(), y.square().sum() / 2)
    assert found.gap[0] == 0
    (slope,) = torch.autograd.grad(found.objective.sum(), epsilon)
    assert slope[0] == 0
    assert slope[1] > 0


def test_a_large_beta_is_no_narrow_cell():
    X, y, _ = data(43, 5, 2, Squared())
    X.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = robust_convex_relu(X, y, 100.0, enumerate_gates(X.detach()), LInf(0.01))
    assert not bool(found.v.any() | found.w.any())
    assert not bool(torch.autograd.grad(found.objective, X)[0].any())


# --------------------------------------------------------------------------------------------------------- derivatives


def difference(value, inputs, k: int, move: Tensor, h: float = 2e-4) -> Tensor:
    """A central difference of input k along a move, extrapolated once."""

    def one(step: float) -> Tensor:
        ends = [value(*inputs[:k], inputs[k] + sign * step * move, *inputs[k + 1 :]) for sign in (1, -1)]
        return (ends[0] - ends[1]) / (2 * step)

    return (4 * one(h) - one(2 * h)) / 3


@pytest.mark.parametrize("ball", [LInf, L2])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_the_derivative_of_the_value_is_that_of_re_solved_problems(loss, ball):
    X, y, s = data(50, 6, 3, loss, bias=True)
    G = normal(51, 5, 3)
    numbers = torch.tensor(0.1).double(), torch.tensor(0.06).double()

    def value(X, y, s, beta, epsilon):
        return robust_convex_relu(
            X, y, beta, G, ball(epsilon, fixed_columns=(2,)), sample_weight=s, loss=loss
        ).objective

    inputs = [t.clone().requires_grad_() for t in (X, y, s, *numbers)]
    found = torch.autograd.grad(value(*inputs), inputs)
    assert found[4] > 0.01, "cells or margins depend on epsilon"
    at = [t.detach() for t in inputs]
    for k, slope in enumerate(found):
        for seed in range(1 if slope.ndim == 0 else 3):
            move = normal(80 + 10 * k + seed, *slope.shape)
            torch.testing.assert_close((slope * move).sum(), difference(value, at, k, move), rtol=1e-6, atol=1e-6)


def test_cells_take_part_in_the_derivative():
    """At a problem whose cells bind; a Lagrangian without them misses part of every slope."""
    X, y, _ = data(69, 5, 2, Squared())
    epsilon = torch.tensor(0.1).double().requires_grad_()
    found = robust_convex_relu(X, y, 0.02, enumerate_gates(X), LInf(epsilon))
    (slope,) = torch.autograd.grad(found.objective, epsilon)
    q = torch.where(found.gates.patterns.unsqueeze(-1), found.v - found.w, 0).sum(-2).detach()
    a = q.abs().sum(-1)
    of_loss = (a * (((X * q).sum(-1) - y).abs() + 0.1 * a)).sum()
    assert slope > of_loss + 1


def test_a_second_derivative_is_refused():
    X, y, _ = data(53, 5, 2, Squared())
    y.requires_grad_()
    G = normal(54, 4, 2)
    value = lambda y: robust_convex_relu(X, y, 0.1, G, LInf(0.05)).objective  # noqa: E731
    (slope,) = torch.autograd.grad(value(y), y, create_graph=True)
    with pytest.raises(RuntimeError, match="or a second derivative: neurons of a cone program may not be unique"):
        slope.square().sum().backward()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.jacrev(torch.func.grad(value))(y.detach())
    assert bool(torch.isnan(jacfwd(torch.func.grad(value))(y.detach())).any()), "forward mode cannot raise: NaN"


@pytest.mark.parametrize("name", ["v", "w"])
def test_a_derivative_of_the_neurons_is_refused(name):
    X, y, _ = data(55, 5, 2, Squared())
    X.requires_grad_()
    G = normal(56, 4, 2)
    found = robust_convex_relu(X, y, 0.01, G, LInf(0.05))
    with pytest.raises(RuntimeError, match="Differentiate the objective once, and detach the neurons"):
        getattr(found, name).sum().backward()
    with pytest.raises(RuntimeError, match="detach the neurons"):
        predict(found, X.detach()).sum().backward()
    detached = found._replace(v=found.v.detach(), w=found.w.detach())
    certified_margin(detached, X, y, LInf(0.05)).sum().backward()
    assert X.grad is not None
    f = lambda X: getattr(robust_convex_relu(X, y, 0.01, G, LInf(0.05)), name)  # noqa: E731
    assert bool(torch.isnan(jvp(f, (X.detach(),), (torch.ones_like(X),))[1]).all())


def test_the_gap_has_no_derivative():
    X, y, _ = data(57, 5, 2, Squared())
    assert not robust_convex_relu(X.requires_grad_(), y, 0.1, normal(58, 4, 2), LInf(0.05)).gap.requires_grad


# ------------------------------------------------------------------------------------------------------------ failures


def test_a_bad_element_spoils_no_other():
    X, y, s = data(60, 4, 2, Squared())
    y = torch.stack([y, y + 1, y - 1])
    G, weight = normal(61, 4, 2), torch.tensor([1.0, 0.0, 2.0]).double()

    def derivatives(y):
        shared = [t.clone().requires_grad_() for t in (X, y, s)]
        found = robust_convex_relu(shared[0], shared[1], 0.1, G, LInf(0.05), sample_weight=shared[2], on_failure="nan")
        return found, torch.autograd.grad(found.objective, shared, weight)

    bad = y.clone()
    bad[1, 2] = math.nan
    clean, slopes = derivatives(y)
    spoilt, others = derivatives(bad)
    for name in ("objective", "gap", "v", "w"):
        got, expected = getattr(spoilt, name).detach(), getattr(clean, name).detach()
        assert bool(torch.isnan(got[1]).all())
        assert torch.equal(got[[0, 2]], expected[[0, 2]])
    assert not bool(others[1][1].any()), "exact zeros for an element nobody asks for"
    for got, expected in zip(others, slopes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
    status = robust_convex_relu_ex(X, bad, 0.1, G, LInf(0.05)).status
    assert status.tolist() == [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
    with pytest.raises(ValueError, match="y: expected finite numbers, got 1 NaN or Inf of 12"):
        robust_convex_relu(X, bad, 0.1, G, LInf(0.05))
    with pytest.raises(ValueError, match="epsilon: expected finite numbers"):
        robust_convex_relu(X, y[0], 0.1, G, LInf(torch.tensor(math.nan, dtype=torch.float64)))


def test_shared_arguments_collect_the_slopes_of_all_elements():
    X, y, _ = data(62, 4, 2, Squared())
    y, G = torch.stack([y, 2 * y]), normal(63, 4, 2)
    X.requires_grad_()
    value = lambda y: robust_convex_relu(X, y, 0.1, G, LInf(0.05)).objective.sum()  # noqa: E731
    (both,) = torch.autograd.grad(value(y), X)
    parts = [torch.autograd.grad(value(one), X)[0] for one in y]
    torch.testing.assert_close(both, parts[0] + parts[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"robustness": 0.1}, r"robustness: expected LInf\(epsilon\) or L2\(epsilon\), got 0.1"),
        ({"robustness": LInf(-0.1)}, "epsilon: expected at least 0, got -0.1"),
        ({"robustness": LInf("wide")}, "epsilon: expected a number or a tensor, got str"),
        ({"robustness": LInf(torch.tensor(1))}, "epsilon: expected a floating-point tensor"),
        ({"robustness": LInf(torch.tensor(0.1))}, r"epsilon: expected dtype torch.float64 as of X"),
        ({"robustness": LInf(torch.ones(3).double())}, "epsilon: expected batch dimensions that broadcast"),
        ({"robustness": LInf(0.1, fixed_columns=(2,))}, "fixed_columns: expected columns from -2 to 1 as of X, got 2"),
        ({"robustness": LInf(0.1, fixed_columns=-1)}, "fixed_columns: expected a tuple of integers, got -1"),
        ({"solver": 3}, r"solver: expected ClarabelSolver\(\) or None, got 3"),
        ({"loss": "hinge"}, "loss: expected"),
        ({"beta": 0.0}, "beta: expected more than 0"),
        ({"y": torch.zeros(2, 4).double(), "loss": Hinge()}, "y: expected labels -1 and 1"),
        ({"on_failure": "zero"}, "on_failure: expected"),
    ],
)
def test_wrong_input_is_refused(change, message):
    X, y = normal(70, 2, 4, 2), normal(71, 2, 4)
    given = {"X": X, "y": y, "beta": 0.1, "gates": normal(72, 3, 2), "robustness": LInf(0.1)} | change
    with pytest.raises(ValueError, match=message):
        robust_convex_relu(**given)


def test_options_of_the_solver_are_checked():
    for options, name in (({"rtol": 0.0}, "rtol"), ({"max_steps": 0}, "max_steps")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            ClarabelSolver(**options)


def test_a_failed_solve_raises(monkeypatch):
    import difflayers.relu._robust_rows as rows

    X, y, _ = data(73, 4, 2, Squared())
    broken = lambda self, *rest: (np.full(self.width, np.nan), {n: np.full(r.stop - r.start, np.nan) for n, r in self.rows.items()}, 1)  # noqa: E731, E501  # fmt: skip
    monkeypatch.setattr(rows.Program, "solve", broken)
    with pytest.raises(SolveError, match="robust_convex_relu"):
        robust_convex_relu(X, y, 0.1, normal(74, 3, 2), LInf(0.0))
