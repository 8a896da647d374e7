"""Costs between the points of two clouds, with right derivatives where points coincide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_same, check_shape, check_tensor
from difflayers.linalg._autodiff import autocast_off


class Cost(Protocol):
    """``(x, y) -> (*batch, n, m)`` for points ``(*batch, n, d)`` and ``(*batch, m, d)``. A frozen dataclass."""

    def __hash__(self) -> int: ...

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The cost of every pair."""


@dataclass(frozen=True)
class SquaredEuclidean:
    """``|x - y|^2``, without a half.

    Example:
        >>> import torch
        >>> from difflayers.transport import SquaredEuclidean
        >>> SquaredEuclidean()(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0]]))
        tensor([[0., 9.],
                [1., 4.]])
    """

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The cost of every pair.

        Args:
            x: ``(*batch, n, d)``.
            y: ``(*batch, m, d)``.

        Returns:
            ``(*batch, n, m)``, exact to rounding of the squared size of the clouds.
        """
        check_points(x, y)
        with autocast_off(x):
            # moving both clouds changes nothing, and spares the digits that a far origin would cost
            origin = y.detach().mean(-2, keepdim=True)
            x, y = x - origin, y - origin
            sums = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
            return sums - 2 * (x @ y.mT)


@dataclass(frozen=True)
class Euclidean:
    """``|x - y|``; where points coincide its derivative counts as zero, the middle of the subdifferential.

    Keeps the differences of all pairs, ``(*batch, n, m, d)``, for the derivative.

    Example:
        >>> import torch
        >>> from difflayers.transport import Euclidean
        >>> Euclidean()(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        tensor([[0., 5.]])
    """

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The cost of every pair.

        Args:
            x: ``(*batch, n, d)``.
            y: ``(*batch, m, d)``.

        Returns:
            ``(*batch, n, m)``.
        """
        check_points(x, y)
        difference = x.unsqueeze(-2) - y.unsqueeze(-3)
        size = _size(difference)  # so that squares neither vanish nor overflow
        square = (difference / size.unsqueeze(-1)).square().sum(-1)
        apart = square != 0  # NaN is none
        return torch.where(apart, torch.where(apart, square, 1).sqrt(), 0) * size


@dataclass(frozen=True)
class Cosine:
    """``1 - cos(x, y)``, between 0 and 2; a point at the origin is orthogonal to all others, with derivative zero.

    Example:
        >>> import torch
        >>> from difflayers.transport import Cosine
        >>> Cosine()(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
        tensor([[0., 1., 2.]])
    """

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The cost of every pair.

        Args:
            x: ``(*batch, n, d)``.
            y: ``(*batch, m, d)``.

        Returns:
            ``(*batch, n, m)``.
        """
        check_points(x, y)
        with autocast_off(x):
            return 1 - _direction(x) @ _direction(y).mT


def _size(v: Tensor) -> Tensor:
    """The largest entry, as a constant; 1 for zeros."""
    size = v.detach().abs().amax(-1) if v.shape[-1] else v.new_zeros(v.shape[:-1])
    return torch.where(size > 0, size, 1)


def _direction(x: Tensor) -> Tensor:
    """Unit vectors; zeros of zeros."""
    x = x / _size(x).unsqueeze(-1)
    square = x.square().sum(-1, keepdim=True)
    some = square != 0
    return torch.where(some, x * torch.where(some, square, 1).rsqrt(), 0)


def check_points(x: Tensor, y: Tensor) -> None:
    """Refuses what is no pair of clouds of one dimension."""
    check_tensor("x", x, min_ndim=2)
    check_tensor("y", y, min_ndim=2)
    check_same([("x", x), ("y", y)])
    check_shape("y", y.shape[-1:], x.shape[-1:], " in its last dimension as x has")
    broadcast_batch([("x", tuple(x.shape[:-2])), ("y", tuple(y.shape[:-2]))])


def cost_of_pairs(cost: Cost, x: Tensor, y: Tensor) -> Tensor:
    """The cost of every pair, of the right shape; only NaN for elements that are not finite, see :func:`confined`."""
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    (x, of_x), (y, of_y) = confined(x, 2), confined(y, 2)
    costs = cost(x, y)
    check_shape("cost", tuple(costs.shape), (*batch, x.shape[-2], y.shape[-2]), " for every pair of points")
    return costs + (of_x + of_y)[..., None, None]


def confined(t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """Zeros for elements that hold NaN or Inf, and what is to be added to their results: NaN, and 0 for the others.

    So their cotangent, if it is zero, does not reach what they share with others as 0 * NaN; if it is NaN, it reaches
    what they have of their own.
    """
    bad = ~torch.isfinite(t).flatten(t.ndim - ndim).all(-1)
    return torch.where(bad[(..., *(None,) * ndim)], 0, t), torch.where(bad, t.flatten(t.ndim - ndim).sum(-1) * 0, 0)
