"""Cases of distillation by transport, of the L1 distance it is made of, and of rounding to the transport polytope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.testing._case import Hostile, LayerCase, Wrong
from difflayers.transport import (
    KernelSinkhorn,
    Manhattan,
    SinkhornDistillation,
    round_to_polytope,
    sinkhorn_distillation,
)

from ._common import numbers, per_element
from ._transport_divergence import _angles
from ._transport_sinkhorn import _plan

__all__ = ["CASES"]

CUI = "X. Cui et al., Sinkhorn Distance Minimization for Knowledge Distillation, 2024"
ALTSCHULER = "J. Altschuler et al., Near-linear time approximation algorithms for optimal transport, 2017"


def _l1(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(x[:, None] - y).sum(-1))


def _moved(W: np.ndarray, a: np.ndarray, b: np.ndarray, eps: Any) -> np.ndarray:
    """The cost of the plan, by alternate minimisation to a standstill."""
    return np.asarray((W * _plan(W, a, b, np.asarray(eps))).sum())


def _softmax(x: np.ndarray) -> np.ndarray:
    y = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(y / y.sum(-1, keepdims=True))


# ------------------------------------------------------------------------------------------------------------- logits

LOGITS = numbers(
    [[[2.0, 0.3, -1.0], [0.1, 1.2, 0.4], [-0.6, 0.5, 0.9]], [[0.2, -0.9, 1.1], [1.5, 0.0, 0.7], [0, 1, 3]]]
)
TEACHER = numbers([[3.0, 0.2, -2.0], [-0.4, 2.6, 0.3], [-1.0, 0.8, 2.2]])
MASK = torch.tensor([True, True, False], device="cpu")


def _logits_oracle(mask: np.ndarray | None = None) -> Callable[..., np.ndarray]:
    def oracle(student: np.ndarray) -> np.ndarray:
        W = _l1(_softmax(student / 2), _softmax(TEACHER.numpy() / 2))
        mass = np.ones(3) if mask is None else mask.astype(float)
        return _moved(W, mass / mass.sum(), mass / mass.sum(), 0.1)

    return oracle


def _logits_called(mask: Tensor | None = None, **options: Any) -> Callable[[Tensor], Tensor]:
    loss = SinkhornDistillation(reduction="none", **options)

    def call(student: Tensor) -> Tensor:
        of = None if mask is None else mask.to(student.device).expand(student.shape[:-1])
        return loss(student, TEACHER.to(student).expand(torch.broadcast_shapes(student.shape, TEACHER.shape)), of)

    return call


def _logits_hostile(x: Tensor) -> tuple[Hostile, ...]:
    same = TEACHER.expand_as(x).clone()
    return (
        Hostile("large logits", (x * 1e9,)),
        Hostile("small logits", (x * 1e-9,)),
        Hostile("the teacher's own", (same,)),
        Hostile("equal rows", (x[:, :1].expand_as(x).clone(),)),
        Hostile("zeros", (x * 0,)),
    )


# ------------------------------------------------------------------------------------------------------------- states

STATES = numbers([[[0.4, -0.2], [0.9, 0.6]], [[-0.5, 0.3], [0.2, 0.8]]])
TARGET = numbers([[0.3, 0.5], [-0.6, 0.1], [0.7, -0.4]])
A, B, EPS = numbers([[0.4, 0.6], [0.7, 0.3]]), numbers([0.3, 0.5, 0.2]), numbers(0.3)


def _states_called(**options: Any) -> Callable[..., Tensor]:
    def call(student: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> Tensor:
        if (a.device, a.dtype) == (b.device, b.dtype):  # some clauses scale an input; totals must agree
            ratio = (a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True)).abs()
            b = b * torch.where(torch.isfinite(ratio), ratio, 1)
        return sinkhorn_distillation(student, TARGET.to(student), a, b, eps=eps, **options)

    return call


def _states_oracle(distance: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda x, a, b, eps: _moved(distance(x, TARGET.numpy()), a, b, eps)


def _states_case(name: str, distance: Callable[..., np.ndarray], **options: Any) -> LayerCase:
    data, masses = (STATES, A, B, EPS), (A, B, EPS)
    few = KernelSinkhorn(max_steps=1, check_every=1, newton_steps=0)
    return LayerCase(
        name,
        _states_called(**options),
        data,
        per_element(_states_oracle(distance), (2, 1, 1, 0)),
        source=CUI,
        event_ndims=(2, 1, 1, 0),
        tolerant=_states_called(on_failure="nan", **options),
        starved=_states_called(solver=few, **options),
        hostile=(
            Hostile("states at the origin", (STATES * 0, *masses)),
            Hostile("equal states", (STATES[:, :1].expand_as(STATES).clone(), *masses)),
            Hostile("the teacher's own", (TARGET[:2].expand_as(STATES).clone(), *masses)),
            Hostile("little mass", (STATES, A * 1e-9, B * 1e-9, EPS)),
            Hostile("negative mass", (STATES, -A, B, EPS), ValueError, "a: expected masses"),
            Hostile("eps of zero", (STATES, A, B, EPS * 0), ValueError, "eps: expected"),
        ),
        wrong=(
            Wrong("a vector", (STATES[0, 0], *masses), "student: expected at least 2 dimensions"),
            Wrong("width", (STATES[..., :1], *masses), r"teacher: expected shape \(1,\) in its last dimension"),
            Wrong("masses", (STATES, A[:, 1:], B, EPS), r"a: expected shape \(2,\) as cost has rows"),
        ),
        representative=name == "sinkhorn_distillation",  # Manhattan has its own
        exact_bits=False,
        exempt={"autocast_of_backward": "the products of the cost are plain torch, which autocast halves in backward"},
    )


# ----------------------------------------------------------------------------------------------------------- rounding

PLAN = numbers([[[0.2, 0.1, 0.15], [0.3, 0.05, 0.1]], [[0.15, 0.3, 0.05], [0.2, 0.1, 0.25]]])


def _round_oracle(P: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Altschuler et al., algorithm 2, line by line."""
    P = np.array(P)
    for i in range(len(a)):
        P[i] *= min(a[i] / P[i].sum(), 1)
    for j in range(len(b)):
        P[:, j] *= min(b[j] / P[:, j].sum(), 1)
    rows, columns = a - P.sum(1), b - P.sum(0)
    return np.asarray(P + rows[:, None] * columns / rows.sum())


def _round_called(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Some clauses scale an input; totals must agree."""
    if (a.device, a.dtype) == (b.device, b.dtype):
        ratio = (a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True)).abs()
        b = b * torch.where(torch.isfinite(ratio), ratio, 1)
    return round_to_polytope(plan, a, b)


def _product(_: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (a.unsqueeze(-1) * b.unsqueeze(-2) / a.sum(-1)[..., None, None]).expand(2, 2, 3)


first = torch.zeros_like(A)
first[..., 0] = 1

CASES: tuple[LayerCase, ...] = (
    LayerCase(
        "Manhattan",
        Manhattan(),
        (STATES, TARGET),
        per_element(_l1, (2, 2)),
        source=CUI,
        event_ndims=(2, 2),
        names=("x", "y"),
        hostile=(
            Hostile("coincident points", (STATES, STATES[0])),
            Hostile("small numbers", (STATES * 1e-9, TARGET * 1e-9)),
            Hostile("large numbers", (STATES * 1e9, TARGET * 1e9)),
        ),
        wrong=(
            Wrong("dimensions", (STATES, TARGET[:, :1]), r"y: expected shape \(2,\) in its last dimension as x has"),
        ),
        half=False,
        representative=True,
    ),
    LayerCase(
        "SinkhornDistillation",
        _logits_called(),
        (LOGITS,),
        per_element(_logits_oracle(), (2,)),
        source=CUI,
        representative=True,
        tolerant=_logits_called(on_failure="nan"),
        hostile=_logits_hostile(LOGITS),
        wrong=(Wrong("a vector", (LOGITS[0, 0],), "student_logits: expected at least 2 dimensions"),),
        make_module=lambda: SinkhornDistillation(reduction="sum").double(),
        module_inputs=(LOGITS, TEACHER.expand_as(LOGITS)),
        exact_bits=False,
        exempt={"module_learns": "a loss has no parameters, so there is nothing that could get a gradient"},
    ),
    LayerCase(
        "SinkhornDistillation masked",
        _logits_called(MASK),
        (LOGITS,),
        per_element(_logits_oracle(MASK.numpy()), (2,)),
        source=CUI,
        tolerant=_logits_called(MASK, on_failure="nan"),
        hostile=_logits_hostile(LOGITS),
        exact_bits=False,
    ),
    _states_case("sinkhorn_distillation", _angles),
    _states_case("sinkhorn_distillation Manhattan", _l1, cost=Manhattan()),
    LayerCase(
        "round_to_polytope",
        _round_called,
        (PLAN, A, B),
        per_element(_round_oracle, (2, 1, 1)),
        (lambda P, _, a, b: torch.cat([P.sum(-1) - a, P.sum(-2) - b.expand(*P.shape[:-2], 3)], -1),),
        (2, 1, 1),
        names=("plan", "a", "b"),
        source=ALTSCHULER,
        representative=True,
        hostile=(
            Hostile("small numbers", (PLAN * 1e-9, A * 1e-9, B * 1e-9)),
            Hostile("large numbers", (PLAN * 1e9, A * 1e9, B * 1e9)),
            Hostile("much too heavy", (PLAN * 1e9, A, B)),
            Hostile("much too light", (PLAN * 1e-9, A, B)),
            Hostile("zeros", (PLAN * 0, A, B), oracle=_product),
            Hostile("a coupling", (_product(PLAN, A, B), A, B), oracle=_product),
            Hostile("a row without mass", (PLAN, first, B)),
            Hostile("negative mass", (PLAN, -A, B), ValueError, "a: expected masses"),
            Hostile("totals", (PLAN, A * 1.1, B), ValueError, "expected equal totals", fn=round_to_polytope),
        ),
        wrong=(
            Wrong("a vector", (PLAN[0, 0], A, B), "plan: expected at least 2 dimensions"),
            Wrong("rows", (PLAN, A[..., 1:], B), r"a: expected shape \(2,\) as plan has rows"),
            Wrong("columns", (PLAN, A, B[..., 1:]), r"b: expected shape \(3,\) as plan has columns"),
        ),
    ),
)
