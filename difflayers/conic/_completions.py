r"""Completions in closed form: boxes, balls, ellipsoids, hyperbolas.

M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, NeurIPS 2024, section 3.2. Where the
minimiser is piecewise constant in the costs r, the value is written :math:`r^T x(r)`, whose derivative in r is x
itself, at every order, at ties too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from difflayers._solution import OnFailure
from difflayers.implicit import envelope
from difflayers.linalg import linear_solve
from difflayers.linalg._system import times
from difflayers.proximal._operands import Number, check_range, check_that, per_element, shown

from ._completion import Completed, Completion, beside, check_entries, check_matrix, check_number, column, dot, spoil
from ._cones import length


@dataclass(frozen=True, eq=False)
class BoxCompletion(Completion):
    r"""Bounds on every variable, ``lower <= x <= upper``.

    .. math:: L(y) = b^T y + l^T r_+ - u^T r_-, \qquad z = (r_+, r_-)

    with :math:`r_+ = \max(r, 0)` and :math:`r_- = \max(-r, 0)`. The multipliers z are those of ``x - lower >= 0``, then
    those of ``upper - x >= 0``: ``(*batch, 2 n)``. At a kink, an entry of r equal to zero, the minimiser is the middle
    of the box. Where the bound that r asks for is infinite, so is x, and L is minus infinity.

    Args:
        lower: A number or ``(*batch, n)``; ``-inf`` where there is none.
        upper: A number or ``(*batch, n)``, at least `lower`; ``inf`` where there is none.

    Example:
        >>> import torch
        >>> from difflayers.conic import dual_bound
        >>> y, A, b = torch.tensor([1.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([1.0])
        >>> dual_bound(y, A, b, torch.tensor([3.0, -1.0]), BoxCompletion(0.0, 1.0)).x
        tensor([0., 1.])

    Source: M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024.
    """

    lower: Number
    upper: Number

    event_ndims: ClassVar[Mapping[str, int]] = {"lower": 1, "upper": 1}

    def __post_init__(self) -> None:
        check_box(self.lower, self.upper)

    def _check(self, event: tuple[int, ...]) -> None:
        check_entries("lower", self.lower, event[-1])
        check_entries("upper", self.upper, event[-1])

    def _complete(self, r: Tensor, w: Tensor | None, on_failure: OnFailure | None) -> Completed:
        return Completed(*over_box(r, self.lower, self.upper))


def check_box(lower: Number, upper: Number) -> None:
    """Refuses an empty box."""
    check_number("lower", lower)
    check_number("upper", upper)
    if isinstance(lower, Tensor) and isinstance(upper, Tensor) and lower.device != upper.device:
        raise ValueError(f"upper: expected device {lower.device} as of lower, got {upper.device}")
    check_that(
        lower <= upper,
        lambda: f"lower: expected at most upper, {shown(upper)}, got {shown(lower)}",
    )


def over_box(r: Tensor, lower: Number, upper: Number) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest ``r^T x`` in a box, with minimiser and multipliers."""
    z = torch.relu(torch.cat([r, -r], -1))
    if not isinstance(lower, Tensor) and not isinstance(upper, Tensor) and r.dtype == torch.float64:
        center, half = (lower + upper) / 2, (upper - lower) / 2
        if center - half == lower and center + half == upper:  # to the bit, and ten times faster than branches
            x = center - half * r.detach().sign()
            return dot(r, x), x, z
    l, u = beside(lower, r), beside(upper, r)
    no_l, no_u = torch.isinf(l), torch.isinf(u)
    middle = (torch.where(no_l, torch.where(no_u, 0, u), l) + torch.where(no_u, torch.where(no_l, 0, l), u)) / 2
    x = torch.where(r > 0, l, torch.where(r < 0, u, middle))
    endless = torch.isinf(x.detach())
    value = dot(r, torch.where(endless, 0, x)) + torch.where(endless.any(-1), -math.inf, 0)
    return value, x, z


@dataclass(frozen=True, eq=False)
class BallCompletion(Completion):
    r"""A ball of any p-norm, ``||x - center||_p <= radius``.

    .. math:: L(y) = b^T y + r^T x_0 - R \|r\|_q, \qquad z = (\|r\|_q, r), \qquad \tfrac1p + \tfrac1q = 1

    The multipliers z are those of ``(radius, x - center)`` in the cone of the norm: ``(*batch, 1 + n)``. At the kink,
    ``r = 0``, the minimiser is the center; for p = 1 ties share it evenly, for p = inf an entry of r equal to zero
    leaves x at the center. Second derivatives are right where r is not zero (for p above 2, where no entry of it is:
    there the second derivative in that entry counts as zero).

    Args:
        radius: At least 0: a number or ``(*batch)``.
        p: Of the norm: a number from 1 to ``inf``.
        center: ``(*batch, n)``, a number, or None for zero.

    Example:
        >>> import torch
        >>> from difflayers.conic import dual_bound
        >>> y, A, b = torch.tensor([1.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([1.0])
        >>> dual_bound(y, A, b, torch.tensor([4.0, 5.0]), BallCompletion(1.0)).bound
        tensor(-4.)

    Source: M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024.
    """

    radius: Number
    p: float = 2.0
    center: Number | None = None

    event_ndims: ClassVar[Mapping[str, int]] = {"radius": 0, "center": 1}

    def __post_init__(self) -> None:
        check_range(per_element("radius", self.radius, at_least=0))
        if isinstance(self.p, bool) or not isinstance(self.p, int | float) or not self.p >= 1:
            raise ValueError(f"p: expected a number of at least 1, got {self.p}")
        if self.center is not None:
            check_number("center", self.center)

    def _check(self, event: tuple[int, ...]) -> None:
        check_entries("center", self.center, event[-1])

    def _complete(self, r: Tensor, w: Tensor | None, on_failure: OnFailure | None) -> Completed:
        R = column(self.radius, r)
        size, direction = _dual_norm(r, float(self.p))
        x, value = -R * direction, (-R * size).squeeze(-1)
        if self.center is not None:
            center = beside(self.center, r)
            x, value = center + x, value + dot(r, center)
        return Completed(value, x, torch.cat([size, r], -1))


def _dual_norm(r: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """``||r||_q`` as ``(*batch, 1)`` and its gradient, both with derivatives of their own; zero at zero."""
    if p == 2:
        size = length(r)
        zero = size.detach() == 0
        return size, torch.where(zero, 0, r / torch.where(zero, 1, size))
    if p == math.inf:
        direction = r.detach().sign()
        return dot(r, direction).unsqueeze(-1), direction
    if p == 1:
        large = r.detach().abs()
        top = (large == large.amax(-1, keepdim=True)).to(r.dtype)
        direction = r.detach().sign() * top / top.sum(-1, keepdim=True)
        return dot(r, direction).unsqueeze(-1), direction
    q = p / (p - 1)
    scale = r.detach().abs().amax(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    zero = r.detach() == 0
    a = torch.where(zero, 1, (r / scale).abs())  # powers below 2 have no second derivative at zero
    power = torch.where(zero, 0, a**q).sum(-1, keepdim=True)
    nothing = zero.all(-1, keepdim=True)
    size = torch.where(nothing, 0, torch.where(nothing, 1, power) ** (1 / q))
    direction = torch.where(zero, 0, r.detach().sign() * (a / torch.where(nothing, 1, size)) ** (q - 1))
    return size * scale, direction


@dataclass(frozen=True, eq=False)
class EllipsoidCompletion(Completion):
    r"""An ellipsoid, ``||D (x - center)||_2 <= radius``.

    .. math:: L(y) = b^T y + r^T x_0 - R \|D^{-T} r\|_2, \qquad z = (\|D^{-T} r\|_2, D^{-T} r)

    The multipliers z are those of ``(radius, D (x - center))`` in the second-order cone: ``(*batch, 1 + n)``. At the
    kink, ``r = 0``, the minimiser is the center. First derivatives need no linear solve, second ones do.

    Args:
        D: ``(*batch, n, n)`` regular.
        radius: At least 0: a number or ``(*batch)``.
        center: ``(*batch, n)``, a number, or None for zero.

    Example:
        >>> import torch
        >>> from difflayers.conic import dual_bound
        >>> y, A, b = torch.tensor([1.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([1.0])
        >>> D = torch.tensor([[0.5, 0.0], [0.0, 1.0]])
        >>> dual_bound(y, A, b, torch.tensor([2.5, 5.0]), EllipsoidCompletion(D)).bound
        tensor(-4.)

    Source: M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024.
    """

    D: Tensor
    radius: Number = 1.0
    center: Number | None = None

    solves: ClassVar[bool] = True
    event_ndims: ClassVar[Mapping[str, int]] = {"D": 2, "radius": 0, "center": 1}

    def __post_init__(self) -> None:
        check_matrix("D", self.D)
        check_range(per_element("radius", self.radius, at_least=0))
        if self.center is not None:
            check_number("center", self.center)

    def _check(self, event: tuple[int, ...]) -> None:
        check_square("D", self.D, event[-1])
        check_entries("center", self.center, event[-1])

    def _complete(self, r: Tensor, w: Tensor | None, on_failure: OnFailure | None) -> Completed:
        R = column(self.radius, r)
        policy = on_failure or "nan"
        u = linear_solve(self.D.mT, r, on_failure=policy)
        size, direction = _dual_norm(u, 2.0)
        step = -R * linear_solve(self.D, direction, on_failure=policy)
        z = torch.cat([size, u], -1)
        failed = torch.isnan(step.detach()).any(-1, keepdim=True)
        value = envelope(
            _ellipsoid,
            (torch.where(failed, 0, step), torch.where(failed, 0, z)),
            (self.D, R.expand(*R.shape[:-1], 1), r),
        )
        value = spoil(value, failed.squeeze(-1))
        if self.center is not None:
            center = beside(self.center, r)
            step, value = center + step, value + dot(r, center)
        return Completed(value, step, z)


def _ellipsoid(point: tuple[Tensor, Tensor], D: Tensor, R: Tensor, r: Tensor) -> Tensor:
    """The Lagrangian around the center: stationary in the step and in its multipliers."""
    step, z = point
    return dot(r, step) - dot(z[..., 1:], times(D, step)) - dot(z[..., :1], R)


def check_square(name: str, M: Tensor, n: int) -> None:
    """Refuses a matrix that does not fit n variables."""
    if tuple(M.shape[-2:]) != (n, n):
        raise ValueError(f"{name}: expected shape (..., {n}, {n}) as of c, got {tuple(M.shape)}")


@dataclass(frozen=True, eq=False)
class HyperbolicCompletion(Completion):
    r"""Pairs of variables whose product is at least a constant, ``x_j t_j >= product`` with ``x, t >= 0``.

    The variables are ``(x, t)``, n / 2 of each, with costs :math:`r = (\pi, \tau)`; that is, :math:`(x_j, t_j,
    \sqrt{2\rho})` lies in the rotated second-order cone.

    .. math:: L(y) = b^T y + 2 \sum_j \sqrt{\rho_j \pi_j \tau_j}, \qquad
              z_j = (\pi_j, \tau_j, -\sqrt{2 \pi_j \tau_j})

    The multipliers z are those of the cones, one triple after the other: ``(*batch, 3 n / 2)``. The set is not bounded:
    L is minus infinity where a cost is negative, and where a cost is zero beside a positive one the minimum is not
    attained: then the derivative counts as zero, and x holds the limit.

    Args:
        product: At least 0: a number or ``(*batch, n / 2)``.

    Example:
        >>> import torch
        >>> from difflayers.conic import dual_bound
        >>> y, A, b = torch.tensor([1.0]), torch.tensor([[-3.0, 0.0]]), torch.tensor([-5.0])
        >>> dual_bound(y, A, b, torch.tensor([1.0, 9.0]), HyperbolicCompletion())
        DualPoint(bound=tensor(7.), x=tensor([1.5000, 0.6667]), z=tensor([ 4.0000,  9.0000, -8.4853]))

    Source: M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024, production planning.
    """

    product: Number = 1.0

    event_ndims: ClassVar[Mapping[str, int]] = {"product": 1}

    def __post_init__(self) -> None:
        check_range(per_element("product", self.product, at_least=0))

    def _check(self, event: tuple[int, ...]) -> None:
        if event[-1] % 2:
            raise ValueError(f"c: expected an even number of variables, x and then t, got {event[-1]}")
        check_entries("product", self.product, event[-1] // 2)

    def _complete(self, r: Tensor, w: Tensor | None, on_failure: OnFailure | None) -> Completed:
        rho = beside(self.product, r)
        pi, tau = r.tensor_split(2, -1)
        inside = (pi > 0) & (tau > 0) & (rho > 0)
        a, b, k = (torch.where(inside, t, 1).sqrt() for t in (pi, tau, rho))
        negative = (pi < 0) | (tau < 0)
        spoilt = 0 * (pi + tau)  # NaN where a cost is
        terms = torch.where(inside, 2 * k * a * b, torch.where(negative, -math.inf, spoilt.detach()))
        on_axis = torch.where(rho > 0, math.inf, 0).to(r.dtype)
        flat = rho.detach().sqrt()
        x = torch.where(inside, k * b / a, torch.where(pi < tau, on_axis, torch.where(pi == tau, flat, 0)))
        t = torch.where(inside, k * a / b, torch.where(tau < pi, on_axis, torch.where(pi == tau, flat, 0)))
        x, t = (torch.where(negative, torch.where(cost < 0, math.inf, 0), p) for cost, p in ((pi, x), (tau, t)))
        z = torch.stack([pi, tau, torch.where(inside, -math.sqrt(2) * a * b, 0)], -1).flatten(-2)
        return Completed(terms.sum(-1), torch.cat([x, t], -1), z)
