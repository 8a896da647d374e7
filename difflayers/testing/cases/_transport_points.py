"""Cases of entropic transport between points whose costs are not stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.testing._case import Hostile, LayerCase, Wrong
from difflayers.transport import (
    Cosine,
    Euclidean,
    LogSinkhorn,
    PointCloud,
    SquaredEuclidean,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_ex,
    sinkhorn_value,
)

from ._common import numbers, per_element
from ._transport_divergence import EXEMPT, _angles, _distances, _divergence, _squares
from ._transport_sinkhorn import CHIZAT, CUTURI, FEYDY, _plan, _potentials, _value

__all__ = ["CASES"]

NAMES, NDIMS = ("x", "y", "a", "b", "eps", "rho_a", "rho_b"), (2, 2, 1, 1, 0, 0, 0)
X = numbers([[[0.1, 0.4], [0.9, -0.3]], [[1.2, 0.5], [-0.4, 0.7]]])
Y = numbers([[0.3, -0.2], [0.8, 0.6], [-0.5, 0.1]])
A, B, EPS, RHO = numbers([0.4, 0.6]), numbers([0.3, 0.5, 0.2]), numbers(0.5), numbers(0.8)
STARVED = LogSinkhorn(max_steps=1, newton_steps=0)
V = numbers([[1.0, -0.5], [0.3, 2.0], [-1.2, 0.4]])


def _called(make: Callable[..., Any], cost: Any = None, rows: int | None = None, **options: Any) -> Callable[..., Any]:
    """``(x, y, a, b, eps, rho_a, rho_b)``, of which the penalties may be missing."""

    def call(x: Tensor, y: Tensor, a: Tensor, b: Tensor, eps: Tensor, *rho: Tensor) -> Any:
        if not rho and (a.device, a.dtype) == (b.device, b.dtype):  # some clauses scale an input; totals must agree
            ratio = (a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True)).abs()
            b = b * torch.where(torch.isfinite(ratio), ratio, 1)
        cloud = PointCloud(x, y, SquaredEuclidean() if cost is None else cost, rows=rows)
        return make(cloud, a, b, eps=eps, **dict(zip(("rho_a", "rho_b")[: len(rho)], rho, strict=True)), **options)

    return call


def _applied(*data: Any, **options: Any) -> Any:
    """The plan times fixed vectors."""
    found = sinkhorn_ex(*data, **options)
    return replace(found, value=found.value.apply(V.to(found.value.f).expand(*found.value.shape[:-2], 3, 2)))


def _g(*data: Any, **options: Any) -> Any:
    return replace(found := sinkhorn_ex(*data, **options), value=found.value.g)


def _of_points(oracle: Callable[..., Any], costs: Callable[..., np.ndarray] = _squares) -> Callable[..., np.ndarray]:
    return lambda x, y, *rest: oracle(costs(x, y), *rest)


def _case(name: str, fn: Callable[..., Any], oracle: Any, *rest: Tensor, **fields: Any) -> LayerCase:
    inputs = (X, Y, A, B, EPS, *rest)
    more = (EPS, *rest)
    power, first = fields.pop("power", 2), numbers([0.0, 1.0])  # of the numbers in their cost
    common: dict[str, Any] = {
        "layer": "PointCloud",
        "source": CHIZAT if rest else CUTURI,
        "event_ndims": NDIMS[: len(inputs)],
        "names": NAMES[: len(inputs)],
        "exact_bits": False,
        "hostile": (
            Hostile("small numbers", (X * 1e-6, Y * 1e-6, A, B, *(t * 1e-6**power for t in more))),
            Hostile("large numbers", (X * 1e6, Y * 1e6, A, B, *(t * 1e6**power for t in more))),
            Hostile("small eps", (X, Y, A, B, EPS * 1e-2, *rest)),
            Hostile("large eps", (X, Y, A, B, EPS * 1e4, *rest)),
            Hostile("coincident points", (X, X[:, [0, 0, 1]], A, B, *more)),
            Hostile("duplicates", (X[:, :1].expand_as(X).clone(), Y, A, B, *more)),
            Hostile("far away", (X + 5, Y, A, B, *more), may_fail=True),
            Hostile("a point without mass", (X, Y, first, B, *more)),
            Hostile("negative mass", (X, Y, -A, B, *more), ValueError, "a: expected masses"),
            Hostile("eps of zero", (X, Y, A, B, EPS * 0, *rest), ValueError, "eps: expected"),
        ),
        "wrong": (
            Wrong("dimensions", (X, Y[:, :1], A, B, *more), r"y: expected shape \(2,\) in its last dimension as x has"),
            Wrong("masses", (X, Y, A, B[..., 1:], *more), r"b: expected shape \(3,\) as y has points"),
        ),
    }
    return LayerCase(name, fn, inputs, per_element(oracle, NDIMS[: len(inputs)]), **(common | fields))


def _free_divergence(x: Tensor, y: Tensor, a: Tensor, b: Tensor, eps: Tensor, rho: Tensor) -> Tensor:
    return sinkhorn_divergence(x, y, a, b, eps=eps, rho=rho, matrix_free=True)


CASES: tuple[LayerCase, ...] = (
    _case(
        "PointCloud sinkhorn",
        _called(sinkhorn),
        _of_points(_plan),
        tolerant=_called(sinkhorn, on_failure="nan"),
        starved=_called(sinkhorn, solver=STARVED),
    ),
    _case(
        "PointCloud apply",
        lambda *data: _called(_applied, rows=1)(*data).value,
        lambda x, y, *rest: _plan(_squares(x, y), *rest) @ V.numpy(),
        solution=_called(_applied),
        starved_solution=_called(_applied, solver=STARVED),
        representative=True,
    ),
    _case(
        "PointCloud g penalised, Euclidean",
        lambda *data: _called(_g, Euclidean())(*data).value,
        _of_points(lambda *data: _potentials(*data)[2], _distances),
        RHO,
        power=1,
    ),
    _case(
        "PointCloud sinkhorn_value",
        _called(sinkhorn_value),
        _of_points(_value),
        source=FEYDY,
        tolerant=_called(sinkhorn_value, on_failure="nan"),
    ),
    _case(
        "PointCloud sinkhorn_value penalised, Cosine",
        _called(sinkhorn_value, Cosine()),
        _of_points(_value, _angles),
        RHO,
        numbers(1.4),
        power=0,
        source=FEYDY,
    ),
    LayerCase(
        "sinkhorn_divergence matrix-free",
        _free_divergence,
        (X, Y, A, B, EPS, RHO),
        per_element(_divergence, (2, 2, 1, 1, 0, 0)),
        layer="sinkhorn_divergence",
        source=FEYDY,
        event_ndims=(2, 2, 1, 1, 0, 0),
        exact_bits=False,
        exempt=EXEMPT,
    ),
)
