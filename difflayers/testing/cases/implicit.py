"""Cases of :mod:`difflayers.implicit`."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element
from ._constrained_minima import CONSTRAINED
from ._fixed_points import FIXED_POINTS, MODULES
from ._minima import FITS, MINIMA
from ._roots import ROOTS
from ._transport_plan import transport_plan, transport_plan_ex

__all__ = ["CASES"]


def _plan_by_scaling(cost: np.ndarray, a: np.ndarray, b: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """Matrix scaling in plain numpy, far beyond convergence."""
    a, b = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
    K = np.exp(-cost / eps)
    v = np.ones_like(b)
    for _ in range(20000):
        u = a / (K @ v)
        v = b / (K.T @ u)
    return u[:, None] * K * v


def _plan_unrolled(cost: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    """Sinkhorn in the logarithm under autograd."""
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    S = -cost / eps[..., None, None]
    for _ in range(300):
        S = S - S.logsumexp(-1, keepdim=True) + log_a.unsqueeze(-1)
        S = S - S.logsumexp(-2, keepdim=True) + log_b.unsqueeze(-2)
    return S.exp()


def _sums_are_right(plan: Tensor, cost: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    return torch.cat([plan.sum(-1) - a.softmax(-1), plan.sum(-2) - b.softmax(-1)], -1)


PLAN = (normal(17, 2, 2, 3).abs(), normal(18, 2), normal(19, 3), numbers(0.5))

PLANS = (
    LayerCase(
        "solution_map transport plan",
        transport_plan,
        PLAN,
        per_element(_plan_by_scaling, (2, 1, 1, 0)),
        (_sums_are_right,),
        (2, 1, 1, 0),
        names=("cost", "a", "b", "eps"),
        source="M. Cuturi, Sinkhorn distances, 2013; the pattern for authors of layers",
        representative=True,
        unrolled=_plan_unrolled,
        tolerant=partial(transport_plan, on_failure="nan"),
        solution=transport_plan_ex,
        starved=partial(transport_plan, max_steps=1),
        starved_solution=partial(transport_plan_ex, max_steps=1),
        hostile=(
            Hostile("cost zero: every plan entry a product", (0 * PLAN[0], *PLAN[1:])),
            Hostile("ties in the cost", (torch.ones_like(PLAN[0]), *PLAN[1:])),
            Hostile("one marginal almost empty", (PLAN[0], numbers([0.0, -40.0]), *PLAN[2:])),
            Hostile("cold", (*PLAN[:3], numbers(0.05)), may_fail=True),
        ),
        wrong=(
            Wrong("batches that do not fit", (PLAN[0], normal(1, 5, 2), *PLAN[2:]), "a: expected batch dimensions"),
            Wrong("cost without columns", (PLAN[0][0, 0], *PLAN[1:]), "cost: expected at least 2 dimensions"),
        ),
    ),
)

CASES: tuple[LayerCase, ...] = (*ROOTS, *FIXED_POINTS, *MODULES, *MINIMA, *CONSTRAINED, *FITS, *PLANS)
