"""The case of plans found by Newton's method with sparse Hessians."""

from __future__ import annotations

from difflayers.testing._case import LayerCase
from difflayers.transport import SparseNewton, sinkhorn

from ._transport_sinkhorn import TALL, _called, _only, _plan_case, _sums

__all__ = ["CASES"]

TANG = "X. Tang et al., Accelerating Sinkhorn Algorithm with Sparse Newton Iterations, 2024"
STARVED = SparseNewton(max_steps=1, sinkhorn_steps=1, scaling=False, fallback=False)

CASES: tuple[LayerCase, ...] = (
    _plan_case(
        "sinkhorn SparseNewton",
        TALL,
        options={"solver": SparseNewton()},
        source=TANG,
        invariants=(_sums,),
        starved=_called(sinkhorn, solver=STARVED),
        starved_solution=_called(_only("plan"), solver=STARVED),
    ),
)
