r"""Quadratic programs as layers.

.. math:: \min_x \tfrac12 x^T P x + q^T x \quad \text{s.t.} \quad A x = b, \; G x \le h

with multipliers y of the equalities and :math:`z \ge 0` of the inequalities. B. Amos, J. Z. Kolter, OptNet, 2017,
section 3.1; M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024, uses the same
derivative in its generic completion.

The derivative is that of the equations that hold at the solution: an inequality with a positive multiplier is an
equality there, one with a zero multiplier is none. It is exact under strict complementarity; a constraint that is
active with a zero multiplier counts as inactive.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from difflayers._checks import check_same, check_tensor, compute_dtype
from difflayers._solution import Info, OnFailure, Solution, Status
from difflayers.implicit import ImplicitProblem, solution_map, solution_map_ex
from difflayers.linalg._system import times

from . import _program_kkt as kkt
from ._interior_point import InteriorPoint
from ._moreau import Moreau


class ProgramPoint(NamedTuple):
    """A point of a program.

    Attributes:
        x: ``(*batch, n)`` variables.
        y: ``(*batch, p)`` multipliers of the equalities.
        z: ``(*batch, m)`` multipliers of the inequalities, at least 0.
        s: ``(*batch, m)`` slacks ``h - G x``, at least 0.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    s: Tensor


class ProgramSolver(Protocol):
    """Finds a solution and its multipliers, one row an element; no gradient is asked of it. A frozen dataclass."""

    def __hash__(self) -> int: ...

    def solve(
        self, P: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``(x, y, z, status, steps)``."""


def quadratic_program(
    P: Tensor,
    q: Tensor,
    G: Tensor | None = None,
    h: Tensor | None = None,
    A: Tensor | None = None,
    b: Tensor | None = None,
    *,
    solver: ProgramSolver | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The minimiser of a convex quadratic function under linear constraints.

    Solves ``argmin_x 1/2 x^T P x + q^T x s.t. A x = b, G x <= h``. Every argument is shared by the batch or has one
    entry for each of its elements.

    Args:
        P: ``(*batch, n, n)`` positive semidefinite; of a matrix that is not symmetric the symmetric part counts.
        q: ``(*batch, n)``.
        G: ``(*batch, m, n)`` inequalities, or None.
        h: ``(*batch, m)`` their bounds; ``inf`` where there is none.
        A: ``(*batch, p, n)`` equalities, or None.
        b: ``(*batch, p)`` their right-hand sides.
        solver: :class:`Moreau` or :class:`InteriorPoint`. None: the first on a CPU, the second elsewhere.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        ``(*batch, n)`` minimisers.

    Raises:
        ValueError: For shapes that do not fit, a `P` that is not positive semidefinite (of which the first element is
            named), NaN or Inf, naming the argument.
        SolveError: For elements that are infeasible or unbounded; in backward, where the solution is not unique or
            dependent constraints make a multiplier's derivative undefined.

    Differentiable in every argument, to any order, forward and reverse; gradients of shared arguments are sums over the
    batch. Constraints that hold with a zero multiplier count as absent. At the vertex of a linear program the
    derivative in `q` is exactly zero.

    Example:
        >>> import torch
        >>> from difflayers.conic import quadratic_program
        >>> q = torch.tensor([-2.0, -3.0], requires_grad=True)
        >>> x = quadratic_program(torch.eye(2), q, torch.tensor([[1.0, 1.0]]), torch.tensor([2.0]))
        >>> x
        tensor([0.5000, 1.5000], grad_fn=<SliceBackward0>)
        >>> torch.autograd.grad(x[0], q)
        (tensor([-0.5000,  0.5000]),)

    Source: B. Amos, J. Z. Kolter, OptNet: Differentiable Optimization as a Layer in Neural Networks, 2017, section 3.1.
    Departure: the derivative is solved on the active set, which is exact; the interior-point system is biased.
    """
    parts, args = _prepare(P, q, G, h, A, b)
    point = solution_map(_problem(parts, solver or _default(q)), args, on_failure=on_failure)
    return point[..., : q.shape[-1]].to(q.dtype)


def quadratic_program_ex(
    P: Tensor,
    q: Tensor,
    G: Tensor | None = None,
    h: Tensor | None = None,
    A: Tensor | None = None,
    b: Tensor | None = None,
    *,
    solver: ProgramSolver | None = None,
) -> Solution[ProgramPoint]:
    """As :func:`quadratic_program`, with multipliers and slacks, as an unchecked :class:`~difflayers.Solution`.

    Args:
        P: Quadratic part.
        q: Linear part.
        G: Inequalities.
        h: Their bounds.
        A: Equalities.
        b: Their right-hand sides.
        solver: Solver.

    Returns:
        A :class:`ProgramPoint`, all of it differentiable, with status, steps and the largest violation of an optimality
        condition.
    """
    parts, args = _prepare(P, q, G, h, A, b)
    found = solution_map_ex(_problem(parts, solver or _default(q)), args)
    n, p = q.shape[-1], 0 if A is None else A.shape[-2]
    x, y, z = found.value.split((n, p, found.value.shape[-1] - n - p), -1)
    s = x.new_zeros((*x.shape[:-1], 0)) if G is None or h is None else h - times(G, x)
    point = ProgramPoint(*(t.to(q.dtype) for t in (x, y, z, s)))
    return Solution(point, found.status, found.steps, found.residual)


def project_polyhedron(
    x: Tensor,
    G: Tensor | None = None,
    h: Tensor | None = None,
    A: Tensor | None = None,
    b: Tensor | None = None,
    *,
    solver: ProgramSolver | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The nearest point of a polyhedron.

    Solves ``argmin_z 1/2 ||z - x||^2 s.t. A z = b, G z <= h``.

    Args:
        x: ``(*batch, n)``.
        G: ``(*batch, m, n)`` inequalities, or None.
        h: ``(*batch, m)`` their bounds.
        A: ``(*batch, p, n)`` equalities, or None.
        b: ``(*batch, p)`` their right-hand sides.
        solver: As for :func:`quadratic_program`.
        on_failure: ``"raise"``, ``"nan"`` or ``"ignore"``.

    Returns:
        ``(*batch, n)`` projection.

    Raises:
        ValueError: For shapes that do not fit, NaN or Inf.
        SolveError: For elements whose polyhedron is empty.

    Differentiable in every argument, to any order.

    Example:
        >>> import torch
        >>> from difflayers.conic import project_polyhedron
        >>> project_polyhedron(torch.tensor([2.0, 2.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([2.0]))
        tensor([1., 1.])

    Source: B. Amos, J. Z. Kolter, OptNet: Differentiable Optimization as a Layer in Neural Networks, 2017, section 3.1.
    """
    check_tensor("x", x, min_ndim=1)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return quadratic_program(eye, -x, G, h, A, b, solver=solver, on_failure=on_failure)


def _default(q: Tensor) -> ProgramSolver:
    return Moreau() if q.device.type == "cpu" else InteriorPoint()


_NAMES = ("P", "q", "G", "h", "A", "b")
_NDIMS = (2, 1, 2, 1, 2, 1)


def _prepare(*data: Tensor | None) -> tuple[tuple[bool, bool], tuple[Tensor, ...]]:
    P, q = check_tensor("P", data[0], min_ndim=2), check_tensor("q", data[1], min_ndim=1)
    G, h, A, b = data[2:]
    given = [
        (name, check_tensor(name, t, min_ndim=k))
        for name, t, k in zip(_NAMES, data, _NDIMS, strict=True)
        if t is not None
    ]
    check_same(given)
    n = q.shape[-1]
    if P.shape[-2:] != (n, n):
        raise ValueError(f"P: expected shape (..., {n}, {n}) as of q, got {tuple(P.shape)}")
    for M, v, names in ((G, h, "Gh"), (A, b, "Ab")):
        if (M is None) != (v is None):
            raise ValueError(f"{names[0]}, {names[1]}: expected both or none, got one of them")
        if M is None or v is None:
            continue
        if M.shape[-1] != n:
            raise ValueError(f"{names[0]}: expected {n} columns as of q, got {tuple(M.shape)}")
        if M.shape[-2] != v.shape[-1]:
            raise ValueError(
                f"{names[1]}: expected {M.shape[-2]} entries, one per row of {names[0]}, got {tuple(v.shape)}"
            )
    lift = compute_dtype(q.dtype)
    P = (P + P.mT) / 2
    args = tuple(t.to(lift) for t in (P, q, G, h, A, b) if t is not None)
    return (G is not None, A is not None), args


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
def _problem(parts: tuple[bool, bool], solver: Any) -> ImplicitProblem:
    present = (True, True, *(parts[0],) * 2, *(parts[1],) * 2)
    return ImplicitProblem(
        solve=functools.partial(_solve, parts=parts, solver=solver),
        residual=functools.partial(_residual, parts=parts),
        linear_solve=functools.partial(_linear_solve, parts=parts),
        value_ndim=1,
        arg_ndims=tuple(k for k, there in zip(_NDIMS, present, strict=True) if there),
        factor_ndims=kkt.FACTOR_NDIMS,
        symmetric=False,
        name=f"quadratic_program[{solver!r}]",
        arg_names=tuple(name for name, there in zip(_NAMES, present, strict=True) if there),
    )


def _solve(*args: Tensor, parts: tuple[bool, bool], solver: ProgramSolver) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    data = _unpack(args, parts)
    batch = torch.broadcast_shapes(*(t.shape[: t.ndim - k] for t, k in zip(data, _NDIMS, strict=True)))
    data = tuple(_flat(t, batch, k) for t, k in zip(data, _NDIMS, strict=True))
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
