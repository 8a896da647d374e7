r"""The exponential cone and its dual.

Off the faces, a point v outside of both the cone and its polar is the sum of its projections on the two surfaces,

.. math:: v = a\,(\rho,\ 1,\ e^\rho) + b\,(1,\ 1 - \rho,\ -e^{-\rho}), \qquad a, b > 0,

two orthogonal vectors. The first two coordinates give a and b for any :math:`\rho`; the third is an increasing scalar
equation for it. H. A. Friberg, Projection onto the exponential cone: a univariate root-finding problem, 2021.

The derivative, of every order, is that of the equation at its root. :math:`\rho` grows without bound towards the faces.
So all equations here are multiplied by :math:`e^{-|\rho|}`; of two formulas for a coordinate the one without
cancellation is used; and where :math:`e^{-|\rho|}` would underflow, the surface is as good as the face. Everything is
computed in float64.

Symbols: ``r, s, t`` coordinates of v; ``rho = x / y`` on the surface.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._solution import Info
from difflayers.implicit import ImplicitProblem, solution_map
from difflayers.linalg._autodiff import opaque

from ._cones import Cone, scale_of
from ._root_search import certain, divide, find_root, log_step, widen

STEEPEST = 800.0  # an exponent: e^-STEEPEST is nothing beside 1, and the surface is as good as the face
REACH = 2048.0  # e^REACH outgrows every ratio of two numbers
STEEP = 8.0  # from here on a coordinate next to a face is what the other part leaves


@dataclass(frozen=True)
class Exponential(Cone):
    """Points ``(x, y, z)`` with ``y exp(x / y) <= z`` and ``y > 0``, or ``x <= 0, y = 0, z >= 0``.

    This is the order of CVXPY's ``ExpCone`` and of SCS; MOSEK has it reversed. The dual is :class:`DualExponential`.

    Default direction: ``(0, 1, 2)``. Differentiable to any order. At a kink the derivative of the projection is that of
    the inside on the surface, that of the face on the face ``y = 0`` and at zero, and zero on the polar cone.

    Example:
        >>> import torch
        >>> Exponential().project(torch.tensor([1.0, 1.0, 1.0]))
        tensor([0.4263, 0.7517, 1.3254])

    Source: H. A. Friberg, Projection onto the exponential cone: a univariate root-finding problem, 2021.
    """

    def dual(self) -> DualExponential:
        """The dual exponential cone."""
        return DualExponential()

    def _event(self, size: int) -> tuple[int, ...]:
        return three(size)

    def _onto(self, x: Tensor) -> Tensor:
        return _decompose(x)[0]

    def _along(self, x: Tensor, direction: Tensor | None) -> Tensor:
        return _first_point(x, torch.arange(3, dtype=x.dtype, device=x.device) if direction is None else direction)

    def _in_interior(self, x: Tensor) -> Tensor:
        r, s, t = x.double().unbind(-1)
        return (s > 0) & (s * (r / s).exp() < t)


@dataclass(frozen=True)
class DualExponential(Cone):
    """Points ``(u, v, w)`` with ``-u exp(v / u - 1) <= w`` and ``u < 0``, or ``u = 0, v >= 0, w >= 0``.

    The dual of :class:`Exponential`, in the same order of variables: ``(u - v, -u, w)`` lies in that cone.

    Default direction: ``(-1, -1, 2)``. Differentiable to any order; kinks as in :class:`Exponential`.

    Example:
        >>> import torch
        >>> DualExponential().project(torch.tensor([-1.0, -1.0, 0.0]))
        tensor([-0.8534, -0.5654,  0.6090])

    Source: H. A. Friberg, Projection onto the exponential cone: a univariate root-finding problem, 2021.
    """

    def dual(self) -> Exponential:
        """The exponential cone."""
        return Exponential()

    def _event(self, size: int) -> tuple[int, ...]:
        return three(size)

    def _onto(self, x: Tensor) -> Tensor:
        return -_decompose(-x)[1]

    def _along(self, x: Tensor, direction: Tensor | None) -> Tensor:
        point = _as_primal(x)
        landed = _PRIMAL._along(point, None if direction is None else _as_primal(direction))
        r, s, t = landed.unbind(-1)
        return torch.where((landed == point).all(-1, keepdim=True), x, torch.stack([-s, -s - r, t], -1))

    def _in_interior(self, x: Tensor) -> Tensor:
        return _PRIMAL._in_interior(_as_primal(x))


_PRIMAL = Exponential()


def _as_primal(x: Tensor) -> Tensor:
    u, v, w = x.unbind(-1)
    return torch.stack([u - v, -u, w], -1)


def three(size: int) -> tuple[int, ...]:
    """The shape of a point of three numbers."""
    if size != 3:
        raise ValueError("expected 3 entries, (x, y, z)")
    return (3,)


# ----------------------------------------------------------------------------------------------- Euclidean projection


@opaque
def _decompose(v: Tensor) -> tuple[Tensor, Tensor]:
    """The projections on the cone and on its polar cone: two orthogonal parts of v."""
    scale = scale_of(v).double()
    r, s, t = (v.double() / scale).split(1, -1)
    inside, polar, face = _branches(r.detach(), s.detach(), t.detach())
    surface = ~(inside | polar | face)
    far = torch.cat([-torch.relu(-r), torch.relu(s), torch.relu(t)], -1)
    off = torch.cat([torch.relu(r), -torch.relu(-s), -torch.relu(-t)], -1)
    r, s, t = (torch.where(surface, c, 1) for c in (r, s, t))
    rho = solution_map(_SURFACE, (r, s, t), on_failure="ignore")
    onto, polar_part = _two_parts(rho, r, s, t)
    onto = torch.where(face, far, onto) * scale
    polar_part = torch.where(face, off, polar_part) * scale
    onto, polar_part = onto.to(v.dtype), polar_part.to(v.dtype)
    return (
        torch.where(inside, v, torch.where(polar, 0, onto)),
        torch.where(polar, v, torch.where(inside, 0, polar_part)),
    )


def _branches(r: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which points are in the cone, which in the polar cone, which are projected as on the face."""
    # beyond the face, and so steeply below or above it that the surface lies closer to it than rounding
    face = ((s <= 0) & (STEEPEST * r <= -s)) | ((r < 0) & (STEEPEST * s <= -r) & (t <= 0))
    inside = (s > 0) & (s * (r / s).exp() <= t)
    polar = (r > 0) & (r * (s / r).exp() <= -torch.e * t) & ~face
    return inside & ~face, polar, face


def _two_parts(rho: Tensor, r: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Both projections for a given rho: of the formulas for a coordinate the one without cancellation."""
    a, b = _weights(rho, r, s)
    positive = rho > 0
    E = torch.where(positive, -rho, rho).exp()
    z, away = torch.where(positive, t + b * E, a * E), torch.where(positive, b * E, a * E - t)
    # next to a face one part is nearly all of (r, s); a tiny multiple of a huge rho is for the other part
    x, y, x_rest, y_rest = a * rho, a, b, b * (1 - rho)
    left, right = rho < -STEEP, rho > STEEP
    x, x_rest = torch.where(left, r - x_rest, x), torch.where(right, r - x, x_rest)
    y, y_rest = torch.where(left, s - y_rest, y), torch.where(right, s - y, y_rest)
    return torch.cat([x, y, z], -1), torch.cat([x_rest, y_rest, -away], -1)


def _weights(rho: Tensor, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The multiples a and b of the two vectors that fit r and s."""
    D = (rho - 1) * rho + 1
    return ((rho - 1) * r + s) / D, (r - rho * s) / D


def _surface_equation(rho: Tensor, r: Tensor, s: Tensor, t: Tensor) -> Tensor:
    a, b = _weights(rho, r, s)
    m = rho.detach().abs()
    return a * (rho - m).exp() - b * (-rho - m).exp() - t * (-m).exp()


def _surface_terms(rho: Tensor, r: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """The equation as ``p = q`` with terms of one sign each, for :func:`log_step`."""
    D, twice = (rho - 1) * rho + 1, 2 * rho - 1
    a, b = _weights(rho, r, s)
    m = rho.abs()
    up, down, one = (rho - m).exp(), (-rho - m).exp(), (-m).exp()
    p, q = a * up + torch.relu(-t) * one, b * down + torch.relu(t) * one
    large = 1 + rho.abs()
    size = (large * r.abs() + s.abs()) / D * up + (r.abs() + large * s.abs()) / D * down + t.abs() * one
    return p, q, ((r - a * twice) / D + a) * up, ((-s - b * twice) / D - b) * down, rho.sign() - twice / D, size


def _solve_surface(r: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    r, s, t = torch.broadcast_tensors(r, s, t)
    # a > 0 bounds rho from below where r > 0, b > 0 from above where s > 0; an exponential soon settles the other side
    low, high = torch.where(r > 0, 1 - s / r, -math.inf), torch.where(s > 0, r / s, math.inf)
    low, high = (
        torch.where(s >= r, torch.maximum(low, high - REACH), low),
        torch.where(s >= r, high, torch.minimum(high, low + REACH)),
    )
    reach = ((high - low) / 2).clamp_max(1)
    start = torch.minimum(torch.maximum(torch.full_like(low, 0.5), low + reach), high - reach)
    rho = find_root(lambda rho: log_step(*_surface_terms(rho, r, s, t)), low, high, start)
    _, _, dp, dq, *_ = _surface_terms(rho, r, s, t)
    return rho, certain(rho), (dp - dq,)


_SURFACE = ImplicitProblem(
    solve=_solve_surface,
    residual=_surface_equation,
    linear_solve=divide,
    value_ndim=0,
    arg_ndims=(0, 0, 0),
    factor_ndims=(0,),
    symmetric=True,
    name="projection on the exponential cone",
    arg_names=("r", "s", "t"),
)


# -------------------------------------------------------------------------------------------------- radial projection


@opaque
def _first_point(v: Tensor, direction: Tensor) -> Tensor:
    """``v + tau * direction`` on the boundary. Its middle coordinate is ``u * d_y``, so u tells the distance."""
    scale = scale_of(v).double()
    d = direction.double().expand_as(v)
    r, s, t = (v.double() / scale).split(1, -1)
    inside = _in_cone(r.detach(), s.detach(), t.detach())
    dr, ds, dt = d.split(1, -1)
    r, t = r - s * (dr / ds), t - s * (dt / ds)  # the point with y = 0 on the line
    face = (r.detach() <= 1e-70) & (t.detach() >= 0)
    smooth = ~(inside | face)
    safe = (
        [torch.where(smooth, c, 1) for c in (r, t)],
        [torch.where(smooth, c, k) for c, k in ((dr, 0), (ds, 1), (dt, 2))],
    )
    log_u = solution_map(_RAY, (*safe[0], *safe[1]), on_failure="ignore")
    u = torch.where(smooth, log_u.exp(), 0)
    landed = (torch.cat([r + u * dr, u * ds, t + u * dt], -1) * scale).to(v.dtype)
    return torch.where(inside, v, landed)


def _in_cone(r: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return ((s > 0) & (s * (r / s).exp() <= t)) | ((s == 0) & (r <= 0) & (t >= 0))


def _ray_terms(
    log_u: Tensor, r: Tensor, t: Tensor, dr: Tensor, ds: Tensor, dt: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides of ``z = y exp(x / y)`` on the line, over a number too large for overflow, and ``x / y``."""
    u = log_u.exp()
    rho = (r / u + dr) / ds
    m = torch.relu(rho.detach())
    return (t + u * dt) * (-m).exp(), u * ds * (rho - m).exp(), rho


def _ray_equation(log_u: Tensor, r: Tensor, t: Tensor, dr: Tensor, ds: Tensor, dt: Tensor) -> Tensor:
    p, q, _ = _ray_terms(log_u, r, t, dr, ds, dt)
    return p - q


def _ray_slopes(log_u: Tensor, r: Tensor, t: Tensor, dr: Tensor, ds: Tensor, dt: Tensor) -> tuple[Tensor, ...]:
    p, q, rho = _ray_terms(log_u, r, t, dr, ds, dt)
    u = log_u.exp()
    one = (-torch.relu(rho)).exp()
    size = (t.abs() + u * dt.abs()) * one + q * (1 + rho.abs())
    dm = torch.where(rho > 0, -r / (u * ds), 0)
    return p, q, u * dt * one, q * (1 - r / (u * ds)), dm, size


def _solve_ray(r: Tensor, t: Tensor, dr: Tensor, ds: Tensor, dt: Tensor) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    r, t, dr, ds, dt = torch.broadcast_tensors(r, t, dr, ds, dt)
    equation = lambda log_u: log_step(*_ray_slopes(log_u, r, t, dr, ds, dt))  # noqa: E731
    start = torch.zeros_like(r)
    log_u = find_root(equation, *widen(equation, start), start)
    _, _, dp, dq, *_ = _ray_slopes(log_u, r, t, dr, ds, dt)
    return log_u, certain(log_u), (dp - dq,)


_RAY = ImplicitProblem(
    solve=_solve_ray,
    residual=_ray_equation,
    linear_solve=divide,
    value_ndim=0,
    arg_ndims=(0, 0, 0, 0, 0),
    factor_ndims=(0,),
    symmetric=True,
    name="radial projection on the exponential cone",
    arg_names=("r", "t", "dr", "ds", "dt"),
)
