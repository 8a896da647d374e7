r"""The power cone and its dual.

The projection of :math:`v = (x, y, z)` on the surface :math:`x^\alpha y^{1 - \alpha} = |z|` has

.. math::
    \xi_i = \tfrac12 \Big(v_i + \sqrt{v_i^2 + 4 \alpha_i m}\Big), \qquad m = z^2\,\theta (1 - \theta), \qquad
    \xi_1^\alpha\, \xi_2^{1 - \alpha} = \theta |z|,

with :math:`\alpha_1 = \alpha, \alpha_2 = 1 - \alpha`, and :math:`\theta z` as third coordinate, :math:`0 < \theta < 1`.
L. T. K. Hien, Differential properties of Euclidean projection onto power cone, 2015.

Near the faces :math:`\theta` or :math:`1 - \theta` may be any power of the distance. So the unknown is the logit of
:math:`\theta`, and the equation is that of logarithms. The derivative, of every order, is that of the equation at its
root. Everything is computed in float64.

Symbols: ``q = |z|``; ``w`` logit of theta.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._solution import Info
from difflayers.implicit import ImplicitProblem, solution_map
from difflayers.linalg._autodiff import opaque

from ._cones import Cone, scale_of
from ._exponential import three
from ._root_search import Terms, certain, divide, find_root, widen

NOTHING = 1e-70  # of 1: a third coordinate as small is none
WIDEST = 300.0  # a logit: e^-WIDEST is nothing beside 1, and NOTHING**2 times it no underflow


@dataclass(frozen=True)
class Power(Cone):
    """Points ``(x, y, z)`` with ``x^alpha y^(1 - alpha) >= |z|`` and ``x, y >= 0``: CVXPY's ``PowCone3D``.

    The dual is :class:`DualPower`. Default direction: ``(1, 1, 0)``. Differentiable to any order. At a kink the
    derivative of the projection is that of the inside on the surface, and zero on the polar cone and at zero. Points
    with ``z = 0`` and one of x and y negative are no kink: beyond ``x = 0`` the projection keeps z if ``alpha < 1/2``
    and drops it if ``alpha > 1/2``; beyond ``y = 0`` the other way round.

    Args:
        alpha: The exponent of x, between 0 and 1.

    Raises:
        ValueError: For an `alpha` that is no number between 0 and 1.

    Example:
        >>> import torch
        >>> Power(0.5).project(torch.tensor([1.0, 1.0, 3.0]))
        tensor([1.6667, 1.6667, 1.6667])

    Source: L. T. K. Hien, Differential properties of Euclidean projection onto power cone, 2015.
    """

    alpha: float

    def __post_init__(self) -> None:
        check_exponent(self.alpha)

    def dual(self) -> DualPower:
        """The dual power cone."""
        return DualPower(self.alpha)

    def _event(self, size: int) -> tuple[int, ...]:
        return three(size)

    def _onto(self, x: Tensor) -> Tensor:
        return _decompose(x, self.alpha)[0]

    def _along(self, x: Tensor, direction: Tensor | None) -> Tensor:
        d = torch.tensor([1, 1, 0], dtype=x.dtype, device=x.device) if direction is None else direction
        return _first_point(x, d, self.alpha)

    def _in_interior(self, x: Tensor) -> Tensor:
        a, b, c = x.double().unbind(-1)
        return (a > 0) & (b > 0) & (_mean(a, b, self.alpha) > c.abs())


@dataclass(frozen=True)
class DualPower(Cone):
    """Points ``(u, v, w)`` with ``(u / alpha)^alpha (v / (1 - alpha))^(1 - alpha) >= |w|`` and ``u, v >= 0``.

    The dual of :class:`Power`. Default direction: ``(alpha, 1 - alpha, 0)``. Differentiable to any order; kinks as in
    :class:`Power`.

    Args:
        alpha: The exponent, between 0 and 1.

    Raises:
        ValueError: For an `alpha` that is no number between 0 and 1.

    Example:
        >>> import torch
        >>> DualPower(0.5).project(torch.tensor([0.0, 0.0, 3.0]))
        tensor([1., 1., 2.])

    Source: L. T. K. Hien, Differential properties of Euclidean projection onto power cone, 2015.
    """

    alpha: float

    def __post_init__(self) -> None:
        check_exponent(self.alpha)

    def dual(self) -> Power:
        """The power cone."""
        return Power(self.alpha)

    def _event(self, size: int) -> tuple[int, ...]:
        return three(size)

    def _onto(self, x: Tensor) -> Tensor:
        return -_decompose(-x, self.alpha)[1]

    def _along(self, x: Tensor, direction: Tensor | None) -> Tensor:
        primal, weights = Power(self.alpha), self._weights(x)
        point = x / weights
        landed = primal._along(point, None if direction is None else direction / weights)
        return torch.where((landed == point).all(-1, keepdim=True), x, landed * weights)

    def _in_interior(self, x: Tensor) -> Tensor:
        return Power(self.alpha)._in_interior(x / self._weights(x))

    def _weights(self, x: Tensor) -> Tensor:
        return torch.tensor([self.alpha, 1 - self.alpha, 1.0], dtype=x.dtype, device=x.device)


def check_exponent(alpha: float) -> None:
    """Refuses what is no number between 0 and 1."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1:
        raise ValueError(f"alpha: expected a number between 0 and 1, got {alpha!r}")


def _mean(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    """The weighted geometric mean, 0 where one of the two is negative."""
    return x.clamp_min(0) ** alpha * y.clamp_min(0) ** (1 - alpha)


# ----------------------------------------------------------------------------------------------- Euclidean projection


@opaque
def _decompose(v: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The projections on the cone and on its polar cone: two orthogonal parts of v."""
    scale = scale_of(v).double()
    x, y, z = (v.double() / scale).split(1, -1)
    sign = torch.where(z.detach() < 0, -1, 1).to(z.dtype)
    q = sign * z
    polar, inside, flat = _branches(x.detach(), y.detach(), q.detach(), alpha)
    far, off = _flat_parts(x, y, z, alpha)
    surface = ~(polar | inside | flat)
    x, y, q = (torch.where(surface, c, 1) for c in (x, y, q))
    exponent = x.new_full((), alpha)
    w = solution_map(_SURFACE, (x, y, q, exponent), on_failure="ignore")
    m, share, rest = _product(w, q)
    xi, x_rest = _roots(x, alpha * m)
    eta, y_rest = _roots(y, (1 - alpha) * m)
    onto = torch.cat([xi, eta, sign * q * share], -1)
    polar_part = torch.cat([-x_rest, -y_rest, sign * q * rest], -1)
    onto, polar_part = (torch.where(flat, far, onto) * scale), (torch.where(flat, off, polar_part) * scale)
    onto, polar_part = onto.to(v.dtype), polar_part.to(v.dtype)
    apex = (v.detach() == 0).all(-1, keepdim=True)
    return (
        torch.where(inside, v, torch.where(polar, 0, onto)),
        torch.where(polar & ~apex, v, torch.where(inside | apex, 0, polar_part)),
    )


def _branches(x: Tensor, y: Tensor, q: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which points are in the polar cone, which in the cone, which of the others have no third coordinate."""
    polar = (x <= 0) & (y <= 0) & (_mean(-x / alpha, -y / (1 - alpha), alpha) >= q)
    inside = (x >= 0) & (y >= 0) & (_mean(x, y, alpha) >= q) & ~polar
    return polar, inside, (q <= NOTHING) & ~(polar | inside)


def _flat_parts(x: Tensor, y: Tensor, z: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The decomposition for z next to zero: to first order in z, and where there is one, to second order."""
    first = x.detach() < y.detach()
    low, high = torch.where(first, x, y), torch.where(first, y, x)
    weight = torch.where(first, x.new_full((), alpha), 1 - alpha)  # of the lower one, which is cut off
    split = (low.detach() < 0) & (high.detach() > 0)
    # what z keeps and what it loses, where both are something
    sum_ = torch.where(split, high - 2 * low, 1)
    even = split & (weight == 0.5)
    keeps = torch.where(split, weight < 0.5, high.detach() > 0).to(z.dtype)
    share, lost = torch.where(even, high / sum_, keeps), torch.where(even, -2 * low / sum_, 1 - keeps)
    m = z * z * share * lost
    onto, rest = [], []
    for c, a in ((x, alpha), (y, 1 - alpha)):
        more = a * m / torch.where(split, c.abs(), 1)
        onto.append(torch.relu(c) + more)
        rest.append(-torch.relu(-c) - more)
    return torch.cat([*onto, z * share], -1), torch.cat([*rest, z * lost], -1)


def _logistic(w: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of ``theta`` and ``1 - theta``."""
    positive = w > 0
    small = torch.where(positive, -w, w)
    shared = torch.log1p(small.exp())
    return torch.where(positive, 0, w) - shared, torch.where(positive, -w, 0) - shared


def _product(w: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``m``, ``theta``, ``1 - theta``."""
    log_share, log_rest = _logistic(w)
    return q * q * (log_share + log_rest).exp(), log_share.exp(), log_rest.exp()


def _roots(v: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """Two positive numbers with this product whose difference is v, without cancellation."""
    root = (v * v + 4 * product).sqrt()
    positive = v > 0
    large = (root + torch.where(positive, v, -v)) / 2
    small = product / large
    return torch.where(positive, large, small), torch.where(positive, small, large)


def _surface_equation(w: Tensor, x: Tensor, y: Tensor, q: Tensor, alpha: Tensor) -> Tensor:
    m, *_ = _product(w, q)
    xi, eta = _roots(x, alpha * m)[0], _roots(y, (1 - alpha) * m)[0]
    return _logistic(w)[0] + q.log() - alpha * xi.log() - (1 - alpha) * eta.log()


def _surface_slope(w: Tensor, x: Tensor, y: Tensor, q: Tensor, alpha: Tensor) -> Tensor:
    m, share, rest = _product(w, q)
    bent = torch.zeros_like(w)
    for v, a in ((x, alpha), (y, 1 - alpha)):
        xi, _ = _roots(v, a * m)
        bent = bent + a * (a * m / (xi * xi + a * m))
    return rest - bent * (rest - share)


def _solve_surface(x: Tensor, y: Tensor, q: Tensor, alpha: Tensor) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    x, y, q, alpha = torch.broadcast_tensors(x, y, q, alpha)

    def equation(w: Tensor) -> Terms:
        value = _surface_equation(w, x, y, q, alpha)
        step = -value / _surface_slope(w, x, y, q, alpha)
        return value, step, step, 1 + w.abs() + q.log().abs()

    end = torch.full_like(x, WIDEST)
    w = find_root(equation, -end, end, torch.zeros_like(x))
    return w, certain(w), (_surface_slope(w, x, y, q, alpha),)


_SURFACE = ImplicitProblem(
    solve=_solve_surface,
    residual=_surface_equation,
    linear_solve=divide,
    value_ndim=0,
    arg_ndims=(0, 0, 0, 0),
    factor_ndims=(0,),
    symmetric=True,
    name="projection on the power cone",
    arg_names=("x", "y", "q", "alpha"),
)


# -------------------------------------------------------------------------------------------------- radial projection


@opaque
def _first_point(v: Tensor, direction: Tensor, alpha: float) -> Tensor:
    """``v + tau * direction`` on the boundary, reached from the point where x or y is zero first: u further on."""
    scale = scale_of(v).double()
    d = direction.double().expand_as(v)
    x, y, z = (v.double() / scale).split(1, -1)
    dx, dy, dz = d.split(1, -1)
    inside = _in_cone(x.detach(), y.detach(), z.detach().abs(), alpha)
    first = (x / dx).detach() < (y / dy).detach()
    base = torch.where(first, x / dx, y / dy)
    gap = torch.where(first, y / dy, x / dx) - base
    z = z - base * dz
    low, high = torch.where(first, dx, dy), torch.where(first, dy, dx)
    weight = torch.where(first, x.new_full((), alpha), 1 - alpha)
    edge = z.detach().abs() <= NOTHING
    smooth = ~(inside | edge)
    given = [(gap, 1), (z, 1), (low, 1), (high, 1), (dz, 0), (weight, 0.5)]
    log_u = solution_map(_RAY, tuple(torch.where(smooth, c, k) for c, k in given), on_failure="ignore")
    # at z = 0 itself there is a second derivative for one exponent
    apart = gap.detach() > 0
    touching = torch.where(apart & (weight == 0.5), z * z / (torch.where(apart, gap, 1) * low * high), 0)
    u = torch.where(smooth, log_u.exp(), touching)
    one, other = low * u, high * (u + gap)
    landed = torch.cat([torch.where(first, one, other), torch.where(first, other, one), z + u * dz], -1) * scale
    return torch.where(inside, v, landed.to(v.dtype))


def _in_cone(x: Tensor, y: Tensor, q: Tensor, alpha: float) -> Tensor:
    return (x >= 0) & (y >= 0) & (_mean(x, y, alpha) >= q)


def _ray_equation(
    log_u: Tensor, gap: Tensor, z: Tensor, low: Tensor, high: Tensor, dz: Tensor, weight: Tensor
) -> Tensor:
    u = log_u.exp()
    # where u is nothing beside the gap, only its logarithm still counts; where there is no gap, it is all there is
    apart = gap.detach() > 0
    alone = log_u + torch.where(apart, 0, gap) / torch.where(apart, 1, u)
    beside = torch.where(apart, (u + torch.where(apart, gap, 1)).log(), alone)
    return weight * (low.log() + log_u) + (1 - weight) * (high.log() + beside) - (z + u * dz).abs().log()


def _ray_slope(log_u: Tensor, gap: Tensor, z: Tensor, low: Tensor, high: Tensor, dz: Tensor, weight: Tensor) -> Tensor:
    u = log_u.exp()
    beside = torch.where(gap > 0, u / (u + gap), 1)
    return weight + (1 - weight) * beside - u * dz / (z + u * dz)


def _solve_ray(*args: Tensor) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    args = torch.broadcast_tensors(*args)

    def equation(log_u: Tensor) -> Terms:
        value = _ray_equation(log_u, *args)
        step = -value / _ray_slope(log_u, *args)
        return value, step, step, 1 + log_u.abs()

    start = torch.zeros_like(args[0])
    log_u = find_root(equation, *widen(equation, start), start)
    return log_u, certain(log_u), (_ray_slope(log_u, *args),)


_RAY = ImplicitProblem(
    solve=_solve_ray,
    residual=_ray_equation,
    linear_solve=divide,
    value_ndim=0,
    arg_ndims=(0,) * 6,
    factor_ndims=(0,),
    symmetric=True,
    name="radial projection on the power cone",
    arg_names=("gap", "z", "low", "high", "dz", "weight"),
)
