"""Cases of :mod:`difflayers.transport`."""

from __future__ import annotations

from difflayers.testing._case import LayerCase

from . import (
    _transport_clustering,
    _transport_distillation,
    _transport_divergence,
    _transport_gsp,
    _transport_labels,
    _transport_points,
    _transport_sinkhorn,
    _transport_sparse_newton,
)

__all__ = ["CASES"]

CASES: tuple[LayerCase, ...] = (
    *_transport_clustering.CASES,
    *_transport_distillation.CASES,
    *_transport_divergence.CASES,
    *_transport_gsp.CASES,
    *_transport_labels.CASES,
    *_transport_points.CASES,
    *_transport_sinkhorn.CASES,
    *_transport_sparse_newton.CASES,
)
