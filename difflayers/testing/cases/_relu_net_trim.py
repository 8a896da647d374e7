"""Cases of Net-Trim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers import SolveError
from difflayers.relu import net_trim_weights, net_trim_weights_ex
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

__all__ = ["CASES"]

SOURCE = "A. Aghasi, A. Abdi, N. Nguyen, J. Romberg, Net-Trim: Convex Pruning of Deep Neural Networks, 2017"
NDIMS = (2, 2, 0)


def _enumeration(relu: bool) -> Callable[..., np.ndarray]:
    """Every set of non-zero weights, signs and tight silent responses, and bisection on the multiplier of the ball.

    The ball is all that neurons share: with its multiplier given, each is a small quadratic program of its own.
    """

    def neuron(X: np.ndarray, y: np.ndarray, mu: float) -> np.ndarray:
        """Least ``|u|_1 + mu/2 ||X_on u - y_on||^2`` with ``X_off u <= 0``: every active set, the best feasible."""
        on = y > 0 if relu else np.full(len(y), True)
        A, B, d = X[on], X[~on], X.shape[1]
        best, least = np.zeros(d), mu / 2 * float(y[on] @ y[on])
        for signs in np.ndindex(*(3,) * d):
            s = np.array(signs) - 1.0
            k = np.flatnonzero(s)
            for tight in np.ndindex(*(2,) * len(B)):
                C = B[np.array(tight, dtype=bool)][:, k]
                if not len(k) or len(C) >= len(k) + 1:
                    continue
                K = np.block([[mu * A[:, k].T @ A[:, k], C.T], [C, np.zeros((len(C), len(C)))]])
                rhs = np.concatenate([mu * A[:, k].T @ y[on] - s[k], np.zeros(len(C))])
                u = np.zeros(d)
                u[k] = np.linalg.lstsq(K, rhs, rcond=None)[0][: len(k)]
                value = np.abs(u).sum() + mu / 2 * ((A @ u - y[on]) ** 2).sum()
                if (B @ u <= 1e-9 * np.abs(X).max() * np.abs(u).max()).all() and value < least:
                    best, least = u, value
        return best

    def solve(X: np.ndarray, Y: np.ndarray, tolerance: np.ndarray) -> np.ndarray:
        on = Y > 0 if relu else np.full(Y.shape, True)
        total = float(np.linalg.norm(Y[on]))
        if float(tolerance) >= 1 or total == 0:
            return np.zeros((Y.shape[1], X.shape[1]))
        unit = 1 / (float(np.linalg.norm(X)) * total)
        low, high = 1e-3 * unit, 1e9 * unit
        for _ in range(80):
            mu = (low * high) ** 0.5
            U = np.array([neuron(X, y, mu) for y in Y.T])
            far = float(np.linalg.norm((X @ U.T - Y)[on])) > float(tolerance) * total
            low, high = (mu, high) if far else (low, mu)
            if high / low < 1 + 1e-14:
                break
        return U

    return solve


def _call(make: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda X, Y, tolerance: make(X, Y, tolerance, **options)


def _violated(U: Tensor, X: Tensor, Y: Tensor, tolerance: Tensor) -> Tensor:
    """Zero where the constraints hold."""
    V, on = X @ U.mT, Y > 0
    miss = torch.linalg.vector_norm(torch.where(on, V - Y, 0), dim=(-2, -1))
    ball = (miss - tolerance * torch.linalg.vector_norm(torch.where(on, Y, 0), dim=(-2, -1))).clamp_min(0)
    return ball + torch.where(on, 0, V.clamp_min(0)).sum((-2, -1))


def _case(name: str, inputs: tuple[Tensor, ...], relu: bool, **fields: Any) -> LayerCase:
    X, Y, tolerance = inputs
    hostile = (
        Hostile("all error allowed", (X, Y, 1 + tolerance)),
        Hostile("no error allowed", (X, X @ WEIGHTS.mT, 0 * tolerance), may_fail=True),
        Hostile("nothing to keep", (X, 0 * Y, tolerance)),
        Hostile("duplicate rows", (torch.cat([X[:1], X[:-1]]), torch.cat([Y[:, :1], Y[:, :-1]], 1), tolerance)),
        Hostile("a zero row", (torch.cat([0 * X[:1], X[1:]]), torch.cat([0 * Y[:, :1], Y[:, 1:]], 1), tolerance)),
        Hostile("a zero column", (X * FIRST, (X * FIRST) @ WEIGHTS.mT, tolerance)),
        Hostile("huge data", (X * 1e6, Y * 1e6, tolerance)),
        Hostile("tiny data", (X * 1e-6, Y * 1e-6, tolerance)),
        Hostile("impossible", (0 * X, Y.abs() + 1, tolerance), SolveError, "INFEASIBLE"),
        Hostile("a negative tolerance", (X, Y, -tolerance), ValueError, "tolerance: expected at least 0, got -"),
    )
    common: dict[str, Any] = {
        "layer": "net_trim_weights",
        "source": SOURCE,
        "event_ndims": NDIMS,
        "names": ("X", "Y", "tolerance"),
        "tolerant": _call(net_trim_weights, relu=relu, on_failure="nan"),
        "solution": _call(net_trim_weights_ex, relu=relu),
        "hostile": hostile,
        "wrong": (
            Wrong("rows", (X, Y[:, 1:], tolerance), r"Y: expected shape \(\d,\) in its last dimension but one"),
            Wrong("one number", (X, Y[0, 0, 0], tolerance), "Y: expected at least 2 dimensions, got shape"),
        ),
        "exact_bits": False,
    }
    oracle = per_element(_enumeration(relu), NDIMS)
    return LayerCase(name, _call(net_trim_weights, relu=relu), inputs, oracle, **(common | fields))


X = normal(1, 5, 2)
WEIGHTS = numbers([[[1.0, -0.4]], [[-0.7, 0.9]]])
FIRST = numbers([1.0, 0.0])
JOINT = normal(2, 3, 2), normal(2, 3, 2) @ normal(3, 2, 2, 2).mT, numbers([0.2, 0.3])

CASES: tuple[LayerCase, ...] = (
    _case(
        "net_trim_weights",
        (X, X @ WEIGHTS.mT, numbers([0.1, 0.3])),
        True,
        representative=True,
        invariants=(_violated,),
    ),
    _case("net_trim_weights of neurons that share the error", JOINT, True, hostile=(), invariants=(_violated,)),
    _case("net_trim_weights linear", JOINT, False, hostile=()),
)
