r"""Projections that subtract one threshold: the simplex and the l1 ball.

.. math:: P(x) = (x - \tau)_+, \qquad \sum_i (x_i - \tau)_+ = \rho

The threshold is the root of a convex, decreasing, piecewise linear function, which Newton's method finds in a finite
number of steps from the left: no sort is needed. C. Michelot, A finite algorithm for finding the projection of a point
onto the canonical simplex, 1986; L. Condat, Fast projection onto the simplex and the l1 ball, 2016, section 3.

Symbols: ``rho`` radius, ``tau`` threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._identify import identify
from ._operands import Number, on_vectors, per_element


def project_simplex(x: Tensor, radius: Number = 1.0, *, dim: int = -1) -> Tensor:
    """The nearest point with non-negative entries that sum to `radius` (``sparsemax`` at radius 1).

    Solves ``argmin_z 1/2 ||z - x||^2 s.t. z >= 0, sum(z) = radius``.

    Args:
        x: Any shape.
        radius: At least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        dim: The dimension of one vector.

    Returns:
        The projection, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `radius` (the set is empty), a shape that does not broadcast, or a dtype that
            is not floating point.

    Differentiable in `x` and `radius`, to any order. At a kink (an entry that just reaches zero) the derivative is that
    of the zero branch.

    Example:
        >>> import torch
        >>> project_simplex(torch.tensor([1.0, 0.5, -1.0]))
        tensor([0.7500, 0.2500, 0.0000])

    Source: C. Michelot, A finite algorithm for finding the projection of a point onto the canonical simplex, 1986.
    """
    return on_vectors(_onto_simplex, x, per_element("radius", radius, at_least=0), dim=dim)


def project_l1_ball(x: Tensor, radius: Number = 1.0, *, dim: int = -1) -> Tensor:
    """The nearest point whose absolute values sum to at most `radius`.

    Solves ``argmin_z 1/2 ||z - x||^2 s.t. ||z||_1 <= radius``.

    Args:
        x: Any shape.
        radius: At least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        dim: The dimension of one vector.

    Returns:
        The projection, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `radius` (the set is empty), a shape that does not broadcast, or a dtype that
            is not floating point.

    Differentiable in `x` and `radius`, to any order. At a kink (an entry that just reaches zero) the derivative is that
    of the zero branch; on the boundary of the ball it is that of the inside.

    Example:
        >>> import torch
        >>> project_l1_ball(torch.tensor([1.0, -0.5, 0.1]))
        tensor([ 0.7500, -0.2500,  0.0000])

    Source: L. Condat, Fast projection onto the simplex and the l1 ball, 2016, section 2.
    """
    return on_vectors(_onto_l1_ball, x, per_element("radius", radius, at_least=0), dim=dim)


def _onto_simplex(x: Tensor, rho: Number) -> Tensor:
    rho = as_column(rho, x)
    (active,) = identify(_active, x, rho, ndims=(1, 1), found_ndims=(1,))
    return torch.where(active, x - threshold(x, rho, active), 0)


def _onto_l1_ball(x: Tensor, rho: Number) -> Tensor:
    rho = as_column(rho, x)
    active, inside = identify(_active_magnitudes, x, rho, ndims=(1, 1), found_ndims=(1, 1))
    tau = torch.where(inside, 0, threshold(x.abs(), rho, active))
    return torch.where(active, x - x.sign() * tau, 0)


def as_column(number: Number, x: Tensor) -> Tensor:
    """A number for each element as ``(*batch, 1)`` or ``(1,)``."""
    return number if isinstance(number, Tensor) else x.new_full((1,), number)


def threshold(x: Tensor, rho: Tensor, active: Tensor) -> Tensor:
    """What to subtract from the `active` entries, so that they sum to `rho`: ``(*batch, 1)``."""
    count = active.sum(-1, keepdim=True).clamp_min(1)
    return (torch.where(active, x, 0).sum(-1, keepdim=True) - rho) / count


def _active(x: Tensor, rho: Tensor) -> tuple[Tensor, ...]:
    """The entries above the threshold: exactly those with ``x > threshold(x, rho, active)``."""
    if not x.numel():
        return (torch.zeros_like(x, dtype=torch.bool),)
    # tau >= max(x) - rho, since no entry of the projection is larger than rho; Newton moves right from there
    active = x > x.amax(-1, keepdim=True) - rho
    count = active.sum(-1)
    for _ in range(x.shape[-1]):
        active = active & (x > threshold(x, rho, active))
        before, count = count, active.sum(-1)
        if bool((count == before).all()):  # the one read-back of a step; seldom more than ten
            break
    return (active,)


def _active_magnitudes(x: Tensor, rho: Tensor) -> tuple[Tensor, ...]:
    a = x.abs()
    inside = a.sum(-1, keepdim=True) <= rho
    return _active(a, rho)[0] | inside, inside
