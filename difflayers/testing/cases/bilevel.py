"""Cases of :mod:`difflayers.bilevel`."""

from __future__ import annotations

from difflayers.testing._case import LayerCase

from . import _bilevel_applications, _bilevel_argmin

__all__ = ["CASES"]

CASES: tuple[LayerCase, ...] = (*_bilevel_argmin.CASES, *_bilevel_applications.CASES)
