r"""How far a network may lie above the optimum of its constrained program: a lower bound from cone multipliers.

With slopes t of the loss, :math:`\nu = -S t` and any :math:`\rho_i \ge 0`, :math:`\mu = \max_i \|\sigma_i Z_i^T \nu +
K_i^T \rho_i\|` bounds what the dual demands to be at most beta; scaled by :math:`c \le \beta / \mu` the point is
feasible for the dual, and its value :math:`-\sum_k s_k\, l^*(c\, t_k, y_k)` is a lower bound over all networks on the
patterns at hand, whatever the multipliers are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _losses
from ._cone_problem import ConeProblem, or_one


def lower_bound(problem: ConeProblem, p: Tensor, rho: Tensor, slope: Tensor | None = None) -> Tensor:
    """``(*B)``: no network on these patterns has an objective below it.

    `rho` is at least 0, ``(*B, 2P, n)``; `slope` of the loss is that at `p` where it is not given.
    """
    t = problem.slope(p) if slope is None else slope
    norms = torch.linalg.vector_norm(problem.cones_adjoint(rho) - problem.fit_adjoint(problem.s * t), dim=-1)
    mu = norms.amax(-1) if norms.shape[-1] else torch.zeros_like(problem.beta)
    most = torch.where(mu == 0, torch.inf, problem.beta / or_one(mu))
    return _losses.lower_bound(problem.loss, problem.s, problem.y, t, most)


def duality_gap(problem: ConeProblem, p: Tensor, rho: Tensor, slope: Tensor | None = None) -> Tensor:
    """``(*B)``: how far the objective at `p` lies above :func:`lower_bound`; NaN stays NaN."""
    return problem.objective(p) - lower_bound(problem, p, rho, slope)


def optimality_error(unit: ConeProblem, p: Tensor, rho: Tensor, slope: Tensor | None = None) -> Tensor:
    """``(*B)``: what solvers stop on, in the units of :func:`._cone_problem.normalise`.

    The larger of two: the gap together with what the violation of the cones may have spared, relative to the objective,
    and the violation of the cones of unit vectors, relative to the largest neuron or label.
    """
    length = or_one(torch.linalg.vector_norm(unit.X, dim=-1))
    outside = (-unit.cones(p)).clamp(min=0)
    size = torch.maximum(torch.linalg.vector_norm(p, dim=-1).amax(-1), unit.y.abs().amax(-1))
    apart = duality_gap(unit, p, rho, slope).abs() + (rho * outside).sum((-2, -1))
    relative = apart / unit.objective(p).clamp(min=torch.finfo(p.dtype).tiny)
    return torch.maximum(relative, (outside / length[..., None, :]).amax((-2, -1)) / or_one(size))


def interior_shift(problem: ConeProblem, p: Tensor, inner: Tensor) -> Tensor:
    r"""Moves neurons into their cells: ``p + c g``, the least c that does.

    `inner` holds one strict interior point of each pattern's cell, ``(*B, P, d)``. Blocks of zeros stay zero.
    """
    g = torch.cat([inner, inner], -2)
    room, value = problem.cones(g), problem.cones(p)
    c = torch.where(room > 0, -value / torch.where(room > 0, room, 1), 0).clamp(min=0).amax(-1, keepdim=True)
    return p + c * g
