"""Hypergradients of lower problems with inequalities or a set of their own.

Oracles, written down first: quadratic programs solved again by Clarabel through cvxpy at x +- e, and the upper
objective differenced (central differences of a function that is smooth while the active set stays: error of 1e-7 or so
of the solver and the step); projections with closed forms; rows that are known to be active left as equalities.
"""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch

from difflayers import SolveError
from difflayers.bilevel import Bilevel, hypergradient
from difflayers.implicit import Implicit
from difflayers.linalg import CG, GMRES, LU, MINRES
from tests.bilevel.method_toys import tensor

r = np.random.default_rng(8)
M = r.normal(size=(5, 5))
H, B, b = M @ M.T + np.eye(5), r.normal(size=(5, 3)), r.normal(size=5)
G, C, h = r.normal(size=(6, 5)), r.normal(size=(6, 3)) / 2, np.array([0.1, 0.2, 0.1, 3.0, 0.1, 2.0])
w, X = r.normal(size=5), r.normal(size=3)


def solve(x, rows=slice(None)):
    """min y'Hy/2 - (b + B x)'y subject to G y <= h + C x, and its multipliers."""
    y = cp.Variable(5)
    holds = [G[rows] @ y <= (h + C @ x)[rows]]
    problem = cp.Problem(cp.Minimize(cp.quad_form(y, cp.psd_wrap(H)) / 2 - (b + B @ x) @ y), holds)
    problem.solve(solver="CLARABEL", tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)
    return y.value, holds[0].dual_value


def program(scale=1.0, equality=False, rows=slice(None)):
    Ht, Bt, bt, Gt, Ct, ht, wt = (tensor(a) for a in (H, B, b, G, C, h, w))
    return Bilevel(
        upper=lambda x, y, batch: (wt @ y).sin() + y @ y / 2 + x @ x / 2,
        lower=lambda x, y, batch: y @ Ht @ y / 2 - (bt + Bt @ x) @ y,
        constraint=lambda x, y: scale * (Gt @ y - ht - Ct @ x)[rows],
        equality=equality,
    )


def upper(x):
    y, _ = solve(x)
    return np.sin(w @ y) + y @ y / 2 + x @ x / 2


@pytest.mark.parametrize("adjoint", [None, Implicit(), Implicit(LU()), Implicit(GMRES()), Implicit(MINRES())], ids=str)
def test_quadratic_program(adjoint):
    y, dual = solve(X)
    active = dual > 1e-6
    assert 1 < active.sum() < 5 and dual[active].min() > 1e-2  # strict complementarity, so that differences exist
    expected = [(upper(X + e) - upper(X - e)) / 2e-4 for e in 1e-4 * np.eye(3)]
    found = hypergradient(program(), tensor(X), tensor(y), adjoint=adjoint)
    np.testing.assert_allclose(found.grad, expected, rtol=1e-6, atol=1e-7)
    rows = torch.as_tensor(active).nonzero().flatten()
    known = hypergradient(program(equality=True, rows=rows), tensor(X), tensor(y), adjoint=adjoint)
    torch.testing.assert_close(found.grad, known.grad, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose((G @ found.adjoint.numpy())[active], 0, atol=1e-9)
    assert found.converged and found.stationarity < 1e-7


def test_rows_are_found_whatever_their_scale_and_near_a_solution():
    y, _ = solve(X)
    expected = hypergradient(program(), tensor(X), tensor(y)).grad
    for scale in (1e-6, 1e6):
        torch.testing.assert_close(
            hypergradient(program(scale), tensor(X), tensor(y)).grad, expected, rtol=1e-7, atol=0
        )
    for seed in range(3):
        moved = y + 1e-7 * np.random.default_rng(seed).normal(size=5)
        torch.testing.assert_close(hypergradient(program(), tensor(X), tensor(moved)).grad, expected, rtol=1e-5, atol=0)
    warm = hypergradient(program(), tensor(X), tensor(y))
    again = hypergradient(program(), tensor(X), tensor(y), init=warm.adjoint)
    assert again.steps == 0 and warm.steps > 3
    torch.testing.assert_close(again.grad, expected)


def test_interior_solution_and_none_at_all():
    """Rows that hold nothing are no rows: the hypergradient is that of the problem without a constraint."""
    problem = program()
    y = np.linalg.solve(H, b + B @ X)
    shift = tensor(G @ y - h - C @ X + 1e-1)
    slack = Bilevel(
        problem.upper, problem.lower, constraint=lambda x, y: problem.constraint(x, y) - shift.clamp_min(0) - 0.1
    )
    free = hypergradient(Bilevel(problem.upper, problem.lower), tensor(X), tensor(y)).grad
    torch.testing.assert_close(hypergradient(slack, tensor(X), tensor(y)).grad, free, rtol=1e-9, atol=1e-11)
    empty = Bilevel(problem.upper, problem.lower, constraint=lambda x, y: y[:0])
    torch.testing.assert_close(hypergradient(empty, tensor(X), tensor(y)).grad, free, rtol=1e-9, atol=1e-11)


def test_bounds_on_many_variables_and_a_weakly_active_one():
    """|y - x|^2 / 2 on y >= 0 is y = max(x, 0), with derivative 1 where x > 0, 0 where x < 0; at 0 the bound is
    weakly active (multiplier zero) and counts as inactive: 1, as the docstring says."""
    n = 600
    x = tensor(np.concatenate([[0.0], r.normal(size=n - 1)]))
    problem = Bilevel(
        lambda x, y, batch: (y * torch.arange(1, n + 1)).sum(),
        lambda x, y, batch: (y - x).square().sum() / 2,
        constraint=lambda x, y: -y,
    )
    found = hypergradient(problem, x, x.clamp_min(0)).grad
    torch.testing.assert_close(found, torch.where(x >= 0, torch.arange(1, n + 1), 0.0).double(), rtol=1e-9, atol=1e-9)


def test_ball_whose_curvature_counts():
    """min |y - c|^2 / 2 in |y| <= x: y = x c / |c|, so F = w'y has derivative w'c / |c| in x; 2 nu = |c| / x - 1.

    With a Hessian of the objective alone, in place of the Lagrangian's, the derivative in c would be off by |c| / x.
    """
    c, wt = tensor([3.0, -4.0, 12.0]), tensor([1.0, 2.0, -1.0])
    problem = Bilevel(
        lambda x, y, batch: wt @ y,
        lambda x, y, batch: (y - x[1:]).square().sum() / 2,
        constraint=lambda x, y: y @ y - x[0] ** 2,
    )
    x = torch.cat([tensor([2.0]), c])
    unit = c / 13
    expected = torch.cat([(wt @ unit)[None], 2 * (wt - (wt @ unit) * unit) / 13])
    torch.testing.assert_close(hypergradient(problem, x, 2 * unit).grad, expected, rtol=1e-9, atol=1e-11)


def test_dependent_active_rows():
    """The same row twice: multipliers are not unique, the solution and its derivative are."""
    y, _ = solve(X)
    twice = Bilevel(program().upper, program().lower, constraint=lambda x, y: program().constraint(x, y).repeat(2))
    expected = hypergradient(program(), tensor(X), tensor(y)).grad
    torch.testing.assert_close(hypergradient(twice, tensor(X), tensor(y)).grad, expected, rtol=1e-8, atol=1e-10)


def test_points_that_are_no_solutions_are_refused():
    y, _ = solve(X)
    with pytest.raises(ValueError, match=r"y: expected a point where constraint <= 0, got 0\.\d+ in row"):
        hypergradient(program(), tensor(X), tensor(y + 0.1))
    # y = 0 is at the bound -y <= 0 while the objective pulls inwards
    inward = Bilevel(lambda x, y, b: y, lambda x, y, b: (y - x).square() / 2, constraint=lambda x, y: -y)
    with pytest.raises(ValueError, match="row 0, which is at its bound: its multiplier would be negative"):
        hypergradient(inward, tensor(1.0), tensor(0.0))
    saddle = Bilevel(lambda x, y, b: y.sum(), lambda x, y, b: x * (y[0] - y[1] ** 2), constraint=lambda x, y: -y[:1])
    with pytest.raises(SolveError, match="bends downwards"):
        hypergradient(saddle, tensor(1.0), tensor([0.0, 0.0]))
    with pytest.raises(ValueError, match="adjoint: expected MINRES"):
        hypergradient(program(), tensor(X), tensor(y), adjoint=Implicit(CG()))


@pytest.mark.parametrize("adjoint", [None, Implicit(LU())], ids=str)
def test_projection_of_the_lower_variables(adjoint):
    """Bounds y <= x[:5] and y >= -1 as a set that depends on x, against the same as inequalities."""
    wt, Ht, bt = tensor(w), tensor(H), tensor(3 * b)
    x = tensor(np.array([0.2, 0.3, 0.1, 2.0, 5.0]))
    y = cp.Variable(5)
    holds = [y <= x.numpy(), y >= -0.2]
    cp.Problem(cp.Minimize(cp.quad_form(y, cp.psd_wrap(H)) / 2 - 3 * b @ y), holds).solve(
        solver="CLARABEL", tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13
    )
    assert max(v.dual_value.max() for v in holds) > 1e-2
    at = torch.minimum(tensor(y.value).round(decimals=10), x).clamp_min(-0.2)
    both = lambda x, y, batch: (wt @ y).sin() + x @ x, lambda x, y, batch: y @ Ht @ y / 2 - bt @ y
    projected = Bilevel(*both, project_lower=lambda y, x: torch.minimum(y, x).clamp_min(-0.2))
    bounded = Bilevel(*both, constraint=lambda x, y: torch.cat([y - x, -0.2 - y]))
    expected = hypergradient(bounded, x, at).grad
    torch.testing.assert_close(hypergradient(projected, x, at, adjoint=adjoint).grad, expected, rtol=1e-7, atol=1e-9)
    with pytest.raises(ValueError, match="project_lower output: expected shape"):
        hypergradient(Bilevel(*both, project_lower=lambda y, x: y[:2]), x, at)
    with pytest.raises(ValueError, match="project_lower: expected None next to a constraint"):
        hypergradient(Bilevel(*both, constraint=lambda x, y: -y, project_lower=lambda y, x: y), x, at)
    with pytest.raises(ValueError, match="project_joint: expected None without a constraint"):
        hypergradient(Bilevel(*both, project_joint=lambda x, y: (x, y)), x, at)


@pytest.mark.parametrize("equality", [False, True])
@pytest.mark.parametrize("size", [4, 6])
def test_a_constraint_may_leave_a_part_of_y_alone(equality, size):
    """Projections of x and of 2 x apart, so the hypergradient of ``sum u^3 + sum v^2`` is known by hand."""
    x = torch.linspace(0.5, 1.5, size, dtype=torch.float64)
    problem = Bilevel(
        upper=lambda x, y, batch: y[0].pow(3).sum() + y[1].square().sum(),
        lower=lambda x, y, batch: ((y[0] - x).square().sum() + (y[1] - 2 * x).square().sum()) / 2,
        constraint=lambda x, y: y[0][:4] - 1,
        equality=equality,
    )
    free = torch.ones(size, dtype=torch.bool)
    free[:4] = (x[:4] < 1) & (not equality)
    found = hypergradient(problem, x, (torch.where(free, x, 1), 2 * x))
    torch.testing.assert_close(found.grad, 8 * x + torch.where(free, 3 * x.square(), 0), rtol=1e-12, atol=0)
