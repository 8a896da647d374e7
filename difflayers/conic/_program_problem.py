"""A quadratic program as the engine sees it: the equations that hold at a solution, and how to solve with them.

An inequality with a positive multiplier is an equation, one with a zero multiplier is none, and its multiplier is zero.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from torch import Tensor

from difflayers._solution import Info, Status
from difflayers.implicit import ImplicitProblem
from difflayers.linalg._system import times

from . import _program_kkt as kkt

NAMES = ("P", "q", "G", "h", "A", "b")
NDIMS = (2, 1, 2, 1, 2, 1)


class ProgramSolver(Protocol):
    """Finds a solution and its multipliers, one row an element; no gradient is asked of it. A frozen dataclass."""

    def __hash__(self) -> int: ...

    def solve(
        self, P: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``(x, y, z, status, steps)``."""


def _unpack(args: tuple[Tensor, ...], parts: tuple[bool, bool]) -> tuple[Tensor, ...]:
    """All six, empty where absent."""
    P, q, *rest = args
    none = P.new_zeros(0, P.shape[-1]), P.new_zeros(0)
    G, h = (rest.pop(0), rest.pop(0)) if parts[0] else none
    A, b = (rest.pop(0), rest.pop(0)) if parts[1] else none
    return P, q, G, h, A, b


def _residual(point: Tensor, *args: Tensor, parts: tuple[bool, bool]) -> Tensor:
    """Stationarity, equalities, and of each inequality the equation that holds."""
    P, q, G, h, A, b = _unpack(args, parts)
    n, p = q.shape[-1], A.shape[-2]
    x, y, z = point[..., :n], point[..., n : n + p], point[..., n + p :]
    rows = [times(P, x) + q]
    if parts[1]:
        rows[0] = rows[0] + times(A.mT, y)
        rows.append(times(A, x) - b)
    if parts[0]:
        rows[0] = rows[0] + times(G.mT, z)
        rows.append(torch.where(z > 0, times(G, x) - h, z))
    batch = torch.broadcast_shapes(*(r.shape[:-1] for r in rows))
    return torch.cat([r.expand(*batch, r.shape[-1]) for r in rows], -1)


@functools.lru_cache(maxsize=64)
def program_problem(parts: tuple[bool, bool], solver: Any) -> ImplicitProblem:
    """The problem with the inequalities, the equalities, both or none; `parts` says which.

    Args:
        parts: Whether there are inequalities, and equalities.
        solver: A :class:`ProgramSolver`.
    """
    present = (True, True, *(parts[0],) * 2, *(parts[1],) * 2)
    return ImplicitProblem(
        solve=functools.partial(_solve, parts=parts, solver=solver),
        residual=functools.partial(_residual, parts=parts),
        linear_solve=functools.partial(_linear_solve, parts=parts),
        value_ndim=1,
        arg_ndims=tuple(k for k, there in zip(NDIMS, present, strict=True) if there),
        factor_ndims=kkt.FACTOR_NDIMS,
        symmetric=False,
        name=f"quadratic_program[{solver!r}]",
        arg_names=tuple(name for name, there in zip(NAMES, present, strict=True) if there),
    )


def _solve(*args: Tensor, parts: tuple[bool, bool], solver: ProgramSolver) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    data = _unpack(args, parts)
    batch = torch.broadcast_shapes(*(t.shape[: t.ndim - k] for t, k in zip(data, NDIMS, strict=True)))
    data = tuple(_flat(t, batch, k) for t, k in zip(data, NDIMS, strict=True))
    P, q, G, h, A, b = data
    _refuse_indefinite(P)
    x, y, z, status, steps = solver.solve(*data)
    C, slack = _all_rows(A, G), h - times(G, x)
    z = torch.where(z > slack.clamp_min(0), z, 0)
    active = torch.cat([torch.ones_like(y), (z > 0).to(z.dtype)], -1)
    factors = kkt.factorise(P, C, active)
    size = 1 + torch.maximum(kkt.amax(q), kkt.amax(torch.cat([b, torch.where(torch.isinf(h), 0, h)], -1)))
    violation = _violation((x, y, z), data)
    inexact = violation > 64 * torch.finfo(q.dtype).eps * size
    if bool(inexact.any()):
        x, y, z, violation = _polish((x, y, z), violation, inexact, data, C, factors)
    false = (status == Status.CONVERGED) & ~(violation <= torch.finfo(q.dtype).eps ** 0.4 * size)
    status = torch.where(false, int(Status.DIVERGED), status)
    info = Info(*(t.reshape(batch) for t in (status, steps, violation)))
    back = lambda t, k: t.reshape((*batch, *t.shape[t.ndim - k :])) if t.ndim > k else t  # noqa: E731
    found = tuple(back(f, k) for f, k in zip(factors, kkt.FACTOR_NDIMS, strict=True))
    value = torch.cat([x, y, z], -1)
    return value.reshape((*batch, value.shape[-1])), info, found


def _refuse_indefinite(P: Tensor) -> None:
    """Reads one flag; eigenvalues only of matrices that are not positive definite beyond doubt."""
    suspect = kkt.cholesky(P)[1]
    if P.is_meta or not bool(suspect.any()):
        return
    finite = torch.isfinite(P).flatten(-2).all(-1)[..., None, None]
    values = torch.linalg.eigvalsh(torch.where(finite, P, 0))
    noise = P.shape[-1] * torch.finfo(P.dtype).eps ** 0.75 * values.abs().amax(-1)
    wrong = values[..., 0] < -noise
    if bool(wrong.any()):
        first = int(wrong.flatten().to(torch.int8).argmax())
        lowest = float(values[..., 0].flatten()[first])
        where = f" in element {first}" if P.ndim > 2 else ""
        raise ValueError(f"P: expected a positive semidefinite matrix, got smallest eigenvalue {lowest:.2g}{where}")


def _flat(t: Tensor, batch: torch.Size, ndim: int) -> Tensor:
    """One batch dimension; none for a matrix that all elements share."""
    if ndim == 2 and t.ndim == 2:
        return t
    event = t.shape[t.ndim - ndim :]
    return t.expand((*batch, *event)).reshape((batch.numel(), *event))


def _polish(
    point: tuple[Tensor, ...],
    violation: Tensor,
    inexact: Tensor,
    data: tuple[Tensor, ...],
    C: Tensor,
    factors: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The exact point of the active set, for `inexact` elements that gain by it: a solver's tolerance is not ours."""
    P, q, _, h, _, b = data
    x, y, z = point
    active = factors[2]
    bounds = torch.cat([b, torch.where(z > 0, h, 0)], -1)
    multipliers = torch.cat([y, z], -1)
    dx, dv, _ = kkt.solve(P, C, factors, -(times(P, x) + q + times(C.mT, multipliers)), bounds - active * times(C, x))
    new_x, new = x + dx, multipliers + dv
    new_y, new_z = new[..., : y.shape[-1]], new[..., y.shape[-1] :].clamp_min(0)
    after = _violation((new_x, new_y, new_z), data)
    # an active row keeps a positive multiplier, since that is what says that it is active
    better = inexact & (after < violation) & ((new_z > 0) == (z > 0)).all(-1)
    pick = lambda a, b: torch.where(better.unsqueeze(-1), a, b)  # noqa: E731
    return pick(new_x, x), pick(new_y, y), pick(new_z, z), torch.where(better, after, violation)


def _all_rows(A: Tensor, G: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(A.shape[:-2], G.shape[:-2])
    return torch.cat([A.expand(*batch, *A.shape[-2:]), G.expand(*batch, *G.shape[-2:])], -2)


def _violation(point: tuple[Tensor, ...], data: tuple[Tensor, ...]) -> Tensor:
    """The largest violation of an optimality condition."""
    x, y, z = point
    P, q, G, h, A, b = data
    dual = times(P, x) + q + times(A.mT, y) + times(G.mT, z)
    over = times(G, x) - h
    rows = [dual, over.clamp_min(0), torch.where(z > 0, over, 0), times(A, x) - b]
    return kkt.amax(torch.cat(rows, -1))


def _linear_solve(
    value: Tensor, args: tuple[Tensor, ...], factors: tuple[Tensor, ...], rhs: Tensor, transpose: bool, *, parts: Any
) -> tuple[Tensor, Info]:
    """The Jacobian of the residual, or its transpose, by the symmetric system on the active set."""
    P, q, G, _, A, _ = _unpack(args, parts)
    n, p = q.shape[-1], A.shape[-2]
    r1, r2, r3 = rhs.split((n, p, rhs.shape[-1] - n - p), -1)
    active = factors[2][..., p:] > 0
    C = _all_rows(A, G)
    inactive = torch.where(active, 0, r3)
    if not transpose:  # z = r3 where inactive
        r1 = r1 - times(G.mT, inactive)
    u, v, info = kkt.solve(P, C, factors, r1, torch.cat([r2, r3], -1))
    v3 = v[..., p:] + (inactive - torch.where(active, 0, times(G, u)) if transpose else inactive)
    return torch.cat([u, v[..., :p], v3], -1), info
