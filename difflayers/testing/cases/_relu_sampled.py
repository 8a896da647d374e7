"""Cases of the sampled convex program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.relu import (
    FISTA,
    Logistic,
    Loss,
    Squared,
    sampled_convex_program,
    sampled_convex_program_ex,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

__all__ = ["CASES"]

SOURCE = "Y. Bai, T. Gautam, S. Sojoudi, Efficient Global Optimization of Two-Layer ReLU Networks, 2023"
NDIMS = (2, 1, 1, 0)
DIRECTIONS = numbers([[1.0, 0.3], [-0.8, 0.5], [0.1, -2.0], [-0.4, -0.6]])


def _coefficients(
    loss: Loss, X: np.ndarray, y: np.ndarray, s: np.ndarray, beta: np.ndarray, U: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The lasso by coordinate descent on its parabolas, then Newton steps on the support; also the unit directions."""
    logistic = isinstance(loss, Logistic)
    U = U / np.linalg.norm(U, axis=1, keepdims=True)
    H = np.maximum(X @ U.T, 0)

    def slope(f: np.ndarray) -> np.ndarray:
        return s * (-y / (1 + np.exp(y * f)) if logistic else f - y)

    def bend(f: np.ndarray) -> np.ndarray:
        return s * (y**2 / (2 + 2 * np.cosh(y * f)) if logistic else 1.0)

    a, most = np.zeros(len(U)), (H**2 * bend(0 * y)[:, None]).sum(0)
    for _ in range(3000):
        for j in np.flatnonzero(most):
            z = a[j] - H[:, j] @ slope(H @ a) / most[j]
            a[j] = np.sign(z) * max(abs(z) - beta / most[j], 0)
    on = a != 0
    for _ in range(6 * on.any()):
        f, A = H[:, on] @ a[on], H[:, on]
        step = A.T @ slope(f) + beta * np.sign(a[on])
        a[on] -= np.linalg.lstsq(A.T @ (bend(f)[:, None] * A), step, rcond=None)[0]
    return a, U


def _neurons_of(loss: Loss) -> Callable[..., np.ndarray]:
    def solve(X: np.ndarray, y: np.ndarray, s: np.ndarray, beta: np.ndarray, U: np.ndarray | None = None) -> np.ndarray:
        a, U = _coefficients(loss, X, y, s, beta, DIRECTIONS.numpy() if U is None else U)
        return np.concatenate([np.maximum(a, 0)[:, None] * U, np.maximum(-a, 0)[:, None] * U])

    return solve


def _value_of(loss: Loss) -> Callable[..., np.ndarray]:
    def solve(X: np.ndarray, y: np.ndarray, s: np.ndarray, beta: np.ndarray) -> np.ndarray:
        a, U = _coefficients(loss, X, y, s, beta, DIRECTIONS.numpy())
        f = np.maximum(X @ U.T, 0) @ a
        each = np.log1p(np.exp(-y * f)) if isinstance(loss, Logistic) else (f - y) ** 2 / 2
        return (s * each).sum() + beta * np.abs(a).sum()

    return solve


def _call(make: Callable[..., Any], pick: Callable[[Any], Any], **options: Any) -> Callable[..., Any]:
    def run(X: Tensor, y: Tensor, s: Tensor, beta: Tensor, directions: Tensor | None = None) -> Any:
        directions = DIRECTIONS.to(X) if directions is None else directions
        return pick(make(X, y, beta, directions, sample_weight=s, **options))

    return run


def _neurons(solution: Any) -> Tensor:
    return torch.cat([solution.v, solution.w], -2)


def _only_neurons(solution: Any) -> Any:
    return replace(solution, value=_neurons(solution.value))


def _gap(loss: Loss) -> Callable[..., Tensor]:
    return _call(sampled_convex_program, lambda found: found.gap, loss=loss)


def _optimum(name: str, inputs: tuple[Tensor, ...], loss: Loss) -> Hostile:
    """Compares the objective, where neurons are not unique."""
    fn = _call(sampled_convex_program, lambda found: found.objective, loss=loss)
    return Hostile(name, inputs, fn=fn, oracle=per_element(_value_of(loss), NDIMS))


def _case(name: str, inputs: tuple[Tensor, ...], loss: Loss, **fields: Any) -> LayerCase:
    X, y, s, beta = inputs
    starved = {"solver": FISTA(max_steps=1), "loss": loss}
    common: dict[str, Any] = {
        "layer": "sampled_convex_program",
        "source": SOURCE,
        "event_ndims": NDIMS,
        "names": ("X", "y", "sample_weight", "beta"),
        "invariants": (lambda value, *data: _gap(loss)(*data),),
        "tolerant": _call(sampled_convex_program, _neurons, loss=loss, on_failure="nan"),
        "solution": _call(sampled_convex_program_ex, _only_neurons, loss=loss),
        "starved": _call(sampled_convex_program, _neurons, **starved),
        "starved_solution": _call(sampled_convex_program_ex, _only_neurons, **starved),
        "hostile": (
            Hostile("beta so large that the network is zero", (X, y, s, beta + 1000)),
            Hostile("duplicate rows", (torch.cat([X[..., :1, :], X[..., :-1, :]], -2), y, s, beta)),
            Hostile("a zero row", (torch.cat([0 * X[..., :1, :], X[..., 1:, :]], -2), y, s, beta)),
            # activations of directions are then multiples of each other
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
            Wrong(
                "columns", (X[..., :1], y, s, beta), r"directions: expected vectors of shape \(\.\.\., P, 1\) as of X"
            ),
        ),
        "exact_bits": False,
    }
    run = _call(sampled_convex_program, _neurons, loss=loss)
    oracle = per_element(_neurons_of(loss), NDIMS)
    return LayerCase(name, run, inputs, oracle, **(common | fields))


SHARED = normal(3, 4, 2), normal(4, 2, 4), 0.5 + normal(5, 4).abs(), numbers([0.3, 0.15])
EACH = normal(6, 2, 3, 2), normal(7, 2, 3), 0.5 + normal(8, 3).abs(), numbers(0.2)
SIGNS = normal(3, 4, 2), numbers([[1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, -1.0]]), SHARED[2], numbers([0.1, 0.05])
MOVING = normal(6, 3, 2), normal(7, 2, 3), 0.5 + normal(8, 3).abs(), numbers(0.2), normal(9, 3, 2)

CASES: tuple[LayerCase, ...] = (
    _case("sampled_convex_program", SHARED, Squared(), representative=True),
    _case("sampled_convex_program each its data", EACH, Squared()),
    _case("sampled_convex_program logistic", SIGNS, Logistic()),
    LayerCase(
        "sampled_convex_program directions",
        _call(sampled_convex_program, _neurons),
        MOVING,
        per_element(_neurons_of(Squared()), (*NDIMS, 2)),
        layer="sampled_convex_program",
        source=SOURCE,
        event_ndims=(*NDIMS, 2),
        names=("X", "y", "sample_weight", "beta", "directions"),
        tolerant=_call(sampled_convex_program, _neurons, on_failure="nan"),
        exact_bits=False,
    ),
    LayerCase(
        "sampled_convex_program objective",
        _call(sampled_convex_program, lambda found: found.objective),
        SHARED,
        per_element(_value_of(Squared()), NDIMS),
        layer="sampled_convex_program",
        source=SOURCE,
        event_ndims=NDIMS,
        names=("X", "y", "sample_weight", "beta"),
        tolerant=_call(sampled_convex_program, lambda found: found.objective, on_failure="nan"),
        exact_bits=False,
    ),
)
