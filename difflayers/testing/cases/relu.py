"""Cases of :mod:`difflayers.relu`."""

from __future__ import annotations

from difflayers.testing._case import LayerCase

from . import (
    _relu_constrained,
    _relu_gated,
    _relu_losses,
    _relu_net_trim,
    _relu_nuclear,
    _relu_robust,
    _relu_sampled,
)

__all__ = ["CASES"]

CASES: tuple[LayerCase, ...] = (
    *_relu_gated.CASES,
    *_relu_net_trim.CASES,
    *_relu_nuclear.CASES,
    *_relu_robust.CASES,
    *_relu_sampled.CASES,
    *_relu_constrained.CASES,
    *_relu_losses.CASES,
)
