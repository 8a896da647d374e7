"""Cases of GMRES that recycles a subspace, and of directions from a network: numpy solves the same systems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import SolveError
from difflayers.linalg import LearnedDirections, LinearSolver, RecycledGMRES, linear_solve, linear_solve_ex
from difflayers.testing._case import Hostile, LayerCase

from ._common import normal, numbers, per_element

__all__ = ["CASES"]


def _network(r: Tensor) -> Tensor:
    """A fixed nonlinear map that proposes useful directions."""
    return r + 0.2 * torch.tanh(r.flip(-1))


SOURCE = "M. L. Parks et al., Recycling Krylov subspaces for sequences of linear systems, 2006"
A = normal(71, 4, 4) + 3 * torch.eye(4, dtype=torch.float64, device="cpu")
b = normal(72, 2, 4)
SINGULAR = A.clone()
SINGULAR[:, 2] = SINGULAR[:, 0]
POSITIVE = numbers([[3.0, 0.5, -0.2], [0.5, 2.0, 0.4], [-0.2, 0.4, 1.5]])
c = normal(73, 3, 3)


def _case(name: str, solver: LinearSolver, A: Tensor, b: Tensor, starved: LinearSolver, **fields: Any) -> LayerCase:
    def run(make: Callable[..., Any], solver: LinearSolver = solver, **options: Any) -> Callable[..., Any]:
        return lambda A, b: make(A, b, solver=solver, **options)

    half = isinstance(solver, LearnedDirections)
    return LayerCase(
        name,
        run(linear_solve),
        (A, b),
        layer="linear_solve",
        event_ndims=(2, 1),
        names=("A", "b"),
        oracle=per_element(lambda A, b: np.linalg.solve(A, b), (2, 1)),
        invariants=(lambda x, A, b: (A @ x.unsqueeze(-1)).squeeze(-1) - b,),
        unrolled=lambda A, b: torch.linalg.solve((A + A.mT) / 2 if half else A, b.unsqueeze(-1)).squeeze(-1),
        tolerant=run(linear_solve, on_failure="nan"),
        solution=run(linear_solve_ex),
        starved=run(linear_solve, starved),
        starved_solution=run(linear_solve_ex, starved),
        **fields,
    )


CASES: tuple[LayerCase, ...] = (
    _case(
        "linear_solve RecycledGMRES",
        RecycledGMRES(restart=4, recycle=1),
        A,
        b,
        RecycledGMRES(restart=4, recycle=1, max_steps=1),
        source=SOURCE,
        hostile=(
            Hostile("huge", (1e150 * A, b[0])),
            Hostile("tiny", (1e-150 * A, 1e-150 * b[0])),
            Hostile("zero right-hand side", (A, 0 * b[0])),
            Hostile("rank deficient", (SINGULAR, b[0]), SolveError, "SINGULAR"),
            Hostile("zero matrix", (0 * A, b[0]), SolveError, "SINGULAR"),
        ),
    ),
    _case(
        "linear_solve LearnedDirections",
        LearnedDirections(network=_network),
        POSITIVE,
        c,
        LearnedDirections(network=_network, max_steps=1),
        source="A. Kaneda et al., A deep conjugate direction method for iteratively solving linear systems, 2023",
        hostile=(
            Hostile("huge", (1e150 * POSITIVE, c[0])),
            Hostile("tiny", (1e-150 * POSITIVE, 1e-150 * c[0])),
            Hostile("zero right-hand side", (POSITIVE, 0 * c[0])),
            Hostile("zero matrix", (0 * POSITIVE, c[0]), SolveError, "SINGULAR"),
            Hostile("negative definite", (-POSITIVE, c[0]), SolveError, "SINGULAR"),
        ),
    ),
)
