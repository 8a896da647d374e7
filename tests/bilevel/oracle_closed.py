"""Bilevel problems whose hypergradient and outer Hessian are written down by hand, in numpy.

Each class holds its data, the two objectives as plain torch functions `(x, y, batch)`, and `exact(x)`: lower solution,
outer value, gradient and Hessian of the outer value from formulas derived on paper (in the class docstrings), which use
no automatic differentiation and nothing of the library.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = Any


class Exact(NamedTuple):
    """Lower solution, outer value, its gradient and Hessian, and the Jacobian dy/dx (d, n)."""

    y: Array
    value: float
    gradient: Array
    hessian: Array
    jacobian: Array


def tensor(a: Array, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.as_tensor(np.asarray(a), dtype=dtype)


def outer(y: Array, C: Array, c: Array, rho: float, x: Array, first: Array, second: Array) -> Exact:
    """F = |C y - c|^2 / 2 + rho |x|^2 / 2 through y(x): `first` is dy/dx (d, n), `second` d2y/dx2 (d, n, n)."""
    g = C.T @ (C @ y - c)
    value = 0.5 * float(np.sum((C @ y - c) ** 2) + rho * np.sum(x**2))
    gradient = first.T @ g + rho * x
    hessian = first.T @ (C.T @ C) @ first + np.einsum("d,dij->ij", g, second) + rho * np.eye(x.size)
    return Exact(y, value, gradient, hessian, first)


@dataclass
class Ridge:
    """f = |A y - b|^2 / 2 + sum_i e^{x_i} y_i^2 / 2, one penalty a feature.

    With M = A^T A + diag(e^x), y = M^{-1} A^T b; M y = const gives M y_i = -E_i y, and once more
    M y_ij = -E_j y_i - E_i y_j - [i = j] E_i y, with E_i = e^{x_i} e_i e_i^T.
    """

    A: Array
    b: Array
    C: Array
    c: Array
    rho: float = 0.1

    @classmethod
    def random(cls, seed: int = 0, m: int = 12, d: int = 5) -> Ridge:
        r = np.random.default_rng(seed)
        return cls(r.normal(size=(m, d)), r.normal(size=m), r.normal(size=(7, d)), r.normal(size=7))

    def exact(self, x: Array) -> Exact:
        e, n = np.exp(x), x.size
        inverse = np.linalg.inv(self.A.T @ self.A + np.diag(e))
        y = np.linalg.solve(self.A.T @ self.A + np.diag(e), self.A.T @ self.b)
        first = -inverse * (e * y)
        second = np.zeros((n, n, n))
        for i in range(n):
            for j in range(n):
                right = np.zeros(n)
                right[j] += e[j] * first[j, i]
                right[i] += e[i] * first[i, j]
                if i == j:
                    right[i] += e[i] * y[i]
                second[:, i, j] = -inverse @ right
        return outer(y, self.C, self.c, self.rho, x, first, second)

    def hessian_yy(self, x: Array) -> Array:
        return self.A.T @ self.A + np.diag(np.exp(x))

    def lower(self, x: Tensor, y: Tensor, batch: Any = None) -> Tensor:
        A, b = tensor(self.A, y.dtype), tensor(self.b, y.dtype)
        return 0.5 * ((A @ y - b) ** 2).sum() + 0.5 * (x.exp() * y**2).sum()

    def upper(self, x: Tensor, y: Tensor, batch: Any = None) -> Tensor:
        C, c = tensor(self.C, y.dtype), tensor(self.c, y.dtype)
        return 0.5 * ((C @ y - c) ** 2).sum() + 0.5 * self.rho * (x**2).sum()


@dataclass
class Logistic:
    """f = sum_k log(1 + exp(-s_k a_k^T y)) / m + sum_i e^{x_i} y_i^2 / 2, solved by Newton to rounding.

    Stationary for all x: H y_i = -E_i y. Once more: H y_ij = -(T[y_j] + E_j) y_i - E_i y_j - [i = j] E_i y with the
    third derivative T[u] = A^T diag(l''' * (A u)) A / m.
    """

    A: Array
    s: Array
    C: Array
    c: Array
    rho: float = 0.1

    @classmethod
    def random(cls, seed: int = 1, m: int = 20, d: int = 4) -> Logistic:
        r = np.random.default_rng(seed)
        A = r.normal(size=(m, d))
        s = np.where(A @ r.normal(size=d) + r.normal(size=m) > 0, 1.0, -1.0)
        return cls(A, s, r.normal(size=(6, d)), r.normal(size=6))

    def solve(self, x: Array) -> Array:
        y, e, m = np.zeros(x.size), np.exp(x), len(self.s)
        for _ in range(60):
            p = 1 / (1 + np.exp(-(self.A @ y)))
            gradient = self.A.T @ (p - (self.s + 1) / 2) / m + e * y
            H = self.A.T @ ((p * (1 - p))[:, None] * self.A) / m + np.diag(e)
            y = y - np.linalg.solve(H, gradient)
        return y

    def exact(self, x: Array) -> Exact:
        e, n, m = np.exp(x), x.size, len(self.s)
        y = self.solve(x)
        p = 1 / (1 + np.exp(-(self.A @ y)))
        second_loss, third_loss = p * (1 - p), p * (1 - p) * (1 - 2 * p)
        inverse = np.linalg.inv(self.A.T @ (second_loss[:, None] * self.A) / m + np.diag(e))
        first = -inverse * (e * y)
        second = np.zeros((n, n, n))
        for i in range(n):
            for j in range(n):
                right = self.A.T @ (third_loss * (self.A @ first[:, j]) * (self.A @ first[:, i])) / m
                right[j] += e[j] * first[j, i]
                right[i] += e[i] * first[i, j]
                if i == j:
                    right[i] += e[i] * y[i]
                second[:, i, j] = -inverse @ right
        return outer(y, self.C, self.c, self.rho, x, first, second)

    def lower(self, x: Tensor, y: Tensor, batch: Any = None) -> Tensor:
        A, s = tensor(self.A, y.dtype), tensor(self.s, y.dtype)
        return torch.nn.functional.softplus(-s * (A @ y)).mean() + 0.5 * (x.exp() * y**2).sum()

    def upper(self, x: Tensor, y: Tensor, batch: Any = None) -> Tensor:
        C, c = tensor(self.C, y.dtype), tensor(self.c, y.dtype)
        return 0.5 * ((C @ y - c) ** 2).sum() + 0.5 * self.rho * (x**2).sum()


@dataclass
class ElasticNet:
    """f + g = |A y - b|^2 / 2 + e^{x_d} |y|^2 / 2 + sum_i e^{x_i} |y_i|, one l1 penalty a feature, one l2 penalty.

    Support S and signs s from cyclic coordinate descent run to a standstill. On S, with M = A_S^T A_S + e^{x_d} I:
    M y = A_S^T b - e^{x_S} s, so M y_j = -e^{x_j} s_j e_j, M y_d = -e^{x_d} y; off S everything is zero.
    """

    A: Array
    b: Array
    C: Array
    c: Array
    rho: float = 0.1

    @classmethod
    def random(cls, seed: int = 2, m: int = 15, d: int = 6) -> ElasticNet:
        r = np.random.default_rng(seed)
        A = r.normal(size=(m, d))
        b = A @ np.array([2.0, -1.5, 1.0] + [0.0] * (d - 3)) + 0.1 * r.normal(size=m)
        return cls(A, b, r.normal(size=(7, d)), r.normal(size=7))

    def solve(self, x: Array) -> Array:
        l1, l2 = np.exp(x[:-1]), np.exp(x[-1])
        y = np.zeros(l1.size)
        for _ in range(20000):
            before = y.copy()
            for i in range(y.size):
                rest = self.b - self.A @ y + self.A[:, i] * y[i]
                u = self.A[:, i] @ rest
                y[i] = np.sign(u) * max(abs(u) - l1[i], 0.0) / (self.A[:, i] @ self.A[:, i] + l2)
            if np.array_equal(before, y):
                break
        return y

    def exact(self, x: Array) -> Exact:
        d, n = x.size - 1, x.size
        e, y = np.exp(x), self.solve(x)
        S = np.flatnonzero(y)
        s = np.sign(y)
        inverse = np.zeros((d, d))
        M = self.A[:, S].T @ self.A[:, S] + e[-1] * np.eye(S.size)
        inverse[np.ix_(S, S)] = np.linalg.inv(M)
        y = inverse @ (self.A.T @ self.b - e[:-1] * s)
        assert (np.sign(y) == s).all()
        slack = e[:-1] - np.abs(self.A.T @ (self.b - self.A @ y))
        assert (np.delete(slack, S) > 1e-3).all() and (np.abs(y[S]) > 1e-3).all(), "degenerate: no derivative"
        first = np.concatenate([-inverse * (e[:-1] * s), -(inverse @ y)[:, None] * e[-1]], axis=1)
        second = np.zeros((d, n, n))
        for i in range(n):
            for j in range(n):
                right = np.zeros(d)
                if j == d:
                    right += e[-1] * first[:, i]
                if i == d:
                    right += e[-1] * first[:, j]
                if i == j:
                    right += e[-1] * y if i == d else e[i] * s[i] * np.eye(d)[i]
                second[:, i, j] = -inverse @ right
        return outer(y, self.C, self.c, self.rho, x, first, second)

    def lower(self, x: Tensor, y: Tensor, batch: Any = None) -> Tensor:
        """The smooth part."""
        A, b = tensor(self.A, y.dtype), tensor(self.b, y.dtype)
        return 0.5 * ((A @ y - b) ** 2).sum() + 0.5 * x[-1].exp() * (y**2).sum()

    def soft(self, u: Tensor, x: Tensor, step: Any) -> Tensor:
        """Prox of step * sum_i e^{x_i} |y_i|."""
        t = step * x[:-1].exp()
        return torch.where(u > t, u - t, torch.where(u < -t, u + t, torch.zeros_like(u)))

    def upper(self, x: Tensor, y: Tensor, batch: Any = None) -> Tensor:
        C, c = tensor(self.C, y.dtype), tensor(self.c, y.dtype)
        return 0.5 * ((C @ y - c) ** 2).sum() + 0.5 * self.rho * (x**2).sum()


@dataclass
class Equality:
    """min 1/2 y^T Q y + sum_i e^{x_i} y_i^2 / 2 - p^T y subject to E y = h + W x.

    The optimality system K (y, l) = (p, h + W x) with K = [[Q + diag(e^x), E^T], [E, 0]] is differentiated by hand:
    K (y_i, l_i) = (-E_i y, W_i), K (y_ij, l_ij) = (-E_j y_i - E_i y_j - [i = j] E_i y, 0).
    """

    Q: Array
    p: Array
    E: Array
    h: Array
    W: Array
    C: Array
    c: Array
    rho: float = 0.1

    @classmethod
    def random(cls, seed: int = 3, d: int = 5, k: int = 2) -> Equality:
        r = np.random.default_rng(seed)
        root = r.normal(size=(d, d))
        Q = root @ root.T / d
        return cls(Q, *(r.normal(size=s) for s in (d, (k, d), k, (k, d), (4, d), 4)))

    def exact(self, x: Array) -> Exact:
        e, d, k = np.exp(x), x.size, len(self.h)
        K = np.block([[self.Q + np.diag(e), self.E.T], [self.E, np.zeros((k, k))]])
        inverse = np.linalg.inv(K)
        y = np.linalg.solve(K, np.concatenate([self.p, self.h + self.W @ x]))[:d]
        first = (inverse @ np.concatenate([-np.diag(e * y), self.W]))[:d]
        second = np.zeros((d, d, d))
        for i in range(d):
            for j in range(d):
                right = np.zeros(d + k)
                right[j] += e[j] * first[j, i]
                right[i] += e[i] * first[i, j]
                if i == j:
                    right[i] += e[i] * y[i]
                second[:, i, j] = -(inverse @ right)[:d]
        return outer(y, self.C, self.c, self.rho, x, first, second)

    def lower(self, x: Tensor, y: Tensor, batch: Any = None) -> Tensor:
        Q, p = tensor(self.Q, y.dtype), tensor(self.p, y.dtype)
        return 0.5 * y @ Q @ y + 0.5 * (x.exp() * y**2).sum() - p @ y

    def constraint(self, x: Tensor, y: Tensor) -> Tensor:
        E, h, W = tensor(self.E, y.dtype), tensor(self.h, y.dtype), tensor(self.W, y.dtype)
        return E @ y - h - W @ x

    def upper(self, x: Tensor, y: Tensor, batch: Any = None) -> Tensor:
        C, c = tensor(self.C, y.dtype), tensor(self.c, y.dtype)
        return 0.5 * ((C @ y - c) ** 2).sum() + 0.5 * self.rho * (x**2).sum()


@dataclass
class Box:
    """min y^T Q y / 2 - (p - x / 10)^T y over |y_i| <= e^{x_i}; F = sum_i sin y_i. x bounds and tilts.

    The 3^d active sets are tried until one satisfies the optimality conditions. On it y_A = e^{x_A} s_A and
    Q_FF y_F = p_F - x_F / 10 - Q_FA y_A, so Q_FF dy_F = -dx_F / 10 - Q_FA (y_A * dx_A).
    """

    Q: Array
    p: Array

    @classmethod
    def random(cls, seed: int = 3, d: int = 4) -> Box:
        r = np.random.default_rng(seed)
        B = r.normal(size=(d + 2, d))
        return cls(B.T @ B + 0.5 * np.eye(d), 3 * r.normal(size=d))

    def exact(self, x: Array) -> tuple[Array, Array, Array]:
        """Solution, gradient of the outer value, and Jacobian."""
        d, tilted = x.size, self.p - 0.1 * x
        for signs in itertools.product((-1.0, 0.0, 1.0), repeat=d):
            s = np.array(signs)
            F, A = np.flatnonzero(s == 0), np.flatnonzero(s)
            y = np.exp(x) * s
            inverse = np.linalg.inv(self.Q[np.ix_(F, F)])
            y[F] = inverse @ (tilted[F] - self.Q[np.ix_(F, A)] @ y[A])
            slope = self.Q @ y - tilted
            if (np.abs(y[F]) < np.exp(x[F])).all() and (slope[A] * s[A] < 0).all():
                J = np.zeros((d, d))
                J[A, A] = y[A]
                J[np.ix_(F, A)] = -inverse @ (self.Q[np.ix_(F, A)] * y[A])
                J[np.ix_(F, F)] = -0.1 * inverse
                return y, J.T @ np.cos(y), J
        raise AssertionError("no active set")

    def lower(self, x: Tensor, y: Tensor, batch: Any = None) -> Tensor:
        return 0.5 * y @ tensor(self.Q, y.dtype) @ y - (tensor(self.p, y.dtype) - 0.1 * x) @ y

    def clamp(self, u: Tensor, x: Tensor, step: Any) -> Tensor:
        """Projection onto the box, whatever the step."""
        return torch.minimum(torch.maximum(u, -x.exp()), x.exp())

    def upper(self, x: Tensor, y: Tensor, batch: Any = None) -> Tensor:
        return y.sin().sum()


def neumann(H: Array, g: Array, alpha: float, terms: int) -> Array:
    """alpha * sum_{j < terms} (I - alpha H)^j g, summed by powers of the dense matrix."""
    step = np.eye(len(H)) - alpha * H
    return alpha * sum(np.linalg.matrix_power(step, j) @ g for j in range(terms))


def unrolled(problem: Ridge, x: Array, y: Array, alpha: float, steps: int) -> Array:
    """d/dx of F(x, y_T), `steps` gradient-descent steps from the constant y, by the tangent recursion of Ridge."""
    e = np.exp(x)
    H = problem.hessian_yy(x)
    tangent = np.zeros((y.size, x.size))
    for _ in range(steps):
        tangent = tangent - alpha * (H @ tangent + np.diag(e * y))
        y = y - alpha * (H @ y - problem.A.T @ problem.b)
    g = problem.C.T @ (problem.C @ y - problem.c)
    return tangent.T @ g + problem.rho * x


def bound(problem: Ridge, x: Array, y: Array, gradient_norm: float, residual: float) -> float:
    """The bound of section 0 for Ridge: H does not depend on y, J = diag(e^x y), so L_H = 0 and L_J = max e^x."""
    e = np.exp(x)
    mu = np.linalg.eigvalsh(problem.hessian_yy(x))[0]
    epsilon = gradient_norm / mu
    norm_J, lip_J = np.max(np.abs(e * y)), np.max(e)
    lip_F = np.linalg.norm(problem.C.T @ problem.C, 2)
    g = np.linalg.norm(problem.C.T @ (problem.C @ y - problem.c))
    omega = (lip_F * norm_J / mu + lip_J * g / mu) * epsilon
    return float(omega + norm_J / mu * residual + lip_J * lip_F / mu * epsilon**2)
