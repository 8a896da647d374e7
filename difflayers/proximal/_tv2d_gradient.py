r"""Isotropic total variation of an image by accelerated projected gradients on its flow: for large images.

.. math:: \min_p \tfrac12 \|x - D^T p\|^2 \quad \text{s.t.} \quad \|p_i\| \le b_i, \qquad z = x - D^T p

A. Beck, M. Teboulle, Fast gradient-based algorithms for constrained total variation image denoising and deblurring
problems, 2009, section 4; restart by the gradient: B. O'Donoghue, E. Candes, 2015. A step costs a few passes over the
image, but the distance to the solution falls slowly where pixels are nearly flat, so it pays for moderate tolerances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers._solution import Info, Status

from ._flow_solver import DualGradient
from ._grid_system import difference, divergence
from ._tv2d_pieces import Pieces, length

STEP = 1 / 8  # one over a bound of the squared norm of D


def minimise(x: Tensor, b: Tensor, solver: DualGradient, goal: Tensor) -> tuple[Tensor, Info]:
    """The solution for images ``(B, H, W)`` and bounds ``(B, H, W)``, and the report of every element."""
    p = q = torch.zeros_like(difference(x))
    a = torch.ones_like(x[:, :1, :1])
    busy = torch.ones_like(goal, dtype=torch.bool)
    steps = torch.zeros_like(busy, dtype=torch.int64)
    best, flow, error = x, p, torch.full_like(goal, torch.inf)
    for step in range(1, solver.max_steps + 1):
        new = q + STEP * difference(x - divergence(q))
        new = new * (b / torch.maximum(length(new), b)).unsqueeze(1)
        overshot = ((q - new) * (new - p)).sum((1, 2, 3))[:, None, None] > 0
        faster = (1 + (1 + 4 * a * a).sqrt()) / 2
        q = new + torch.where(overshot, 0, (a - 1) / faster).unsqueeze(1) * (new - p)
        p, a = new, torch.where(overshot, 1, faster)
        if step % solver.check_every and step != solver.max_steps:
            continue
        z = x - divergence(p)
        d = difference(z)
        gap = (b * length(d) - (p * d).sum(1)).sum((-1, -2))
        best, flow = torch.where(busy[:, None, None], z, best), torch.where(busy[:, None, None, None], p, flow)
        error = torch.where(busy, (2 * gap).clamp_min(0).sqrt(), error)
        steps = torch.where(busy, step, steps)
        busy = busy & (error > goal)
        if not bool(busy.any()):
            break
    # flat pixels are told from the others by what is larger, the room of the flow or the jump
    unit = (x - x.mean((-1, -2), keepdim=True)).abs().amax((-1, -2), keepdim=True)
    flat = (1 - length(flow) / b) * unit > length(difference(best))
    z = Pieces.joined_by(flat).mean(best)
    error = error + torch.linalg.vector_norm(z - best, dim=(-1, -2))
    status = torch.where(busy, int(Status.MAX_STEPS), int(Status.CONVERGED))
    return z, Info(status, steps, error)
