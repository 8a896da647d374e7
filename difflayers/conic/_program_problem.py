"""A quadratic program as the engine sees it: the equations that hold at a solution, and how to solve with them.

An inequality with a positive multiplier is an equation, one with a zero multiplier is none, and its multiplier is zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from difflayers._solution import Info, Status
from difflayers.implicit import ImplicitProblem
from difflayers.linalg._autodiff import opaque
from difflayers.linalg._system import times

from . import _program_kkt as kkt
from ._conic_data import sizes
from ._moreau import Moreau

NAMES = ("P", "q", "G", "h", "A", "b")
NDIMS = (2, 1, 2, 1, 2, 1)
CORRECTIONS = 6


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
    if not all(parts):
        none = [P.new_zeros(0, P.shape[-1]), P.new_zeros(0)]
        rest = [*(rest[:2] if parts[0] else none), *(rest[2 * parts[0] :][:2] if parts[1] else none)]
    return P, q, *rest[:4]


def _residual(point: Tensor, *args: Tensor, inequalities: bool, equalities: bool) -> Tensor:
    """Stationarity, equalities, and of each inequality the equation that holds."""
    P, q, G, h, A, b = _unpack(args, (inequalities, equalities))
    n, p = q.shape[-1], A.shape[-2]
    x, y, z = point[..., :n], point[..., n : n + p], point[..., n + p :]
    rows = [(times(P, x) + times(P.mT, x)) / 2 + q]
    if equalities:
        rows[0] = rows[0] + times(A.mT, y)
        rows.append(times(A, x) - b)
    if inequalities:
        rows[0] = rows[0] + times(G.mT, z)
        rows.append(torch.where(z > 0, times(G, x) - h, z))
    batch = torch.broadcast_shapes(*(r.shape[:-1] for r in rows))
    return torch.cat([r.expand(*batch, r.shape[-1]) for r in rows], -1)


def _cotangents(
    value: Tensor, args: tuple[Tensor, ...], w: Tensor, wanted: Sequence[bool], *, parts: tuple[bool, bool]
) -> list[Tensor | None]:
    """Those of the arguments at the cotangent `w` of the residual, written out."""
    P, q, G, h, A, b = _unpack(args, parts)
    sizes = q.shape[-1], b.shape[-1], h.shape[-1]
    (x, y, z), (w1, w2, w3) = value.split_with_sizes(sizes, -1), w.split_with_sizes(sizes, -1)
    w3 = torch.where(z > 0, w3, 0)
    rules: list[Callable[[], Tensor]] = [lambda: _outer(P, w1, x, x, w1, 0.5), lambda: w1]
    rules += [lambda: _outer(G, z, w1, w3, x), lambda: -w3] if parts[0] else []
    rules += [lambda: _outer(A, y, w1, w2, x), lambda: -w2] if parts[1] else []
    found = [
        rule().sum_to_size(a.shape) if asked else None for rule, a, asked in zip(rules, args, wanted, strict=False)
    ]
    return found + [None] * (len(args) - len(found))


def _outer(M: Tensor, u: Tensor, v: Tensor, s: Tensor, t: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * (u v^T + s t^T)``, summed over the elements that share `M`."""
    if M.ndim > 2:
        first = scale * u.unsqueeze(-1) * v.unsqueeze(-2)
        return torch.addcmul(first, s.unsqueeze(-1), t.unsqueeze(-2), value=scale)
    u, v, s, t = (a if a.ndim == 2 else a.reshape(a.shape[:-1].numel(), a.shape[-1]) for a in (u, v, s, t))
    return torch.addmm(u.mT @ v, s.mT, t, beta=scale, alpha=scale)


@opaque
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
        residual=functools.partial(_residual, inequalities=parts[0], equalities=parts[1]),
        linear_solve=_linear_solve,
        cotangents=functools.partial(_cotangents, parts=parts),
        value_ndim=1,
        arg_ndims=tuple(k for k, there in zip(NDIMS, present, strict=True) if there),
        factor_ndims=kkt.FACTOR_NDIMS,
        symmetric=False,
        name=f"quadratic_program[{solver!r}]",
        arg_names=tuple(name for name, there in zip(NAMES, present, strict=True) if there),
    )


def _solve(*args: Tensor, parts: tuple[bool, bool], solver: ProgramSolver) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    P, *rest = _unpack(args, parts)
    data: tuple[Tensor, ...] = ((P + P.mT) / 2, *rest)
    shapes = {t.shape[: t.ndim - k] for t, k in zip(data, NDIMS, strict=True) if t.ndim > k}
    batch = torch.broadcast_shapes(*shapes) if len(shapes) > 1 else shapes.pop() if shapes else torch.Size()
    data = tuple(_flat(t, batch, k) for t, k in zip(data, NDIMS, strict=True))
    definite = kkt.definite(data[0])
    _refuse_indefinite(data[0], definite)
    point, factors, status, steps, fine = _attempt(data, solver, definite)
    if not fine:
        point, factors, status, steps = _rescale(data, solver, definite, (point, factors, status, steps))
    value, info = torch.cat([point.x, point.v], -1), Info(status, steps, point.violation)
    if len(batch) == 1:
        return value, info, factors
    back = lambda t, k: t.reshape((*batch, *t.shape[t.ndim - k :])) if t.ndim > k else t  # noqa: E731
    factors = tuple(back(f, k) for f, k in zip(factors, kkt.FACTOR_NDIMS, strict=True))
    return back(value, 1), Info(*(back(t, 0) for t in info)), factors


def _attempt(
    data: tuple[Tensor, ...], solver: ProgramSolver, definite: kkt.Definite
) -> tuple[_Point, tuple[Tensor, ...], Tensor, Tensor, bool]:
    """What the solver finds, made exact; its factors, status and steps; whether every element is right to rounding."""
    P, q, G, h, A, b = data
    C, bounds, p = kkt.all_rows(A, G), torch.cat([b, h], -1), b.shape[-1]
    if isinstance(solver, Moreau):  # takes the rows as they are
        x, v, status, steps = solver.solve_rows(P, q, C, bounds, p, definite)
    else:
        x, y, z, status, steps = solver.solve(*data)
        v = torch.cat([y, z], -1)
    slack = kkt.plus(bounds, C.mT, x, -1)
    holds = v > slack.clamp_min(0)
    holds[:, :p].fill_(True)
    active = holds.to(q.dtype)
    v = active * v
    factors = kkt.factorise(P, C, active, definite)
    dual, miss = kkt.plus(kkt.plus(q, P, x), C, v), _row_miss(slack, holds)
    noise = 64 * torch.finfo(q.dtype).eps
    # relative to the data, since a small violation of small data is no small one
    finite = torch.nan_to_num(bounds, 0, 0, 0)
    dual_miss, row_miss = kkt.amax(dual), kkt.amax(miss)
    exact = (dual_miss <= noise * kkt.amax(q)) & (row_miss <= noise * kkt.amax(finite))
    point = _Point(x, v, holds, torch.maximum(dual_miss, row_miss))
    if bool(exact.all()):
        return point, factors, status, steps, True
    size = kkt.amax(torch.cat([q, finite], -1)) + 1
    done = (point.violation <= noise * size) | (status > Status.MAX_STEPS)
    if not bool(done.all()):
        point, factors = _polish(point, factors, done, noise * size, (P, q, C, bounds, p, definite))
    false = (status == Status.CONVERGED) & ~(point.violation <= torch.finfo(q.dtype).eps ** 0.4 * size)
    return point, factors, torch.where(false, int(Status.DIVERGED), status), steps, False


def _rescale(
    data: tuple[Tensor, ...], solver: ProgramSolver, definite: kkt.Definite, found: tuple[Any, ...]
) -> tuple[_Point, tuple[Tensor, ...], Tensor, Tensor]:
    """Elements whose data are far from 1, where absolute tolerances mean nothing, solved again with data near it.

    All others keep what was found.
    """
    point, factors, status, steps = found
    P, q, G, h, A, b = data
    C, bounds = kkt.all_rows(A, G), torch.cat([b, h], -1)
    finite = torch.nan_to_num(bounds, 0, 0, 0)
    units = sizes(q, C.flatten(-2), finite, P.diagonal(dim1=-2, dim2=-1))
    gamma, beta, alpha = (u.expand(len(q)) for u in units)
    far = (gamma != 1) | (beta != 1) | (alpha != 1)
    if not bool(far.any()):
        return point, factors, status, steps
    at = far.nonzero().squeeze(-1)
    gamma, beta, alpha = (u[at].unsqueeze(-1) for u in (gamma, beta, alpha))
    P, G, A = (M if M.ndim == 2 else M[at] for M in (P, G, A))
    flat = lambda scale: scale.squeeze(-1)[:, None, None]  # noqa: E731
    bound = gamma * beta
    near = P * flat(beta / alpha), q[at] / alpha, G / flat(gamma), h[at] / bound, A / flat(gamma), b[at] / bound
    again, _, verdict, more, _ = _attempt(near, solver, kkt.definite(near[0]))
    put = lambda old, new: old.index_copy(0, at, new.to(old.dtype))  # noqa: E731
    x, v = put(point.x, again.x * beta), put(point.v, again.v * (alpha / gamma))
    holds = put(point.holds, again.holds)
    P = data[0]
    dual, slack = kkt.plus(kkt.plus(q, P, x), C, v), kkt.plus(bounds, C.mT, x, -1)
    now = torch.maximum(kkt.amax(dual), kkt.amax(_row_miss(slack, holds)))
    point = _Point(x, v, holds, put(point.violation, now[at]))
    return point, kkt.factorise(P, C, holds.to(q.dtype), definite), put(status, verdict), put(steps, more)


class _Point(NamedTuple):
    """Variables, multipliers of all rows, the rows that hold as equations, and what is left of the conditions."""

    x: Tensor
    v: Tensor
    holds: Tensor
    violation: Tensor


def _polish(
    point: _Point, factors: tuple[Tensor, ...], done: Tensor, tol: Tensor, task: tuple[Any, ...]
) -> tuple[_Point, tuple[Tensor, ...]]:
    """The exact point of the active set, and its factors: a solver's tolerance is not ours.

    A row whose multiplier turns out negative leaves the set, one that is violated enters it, a few times over. An
    element that is done, or gains nothing, stays what it is.
    """
    P, q, C, bounds, p, definite = task
    best = now = point
    for _ in range(CORRECTIONS):
        dual, slack = kkt.plus(kkt.plus(q, P, now.x), C, now.v), kkt.plus(bounds, C.mT, now.x, -1)
        dx, dv, _, _ = kkt.solve_rows(factors, -dual, torch.where(now.holds, slack, 0))
        x, v = now.x + dx, now.v + dv
        dual, slack = kkt.plus(kkt.plus(q, P, x), C, v), kkt.plus(bounds, C.mT, x, -1)
        now = _Point(x, v, now.holds, _largest_miss(dual, slack, now.holds))
        # an inequality that holds has a positive multiplier, since that is what says that it does
        positive = ((v > 0) == now.holds)[:, p:].all(-1)
        best = _where(~done & positive & (now.violation < best.violation), now, best)
        done = done | (best.violation <= tol)
        holds = v > slack
        holds[:, :p].fill_(True)
        holds = torch.where(done.unsqueeze(-1), now.holds, holds)
        if torch.equal(holds, now.holds):
            break
        now = now._replace(v=torch.where(holds, v, 0), holds=holds)
        factors = kkt.factorise(P, C, holds.to(q.dtype), definite)
    if not torch.equal(best.holds, now.holds):
        factors = kkt.factorise(P, C, best.holds.to(q.dtype), definite)
    return best, factors


def _where(mask: Tensor, a: _Point, b: _Point) -> _Point:
    return _Point(*(torch.where(mask.unsqueeze(-1) if u.ndim > 1 else mask, u, w) for u, w in zip(a, b, strict=True)))


def _row_miss(slack: Tensor, holds: Tensor) -> Tensor:
    """What rows violate: those that hold have no slack, others none below zero."""
    return torch.where(holds, slack, slack.clamp_max(0))


def _largest_miss(dual: Tensor, slack: Tensor, holds: Tensor) -> Tensor:
    """The largest violation of an optimality condition."""
    return kkt.amax(torch.cat([dual, _row_miss(slack, holds)], -1))


def _refuse_indefinite(P: Tensor, known: kkt.Definite | None = None) -> None:
    """Eigenvalues are asked only of matrices that are not positive definite beyond doubt."""
    if (kkt.definite(P) if known is None else known).every:
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
    if (ndim == 2 and t.ndim == 2) or (len(batch) == 1 and t.shape[: t.ndim - ndim] == batch):
        return t
    event = t.shape[t.ndim - ndim :]
    return t.expand((*batch, *event)).reshape((batch.numel(), *event))


def _linear_solve(
    value: Tensor, args: tuple[Tensor, ...], factors: tuple[Tensor, ...], rhs: Tensor, transpose: bool
) -> tuple[Tensor, Info]:
    """The Jacobian of the residual, or its transpose, by the symmetric system on the active set."""
    C, holds = factors[kkt.ROWS], factors[kkt.ACTIVE] > 0
    r1, r2 = rhs.split_with_sizes((C.shape[-1], C.shape[-2]), -1)
    if transpose:
        u, v, rest, info = kkt.solve_rows(factors, r1, r2)
        return torch.cat([u, torch.where(holds, v, rest)], -1), info
    free = torch.where(holds, 0, r2)  # a multiplier is its own residual where the row does not hold
    u, v, _, info = kkt.solve_rows(factors, kkt.plus(r1, C, free, -1), r2)
    return torch.cat([u, v + free], -1), info
