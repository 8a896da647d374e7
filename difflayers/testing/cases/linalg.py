"""Cases of :mod:`difflayers.linalg`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import SolveError, SolveWarning
from difflayers.linalg import (
    CG,
    GMRES,
    LU,
    QR,
    Cholesky,
    LinearOperator,
    Tag,
    least_squares,
    least_squares_ex,
    linear_solve,
    linear_solve_ex,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from . import _linalg_minres, _linalg_recycled, _linalg_sparse
from ._common import normal, numbers, per_element

__all__ = ["CASES"]

SOURCE = "linear systems by factorisation or Krylov iteration"


def _residual(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return (A @ x.unsqueeze(-1)).squeeze(-1) - b


def _matvec(params: tuple[Tensor, ...], v: Tensor) -> Tensor:
    return (params[0] @ v.unsqueeze(-1)).squeeze(-1)


def _symmetric_matvec(params: tuple[Tensor, ...], v: Tensor) -> Tensor:
    return (_matvec(params, v) + _matvec((params[0].mT,), v)) / 2


def _case(name: str, A: Tensor, b: Tensor, solver: Any, starved: Any = None, **fields: Any) -> LayerCase:
    """A dense system, solved by `solver`."""

    def run(make: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda A, b: make(A, b, **options)

    common: dict[str, Any] = {
        "layer": "linear_solve",
        "source": SOURCE,
        "event_ndims": (2, 1),
        "names": ("A", "b"),
        "oracle": per_element(lambda A, b: np.linalg.solve(A, b), (2, 1)),
        "invariants": (_residual,),
        "unrolled": lambda A, b: torch.linalg.solve(A, b.unsqueeze(-1)).squeeze(-1),
        "tolerant": run(linear_solve, solver=solver, on_failure="nan"),
        "solution": run(linear_solve_ex, solver=solver),
        "wrong": (
            Wrong("not square", (A[..., :2], b), r"A: expected a square matrix .* got \(.*3, 2\)"),
            Wrong("wrong length", (A, b[..., :2]), "b: expected 3 entries .* got 2"),
            Wrong("a vector for a matrix", (A[0] if A.ndim == 2 else A[0, 0], b), r"A: expected at least 2 dimensions"),
            Wrong(
                "batches that do not fit", (A.expand(4, 2, 3, 3), normal(2, 3, 3)), "[Ab]: expected batch dimensions"
            ),
        ),
    }
    if starved is not None:
        common["starved"] = run(linear_solve, solver=starved)
        common["starved_solution"] = run(linear_solve_ex, solver=starved)
    return LayerCase(name, run(linear_solve, solver=solver), (A, b), **(common | fields))


def _operator(case: LayerCase, solver: Any, starved: Any, tags: Tag, param_ndims: tuple[int, ...] | None) -> LayerCase:
    """The same system with its matrix hidden in a product."""
    matvec = _symmetric_matvec if tags else _matvec

    def run(make: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda A, b: make(LinearOperator(matvec, (A,), tags, param_ndims), b, **options)

    def captured(b: Tensor) -> Tensor:
        A = LinearOperator(lambda params, v: v + 0.1 * _matvec((b,), v), (), Tag.SYMMETRIC)
        return linear_solve(A, torch.ones_like(b[..., 0]), solver=GMRES())

    return replace(
        case,
        fn=run(linear_solve, solver=solver),
        tolerant=run(linear_solve, solver=solver, on_failure="nan"),
        solution=run(linear_solve_ex, solver=solver),
        starved=run(linear_solve, solver=starved) if starved else None,
        starved_solution=run(linear_solve_ex, solver=starved) if starved else None,
        captured=captured,
        names=("params[0]", "b"),
        wrong=(Wrong("mixed dtypes", (case.inputs[0].float(), case.inputs[1]), r"params\[0\]: expected dtype"),),
        exempt={"wrong_dtype_is_refused": "an operator may take integers, such as indices, among its params"},
    )


SQUARE = normal(3, 3, 3) + 2 * torch.eye(3, dtype=torch.float64, device="cpu")
SQUARES = normal(4, 2, 3, 3) + 2 * torch.eye(3, dtype=torch.float64, device="cpu")
POSITIVE = SQUARE @ SQUARE.mT / 3 + torch.eye(3, dtype=torch.float64, device="cpu")
POSITIVES = SQUARES @ SQUARES.mT / 3 + torch.eye(3, dtype=torch.float64, device="cpu")
VECTOR, VECTORS = normal(5, 3), normal(6, 3, 3)
SINGULAR = numbers([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [1.0, 0.0, 1.0]])
INDEFINITE = numbers([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 2.0]])
SYMMETRIC_SINGULAR = numbers([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
HILBERT = 1 / (1 + torch.arange(3.0, dtype=torch.float64, device="cpu")[:, None] + torch.arange(3.0, device="cpu"))

SCALES = (
    Hostile("huge", (1e150 * POSITIVE, VECTOR)),
    Hostile("tiny", (1e-150 * POSITIVE, 1e-150 * VECTOR)),
    Hostile("zero right-hand side", (POSITIVE, 0 * VECTOR)),
    Hostile("one by one", (numbers([[2.0]]), numbers([3.0]))),
    Hostile("ill-conditioned", (HILBERT, VECTOR)),
    Hostile("equal columns but for the last digits of single precision", (POSITIVE + 1e4, VECTOR)),
)
NONSYMMETRIC = (
    Hostile("zero diagonal", (numbers([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), VECTOR)),
    Hostile("rows of very different size", (SQUARE * numbers([[1e8], [1.0], [1e-8]]), VECTOR)),
)
DEPENDENT = Hostile("rank deficient", (SINGULAR, VECTOR), SolveError, r"linear_solve \(forward\)")
ZERO = Hostile("zero matrix", (0 * SINGULAR, VECTOR), SolveError, "SINGULAR")
NOT_POSITIVE = Hostile("indefinite", (INDEFINITE, VECTOR), SolveError, "SINGULAR")
# conjugate gradients see this one by rounding only: a warning is honest too
SEMIDEFINITE = Hostile(
    "semidefinite", (SYMMETRIC_SINGULAR, VECTOR), (SolveError, SolveWarning), r"linear_solve \(forward\)"
)

GENERAL = (*SCALES, *NONSYMMETRIC, DEPENDENT, ZERO)
# the residual of such rows cannot reach the tolerance in float64: products round it away, and the solver says so
KRYLOV = tuple(h._replace(may_fail=h.may_fail or h.name.startswith("rows of very")) for h in GENERAL)
DEFINITE = (*SCALES, ZERO, NOT_POSITIVE, SEMIDEFINITE)

_LU = _case("linear_solve LU", SQUARE, VECTORS, LU(), hostile=GENERAL, representative=True)
_CHOLESKY = _case("linear_solve Cholesky", POSITIVE, VECTORS, Cholesky(), hostile=DEFINITE)
_CG = _case("linear_solve CG", POSITIVE, VECTORS, CG(), CG(max_steps=1), hostile=DEFINITE)
_GMRES = _case("linear_solve GMRES", SQUARE, VECTORS, GMRES(), GMRES(max_steps=1), hostile=KRYLOV)

# finite differences and the twin move one entry of a matrix; the symmetric part is what these layers see
_SYMMETRIC: dict[str, Any] = {"unrolled": lambda A, b: torch.linalg.solve((A + A.mT) / 2, b.unsqueeze(-1)).squeeze(-1)}
_CHOLESKY, _CG = replace(_CHOLESKY, **_SYMMETRIC), replace(_CG, **_SYMMETRIC)

LINEAR_SOLVES: tuple[LayerCase, ...] = (
    _LU,
    _case("linear_solve LU batched", SQUARES, VECTOR, LU(), bad=(0, SINGULAR)),
    _case("linear_solve QR", SQUARE, VECTORS, QR(), hostile=GENERAL),
    _case("linear_solve QR batched", SQUARES, VECTOR, QR(), bad=(0, SINGULAR)),
    _CHOLESKY,
    replace(_case("linear_solve Cholesky batched", POSITIVES, VECTOR, Cholesky(), bad=(0, INDEFINITE)), **_SYMMETRIC),
    _CG,
    replace(_case("linear_solve CG batched", POSITIVES, VECTOR, CG(), bad=(0, INDEFINITE)), **_SYMMETRIC),
    _GMRES,
    _case("linear_solve GMRES batched", SQUARES, VECTOR, GMRES(), bad=(0, SINGULAR)),
    replace(_operator(_LU, LU(), None, Tag.NONE, (2,)), name="linear_solve LU operator", representative=False),
    replace(
        _operator(_CG, CG(), CG(max_steps=1), Tag.POSITIVE_DEFINITE, (2,)),
        name="linear_solve CG operator",
    ),
    replace(
        _operator(_GMRES, GMRES(), GMRES(max_steps=1), Tag.NONE, (2,)),
        name="linear_solve GMRES operator",
    ),
    replace(
        _operator(_GMRES, GMRES(), GMRES(max_steps=1), Tag.NONE, None),
        name="linear_solve GMRES operator, undeclared",
    ),
)


# ------------------------------------------------------------------------------------------------------ least squares


def _normal_equations(
    A: Tensor,
    y: Tensor,
    weights: Tensor | None = None,
    ridge: Tensor | None = None,
    center: Tensor | None = None,
    C: Tensor | None = None,
    d: Tensor | None = None,
) -> Tensor:
    """The optimality system, assembled and solved by torch."""
    M, t = (A, y) if weights is None else (weights.unsqueeze(-1) * A, weights * y)
    H, g = M.mT @ M, (M.mT @ t.unsqueeze(-1)).squeeze(-1)
    n = A.shape[-1]
    if ridge is not None:
        H = H + ridge[..., None, None] * torch.eye(n, dtype=A.dtype, device=A.device)
        g = g if center is None else g + ridge.unsqueeze(-1) * center
    if C is not None and d is not None:
        corner = C.new_zeros(*C.shape[:-2], C.shape[-2], C.shape[-2])
        H = torch.cat([torch.cat([H, C.mT], -1), torch.cat([C, corner], -1)], -2)
        g = torch.cat([g, d.expand(*g.shape[:-1], d.shape[-1])], -1)
    return torch.linalg.solve(H, g.unsqueeze(-1)).squeeze(-1)[..., :n]


def _lstsq(A: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.linalg.lstsq(A, y, rcond=None)[0]


def _stacked(A: np.ndarray, y: np.ndarray, weights: np.ndarray, ridge: np.ndarray, center: np.ndarray) -> np.ndarray:
    rows = np.concatenate([weights[:, None] * A, np.sqrt(ridge) * np.eye(A.shape[1])])
    return _lstsq(rows, np.concatenate([weights * y, np.sqrt(ridge) * center]))


def _constrained(A: np.ndarray, y: np.ndarray, C: np.ndarray, d: np.ndarray) -> np.ndarray:
    """On a basis of the solutions of the equalities."""
    _, _, Vt = np.linalg.svd(C)
    start, Z = np.linalg.pinv(C) @ d, Vt[len(C) :].T
    return start + Z @ _lstsq(A @ Z, y - A @ start)


def _fit(name: str, inputs: tuple[Tensor, ...], parts: tuple[str, ...], solve: Any, **fields: Any) -> LayerCase:
    """A least-squares problem; `parts` says what `inputs` are behind A and y."""
    ndims = {"A": 2, "y": 1, "weights": 1, "ridge": 0, "center": 1, "C": 2, "d": 1}
    names = ("A", "y", *parts)

    def run(layer: Callable[..., Any], **more: Any) -> Callable[..., Any]:
        def fn(A: Tensor, y: Tensor, *rest: Tensor) -> Any:
            options: dict[str, Any] = dict(zip(parts, rest, strict=True))
            if "C" in options:
                options["equality"] = (options.pop("C"), options.pop("d"))
            return layer(A, y, **options, **more)

        return fn

    common: dict[str, Any] = {
        "layer": "least_squares",
        "source": "weighted ridge regression with equalities, the derivative in closed form",
        "event_ndims": tuple(ndims[n] for n in names),
        "names": names,
        "oracle": per_element(solve, tuple(ndims[n] for n in names)),
        "unrolled": lambda A, y, *rest: _normal_equations(A, y, **dict(zip(parts, rest, strict=True))),
        "tolerant": run(least_squares, on_failure="nan"),
        "solution": run(least_squares_ex),
    }
    return LayerCase(name, run(least_squares), inputs, **(common | fields))


TALL, TALLS, WIDE = normal(21, 4, 2), normal(22, 2, 3, 2), normal(23, 2, 3)
LOW_RANK = numbers([[1.0, 2.0], [2.0, 4.0], [-1.0, -2.0]])
CONSTRAINED = (normal(24, 4, 3), normal(25, 2, 4), normal(26, 1, 3), normal(27, 1))

LEAST_SQUARES: tuple[LayerCase, ...] = (
    _fit(
        "least_squares tall",
        (TALL, normal(28, 2, 4)),
        (),
        _lstsq,
        representative=True,
        hostile=(
            Hostile("rank deficient", (LOW_RANK, normal(29, 3)), SolveError, "SINGULAR"),
            Hostile("fewer rows than columns", (WIDE, normal(29, 2)), SolveError, "SINGULAR"),
            Hostile("zero matrix", (0 * TALL, normal(29, 4)), SolveError, "SINGULAR"),
            Hostile("almost rank deficient", (LOW_RANK + 1e-5 * TALLS[0], normal(29, 3)), oracle=None),
            Hostile("huge", (1e100 * TALL, normal(29, 4))),
            Hostile("tiny", (1e-100 * TALL, normal(29, 4))),
            Hostile("columns of very different size", (TALL * numbers([1e5, 1e-5]), normal(29, 4))),
            Hostile("zero data", (TALL, 0 * normal(29, 4))),
            Hostile("duplicate rows", (TALL[[0, 0, 1, 1]], normal(29, 4))),
            Hostile("square", (SQUARE, VECTOR)),
        ),
        wrong=(
            Wrong("rows that do not fit", (TALL, normal(1, 3)), r"y: expected shape .*4.* got"),
            Wrong("a vector for a matrix", (TALL[0], normal(1, 2)), "A: expected at least 2 dimensions"),
            Wrong("batches that do not fit", (TALLS, normal(1, 3, 3)), "expected batch dimensions"),
        ),
    ),
    _fit("least_squares batched", (TALLS, normal(30, 3)), (), _lstsq, bad=(0, LOW_RANK)),
    _fit(
        "least_squares weights, ridge, center",
        (normal(31, 3, 2), normal(32, 2, 3), numbers([1.0, 0.5, 2.0]), numbers(0.3), normal(33, 2)),
        ("weights", "ridge", "center"),
        _stacked,
        hostile=(
            Hostile(
                "rank deficient with a ridge",
                (LOW_RANK, normal(29, 3), numbers([1.0, 1.0, 1.0]), numbers(1e-3), normal(33, 2)),
            ),
            Hostile(
                "all weights zero",
                (normal(31, 3, 2), normal(32, 3), numbers([0.0, 0.0, 0.0]), numbers(0.3), normal(33, 2)),
            ),
        ),
    ),
    _fit(
        "least_squares wide with a ridge",
        (WIDE, normal(34, 2, 2), numbers(0.1)),
        ("ridge",),
        lambda A, y, ridge: _stacked(A, y, np.ones(2), ridge, np.zeros(3)),
    ),
    _fit(
        "least_squares ridge by element",
        (WIDE, normal(34, 2), numbers([0.1, 1.0])),
        ("ridge",),
        lambda A, y, ridge: _stacked(A, y, np.ones(2), ridge, np.zeros(3)),
        bad=(2, numbers(0.0)),
    ),
    _fit(
        "least_squares equality",
        CONSTRAINED,
        ("C", "d"),
        _constrained,
        invariants=(lambda w, A, y, C, d: (C @ w.unsqueeze(-1)).squeeze(-1) - d,),
        hostile=(
            Hostile("equality of zeros", (*CONSTRAINED[:2], 0 * CONSTRAINED[2], 0 * CONSTRAINED[3]), SolveError, ""),
        ),
    ),
)

CASES: tuple[LayerCase, ...] = (
    *LINEAR_SOLVES,
    *LEAST_SQUARES,
    *_linalg_sparse.CASES,
    *_linalg_recycled.CASES,
    *_linalg_minres.CASES,
)
