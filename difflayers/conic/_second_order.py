r"""The second-order cone and its rotated twin.

.. math:: P(t, x) = \tfrac{1}{2} \Big(1 + \frac{t}{\|x\|}\Big) (\|x\|, x) \qquad \text{where } |t| < \|x\|

F. Alizadeh, D. Goldfarb, Second-order cone programming, 2003; S. Boyd, L. Vandenberghe, Convex Optimization, 2004,
exercise 8.3. The norm is only differentiated where it is not zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._cones import Cone, length, scale_of


@dataclass(frozen=True)
class SecondOrder(Cone):
    """Points ``(t, x)`` with ``||x||_2 <= t`` (CVXPY's ``SOC``: the bound stands first); its own dual.

    Default direction: ``(1, 0, ..., 0)``. Differentiable to any order. At a kink, ``||x|| = |t|``, the derivative of
    the projection is that of the inside, or where the projection is zero, that of the zero branch.

    Example:
        >>> import torch
        >>> SecondOrder().project(torch.tensor([1.0, 3.0, 4.0]))
        tensor([3.0000, 1.8000, 2.4000])

    Source: S. Boyd, L. Vandenberghe, Convex Optimization, 2004, exercise 8.3.
    """

    def dual(self) -> SecondOrder:
        """The cone itself."""
        return self

    def _event(self, size: int) -> tuple[int, ...]:
        if size < 1:
            raise ValueError("expected at least 1 entry, t")
        return (size,)

    def _onto(self, x: Tensor) -> Tensor:
        scale = scale_of(x)
        t, z = _split(x / scale)
        n = torch.linalg.vector_norm(z.detach(), dim=-1, keepdim=True)
        zero = n <= -t
        inside = (n <= t) & ~zero
        surface = ~(zero | inside)
        t, z = torch.where(surface, t, 0), torch.where(surface, z, 1)
        n = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        half = (n + t) / 2
        onto = torch.cat([half, z * (half / n)], -1) * scale
        return torch.where(inside, x, torch.where(zero, 0, onto))

    def _along(self, x: Tensor, direction: Tensor | None) -> Tensor:
        t, z = _split(x)
        n = length(z)
        if direction is None:
            return torch.cat([torch.where(n <= t, t, n), z], -1)
        d, e = _split(direction)
        w = z - (t / d) * e  # x = (t / d) * direction + (0, w): a root without differences of squares
        landing = _onto_surface(w, d, e)
        moved = torch.cat([landing * d, w + landing * e], -1)
        return torch.where(n <= t, x, moved)

    def _in_interior(self, x: Tensor) -> Tensor:
        t, z = _split(x)
        return (torch.linalg.vector_norm(z, dim=-1, keepdim=True) < t).squeeze(-1)


@dataclass(frozen=True)
class RotatedSecondOrder(Cone):
    """Points ``(u, v, w)`` with ``2 u v >= ||w||_2^2`` and ``u, v >= 0``; its own dual.

    The second-order cone, its first two coordinates turned by 45 degrees. (CVXPY builds it from ``SOC`` or
    ``quad_over_lin``; MOSEK's rotated cone is the same, with the factor 2.)

    Default direction: ``(1, 1, 0, ..., 0)``. Differentiable to any order; kinks as in :class:`SecondOrder`.

    Example:
        >>> import torch
        >>> RotatedSecondOrder().project(torch.tensor([1.0, 1.0, 2.0]))
        tensor([1.2071, 1.2071, 1.7071])

    Source: F. Alizadeh, D. Goldfarb, Second-order cone programming, 2003, section 1.
    """

    def dual(self) -> RotatedSecondOrder:
        """The cone itself."""
        return self

    def _event(self, size: int) -> tuple[int, ...]:
        if size < 2:
            raise ValueError("expected at least 2 entries, u and v")
        return (size,)

    def _onto(self, x: Tensor) -> Tensor:
        return _given_inside(x, rotate(_PLAIN._onto(rotate(x))))

    def _along(self, x: Tensor, direction: Tensor | None) -> Tensor:
        return _given_inside(x, rotate(_PLAIN._along(rotate(x), None if direction is None else rotate(direction))))

    def _in_interior(self, x: Tensor) -> Tensor:
        return _PLAIN._in_interior(rotate(x))


_PLAIN = SecondOrder()


def rotate(x: Tensor) -> Tensor:
    """``(u, v, w)`` to ``((u + v) / sqrt 2, (u - v) / sqrt 2, w)``: its own inverse."""
    u, v = x[..., :1], x[..., 1:2]
    root = math.sqrt(0.5)
    return torch.cat([(u + v) * root, (u - v) * root, x[..., 2:]], -1)


def _given_inside(x: Tensor, z: Tensor) -> Tensor:
    """Points of the rotated cone as they were, without the rounding of two rotations; but not the apex."""
    y = (x / scale_of(x)).detach()
    u, v, w = y[..., :1], y[..., 1:2], y[..., 2:]
    inside = (u >= 0) & (v >= 0) & (2 * u * v >= w.square().sum(-1, keepdim=True)) & (u + v > 0)
    return torch.where(inside, x, z)


def _onto_surface(w: Tensor, d: Tensor, e: Tensor) -> Tensor:
    """The ``s >= 0`` with ``||w + s e|| = s d``, for ``||e|| < d``; 0 with derivative 0 at ``w = 0``."""
    scale = scale_of(w)
    w = w / scale
    zero = (w.detach() == 0).all(-1, keepdim=True)
    w = torch.where(zero, 1, w)
    across = (w * e).sum(-1, keepdim=True)
    square = w.square().sum(-1, keepdim=True)
    n = torch.linalg.vector_norm(e.detach(), dim=-1, keepdim=True)
    gap = (d - n) * (d + n) + (n.square() - e.square().sum(-1, keepdim=True))
    root = (across.square() + gap * square).sqrt()
    backward = across < 0
    s = torch.where(
        backward, square / (root - torch.where(backward, across, 0)), (root + torch.where(backward, 0, across)) / gap
    )
    return torch.where(zero, 0, s * scale)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., :1], x[..., 1:]
