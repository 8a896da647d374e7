"""Continuity between experts: one least-squares problem for all of them, with rows on their seams."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._assembly import Assembly, Recipe, averaging, root_mean_square
from ._derivatives import Basis
from ._divided import Divided
from ._exact_rows import independent_rows
from ._gates import Seam
from ._samplers import Place


@dataclass(frozen=True)
class Continuity:
    """Neighbouring experts agree on their seams.

    All experts become one problem of ``E K`` coefficients, whose cost grows with the square of the number of experts
    beside that of separate ones; if it fails, it fails for all of them.

    Args:
        order: 0: the field; 1: its derivative across the seam, too, times the mean width of the two boxes.
        weight: Factor of the rows, at least 0, as those of conditions are weighted.
        exact: The rows hold exactly. With as many points on a seam as there are basis functions the experts beside it
            are the same in general: take few.
        points: On every seam, drawn as :class:`Sobol` does; None: as many as its faces have, 32 beside :class:`Fixed`.
            A seam in one dimension is a point, and on a grid the first nodes of the upper box.

    Raises:
        ValueError: For numbers out of their range.

    Example:
        >>> from difflayers.pde import Continuity
        >>> Continuity(order=1, weight=10.0)
        Continuity(order=1, weight=10.0, exact=False, points=None)

    Source: A. D. Jagtap, G. E. Karniadakis, Extended physics-informed neural networks (XPINNs), 2020.
    """

    order: int = 0
    weight: float = 1.0
    exact: bool = False
    points: int | None = None

    def __post_init__(self) -> None:
        if self.order not in (0, 1):
            raise ValueError(f"order: expected 0 or 1, got {self.order!r}")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight: expected a number of at least 0, got {self.weight!r}")
        if self.points is not None and (not isinstance(self.points, int) or self.points < 1):
            raise ValueError(f"points: expected an integer of at least 1, got {self.points!r}")


@dataclass(frozen=True)
class Seams:
    """The seams of experts with the points on them.

    Attributes:
        recipe: Equation and derivatives.
        sampler: Chooses the points.
        seams: The pairs of neighbours.
    """

    recipe: Recipe
    sampler: Divided
    seams: tuple[Seam, ...]

    def across(self, points: int | None, like: Tensor) -> Iterator[tuple[int, list[int], tuple[Place, Place]]]:
        """For each coordinate with seams: its index, the seams, their points for the expert below and above."""
        pde = self.recipe.pde
        for axis, coordinate in enumerate(pde.coords):
            some = [i for i, s in enumerate(self.seams) if s.coordinate == coordinate]
            if some:
                yield axis, some, self.sampler.seam(pde, [self.seams[i] for i in some], axis, points, like)

    def rows(
        self, basis: Basis, offset: Basis | None, rule: Continuity, like: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Rows that say that both sides agree.

        Returns:
            Rows ``(*batch, R, E, K)``, right-hand sides ``(*batch, R)``, weights ``(R)`` that average those of a seam,
            and the name of every row.
        """
        pde, rows, rights, weights, names = self.recipe.pde, [], [], [], []
        experts = torch.arange(self.sampler.tiling.count, device=like.device)
        for axis, some, sides in self.across(rule.points, like):
            coordinate = pde.coords[axis]
            terms = [f + "_" * (k > 0) + k * coordinate for k in range(rule.order + 1) for f in pde.fields]
            sums, gaps = [], []
            for place, sign, end in zip(sides, (1.0, -1.0), ("lower", "upper"), strict=True):
                B = self.recipe.derivatives.terms(basis, place, pde, terms)  # (*batch, S, m, T, K)
                owner = torch.tensor([getattr(self.seams[i], end) for i in some], device=like.device)
                mine = sign * (owner.unsqueeze(-1) == experts).to(like)
                sums.append(B.unsqueeze(-2) * mine[:, None, None, :, None])
                if offset is not None:
                    gaps.append(-sign * self.recipe.offset_terms(offset, place, terms))
            # a slope times the width of a box is of the size of the field
            width = like.new_tensor([self.sampler.tiling.width(self.seams[i], axis) for i in some])
            size = torch.cat([width.unsqueeze(-1) ** k for k in range(rule.order + 1) for _ in pde.fields], -1)
            A = (sums[0] + sums[1]) * size[:, None, :, None, None]  # (*batch, S, m, T, E, K)
            shape = A.shape[-5:-2]
            average = averaging(sides[0].present, sides[0].points[..., 0]).expand(shape[:-1])
            if sides[0].present is not None:
                A = torch.where(sides[0].present[..., None, None, None], A, 0)
            apart = gaps and sides[0] is not sides[1]
            right = (gaps[0] + gaps[1]) * size.unsqueeze(1) if apart else like.new_zeros(shape)
            rows.append(A.flatten(-5, -3))
            rights.append(right.flatten(-3))
            weights.append(average.unsqueeze(-1).expand(shape).flatten())
            for i in some:
                names += [f"continuity across {coordinate}={self.seams[i].at:g}"] * shape[1:].numel()
        return _cat(rows, 3), _cat(rights, 1), torch.cat(weights), names

    @torch.no_grad()
    def jumps(self, basis: Basis, offset: Basis | None, w: Tensor) -> Tensor:
        """``(*batch, S)`` root mean squares of what the field ``(*batch, E, K)`` jumps by on the seams."""
        pde, found = self.recipe.pde, dict[int, Tensor]()
        for _, some, sides in self.across(None, w):
            values = []
            for place, end in zip(sides, ("lower", "upper"), strict=True):
                owner = torch.tensor([getattr(self.seams[i], end) for i in some], device=w.device)
                B = self.recipe.derivatives.terms(basis, place, pde, pde.fields)
                u = (B * w.index_select(-2, owner)[..., None, None, :]).sum(-1)  # (*batch, S, m, Q)
                values.append(u if offset is None else u + self.recipe.offset_terms(offset, place, pde.fields))
            sizes = root_mean_square(torch.linalg.vector_norm(values[0] - values[1], dim=-1), sides[0].present)
            found |= dict(zip(some, sizes.unbind(-1), strict=True))
        return torch.stack([found[i] for i in range(len(self.seams))], -1) if found else w.new_zeros(*w.shape[:-2], 0)


def _cat(parts: list[Tensor], event: int) -> Tensor:
    batch = torch.broadcast_shapes(*(p.shape[: p.ndim - event] for p in parts))
    return torch.cat([p.expand(*batch, *p.shape[p.ndim - event :]) for p in parts], -event)


def _both(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Rows ``(*batch, R, E K)``, and vectors of a number for each, behind each other."""
    return tuple(_cat([a, b], 1 if i else 2) for i, (a, b) in enumerate(zip(first, second, strict=True)))


def joint_call(
    parts: Assembly,
    ridge: float,
    init: Tensor | None,
    rows: tuple[Tensor, Tensor, Tensor, list[str]],
    rule: Continuity,
) -> tuple[Any, ...]:
    """The arguments of :func:`residual_least_squares` for all experts as one element with ``E K`` coefficients."""
    A, y, average, names = rows
    E, N = A.shape[-2], parts.B.shape[-3]
    terms, residual, params, offset, weights, soft, exact, *rest = parts.call(
        ridge, None if init is None else init.flatten(-2)
    )
    own = torch.eye(E, dtype=A.dtype, device=A.device)

    def apart(t: Tensor) -> Tensor:
        """``(*batch, E, n, K)`` as the blocks of ``(*batch, E n, E K)``."""
        t = t.expand(*t.shape[:-3], E, *t.shape[-2:])
        return (t.unsqueeze(-2) * own[:, None, :, None]).flatten(-2).flatten(-3, -2)

    def chain(t: Any, n: int) -> Any:
        """``(*batch, E, n)`` as ``(*batch, E n)``; numbers, and one entry for all points, as they are."""
        if not isinstance(t, Tensor) or t.ndim == 0:
            return t
        if t.ndim > 1 and t.shape[-2:] == (1, 1) and n > 1:
            return t.squeeze(-1)
        return t.expand(*t.shape[:-2], E, n).flatten(-2)

    weight = rule.weight / max(parts.recipe.pde.scale(f) for f in parts.recipe.pde.fields)
    seam = A.flatten(-2), y, weight * average
    if soft is not None:
        m = soft[0].shape[-2]
        soft = apart(soft[0]), chain(soft[1], m), chain(soft[2], m)
    if exact is not None:
        exact = apart(exact[0]), chain(exact[1], exact[0].shape[-2])
    if not rule.exact:
        soft = seam if soft is None else _both(soft, seam)
    else:
        before = [] if exact is None else ["an exact condition"] * exact[0].shape[-2]
        C, d = seam[:2] if exact is None else _both(exact, seam[:2])
        batch = torch.broadcast_shapes(C.shape[:-2], d.shape[:-1])
        exact = independent_rows(C.expand(*batch, *C.shape[-2:]), d.expand(*batch, d.shape[-1]), before + names)
    return (
        {n: apart(t) for n, t in terms.items()},
        residual,
        {n: chain(t, N) for n, t in params.items()},
        None if offset is None else {n: chain(t, N) for n, t in offset.items()},
        chain(weights, N),
        soft,
        exact,
        *rest,
    )
