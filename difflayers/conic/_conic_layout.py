r"""How the rows of a conic program are laid out for its solver: sorted by kind of cone, an isometry away from the user.

Every row here is a combination of at most two rows of the user. The off-diagonal entries (i, j) and (j, i) of a matrix
become one, their sum over :math:`\sqrt 2`; the first two rows of a rotated second-order cone are turned by 45 degrees.
So cones stay cones, projections stay projections, and the isometry's transpose takes multipliers back.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._cones import Cone, Free, NonNegative, Product, Zero
from ._exponential import DualExponential, Exponential
from ._positive_semidefinite import PositiveSemidefinite
from ._power import DualPower, Power
from ._second_order import RotatedSecondOrder, SecondOrder

ORDER: tuple[type, ...] = (
    *(Zero, NonNegative, SecondOrder, PositiveSemidefinite),
    *(Exponential, DualExponential, Power, DualPower, Free),
)
TINY = torch.finfo(torch.float64).tiny


class Block(NamedTuple):
    """Equal cones of equal size, one after the other; a matrix is the upper half of its columns, `dim` numbers."""

    cone: Cone
    dim: int
    times: int

    @property
    def size(self) -> int:
        """Rows."""
        return self.dim * self.times

    @property
    def side(self) -> int:
        """Rows of one matrix."""
        return (math.isqrt(8 * self.dim + 1) - 1) // 2


Layout = tuple[Block, ...]


@dataclass(frozen=True)
class Isometry:
    """``T`` of the two rows `first` and `second` with weights `a` and `b`; and of its transpose, in the same form."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]

    def apply(self, t: Tensor, dim: int) -> Tensor:
        """``T t`` along `dim`, -1 or -2."""
        rows = lambda index: t.index_select(dim, torch.tensor(index, device=t.device))  # noqa: E731
        column = lambda w: torch.tensor(w, dtype=t.dtype, device=t.device)[(...,) + (None,) * (-1 - dim)]  # noqa: E731
        if not any(self.b):
            return rows(self.first) if set(self.a) == {1.0} else column(self.a) * rows(self.first)
        return column(self.a) * rows(self.first) + column(self.b) * rows(self.second)


def of_cones(parts: Iterable[tuple[Cone, int]]) -> tuple[Layout, Isometry | None, Isometry | None]:
    """The layout of the user's cones, the isometry that leads there (None: no change), and its transpose."""
    pieces = sorted(_pieces(parts), key=lambda piece: _rank(piece[0]))
    layout = grouped([(cone, len(rows)) for cone, rows in pieces])
    rows = [row for _, piece in pieces for row in piece]
    m = 1 + max((max(i, j) for i, j, _, _ in rows), default=-1)
    if rows == [(i, i, 1.0, 0.0) for i in range(m)]:
        return layout, None, None
    back: list[list[tuple[int, float]]] = [[] for _ in range(m)]
    for k, (i, j, a, b) in enumerate(rows):
        back[i].append((k, a))
        if b:
            back[j].append((k, b))
    there = Isometry(*zip(*rows, strict=True))
    pairs = [(*entries, (entries[0][0], 0.0))[:2] for entries in back]
    return layout, there, Isometry(
        tuple(p[0] for p, _ in pairs), tuple(q[0] for _, q in pairs),
        tuple(p[1] for p, _ in pairs), tuple(q[1] for _, q in pairs),
    )  # fmt: skip


Row = tuple[int, int, float, float]


def _pieces(parts: Iterable[tuple[Cone, int]], start: int = 0) -> list[tuple[Cone, list[Row]]]:
    """One cone a piece, and its rows as combinations of those of the user."""
    out: list[tuple[Cone, list[Row]]] = []
    root = math.sqrt(0.5)
    for cone, dim in parts:
        own: list[Row] = [(i, i, 1.0, 0.0) for i in range(start, start + dim)]
        if isinstance(cone, Product):
            out += _pieces(cone.parts, start)
        elif isinstance(cone, Zero | Free | NonNegative):
            out += [(cone, [row]) for row in own]
        elif isinstance(cone, PositiveSemidefinite):
            k = math.isqrt(dim)
            at = lambda i, j, start=start, k=k: start + i * k + j  # noqa: E731
            halves = [
                (at(i, i), at(i, i), 1.0, 0.0) if i == j else (at(i, j), at(j, i), root, root)
                for j in range(k)
                for i in range(j + 1)
            ]
            out.append((cone, halves))
        elif isinstance(cone, RotatedSecondOrder):
            turned = [(start, start + 1, root, root), (start, start + 1, root, -root), *own[2:]]
            out.append((SecondOrder(), turned))
        elif isinstance(cone, SecondOrder) and dim == 1:
            out.append((NonNegative(), own))
        else:
            out.append((cone, own))
        start += dim
    return out


def _rank(cone: Cone) -> int:
    for rank, kind in enumerate(ORDER):
        if isinstance(cone, kind):
            return rank
    raise ValueError(f"cones: expected cones of difflayers.conic, got {cone}")


def grouped(parts: Sequence[tuple[Cone, int]]) -> Layout:
    """Equal cones that follow each other as blocks; the size of a matrix is that of its half."""
    return tuple(Block(cone, dim, sum(1 for _ in run)) for (cone, dim), run in itertools.groupby(parts))


# --------------------------------------------------------------------------------------------------------- projections


def project(layout: Layout, v: Tensor, dual: bool = False) -> Tensor:
    """The projection on the product of the cones, or of their duals: plain torch, batch dimensions in front."""
    if not layout:
        return v.clone()
    pieces = v.split([block.size for block in layout], -1)
    return torch.cat([_onto(block, piece, dual) for block, piece in zip(layout, pieces, strict=True)], -1)


def _onto(block: Block, v: Tensor, dual: bool) -> Tensor:
    cone = block.cone.dual() if dual else block.cone
    if block.dim == 1 and not isinstance(cone, PositiveSemidefinite):
        return cone._onto(v)
    v = v.unflatten(-1, (block.times, block.dim))
    if isinstance(cone, PositiveSemidefinite):
        return to_half(cone._onto(to_matrix(v, block.side))).flatten(-2)
    return cone._onto(v).flatten(-2)


def to_matrix(h: Tensor, k: int) -> Tensor:
    """``(..., k (k + 1) / 2)`` scaled upper halves to symmetric matrices."""
    place, weight = _places(k)
    index = torch.tensor(place, device=h.device)
    scale = torch.tensor(weight, dtype=h.dtype, device=h.device)
    return (h[..., index] * scale).unflatten(-1, (k, k))


def to_half(X: Tensor) -> Tensor:
    """The inverse, for symmetric matrices."""
    k = X.shape[-1]
    index = torch.tensor([i * k + j for j in range(k) for i in range(j + 1)], device=X.device)
    scale = [1.0 if i == j else math.sqrt(2) for j in range(k) for i in range(j + 1)]
    return X.flatten(-2)[..., index] * torch.tensor(scale, dtype=X.dtype, device=X.device)


@functools.lru_cache(maxsize=64)
def _places(k: int) -> tuple[list[int], list[float]]:
    pairs = [(min(i, j), max(i, j)) for i in range(k) for j in range(k)]
    return [j * (j + 1) // 2 + i for i, j in pairs], [1.0 if i == j else math.sqrt(0.5) for i, j in pairs]


# --------------------------------------------------------------------------------- of plain tensors, for linear solves


def slope(layout: Layout, v: Tensor) -> Tensor:
    """``(B, m, m)`` symmetric derivative of :func:`project` at ``(B, m)``; numbers."""
    D = v.new_zeros(*v.shape, v.shape[-1])
    diagonal = D.diagonal(dim1=-2, dim2=-1)
    start = 0
    for block in layout:
        rows = slice(start, start + block.size)
        start += block.size
        if isinstance(block.cone, Free):
            diagonal[..., rows] = 1
        elif isinstance(block.cone, NonNegative):
            diagonal[..., rows] = (v[..., rows] > 0).to(v.dtype)
        elif not isinstance(block.cone, Zero):
            own = D[..., rows, rows].unflatten(-1, (block.times, block.dim)).unflatten(-3, (block.times, block.dim))
            own.diagonal(dim1=-4, dim2=-2).copy_(_slopes(block, v[..., rows]))
    return D


def _slopes(block: Block, v: Tensor) -> Tensor:
    """``(B, dim, dim, count)``: one backward pass with a batch of unit vectors, the projection computed once."""
    with torch.inference_mode(False), torch.enable_grad():  # inference mode records nothing
        v = (v.clone() if v.is_inference() else v.detach()).requires_grad_()
        onto = _onto(block, v, False)
        units = torch.eye(block.dim, dtype=v.dtype, device=v.device)[:, None, None, :]
        units = units.expand(block.dim, v.shape[0], block.times, block.dim).flatten(-2)
        (rows,) = torch.autograd.grad(onto, v, units, is_grads_batched=True)
    return rows.unflatten(-1, (block.times, block.dim)).permute(1, 0, 3, 2)


def decided(layout: Layout, v: Tensor, noise: Tensor) -> Tensor:
    """Entries of non-negative cones that are zero but for rounding become a positive nothing: no constraint."""
    out = v.clone()
    start = 0
    for block in layout:
        if isinstance(block.cone, NonNegative):
            rows = slice(start, start + block.size)
            own = out[..., rows]
            own.copy_(torch.where(own.abs() <= noise[..., rows], TINY, own))
        start += block.size
    return out
