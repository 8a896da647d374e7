"""Projection on transport plans: against a conic solver, linear programming, optimality, and at every scale."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacrev, jvp

from difflayers import SolveError, SolveWarning, Status
from difflayers.proximal import project_simplex, project_transport, project_transport_ex

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def sums(n: int, m: int, *batch: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    a, b = normal(*batch, n, seed=seed).exp(), normal(*batch, m, seed=seed + 1).exp()
    return a, b * (a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True))


def conic(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    import cvxpy as cp

    P = cp.Variable(x.shape, nonneg=True)
    constraints = [cp.sum(P, axis=1) == a.numpy(), cp.sum(P, axis=0) == b.numpy()]
    cp.Problem(cp.Minimize(cp.sum_squares(P - x.numpy()) / 2), constraints).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13
    )
    return torch.from_numpy(P.value)


def assert_optimal(x: Tensor, a: Tensor, b: Tensor, P: Tensor, tol: float = 1e-9) -> None:
    """Feasible, and no feasible direction descends: an error bound that needs no second solver."""
    assert (P >= 0).all()
    torch.testing.assert_close(P.sum(-1), a, atol=1e-12 * float(a.max()), rtol=1e-12)
    torch.testing.assert_close(P.sum(-2), b, atol=1e-12 * float(a.max()), rtol=1e-12)
    from scipy.optimize import linprog

    n, m = x.shape
    A = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    cost = (P - x).flatten().numpy()
    best = linprog(cost / np.abs(cost).max(), A_eq=A, b_eq=torch.cat([a, b]).numpy(), bounds=(0, None)).fun
    gap = float((P.flatten().numpy() * cost / np.abs(cost).max()).sum()) - best
    assert gap <= tol * float(a.sum()), f"a vertex is better by {gap:.1e}"


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(("n", "m"), [(4, 4), (3, 6), (7, 2)])
def test_equals_conic_solver(n, m, scale):
    x, (a, b) = scale * normal(n, m), sums(n, m)
    torch.testing.assert_close(project_transport(x, a, b), conic(x, a, b), atol=1e-7, rtol=0)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e3, 1e6])
def test_is_optimal_at_every_scale(scale):
    for n, m in ((20, 20), (12, 25)):
        x, (a, b) = scale * normal(n, m), sums(n, m)
        assert_optimal(x, a, b, project_transport(x, a, b))


def test_large_matrix_gives_the_optimal_assignment():
    from scipy.optimize import linear_sum_assignment

    x = 1e9 * normal(30, 30)
    rows, columns = linear_sum_assignment(-x.numpy())
    expected = torch.zeros_like(x)
    expected[torch.from_numpy(rows), torch.from_numpy(columns)] = 1
    torch.testing.assert_close(project_transport(x), expected, atol=1e-12, rtol=0)


def test_every_element_of_a_large_batch_converges():
    """Plans with parts that come to be disconnected, whose potentials are not unique, among them."""
    for scale in (0.3, 1.0, 5.0, 100.0):
        for n in (2, 3, 8):
            solution = project_transport_ex(scale * normal(256, n, n, seed=n))
            assert solution.converged.all()
            assert solution.steps.max() <= 40
            torch.testing.assert_close(solution.value.sum(-1), torch.ones(256, n, dtype=F64), atol=1e-12, rtol=0)


def test_single_row_is_the_simplex_without_choice_and_sums_of_one_column():
    x, (a, b) = normal(1, 5), sums(1, 5)
    torch.testing.assert_close(project_transport(x, a, b), b.unsqueeze(0))
    wide = normal(2, 3)
    # with free column sums the projection is that on two simplices: their sums, given back, change nothing
    free = project_simplex(wide, torch.tensor([1.0, 2.0], dtype=F64))
    torch.testing.assert_close(project_transport(wide, free.sum(-1), free.sum(-2)), free, atol=1e-12, rtol=0)


def test_transposed():
    x, (a, b) = normal(4, 6), sums(4, 6)
    weights = normal(4, 6, seed=3)
    found = jacrev(lambda *t: (weights * project_transport(*t)).sum(), (0, 1, 2))(x, a, b)
    other = jacrev(lambda x, a, b: (weights * project_transport(x.mT, b, a).mT).sum(), (0, 1, 2))(x, a, b)
    for f, o in zip(found, other, strict=True):
        torch.testing.assert_close(f, o)


def test_a_plan_stays_and_projecting_twice_changes_nothing():
    x, (a, b) = normal(5, 4), sums(5, 4)
    P = project_transport(x, a, b)
    torch.testing.assert_close(project_transport(P, a, b), P, atol=1e-12, rtol=0)


def test_float32_of_a_large_matrix():
    x, (a, b) = 1e4 * normal(8, 16, 16), sums(16, 16, 8)
    P = project_transport(x.float(), a.float(), b.float())
    assert P.dtype == torch.float32
    torch.testing.assert_close(P, project_transport(x.float().double(), a, b).float(), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------- derivatives


def of_logits(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return project_transport(x, a.softmax(-1), b.softmax(-1))


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (2, 3, 2), (1, 1)])
def test_derivatives(shape):
    args = normal(*shape), normal(*shape[:-1], seed=1), normal(*shape[:-2], shape[-1], seed=2)
    leaves = tuple(t.requires_grad_() for t in args)
    assert gradcheck(of_logits, leaves, check_forward_ad=True)
    assert gradgradcheck(of_logits, leaves, check_fwd_over_rev=True, fast_mode=True)


def test_jacobian_is_the_projector_of_the_support():
    x = normal(4, 4, seed=4)
    P = project_transport(x)
    J = jacrev(project_transport)(x).reshape(16, 16)
    torch.testing.assert_close(J, J.mT)
    torch.testing.assert_close(J @ J, J)
    edges = (P > 0).nonzero()
    conditions = torch.zeros(8, len(edges), dtype=F64)  # each entry counts in one row and one column
    conditions[edges[:, 0], range(len(edges))] = 1
    conditions[4 + edges[:, 1], range(len(edges))] = 1
    free = len(edges) - int(torch.linalg.matrix_rank(conditions))
    assert free > 0 and int(J.diagonal().sum().round()) == free


def test_derivative_of_a_permutation_is_zero_and_finite_in_the_sums():
    x = 5 * torch.eye(4, dtype=F64)[[2, 0, 3, 1]]
    ones = torch.ones(4, dtype=F64)
    leaves = x.requires_grad_(), ones.clone().requires_grad_(), ones.clone().requires_grad_()
    P = project_transport(*leaves)
    torch.testing.assert_close(P, x / 5)
    found = torch.autograd.grad((normal(4, 4) * P).sum(), leaves)
    torch.testing.assert_close(found[0], torch.zeros_like(x), atol=1e-14, rtol=0)
    assert all(torch.isfinite(g).all() and g.abs().max() < 10 for g in found)
    # more for row i and for its column: that entry alone takes it
    move = torch.zeros(4, dtype=F64)
    move[0] = 1
    _, moved = jvp(lambda a, b: project_transport(x.detach(), a, b), (ones, ones), (move, move[[1, 3, 0, 2]]))
    expected = torch.zeros(4, 4, dtype=F64)
    expected[0, 2] = 1
    torch.testing.assert_close(moved, expected, atol=1e-12, rtol=0)


def test_zero_sums_leave_empty_rows_and_finite_derivatives():
    x, a, b = normal(3, 4), torch.tensor([0.0, 1.0, 0.5], dtype=F64), torch.tensor([0.5, 0.0, 0.6, 0.4], dtype=F64)
    leaves = tuple(t.requires_grad_() for t in (x, a, b))
    P = project_transport(*leaves)
    assert (P[0] == 0).all() and (P[:, 1] == 0).all()
    with torch.no_grad():
        rest = project_transport(x[1:][:, [0, 2, 3]], a[1:], b[[0, 2, 3]])
    torch.testing.assert_close(P[1:][:, [0, 2, 3]], rest)
    found = torch.autograd.grad(P.square().sum(), leaves)
    assert all(torch.isfinite(g).all() for g in found)
    assert found[1][0] == 0 and found[2][1] == 0


def test_kink_takes_the_zero_branch():
    x = torch.eye(3, dtype=F64)  # its own projection, every other entry at a kink
    _, moved = jvp(project_transport, (x,), (normal(3, 3),))
    torch.testing.assert_close(moved, torch.zeros(3, 3, dtype=F64), atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------------------------------- verdicts


def test_different_totals_and_negative_sums_are_infeasible():
    x, (a, b) = normal(3, 2, 3), sums(2, 3, 3)
    b = b.clone()
    b[1, 0] += 0.1
    a[2, 0], b[2] = -a[2, 0], b[2] * (a[2, 1] - a[2, 0]) / (a[2, 1] + a[2, 0])
    solution = project_transport_ex(x, a, b)
    assert solution.status.tolist() == [Status.CONVERGED, Status.INFEASIBLE, Status.INFEASIBLE]
    with pytest.raises(SolveError, match="INFEASIBLE") as error:
        project_transport(x, a, b)
    assert error.value.solution.value.shape == x.shape
    P = project_transport(x, a, b, on_failure="nan")
    assert P[1:].isnan().all()
    assert torch.equal(P[0], project_transport(x[:1], a[:1], b[:1])[0])


def test_not_finite_is_refused_by_name():
    x, (a, b) = normal(2, 3), sums(2, 3)
    for i, name in enumerate("xab"):
        for bad in (math.nan, math.inf):
            args = [x.clone(), a.clone(), b.clone()]
            args[i].view(-1)[0] = bad
            with pytest.raises(ValueError, match=rf"^{name}: expected finite"):
                project_transport(*args)


def test_totals_may_differ_by_rounding():
    a, b = torch.rand(300), torch.rand(200)
    b = b * (a.sum() / b.sum())
    P = project_transport(torch.randn(300, 200), a, b)
    torch.testing.assert_close(P.sum(-1), a, atol=1e-5, rtol=1e-5)


def test_stopping_early_warns_and_gives_a_plan():
    x, (a, b) = 100 * normal(10, 12), sums(10, 12)
    with pytest.warns(SolveWarning, match="project_transport"):
        P = project_transport(x, a, b, max_steps=3)
    torch.testing.assert_close(P.sum(-1), a)
    assert (P >= 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert project_transport_ex(x, a, b, max_steps=3).status == Status.MAX_STEPS


def test_arguments_are_checked():
    x, (a, b) = normal(2, 3), sums(2, 3)
    for args, message in (
        ((x,), "a: expected row sums for a matrix that is not square, 2 x 3"),
        ((x, a), "b: expected a tensor where a is one"),
        ((x, None, b), "a: expected a tensor where b is one"),
        ((x, b, a), r"a: expected shape \(2,\)"),
        ((x, a, b.float()), "b: expected dtype torch.float64"),
        ((x[:0], a[:0], b), "x: expected at least one row"),
        ((x.long(), a, b), "x: expected a floating-point tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            project_transport(*args)
