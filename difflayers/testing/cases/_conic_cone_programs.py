"""Cases of conic programs: one of every cone, its solution on the curved surface; the answer is known to CVXPY."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import SolveError
from difflayers.conic import (
    Clarabel,
    CvxpyLayer,
    Exponential,
    NonNegative,
    PositiveSemidefinite,
    Power,
    RotatedSecondOrder,
    SecondOrder,
    Zero,
    conic_program,
    conic_program_ex,
)
from difflayers.linalg._autodiff import opaque
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

__all__ = ["CASES"]

SOURCE = "A. Agrawal et al., Differentiable Convex Optimization Layers, 2019"
Parts = tuple[tuple[Any, int], ...]


def members(cone: Any, s: Any) -> list[Any]:
    """CVXPY's constraints that say ``s in cone``: nothing of ours but the name of the cone."""
    import cvxpy as cp

    match cone:
        case Zero():
            return [s == 0]
        case NonNegative():
            return [s >= 0]
        case SecondOrder():
            return [cp.norm(s[1:]) <= s[0]]
        case RotatedSecondOrder():
            return [cp.SOC(s[0] + s[1], cp.hstack([s[0] - s[1], math.sqrt(2) * s[2:]]))]
        case PositiveSemidefinite():
            k = math.isqrt(s.size)
            matrix = cp.reshape(s, (k, k), order="C")
            return [(matrix + matrix.T) / 2 >> 0]
        case Exponential():
            return [cp.ExpCone(s[0], s[1], s[2])]
        case Power(alpha):
            return [cp.PowCone3D(s[0], s[1], s[2], alpha)]
        case _:
            raise ValueError(f"cone: expected one of the above, got {cone}")


def by_cvxpy(q: np.ndarray, A: np.ndarray, b: np.ndarray, P: np.ndarray, parts: Parts) -> np.ndarray:
    """The minimiser, from Clarabel at 1e-12."""
    import cvxpy as cp

    x = cp.Variable(len(q))
    rows = b - A @ x
    constraints, start = [], 0
    for cone, dim in parts:
        constraints += members(cone, rows[start : start + dim])
        start += dim
    objective = cp.quad_form(x, (P + P.T) / 2, assume_PSD=True) / 2 + q @ x
    tight = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at times Clarabel is a little short of that
        cp.Problem(cp.Minimize(objective), constraints).solve(solver=cp.CLARABEL, **tight)
    return np.asarray(x.value)


def _only_x(solution: Any) -> Any:
    return replace(solution, value=solution.value.x)


def _case(name: str, parts: Parts, inputs: tuple[Tensor, ...], **fields: Any) -> LayerCase:
    def run(make: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda q, A, b, P: make(q, A, b, parts, P, **options)

    q, A, b, P = inputs
    m = b.shape[-1]
    common: dict[str, Any] = {
        "layer": "conic_program",
        "source": SOURCE,
        "event_ndims": (1, 2, 1, 2),
        "names": ("q", "A", "b", "P"),
        "oracle": per_element(lambda q, A, b, P: by_cvxpy(q, A, b, P, parts), (1, 2, 1, 2)),
        "tolerant": run(conic_program, on_failure="nan"),
        "solution": lambda *data: _only_x(run(conic_program_ex)(*data)),
        "wrong": (
            Wrong("wrong columns", (q, A[..., :1], b, P), r"A: expected 2 columns as of q"),
            Wrong("wrong rows", (q, A[..., 1:, :], b, P), rf"A: expected {m} rows, those of {len(parts)} cones"),
            Wrong("wrong right-hand side", (q, A, b[..., 1:], P), rf"b: expected {m} entries, one per row of A"),
            Wrong("not square", (q, A, b, P[..., :1]), r"P: expected shape \(\.\.\., 2, 2\) as of q"),
            Wrong("indefinite", (q, A, b, -P), r"P: expected a positive semidefinite matrix"),
        ),
        "exact_bits": False,  # exponentials and logarithms round by their place in the batch
        "oracle_tol": 1e-6,
    }
    return LayerCase(f"conic_program {name}", run(conic_program), inputs, **(common | fields))


P = numbers([[2.0, 0.3], [0.3, 1.0]])
A3 = numbers([[0.2, 0.1], [-1.0, 0.3], [0.2, -1.0]])
q = normal(41, 2, 2) * 3
MIXED: Parts = ((NonNegative(), 1), (Zero(), 1), (SecondOrder(), 2))
A4 = numbers([[1.0, -0.3], [-1.0, 0.2], [-1.0, 0.2], [0.4, -1.0]])
MATRIX = numbers([[1.0, 0.2], [0.0, 0.6], [0.3, -0.4], [-0.5, 1.0]])


def _infeasible(*data: Tensor) -> Tensor:
    rows = -torch.eye(2, dtype=data[0].dtype, device=data[0].device)
    return conic_program(data[0], torch.cat([rows, -rows]), data[2].new_tensor([-1.0, -1, 0, 0]), [(NonNegative(), 4)])


def _sized(size: float) -> Callable[..., Tensor]:
    """The oracle at numbers around 1: the solution grows with q and b, and Clarabel's tolerances are absolute."""
    solve = per_element(lambda q, A, b, P: by_cvxpy(q, A, b, P, ((SecondOrder(), 3),)), (1, 2, 1, 2))
    return lambda q, A, b, P: solve(q / size, A, b / size, P) * size


PROGRAMS: tuple[LayerCase, ...] = (
    _case(
        "SecondOrder",
        ((SecondOrder(), 3),),
        (q, A3, numbers([1.0, 0.1, -0.2]), P),
        representative=True,
        starved=lambda q, A, b, P: conic_program(q, A, b, [(SecondOrder(), 3)], P, solver=Clarabel(max_steps=1)),
        starved_solution=lambda q, A, b, P: _only_x(
            conic_program_ex(q, A, b, [(SecondOrder(), 3)], P, solver=Clarabel(max_steps=1))
        ),
        hostile=(
            Hostile("infeasible", (q, A3, numbers([1.0, 0.1, -0.2]), P), SolveError, "INFEASIBLE", fn=_infeasible),
            *(
                Hostile(f"of size {size}", (q * size, A3, numbers([1.0, 0.1, -0.2]) * size, P), oracle=_sized(size))
                for size in (1e-9, 1e9)
            ),
            Hostile(
                "at the apex",
                (q, A3, numbers([1.0, 0.1, -0.2]) * 0, P),
                oracle=lambda q, *_: torch.zeros_like(q),  # its multipliers are inside the cone
            ),
        ),
    ),
    _case("RotatedSecondOrder", ((RotatedSecondOrder(), 3),), (q, A3, numbers([1.0, 0.5, -0.2]), P)),
    _case("PositiveSemidefinite", ((PositiveSemidefinite(), 4),), (q, MATRIX, numbers([1.0, 0.2, 0.2, 0.5]), P)),
    _case("Exponential", ((Exponential(), 3),), (q, A3, numbers([0.1, 1.0, 1.2]), P)),
    _case("Power", ((Power(0.3), 3),), (q, A3, numbers([1.0, 1.0, 0.4]), P)),
    _case("mixed", MIXED, (normal(43, 1, 2), A4[None], numbers([[0.4, 0.1, 0.8, 0.3]]), P[None])),
)


# ------------------------------------------------------------------------------------------------------- CVXPY's layer


def _cvxpy_problem() -> tuple[Any, list[Any], list[Any]]:
    """The nearest point, in a mixture of norms, of a half space in the positive quadrant."""
    import cvxpy as cp

    x = cp.Variable(2, nonneg=True, name="x")
    a, c = cp.Parameter(2, name="a"), cp.Parameter(2, name="c")
    weight = cp.Parameter(nonneg=True, name="weight")
    objective = cp.sum_squares(x - c) + weight * cp.norm(x) + cp.exp(a @ x)
    return cp.Problem(cp.Minimize(objective), [a @ x >= 1]), [a, c, weight], [x]


@opaque  # Dynamo looks behind the cache and would follow CVXPY
@functools.lru_cache
def _layer(**options: Any) -> CvxpyLayer:
    return CvxpyLayer(*_cvxpy_problem(), **options)


class _Learned(torch.nn.Module):
    """The layer behind a parameter that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = CvxpyLayer(*_cvxpy_problem())
        self.center = torch.nn.Parameter(normal(47, 2, 2))

    def forward(self, a: Tensor, weight: Tensor) -> Tensor:
        """The variable."""
        return self.layer(a, self.center, weight)[0]


def _by_hand(a: np.ndarray, c: np.ndarray, weight: np.ndarray) -> np.ndarray:
    problem, parameters, (x,) = _cvxpy_problem()
    for parameter, value in zip(parameters, (a, c, weight), strict=True):
        parameter.value = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem.solve(solver="CLARABEL", **dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-12))
    return np.asarray(x.value)


_INPUTS = (numbers([1.0, 0.7]), normal(47, 2, 2), numbers([0.3, 0.5]))

LAYERS: tuple[LayerCase, ...] = (
    LayerCase(
        "CvxpyLayer",
        lambda *values: _layer()(*values)[0],
        _INPUTS,
        oracle=per_element(_by_hand, (1, 1, 0)),
        event_ndims=(1, 1, 0),
        names=("a", "c", "weight"),
        source=SOURCE,
        tolerant=lambda *values: _layer(on_failure="nan")(*values)[0],
        wrong=(
            Wrong("one of three", _INPUTS[:1], "parameters: expected 3 tensors, got 1"),
            Wrong("three entries", (normal(1, 3), *_INPUTS[1:]), r"a: expected shape \(2,\) behind the batch"),
            Wrong("negative", (*_INPUTS[:2], -_INPUTS[2]), "weight: expected at least 0"),
        ),
        representative=True,
        make_module=_Learned,
        module_inputs=(_INPUTS[0], _INPUTS[2]),
        exact_bits=False,
        oracle_tol=1e-6,
    ),
)

CASES: tuple[LayerCase, ...] = (*PROGRAMS, *LAYERS)
