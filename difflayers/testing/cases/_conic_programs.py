"""Cases of quadratic programs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from difflayers._solution import SolveError
from difflayers.conic import InteriorPoint, Moreau, quadratic_program, quadratic_program_ex
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

__all__ = ["CASES"]

SOURCE = "B. Amos, J. Z. Kolter, OptNet, 2017"


def _enumerate(P: np.ndarray, q: np.ndarray, G: np.ndarray, h: np.ndarray, A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Every active set is tried; the feasible point with multipliers of the right sign and the lowest value wins."""
    best, value = None, np.inf
    n, p, m = len(q), len(b), len(h)
    P = (P + P.T) / 2
    for k in range(min(m, n - p) + 1):
        for rows in itertools.combinations(range(m), k):
            C = np.concatenate([A, G[list(rows)]])
            K = np.block([[P, C.T], [C, np.zeros((p + k, p + k))]])
            right = np.concatenate([-q, b, h[list(rows)]])
            x = np.linalg.lstsq(K, right, rcond=None)[0]
            if np.abs(K @ x - right).max() > 1e-9 * (1 + np.abs(right).max()):
                continue
            z, x = x[n + p :], x[:n]
            scale = 1e-9 * (1 + np.abs(h).max())
            energy = x @ P @ x / 2 + q @ x
            if (z >= -1e-9).all() and (G @ x <= h + scale).all() and energy < value:
                best, value = x, energy
    assert best is not None
    return best


def _case(name: str, inputs: tuple[Tensor, ...], solver: Any, **fields: Any) -> LayerCase:
    def run(make: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda *data: make(*data, solver=solver, **options)

    P, q, G, h, A, b = inputs
    common: dict[str, Any] = {
        "layer": "quadratic_program",
        "source": SOURCE,
        "event_ndims": (2, 1, 2, 1, 2, 1),
        "names": ("P", "q", "G", "h", "A", "b"),
        "oracle": per_element(_enumerate, (2, 1, 2, 1, 2, 1)),
        "tolerant": run(quadratic_program, on_failure="nan"),
        "solution": lambda *data: _only_x(quadratic_program_ex(*data, solver=solver)),
        "invariants": (
            lambda x, P, q, G, h, A, b: (A @ x.unsqueeze(-1)).squeeze(-1) - b,
            lambda x, P, q, G, h, A, b: ((G @ x.unsqueeze(-1)).squeeze(-1) - h).clamp_min(0),
        ),
        "hostile": (
            Hostile("infeasible", (P, q, G, h - 100, A, b), SolveError, "INFEASIBLE|MAX_STEPS"),
            Hostile("no bounds", (P, q, G, h + numbers(np.inf), A, b)),
        ),
        "wrong": (
            Wrong("not square", (P[..., :1], q, G, h, A, b), r"P: expected shape"),
            Wrong("wrong columns", (P, q, G[..., :1], h, A, b), r"G: expected 2 columns as of q"),
            Wrong("wrong rows", (P, q, G, h[..., :1], A, b), r"h: expected 2 entries, one per row of G"),
        ),
        "oracle_tol": 1e-7,
    }
    return LayerCase(name, run(quadratic_program), inputs, **(common | fields))


def _only_x(solution: Any) -> Any:
    from dataclasses import replace

    return replace(solution, value=solution.value.x)


P = numbers([[2.0, 0.3], [0.3, 1.0]])
G, A, b = numbers([[1.0, -0.5], [-1.0, 0.2]]), numbers([[1.0, 1.0]]), numbers([0.4])
q, h = normal(31, 2, 2), numbers([[0.1, 0.8], [0.3, 0.2]])

CASES: tuple[LayerCase, ...] = (
    _case("quadratic_program Moreau", (P, q, G, h, A, b), Moreau(), representative=True),
    _case("quadratic_program InteriorPoint", (P, q, G, h, A, b), InteriorPoint()),
)
