"""Where a differential equation is enforced: points inside a box and on its faces."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from difflayers._checks import check_tensor
from difflayers.linalg._autodiff import physical

from ._declaration import PDE, Box


class Place(NamedTuple):
    """Points, of one domain or divided among experts.

    Attributes:
        points: ``(*batch, N, d)``; divided: ``(E, N, d)``, or ``(1, N, d)`` where all experts have the same.
        indices: Which nodes of a grid they are, in the shape of the points; None: all of it, or no grid.
        present: ``(E, N)``: points that are there, the others fill the shape up; None: all of them.
        chosen: ``(E, N)``: which of the `whole` points of the undivided place they are; None without such a place.
        whole: Number of the points that tensors of values refer to; None: those of `points`.
        divided: Among experts.
    """

    points: Tensor
    indices: Tensor | None = None
    present: Tensor | None = None
    chosen: Tensor | None = None
    whole: int | None = None
    divided: bool = False

    @property
    def numbers(self) -> int:
        """Number of points that tensors of values refer to."""
        return self.points.shape[-2] if self.whole is None else self.whole

    def spread(self, values: Tensor) -> Tensor:
        """Values ``(*batch, 1)`` or ``(*batch, numbers)`` in a shape that broadcasts with ``(*batch, E, N)``."""
        if not self.divided:
            return values
        if values.shape[-1] == 1 or self.chosen is None:
            return values.unsqueeze(-2)
        return values.index_select(-1, self.chosen.flatten()).unflatten(-1, self.chosen.shape)


class Sampler(Protocol):
    """What chooses points inside a domain and on its faces."""

    def interior(self, pde: PDE, like: Tensor) -> Place:
        """Points inside."""

    def face(self, pde: PDE, axis: int, upper: bool, like: Tensor) -> Place:
        """Points on a face."""


@dataclass(frozen=True)
class Sobol:
    """Quasi-random points, scrambled by a seed: the same at every call.

    Args:
        points: Inside the domain, at least 1.
        boundary: On each face, at least 1; one on a face that is a point.
        seed: At least 0. Seeds a multiple of 100 apart draw independent points everywhere.

    Raises:
        ValueError: For numbers of points below 1, or a negative seed.

    Example:
        >>> import torch
        >>> from difflayers.pde import Burgers, Sobol
        >>> Sobol(points=100, seed=1).interior(Burgers(), torch.zeros(())).points.shape
        torch.Size([100, 2])

    Source: I. M. Sobol, 1967; A. B. Owen, Scrambling Sobol and Niederreiter-Xing points, 1998.
    """

    points: int = 256
    boundary: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("points", 1), ("boundary", 1), ("seed", 0)):
            got = getattr(self, name)
            if not isinstance(got, int) or got < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {got!r}")

    def interior(self, pde: PDE, like: Tensor) -> Place:
        """Points inside."""
        low, high = pde.domain.ends(like)
        return Place(low + (high - low) * unit_points(len(pde.coords), self.points, self.seed, like))

    def face(self, pde: PDE, axis: int, upper: bool, like: Tensor) -> Place:
        """Points on a face, opposite each other on opposite ones."""
        low, high = pde.domain.ends(like)
        d, end = len(pde.coords), (high if upper else low)[axis].reshape(1, 1)
        if d == 1:
            return Place(end)
        rest = [i for i in range(d) if i != axis]
        inner = low[rest] + (high - low)[rest] * unit_points(d - 1, self.boundary, self.seed + 1 + axis, like)
        return Place(torch.cat([inner[:, :axis], end.expand(self.boundary, 1), inner[:, axis:]], -1))


def unit_points(d: int, n: int, seed: int, like: Tensor) -> Tensor:
    """``(n, d)`` quasi-random points in the unit box."""
    return _drawn(d, n, seed).to(like)


@functools.lru_cache(maxsize=256)
def _drawn(d: int, n: int, seed: int) -> Tensor:
    """Drawn once, on the CPU, and outside of any transform, which would take the numbers for its own."""
    with torch._C._DisableFuncTorch(), torch.inference_mode(False), torch.device("cpu"):
        return torch.quasirandom.SobolEngine(d, scramble=True, seed=seed).draw(n, dtype=torch.float64)


class Fixed:
    """Points of the caller's choice.

    Args:
        points: ``(N, d)`` inside the domain, or ``(*batch, N, d)`` where each element (expert) has its own.
        faces: ``(m, d)`` points for each side on which there is a condition, by the names of the sides: ``"x=0"``,
            ``"t=low"``. Under a periodic condition the points of both ends lie opposite each other, in the same order.

    Raises:
        ValueError: For points outside the domain, when it is known, or a face without points.

    Example:
        >>> import torch
        >>> from difflayers.pde import Box, Fixed, Poisson
        >>> line = Poisson(domain=Box(x=(0.0, 1.0)))
        >>> sampler = Fixed(torch.rand(8, 1), {"x=0": torch.zeros(1, 1), "x=1": torch.ones(1, 1)})
        >>> sampler.face(line, 0, True, torch.zeros(())).points
        tensor([[1.]])
    """

    def __init__(self, points: Tensor, faces: Mapping[str, Tensor] | None = None) -> None:
        self.points = check_tensor("points", points, min_ndim=2)
        self.faces = {side: check_tensor(f"faces[{side!r}]", p, min_ndim=2) for side, p in (faces or {}).items()}

    def __repr__(self) -> str:
        return f"Fixed({tuple(self.points.shape)}, faces: {', '.join(self.faces) or 'none'})"

    def interior(self, pde: PDE, like: Tensor) -> Place:
        """Points inside."""
        pde.domain.check("points", self.points)
        return Place(self.points.to(like))

    def face(self, pde: PDE, axis: int, upper: bool, like: Tensor) -> Place:
        """Points on a face."""
        for side, points in self.faces.items():
            at, ends = pde.side(side)
            if at == axis and ends == (upper,):
                pde.domain.check(f"faces[{side!r}]", points)
                low, high = pde.domain.bounds[axis]
                off = (physical(points)[..., axis] - (low, high)[upper]).abs().max()
                if not points.is_meta and float(off) > 1e-5 * (high - low):
                    raise ValueError(f"faces[{side!r}]: expected points on that side, got one {float(off):g} away")
                return Place(points.to(like))
        end = "high" if upper else "low"
        raise ValueError(f"faces: expected points for {pde.coords[axis]}={end}, got {', '.join(self.faces) or 'none'}")


class Grid:
    """A product grid: points of a :class:`PDEConstraint`, and what :class:`FiniteDifference` and :class:`Spectral` use.

    Args:
        domain: The box.
        periodic: Coordinates that are circles: their upper end is left out. They have no faces and need no condition.
        spacing: ``"uniform"``, or ``"chebyshev"`` (dense at the ends) for the coordinates that are not periodic.
        **sizes: Number of nodes of each coordinate, at least 2; or its nodes, increasing, the ends included.

    Raises:
        ValueError: For a coordinate that is missing, unknown or too short, or nodes that do not fill the box.

    Example:
        >>> import torch
        >>> from difflayers.pde import Box, Grid
        >>> Grid(Box(t=(0.0, 1.0), x=(0.0, 1.0)), periodic=("x",), t=3, x=4).points(torch.zeros(()))[:2]
        tensor([[0.0000, 0.0000],
                [0.0000, 0.2500]])
    """

    def __init__(
        self,
        domain: Box,
        *,
        periodic: tuple[str, ...] = (),
        spacing: Literal["uniform", "chebyshev"] = "uniform",
        **sizes: int | Tensor,
    ) -> None:
        if spacing not in ("uniform", "chebyshev"):
            raise ValueError(f'spacing: expected "uniform" or "chebyshev", got {spacing!r}')
        if set(sizes) != set(domain.names) or not set(periodic) <= set(domain.names):
            raise ValueError(
                f"Grid: expected a size for each of {', '.join(domain.names)}, got {', '.join(sizes) or 'none'}, "
                f"periodic {tuple(periodic)}"
            )
        self.domain, self.periodic, self.spacing = domain, tuple(n in periodic for n in domain.names), spacing
        self.nodes = tuple(
            _nodes(n, sizes[n], b, p, spacing)
            for n, b, p in zip(domain.names, domain.bounds, self.periodic, strict=True)
        )
        self.shape = tuple(len(x) for x in self.nodes)

    def __repr__(self) -> str:
        return f"Grid({self.domain}, {' x '.join(map(str, self.shape))})"

    def points(self, like: Tensor) -> Tensor:
        """``(N, d)`` points, the last coordinate fastest."""
        axes = torch.meshgrid(*(x.to(like) for x in self.nodes), indexing="ij")
        return torch.stack(axes, -1).flatten(0, -2)

    def interior(self, pde: PDE, like: Tensor) -> Place:
        """All points."""
        self._check(pde)
        return Place(self.points(like))

    def face(self, pde: PDE, axis: int, upper: bool, like: Tensor) -> Place:
        """The points of a face."""
        self._check(pde)
        if self.periodic[axis]:
            raise ValueError(
                f"grid: expected no condition at the ends of {pde.coords[axis]}, which is a circle here, got one; pass "
                "the equation without it"
            )
        total = torch.arange(math.prod(self.shape), device=like.device).reshape(self.shape)
        index = total.select(axis, -1 if upper else 0).flatten()
        return Place(self.points(like)[index], index)

    def _check(self, pde: PDE) -> None:
        if (pde.domain.names, pde.domain.bounds) != (self.domain.names, self.domain.bounds):
            raise ValueError(f"grid: expected one of {pde.domain}, got {self}")


def _nodes(name: str, size: Any, ends: tuple[float, float], circle: bool, spacing: str) -> Tensor:
    low, high = ends
    if isinstance(size, Tensor):
        nodes = check_tensor(name, size, min_ndim=1).detach().to("cpu", torch.float64)
        slack = 1e-6 * (high - low)
        ends_at = [float(v) for v in nodes.flatten()[[0, -1]]] if nodes.numel() else [math.inf, math.inf]
        fits = abs(ends_at[0] - low) <= slack and (circle or abs(ends_at[1] - high) <= slack)
        if (
            nodes.ndim != 1
            or len(nodes) < 2
            or not bool((nodes.diff() > 0).all())
            or not fits
            or nodes[-1] > high + slack
        ):
            raise ValueError(f"{name}: expected increasing nodes from {low:g} to {high:g}, got {tuple(size.shape)}")
        return nodes
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise ValueError(f"{name}: expected at least 2 nodes, got {size!r}")
    steps = torch.arange(size, dtype=torch.float64, device="cpu")
    if circle:
        unit = steps / size
    elif spacing == "uniform":
        unit = steps / (size - 1)
    else:
        unit = (1 - torch.cos(math.pi * steps / (size - 1))) / 2
    nodes = low + (high - low) * unit
    if not circle:
        nodes[-1] = high
    return nodes
