"""Cases of costs between points, and of the Sinkhorn divergence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.testing._case import Hostile, LayerCase, Wrong
from difflayers.transport import Cosine, Euclidean, SquaredEuclidean, sinkhorn_divergence

from ._common import numbers, per_element
from ._transport_sinkhorn import FEYDY, _value

__all__ = ["CASES"]

SEJOURNE = "T. Sejourne et al., Sinkhorn Divergences for Unbalanced Optimal Transport, 2019"


def _squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray(((x[:, None] - y) ** 2).sum(-1))


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x[:, None] - y, axis=-1)


def _angles(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(x, axis=-1)[:, None] * np.linalg.norm(y, axis=-1)
    return 1 - (x @ y.T) / np.where(lengths > 0, lengths, 1)


def _divergence(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray, eps: Any, rho: Any = None) -> Any:
    soft = () if rho is None else (rho, rho)
    if rho is None:
        b = b / b.sum() * a.sum()
    mixed, first, second = (
        _value(_squares(p, q), s, t, eps, *soft) for p, q, s, t in ((x, y, a, b), (x, x, a, a), (y, y, b, b))
    )
    return mixed - first / 2 - second / 2 + eps / 2 * (a.sum() - b.sum()) ** 2


def _called(**options: Any) -> Callable[..., Tensor]:
    def call(x: Tensor, y: Tensor, a: Tensor, b: Tensor, eps: Tensor, *rho: Tensor) -> Tensor:
        if not rho and (a.device, a.dtype) == (b.device, b.dtype):  # some clauses scale an input; totals must agree
            ratio = (a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True)).abs()
            b = b * torch.where(torch.isfinite(ratio), ratio, 1)
        return sinkhorn_divergence(x, y, a, b, eps=eps, rho=rho[0] if rho else None, **options)

    return call


X = numbers([[[0.1, 0.4], [0.9, -0.3]], [[1.2, 0.5], [-0.4, 0.7]]])
Y = numbers([[0.3, -0.2], [0.8, 0.6], [-0.5, 0.1]])
A, B, EPS, RHO = numbers([[0.4, 0.6], [0.7, 0.3]]), numbers([0.3, 0.5, 0.2]), numbers(0.5), numbers(0.8)
EXEMPT = {"autocast_of_backward": "the products of the cost are plain torch, which autocast halves in backward"}


def _cost_case(name: str, fn: Callable[..., Tensor], oracle: Callable[..., np.ndarray]) -> LayerCase:
    origin = Y.clone()
    origin[1] = 0
    return LayerCase(
        name,
        fn,
        (X, Y),
        per_element(oracle, (2, 2)),
        source=FEYDY,
        event_ndims=(2, 2),
        names=("x", "y"),
        representative=True,
        exact_bits=False,
        hostile=(
            Hostile("coincident points", (X, X[0])),
            Hostile("a point at the origin", (X, origin)),
            Hostile("small numbers", (X * 1e-9, Y * 1e-9)),
            Hostile("large numbers", (X * 1e9, Y * 1e9)),
        ),
        wrong=(
            Wrong("a vector", (X[0, 0], Y), "x: expected at least 2 dimensions"),
            Wrong("dimensions", (X, Y[:, :1]), r"y: expected shape \(2,\) in its last dimension as x has"),
        ),
        half=False,
        exempt=EXEMPT,
    )


def _case(name: str, inputs: tuple[Tensor, ...], **fields: Any) -> LayerCase:
    x, y, *rest = inputs
    ndims = (2, 2, 1, 1, 0, 0)[: len(inputs)]
    common: dict[str, Any] = {
        "layer": "sinkhorn_divergence",
        "source": FEYDY,
        "event_ndims": ndims,
        "exact_bits": False,
        "tolerant": _called(on_failure="nan"),
        "hostile": (
            Hostile("small numbers", (x * 1e-6, y * 1e-6, *rest[:2], *(t * 1e-12 for t in rest[2:]))),
            Hostile("large numbers", (x * 1e6, y * 1e6, *rest[:2], *(t * 1e12 for t in rest[2:]))),
            Hostile("duplicates", (x[:, :1].expand_as(x).clone(), y, *rest)),
            Hostile("far away", (x + 5, y, *rest), may_fail=True),
        ),
        "wrong": (
            Wrong("dimensions", (x, y[:, :1], *rest), r"y: expected shape \(2,\) in its last dimension as x has"),
        ),
        "exempt": EXEMPT,
    }
    return LayerCase(name, _called(), inputs, per_element(_divergence, ndims), **(common | fields))


CASES: tuple[LayerCase, ...] = (
    _cost_case("SquaredEuclidean", SquaredEuclidean(), _squares),
    _cost_case("Euclidean", Euclidean(), _distances),
    _cost_case("Cosine", Cosine(), _angles),
    _case("sinkhorn_divergence", (X, Y, A, B, EPS), representative=True),
    _case("sinkhorn_divergence penalised", (X, Y, A, B, EPS, RHO), source=SEJOURNE),
)
