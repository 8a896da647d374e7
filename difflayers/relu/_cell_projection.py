r"""The nearest vector of a cell: what bounds from above how much a ReLU neuron there could gain.

.. math:: \max \{ g^T u : K u \ge 0, \|u\| \le 1 \} = \min_{\rho \ge 0} \|g + K^T \rho\|,

and the minimiser :math:`g + K^T \rho` is the projection of g on the cell :math:`K u \ge 0`. One small quadratic program
a cell, all at once, by Mehrotra's predictor-corrector method with a d x d system each. S. Mehrotra, On the
implementation of a primal-dual interior point method, 1992.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._cone_newton import factor, solve_factor
from ._cone_problem import or_one

_STEPS, _ENOUGH, _SHORT, _NEAR, _PATIENCE = 60, 1e-14, 0.995, 1e-8, 3


def cell_multipliers(rows: Tensor, side: Tensor, g: Tensor) -> Tensor:
    """``rho >= 0 (*B, Q, n)`` for vectors `g (*B, Q, d)` and cells ``side_ik x_k^T u >= 0``.

    Args:
        rows: ``(*B, n, d)``, the points x_k.
        side: ``(*B, Q, n)``, 1, -1, or 0 where a point binds nothing.
        g: What is projected. NaN stays with its vector.
    """
    length = or_one(torch.linalg.vector_norm(rows, dim=-1))
    size = or_one(torch.linalg.vector_norm(g, dim=-1))[..., None]
    rows, goal = rows / length[..., None], g / size
    bound = (side != 0) & (rows != 0).any(-1).unsqueeze(-2)
    side = torch.where(bound, side, 0)
    count = bound.sum(-1).clamp(min=1)
    u, s, rho = torch.zeros_like(goal), torch.ones_like(side), torch.where(bound, 1.0, torch.zeros_like(side))
    outer = (rows[..., :, None] * rows[..., None, :]).flatten(-2)
    eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)

    def cone(u: Tensor) -> Tensor:
        return side * (u @ rows.mT)

    def adjoint(v: Tensor) -> Tensor:
        return (side * v) @ rows

    # all multipliers give a bound; the least is kept, since steps beyond rounding lead astray
    best, least = rho, torch.full_like(u[..., 0], torch.inf)
    idle = torch.zeros_like(count)
    for _ in range(_STEPS):
        norm = torch.linalg.vector_norm(goal + adjoint(rho), dim=-1)
        r_d, r_p = u - goal - adjoint(rho), torch.where(bound, cone(u) - s, 0)
        mu = (s * rho).sum(-1) / count
        error = torch.maximum(mu, torch.maximum(r_d.abs().amax(-1), r_p.abs().amax(-1)))
        idle = torch.where((norm < least) | (error > _NEAR), 0, idle + 1)
        best = torch.where((norm < least)[..., None], rho, best)
        least = torch.fmin(norm, least)
        going = (error > _ENOUGH) & (idle < _PATIENCE)
        if not bool(going.any()):
            break
        L = factor(eye + ((rho / s) @ outer).unflatten(-1, eye.shape))

        def direction(product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            du = solve_factor(L, -r_d - adjoint((rho * r_p + product) / s))  # noqa: B023  (used within its own step)
            ds = torch.where(bound, cone(du) + r_p, 0)  # noqa: B023
            return du, ds, (-product - rho * ds) / s  # noqa: B023

        def longest(ds: Tensor, drho: Tensor) -> Tensor:
            ratio = torch.maximum(-ds / s, torch.where(bound, -drho / or_one(rho), 0)).amax(-1)  # noqa: B023
            return 1 / ratio.clamp(min=1)

        _, ds, drho = direction(s * rho)
        t = longest(ds, drho)[..., None]
        then = torch.where(bound, (s + t * ds) * (rho + t * drho), 0).sum(-1) / count
        centre = (then / or_one(mu)).clamp(0, 1) ** 3 * mu
        du, ds, drho = direction(torch.where(bound, s * rho + ds * drho - centre[..., None], 0))
        t = torch.where(going, _SHORT * longest(ds, drho), 0)[..., None]
        step = torch.isfinite(du).all(-1, keepdim=True)
        u, s, rho = (torch.where(step, a + t * da, a) for a, da in ((u, du), (s, ds), (rho, drho)))
    return torch.where(bound, best, 0) * size / length[..., None, :]
