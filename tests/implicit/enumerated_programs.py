"""Strictly convex quadratic programs solved by trying all active sets in numpy: an oracle without any solver."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np


def solve(K, r):
    """A symmetric system, scaled to a unit diagonal of row maxima, with iterative refinement in long double."""
    s = np.ones(len(K))
    for _ in range(6):
        s = s / np.sqrt(np.abs(s[:, None] * K * s).max(1))
    scaled = s[:, None] * K * s
    inverse, w = np.linalg.inv(scaled), np.zeros(len(K), np.longdouble)
    for _ in range(6):
        w = w + inverse @ ((s * r).astype(np.longdouble) - scaled.astype(np.longdouble) @ w)
    return (s * w).astype(float)


@dataclass
class Program:
    """min z'Qz/2 - c'z subject to G z <= h, A z = b."""

    Q: np.ndarray
    c: np.ndarray
    G: np.ndarray
    h: np.ndarray
    A: np.ndarray
    b: np.ndarray

    def kkt(self, S):
        rows = np.vstack([self.G[S], self.A])
        k = len(rows)
        return np.block([[self.Q, rows.T], [rows, np.zeros((k, k))]])

    def right(self, S):
        return np.concatenate([self.c, self.h[S], self.b])

    def solution(self):
        """(z, multipliers, of the equalities, active rows, margin to another active set), or None if infeasible."""
        d, m, p = len(self.c), len(self.h), len(self.b)
        size, best = np.abs(self.G).max(1, initial=0), None
        for k in range(min(m, d - p) + 1):
            for S in map(list, combinations(range(m), k)):
                rows = np.vstack([self.G[S], self.A])
                if len(rows) and np.linalg.svd(rows / np.abs(rows).max(1)[:, None])[1].min() < 1e-9:
                    continue
                w = solve(self.kkt(S), self.right(S))
                z, multipliers = w[:d], np.zeros(m)
                multipliers[S] = w[d : d + k]
                slack = (self.h - self.G @ z) / (size * np.abs(z).max() + np.abs(self.h) + 1e-300)
                pressure = multipliers * size / (np.abs(self.c).max() + np.abs(self.Q @ z).max())
                if (slack < -1e-9).any() or (pressure < -1e-9).any():
                    continue
                margin = np.maximum(slack * ~np.isin(np.arange(m), S), pressure).min(initial=1)
                if best is None or margin > best[4]:
                    best = z, multipliers, w[d + k :], S, margin
        return best

    def along(self, slope, S):
        """First and second derivative of z and the multipliers along ``self + t slope``, t = 0: Taylor's series."""
        d, m = len(self.c), len(self.h)
        K, dK = self.kkt(S), np.block([[slope.Q, np.vstack([slope.G[S], slope.A]).T], [slope.kkt(S)[d:]]])
        w = solve(K, self.right(S))
        first = solve(K, slope.right(S) - dK @ w)
        out = []
        for v in (first, solve(K, -2 * dK @ first)):
            multipliers = np.zeros(m)
            multipliers[S] = v[d : d + len(S)]
            out.append((v[:d], multipliers, v[d + len(S) :]))
        return out


def program(rng, d, m, p, *, objective=1.0, unit=1.0, rows=1.0):
    """A random one, feasible, with z of size `unit`, and rows multiplied by up to `rows` or its inverse."""
    M, G, A, inside = (rng.normal(size=s) for s in ((d, d), (m, d), (p, d), d))
    h, b, c = G @ inside + rng.uniform(0, 1, m), A @ inside, 3 * rng.normal(size=d)
    Q, scale = M @ M.T + 0.2 * np.eye(d), rows ** rng.uniform(-1, 1, m)
    other = rows ** rng.uniform(-1, 1, p)
    return Program(
        Q * objective / unit**2,
        c * objective / unit,
        scale[:, None] * G / unit,
        scale * h,
        other[:, None] * A / unit,
        other * b,
    )


def direction(rng, like):
    """Something to differentiate along, as large as the data."""
    parts = [rng.normal(size=a.shape) * np.abs(a).max(initial=0) for a in vars(like).values()]
    parts[0] = (parts[0] + parts[0].T) / 2
    return Program(*parts)
