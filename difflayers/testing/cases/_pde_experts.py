"""Cases of the mixture of domain experts, as values of its field."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.implicit import LevenbergMarquardt
from difflayers.pde import (
    Box,
    Continuity,
    Dirichlet,
    DomainExperts,
    Fixed,
    HardBoxes,
    PartitionOfUnity,
    PDEConstraint,
    Poisson,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element
from ._pde_layer import _basis, _Logistic

__all__ = ["CASES"]

SOURCE = "N. Chalapathi, Y. Du, A. S. Krishnapriyan, Scaling physics-informed hard constraints, 2024"
RIDGE = 0.5
POINTS, AT = (0.1, 0.2, 0.6, 0.7, 0.9), (0.25, 0.5, 0.9)


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)


def _line(like: Tensor) -> tuple[Poisson, Fixed]:
    ends = {"x=0": _column((0.0,), like), "x=1": _column((1.0,), like)}
    conditions = (Dirichlet("x=0", "left", exact=True), Dirichlet("x=1"))
    return Poisson(domain=Box(x=(0.0, 1.0)), conditions=conditions), Fixed(_column(POINTS, like), ends)


def _poisson(continuity: Continuity | None = None, **options: Any) -> Any:
    def fn(a: Tensor, f: Tensor, left: Tensor) -> Tensor:
        pde, sampler = _line(a)
        inner = PDEConstraint(pde, sampler=sampler, ridge=RIDGE, **options)
        layer = DomainExperts(inner, HardBoxes(x=2), continuity=continuity).to(a)
        return layer(_basis(a), {"f": f}, {"left": left})(_column(AT, a))

    return fn


def _logistic(**options: Any) -> Any:
    def fn(a: Tensor, k: Tensor, start: Tensor) -> Tensor:
        sampler = Fixed(_column(POINTS, a), {"t=0": _column((0.0,), a)})
        inner = PDEConstraint(_Logistic(), sampler=sampler, ridge=RIDGE, **options)
        layer = DomainExperts(inner, PartitionOfUnity(overlap=0.8, t=2), conditions="all").to(a)
        return layer(_basis(a), {"k": k}, {"start": start})(_column(AT, a))

    return fn


def _waves(a: np.ndarray, x: Any) -> np.ndarray:
    return np.sin(np.multiply.outer(np.asarray(x), a) + np.arange(len(a)))


def _poisson_blocks(
    a: np.ndarray, f: np.ndarray, left: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Weighted rows and exact rows of both experts."""
    out = []
    for points, end in ((POINTS[:2], 0), (POINTS[2:], 1)):
        J = -(a**2) * _waves(a, points) / np.sqrt(len(points))
        r = -f * np.ones(len(points)) / np.sqrt(len(points))
        if end:
            out.append((np.vstack([J, _waves(a, 1.0)]), np.append(r, 0.0), np.zeros((0, len(a))), np.zeros(0)))
        else:
            out.append((J, r, _waves(a, 0.0)[None], left))
    return out


def _constrained(A: np.ndarray, y: np.ndarray, C: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Ridge regression with exact rows, by its optimality system."""
    K, p = A.shape[1], len(C)
    system = np.block([[A.T @ A + RIDGE * np.eye(K), C.T], [C, np.zeros((p, p))]])
    return np.linalg.solve(system, np.concatenate([A.T @ y, d]))[:K]


def _picked(a: np.ndarray, w: list[np.ndarray]) -> np.ndarray:
    return np.array([_waves(a, x) @ w[x >= 0.5] for x in AT])


def _poisson_oracle(a: np.ndarray, f: np.ndarray, left: np.ndarray) -> np.ndarray:
    return _picked(a, [_constrained(*block) for block in _poisson_blocks(a, f, left)])


def _tied_oracle(a: np.ndarray, f: np.ndarray, left: np.ndarray) -> np.ndarray:
    """One problem for both, with a row for the difference in the middle."""
    (A1, y1, C1, d1), (A2, y2, _, _) = _poisson_blocks(a, f, left)
    K, seam = len(a), 3.0 * _waves(a, 0.5)
    zero = lambda A: np.zeros((len(A), K))  # noqa: E731
    A = np.vstack([np.hstack([A1, zero(A1)]), np.hstack([zero(A2), A2]), np.hstack([seam, -seam])[None]])
    w = _constrained(A, np.concatenate([y1, y2, [0.0]]), np.hstack([C1, zero(C1)]), d1)
    return _picked(a, [w[:K], w[K:]])


def _logistic_oracle(a: np.ndarray, k: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Newton's method from the best of scipy on each box, [0, 0.7] and [0.3, 1], and a blend by hand."""
    from scipy.optimize import least_squares

    found = []
    for box in ((0.0, 0.7), (0.3, 1.0)):
        t = np.array([x for x in POINTS if box[0] <= x <= box[1]])
        U, V = _waves(a, t), a * np.cos(np.multiply.outer(t, a) + np.arange(len(a)))

        def rows(w: np.ndarray, U: np.ndarray = U, V: np.ndarray = V) -> np.ndarray:
            u = U @ w
            miss = (V @ w + k * u + u**2) / np.sqrt(len(u))
            return np.concatenate([miss, _waves(a, 0.0)[None] @ w - start, np.sqrt(RIDGE) * w])

        w = least_squares(rows, np.zeros(len(a)), xtol=1e-15, ftol=1e-15, gtol=1e-15).x
        for _ in range(3):
            u, N = U @ w, len(t)
            J = np.vstack(
                [(V + (k + 2 * u)[:, None] * U) / np.sqrt(N), _waves(a, 0.0), np.sqrt(RIDGE) * np.eye(len(a))]
            )
            r = rows(w)
            w = w - np.linalg.solve(J.T @ J + (U.T * (2 * r[:N] / np.sqrt(N))) @ U, J.T @ r)
        found.append(w)
    s = np.clip((np.array(AT) - 0.3) / 0.4, 0, 1)
    share = 6 * s**5 - 15 * s**4 + 10 * s**3
    values = [_waves(a, AT) @ w for w in found]
    return (1 - share) * values[0] + share * values[1]


A = numbers([[1.0, 2.0, 0.5], [0.7, 1.5, 2.5]])
F, LEFT = numbers([[0.7], [1.3]]), numbers([[0.3], [-0.4]])
K, START = numbers([[0.4], [0.9]]), numbers([[0.5], [0.8]])
NDIMS = (1, 1, 1)
COMMON: dict[str, Any] = {
    "layer": "DomainExperts",
    "event_ndims": NDIMS,
    "source": SOURCE,
    "half": False,
    "exact_bits": False,
    "bad": (1, numbers([float("nan")])),
}

CASES: tuple[LayerCase, ...] = (
    LayerCase(
        "DomainExperts poisson",
        _poisson(),
        (A, F, LEFT),
        per_element(_poisson_oracle, NDIMS),
        names=(None, "params['f']", None),
        representative=True,
        tolerant=_poisson(on_failure="nan"),
        hostile=(
            Hostile("constant basis functions, with a ridge", (0 * A, F, LEFT)),
            Hostile("huge source", (A, 1e9 * F, LEFT)),
        ),
        wrong=(
            Wrong("a source of the wrong size", (A, normal(1, 2, 3), LEFT), r"params\['f'\]: expected 1 or 5 entries"),
            Wrong("values of the wrong size", (A, F, normal(1, 2, 3)), r"dirichlet x=0: expected 1 or 1 entries"),
        ),
        **COMMON,
    ),
    LayerCase(
        "DomainExperts poisson, continuous",
        _poisson(Continuity(weight=3.0)),
        (A, F, LEFT),
        per_element(_tied_oracle, NDIMS),
        names=(None, "params['f']", None),
        tolerant=_poisson(Continuity(weight=3.0), on_failure="nan"),
        **COMMON,
    ),
    LayerCase(
        "DomainExperts logistic, blended",
        _logistic(),
        (A, K, START),
        per_element(_logistic_oracle, NDIMS),
        names=(None, "params['k']", None),
        tolerant=_logistic(on_failure="nan"),
        starved=_logistic(solver=LevenbergMarquardt(max_steps=1)),
        **COMMON,
    ),
)
