"""Cases of data consistency, matrix completion, and the nuclear norm of a Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import SolveError
from difflayers.proximal import (
    AlternatingMinimisation,
    DataConsistency,
    complete_matrix,
    complete_matrix_ex,
    data_consistency,
    data_consistency_ex,
    jacobian_nuclear_norm,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

# --------------------------------------------------------------------------------------------------- data consistency


def _matrix(z: Tensor, A: Tensor) -> Tensor:
    return (A @ z.unsqueeze(-1)).squeeze(-1)


def _transpose(y: Tensor, A: Tensor) -> Tensor:
    return _matrix(y, A.mT)


def _explain(solve: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Data consistency for a matrix that is differentiated too."""

    def run(x: Tensor, b: Tensor, weight: Tensor, A: Tensor) -> Any:
        batch = torch.broadcast_shapes(x.shape[:-1], b.shape[:-1], weight.shape)
        return solve(_matrix, x.expand(*batch, x.shape[-1]), b, weight, params=(A,), **options)

    return run


def _dense(x: Tensor, b: Tensor, weight: Tensor, A: Tensor) -> Tensor:
    H = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device) + weight[..., None, None] * (A.mT @ A)
    rhs = x + weight.unsqueeze(-1) * _transpose(b, A)
    return torch.linalg.solve(H, rhs.unsqueeze(-1)).squeeze(-1)


def _krylov(steps: int) -> Callable[..., np.ndarray]:
    """The best point of the Krylov space: what conjugate gradients reach after so many steps."""

    def solve(x: np.ndarray, b: np.ndarray, weight: np.ndarray, A: np.ndarray) -> np.ndarray:
        H = np.eye(len(x)) + weight * A.T @ A
        r = x + weight * A.T @ b - H @ x
        K = np.stack([np.linalg.matrix_power(H, k) @ r for k in range(steps)], -1)
        return x + K @ np.linalg.solve(K.T @ H @ K, K.T @ r)

    return solve


RECORDED = "the operator is the caller's plain torch, whose backward follows the autocast mode it is run under"
POINT, SEEN, MISFIT, MATRIX = normal(43, 2, 3), normal(44, 2, 2), numbers([0.5, 2.0]), normal(45, 2, 3)
CONSISTENCY: tuple[LayerCase, ...] = (
    LayerCase(
        "data_consistency",
        _explain(data_consistency),
        (POINT, SEEN, MISFIT, MATRIX),
        _dense,
        event_ndims=(1, 1, 0, 2),
        names=("x", "measurement", "weight", None),
        layer="DataConsistency",
        source="H. Chung, S. Lee, J. C. Ye, 2024: decomposed diffusion sampler",
        representative=True,
        unrolled=_dense,
        tolerant=_explain(data_consistency, on_failure="nan"),
        solution=_explain(data_consistency_ex),
        exempt={"autocast_of_backward": RECORDED},
        make_module=lambda: DataConsistency(_average, learn_weight=True, device="cpu", dtype=torch.float64),
        module_inputs=(POINT, SEEN),
        hostile=(
            Hostile("no weight", (POINT, SEEN, 0 * MISFIT, MATRIX)),
            Hostile("zero", (0 * POINT, 0 * SEEN, MISFIT, MATRIX)),
            Hostile("a map to zero", (POINT, SEEN, MISFIT, 0 * MATRIX)),
            Hostile("already consistent", (POINT, _matrix(POINT, MATRIX), MISFIT, MATRIX)),
            Hostile("huge", (1e9 * POINT, 1e9 * SEEN, MISFIT, MATRIX)),
            Hostile("tiny", (1e-9 * POINT, 1e-9 * SEEN, MISFIT, MATRIX)),
            Hostile("a heavy misfit", (POINT, SEEN, 1e6 * MISFIT, MATRIX)),
        ),
        wrong=(
            Wrong("negative weight", (POINT, SEEN, -MISFIT, MATRIX), r"weight: expected at least 0, got -2"),
            Wrong(
                "wrong measurement", (POINT, POINT, MISFIT, MATRIX), r"measurement: expected a shape .* got \(2, 3\)"
            ),
            Wrong(
                "not linear",
                (POINT, SEEN, MISFIT, MATRIX),
                "operator: expected a linear map",
                fn=lambda x, b, w, A: data_consistency(lambda z: z[..., :2] + 1, x, b, w),
            ),
            Wrong(
                "not the adjoint",
                (POINT, SEEN, MISFIT, MATRIX),
                "adjoint: expected the transpose of operator",
                fn=lambda x, b, w, A: data_consistency(_matrix, x, b, w, adjoint=_wrong, params=(A,)),
            ),
        ),
    ),
    LayerCase(
        "data_consistency after two steps",
        _explain(data_consistency, adjoint=_transpose, max_steps=2),
        (POINT, SEEN, MISFIT, MATRIX),
        per_element(_krylov(2), (1, 1, 0, 2)),
        event_ndims=(1, 1, 0, 2),
        layer="DataConsistency",
        exempt={"autocast_of_backward": RECORDED},
    ),
)


def _average(z: Tensor) -> Tensor:
    return (z[..., :-1] + z[..., 1:]) / 2


def _wrong(y: Tensor, A: Tensor) -> Tensor:
    return -_transpose(y, A)


# -------------------------------------------------------------------------------------------------- matrix completion

KNOWN = ((True, True, True), (True, True, False), (False, True, True))


def _mask(M: Tensor) -> Tensor:
    return torch.tensor(KNOWN, device=M.device)


def _complete(solve: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda M, mu: solve(M, _mask(M), 1, ridge=mu, **options)


def _rank_one(M: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """The gradient of the nuclear norm form in ``X = u (1, w)^T``, and a root finder."""
    from scipy.optimize import root

    known = np.array(KNOWN)
    M = np.where(known, M, 0)
    size = np.abs(M).max() or 1.0
    M, mu = M / size, mu / size
    U, s, Vh = np.linalg.svd(M)

    def gradient(x: np.ndarray) -> np.ndarray:
        u, v = x[:3], np.append(1.0, x[3:])
        R = known * (np.outer(u, v) - M)
        a, b = np.linalg.norm(u), np.linalg.norm(v)
        return np.append(R @ v + mu * b * u / a, (R.T @ u + mu * a * v / b)[1:])

    x = root(gradient, np.append(s[0] * U[:, 0] * Vh[0, 0], Vh[0, 1:] / Vh[0, 0]), tol=1e-14).x
    return size * np.outer(x[:3], np.append(1.0, x[3:]))


MATRICES = numbers([1.0, 2.0, -1.0]).unsqueeze(-1) * numbers([1.0, 0.5, 2.0]) + 0.2 * normal(46, 2, 3, 3)
LOW = numbers([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [-1.0, -2.0, -3.0]])
COMPLETIONS: tuple[LayerCase, ...] = (
    LayerCase(
        "complete_matrix",
        _complete(complete_matrix),
        (MATRICES, numbers(0.1)),
        per_element(_rank_one, (2, 0)),
        event_ndims=(2, 0),
        names=("observed", "ridge"),
        source="Y. Gu, Z. Song, J. Yin, L. Zhang, 2023: low rank completion by alternating minimisation",
        representative=True,
        tolerant=_complete(complete_matrix, on_failure="nan"),
        solution=_complete(complete_matrix_ex),
        exempt={"autocast_of_backward": "the product of the factors is plain torch, which autocast halves in backward"},
        starved=_complete(complete_matrix, solver=AlternatingMinimisation(max_steps=1)),
        starved_solution=_complete(complete_matrix_ex, solver=AlternatingMinimisation(max_steps=1)),
        hostile=(
            Hostile("exact", (LOW, numbers(0.0)), oracle=lambda M, mu: LOW.to(M)),
            Hostile("zero", (0 * LOW, numbers(0.0)), oracle=lambda M, mu: 0 * M),
            Hostile("huge", (1e9 * MATRICES, numbers(1e8))),
            Hostile("tiny", (1e-9 * MATRICES, numbers(1e-10))),
            Hostile("unknown entries are NaN", (torch.where(_mask(LOW), MATRICES, math.nan), numbers(0.1))),
            Hostile(
                "rank lower than asked for: factors have no derivative",
                (LOW, numbers(0.0)),
                SolveError,
                r"complete_matrix \(adjoint\)",
                fn=lambda M, mu: torch.func.grad(lambda M: complete_matrix(M, _mask(M), 2).sum())(M),
            ),
        ),
        wrong=(
            Wrong("negative ridge", (MATRICES, numbers(-0.1)), r"ridge: expected at least 0, got -0\.1"),
            Wrong("another shape", (MATRICES[..., :2], numbers(0.1)), r"mask: expected shape \(3, 2\)"),
            Wrong(
                "rank too high",
                (MATRICES, numbers(0.1)),
                "rank: expected between 1 and 3",
                fn=lambda M, mu: complete_matrix(M, _mask(M), 4),
            ),
            Wrong(
                "a mask of numbers",
                (MATRICES, numbers(0.1)),
                "mask: expected a tensor of booleans",
                fn=lambda M, mu: complete_matrix(M, torch.ones_like(M), 1),
            ),
        ),
        tol=1e-7,
        exact_bits=False,
    ),
)

# -------------------------------------------------------------------------------------------------- Jacobian's norm


def _norm(x: Tensor, A: Tensor) -> Tensor:
    """At a small network without matrix products, which autocast would halve."""
    return jacobian_nuclear_norm(lambda z: torch.tanh((A * z.unsqueeze(-2)).sum(-1)), x)


def _singular_values(x: Tensor, A: Tensor) -> Tensor:
    bend = 1 - torch.tanh((A @ x.unsqueeze(-1)).squeeze(-1)) ** 2
    return torch.linalg.svdvals(bend.unsqueeze(-1) * A).sum(-1)


TURN = numbers([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
JACOBIANS: tuple[LayerCase, ...] = (
    LayerCase(
        "jacobian_nuclear_norm",
        _norm,
        (normal(47, 2, 3), normal(48, 2, 3)),
        _singular_values,
        event_ndims=(1, 2),
        source="C. Scarvelis, J. Solomon, Nuclear norm regularization for deep learning, 2024",
        representative=True,
        unrolled=_singular_values,
        hostile=(
            Hostile("repeated singular values", (numbers([0.0, 0.0, 0.0]), TURN)),
            Hostile("zero", (normal(47, 3), 0 * TURN)),
            Hostile("rank deficient", (normal(47, 3), TURN * numbers([1.0, 1.0, 0.0]))),
            Hostile("more outputs than inputs", (normal(47, 2), normal(48, 3, 2))),
            Hostile("huge", (0 * normal(47, 3), 1e9 * TURN)),
            Hostile("tiny", (normal(47, 3), 1e-9 * TURN)),
        ),
        wrong=(
            Wrong(
                "an output without the batch",
                (normal(47, 2, 3), TURN),
                "function: expected an output that begins with the batch",
                fn=lambda x, A: jacobian_nuclear_norm(lambda z: z.sum(0), x),
            ),
        ),
    ),
)

CASES: tuple[LayerCase, ...] = (*CONSISTENCY, *COMPLETIONS, *JACOBIANS)
