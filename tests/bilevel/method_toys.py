"""Bilevel problems with known solutions, in numpy: what the single-loop methods have to reach.

Derived on paper. Nothing here uses the library or automatic differentiation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.bilevel import Bilevel

Array = Any


def tensor(a: Array) -> Tensor:
    return torch.as_tensor(np.asarray(a), dtype=torch.float64)


@dataclass
class Quadratic:
    """T4: f = y'Hy/2 - y'Bx, F = |Ay - t|^2/2 + rho |x|^2/2.

    y*(x) = H^{-1} B x, so with S = A H^{-1} B the optimum solves (S'S + rho) x = S't.
    With a penalty lam, min_y F + lam f is at y = (A'A + lam H)^{-1} (A't + lam B x), and the hypergradient
    rho x + lam (-B'y + B'z), z = H^{-1} B x, is affine in x: its zero is the solution of the penalised problem.
    """

    H: Array
    B: Array
    A: Array
    t: Array
    rho: float

    @classmethod
    def random(cls, seed: int = 0, n: int = 3, d: int = 4, rho: float = 0.3) -> Quadratic:
        r = np.random.default_rng(seed)
        q, _ = np.linalg.qr(r.normal(size=(d, d)))
        H = q @ np.diag(np.linspace(0.6, 1.4, d)) @ q.T
        A, _ = np.linalg.qr(r.normal(size=(d, d)))
        return cls(H, r.normal(size=(d, n)) / 2, A, r.normal(size=d), rho)

    @property
    def optimum(self) -> tuple[Array, Array]:
        S = self.A @ np.linalg.solve(self.H, self.B)
        x = np.linalg.solve(S.T @ S + self.rho * np.eye(S.shape[1]), S.T @ self.t)
        return x, np.linalg.solve(self.H, self.B @ x)

    def hypergradient(self, x: Array) -> Array:
        S = self.A @ np.linalg.solve(self.H, self.B)
        return S.T @ (S @ x - self.t) + self.rho * x

    def penalised_y(self, x: Array, lam: float) -> Array:
        return np.linalg.solve(self.A.T @ self.A + lam * self.H, self.A.T @ self.t + lam * self.B @ x)

    def penalised_gradient(self, x: Array, lam: float) -> Array:
        z = np.linalg.solve(self.H, self.B @ x)
        return self.rho * x - lam * self.B.T @ (self.penalised_y(x, lam) - z)

    def penalised_optimum(self, lam: float) -> tuple[Array, Array]:
        n = self.B.shape[1]
        zero = self.penalised_gradient(np.zeros(n), lam)
        M = np.stack([self.penalised_gradient(e, lam) - zero for e in np.eye(n)], axis=1)
        x = np.linalg.solve(M, -zero)
        return x, self.penalised_y(x, lam)

    # gradients by hand, for one update written out in numpy
    def upper_x(self, x: Array, y: Array) -> Array:
        return self.rho * x

    def upper_y(self, x: Array, y: Array) -> Array:
        return self.A.T @ (self.A @ y - self.t)

    def lower_x(self, x: Array, y: Array) -> Array:
        return -self.B.T @ y

    def lower_y(self, x: Array, y: Array) -> Array:
        return self.H @ y - self.B @ x

    def upper_value(self, x: Array, y: Array) -> float:
        return float(0.5 * np.sum((self.A @ y - self.t) ** 2) + 0.5 * self.rho * np.sum(x**2))

    def lower_value(self, x: Array, y: Array) -> float:
        return float(0.5 * y @ self.H @ y - y @ self.B @ x)

    def problem(self, **options: Any) -> Bilevel:
        H, B, A, t = (tensor(a) for a in (self.H, self.B, self.A, self.t))

        def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
            return 0.5 * (A @ y - t).square().sum() + 0.5 * self.rho * x.square().sum()

        def lower(x: Tensor, y: Tensor, batch: Any) -> Tensor:
            return 0.5 * y @ H @ y - y @ B @ x

        return Bilevel(upper, lower, **options)


def convex_not_strongly(n: int, **options: Any) -> Bilevel:
    """T1: F = |x - y2|^2/2 + |y1 - 1|^2/2, f = |y1|^2/2 - x'y1.

    Lower solutions are y1 = x with any y2, so F = 0 at x = y1 = y2 = 1 and nowhere else.
    """

    def upper(x: Tensor, y: tuple[Tensor, Tensor], batch: Any) -> Tensor:
        return 0.5 * (x - y[1]).square().sum() + 0.5 * (y[0] - 1).square().sum()

    def lower(x: Tensor, y: tuple[Tensor, Tensor], batch: Any) -> Tensor:
        return 0.5 * y[0].square().sum() - x @ y[0]

    return Bilevel(upper, lower, **options)


@dataclass
class Sine:
    """T2: F = (x - a)^2 + |y - a - c|^2, f = sum sin(x + y_i - c_i): a lower objective that is not convex.

    Its minima are the branches y_i = C + c_i - x with C = 2 pi k - pi/2. On one of them
    Phi(x) = (x - a)^2 + n (C - x - a)^2, least at x = ((1 - n) a + n C) / (1 + n); the best C is nearest 2 a.
    """

    a: float
    c: Array

    @property
    def optimum(self) -> tuple[float, Array]:
        n = self.c.size
        C = min((2 * np.pi * k - np.pi / 2 for k in range(-9, 10)), key=lambda C: abs(C - 2 * self.a))
        x = ((1 - n) * self.a + n * C) / (1 + n)
        return x, C + self.c - x

    def problem(self) -> Bilevel:
        c = tensor(self.c)

        def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
            return (x - self.a).square() + (y - self.a - c).square().sum()

        def lower(x: Tensor, y: Tensor, batch: Any) -> Tensor:
            return torch.sin(x + y - c).sum()

        return Bilevel(upper, lower)


STARTS = (0, 1, 2)


def start(seed: int, *sizes: int, scale: float = 2.0) -> list[Tensor]:
    r = np.random.default_rng(100 + seed)
    return [tensor(scale * r.normal(size=n)) for n in sizes]


def moreau_optimum(q: Quadratic, c: float, gamma: float) -> tuple[Array, Array]:
    """Stationary point of F / c + f - v_gamma on T4: linear in (x, y), theta = (H + I/gamma)^{-1} (B x + y / gamma)."""
    d, n = q.B.shape
    eye = np.eye(d)
    M = np.linalg.inv(q.H + eye / gamma)
    theta_x, theta_y = M @ q.B, M / gamma
    K = np.block(
        [
            [q.rho * np.eye(n) / c + q.B.T @ theta_x, -q.B.T @ (eye - theta_y)],
            [-q.B + theta_x / gamma, q.A.T @ q.A / c + q.H - (eye - theta_y) / gamma],
        ]
    )
    xy = np.linalg.solve(K, np.concatenate([np.zeros(n), q.A.T @ q.t / c]))
    return xy[:n], xy[n:]


def gradient_penalty_optimum(q: Quadratic, gamma: float) -> tuple[Array, Array]:
    """Stationary point of F + gamma |r|^2 on T4, r = H y - B x: rho x = 2 gamma B'r, A'(A y - t) + 2 gamma H r = 0."""
    n = q.B.shape[1]
    K = np.block(
        [
            [q.rho * np.eye(n) + 2 * gamma * q.B.T @ q.B, -2 * gamma * q.B.T @ q.H],
            [-2 * gamma * q.H @ q.B, q.A.T @ q.A + 2 * gamma * q.H @ q.H],
        ]
    )
    xy = np.linalg.solve(K, np.concatenate([np.zeros(n), q.A.T @ q.t]))
    return xy[:n], xy[n:]


def mixed_optimum(q: Quadratic, mu: float) -> tuple[Array, Array]:
    """min_x F(x, y(x)) on T4 with y = argmin mu F + (1 - mu) f = a + W x: normal equations of A (a + W x) = t."""
    M = mu * q.A.T @ q.A + (1 - mu) * q.H
    a, W = np.linalg.solve(M, mu * q.A.T @ q.t), np.linalg.solve(M, (1 - mu) * q.B)
    x = np.linalg.solve(W.T @ q.A.T @ q.A @ W + q.rho * np.eye(W.shape[1]), W.T @ q.A.T @ (q.t - q.A @ a))
    return x, a + W @ x


def coupled(n: int, factor: float = 1.0) -> Bilevel:
    """T3: T1 with f + sum y2 and sum(x + y1 + y2) = 0, whose row may be multiplied by a factor.

    The lower multiplier is -1, y1 = x + 1, and the upper problem is the least of |x - y2|^2 / 2 + |x|^2 / 2 with
    2 x + y2 = -1 in the mean: x = -0.3, y1 = 0.7, y2 = -0.4, all components alike.
    """

    def upper(x: Tensor, y: tuple[Tensor, Tensor], batch: Any) -> Tensor:
        return 0.5 * (x - y[1]).square().sum() + 0.5 * (y[0] - 1).square().sum()

    def lower(x: Tensor, y: tuple[Tensor, Tensor], batch: Any) -> Tensor:
        return 0.5 * y[0].square().sum() - x @ y[0] + y[1].sum()

    def constraint(x: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
        return factor * (x.sum() + y[0].sum() + y[1].sum())

    return Bilevel(upper, lower, constraint=constraint, equality=True)


def coupled_penalised(c: float, gamma: float) -> Array:
    """Stationary point of F / c + f - v on T3, one component: (x, y1, y2, theta1, theta2, nu, kappa).

    theta solves its saddle point (z = lambda there), (x, y) is stationary up to kappa times the normal (1, 1, 1).
    """
    g, e = 1 / gamma, 1 / c
    K = np.array(
        [
            [-1, -g, 0, 1 + g, 0, 1, 0],  # theta1 - x + nu + (theta1 - y1) / gamma = 0
            [0, 0, -g, 0, g, 1, 0],  # 1 + nu + (theta2 - y2) / gamma = 0
            [1, 0, 0, 1, 1, 0, 0],  # x + theta1 + theta2 = 0
            [e, -1, -e, 1, 0, -1, 1],  # (x - y2) / c - y1 + theta1 - nu + kappa = 0
            [-1, e + 1 - g, 0, g, 0, 0, 1],  # (y1 - 1) / c + y1 - x - (y1 - theta1) / gamma + kappa = 0
            [-e, 0, e - g, 0, g, 0, 1],  # -(x - y2) / c + 1 - (y2 - theta2) / gamma + kappa = 0
            [1, 1, 1, 0, 0, 0, 0],  # x + y1 + y2 = 0
        ]
    )
    return np.linalg.solve(K, np.array([0, -1, 0, 0, e, -1, 0.0]))
