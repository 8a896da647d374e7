"""Cases of :mod:`difflayers.relu`."""

from __future__ import annotations

from difflayers.testing._case import LayerCase

from . import _relu_gated

__all__ = ["CASES"]

CASES: tuple[LayerCase, ...] = (*_relu_gated.CASES,)
