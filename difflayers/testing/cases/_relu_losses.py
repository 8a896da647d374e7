"""Cases of ReLU networks with losses whose slopes have ends, or that bend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.relu import (
    FISTA,
    Hinge,
    Huber,
    InteriorPoint,
    Logistic,
    Loss,
    convex_gated_relu,
    convex_gated_relu_ex,
    convex_relu,
    convex_relu_ex,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

__all__ = ["CASES"]

GATED = "A. Mishkin, A. Sahiner, M. Pilanci, Fast Convex Optimization for Two-Layer ReLU Networks, 2022"
CONSTRAINED = "M. Pilanci, T. Ergen, Neural Networks are Convex Regularizers, 2020"
NDIMS = (2, 1, 1, 0)
GATES = numbers([[1.0, 0.3], [-0.8, 0.5], [0.1, -1.0]])


def _value(loss: Loss, f: np.ndarray, y: np.ndarray) -> np.ndarray:
    if isinstance(loss, Huber):
        r = np.abs(f - y)
        return np.where(r < loss.delta, r**2 / 2, loss.delta * (r - loss.delta / 2))
    return np.log1p(np.exp(-y * f)) if isinstance(loss, Logistic) else np.maximum(1 - y * f, 0)


def _slopes(loss: Loss, f: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and second derivative, off kinks."""
    if isinstance(loss, Huber):
        return np.clip(f - y, -loss.delta, loss.delta), 1.0 * (np.abs(f - y) < loss.delta)
    if isinstance(loss, Logistic):
        return -y / (1 + np.exp(y * f)), y**2 / (2 + 2 * np.cosh(y * f))
    return np.where(y * f < 1, -y, 0), 0 * f


def _nearest(loss: Loss, z: np.ndarray, y: np.ndarray, step: np.ndarray) -> np.ndarray:
    """``argmin_f step * l(f, y) + (f - z)^2 / 2``, entry by entry."""
    if isinstance(loss, Huber):
        return z + np.clip((y - z) * step / (1 + step), -loss.delta * step, loss.delta * step)
    if isinstance(loss, Hinge):
        return z + y * np.clip((1 - y * z) / y**2, 0, step)
    f = z.copy()
    for _ in range(5):
        first, second = _slopes(loss, f, y)
        f = f - (step * first + f - z) / (step * second + 1)
    return f


def _splitting(loss: Loss, cones: bool) -> Callable[..., np.ndarray]:
    """Many steps of the alternating direction method on dense matrices, and Newton steps on what it has found."""

    def solve(X: np.ndarray, y: np.ndarray, s: np.ndarray, beta: np.ndarray) -> np.ndarray:
        unit = max(float(np.linalg.norm(X, 2)), 1e-300)
        X, beta = X / unit, beta / unit
        (n, d), P = X.shape, len(GATES)
        M = (X @ GATES.numpy().T >= 0).astype(float)
        first = [not any((M[s > 0, i] == M[s > 0, j]).all() for j in range(i)) or cones for i in range(P)]
        signs = (1, -1) if cones else (1,)
        B = len(signs) * P
        F = np.concatenate([sign * X * M[:, [i]] * first[i] for sign in signs for i in range(P)], 1)
        K = np.zeros((cones * B * n, B * d))
        for b in range(cones * B):
            K[b * n : (b + 1) * n, b * d : (b + 1) * d] = (2 * M[:, [b % P]] - 1) * X
        rho = 0.5 * float(s.max())
        A = np.linalg.inv(F.T @ F + np.eye(B * d) + K.T @ K)
        v, t, f = np.zeros(B * d), np.zeros(len(K)), np.zeros(n)
        lam, nu, mu = 0 * v, 0 * t, 0 * f
        for _ in range(5000):
            u = A @ (F.T @ (f - mu) + v - lam + K.T @ (t - nu))
            z = (u + lam).reshape(-1, d)
            length = np.linalg.norm(z, axis=1, keepdims=True)
            v = (z * np.maximum(1 - beta / rho / np.where(length > 0, length, 1), 0)).ravel()
            t = np.maximum(K @ u + nu, 0)
            f = _nearest(loss, F @ u + mu, y, s / rho)
            lam, nu, mu = lam + u - v, nu + K @ u - t, mu + F @ u - f
        p, out = v.reshape(-1, d), np.zeros((B, d))
        size = np.linalg.norm(p, axis=1)
        on = size > 1e-7 * size.max()
        if not on.any():
            return out
        at = np.repeat(on, d)
        tight = (-rho * nu > 1e-6 * beta) & np.repeat(on, n)[: len(K)]
        kink = (np.abs(1 - y * f) < 1e-7) & (s > 0) & isinstance(loss, Hinge)
        G, x = F[:, at], v[at]
        # constraints of the active set: kinks of neurons, and predictions at the kink of the loss
        C = np.concatenate([K[np.ix_(tight, at)], G[kink]])
        wanted = np.concatenate([np.zeros(tight.sum()), 1 / y[kink]])
        m = np.concatenate([-rho * nu[tight], -rho * mu[kink]])
        for _ in range(8):
            block = x.reshape(-1, d)
            lengths = np.linalg.norm(block, axis=1, keepdims=True)
            h = block / lengths
            slope, bend = (np.where(kink, 0, s * each) for each in _slopes(loss, G @ x, y))
            H = G.T @ (bend[:, None] * G)
            for i in range(len(block)):
                H[i * d : (i + 1) * d, i * d : (i + 1) * d] += beta * (np.eye(d) - np.outer(h[i], h[i])) / lengths[i]
            rest = np.concatenate([G.T @ slope + beta * h.ravel() - C.T @ m, C @ x - wanted])
            matrix = np.block([[H, -C.T], [C, np.zeros((len(m), len(m)))]])
            step = np.linalg.lstsq(matrix, -rest, rcond=None)[0]
            x, m = x + step[: len(x)], m + step[len(x) :]
        out[on] = x.reshape(-1, d) / unit
        return out

    return solve


def _optimal_value(loss: Loss, cones: bool) -> Callable[..., np.ndarray]:
    def solve(X: np.ndarray, y: np.ndarray, s: np.ndarray, beta: np.ndarray) -> np.ndarray:
        p, G = _splitting(loss, cones)(X, y, s, beta), GATES.numpy()
        f = ((X @ G.T >= 0) * (X @ p[: len(G)].T)).sum(1)
        if cones:
            f = f - ((X @ G.T >= 0) * (X @ p[len(G) :].T)).sum(1)
        return (s * _value(loss, f, y)).sum() + beta * np.linalg.norm(p, axis=1).sum()

    return solve


def _call(make: Callable[..., Any], pick: Callable[[Any], Any], **options: Any) -> Callable[..., Any]:
    def run(X: Tensor, y: Tensor, s: Tensor, beta: Tensor) -> Any:
        return pick(make(X, y, beta, GATES.to(X), sample_weight=s, **options))

    return run


def _neurons(found: Any) -> Tensor:
    return found.v if found.w is None else torch.cat([found.v, found.w], -2)


def _only_neurons(found: Any) -> Any:
    return replace(found, value=_neurons(found.value))


def _case(name: str, inputs: tuple[Tensor, ...], loss: Loss, *, cones: bool, **fields: Any) -> LayerCase:
    X, y, s, beta = inputs
    make, make_ex = (convex_relu, convex_relu_ex) if cones else (convex_gated_relu, convex_gated_relu_ex)
    starved = {"loss": loss, "solver": InteriorPoint(max_steps=1) if cones else FISTA(max_steps=1)}

    def optimum(name: str, *inputs: Tensor) -> Hostile:
        """Compares the objective, where neurons are not unique."""
        objective = _call(make, lambda found: found.objective, loss=loss)
        return Hostile(name, inputs, fn=objective, oracle=per_element(_optimal_value(loss, cones), NDIMS))

    return LayerCase(
        name,
        _call(make, _neurons, loss=loss),
        inputs,
        per_element(_splitting(loss, cones), NDIMS),
        layer=make.__name__,
        source=CONSTRAINED if cones else GATED,
        event_ndims=NDIMS,
        names=("X", "y", "sample_weight", "beta"),
        invariants=(lambda v, *data: _call(make, lambda found: found.gap, loss=loss)(*data),),
        tolerant=_call(make, _neurons, loss=loss, on_failure="nan"),
        solution=_call(make_ex, _only_neurons, loss=loss),
        starved=_call(make, _neurons, **starved),
        starved_solution=_call(make_ex, _only_neurons, **starved),
        hostile=(
            Hostile("above beta_max", (X, y, s, beta + 1000)),
            optimum("duplicate rows", torch.cat([X[..., :1, :], X[..., :-1, :]], -2), y, s, beta),
            optimum("a zero row", torch.cat([0 * X[..., :1, :], X[..., 1:, :]], -2), y, s, beta),
            optimum("a zero column", X * numbers([1.0, 0.0]), y, s, beta),
            optimum("dependent columns", X[..., :1] * numbers([1.0, 2.0]), y, s, beta),
            optimum("a sample without weight", X, y, s * (torch.arange(s.shape[-1], device="cpu") > 0), beta),
            Hostile("huge data", (X * 1e6, y, s, beta * 1e6)),
            Hostile("tiny data", (X * 1e-6, y, s, beta * 1e-6)),
            Hostile("beta is zero", (X, y, s, 0 * beta), ValueError, "beta: expected more than 0, got 0"),
            Hostile("a negative weight", (X, y, -s, beta), ValueError, "sample_weight: expected at least 0, got -"),
        ),
        wrong=(
            Wrong("labels", (X, y[..., :1], s, beta), r"y: expected shape \(\d,\) in its last dimension"),
            Wrong("weights", (X, y, s[..., :1], beta), r"sample_weight: expected shape"),
            Wrong("columns", (X[..., :1], y, s, beta), r"gates: expected vectors of shape \(\.\.\., P, 1\) as of X"),
        ),
        exact_bits=False,
        **fields,
    )


SIGNS = numbers([[1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, -1.0]])


def _data(seed: int, y: Tensor | None = None, beta: tuple[float, float] = (0.2, 0.1)) -> tuple[Tensor, ...]:
    y = normal(seed + 1, 2, 4) if y is None else y
    return normal(seed, 4, 2), y, 0.5 + normal(seed + 2, 4).abs(), numbers(beta)


EARLY = {"starved_solver_warns": "the loss has no curvature that an early stop could be differentiated with: refused"}

# every element is far from a change of its active set, and some samples lie on either side of the knee
CASES: tuple[LayerCase, ...] = (
    _case("convex_gated_relu Huber", _data(3), Huber(0.4), cones=False, exempt=EARLY),
    _case("convex_gated_relu hinge", _data(3, SIGNS, (0.3, 0.15)), Hinge(), cones=False, exempt=EARLY),
    _case("convex_relu Huber", _data(17), Huber(0.4), cones=True),
    _case("convex_relu logistic", _data(3, SIGNS, (0.1, 0.05)), Logistic(), cones=True),
)
