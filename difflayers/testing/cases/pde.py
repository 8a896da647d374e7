"""Cases of :mod:`difflayers.pde`."""

from __future__ import annotations

from difflayers.testing._case import LayerCase

from . import _pde_conservation, _pde_constraint, _pde_darcy, _pde_experts, _pde_layer

__all__ = ["CASES"]

CASES: tuple[LayerCase, ...] = (
    *_pde_constraint.CASES,
    *_pde_conservation.CASES,
    *_pde_layer.CASES,
    *_pde_experts.CASES,
    *_pde_darcy.CASES,
)
