"""RecycledGMRES. Oracles: dense solves for values and derivatives, SciPy's gcrotmk and gmres for products."""

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.sparse import linalg as sparse_linalg
from torch.autograd import gradcheck, gradgradcheck

from difflayers import SolveWarning, Status
from difflayers.linalg import (
    RecycledGMRES,
    RecycledSpace,
    SparseMatrix,
    linear_solve,
    linear_solve_ex,
    sort_systems,
)
from difflayers.linalg._recycled_gmres import _orthonormal, _smallest

F64 = torch.float64
N = 24


def convection(seed, spread):
    """Diffusion and convection on a grid, with a random reaction: nonsymmetric."""
    rng = np.random.default_rng(seed)
    diffusion = sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(N, N), dtype=float)
    slope = sparse.diags_array([-1.0, 1.0], offsets=[-1, 1], shape=(N, N), dtype=float)
    eye = sparse.eye_array(N)
    A = sparse.kron(diffusion + 0.1 * slope, eye) + sparse.kron(eye, diffusion)
    return (A + sparse.diags_array(spread * rng.random(N * N))).tocsr(), rng.standard_normal(N * N)


def ours(A):
    return SparseMatrix(torch.tensor(A.indptr), torch.tensor(A.indices), torch.tensor(A.data), A.shape)


def counted(A):
    calls = []
    product = lambda v: calls.append(1) or A @ v  # noqa: E731
    return sparse_linalg.LinearOperator(A.shape, matvec=product, dtype=float), calls


def general(*batch, n=30, seed=0):
    rng = np.random.default_rng(seed)
    A = torch.tensor(rng.standard_normal((*batch, n, n))) / n**0.5 + 1.5 * torch.eye(n, dtype=F64)
    return A, torch.tensor(rng.standard_normal((*batch, n)))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 30, 90])
@pytest.mark.parametrize(("restart", "recycle"), [(40, 10), (6, 2), (4, 1)])
def test_values_equal_the_dense_solve(n, restart, recycle):
    A, b = general(3, n=n)
    space = RecycledSpace()
    solver = RecycledGMRES(restart=restart, recycle=recycle, space=space)
    for shift in (0.0, 0.01, 0.02):
        M = A + shift * torch.eye(n, dtype=F64)
        got = linear_solve(M, b, solver=solver)
        torch.testing.assert_close(got, torch.linalg.solve(M, b), rtol=1e-7, atol=1e-8)


def test_fewer_products_than_scipy():
    """On a sequence of nonsymmetric systems, at one memory and one tolerance."""
    solver = RecycledGMRES(rtol=1e-8, restart=30, recycle=10, space=RecycledSpace())
    recycled, within, gcrot, gmres, CU = [], [], [], [], []
    for seed in range(5):
        A, b = convection(seed, 0.02)
        x = sparse_linalg.spsolve(A.tocsc(), b)
        for one, counts in ((solver, recycled), (RecycledGMRES(rtol=1e-8, restart=30, recycle=10), within)):
            solution = linear_solve_ex(ours(A), torch.tensor(b), solver=one)
            assert solution.status == Status.CONVERGED
            np.testing.assert_allclose(solution.value, x, atol=1e-6 * abs(x).max())
            counts.append(int(solution.steps))
        operator, calls = counted(A)
        _, failed = sparse_linalg.gcrotmk(operator, b, rtol=1e-8, m=20, k=10, CU=CU, discard_C=True)
        gcrot.append(len(calls))
        assert not failed
        operator, calls = counted(A)
        _, failed = sparse_linalg.gmres(operator, b, rtol=1e-8, restart=30, maxiter=100)
        gmres.append(len(calls))
        assert not failed
    assert sum(recycled[1:]) < 0.95 * sum(within[1:])
    assert sum(recycled[1:]) < 0.85 * sum(gcrot[1:])
    assert sum(recycled[1:]) < 0.75 * sum(gmres[1:])


def test_the_kept_directions_are_the_slow_ones():
    """Against the exact eigenvectors of the smallest eigenvalues."""
    eigenvalues = torch.cat([torch.tensor([1e-3, 2e-3, 4e-3], dtype=F64), torch.linspace(1, 3, 97, dtype=F64)])
    V = torch.tensor(np.random.default_rng(0).standard_normal((100, 100))) / 10 + torch.eye(100, dtype=F64)
    A = V @ torch.diag(eigenvalues) @ torch.linalg.inv(V)
    b, space = torch.ones(100, dtype=F64), RecycledSpace()
    linear_solve(A, b, solver=RecycledGMRES(restart=30, recycle=5, space=space))
    U = space.get(b, False)
    Q, slow = torch.linalg.qr(U.mT)[0], torch.linalg.qr(V[:, :3])[0]
    assert torch.linalg.svdvals(slow.mT @ Q).min() > 1 - 1e-6
    steps = [int(linear_solve_ex(A, b.roll(3) * torch.arange(100), solver=s).steps) for s in (
        RecycledGMRES(restart=30, recycle=5), RecycledGMRES(restart=30, recycle=5, space=space))]  # fmt: skip
    assert steps[1] < steps[0]


def test_images_are_orthonormal_and_dependent_ones_drop_out():
    A, _ = general(2, n=12)
    U = torch.tensor(np.random.default_rng(3).standard_normal((2, 4, 12)))
    U[:, 2] = U[:, 0] - 3 * U[:, 1]
    new, C = _orthonormal(U, U @ A.mT)
    torch.testing.assert_close(new @ A.mT, C)
    gram = C @ C.mT
    torch.testing.assert_close(gram, torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)))
    assert (gram.diagonal(dim1=-2, dim2=-1).sum(-1) - 3).abs().max() < 1e-12


def test_a_complex_pair_is_not_cut():
    block = torch.tensor([[3.0, 2.0], [-2.0, 3.0]], dtype=F64)
    M = torch.block_diag(torch.tensor([[5.0]], dtype=F64), block, torch.eye(2, dtype=F64))
    inside = torch.eye(5, dtype=F64)[:, :3]
    two, three = _smallest(M, 2), _smallest(M, 3)
    for basis in (two, three[:, :3]):
        assert torch.linalg.matrix_rank(basis) == 3
        assert (basis - inside @ (inside.mT @ basis)).abs().max() < 1e-12
    assert (three[:, 3] == 0).all()


def test_adjoint_systems_keep_their_own_directions():
    A, b = general(n=60)
    space = RecycledSpace()
    solver = RecycledGMRES(restart=20, recycle=5, space=space)
    A.requires_grad_()
    x = linear_solve(A, b, solver=solver)
    assert space.get(b, True) is None
    (g,) = torch.autograd.grad(x.sum(), A)
    forward, adjoint = space.get(b, False), space.get(b, True)
    assert forward is not None and adjoint is not None and not forward.requires_grad
    M = A.detach()
    q = torch.linalg.solve(M.mT, torch.ones(60, dtype=F64))
    torch.testing.assert_close(g, -torch.outer(q, torch.linalg.solve(M, b)), rtol=1e-6, atol=1e-8)
    space.clear()
    assert space.get(b, False) is None


def test_other_shapes_do_not_meet():
    space = RecycledSpace()
    solver = RecycledGMRES(restart=8, recycle=3, space=space)
    for n, batch in ((20, ()), (24, ()), (20, (2,))):
        A, b = general(*batch, n=n)
        torch.testing.assert_close(linear_solve(A, b, solver=solver), torch.linalg.solve(A, b), rtol=1e-7, atol=1e-8)
    assert repr(space).count("20)") == 2 and repr(space).count("24)") == 1


def test_derivatives_of_first_and_second_order():
    A, b = general(n=5)
    solver = RecycledGMRES(rtol=1e-13, restart=4, recycle=1, space=RecycledSpace())
    f = lambda A, b: linear_solve(A, b, solver=solver)  # noqa: E731
    inputs = A.requires_grad_(), b.requires_grad_()
    # a second adjoint solve starts from the directions of the first, and ends with other last digits
    assert gradcheck(f, inputs, check_forward_ad=True, nondet_tol=1e-10)
    assert gradgradcheck(f, inputs, nondet_tol=1e-10)


def test_preconditioner_and_start():
    A, b = general(2, n=50)
    d = torch.logspace(-3, 3, 50, dtype=F64)
    A = A * d
    space = RecycledSpace()
    exact = torch.linalg.solve(A, b)
    solver = RecycledGMRES(preconditioner=lambda params, r: r / d, restart=20, recycle=5, space=space)
    for _ in range(2):
        torch.testing.assert_close(linear_solve(A, b, solver=solver), exact, rtol=1e-6, atol=1e-8)
    assert (linear_solve_ex(A, b, solver=solver, init=exact).steps == 0).all()


def test_ends():
    A, b = general(3, n=20)
    solver = RecycledGMRES(restart=8, recycle=3, space=RecycledSpace())
    assert (linear_solve(A, 0 * b, solver=solver) == 0).all()
    spoilt = b.clone()
    spoilt[1] = torch.nan
    solution = linear_solve_ex(A, spoilt, solver=solver)
    assert solution.status.tolist() == [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
    again = linear_solve_ex(A, b, solver=solver)  # the space of a spoilt element is of no harm
    torch.testing.assert_close(again.value, torch.linalg.solve(A, b), rtol=1e-7, atol=1e-8)
    S = A.clone()
    S[0, :, 3] = S[0, :, 4]
    assert linear_solve_ex(S, b, solver=RecycledGMRES()).status.tolist()[0] == Status.SINGULAR
    with pytest.warns(SolveWarning, match="stopped after 2 steps"):
        linear_solve(A, b, solver=RecycledGMRES(max_steps=2))


@pytest.mark.parametrize("n", [12, 30, 50])
def test_a_map_that_hides_from_the_kept_directions(n):
    """A cyclic shift: no cycle short of n gains anything, and the kept image covers that of the residual."""
    A, b = torch.roll(torch.eye(n, dtype=F64), 1, 0), torch.eye(n, dtype=F64)[0]
    easy = 2 * torch.eye(n, dtype=F64)
    for recycle, space in ((3, None), (1, RecycledSpace()), (3, RecycledSpace())):
        for _ in range(2):
            solver = RecycledGMRES(restart=10, recycle=recycle, space=space)
            solution = linear_solve_ex(torch.stack([A, easy]), b, solver=solver)
            assert solution.converged.all()
            torch.testing.assert_close(solution.value, torch.stack([b.roll(-1), b / 2]))


def test_a_space_does_not_grow_for_ever():
    space = RecycledSpace()
    for count in range(1, 30):
        A, b = general(count, n=8)
        linear_solve(A, b, solver=RecycledGMRES(restart=4, recycle=2, space=space))
    assert repr(space).count("8)") == 16 and "(29, " in repr(space)


def test_systems_are_sorted_to_the_nearest():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(30, 2, 3, generator=generator, dtype=F64)
    order = sort_systems(p, start=4).tolist()
    at, left = 4, set(range(30)) - {4}
    for got in order[1:]:
        at = min(left, key=lambda i: float((p[i] - p[at]).square().sum()))
        left.remove(at)
        assert got == at
    assert order[0] == 4 and sorted(order) == list(range(30))
    p[3] = torch.nan
    assert sorted(sort_systems(p).tolist()) == list(range(30))
    assert sort_systems(torch.zeros(0, 2)).shape == (0,)


def test_bad_options():
    with pytest.raises(ValueError, match="restart: expected an integer of at least recycle"):
        RecycledGMRES(restart=10, recycle=10)
    with pytest.raises(ValueError, match="recycle: expected an integer of at least 1"):
        RecycledGMRES(recycle=0)
    with pytest.raises(ValueError, match="check_every: expected an integer of at least 1, got 0"):
        RecycledGMRES(check_every=0)
    with pytest.raises(ValueError, match="atol: expected None or a number of at least 0"):
        RecycledGMRES(atol=-1.0)
    with pytest.raises(ValueError, match="space: expected None or a RecycledSpace, got dict"):
        RecycledGMRES(space={})
    with pytest.raises(ValueError, match="start: expected a number from 0 to 2"):
        sort_systems(torch.zeros(3, 1), start=3)
    with pytest.raises(ValueError, match="parameters: expected a tensor"):
        sort_systems([1.0])
