"""Matrix completion: recovery of incoherent matrices, and derivatives of the product of the factors."""

import pytest
import torch
from torch.func import hessian, jacfwd, jacrev, vmap

from difflayers import SolveError, SolveWarning
from difflayers.proximal import AlternatingMinimisation, complete_matrix, complete_matrix_ex

F64 = torch.float64


def problem(m, n, rank, share, noise=0.0, seed=0, batch=()):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*batch, *shape, generator=generator, dtype=F64)  # noqa: E731
    truth = draw(m, rank) @ draw(rank, n)
    return truth, truth + noise * draw(m, n), torch.rand(*batch, m, n, generator=generator) < share


@pytest.mark.parametrize(("m", "n", "rank", "share"), [(60, 50, 3, 0.4), (30, 80, 2, 0.3), (20, 20, 1, 0.3)])
def test_incoherent_matrices_are_recovered(m, n, rank, share):
    truth, M, mask = problem(m, n, rank, share)
    solution = complete_matrix_ex(M, mask, rank)
    assert solution.converged
    assert (solution.value - truth).norm() < 1e-8 * truth.norm()


def test_a_batch_of_masks():
    truth, M, mask = problem(30, 30, 2, 0.5, batch=(3,))
    assert ((complete_matrix(M, mask, 2) - truth).flatten(1).norm(dim=-1) < 1e-7 * 30).all()


@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize("size", [(8, 7), (30, 25)], ids=["dense", "conjugate gradients"])
def test_derivative_against_differences_of_a_tight_solve(size, ridge):
    _, M, mask = problem(*size, 2, 0.7, noise=0.2)
    tight = AlternatingMinimisation(rtol=1e-13, max_steps=20_000)
    g, move = torch.randn(size, dtype=F64), torch.randn(size, dtype=F64)
    mu = torch.tensor(ridge, dtype=F64)
    solve = lambda M, mu: (g * complete_matrix(M, mask, 2, ridge=mu, solver=tight)).sum()  # noqa: E731
    leaves = M.clone().requires_grad_(), mu.clone().requires_grad_()
    in_M, in_mu = torch.autograd.grad(solve(*leaves), leaves)
    h = 1e-5
    difference = (solve(M + h * move, mu) - solve(M - h * move, mu)) / (2 * h)
    assert float((in_M * move).sum()) == pytest.approx(float(difference), rel=1e-6)
    assert (in_M[~mask] == 0).all()
    if ridge:
        difference = (solve(M, mu + h) - solve(M, mu - h)) / (2 * h)
        assert float(in_mu) == pytest.approx(float(difference), rel=1e-6)


def test_ridge_is_the_nuclear_norm():
    """With all entries known the solution is the soft-thresholded SVD."""
    _, M, _ = problem(6, 5, 5, 1.0)
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    ridge = float(s[2:4].mean())
    wanted = (U * (s - ridge).clamp_min(0)) @ Vh
    found = complete_matrix(M, torch.ones(6, 5, dtype=torch.bool), 3, ridge=ridge)
    assert (found - wanted).norm() < 1e-8 * M.norm()


def test_gauge_leaves_no_trace_in_either_order():
    _, M, mask = problem(4, 4, 2, 0.85, noise=0.1, seed=3)
    f = lambda M: complete_matrix(M, mask, 2, solver=AlternatingMinimisation(rtol=1e-12))  # noqa: E731
    torch.testing.assert_close(jacfwd(f)(M), jacrev(f)(M), rtol=1e-7, atol=1e-7)
    loss = lambda M: f(M).square().sum()  # noqa: E731
    H = hessian(loss)(M).reshape(16, 16)
    torch.testing.assert_close(H, H.mT, rtol=1e-6, atol=1e-6)
    move, h = torch.randn(4, 4, dtype=F64), 1e-5
    slope = lambda M: torch.func.grad(loss)(M)  # noqa: E731
    difference = (slope(M + h * move) - slope(M - h * move)) / (2 * h)
    torch.testing.assert_close((H @ move.flatten()).reshape(4, 4), difference, rtol=1e-5, atol=1e-5)


def test_unknown_entries_do_not_matter():
    _, M, mask = problem(10, 10, 1, 0.6, noise=0.1)
    hidden = torch.where(mask, M, torch.nan).requires_grad_()
    X = complete_matrix(hidden, mask, 1)
    torch.testing.assert_close(X, complete_matrix(M, mask, 1))
    assert torch.isfinite(torch.autograd.grad(X.sum(), hidden)[0]).all()
    torch.testing.assert_close(vmap(lambda M: complete_matrix(M, mask, 1))(M.expand(2, 10, 10)), X.expand(2, 10, 10))


def test_a_row_without_entries_has_no_derivative():
    _, M, mask = problem(6, 6, 1, 1.1)
    mask[2] = False
    M.requires_grad_()
    with pytest.raises(SolveError, match="SINGULAR"):
        torch.autograd.grad(complete_matrix(M, mask, 1).sum(), M)


def test_starved_solver_warns():
    _, M, mask = problem(20, 20, 3, 0.5, noise=0.1)
    with pytest.warns(SolveWarning, match="complete_matrix"):
        complete_matrix(M, mask, 3, solver=AlternatingMinimisation(max_steps=1))
    with pytest.raises(ValueError, match="max_steps: expected at least 1"):
        AlternatingMinimisation(max_steps=0)
