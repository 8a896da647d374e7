"""Cases of operators that couple the entries of a vector: norms, and projections on sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import SolveError
from difflayers.proximal import (
    conjugate_prox,
    project_affine,
    project_affine_ex,
    project_box,
    project_capped_simplex,
    project_halfspace,
    project_hyperplane,
    project_l1_ball,
    project_l2_ball,
    project_linf_ball,
    project_nonnegative,
    project_simplex,
    prox_group_l2,
    prox_l2,
    prox_linf,
    prox_quadratic,
    prox_quadratic_ex,
    soft_topk,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

X = normal(20, 3, 4)
T = numbers([0.3, 0.5, 0.8])
Y = normal(21, 3, 4)
BOYD = "N. Parikh, S. Boyd, Proximal Algorithms, 2014"
LABELS = torch.tensor([0, 1, 1, 0], device="cpu")
GROUP_WEIGHTS = numbers([[0.5, 1.0], [1.2, 0.7], [0.9, 0.4]])

# ----------------------------------------------------------------------------------------------------------- oracles


def _simplex(x: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """By sorting, one vector at a time."""
    s = np.sort(x)[::-1]
    means = (np.cumsum(s) - radius) / np.arange(1, len(x) + 1)
    return np.maximum(x - means[s > means][-1], 0) if radius > 0 else 0 * x


def _l1_ball(x: np.ndarray, radius: np.ndarray) -> np.ndarray:
    return x if np.abs(x).sum() <= radius else np.sign(x) * _simplex(np.abs(x), radius)


def _capped(x: np.ndarray, total: np.ndarray, upper: np.ndarray | float = 1.0) -> np.ndarray:
    """The threshold by bisection."""
    x = np.where(x == -np.inf, np.min(x, where=x > -np.inf, initial=0) - np.max(upper) - 1, x)
    low, high = np.min(x - upper) - 1, np.max(x) + 1
    for _ in range(200):
        mid = (low + high) / 2
        low, high = (mid, high) if np.clip(x - mid, 0, upper).sum() > total else (low, mid)
    return np.clip(x - (low + high) / 2, 0, upper) if total > 0 else 0 * x


def _shrunk(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    r = np.linalg.norm(x)
    return 0 * x if r <= t else x * (1 - t / r)


def _ball(x: np.ndarray, radius: np.ndarray, center: np.ndarray | float = 0.0) -> np.ndarray:
    r = np.linalg.norm(x - center)
    return x if r <= radius else center + (x - center) * (radius / r)


def _groups(x: np.ndarray, t: np.ndarray, weights: np.ndarray) -> np.ndarray:
    z = np.empty_like(x)
    for g, members in enumerate(([0, 3], [1, 2])):
        z[members] = _shrunk(x[members], t * weights[g])
    return z


def _halfspace(x: np.ndarray, c: np.ndarray, b: np.ndarray) -> np.ndarray:
    return x - max((c @ x - b) / (c @ c), 0) * c


def _affine(x: np.ndarray, A: np.ndarray, b: np.ndarray) -> np.ndarray:
    return x - np.linalg.lstsq(A, A @ x - b, rcond=1e-12)[0]


def _quadratic(x: np.ndarray, t: np.ndarray, Q: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.linalg.solve(np.eye(len(x)) + t * (Q + Q.T) / 2, x - t * q)


# ------------------------------------------------------------------------------------------------------------- cases


def _case(
    name: str,
    fn: Any,
    solve: Any,
    params: dict[str, Tensor],
    ndims: tuple[int, ...],
    *,
    hostile: tuple[Hostile, ...] = (),
    wrong: tuple[Wrong, ...] = (),
    source: str = BOYD,
    scale: tuple[int, ...] | None = None,
    **fields: Any,
) -> LayerCase:
    """An operator on the vectors `x`; `scale`: the inputs that grow with it."""
    inputs = tuple(params.values())
    scale = tuple(range(len(inputs))) if scale is None else scale
    scaled = lambda s: tuple(s * p if i in scale else p for i, p in enumerate(inputs))  # noqa: E731
    return LayerCase(
        name,
        fn,
        inputs,
        per_element(solve, ndims),
        event_ndims=ndims,
        names=tuple(params),
        source=source,
        hostile=(
            Hostile("zero", (0 * inputs[0], *inputs[1:])),
            Hostile("ties", (inputs[0][:, :1].expand_as(inputs[0]), *inputs[1:])),
            Hostile("huge", scaled(1e9)),
            Hostile("tiny", scaled(1e-9)),
            *hostile,
        ),
        wrong=wrong,
        **({"representative": True} | fields),
    )


NO_STEP = Hostile("no step", (X, 0 * T))
POINT = Hostile("a single point", (X, 0 * T))
NEGATIVE_STEP = Wrong("negative step", (X, -T), r"t: expected at least 0, got -0\.3")
EMPTY = Wrong("empty set", (X, -T), r"radius: expected at least 0, got -0\.3")

NORMS: tuple[LayerCase, ...] = (
    _case(
        "prox_l2",
        prox_l2,
        _shrunk,
        {"x": X, "t": T},
        (1, 0),
        hostile=(
            NO_STEP,
            Hostile("zero without a step", (0 * X, 0 * T)),
            Hostile("at the kink", (numbers([3.0, 4.0]), numbers(5.0))),
        ),
        wrong=(NEGATIVE_STEP,),
    ),
    _case(
        "prox_linf",
        prox_linf,
        lambda x, t: x - _l1_ball(x, t),
        {"x": X, "t": T},
        (1, 0),
        hostile=(NO_STEP, Hostile("at the kink", (numbers([0.5, -0.25, 0.0, 0.25]), numbers(1.0)))),
        wrong=(NEGATIVE_STEP,),
    ),
    _case(
        "prox_group_l2",
        lambda x, t, w: prox_group_l2(x, t, LABELS.to(x.device), weights=w),
        _groups,
        {"x": X, "t": T, "weights": GROUP_WEIGHTS},
        (1, 0, 1),
        source="M. Yuan, Y. Lin, Model selection and estimation in regression with grouped variables, 2006",
        scale=(0, 1),
        hostile=(
            Hostile("no step", (X, 0 * T, GROUP_WEIGHTS)),
            Hostile("a group of zeros", (X * numbers([0.0, 1.0, 1.0, 0.0]), T, GROUP_WEIGHTS)),
        ),
        wrong=(
            Wrong("a weight for each entry", (X, T, X.abs()), r"weights: expected shape \(2,\), .* got \(3, 4\)"),
            Wrong("no divisor", (X, T), r"groups: expected a divisor of 4", lambda x, t: prox_group_l2(x, t, 3)),
            Wrong(
                "labels of another length",
                (X, T),
                r"groups: expected shape \(4,\)",
                lambda x, t: prox_group_l2(x, t, LABELS[:3]),
            ),
        ),
    ),
    _case(
        "prox_group_l2 of equal size",
        lambda x, t: prox_group_l2(x, t, 2),
        lambda x, t: np.concatenate([_shrunk(x[:2], t), _shrunk(x[2:], t)]),
        {"x": X, "t": T},
        (1, 0),
        representative=False,
    ),
    _case(
        "conjugate_prox of prox_l2",
        lambda x, t: conjugate_prox(prox_l2, x, t),
        lambda x, t: _ball(x, np.array(1.0)),
        {"x": X, "t": T},
        (1, 0),
        representative=False,
    ),
    _case(
        "conjugate_prox of prox_group_l2",
        lambda x, t, w: conjugate_prox(prox_group_l2, x, t, groups=LABELS.to(x.device), weights=w),
        lambda x, t, w: x - _groups(x, np.array(1.0), w),
        {"x": X, "t": T, "weights": GROUP_WEIGHTS},
        (1, 0, 1),
        representative=False,
    ),
    _case(
        "prox_quadratic",
        prox_quadratic,
        _quadratic,
        {"x": X[:, :2], "t": T, "Q": numbers([[2.0, 0.5], [0.3, 1.0]]), "q": Y[:, :2]},
        (1, 0, 2, 1),
        scale=(0, 3),
        tolerant=lambda *p: prox_quadratic(*p, on_failure="nan"),
        solution=prox_quadratic_ex,
        hostile=(
            Hostile("no step", (X, 0 * T, torch.diag(X[0]), Y)),
            Hostile("singular", (X, T, 0 * torch.diag(X[0]), Y)),
            Hostile("unbounded", (X, T, -9 * torch.diag(X[0]).abs(), Y), SolveError, "prox_quadratic .*SINGULAR"),
            Hostile("scales apart", (X, 1e9 * T, torch.diag(X[0]).abs(), Y)),
        ),
        wrong=(
            Wrong("not square", (X, T, X, X), r"Q: expected shape \(4, 4\).* got \(3, 4\)"),
            Wrong("of another size", (X, T, torch.diag(X[0, :3]), X), r"[Qq]: expected shape \([34]"),
        ),
    ),
)
SETS: tuple[LayerCase, ...] = (
    _case(
        "project_simplex",
        project_simplex,
        _simplex,
        {"x": X, "radius": T},
        (1, 0),
        invariants=(lambda z, x, r: z.sum(-1) - r, lambda z, x, r: z.clamp_max(0)),
        source="C. Michelot, 1986: projection on the canonical simplex",
        hostile=(
            POINT,
            Hostile("at the kink", (numbers([1.0, 0.0, 0.0, -1.0]), numbers(1.0))),
            Hostile("scales apart", (1e9 * X, 1e-9 * T), oracle=lambda x, r: r[:, None] * (x == x.amax(-1, True))),
            Hostile("masked entries", (numbers([1.0, -np.inf, 0.5]), numbers(1.0))),
        ),
        wrong=(EMPTY,),
    ),
    _case(
        "project_l1_ball",
        project_l1_ball,
        _l1_ball,
        {"x": X, "radius": T},
        (1, 0),
        source="L. Condat, 2016: fast projection onto the simplex and the l1 ball",
        hostile=(
            POINT,
            Hostile("inside", (X, 100 * T)),
            Hostile("on the boundary", (numbers([0.5, -0.25, 0.0, 0.25]), numbers(1.0))),
        ),
        wrong=(EMPTY,),
    ),
    _case(
        "project_capped_simplex",
        lambda x, total, u: project_capped_simplex(x, total, upper=u),
        _capped,
        {"x": X[:2], "total": numbers([1.1, 1.6]), "upper": Y[:2].abs()},
        (1, 0, 1),
        invariants=(lambda z, x, r, u: z.sum(-1) - r, lambda z, x, r, u: (z - u).clamp_min(0) + z.clamp_max(0)),
        source="R. Cominetti, W. Mascarenhas, P. Silva, 2014: Newton for the continuous quadratic knapsack problem",
        hostile=(
            Hostile("a single point", (X, 0 * T, Y.abs())),
            Hostile("all at their caps", (X, Y.abs().sum(-1), Y.abs())),
            Hostile("caps of zero", (X, T, numbers([1.0, 0.0, 0.0, 1.0]))),
            Hostile("no caps", (X, T, 1e30 * Y.abs())),
            Hostile("scales apart", (1e9 * X, T, Y.abs().clamp_min(0.8))),
        ),
        wrong=(
            Wrong("empty set", (X, 9 + T, Y.abs()), r"total: expected at most [0-9.]+ to [0-9.]+, the sum of upper"),
            Wrong("negative caps", (X, T, Y), r"upper: expected at least 0, got -"),
        ),
    ),
    _case(
        "soft_topk",
        lambda x, k, s: soft_topk(x, k, temperature=s),
        lambda x, k, s: _capped(x / s, k),
        {"x": X, "k": numbers([1.2, 2.3, 1.7]), "temperature": numbers([0.9, 1.6, 2.0])},
        (1, 0, 0),
        scale=(0, 2),
        source="B. Amos, V. Koltun, J. Z. Kolter, 2019: the limited multi-label projection layer",
        hostile=(
            Hostile("hard", (X, numbers([1.0, 2.0, 3.0]), 1e-9 * T)),
            Hostile("none and all", (X, numbers([0.0, 4.0, 4.0]), T)),
            Hostile("masked entries", (numbers([1.0, -np.inf, 0.5, 0.2]), numbers(2.0), numbers(1.0))),
        ),
        wrong=(
            Wrong("more than there are", (X, 4 + T, T), r"k: expected at most 4, .* got 4\.3 to 4\.8"),
            Wrong("no temperature", (X, T, 0 * T), r"temperature: expected more than 0, got 0"),
        ),
    ),
    _case(
        "project_l2_ball",
        lambda x, r, c: project_l2_ball(x, r, center=c),
        _ball,
        {"x": X[:2], "radius": T[:2], "center": Y[:2] / 2},
        (1, 0, 1),
        hostile=(
            Hostile("a single point", (X, 0 * T, Y)),
            Hostile("its centre", (X, T, X)),
            Hostile("on the boundary", (numbers([3.0, 4.0]), numbers(5.0), numbers([0.0, 0.0]))),
        ),
        wrong=(Wrong("empty set", (X, -T, Y), r"radius: expected at least 0, got -0\.3"),),
    ),
    _case(
        "project_linf_ball",
        project_linf_ball,
        lambda x, r: np.clip(x, -r, r),
        {"x": X, "radius": T},
        (1, 0),
        hostile=(POINT, Hostile("on the boundary", (numbers([0.5, -0.5, 0.0]), numbers(0.5)))),
        wrong=(EMPTY,),
    ),
    _case(
        "project_box",
        project_box,
        np.clip,
        {"x": X[:2], "lower": Y[:2] - 0.5, "upper": Y[:2] + numbers([0.1, 0.6, 0.3, 0.2])},
        (1, 1, 1),
        hostile=(
            Hostile("a single point", (X, Y, Y)),
            Hostile("at its corner", (Y, Y, Y + 1)),
            Hostile("half a space", (X, Y, numbers([np.inf] * 4))),
        ),
        wrong=(Wrong("empty set", (X, Y, Y - 1), r"upper: expected at least lower, .*, got "),),
    ),
    _case("project_nonnegative", project_nonnegative, lambda x: np.maximum(x, 0), {"x": X}, (1,)),
    _case(
        "project_halfspace",
        project_halfspace,
        _halfspace,
        {"x": X[:2], "normal": Y[:2], "offset": numbers([-0.3, 0.2])},
        (1, 1, 0),
        scale=(0, 2),
        hostile=(
            Hostile("on the hyperplane", (numbers([1.0, 2.0]), numbers([2.0, -1.0]), numbers(0.0))),
            Hostile("a long normal", (X, 1e9 * Y, 1e9 * T)),
            Hostile("a short normal", (X, 1e-9 * Y, 1e-9 * T)),
        ),
        wrong=(Wrong("no normal", (X, 0 * Y, T), "normal: expected a vector that is not zero"),),
    ),
    _case(
        "project_hyperplane",
        project_hyperplane,
        lambda x, c, b: x - (c @ x - b) / (c @ c) * c,
        {"x": X[:2], "normal": Y[:2], "offset": numbers([-0.3, 0.2])},
        (1, 1, 0),
        scale=(0, 2),
        wrong=(Wrong("no normal", (X, 0 * Y, T), "normal: expected a vector that is not zero"),),
    ),
    _case(
        "project_affine",
        project_affine,
        _affine,
        {"x": X[:, :3], "A": Y[:2, :3], "b": normal(22, 3, 2)},
        (1, 2, 1),
        scale=(0, 2),
        tolerant=lambda *p: project_affine(*p, on_failure="nan"),
        solution=project_affine_ex,
        invariants=(lambda z, x, A, b: z @ A.mT - b,),
        hostile=(
            Hostile("large rows", (X, 1e9 * Y[:2], 1e9 * X[:, :2])),
            Hostile("equal rows", (X, Y[:1].expand(2, 4), X[:, :1].expand(3, 2))),
            Hostile("a row of zeros", (X, Y[:2] * numbers([[1.0], [0.0]]), X[:, :2] * numbers([1.0, 0.0]))),
            Hostile("no freedom", (X, Y.mT @ Y + torch.diag(X[0].abs()), Y)),
            Hostile("contradiction", (X, Y[:1].expand(2, 4), X[:, :2]), SolveError, "project_affine .*INFEASIBLE"),
        ),
        wrong=(
            Wrong("rows that do not fit", (X, Y[:2], X[:, :3]), r"A: expected shape \(3, 4\).* got \(2, 4\)"),
            Wrong("columns that do not fit", (X, Y[:2, :3], X[:, :2]), r"A: expected shape \(2, 4\).* got \(2, 3\)"),
        ),
    ),
)
CASES: tuple[LayerCase, ...] = (*NORMS, *SETS)
