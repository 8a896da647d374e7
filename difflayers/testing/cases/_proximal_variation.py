"""Cases of operators with a partition: isotonic regression, the sorted l1 norm, total variation."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from difflayers.proximal import (
    DualGradient,
    TV2DInteriorPoint,
    project_isotonic,
    prox_graph_tv,
    prox_graph_tv_ex,
    prox_slope,
    prox_tv1d,
    prox_tv2d,
    prox_tv2d_ex,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

X = normal(31, 3, 4)
T = numbers([0.3, 0.5, 0.8])
WEIGHTS = normal(32, 3, 4).exp()
FALLING = numbers([1.5, 1.0, 0.6, 0.1])
PAIRS = normal(33, 3, 3).exp()

EDGES = ((0, 1, 2, 3, 0), (1, 2, 3, 0, 2))
EDGE_WEIGHTS = normal(34, 5).exp()
IMAGES = normal(35, 2, 2, 3)
SMALL = normal(36, 3, 2, 2)


def pooled(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Pool adjacent violators, one block after the other."""
    blocks: list[list[float]] = []
    for value, weight in zip(x, w, strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, p, m), (b, q, k) = blocks[-2:]
            blocks[-2:] = [[(p * a + q * b) / (p + q), p + q, m + k]]
    return np.concatenate([np.full(int(k), a) for a, _, k in blocks])


def _slope(x: np.ndarray, t: np.ndarray, w: np.ndarray) -> np.ndarray:
    order = np.argsort(-np.abs(x), kind="stable")
    z = np.empty_like(x)
    z[order] = np.maximum(-pooled(t * w - np.abs(x)[order], np.ones_like(x)), 0)
    return np.sign(x) * z


def variation(x: np.ndarray, bounds: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """``argmin_z sum_e bounds_e |z_i - z_j| + 1/2 ||z - x||^2`` by trying every sign of every difference."""
    best, found = np.inf, x
    D = np.zeros((edges.shape[1], len(x)))
    D[np.arange(len(D)), edges[0]], D[np.arange(len(D)), edges[1]] = -1, 1
    for signs in itertools.product((-1, 0, 1), repeat=len(D)):
        s = np.array(signs)
        E = D[s == 0]
        pulled = x - D.T @ (bounds * s)
        z = pulled - np.linalg.pinv(E) @ (E @ pulled)
        value = bounds @ np.abs(D @ z) + ((z - x) ** 2).sum() / 2
        if value < best:
            best, found = value, z
    return found


def _tv1d(x: np.ndarray, t: np.ndarray, w: np.ndarray) -> np.ndarray:
    return variation(x, t * w, np.array([range(len(x) - 1), range(1, len(x))]))


def _graph_tv(x: np.ndarray, t: np.ndarray, w: np.ndarray) -> np.ndarray:
    return variation(x, t * w, np.array(EDGES))


def _edges(x: Tensor) -> Tensor:
    return torch.tensor(EDGES, dtype=torch.int64, device=x.device)


def _grid(height: int, width: int) -> np.ndarray:
    """The edges of a pixel grid: to the right, then down; ``(2, m)``."""
    index = np.arange(height * width).reshape(height, width)
    right, down = (index[:, :-1], index[:, 1:]), (index[:-1], index[1:])
    return np.concatenate([np.stack([tail.ravel(), head.ravel()]) for tail, head in (right, down)], 1)


def _tv2d_anisotropic(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    edges = _grid(*x.shape)
    return variation(x.ravel(), np.full(edges.shape[1], float(t)), edges).reshape(x.shape)


def _tv2d(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Alternating directions with the system inverted, until nothing changes."""
    height, width = x.shape
    size, n = max(float(np.abs(x).max()), 1e-300), x.size
    D = np.zeros((2, n, n))  # to the right and down, zero rows at the border
    for k, (tail, head) in enumerate([(0, 1), (0, width)]):
        for i in range(n):
            inside = i % width + 1 < width if k == 0 else i // width + 1 < height
            if inside:
                D[k, i, i + tail], D[k, i, i + head] = -1, 1
    v, step, stacked = x.ravel() / size, float(t) / size, D.reshape(2 * n, n)
    rho = min(max(step, 0.1), 10.0)
    inverse = np.linalg.inv(np.eye(n) + rho * stacked.T @ stacked)
    d = u = np.zeros((2, n))
    z = v
    for _ in range(4000):
        new = inverse @ (v + rho * stacked.T @ (d - u).ravel())
        w = (stacked @ new).reshape(2, n) + u
        norm = np.maximum(np.linalg.norm(w, axis=0), max(step / rho, 1e-300))
        d = (1 - step / rho / norm) * w
        u, change, z = w - d, np.abs(new - z).max(), new
        if change < 1e-16:
            break
    return z.reshape(x.shape) * size


STARVED = DualGradient(max_steps=1)

CASES: tuple[LayerCase, ...] = (
    LayerCase(
        "project_isotonic",
        lambda x, w: project_isotonic(x, weights=w),
        (X, WEIGHTS),
        per_element(pooled, (1, 1)),
        invariants=(lambda z, x, w: z.diff(dim=-1).clamp_max(0), lambda z, x, w: (w * (z - x)).sum(-1)),
        names=("x", "weights"),
        source="R. E. Barlow et al., Statistical Inference under Order Restrictions, 1972",
        representative=True,
        hostile=(
            Hostile("zero", (0 * X, WEIGHTS)),
            Hostile("ties", (numbers([1.0, 0.0, 0.5, 0.5]), 0 * X[0] + 1)),
            Hostile("falling", (numbers([3.0, 2.0, 1.0, 0.0]), WEIGHTS[0])),
            Hostile("huge", (1e9 * X, 1e9 * WEIGHTS)),
            Hostile("tiny", (1e-9 * X, 1e-9 * WEIGHTS)),
        ),
        wrong=(
            Wrong("no weight", (X, 0 * WEIGHTS), r"weights: expected more than 0, got 0 in 12 of 12"),
            Wrong("too many weights", (X, WEIGHTS.repeat(1, 2)), r"weights: expected a number or a shape that .*8\)"),
        ),
    ),
    LayerCase(
        "prox_slope",
        prox_slope,
        (X, T, FALLING),
        per_element(_slope, (1, 0, 1)),
        event_ndims=(1, 0, 1),
        names=("x", "t", "weights"),
        source="M. Bogdan et al., SLOPE: adaptive variable selection via convex optimization, 2015",
        representative=True,
        hostile=(
            Hostile("zero", (0 * X, T, FALLING)),
            Hostile("ties", (numbers([2.0, -2.0, 2.0, 1.0]), numbers(0.5), FALLING)),
            Hostile("equal weights", (numbers([2.0, -2.0, 0.5, 1.0]), numbers(0.5), 0 * FALLING + 1)),
            Hostile("no step", (X, 0 * T, FALLING)),
            Hostile("huge", (1e9 * X, 1e9 * T, FALLING)),
            Hostile("tiny", (1e-9 * X, 1e-9 * T, FALLING)),
        ),
        wrong=(
            Wrong("negative step", (X, -T, FALLING), r"t: expected at least 0, got -0\.3"),
            Wrong("rising weights", (X, T, FALLING.flip(0)), r"weights: expected entries that do not rise along dim"),
            Wrong("negative weight", (X, T, FALLING - 1), r"weights: expected at least 0, got -0\.4"),
        ),
    ),
    LayerCase(
        "prox_tv1d",
        lambda x, t, w: prox_tv1d(x, t, weights=w),
        (X, numbers(0.4), PAIRS),
        per_element(_tv1d, (1, 0, 1)),
        invariants=(lambda z, x, t, w: z.sum(-1) - x.sum(-1),),
        event_ndims=(1, 0, 1),
        names=("x", "t", "weights"),
        source="A. Chambolle, J. Darbon, Total variation minimization by parametric maximum flows, 2009",
        representative=True,
        hostile=(
            Hostile("zero", (0 * X, T, PAIRS)),
            Hostile("ties", (numbers([1.0, 1.0, 0.0, 0.5]), numbers(0.25), 0 * PAIRS[0] + 1)),
            Hostile("no step", (X, 0 * T, PAIRS)),
            Hostile("no weight", (X, T, 0 * PAIRS)),
            Hostile("flat", (X, 1e6 * T, PAIRS)),
            Hostile("huge", (1e9 * X, 1e9 * T, PAIRS)),
            Hostile("tiny", (1e-9 * X, 1e-9 * T, PAIRS)),
        ),
        wrong=(
            Wrong("negative step", (X, -T, PAIRS), r"t: expected at least 0, got -0\.3"),
            Wrong("negative weight", (X, T, -PAIRS), r"weights: expected at least 0, got -"),
            Wrong("a weight for each entry", (X, T, WEIGHTS), r"weights: expected 3 entries along dim -1"),
        ),
    ),
    LayerCase(
        "prox_graph_tv",
        lambda x, t, w: prox_graph_tv(x, t, _edges(x), weights=w),
        (X, T, EDGE_WEIGHTS),
        per_element(_graph_tv, (1, 0, 1)),
        invariants=(lambda z, x, t, w: z.sum(-1) - x.sum(-1),),
        event_ndims=(1, 0, 1),
        names=("x", "t", "weights"),
        source="A. Chambolle, J. Darbon, Total variation minimization by parametric maximum flows, 2009",
        representative=True,
        tolerant=lambda x, t, w: prox_graph_tv(x, t, _edges(x), weights=w, on_failure="nan"),
        solution=lambda x, t, w: prox_graph_tv_ex(x, t, _edges(x), weights=w),
        starved=lambda x, t, w: prox_graph_tv(x, t, _edges(x), weights=w, solver=STARVED),
        starved_solution=lambda x, t, w: prox_graph_tv_ex(x, t, _edges(x), weights=w, solver=STARVED),
        hostile=(
            Hostile("zero", (0 * X, T, EDGE_WEIGHTS)),
            Hostile("constant", (0 * X + 0.1, T, EDGE_WEIGHTS)),
            Hostile("ties", (numbers([1.0, 1.0, 0.0, 0.5]), numbers(0.25), 0 * EDGE_WEIGHTS + 1)),
            Hostile("no step", (X, 0 * T, EDGE_WEIGHTS)),
            Hostile("no weight", (X, T, 0 * EDGE_WEIGHTS)),
            Hostile("flat", (X, 1e6 * T, EDGE_WEIGHTS)),
            Hostile("huge", (1e9 * X, 1e9 * T, EDGE_WEIGHTS)),
            Hostile("tiny", (1e-9 * X, 1e-9 * T, EDGE_WEIGHTS)),
        ),
        wrong=(
            Wrong("negative step", (X, -T, EDGE_WEIGHTS), r"t: expected at least 0, got -0\.3"),
            Wrong("too few weights", (X, T, EDGE_WEIGHTS[:4]), r"weights: expected shape \(5,\), or the same behind"),
            Wrong("too few nodes", (X[:, :3], T, EDGE_WEIGHTS), r"edges: expected nodes in 0\.\.2, got 0\.\.3"),
        ),
    ),
    LayerCase(
        "prox_tv2d",
        prox_tv2d,
        (IMAGES, T[:2]),
        per_element(_tv2d, (2, 0)),
        invariants=(lambda z, x, t: (z - x).sum((-1, -2)),),
        event_ndims=(2, 0),
        names=("x", "t"),
        source="L. Rudin, S. Osher, E. Fatemi, Nonlinear total variation based noise removal, 1992",
        representative=True,
        tolerant=lambda x, t: prox_tv2d(x, t, on_failure="nan"),
        solution=prox_tv2d_ex,
        starved=lambda x, t: prox_tv2d(x, t, solver=TV2DInteriorPoint(max_steps=1)),
        starved_solution=lambda x, t: prox_tv2d_ex(x, t, solver=TV2DInteriorPoint(max_steps=1)),
        hostile=(
            Hostile("zero", (0 * IMAGES, T[:2])),
            Hostile("constant", (0 * IMAGES + 0.1, T[:2])),
            Hostile("pieces", (IMAGES.round(), T[:2])),
            Hostile("no step", (IMAGES, 0 * T[:2])),
            Hostile("flat", (IMAGES, 1e6 * T[:2])),
            Hostile("huge", (1e9 * IMAGES, 1e9 * T[:2])),
            Hostile("tiny", (1e-9 * IMAGES, 1e-9 * T[:2])),
        ),
        wrong=(
            Wrong("negative step", (IMAGES, -T[:2]), r"t: expected at least 0, got -0\.3"),
            Wrong("a signal", (IMAGES[0, 0], T[0]), r"x: expected at least 2 dimensions"),
        ),
        oracle_tol=1e-7,
    ),
    LayerCase(
        "prox_tv2d anisotropic",
        lambda x, t: prox_tv2d(x, t, isotropic=False),
        (SMALL, T),
        per_element(_tv2d_anisotropic, (2, 0)),
        event_ndims=(2, 0),
        names=("x", "t"),
        tolerant=lambda x, t: prox_tv2d(x, t, isotropic=False, on_failure="nan"),
        solution=lambda x, t: prox_tv2d_ex(x, t, isotropic=False),
        starved=lambda x, t: prox_tv2d(x, t, isotropic=False, solver=STARVED),
        starved_solution=lambda x, t: prox_tv2d_ex(x, t, isotropic=False, solver=STARVED),
        hostile=(
            Hostile("pieces", (SMALL.round(), T)),
            Hostile("no step", (SMALL, 0 * T)),
            Hostile("huge", (1e9 * SMALL, 1e9 * T)),
            Hostile("tiny", (1e-9 * SMALL, 1e-9 * T)),
        ),
        wrong=(
            Wrong(
                "a solver of the other kind",
                (SMALL, T),
                r"solver: expected DualGradient, since isotropic is False, got TV2DInteriorPoint",
                fn=lambda x, t: prox_tv2d(x, t, isotropic=False, solver=TV2DInteriorPoint()),
            ),
        ),
    ),
)
