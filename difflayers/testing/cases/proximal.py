"""Cases of :mod:`difflayers.proximal`."""

from __future__ import annotations

from difflayers.testing._case import LayerCase

from . import _proximal_vectors

__all__ = ["CASES"]

CASES: tuple[LayerCase, ...] = (*_proximal_vectors.CASES,)
