r"""Newton's method for symmetric plans, which have one potential.

.. math:: \max_p \; 2 \sum_i p_i - \gamma \sum_{ij} \Pi_{ij}, \qquad
    \Pi_{ij} = \exp((p_i + p_j + A_{ij}) / \gamma)

The gradient is :math:`2 (1 - \Pi 1)`, the Hessian :math:`-\tfrac{2}{\gamma} (\mathrm{diag}(\Pi 1) + \Pi)`. Of the
eigenvalues of a doubly stochastic plan only those near -1 trouble the iteration: clusters, which hardly exchange mass
and slow down Sinkhorn's, do not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._checks import default_rtol
from difflayers._solution import Info, Status
from difflayers.linalg import CG, LinearOperator, Tag, linear_solve_ex
from difflayers.linalg._system import Params

from . import _schur as schur
from ._iteration import HANDOVER, largest_log, times

_PRODUCTS = 15  # damped steps before Newton's method, on the kernel or in the logarithm
_LOGARITHMS = 4
DENSE_LIMIT = 256  # up to this size a system is factorised; above, it is solved by products, and factorised in need
LARGEST = 2048  # above this one nothing is factorised
_EASY = 20  # steps of Newton's method at the wanted gamma, before it is followed from a large one
_HALVINGS = 12
_LONGEST = 3.0  # of a step, in gamma: what the exponential survives
_INEXACT = CG(rtol=1e-4, max_steps=100, check_every=5)


class Problem(NamedTuple):
    """One flat batch.

    Attributes:
        affinity: ``(B, n, n)``, symmetric; at most :func:`forbidden` where no mass may be.
        gamma: ``(B,)``.
    """

    affinity: Tensor
    gamma: Tensor

    def pick(self, rows: Tensor) -> Problem:
        """Some elements of the batch, by index or mask."""
        return Problem(*(t[rows] for t in self))


def forbidden(dtype: torch.dtype) -> float:
    """An affinity that is as good as -inf, without derivatives ``0 * inf``."""
    return -1e60 if dtype == torch.float64 else -1e18


def plan_of(affinity: Tensor, gamma: Tensor, p: Tensor) -> Tensor:
    """The plan of potentials; symmetric to the bit, as sums of two numbers are. On plain tensors."""
    moved = ((p.unsqueeze(-1) + p.unsqueeze(-2)) + affinity) / gamma[..., None, None]
    return moved.clamp_(max=largest_log(moved.dtype)).exp_()


def symmetric_newton(
    problem: Problem, init: Tensor | None, *, rtol: float | None, max_steps: int
) -> tuple[Tensor, Info]:
    """Finds the potential of every element.

    Args:
        problem: Flat batch.
        init: ``(B, n)`` an earlier solution, NaN where there is none.
        rtol: Of the L1 error of the sums, relative to n.
        max_steps: Of Newton's method, for each gamma that it takes.

    Returns:
        ``(p, info)``.
    """
    top, low = _range(problem.affinity)
    least = default_rtol(rtol, top.dtype)
    tol = rounding(problem, start(problem.affinity)).clamp(min=least)
    impossible = (problem.affinity <= forbidden(top.dtype)).all(-1).any(-1)
    goal = torch.where(impossible, torch.inf, tol)
    p = _warmed_up(problem, start(problem.affinity))
    if init is not None:
        p = torch.where(torch.isfinite(init).all(-1, keepdim=True), init, p)
    p, error, steps = _newton(problem, p, goal, min(max_steps, _EASY))
    rest = ~(error <= torch.maximum(goal, rounding(problem, p))) & torch.isfinite(top - low)
    if max_steps > _EASY and bool(rest.any()):
        q, again, more, none = _staged(problem.pick(rest), tol[rest], top[rest], low[rest], max_steps)
        better = ~(again >= error[rest])
        p[rest] = torch.where(better.unsqueeze(-1), q, p[rest])
        error[rest] = torch.where(better, again, error[rest])
        steps[rest] += more
        impossible[rest] = none & ~(error[rest] <= tol[rest])
    noise = rounding(problem, p)
    good = error <= noise.clamp(min=least) + noise
    status = torch.where(good, int(Status.CONVERGED), int(Status.MAX_STEPS))
    status = torch.where(torch.isfinite(error), status, int(Status.DIVERGED))
    error = torch.where(torch.isinf(goal), torch.inf, error)  # of a row without any entry
    return p, Info(torch.where(impossible, int(Status.INFEASIBLE), status), steps, error)


def start(affinity: Tensor) -> Tensor:
    """Potentials with ``p_i + p_j + A_ij <= 0``, and an equality for the largest affinity of all."""
    return -affinity.amax(-1) / 2


def rounding(problem: Problem, p: Tensor) -> Tensor:
    """``(B,)`` the error of the sums that rounding of the potential leaves, and never more than it may be.

    Affinities far below the others do no harm: the plan is zero there.
    """
    unit = torch.finfo(p.dtype).eps
    return (unit * (4 + 2 * p.abs().amax(-1) / problem.gamma)).clamp(max=unit**0.4)


def _warmed_up(problem: Problem, p: Tensor) -> Tensor:
    """Damped steps: without damping they can alternate between two points for ever.

    One in the logarithm leaves no entry of the kernel above 1. The others are products with the kernel; elements whose
    kernel vanishes in a row take theirs in the logarithm too.
    """
    p = _log_step(problem, p)
    kernel, s = plan_of(*problem, p), torch.ones_like(p)
    for _ in range(_PRODUCTS):
        s = (s / times(kernel, s)).sqrt()
    moved = p + problem.gamma.unsqueeze(-1) * s.log()
    broken = ~torch.isfinite(moved).all(-1)
    if bool(broken.any()):
        some, q = problem.pick(broken), p[broken]
        for _ in range(_LOGARITHMS):
            q = _log_step(some, q)
        moved[broken] = q
    return moved


def _log_step(problem: Problem, p: Tensor) -> Tensor:
    gamma = problem.gamma.unsqueeze(-1)
    moved = (p.unsqueeze(-2) + problem.affinity).div_(gamma.unsqueeze(-1))
    return (p - gamma * moved.logsumexp(-1)) / 2


def _range(affinity: Tensor) -> tuple[Tensor, Tensor]:
    """``(B,)`` the largest affinity and the smallest that is not forbidden."""
    none = affinity <= forbidden(affinity.dtype)
    top = affinity.amax((-2, -1))
    return top, torch.where(none, top[:, None, None], affinity).amin((-2, -1))


def _certificate(problem: Problem, p: Tensor, top: Tensor, low: Tensor) -> Tensor:
    """Elements whose allowed entries carry no doubly stochastic matrix: potentials prove it, at any gamma.

    Of such a matrix the objective ``-<A, Pi> + gamma sum Pi (log Pi - 1)`` would be at most ``-n (low + gamma)``, and
    at least the dual.
    """
    n, eps = p.shape[-1], torch.finfo(p.dtype).eps
    dual = 2 * p.sum(-1) - problem.gamma * plan_of(*problem, p).sum((-2, -1))
    rounding = n * 1e3 * eps * (top.abs() + low.abs() + problem.gamma + p.abs().amax(-1))
    return dual > rounding - n * (low + problem.gamma)


def _staged(
    problem: Problem, tol: Tensor, top: Tensor, low: Tensor, max_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Newton's method from the range of the affinities on, with gamma halved after a few steps for each.

    And which elements are impossible: at a large gamma steps are long, and what goes to infinity does so quickly.
    """
    gamma = torch.maximum(top - low, problem.gamma)
    p = _warmed_up(problem._replace(gamma=gamma), start(problem.affinity))
    steps, impossible = torch.zeros_like(tol, dtype=torch.int64), torch.zeros_like(tol, dtype=torch.bool)
    while True:
        last, stage = gamma <= problem.gamma, problem._replace(gamma=gamma)
        goal = torch.where(last, tol, HANDOVER)
        p, error, more = _newton(stage, p, torch.where(impossible, torch.inf, goal), max_steps)
        steps = steps + more
        missed = ~(error <= goal) & ~impossible
        if bool(missed.any()):
            impossible = impossible | (missed & _certificate(stage, p, top, low))
        if bool((last | impossible | ~torch.isfinite(error)).all()):
            return p, error, steps, impossible
        gamma = torch.maximum(gamma / 2, problem.gamma)


class _Point:
    """A potential, its plan, the row sums, their error and the dual."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts
        self.p, self.plan, self.rows, self.error, self.dual = parts

    @staticmethod
    def at(problem: Problem, p: Tensor) -> _Point:
        plan = plan_of(*problem, p)
        rows = plan.sum(-1)
        dual = 2 * p.sum(-1) - problem.gamma * rows.sum(-1)
        return _Point(p, plan, rows, (rows - 1).abs().mean(-1), dual)

    def pick(self, keep: Tensor) -> _Point:
        return _Point(*(t[keep] for t in self.parts))

    def where(self, mask: Tensor, other: _Point) -> _Point:
        if bool(mask.all()):
            return other
        pairs = zip(self.parts, other.parts, strict=True)
        return _Point(*(torch.where(mask.reshape(-1, *(1,) * (t.ndim - 1)), o, t) for t, o in pairs))


def _newton(problem: Problem, p: Tensor, tol: Tensor, max_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Steps until the error is at most `tol`, or falls no more; finished elements drop out of the work."""
    p = p.clone()
    index = torch.arange(p.shape[0], device=p.device)
    error, steps = torch.full_like(tol, torch.inf), torch.zeros(tol.shape, dtype=torch.int64, device=tol.device)
    now = _Point.at(problem, p)
    for step in range(max_steps + 1):
        error[index] = now.error
        go_on = (now.error > tol[index]) & torch.isfinite(now.error)
        some, every = torch.stack([go_on.any(), go_on.all()]).tolist()
        if step == max_steps or not some:
            break
        if not every:
            index, problem, now = index[go_on], problem.pick(go_on), now.pick(go_on)
        now, stuck = _step(problem, now)
        steps[index] += 1
        p[index] = now.p
        tol = tol.index_put((index[stuck],), tol.new_full((), torch.inf))
    return p, error, steps


def _step(problem: Problem, now: _Point) -> tuple[_Point, Tensor]:
    """The next point, and the elements that found none that is better."""
    direction = problem.gamma.unsqueeze(-1) * _direction(now)
    slope = 2 * ((1 - now.rows) * direction).sum(-1)
    slope = torch.where(slope > 64 * torch.finfo(slope.dtype).eps * now.dual.abs(), slope, torch.inf)
    size = (_LONGEST * problem.gamma / direction.abs().amax(-1)).clamp(max=1)
    best, waiting = now, torch.ones_like(slope, dtype=torch.bool)
    for _ in range(_HALVINGS):
        trial = _Point.at(problem, now.p + size.unsqueeze(-1) * direction)
        # far from the solution the dual may grow while the error does too; near it, rounding hides the growth
        better = waiting & ((trial.error < now.error) | (trial.dual > now.dual + 1e-4 * size * slope))
        best = best.where(better, trial)
        waiting = waiting & ~better
        if not bool(waiting.any()):
            break
        size = size / 2
    return best, waiting


def _direction(now: _Point) -> Tensor:
    root = now.rows.rsqrt()
    scaled = scaled_plan(now.plan, root)
    right = root * (1 - now.rows)
    if right.shape[-1] <= DENSE_LIMIT:
        return root * schur.solve_factorised(factorise(scaled)[0], right)
    x, info = solve_iterated(scaled, right, _INEXACT)  # stopped early it is a direction of ascent all the same
    early = info.status != Status.CONVERGED
    if right.shape[-1] <= LARGEST and bool(early.any()):
        x[early] = schur.solve_factorised(factorise(scaled[early])[0], right[early])
    return root * x


def scaled_plan(plan: Tensor, root: Tensor) -> Tensor:
    """``D^(-1/2) Pi D^(-1/2)`` with ``root = D^(-1/2)`` of the row sums; its eigenvalues are between -1 and 1."""
    return root.unsqueeze(-1) * plan * root.unsqueeze(-2)


def factorise(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of the identity plus the scaled plan, and which elements have none.

    A few roundings are added to the diagonal: where the support is bipartite the matrix is singular, with null vectors
    of 1 and -1 that change no plan, and the solution has a bounded part of them. More, where pivots are negative.
    """
    n, eps = scaled.shape[-1], torch.finfo(scaled.dtype).eps
    S = scaled.clone()
    S.diagonal(dim1=-2, dim2=-1).add_(1 + 8 * eps)
    return schur.lifted_cholesky(S, 4 * n * eps)


def solve_iterated(scaled: Tensor, right: Tensor, solver: CG) -> tuple[Tensor, Info]:
    """Solved by products; few are needed, unless an eigenvalue of the plan is near -1."""
    operator = LinearOperator(_plus_identity, (scaled,), tags=Tag.POSITIVE_DEFINITE, param_ndims=(2,))
    found = linear_solve_ex(operator, right, solver=solver)
    return found.value, Info(found.status, found.steps, found.residual)


def _plus_identity(params: Params, v: Tensor) -> Tensor:
    return v + times(params[0], v)
