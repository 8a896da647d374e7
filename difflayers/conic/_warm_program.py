"""Warm start of a quadratic program: the active set of an earlier solution is tried before the solver is asked.

One batched solve with the KKT matrix of that set gives the only point it can mean. Where the point satisfies every
optimality condition it is the solution, whatever the solver; the remaining elements go to the solver, alone.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from difflayers._solution import Info, Solution, Status
from difflayers.implicit import ImplicitProblem
from difflayers.linalg._autodiff import opaque
from difflayers.linalg._system import times

from . import _program_kkt as kkt
from ._program_problem import (
    NDIMS,
    ProgramSolver,
    _flat,
    _largest_miss,
    _refuse_indefinite,
    _unpack,
    program_problem,
)


def earlier_multipliers(warm_start: Any, m: int, like: Tensor) -> Tensor:
    """The multipliers of the inequalities of an earlier solution, as constants: ``(*batch, m)``."""
    point = warm_start.value if isinstance(warm_start, Solution) else warm_start
    z = getattr(point, "z", None)
    if not isinstance(z, Tensor):
        raise ValueError(
            f"warm_start: expected a Solution of quadratic_program_ex or its ProgramPoint, got {type(point).__name__}"
        )
    if z.ndim < 1 or z.shape[-1] != m:
        raise ValueError(f"warm_start: expected {m} multipliers z, one per row of G, got shape {tuple(z.shape)}")
    return z.detach().to(like.device, like.dtype)


@opaque
@functools.lru_cache(maxsize=64)
def warm_problem(parts: tuple[bool, bool], solver: Any) -> ImplicitProblem:
    """The problem with one more argument, the earlier multipliers, which the solution does not depend on.

    Args:
        parts: Whether there are inequalities, and equalities.
        solver: A :class:`ProgramSolver` for the elements whose active set has changed.
    """
    cold = program_problem(parts, solver)
    assert cold.arg_ndims is not None
    return dataclasses.replace(
        cold,
        solve=functools.partial(_solve, parts=parts, solver=solver),
        arg_ndims=(*cold.arg_ndims, 1),
        arg_names=(*cold.arg_names, "warm_start"),
    )


def _solve(*args: Tensor, parts: tuple[bool, bool], solver: ProgramSolver) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    earlier = args[-1]
    P, *others = _unpack(args[:-1], parts)
    whole = ((P + P.mT) / 2, *others)
    batch = torch.broadcast_shapes(
        earlier.shape[:-1], *(t.shape[: t.ndim - k] for t, k in zip(whole, NDIMS, strict=True))
    )
    data = tuple(_flat(t, batch, k) for t, k in zip(whole, NDIMS, strict=True))
    cold = program_problem(parts, solver)
    present = [True, True, *(parts[0],) * 2, *(parts[1],) * 2]
    given = [(t, k) for t, k, there in zip(data, NDIMS, present, strict=True) if there]
    value, right, violation, factors = _try(data, _flat(earlier, batch, 1) > 0)
    status = torch.full_like(right, int(Status.CONVERGED), dtype=torch.int64)
    info = Info(status, torch.zeros_like(status), violation)
    rest = (~right).nonzero().squeeze(-1)  # the one read-back
    if len(rest) == len(right):
        value, info, factors = cold.solve(*(t for t, _ in given))
    elif len(rest):
        some, report, made = cold.solve(*(t[rest] if t.ndim > k else t for t, k in given))
        value = value.index_copy(0, rest, some)
        info = Info(*(a.index_copy(0, rest, b.to(a.dtype)) for a, b in zip(info, report, strict=True)))
        factors = tuple(
            a.index_copy(0, rest, b) if a.ndim > k else a
            for a, b, k in zip(factors, made, kkt.FACTOR_NDIMS, strict=True)
        )
    back = lambda t, k: t.reshape((*batch, *t.shape[t.ndim - k :])) if t.ndim > k else t  # noqa: E731
    found = tuple(back(f, k) for f, k in zip(factors, kkt.FACTOR_NDIMS, strict=True))
    return back(value, 1), Info(*(t.reshape(batch) for t in info)), found


def _try(data: tuple[Tensor, ...], active: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """The point of an active set, whether it satisfies all optimality conditions to rounding, by how much, factors."""
    P, q, G, h, A, b = data
    known = kkt.definite(P)
    if not known.every:
        _refuse_indefinite(P)  # of which such a point may be a saddle
    active = active & torch.isfinite(h)
    C = kkt.all_rows(A, G)
    rows = torch.cat([torch.ones_like(b), active.to(q.dtype)], -1)
    factors = kkt.factorise(P, C, rows, known)
    bounds = torch.cat([b, torch.where(active, h, 0)], -1)
    x, v, info = kkt.solve(factors, -q, bounds)
    # once more for the rest: what is accepted must be exact
    dx, dv, _ = kkt.solve(factors, -q - times(P, x) - times(C.mT, v), bounds - rows * times(C, x))
    x, v = x + dx, v + dv
    y, z = v.split((b.shape[-1], h.shape[-1]), -1)
    positive = ((z > 0) == active).all(-1)
    held = torch.where(active, h - times(G, x), 0)
    violation = torch.maximum(_violation((x, y, z), data), kkt.amax(held))
    # in units of the terms that cancel
    terms = q, times(P, x), times(C.mT, v), bounds, rows * times(C, x)
    size = 1 + kkt.amax(torch.cat([t.expand(*x.shape[:-1], -1) for t in terms], -1))
    exact = violation <= 64 * torch.finfo(q.dtype).eps * size
    right = (info.status == Status.CONVERGED) & positive & exact
    return torch.cat([x, y, z], -1), right, violation, factors


def _violation(point: tuple[Tensor, ...], data: tuple[Tensor, ...]) -> Tensor:
    """The largest violation of an optimality condition at a point ``(x, y, z)``."""
    x, y, z = point
    P, q, G, h, A, b = data
    dual, slack = times(P, x) + q + times(A.mT, y) + times(G.mT, z), h - times(G, x)
    return torch.maximum(_largest_miss(dual, slack, z > 0), kkt.amax(times(A, x) - b))
