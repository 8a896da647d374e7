"""Operators that average: which neighbours share a value, and the closed form once that is known.

Isotonic regression, the sorted l1 norm and total variation cut a vector into pieces on which the result is constant.
*Given* the pieces, the result is the mean of each, which is plain torch; *which* they are, an algorithm finds (see
:mod:`difflayers.proximal._identify`). A block is known by the number that all its entries carry, from 0 on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

TIE = 8  # rounding units by which neighbours may differ and still count as equal


def block_sums(v: Tensor, blocks: Tensor) -> Tensor:
    """The sum of every entry's block, ``(*batch, n)``."""
    return torch.zeros_like(v).scatter_add(-1, blocks, v).gather(-1, blocks)


def block_means(v: Tensor, blocks: Tensor, weights: Tensor | None = None) -> Tensor:
    """The (weighted) mean of every entry's block, ``(*batch, n)``."""
    if weights is None:
        return block_sums(v, blocks) / block_sums(torch.ones_like(v), blocks)
    return block_sums(v * weights, blocks) / block_sums(weights, blocks)


def block_largest(v: Tensor, blocks: Tensor) -> Tensor:
    """The largest entry of every entry's block; no derivative is meant."""
    return torch.zeros_like(v).scatter_reduce(-1, blocks, v, "amax", include_self=False).gather(-1, blocks)


def levels(v: Tensor, blocks: Tensor, weights: Tensor | None = None) -> Tensor:
    """As :func:`block_means`, correct to a few rounding units of the largest entry in a block of any length."""
    rough = block_means(v, blocks, weights)
    return rough + block_means(v - rough, blocks, weights)


def merge_ties(z: Tensor, v: Tensor, first: Tensor, apart: Tensor | None = None) -> Tensor:
    """Joins neighbouring blocks whose values are equal up to rounding: they move together.

    Args:
        z: ``(*batch, n)`` value of every entry's block.
        v: ``(*batch, n)`` what was averaged.
        first: ``(*batch, n)`` whether an entry is the first of its block.
        apart: ``(*batch, n)`` whether an entry must not be joined to the one before it.

    Returns:
        `first` with fewer blocks.
    """
    blocks = number(first)
    largest, smallest = block_largest(v, blocks), -block_largest(-v, blocks)
    size = torch.maximum(largest.abs(), smallest.abs())
    rounding = TIE * torch.finfo(z.dtype).eps * torch.maximum(size[..., 1:], size[..., :-1])
    # what is equal was not averaged, so two such blocks that differ do differ
    exact = largest == smallest
    rounding = torch.where(exact[..., 1:] & exact[..., :-1], 0, rounding)
    differs = pad(z.diff(dim=-1).abs() > rounding, (1, 0), value=True)
    return first & (differs if apart is None else differs | apart)


def number(first: Tensor) -> Tensor:
    """Block numbers from the marks of first entries."""
    return first.cumsum(-1) - 1
