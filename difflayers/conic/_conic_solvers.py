"""Conic solvers that find a solution: Clarabel element by element, and Moreau on whole batches."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import Status

from ._cones import Free, NonNegative, Zero
from ._conic_layout import Block, Layout
from ._exponential import DualExponential, Exponential
from ._moreau import Moreau
from ._positive_semidefinite import PositiveSemidefinite
from ._power import DualPower, Power
from ._second_order import SecondOrder

Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@runtime_checkable
class ConicSolver(Protocol):
    """Finds a solution of a conic program, one row an element; no gradient is asked of it. A frozen dataclass."""

    def __hash__(self) -> int: ...

    def solve_conic(self, P: Tensor, q: Tensor, A: Tensor, b: Tensor, layout: Layout) -> Found:
        """``(x, y, s, status, steps)``; vectors are ``(B, .)``, matrices shared or ``(B, ., .)``."""


def check_solver(solver: object) -> None:
    """Refuses what solves no conic program."""
    if solver is not None and not isinstance(solver, Moreau | ConicSolver):
        raise ValueError(f"solver: expected Moreau, a ConicSolver such as Clarabel, or None, got {solver!r}")


@dataclass(frozen=True)
class Clarabel:
    """Solves with the library of the same name, in float64 on the CPU, one element after the other.

    Args:
        tol: Tolerance of the residuals, of the gap, and of certificates.
        max_steps: Iterations of the interior-point method.
    """

    tol: float = 1e-11
    max_steps: int = 200

    def solve_conic(self, P: Tensor, q: Tensor, A: Tensor, b: Tensor, layout: Layout) -> Found:
        """``(x, y, s, status, steps)``."""
        import clarabel  # type: ignore[import-untyped]
        from scipy import sparse

        settings = clarabel.DefaultSettings()
        settings.verbose, settings.max_iter = False, self.max_steps
        for name in ("tol_gap_abs", "tol_gap_rel", "tol_feas", "tol_infeas_abs", "tol_infeas_rel", "tol_ktratio"):
            setattr(settings, name, self.tol)
        cones = _clarabel_cones(layout)
        rows = _Rows(layout, A, b)
        shared = [t.ndim == 2 for t in (P, A)]
        triangle = lambda M: sparse.csc_matrix(np.triu(M))  # noqa: E731
        P_np, q_np, A_np, b_np = _numpy(P), _numpy(q), _numpy(rows.A), _numpy(rows.b)
        P_all = triangle(P_np) if shared[0] else None
        A_all = sparse.csc_matrix(A_np) if shared[1] else None
        out = []
        for k in range(len(q_np)):
            P_k = triangle(P_np[k]) if P_all is None else P_all
            A_k = sparse.csc_matrix(A_np[k]) if A_all is None else A_all
            out.append(clarabel.DefaultSolver(P_k, q_np[k], A_k, b_np[k], cones, settings).solve())
        x, z, s = (_tensor(np.array([getattr(r, name) for r in out]), q) for name in ("x", "z", "s"))
        codes = [_CLARABEL.get(str(r.status), Status.DIVERGED) for r in out]
        steps = torch.tensor([r.iterations for r in out], dtype=torch.int64, device=q.device)
        return x, rows.y(z), rows.s(s, x), torch.tensor(codes, dtype=torch.int64, device=q.device), steps


# what is only "almost" so is judged by our own residual
_CLARABEL = {
    "Solved": Status.CONVERGED,
    "AlmostSolved": Status.CONVERGED,
    "PrimalInfeasible": Status.INFEASIBLE,
    "AlmostPrimalInfeasible": Status.INFEASIBLE,
    "DualInfeasible": Status.UNBOUNDED,
    "AlmostDualInfeasible": Status.UNBOUNDED,
    "MaxIterations": Status.MAX_STEPS,
}
_MOREAU = {
    1: Status.CONVERGED,
    2: Status.INFEASIBLE,
    3: Status.UNBOUNDED,
    4: Status.CONVERGED,  # almost; the same of a certificate is no reason to stop looking
    7: Status.MAX_STEPS,
}
_one_at_a_time = threading.Lock()  # a compiled solver keeps its data between setup and solve


def solve_moreau(options: Moreau, P: Tensor, q: Tensor, A: Tensor, b: Tensor, layout: Layout) -> Found:
    """``(x, y, s, status, steps)`` by Moreau's interior-point method."""
    rows = _Rows(layout, A, b)
    n, m = q.shape[-1], rows.b.shape[-1]
    with _one_at_a_time:
        solver = _compiled(n, m, q.shape[0], layout, options)
        matrices = [M.flatten(-2) for M in (P, rows.A)]
        if any(M.ndim > 1 for M in matrices):  # it takes both shared or none
            matrices = [M.expand(q.shape[0], -1) for M in matrices]
        solver.setup(*map(_numpy, matrices))
        found = solver.solve(_numpy(q), _numpy(rows.b))
        x, z, s = (_tensor(np.array(t), q) for t in (found.x, found.z, found.s))
        codes = [_MOREAU.get(int(code), Status.DIVERGED) for code in solver.info.status]
        steps = torch.tensor(np.array(solver.info.iterations), dtype=torch.int64, device=q.device)
    return x, rows.y(z), rows.s(s, x), torch.tensor(codes, dtype=torch.int64, device=q.device), steps


@functools.lru_cache(maxsize=64)
def _compiled(n: int, m: int, B: int, layout: Layout, options: Moreau) -> Any:
    import moreau

    tol = options.atol
    inner = moreau.IPMSettings(tol_gap_abs=tol, tol_gap_rel=tol, tol_feas=tol)
    settings = moreau.Settings(
        device="cpu", batch_size=B, enable_grad=False, max_iter=options.max_steps, solver="ipm", ipm_settings=inner
    )
    dense = lambda rows: (np.arange(rows + 1) * n, np.tile(np.arange(n), rows))  # noqa: E731
    return moreau.CompiledSolver(n, m, *dense(n), *dense(m), moreau.Cones(**_moreau_cones(layout)), settings)


def _moreau_cones(layout: Layout) -> dict[str, Any]:
    """In the order in which it wants the rows, which is that of the layout."""
    rows = lambda kind: sum(block.size for block in layout if isinstance(block.cone, kind))  # noqa: E731
    each = lambda kind: [block for block in layout for _ in range(block.times) if isinstance(block.cone, kind)]  # noqa: E731
    return {
        "num_zero_cones": rows(Zero),
        "num_nonneg_cones": rows(NonNegative),
        "so_cone_dims": [block.dim for block in each(SecondOrder)],
        "psd_dims": [block.side for block in each(PositiveSemidefinite)],
        "num_exp_cones": len(each((Exponential, DualExponential))),
        "power_alphas": [block.cone.alpha for block in each((Power, DualPower))],  # type: ignore[attr-defined]
    }


def _clarabel_cones(layout: Layout) -> list[Any]:
    import clarabel

    cones: list[Any] = []
    for cone, dim, count in layout:
        match cone:
            case Zero():
                cones.append(clarabel.ZeroConeT(dim * count))
            case NonNegative():
                cones.append(clarabel.NonnegativeConeT(dim * count))
            case SecondOrder():
                cones += [clarabel.SecondOrderConeT(dim)] * count
            case PositiveSemidefinite():
                cones += [clarabel.PSDTriangleConeT(Block(cone, dim, count).side)] * count
            case Exponential() | DualExponential():
                cones += [clarabel.ExponentialConeT()] * count
            case Power(alpha) | DualPower(alpha):
                cones += [clarabel.PowerConeT(alpha)] * count
    return cones


class _Rows:
    """The rows as a solver wants them: no free ones, and members of dual cones turned into members of the primal ones.

    ``(u, v, w)`` is in the dual exponential cone where ``(u - v, -u, w)`` is in the exponential cone, and in the dual
    power cone where ``(u / alpha, v / (1 - alpha), w)`` is in the power cone.
    """

    def __init__(self, layout: Layout, A: Tensor, b: Tensor) -> None:
        self.kept = sum(block.size for block in layout if not isinstance(block.cone, Free))  # free ones come last
        self.whole_A, self.whole_b = A, b
        self.M: Tensor | None = None
        if any(isinstance(block.cone, DualExponential | DualPower) for block in layout):
            blocks = [_to_primal(block.cone, block.dim, b) for block in layout for _ in range(block.times)]
            self.M = torch.block_diag(*blocks)[: self.kept, : self.kept]
        A, b = A[..., : self.kept, :], b[..., : self.kept]
        self.A = A if self.M is None else self.M @ A
        self.b = b if self.M is None else _turned(self.M, b)

    def y(self, z: Tensor) -> Tensor:
        """Multipliers of all rows."""
        z = z if self.M is None else _turned(self.M.mT, z)
        return torch.cat([z, z.new_zeros(*z.shape[:-1], self.whole_b.shape[-1] - self.kept)], -1)

    def s(self, s: Tensor, x: Tensor) -> Tensor:
        """Slacks of all rows."""
        if self.M is not None:
            s = _turned(torch.linalg.inv(self.M), s)
        if self.kept == self.whole_b.shape[-1]:
            return s
        free = self.whole_b - (self.whole_A @ x.unsqueeze(-1)).squeeze(-1)
        return torch.cat([s, free[..., self.kept :]], -1)


def _turned(M: Tensor, v: Tensor) -> Tensor:
    """``M v``, whose rounding does not depend on how many elements there are."""
    return (M * v.unsqueeze(-2)).sum(-1)


def _to_primal(cone: Any, dim: int, like: Tensor) -> Tensor:
    make = lambda rows: torch.tensor(rows, dtype=like.dtype, device=like.device)  # noqa: E731
    match cone:
        case DualExponential():
            return make([[1.0, -1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        case DualPower(alpha):
            return torch.diag(make([1 / alpha, 1 / (1 - alpha), 1.0]))
        case _:
            return torch.eye(dim, dtype=like.dtype, device=like.device)


def _numpy(t: Tensor) -> np.ndarray:
    return t.detach().to("cpu", torch.float64).contiguous().numpy()


def _tensor(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.tensor(array, dtype=like.dtype, device=like.device)
