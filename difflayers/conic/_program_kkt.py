r"""The KKT system of a quadratic program on its active set, solved with one batched Cholesky factorisation.

With C the rows of A and the active rows of G, both derivatives of a solution, forward and reverse, come down to

.. math:: \begin{pmatrix} P & C^T \\ C & 0 \end{pmatrix} \begin{pmatrix} u \\ v \end{pmatrix}
    = \begin{pmatrix} r_1 \\ r_2 \end{pmatrix}.

Shapes do not depend on the active set: an inactive row is replaced by one of the identity. Where P is positive definite
and shared by the batch, it is factorised once for all elements; else every element factorises ``P + C^T C``, which is
positive definite exactly where the solution is unique.
"""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers._solution import Info, Status
from difflayers.linalg._direct import solve_columns, tiny_pivots
from difflayers.linalg._system import times

FACTOR_NDIMS = (2, 2, 1, 0, 0)  # factor of H, factor of C H^-1 C^T, active rows, weight of C^T C in H, singular


def factorise(P: Tensor, C: Tensor, active: Tensor) -> tuple[Tensor, ...]:
    """Factors of the KKT matrix with the rows of `C` that `active` marks.

    Args:
        P: ``(*batch, n, n)`` symmetric.
        C: ``(*batch, r, n)`` all rows.
        active: ``(*batch, r)`` which of them count, as zeros and ones of the dtype of `P`.

    Returns:
        Tensors with the event dimensions `FACTOR_NDIMS`.
    """
    if P.ndim == 2:
        L, singular = cholesky(P)
        if not bool(singular):  # the one read-back
            # with C shared too, all but the active set is computed once
            gram = active.unsqueeze(-1) * _whitened_gram(L, C) * active.unsqueeze(-2)
            return L, _cholesky_of_gram(gram, active), active, P.new_zeros(()), singular
    rows = active.unsqueeze(-1) * C
    outer = rows.mT @ rows
    scale = _largest(P)
    weight = torch.where(scale > 0, scale, 1) / _positive(_largest(outer))
    L, singular = cholesky(P + weight[..., None, None] * outer)
    L = torch.where(singular[..., None, None], torch.eye(P.shape[-1], dtype=P.dtype, device=P.device), L)
    return L, _cholesky_of_gram(_whitened_gram(L, rows), active), active, weight, singular


def solve(P: Tensor, C: Tensor, factors: tuple[Tensor, ...], r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor, Info]:
    """``(u, v)`` with ``P u + C^T v = r1`` and ``C u = r2`` on active rows, ``v = 0`` on the others."""
    L, R, active, weight, singular = factors
    r2 = active * r2

    def once(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if not C.shape[-2]:
            return _cholesky_solve(L, a), b
        if weight.ndim or weight.is_meta or bool(weight):
            a = a + weight.unsqueeze(-1) * times(C.mT, b)
        v = active * _cholesky_solve(R, active * times(C, _cholesky_solve(L, a)) - b)
        return _cholesky_solve(L, a - times(C.mT, v)), v

    def miss(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return r1 - times(P, u) - times(C.mT, v), r2 - active * times(C, u)

    u, v = once(r1, r2)
    du, dv = once(*miss(u, v))
    u, v = u + du, v + dv
    m1, m2 = miss(u, v)
    residual = torch.maximum(amax(m1), amax(m2))
    # dependent rows that contradict each other leave a residual that refinement cannot remove
    bad = singular | ~(residual <= 1e-3 * torch.maximum(amax(r1), amax(r2)))
    status = torch.where(bad, int(Status.SINGULAR), int(Status.CONVERGED))
    return u, v, Info(status, torch.zeros_like(status), residual)


def cholesky(H: Tensor) -> tuple[Tensor, Tensor]:
    """The factor, and which elements are not positive definite to working precision."""
    L, info = torch.linalg.cholesky_ex(H)
    d = L.diagonal(dim1=-2, dim2=-1)
    return L, (info != 0) | tiny_pivots(d * d, H.diagonal(dim1=-2, dim2=-1))


def _cholesky_of_gram(gram: Tensor, active: Tensor) -> Tensor:
    """The factor of the Gram matrix of the active rows, with a multiple of the identity in the place of the others.

    A trace of the identity keeps dependent rows apart: their multipliers then have the smallest norm.
    """
    top = gram.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True) if gram.shape[-1] else gram.new_ones(())
    top = torch.where(top > 0, top, 1)
    noise = 16 * gram.shape[-1] * torch.finfo(gram.dtype).eps
    return torch.linalg.cholesky_ex(gram + torch.diag_embed(torch.where(active > 0, noise * top, top)))[0]


def _whitened_gram(L: Tensor, C: Tensor) -> Tensor:
    W = torch.linalg.solve_triangular(L, C.mT, upper=False)
    return W.mT @ W


def _cholesky_solve(L: Tensor, v: Tensor) -> Tensor:
    return solve_columns(lambda L, b: torch.cholesky_solve(b, L), (L,), (2,), v)


def _largest(M: Tensor) -> Tensor:
    return M.diagonal(dim1=-2, dim2=-1).abs().amax(-1)


def _positive(t: Tensor) -> Tensor:
    return torch.where(t > 0, t, 1)


def amax(v: Tensor) -> Tensor:
    """The largest magnitude, 0 of nothing."""
    return v.abs().amax(-1) if v.shape[-1] else v.new_zeros(v.shape[:-1])
