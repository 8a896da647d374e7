"""Cases of minimal residuals: numpy solves the same symmetric systems, which are not definite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import SolveError
from difflayers.linalg import MINRES, LinearOperator, LinearSolver, Tag, linear_solve, linear_solve_ex
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

__all__ = ["CASES"]


def _product(params: tuple[Tensor, ...], v: Tensor) -> Tensor:
    """With the symmetric part."""
    return ((params[0] + params[0].mT) / 2 @ v.unsqueeze(-1)).squeeze(-1)


def _operator(A: Tensor) -> LinearOperator:
    return LinearOperator(_product, (A,), Tag.SYMMETRIC, (2,))


def _case(name: str, A: Tensor, b: Tensor, **fields: Any) -> LayerCase:
    def run(make: Callable[..., Any], solver: LinearSolver = MINRES(), **options: Any) -> Callable[..., Any]:
        return lambda A, b: make(A, b, solver=solver, **options)

    common: dict[str, Any] = {
        "layer": "linear_solve",
        "source": "C. C. Paige, M. A. Saunders, Solution of sparse indefinite systems of linear equations, 1975",
        "event_ndims": (2, 1),
        "names": ("A", "b"),
        "oracle": per_element(np.linalg.solve, (2, 1)),
        "invariants": (lambda x, A, b: (A @ x.unsqueeze(-1)).squeeze(-1) - b,),
        "unrolled": lambda A, b: torch.linalg.solve((A + A.mT) / 2, b.unsqueeze(-1)).squeeze(-1),
        "tolerant": run(linear_solve, on_failure="nan"),
        "solution": run(linear_solve_ex),
        "starved": run(linear_solve, MINRES(max_steps=1)),
        "starved_solution": run(linear_solve_ex, MINRES(max_steps=1)),
        "wrong": (
            Wrong("not symmetric", (A + numbers([[0.0, 1.0, 0.0]]), b), "A: expected a symmetric matrix for MINRES"),
            Wrong("wrong length", (A, b[..., :2]), "b: expected 3 entries .* got 2"),
        ),
    }
    return LayerCase(name, run(linear_solve), (A, b), **(common | fields))


INDEFINITE = numbers([[1.0, 0.5, -0.2], [0.5, -2.0, 0.4], [-0.2, 0.4, 1.5]])
SEVERAL = INDEFINITE * numbers([[[1.0]], [[-2.0]]])
SINGULAR = numbers([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, -1.0]])
SADDLE = numbers([[1.0, 0.0, 1.0], [0.0, 2.0, -1.0], [1.0, -1.0, 0.0]])
VECTOR, VECTORS = normal(81, 3), normal(82, 3, 3)

_DENSE = _case(
    "linear_solve MINRES",
    INDEFINITE,
    VECTORS,
    hostile=(
        Hostile("huge", (1e150 * INDEFINITE, VECTOR)),
        Hostile("tiny", (1e-150 * INDEFINITE, 1e-150 * VECTOR)),
        Hostile("zero right-hand side", (INDEFINITE, 0 * VECTOR)),
        Hostile("one by one", (numbers([[-2.0]]), numbers([3.0]))),
        Hostile("zeros on the diagonal", (numbers([[0.0, 1.0], [1.0, 0.0]]), numbers([1.0, -1.0]))),
        Hostile("saddle point", (SADDLE, VECTOR)),
        Hostile("eigenvalues of one size", (numbers([[0.0, 1.0], [1.0, 0.0]]), numbers([1.0, 0.0]))),
        Hostile("no solution", (SINGULAR, VECTOR), SolveError, "SINGULAR"),
        Hostile("zero matrix", (0 * SINGULAR, VECTOR), SolveError, "SINGULAR"),
    ),
)

CASES: tuple[LayerCase, ...] = (
    _DENSE,
    _case("linear_solve MINRES batched", SEVERAL, VECTOR, bad=(0, SINGULAR), wrong=()),
    replace(
        _DENSE,
        name="linear_solve MINRES operator",
        fn=lambda A, b: linear_solve(_operator(A), b, solver=MINRES()),
        tolerant=lambda A, b: linear_solve(_operator(A), b, solver=MINRES(), on_failure="nan"),
        solution=lambda A, b: linear_solve_ex(_operator(A), b, solver=MINRES()),
        starved=lambda A, b: linear_solve(_operator(A), b, solver=MINRES(max_steps=1)),
        starved_solution=lambda A, b: linear_solve_ex(_operator(A), b, solver=MINRES(max_steps=1)),
        names=("params[0]", "b"),
        wrong=(Wrong("mixed dtypes", (INDEFINITE.float(), VECTORS), r"params\[0\]: expected dtype"),),
        exempt={"wrong_dtype_is_refused": "an operator may take integers, such as indices, among its params"},
    ),
)
