"""Cases of conservation laws imposed on a prediction."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from difflayers import SolveError
from difflayers._solution import Solution
from difflayers.pde import (
    Conservation,
    conservation_operator,
    conserve,
    conserve_ex,
    conserved_log_likelihood,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

__all__ = ["CASES"]

SOURCE = "D. Hansen and others, Learning Physical Models that Can Respect Conservation Laws, 2023"
MEAN, VARIANCE, B = normal(70, 2, 3), normal(71, 2, 3).abs() + 0.3, normal(72, 2, 2)
ROWS, NOISE = numbers([[0.5, 1.0, 0.5], [0.2, -0.4, 1.3]]), numbers(0.7)
SMALL, ROW, MASS = MEAN[:, :2], numbers([[0.5, 1.5]]), B[:, :1]
MATRIX = numbers([[[1.5, 0.4], [0.4, 0.8]], [[0.6, -0.3], [-0.3, 1.1]]])
GRID = numbers([[0.0, 0.4, 1.1, 1.5], [-1.0, 0.2, 0.3, 2.0]])


# ------------------------------------------------------------------------------------------------------------ oracles


def _dense(covariance: np.ndarray) -> np.ndarray:
    return np.diag(covariance) if covariance.ndim == 1 else (covariance + covariance.T) / 2


def _bordered(mean: Any, covariance: Any, b: Any, G: Any, noise: Any = 0.0) -> np.ndarray:
    """The saddle-point system of the inner problem, column by column; no inner matrix is formed."""
    S, m, n = _dense(covariance), len(G), len(mean)
    K = np.block([[np.eye(n), S @ G.T], [G, -noise * np.eye(m)]])
    right = np.block([[mean[:, None], S], [b[:, None], np.zeros((m, n))]])
    found = np.linalg.solve(K, right)[:n]
    left = found[:, 1:]
    return np.concatenate([found[:, 0], np.diag(left) if covariance.ndim == 1 else left.ravel()])


def _density(u: Any, mean: Any, covariance: Any, b: Any, G: Any, noise: Any = None) -> np.ndarray:
    """Of the posterior itself; with exact rows, in coordinates of the fields that satisfy them, where `u` must be."""
    S, n, scale = _dense(covariance), len(mean), 0.0
    found = _bordered(mean, S, b, G, 0.0 if noise is None else noise)
    far, left = u - found[:n], found[n:].reshape(n, n)
    if noise is None:
        _, singular, V = np.linalg.svd(G)
        basis, scale = V[len(G) :].T, np.log(singular).sum()  # a constant of G
        far, left = far @ basis, basis.T @ left @ basis
    form = far @ np.linalg.solve(left, far)
    return np.asarray(scale - (form + np.linalg.slogdet(left)[1] + len(far) * np.log(2 * np.pi)) / 2)


def _weights(grid: np.ndarray) -> np.ndarray:
    """Integrals of the hat functions."""
    return np.array([[np.trapezoid(unit, grid) for unit in np.eye(len(grid))]])


# ------------------------------------------------------------------------------------------------------------- cases


def _joined(mean: Tensor, covariance: Tensor, b: Tensor, G: Tensor, *noise: Tensor, **options: Any) -> Tensor:
    """Mean and covariance in one vector."""
    return _vector(conserve(mean, covariance, b, G, *noise, **options))


def _vector(pair: tuple[Tensor, Tensor]) -> Tensor:
    mean, covariance = pair
    return torch.cat([mean, covariance if covariance.ndim == mean.ndim else covariance.flatten(-2)], -1)


def _solution(*args: Tensor) -> Solution[Tensor]:
    found = conserve_ex(*args)
    return Solution(_vector(found.value), found.status, found.steps, found.residual)


def _tolerant(*args: Tensor) -> Tensor:
    return _joined(*args, on_failure="nan")


def _rows_hold(value: Tensor, mean: Tensor, covariance: Tensor, b: Tensor, G: Tensor) -> Tensor:
    """``G mean = b`` and ``G covariance = 0``, with exact rows and a full covariance."""
    n = mean.shape[-1]
    left = value[..., n:].unflatten(-1, (n, n))
    return torch.cat([value[..., :n] @ G.mT - b, (G @ left).flatten(-2)], -1)


class _Vector(nn.Module):
    """The module with rows that learn, and its two results in one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Conservation(nn.Parameter(ROWS.clone()), 0.7)

    def forward(self, mean: Tensor, variance: Tensor, b: Tensor) -> Tensor:
        """Mean and variance."""
        return _vector(self.layer(mean, variance, b))


def _layer(like: Tensor, *args: Tensor) -> Tensor:
    return _vector(Conservation(ROWS.to(like), 0.7)(*args))


_PRODUCTS = {"autocast_of_backward": "products with G are plain torch, which autocast halves in backward"}
_WRONG = (
    Wrong("rows", (MEAN, VARIANCE, B, ROWS[:1], NOISE), r"G: expected shape \(2, 3\).*got \(1, 3\)"),
    Wrong("variance", (MEAN, VARIANCE[:, :2], B, ROWS, NOISE), r"covariance: expected shape .*got \(2, 2\)"),
    Wrong("no vector", (MEAN, VARIANCE, B[0, 0], ROWS, NOISE), "b: expected at least 1 dimension"),
)
_DEPENDENT = torch.cat([ROW, 2 * ROW])
_common: dict[str, Any] = {"source": SOURCE, "tolerant": _tolerant, "solution": _solution, "exact_bits": False}

CASES: tuple[LayerCase, ...] = (
    LayerCase(
        "conserve diagonal, with noise",
        _joined,
        (MEAN, VARIANCE, B, ROWS, NOISE),
        oracle=per_element(_bordered, (1, 1, 1, 2, 0)),
        event_ndims=(1, 1, 1, 2, 0),
        names=("mean", "covariance", "b", "G", "noise"),
        representative=True,
        hostile=(
            Hostile("dependent rows", (MEAN, VARIANCE, B, ROWS[:1].expand(2, 3), NOISE)),
            Hostile("no variance", (MEAN, 0 * VARIANCE, B, ROWS, NOISE)),
            Hostile("nothing to integrate", (MEAN, VARIANCE, B, 0 * ROWS, NOISE)),
            Hostile("huge variance", (MEAN, 1e9 * VARIANCE, B, ROWS, NOISE), may_fail=True),
            Hostile("tiny variance", (MEAN, 1e-9 * VARIANCE, B, ROWS, 1e-9 * NOISE)),
            Hostile("a negative variance", (MEAN, -VARIANCE, B, ROWS, NOISE), ValueError, "covariance: expected varia"),
            Hostile("a negative noise", (MEAN, VARIANCE, B, ROWS, -NOISE), ValueError, "noise: expected variances of"),
        ),
        wrong=_WRONG,
        **_common,
    ),
    LayerCase(
        "conserve full, exact",
        _joined,
        (SMALL, MATRIX, MASS, ROW),
        oracle=per_element(_bordered, (1, 2, 1, 2)),
        invariants=(_rows_hold,),
        event_ndims=(1, 2, 1, 2),
        names=("mean", "covariance", "b", "G"),
        hostile=(
            Hostile(
                "dependent rows", (SMALL, MATRIX, B, _DEPENDENT), SolveError, "conserve .*SINGULAR: .a. dependent rows"
            ),
            Hostile("no variance", (SMALL, 0 * MATRIX, MASS, ROW), SolveError, "conserve .*SINGULAR"),
            Hostile("not symmetric", (SMALL, MATRIX + numbers([[0.0, 0.2], [0.0, 0.0]]), MASS, ROW)),
            Hostile("no freedom left", (SMALL, MATRIX, B, numbers([[1.0, 0.0], [0.5, 1.0]]))),
            Hostile("huge variance", (SMALL, 1e9 * MATRIX, MASS, ROW)),
            Hostile("tiny rows", (SMALL, MATRIX, 1e-9 * MASS, 1e-9 * ROW)),
        ),
        wrong=(Wrong("matrix", (SMALL, MATRIX[..., :1], MASS, ROW), r"covariance: expected shape .*got \(2, 2, 1\)"),),
        **_common,
    ),
    LayerCase(
        "Conservation",
        lambda mean, variance, b: _layer(b if b.is_floating_point() else B, mean, variance, b),
        (MEAN, VARIANCE, B),
        oracle=per_element(lambda mean, variance, b: _bordered(mean, variance, b, ROWS.numpy(), 0.7), (1, 1, 1)),
        event_ndims=(1, 1, 1),
        names=("mean", "covariance", "b"),
        representative=True,
        make_module=_Vector,
        module_inputs=(MEAN, VARIANCE, B),
        source=SOURCE,
    ),
    LayerCase(
        "conserved_log_likelihood diagonal, with noise",
        conserved_log_likelihood,
        (SMALL, MEAN[:, 1:], VARIANCE[:, :2], MASS, ROW, NOISE),
        oracle=per_element(_density, (1, 1, 1, 1, 2, 0)),
        event_ndims=(1, 1, 1, 1, 2, 0),
        representative=True,
        exact_bits=False,
        exempt=_PRODUCTS,
        source=SOURCE,
    ),
    LayerCase(
        "conserved_log_likelihood full, exact",
        conserved_log_likelihood,
        (SMALL, MEAN[:, 1:], MATRIX, SMALL @ ROW.mT, ROW),
        oracle=per_element(_density, (1, 1, 2, 1, 2)),
        event_ndims=(1, 1, 2, 1, 2),
        exact_bits=False,
        exempt=_PRODUCTS,
        source=SOURCE,
    ),
    LayerCase(
        "conservation_operator",
        conservation_operator,
        (GRID,),
        oracle=per_element(_weights, (1,)),
        event_ndims=(1,),
        representative=True,
        wrong=(
            Wrong("one point", (GRID[:, :1],), "grid: expected at least 2 points, got 1"),
            Wrong("points that fall", (GRID.flip(-1),), "grid: expected increasing points, got a step of -"),
        ),
        source=SOURCE,
    ),
)
