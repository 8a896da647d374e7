"""Moreau, the conic solver, as the forward engine of quadratic programs: an active-set method for small ones."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difflayers._solution import Status

from . import _program_kkt as kkt
from ._interior_point import InteriorPoint


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
        p, data = b.shape[-1], (P, q, kkt.all_rows(A, G), torch.cat([b, h], -1))
        x, v, status, steps = self.solve_rows(*data, p, kkt.definite(P))
        return x, v[:, :p], v[:, p:], status, steps

    def solve_rows(
        self, P: Tensor, q: Tensor, C: Tensor, bounds: Tensor, p: int, definite: kkt.Definite
    ) -> tuple[Tensor, ...]:
        """``(x, multipliers, status, steps)`` with the `p` equalities first among the rows; `definite` is of P."""
        B, n, r = q.shape[0], q.shape[-1], C.shape[-2]
        if not B:
            none = torch.zeros(0, dtype=torch.int64, device=q.device)
            return q, q.new_zeros(0, r), none, none
        if not r:  # moreau crashes without a constraint
            x, y, _, status, steps = InteriorPoint().solve(P, q, C, bounds, C, bounds)
            return x, y, status, steps
        data = P, q, C, bounds
        regular = C.any(-1)  # its active set returns wrong points without a word where a row is zero
        small = max(n, (r - p) / 2) <= self.active_set_limit
        if small and definite.every and bool(regular.all()):
            return self._active_set(p, *data)
        return self._by_group(p, data, (definite.elements & regular.all(-1) & small).expand(B))

    def _by_group(self, p: int, data: tuple[Tensor, ...], regular: Tensor) -> tuple[Tensor, ...]:
        """Each element by the method that suits it."""
        found, order = [], []
        for mask, method in ((regular, self._active_set), (~regular, self._interior_point)):
            index = mask.nonzero().squeeze(-1)
            if len(index):
                found.append(method(p, *(_rows(t, k, index) for t, k in zip(data, (2, 1, 2, 1), strict=True))))
                order.append(index)
        back = torch.cat(order).argsort()
        return tuple(torch.cat(pieces)[back] for pieces in zip(*found, strict=True))

    def _active_set(self, p: int, P: Tensor, q: Tensor, rows: Tensor, bounds: Tensor) -> tuple[Tensor, ...]:
        solver = _solvers.compiled(*_sizes(q, bounds, p), True, self)
        solver = getattr(solver, "_impl", solver)  # without a check of the symmetry of P, longer than a small solve
        solver.setup(_numpy(P.flatten(-2)), _numpy(rows.flatten(-2)))
        found = solver.solve(_numpy(q), _numpy(bounds.clamp(-_NO_BOUND, _NO_BOUND)))  # it takes no infinity
        if not isinstance(found, dict):
            found = {"x": found.x, "z": found.z, "status": solver.info.status, "iterations": solver.info.iterations}
        result = _tensors(found, q)
        lost = [i for i, s in enumerate(found["status"]) if _STATUS.get(int(s)) not in _SETTLED]
        if lost:  # on dependent equalities, for instance
            index = torch.tensor(lost, device=q.device)
            few = (_rows(t, k, index) for t, k in zip((P, q, rows, bounds), (2, 1, 2, 1), strict=True))
            result = tuple(
                t.index_copy(0, index, a) for t, a in zip(result, self._interior_point(p, *few), strict=True)
            )
        return result

    def _interior_point(self, p: int, P: Tensor, q: Tensor, rows: Tensor, bounds: Tensor) -> tuple[Tensor, ...]:
        absent = torch.isinf(bounds)
        if bool(absent.any()):  # it takes no huge bound
            rows, bounds = torch.where(absent.unsqueeze(-1), 0, rows), torch.where(absent, bounds.sign(), bounds)
        if P.ndim != rows.ndim:  # it takes both shared or none
            P, rows = (M.expand(len(q), *M.shape[-2:]) for M in (P, rows))
        solver = _solvers.compiled(*_sizes(q, bounds, p), False, self)
        solver.setup(_numpy(P.flatten(-2)), _numpy(rows.flatten(-2)))
        found = solver.solve(_numpy(q), _numpy(bounds))
        found = {"x": found.x, "z": found.z, "status": solver.info.status, "iterations": solver.info.iterations}
        return _tensors(found, q)


_NO_BOUND = 1e20

# by number of moreau's SolverStatus; those that are "almost" so are judged by their residual
_STATUS = {
    1: int(Status.CONVERGED),
    2: int(Status.INFEASIBLE),
    3: int(Status.UNBOUNDED),
    4: int(Status.CONVERGED),
    5: int(Status.INFEASIBLE),
    6: int(Status.UNBOUNDED),
    7: int(Status.MAX_STEPS),
    10: int(Status.MAX_STEPS),
}


_SETTLED = (Status.CONVERGED, Status.INFEASIBLE, Status.UNBOUNDED)


def _rows(t: Tensor, ndim: int, index: Tensor) -> Tensor:
    return t if t.ndim == ndim and ndim == 2 else t[index]


def _sizes(q: Tensor, bounds: Tensor, p: int) -> tuple[int, int, int, int]:
    return q.shape[-1], p, bounds.shape[-1] - p, q.shape[0]


def _numpy(t: Tensor) -> Any:
    return t.numpy(force=True)


def _tensors(found: dict[str, Any], like: Tensor) -> tuple[Tensor, ...]:
    """``(x, multipliers, status, steps)``."""
    x, v = (torch.from_numpy(found[name]).to(like) for name in ("x", "z"))
    codes = [_STATUS.get(int(s), int(Status.DIVERGED)) for s in found["status"]]
    status, steps = torch.tensor([codes, list(found["iterations"])], device=like.device).unbind()
    return x, v, status, steps


def _compiled(n: int, p: int, m: int, B: int, active_set: bool, options: Moreau) -> Any:
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


class _Solvers(threading.local):
    """Those of one thread: a solver holds the data of its problem, and lets other threads run while it solves."""

    def __init__(self) -> None:
        self.compiled = functools.lru_cache(maxsize=32)(_compiled)


_solvers = _Solvers()
