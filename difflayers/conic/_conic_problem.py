r"""A conic program as the engine sees it: a nonsmooth equation, its solver, and one factorisation for all derivatives.

With :math:`v = s - y`, slack and multiplier are the two parts of Moreau's decomposition, :math:`s = P_K(v)` and
:math:`y = P_K(v) - v`, so that membership and complementarity hold by construction. What remains is

.. math:: P x + q + A^T (P_K(v) - v) = 0, \qquad A x + P_K(v) = b,

with the Jacobian :math:`\begin{pmatrix} P & A^T (D - I) \\ A & D \end{pmatrix}`, D the derivative of the projection.
A. Agrawal, S. Barratt, S. Boyd, E. Busseti, W. Moursi, Differentiating through a cone program, 2019, has the same idea
on the larger homogeneous embedding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from difflayers._solution import Info, Status, _listeners
from difflayers.implicit import ImplicitProblem
from difflayers.linalg._autodiff import opaque
from difflayers.linalg._system import times

from . import _conic_kkt as kkt
from . import _conic_layout as cones
from . import _program_kkt as program_kkt
from ._cones import NonNegative, Zero
from ._conic_data import VANISHED, Data, flat, sound
from ._conic_layout import Layout
from ._conic_solvers import Clarabel, Found, solve_moreau
from ._moreau import Moreau
from ._program_kkt import amax
from ._program_problem import _refuse_indefinite

EXACT = 64 * torch.finfo(torch.float64).eps
GOOD, FAIR = 1e-8, 1e-5  # relative residuals: converged; stopped early


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """Projections on curved cones solve equations of their own: no trace wants to see those."""
    token = _listeners.set(())
    try:
        yield
    finally:
        _listeners.reset(token)


def _residual(point: Tensor, *args: Tensor, layout: Layout) -> Tensor:
    """Stationarity and feasibility."""
    data = Data.of(args)
    n = data.q.shape[-1]
    x, v = point[..., :n], point[..., n:]
    s = cones.project(layout, v)
    top = data.hessian(x) + data.q + times(data.A.mT, s - v)
    bottom = times(data.A, x) + s - data.b
    batch = torch.broadcast_shapes(top.shape[:-1], bottom.shape[:-1])
    return torch.cat([t.expand(*batch, t.shape[-1]) for t in (top, bottom)], -1)


@opaque
@functools.lru_cache(maxsize=64)
def conic_problem(layout: Layout, quadratic: bool, solver: Any) -> ImplicitProblem:
    """The problem with or without a quadratic part.

    Args:
        layout: The cones of the rows.
        quadratic: Whether there is a P.
        solver: :class:`Moreau`, a :class:`ConicSolver`, or None for the first with the second for what it leaves.
    """
    names = ("q", "A", "b", *(("P",) if quadratic else ()), "gamma", "beta", "alpha")
    ndims = (1, 2, 1, *((2,) if quadratic else ()), 0, 0, 0)
    return ImplicitProblem(
        solve=functools.partial(_solve, layout=layout, solver=solver, ndims=ndims),
        residual=functools.partial(_residual, layout=layout),
        linear_solve=functools.partial(_linear_solve, layout=layout),
        value_ndim=1,
        arg_ndims=ndims,
        factor_ndims=kkt.FACTOR_NDIMS,
        name=f"conic_program[{solver or (Moreau(), Clarabel())!r}]",
        arg_names=names,
    )


# ------------------------------------------------------------------------------------------------------------- forward


@_unseen()
def _solve(*args: Tensor, layout: Layout, solver: Any, ndims: tuple[int, ...]) -> tuple[Tensor, Info, Any]:
    batch = torch.broadcast_shapes(*(t.shape[: t.ndim - k] for t, k in zip(args, ndims, strict=True)))
    if len(ndims) == 7:
        _check_curvature(args[3])
    data, todo = sound(flat(Data.of(args), batch))
    B, n, m = batch.numel(), data.q.shape[-1], data.b.shape[-1]
    point = data.q.new_zeros(B, n + m)
    score = data.q.new_full((B,), torch.inf)
    status = torch.full((B,), int(Status.DIVERGED), device=score.device)
    steps = torch.zeros_like(status)
    for attempt in _attempts(solver, layout, data.P is not None):
        index = todo.nonzero().squeeze(-1)
        if not index.shape[0]:
            break
        found = attempt(data, index)
        start, code, taken = (
            torch.zeros_like(t).index_copy(0, index, f.to(t.dtype))
            for t, f in zip((point, status, steps), found, strict=True)
        )
        start, new = _polish(data, layout, torch.where(torch.isfinite(start), start, 0), todo)
        better = todo & ((new < score) | (code > Status.MAX_STEPS))
        certified = (code == Status.INFEASIBLE) | (code == Status.UNBOUNDED)
        early = (new <= FAIR) | (code == Status.MAX_STEPS)
        by_score = torch.where(early, int(Status.MAX_STEPS), int(Status.DIVERGED))
        by_score = torch.where(new <= GOOD, int(Status.CONVERGED), by_score)
        status = torch.where(better, torch.where(certified & (new > GOOD), code, by_score), status)
        steps, score = torch.where(better, taken, steps), torch.where(better, new, score)
        point = torch.where(better.unsqueeze(-1), start, point)
        todo = todo & (new > GOOD) & ~certified
    score = torch.where(torch.isfinite(score), score, torch.finfo(score.dtype).max)
    factors = kkt.factorise(kkt.jacobian(data, layout, point[:, n:]))
    back = lambda t: t.reshape((*batch, *t.shape[1:]))  # noqa: E731
    return back(point), Info(*map(back, (status, steps, score))), tuple(map(back, factors))


def _check_curvature(P: Tensor) -> None:
    """Refuses indefinite matrices; eigenvalues only of those that a little more on the diagonal does not cure."""
    size = P.diagonal(dim1=-2, dim2=-1).abs().amax(-1, keepdim=True) if P.numel() else P.new_zeros(1)
    more = P.shape[-1] * torch.finfo(P.dtype).eps ** 0.75 * size.expand(P.shape[:-1])
    if bool((torch.linalg.cholesky_ex(P + torch.diag_embed(more))[1] != 0).any()):
        _refuse_indefinite(P)


def _attempts(solver: Any, layout: Layout, quadratic: bool) -> list[Any]:
    def by(find: Any) -> Any:
        def attempt(data: Data, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            data = data.pick(index)
            found: Found = find(data.quadratic(), data.q, data.A, data.b, layout)
            x, y, s, status, steps = found
            return torch.cat([x, s - y], -1), status, steps

        return attempt

    def direct(data: Data, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # a step of Newton solves it
        none = torch.zeros_like(index)
        return torch.zeros_like(data.q[index]), none + int(Status.UNBOUNDED), none

    if not layout:
        return [direct]
    if solver is not None and not isinstance(solver, Moreau):
        return [by(solver.solve_conic)]
    moreau = solver or Moreau()
    linear = quadratic and all(isinstance(block.cone, Zero | NonNegative) for block in layout)
    first = [functools.partial(_active_set, layout=layout, solver=moreau)] if linear else []
    last = [] if solver else [by(Clarabel().solve_conic)]
    return [*first, by(functools.partial(solve_moreau, moreau)), *last]


def _active_set(data: Data, index: Tensor, layout: Layout, solver: Moreau) -> tuple[Tensor, Tensor, Tensor]:
    """Linear rows: the solver's fast method, for elements with positive curvature along the equations.

    A multiple of ``|A x - b|^2`` over the equations changes neither solution nor multipliers, and makes the rest of P
    positive definite.
    """
    p = sum(block.size for block in layout if isinstance(block.cone, Zero))
    P, equations = data.quadratic(), data.A[..., :p, :]
    trace = lambda M: M.diagonal(dim1=-2, dim2=-1).sum(-1)  # noqa: E731
    gram = equations.mT @ equations
    weight = trace(P) / torch.where(trace(gram) > 0, trace(gram), 1)
    P = P + weight[..., None, None] * gram
    q = data.q - weight.unsqueeze(-1) * times(equations.mT, data.b[:, :p])
    point = torch.cat([torch.zeros_like(q), torch.zeros_like(data.b)], -1)
    status = torch.full_like(point[:, 0], int(Status.DIVERGED), dtype=torch.int64)
    steps = torch.zeros_like(status)
    fit = program_kkt.definite(P).elements.expand(status.shape)
    chosen = index[fit[index]]
    if chosen.shape[0]:
        some = data._replace(q=q, P=P).pick(chosen)
        assert some.P is not None
        x, y, _, taken = solver.solve_rows(some.P, some.q, some.A, some.b, p, program_kkt.definite(some.P))
        x, y = (torch.zeros_like(t).index_copy(0, chosen, f) for t, f in ((q, x), (data.b, y)))
        s = data.b - times(data.A, x)
        s = torch.where((y > 0) | (torch.arange(s.shape[-1], device=s.device) < p), 0, s)
        point = torch.cat([x, s - y], -1)
        steps[chosen] = taken.to(steps.dtype)
        status[chosen] = int(Status.CONVERGED)  # which its residual will confirm or not
    return point[index], status[index], steps[index]


def _score(data: Data, layout: Layout, point: Tensor) -> tuple[Tensor, Tensor]:
    """The residual, and its largest entry relative to the terms it is a difference of."""
    n = data.q.shape[-1]
    x, v = point[:, :n], point[:, n:]
    s = cones.project(layout, v)
    Px, Ay, Ax = data.hessian(x), times(data.A.mT, s - v), times(data.A, x)
    top, bottom = Px + data.q + Ay, Ax + s - data.b
    score = torch.maximum(_relative(top, Px, data.q, Ay), _relative(bottom, Ax, s, data.b))
    return torch.cat([top, bottom], -1), torch.where(torch.isnan(score), torch.inf, score)


def _relative(total: Tensor, *terms: Tensor) -> Tensor:
    """Terms that vanish, at the apex of a cone for instance, are rounding, of which nothing can be asked."""
    return amax(total) / torch.stack([amax(t) for t in terms]).amax(0).clamp_min(VANISHED)


def _polish(data: Data, layout: Layout, point: Tensor, wanted: Tensor, max_steps: int = 10) -> tuple[Tensor, Tensor]:
    """Newton's method on the nonsmooth equation, as long as it gains: a solver's tolerance is not ours.

    Only factorisations, one by one, are of the elements still at it: all else is of the whole batch, see :func:`sound`.
    """
    n = data.q.shape[-1]
    point = _decided(data, layout, point)
    residual, score = _score(data, layout, point)
    running = wanted & (score > EXACT) & torch.isfinite(score)
    for _ in range(max_steps):
        index = running.nonzero().squeeze(-1)
        if not index.shape[0]:
            break
        factors = kkt.factorise(kkt.jacobian(data, layout, point[:, n:])[index])
        new = point.index_add(0, index, kkt.solve(factors, residual[index], False), alpha=-1)
        new = _decided(data, layout, new)
        miss, after = _score(data, layout, new)
        gains = running & (after < score)
        running = gains & (after > EXACT) & (after < score / 4)
        point, residual = (torch.where(gains.unsqueeze(-1), a, b) for a, b in ((new, point), (miss, residual)))
        score = torch.where(gains, after, score)
    return point, score


def _decided(data: Data, layout: Layout, point: Tensor) -> Tensor:
    """Rows that are neither slack nor pressed, to rounding, count as slack."""
    x, v = point[:, : data.q.shape[-1]], point[:, data.q.shape[-1] :]
    noise = 1e3 * torch.finfo(v.dtype).eps * (times(data.A.abs(), x.abs()) + data.b.abs())
    return torch.cat([x, cones.decided(layout, v, noise)], -1)


@_unseen()
def _linear_solve(
    value: Tensor,
    args: tuple[Tensor, ...],
    factors: tuple[Tensor, ...],
    rhs: Tensor,
    transpose: bool,
    *,
    layout: Layout,
) -> tuple[Tensor, Info]:
    """The Jacobian or its transpose; where it is singular, the shortest solution, if there is one."""
    x = kkt.solve(factors, rhs, transpose)
    singular = factors[-1]
    status = torch.where(torch.isfinite(x).all(-1), int(Status.CONVERGED), int(Status.DIVERGED))
    residual = torch.full_like(x[..., 0], torch.nan)
    if bool(singular.any()):
        batch = singular.shape
        data = flat(Data.of(args), batch)
        v = value[..., data.q.shape[-1] :].expand(*batch, -1).reshape(batch.numel(), -1)
        J = kkt.jacobian(data, layout, v).reshape(*batch, *rhs.shape[-1:] * 2)
        residual = amax((times(J.mT if transpose else J, x) - rhs) / (factors[3] if transpose else factors[2]))
        size = amax(rhs / (factors[3] if transpose else factors[2]))
        lost = singular & ~(residual <= 1e-6 * size)
        status = torch.where(lost, int(Status.SINGULAR), status)
    return x, Info(status, torch.zeros_like(status), residual)
