"""Cases of :mod:`difflayers.proximal`."""

from __future__ import annotations

from difflayers.testing._case import LayerCase

from . import (
    _proximal_inverse,
    _proximal_learned,
    _proximal_matrices,
    _proximal_moreau,
    _proximal_scalars,
    _proximal_sparse,
    _proximal_variation,
    _proximal_vectors,
)

__all__ = ["CASES"]

CASES: tuple[LayerCase, ...] = (
    *_proximal_moreau.CASES,
    *_proximal_learned.CASES,
    *_proximal_scalars.CASES,
    *_proximal_sparse.CASES,
    *_proximal_inverse.CASES,
    *_proximal_vectors.CASES,
    *_proximal_matrices.CASES,
    *_proximal_variation.CASES,
)
