"""Closed forms of small convex programs: every active set is tried, and the equations of the right one are solved."""

import itertools

import torch
from torch import Tensor


def quadratic(P: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """argmin 1/2 x'Px + q'x s.t. Gx <= h, Ax = b, of one element."""
    n, m, p = len(q), len(h), len(b)

    def solution(active: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.cat([A, G[active]])
        zero = rows.new_zeros(len(rows), len(rows))
        K = torch.cat([torch.cat([P, rows.mT], 1), torch.cat([rows, zero], 1)])
        found = torch.linalg.solve(K, torch.cat([-q, b, h[active]]))
        return found[:n], found[n + p :]

    for count in range(m + 1):
        for active in itertools.combinations(range(m), count):
            with torch.no_grad():
                rows = torch.cat([A, G[list(active)]])
                if len(rows) > n or torch.linalg.svdvals(rows).min(dim=-1).values < 1e-9 if len(rows) else False:
                    continue
                x, z = solution(list(active))
                right = bool((z > 0).all()) and bool((G @ x <= h + 1e-10).all())
            if right:
                return solution(list(active))[0]
    raise ValueError("infeasible")


def simplex(v: Tensor, total: Tensor) -> Tensor:
    """argmin 1/2 |x - v|^2 s.t. x >= 0, sum(x) = total, of one element."""
    with torch.no_grad():
        u = v.sort(descending=True).values
        sizes = torch.arange(1, len(v) + 1, dtype=v.dtype)
        support = v >= u[: int((u - (u.cumsum(0) - total) / sizes > 0).sum())].min()
    free = v[support]
    shifted = free - (free.sum() - total) / len(free)
    return torch.zeros_like(v).masked_scatter(support, shifted)


def ellipsoid(F: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """argmin 1/2 |x - v|^2 s.t. |Fx| <= r, of one element with |Fv| > r: x = (I + t F'F)^-1 v with |Fx| = r."""
    eye = torch.eye(len(v), dtype=v.dtype)

    def step(t: Tensor, F: Tensor, v: Tensor, r: Tensor) -> Tensor:
        """One of Newton's on 1/|Fx| - 1/r, which is concave in t."""
        M = eye + t * F.mT @ F
        x = torch.linalg.solve(M, v)
        slope = -torch.linalg.solve(M, F.mT @ (F @ x))
        norm = (F @ x).norm()
        return t - (1 / norm - 1 / r) / (-(F @ x) @ (F @ slope) / norm**3)

    with torch.no_grad():
        t = torch.zeros((), dtype=v.dtype)
        for _ in range(100):
            t = step(t, F, v, r)
    # two steps with their graph from the solution have its first and second derivative
    for _ in range(2):
        t = step(t, F, v, r)
    return torch.linalg.solve(eye + t * F.mT @ F, v)


def upgrad(J: Tensor) -> Tensor:
    """sum_i w_i J with w_i = argmin 1/2 w'JJ'w s.t. w >= e_i / m, of one Jacobian."""
    m = len(J)
    G, eye = J @ J.mT, torch.eye(m, dtype=J.dtype)
    total = 0
    for bound in eye / m:
        none, empty = G.new_zeros(0, m), G.new_zeros(0)
        total = total + quadratic(G, G.new_zeros(m), -eye, -bound, none, empty) @ J
    return total
