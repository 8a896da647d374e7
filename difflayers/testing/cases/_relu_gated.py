"""Cases of gated ReLU networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.relu import (
    FISTA,
    ConvexReLUHead,
    Gates,
    Logistic,
    Loss,
    Squared,
    beta_max,
    convex_gated_relu,
    convex_gated_relu_ex,
    predict,
)
from difflayers.relu import ConvexReLUSolution as Trained
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

__all__ = ["CASES"]

SOURCE = "A. Mishkin, A. Sahiner, M. Pilanci, Fast Convex Optimization for Two-Layer ReLU Networks, 2022"
NDIMS = (2, 1, 1, 0)
GATES = numbers([[1.0, 0.3], [-0.8, 0.5], [0.1, -1.0]])


def _proximal_gradient(loss: Loss) -> Callable[..., np.ndarray]:
    """Many proximal gradient steps on the dense matrix of all gates, and Newton steps on what is not zero then."""
    logistic = isinstance(loss, Logistic)

    def solve(X: np.ndarray, y: np.ndarray, s: np.ndarray, beta: np.ndarray) -> np.ndarray:
        G = GATES.numpy()
        P, d = G.shape
        Z = np.concatenate([X * (X @ g >= 0)[:, None] for g in G], axis=1)

        def slope(f: np.ndarray) -> np.ndarray:
            return s * (-y / (1 + np.exp(y * f)) if logistic else f - y)

        def bend(f: np.ndarray) -> np.ndarray:
            return s * (y**2 / (2 + 2 * np.cosh(y * f)) if logistic else 1.0)

        size = float(np.linalg.norm(Z * np.sqrt(bend(0 * y))[:, None], 2))
        step = 1 / max(size**2, 1e-300)
        u, v, t = np.zeros(P * d), np.zeros(P * d), 1.0
        for _ in range(3000):
            z = (v - step * Z.T @ slope(Z @ v)).reshape(P, d)
            length = np.linalg.norm(z, axis=1, keepdims=True)
            new = (z * np.maximum(1 - step * beta / np.where(length > 0, length, 1), 0)).ravel()
            grown = (1 + np.sqrt(1 + 4 * t * t)) / 2
            if (new - u) @ (v - new) > 0:
                v, t = new, 1.0
            else:
                v, t = new + (t - 1) / grown * (new - u), grown
            u = new
        on = np.abs(u).reshape(P, d).max(1) > 0
        if not on.any():
            return u.reshape(P, d)
        A = Z[:, np.repeat(on, d)]
        x = u.reshape(P, d)[on]
        for _ in range(8):
            lengths = np.linalg.norm(x, axis=1)
            f = A @ x.ravel()
            H = A.T @ (bend(f)[:, None] * A)
            for i, (block, length) in enumerate(zip(x, lengths, strict=True)):
                at = slice(i * d, (i + 1) * d)
                H[at, at] += beta * (np.eye(d) - np.outer(block, block) / length**2) / length
            x = x - np.linalg.lstsq(H, A.T @ slope(f) + beta * (x / lengths[:, None]).ravel(), rcond=None)[0].reshape(
                -1, d
            )
        out = np.zeros((P, d))
        out[on] = x
        return out

    return solve


def _call(make: Callable[..., Any], pick: Callable[[Any], Any], **options: Any) -> Callable[..., Any]:
    def run(X: Tensor, y: Tensor, s: Tensor, beta: Tensor) -> Any:
        found = make(X, y, beta, GATES.to(X), sample_weight=s, **options)
        return pick(found)

    return run


def _neurons(solution: Any) -> Tensor:
    return solution.v


def _only_v(solution: Any) -> Any:
    return replace(solution, value=solution.value.v)


def _not_dual(loss: Loss) -> Callable[..., Tensor]:
    """The duality gap, which is zero at the optimum."""
    return _call(convex_gated_relu, lambda found: found.gap, loss=loss)


def _optimal_value(loss: Loss) -> Callable[..., np.ndarray]:
    def solve(X: np.ndarray, y: np.ndarray, s: np.ndarray, beta: np.ndarray) -> np.ndarray:
        u = _proximal_gradient(loss)(X, y, s, beta)
        f = ((X @ GATES.numpy().T >= 0) * (X @ u.T)).sum(1)
        each = np.log1p(np.exp(-y * f)) if isinstance(loss, Logistic) else (f - y) ** 2 / 2
        return (s * each).sum() + beta * np.linalg.norm(u, axis=1).sum()

    return solve


def _optimum(name: str, inputs: tuple[Tensor, ...], loss: Loss) -> Hostile:
    """Compares the objective, where neurons are not unique."""
    fn = _call(convex_gated_relu, lambda found: found.objective, loss=loss)
    return Hostile(name, inputs, fn=fn, oracle=per_element(_optimal_value(loss), NDIMS))


def _case(name: str, inputs: tuple[Tensor, ...], loss: Loss, **fields: Any) -> LayerCase:
    X, y, s, beta = inputs
    starved = {"solver": FISTA(max_steps=1), "loss": loss}
    common: dict[str, Any] = {
        "layer": "convex_gated_relu",
        "source": SOURCE,
        "event_ndims": NDIMS,
        "names": ("X", "y", "sample_weight", "beta"),
        "invariants": (lambda v, *data: _not_dual(loss)(*data),),
        "tolerant": _call(convex_gated_relu, _neurons, loss=loss, on_failure="nan"),
        "solution": _call(convex_gated_relu_ex, _only_v, loss=loss),
        "starved": _call(convex_gated_relu, _neurons, **starved),
        "starved_solution": _call(convex_gated_relu_ex, _only_v, **starved),
        "hostile": (
            Hostile("above beta_max", (X, y, s, beta + 1000)),
            # gates have equal patterns there, so that neurons are not unique
            _optimum("duplicate rows", (torch.cat([X[..., :1, :], X[..., :-1, :]], -2), y, s, beta), loss),
            _optimum("a zero row", (torch.cat([0 * X[..., :1, :], X[..., 1:, :]], -2), y, s, beta), loss),
            _optimum("a zero column", (X * numbers([1.0, 0.0]), y, s, beta), loss),
            _optimum("dependent columns", (X[..., :1] * numbers([1.0, 2.0]), y, s, beta), loss),
            _optimum("a sample without weight", (X, y, s * (torch.arange(s.shape[-1], device="cpu") > 0), beta), loss),
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
    run = _call(convex_gated_relu, _neurons, loss=loss)
    oracle = per_element(_proximal_gradient(loss), NDIMS)
    return LayerCase(name, run, inputs, oracle, **(common | fields))


SHARED = normal(3, 4, 2), normal(4, 2, 4), 0.5 + normal(5, 4).abs(), numbers([0.3, 0.15])
EACH = normal(6, 2, 3, 2), normal(7, 2, 3), 0.5 + normal(8, 3).abs(), numbers(0.2)
SIGNS = normal(3, 4, 2), numbers([[1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, -1.0]]), SHARED[2], numbers([0.1, 0.05])


def _largest_norm(X: np.ndarray, y: np.ndarray, s: np.ndarray) -> np.ndarray:
    return np.array(max(np.linalg.norm(((X @ g >= 0) * s * y) @ X) for g in GATES.numpy()))


def _head(X: Tensor, y: Tensor, query: Tensor) -> Tensor:
    gates = GATES.to(X) if X.is_floating_point() else GATES.to(y)
    return ConvexReLUHead(0.2, gates)(X, y, query)


def _trained_predictions(X: np.ndarray, y: np.ndarray, query: np.ndarray) -> np.ndarray:
    u = _proximal_gradient(Squared())(X, y, np.ones(len(y)), np.array(0.2))
    return ((query @ GATES.numpy().T >= 0) * (query @ u.T)).sum(1)


def _predictions(v: Tensor, X: Tensor) -> Tensor:
    nothing = v.new_zeros(())
    return predict(Trained(v, None, nothing, nothing, Gates(GATES.to(v), nothing > 0)), X)


def _gated_sum(v: np.ndarray, X: np.ndarray) -> np.ndarray:
    return np.array([sum(x @ u for u, g in zip(v, GATES.numpy(), strict=True) if x @ g >= 0) for x in X])


PRODUCTS = {"autocast_of_backward": "products of the data are plain torch, which autocast halves in backward"}

CASES: tuple[LayerCase, ...] = (
    _case("convex_gated_relu", SHARED, Squared(), representative=True),
    _case("convex_gated_relu each its data", EACH, Squared()),
    _case("convex_gated_relu logistic", SIGNS, Logistic()),
    LayerCase(
        "convex_gated_relu objective",
        _call(convex_gated_relu, lambda found: found.objective),
        SHARED,
        per_element(_optimal_value(Squared()), NDIMS),
        layer="convex_gated_relu",
        source=SOURCE,
        event_ndims=NDIMS,
        names=("X", "y", "sample_weight", "beta"),
        tolerant=_call(convex_gated_relu, lambda found: found.objective, on_failure="nan"),
        exact_bits=False,
    ),
    LayerCase(
        "beta_max",
        lambda X, y, s: beta_max(X, y, GATES.to(X), sample_weight=s),
        SHARED[:3],
        per_element(_largest_norm, NDIMS[:3]),
        source="A. Mishkin, M. Pilanci, Optimal Sets and Solution Paths of ReLU Networks, 2023",
        event_ndims=NDIMS[:3],
        representative=True,
        exact_bits=False,
        exempt=PRODUCTS,
    ),
    LayerCase(
        "ConvexReLUHead",
        _head,
        (normal(9, 4, 2), normal(4, 2, 4), normal(10, 2, 2)),
        per_element(_trained_predictions, (2, 1, 2)),
        source=SOURCE,
        event_ndims=(2, 1, 2),
        names=("X", "y", None),
        representative=True,
        make_module=lambda: ConvexReLUHead(0.2, GATES, learn_beta=True),
        module_inputs=(normal(9, 4, 2), 3 * normal(11, 4), normal(9, 4, 2)),
        exact_bits=False,
        exempt=PRODUCTS,
    ),
    LayerCase(
        "predict",
        _predictions,
        (normal(12, 2, 3, 2), normal(13, 2, 3, 2)),
        per_element(_gated_sum, (2, 2)),
        source=SOURCE,
        representative=True,
        exact_bits=False,
        exempt=PRODUCTS,
    ),
)
