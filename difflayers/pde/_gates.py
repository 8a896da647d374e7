"""How experts share a domain: boxes side by side, or overlapping ones that are blended."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._declaration import Box

Parts = int | tuple[float, ...]


class Seam(NamedTuple):
    """Where two experts meet.

    Attributes:
        lower: The expert below.
        upper: The expert above; of a periodic coordinate also the first one, above the last.
        coordinate: The one across.
        at: Its value there, the upper end where a periodic coordinate closes.

    Example:
        >>> from difflayers.pde import Seam
        >>> Seam(lower=0, upper=1, coordinate="x", at=0.5).at
        0.5
    """

    lower: int
    upper: int
    coordinate: str
    at: float


@dataclass(frozen=True)
class Tiling:
    """The boxes of all experts, the last coordinate fastest.

    Attributes:
        domain: What they fill.
        cuts: For each coordinate, increasing, from the lower to the upper end of the domain.
        reach: For each coordinate and each of its cuts, how far either box beside it goes beyond.
    """

    domain: Box
    cuts: tuple[tuple[float, ...], ...]
    reach: tuple[tuple[float, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of boxes along each coordinate."""
        return tuple(len(c) - 1 for c in self.cuts)

    @property
    def count(self) -> int:
        """Number of experts."""
        return math.prod(self.shape)

    def cells(self) -> list[tuple[int, ...]]:
        """The position of every box along every coordinate; no tensors, which a transform around us would wrap."""
        return list(itertools.product(*map(range, self.shape)))

    def ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """``(E, d)`` lower and upper ends of the boxes, with what they share with others."""
        low, high = torch.tensor(self._intervals(), dtype=torch.float64, device="cpu").to(like).unbind(-1)
        return low, high

    def _intervals(self) -> list[list[tuple[float, float]]]:
        cuts, reach = self.cuts, self.reach
        return [
            [(cuts[axis][i] - reach[axis][i], cuts[axis][i + 1] + reach[axis][i + 1]) for axis, i in enumerate(cell)]
            for cell in self.cells()
        ]

    def boxes(self) -> tuple[Box, ...]:
        """The boxes of the experts."""
        return tuple(Box(**dict(zip(self.domain.names, box, strict=True))) for box in self._intervals())

    def touches(self, axis: int, upper: bool) -> list[bool]:
        """Which experts reach a side of the domain."""
        end = self.shape[axis] - 1 if upper else 0
        return [cell[axis] == end for cell in self.cells()]

    def width(self, seam: Seam, axis: int) -> float:
        """Mean width, across a seam, of the two boxes beside it, without what they share."""
        cells, cuts = self.cells(), self.cuts[axis]
        return sum(cuts[i + 1] - cuts[i] for i in (cells[seam.lower][axis], cells[seam.upper][axis])) / 2

    def members(self, points: Tensor) -> Tensor:
        """``(E, M)`` booleans: the box has the point. Of boxes side by side the upper one has those between them."""
        index, weight = self.mix(points)
        found = torch.zeros(self.count, points.shape[0], dtype=torch.bool, device=points.device)
        return found.scatter(0, index.mT, True) if weight is None else self._within(points)

    def _within(self, points: Tensor) -> Tensor:
        low, high = self.ends(points)
        return ((points >= low.unsqueeze(1)) & (points <= high.unsqueeze(1))).all(-1)

    def mix(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(M, s)`` experts of each of ``(M, d)`` points, and their shares of a sum of 1; None where there is one.

        An expert whose share is zero is replaced by the one that has most, so that its failure harms nobody.
        """
        index = torch.zeros(points.shape[0], 1, dtype=torch.int64, device=points.device)
        share = None
        for axis, n in enumerate(self.shape):
            x = points[:, axis].contiguous()
            cuts = torch.tensor(self.cuts[axis], dtype=torch.float64, device="cpu").to(points)
            cell = torch.bucketize(x.detach(), cuts[1:-1].contiguous(), right=True)
            if n == 1 or not any(self.reach[axis]):
                index = index * n + cell.unsqueeze(-1)
                continue
            reach = torch.tensor(self.reach[axis], dtype=torch.float64, device="cpu").to(points)
            above = _rise(x, cuts[cell], reach[cell], 1.0)  # share that the lower neighbour leaves
            below = 1 - _rise(x, cuts[cell + 1], reach[cell + 1], 0.0)
            other = torch.where(above < 1, cell - 1, torch.where(below < 1, cell + 1, cell))
            most = torch.where(above < 1, above, below)
            index = (index.unsqueeze(-1) * n + torch.stack([cell, other], -1).unsqueeze(1)).flatten(1)
            part = torch.stack([most, 1 - most], -1)
            share = part if share is None else (share.unsqueeze(-1) * part.unsqueeze(1)).flatten(1)
        return index, share

    def seams(self, circles: tuple[bool, ...]) -> tuple[Seam, ...]:
        """All pairs of neighbours, also across the ends of coordinates that are circles."""
        out, number = [], {cell: expert for expert, cell in enumerate(self.cells())}
        for axis, n in enumerate(self.shape):
            last = n if circles[axis] and n > 1 else n - 1
            for i in range(last):
                for cell, lower in number.items():
                    if cell[axis] == i:
                        upper = number[*cell[:axis], (i + 1) % n, *cell[axis + 1 :]]
                        out.append(Seam(lower, upper, self.domain.names[axis], self.cuts[axis][i + 1]))
        return tuple(out)


def _rise(x: Tensor, at: Tensor, reach: Tensor, otherwise: float) -> Tensor:
    """From 0 to 1 across ``at - reach .. at + reach``, twice differentiable; `otherwise` where there is no reach."""
    wide = reach > 0
    s = ((x - at) / torch.where(wide, 2 * reach, 1) + 0.5).clamp(0, 1)
    return torch.where(wide, s**3 * (10 + s * (6 * s - 15)), otherwise)


class HardBoxes:
    """Boxes side by side: the field at a point is that of the expert whose box has it, and jumps between boxes.

    Args:
        **parts: For each coordinate that is divided the number of equal boxes, or the inner cuts, increasing.

    Raises:
        ValueError: For coordinates that the domain does not have, or cuts outside of it, when it is known.

    Example:
        >>> from difflayers.pde import HardBoxes
        >>> HardBoxes(x=4, t=(100.0,))
        HardBoxes(x=4, t=(100.0,))

    Source: N. Chalapathi, Y. Du, A. S. Krishnapriyan, Scaling physics-informed hard constraints with
    mixture-of-experts, 2024, section 3.
    """

    overlap = 0.0

    def __init__(self, **parts: Parts) -> None:
        if not parts:
            raise ValueError(f"{type(self).__name__}: expected at least one coordinate to divide, got none")
        for name, given in parts.items():
            if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
                continue
            if not isinstance(given, tuple) or any(b <= a for a, b in itertools.pairwise(given)):
                raise ValueError(f"{name}: expected a number of boxes of at least 1 or increasing cuts, got {given!r}")
        self.parts = dict(parts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{n}={p}' for n, p in self.parts.items())})"

    def tiling(self, domain: Box) -> Tiling:
        """The boxes on a domain."""
        for name in self.parts:
            if name not in domain.names:
                raise ValueError(f"gate: expected coordinates of {domain}, got {name!r}")
        cuts, reaches = [], []
        for name, (low, high) in zip(domain.names, domain.bounds, strict=True):
            given = self.parts.get(name, 1)
            inner = given if isinstance(given, tuple) else [low + (high - low) * i / given for i in range(1, given)]
            own = (low, *inner, high)
            if any(b <= a for a, b in itertools.pairwise(own)):
                raise ValueError(f"gate: expected cuts of {name} between {low:g} and {high:g}, got {given!r}")
            sizes = [b - a for a, b in itertools.pairwise(own)]
            inside = [self.overlap / 2 * min(a, b) for a, b in itertools.pairwise(sizes)]
            cuts.append(own)
            reaches.append((0.0, *inside, 0.0))
        return Tiling(domain, tuple(cuts), tuple(reaches))


class PartitionOfUnity(HardBoxes):
    """Overlapping boxes: where two share a region the field passes from one to the other, twice differentiable.

    Args:
        overlap: Width of the shared region as a fraction of the smaller box beside it, above 0 and at most 1.
        **parts: As in :class:`HardBoxes`; the cuts are the middles of the shared regions.

    Raises:
        ValueError: As there, and for an overlap outside its range.

    Example:
        >>> from difflayers.pde import PartitionOfUnity
        >>> PartitionOfUnity(overlap=0.5, x=2)
        PartitionOfUnity(overlap=0.5, x=2)

    Source: B. Moseley, A. Markham, T. Nissen-Meyer, Finite basis physics-informed neural networks, 2023.
    """

    def __init__(self, overlap: float = 0.25, **parts: Parts) -> None:
        super().__init__(**parts)
        if not 0 < overlap <= 1:
            raise ValueError(f"overlap: expected a number above 0 and at most 1, got {overlap!r}")
        self.overlap = float(overlap)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(overlap={self.overlap}, {', '.join(f'{n}={p}' for n, p in self.parts.items())})"


Gate = HardBoxes | PartitionOfUnity
