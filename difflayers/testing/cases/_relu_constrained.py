"""Cases of ReLU networks that keep to the cells of their patterns."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.relu import (
    ConvexReLUHead,
    InteriorPoint,
    beta_max,
    convex_relu,
    convex_relu_ex,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

__all__ = ["CASES"]

SOURCE = "M. Pilanci, T. Ergen, Neural Networks are Convex Regularizers, 2020"
NDIMS = (2, 1, 1, 0)
GATES = numbers([[1.0, 0.3], [-0.8, 0.5], [0.1, -1.0], [-0.3, 1.0]])


def _splitting(X: np.ndarray, y: np.ndarray, s: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Many steps of the alternating direction method on dense matrices, and Newton steps on what it has found."""
    unit = max(float(np.linalg.norm(X, 2)), 1e-300)
    X, beta = X / unit, beta / unit
    (n, d), P = X.shape, len(GATES)
    M = (X @ GATES.numpy().T >= 0).astype(float)
    first = [not any((M[:, i] == M[:, j]).all() for j in range(i)) for i in range(P)]
    F = np.concatenate([sign * X * M[:, [i]] * first[i] for sign in (1, -1) for i in range(P)], 1)
    K = np.zeros((2 * P * n, 2 * P * d))
    for b in range(2 * P):
        K[b * n : (b + 1) * n, b * d : (b + 1) * d] = (2 * M[:, [b % P]] - 1) * X
    rho = 0.3 * float(s.max())
    A = np.linalg.inv(F.T @ (s[:, None] * F) + rho * (np.eye(2 * P * d) + K.T @ K))
    u, v, lam, t, nu = (np.zeros(size) for size in (2 * P * d, 2 * P * d, 2 * P * d, 2 * P * n, 2 * P * n))
    for _ in range(4000):
        u = A @ (F.T @ (s * y) + rho * (v - lam + K.T @ (t - nu)))
        z = (u + lam).reshape(-1, d)
        length = np.linalg.norm(z, axis=1, keepdims=True)
        v = (z * np.maximum(1 - beta / rho / np.where(length > 0, length, 1), 0)).ravel()
        t = np.maximum(K @ u + nu, 0)
        lam, nu = lam + u - v, nu + K @ u - t
    p, out = v.reshape(-1, d), np.zeros((2 * P, d))
    size = np.linalg.norm(p, axis=1)
    on = size > 1e-7 * size.max()
    if not on.any():
        return out
    at = np.repeat(on, d)
    tight = (-rho * nu > 1e-6 * beta) & np.repeat(on, n)
    C, G, x = K[np.ix_(tight, at)], F[:, at], v[at]
    m = -rho * nu[tight]
    for _ in range(8):
        block = x.reshape(-1, d)
        lengths = np.linalg.norm(block, axis=1, keepdims=True)
        h = block / lengths
        H = G.T @ (s[:, None] * G)
        for i in range(len(block)):
            H[i * d : (i + 1) * d, i * d : (i + 1) * d] += beta * (np.eye(d) - np.outer(h[i], h[i])) / lengths[i]
        slope = G.T @ (s * (G @ x - y)) + beta * h.ravel() - C.T @ m
        zero = np.zeros((len(m), len(m)))
        step = np.linalg.lstsq(np.block([[H, -C.T], [C, zero]]), -np.concatenate([slope, C @ x]), rcond=None)[0]
        x, m = x + step[: len(x)], m + step[len(x) :]
    out[on] = x.reshape(-1, d) / unit
    return out


def _call(make: Callable[..., Any], pick: Callable[[Any], Any], **options: Any) -> Callable[..., Any]:
    def run(X: Tensor, y: Tensor, s: Tensor, beta: Tensor) -> Any:
        return pick(make(X, y, beta, GATES.to(X), sample_weight=s, **options))

    return run


def _neurons(found: Any) -> Tensor:
    return torch.cat([found.v, found.w], -2)


def _only_neurons(found: Any) -> Any:
    return replace(found, value=_neurons(found.value))


def _optimal_value(X: np.ndarray, y: np.ndarray, s: np.ndarray, beta: np.ndarray) -> np.ndarray:
    p = _splitting(X, y, s, beta)
    f = np.maximum(X @ p.T, 0) @ np.repeat([1.0, -1.0], len(GATES))
    return (s * (f - y) ** 2).sum() / 2 + beta * np.linalg.norm(p, axis=1).sum()


def _optimum(name: str, inputs: tuple[Tensor, ...]) -> Hostile:
    """Compares the objective, where neurons are not unique."""
    return Hostile(
        name,
        inputs,
        fn=_call(convex_relu, lambda found: found.objective),
        oracle=per_element(_optimal_value, NDIMS),
    )


# neurons with kinks on points in every element, and far from a change of the active set
SHARED = normal(45, 4, 2), normal(46, 2, 4), 0.5 + normal(47, 4).abs(), numbers([0.3, 0.15])
EACH = normal(21, 2, 3, 2), normal(22, 2, 3), 0.5 + normal(23, 3).abs(), numbers(0.2)
OBJECTIVE = _call(convex_relu, lambda found: found.objective)
PRODUCTS = {"autocast_of_backward": "products of the data are plain torch, which autocast halves in backward"}


def _case(name: str, inputs: tuple[Tensor, ...], **fields: Any) -> LayerCase:
    X, y, s, beta = inputs
    starved = InteriorPoint(max_steps=1)
    common: dict[str, Any] = {
        "layer": "convex_relu",
        "source": SOURCE,
        "event_ndims": NDIMS,
        "names": ("X", "y", "sample_weight", "beta"),
        "invariants": (lambda p, *data: _call(convex_relu, lambda found: found.gap)(*data),),
        "tolerant": _call(convex_relu, _neurons, on_failure="nan"),
        "solution": _call(convex_relu_ex, _only_neurons),
        "starved": _call(convex_relu, _neurons, solver=starved),
        "starved_solution": _call(convex_relu_ex, _only_neurons, solver=starved),
        "hostile": (
            Hostile("above beta_max", (X, y, s, beta + 1000)),
            _optimum("duplicate rows", (torch.cat([X[..., :1, :], X[..., :-1, :]], -2), y, s, beta)),
            _optimum("a zero row", (torch.cat([0 * X[..., :1, :], X[..., 1:, :]], -2), y, s, beta)),
            _optimum("a zero column", (X * numbers([1.0, 0.0]), y, s, beta)),
            _optimum("dependent columns", (X[..., :1] * numbers([1.0, 2.0]), y, s, beta)),
            _optimum("a sample without weight", (X, y, s * (torch.arange(s.shape[-1], device="cpu") > 0), beta)),
            Hostile("huge data", (X * 1e6, y, s, beta * 1e6)),
            Hostile("tiny data", (X * 1e-6, y, s, beta * 1e-6)),
            Hostile("beta is zero", (X, y, s, 0 * beta), ValueError, "beta: expected more than 0, got 0"),
            Hostile("a negative weight", (X, y, -s, beta), ValueError, "sample_weight: expected at least 0, got -"),
        ),
        "wrong": (
            Wrong("labels", (X, y[..., :1], s, beta), r"y: expected shape \(\d,\) in its last dimension"),
            Wrong("weights", (X, y, s[..., :1], beta), r"sample_weight: expected shape"),
            Wrong("columns", (X[..., :1], y, s, beta), r"gates: expected vectors of shape \(\.\.\., P, 1\) as of X"),
        ),
        "exact_bits": False,
    }
    return LayerCase(name, _call(convex_relu, _neurons), inputs, per_element(_splitting, NDIMS), **(common | fields))


def _head(X: Tensor, y: Tensor, query: Tensor) -> Tensor:
    gates = GATES.to(X) if X.is_floating_point() else GATES.to(y)
    return ConvexReLUHead(0.2, gates, gated=False)(X, y, query)


def _trained_predictions(X: np.ndarray, y: np.ndarray, query: np.ndarray) -> np.ndarray:
    p = _splitting(X, y, np.ones(len(y)), np.array(0.2))
    return np.maximum(query @ p.T, 0) @ np.repeat([1.0, -1.0], len(GATES))


def _longest_projection(X: np.ndarray, y: np.ndarray, s: np.ndarray) -> np.ndarray:
    """By trying all sets of rows that a vector may be projected on the border of."""
    best = 0.0
    for g in GATES.numpy():
        side = np.where(X @ g >= 0, 1.0, -1.0)
        for sign in (1, -1):
            z = sign * ((X @ g >= 0) * s * y) @ X
            for size in range(X.shape[1]):
                for rows in itertools.combinations(range(len(X)), size):
                    C = X[list(rows)]
                    u = z - np.linalg.pinv(C) @ (C @ z) if size else z
                    if (side * (X @ u) >= -1e-12).all() and u @ z > 1e-12 * z @ z:
                        best = max(best, float(u @ z / np.linalg.norm(u)))
    return np.array(best)


CASES: tuple[LayerCase, ...] = (
    _case("convex_relu", SHARED, representative=True),
    _case("convex_relu each its data", EACH),
    LayerCase(
        "convex_relu objective",
        OBJECTIVE,
        SHARED,
        per_element(_optimal_value, NDIMS),
        layer="convex_relu",
        source=SOURCE,
        event_ndims=NDIMS,
        names=("X", "y", "sample_weight", "beta"),
        tolerant=_call(convex_relu, lambda found: found.objective, on_failure="nan"),
        exact_bits=False,
    ),
    LayerCase(
        "beta_max constrained",
        lambda X, y, s: beta_max(X, y, GATES.to(X), sample_weight=s, gated=False),
        SHARED[:3],
        per_element(_longest_projection, NDIMS[:3]),
        layer="beta_max",
        source="A. Mishkin, M. Pilanci, Optimal Sets and Solution Paths of ReLU Networks, 2023",
        event_ndims=NDIMS[:3],
        exact_bits=False,
        exempt=PRODUCTS,
    ),
    LayerCase(
        "ConvexReLUHead constrained",
        _head,
        (normal(9, 4, 2), normal(4, 2, 4), normal(10, 2, 2)),
        per_element(_trained_predictions, (2, 1, 2)),
        layer="ConvexReLUHead",
        source=SOURCE,
        event_ndims=(2, 1, 2),
        names=("X", "y", None),
        make_module=lambda: ConvexReLUHead(0.2, GATES, gated=False, learn_beta=True),
        module_inputs=(normal(9, 4, 2), 3 * normal(11, 4), normal(9, 4, 2)),
        exact_bits=False,
        exempt=PRODUCTS,
    ),
)
