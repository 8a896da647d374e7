"""Cases of operators on matrices: singular values, eigenvalues, transport plans."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import SolveError
from difflayers.proximal import (
    project_nuclear_ball,
    project_spectral_box,
    project_stiefel,
    project_transport,
    project_transport_ex,
    prox_nuclear,
    prox_spectral_l2,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

X = normal(60, 3, 3, 2)
T = numbers([0.3, 0.5, 0.8])
EYE = torch.eye(3, dtype=torch.float64, device="cpu")
SQUARE = normal(61, 2, 3, 3)
LOWER, UPPER = numbers([-0.4, -0.1]), numbers([0.6, 0.9])
COST, ROWS, COLUMNS = (
    normal(62, 2, 2, 3),
    numbers([[0.4, 0.6], [1.0, 0.5]]),
    numbers([[0.2, 0.5, 0.3], [0.3, 0.3, 0.9]]),
)


def _by_values(change: Callable[[np.ndarray, float], np.ndarray]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A change of the singular values, one matrix at a time."""

    def solve(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        u, s, v = np.linalg.svd(x, full_matrices=False)
        return (u * change(s, float(t))) @ v

    return solve


def _bisect(f: Callable[[float], float], high: float) -> float:
    """The root of a decreasing function on [0, high]."""
    low = 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return high


def _onto_ball(s: np.ndarray, radius: float) -> np.ndarray:
    if s.sum() <= radius:
        return s
    return np.maximum(s - _bisect(lambda tau: np.maximum(s - tau, 0).sum() - radius, s.max()), 0)


def _capped(s: np.ndarray, t: float) -> np.ndarray:
    """The height h at which the parts above sum to t; 0 where even all of them do not."""
    return np.minimum(s, _bisect(lambda h: np.maximum(s - h, 0).sum() - t, s.max())) if s.sum() > t else 0 * s


def _clipped(x: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    values, q = np.linalg.eigh((x + x.T) / 2)
    return (q * np.clip(values, lower, upper)) @ q.T


def _polar(x: np.ndarray) -> np.ndarray:
    values, q = np.linalg.eigh(x.T @ x)
    return x @ (q / np.sqrt(values)) @ q.T


def _plan(x: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The best of the solutions on every support."""
    n, m = x.shape
    sums = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    aim, point = np.concatenate([a, b]), x.ravel()
    best, found = math.inf, point
    for kept in itertools.product((False, True), repeat=n * m):
        mask = np.array(kept)
        A = sums[:, mask]
        p = np.zeros(n * m)
        p[mask] = point[mask] + np.linalg.pinv(A) @ (aim - A @ point[mask])
        distance = ((p - point) ** 2).sum()
        if np.abs(sums @ p - aim).max() < 1e-9 * aim.max() and p.min() > -1e-9 * aim.max() and distance < best:
            best, found = distance, p
    return found.reshape(n, m)


def _balanced(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Totals made equal, so that all numbers may move on their own."""
    return x, a, b * (a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True))


SCALES = (Hostile("huge", (1e9 * X, 1e9 * T)), Hostile("tiny", (1e-9 * X, 1e-9 * T)))

CASES: tuple[LayerCase, ...] = (
    LayerCase(
        "prox_nuclear",
        prox_nuclear,
        (X, T),
        per_element(_by_values(lambda s, t: np.maximum(s - t, 0)), (2, 0)),
        event_ndims=(2, 0),
        names=("x", "t"),
        source="J.-F. Cai, E. Candes, Z. Shen, 2010: singular value thresholding",
        representative=True,
        hostile=(
            Hostile("zero", (0 * X, T)),
            Hostile("repeated", (2 * EYE, numbers(0.5))),
            Hostile("equal to the step", (2 * EYE, numbers(2.0))),
            Hostile("rank one", (torch.ones(3, 2, dtype=torch.float64, device="cpu"), numbers(0.5))),
            Hostile("no step", (X, 0 * T)),
            Hostile("no step at zero", (0 * X, 0 * T)),
            *SCALES,
        ),
        wrong=(
            Wrong("negative step", (X, -T), r"t: expected at least 0, got -0\.3"),
            Wrong("a vector", (T, T), r"x: expected at least 2 dimensions"),
        ),
    ),
    LayerCase(
        "prox_nuclear wide",
        prox_nuclear,
        (X.mT.contiguous(), numbers(0.4)),
        per_element(_by_values(lambda s, t: np.maximum(s - t, 0)), (2, 0)),
        event_ndims=(2, 0),
        names=("x", "t"),
    ),
    LayerCase(
        "project_nuclear_ball",
        project_nuclear_ball,
        (X, T),
        per_element(_by_values(_onto_ball), (2, 0)),
        event_ndims=(2, 0),
        names=("x", "radius"),
        source="A. Beck, First-Order Methods in Optimization, 2017, section 7.3",
        representative=True,
        hostile=(
            Hostile("inside", (X, 100 * T)),
            Hostile("a single point", (X, 0 * T)),
            Hostile("repeated", (2 * EYE, numbers(1.5))),
            Hostile("zero", (0 * X, T)),
            *SCALES,
        ),
        wrong=(Wrong("empty set", (X, -T), r"radius: expected at least 0, got -0\.3"),),
    ),
    LayerCase(
        "prox_spectral_l2",
        prox_spectral_l2,
        (X, T),
        per_element(_by_values(_capped), (2, 0)),
        event_ndims=(2, 0),
        names=("x", "t"),
        source="N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.7.3",
        representative=True,
        hostile=(
            Hostile("large step", (X, 100 * T)),
            Hostile("no step", (X, 0 * T)),
            Hostile("repeated", (2 * EYE, numbers(1.5))),
            *SCALES,
        ),
        wrong=(Wrong("negative step", (X, -T), r"t: expected at least 0, got -0\.3"),),
    ),
    LayerCase(
        "project_spectral_box",
        project_spectral_box,
        (SQUARE, LOWER, UPPER),
        per_element(_clipped, (2, 0, 0)),
        event_ndims=(2, 0, 0),
        names=("x", "lower", "upper"),
        source="N. Higham, 1988: a nearest symmetric positive semidefinite matrix",
        representative=True,
        hostile=(
            Hostile("cone", (SQUARE, 0 * LOWER, math.inf * UPPER)),
            Hostile("no bounds", (SQUARE, math.inf * LOWER, math.inf * UPPER)),
            Hostile("repeated", (2 * EYE, numbers(0.0), numbers(1.0))),
            Hostile("equal to a bound", (EYE, numbers(0.0), numbers(1.0))),
            Hostile("a single point", (SQUARE, LOWER, LOWER)),
            Hostile("huge", (1e9 * SQUARE, 1e9 * LOWER, 1e9 * UPPER)),
            Hostile("narrow", (1e9 * SQUARE, LOWER, UPPER)),
            Hostile("tiny", (1e-9 * SQUARE, 1e-9 * LOWER, 1e-9 * UPPER)),
        ),
        wrong=(
            Wrong("empty set", (SQUARE, UPPER, LOWER), r"lower: expected bounds with lower <= upper"),
            Wrong("not square", (X, numbers(0.0), numbers(1.0)), r"x: expected square matrices, got shape \(3, 3, 2\)"),
        ),
    ),
    LayerCase(
        "project_spectral_box cone",
        project_spectral_box,
        (SQUARE,),
        per_element(lambda x: _clipped(x, np.array(0.0), np.array(math.inf)), (2,)),
        event_ndims=(2,),
        names=("x",),
        hostile=(Hostile("zero", (0 * SQUARE,)), Hostile("rank one", (0 * SQUARE + 1,)), Hostile("in it", (2 * EYE,))),
    ),
    LayerCase(
        "project_stiefel",
        project_stiefel,
        (X,),
        per_element(_polar, (2,)),
        invariants=(lambda z, x: z.mT @ z - EYE[:2, :2].to(z),),
        event_ndims=(2,),
        names=("x",),
        source="N. Higham, Functions of Matrices, 2008, theorem 8.4",
        representative=True,
        hostile=(
            Hostile("repeated", (2 * EYE,)),
            Hostile("huge", (1e9 * X,)),
            Hostile("tiny", (1e-9 * X,)),
            Hostile("zero", (0 * X,), fn=lambda x: project_stiefel(x)),
        ),
        wrong=(Wrong("wide", (X.mT,), r"x: expected at least as many rows as columns, got shape \(3, 2, 3\)"),),
    ),
    LayerCase(
        "project_transport",
        lambda *args: project_transport(*_balanced(*args)),
        (COST, ROWS, COLUMNS),
        lambda *args: per_element(_plan, (2, 1, 1))(*_balanced(*args)),
        invariants=(lambda z, x, a, b: z.sum(-1) - a, lambda z, x, a, b: z.clamp_max(0)),
        event_ndims=(2, 1, 1),
        names=("x", None, None),
        source="M. Blondel, V. Seguy, A. Rolet, 2018: smooth and sparse optimal transport",
        representative=True,
        tolerant=lambda *args: project_transport(*_balanced(*args), on_failure="nan"),
        solution=lambda *args: project_transport_ex(*_balanced(*args)),
        starved=lambda x, *sums: project_transport(*_balanced(3 * x, *sums), max_steps=1),
        starved_solution=lambda x, *sums: project_transport_ex(*_balanced(3 * x, *sums), max_steps=1),
        hostile=(
            Hostile("zero", (0 * COST, ROWS, COLUMNS)),
            Hostile("a permutation", (5 * EYE, numbers([1.0, 1.0, 1.0]), numbers([1.0, 1.0, 1.0]))),
            Hostile("at a kink", (EYE, numbers([1.0, 1.0, 1.0]), numbers([1.0, 1.0, 1.0]))),
            Hostile("empty row", (COST[0], numbers([0.0, 1.0]), COLUMNS[0])),
            Hostile("no mass", (COST[0], numbers([0.0, 0.0]), numbers([0.0, 0.0, 0.0])), fn=project_transport),
            Hostile("large matrix", (1e4 * COST, ROWS, COLUMNS)),
            Hostile("small matrix", (1e-9 * COST, ROWS, COLUMNS)),
            Hostile("huge", (1e9 * COST, 1e9 * ROWS, 1e9 * COLUMNS)),
            Hostile("tiny", (1e-9 * COST, 1e-9 * ROWS, 1e-9 * COLUMNS)),
            Hostile("different totals", (COST, ROWS, 2 * COLUMNS), SolveError, "INFEASIBLE", fn=project_transport),
            Hostile("negative sum", (COST, ROWS - 0.5, COLUMNS), SolveError, "INFEASIBLE"),
        ),
        wrong=(
            Wrong(
                "one sum alone",
                (COST, ROWS, COLUMNS),
                r"b: expected a tensor",
                fn=lambda x, a, b: project_transport(x, a),
            ),
            Wrong(
                "not square", (COST, ROWS, COLUMNS), r"a: expected row sums", fn=lambda x, a, b: project_transport(x)
            ),
            Wrong("sums exchanged", (COST, COLUMNS, ROWS), r"a: expected shape \(2,\)", fn=project_transport),
        ),
    ),
)
