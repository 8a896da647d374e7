r"""The continuous multi-dimensional knapsack: generator, and its form for dual bounds.

.. math:: \min_x -p^T x \quad \text{s.t.} \quad W x \le v, \; 0 \le x \le 1

A. Freville, G. Plateau, An efficient preprocessing procedure for the multidimensional 0-1 knapsack problem, 1994, for
the distribution; M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, NeurIPS 2024, section
5.1, for the relaxation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._completions import BoxCompletion


class Knapsack(NamedTuple):
    r"""Knapsack instances, ``max prices^T x s.t. weights x <= capacity, 0 <= x <= 1``.

    As a program with bounds from below, its objective is ``-prices^T x``. The properties `A`, `b`, `c` and `completion`
    are what :func:`dual_bound` takes; the multipliers are those of ``-weights x - (-capacity) >= 0``, at least 0.

    Attributes:
        prices: ``(*batch, n)``.
        weights: ``(*batch, m, n)``.
        capacity: ``(*batch, m)``.
    """

    prices: Tensor
    weights: Tensor
    capacity: Tensor

    @property
    def A(self) -> Tensor:
        """``(*batch, m, n)`` rows, the negative weights."""
        return -self.weights

    @property
    def b(self) -> Tensor:
        """``(*batch, m)`` right-hand sides, the negative capacity."""
        return -self.capacity

    @property
    def c(self) -> Tensor:
        """``(*batch, n)`` costs, the negative prices."""
        return -self.prices

    @property
    def completion(self) -> BoxCompletion:
        """The box from 0 to 1."""
        return BoxCompletion(0.0, 1.0)

    @property
    def features(self) -> Tensor:
        """``(*batch, n + m + m n)`` all data in a row: prices, capacity, weights."""
        return torch.cat([self.prices, self.capacity, self.weights.flatten(-2)], -1)


def sample_knapsack(
    count: int,
    *,
    constraints: int,
    items: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Knapsack:
    """Random knapsack instances of the benchmark's distribution.

    Weights are integers from 0 to 1000, a capacity is a quarter of its row's weights, and a price is the mean weight of
    its item plus up to 100: so that profitable items are heavy.

    Args:
        count: Number of instances.
        constraints: m.
        items: n.
        generator: Of the random numbers, on the CPU. None: torch's own.
        dtype: None: the default one. Integers of this size are exact in float32.
        device: None: the default one.

    Returns:
        Instances with a batch dimension of `count`.

    Example:
        >>> import torch
        >>> from difflayers.conic import sample_knapsack
        >>> instances = sample_knapsack(8, constraints=5, items=100, generator=torch.Generator().manual_seed(0))
        >>> instances.A.shape
        torch.Size([8, 5, 100])

    Source: M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024, section 5.1.
    """
    for name, value, least in (("count", count, 0), ("constraints", constraints, 1), ("items", items, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    where = torch.get_default_device() if device is None else torch.device(device)
    weights = torch.randint(
        0, 1001, (count, constraints, items), generator=generator, dtype=torch.int16, device="cpu"
    )  # large sets are large
    extra = 100 * torch.rand((count, items), generator=generator, dtype=torch.float64, device="cpu")
    capacity = (0.25 * weights.sum(-1)).round()
    prices = (extra + weights.sum(-2) / constraints).round()
    like = dtype or torch.get_default_dtype()
    return Knapsack(*(t.to(device=where, dtype=like) for t in (prices, weights, capacity)))
