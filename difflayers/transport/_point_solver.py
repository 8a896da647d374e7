r"""Potentials of entropic transport between points: Sinkhorn's iteration, then Newton's method, by blocks of rows.

With f the soft minimum of its rows for g, one pass over the blocks gives f and the column sums, and so one step of the
iteration, or the gradient of the dual as a function of g alone. The Hessian of that is the Schur complement of
:mod:`._schur`; conjugate gradients take one pass a product, and no product with f's part.

M. Cuturi, G. Peyre, A Smoothed Dual Approach for Variational Wasserstein Problems, 2016 (the dual in one potential).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._checks import default_rtol
from difflayers._solution import Info
from difflayers.linalg import CG
from difflayers.linalg._operator import OperatorSystem

from . import _schur as schur
from ._costs import Cost
from ._iteration import (
    HANDOVER,
    STAGE_STEPS,
    Problem,
    best_shift,
    credible,
    gain,
    judged,
    rounding,
    sampled,
    too_slow,
    wanted,
)
from ._point_kernel import Kernel
from ._solvers import KernelSinkhorn, LogSinkhorn

_PATIENCE = 30.0  # steps ahead from which Newton's method is quicker, at the present rate
_EASY = 200  # steps after which it is tried anyway
_WARM = 10  # steps of Newton's method from an earlier solution, before it is given up
_LONGEST = 3.0  # step of Newton's method, in eps
_HALVINGS = 6
_INEXACT = CG(rtol=1e-3, max_steps=300)  # every step then gains three digits, near the solution


class Points(NamedTuple):
    """One flat batch of problems, as :class:`._iteration.Problem`.

    Attributes:
        x: ``(B, n, d)``.
        y: ``(B, m, d)``.
        a: ``(B, n)``.
        b: ``(B, m)``.
        eps: ``(B,)``.
        soft_a: ``(B,)``.
        soft_b: ``(B,)``.
    """

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    eps: Tensor
    soft_a: Tensor
    soft_b: Tensor

    @property
    def problem(self) -> Problem:
        """For what does not look at costs."""
        return Problem(self.x, *self[2:])

    def pick(self, rows: Tensor) -> Points:
        """Some elements of the batch, by index or mask."""
        return self if bool(rows.dtype == torch.bool and rows.all()) else Points(*(t[rows] for t in self))


class Solver:
    """One solve with its settings.

    Args:
        cost: Of points.
        size: Rows of a block.
        options: Tolerance and bounds.
    """

    def __init__(self, cost: Cost, size: int, options: KernelSinkhorn | LogSinkhorn) -> None:
        self.cost, self.size, self.options = cost, size, options

    def solve(self, p: Points, init: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Info]:
        """``(f, g, info)``; the residual of `info` is the L1 error of the sums, relative to the mass."""
        f, g, wide = self.start(p)
        noise = rounding(p.problem, f, g)
        rtol = default_rtol(self.options.rtol, f.dtype)
        enough, tol = noise.clamp(min=rtol), (noise / 8).clamp(min=rtol)  # Newton's method often reaches more
        steps = torch.zeros(f.shape[0], dtype=torch.int64, device=f.device)
        if not f.shape[0]:
            return f, g, Info(steps, steps, tol)
        if init is not None:
            good = torch.isfinite(init[0]).all(-1) & torch.isfinite(init[1]).all(-1)
            g0 = torch.where(good.unsqueeze(-1), init[1], g)
            f0 = self.soft_rows(p, g0, p.eps)  # nothing is known of the range of the given ones
            f0, g0, error, steps = self.newton(p, f0, g0, tol, min(self.options.newton_steps, _WARM))
            f, g = self.better(p, (f0, g0), (f, g), error <= HANDOVER)
        scaled = self.options.scaling & (p.eps < 5e-3 * wide)
        if init is not None:
            scaled = scaled & ~(error <= HANDOVER)
        eps = torch.where(scaled, wide, p.eps)
        newton = self.options.newton_steps > 0
        few = min(self.options.max_steps, _EASY) if newton else self.options.max_steps
        goal, patience = (tol, _PATIENCE) if newton else (enough, torch.inf)
        f, g, more = self.iterate(p, f, g, goal, eps, few, patience)
        steps = steps + more
        if newton:
            f, g, error, more = self.newton(p, f, g, tol, self.options.newton_steps)
            steps, rest = steps + more, (error > enough + rounding(p.problem, f, g)).nonzero().squeeze(-1)
            left = self.options.max_steps - few
            if rest.numel() and left > 0:
                q = p.pick(rest)
                f_rest, g_rest, more = self.iterate(q, f[rest], g[rest], enough[rest], q.eps, left, torch.inf)
                f, g = f.index_put((rest,), f_rest), g.index_put((rest,), g_rest)
                steps = steps.index_add(0, rest, more)
        error = self.error(p, f, g)
        return f, g, Info(judged(p.problem, f, g, error, enough, has_costs=False), steps, error)

    # ------------------------------------------------------------------------------------------------- the iteration

    def start(self, p: Points) -> tuple[Tensor, Tensor, Tensor]:
        """As :func:`._iteration.start`, and the range of the costs as :func:`._iteration.spread`."""
        inf = torch.inf
        f, g = torch.full_like(p.a, inf), torch.full_like(p.b, inf)
        low, top = torch.full_like(p.eps, inf), torch.full_like(p.eps, -inf)
        for s in range(0, p.x.shape[1], self.size):
            rows = slice(s, s + self.size)
            C, mine = self.cost(p.x[:, rows], p.y), (p.a[:, rows] > 0).unsqueeze(-1)
            f[:, rows] = torch.where((p.b > 0).unsqueeze(-2), C, inf).amin(-1)
            g = torch.minimum(g, torch.where(mine, C - f[:, rows].unsqueeze(-1), inf).amin(-2))
            counts = mine & (p.b > 0).unsqueeze(-2) & torch.isfinite(C)
            low = torch.minimum(low, torch.where(counts, C, inf).amin((-2, -1)))
            top = torch.maximum(top, torch.where(counts, C, -inf).amax((-2, -1)))
        some, others = sampled(p.x.shape[1], p.y.shape[1])
        sample = self.cost(p.x[:, some], p.y[:, others])
        counts = (p.a[:, some] > 0).unsqueeze(-1) & (p.b[:, others] > 0).unsqueeze(-2)
        return f, g, credible(top - low, torch.where(counts, sample, inf))

    def iterate(
        self, p: Points, f: Tensor, g: Tensor, tol: Tensor, eps: Tensor, max_steps: int, patience: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sinkhorn's iteration; finished elements drop out of the work."""
        final_f, final_g = f.clone(), g.clone()
        steps = torch.zeros(f.shape[0], dtype=torch.int64, device=f.device)
        index, stage_steps = torch.arange(f.shape[0], device=f.device), torch.zeros_like(tol)
        before = torch.full_like(tol, torch.inf)
        for taken in range(1, max_steps + 1):
            at = self.visit(p, f, g, eps)
            error, last = at.error, eps <= p.eps
            close = error <= torch.where(last, tol, HANDOVER)
            close = close | (last & too_slow(error, before, tol, patience))
            over = (last & close) | ~torch.isfinite(error)
            stage_over = ~last & (close | (stage_steps >= STAGE_STEPS))
            before = torch.where(last, error, torch.inf)
            stage_steps = torch.where(stage_over, 0, stage_steps + 1)
            f, g_next = at.f, torch.where(over.unsqueeze(-1), g, at.following)
            f, g = self.translated(p, f, g_next, ~over)
            eps = torch.where(stage_over, torch.maximum(eps / 2, p.eps), eps)
            if taken == max_steps or bool(over.any()):
                final_f[index], final_g[index], steps[index] = f, g, taken
                go_on = ~over
                if taken == max_steps or not bool(go_on.any()):
                    break
                f, g, tol, eps, before, index, stage_steps = (
                    t[go_on] for t in (f, g, tol, eps, before, index, stage_steps)
                )
                p = p.pick(go_on)
        return final_f, final_g, steps

    def visit(self, p: Points, f: Tensor, g: Tensor, eps: Tensor) -> _Visit:
        """What one pass over the blocks tells at `g`; the old `f` only keeps the numbers in range."""
        e = eps.unsqueeze(-1)
        ka = 1 + e * p.soft_a.unsqueeze(-1)

        def turn(rows: slice, sums: Tensor) -> tuple[Tensor, Tensor]:
            new = (f[:, rows] - e * sums.log()) / ka
            return new, p.a[:, rows] * ((new - f[:, rows]) / e).exp()

        new, columns = Kernel(self.cost, p.x, p.y, f, g, eps, self.size).there_and_back(p.b, turn)
        kb = 1 + e * p.soft_b.unsqueeze(-1)
        following = (g - e * columns.log()) / kb
        lost = ~(torch.isfinite(new).all(-1) & torch.isfinite(following).all(-1))
        if bool(lost.any()):  # out of the range of the kernel
            q = p.pick(lost)
            new[lost] = self.soft_rows(q, g[lost], eps[lost])
            following[lost] = self.soft_columns(q, new[lost], eps[lost])
            columns[lost] = ((g - kb * following) / e).exp()[lost]
        columns = p.b * columns
        want, mass = wanted(p.b, g, p.soft_b), columns.sum(-1)
        error = (columns - want).abs().sum(-1) / mass
        dual = gain(p.a, new, p.soft_a) + gain(p.b, g, p.soft_b) - eps * mass
        return _Visit(new, g, following, columns, want, error, dual)

    def translated(self, p: Points, f: Tensor, g: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        """With the best constant moved from one potential to the other, where a marginal is penalised."""
        move = torch.where(moving, best_shift(p.problem, f, g), 0).unsqueeze(-1)
        return f + move, g - move

    def soft_rows(self, p: Points, g: Tensor, eps: Tensor) -> Tensor:
        """The soft minimum of every row, in the logarithm."""
        e, logs = eps.unsqueeze(-1), torch.empty_like(p.a)
        for s in range(0, p.x.shape[1], self.size):
            moved = (g.unsqueeze(-2) - self.cost(p.x[:, s : s + self.size], p.y)) / e.unsqueeze(-1)
            logs[:, s : s + self.size] = (moved + p.b.log().unsqueeze(-2)).logsumexp(-1)
        return -e * logs / (1 + e * p.soft_a.unsqueeze(-1))

    def soft_columns(self, p: Points, f: Tensor, eps: Tensor) -> Tensor:
        """The soft minimum of every column."""
        e, total = eps.unsqueeze(-1), torch.full_like(p.b, -torch.inf)
        for s in range(0, p.x.shape[1], self.size):
            stop = s + self.size
            moved = (f[:, s:stop].unsqueeze(-1) - self.cost(p.x[:, s:stop], p.y)) / e.unsqueeze(-1)
            total = torch.logaddexp(total, (moved + p.a[:, s:stop].log().unsqueeze(-1)).logsumexp(-2))
        return -e * total / (1 + e * p.soft_b.unsqueeze(-1))

    def error(self, p: Points, f: Tensor, g: Tensor) -> Tensor:
        """``(B,)`` the L1 error of the sums on both sides, relative to the mass: what a caller could measure."""
        rows, columns = Kernel(self.cost, p.x, p.y, f, g, p.eps, self.size).sums(p.a, p.b)
        rows, columns = p.a * rows, p.b * columns
        off = (rows - wanted(p.a, f, p.soft_a)).abs().sum(-1) + (columns - wanted(p.b, g, p.soft_b)).abs().sum(-1)
        return off / rows.sum(-1)

    # ------------------------------------------------------------------------------------------------ Newton's method

    def newton(
        self, p: Points, f: Tensor, g: Tensor, tol: Tensor, max_steps: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Steps until the error is at most `tol`, or falls no more."""
        now, steps = self.visit(p, f, g, p.eps), torch.zeros(f.shape[0], dtype=torch.int64, device=f.device)
        stuck = torch.zeros_like(tol, dtype=torch.bool)
        for _ in range(max_steps):
            active = ~stuck & (now.error > tol) & torch.isfinite(now.error)
            if not bool(active.any()):
                break
            every = bool(active.all())
            q, here = (p, now) if every else (p.pick(active), now.pick(active))
            found, none = self.newton_step(q, here)
            steps[active] += 1
            stuck[active] = none
            now = found if every else now.put(active, found)
        return now.f, now.g, now.error, steps

    def newton_step(self, p: Points, now: _Visit) -> tuple[_Visit, Tensor]:
        """The next point, and the elements that found none that is better."""
        e = p.eps.unsqueeze(-1)
        move = e * self.direction(p, now)
        slope = ((now.want - now.columns) * move).sum(-1)
        noise = 64 * torch.finfo(move.dtype).eps * now.dual.abs()
        slope = torch.where(slope > noise, slope, torch.inf)
        length = (_LONGEST / (move.abs().amax(-1) / p.eps)).clamp(max=1)
        best, waiting = now, torch.ones_like(slope, dtype=torch.bool)
        for _ in range(_HALVINGS):
            trial = self.visit(p, now.f, now.g + length.unsqueeze(-1) * move, p.eps)
            better = waiting & ((trial.error < now.error) | (trial.dual > now.dual + 1e-4 * length * slope))
            best, waiting = best.where(better, trial), waiting & ~better
            if not bool(waiting.any()):
                break
            length = length / 2
        return best, waiting

    def direction(self, p: Points, now: _Visit) -> Tensor:
        """Of g, in eps."""
        e = p.eps.unsqueeze(-1)
        rows = wanted(p.a, now.f, p.soft_a)  # what they are, too
        d1 = rows * (1 + e * p.soft_a.unsqueeze(-1))
        d2 = now.columns + e * p.soft_b.unsqueeze(-1) * now.want
        hard = (p.soft_a == 0) & (p.soft_b == 0)
        s2 = schur.inverse_sqrt(d2)
        w = torch.where(hard.unsqueeze(-1), schur.null_vector(d2), 0)
        K = Kernel(self.cost, p.x, p.y, now.f, now.g, p.eps, self.size)
        left = p.a * schur.inverse_sqrt(d1)
        x, _ = complement_solved(K, left.square(), p.b * s2, w, s2 * (now.want - now.columns), _INEXACT)
        return s2 * x

    def better(
        self, p: Points, ours: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], good: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The first pair where it is good."""
        f, g = (torch.where(good.unsqueeze(-1), s, t) for s, t in zip(ours, others, strict=True))
        return f, g


class _Visit(NamedTuple):
    """A potential g with the best f, the next g of Sinkhorn's iteration, and the columns with what they must be."""

    f: Tensor
    g: Tensor
    following: Tensor
    columns: Tensor
    want: Tensor
    error: Tensor
    dual: Tensor

    def pick(self, keep: Tensor) -> _Visit:
        return _Visit(*(t[keep] for t in self))

    def put(self, places: Tensor, other: _Visit) -> _Visit:
        return _Visit(*(t.index_put((places,), o) for t, o in zip(self, other, strict=True)))

    def where(self, mask: Tensor, other: _Visit) -> _Visit:
        pairs = zip(self, other, strict=True)
        return _Visit(*(torch.where(mask.reshape(-1, *(1,) * (t.ndim - 1)), o, t) for t, o in pairs))


def complement_solved(
    K: Kernel, left: Tensor, right: Tensor, w: Tensor, rhs: Tensor, solver: CG
) -> tuple[Tensor, Info]:
    """``I - A^T A + w w^T`` solved with ``A^T A = diag(right) K^T diag(left) K diag(right)``, one pass a product."""

    def product(_: tuple[Tensor, ...], v: Tensor) -> Tensor:
        back = K.there_and_back(right * v, lambda rows, t: (t, left[..., rows] * t))[1]
        return v - right * back + w * (w * v).sum(-1, keepdim=True)

    system = OperatorSystem(solver, None, matvec=product)
    return solver.solve(system, (), (), rhs, False, None)
