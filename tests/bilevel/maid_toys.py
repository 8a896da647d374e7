"""Logistic regression with one ridge per feature, in numpy: all constants of its error bound, and its hypergradient.

Derived on paper. Nothing here uses the library or automatic differentiation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.bilevel import Bilevel, Smoothness
from tests.bilevel.method_toys import Quadratic, tensor

Array = Any


def sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


class Logistic:
    """f = mean log(1 + exp(-a_i'y)) + sum e^x_j y_j^2 / 2 and F = mean log(1 + exp(-b_i'y)), labels in a and b.

    sigmoid' <= 1/4 and |sigmoid''| <= 1 / (6 sqrt 3) =: k, so that with A = U_a'U_a / m and s = largest |a_i|:
    mu = min e^x, Lipschitz constant of grad F: |B| / 4, of H: k s |A|; J = diag(e^x y), of norm max |e^x_j y_j|, whose
    Lipschitz constant is max e^x.
    """

    def __init__(self, seed: int, d: int = 5) -> None:
        r = np.random.default_rng(seed)
        truth = r.normal(size=d)
        self.a, self.b = (
            m * np.sign(m @ truth + r.normal(size=m.shape[0]))[:, None] for m in r.normal(size=(2, 30, d))
        )

    def slope(self, x: Array, y: Array) -> Array:
        return -self.a.T @ sigmoid(-self.a @ y) / len(self.a) + np.exp(x) * y

    def hessian(self, x: Array, y: Array) -> Array:
        s = sigmoid(self.a @ y)
        return (self.a.T * (s * (1 - s))) @ self.a / len(self.a) + np.diag(np.exp(x))

    def cross(self, x: Array, y: Array) -> Array:
        return np.diag(np.exp(x) * y)

    def upper_y(self, y: Array) -> Array:
        return -self.b.T @ sigmoid(-self.b @ y) / len(self.b)

    def upper_value(self, y: Array) -> float:
        return float(np.log1p(np.exp(-self.b @ y)).mean())

    def solution(self, x: Array) -> Array:
        y = np.zeros(x.size)
        for _ in range(50):
            y = y - np.linalg.solve(self.hessian(x, y), self.slope(x, y))
        assert np.abs(self.slope(x, y)).max() < 1e-13
        return y

    def hypergradient(self, x: Array) -> Array:
        y = self.solution(x)
        return -self.cross(x, y) @ np.linalg.solve(self.hessian(x, y), self.upper_y(y))

    def constants(self, x: Array, y: Array) -> dict[str, float]:
        m = len(self.a)
        longest = np.linalg.norm(self.a, axis=1).max()
        return {
            "strong_convexity": np.exp(x).min(),
            "upper": np.linalg.norm(self.b, 2) ** 2 / m / 4,
            "upper_in_x": 0.0,
            "hessian": longest * np.linalg.norm(self.a, 2) ** 2 / m / (6 * 3**0.5),
            "cross": np.exp(x).max(),
            "cross_norm": np.abs(np.exp(x) * y).max(),
        }

    def smoothness(self) -> Smoothness:
        def constant(name: str) -> Any:
            return lambda x, y: float(self.constants(x.numpy(), y.numpy())[name])

        return Smoothness(**{name: constant(name) for name in self.constants(np.zeros(5), np.zeros(5))})

    def problem(self) -> Bilevel:
        a, b = tensor(self.a), tensor(self.b)

        def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
            return torch.nn.functional.softplus(-b @ y).mean()

        def lower(x: Tensor, y: Tensor, batch: Any) -> Tensor:
            return torch.nn.functional.softplus(-a @ y).mean() + (x.exp() * y.square()).sum() / 2

        return Bilevel(upper, lower)


def quadratic_smoothness(q: Quadratic) -> Smoothness:
    """Of T4: H, J = -B' and the upper Hessian A'A are constant."""
    return Smoothness(
        strong_convexity=float(np.linalg.eigvalsh(q.H)[0]),
        upper=float(np.linalg.norm(q.A, 2) ** 2),
        upper_in_x=0.0,
        hessian=0.0,
        cross=0.0,
        cross_norm=float(np.linalg.norm(q.B, 2)),
    )


def quadratic_value(q: Quadratic, x: Array) -> float:
    """Phi of T4."""
    return q.upper_value(x, np.linalg.solve(q.H, q.B @ x))
