r"""Penalties of spectral risk: which sorted losses share their weights, and risk and weights once that is known.

Losses are divided by a scale s (below) and sorted. Neighbours that violate the order of what they are worth,

.. math:: c_B = \operatorname{mean}_B (\ell / s - \sigma) \;\; (\chi^2), \qquad
    c_B = \log \textstyle\sum_B e^{\ell / s} - \log \sum_B \sigma \;\; (\mathrm{KL}),

are pooled until these numbers do not fall. Inside a block B the weights have the sum of its entries of sigma and follow
the losses: :math:`q = \bar\sigma_B + (\ell - \bar\ell_B) / s`, or :math:`q = \sum_B \sigma \cdot
\operatorname{softmax}_B(\ell / s)`. R. Mehta, V. Roulet, K. Pillutla, Z. Harchaoui, Distributionally Robust
Optimization with Bias and Variance Reduction, 2024.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from difflayers.proximal._operands import Number
from difflayers.proximal._partition import block_largest, block_sums, number

from ._exponents import exponents
from ._pooling import blocks_of_log_ratios, blocks_of_means

PIECE = 2**18  # numbers
NEGLIGIBLE = 100.0  # e^-NEGLIGIBLE is nothing beside 1, even times the number of losses


class Sorted(NamedTuple):
    """Losses and what is known of them in sorted order, each in its caller's place; all ``(*batch, n)``.

    Attributes:
        losses: Losses.
        blocks: The number of the block.
        size: How many entries the block has.
        anchor: A constant, the largest loss of the block, from which distances are taken.
        mean: The mean of the spectrum over the block.
        scale: What losses are divided by, ``(*batch, 1)``; 0 where there is no penalty.
    """

    losses: Tensor
    blocks: Tensor
    size: Tensor
    anchor: Tensor
    mean: Tensor
    scale: Tensor

    def mean_of(self, v: Tensor) -> Tensor:
        """The mean of every entry's block."""
        return block_sums(v, self.blocks) / self.size

    # methods, since Dynamo of torch 2.6 trips over the properties of a named tuple

    def n(self) -> int:
        """The number of losses."""
        return self.losses.shape[-1]

    def free(self) -> Tensor:
        """Where there is no penalty."""
        return self.scale.detach() == 0


@dataclass(frozen=True, eq=False)
class Divergence(ABC):
    """How far weights are from uniform, and what that costs: :class:`ChiSquare` or :class:`KL`.

    Attributes:
        strength: At least 0: a number, or a tensor ``(*batch)``.
    """

    strength: Number

    @abstractmethod
    def _scale(self, strength: Tensor, n: int) -> Tensor:
        """What losses are divided by."""

    @abstractmethod
    def _blocks(self, gaps: Tensor, sigma: Tensor) -> Tensor:
        """Blocks from the gaps between sorted losses over the scale; plain tensors in float64."""

    @abstractmethod
    def _weights(self, at: Sorted) -> Tensor:
        """The optimal weights."""

    @abstractmethod
    def _risk(self, at: Sorted) -> Tensor:
        """The optimal value, as one term for each loss."""


@dataclass(frozen=True, eq=False)
class NoPenalty(Divergence):
    """Weights cost nothing: only equal losses share theirs."""

    strength: Number = 0.0

    def _scale(self, strength: Tensor, n: int) -> Tensor:
        return strength

    def _blocks(self, gaps: Tensor, sigma: Tensor) -> Tensor:
        return _ties(gaps)

    def _weights(self, at: Sorted) -> Tensor:
        return at.mean

    def _risk(self, at: Sorted) -> Tensor:
        return at.mean * at.losses


@dataclass(frozen=True, eq=False)
class ChiSquare(Divergence):
    """The penalty ``strength * n * sum_i (q_i - 1/n)^2``.

    Args:
        strength: At least 0: a number, or a tensor ``(*batch)``, in which the risk is differentiable.
    """

    def _scale(self, strength: Tensor, n: int) -> Tensor:
        return 2 * n * strength

    def _blocks(self, gaps: Tensor, sigma: Tensor) -> Tensor:
        spread = sigma[..., -1:] - sigma[..., :1]
        return blocks_of_means(_heights(gaps, 2 * spread) - sigma)

    def _above_mean(self, at: Sorted) -> tuple[Tensor, Tensor]:
        """By how much a loss is above the mean of its block, and that over the scale."""
        gap = at.losses - at.anchor
        above = gap - at.mean_of(gap)
        return above, torch.where(at.free(), 0, above / torch.where(at.free(), 1, at.scale))

    def _weights(self, at: Sorted) -> Tensor:
        return at.mean + self._above_mean(at)[1]

    def _risk(self, at: Sorted) -> Tensor:
        above, shift = self._above_mean(at)
        return at.mean * at.losses + above * shift / 2 - at.scale / 2 * (at.mean - 1 / at.n()).square()


@dataclass(frozen=True, eq=False)
class KL(Divergence):
    """The penalty ``strength * sum_i q_i log(n q_i)``.

    Args:
        strength: At least 0: a number, or a tensor ``(*batch)``, in which the risk is differentiable.
    """

    def _scale(self, strength: Tensor, n: int) -> Tensor:
        return strength

    def _blocks(self, gaps: Tensor, sigma: Tensor) -> Tensor:
        smallest = torch.where(sigma > 0, sigma, math.inf).amin(-1, keepdim=True)
        return blocks_of_log_ratios(_heights(gaps, (sigma[..., -1:] / smallest).log() + NEGLIGIBLE), sigma)

    def _shares(self, at: Sorted) -> tuple[Tensor, Tensor]:
        """Exponentials of the losses over the scale, that of the anchor being 1, and their mean over the block."""
        e = exponents(at.losses - at.anchor, at.scale).exp()
        return e, at.mean_of(e)

    def _weights(self, at: Sorted) -> Tensor:
        e, mean = self._shares(at)
        return torch.where(at.free(), at.mean, at.mean * (e / mean))

    def _risk(self, at: Sorted) -> Tensor:
        base = torch.where(at.free(), at.losses, at.anchor + at.scale * self._shares(at)[1].log())
        # only without a penalty is there a block of zeros: then the logarithm does not count
        log_ratio = (at.n() * at.mean).clamp_min(torch.finfo(at.mean.dtype).tiny).log()
        return at.mean * (base - at.scale * log_ratio)


def locate(divergence: Divergence, losses: Tensor, sigma: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """For every loss its rank, its block, the block's size, anchor and mean of sigma; on plain tensors."""
    batch, n = torch.broadcast_shapes(losses.shape[:-1], sigma.shape[:-1], scale.shape[:-1]), losses.shape[-1]
    rows = [t.expand(*batch, t.shape[-1]).reshape(-1, t.shape[-1]) for t in (losses, sigma, scale)]
    # a CPU goes through large batches in pieces that stay in its cache
    height = max(1, PIECE // n) if losses.device.type == "cpu" else max(1, len(rows[0]))
    parts = [_locate(divergence, *piece) for piece in zip(*(t.split(height) for t in rows), strict=True)]
    return tuple(torch.cat(found).reshape(*batch, n) for found in zip(*parts, strict=True))


def _locate(divergence: Divergence, losses: Tensor, sigma: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """The same for ``(rows, n)``."""
    sigma, (ascending, order) = sigma.double(), losses.double().sort(dim=-1, stable=True)
    ranks = torch.arange(losses.shape[-1], device=losses.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, ranks)
    gaps = ascending.diff(dim=-1)
    gaps = torch.where(gaps > 0, gaps / scale, 0)  # NaN counts as no gap
    blocks = torch.where(scale == 0, _ties(gaps), divergence._blocks(gaps, sigma))
    size, anchor = torch.ones_like(ascending), ascending
    if blocks.numel() and bool((blocks[..., -1] < ranks[..., -1]).any()):  # not every entry is a block of its own
        # entries of equal weight never exchange anything: each is a block of its own
        new = pad(blocks.diff(dim=-1) > 0, (1, 0), value=True)
        steeper = ~new & (pad(sigma.diff(dim=-1), (1, 0)) > 0)
        blocks = number(new | (block_sums(steeper.to(sigma), blocks) == 0))
        size, anchor = block_sums(size, blocks), block_largest(ascending, blocks)
        rough = block_sums(sigma, blocks) / size
        sigma = rough + block_sums(sigma - rough, blocks) / size
    found = (t.gather(-1, rank) for t in (blocks, size, anchor, sigma))
    return rank, next(found), *(t.to(losses.dtype) for t in found)


def _ties(gaps: Tensor) -> Tensor:
    """Blocks of equal losses."""
    return number(pad(gaps > 0, (1, 0), value=True))


def _heights(gaps: Tensor, widest: Tensor) -> Tensor:
    """Sorted losses over the scale, up to a constant, with gaps cut where no block can cross them.

    So the numbers stay small: nothing is lost to rounding beside sigma, however small the scale.
    """
    return pad(torch.minimum(gaps, widest).cumsum(-1), (1, 0))
