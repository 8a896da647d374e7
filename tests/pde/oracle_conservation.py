"""Posterior of a Gaussian under linear observations, in mpmath with fifty digits, by conditioning a joint Gaussian.

Not the gain formula: the precision form for a noise above 0 and a regular covariance, (S^-1 + G^T G / noise)^-1; the
conditional distribution of a joint Gaussian by elimination otherwise. Derivatives by central differences.
"""

from __future__ import annotations

from typing import Any

import mpmath as mp
import torch
from torch import Tensor

DIGITS = 50


def exact(x: Tensor) -> Any:
    x = x if x.ndim == 2 else x.reshape(-1, 1)
    return mp.matrix(x.tolist())


def back(x: Any) -> Tensor:
    return torch.tensor([[float(one) for one in row] for row in x.tolist()], dtype=torch.float64)


def posterior(mean: Any, covariance: Any, b: Any, G: Any, noise: Any) -> tuple[Any, Any]:
    """Mean and covariance given G u + e = b, by eliminating the observation from the joint covariance

    [[P, G S], [S G^T, S]], one Gaussian elimination step an observation, with dependent rows dropped where the pivot
    vanishes (a consistent system says nothing new there).
    """
    with mp.workdps(DIGITS):
        m, n = G.rows, G.cols
        P = G * covariance * G.T + noise * mp.eye(m)
        joint = mp.zeros(m + n)
        cross = G * covariance
        for i in range(m):
            for j in range(m):
                joint[i, j] = P[i, j]
            for j in range(n):
                joint[i, m + j] = joint[m + j, i] = cross[i, j]
        for i in range(n):
            for j in range(n):
                joint[m + i, m + j] = covariance[i, j]
        misfit = b - G * mean
        shift = mp.zeros(m + n, 1)
        for i in range(m):
            shift[i] = misfit[i]
        for i in range(m):  # condition on observation i; shift holds what is still missing, and the shift of u
            pivot = joint[i, i]
            if abs(pivot) < mp.mpf(10) ** (-30):
                continue
            gain = [joint[k, i] / pivot for k in range(m + n)]
            missing = shift[i]
            for k in range(i + 1, m + n):
                shift[k] = shift[k] + gain[k] * missing * (-1 if k < m else 1)
                for j in range(i + 1, m + n):
                    joint[k, j] = joint[k, j] - gain[k] * joint[i, j]
        after = mp.matrix(n, n)
        for i in range(n):
            for j in range(n):
                after[i, j] = joint[m + i, m + j]
        return mean + shift[m:, 0], after


def precision_form(mean: Any, covariance: Any, b: Any, G: Any, noise: Any) -> tuple[Any, Any]:
    with mp.workdps(DIGITS):
        inverse = mp.inverse(covariance)
        after = mp.inverse(inverse + G.T * G / noise)
        return after * (inverse * mean + G.T * b / noise), after


def along(arguments: list[Any], directions: list[Any], order: int = 1) -> tuple[Any, Any]:
    """Derivative of the posterior along a direction of (mean, covariance, b, G, noise)."""
    with mp.workdps(DIGITS):
        h = mp.mpf(10) ** (-DIGITS // (order + 3))
        moved = [
            posterior(*(a + sign * h * d for a, d in zip(arguments, directions, strict=True))) for sign in (1, 0, -1)
        ]
        if order == 1:
            return tuple((a - b) / (2 * h) for a, b in zip(moved[0], moved[2], strict=True))  # type: ignore[return-value]
        return tuple((a - 2 * c + b) / h**2 for a, c, b in zip(*moved, strict=True))  # type: ignore[return-value]
