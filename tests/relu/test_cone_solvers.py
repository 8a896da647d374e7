"""Solvers of the constrained convex program of a ReLU network over given patterns.

Oracles: Clarabel at a tolerance of 1e-10; patterns enumerated here by the sorted angles of the plane; L-BFGS from many
starts on the non-convex loss; dense matrices for every system that is solved in a factored form; the optimality
conditions written out block by block.
"""

import math

import cvxpy
import numpy as np
import pytest
import torch

from difflayers._solution import Status
from difflayers.relu._cone_admm import ADMM, _Loop
from difflayers.relu._cone_certificate import interior_shift, lower_bound
from difflayers.relu._cone_interior_point import InteriorPoint
from difflayers.relu._cone_lagrangian import AugmentedLagrangian
from difflayers.relu._cone_newton import NewtonSystem, SecondOrderScaling, gram_of
from difflayers.relu._cone_problem import ConeProblem, normalise


def all_patterns(X):
    """One gate between any two neighbouring angles at which a point of the plane changes sides."""
    X = X.numpy()
    angles = np.arctan2(X[:, 1], X[:, 0])
    edges = np.sort(np.concatenate([angles + math.pi / 2, angles - math.pi / 2]) % (2 * math.pi))
    middle = (edges + np.append(edges[1:], edges[0] + 2 * math.pi)) / 2
    return torch.from_numpy(np.unique(X @ np.stack([np.cos(middle), np.sin(middle)]) >= 0, axis=1)).double()


def data(n=24, d=2, gates=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64)
    first, second = torch.randn(d, 3, generator=generator).double(), torch.randn(3, generator=generator).double()
    y = (X @ first).relu() @ second + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)
    if gates is None:
        return X, y, all_patterns(X)
    return X, y, (X @ torch.randn(d, gates, generator=generator, dtype=torch.float64) >= 0).double()


def problem(X, y, M, beta=0.1, s=None):
    beta = torch.as_tensor(beta, dtype=X.dtype)
    return ConeProblem(X, y, torch.ones_like(y) if s is None else s, beta, M)


def clarabel(p, tol=1e-10):
    X, y, M, s = (t.double().numpy() for t in (p.X, p.y, p.M, p.s))
    v, w = cvxpy.Variable((X.shape[1], M.shape[1])), cvxpy.Variable((X.shape[1], M.shape[1]))
    fit = cvxpy.sum(cvxpy.multiply(M, X @ (v - w)), axis=1)
    norms = cvxpy.sum(cvxpy.norm(v, 2, axis=0)) + cvxpy.sum(cvxpy.norm(w, 2, axis=0))
    loss = cvxpy.sum_squares(cvxpy.multiply(np.sqrt(s), fit - y)) / 2
    cones = [cvxpy.multiply(2 * M - 1, X @ v) >= 0, cvxpy.multiply(2 * M - 1, X @ w) >= 0]
    program = cvxpy.Problem(cvxpy.Minimize(loss + float(p.beta) * norms), cones)
    tight = {"tol_gap_abs": tol, "tol_gap_rel": tol, "tol_feas": tol}
    return program.solve(solver="CLARABEL", **tight)


def blocks(solution):
    return torch.cat([solution.v, solution.w], -2), torch.cat([solution.rho_v, solution.rho_w], -2)


@pytest.mark.parametrize(("seed", "beta"), [(0, 0.1), (1, 1.0), (2, 1e-3)])
def test_the_optimum_over_all_patterns_is_that_of_clarabel_and_of_the_best_training_run(seed, beta):
    X, y, M = data(seed=seed)
    p = problem(X, y, M, beta)
    got = InteriorPoint().solve(p)
    expected = clarabel(p)
    assert got.status == Status.CONVERGED
    assert float(got.objective) == pytest.approx(expected, rel=1e-7)
    assert got.violation < 1e-8
    assert -1e-9 < got.gap / got.objective < 1e-7
    assert float(got.objective - got.gap) <= expected * (1 + 1e-8)

    best = math.inf
    for start in range(8):
        generator = torch.Generator().manual_seed(start)
        W = torch.randn(2, 30, generator=generator, dtype=torch.float64).requires_grad_()
        a = torch.randn(30, generator=generator, dtype=torch.float64).requires_grad_()
        search = torch.optim.LBFGS([W, a], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-12)

        def loss(W=W, a=a):
            return ((X @ W).relu() @ a - y).square().sum() / 2 + beta / 2 * (W.square().sum() + a.square().sum())

        def closure(search=search, loss=loss):
            search.zero_grad()
            value = loss()
            value.backward()
            return value

        search.step(closure)
        best = min(best, float(loss().detach()))
    assert float(got.objective) <= best * (1 + 1e-8)


def test_the_conditions_of_optimality_hold_block_by_block():
    X, y, M = data(60, 4, 10)
    p = problem(X, y, M, 0.5, torch.linspace(0, 2, 60, dtype=torch.float64))
    got = InteriorPoint().solve(p)
    residual = sum(M[:, i] * (X @ (got.v[i] - got.w[i])) for i in range(M.shape[1])) - y
    active = 0
    for sign, neurons, multipliers in ((1, got.v, got.rho_v), (-1, got.w, got.rho_w)):
        for i in range(M.shape[1]):
            K = (2 * M[:, i : i + 1] - 1) * X
            pull = -sign * X.T @ (M[:, i] * p.s * residual) + K.T @ multipliers[i]
            assert pull.norm() <= 0.5 * (1 + 1e-10)
            assert (multipliers[i] >= 0).all()
            assert (K @ neurons[i]).min() > -1e-12
            assert abs(multipliers[i] @ (K @ neurons[i])) < 1e-12
            if neurons[i].norm() > 1e-3:
                active += 1
                torch.testing.assert_close(pull, 0.5 * neurons[i] / neurons[i].norm(), rtol=0, atol=1e-10)
    assert active > 2


def repeated(X, y, M):
    return torch.cat([X, X[:9]]), torch.cat([y, y[:9]]), torch.cat([M, M[:9]])


def at_origin(X, y, M):
    return torch.cat([0 * X[:2], X[2:]]), y, M


CASES = {
    "repeated points": repeated,
    "repeated patterns": lambda X, y, M: (X, y, torch.cat([M, M[:, :3]], 1)),
    "dependent columns": lambda X, y, M: (torch.cat([X, X], 1), y, M),
    "a zero column": lambda X, y, M: (torch.cat([X, 0 * X[:, :1]], 1), y, M),
    "points at the origin": at_origin,
    "cells without interior": lambda X, y, M: (X, y, M.flip(0)),
    "constant labels": lambda X, y, M: (X, 0 * y + 1, M),
    "one point": lambda X, y, M: (X[:1], y[:1], M[:1]),
    "one column": lambda X, y, M: (X[:, :1], y, torch.cat([X[:, :1] >= 0, X[:, :1] <= 0], 1).double()),
    "one pattern": lambda X, y, M: (X, y, M[:, :1]),
    "columns of other sizes": lambda X, y, M: (X * torch.tensor([1.0, 30.0, 0.01]).double(), y, M),
}


@pytest.mark.parametrize("name", CASES)
def test_hostile_data(name):
    p = problem(*CASES[name](*data(30, 3, 6, seed=3)), 0.05)
    got = InteriorPoint().solve(p)
    assert got.status == Status.CONVERGED
    assert float(got.objective) == pytest.approx(clarabel(p, 1e-8), rel=1e-6)
    assert got.violation < 1e-7


@pytest.mark.parametrize("beta", [1e-8, 1e-4, 1e-2, 1.0, 10.0, 1e3])
def test_any_regularisation(beta):
    p = problem(*data(30, 3, 6, seed=3), beta)
    got = InteriorPoint().solve(p)
    expected = clarabel(p)
    assert got.status == Status.CONVERGED
    assert float(got.objective) == pytest.approx(expected, rel=1e-6)
    assert float(got.objective - got.gap) <= expected * (1 + 1e-7)


def test_above_the_largest_useful_regularisation_the_network_is_exactly_zero():
    X, y, M = data(30, 3, 6)
    bound = max((X.T @ (M[:, i] * y)).norm() for i in range(6))
    got = InteriorPoint().solve(problem(X, y, M, float(bound)))
    assert not got.v.any()
    assert not got.w.any()
    assert got.gap.abs() < 1e-12 * got.objective
    below = InteriorPoint().solve(problem(X, y, M, float(bound) * 0.2))
    assert below.v.any() or below.w.any()
    assert ((below.v == 0).all(-1) | (below.v.norm(dim=-1) > 1e-4)).all()  # zeros are zeros


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_scales(scale):
    X, y, M = data(30, 3, 6)
    plain, got = InteriorPoint().solve(problem(X, y, M)), InteriorPoint().solve(problem(X * scale, y / scale, M))
    torch.testing.assert_close(got.objective * scale**2, plain.objective, rtol=1e-7, atol=0)
    torch.testing.assert_close(got.v * scale**2, plain.v, rtol=0, atol=1e-4 * float(plain.v.abs().max()))


@pytest.mark.parametrize("solver", [InteriorPoint(), ADMM(max_steps=200), AugmentedLagrangian(max_steps=200)])
def test_elements_of_a_batch_do_not_meet(solver):
    X, y, M = data(30, 3, 6)
    X, y, M = torch.stack([X, 2 * X, X, X]), torch.stack([y, y, y, 0 * y]), M.expand(4, -1, -1)
    clean, y = y, y.clone()
    y[2, 4] = torch.nan
    beta = torch.tensor([0.1, 1.0, 0.1, 0.3], dtype=torch.float64)
    got = solver.solve(problem(X[None], y[None], M[None], beta[None]))
    assert got.v.shape == (1, 4, 6, 3)
    assert got.rho_w.shape == (1, 4, 6, 30)
    assert got.status[0, 2] == Status.DIVERGED
    assert got.v[0, 2].isnan().all()
    assert not got.v[0, 3].any()
    for name, with_nan, without in zip(
        got._fields, got, solver.solve(problem(X[None], clean[None], M[None], beta[None])), strict=True
    ):
        assert torch.equal(with_nan[0, [0, 1, 3]], without[0, [0, 1, 3]]), name
    for i in (0, 1):
        alone = solver.solve(problem(X[i], y[i], M[i], beta[i]))
        torch.testing.assert_close(alone.objective, got.objective[0, i], rtol=1e-8, atol=0)
        assert torch.equal(alone.status, got.status[0, i])
    none = solver.solve(problem(X[:0], y[:0], M[:0], beta[:0]))
    assert none.v.shape == (0, 6, 3)


def test_float32_is_solved_within_float64():
    X, y, M = data(40, 3, 8)
    p = problem(X.float(), y.float(), M.float())
    got = InteriorPoint().solve(p)
    assert got.v.dtype == got.gap.dtype == torch.float32
    assert got.status == Status.CONVERGED
    assert float(got.objective) == pytest.approx(clarabel(p), rel=1e-6)


def test_a_starved_solve_says_so():
    p = problem(*data(40, 3, 8))
    for solver in (InteriorPoint(max_steps=3), ADMM(max_steps=3), AugmentedLagrangian(max_steps=3)):
        got = solver.solve(p)
        assert got.status == Status.MAX_STEPS
        assert got.steps == 3
        assert got.residual > 1e-3


@pytest.mark.parametrize("solver", [ADMM(rtol=1e-5, max_steps=8000), AugmentedLagrangian(rtol=1e-4, max_steps=8000)])
def test_first_order_solvers_find_the_same_optimum(solver):
    p = problem(*data(20, 2, 5, seed=4), 0.5)
    got, exact = solver.solve(p), InteriorPoint().solve(p)
    assert got.status == Status.CONVERGED
    torch.testing.assert_close(got.objective, exact.objective, rtol=10 * solver.rtol, atol=0)
    again = solver.solve(p, init=got)
    assert again.status == Status.CONVERGED
    assert again.steps <= got.steps / 2


def dense(p):
    """``F`` and the blocks ``K`` of the definition."""
    count = p.M.shape[1]
    F = torch.cat([p.M[:, i : i + 1] * p.X for i in range(count)] + [-p.M[:, i : i + 1] * p.X for i in range(count)], 1)
    K = torch.block_diag(*[(2 * p.M[:, i : i + 1] - 1) * p.X for i in range(count)] * 2)
    return F, K


def test_the_step_of_admm_is_the_least_squares_solution_also_after_a_change_of_the_penalty():
    p, _, _ = normalise(problem(*data(12, 3, 4), 0.2, torch.linspace(0, 1, 12, dtype=torch.float64)))
    F, K = dense(p)
    loop = _Loop(p, 0.3)
    for factor in (1.0, 2.0):
        loop.primal, loop.dual = torch.ones(()), torch.ones(()) / (100 if factor == 2 else 1)
        loop.balance()
        assert float(loop.penalty) == pytest.approx(0.3 * factor)
        for _ in range(3):
            rho = loop.penalty
            matrix = torch.eye(24, dtype=torch.float64) + K.T @ K + F.T @ (p.s[:, None] * F) / rho
            side = F.T @ (p.s * p.y) / rho + (loop.v - loop.dual_v).flatten()
            u = torch.linalg.solve(matrix, side + K.T @ (loop.t - loop.dual_t).flatten())
            moved = u.view(8, 3) + loop.dual_v
            dual = loop.dual_v + u.view(8, 3) - moved * (1 - p.beta / (rho * moved.norm(dim=-1, keepdim=True))).relu()
            loop.step()
            torch.testing.assert_close(loop.dual_v, dual, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [3, 12])  # n more and less than d P
def test_the_newton_system_is_solved_in_either_form(count):
    generator = torch.Generator().manual_seed(0)
    p = problem(*data(20, 3, count), 0.2, torch.linspace(0, 1, 20, dtype=torch.float64))
    assert (gram_of(p, p.s) is None) == (count == 12)
    A = torch.randn(2 * count, 3, 3, generator=generator, dtype=torch.float64)
    A = A @ A.mT + torch.eye(3, dtype=torch.float64)
    u, b = (torch.randn(2 * count, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    u = u * (0.99999 / (u * torch.linalg.solve(A, u[..., None])[..., 0]).sum(-1, keepdim=True)).sqrt()
    F, _ = dense(p)
    matrix = torch.block_diag(*(A - u[:, :, None] * u[:, None, :])) + F.T @ (p.s[:, None] * F)
    got, n = NewtonSystem(p, p.s, gram_of(p, p.s), A, u).solve(b)
    torch.testing.assert_close(n, p.s * p.fit(got), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(got.flatten(), torch.linalg.solve(matrix, b.flatten()), rtol=1e-7, atol=1e-9)


def test_the_scaling_of_nesterov_and_todd():
    generator = torch.Generator().manual_seed(0)
    p, z = (torch.randn(7, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    t, beta = p.norm(dim=-1) + 0.3, z.norm(dim=-1) + 0.01
    scaling = SecondOrderScaling(t, p, beta, z)
    for got, expected in zip(scaling.apply(beta, z), scaling.apply(t, p, inverse=True), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    for got, expected in zip(scaling.apply(*scaling.apply(beta, z)), (t, p), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_the_bound_is_one_for_any_multipliers_and_any_network():
    p = problem(*data(20, 2), 0.3, torch.linspace(0, 1, 20, dtype=torch.float64))
    expected = clarabel(p)
    generator = torch.Generator().manual_seed(0)
    found = InteriorPoint().solve(p)
    exact, rho = blocks(found)
    assert float(found.objective - found.gap) == pytest.approx(expected, rel=1e-8)
    tightest = -math.inf
    for size in (0, 1e-6, 1e-3, 1, 100):
        noise = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
        more = torch.rand(rho.shape, generator=generator, dtype=torch.float64)
        bound = float(lower_bound(p, exact + size * noise, rho + size * more))
        assert bound <= expected * (1 + 1e-8)
        tightest = max(tightest, bound)
    assert tightest == pytest.approx(expected, rel=1e-7)


def test_a_shift_by_interior_points_ends_every_violation():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    g = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    p = problem(X, X[:, 0], (X @ g.T >= 0).double())
    loose = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    loose[3] = 0
    shifted = interior_shift(p, loose, g)
    assert p.violation(loose) > 0.1
    assert p.violation(shifted) < 1e-12
    assert not shifted[3].any()


@pytest.mark.parametrize("kind", [InteriorPoint, ADMM, AugmentedLagrangian])
def test_options(kind):
    for bad in ({"rtol": -1.0}, {"max_steps": 0}, {"check_every": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            kind(**bad)
    if kind is not InteriorPoint:
        with pytest.raises(ValueError, match="penalty: expected"):
            kind(penalty=0.0)
    assert hash(kind()) == hash(kind())
