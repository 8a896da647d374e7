"""Moreau, the conic solver, as the forward engine of quadratic programs: an active-set method for small ones."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difflayers._solution import Status

from ._interior_point import InteriorPoint
from ._program_kkt import cholesky


@dataclass(frozen=True)
class Moreau:
    """Solves with the library of the same name, in float64 on the CPU.

    Elements with a positive definite P are solved by its dual active-set method, all others, and problems beyond
    `active_set_limit` variables, by its interior-point method.

    Args:
        atol: Feasibility tolerance of the active set, and all tolerances of the interior-point method.
        max_steps: Iterations of the interior-point method.
        active_set_limit: Variables.
    """

    atol: float = 1e-10
    max_steps: int = 200
    active_set_limit: int = 500

    def solve(
        self, P: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``(x, y, z, status, steps)``; vectors are ``(B, .)``, matrices shared or ``(B, ., .)``."""
        if not q.shape[0]:
            none = torch.zeros(0, dtype=torch.int64, device=q.device)
            return q, q.new_zeros(0, A.shape[-2]), q.new_zeros(0, G.shape[-2]), none, none
        if not A.shape[-2] + G.shape[-2]:  # moreau crashes without a constraint
            return InteriorPoint().solve(P, q, G, h, A, b)
        # its active set returns wrong points without a word where a row is zero
        empty = (G == 0).all(-1).any(-1) | (A == 0).all(-1).any(-1)
        definite = (~cholesky(P)[1] & ~empty).expand(q.shape[0])
        if max(q.shape[-1], G.shape[-2] / 2) > self.active_set_limit:
            definite = torch.zeros_like(definite)
        data = P, q, G, h, A, b
        if bool(definite.all()) or not bool(definite.any()):
            return self._solve_group(data, bool(definite.all()))
        groups = definite.nonzero().squeeze(-1), (~definite).nonzero().squeeze(-1)
        order = torch.cat(groups).argsort()
        parts = [self._solve_group(tuple(_rows(t, k, g) for t, k in zip(data, (2, 1) * 3, strict=True)), first)
                 for g, first in zip(groups, (True, False), strict=True)]  # fmt: skip
        x, y, z, status, steps = (torch.cat(pair)[order] for pair in zip(*parts, strict=True))
        return x, y, z, status, steps

    def _solve_group(self, data: tuple[Tensor, ...], active_set: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        P, q, G, h, A, b = data
        absent = torch.isinf(h)
        if active_set:  # which takes no row of zeros, nor infinity
            h = h.clamp(-_NO_BOUND, _NO_BOUND)
        elif bool(absent.any()):  # the interior point takes no huge bound
            G, h = torch.where(absent.unsqueeze(-1), 0, G), torch.where(absent, h.sign(), h)
        B, n, p, m = q.shape[0], q.shape[-1], A.shape[-2], G.shape[-2]
        batch = torch.broadcast_shapes(G.shape[:-2], A.shape[:-2])
        rows = torch.cat([A.expand(*batch, p, n), G.expand(*batch, m, n)], -2)
        solver = _solver(n, p, m, B, active_set, self)
        solver.setup(_numpy(P.flatten(-2)), _numpy(rows.flatten(-2)))
        found = solver.solve(_numpy(q), _numpy(torch.cat([b, h], -1)))
        x, multipliers = (torch.as_tensor(v, dtype=q.dtype, device=q.device) for v in (found.x, found.z))
        codes = [_STATUS.get(int(s), Status.DIVERGED) for s in solver.info.status]
        status = torch.tensor(codes, dtype=torch.int64, device=q.device)
        steps = torch.as_tensor(solver.info.iterations, dtype=torch.int64, device=q.device)
        return x, multipliers[:, :p], multipliers[:, p:], status, steps


_NO_BOUND = 1e20

# by number of moreau's SolverStatus; those that are "almost" so are judged by their residual
_STATUS = {
    1: Status.CONVERGED,
    2: Status.INFEASIBLE,
    3: Status.UNBOUNDED,
    4: Status.CONVERGED,
    5: Status.INFEASIBLE,
    6: Status.UNBOUNDED,
    7: Status.MAX_STEPS,
    10: Status.MAX_STEPS,
}


def _rows(t: Tensor, ndim: int, index: Tensor) -> Tensor:
    return t if t.ndim == ndim and ndim == 2 else t[index]


def _numpy(t: Tensor) -> Any:
    return t.detach().to("cpu", torch.float64).contiguous().numpy()


@functools.lru_cache(maxsize=64)
def _solver(n: int, p: int, m: int, B: int, active_set: bool, options: Moreau) -> Any:
    """A compiled solver for dense problems of one shape; building one costs as much as some solves."""
    import moreau
    import numpy as np

    tol = options.atol
    method: dict[str, Any] = (
        {"solver": "active_set", "active_set_settings": moreau.ActiveSetSettings(primal_tol=tol)}
        if active_set
        else {"solver": "ipm", "ipm_settings": moreau.IPMSettings(tol_gap_abs=tol, tol_gap_rel=tol, tol_feas=tol)}
    )
    settings = moreau.Settings(device="cpu", batch_size=B, enable_grad=False, max_iter=options.max_steps, **method)
    dense = lambda rows: (np.arange(rows + 1) * n, np.tile(np.arange(n), rows))  # noqa: E731
    cones = moreau.Cones(num_zero_cones=p, num_nonneg_cones=m)
    return moreau.CompiledSolver(n, p + m, *dense(n), *dense(p + m), cones, settings)
