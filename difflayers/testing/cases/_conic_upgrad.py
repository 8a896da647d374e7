"""Cases of projections on dual cones and of UPGrad."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from difflayers.conic import (
    BlockPivoting,
    UPGrad,
    dual_cone_weights,
    dual_cone_weights_ex,
    upgrad_weights,
    upgrad_weights_ex,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

__all__ = ["CASES"]

SOURCE = "P. Quinton, V. Rey, Jacobian Descent For Multi-Objective Optimization, 2024"
STARVED = BlockPivoting(warm_steps=0, max_steps=1)


def every_active_set(u: np.ndarray, G: np.ndarray) -> np.ndarray:
    """The weights by trying every set of entries above their bound; the smallest objective, then the smallest norm."""
    G, m = (G + G.T) / 2, len(u)
    best, value = None, (np.inf, np.inf)
    for free in map(list, itertools.chain(*(itertools.combinations(range(m), r) for r in range(m + 1)))):
        held = [j for j in range(m) if j not in free]
        w = u.copy()
        w[free] = np.linalg.lstsq(G[np.ix_(free, free)], -G[np.ix_(free, held)] @ u[held], rcond=1e-12)[0]
        if (w >= u - 1e-9).all():
            reached = (round(w @ G @ w, 11), w @ w)
            best, value = (w, reached) if reached < value else (best, value)
    assert best is not None
    return best


def _combined(G: np.ndarray, preference: np.ndarray) -> np.ndarray:
    rows = [every_active_set(c * e, G) for c, e in zip(preference, np.eye(len(G)), strict=True)]
    return np.sum(rows, axis=0)


def _of_scaled(G: np.ndarray, preference: np.ndarray) -> np.ndarray:
    """By the rows scaled to length 1: the projection of a multiple of a row is the multiple of its projection."""
    size = np.sqrt(np.diag(G))
    return _combined(G / size[:, None] / size, preference * size / size.max()) / size * size.max()


def _direction(J: np.ndarray) -> np.ndarray:
    return _combined(J @ J.T, np.full(len(J), 1 / len(J))) @ J


def _options(function: Any, **options: Any) -> Any:
    return lambda *inputs: function(*inputs, **options)


def _times(G: Tensor, w: Tensor) -> Tensor:
    return (G @ w.unsqueeze(-1)).squeeze(-1)


J = numbers(
    [[[2.0, 0.5, 0.1], [-1.5, 1.0, 0.3], [0.4, -1.2, 1.0]], [[1.0, 0.2, 0.0], [0.3, 1.5, 0.4], [-2.0, 0.1, 0.9]]]
)
G, c, u = J @ J.mT, numbers([0.2, 0.5, 0.3]), normal(41, 2, 3)
repeated, empty = J[:, [0, 1, 1]], J * numbers([[[1.0], [0.0], [1.0]]])
large, mixed = J * 1e12, J * numbers([[[1e-12], [1.0], [1e12]]])

CASES: tuple[LayerCase, ...] = (
    LayerCase(
        "upgrad_weights",
        upgrad_weights,
        (G, c),
        per_element(_combined, (2, 1)),
        (lambda w, G, c: _times(G, w).clamp_max(0), lambda w, G, c: (w - c).clamp_max(0)),
        (2, 1),
        source=SOURCE,
        names=("gramian", "preference"),
        representative=True,
        tolerant=_options(upgrad_weights, on_failure="nan"),
        solution=upgrad_weights_ex,
        starved=_options(upgrad_weights, solver=STARVED),
        starved_solution=_options(upgrad_weights_ex, solver=STARVED),
        hostile=(
            Hostile("one objective counts", (G, numbers([0.0, 1.0, 0.0]))),
            Hostile("very different sizes", (mixed @ mixed.mT, c), oracle=per_element(_of_scaled, (2, 1))),
        ),
        wrong=(
            Wrong("not square", (G[..., :2], c), r"gramian: expected a square matrix"),
            Wrong("another number of objectives", (G, c[:2]), r"preference: expected 3 entries as of gramian"),
            Wrong("negative preference", (G, c - 0.3), r"preference: expected finite numbers of at least 0"),
            Wrong("negative ridge", (G, c), r"ridge: expected at least 0", fn=_options(upgrad_weights, ridge=-1.0)),
        ),
        exact_bits=False,
    ),
    LayerCase(
        "UPGrad",
        lambda J: UPGrad()(J),
        (J,),
        per_element(_direction, (2,)),
        (lambda g, J: _times(J, g).clamp_max(0),),
        (2,),
        source=SOURCE,
        names=("jacobian",),
        representative=True,
        tolerant=lambda J: UPGrad(on_failure="nan")(J),
        hostile=(
            Hostile("two equal rows", (repeated,)),
            Hostile("a row of zeros", (empty,)),
            Hostile("more objectives than parameters", (J[..., :2],)),
            Hostile("large", (large,)),
        ),
        wrong=(Wrong("one gradient", (J[0, 0],), r"jacobian: expected at least 2 dimensions"),),
        make_module=lambda: UPGrad(nn.Parameter(c.clone())),
        module_inputs=(J,),
        exempt={"autocast_of_backward": "products with J are plain torch, which autocast halves in backward"},
        exact_bits=False,
    ),
    LayerCase(
        "dual_cone_weights",
        dual_cone_weights,
        (u, G),
        per_element(every_active_set, (1, 2)),
        (lambda w, u, G: _times(G, w).clamp_max(0), lambda w, u, G: (w - u).clamp_max(0)),
        (1, 2),
        source=SOURCE,
        names=("u", "gramian"),
        representative=True,
        tolerant=_options(dual_cone_weights, on_failure="nan"),
        solution=dual_cone_weights_ex,
        starved=_options(dual_cone_weights, solver=STARVED),
        starved_solution=_options(dual_cone_weights_ex, solver=STARVED),
        hostile=(
            Hostile("nothing to project", (torch.zeros_like(u), G)),
            Hostile("against every row", (-u.abs(), G)),
            Hostile("zero Gramian", (u, torch.zeros_like(G)), oracle=lambda u, G: u.clamp_min(0)),
        ),
        wrong=(
            Wrong("not square", (u, G[..., :2]), r"gramian: expected a square matrix"),
            Wrong("another number of rows", (u[..., :2], G), r"u: expected 3 entries as of gramian"),
        ),
        exact_bits=False,
    ),
)
