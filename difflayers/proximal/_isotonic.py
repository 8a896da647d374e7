r"""Isotonic regression: the nearest vector whose entries do not fall.

.. math:: P(x) = \arg\min_z \tfrac12 \sum_i w_i (z_i - x_i)^2 \quad \text{s.t.} \quad z_1 \le z_2 \le \dots \le z_n

The result is constant on blocks of consecutive entries and there the weighted mean of x. Two neighbouring stretches
that are solved already merge by pooling one block across their border: the entries of the left above m, and those of
the right below m, where m is the root of

.. math:: h(m) = \sum_{\text{left}} w_i (z_i - m)_+ - \sum_{\text{right}} w_i (m - z_i)_+ .

Stretches of 1, 2, 4, ... entries are merged in pairs, all pairs of the batch at once, so log2 n rounds of sums and
searches find all blocks, whatever the data. Pool adjacent violators, one block after the other, is the same idea in
sequence: R. E. Barlow, D. J. Bartholomew, J. M. Bremner, H. D. Brunk, Statistical Inference under Order Restrictions,
1972, chapter 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._identify import identify
from ._operands import Number, on_vectors, optional, per_entry
from ._partition import block_means, levels, merge_ties, number

SHORT = 8  # stretches of this length are solved by a formula


def project_isotonic(x: Tensor, *, weights: Number | None = None, decreasing: bool = False, dim: int = -1) -> Tensor:
    """Isotonic regression: the nearest vector whose entries do not fall (or do not rise).

    Solves ``argmin_z 1/2 sum_i weights_i (z_i - x_i)^2 s.t. z_1 <= z_2 <= ... <= z_n``.

    Args:
        x: Any shape.
        weights: More than 0: a number, or a tensor that broadcasts with `x`; None: all equal.
        decreasing: Ask for ``z_1 >= z_2 >= ... >= z_n`` instead.
        dim: The dimension of one vector.

    Returns:
        The projection, shaped like `x`.

    Raises:
        ValueError: For `weights` that are not positive, a shape that does not broadcast, or a dtype that is not
            floating point.

    Differentiable in `x` and `weights`, to any order. At a kink (neighbouring blocks with equal values) the derivative
    is that of one joint block.

    Example:
        >>> import torch
        >>> project_isotonic(torch.tensor([1.0, 3.0, 2.0, 4.0]))
        tensor([1.0000, 2.5000, 2.5000, 4.0000])

    Source: R. E. Barlow et al., Statistical Inference under Order Restrictions, 1972, chapter 1.
    Departure: blocks are pooled by divide and conquer, all at once, instead of one after the other.
    """
    if decreasing:
        return -project_isotonic(-x, weights=weights, dim=dim)
    return on_vectors(_onto_isotonic, x, optional(per_entry("weights", weights, above=0)), dim=dim)


def _onto_isotonic(x: Tensor, w: Number | None) -> Tensor:
    if isinstance(w, Tensor):
        w = w.expand_as(x)
        blocks, z = identify(_blocks, x, w, ndims=(1, 1), found_ndims=(1, 1))
        return z + block_means(x - z, blocks, w)
    blocks, z = identify(_blocks, x, ndims=(1,), found_ndims=(1, 1))
    return z + block_means(x - z, blocks)


def _blocks(x: Tensor, w: Tensor | None = None) -> tuple[Tensor, ...]:
    """The block of every entry and its value, in float64 whatever comes in."""
    if w is not None:
        x, w = torch.broadcast_tensors(x, w)
    y, w = x.double(), None if w is None else w.double()
    joined, blocks = pools(y, w)
    return joined, levels(y, blocks, w).to(x.dtype)


def pools(x: Tensor, w: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The blocks of a regression that does not fall, ``(*batch, n)``: with those of equal value joined, and before."""
    if not x.numel():
        none = torch.zeros_like(x, dtype=torch.int64)
        return none, none
    batch, n = x.shape[:-1], x.shape[-1]
    size = SHORT << max(0, (n - 1) // SHORT).bit_length()
    # entries at the top, which are never pooled, fill up to a short stretch times a power of 2
    y = torch.cat([x, x.amax(-1, keepdim=True).expand(*batch, size - n)], -1).reshape(-1, size)
    w = None if w is None else pad(w, (0, size - n), value=1.0).reshape(-1, size)
    sums = RangeSums(y, w)
    z = _solve_short(y, w)
    half = SHORT
    while half < size:
        z = merge(z, sums, half)
        half *= 2
    z = z[:, :n].reshape(*batch, n)
    sound = torch.isfinite(x).all(-1, keepdim=True)  # one NaN makes the whole vector one block of NaN
    first = pad((z[..., 1:] != z[..., :-1]) & sound, (1, 0), value=True)
    return number(merge_ties(z, x, first)), number(first)


def _solve_short(x: Tensor, w: Tensor | None) -> Tensor:
    """Stretches of length SHORT, by the largest over left ends of the smallest over right ends of the mean between."""
    xs = x.unflatten(-1, (-1, SHORT)).unbind(-1)
    ws = [None] * SHORT if w is None else w.unflatten(-1, (-1, SHORT)).unbind(-1)
    z = [torch.full_like(xs[0], -torch.inf)] * SHORT
    for left in range(SHORT):
        total, weight, means = 0, 0, []
        for right in range(left, SHORT):
            w_i = ws[right]
            total = total + (xs[right] if w_i is None else w_i * xs[right])
            weight = weight + (1 if w_i is None else w_i)
            means.append(total / weight)
        smallest = means[-1]
        for right in reversed(range(left, SHORT)):
            smallest = torch.minimum(smallest, means[right - left])
            z[right] = torch.maximum(z[right], smallest)
    return torch.stack(z, -1).flatten(-2)


class RangeSums:
    """Sums of ``w x`` and ``w`` over ranges of entries, from prefix sums of twice the precision."""

    def __init__(self, x: Tensor, w: Tensor | None) -> None:
        self.weighted = w is not None
        columns = self._prefix(x) if w is None else [*self._prefix(w * x), *self._prefix(w)]
        self.table = torch.stack(columns, -1).flatten(0, 1)
        self.row = torch.arange(x.shape[0], device=x.device).unsqueeze(-1) * (x.shape[-1] + 1)

    @staticmethod
    def _prefix(v: Tensor) -> list[Tensor]:
        """Prefix sums and what they lost to rounding, so that a large entry far away does not blur a range."""
        sums = pad(v.cumsum(-1), (1, 0))
        return [sums, pad((v - sums.diff(dim=-1)).cumsum(-1), (1, 0))]

    def over(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Both sums over ``start <= i < end``, for every pair of a row."""
        at_start, at_end = (self.table.index_select(0, (self.row + i).flatten()) for i in (start, end))
        difference = (at_end - at_start).unflatten(0, start.shape)
        wx = difference[..., 0] + difference[..., 1]
        return wx, difference[..., 2] + difference[..., 3] if self.weighted else (end - start).to(wx.dtype)


def merge(z: Tensor, sums: RangeSums, half: int) -> Tensor:
    """Merges neighbouring stretches of length `half`, each solved; ``(rows, n)`` to the same shape."""
    pairs = z.unflatten(-1, (-1, 2, half))
    left, right = pairs[..., 0, :].contiguous(), pairs[..., 1, :].contiguous()
    middle = torch.arange(half, z.shape[-1], 2 * half, device=z.device).expand(left.shape[:-1])

    def above_root(v: Tensor) -> Tensor:
        """h(v) < 0: the root m is less than v."""
        wx, w = sums.over(middle - half + rank(left, v), middle + rank(right, v))
        return wx < v * w

    start = middle - half + _first(left, above_root)

    def reached(v: Tensor) -> Tensor:
        """h(v) <= 0 with the pooled part of the left fixed: v is not pooled."""
        wx, w = sums.over(start, middle + rank(right, v))
        return wx <= v * w

    end = middle + _first(right, reached)
    end = torch.where(start < middle, end, middle)
    wx, w = sums.over(start, end)
    index = torch.arange(z.shape[-1], device=z.device).unflatten(-1, (-1, 2 * half))
    pooled = (index >= start.unsqueeze(-1)) & (index < end.unsqueeze(-1))
    return torch.where(pooled, (wx / w).unsqueeze(-1), z.unflatten(-1, (-1, 2 * half))).flatten(-2)


def rank(sorted_rows: Tensor, v: Tensor) -> Tensor:
    """How many entries of each sorted row are less than `v`."""
    return torch.searchsorted(sorted_rows, v.unsqueeze(-1)).squeeze(-1)


def _first(sorted_rows: Tensor, holds: Callable[[Tensor], Tensor]) -> Tensor:
    """The index of the first entry for which `holds`, which stays true from there on; the length if none."""
    n = sorted_rows.shape[-1]
    found = torch.zeros(sorted_rows.shape[:-1], dtype=torch.int64, device=sorted_rows.device)
    step = n
    while step:  # invariant: entries before `found` do not hold
        at = found + (step - 1)
        v = sorted_rows.gather(-1, at.clamp_max(n - 1).unsqueeze(-1)).squeeze(-1)
        found = torch.where((at < n) & ~holds(v), at + 1, found)
        step //= 2
    return found
