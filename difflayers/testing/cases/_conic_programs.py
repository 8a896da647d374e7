"""Cases of quadratic programs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from difflayers._solution import SolveError
from difflayers.conic import (
    InteriorPoint,
    Moreau,
    ProgramPoint,
    QuadraticProgram,
    SparseMatrix,
    quadratic_program,
    quadratic_program_ex,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

__all__ = ["CASES"]

SOURCE = "B. Amos, J. Z. Kolter, OptNet, 2017"


def _enumerate(P: np.ndarray, q: np.ndarray, G: np.ndarray, h: np.ndarray, A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Every active set is tried; the feasible point with multipliers of the right sign and the lowest value wins."""
    best, value = None, np.inf
    n, p, m = len(q), len(b), len(h)
    P = (P + P.T) / 2
    for k in range(min(m, n - p) + 1):
        for rows in itertools.combinations(range(m), k):
            C = np.concatenate([A, G[list(rows)]])
            K = np.block([[P, C.T], [C, np.zeros((p + k, p + k))]])
            right = np.concatenate([-q, b, h[list(rows)]])
            x = np.linalg.lstsq(K, right, rcond=None)[0]
            if np.abs(K @ x - right).max() > 1e-9 * (1 + np.abs(right).max()):
                continue
            z, x = x[n + p :], x[:n]
            scale = 1e-9 * (1 + np.abs(h).max())
            energy = x @ P @ x / 2 + q @ x
            if (z >= -1e-9).all() and (G @ x <= h + scale).all() and energy < value:
                best, value = x, energy
    assert best is not None
    return best


def _case(name: str, inputs: tuple[Tensor, ...], options: dict[str, Any], **fields: Any) -> LayerCase:
    def run(make: Callable[..., Any], **more: Any) -> Callable[..., Any]:
        return lambda *data: make(*data, **options, **more)

    P, q, G, h, A, b = inputs
    common: dict[str, Any] = {
        "layer": "quadratic_program",
        "source": SOURCE,
        "event_ndims": (2, 1, 2, 1, 2, 1),
        "names": ("P", "q", "G", "h", "A", "b"),
        "oracle": per_element(_enumerate, (2, 1, 2, 1, 2, 1)),
        "tolerant": run(quadratic_program, on_failure="nan"),
        "solution": lambda *data: _only_x(quadratic_program_ex(*data, **options)),
        "invariants": (
            lambda x, P, q, G, h, A, b: (A @ x.unsqueeze(-1)).squeeze(-1) - b,
            lambda x, P, q, G, h, A, b: ((G @ x.unsqueeze(-1)).squeeze(-1) - h).clamp_min(0),
        ),
        "hostile": (
            Hostile("infeasible", (P, q, G, h - 100, A, b), SolveError, "INFEASIBLE|MAX_STEPS"),
            Hostile("no bounds", (P, q, G, h + numbers(np.inf), A, b)),
        ),
        "wrong": (
            Wrong("not square", (P[..., :1], q, G, h, A, b), r"P: expected shape"),
            Wrong("wrong columns", (P, q, G[..., :1], h, A, b), r"G: expected 2 columns as of q"),
            Wrong("wrong rows", (P, q, G, h[..., :1], A, b), r"h: expected 2 entries, one per row of G"),
        ),
        "oracle_tol": 1e-7,
    }
    return LayerCase(name, run(quadratic_program), inputs, **(common | fields))


def _only_x(solution: Any) -> Any:
    from dataclasses import replace

    return replace(solution, value=solution.value.x)


P = numbers([[2.0, 0.3], [0.3, 1.0]])
G, A, b = numbers([[1.0, -0.5], [-1.0, 0.2]]), numbers([[1.0, 1.0]]), numbers([0.4])
q, h = normal(31, 2, 2), numbers([[0.1, 0.8], [0.3, 0.2]])
DATA = P, q, G, h, A, b

# ---------------------------------------------------------------------------------------------------------- smoothing

KAPPA = 1e-2


def _central(P: np.ndarray, q: np.ndarray, G: np.ndarray, h: np.ndarray) -> np.ndarray:
    """The minimiser with logarithmic barriers, by Newton's method from a point inside."""
    x = np.zeros(len(q))
    energy = lambda x: x @ P @ x / 2 + q @ x - KAPPA * np.log(h - G @ x).sum()  # noqa: E731
    for _ in range(100):
        s = h - G @ x
        slope = P @ x + q + KAPPA * G.T @ (1 / s)
        step = np.linalg.solve((P + P.T) / 2 + KAPPA * G.T @ np.diag(1 / s**2) @ G, -slope)
        t = 1.0
        while (h - G @ (x + t * step) <= 0).any() or energy(x + t * step) > energy(x) + 1e-14:
            t /= 2
            if t < 1e-12:
                return x
        x = x + t * step
    return x


def _smooth_slope(P: Tensor, q: Tensor, G: Tensor, h: Tensor) -> Tensor:
    """The derivative of the layer in one direction, which is a number the oracle knows: the Jacobian is symmetric."""
    x, pull = torch.func.vjp(lambda q: quadratic_program(P, q, G, h, smoothing=KAPPA), q)
    return pull(torch.ones_like(x))[0]


def _central_slope(*data: Tensor) -> Tensor:
    P, q, G, h = data
    solve, step = per_element(_central, (2, 1, 2, 1)), 1e-5
    return (solve(P, q + step, G, h) - solve(P, q - step, G, h)) / (2 * step)


# ------------------------------------------------------------------------------------------------------------- sparse

P_AT, G_AT, A_AT = (
    (torch.tensor([0, 2, 4], device="cpu"), torch.tensor([0, 1, 0, 1], device="cpu"), (2, 2)),
    (torch.tensor([0, 2, 3], device="cpu"), torch.tensor([0, 1, 0], device="cpu"), (2, 2)),
    (torch.tensor([0, 2], device="cpu"), torch.tensor([0, 1], device="cpu"), (1, 2)),
)


def _sparse(at: Any, values: Tensor) -> SparseMatrix:
    crow, cols, shape = at
    return SparseMatrix(crow.to(values.device), cols.to(values.device), values, shape)


def _sparse_program(make: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def call(P: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor) -> Any:
        return make(_sparse(P_AT, P), q, _sparse(G_AT, G), h, _sparse(A_AT, A), b, **options)

    return call


def _dense(P: np.ndarray, q: np.ndarray, G: np.ndarray, h: np.ndarray, A: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _enumerate(P.reshape(2, 2), q, np.array([[G[0], G[1]], [G[2], 0.0]]), h, A.reshape(1, 2), b)


SPARSE = numbers([2.0, 0.3, 0.3, 1.0]), q, numbers([1.0, -0.5, -1.0]), h, A[0], b

# ------------------------------------------------------------------------------------------------------------- module


def _module() -> QuadraticProgram:
    factor, G_, A_, x0, s0 = (nn.Parameter(t.clone()) for t in (FACTOR, G, A, X0, S0))
    return QuadraticProgram(factor=factor, G=G_, A=A_, x0=x0, s0=s0, ridge=0.1)


def _called(**options: Any) -> Callable[..., Tensor]:
    def call(factor: Tensor, q: Tensor, G: Tensor, A: Tensor, x0: Tensor, s0: Tensor) -> Tensor:
        module = QuadraticProgram(factor=factor, G=G, A=A, x0=x0, s0=s0, ridge=0.1, **options)
        return functional_call(module, {"factor": factor, "G": G, "A": A, "x0": x0, "s0": s0}, (q,))

    return call


def _implied(F: np.ndarray, q: np.ndarray, G: np.ndarray, A: np.ndarray, x0: np.ndarray, s0: np.ndarray) -> np.ndarray:
    return _enumerate(F @ F.T + 0.1 * np.eye(2), q, G, G @ x0 + np.log1p(np.exp(s0)), A, A @ x0)


FACTOR, X0, S0 = numbers([[1.2, 0.0], [0.3, 0.9]]), numbers([0.1, 0.3]), numbers([-4.0, 0.2])

CASES: tuple[LayerCase, ...] = (
    _case("quadratic_program Moreau", DATA, {"solver": Moreau()}, representative=True),
    _case("quadratic_program InteriorPoint", DATA, {"solver": InteriorPoint()}),
    _case(
        "quadratic_program warm start",
        DATA,
        # right for the first element, wrong for the second
        {"warm_start": ProgramPoint(q.new_zeros(2), q.new_zeros(1), numbers([1.0, 0.0]), q.new_zeros(2))},
        exact_bits=False,
    ),
    LayerCase(
        "quadratic_program smoothing",
        _smooth_slope,
        (P, q, G, h),
        _central_slope,
        layer="quadratic_program",
        source=SOURCE,
        event_ndims=(2, 1, 2, 1),
        oracle_tol=1e-6,
        exempt={"empty_batch": "the case is a derivative, and that of an empty batch does not depend on anything"},
    ),
    LayerCase(
        "quadratic_program sparse",
        _sparse_program(quadratic_program),
        SPARSE,
        per_element(_dense, (1,) * 6),
        layer="quadratic_program",
        source=SOURCE,
        event_ndims=(1,) * 6,
        names=("P", "q", "G", "h", "A", "b"),
        tolerant=_sparse_program(quadratic_program, on_failure="nan"),
        solution=lambda *data: _only_x(_sparse_program(quadratic_program_ex)(*data)),
        hostile=(Hostile("infeasible", (*SPARSE[:3], h - 100, *SPARSE[4:]), SolveError, "INFEASIBLE|MAX_STEPS"),),
        oracle_tol=1e-7,
    ),
    LayerCase(
        "QuadraticProgram",
        _called(),
        (FACTOR, q, G, A, X0, S0),
        per_element(_implied, (2, 1, 2, 2, 1, 1)),
        source=SOURCE,
        event_ndims=(2, 1, 2, 2, 1, 1),
        representative=True,
        tolerant=_called(on_failure="nan"),
        make_module=_module,
        module_inputs=(q,),
        exempt={"autocast_of_backward": "P, h and b are products of plain torch, which autocast halves in backward"},
        oracle_tol=1e-7,
    ),
)
