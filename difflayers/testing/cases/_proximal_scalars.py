"""Cases of operators that work entry by entry, against the root of their optimality condition by bisection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.proximal import (
    conjugate_prox,
    prox_elastic_net,
    prox_entropy,
    prox_hinge,
    prox_huber,
    prox_l0,
    prox_l1,
    prox_log,
    prox_logistic,
    prox_mcp,
    prox_nonnegative_l1,
    prox_poisson,
    prox_scad,
    prox_squared_l2,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers

X = 2 * normal(20, 3, 4)
T = numbers([0.3, 0.5, 0.8])
P, R = numbers([0.7, 1.3, 0.4]), numbers([1.2, 0.6, 0.9])
SMALL, LABELS = X[:, :3], numbers([[1.0, -1.0, 0.8], [-1.0, 1.2, 1.0], [1.0, 1.0, -1.0]])
COUNTS = numbers([[3.0, 0.5, 1.0], [2.0, 1.0, 4.0], [0.2, 1.0, 0.7]])

BECK = "A. Beck, First-Order Methods in Optimization, 2017, chapter 6"

Slope = Callable[..., np.ndarray]


def bisect(slope: Slope, x: np.ndarray, t: np.ndarray, *params: np.ndarray, low: float = -np.inf) -> np.ndarray:
    """The root of ``t g'(z) + z - x``, whose left side jumps upwards where g has a kink, entry by entry."""
    wide = np.broadcast_arrays(x, t, *params)
    x, t, *params = (np.asarray(w, dtype=np.longdouble) for w in wide)  # type: ignore[assignment]
    size = 1 + np.abs(x) + t * 10 * (1 + sum((np.abs(p) for p in params), start=np.zeros_like(x)))
    a, b = np.maximum(x - size, low), x + size
    with np.errstate(all="ignore"):
        for _ in range(200):
            mid = (a + b) / 2
            above = t * slope(mid, *params) + mid - x > 0
            a, b = np.where(above, a, mid), np.where(above, mid, b)
    root = np.where(b <= low, low, (a + b) / 2)
    return np.where(np.abs(root) < 1e-40, 0, root).astype(np.float64)


def _entries(solve: Callable[..., np.ndarray], ndims: tuple[int, ...]) -> Callable[..., Tensor]:
    """An oracle on whole arrays; parameters of an element get a dimension for its entries."""

    def oracle(*args: Tensor) -> Tensor:
        shaped = [a if k else a.unsqueeze(-1) for a, k in zip(args, ndims, strict=True)]
        return torch.from_numpy(solve(*(s.detach().cpu().numpy() for s in shaped))).to(args[0])

    return oracle


def _case(
    name: str,
    fn: Callable[..., Tensor],
    solve: Callable[..., np.ndarray],
    params: dict[str, Tensor] | None = None,
    *,
    x: Tensor = X,
    ndims: tuple[int, ...] | None = None,
    hostile: tuple[Hostile, ...] = (),
    wrong: tuple[Wrong, ...] = (),
    steps: tuple[float, float] = (0.0, 1e9),
    source: str = BECK,
    **fields: Any,
) -> LayerCase:
    """An operator of `x`, `t` and `params`, which are numbers of an element unless `ndims` says other."""
    params = params or {}
    rest, ndims = tuple(params.values()), ndims or (0,) * len(params)
    return LayerCase(
        name,
        fn,
        (x, T, *rest),
        _entries(solve, (1, 0, *ndims)),
        event_ndims=(1, 0, *ndims),
        names=("x", "t", *params),
        source=source,
        hostile=(
            Hostile("zero", (0 * x, T, *rest)),
            Hostile("ties", (x[:1, :1].expand_as(x), T, *rest)),
            Hostile("shortest step", (x, steps[0] * T, *rest)),
            Hostile("longest step", (x, steps[1] * T, *rest)),
            Hostile("huge", (1e9 * x, T, *rest)),
            Hostile("tiny", (1e-9 * x, T, *rest)),
            *hostile,
        ),
        wrong=(
            Wrong("negative step", (x, -T, *rest), r"t: expected (at least|more than) 0, got -0\.3"),
            Wrong("a step for each entry", (x, T[:, None] + 0 * x, *rest), r"t: expected a number or a shape that "),
            *wrong,
        ),
        **({"representative": True} | fields),
    )


def _log(x: np.ndarray, t: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """The better of zero and the root of the derivative beyond its lowest point."""
    a = np.abs(x).astype(np.longdouble)
    lower, upper = np.maximum(np.sqrt(t) - eps, 0) + 0 * a, a + 0 * t
    for _ in range(200):
        mid = (lower + upper) / 2
        above = mid - a + t / (eps + mid) > 0
        lower, upper = np.where(above, lower, mid), np.where(above, mid, upper)
    better = (lower - a) ** 2 / 2 + t * np.log1p(lower / eps) < a * a / 2
    return (np.sign(x) * np.where(better, lower, 0)).astype(np.float64)


def _penalty(slope: Slope) -> Slope:
    """The slope of an even function."""
    return lambda z, *params: np.sign(z) * slope(np.abs(z), *params)


SCAD = _penalty(lambda z, lam, a: np.where(z <= lam, lam, np.maximum(a * lam - z, 0) / (a - 1)))
MCP = _penalty(lambda z, lam, gamma: np.maximum(lam - z / gamma, 0))
L1 = _penalty(lambda z, w: w + 0 * z)
HUBER = _penalty(lambda z, delta: np.minimum(z / delta, 1))
ELASTIC_NET = _penalty(lambda z, l1, l2: l1 + l2 * z)


def _logistic(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    return -y / (1 + np.exp(y * z))


def _by(slope: Slope, low: float = -np.inf) -> Callable[..., np.ndarray]:
    return lambda x, t, *params: bisect(slope, x, t, *params, low=low)


def _conjugate(slope: Slope, low: float = -np.inf) -> Callable[..., np.ndarray]:
    """By the optimality of the inner minimiser ``z``: the result is ``x - t z``."""
    return lambda x, t, *params: x - t * bisect(slope, x / t, 1 / t, *params, low=low)


CONJUGATES: tuple[tuple[Any, ...], ...] = (
    (
        prox_elastic_net,
        lambda x, t, a, b: conjugate_prox(prox_elastic_net, x, t, l1=a, l2=b),
        ELASTIC_NET,
        -np.inf,
        {"l1": P, "l2": R},
        None,
    ),
    (prox_huber, lambda x, t, d: conjugate_prox(prox_huber, x, t, delta=d), HUBER, -np.inf, {"delta": P}, None),
    (prox_entropy, lambda x, t: conjugate_prox(prox_entropy, x, t), lambda z: np.log(z) + 1, 0, None, None),
    (
        prox_logistic,
        lambda x, t, y: conjugate_prox(prox_logistic, x, t, labels=y),
        _logistic,
        -np.inf,
        {"labels": LABELS},
        (1,),
    ),
    (
        prox_poisson,
        lambda x, t, y: conjugate_prox(prox_poisson, x, t, counts=y),
        lambda z, y: 1 - y / z,
        0,
        {"counts": COUNTS},
        (1,),
    ),
)

CASES: tuple[LayerCase, ...] = (
    _case(
        "prox_l1",
        prox_l1,
        lambda x, t: np.sign(x) * np.maximum(np.abs(x) - t, 0),
        source="N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.5.2",
        hostile=(Hostile("at the kink", (numbers([0.5, -0.5, 0.5, 1.0]), numbers(0.5))),),
    ),
    _case(
        "prox_l1 weights",
        lambda x, t, w: prox_l1(x, t, weights=w),
        _by(L1),
        {"weights": SMALL.abs()},
        x=SMALL,
        ndims=(1,),
        representative=False,
        wrong=(Wrong("negative weights", (SMALL, T, SMALL), r"weights: expected at least 0, got -"),),
    ),
    _case("prox_nonnegative_l1", prox_nonnegative_l1, lambda x, t: np.maximum(x - t, 0)),
    _case("prox_squared_l2", prox_squared_l2, lambda x, t: x / (1 + t)),
    _case(
        "prox_elastic_net",
        lambda x, t, l1, l2: prox_elastic_net(x, t, l1=l1, l2=l2),
        _by(ELASTIC_NET),
        {"l1": P, "l2": R},
        wrong=(Wrong("negative weight", (X, T, P, -R), r"l2: expected at least 0, got -1\.2"),),
    ),
    _case(
        "prox_huber",
        lambda x, t, d: prox_huber(x, t, delta=d),
        _by(HUBER),
        {"delta": P},
        hostile=(Hostile("at the kink", (numbers([1.5, -1.5, 0.0]), numbers(0.5), numbers(1.0))),),
        wrong=(Wrong("no width", (X, T, 0 * P), r"delta: expected more than 0, got 0"),),
    ),
    _case(
        "prox_hinge",
        prox_hinge,
        _by(lambda z, y: np.where(y * z < 1, -y, 0)),
        {"labels": LABELS},
        x=SMALL,
        ndims=(1,),
        hostile=(Hostile("labels of zero", (SMALL, T, 0 * LABELS)),),
    ),
    _case(
        "prox_l0",
        prox_l0,
        lambda x, t: np.where(x * x / 2 > t, x, 0),
        hostile=(Hostile("at the jump", (numbers([1.0, -1.0, 0.0]), numbers(0.5))),),
    ),
    _case(
        "prox_log",
        lambda x, t, eps: prox_log(x, t, eps=eps),
        _log,
        {"eps": P},
        hostile=(Hostile("no stationary point", (0.1 * X, 10 * T, 0.1 * P)),),
        wrong=(Wrong("no offset", (X, T, 0 * P), r"eps: expected more than 0, got 0"),),
    ),
    _case(
        "prox_scad",
        lambda x, t, lam, a: prox_scad(x, t, lam=lam, a=a),
        _by(SCAD),
        {"lam": P, "a": 2 + R},
        steps=(0.0, 1.0),
        hostile=(Hostile("at the kinks", (numbers([0.5, 1.5, -3.0, 0.0]), numbers(0.5), numbers(1.0), numbers(3.0))),),
        wrong=(Wrong("not convex", (X, T, P, 1 + T), r"a: expected more than 1 \+ t, got 1\.3 to 1\.8 with t"),),
    ),
    _case(
        "prox_mcp",
        lambda x, t, lam, gamma: prox_mcp(x, t, lam=lam, gamma=gamma),
        _by(MCP),
        {"lam": P, "gamma": 1 + R},
        steps=(0.0, 1.0),
        hostile=(Hostile("at the kinks", (numbers([0.5, -3.0, 0.0]), numbers(0.5), numbers(1.0), numbers(3.0))),),
        wrong=(Wrong("not convex", (X, T, P, T), r"gamma: expected more than t, got 0\.3 to 0\.8 with t"),),
    ),
    _case(
        "prox_entropy",
        prox_entropy,
        _by(lambda z: np.log(z) + 1, low=0),
        hostile=(Hostile("an exponential that overflows", (1e4 * X, 1e-3 * T)),),
    ),
    _case(
        "prox_poisson",
        prox_poisson,
        _by(lambda z, y: 1 - y / z, low=0),
        {"counts": COUNTS},
        x=SMALL,
        ndims=(1,),
        hostile=(
            Hostile("no counts", (SMALL, T, 0 * COUNTS)),
            Hostile("zero, no step, no counts", (0 * SMALL, 0 * T, 0 * COUNTS)),
        ),
        wrong=(Wrong("negative counts", (SMALL, T, -COUNTS), r"counts: expected at least 0, got -3"),),
    ),
    _case(
        "prox_logistic",
        prox_logistic,
        _by(_logistic),
        {"labels": LABELS},
        x=SMALL,
        ndims=(1,),
        hostile=(Hostile("labels of zero", (SMALL, T, 0 * LABELS)),),
    ),
    _case(
        "conjugate_prox",
        lambda x, t: conjugate_prox(prox_l1, x, t),
        lambda x, t: np.clip(x, -1, 1),
        steps=(1e-9, 1e9),
        source="N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 2.5",
        wrong=(
            Wrong("no step", (X, 0 * T), r"t: expected more than 0, got 0"),
            Wrong(
                "not convex",
                (X, T),
                r"prox: expected .* convex .* got prox_l0",
                lambda x, t: conjugate_prox(prox_l0, x, t),
            ),
        ),
    ),
    *(
        _case(
            f"conjugate_prox of {prox.__name__}",
            fn,
            _conjugate(slope, low),
            params,
            x=SMALL if ndims else X,
            ndims=ndims,
            steps=(1e-2, 1e2),
            layer="conjugate_prox",
            representative=False,
        )
        for prox, fn, slope, low, params, ndims in CONJUGATES
    ),
)
