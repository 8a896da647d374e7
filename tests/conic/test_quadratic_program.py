"""Quadratic programs against Clarabel and against the exact KKT derivative; failing elements; linear programs."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from difflayers import SolveError, Status
from difflayers.conic import InteriorPoint, Moreau, project_polyhedron, quadratic_program, quadratic_program_ex

F64 = torch.float64
SOLVERS = [Moreau(), InteriorPoint()]


def problem(batch: int, n: int, seed: int = 0, m: int | None = None) -> list[torch.Tensor]:
    """Dense inequalities m = n and n/5 equalities, P, G and A shared: feasible by construction."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=F64)  # noqa: E731
    m, p = m or n, max(n // 5, 1)
    root = draw(n, n)
    P, G, A, q, x = (
        root @ root.T / n + 0.1 * torch.eye(n, dtype=F64),
        draw(m, n),
        draw(p, n),
        draw(batch, n),
        draw(batch, n),
    )
    return [P, q, G, x @ G.T + torch.rand(batch, m, generator=generator, dtype=F64), A, x @ A.T]


def exact(data: list[torch.Tensor], active: torch.Tensor) -> torch.Tensor:
    """The solution by a dense solve with the KKT matrix of the active set, element by element, under autograd."""
    P, q, G, h, A, b = data
    found = []
    for i in range(len(q)):
        C = torch.cat([A, G[active[i]]])
        zero = torch.zeros(len(C), len(C), dtype=F64)
        K = torch.cat([torch.cat([(P + P.T) / 2, C.T], 1), torch.cat([C, zero], 1)])
        found.append(torch.linalg.solve(K, torch.cat([-q[i], b[i], h[i][active[i]]]))[: q.shape[-1]])
    return torch.stack(found)


@pytest.mark.parametrize("solver", SOLVERS)
def test_equals_clarabel(solver):
    import cvxpy as cp

    P, q, G, h, A, b = problem(4, 10)
    found = quadratic_program_ex(P, q, G, h, A, b, solver=solver)
    for i in range(4):
        x = cp.Variable(10)
        rows = [G.numpy() @ x <= h[i].numpy(), A.numpy() @ x == b[i].numpy()]
        energy = cp.quad_form(x, cp.psd_wrap(P.numpy())) / 2 + q[i].numpy() @ x
        cp.Problem(cp.Minimize(energy), rows).solve(
            solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
        )
        np.testing.assert_allclose(found.value.x[i].numpy(), x.value, atol=1e-7)
        np.testing.assert_allclose(found.value.z[i].numpy(), rows[0].dual_value, atol=1e-6)
        np.testing.assert_allclose(found.value.y[i].numpy(), rows[1].dual_value, atol=1e-6)
    assert bool(found.converged.all()) and float(found.residual.max()) < 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("n", [10, 50])
def test_gradients_equal_those_of_the_exact_kkt_system(solver, n):
    """At 1e-9; gradients of shared arguments are sums over the batch, not means."""
    data = [t.requires_grad_() for t in problem(6, n)]
    active = quadratic_program_ex(*data, solver=solver).value.z > 0
    x, expected = quadratic_program(*data, solver=solver), exact(data, active)
    g = torch.cos(torch.arange(x.numel(), dtype=F64)).reshape(x.shape)
    pairs = zip(torch.autograd.grad(x, data, g), torch.autograd.grad(expected, data, g), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))


@pytest.mark.parametrize("given", ["G", "A", "GA", ""])
def test_multipliers_and_slacks_are_differentiable(given):
    P, q, G, h, A, b = problem(3, 5)
    data = [P, q, *([G, h] if "G" in given else []), *([A, b] if "A" in given else [])]

    def point(*data):
        P, q, *rest = data
        names = {"G": ("G", "h"), "A": ("A", "b")}
        keywords = dict(zip([n for letter in given for n in names[letter]], rest, strict=True))
        return torch.cat(quadratic_program_ex(P, q, **keywords).value, -1)

    leaves = [t.clone().requires_grad_() for t in data]
    assert gradcheck(point, leaves, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(point, leaves, fast_mode=True)


@pytest.mark.parametrize("solver", SOLVERS)
def test_infeasible_and_unbounded_elements_leave_the_others_to_the_bit(solver):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=F64)  # noqa: E731
    root = draw(64, 6, 6)
    good = [root @ root.mT / 6 + 0.1 * torch.eye(6, dtype=F64), draw(64, 6), draw(64, 8, 6), draw(64, 8).abs() + 0.1]
    P, q, G, h = bad = [t.clone() for t in good]
    G[5, 0], h[5, :2] = -G[5, 1], -5  # contradict each other
    P[9], q[9], G[9] = 0, 1, G[9].abs()  # falls for ever
    rest = torch.ones(64, dtype=torch.bool)
    rest[[5, 9]] = False

    def run(data):
        leaves = [t.clone().requires_grad_() for t in data]
        x = quadratic_program(*leaves, solver=solver, on_failure="nan")
        found = torch.autograd.grad(x[rest].sin().sum(), leaves)
        return quadratic_program_ex(*data, solver=solver).status, x, found

    _, x, first = run(good)
    status, y, second = run(bad)
    assert status[5] == Status.INFEASIBLE and status[9] == Status.UNBOUNDED
    assert bool((status[rest] == Status.CONVERGED).all())
    assert torch.equal(x[rest], y[rest]) and bool(torch.isnan(y[[5, 9]]).all())
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a[rest], b[rest]) and bool((b[[5, 9]] == 0).all())
    with pytest.raises(SolveError, match=r"INFEASIBLE.*UNBOUNDED"):
        quadratic_program(*bad, solver=solver)


@pytest.mark.parametrize("solver", SOLVERS)
def test_vertex_of_a_linear_program(solver):
    """Exactly no derivative in the cost, the inverse of the active rows in the bounds."""
    P = torch.zeros(3, 3, dtype=F64)
    eye = torch.eye(3, dtype=F64)
    G, h = torch.cat([eye, -eye]), torch.tensor([1.0, 2, 3, 1, 1, 1], dtype=F64).requires_grad_()
    q = torch.tensor([-1.0, 2.0, -0.5], dtype=F64, requires_grad=True)
    x = quadratic_program(P, q, G, h, solver=solver)
    torch.testing.assert_close(x, torch.tensor([1.0, -1.0, 3.0], dtype=F64))
    in_q, in_h = torch.autograd.grad(x[1], (q, h))
    assert bool((in_q.abs() < 1e-12).all())
    torch.testing.assert_close(in_h, torch.tensor([0.0, 0, 0, 0, -1, 0], dtype=F64))


@pytest.mark.parametrize("solver", SOLVERS)
def test_infinite_bounds_bind_nothing(solver):
    P, q, G, h, _, _ = problem(3, 6)
    h[:, 2] = math.inf
    h[1] = math.inf
    h.requires_grad_()
    x = quadratic_program(P, q, G, h, solver=solver)
    torch.testing.assert_close(x[1], -torch.linalg.solve(P, q[1]))
    (slope,) = torch.autograd.grad(x.sum(), h)
    assert bool(torch.isfinite(slope).all()) and bool((slope[1] == 0).all()) and bool((slope[:, 2] == 0).all())


def test_an_indefinite_matrix_is_named():
    P = torch.eye(2, dtype=F64).repeat(3, 1, 1)
    P[1, 0, 0] = -0.5
    with pytest.raises(ValueError, match=r"P: expected a positive semidefinite matrix, got .* -0.5 in element 1"):
        quadratic_program(P, torch.ones(3, 2, dtype=F64))


def test_projection_on_a_polyhedron():
    x = torch.tensor([[2.0, 2.0], [0.1, 0.2]], dtype=F64)
    z = project_polyhedron(x, torch.ones(1, 2, dtype=F64), torch.tensor([2.0], dtype=F64))
    torch.testing.assert_close(z, torch.tensor([[1.0, 1.0], [0.1, 0.2]], dtype=F64))


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_of_zeros_bind_nothing(solver):
    """Such as padding; the active set of moreau 0.4 returns a wrong point for them."""
    P, q, G, h, _, _ = problem(3, 6)
    padded, bounds = torch.cat([G, torch.zeros(2, 6, dtype=F64)]), torch.cat([h, torch.ones(3, 2, dtype=F64)], -1)
    expected = quadratic_program(P, q, G, h, solver=solver)
    torch.testing.assert_close(quadratic_program(P, q, padded, bounds, solver=solver), expected)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("quadratic", ["definite", "singular", "none"])
@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e6, 1e9])
def test_units_do_not_matter(solver, quadratic, scale):
    """Objective, rows and variables in other units: the same solution and derivative, since both are known exactly."""
    P, q, G, h, A, b = problem(4, 6, seed=3)
    P = {"definite": P, "singular": torch.diag(torch.tensor([1.0, 1, 0, 0, 0, 0], dtype=F64)), "none": 0 * P}[quadratic]
    G = torch.cat([G, torch.eye(6, dtype=F64), -torch.eye(6, dtype=F64)])
    h = torch.cat([h, torch.full((4, 12), 5.0, dtype=F64)], -1)

    def run(P, q, G, h, A, b, unit=1.0):
        q, h = q.clone().requires_grad_(), h.clone().requires_grad_()
        x = quadratic_program(P, q, G, h, A, b, solver=solver) / unit
        weights = torch.linspace(-1, 1, 6, dtype=F64)
        by_q, by_h = torch.autograd.grad(x @ weights, (q, h), torch.ones(4, dtype=F64))
        return x, by_q, by_h

    x, by_q, by_h = run(P, q, G, h, A, b)
    others = {
        "objective": (run(P * scale, q * scale, G, h, A, b), scale, 1.0),
        "rows": (run(P, q, G * scale, h * scale, A * scale, b * scale), 1.0, scale),
        "variables": (run(P / scale, q, G, h * scale, A, b * scale, scale), 1.0, scale),
    }
    for (x2, by_q2, by_h2), unit_q, unit_h in others.values():
        # a derivative that is zero, as a vertex has in q, is so up to rounding in its own units
        atol = 1e-9 + (1e-14 * max(scale, 1 / scale) if quadratic == "none" else 0)
        for ours, theirs in ((x2, x), (by_q2 * unit_q, by_q), (by_h2 * unit_h, by_h)):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=atol)


def test_bad_solver_and_no_variables():
    one = torch.ones(1, dtype=F64)
    with pytest.raises(ValueError, match=r"solver: expected Moreau\(\), InteriorPoint\(\) or None, got 'x'"):
        quadratic_program(torch.eye(1, dtype=F64), one, solver="x")
    with pytest.raises(ValueError, match=r"q: expected at least 1 variable"):
        quadratic_program(one.new_zeros(0, 0), one.new_zeros(0))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_neither_curvature_nor_rows_is_unbounded(solver, dtype):
    P = torch.stack([torch.zeros(2, 2, dtype=dtype), torch.eye(2, dtype=dtype)])
    found = quadratic_program_ex(P, torch.ones(2, 2, dtype=dtype), solver=solver)
    assert found.status.tolist() == [Status.UNBOUNDED, Status.CONVERGED]
