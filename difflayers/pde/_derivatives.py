"""Derivative terms of basis functions: forward mode through a network, or matrices on a grid.

Differentiation is linear, so all terms of all basis functions are computed once, before the coefficients are known.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import jvp, vmap

from difflayers.linalg._autodiff import check_inference_mode, forward_mode_lock, push_forward

from ._declaration import PDE
from ._samplers import Grid, Place

Basis = Tensor | Callable[[Tensor], Tensor]
Word = tuple[int, ...]


@dataclass(frozen=True)
class Jvp:
    """Derivatives by nested forward mode through a function of one point, exact to rounding.

    The basis is a callable (a network) from a point ``(d,)`` to ``(*batch, K)``, or ``(*batch, Q, K)`` for Q fields;
    ``vmap`` runs it on all points. What distinguishes the elements of a batch, it takes from its surroundings.

    Example:
        >>> import torch
        >>> from difflayers.pde import Box, Jvp, Poisson
        >>> line, points = Poisson(domain=Box(x=(0.0, 4.0))), torch.tensor([[1.0], [3.0]])
        >>> powers = lambda point: point ** torch.arange(4.0)
        >>> Jvp().terms(powers, points, line, ("u", "u_xx"))[0]
        tensor([[1., 1., 1., 1.],
                [0., 0., 2., 6.]])

    Source: nested forward mode as in A. Griewank, A. Walther, Evaluating Derivatives, 2008, chapter 13.
    """

    def terms(self, basis: Basis, place: Place | Tensor, pde: PDE, names: Sequence[str]) -> Tensor:
        """``(*batch, N, T, K)`` terms of the basis functions.

        Args:
            basis: See above.
            place: ``(N, d)`` points, or ``(*experts, N, d)``, whose dimensions follow those of the batch.
            pde: Says what the names mean.
            names: The terms.
        """
        points = place.points if isinstance(place, Place) else place
        if not callable(basis):
            raise ValueError(f"basis: expected a function of a point for Jvp, got {type(basis).__name__}")
        flat = points.flatten(0, -2)
        parsed = [pde.parse(name) for name in names]
        units = torch.eye(flat.shape[-1], dtype=flat.dtype, device=flat.device)
        function = functools.partial(evaluated, basis, pde=pde)
        words = {word for _, word in parsed}
        with forward_mode_lock:
            if forward_ad._current_level >= 0:  # torch does not nest forward mode: two reverse passes do the same
                found = {word: _along(function, flat, word, units) for word in words}
            else:
                found = _collect(function, flat, words, units)
        several = len(pde.fields) > 1
        picked = [found[word].select(-2, field) if several else found[word] for field, word in parsed]
        return torch.stack(picked, -2).unflatten(-3, points.shape[:-1])


def _collect(f: Callable[[Tensor], Tensor], x: Tensor, words: set[Word], units: Tensor) -> dict[Word, Tensor]:
    """The derivatives of `f` by each word. Those that begin alike share their passes."""
    out: dict[Word, Tensor] = {}
    check_inference_mode()
    for c in sorted({word[0] for word in words if word}):
        tails = {word[1:] for word in words if word and word[0] == c}
        values, slopes = jvp(lambda y, t=tails: _collect(f, y, t | {()}, units), (x,), (units[c].expand_as(x),))
        out |= {(c, *tail): slopes[tail] for tail in tails}
        out.setdefault((), values[()])
    if () in words and () not in out:
        out[()] = f(x)
    return out


def _along(f: Callable[[Tensor], Tensor], x: Tensor, word: Word, units: Tensor) -> Tensor:
    """One derivative without forward mode."""
    if not word:
        return f(x)
    return push_forward(lambda y: _along(f, y, word[1:], units), (x,), (units[word[0]].expand_as(x),))


def evaluated(basis: Callable[[Tensor], Tensor], points: Tensor, pde: PDE) -> Tensor:
    """``(*batch, N, K)`` or ``(*batch, N, Q, K)`` values at ``(N, d)`` points."""
    event = 1 if len(pde.fields) == 1 else 2

    def at(point: Tensor) -> Tensor:
        out = basis(point)
        if not isinstance(out, Tensor):
            raise ValueError(f"basis: expected a tensor, got {type(out).__name__}")
        if out.ndim < event or (event == 2 and out.shape[-2] != len(pde.fields)):
            expected = "(*batch, K)" if event == 1 else f"(*batch, {len(pde.fields)}, K)"
            raise ValueError(
                f"basis: expected shape {expected} at a point of shape {tuple(point.shape)}, got {tuple(out.shape)}"
            )
        if out.dtype != point.dtype:
            raise ValueError(
                f"basis: expected {point.dtype} as the points are (`.to(dtype)` of the layer or of the network), got "
                f"{out.dtype}"
            )
        return out

    # negative out_dims bring torch down where the basis does not depend on the point
    return vmap(at)(points).movedim(0, -1 - event)


class _OnGrid:
    """Derivatives as one matrix for each coordinate and order."""

    def __init__(self, grid: Grid) -> None:
        if not isinstance(grid, Grid):
            raise ValueError(f"grid: expected a Grid, got {type(grid).__name__}")
        self.grid = grid
        self._matrices: dict[tuple[int, int], Tensor] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.grid})"

    def matrix(self, axis: int, order: int) -> Tensor:
        """``(n, n)`` derivative of an order by one coordinate, in float64."""
        if (axis, order) not in self._matrices:
            nodes, (low, high) = self.grid.nodes[axis], self.grid.domain.bounds[axis]
            period = high - low if self.grid.periodic[axis] else None
            self._matrices[axis, order] = self.build(nodes, order, period)
        return self._matrices[axis, order]

    def build(self, nodes: Tensor, order: int, period: float | None) -> Tensor:
        """The matrix for these nodes."""
        raise ValueError(f"{type(self).__name__}: expected a subclass that builds matrices")

    def terms(self, basis: Basis, place: Place | None, pde: PDE, names: Sequence[str]) -> Tensor:
        """``(*batch, N, T, K)`` terms of the basis functions on the grid, the last coordinate fastest.

        Args:
            basis: ``(*batch, n_1, ..., n_d, K)`` values on the grid, with a dimension for the fields before K if there
                are several; or a function of a point as in :class:`Jvp`.
            place: A face of the grid, None for all of it.
            pde: Says what the names mean.
            names: The terms.
        """
        shape, event = self.grid.shape, 1 if len(pde.fields) == 1 else 2
        d = len(shape)
        if isinstance(basis, Tensor):
            tail = shape if event == 1 else (*shape, len(pde.fields))
            if basis.ndim < d + event or tuple(basis.shape[-d - event : -1]) != tail:
                expected = ", ".join(map(str, tail))
                raise ValueError(f"basis: expected shape (*batch, {expected}, K), got {tuple(basis.shape)}")
            values = basis
        else:
            if place is None:
                raise ValueError("basis: expected values on the grid where no points are given, got a function")
            points = self.grid.points(place.points)
            values = evaluated(basis, points, pde).unflatten(-1 - event, shape)
        found: dict[Word, Tensor] = {(): values}
        out = []
        for name in names:
            field, word = pde.parse(name)
            if word not in found:
                v = values
                for c in sorted(set(word)):
                    M = self.matrix(c, word.count(c)).to(v)
                    v = torch.tensordot(v, M, dims=([c - d - event], [1])).movedim(-1, c - d - event)
                found[word] = v
            v = found[word]
            out.append(v if event == 1 else v.select(-2, field))
        stacked = torch.stack([v.flatten(-1 - d, -2) for v in out], -2)
        index = None if place is None else place.indices
        return stacked if index is None else stacked.index_select(-3, index.flatten()).unflatten(-3, index.shape)


class FiniteDifference(_OnGrid):
    """Derivatives by finite differences on a grid with any spacing, one-sided at the ends.

    Args:
        grid: A :class:`Grid`.
        accuracy: Order of the error in the spacing, an even number of at least 2. On a uniform grid the stencils inside
            are central.

    Raises:
        ValueError: For an accuracy that is not even, or a grid with fewer nodes than the stencil.

    Example:
        >>> import torch
        >>> from difflayers.pde import Box, FiniteDifference, Grid
        >>> line = Grid(Box(x=(0.0, 2.0)), x=5)
        >>> FiniteDifference(line).matrix(0, 1)[2]
        tensor([ 0., -1.,  0.,  1.,  0.], dtype=torch.float64)

    Source: B. Fornberg, Generation of finite difference formulas on arbitrarily spaced grids, 1988.
    """

    def __init__(self, grid: Grid, accuracy: int = 2) -> None:
        super().__init__(grid)
        if not isinstance(accuracy, int) or accuracy < 2 or accuracy % 2:
            raise ValueError(f"accuracy: expected an even number of at least 2, got {accuracy!r}")
        self.accuracy = accuracy

    def build(self, nodes: Tensor, order: int, period: float | None) -> Tensor:
        """Weights that differentiate polynomials on the stencil of each node."""
        n, here = len(nodes), torch.arange(len(nodes), device=nodes.device)
        central, sided = 2 * ((order + 1) // 2) - 1 + self.accuracy, order + self.accuracy
        gaps = nodes.diff()
        uniform = bool((gaps.max() - gaps.min()) <= 1e-9 * gaps.max())
        width = central if uniform else sided + 1 - sided % 2
        if n < max(width, sided if period is None else 0):
            raise ValueError(f"grid: expected at least {max(width, sided)} nodes for order {order}, got {n}")
        start = here - width // 2
        if period is None:
            inner = (start >= 0) & (start + width <= n)
            rows = torch.zeros(n, n, dtype=nodes.dtype, device=nodes.device)
            first = (here - sided // 2).clamp(0, n - sided)
            for some, begin, size in ((inner, start, width), (~inner, first, sided)):
                stencil = begin[some].unsqueeze(-1) + torch.arange(size, device=nodes.device)
                weights = _weights(nodes[stencil] - nodes[some].unsqueeze(-1), order)
                rows[some] = rows[some].scatter(-1, stencil, weights)
            return rows
        stencil = start.unsqueeze(-1) + torch.arange(width, device=nodes.device)
        away = (
            nodes[stencil % n] + period * torch.div(stencil, n, rounding_mode="floor").to(nodes) - nodes.unsqueeze(-1)
        )
        return torch.zeros(n, n, dtype=nodes.dtype, device=nodes.device).scatter(-1, stencil % n, _weights(away, order))


def _weights(away: Tensor, order: int) -> Tensor:
    """``(n, w)`` weights of nodes at distances `away` for a derivative at 0, exact for polynomials."""
    if away.shape[0] == 0:
        return away
    scale = away.abs().amax(-1, keepdim=True)
    w = away.shape[-1]
    powers = (away / scale).unsqueeze(-2) ** torch.arange(w, dtype=away.dtype, device=away.device).unsqueeze(-1)
    wanted = torch.zeros(w, dtype=away.dtype, device=away.device)
    wanted[order] = math.factorial(order)
    weights = torch.linalg.solve(powers, wanted.expand(away.shape))
    return torch.where(weights.abs() < 1e-13 * weights.abs().amax(-1, keepdim=True), 0, weights) / scale**order


class Spectral(_OnGrid):
    """Derivatives of the interpolant: Fourier series in periodic coordinates, a polynomial in the others.

    Args:
        grid: A :class:`Grid`, uniform in periodic coordinates, with ``spacing="chebyshev"`` in the others.

    Raises:
        ValueError: For a spacing on which interpolation is not stable.

    Example:
        >>> import torch
        >>> from difflayers.pde import Box, Grid, Spectral
        >>> circle = Grid(Box(x=(0.0, 6.283185307179586)), periodic=("x",), x=8)
        >>> wave = torch.sin(circle.nodes[0])
        >>> torch.allclose(Spectral(circle).matrix(0, 1) @ wave, torch.cos(circle.nodes[0]))
        True

    Source: L. N. Trefethen, Spectral Methods in MATLAB, 2000, chapters 3 and 6.
    """

    def build(self, nodes: Tensor, order: int, period: float | None) -> Tensor:
        """Differentiation matrix of the interpolant."""
        n = len(nodes)
        eye = torch.eye(n, dtype=nodes.dtype, device=nodes.device)
        if period is not None:
            if float((nodes.diff() - period / n).abs().max()) > 1e-9 * period:
                raise ValueError("grid: expected uniform nodes in a periodic coordinate, got others")
            k = torch.fft.fftfreq(n, period / n / (2 * math.pi), dtype=nodes.dtype, device=nodes.device)
            # the real part: a sawtooth has no odd derivative on the grid
            return torch.fft.ifft((1j * k.unsqueeze(-1)) ** order * torch.fft.fft(eye, dim=0), dim=0).real
        away = (nodes.unsqueeze(-1) - nodes) / (nodes[-1] - nodes[0]) * 4 + eye  # capacity 1: products stay in range
        logs = -away.abs().log().sum(-1)
        if float(logs.max() - logs.min()) > math.log(1e3) + math.log(n):
            raise ValueError('grid: expected spacing="chebyshev" where a coordinate is not periodic, got other nodes')
        signs = 1.0 - 2.0 * (torch.arange(n, device=nodes.device) % 2).to(nodes)
        c = signs * (logs - logs.max()).exp()  # barycentric weights
        D = c / c.unsqueeze(-1) / (nodes.unsqueeze(-1) - nodes + eye) * (1 - eye)
        D = D - torch.diag(D.sum(-1))  # constants have no slope, to rounding
        return torch.linalg.matrix_power(D, order)


Derivatives = Jvp | FiniteDifference | Spectral


def check_derivatives(given: Any) -> Derivatives:
    """Refuses anything else."""
    if not isinstance(given, Jvp | FiniteDifference | Spectral):
        raise ValueError(
            f"derivatives: expected Jvp(), FiniteDifference(grid) or Spectral(grid), got {type(given).__name__}"
        )
    return given
