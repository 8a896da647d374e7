r"""An interior-point method for gated problems that the active-set search does not get through: small beta, many gates.

It solves the dual problem, a program with one convex quadratic constraint a gate,

.. math:: \min_\nu \tfrac12 \nu^T S^{-1} \nu - y^T \nu \quad \text{s.t.} \quad
    g_i = \frac{\|q_i\|^2 - \beta^2}{2 \beta} \le 0, \quad q_i = Z_i^T \nu,

whose multipliers are the norms of the neurons, :math:`u_i = \lambda_i q_i / \beta`. With :math:`V_i = Z_i q_i / \beta`
every Newton step is one positive definite system of the size of the training set, however many gates there are,

.. math:: \Big(S^{-1} + (X X^T) \circ (M \tfrac\lambda\beta M^T) + V \tfrac{\lambda}{-g} V^T\Big) \Delta\nu
    = f - \sum_i \frac{\mu}{-g_i} V_i .

S. Boyd, L. Vandenberghe, Convex Optimization, 2004, algorithm 11.2.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ._cone_interior_point import InteriorPoint
from ._cone_problem import ConeProblem
from ._gated_task import GatedTask
from ._losses import Squared

STEPS = 60
OUTER, LENGTHS = 20, tuple(0.5**k for k in range(10))  # parabolas tried, and steps towards their minimum
FLAT = 1e-8  # the least curvature of a parabola, relative to the largest
GAP = 1e-11  # relative gap at which the active neurons are plain


def rescue(task: GatedTask, u: Tensor) -> tuple[Tensor, Tensor]:
    """A point close to a solution, with zero blocks where neurons are not active, for every element; steps taken.

    Losses other than the square are replaced by their parabolas, from the point `u` on.
    """
    return interior_point(task) if isinstance(task.loss, Squared) else _parabolas(task, u)


def rescue_without_parabolas(task: GatedTask, u: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the method for networks with cones, without cones; slower, where there are many gates."""
    problem = ConeProblem(task.X, task.y, task.s, task.beta, task.M, task.loss, gated=True)
    found = InteriorPoint(rtol=1e-14).solve(problem)
    return torch.where(torch.isfinite(found.v), found.v - found.w, u), found.steps


def _parabolas(task: GatedTask, u: Tensor) -> tuple[Tensor, Tensor]:
    """Minima of the loss's parabolas at the last point, with a line search towards each."""
    steps = torch.zeros_like(task.beta, dtype=torch.long)
    t = torch.tensor(LENGTHS, dtype=u.dtype, device=u.device)[:, None, None, None]
    wide = replace(task, **{name: getattr(task, name).unsqueeze(0) for name in ("X", "M", "y", "s", "beta")})
    for _ in range(OUTER):
        f = task.fit(u)
        bend = task.curvature(f)
        bend = torch.maximum(bend, FLAT * bend.amax(-1, keepdim=True))
        target = f - task.s * task.loss.slope(f, task.y) / torch.where(bend > 0, bend, 1)
        new, more = interior_point(replace(task, y=target, s=bend, loss=Squared()))
        steps += more
        tried = u + t * (new - u)
        value, at = wide.objective(tried).nan_to_num(nan=torch.inf).min(0)
        before = task.objective(u)
        best = tried.gather(0, at[None, :, None, None].expand(1, *u.shape)).squeeze(0)
        u = torch.where((value < before)[:, None, None], best, u)
        if not bool((value < before * (1 - GAP)).any()):
            break
    return u, steps


def interior_point(task: GatedTask) -> tuple[Tensor, Tensor]:
    """The same for the squared loss."""
    X, M, s, y, beta = task.X, task.M, task.s, task.y, task.beta.unsqueeze(-1)
    P, eps = M.shape[-1], torch.finfo(X.dtype).eps
    gram, root = X @ X.mT, s.sqrt()
    there, weight = s > 0, torch.where(s > 0, s, 1)
    largest = torch.linalg.vector_norm(task.pull(s * y), dim=-1).amax(-1, keepdim=True)
    nu = s * y * (0.9 * beta / torch.where(largest > 0, largest, 1)).clamp_max(1)
    size = (s * y.square()).sum(-1, keepdim=True) / 2
    lam = (size / (beta * P)).expand(-1, P).clamp_min(torch.finfo(X.dtype).tiny)
    sigma, steps = torch.full_like(beta, 0.1), torch.zeros_like(task.beta, dtype=torch.long)
    done = torch.zeros_like(beta, dtype=torch.bool)
    for _ in range(STEPS):
        q = task.pull(nu)
        room = _room(q, beta).clamp_min(eps * beta)
        f = torch.where(there, y - nu / weight, 0)
        V = M * (X @ q.mT) / beta.unsqueeze(-1)
        surrogate = (lam * room).sum(-1, keepdim=True)
        missing = (s * (f - (V * lam.unsqueeze(-2)).sum(-1)).square()).sum(-1, keepdim=True)
        done = done | (torch.maximum(surrogate, missing) <= max(GAP, 4 * eps) * size)
        if bool(done.all()):
            break
        steps += ~done.squeeze(-1)
        mu = sigma * surrogate / P
        T = gram * ((M * (lam / beta).unsqueeze(-2)) @ M.mT) + (V * (lam / room).unsqueeze(-2)) @ V.mT
        K = T * root.unsqueeze(-1) * root.unsqueeze(-2)
        K.diagonal(dim1=-2, dim2=-1).add_(1)
        factor, _ = torch.linalg.cholesky_ex(K)
        wanted = root * (f - (V * (mu / room).unsqueeze(-2)).sum(-1))
        dnu = root * torch.cholesky_solve(wanted.unsqueeze(-1), factor).squeeze(-1)
        dlam = lam / room * (V * dnu.unsqueeze(-1)).sum(-2) - lam + mu / room
        t = _reach(q, task.pull(dnu), beta).amin(-1, keepdim=True)
        t = torch.minimum(t, torch.where(dlam < 0, -lam / dlam, torch.inf).amin(-1, keepdim=True))
        t = (0.99 * t).clamp_max(1)
        moves = ~done & torch.isfinite(dnu).all(-1, keepdim=True)
        nu, lam = torch.where(moves, nu + t * dnu, nu), torch.where(moves, lam + t * dlam, lam)
        sigma = torch.where(t > 0.9, 0.02, torch.where(t > 0.5, 0.1, 0.4))
    q = task.pull(nu)
    active = lam * beta > _room(q, beta) * lam.amax(-1, keepdim=True)
    return torch.where(active.unsqueeze(-1), (lam / beta).unsqueeze(-1) * q, 0), steps


def _room(q: Tensor, beta: Tensor) -> Tensor:
    """``-g_i``."""
    size = torch.linalg.vector_norm(q, dim=-1)
    return (beta - size) * (beta + size) / (2 * beta)


def _reach(q: Tensor, dq: Tensor, beta: Tensor) -> Tensor:
    """The step at which ``|q + t dq| = beta``, for every block."""
    a, b = dq.square().sum(-1), (q * dq).sum(-1)
    c = 2 * beta * _room(q, beta).clamp_min(0)
    root = (b * b + a * c).sqrt()
    # the stable form of (root - b) / a
    below = root + b
    return torch.where(
        b > 0,
        c / torch.where(below > 0, below, 1),
        torch.where(a > 0, (root - b) / torch.where(a > 0, a, 1), torch.inf),
    )
