"""MINRES. Oracles: SciPy's minres, dense solves, pseudo-inverses, finite differences, and the counts of the theory."""

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.sparse import linalg as scipy_linalg

from difflayers import SolveError, Status
from difflayers.linalg import MINRES, LinearOperator, SparseMatrix, Tag, linear_solve, linear_solve_ex

F64 = torch.float64


def symmetric(spectrum, seed=0):
    """A dense matrix with these eigenvalues, and its eigenvectors."""
    n = len(spectrum)
    Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    A = (Q * np.asarray(spectrum)) @ Q.T
    return torch.tensor((A + A.T) / 2), torch.tensor(Q)


def vectors(*shape, seed=1):
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape))


def neumann(n):
    """Second differences without boundary values: constants are in the null space."""
    ones = np.ones(n - 1)
    return sparse.diags_array([-ones, np.r_[1, 2 * ones[1:], 1], -ones], offsets=[-1, 0, 1]).tocsr()


def ours(M):
    return SparseMatrix(torch.tensor(M.indptr), torch.tensor(M.indices), torch.tensor(M.data), M.shape)


def indefinite_laplacian(m, shift):
    """Helmholtz on a grid: some eigenvalues are below zero."""
    ones = np.ones(m)
    T = sparse.diags_array([-ones[1:], 2 * ones, -ones[1:]], offsets=[-1, 0, 1])
    eye = sparse.eye_array(m)
    M = (sparse.kron(T, eye) + sparse.kron(eye, T) - shift * sparse.eye_array(m * m)).tocsr()
    M.sort_indices()
    return M


@pytest.mark.parametrize(
    "spectrum", [np.linspace(-3, 5, 40), np.r_[-np.geomspace(1, 1e3, 20), np.geomspace(1, 50, 20)]]
)
def test_dense_indefinite(spectrum):
    A, _ = symmetric(spectrum)
    b = vectors(3, 40)
    solution = linear_solve_ex(A, b, solver=MINRES(rtol=1e-11))
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.value, torch.linalg.solve(A, b.mT).mT, rtol=1e-7, atol=1e-9)


def test_as_many_steps_as_distinct_eigenvalues():
    A, _ = symmetric([-2.0] * 7 + [1.0] * 9 + [4.0] * 4)
    solution = linear_solve_ex(A, vectors(20), solver=MINRES())
    assert int(solution.steps) == 3 and bool(solution.converged.all())


def test_the_iterates_are_scipys():
    """The same residual after the same number of steps, on a sparse indefinite matrix."""
    M = indefinite_laplacian(12, 0.7)
    b = vectors(144)
    for steps in (1, 2, 5, 20, 60):
        want, _ = scipy_linalg.minres(M, b.numpy(), rtol=0.0, maxiter=steps)
        got = linear_solve_ex(ours(M), b, solver=MINRES(rtol=0.0, max_steps=steps))
        assert int(got.steps) == steps
        np.testing.assert_allclose(got.value, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())


def test_dense_sparse_and_matrix_free_agree():
    M = indefinite_laplacian(7, 1.3)
    b, dense = vectors(2, 49), torch.tensor(M.toarray())
    free = LinearOperator(lambda p, v: v @ p[0], (dense,), tags=Tag.SYMMETRIC)
    want = torch.tensor(scipy_linalg.spsolve(M.tocsc(), b.numpy().T).T)
    for A in (dense, ours(M), free):
        torch.testing.assert_close(linear_solve(A, b, solver=MINRES(rtol=1e-12)), want, rtol=1e-9, atol=1e-9)


def test_singular_with_solutions_gives_the_shortest():
    n = 30
    b = vectors(n)
    b = b - b.mean()
    solution = linear_solve_ex(ours(neumann(n)), b, solver=MINRES())
    assert bool(solution.converged.all())
    want = np.linalg.pinv(neumann(n).toarray(), rcond=1e-12, hermitian=True) @ b.numpy()
    np.testing.assert_allclose(solution.value, want, rtol=1e-7, atol=1e-8 * np.abs(want).max())
    start = torch.full((n,), 3.0, dtype=F64)  # the part that the system leaves free stays
    moved = linear_solve(ours(neumann(n)), b, solver=MINRES(), init=start)
    torch.testing.assert_close(moved, solution.value + 3.0, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("n", [20, 60])
def test_without_a_solution_the_status_says_so(n, dtype):
    """What is left is a least-squares solution, not a step along the null space."""
    for seed in range(3):
        spectrum = np.linspace(-3, 5, n)
        spectrum[[3, n // 2]] = 0.0
        A, Q = symmetric(spectrum, seed)
        b = vectors(2, n, seed=seed)
        reached = b - (b @ Q[:, [3, n // 2]]) @ Q[:, [3, n // 2]].mT
        solution = linear_solve_ex(A.to(dtype), b.to(dtype), solver=MINRES())
        assert (solution.status == Status.SINGULAR).all()
        accuracy = 1e-6 if dtype == F64 else 2e-2
        torch.testing.assert_close(solution.value.double() @ A, reached, rtol=0, atol=accuracy)
        with pytest.raises(SolveError, match="SINGULAR"):
            linear_solve(A.to(dtype), b.to(dtype), solver=MINRES())


def test_a_right_hand_side_in_the_null_space_and_a_matrix_of_zeros():
    A = torch.tensor([[[0.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [2.0, 0.0]]], dtype=F64)
    b = torch.tensor([1.0, 0.0], dtype=F64)
    solution = linear_solve_ex(A, b, solver=MINRES())
    assert solution.status.tolist() == [Status.SINGULAR, Status.SINGULAR, Status.CONVERGED]
    torch.testing.assert_close(solution.value[2], torch.tensor([0.0, 0.5], dtype=F64))


def test_a_small_eigenvalue_is_not_taken_for_none():
    spectrum = np.linspace(1, 5, 40)
    spectrum[:20] *= -1
    spectrum[[3, 30]] = 1e-6, -2e-6
    for scale in (1e-9, 1.0, 1e9):
        A, _ = symmetric(spectrum * scale)
        solution = linear_solve_ex(A, vectors(40), solver=MINRES(rtol=1e-6))
        assert bool(solution.converged.all())


def test_elements_stop_alone():
    """Each with its own count, bit for bit as in other company, whatever becomes of the others."""
    quick, slow = symmetric([-1.0] * 8 + [2.0] * 8)[0], symmetric(np.linspace(-4, 4, 16))[0]
    b = vectors(3, 16)
    bad = torch.zeros(16, 16, dtype=F64)
    for other in (bad, torch.full_like(bad, float("nan"))):
        together = linear_solve_ex(torch.stack([quick, other, slow]), b, solver=MINRES())
        harmless = linear_solve_ex(torch.stack([quick, torch.eye(16, dtype=F64), slow]), b, solver=MINRES())
        assert together.status[1] != Status.CONVERGED
        for i in (0, 2):
            assert together.value[i].equal(harmless.value[i])
            assert together.steps[i] == harmless.steps[i] and together.status[i] == Status.CONVERGED
        assert together.steps[0] == 2 and together.steps[2] > 10


def test_preconditioned():
    """The absolute value of the map, inverted: two distinct eigenvalues are left."""
    d = torch.tensor(np.r_[np.geomspace(1, 1e4, 25), -np.geomspace(1, 1e3, 25)])
    A = LinearOperator(lambda p, v: p[0] * v, (d,), tags=Tag.SYMMETRIC, param_ndims=(1,))
    b = vectors(2, 50)
    solver = MINRES(preconditioner=lambda p, r: r / p[0].abs())
    solution = linear_solve_ex(A, b, solver=solver)
    assert (solution.steps <= 3).all() and bool(solution.converged.all())
    torch.testing.assert_close(solution.value, b / d, rtol=1e-8, atol=1e-10)
    solution = linear_solve_ex(A, b, solver=MINRES(preconditioner=lambda p, r: r / p[0]))
    assert (solution.status == Status.SINGULAR).all()


def test_a_preconditioner_that_turns_out_indefinite():
    """Not in the first residual, but in a later one."""
    d, b = torch.tensor([1.0, 2.0, 10.0], dtype=F64), torch.tensor([1.0, 1.0, 0.1], dtype=F64)
    A = LinearOperator(lambda p, v: p[0] * v, (d,), tags=Tag.SYMMETRIC, param_ndims=(1,))
    sign = torch.tensor([1.0, 1.0, -1.0], dtype=F64)
    solution = linear_solve_ex(A, b, solver=MINRES(preconditioner=lambda p, r: sign * r))
    assert solution.status == Status.SINGULAR and int(solution.steps) < 3


def test_without_read_backs():
    A, _ = symmetric(np.linspace(-3, 5, 12))
    b = vectors(2, 12)
    fixed = linear_solve_ex(A, b, solver=MINRES(check_every=None, max_steps=30))
    assert bool(fixed.converged.all())
    torch.testing.assert_close(fixed.value, linear_solve(A, b, solver=MINRES()), rtol=1e-8, atol=1e-9)


def test_derivatives():
    A, _ = symmetric([-2.0, -1.0, 1.5, 3.0])
    b = vectors(2, 4)
    solve = lambda A, b: linear_solve((A + A.mT) / 2, b, solver=MINRES(rtol=1e-13))  # noqa: E731
    A.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(solve, (A, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solve, (A, b))
    g = vectors(2, 4, seed=5)
    for got, want in zip(
        torch.autograd.grad(solve(A, b), (A, b), g),
        torch.autograd.grad(torch.linalg.solve((A + A.mT) / 2, b.mT).mT, (A, b), g),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_derivatives_of_a_singular_system():
    """Conductances of a ring: the potential is known up to a constant, differences of it are not."""
    n = 8
    here, there = torch.arange(n), (torch.arange(n) + 1) % n
    incidence = torch.zeros(n, n, dtype=F64)
    incidence[torch.arange(n), here], incidence[torch.arange(n), there] = 1.0, -1.0

    def laplacian(p, v):
        return (p[0] * (v @ incidence.mT)) @ incidence

    c, b = vectors(n).abs() + 0.5, vectors(n)
    c.requires_grad_(), b.requires_grad_()

    def potential(c, b):
        A = LinearOperator(laplacian, (c,), tags=Tag.SYMMETRIC)
        x = linear_solve(A, b - b.mean(), solver=MINRES(rtol=1e-13))
        return x - x.mean()

    def pseudo_inverse(c, b):
        L = incidence.mT @ torch.diag(c) @ incidence + torch.ones(n, n, dtype=F64) / n
        x = torch.linalg.solve(L, b - b.mean())
        return x - x.mean()

    torch.testing.assert_close(potential(c, b), pseudo_inverse(c, b), rtol=1e-9, atol=1e-10)
    g = vectors(n, seed=7)
    got, want = (torch.autograd.grad(f(c, b), (c, b), g) for f in (potential, pseudo_inverse))
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)
    assert torch.autograd.gradgradcheck(potential, (c, b))
    A = LinearOperator(laplacian, (c,), tags=Tag.SYMMETRIC)
    x = linear_solve(A, b - b.mean(), solver=MINRES())
    with pytest.raises(SolveError, match="adjoint"):  # the loss depends on what the system leaves free
        torch.autograd.grad(x[0], c)


def test_refusals():
    A, b = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.ones(2)
    with pytest.raises(ValueError, match="A: expected a symmetric matrix for MINRES"):
        linear_solve(A, b, solver=MINRES())
    M = SparseMatrix(torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1]), torch.tensor([1.0, 2.0, 1.0]), (2, 2))
    with pytest.raises(ValueError, match="A: expected a symmetric matrix for MINRES"):
        linear_solve(M, b, solver=MINRES())
    with pytest.raises(ValueError, match=r"A: expected tags=Tag.SYMMETRIC for MINRES"):
        linear_solve(LinearOperator(lambda p, v: v), b, solver=MINRES())
    with pytest.raises(ValueError, match="rtol"):
        MINRES(rtol=-1.0)
