r"""Newton's method on the dual of entropic transport, from where Sinkhorn's iteration has come close.

The Hessian is the matrix of :mod:`._schur`, with the plan at the present potentials. A few steps reach rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers.linalg import CG

from . import _schur as schur
from ._iteration import HANDOVER, Problem, gain, plan_of, spread, start, wanted

_HALVINGS = 12
# of a step, in eps: parts of the plan that hardly exchange mass call for far longer ones, which the exponential that is
# to come from them does not survive
_LONGEST = 3.0
_INEXACT = CG(rtol=1e-4, max_steps=500)  # every step then gains four digits, near the solution


def dual_newton(
    problem: Problem, f: Tensor, g: Tensor, tol: Tensor, *, max_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps until the L1 error of the sums is at most `tol` of the mass, or falls no more.

    Args:
        problem: Flat batch.
        f: ``(B, n)`` start.
        g: ``(B, m)`` start.
        tol: ``(B,)``.
        max_steps: At most.

    Returns:
        ``(f, g, error, steps)``.
    """
    f, g = f.clone(), g.clone()
    index = torch.arange(f.shape[0], device=f.device)
    error, steps = torch.full_like(tol, torch.inf), torch.zeros(tol.shape, dtype=torch.int64, device=tol.device)
    now = _Point.at(problem, f, g)
    for step in range(max_steps + 1):
        error[index] = now.error
        go_on = (now.error > tol[index]) & torch.isfinite(now.error)
        if step == max_steps or not bool(go_on.any()):
            break
        if not bool(go_on.all()):
            index, problem, now = index[go_on], problem.pick(go_on), now.pick(go_on)
        now, stuck = line_search(problem, now, *direction(problem, now))
        steps[index] += 1
        f[index], g[index] = now.f, now.g
        error[index] = now.error
        # without progress there is none to come: the tolerance is out of reach, or the system is too ill-conditioned
        tol = tol.index_put((index[stuck],), tol.new_tensor(torch.inf))
    return f, g, error, steps


def staged_newton(problem: Problem, tol: Tensor, *, max_steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`dual_newton`, from nothing: eps is halved from the range of the costs on, with a few steps for each.

    Follows the solution where Sinkhorn's iteration hardly moves: small eps, parts that hardly exchange mass.
    """
    f, g = start(problem)
    eps, error = torch.maximum(spread(problem), problem.eps), tol
    steps = torch.zeros(tol.shape, dtype=torch.int64, device=tol.device)
    goal = torch.full_like(tol, HANDOVER)
    while eps.numel():
        last = eps <= problem.eps
        f, g, error, more = dual_newton(
            problem._replace(eps=eps), f, g, torch.where(last, tol, goal), max_steps=max_steps
        )
        steps = steps + more
        if bool((last | ~torch.isfinite(error)).all()):
            break
        eps = torch.where(torch.isfinite(error), torch.maximum(eps / 2, problem.eps), eps)
    return f, g, error, steps


def line_search(problem: Problem, now: _Point, df: Tensor, dg: Tensor) -> tuple[_Point, Tensor]:
    """The next point in a direction of ascent, and the elements that found none that is better."""
    slope = ((now.want_rows - now.rows) * df).sum(-1) + ((now.want_columns - now.columns) * dg).sum(-1)
    noise = 64 * torch.finfo(df.dtype).eps * now.dual.abs()
    slope = torch.where(slope > noise, slope, torch.inf)
    longest = torch.maximum(df.abs().amax(-1), dg.abs().amax(-1)) / problem.eps
    size = (_LONGEST / longest).clamp(max=1)
    best, waiting = now, torch.ones_like(now.error, dtype=torch.bool)
    for _ in range(_HALVINGS):
        t = size.unsqueeze(-1)
        trial = _Point.at(problem, now.f + t * df, now.g + t * dg)
        # far from the solution the dual may grow while the error does too; near it, rounding hides the growth
        better = waiting & ((trial.error < now.error) | (trial.dual > now.dual + 1e-4 * size * slope))
        best = best.where(better, trial)
        waiting = waiting & ~better
        if not bool(waiting.any()):
            break
        size = size / 2
    return best, waiting


class _Point:
    """Potentials, their plan, what its sums are and what they must be."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts
        self.f, self.g, self.plan, self.rows, self.columns = parts[:5]
        self.want_rows, self.want_columns, self.error, self.dual = parts[5:]

    @staticmethod
    def at(problem: Problem, f: Tensor, g: Tensor) -> _Point:
        plan = plan_of(problem, f, g)
        rows, columns = plan.sum(-1), plan.sum(-2)
        want = wanted(problem.a, f, problem.soft_a), wanted(problem.b, g, problem.soft_b)
        mass = rows.sum(-1)
        error = ((rows - want[0]).abs().sum(-1) + (columns - want[1]).abs().sum(-1)) / mass
        dual = gain(problem.a, f, problem.soft_a) + gain(problem.b, g, problem.soft_b) - problem.eps * mass
        return _Point(f, g, plan, rows, columns, *want, error, dual)

    def pick(self, keep: Tensor) -> _Point:
        return _Point(*(t[keep] for t in self.parts))

    def where(self, mask: Tensor, other: _Point) -> _Point:
        if bool(mask.all()):
            return other
        pairs = zip(self.parts, other.parts, strict=True)
        return _Point(*(torch.where(mask.reshape(-1, *(1,) * (t.ndim - 1)), o, t) for t, o in pairs))


def direction(problem: Problem, now: _Point) -> tuple[Tensor, Tensor]:
    """Newton's, with all of the plan."""
    eps = problem.eps.unsqueeze(-1)
    d1 = now.rows + eps * problem.soft_a.unsqueeze(-1) * now.want_rows
    d2 = now.columns + eps * problem.soft_b.unsqueeze(-1) * now.want_columns
    hard = (problem.soft_a == 0) & (problem.soft_b == 0)
    miss = now.want_rows - now.rows, now.want_columns - now.columns
    alpha, beta = schur.newton_step(now.plan, d1, d2, *miss, hard, _INEXACT)
    return eps * alpha, eps * beta
