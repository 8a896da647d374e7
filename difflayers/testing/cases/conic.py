"""Cases of :mod:`difflayers.conic`."""

from __future__ import annotations

from difflayers.testing._case import LayerCase

from . import _conic_cone_programs, _conic_cones, _conic_duals, _conic_programs, _conic_risk, _conic_upgrad

__all__ = ["CASES"]

CASES: tuple[LayerCase, ...] = (
    *_conic_cone_programs.CASES,
    *_conic_cones.CASES,
    *_conic_duals.CASES,
    *_conic_programs.CASES,
    *_conic_risk.CASES,
    *_conic_upgrad.CASES,
)
