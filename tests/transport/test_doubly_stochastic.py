"""Symmetric entropic projections onto doubly stochastic matrices.

Oracles, written down before the code: the conditions of optimality, which one plan meets alone (sums of 1, and a
logarithm that differs from A / gamma by a sum of row and column terms); Clarabel on the exponential cone; linear
programming for gamma to zero; derivatives by differences of Sinkhorn's iteration in numpy, and by the pseudo-solution
of the system with I + Pi; for infeasible supports small graphs whose perfect matchings are known.
"""

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from difflayers import SolveError, SolveWarning, Status
from difflayers.linalg import CG, Cholesky
from difflayers.transport import Coupling, SymmetricNewton, doubly_stochastic, doubly_stochastic_ex, sinkhorn

D = torch.float64
INF = torch.inf


def affinity(n: int, seed: int = 0, batch: tuple[int, ...] = ()) -> Tensor:
    return torch.randn(*batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=D)


def without_loops(A: Tensor) -> Tensor:
    return A.masked_fill(torch.eye(A.shape[-1], dtype=torch.bool), -INF)


def bipartite(A: Tensor) -> Tensor:
    side = torch.arange(A.shape[-1]) < A.shape[-1] // 2
    return A.masked_fill(side.unsqueeze(-1) == side, -INF)


def gradient(A: Tensor, gamma: float, G: Tensor, **options) -> Tensor:
    A = A.clone().requires_grad_()
    return torch.autograd.grad((doubly_stochastic(A, gamma, **options) * G).sum(), A)[0]


def excess(P: Tensor, A: Tensor, gamma: float) -> float:
    """How far log P - A / gamma is from a sum of row and column terms, where P may be positive."""
    some = torch.isfinite(A)
    n = A.shape[-1]
    rows, columns = some.nonzero(as_tuple=True)
    terms = torch.zeros(len(rows), 2 * n, dtype=D)
    terms[torch.arange(len(rows)), rows] = 1
    terms[torch.arange(len(rows)), n + columns] = 1
    logs = (P[some].log() - A[some] / gamma).unsqueeze(-1)
    return float((terms @ torch.linalg.pinv(terms) @ logs - logs).abs().max())


@pytest.mark.parametrize("restrict", [lambda A: A, without_loops, bipartite])
@pytest.mark.parametrize("gamma", [0.05, 0.5, 20.0])
def test_optimality(restrict, gamma):
    A = restrict(affinity(6))
    A = (A + A.mT) / 2
    P = doubly_stochastic(A, gamma)
    assert torch.equal(P, P.mT)
    assert bool((P[torch.isneginf(A)] == 0).all())
    assert float((P.sum(-1) - 1).abs().max()) < 1e-9
    assert excess(P, A, gamma) < 1e-10 / gamma


def test_cone_program():
    A = affinity(4)
    P = cp.Variable((4, 4))
    objective = -cp.sum(cp.multiply(A.numpy(), P)) + 0.3 * cp.sum(-cp.entr(P))
    program = cp.Problem(cp.Minimize(objective), [cp.sum(P, 0) == 1, cp.sum(P, 1) == 1, P == P.T])
    program.solve(cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    ours = doubly_stochastic(A, 0.3)
    # a gap of 1e-12 leaves its square root in the plan
    torch.testing.assert_close(ours, torch.from_numpy(P.value), rtol=0, atol=2e-6)
    value = float(-(A * ours).sum() + 0.3 * (ours * ours.log()).sum())
    assert abs(value - program.value) < 1e-9


def test_gamma_to_zero_is_a_linear_program():
    A = without_loops(affinity(8).clamp(-2, 2))
    A = (A + A.mT) / 2
    sums = np.concatenate([np.kron(np.eye(8), np.ones((1, 8))), np.kron(np.ones((1, 8)), np.eye(8))])
    allowed = torch.isfinite(A)
    costs = torch.where(allowed, -A, 0).numpy().ravel()
    bounds = [(0, None if ok else 0) for ok in allowed.flatten().tolist()]
    best = -linprog(costs, A_eq=sums, b_eq=np.ones(16), bounds=bounds).fun
    for gamma in (1e-1, 1e-2, 1e-3):
        P = doubly_stochastic(A, gamma)
        reached = float((P * torch.where(allowed, A, 0)).sum())
        assert best - gamma * 8 * np.log(8) <= reached <= best + 1e-8


def iterated(A: np.ndarray, gamma: float) -> np.ndarray:
    """Sinkhorn's iteration in numpy to rounding."""
    with np.errstate(divide="ignore"):
        logs = (A + A.T) / (2 * gamma)
    g = np.zeros(len(A))
    for _ in range(20_000):
        f = -np.logaddexp.reduce(logs + g, axis=1)
        new = -np.logaddexp.reduce(logs + f[:, None], axis=0)
        if np.abs(new - g).max() < 1e-15:
            break
        g = new
    return np.exp(logs + f[:, None] + g)


@pytest.mark.parametrize("restrict", [lambda A: A, without_loops, bipartite])
def test_derivatives_by_differences(restrict):
    A, G, gamma, h = restrict(affinity(4, 1)), affinity(4, 2), 0.4, 1e-5
    found = gradient(A, gamma, G)
    assert bool((found == found.mT).all())
    for i, j in [(0, 0), (0, 2), (1, 3), (3, 1)]:
        step = np.zeros((4, 4))
        step[i, j] = h
        ends = [(iterated(A.numpy() + s * step, gamma) * G.numpy()).sum() for s in (1, -1)]
        assert abs((ends[0] - ends[1]) / (2 * h) - float(found[i, j])) < 1e-8
    g = torch.tensor(gamma, dtype=D, requires_grad=True)
    slope = torch.autograd.grad((doubly_stochastic(A, g) * G).sum(), g)[0]
    ends = [(iterated(A.numpy(), gamma + s * h) * G.numpy()).sum() for s in (1, -1)]
    assert abs((ends[0] - ends[1]) / (2 * h) - float(slope)) < 1e-8


@pytest.mark.parametrize("adjoint", [None, Cholesky(), CG()])
@pytest.mark.parametrize("restrict", [lambda A: A, without_loops, bipartite])
def test_gradient_is_the_pseudo_solution(restrict, adjoint):
    A, G, gamma = restrict(affinity(12, 3)), affinity(12, 4), 0.5
    P, Gs = doubly_stochastic(A, gamma), (G + G.mT) / 2
    alpha = torch.linalg.lstsq(P + torch.eye(12, dtype=D), (P * Gs).sum(-1, keepdim=True), driver="gelsd").solution
    expected = P * (Gs - alpha - alpha.mT) / gamma
    torch.testing.assert_close(gradient(A, gamma, G, adjoint=adjoint), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("restrict", [lambda A: A, without_loops, bipartite])
def test_second_derivatives(restrict):
    A = affinity(4, 5, (2,)).requires_grad_()
    gamma = torch.tensor([0.4, 0.8], dtype=D, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda A, g: doubly_stochastic(restrict(A), g), (A, gamma))


def test_large_ones_take_products_and_agree_with_factors():
    A, G = affinity(300, 6), affinity(300, 7)
    A.requires_grad_()
    plans = [doubly_stochastic(A, 0.5, adjoint=adjoint) for adjoint in (None, Cholesky())]
    grads = [torch.autograd.grad((P * G).sum(), A)[0] for P in plans]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-8)
    one = torch.ones(300, dtype=D)
    balanced = sinkhorn(-(A + A.mT).detach() / 2, one, one, eps=0.5)
    torch.testing.assert_close(plans[0].detach(), balanced, rtol=0, atol=1e-9)


@pytest.mark.parametrize("restrict", [lambda A: A, without_loops, bipartite])
def test_float32_at_small_gamma(restrict):
    A = restrict(torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(8), dtype=D))
    single, double = doubly_stochastic(A.float(), 1e-3), doubly_stochastic(A, 1e-3)
    assert single.dtype == torch.float32
    assert float((single.sum(-1) - 1).abs().max()) < 2e-3
    assert float((single - double).abs().max()) < 2e-2
    G = torch.rand(20, 20, generator=torch.Generator().manual_seed(9))
    found = gradient(A.float(), 2e-2, G)
    expected = gradient(A, 2e-2, G.double())
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-3


@pytest.mark.parametrize("gamma", [1e-3, 1.0, 1e3])
def test_supports_without_a_matching_are_infeasible(gamma):
    star = torch.full((4, 4), -INF, dtype=D)
    star[0, 1:] = star[1:, 0] = torch.tensor([0.3, -1.0, 2.0], dtype=D)
    empty = affinity(4)
    empty[2] = -INF
    A = torch.stack([affinity(4), star, empty, without_loops(affinity(4, 1))])
    found = doubly_stochastic_ex(A, gamma)
    assert found.status.tolist() == [Status.CONVERGED, Status.INFEASIBLE, Status.INFEASIBLE, Status.CONVERGED]
    with pytest.raises(SolveError, match="INFEASIBLE"):
        doubly_stochastic(A, gamma)
    some = doubly_stochastic(A, gamma, on_failure="nan")
    assert bool(torch.isnan(some[1:3]).all())
    for i in (0, 3):
        torch.testing.assert_close(some[i], doubly_stochastic(A[i], gamma), rtol=0, atol=1e-12)


def test_entries_of_no_matching_vanish():
    # the second point may only meet the first, so nothing is left for the first and itself
    A = torch.tensor([[1.0, 0.5], [0.5, -INF]], dtype=D)
    torch.testing.assert_close(doubly_stochastic(A, 0.3), torch.eye(2, dtype=D).flip(0), rtol=0, atol=1e-9)


def test_steps_are_honest():
    A = torch.rand(16, 16, generator=torch.Generator().manual_seed(10), dtype=D)
    with pytest.warns(SolveWarning, match="doubly_stochastic"):
        doubly_stochastic(A, 1e-3, solver=SymmetricNewton(max_steps=2))
    found = doubly_stochastic_ex(A, 1e-3, solver=SymmetricNewton(max_steps=2))
    assert int(found.status) == Status.MAX_STEPS
    error = (found.value.plan.sum(-1) - 1).abs().mean()
    torch.testing.assert_close(found.residual, error, rtol=1e-6, atol=0)


def test_warm_start():
    A = without_loops(torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(11), dtype=D))
    first = doubly_stochastic_ex(A, 1e-2)
    again = doubly_stochastic_ex(A + 1e-6, 1e-2, warm_start=first)
    assert int(first.steps.min()) > 2
    assert int(again.steps.max()) <= 2
    torch.testing.assert_close(again.value.plan, first.value.plan, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="warm_start: expected a Solution"):
        doubly_stochastic(A, 1e-2, warm_start=3)


def test_units_do_not_matter():
    A = affinity(5, 12)
    expected = doubly_stochastic(A, 0.2)
    for unit in (1e-9, 1e9):
        torch.testing.assert_close(doubly_stochastic(A * unit, 0.2 * unit), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(doubly_stochastic(A + 1e3, 0.2), expected, rtol=0, atol=1e-12)
    single = doubly_stochastic_ex(A.float() + 1e3, 0.2)  # the affinity itself has an error of 3e-5
    assert int(single.status) == Status.CONVERGED
    torch.testing.assert_close(single.value.plan.double(), expected, rtol=0, atol=1e-4)
    p = doubly_stochastic_ex(A + 1e3, 0.2).value.f
    torch.testing.assert_close(p, doubly_stochastic_ex(A, 0.2).value.f - 500, rtol=0, atol=1e-9)
    assert int(doubly_stochastic_ex(A + 1e3, 0.2, warm_start=Coupling(expected, p, p)).steps) == 0


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("far", [-1e6, -1e15, -1e30])
def test_far_affinities_are_as_good_as_forbidden(dtype, far):
    A = affinity(6, 13).to(dtype)
    some = torch.eye(6, dtype=torch.bool)
    found = doubly_stochastic_ex(A.masked_fill(some, far), 0.3)
    assert int(found.status) == Status.CONVERGED
    expected = doubly_stochastic(A.masked_fill(some, -INF), 0.3)
    torch.testing.assert_close(found.value.plan, expected, rtol=0, atol=1e-9 if dtype == D else 1e-4)


def test_wrong_options():
    A = affinity(3)
    for call, message in (
        (lambda: doubly_stochastic(A, -1.0), "gamma: expected a number above 0"),
        (lambda: doubly_stochastic(A, "1"), "gamma: expected a number or a tensor"),
        (lambda: doubly_stochastic(A, 1.0, solver=3), r"solver: expected SymmetricNewton\(\)"),
        (lambda: doubly_stochastic(A, 1.0, adjoint=3), r"adjoint: expected Cholesky\(\)"),
        (lambda: doubly_stochastic(A[:0, :0], 1.0), "affinity: expected square matrices of at least one row"),
        (lambda: doubly_stochastic(A.masked_fill(A > 1, torch.nan), 1.0), "affinity: expected finite"),
        (lambda: SymmetricNewton(rtol=-1), "rtol: expected"),
        (lambda: SymmetricNewton(max_steps=0), "max_steps: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
