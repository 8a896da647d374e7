"""Cases of gated ReLU networks with vector outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.relu import (
    FISTA,
    Gates,
    VectorReLUSolution,
    beta_max_vector,
    convex_gated_relu_vector,
    convex_gated_relu_vector_ex,
    predict_vector,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

__all__ = ["CASES"]

SOURCE = (
    "A. Sahiner, T. Ergen, J. Pauly, M. Pilanci, Vector-output ReLU Neural Network Problems are Copositive Programs, "
    "2021"
)
NDIMS = (2, 2, 1, 0)
GATES = numbers([[1.0, 0.3], [-0.8, 0.5], [0.1, -1.0]])


def _trained(X: np.ndarray, Y: np.ndarray, s: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Many proximal gradient steps, then Newton's method on the ordinary network's own decayed loss, in its factors."""
    Z = np.stack([X * (X @ g >= 0)[:, None] for g in GATES.numpy()])
    W = s[:, None]
    d, c = X.shape[1], Y.shape[1]
    size = float(np.linalg.norm(np.concatenate(list(Z * np.sqrt(W)), axis=1), 2))
    step = 1 / max(size**2, 1e-300)
    U = V = np.zeros((len(Z), d, c))
    t = 1.0
    for _ in range(2000):
        G = Z.transpose(0, 2, 1) @ (W * ((Z @ V).sum(0) - Y))
        left, sigma, right = np.linalg.svd(V - step * G, full_matrices=False)
        new = (left * np.maximum(sigma - step * beta, 0)[:, None]) @ right
        grown = (1 + np.sqrt(1 + 4 * t * t)) / 2
        if ((new - U) * (V - new)).sum() > 0:
            V, t = new, 1.0
        else:
            V, t = new + (t - 1) / grown * (new - U), grown
        U = new
    left, sigma, right = np.linalg.svd(U, full_matrices=False)
    units = [(i, j) for i in range(len(Z)) for j in range(sigma.shape[1]) if sigma[i, j] > 1e-9 * sigma.max()]
    if not units:
        return 0 * U
    A = np.stack([left[i, :, j] * np.sqrt(sigma[i, j]) for i, j in units])
    B = np.stack([right[i, j] * np.sqrt(sigma[i, j]) for i, j in units])
    at = [i for i, _ in units]
    m, n = len(units), len(X)
    for _ in range(8):
        R = W * (sum(np.outer(Z[i] @ a, b) for i, a, b in zip(at, A, B, strict=True)) - Y)
        J, H = np.zeros((n, c, m, d + c)), beta * np.eye(m * (d + c)).reshape(m, d + c, m, d + c)
        slope = np.zeros((m, d + c))
        for j, i in enumerate(at):
            J[:, :, j, :d] = np.einsum("kd,c->kcd", Z[i], B[j])
            J[:, :, j, d:] = np.einsum("k,ce->kce", Z[i] @ A[j], np.eye(c))
            G = Z[i].T @ R
            H[j, :d, j, d:] += G
            H[j, d:, j, :d] += G.T
            slope[j] = np.concatenate([G @ B[j] + beta * A[j], G.T @ A[j] + beta * B[j]])
        flat = J.reshape(n * c, -1)
        H = H.reshape(m * (d + c), -1) + flat.T @ (np.repeat(s, c)[:, None] * flat)
        # units of one gate may be rotated into each other, so the Hessian is singular
        move = np.linalg.lstsq(H, slope.ravel(), rcond=1e-9)[0].reshape(m, d + c)
        A, B = A - move[:, :d], B - move[:, d:]
    U = 0 * U
    for i, a, b in zip(at, A, B, strict=True):
        U[i] += np.outer(a, b)
    return U


def _optimal_value(X: np.ndarray, Y: np.ndarray, s: np.ndarray, beta: np.ndarray) -> np.ndarray:
    U = _trained(X, Y, s, beta)
    F = ((X @ GATES.numpy().T >= 0)[..., None] * np.einsum("nd,pdc->npc", X, U)).sum(1)
    return (s[:, None] * (F - Y) ** 2).sum() / 2 + beta * np.linalg.svd(U, compute_uv=False).sum()


def _call(make: Callable[..., Any], pick: Callable[[Any], Any], **options: Any) -> Callable[..., Any]:
    def run(X: Tensor, Y: Tensor, s: Tensor, beta: Tensor) -> Any:
        return pick(make(X, Y, beta, GATES.to(X), sample_weight=s, **options))

    return run


def _neurons(solution: Any) -> Tensor:
    return solution.neurons


def _only_neurons(solution: Any) -> Any:
    return replace(solution, value=solution.value.neurons)


_value = _call(convex_gated_relu_vector, lambda found: found.objective)


def _optimum(name: str, inputs: tuple[Tensor, ...]) -> Hostile:
    """Compares the objective, where neurons are not unique."""
    return Hostile(name, inputs, fn=_value, oracle=per_element(_optimal_value, NDIMS))


def _case(name: str, inputs: tuple[Tensor, ...], **fields: Any) -> LayerCase:
    X, Y, s, beta = inputs
    starved = {"solver": FISTA(max_steps=1)}
    common: dict[str, Any] = {
        "layer": "convex_gated_relu_vector",
        "source": SOURCE,
        "event_ndims": NDIMS,
        "names": ("X", "Y", "sample_weight", "beta"),
        "invariants": (
            lambda v, *data: _call(convex_gated_relu_vector, lambda found: found.gap)(*data),  # zero at the optimum
        ),
        "tolerant": _call(convex_gated_relu_vector, _neurons, on_failure="nan"),
        "solution": _call(convex_gated_relu_vector_ex, _only_neurons),
        "starved": _call(convex_gated_relu_vector, _neurons, **starved),
        "starved_solution": _call(convex_gated_relu_vector_ex, _only_neurons, **starved),
        "hostile": (
            Hostile("above beta_max", (X, Y, s, beta + 1000)),
            _optimum("duplicate rows", (torch.cat([X[..., :1, :], X[..., :-1, :]], -2), Y, s, beta)),
            _optimum("equal outputs", (X, Y[..., :1].expand_as(Y).contiguous(), s, beta)),
            _optimum("a zero row", (torch.cat([0 * X[..., :1, :], X[..., 1:, :]], -2), Y, s, beta)),
            _optimum("a zero column", (X * numbers([1.0, 0.0]), Y, s, beta)),
            _optimum("dependent columns", (X[..., :1] * numbers([1.0, 2.0]), Y, s, beta)),
            _optimum("a sample without weight", (X, Y, s * (torch.arange(s.shape[-1], device="cpu") > 0), beta)),
            Hostile("huge data", (X * 1e6, Y, s, beta * 1e6)),
            Hostile("tiny data", (X * 1e-6, Y, s, beta * 1e-6)),
            Hostile("beta is zero", (X, Y, s, 0 * beta), ValueError, "beta: expected more than 0, got 0"),
            Hostile("a negative weight", (X, Y, -s, beta), ValueError, "sample_weight: expected at least 0, got -"),
        ),
        "wrong": (
            Wrong("labels", (X, Y[..., :1, :], s, beta), r"Y: expected shape \(\d,\) in its last dimension but one"),
            Wrong("weights", (X, Y, s[..., :1], beta), r"sample_weight: expected shape"),
            Wrong("columns", (X[..., :1], Y, s, beta), r"gates: expected vectors of shape \(\.\.\., P, 1\) as of X"),
        ),
        "exact_bits": False,
    }
    run, oracle = _call(convex_gated_relu_vector, _neurons), per_element(_trained, NDIMS)
    return LayerCase(name, run, inputs, oracle, **(common | fields))


SHARED = normal(3, 3, 2), normal(4, 2, 3, 2), 0.5 + normal(5, 3).abs(), numbers([0.3, 0.15])
EACH = normal(6, 2, 2, 2), normal(7, 2, 3), 0.5 + normal(8, 2).abs(), numbers(0.2)


def _largest_norm(X: np.ndarray, Y: np.ndarray, s: np.ndarray) -> np.ndarray:
    return np.array(max(np.linalg.norm(X.T @ (((X @ g >= 0) * s)[:, None] * Y), 2) for g in GATES.numpy()))


def _predictions(U: Tensor, X: Tensor) -> Tensor:
    nothing = U.new_zeros(())
    return predict_vector(VectorReLUSolution(U, nothing, nothing, Gates(GATES.to(U), nothing > 0)), X)


def _gated_sum(U: np.ndarray, X: np.ndarray) -> np.ndarray:
    return np.array([sum(V.T @ x for V, g in zip(U, GATES.numpy(), strict=True) if x @ g >= 0) for x in X])


PRODUCTS = {"autocast_of_backward": "products of the data are plain torch, which autocast halves in backward"}

CASES: tuple[LayerCase, ...] = (
    _case("convex_gated_relu_vector", SHARED, representative=True),
    _case("convex_gated_relu_vector more outputs than inputs", EACH),
    LayerCase(
        "convex_gated_relu_vector objective",
        _value,
        SHARED,
        per_element(_optimal_value, NDIMS),
        layer="convex_gated_relu_vector",
        source=SOURCE,
        event_ndims=NDIMS,
        names=("X", "Y", "sample_weight", "beta"),
        tolerant=_call(convex_gated_relu_vector, lambda found: found.objective, on_failure="nan"),
        exact_bits=False,
    ),
    LayerCase(
        "beta_max_vector",
        lambda X, Y, s: beta_max_vector(X, Y, GATES.to(X), sample_weight=s),
        SHARED[:3],
        per_element(_largest_norm, NDIMS[:3]),
        source="A. Mishkin, M. Pilanci, Optimal Sets and Solution Paths of ReLU Networks, 2023",
        event_ndims=NDIMS[:3],
        representative=True,
        exact_bits=False,
        exempt=PRODUCTS,
    ),
    LayerCase(
        "predict_vector",
        _predictions,
        (normal(12, 3, 2, 2), normal(13, 2, 3, 2)),
        per_element(_gated_sum, (3, 2)),
        source=SOURCE,
        event_ndims=(3, 2),
        representative=True,
        exact_bits=False,
        exempt=PRODUCTS,
    ),
)
