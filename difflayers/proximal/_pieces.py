"""Piecewise linear building blocks whose derivative at a kink is that of the zero, or of the bound, at every order.

``torch.clamp``, ``maximum`` and ``minimum`` pass the whole cotangent, or half of it, to the entry that only just
reaches a bound. These do not, and with bounds that are numbers each is one fused kernel in either direction.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import hardtanh, softshrink

from ._operands import Number


def soften(x: Tensor, bound: Number) -> Tensor:
    """``sign(x) max(|x| - bound, 0)`` for a bound of at least 0."""
    if isinstance(bound, Tensor):
        return torch.relu(x - bound) - torch.relu(-x - bound)
    return softshrink(x, bound)


def clip(x: Tensor, lower: Number, upper: Number) -> Tensor:
    """``min(max(x, lower), upper)``."""
    if isinstance(lower, Tensor) or isinstance(upper, Tensor):
        return torch.where(x <= lower, lower, torch.where(x >= upper, upper, x))
    return hardtanh(x, lower, upper)
