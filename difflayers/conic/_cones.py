r"""Cones as small objects, and the simple ones: zero, free, non-negative, and products.

A cone knows the Euclidean projections on itself and on its dual cone, the radial projection, the distance of a point,
and its dual. With :math:`K^* = \{y : y^T x \ge 0 \text{ for all } x \in K\}`, Moreau's decomposition says

.. math:: x = P_K(x) - P_{K^*}(-x), \qquad P_K(x) \perp P_{K^*}(-x) .

J. J. Moreau, Décomposition orthogonale d'un espace hilbertien selon deux cônes mutuellement polaires, 1962.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from difflayers._checks import check_tensor
from difflayers.proximal._operands import check_that, on_matrices, on_vectors, per_event


class Cone(ABC):
    """A closed convex cone; a batch of points goes through each method at once.

    Subclasses state the cone's convention, which is CVXPY's. All of them are frozen: equal, hashable, picklable.

    Attributes:
        ndim: Trailing dimensions that make one point: 1, or 2 for matrices.
    """

    ndim: ClassVar[int] = 1

    # ------------------------------------------------------------------------------------------------- for everybody

    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the cone.

        Solves ``argmin_z 1/2 ||z - x||^2 s.t. z in K``.

        Args:
            x: ``(*batch, n)``, or ``(*batch, n, n)`` for matrices.

        Returns:
            The projection, shaped like `x`, in its dtype.

        Raises:
            ValueError: For a shape that does not fit the cone, or a dtype that is not floating point.

        Differentiable in `x`; the class says to which order, and which derivative is meant at a kink.

        Example:
            >>> import torch
            >>> from difflayers.conic import SecondOrder
            >>> SecondOrder().project(torch.tensor([1.0, 3.0, 4.0]))
            tensor([3.0000, 1.8000, 2.4000])

        Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.3.
        """
        return self._over_batch(self._onto, x)

    def project_dual(self, x: Tensor) -> Tensor:
        """The nearest point of the dual cone, ``dual().project(x)``.

        Solves ``argmin_z 1/2 ||z - x||^2 s.t. z in K*``.

        Args:
            x: ``(*batch, n)``, or ``(*batch, n, n)`` for matrices.

        Returns:
            The projection, shaped like `x`, in its dtype. ``x == project(x) - project_dual(-x)``.

        Raises:
            ValueError: For a shape that does not fit the cone, or a dtype that is not floating point.

        Differentiable in `x` as :meth:`project` is.

        Example:
            >>> import torch
            >>> from difflayers.conic import Zero
            >>> Zero().project_dual(torch.tensor([1.0, -2.0]))
            tensor([ 1., -2.])

        Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.3.
        """
        return self._over_batch(self.dual()._onto, x)

    def radial_project(self, x: Tensor, direction: Tensor | None = None) -> Tensor:
        """The first point of the cone that is met on the way from `x` along `direction`.

        Solves ``x + t * direction`` with ``min_t t s.t. t >= 0, x + t * direction in K``. Cheaper than
        :meth:`project`; points of the cone stay where they are.

        Args:
            x: ``(*batch, n)``, or ``(*batch, n, n)`` for matrices.
            direction: A point in the interior of the cone: the shape of one point, or the same behind dimensions that
                broadcast to the batch. None: the direction that the class names.

        Returns:
            The point, shaped like `x`, in its dtype.

        Raises:
            ValueError: For a shape that does not fit the cone, a dtype that is not floating point, or a `direction`
                that is not in the interior (of a tensor this reads one flag, never in a compiled graph).

        Differentiable in `x` and `direction`; on the boundary of the cone the derivative is that of the inside.

        Example:
            >>> import torch
            >>> from difflayers.conic import SecondOrder
            >>> SecondOrder().radial_project(torch.tensor([1.0, 3.0, 4.0]))
            tensor([5., 3., 4.])

        Source: M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024.
        """
        self._check(x)
        if direction is None:
            return self._over_batch(lambda x: self._along(x, None), x)
        inner = lambda x, d: self._along(x, self._checked(d).expand_as(x))  # noqa: E731
        operand = per_event("direction", direction, tuple(x.shape[-self.ndim :]))
        return on_vectors(inner, x, operand) if self.ndim == 1 else on_matrices(inner, x, operand)

    def violation(self, x: Tensor) -> Tensor:
        """The Euclidean distance to the cone, ``||x - project(x)||``.

        Args:
            x: ``(*batch, n)``, or ``(*batch, n, n)`` for matrices.

        Returns:
            ``(*batch)``, exactly 0 for points of the cone. Computed as the norm of ``project_dual(-x)``, so that next
            to the cone it has digits of its own.

        Raises:
            ValueError: For a shape that does not fit the cone, or a dtype that is not floating point.

        Differentiable in `x`; zero at points of the cone, its boundary included.

        Example:
            >>> import torch
            >>> from difflayers.conic import NonNegative
            >>> NonNegative().violation(torch.tensor([[1.0, -3.0, -4.0], [1.0, 0.0, 2.0]]))
            tensor([5., 0.])
        """
        return self._over_batch(self._distance, x)

    @abstractmethod
    def dual(self) -> Cone:
        """The dual cone, ``{y : <y, x> >= 0 for all x in K}``; a cone that is its own dual returns itself."""

    # ------------------------------------------------------------------------------------- what a cone has to know

    @abstractmethod
    def _onto(self, x: Tensor) -> Tensor:
        """The projection, on the last `ndim` dimensions."""

    @abstractmethod
    def _along(self, x: Tensor, direction: Tensor | None) -> Tensor:
        """The radial projection, for a direction in the interior."""

    @abstractmethod
    def _in_interior(self, x: Tensor) -> Tensor:
        """``(*batch)``: which points lie in the interior; of constants."""

    def _event(self, size: int) -> tuple[int, ...]:
        """The shape of one point of `size` numbers; refuses a size that does not fit."""
        return (size,)

    def _distance(self, x: Tensor) -> Tensor:
        away = self.dual()._onto(-x)
        return length(away if self.ndim == 1 else away.flatten(-2)).squeeze(-1)

    # ------------------------------------------------------------------------------------------------------- checks

    def _check(self, x: Tensor) -> None:
        check_tensor("x", x, min_ndim=self.ndim)
        event = tuple(x.shape[-self.ndim :])
        try:
            expected = self._event(math.prod(event))
        except ValueError as error:
            raise ValueError(f"x: {error}, got shape {tuple(x.shape)}") from None
        if event != expected:
            raise ValueError(f"x: expected square matrices, got shape {tuple(x.shape)}")

    def _over_batch(self, formula: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self._check(x)
        return on_vectors(formula, x) if self.ndim == 1 else on_matrices(formula, x)

    def _checked(self, direction: Tensor) -> Tensor:
        check_that(
            self._in_interior(direction.detach()),
            lambda: f"direction: expected points in the interior of {self}, got one that is not",
        )
        return direction


@dataclass(frozen=True)
class Zero(Cone):
    """The point zero, ``{0}``: equations. Its dual is :class:`Free`.

    There is no interior: the radial projection is zero, whatever the direction.

    Example:
        >>> import torch
        >>> Zero().violation(torch.tensor([3.0, 4.0]))
        tensor(5.)
    """

    def dual(self) -> Cone:
        """All of space."""
        return Free()

    def _onto(self, x: Tensor) -> Tensor:
        return torch.where(torch.isnan(x), x, 0)

    def _along(self, x: Tensor, direction: Tensor | None) -> Tensor:
        return self._onto(x)

    def _in_interior(self, x: Tensor) -> Tensor:
        return torch.ones_like(x[..., 0], dtype=torch.bool)


@dataclass(frozen=True)
class Free(Cone):
    """All of space: no constraint. Its dual is :class:`Zero`.

    Example:
        >>> import torch
        >>> Free().project(torch.tensor([3.0, -4.0]))
        tensor([ 3., -4.])
    """

    def dual(self) -> Cone:
        """The point zero."""
        return Zero()

    def _onto(self, x: Tensor) -> Tensor:
        return x.clone()

    def _along(self, x: Tensor, direction: Tensor | None) -> Tensor:
        return x.clone()

    def _in_interior(self, x: Tensor) -> Tensor:
        return torch.ones_like(x[..., 0], dtype=torch.bool)


@dataclass(frozen=True)
class NonNegative(Cone):
    """Points without negative entries, ``x >= 0``; its own dual.

    Default direction: all entries 1. Differentiable to any order; at a kink, an entry equal to zero, the derivative of
    the projection is zero. Where several entries are the smallest, that of the radial projection is shared between
    them.

    Example:
        >>> import torch
        >>> NonNegative().project(torch.tensor([3.0, -4.0]))
        tensor([3., 0.])
        >>> NonNegative().radial_project(torch.tensor([3.0, -4.0]))
        tensor([7., 0.])
    """

    def dual(self) -> NonNegative:
        """The cone itself."""
        return self

    def _onto(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def _along(self, x: Tensor, direction: Tensor | None) -> Tensor:
        d = torch.ones_like(x) if direction is None else direction
        if not x.shape[-1]:
            return x.clone()
        # what lands on zero does so without rounding
        moved = x + torch.relu((-x / d).amax(-1, keepdim=True)) * d
        return torch.where(moved >= 0, moved, moved - moved.detach())

    def _in_interior(self, x: Tensor) -> Tensor:
        return (x > 0).all(-1)


@dataclass(frozen=True)
class Product(Cone):
    """A product of cones: consecutive blocks of entries, each in a cone of its own.

    Each block is projected on its own cone, radially too: along its own direction, as far as it needs. Equal cones of
    equal size that stand side by side are handled in one go.

    Args:
        parts: Pairs ``(cone, dim)``: the cone, and how many entries belong to it. A block of
            ``PositiveSemidefinite`` has ``n * n`` entries, the rows of a matrix one after the other.

    Raises:
        ValueError: For a number of entries that does not fit its cone.

    Example:
        >>> import torch
        >>> from difflayers.conic import SecondOrder
        >>> cone = Product([(NonNegative(), 2), (SecondOrder(), 3)])
        >>> cone.project(torch.tensor([1.0, -1.0, 1.0, 3.0, 4.0]))
        tensor([1.0000, 0.0000, 3.0000, 1.8000, 2.4000])
    """

    parts: Sequence[tuple[Cone, int]]

    def __post_init__(self) -> None:
        parts = []
        for i, part in enumerate(self.parts):
            if len(part) != 2 or not isinstance(part[0], Cone):
                raise ValueError(f"parts[{i}]: expected a cone and a number of entries, got {part}")
            cone, dim = part
            parts.append((cone, dim))
            if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
                raise ValueError(f"parts[{i}]: expected at least 1 entry, got {dim!r}")
            try:
                cone._event(dim)
            except ValueError as error:
                raise ValueError(f"parts[{i}]: {error}, got {dim}") from None
        object.__setattr__(self, "parts", tuple(parts))

    def dual(self) -> Product:
        """The product of the dual cones."""
        return Product([(cone.dual(), dim) for cone, dim in self.parts])

    def _event(self, size: int) -> tuple[int, ...]:
        expected = sum(dim for _, dim in self.parts)
        if size != expected:
            raise ValueError(f"expected {expected} entries for {len(self.parts)} parts")
        return (size,)

    def _runs(self) -> Iterator[tuple[Cone, int, int]]:
        """Cone, size of a block, and how many such blocks follow each other."""
        for (cone, dim), run in itertools.groupby(self.parts):
            yield cone, dim, sum(1 for _ in run)

    def _blocks(self, x: Tensor) -> list[Tensor]:
        """One tensor a run, ``(*batch, count, event...)``."""
        runs = list(self._runs())
        pieces = x.split([dim * count for _, dim, count in runs], -1)
        return [p.unflatten(-1, (count, *c._event(dim))) for p, (c, dim, count) in zip(pieces, runs, strict=True)]

    def _on_blocks(self, formula: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        """``formula(cone, *blocks)`` on every run, put together again."""
        if not self.parts:
            return xs[0].clone()
        # a list: where a cone breaks the graph, Dynamo of torch 2.6 cannot carry `zip(strict=True)` over the break
        runs = list(zip(self._runs(), *map(self._blocks, xs), strict=True))
        done = [formula(cone, *b) for (cone, *_), *b in runs]
        return torch.cat([z.flatten(-1 - cone.ndim) for z, (cone, *_) in zip(done, self._runs(), strict=True)], -1)

    def _onto(self, x: Tensor) -> Tensor:
        return self._on_blocks(lambda cone, x: cone._onto(x), x)

    def _along(self, x: Tensor, direction: Tensor | None) -> Tensor:
        if direction is None:
            return self._on_blocks(lambda cone, x: cone._along(x, None), x)
        return self._on_blocks(lambda cone, x, d: cone._along(x, d), x, direction)

    def _in_interior(self, x: Tensor) -> Tensor:
        runs = list(zip(self._runs(), self._blocks(x), strict=True))  # a list, as above
        inside = [c._in_interior(b).all(-1) for (c, *_), b in runs]
        return torch.stack(inside, -1).all(-1)


# -------------------------------------------------------------------------------------------- what all formulas share


def scale_of(x: Tensor) -> Tensor:
    """``(*batch, 1)`` power of two next to the largest magnitude of each point, a constant; 1 where there is none.

    A cone does not change when its points are scaled, so a formula may be evaluated at numbers around 1: no square
    underflows or overflows, and a power of two rounds nothing.
    """
    if not x.shape[-1]:
        return x.new_ones((*x.shape[:-1], 1))
    size = x.detach().abs().amax(-1, keepdim=True)
    return torch.where((size > 0) & torch.isfinite(size), size / (2 * torch.frexp(size)[0]), 1)


def length(x: Tensor) -> Tensor:
    """``(*batch, 1)`` Euclidean norm of the last dimension at any scale; at zero its derivative is zero."""
    size = scale_of(x)
    y = x / size
    zero = (y.detach() == 0).all(-1, keepdim=True)
    return torch.where(zero, 0, torch.linalg.vector_norm(torch.where(zero, 1, y), dim=-1, keepdim=True) * size)
