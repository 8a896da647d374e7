r"""Sinkhorn's iteration in the logarithm: dearer than on the kernel, and never out of the range of the numbers.

One step is a soft minimum over every row and one over every column. For penalised marginals the step is shortened by
:math:`\rho / (\rho + \epsilon)`.

M. Cuturi, Sinkhorn Distances: Lightspeed Computation of Optimal Transport, 2013; G. Peyre, M. Cuturi, Computational
Optimal Transport, 2019, remark 4.23.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._iteration import HANDOVER, STAGE_STEPS, Problem, best_shift, evened, first_eps, too_slow, wanted

_DEARER = 10  # than a step on the kernel, about


def log_sinkhorn(
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
    """As :func:`kernel_sinkhorn`, to which it is an exact equal."""
    final_f, final_g = f.clone(), g.clone()
    error = torch.full_like(tol, torch.inf)
    steps = torch.zeros(tol.shape, dtype=torch.int64, device=tol.device)
    index = torch.arange(f.shape[0], device=f.device)
    eps, stage_steps = first_eps(problem, scaling), torch.zeros_like(tol)
    taken, before = 0, torch.full_like(tol, torch.inf)
    while index.numel() and taken < max_steps:
        for _ in range(check_every):
            f = soft_minimum(problem, g, eps, rows=True)
            g = soft_minimum(problem, f, eps, rows=False)
            move = best_shift(problem, f, g).unsqueeze(-1)
            f, g = f + move, g - move
        f, g = evened(problem, f, g)
        taken, stage_steps = taken + check_every, stage_steps + check_every
        err, last = _error(problem, f, g, eps), eps <= problem.eps
        slow = last & too_slow(err, before, tol[index], patience / check_every / _DEARER)
        close = (err <= torch.where(last, tol[index], HANDOVER)) | slow
        before = torch.where(last, err, torch.inf)
        over = (last & close) | ~torch.isfinite(err)
        stage_over = ~last & (close | (stage_steps >= STAGE_STEPS))
        eps = torch.where(stage_over, torch.maximum(eps / 2, problem.eps), eps)
        stage_steps = torch.where(stage_over, 0, stage_steps)
        if bool(over.any()) or taken >= max_steps:
            final_f[index], final_g[index], error[index] = f, g, err
            steps[index] = taken
            go_on = ~over
            before = before[go_on]
            index, problem, eps, stage_steps = index[go_on], problem.pick(go_on), eps[go_on], stage_steps[go_on]
            f, g = f[go_on], g[go_on]
    return final_f, final_g, error, steps, ~torch.isfinite(error)


def soft_minimum(problem: Problem, potential: Tensor, eps: Tensor, *, rows: bool) -> Tensor:
    """The best potential of the rows for one of the columns, or the other way round."""
    other, soft = (problem.b, problem.soft_a) if rows else (problem.a, problem.soft_b)
    e = eps.unsqueeze(-1)
    side, across = (-1, -2) if rows else (-2, -1)
    moved = (potential.unsqueeze(across) - problem.cost).div_(e.unsqueeze(-1)).add_(other.log().unsqueeze(across))
    return -e * moved.logsumexp(side) / (1 + e * soft.unsqueeze(-1))


def _error(problem: Problem, f: Tensor, g: Tensor, eps: Tensor) -> Tensor:
    """Of the rows, from the potentials that the next step would give."""
    _, a, _, _, soft_a, _ = problem
    k = 1 + (eps * soft_a).unsqueeze(-1)
    following = soft_minimum(problem, g, eps, rows=True)
    rows = wanted(a, f, soft_a) * (k * (f - following) / eps.unsqueeze(-1)).exp()
    return (rows - wanted(a, f, soft_a)).abs().sum(-1) / rows.sum(-1)
