"""Cases of :mod:`difflayers.transport`."""

from __future__ import annotations

from difflayers.testing._case import LayerCase

from . import _transport_divergence, _transport_sinkhorn

__all__ = ["CASES"]

CASES: tuple[LayerCase, ...] = (
    *_transport_divergence.CASES,
    *_transport_sinkhorn.CASES,
)
