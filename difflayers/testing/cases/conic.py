"""Cases of :mod:`difflayers.conic`."""

from __future__ import annotations

from difflayers.testing._case import LayerCase

from . import _conic_cones

__all__ = ["CASES"]

CASES: tuple[LayerCase, ...] = _conic_cones.CASES
