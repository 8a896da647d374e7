r"""Sinkhorn's iteration on the exponential kernel, which is kept in range by absorbing its scalings.

With :math:`K = \exp((\hat f \oplus \hat g - C) / \epsilon)` one step is :math:`u = 1 / K (b \circ v)`,
:math:`v = 1 / K^T (a \circ u)`: two products and no exponential. The potentials are
:math:`\hat f + \epsilon \log u` and :math:`\hat g + \epsilon \log v`; where u or v grows they are absorbed in
:math:`\hat f, \hat g` and K is built anew.

B. Schmitzer, Stabilized Sparse Scaling Algorithms for Entropy Regularized Transport Problems, 2019, algorithm 2;
L. Chizat et al., Scaling Algorithms for Unbalanced Optimal Transport Problems, 2018 (penalised marginals);
T. Sejourne, F.-X. Vialard, G. Peyre, Faster Unbalanced Optimal Transport, 2022 (translations).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._iteration import HANDOVER, STAGE_STEPS, Problem, best_shift, evened, first_eps, kernel, times, too_slow, wanted

_LARGE = math.log(1e4)  # of the logarithm of a scaling: then it is absorbed


def kernel_sinkhorn(
    problem: Problem,
    f: Tensor,
    g: Tensor,
    tol: Tensor,
    *,
    max_steps: int,
    check_every: int,
    scaling: bool,
    patience: float = math.inf,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Iterates until the L1 error of the sums is at most `tol` of the mass; finished elements drop out of the work.

    Args:
        problem: Flat batch.
        f: ``(B, n)`` start.
        g: ``(B, m)`` start.
        tol: ``(B,)`` relative to the mass of the plan.
        max_steps: Of the last eps and of the stages before it together.
        check_every: Steps between looks at the error.
        scaling: Whether small eps are reached in stages.
        patience: Elements stop at an error of 1e-2 where, at the present rate, more steps than this lie ahead.

    Returns:
        ``(f, g, error, steps, broken)``; elements that are `broken` left the range of the numbers, and keep the last
        potentials that did not.
    """
    final_f, final_g = f.clone(), g.clone()
    error = torch.full_like(tol, torch.inf)
    steps = torch.zeros(tol.shape, dtype=torch.int64, device=tol.device)
    broken = torch.zeros(tol.shape, dtype=torch.bool, device=tol.device)
    if not f.shape[0]:
        return final_f, final_g, error, steps, broken
    index = torch.arange(f.shape[0], device=f.device)
    work = _Work(problem, f, g, tol, first_eps(problem, scaling))
    before = torch.full_like(tol, torch.inf)
    for taken in range(check_every, max_steps + check_every, check_every):
        work.sweep(check_every)
        err, size = work.error()
        sound = torch.isfinite(err) & torch.isfinite(size)
        last = work.eps <= work.problem.eps
        slow = last & too_slow(err, before, work.tol, patience / check_every)
        close = (err <= torch.where(last, work.tol, HANDOVER)) | slow
        before = torch.where(last, err, torch.inf)
        stage_over = ~last & (close | (work.stage_steps >= STAGE_STEPS))
        over = (last & close) | ~sound | (taken >= max_steps)
        absorb = sound & ((size > _LARGE) | stage_over | over)
        new = over & ~work.stored
        any_absorb, any_new, ended, all_over = torch.stack(
            [absorb.any(), new.any(), 4 * over.sum() >= over.numel(), over.all()]
        ).tolist()
        if any_absorb:
            work.absorb(absorb, stage_over)
        if any_new:
            at = index[new]
            final_f[at], final_g[at], error[at] = work.f[new], work.g[new], err[new]
            steps[at], broken[at] = taken, ~sound[new]
            work.stored = work.stored | over
        if all_over:
            break
        if ended and any_new:
            keep = ~over
            index, before = index[keep], before[keep]
            work.keep(keep)
    return final_f, final_g, error, steps, broken


class _Work:
    """The elements that still iterate."""

    def __init__(self, problem: Problem, f: Tensor, g: Tensor, tol: Tensor, eps: Tensor) -> None:
        self.problem, self.f, self.g, self.tol, self.eps = problem, f.clone(), g.clone(), tol, eps
        self.u, self.v = torch.ones_like(f), torch.ones_like(g)
        self.kernel = kernel(problem, f, g, eps)
        self.stored = torch.zeros(tol.shape, dtype=torch.bool, device=tol.device)
        self.stage_steps = torch.zeros_like(tol)
        self.soft = bool(((problem.soft_a > 0) | (problem.soft_b > 0)).any())

    def sweep(self, count: int) -> None:
        a = self.problem.a
        for _ in range(count):
            self.u = self.scaling(self.row_sums(), self.f, self.problem.soft_a)
            self.v = self.scaling(times(self.kernel.mT, a * self.u), self.g, self.problem.soft_b)
            if self.soft:
                self.translate()
        self.stage_steps = self.stage_steps + count

    def row_sums(self) -> Tensor:
        return times(self.kernel, self.problem.b * self.v)

    def scaling(self, sums: Tensor, potential: Tensor, soft: Tensor) -> Tensor:
        if not self.soft:
            return 1 / sums
        soft = soft.unsqueeze(-1)
        return (-(sums.log() + potential * soft) / (1 + self.eps.unsqueeze(-1) * soft)).exp()

    def potentials(self) -> tuple[Tensor, Tensor]:
        eps = self.eps.unsqueeze(-1)
        return self.f + eps * self.u.log(), self.g + eps * self.v.log()

    def translate(self) -> None:
        """The best constant to move from one potential to the other, where a marginal is penalised."""
        factor = (best_shift(self.problem, *self.potentials()) / self.eps).exp().unsqueeze(-1)
        self.u, self.v = self.u * factor, self.v / factor

    def error(self) -> tuple[Tensor, Tensor]:
        """Of the rows, since the columns have just been set right; and how far the scalings are from 1."""
        _, a, _, _, soft_a, _ = self.problem
        rows = a * self.u * self.row_sums()
        f = self.f + self.eps.unsqueeze(-1) * self.u.log()
        size = torch.maximum(self.u.log().abs().amax(-1), self.v.log().abs().amax(-1))
        return (rows - wanted(a, f, soft_a)).abs().sum(-1) / rows.sum(-1), size

    def absorb(self, rows: Tensor, stage_over: Tensor) -> None:
        """Puts scalings into the potentials; a stage that is over halves eps."""
        f, g = evened(self.problem, *self.potentials())
        mask = rows.unsqueeze(-1)
        self.f, self.g = torch.where(mask, f, self.f), torch.where(mask, g, self.g)
        self.u, self.v = torch.where(mask, 1, self.u), torch.where(mask, 1, self.v)
        self.eps = torch.where(stage_over, torch.maximum(self.eps / 2, self.problem.eps), self.eps)
        self.stage_steps = torch.where(stage_over, 0, self.stage_steps)
        at = rows.nonzero().squeeze(-1)
        self.kernel[at] = kernel(self.problem.pick(at), self.f[at], self.g[at], self.eps[at])

    def keep(self, rows: Tensor) -> None:
        self.problem = self.problem.pick(rows)
        for name in ("f", "g", "tol", "eps", "u", "v", "kernel", "stored", "stage_steps"):
            setattr(self, name, getattr(self, name)[rows])
