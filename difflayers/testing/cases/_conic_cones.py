"""Cases of cones: Euclidean and radial projections, duals and distances."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from difflayers.conic import (
    Cone,
    DualExponential,
    DualPower,
    Exponential,
    Free,
    NonNegative,
    PositiveSemidefinite,
    Power,
    Product,
    RotatedSecondOrder,
    SecondOrder,
    Zero,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from . import _conic_oracles as oracles
from ._common import normal, numbers, per_element

Solve = Callable[..., np.ndarray]


def _distance(project: Solve) -> Solve:
    return lambda x: np.sqrt(((x - project(x)) ** 2).sum())


def _case(
    cone: Cone,
    method: str,
    solve: Solve,
    x: Tensor,
    *direction: Tensor,
    source: str = "",
    hostile: tuple[Hostile, ...] = (),
    wrong: tuple[Wrong, ...] = (),
    **fields: Any,
) -> LayerCase:
    """A method of a cone; `x` is scaled up and down too."""
    ndims = (cone.ndim,) * (1 + len(direction))
    fn = getattr(cone, method)
    name = " ".join([type(cone).__name__, method, *(["along a direction"] if direction else [])])
    return LayerCase(
        name,
        lambda *inputs: fn(*inputs),
        (x, *direction),
        per_element(solve, ndims),
        event_ndims=ndims,
        names=("x", "direction")[: len(ndims)],
        source=source,
        hostile=(
            Hostile("zero", (0 * x, *direction)),
            Hostile("huge", (1e9 * x, *direction)),
            Hostile("tiny", (1e-9 * x, *direction)),
            *hostile,
        ),
        wrong=wrong,
        **fields,
    )


def _at(name: str, values: object) -> Hostile:
    return Hostile(name, (numbers(values),))


def _outside(direction: object, x: Tensor) -> Wrong:
    return Wrong("direction outside", (x, numbers(direction)), r"direction: expected points in the interior of ")


X = normal(40, 3, 4)
OF_THREE = r"x: expected 3 entries, \(x, y, z\), got shape \(3, 4\)"

SIMPLE: tuple[LayerCase, ...] = (
    _case(
        Zero(), "violation", lambda x: np.sqrt((x**2).sum()), X, source="R. T. Rockafellar, 1970", representative=True
    ),
    _case(Zero(), "project", lambda x: 0 * x, X),
    _case(Free(), "project", lambda x: x, X, source="R. T. Rockafellar, 1970", representative=True),
    _case(
        NonNegative(),
        "project",
        lambda x: np.maximum(x, 0),
        X,
        source="N. Parikh, S. Boyd, 2014: Proximal Algorithms, section 6.2",
        representative=True,
    ),
    _case(
        NonNegative(),
        "radial_project",
        lambda x: x + max(-x.min(), 0),
        X,
        hostile=(_at("ties", [-1.0, 2.0, -1.0, 0.0]), _at("inside", [1.0, 2.0, 0.0, 3.0])),
    ),
    _case(
        NonNegative(),
        "radial_project",
        lambda x, d: x + max((-x / d).max(), 0) * d,
        X,
        numbers([1.0, 0.5, 2.0, 0.3]),
        wrong=(
            _outside([1.0, 0.0, 1.0, 1.0], X),
            Wrong("another size", (X, numbers([1.0, 1.0])), r"direction: expected shape \(4,\)"),
        ),
    ),
    _case(NonNegative(), "violation", _distance(lambda x: np.maximum(x, 0)), X, hostile=(_at("inside", [[1.0, 0.0]]),)),
)

# one point inside, one in the polar cone, one elsewhere
POINTS = numbers([[2.0, -0.7, 1.1, 0.3], [-2.0, 0.9, 0.4, -0.6], [0.4, 1.2, -0.8, 0.5], [-0.3, 0.2, 0.7, -1.5]])
ROTATED = numbers([[2.0, 1.5, 1.1, 0.3], [-2.0, -0.9, 0.4, -0.6], [0.4, 1.2, -1.8, 0.5], [-0.3, 0.2, 0.7, -1.5]])

SECOND_ORDER: tuple[LayerCase, ...] = (
    _case(
        SecondOrder(),
        "project",
        oracles.second_order,
        POINTS,
        source="S. Boyd, L. Vandenberghe, 2004: Convex Optimization, exercise 8.3",
        representative=True,
        hostile=(
            _at("on the boundary", [5.0, 3.0, 4.0]),
            _at("on the polar boundary", [-5.0, 3.0, 4.0]),
            _at("the axis", [[3.0, 0.0], [-3.0, 0.0]]),
            _at("one number", [[3.0], [-3.0], [0.0]]),
        ),
        wrong=(Wrong("no entry", (POINTS[:, :0],), r"x: expected at least 1 entry, t, got shape \(4, 0\)"),),
    ),
    _case(
        SecondOrder(),
        "radial_project",
        lambda x: np.concatenate([[max(x[0], math.sqrt((x[1:] ** 2).sum()))], x[1:]]),
        POINTS,
        hostile=(_at("the axis", [[3.0, 0.0], [-3.0, 0.0]]), _at("one number", [[3.0], [-3.0]])),
    ),
    _case(
        SecondOrder(),
        "radial_project",
        oracles.by_bisection(oracles.in_second_order),
        POINTS,
        numbers([1.3, 0.5, -0.2, 0.7]),
        hostile=(
            Hostile("against", (numbers([[-2.0, -1.0, 0.0], [1.0, 3.0, 0.0]]), numbers([2.0, 1.0, 0.0]))),
            Hostile("along the direction", (numbers([2.0, 1.0, 0.0]), numbers([2.0, 1.0, 0.0]))),
        ),
        wrong=(_outside([1.0, 1.0, 0.0, 0.0], POINTS),),
    ),
    _case(
        SecondOrder(),
        "violation",
        _distance(oracles.second_order),
        POINTS,
        hostile=(_at("boundary", [[5.0, 3.0, 4.0]]),),
    ),
    _case(
        RotatedSecondOrder(),
        "project",
        lambda x: oracles.turned(oracles.second_order(oracles.turned(x))),
        ROTATED,
        source="F. Alizadeh, D. Goldfarb, 2003: second-order cone programming, section 1",
        representative=True,
        hostile=(_at("on the boundary", [2.0, 1.0, 2.0]), _at("on a face", [[2.0, 0.0, 0.0], [0.0, -1.0, 0.0]])),
        wrong=(Wrong("one entry", (ROTATED[:, :1],), r"x: expected at least 2 entries, u and v, got shape \(4, 1\)"),),
    ),
    _case(
        RotatedSecondOrder(),
        "radial_project",
        lambda x: oracles.by_bisection(oracles.in_rotated)(x, np.array([1.0, 1.0, 0.0, 0.0])),
        ROTATED,
    ),
    _case(
        RotatedSecondOrder(),
        "radial_project",
        oracles.by_bisection(oracles.in_rotated),
        ROTATED,
        numbers([1.3, 0.5, -0.2, 0.7]),
        wrong=(_outside([1.0, 1.0, 2.0, 0.0], ROTATED),),
    ),
)

S = normal(41, 2, 3, 3)
REPEATED = numbers([[2.0, -1.0, -1.0], [-1.0, 2.0, -1.0], [-1.0, -1.0, 2.0]])

SEMIDEFINITE: tuple[LayerCase, ...] = (
    _case(
        PositiveSemidefinite(),
        "project",
        oracles.semidefinite,
        S,
        source="N. Higham, 1988: computing a nearest symmetric positive semidefinite matrix",
        representative=True,
        hostile=(_at("repeated", (REPEATED - REPEATED.mean()).tolist()), _at("one number", [[-3.0]])),
        wrong=(Wrong("not square", (S[..., :2],), r"x: expected .*square.*, got shape \(2, 3, 2\)"),),
    ),
    _case(
        PositiveSemidefinite(),
        "radial_project",
        lambda x: oracles.relative_eigenvalue(x, np.eye(len(x))),
        S,
        hostile=(_at("repeated", (-REPEATED).tolist()), _at("one number", [[-3.0]])),
    ),
    _case(
        PositiveSemidefinite(),
        "radial_project",
        oracles.relative_eigenvalue,
        S[:1],
        numbers([[2.0, 0.5, 0.0], [0.3, 1.0, 0.2], [0.1, 0.0, 0.7]]),
        wrong=(_outside([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], S),),
    ),
    _case(
        PositiveSemidefinite(),
        "violation",
        lambda x: _distance(oracles.semidefinite)((x + x.T) / 2),
        S,
        hostile=(_at("inside", [[[2.0, 1.0], [1.0, 0.5]]]),),
    ),
)

# inside, polar, two on the surface, on the face
EXPONENTIAL = numbers([[-0.3, 1.0, 2.0], [0.6, -0.5, -1.3], [1.0, 1.2, 0.7], [-1.3, 0.6, -1.8], [-0.8, -1.1, 0.9]])
DUAL_EXPONENTIAL = -EXPONENTIAL
FRIBERG = "H. A. Friberg, 2021: projection onto the exponential cone"
NEAR_FACES = [[1e-3, -1.0, 1.0], [1.0, -30.0, 1e-9], [-1.0, 1e-3, -1.0], [-30.0, 1.0, -1e-9], [1.0, 0.0, 1e9]]
ON_FACES = [[-1.0, 0.0, 1.0], [0.0, 0.0, -1.0], [0.0, -1.0, 1.0], [-1.0, 0.0, -1.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]

EXPONENTIALS: tuple[LayerCase, ...] = (
    _case(
        Exponential(),
        "project",
        oracles.exponential,
        EXPONENTIAL,
        source=FRIBERG,
        representative=True,
        hostile=(_at("next to the faces", NEAR_FACES), _at("on the faces", ON_FACES), _at("boundary", [0.0, 1.0, 1.0])),
        wrong=(Wrong("four entries", (X,), OF_THREE),),
    ),
    _case(Exponential(), "project_dual", oracles.dual_exponential, DUAL_EXPONENTIAL),
    _case(
        Exponential(),
        "radial_project",
        lambda x: oracles.exponential_along(x, np.array([0.0, 1.0, 2.0])),
        EXPONENTIAL,
        hostile=(_at("next to the faces", NEAR_FACES), _at("on the faces", ON_FACES)),
    ),
    _case(
        Exponential(),
        "radial_project",
        oracles.exponential_along,
        EXPONENTIAL,
        numbers([-0.4, 0.5, 0.7]),
        wrong=(_outside([1.0, 1.0, 2.0], EXPONENTIAL),),
    ),
    _case(
        Exponential(),
        "violation",
        _distance(oracles.exponential),
        EXPONENTIAL,
        hostile=(_at("on the faces", ON_FACES),),
    ),
    _case(
        DualExponential(),
        "project",
        oracles.dual_exponential,
        DUAL_EXPONENTIAL,
        source=FRIBERG,
        representative=True,
        hostile=(_at("next to the faces", [[-a for a in p] for p in NEAR_FACES]), _at("on the faces", ON_FACES)),
        wrong=(Wrong("four entries", (X,), OF_THREE),),
    ),
    _case(
        DualExponential(),
        "radial_project",
        lambda x, d: oracles.along(oracles.in_dual_exponential, x, d),
        DUAL_EXPONENTIAL,
        numbers([-0.7, 0.2, 0.9]),
        wrong=(_outside([1.0, 1.0, 2.0], EXPONENTIAL),),
    ),
)

ALPHA = 0.3
WEIGHTS = np.array([ALPHA, 1 - ALPHA, 1.0])
# inside, polar, then x and y of either sign
POWER = numbers([[1.0, 1.3, 0.8], [-0.5, -1.4, 0.6], [0.4, 0.7, -1.5], [-0.6, 0.9, 0.5], [0.8, -0.7, -1.1]])
HIEN = "L. T. K. Hien, 2015: differential properties of Euclidean projection onto power cone"
EDGES = [[-1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 1.0, 0.0], [-1.0, -1.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 1.0]]
NEAR_EDGES = [[-1.0, 1.0, 1e-9], [1.0, -1.0, 1e-9], [1e-9, 1.0, 1e-9], [-1.0, -1.0, 1e9], [0.0, 1.0, -1e-9]]

POWERS: tuple[LayerCase, ...] = (
    _case(
        Power(ALPHA),
        "project",
        lambda x: oracles.power(x, ALPHA),
        POWER,
        source=HIEN,
        representative=True,
        hostile=(_at("on the edges", EDGES), _at("next to the edges", NEAR_EDGES)),
        wrong=(Wrong("four entries", (X,), OF_THREE),),
    ),
    _case(Power(ALPHA), "project_dual", lambda x: oracles.power(x, ALPHA, True), -POWER),
    _case(
        Power(ALPHA),
        "radial_project",
        lambda x: oracles.power_along(x, np.array([1.0, 1.0, 0.0]), ALPHA),
        POWER,
        hostile=(_at("on the edges", EDGES), _at("next to the edges", NEAR_EDGES), _at("a tie", [-1.0, -1.0, 0.5])),
    ),
    _case(
        Power(ALPHA),
        "radial_project",
        lambda x, d: oracles.power_along(x, d, ALPHA),
        POWER,
        numbers([0.8, 1.3, -0.4]),
        wrong=(_outside([1.0, 1.0, 2.0], POWER),),
    ),
    _case(
        Power(ALPHA),
        "violation",
        _distance(lambda x: oracles.power(x, ALPHA)),
        POWER,
        hostile=(_at("on the edges", EDGES),),
    ),
    _case(
        DualPower(ALPHA),
        "project",
        lambda x: oracles.power(x, ALPHA, True),
        -POWER,
        source=HIEN,
        representative=True,
        hostile=(_at("on the edges", EDGES),),
        wrong=(Wrong("four entries", (X,), OF_THREE),),
    ),
    _case(
        DualPower(ALPHA),
        "radial_project",
        lambda x, d: oracles.power_along(x / WEIGHTS, d / WEIGHTS, ALPHA) * WEIGHTS,
        -POWER,
        numbers([0.8, 1.3, -0.4]),
    ),
)

SMALL = Product([(NonNegative(), 2), (SecondOrder(), 3), (SecondOrder(), 3)])
LARGE = Product([(NonNegative(), 2), (SecondOrder(), 3), (SecondOrder(), 3), (PositiveSemidefinite(), 4)])
BLOCKS = normal(42, 2, 12)


def _blockwise(nonnegative: Solve, second_order: Solve, semidefinite: Solve) -> Solve:
    def solve(x: np.ndarray) -> np.ndarray:
        a, b, c, d = np.split(x, [2, 5, 8])
        matrix = [semidefinite(d.reshape(2, 2)).ravel()] if len(d) else []
        return np.concatenate([nonnegative(a), second_order(b), second_order(c), *matrix])

    return solve


_project_blocks = _blockwise(lambda x: np.maximum(x, 0), oracles.second_order, oracles.semidefinite)

PRODUCTS: tuple[LayerCase, ...] = (
    _case(
        SMALL,
        "project",
        _project_blocks,
        BLOCKS[:, :8],
        source="N. Parikh, S. Boyd, 2014: Proximal Algorithms, section 2.1",
        representative=True,
        wrong=(
            Wrong("seven entries", (BLOCKS[:, :7],), r"x: expected 8 entries for 3 parts, got shape \(2, 7\)"),
            Wrong("no cone", (BLOCKS,), r"parts\[0\]: expected a cone", lambda x: Product([(3, 4)]).project(x)),  # type: ignore[list-item]
            Wrong(
                "two entries of three",
                (BLOCKS,),
                r"parts\[1\]: expected 3 entries, \(x, y, z\), got 2",
                lambda x: Product([(Zero(), 1), (Exponential(), 2)]).project(x),
            ),
            Wrong("no exponent", (BLOCKS,), r"alpha: expected a number between", lambda x: Power(1.0).project(x)),
        ),
    ),
    replace(_case(LARGE, "project", _project_blocks, BLOCKS), name="Product project with matrices"),
    _case(
        LARGE,
        "radial_project",
        _blockwise(
            lambda x: x + max(-x.min(), 0),
            lambda x: np.concatenate([[max(x[0], math.sqrt((x[1:] ** 2).sum()))], x[1:]]),
            lambda x: oracles.relative_eigenvalue(x, np.eye(2)),
        ),
        BLOCKS,
    ),
)

CASES: tuple[LayerCase, ...] = (*SIMPLE, *SECOND_ORDER, *SEMIDEFINITE, *EXPONENTIALS, *POWERS, *PRODUCTS)
