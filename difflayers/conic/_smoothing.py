r"""Quadratic programs with a smoothed derivative: that of the point of the central path where ``s * z = kappa``.

Where a constraint turns active, and at every vertex of a linear program, the exact derivative is zero or jumps. The
minimiser of

.. math:: \tfrac12 x^T P x + q^T x - \kappa \sum_i \log (h - G x)_i \quad \text{s.t.} \quad A x = b

moves smoothly with all data. It satisfies, with multipliers :math:`z_i = \kappa / (h - G x)_i`,

.. math:: P x + q + A^T y + G^T z = 0, \quad A x = b, \quad z_i (h - G x)_i = \kappa,

an implicit function like any other. The layer returns the sharp solution with the derivative of this one, which is
biased: it tends to the exact one as kappa goes to 0, where that exists.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from difflayers._checks import default_rtol
from difflayers._solution import Info, Status
from difflayers.implicit import ImplicitProblem
from difflayers.linalg._system import times

from . import _program_kkt as kkt
from ._program_problem import NAMES, NDIMS, _flat, _unpack

MAX_STEPS = 60
TO_BOUNDARY = 0.99


def check_smoothing(smoothing: float | None) -> None:
    """Refuses anything but a positive number or None."""
    if smoothing is None:
        return
    if not isinstance(smoothing, int | float) or isinstance(smoothing, bool) or not 0 < smoothing < float("inf"):
        raise ValueError(f"smoothing: expected a positive number or None, got {smoothing!r}")


@functools.lru_cache(maxsize=64)
def relaxed_problem(parts: tuple[bool, bool], kappa: float) -> ImplicitProblem:
    """The problem of the central path; its last argument is the sharp solution, from which Newton's method starts.

    Args:
        parts: Whether there are inequalities (there must be), and equalities.
        kappa: Complementarity of every inequality.
    """
    present = (True, True, *(parts[0],) * 2, *(parts[1],) * 2)
    return ImplicitProblem(
        solve=functools.partial(_solve, parts=parts, kappa=kappa),
        residual=functools.partial(_residual, parts=parts, kappa=kappa),
        linear_solve=functools.partial(_linear_solve, parts=parts),
        value_ndim=1,
        arg_ndims=(*(k for k, there in zip(NDIMS, present, strict=True) if there), 1),
        factor_ndims=kkt.FACTOR_NDIMS,
        symmetric=False,
        name=f"quadratic_program[smoothing={kappa:g}]",
        arg_names=(*(name for name, there in zip(NAMES, present, strict=True) if there), "start"),
    )


def _slack(x: Tensor, G: Tensor, h: Tensor) -> Tensor:
    """``h - G x``, 1 where there is no bound."""
    return torch.where(torch.isfinite(h), h - times(G, x), 1)


def _residual(point: Tensor, *args: Tensor, parts: tuple[bool, bool], kappa: float) -> Tensor:
    """Stationarity, equalities, perturbed complementarity."""
    P, q, G, h, A, b = _unpack(args[:-1], parts)
    n, p = q.shape[-1], A.shape[-2]
    x, y, z = point[..., :n], point[..., n : n + p], point[..., n + p :]
    rows = [times(P, x) + q + times(G.mT, z)]
    if parts[1]:
        rows[0] = rows[0] + times(A.mT, y)
        rows.append(times(A, x) - b)
    rows.append(torch.where(torch.isfinite(h), z * _slack(x, G, h) - kappa, z))
    batch = torch.broadcast_shapes(*(r.shape[:-1] for r in rows))
    return torch.cat([r.expand(*batch, r.shape[-1]) for r in rows], -1)


def _solve(*args: Tensor, parts: tuple[bool, bool], kappa: float) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    """Damped primal-dual Newton steps at a fixed kappa; slacks may differ from ``h - G x`` on the way.

    The start puts every pair of slack and multiplier on the hyperbola ``s z = kappa``, at the point whose difference is
    that of the sharp solution: close to it for a small kappa, and never on the boundary.
    """
    data, start = _unpack(args[:-1], parts), args[-1]
    batch = torch.broadcast_shapes(start.shape[:-1], *(t.shape[: t.ndim - k] for t, k in zip(data, NDIMS, strict=True)))
    P, q, G, h, A, b = (_flat(t, batch, k) for t, k in zip(data, NDIMS, strict=True))
    bounded = torch.isfinite(h)
    G = G if bool(bounded.all()) else torch.where(bounded.unsqueeze(-1), G, 0)
    h = torch.where(bounded, h, 1)
    target = kappa * bounded.to(q.dtype)
    x, y, z = _flat(start, batch, 1).split((q.shape[-1], b.shape[-1], h.shape[-1]), -1)
    length = torch.linalg.vector_norm(G, dim=-1)
    length = torch.where(length > 0, length, 1)
    v = (h - times(G, x)) / length - z * length
    root = (v * v + 4 * target).sqrt()
    # of the two roots the one without cancellation, the other from their product
    big = (v.abs() + root) / 2
    small = target / torch.where(big > 0, big, 1)
    s, z = torch.where(v > 0, big, small) * length, torch.where(v > 0, small, big) / length
    z = torch.where(bounded, z, 0)

    rtol = max(default_rtol(None, q.dtype), 64 * torch.finfo(q.dtype).eps)
    size = 1 + torch.maximum(kkt.amax(q), kkt.amax(torch.cat([b, h], -1)))
    ones = torch.ones_like(y)
    status = torch.full(q.shape[:-1], int(Status.MAX_STEPS), device=q.device)
    steps = torch.zeros_like(status)
    running = torch.ones_like(status, dtype=torch.bool)
    for k in range(MAX_STEPS + 1):
        r_d = times(P, x) + q + times(A.mT, y) + times(G.mT, z)
        r_e, r_i, r_c = times(A, x) - b, times(G, x) + s - h, s * z - target
        violation = torch.maximum(kkt.amax(torch.cat([r_d, r_e, r_i], -1)) / size, kkt.amax(r_c) / kappa)
        status = torch.where(running & (violation <= rtol), int(Status.CONVERGED), status)
        status = torch.where(running & ~torch.isfinite(violation), int(Status.DIVERGED), status)
        running = running & (status == Status.MAX_STEPS)
        if k == MAX_STEPS or not bool(running.any()):
            break
        steps = steps + running
        H = P + G.mT @ ((z / s).unsqueeze(-1) * G)
        t = -r_d - times(G.mT, (z * r_i - r_c) / s)
        dx, dy, _ = kkt.solve(kkt.factorise(H, A, ones), t, -r_e)
        ds = -r_i - times(G, dx)
        dz = (-r_c - z * ds) / s
        alpha = (TO_BOUNDARY * torch.minimum(_to_zero(s, ds), _to_zero(z, dz))).clamp_max(1)
        alpha = torch.where(running.unsqueeze(-1), alpha, 0)
        x, y, s, z = (u + torch.where(alpha > 0, alpha * du, 0) for u, du in ((x, dx), (y, dy), (s, ds), (z, dz)))
    z = torch.where(bounded, z, 0)
    H = P + G.mT @ ((z / _slack(x, G, h)).unsqueeze(-1) * G)
    factors = kkt.factorise(H, A, ones)
    back = lambda t, k: t.reshape((*batch, *t.shape[t.ndim - k :])) if t.ndim > k else t  # noqa: E731
    found = tuple(back(f, k) for f, k in zip(factors, kkt.FACTOR_NDIMS, strict=True))
    info = Info(*(t.reshape(batch) for t in (status, steps, violation)))
    return back(torch.cat([x, y, z], -1), 1), info, found


def _to_zero(v: Tensor, dv: Tensor) -> Tensor:
    """The step at which the first falling entry is zero."""
    falls = dv < 0
    return torch.where(falls, -v / torch.where(falls, dv, -1), torch.inf).amin(-1, keepdim=True)


def _linear_solve(
    value: Tensor,
    args: tuple[Tensor, ...],
    factors: tuple[Tensor, ...],
    rhs: Tensor,
    transpose: bool,
    *,
    parts: tuple[bool, bool],
) -> tuple[Tensor, Info]:
    """The Jacobian of the residual, or its transpose, reduced to ``H = P + G^T D(z/s) G`` and the equalities."""
    _, q, G, h, A, _ = _unpack(args[:-1], parts)
    n, p = q.shape[-1], A.shape[-2]
    bounded = torch.isfinite(h)
    x, z = value[..., :n], torch.where(bounded, value[..., n + p :], 0)
    s = _slack(x, G, h)
    r1, r2, r3 = rhs.split((n, p, rhs.shape[-1] - n - p), -1)
    live = torch.where(bounded, r3, 0)
    if transpose:
        u, v, info = kkt.solve(factors, r1 + times(G.mT, z / s * live), r2)
        last = torch.where(bounded, (r3 - times(G, u)) / s, r3 - times(G, u))
    else:
        held = torch.where(bounded, 0, r3)  # z = r3 where there is no bound
        u, v, info = kkt.solve(factors, r1 - times(G.mT, live / s + held), r2)
        last = torch.where(bounded, (r3 + z * times(G, u)) / s, r3)
    return torch.cat([u, v, last], -1), info
