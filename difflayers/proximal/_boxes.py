r"""Projections entry by entry: boxes, the non-negative orthant, the ball of the largest absolute value.

.. math:: P(x)_i = \min(\max(x_i, l_i), u_i)

N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.2.4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._operands import Number, check_that, on_vectors, optional, per_element, per_entry, shown
from ._pieces import clip


def project_box(x: Tensor, lower: Number | None, upper: Number | None, *, dim: int = -1) -> Tensor:
    """The nearest point with every entry between its bounds.

    Solves ``argmin_z 1/2 ||z - x||^2 s.t. lower <= z <= upper``.

    Args:
        x: Any shape.
        lower: A number, or a tensor that broadcasts with `x`; None: no bound.
        upper: The same, not less than `lower`.
        dim: The dimension of one vector (of use only for bounds of fewer dimensions than `x`).

    Returns:
        The projection, shaped like `x`.

    Raises:
        ValueError: For NaN or ``lower > upper`` somewhere (the set is empty), a shape that does not broadcast, or a
            dtype that is not floating point.

    Differentiable in `x`, `lower` and `upper`, to any order. Where an entry just reaches a bound the derivative is that
    of the bound.

    Example:
        >>> import torch
        >>> project_box(torch.tensor([3.0, -2.0, 0.5]), -1.0, 1.0)
        tensor([ 1.0000, -1.0000,  0.5000])

    Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.2.4.
    """
    operands = optional(per_entry("lower", lower)), optional(per_entry("upper", upper))
    return on_vectors(_onto_box, x, *operands, dim=dim)


def project_nonnegative(x: Tensor, *, dim: int = -1) -> Tensor:
    """The nearest point without negative entries.

    Solves ``argmin_z 1/2 ||z - x||^2 s.t. z >= 0``.

    Args:
        x: Any shape.
        dim: The dimension of one vector (any gives the same).

    Returns:
        The projection ``max(x, 0)``, shaped like `x`.

    Raises:
        ValueError: For a dtype that is not floating point.

    Differentiable in `x`, to any order. At zero the derivative is zero.

    Example:
        >>> import torch
        >>> project_nonnegative(torch.tensor([3.0, -2.0]))
        tensor([3., 0.])

    Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.2.4.
    """
    return on_vectors(torch.relu, x, dim=dim)


def project_linf_ball(x: Tensor, radius: Number = 1.0, *, dim: int = -1) -> Tensor:
    """The nearest point whose entries are at most `radius` in absolute value.

    Solves ``argmin_z 1/2 ||z - x||^2 s.t. max_i |z_i| <= radius``.

    Args:
        x: Any shape.
        radius: At least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        dim: The dimension of one vector.

    Returns:
        The projection, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `radius` (the set is empty), a shape that does not broadcast, or a dtype that
            is not floating point.

    Differentiable in `x` and `radius`, to any order. Where an entry just reaches the bound the derivative is that of
    the bound.

    Example:
        >>> import torch
        >>> project_linf_ball(torch.tensor([3.0, -2.0, 0.5]))
        tensor([ 1.0000, -1.0000,  0.5000])

    Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.2.4.
    """
    return on_vectors(lambda x, rho: clip(x, -rho, rho), x, per_element("radius", radius, at_least=0), dim=dim)


def _onto_box(x: Tensor, lower: Any, upper: Any) -> Tensor:
    lower, upper = -math.inf if lower is None else lower, math.inf if upper is None else upper
    check_that(lower <= upper, lambda: f"upper: expected at least lower, {shown(lower)}, got {shown(upper)}")
    return clip(x, lower, upper)
