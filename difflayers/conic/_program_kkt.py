r"""The KKT system of a quadratic program on its active set, solved with one batched Cholesky factorisation.

With C the rows of A and the active rows of G, both derivatives of a solution, forward and reverse, come down to

.. math:: \begin{pmatrix} P & C^T \\ C & 0 \end{pmatrix} \begin{pmatrix} u \\ v \end{pmatrix}
    = \begin{pmatrix} r_1 \\ r_2 \end{pmatrix}.

Shapes do not depend on the active set: an inactive row is replaced by one of the identity. A positive definite P is
factorised as it is, once where the batch shares it; any other element factorises ``P + C^T C`` with the active rows,
which is positive definite exactly where the solution is unique.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._solution import Info, Status
from difflayers.linalg._direct import solve_columns

# P, all rows C, factor L of H, L^-1 C^T, factor of C H^-1 C^T, active rows, weight of C^T C in H, singular
FACTOR_NDIMS = (2, 2, 2, 2, 2, 1, 0, 0)
ROWS, ACTIVE = 1, 5
REFINEMENTS = 3


class Definite(NamedTuple):
    """Which elements are positive definite to working precision: what several steps of a solve want to know."""

    L: Tensor  # the Cholesky factor of those
    elements: Tensor
    every: bool  # all of them: read back once


def definite(P: Tensor) -> Definite:
    """Looks at every matrix by a Cholesky factorisation; reads one flag."""
    L, good = _cholesky(P, 4 * P.shape[-1] ** 0.5)
    return Definite(L, good, bool(good.all()))


def factorise(P: Tensor, C: Tensor, active: Tensor, known: Definite | None = None) -> tuple[Tensor, ...]:
    """Factors of the KKT matrix with the rows of `C` that `active` marks.

    Args:
        P: ``(*batch, n, n)`` symmetric.
        C: ``(*batch, r, n)`` all rows.
        active: ``(*batch, r)`` which of them count, as zeros and ones of the dtype of `P`.
        known: What :func:`definite` found, None to ask it.

    Returns:
        Tensors with the event dimensions `FACTOR_NDIMS`.
    """
    known = definite(P) if known is None else known
    if known.every:
        # with P and C shared, all but the active set is computed once
        W = torch.linalg.solve_triangular(known.L, C.mT, upper=False)
        gram = active.unsqueeze(-1) * active.unsqueeze(-2) * (W.mT @ W)
        weight, singular = P.new_zeros(P.shape[:-2]), ~known.elements
        return P, C, known.L, W, _cholesky_of_gram(gram, active), active, weight, singular
    rows = active.unsqueeze(-1) * C
    outer = rows.mT @ rows
    scale = _largest(P)
    weight = torch.where(scale > 0, scale, 1) / _positive(_largest(outer))
    weight = torch.where(known.elements, 0, weight)  # those are what they would be among definite ones
    L, good = _cholesky(P + weight[..., None, None] * outer, 4 * P.shape[-1] ** 0.5)
    L = torch.where(good[..., None, None], L, torch.eye(P.shape[-1], dtype=P.dtype, device=P.device))
    W = torch.linalg.solve_triangular(L, rows.mT, upper=False)
    return P, C, L, W, _cholesky_of_gram(W.mT @ W, active), active, weight, ~good


def solve(factors: Sequence[Tensor], r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor, Info]:
    """``(u, v)`` with ``P u + C^T v = r1`` and ``C u = r2`` on active rows, ``v = 0`` on the others."""
    u, v, _, info = solve_rows(factors, r1, r2)
    return u, v, info


def solve_rows(factors: Sequence[Tensor], r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor, Tensor, Info]:
    """As :func:`solve`, with ``r2 - C u`` of all rows."""
    P, C, L, W, R, active, weight, singular = factors
    weighted, constrained = bool(weight.any()), C.shape[-2] > 0

    def once(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if weighted:
            a = plus(a, C, weight.unsqueeze(-1) * b)
        a = _triangular_solve(L, a)
        if constrained:
            b = _cholesky_solve(R, active * plus(b, W, a, keep=-1))
            a = plus(a, W.mT, b, -1)
        return _triangular_solve(L, a, transpose=True), b

    def miss(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return plus(plus(r1, P, u, -1), C, v, -1), plus(r2, C.mT, u, -1)

    masked = active * r2
    u, v = once(r1, masked)
    m1, m2 = miss(u, v)
    both = torch.cat([m1, active * m2, r1.expand_as(m1), masked.expand_as(m2)], -1)
    residual, size = amax(both.reshape(*both.shape[:-1], 2, both.shape[-1] // 2)).unbind(-1)
    tol, bad = torch.finfo(u.dtype).eps ** 0.8, singular
    fine = residual <= tol * size
    for _ in range(REFINEMENTS):
        if bool(fine.all()):
            break
        du, dv = once(m1, active * m2)
        pick = fine.unsqueeze(-1)  # an element that needs none stays what it is
        u, v = torch.where(pick, u, u + du), torch.where(pick, v, v + dv)
        m1, m2 = miss(u, v)
        residual = amax(torch.cat([m1, active * m2], -1))
        # dependent rows that contradict each other leave a residual that refinement cannot remove
        fine, bad = residual <= tol * size, singular | ~(residual <= 1e-3 * size)
    steps = torch.zeros_like(fine, dtype=torch.int64)
    return u, v, m2, Info(steps + bad * int(Status.SINGULAR), steps, residual)


def _cholesky(H: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """The factor, and of which elements it is one: no pivot below `noise` roundings of its diagonal entry."""
    L, info = torch.linalg.cholesky_ex(H)
    d = L.diagonal(dim1=-2, dim2=-1)
    least = noise * torch.finfo(H.dtype).eps * H.diagonal(dim1=-2, dim2=-1)
    return L, (info == 0) & (d * d > least).all(-1)


def _cholesky_of_gram(gram: Tensor, active: Tensor) -> Tensor:
    """The factor of the Gram matrix of the active rows, with the identity in the place of the others.

    Dependent rows are kept apart by a multiple of the identity, which refinement takes back where it matters: their
    multipliers then have the smallest norm. Overwrites `gram`.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(active == 0)
    R, good = _cholesky(gram, 16.0 * gram.shape[-1])
    if not bool(good.all()):
        top = _positive((active * diagonal).amax(-1, keepdim=True))
        diagonal.add_(torch.finfo(gram.dtype).eps ** 0.5 * active * top)
        R = torch.where(good[..., None, None], R, torch.linalg.cholesky_ex(gram)[0])
    return R


def _cholesky_solve(R: Tensor, v: Tensor) -> Tensor:
    if v.ndim == R.ndim - 1:
        return torch.cholesky_solve(v.unsqueeze(-1), R).squeeze(-1)
    return solve_columns(lambda R, b: torch.cholesky_solve(b, R), (R,), (2,), v)


def _triangular_solve(L: Tensor, v: Tensor, transpose: bool = False) -> Tensor:
    """``L^-1 v``, or ``L^-T v``."""
    M = L if transpose else L.mT
    if L.ndim == 2 and v.ndim == 2:  # vectors are rows
        return torch.linalg.solve_triangular(M, v, upper=not transpose, left=False)
    return solve_columns(lambda M, b: torch.linalg.solve_triangular(M.mT, b, upper=transpose), (M,), (2,), v)


def plus(r: Tensor, M: Tensor, v: Tensor, sign: int = 1, keep: int = 1) -> Tensor:
    """``keep * r + sign * M^T v``; one matrix for a whole batch makes a single product."""
    if M.ndim == 2 and v.ndim == 2:
        return torch.addmm(r, v, M, beta=keep, alpha=sign)
    product = v @ M if M.ndim == 2 else (v.unsqueeze(-2) @ M).squeeze(-2)
    return torch.add(r if keep == 1 else keep * r, product, alpha=sign)


def _largest(M: Tensor) -> Tensor:
    return M.diagonal(dim1=-2, dim2=-1).abs().amax(-1)


def _positive(t: Tensor) -> Tensor:
    return torch.where(t > 0, t, 1)


def amax(v: Tensor) -> Tensor:
    """The largest magnitude, 0 of nothing."""
    return torch.linalg.vector_norm(v, torch.inf, dim=-1) if v.shape[-1] else v.new_zeros(v.shape[:-1])


def all_rows(A: Tensor, G: Tensor) -> Tensor:
    """Equalities above inequalities, shared by the batch where both are."""
    if A.shape[:-2] != G.shape[:-2]:
        batch = torch.broadcast_shapes(A.shape[:-2], G.shape[:-2])
        A, G = A.expand(*batch, *A.shape[-2:]), G.expand(*batch, *G.shape[-2:])
    return torch.cat([A, G], -2)
