r"""Gates: the activation patterns :math:`1[X g \ge 0]` that a neuron can have on the data.

The rows of X cut the space of neurons g into cones; inside one of them the pattern does not change. For n rows in
general position in d dimensions there are :math:`2 \sum_{k < d} \binom{n - 1}{k}` (T. Cover, Geometrical and
statistical properties of systems of linear inequalities, 1965).

All of them are found facet by facet. A cell has a facet on one of the hyperplanes :math:`x_k^T g = 0`, and that facet
is a cell of what the other rows cut out of this hyperplane: the same task in one dimension less, down to the plane,
where cells lie between sorted angles. The mean of the facets' points is a point well inside the cell. Rows that are
parallel in some face fall together there, so degenerate positions need no care beyond that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from difflayers._checks import check_finite, check_tensor
from difflayers.linalg._autodiff import outside_transforms, physical

Floats = np.ndarray
_CHUNK = 1024  # vectors drawn at a time
_ROWS = 128  # rows compared at a time


class Gates(NamedTuple):
    """Activation patterns, each with a neuron that has it.

    Attributes:
        vectors: ``(P, d)`` of length one, strictly inside the cells: ``x_k^T g = 0`` for no row but a zero one.
        patterns: ``(n, P)`` booleans ``X g >= 0``, all columns different.
    """

    vectors: Tensor
    patterns: Tensor


def enumerate_gates(X: Tensor, *, max_patterns: int = 100_000) -> Gates:
    """All activation patterns of a neuron on the data.

    Finds every ``1[X g >= 0]`` with ``x_k^T g != 0`` for all rows that are not zero. Patterns of neurons on the border
    between cells are left out: such a neuron belongs to the closure of its neighbouring cells.

    Args:
        X: ``(n, d)`` data; a bias is a column of ones.
        max_patterns: Refuse data that may have more patterns than this.

    Returns:
        :class:`Gates`, in a fixed order. With r the rank of X and m the number of rows that are neither zero nor
        parallel to an earlier one, there are at most ``2 sum_{k<r} C(m-1, k)``, and as many in general position.

    Raises:
        ValueError: For data that may have more than `max_patterns` patterns, a wrong shape or dtype, NaN or Inf.

    Not differentiable: the patterns are constant wherever they do not jump. Runs on the CPU in float64, with results on
    the device and in the dtype of X. Rows closer to parallel than about 1e-12 (float32: 1e-5) count as parallel.

    Example:
        >>> import torch
        >>> from difflayers.relu import enumerate_gates
        >>> gates = enumerate_gates(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        >>> gates.patterns.int()
        tensor([[0, 0, 0, 1, 1, 1],
                [0, 1, 1, 0, 0, 1],
                [0, 0, 1, 0, 1, 1]], dtype=torch.int32)

    Source: M. Pilanci, T. Ergen, Neural Networks are Convex Regularizers, 2020, section 2. T. Cover, 1965, for the
    number of patterns.
    """
    X = _check_data(X)
    with outside_transforms():  # inside, no tensor has an array
        rows = X.to("cpu", torch.float64).numpy()
    tol = torch.finfo(X.dtype).eps ** 0.75
    lengths = np.linalg.norm(rows, axis=1)
    there = lengths > 0
    units = _distinct(rows[there] / lengths[there, None], tol)
    if not len(units):
        vectors = np.eye(1, rows.shape[1])
        return _as_gates(vectors, np.ones((len(rows), 1), bool), X)
    _, values, directions = np.linalg.svd(units, full_matrices=False)
    basis = directions[values > tol * values[0]]
    most = cover_count(len(units), len(basis))
    if most > max_patterns:
        raise ValueError(
            f"X: expected data with at most {max_patterns} activation patterns, got {len(units)} different rows of "
            f"rank {len(basis)} with up to {most}; draw some by `sample_gates`, or raise `max_patterns`"
        )
    vectors = _cells(_normalised(units @ basis.T), tol) @ basis
    patterns = rows @ vectors.T >= 0
    patterns[~there] = True
    order = np.lexsort(patterns[::-1])
    return _as_gates(vectors[order], patterns[:, order], X)


def sample_gates(
    X: Tensor, count: int, *, complements: bool = False, generator: torch.Generator | None = None, max_draws: int = 0
) -> Gates:
    """Random activation patterns of a neuron on the data.

    Draws ``g ~ N(0, I)`` until it has found `count` different patterns ``1[X g >= 0]``.

    Args:
        X: ``(n, d)`` data.
        count: Patterns wanted, at least 1.
        complements: Add ``-g`` for every g, as long as its pattern is new: up to ``2 count`` patterns.
        generator: Source of randomness, on the device of X.
        max_draws: Largest number of vectors drawn; 0: ``20 count + 1000``. Data with fewer patterns than `count`, or
            with very rare ones, give what was found till then.

    Returns:
        :class:`Gates` in the order in which they were found; fewer than `count` where there are not so many.

    Raises:
        ValueError: For a count below 1, a wrong shape or dtype, NaN or Inf.

    Not differentiable: the patterns are constant wherever they do not jump.

    Example:
        >>> import torch
        >>> from difflayers.relu import sample_gates
        >>> X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> sample_gates(X, 100, generator=torch.Generator().manual_seed(0)).patterns.shape
        torch.Size([3, 6])

    Source: M. Pilanci, T. Ergen, Neural Networks are Convex Regularizers, 2020, section 4 (sampled arrangements).
    """
    X = _check_data(X)
    if count < 1 or max_draws < 0:
        name, value, least = ("count", count, 1) if count < 1 else ("max_draws", max_draws, 0)
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    left = max_draws or 20 * count + 1000
    zero = ~(X != 0).any(-1, keepdim=True)
    vectors, patterns = X.new_zeros((0, X.shape[1])), zero.new_zeros((len(X), 0))
    wide = X.double() if X.device.type != "mps" else X  # a product of rounded numbers should not decide
    while left > 0 and patterns.shape[1] < count:
        draws = min(max(_CHUNK, count), left)
        left -= draws
        g = torch.randn((draws, X.shape[1]), generator=generator, dtype=X.dtype, device=X.device)
        g = g / torch.linalg.vector_norm(g, dim=-1, keepdim=True)
        heights = wide @ g.to(wide.dtype).mT
        strict = ((heights != 0) | zero).all(0)
        vectors = torch.cat([vectors, g[strict]])
        patterns = torch.cat([patterns, (heights >= 0)[:, strict]], 1)
        kept = _first_of_each(patterns)
        vectors, patterns = vectors[kept], patterns[:, kept]
    vectors, patterns = vectors[:count], patterns[:, :count]
    if complements:
        vectors, patterns = torch.cat([vectors, -vectors]), torch.cat([patterns, ~patterns | zero], 1)
        kept = _first_of_each(patterns)
        vectors, patterns = vectors[kept], patterns[:, kept]
    return Gates(vectors, patterns)


def cover_count(rows: int, rank: int) -> int:
    """Patterns of so many rows in general position: T. Cover, 1965."""
    return 2 * sum(math.comb(rows - 1, k) for k in range(rank))


def _check_data(X: Tensor) -> Tensor:
    """The data without the wrappers of torch.func."""
    if check_tensor("X", X).ndim != 2 or not X.numel():
        raise ValueError(f"X: expected shape (n, d) with at least one row and one column, got {tuple(X.shape)}")
    plain = physical(X)
    if plain.ndim != 2:
        raise ValueError(f"X: expected data that vmap does not batch, got shape {tuple(plain.shape)} behind it")
    check_finite([("X", plain)])
    return plain


def _as_gates(vectors: Floats, patterns: np.ndarray, like: Tensor) -> Gates:
    device = like.device
    return Gates(torch.as_tensor(vectors, dtype=like.dtype, device=device), torch.as_tensor(patterns, device=device))


def _first_of_each(patterns: Tensor) -> Tensor:
    """Indices of the columns that equal no earlier one, in order."""
    _, group = torch.unique(patterns, dim=1, return_inverse=True)
    index = torch.arange(len(group), device=group.device)
    first = torch.full_like(group, len(group)).scatter_reduce(0, group, index, "amin")
    return first[first < len(group)].sort().values


def _normalised(rows: Floats) -> Floats:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _distinct(units: Floats, tol: float) -> Floats:
    """One of all unit rows that are parallel."""
    near = np.zeros(len(units), bool)
    for start in range(0, len(units), _ROWS):
        some, earlier = units[start : start + _ROWS, None], units[None, : start + _ROWS]
        gap = np.minimum(np.linalg.norm(some - earlier, axis=2), np.linalg.norm(some + earlier, axis=2))
        near[start : start + _ROWS] = np.tril(gap <= tol, start - 1).any(1)
    return units[~near]


def _cells(units: Floats, tol: float) -> Floats:
    """A point in every cell of distinct hyperplanes, whose unit normals span the space: ``(cells, r)``."""
    r = units.shape[1]
    if r == 1:
        return np.array([[1.0], [-1.0]])
    if r == 2:
        return _sectors(units)
    patterns, points = [], []
    for k, normal in enumerate(units):
        plane = np.linalg.svd(normal[None])[2][1:]  # an orthonormal basis of the hyperplane
        others = np.delete(units, k, axis=0) @ plane.T
        lengths = np.linalg.norm(others, axis=1)
        cut = _distinct(others[lengths > tol] / lengths[lengths > tol, None], tol)
        facets = _cells(cut, tol) @ plane
        above = units @ facets.T >= 0
        for side in (True, False):
            above[k] = side
            patterns.append(above.T.copy())
            points.append(facets)
    _, group = np.unique(np.concatenate(patterns), axis=0, return_inverse=True)
    group = group.ravel()
    total = np.zeros((group.max() + 1, r))
    np.add.at(total, group, np.concatenate(points))
    return _normalised(total)


def _sectors(units: Floats) -> Floats:
    """The same in the plane: cells lie between neighbouring rays, perpendicular to the normals."""
    angles = np.arctan2(units[:, 1], units[:, 0]) + np.pi / 2
    rays = np.sort(np.mod(angles, np.pi))
    middles = (rays + np.append(rays[1:], rays[0] + np.pi)) / 2
    middles = np.concatenate([middles, middles + np.pi])
    return np.stack([np.cos(middles), np.sin(middles)], 1)
