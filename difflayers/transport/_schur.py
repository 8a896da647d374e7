r"""The linear system of transport plans, by the Schur complement of its shorter side.

.. math:: \begin{pmatrix} \mathrm{diag}(d_1) & P \\ P^T & \mathrm{diag}(d_2) \end{pmatrix}
    \begin{pmatrix} \alpha \\ \beta \end{pmatrix} = \begin{pmatrix} y \\ z \end{pmatrix}

With :math:`A = D_1^{-1/2} P D_2^{-1/2}` the complement is :math:`D_2^{1/2} (I - A^T A) D_2^{1/2}`. Where both marginals
are constraints, :math:`d_1` and :math:`d_2` are the sums of P, the constants :math:`(1, -1)` are a null vector, and
:math:`w w^T` with :math:`w = \sqrt{d_2 / \sum d_2}` is added, which fixes them by :math:`d_2^T \beta = 0`.

The complement is factorised, or conjugate gradients need only products with A: the eigenvalues are between 0 and 1, and
the scaling by :math:`D_2^{1/2}` is their preconditioner.
"""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers._solution import Info
from difflayers.linalg import CG, LinearOperator, Tag, linear_solve_ex
from difflayers.linalg._direct import solve_columns
from difflayers.linalg._system import Params

from ._iteration import times

DENSE_LIMIT = 1024  # above this shorter side nothing is factorised
EAGER_LIMIT = 512  # up to this one factors are made with the solution, for every derivative to come


def scaled(P: Tensor, d1: Tensor, d2: Tensor) -> Tensor:
    """``A``; zero where a side has no mass."""
    return inverse_sqrt(d1).unsqueeze(-1) * P * inverse_sqrt(d2).unsqueeze(-2)


def inverse_sqrt(d: Tensor) -> Tensor:
    """``d^(-1/2)``, 0 at 0."""
    return torch.where(d > 0, torch.where(d > 0, d, 1).rsqrt(), 0)


def null_vector(d2: Tensor) -> Tensor:
    """``w``."""
    total = d2.sum(-1, keepdim=True)
    return (d2 / torch.where(total > 0, total, 1)).sqrt()


def factorise(A: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of ``I - A^T A + w w^T``, and which elements have none.

    Rounding makes pivots negative where blocks of the plan hardly exchange mass.
    """
    S = w.unsqueeze(-1) * w.unsqueeze(-2)
    S -= A.mT @ A
    S.diagonal(dim1=-2, dim2=-1).add_(1)
    return lifted_cholesky(S, A.shape[-1] * torch.finfo(A.dtype).eps)


def lifted_cholesky(S: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Cholesky factor of matrices that are overwritten, and which elements have none.

    Negative pivots are lifted by a trace of the identity, `noise`, a hundred times more at the second and at the third
    attempt.
    """
    diagonal = S.diagonal(dim1=-2, dim2=-1)
    L, info = torch.linalg.cholesky_ex(S)
    for lift in (noise, 1e2 * noise, 1e4 * noise):
        bad = info != 0
        if not bool(bad.any()):
            break
        diagonal += torch.where(bad, lift, 0).unsqueeze(-1)
        again, info = torch.linalg.cholesky_ex(S)
        L = torch.where(bad[..., None, None], again, L)
    return L, info != 0


def solve_factorised(L: Tensor, right: Tensor) -> Tensor:
    """The complement solved for vectors ``(*extra, *batch, m)``."""
    return solve_columns(lambda L, b: torch.cholesky_solve(b, L), (L,), (2,), right)


def solve_iterated(A: Tensor, w: Tensor, right: Tensor, solver: CG) -> tuple[Tensor, Info]:
    """The complement solved by products with `A`."""
    operator = LinearOperator(_complement, (A, w), tags=Tag.POSITIVE_DEFINITE, param_ndims=(2, 1))
    found = linear_solve_ex(operator, right, solver=solver)
    return found.value, Info(found.status, found.steps, found.residual)


def _complement(params: Params, v: Tensor) -> Tensor:
    A, w = params
    return v - times(A.mT, times(A, v)) + w * (w * v).sum(-1, keepdim=True)


def newton_step(
    P: Tensor, d1: Tensor, d2: Tensor, y: Tensor, z: Tensor, hard: Tensor, inexact: CG
) -> tuple[Tensor, Tensor]:
    """``(alpha, beta)``, with zeros where a side has no mass.

    Args:
        P: ``(B, n, m)``.
        d1: ``(B, n)``.
        d2: ``(B, m)``.
        y: ``(B, n)``.
        z: ``(B, m)``.
        hard: ``(B,)`` elements with a null vector.
        inexact: Iterates for a shorter side above the limit.
    """
    A, w = scaled(P, d1, d2), torch.where(hard.unsqueeze(-1), null_vector(d2), 0)
    one1, s2 = torch.where(d1 > 0, d1, 1), inverse_sqrt(d2)
    y = torch.where(d1 > 0, y, 0) / one1
    right = s2 * (z - times(P.mT, y))
    if d2.shape[-1] <= DENSE_LIMIT:
        beta = solve_factorised(factorise(A, w)[0], right)
    else:
        beta, _ = solve_iterated(A, w, right, inexact)  # what it has when it stops early is a descent direction too
    beta = s2 * beta
    return y - times(P, beta) / one1, beta
