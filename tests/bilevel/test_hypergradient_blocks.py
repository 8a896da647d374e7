"""Hypergradients of many lower problems that share x.

Oracle: a loop over the blocks, each a problem without blocks (whose hypergradients have closed forms elsewhere), and
the mean of their gradients; the closed form of ridge regression per block.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from difflayers import SolveError, Status
from difflayers.bilevel import MFAC, Bilevel, FiniteDifference, hypergradient
from difflayers.implicit import Implicit, Neumann, OneStep
from difflayers.linalg import CG, GMRES, LU, MINRES, Cholesky
from tests.bilevel.ridge import F64, randn

m, d = 4, 5
A, t, AV, TV = randn(m, 9, d, seed=1), randn(m, 9, seed=2), randn(m, 6, d, seed=3), randn(m, 6, seed=4)
HYPER = randn(d, seed=5)


def stack(y: dict[str, Tensor]) -> Tensor:
    return torch.cat([y["a"], y["b"].flatten(-2)], -1)


def upper(x, y, A, t):
    return ((A @ stack(y).unsqueeze(-1)).squeeze(-1) - t).square().sum(-1) / 2 + x.square().sum()


def lower(x, y, A, t):
    r = (A @ stack(y).unsqueeze(-1)).squeeze(-1) - t
    return r.square().sum(-1) / 2 + (x.exp() * stack(y).square()).sum(-1) / 2 + stack(y).pow(4).sum(-1) / 12


PROBLEM = Bilevel(lambda x, y, b: upper(x, y, AV, TV), lambda x, y, b: lower(x, y, A, t), blocks=m)


def tree(rows: Tensor) -> dict[str, Tensor]:
    return {"a": rows[..., :1], "b": rows[..., 1:].unflatten(-1, (2, 2))}


def single(i):
    return Bilevel(lambda x, y, b: upper(x, y, AV[i], TV[i]), lambda x, y, b: lower(x, y, A[i], t[i]))


Y = randn(m, d, seed=6) / 3
ADJOINTS = [
    None, Implicit(CG(rtol=1e-12)), Implicit(CG(), damping=0.3), Implicit(Cholesky()), Implicit(LU()),
    Implicit(MINRES()), Implicit(GMRES()), Neumann(7, 0.01), Neumann(40), OneStep(), FiniteDifference(),
]  # fmt: skip


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_blocks_are_a_loop(adjoint):
    found = hypergradient(PROBLEM, HYPER, tree(Y), adjoint=adjoint)
    alone = [hypergradient(single(i), HYPER, tree(Y[i]), adjoint=adjoint) for i in range(m)]
    rough = isinstance(adjoint, FiniteDifference)
    close = {"rtol": 1e-5, "atol": 1e-6} if rough else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(found.grad, torch.stack([one.grad for one in alone]).mean(0), **close)
    for name in ("a", "b"):
        torch.testing.assert_close(found.adjoint[name], torch.stack([one.adjoint[name] for one in alone]), **close)
    torch.testing.assert_close(found.value, torch.stack([one.value for one in alone]).mean())
    torch.testing.assert_close(found.stationarity, torch.stack([one.stationarity for one in alone]))
    assert found.status.shape == found.steps.shape == found.residual.shape == (m,)
    assert torch.equal(found.steps, torch.stack([one.steps for one in alone])) or rough
    if adjoint is None:  # one product for all blocks: as many as the slowest needs
        assert found.products == max(one.products for one in alone)
        again = hypergradient(PROBLEM, HYPER, tree(Y), init=found.adjoint)
        assert not again.steps.any()


def test_one_block_is_the_problem_itself():
    one = Bilevel(lambda x, y, b: upper(x, y, AV[:1], TV[:1]), lambda x, y, b: lower(x, y, A[:1], t[:1]), blocks=1)
    for adjoint in (None, Implicit(Cholesky()), Neumann(5, 0.01)):
        found = hypergradient(one, HYPER, tree(Y[:1]), adjoint=adjoint)
        alone = hypergradient(single(0), HYPER, tree(Y[0]), adjoint=adjoint)
        torch.testing.assert_close(found.grad, alone.grad, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(found.adjoint["b"][0], alone.adjoint["b"], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("bad", ["saddle", "nan"])
@pytest.mark.parametrize("adjoint", [None, Implicit(Cholesky()), Implicit(MINRES())], ids=str)
def test_a_bad_block_leaves_the_others_to_the_bit(adjoint, bad):
    value = {"saddle": -300.0, "nan": float("nan")}[bad]

    def spoiled(x, y, b, at=None):
        weight = torch.zeros(m, dtype=F64)
        weight[2] = value
        return lower(x, y, A, t) + torch.where(torch.arange(m) == 2, weight * y["a"].square().sum(-1), 0.0)

    problem = Bilevel(PROBLEM.upper, spoiled, blocks=m)
    good = hypergradient(PROBLEM, HYPER, tree(Y), adjoint=adjoint)
    found = hypergradient(problem, HYPER, tree(Y), adjoint=adjoint, on_failure="ignore")
    assert found.failed.tolist() == [False, False, True, False]
    others = torch.tensor([0, 1, 3])
    for name in ("a", "b"):
        assert torch.equal(found.adjoint[name][others], good.adjoint[name][others])
    masked = hypergradient(problem, HYPER, tree(Y), adjoint=adjoint, on_failure="nan")
    assert masked.grad.isnan().all()  # every number of x hangs on the mean
    assert torch.equal(masked.adjoint["b"][others], good.adjoint["b"][others])
    said = r"not positive definite at y in blocks \[2\]" if bad == "saddle" else r"1 of 4 .*\(elements 2\)|blocks \[2\]"
    with pytest.raises(SolveError, match=said) as error:
        hypergradient(problem, HYPER, tree(Y), adjoint=adjoint)
    assert (error.value.solution.status != Status.CONVERGED).tolist() == [False, False, True, False]
    assert torch.equal(error.value.solution.value.adjoint["a"][others], good.adjoint["a"][others])


def test_prox_and_projection_by_block():
    """Soft thresholds and bounds of every block, against the loop; one step length serves all blocks."""
    y = torch.linalg.solve(A.mT @ A, (A.mT @ t.unsqueeze(-1))).squeeze(-1)
    x = y.abs().mean() * torch.ones((), dtype=F64)

    def part(i):
        return Bilevel(
            lambda x, y, b: (y - 1).square().sum(-1),
            lambda x, y, b: ((A[i] @ y.unsqueeze(-1)).squeeze(-1) - t[i]).square().sum(-1) / 2,
            project_lower=lambda y, x: y.clamp(-x, x),
            blocks=m if isinstance(i, slice) else None,
        )

    def solve(i):
        z, s = y[i].clamp(-x, x), 1 / torch.linalg.matrix_norm(A[i], 2) ** 2
        for _ in range(3000):
            z = (z - s * A[i].mT @ (A[i] @ z - t[i])).clamp(-x, x)
        return z

    at = torch.stack([solve(i) for i in range(m)])
    assert 2 < (at.abs() == x).sum() < m * d - 2
    alone = [hypergradient(part(i), x, at[i]) for i in range(m)]
    found = hypergradient(part(slice(None)), x, at)
    torch.testing.assert_close(found.grad, torch.stack([one.grad for one in alone]).mean(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found.stationarity, torch.zeros(m, dtype=F64), atol=1e-7, rtol=0)
    broken = at.clone()
    bad = int(torch.linalg.matrix_norm(A, 2).argmin())  # the step length is that of the most curved block
    broken[bad] = float("nan")
    spoiled = hypergradient(part(slice(None)), x, broken, on_failure="ignore")
    others = torch.arange(m) != bad
    assert torch.equal(spoiled.failed, ~others) and torch.equal(spoiled.adjoint[others], found.adjoint[others])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"upper output: expected shape \(4,\), one number a block"):
        hypergradient(Bilevel(lambda x, y, b: x.sum(), PROBLEM.lower, blocks=m), HYPER, tree(Y))
    with pytest.raises(ValueError, match=r"y\['a'\]: expected shape \(5, ...\), a row a block, got \(4, 1\)"):
        hypergradient(Bilevel(PROBLEM.upper, PROBLEM.lower, blocks=5), HYPER, tree(Y))
    with pytest.raises(ValueError, match="adjoint: expected Implicit, Neumann or OneStep with blocks, got MFAC"):
        hypergradient(PROBLEM, HYPER, tree(Y), adjoint=MFAC(2))
    with pytest.raises(ValueError, match="constraint: expected None with blocks"):
        Bilevel(PROBLEM.upper, PROBLEM.lower, blocks=m, constraint=lambda x, y: y)
