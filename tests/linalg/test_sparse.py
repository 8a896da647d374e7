"""Sparse systems. Oracles: torch.linalg.solve of the dense matrix for values and derivatives, SciPy for a large one."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev, vmap

from difflayers import SolveError, Status
from difflayers.linalg import (
    CG,
    GMRES,
    LU,
    Cholesky,
    LinearOperator,
    SparseMatrix,
    SuperLU,
    linear_solve,
    linear_solve_ex,
)

F64 = torch.float64
SOLVERS = [None, SuperLU(), GMRES(), LU()]


def pattern(n, seed=0, density=0.3):
    mask = np.random.default_rng(seed).random((n, n)) < density
    mask |= np.eye(n, dtype=bool)
    rows, cols = np.nonzero(mask)
    crow = np.r_[0, np.cumsum(mask.sum(1))]
    return torch.tensor(rows), torch.tensor(cols), torch.tensor(crow)


def system(n, *batch, seed=0):
    rows, cols, crow = pattern(n, seed)
    rng = np.random.default_rng(seed + 1)
    values = torch.tensor(rng.standard_normal((*batch, len(rows)))) + 4.0 * (rows == cols)
    return SparseMatrix(crow, cols, values, (n, n)), torch.tensor(rng.standard_normal(n))


def dense(A):
    n = A.shape[0]
    rows = torch.repeat_interleave(torch.arange(n), A.crow_indices.diff())
    out = A.values.new_zeros((*A.values.shape[:-1], n, n))
    out[..., rows, A.col_indices] = A.values
    return out


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_values_equal_the_dense_solve(solver, batch):
    A, b = system(12, *batch)
    x = linear_solve(A, b, solver=solver)
    torch.testing.assert_close(x, torch.linalg.solve(dense(A), b.expand(*batch, 12)), rtol=1e-8, atol=1e-9)


def test_one_matrix_serves_many_right_hand_sides():
    A, _ = system(12)
    b = torch.tensor(np.random.default_rng(5).standard_normal((4, 3, 12)))
    want = torch.linalg.solve(dense(A), b.unsqueeze(-1)).squeeze(-1)
    for solver in SOLVERS:
        torch.testing.assert_close(linear_solve(A, b, solver=solver), want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("solver", [SuperLU(), GMRES()])
def test_gradients_on_the_pattern(solver):
    """The closed form: -q x^T on the pattern, q the adjoint solution."""
    A, b = system(9)
    values, b = A.values.requires_grad_(), b.requires_grad_()
    x = linear_solve(A, b, solver=solver)
    g = torch.linspace(-1, 2, 9, dtype=F64)
    got = torch.autograd.grad(x, (values, b), g)
    M = dense(A).detach()
    q, x = torch.linalg.solve(M.mT, g), torch.linalg.solve(M, b.detach())
    rows = torch.repeat_interleave(torch.arange(9), A.crow_indices.diff())
    torch.testing.assert_close(got[0], -(q[rows] * x[A.col_indices]), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(got[1], q, rtol=1e-8, atol=1e-10)


def test_derivatives_of_first_and_second_order_in_both_modes():
    A, b = system(5)
    f = lambda values, b: linear_solve(A._replace(values=values), b)  # noqa: E731
    inputs = A.values.requires_grad_(), b.requires_grad_()
    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True)
    values = A.values.detach()
    torch.testing.assert_close(jacfwd(f)(values, b.detach()), jacrev(f)(values, b.detach()))
    many = torch.stack([values, 2 * values, values + 0.1])
    torch.testing.assert_close(vmap(f, (0, None))(many, b.detach()), f(many, b.detach()))


def test_a_matrix_is_factorised_once_for_all_derivatives(monkeypatch):
    import scipy.sparse.linalg as sparse_linalg

    calls, splu = [], sparse_linalg.splu
    monkeypatch.setattr(sparse_linalg, "splu", lambda M: calls.append(1) or splu(M))
    A, b = system(6)
    values = A.values.requires_grad_()
    x = linear_solve(A, torch.stack([b, 2 * b, b + 1]))
    (g,) = torch.autograd.grad(x.square().sum(), values, create_graph=True)
    torch.autograd.grad(g.square().sum(), values)
    assert len(calls) == 1


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_torch_layouts_and_their_gradients(layout):
    A, b = system(6)
    M = getattr(dense(A), layout)().requires_grad_()
    W = dense(A).requires_grad_()
    x, want = linear_solve(M, b), torch.linalg.solve(W, b)
    torch.testing.assert_close(x, want)
    (g,) = torch.autograd.grad(x.square().sum(), M, create_graph=True)
    (h,) = torch.autograd.grad(want.square().sum(), W, create_graph=True)
    assert g.layout == M.layout
    torch.testing.assert_close(g.to_dense(), h * (dense(A) != 0))
    values = g.coalesce().values() if layout == "to_sparse" else g.values()
    assert torch.isfinite(values).all()


def test_coordinates_given_twice_are_summed():
    index = torch.tensor([[0, 1, 0], [0, 1, 0]])
    values = torch.tensor([1.0, 4.0, 1.0], dtype=F64)
    A = torch.sparse_coo_tensor(index, values, (2, 2), check_invariants=True)
    torch.testing.assert_close(linear_solve(A, torch.ones(2, dtype=F64)), torch.tensor([0.5, 0.25], dtype=F64))


def test_a_singular_element_is_left_to_itself():
    A, b = system(8, 3)
    values = A.values.clone()
    rows = torch.repeat_interleave(torch.arange(8), A.crow_indices.diff())
    values[1, rows == 2] = 0
    A = A._replace(values=values.requires_grad_())
    with pytest.raises(SolveError, match=r"elements 1\)"):
        linear_solve(A, b)
    solution = linear_solve_ex(A, b)
    assert solution.status.tolist() == [Status.CONVERGED, Status.SINGULAR, Status.CONVERGED]
    x = linear_solve(A, b, on_failure="nan")
    assert torch.isnan(x[1]).all()
    (g,) = torch.autograd.grad(x[[0, 2]].sum(), values)
    assert torch.isfinite(g).all() and (g[1] == 0).all()


def test_almost_singular_is_singular_at_any_scale():
    eps = 1e-17
    for scale in (1e-120, 1.0, 1e120):
        values = scale * torch.tensor([1.0, 1.0, 1.0, 1.0 + eps], dtype=F64)
        A = SparseMatrix(torch.tensor([0, 2, 4]), torch.tensor([0, 1, 0, 1]), values, (2, 2))
        assert linear_solve_ex(A, torch.ones(2, dtype=F64)).status == Status.SINGULAR
        fine = A._replace(values=scale * torch.tensor([1.0, 1.0, 1.0, 1.0 + 1e-10], dtype=F64))
        assert linear_solve_ex(fine, torch.ones(2, dtype=F64)).status == Status.CONVERGED


def test_symmetric_solvers():
    A, b = system(7)
    M = dense(A)
    S = ((M + M.mT) / 2 + 4 * torch.eye(7, dtype=F64)).to_sparse()
    for solver in (CG(), Cholesky()):
        torch.testing.assert_close(linear_solve(S, b, solver=solver), torch.linalg.solve(S.to_dense(), b))
        with pytest.raises(ValueError, match=r"A: expected a symmetric matrix for (CG|Cholesky)"):
            linear_solve(A, b, solver=solver)


@pytest.mark.parametrize("solver", [SuperLU(), CG(), GMRES()])
def test_a_large_system_equals_scipy(solver):
    from scipy import sparse
    from scipy.sparse.linalg import spsolve

    T = sparse.diags_array([-1.0, 2.1, -1.0], offsets=[-1, 0, 1], shape=(60, 60), dtype=float)
    A = (sparse.kron(T, sparse.eye_array(60)) + sparse.kron(sparse.eye_array(60), T)).tocsr()
    b = np.random.default_rng(0).standard_normal(3600)
    M = SparseMatrix(torch.tensor(A.indptr), torch.tensor(A.indices), torch.tensor(A.data), A.shape)
    got = linear_solve(M, torch.tensor(b), solver=solver)
    np.testing.assert_allclose(got, spsolve(A.tocsc(), b), rtol=1e-7, atol=1e-7)


def test_bad_input():
    A, b = system(4)
    with pytest.raises(ValueError, match=r"solver: expected a sparse A for SuperLU"):
        linear_solve(dense(A), b, solver=SuperLU())
    with pytest.raises(ValueError, match=r"solver: expected a sparse A for SuperLU"):
        linear_solve(LinearOperator(lambda p, v: v), b, solver=SuperLU())
    with pytest.raises(ValueError, match="A: expected a square matrix"):
        linear_solve(A._replace(shape=(4, 5)), b)
    with pytest.raises(ValueError, match="b: expected 4 entries"):
        linear_solve(A, torch.ones(5, dtype=F64))
    with pytest.raises(ValueError, match="init: expected None for the direct solver"):
        linear_solve(A, b, init=b)
    with pytest.raises(ValueError, match="A: expected finite numbers"):
        linear_solve(A._replace(values=A.values * torch.nan), b)
    with pytest.raises(ValueError, match="A: expected columns in"):
        linear_solve(A._replace(col_indices=A.col_indices.flip(0)), b)
    with pytest.raises(ValueError, match=r"A\.col_indices: expected a tensor of integers, got torch\.float32"):
        linear_solve(A._replace(col_indices=A.col_indices.float()), b)
    with pytest.raises(ValueError, match=r"A\.crow_indices: expected a tensor of integers, got list"):
        linear_solve(A._replace(crow_indices=A.crow_indices.tolist()), b)


def test_a_matrix_without_entries_is_singular():
    none = torch.zeros(0, dtype=torch.int64)
    A = SparseMatrix(torch.zeros(4, dtype=torch.int64), none, torch.zeros(2, 0, dtype=F64), (3, 3))
    for solver in (SuperLU(), GMRES()):
        assert linear_solve_ex(A, torch.ones(3, dtype=F64), solver=solver).status.tolist() == [Status.SINGULAR] * 2
