"""Cases of sparse systems: numpy solves the dense matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import SolveError
from difflayers.linalg import CG, GMRES, LinearSolver, SparseMatrix, SuperLU, linear_solve, linear_solve_ex
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

__all__ = ["CASES"]

SOURCE = "sparse linear systems, the derivative on the pattern"
# rows (0, 1), (0, 1, 2), (1, 2)
ROWS, COLS, CROW = (0, 0, 1, 1, 1, 2, 2), (0, 1, 0, 1, 2, 1, 2), (0, 2, 5, 7)


def sparse(values: Tensor) -> SparseMatrix:
    """The tridiagonal matrix of these values."""
    crow, cols = (torch.tensor(t, device=values.device) for t in (CROW, COLS))
    return SparseMatrix(crow, cols, values, (3, 3))


def dense(values: Tensor) -> Tensor:
    """The same, full."""
    place = torch.tensor(ROWS, device=values.device) * 3 + torch.tensor(COLS, device=values.device)
    return values.new_zeros((*values.shape[:-1], 9)).index_add(-1, place, values).unflatten(-1, (3, 3))


def _numpy(values: np.ndarray, b: np.ndarray) -> np.ndarray:
    A = np.zeros((3, 3))
    A[ROWS, COLS] = values
    return np.linalg.solve(A, b)


def sparse_case(name: str, values: Tensor, b: Tensor, solver: LinearSolver | None, **fields: Any) -> LayerCase:
    """A sparse system, solved by `solver`."""

    def run(make: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda values, b: make(sparse(values), b, solver=solver, **options)

    common: dict[str, Any] = {
        "layer": "linear_solve",
        "source": SOURCE,
        "event_ndims": (1, 1),
        "names": ("A", "b"),
        "oracle": per_element(_numpy, (1, 1)),
        "invariants": (lambda x, values, b: (dense(values) @ x.unsqueeze(-1)).squeeze(-1) - b,),
        "unrolled": lambda values, b: torch.linalg.solve(dense(values), b.unsqueeze(-1)).squeeze(-1),
        "tolerant": run(linear_solve, on_failure="nan"),
        "solution": run(linear_solve_ex),
        "wrong": (
            Wrong("wrong length", (values, b[..., :2]), "b: expected 3 entries .* got 2"),
            Wrong("too few values", (values[..., :6], b), "A: expected 4 row offsets and as many columns as values"),
        ),
    }
    return LayerCase(name, run(linear_solve), (values, b), **(common | fields))


VALUES = normal(61, 7) + 3 * numbers([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0])
SEVERAL = normal(62, 2, 7) + 3 * numbers([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0])
RIGHT, RIGHTS = normal(63, 3), normal(64, 3, 3)
SINGULAR = numbers([1.0, 2.0, 2.0, 4.0, 0.0, 0.0, 1.0])
POSITIVE = numbers([2.0, -0.5, -0.5, 3.0, 0.7, 0.7, 1.5])

HOSTILE = (
    Hostile("huge", (1e150 * VALUES, RIGHT)),
    Hostile("tiny", (1e-150 * VALUES, 1e-150 * RIGHT)),
    Hostile("zero right-hand side", (VALUES, 0 * RIGHT)),
    Hostile("zeros on the pattern and on the diagonal", (numbers([0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]), RIGHT)),
    Hostile("rank deficient", (SINGULAR, RIGHT), SolveError, r"linear_solve \(forward\)"),
    Hostile("zero matrix", (0 * VALUES, RIGHT), SolveError, "SINGULAR"),
)
BADLY_SCALED = Hostile("rows of very different size", (VALUES * numbers([1e8, 1e8, 1.0, 1.0, 1.0, 1e-8, 1e-8]), RIGHT))

CASES: tuple[LayerCase, ...] = (
    sparse_case("linear_solve sparse SuperLU", VALUES, RIGHTS, None, hostile=(*HOSTILE, BADLY_SCALED)),
    sparse_case("linear_solve sparse SuperLU batched", SEVERAL, RIGHT, SuperLU(), bad=(0, SINGULAR)),
    sparse_case("linear_solve sparse GMRES", VALUES, RIGHTS, GMRES(), hostile=HOSTILE),
    replace(
        sparse_case("linear_solve sparse CG", POSITIVE, RIGHTS, CG()),
        unrolled=lambda values, b: torch.linalg.solve((dense(values) + dense(values).mT) / 2, b.unsqueeze(-1)).squeeze(
            -1
        ),
    ),
)
