"""Points for experts: a sampler's, drawn in every box or divided among the boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difflayers.linalg._autodiff import physical

from ._declaration import PDE
from ._gates import Seam, Tiling
from ._samplers import Fixed, Grid, Place, Sobol, unit_points

BETWEEN_EXPERTS = 100  # as far as seeds of Sobol have to be apart


class Divided:
    """What a sampler chooses, for every expert its own part, in the shape ``(E, N)`` with what is missing marked.

    Args:
        sampler: :class:`Sobol` draws in every box, with a seed for each expert; the points of others are divided.
        tiling: The boxes.
        everywhere: All experts get the points of whole faces, not only those that touch their box.
        experts: Which experts; the points of one do not depend on the others that are asked for.
    """

    def __init__(self, sampler: Sobol | Grid | Fixed, tiling: Tiling, everywhere: bool, experts: Sequence[int]) -> None:
        self.sampler, self.tiling, self.everywhere, self.experts = sampler, tiling, everywhere, list(experts)

    def __repr__(self) -> str:
        return repr(self.sampler)

    def interior(self, pde: PDE, like: Tensor) -> Place:
        """Points in the boxes."""
        if isinstance(self.sampler, Sobol):
            draw = [unit_points(len(pde.coords), self.sampler.points, self._seed(e), like) for e in self.experts]
            return Place(self._stretched(torch.stack(draw)), divided=True)
        return self._divide(self.sampler.interior(pde, like), "sampler: expected points in the box of every expert")

    def face(self, pde: PDE, axis: int, upper: bool, like: Tensor) -> Place:
        """Points on the part of a face that is in the box."""
        if self.everywhere:
            whole = self.sampler.face(pde, axis, upper, like)
            if whole.points.ndim == 3:
                return self._own(whole)
            n = whole.points.shape[0]
            chosen = torch.arange(n, device=like.device).unsqueeze(0)
            indices = None if whole.indices is None else whole.indices.unsqueeze(0)
            return Place(whole.points.unsqueeze(0), indices, None, chosen, n, True)
        if not isinstance(self.sampler, Sobol):
            return self._divide(self.sampler.face(pde, axis, upper, like), None)
        low, high = pde.domain.ends(like)
        m = self.sampler.boundary if len(pde.coords) > 1 else 1
        draws = [self._cross(pde, axis, m, self._seed(e) + 1 + axis, like) for e in self.experts]
        points = self._stretched(torch.stack(draws))
        points = _placed(points, axis, (high if upper else low)[axis]).points
        touching = self.tiling.touches(axis, upper)
        here = torch.tensor([touching[e] for e in self.experts], device=like.device)
        return Place(points, None, here.unsqueeze(-1).expand(-1, m), None, 1, True)

    def seam(self, pde: PDE, seams: Sequence[Seam], axis: int, points: int | None, like: Tensor) -> tuple[Place, Place]:
        """``(S, m, d)`` points of seams across one coordinate, for the expert below and for the one above."""
        low, high = (end[[s.upper for s in seams]].unsqueeze(1) for end in self.tiling.ends(like))
        start = pde.domain.bounds[axis][0]
        below = like.new_tensor([s.at for s in seams])
        above = like.new_tensor([start if s.upper <= s.lower else s.at for s in seams])
        coordinate = self.sampler.nodes[axis].to(like) if isinstance(self.sampler, Grid) else None
        if coordinate is None:
            own = self.sampler if isinstance(self.sampler, Sobol) else Sobol()
            draw = self._cross(pde, axis, points or own.boundary, own.seed + 1 + axis, like)
            inside = low + (high - low) * draw
            sides = [_placed(inside, axis, end) for end in (below, above)]
            return sides[0], sides[0] if below.equal(above) else sides[1]
        # the first layer of nodes of the upper box: the lower expert is evaluated there too
        nodes = self.sampler.interior(pde, like)
        on = (nodes.points >= low) & (nodes.points <= high)
        on[..., axis] = nodes.points[:, axis] == coordinate[torch.searchsorted(coordinate, above)].unsqueeze(-1)
        divided = _padded(nodes, on.all(-1))
        return divided, divided

    def _seed(self, expert: int) -> int:
        assert isinstance(self.sampler, Sobol)
        return self.sampler.seed + BETWEEN_EXPERTS * expert

    def _stretched(self, unit: Tensor) -> Tensor:
        low, high = (end[self.experts].unsqueeze(1) for end in self.tiling.ends(unit))
        return low + (high - low) * unit

    @staticmethod
    def _cross(pde: PDE, axis: int, m: int, seed: int, like: Tensor) -> Tensor:
        """``(m, d)`` points of the unit box with a zero along one coordinate."""
        d = len(pde.coords)
        if d == 1:
            return like.new_zeros(1, 1)
        flat = unit_points(d - 1, m, seed, like)
        return torch.cat([flat[:, :axis], flat.new_zeros(m, 1), flat[:, axis:]], -1)

    def _own(self, place: Place) -> Place:
        """Points that the caller has divided."""
        if place.points.shape[:-2] != (self.tiling.count,):
            raise ValueError(
                f"sampler: expected points (N, d) or ({self.tiling.count}, N, d) for as many experts, got shape "
                f"{tuple(place.points.shape)}"
            )
        return Place(place.points[self.experts], None, None, None, 1, True)

    def _divide(self, place: Place, everybody: str | None) -> Place:
        if place.points.ndim == 3:
            return self._own(place)
        member = self.tiling.members(place.points)
        if everybody is not None and not place.points.is_meta:
            empty = ~physical(member).any(-1)
            if bool(empty.any()):
                raise ValueError(f"{everybody}, got none for expert {int(empty.to(torch.int8).argmax())}")
        return _padded(place, member, self.experts)


def _placed(points: Tensor, axis: int, at: Tensor) -> Place:
    """``(E, m, d)`` points with another value of a coordinate, one for each E or for all."""
    at = at.reshape(-1, 1).expand(points.shape[:-1])
    return Place(torch.stack([at if i == axis else c for i, c in enumerate(points.unbind(-1))], -1), divided=True)


def _padded(place: Place, member: Tensor, rows: Sequence[int] | None = None) -> Place:
    """Members of every row in their order, filled up by their first one to the length of the longest.

    Not by members of other rows, whose data may be bad. A row without any has another's first: nobody reads that.
    """
    counts = member.sum(-1, keepdim=True)
    n = member.shape[-1] if member.is_meta else max(int(physical(counts).max()), 1)
    chosen = torch.argsort((~member).to(torch.uint8), dim=-1, stable=True)[:, :n]
    present = torch.arange(n, device=member.device) < counts
    chosen = torch.where(present, chosen, chosen[:, :1])
    if rows is not None:
        chosen, present = chosen[list(rows)], present[list(rows)]
    indices = chosen if place.indices is None else place.indices[chosen]
    return Place(place.points[chosen], indices, present, chosen, place.points.shape[0], True)
