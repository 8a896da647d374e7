r"""Newton's method on the dual of entropic transport with a sparse Hessian.

At small eps a plan has few entries that matter. The Hessian's off-diagonal blocks keep those alone, its diagonal is
that of the whole plan, so that it stays positive definite: the step is one of ascent, as good as Newton's where what is
left out weighs little. Conjugate gradients then need products with sparse matrices alone.

X. Tang et al., Accelerating Sinkhorn Algorithm with Sparse Newton Iterations, 2024, algorithm 1.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from . import _schur as schur
from ._dual_newton import _Point, direction, line_search
from ._iteration import HANDOVER, Problem

LEAST = 4  # entries of a row that are kept, on average
CROWDED = 0.25  # share of the entries from which the whole plan is no dearer
SMALL = 128  # shorter side up to which the whole plan is cheaper in any case
_LOOSE = 1e-4  # largest relative residual of a step, and ratio to the largest entry below which one is left out
_FAR = 1e-2  # relative residual of a step, while the error is larger than that too
_TINY = 1e-30  # ratio at which nothing that counts is left out
_MOST = 1000  # iterations of conjugate gradients, where nothing can be factorised
_LOOK = 5  # iterations of conjugate gradients between looks at their residual


def sparse_newton(
    problem: Problem,
    f: Tensor,
    g: Tensor,
    tol: Tensor,
    *,
    max_steps: int,
    reach: float = math.inf,
    patience: float = math.inf,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps until the L1 error of the sums is at most `tol` of the mass, or falls no more.

    An element whose error does not halve in two steps keeps twice as many entries from then on, and in the end all.

    Args:
        problem: Flat batch.
        f: ``(B, n)`` start.
        g: ``(B, m)`` start.
        tol: ``(B,)``.
        max_steps: At most.
        reach: Elements with a larger error than this take no step.
        patience: Steps after which elements stop whose error is above 1e-2 still.

    Returns:
        ``(f, g, error, steps)``.
    """
    f, g = f.clone(), g.clone()
    index = torch.arange(f.shape[0], device=f.device)
    error, steps = torch.full_like(tol, torch.inf), torch.zeros(tol.shape, dtype=torch.int64, device=tol.device)
    now, cut = _Point.at(problem, f, g), _Cut.first(problem)
    before = torch.full_like(tol, torch.inf), torch.full_like(tol, torch.inf)  # errors of the last two steps
    for step in range(max_steps + 1):
        error[index] = now.error
        go_on = (now.error > tol[index]) & torch.isfinite(now.error)
        if step == 0 or step >= patience:
            go_on = go_on & (now.error <= (reach if step == 0 else HANDOVER))
        if step == max_steps or not bool(go_on.any()):
            break
        if not bool(go_on.all()):
            index, problem, now, cut = index[go_on], problem.pick(go_on), now.pick(go_on), cut.pick(go_on)
            before = before[0][go_on], before[1][go_on]
        # far from the solution steps are short for other reasons
        slow = (now.error > before[0] / 2) & torch.isfinite(before[0]) & (now.error <= HANDOVER)
        cut = cut.wider(slow)
        before = torch.where(slow, torch.inf, before[1]), torch.where(slow, torch.inf, now.error)
        df, dg, cut = _direction(problem, now, cut)
        now, stuck = line_search(problem, now, df, dg)
        steps[index] += 1
        f[index], g[index] = now.f, now.g
        # with all entries there is no progress to come: the tolerance is out of reach
        tol = tol.index_put((index[stuck & cut.whole],), tol.new_tensor(torch.inf))
        cut = cut.wider(stuck & ~cut.whole)
    return f, g, error, steps


class _Cut(NamedTuple):
    """Which entries of the plan an element keeps.

    Attributes:
        least: ``(B,)`` as many.
        taken: ``(B,)`` so many were kept last.
        ratio: ``(B,)`` by which the threshold has been lowered to get as many.
        whole: ``(B,)`` elements that keep all.
    """

    least: Tensor
    taken: Tensor
    ratio: Tensor
    whole: Tensor

    @staticmethod
    def first(problem: Problem) -> _Cut:
        n, m = problem.cost.shape[-2:]
        least = torch.full_like(problem.eps, LEAST * n)
        return _Cut(least, least, torch.ones_like(least), (least > CROWDED * n * m) | (m <= SMALL))

    def pick(self, rows: Tensor) -> _Cut:
        return _Cut(*(t[rows] for t in self))

    def wider(self, rows: Tensor) -> _Cut:
        """Twice as many entries as last time, in some elements."""
        return self._replace(least=torch.where(rows, 2 * torch.maximum(self.least, self.taken), self.least))


def _direction(problem: Problem, now: _Point, cut: _Cut) -> tuple[Tensor, Tensor, _Cut]:
    """Steps with the entries that are kept, and with all of them where those are no few, or do not do."""
    if bool(cut.whole.all()):
        return *direction(problem, now), cut
    df, dg = torch.zeros_like(now.f), torch.zeros_like(now.g)
    inexact = now.error.clamp(max=_LOOSE)
    kept, cut = _kept(now.plan, inexact, cut)
    some = (~cut.whole).nonzero().squeeze(-1)
    if some.numel():
        every = some.numel() == cut.whole.numel()
        data = (
            (problem, now, kept, inexact) if every else (problem.pick(some), now.pick(some), kept[some], inexact[some])
        )
        df[some], dg[some], solved = _sparse_direction(*data)
        if problem.b.shape[-1] <= schur.DENSE_LIMIT:  # else what there is is a direction of ascent too
            cut = cut._replace(whole=cut.whole.index_put((some,), ~solved))
    rest = cut.whole.nonzero().squeeze(-1)
    if rest.numel():
        df[rest], dg[rest] = direction(problem.pick(rest), now.pick(rest))
    return df, dg, cut


def _kept(plan: Tensor, inexact: Tensor, cut: _Cut) -> tuple[Tensor, _Cut]:
    """The entries above a share of the largest one in their row, or in their column."""
    n, m = plan.shape[-2:]
    rows, columns = plan.amax(-1, keepdim=True), plan.amax(-2, keepdim=True)
    while True:
        share = (inexact * cut.ratio)[:, None, None]
        kept = (plan > share * rows) | (plan > share * columns)
        count = kept.sum((-2, -1)).to(plan.dtype)
        few = ~cut.whole & (count < cut.least) & (cut.ratio > _TINY)
        if not bool(few.any()):
            break
        cut = cut._replace(ratio=torch.where(few, cut.ratio / 10, cut.ratio))
    whole = cut.whole | (torch.maximum(count, cut.least) > CROWDED * n * m)
    return kept, cut._replace(taken=count, whole=whole)


def _sparse_direction(problem: Problem, now: _Point, kept: Tensor, inexact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solves the system of :mod:`._schur` with a part of the plan; says where it did."""
    eps = problem.eps.unsqueeze(-1)
    d1 = now.rows + eps * problem.soft_a.unsqueeze(-1) * now.want_rows
    d2 = now.columns + eps * problem.soft_b.unsqueeze(-1) * now.want_columns
    hard = (problem.soft_a == 0) & (problem.soft_b == 0)
    w = torch.where(hard.unsqueeze(-1), schur.null_vector(d2), 0)
    s1, s2 = schur.inverse_sqrt(d1), schur.inverse_sqrt(d2)
    A = _Sparse.of(now.plan, kept, s1, s2)
    y, z = s1 * (now.want_rows - now.rows), s2 * (now.want_columns - now.columns)
    rtol = torch.where(now.error > HANDOVER, _FAR, inexact)
    beta, solved = _conjugate_gradients(A, w, z - A.transposed(y), rtol)
    return eps * s1 * (y - A.times(beta)), eps * s2 * beta, solved


class _Sparse:
    """Kept entries of ``s1 P s2``, as one matrix with a block for every element, and its transpose."""

    def __init__(self, matrix: Tensor, transpose: Tensor) -> None:
        self.matrix, self.transpose = matrix, transpose

    @staticmethod
    def of(plan: Tensor, kept: Tensor, s1: Tensor, s2: Tensor) -> _Sparse:
        (B, n), m = s1.shape, s2.shape[-1]
        element, row, column = kept.nonzero(as_tuple=True)
        row, column = element * n + row, element * m + column
        values = plan[kept] * s1.flatten()[row] * s2.flatten()[column]
        order = column.argsort(stable=True)
        _quiet()
        return _Sparse(
            _csr(row, column, values, (B * n, B * m)),
            _csr(column[order], row[order], values[order], (B * m, B * n)),
        )

    def times(self, v: Tensor) -> Tensor:
        return (self.matrix @ v.flatten()).reshape(v.shape[0], -1)

    def transposed(self, v: Tensor) -> Tensor:
        return (self.transpose @ v.flatten()).reshape(v.shape[0], -1)


@functools.cache
def _quiet() -> None:
    """Takes the warning of a beta state, which torch gives once; filters are those of all threads: not every time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        starts = torch.zeros(1, dtype=torch.int64, device="cpu")
        values = torch.zeros(0, dtype=torch.float32, device="cpu")
        torch.sparse_csr_tensor(starts, starts[:0], values, (0, 0), device="cpu", check_invariants=False)


def _csr(row: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A matrix whose entries come ordered by rows."""
    ends = torch.bincount(row, minlength=shape[0]).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    return torch.sparse_csr_tensor(starts, column, values, shape, device=values.device, check_invariants=False)


def _conjugate_gradients(A: _Sparse, w: Tensor, right: Tensor, rtol: Tensor) -> tuple[Tensor, Tensor]:
    """``(I - A^T A + w w^T) x = right`` to a relative residual per element, and where that was met.

    The scaling of A is Jacobi's preconditioner, and the complement does with half of the iterations that both sides
    together would take.
    """
    most = right.shape[-1]
    most = _MOST if most > schur.DENSE_LIMIT else 100 + most // 2  # what takes longer is better factorised
    x, r = torch.zeros_like(right), right
    p, size = r, (r * r).sum(-1)
    goal = rtol.square() * size
    for k in range(most):
        go_on = size > goal
        if k % _LOOK == 0 and not bool(go_on.any()):
            break
        Ap = p - A.transposed(A.times(p)) + w * (w * p).sum(-1, keepdim=True)
        curvature = (p * Ap).sum(-1)
        go_on = go_on & (curvature > 0)
        step = torch.where(go_on, size / torch.where(go_on, curvature, 1), 0).unsqueeze(-1)
        x, r = x + step * p, r - step * Ap
        new = torch.where(go_on, (r * r).sum(-1), size)
        p = torch.where(go_on.unsqueeze(-1), r + (new / torch.where(go_on, size, 1)).unsqueeze(-1) * p, p)
        size = new
    return x, size <= goal
