"""Cases of operators on vectors."""

from __future__ import annotations

import numpy as np

from difflayers.proximal import project_l1_ball, project_simplex, prox_l1
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

X = normal(20, 3, 4)
T = numbers([0.3, 0.5, 0.8])


def _simplex(x: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """By sorting, one vector at a time."""
    s = np.sort(x)[::-1]
    means = (np.cumsum(s) - radius) / np.arange(1, len(x) + 1)
    return np.maximum(x - means[s > means][-1], 0) if radius > 0 else 0 * x


def _l1_ball(x: np.ndarray, radius: np.ndarray) -> np.ndarray:
    return x if np.abs(x).sum() <= radius else np.sign(x) * _simplex(np.abs(x), radius)


CASES: tuple[LayerCase, ...] = (
    LayerCase(
        "prox_l1",
        prox_l1,
        (X, T),
        lambda x, t: x.sign() * (x.abs() - t.unsqueeze(-1)).clamp_min(0),
        event_ndims=(1, 0),
        names=("x", "t"),
        source="N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.5.2",
        representative=True,
        hostile=(
            Hostile("zero", (0 * X, T)),
            Hostile("tie", (numbers([0.5, -0.5, 0.5, 1.0]), numbers(0.5))),
            Hostile("no step", (X, 0 * T)),
            Hostile("huge", (1e9 * X, 1e9 * T)),
            Hostile("tiny", (1e-9 * X, 1e-9 * T)),
        ),
        wrong=(
            Wrong("negative step", (X, -T), r"t: expected at least 0, got -0\.3"),
            Wrong(
                "step shaped like the entries", (X, T.unsqueeze(-1)), r"t: expected a number or a shape that .*\(3,\)"
            ),
        ),
    ),
    LayerCase(
        "project_simplex",
        project_simplex,
        (X, T),
        per_element(_simplex, (1, 0)),
        invariants=(lambda z, x, r: z.sum(-1) - r, lambda z, x, r: z.clamp_max(0)),
        event_ndims=(1, 0),
        names=("x", "radius"),
        source="C. Michelot, 1986: projection on the canonical simplex",
        representative=True,
        hostile=(
            Hostile("zero", (0 * X, T)),
            Hostile("ties", (numbers([1.0, 1.0, 0.0, 0.0]), numbers(1.0))),
            Hostile("a single point", (X, 0 * T)),
            Hostile("huge", (1e9 * X, 1e9 * T)),
            Hostile("tiny", (1e-9 * X, 1e-9 * T)),
        ),
        wrong=(Wrong("empty set", (X, -T), r"radius: expected at least 0, got -0\.3"),),
    ),
    LayerCase(
        "project_l1_ball",
        project_l1_ball,
        (X, T),
        per_element(_l1_ball, (1, 0)),
        event_ndims=(1, 0),
        names=("x", "radius"),
        source="L. Condat, 2016: fast projection onto the simplex and the l1 ball",
        representative=True,
        hostile=(
            Hostile("inside", (X, 100 * T)),
            Hostile("on the boundary", (numbers([0.5, -0.25, 0.0, 0.25]), numbers(1.0))),
            Hostile("a single point", (X, 0 * T)),
            Hostile("huge", (1e9 * X, 1e9 * T)),
            Hostile("tiny", (1e-9 * X, 1e-9 * T)),
        ),
        wrong=(Wrong("empty set", (X, -T), r"radius: expected at least 0, got -0\.3"),),
    ),
)
