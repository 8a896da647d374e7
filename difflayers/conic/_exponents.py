"""Exponents over a temperature that may be tiny or zero, without a NaN in any derivative."""

from __future__ import annotations

import torch
from torch import Tensor

DEEP = 800.0  # e^-DEEP is zero in every dtype


def exponents(gap: Tensor, temperature: Tensor) -> Tensor:
    """``gap / temperature`` for gaps of at most 0, cut at -DEEP, where neither argument has a derivative.

    At a temperature of 0 a gap of 0 stays 0 and all others are cut.
    """
    low = gap.detach() < -DEEP * temperature.detach()
    cold = temperature.detach() == 0
    return torch.where(low, -DEEP, torch.where(low, 0, gap) / torch.where(cold, 1, temperature))
