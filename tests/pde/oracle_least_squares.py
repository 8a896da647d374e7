"""Brute force for residual least squares: dense, by automatic differentiation of the plain objective, and by mpmath.

Written from the mathematics alone. Two independent routes:

* `Dense` (torch, one problem, no batch): the objective is written out, the minimiser comes from scipy or from Newton's
  method on the Karush-Kuhn-Tucker conditions, and the cotangents from the implicit function theorem with dense
  Jacobians of these conditions by automatic differentiation.
* `Digits` (mpmath, 50 digits): residuals with their first two derivatives written by hand, Newton's method on the same
  conditions, and derivatives by central differences of the problem solved again, which are exact to 15 digits and more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath as mp
import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor
from torch.func import hessian, jacrev

Data = dict[str, Tensor]
Residual = Callable[[Tensor, Any], Tensor]
F64 = torch.float64


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def leaves(data: Data) -> Data:
    return {name: value.clone().requires_grad_() for name, value in data.items()}


def deviation(mine: Tensor, right: Tensor) -> float:
    """Relative, with a floor for what is nearly zero."""
    return float((mine.detach() - right.detach()).norm() / (1e-3 + right.detach().norm()))


class Program:
    """argmin_w f(w; data) subject to c(w; data) = 0, and its derivatives by the implicit function theorem, dense."""

    def __init__(
        self,
        objective: Callable[[Tensor, Data], Tensor],
        equality: Callable[[Tensor, Data], Tensor] | None,
        data: Data,
        K: int,
    ) -> None:
        self.objective, self.equality, self.data, self.K = objective, equality, data, K

    def conditions(self, v: Tensor, data: Data) -> Tensor:
        """Gradient of the Lagrangian, and the equalities; v holds coefficients and multipliers."""
        w, nu = v[: self.K], v[self.K :]
        g = torch.func.grad(self.objective)(w, data)
        if self.equality is None:
            return g
        c, pull = torch.func.vjp(lambda w: self.equality(w, data), w)  # type: ignore[misc]
        return torch.cat([g + pull(nu)[0], c])

    def polish(self, w: Tensor, steps: int = 60) -> Tensor:
        """Newton's method on the conditions, from near by; returns coefficients and multipliers."""
        v = w
        if self.equality is not None:
            C = jacrev(self.equality)(w, self.data)
            g = torch.func.grad(self.objective)(w, self.data)
            v = torch.cat([w, torch.linalg.lstsq(C.T, -g[:, None]).solution[:, 0]])
        best, norm = v, torch.tensor(torch.inf)
        for _ in range(steps):
            g = self.conditions(v, self.data)
            if not g.norm() < norm:
                break
            best, norm = v, g.norm()
            v = v - torch.linalg.solve(jacrev(self.conditions)(v, self.data), g)
        return best

    def pull(self, z: Tensor, v: Tensor) -> Data:
        """-z^T dG/ddata."""
        _, pull = torch.func.vjp(lambda data: self.conditions(v, data), self.data)
        return {name: -cotangent for name, cotangent in pull(z)[0].items()}

    def cotangents(self, v: Tensor, bar: Tensor) -> Data:
        """Cotangents of the data from one on the coefficients (and multipliers, if it is as long as v)."""
        bar = torch.cat([bar, bar.new_zeros(len(v) - len(bar))])
        return self.pull(torch.linalg.solve(jacrev(self.conditions)(v, self.data).T, bar), v)

    def curvature(self, w: Tensor) -> Tensor:
        """The Hessian of the objective."""
        return hessian(self.objective)(w, self.data)

    def null(self, w: Tensor) -> Tensor:
        """Orthonormal directions in which the equalities leave w free."""
        if self.equality is None:
            return torch.eye(self.K, dtype=F64)
        C = jacrev(self.equality)(w, self.data)
        return torch.linalg.svd(C, full_matrices=True).Vh[len(C) :].T


class Dense(Program):
    """The fit of section 1.4. `data` holds basis (N, T, K) and, where wanted, offset, weights, A, y, t, C, d, ridge and
    center; all other entries are parameters of the residual."""

    OWN = ("basis", "offset", "weights", "A", "y", "t", "C", "d", "ridge", "center")

    def __init__(self, residual: Residual, data: Data) -> None:
        self.residual = residual
        equality = (lambda w, data: data["C"] @ w - data["d"]) if "C" in data else None
        super().__init__(self.value, equality, data, data["basis"].shape[-1])

    def rows(self, w: Tensor, data: Data) -> Tensor:
        """All weighted residuals but those of the ridge."""
        T = torch.einsum("ntk,k->nt", data["basis"], w)
        if "offset" in data:
            T = T + data["offset"]
        F = self.residual(T, {name: value for name, value in data.items() if name not in self.OWN})
        F = F.reshape(len(T), -1)
        if "weights" in data:
            F = F * data["weights"][:, None]
        pieces = [F.reshape(-1)]
        if "A" in data:
            pieces.append((data["A"] @ w - data["y"]) * data.get("t", torch.ones_like(data["y"])))
        return torch.cat(pieces)

    def value(self, w: Tensor, data: Data) -> Tensor:
        value = 0.5 * self.rows(w, data).square().sum()
        if "ridge" in data:
            value = value + 0.5 * data["ridge"] * (w - data.get("center", torch.zeros_like(w))).square().sum()
        return value

    def scipy(self, start: Tensor) -> Tensor:
        """scipy.optimize.least_squares at the end of its digits; the equalities by a basis of their null space."""
        data, particular = self.data, torch.zeros(self.K, dtype=F64)
        if "C" in data:
            particular = torch.linalg.pinv(data["C"]) @ data["d"]
        null = self.null(particular)

        def everything(z: Tensor) -> Tensor:
            w = particular + null @ z
            rows = self.rows(w, data)
            if "ridge" in data:
                rows = torch.cat([rows, data["ridge"].sqrt() * (w - data.get("center", torch.zeros_like(w)))])
            return rows

        found = least_squares(
            lambda z: everything(torch.tensor(z)).numpy(),
            (null.T @ (start - particular)).numpy().round(12),  # a start of 1e-17 gives a trust region of that size
            jac=lambda z: jacrev(everything)(torch.tensor(z)).numpy(),
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
            max_nfev=2000,
        )
        return particular + null @ torch.tensor(found.x)

    def gauss_newton_cotangents(self, v: Tensor, bar: Tensor) -> Data:
        """What comes out where the curvature of the residual is left out of the Hessian, and of the Hessian alone."""
        J = jacrev(self.rows)(v[: self.K], self.data)
        H = jacrev(self.conditions)(v, self.data)
        H[: self.K, : self.K] = J.T @ J
        if "ridge" in self.data:
            H[: self.K, : self.K] += self.data["ridge"] * torch.eye(self.K, dtype=F64)
        return self.pull(torch.linalg.solve(H.T, torch.cat([bar, bar.new_zeros(len(v) - self.K)])), v)


# ------------------------------------------------------------------------------------------------------- fifty digits

Jet = list[tuple[Any, list[Any], list[list[Any]]]]  # for each equation: F, its gradient and its Hessian by the terms


class Digits:
    """The same problem in mpmath. `jet(T, p)` gives the residuals with their derivatives at one point, p a dictionary
    of numbers; parameters with a number for each point are lists."""

    def __init__(self, jet: Callable[[list[Any], dict[str, Any]], Jet], data: dict[str, Any], digits: int = 50) -> None:
        self.jet, self.digits = jet, digits
        with mp.workdps(digits):
            self.data = {name: _exact(value) for name, value in data.items()}

    def _point(self, data: dict[str, Any], n: int) -> dict[str, Any]:
        own = Dense.OWN
        return {k: (v[n] if isinstance(v, list) else v) for k, v in data.items() if k not in own}

    def conditions(self, v: list[Any], data: dict[str, Any]) -> tuple[Any, Any]:
        """Gradient of the Lagrangian with the equalities, and its derivative by v."""
        B = data["basis"]
        N, T, K = len(B), len(B[0]), len(B[0][0])
        p = len(data["C"]) if "C" in data else 0
        w, nu = v[:K], v[K:]
        g, H = [mp.mpf(0)] * (K + p), [[mp.mpf(0)] * (K + p) for _ in range(K + p)]
        for n in range(N):
            at = [mp.fdot(B[n][t], w) + (data["offset"][n][t] if "offset" in data else 0) for t in range(T)]
            s2 = data["weights"][n] ** 2 if "weights" in data else mp.mpf(1)
            for F, D, DD in self.jet(at, self._point(data, n)):
                J = [mp.fsum(D[t] * B[n][t][k] for t in range(T)) for k in range(K)]
                for k in range(K):
                    g[k] += s2 * F * J[k]
                for t in range(T):
                    for q in range(T):
                        if DD[t][q]:
                            for k in range(K):
                                for j in range(K):
                                    H[k][j] += s2 * F * DD[t][q] * B[n][t][k] * B[n][q][j]
                for k in range(K):
                    for j in range(K):
                        H[k][j] += s2 * J[k] * J[j]
        if "A" in data:
            for i, row in enumerate(data["A"]):
                t2 = data["t"][i] ** 2 if "t" in data else mp.mpf(1)
                e = mp.fdot(row, w) - data["y"][i]
                for k in range(K):
                    g[k] += t2 * e * row[k]
                    for j in range(K):
                        H[k][j] += t2 * row[k] * row[j]
        if "ridge" in data:
            for k in range(K):
                g[k] += data["ridge"] * (w[k] - (data["center"][k] if "center" in data else 0))
                H[k][k] += data["ridge"]
        for i in range(p):
            g[K + i] = mp.fdot(data["C"][i], w) - data["d"][i]
            for k in range(K):
                g[k] += data["C"][i][k] * nu[i]
                H[k][K + i] = H[K + i][k] = data["C"][i][k]
        return mp.matrix(g), mp.matrix(H)

    def solve(self, start: list[Any], data: dict[str, Any] | None = None) -> list[Any]:
        """Newton's method from near by, to all digits but a few."""
        with mp.workdps(self.digits):
            data = self.data if data is None else data
            v = [mp.mpf(x) for x in start]
            last = mp.inf
            for _ in range(40):
                g, H = self.conditions(v, data)
                d = mp.lu_solve(H, -g)
                v = [x + y for x, y in zip(v, d, strict=True)]
                size = mp.norm(d) / (1 + mp.norm(v))
                if size < mp.mpf(10) ** (5 - self.digits) or (size >= last and size < 1e-20):
                    return v
                last = size
            raise AssertionError("the oracle itself has not converged")

    def along(self, v: list[Any], directions: dict[str, Any], order: int = 1) -> list[Any]:
        """First or second derivative of the solution along a direction of the data, by central differences."""
        with mp.workdps(self.digits):
            h = mp.mpf(10) ** (-self.digits // (order + 3))
            directions = {name: _exact(value) for name, value in directions.items()}
            moved = []
            for sign in (1, -1):
                data = {k: _add(x, directions[k], sign * h) if k in directions else x for k, x in self.data.items()}
                moved.append(self.solve(v, data))
            if order == 1:
                return [(a - b) / (2 * h) for a, b in zip(*moved, strict=True)]
            return [(a - 2 * c + b) / h**2 for a, c, b in zip(moved[0], v, moved[1], strict=True)]


def _exact(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [_exact(one) for one in value]
    return mp.mpf(value)


def _add(x: Any, d: Any, h: Any) -> Any:
    return [_add(a, b, h) for a, b in zip(x, d, strict=True)] if isinstance(x, list) else x + h * d


def numbers(values: list[Any]) -> Tensor:
    return torch.tensor(np.array([float(x) for x in values]))
