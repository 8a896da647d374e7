r"""The Jacobian of a conic program's equation, factorised once for the solution and all its derivatives.

.. math:: \begin{pmatrix} P & A^T (D - I) \\ A & D \end{pmatrix}

with D the derivative of the projection: an LU factorisation with row pivots, after scaling. Where multipliers are not
unique it is singular, and a pseudoinverse takes its place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers.linalg._direct import LU, _scale
from difflayers.linalg._system import times

from . import _conic_layout as cones
from ._conic_data import Data
from ._conic_layout import Layout
from ._program_kkt import amax

FACTOR_NDIMS = (2, 1, 1, 1, 0)  # LU factor (or pseudoinverse), pivots, row scales, column scales, singular
CUT = 1e-11  # singular values below this part of the largest are none


def jacobian(data: Data, layout: Layout, v: Tensor) -> Tensor:
    """``(B, n + m, n + m)``."""
    n, m = data.q.shape[-1], v.shape[-1]
    D = cones.slope(layout, v)
    J = D.new_zeros(v.shape[0], n + m, n + m)
    if data.P is not None:
        J[:, :n, :n] = data.P * data.ratio[:, None, None]
    J[:, n:, :n] = data.A
    J[:, n:, n:] = D
    D.diagonal(dim1=-2, dim2=-1).sub_(1)
    J[:, :n, n:] = data.A.mT @ D
    return J


def factorise(J: Tensor) -> tuple[Tensor, ...]:
    """LU factors; in the place of those of a singular element, its pseudoinverse."""
    rows = _scale(J, -1)
    scaled = J / rows.unsqueeze(-1)
    columns = _scale(scaled, -2)
    scaled = scaled / columns.unsqueeze(-2)
    lu, pivots, _ = torch.linalg.lu_factor_ex(scaled)
    smallest = lu.diagonal(dim1=-2, dim2=-1).abs().amin(-1) if J.shape[-1] else J.new_ones(J.shape[:-2])
    singular = ~(smallest > CUT**0.25)  # suspects, for a closer look
    if bool(singular.any()):
        index = singular.nonzero().squeeze(-1)
        index = index[_badly_conditioned(scaled[index], lu[index], pivots[index])]
        singular = torch.zeros_like(singular)
    else:
        index = singular.new_zeros(0, dtype=torch.int64)
    if index.shape[0]:
        near = torch.where(torch.isfinite(scaled[index]), scaled[index], 0)
        inverse, deficient = map(torch.stack, zip(*map(_pseudoinverse, near), strict=True))
        lu[index[deficient]] = inverse[deficient]
        singular[index] = deficient
    return lu, pivots, rows, columns, singular


def _pseudoinverse(M: Tensor) -> tuple[Tensor, Tensor]:
    """Of one matrix, and whether it is singular. Alone, since rounding depends on the place in a batch."""
    U, S, Vh = torch.linalg.svd(M.clone())
    kept = S / S[:1] > CUT  # NaN where all are zero
    return (Vh.mT * torch.where(kept, 1 / torch.where(kept, S, 1), 0)) @ U.mT, ~kept.all()


def _badly_conditioned(A: Tensor, lu: Tensor, pivots: Tensor) -> Tensor:
    """Per element: whether the condition number, as LAPACK's gecon estimates it, comes near ``1 / CUT``."""
    n = A.shape[-1]
    signs = 1 - 2 * (torch.arange(n, device=A.device) % 2).to(A.dtype)
    largest = LU._solve(lu, pivots, LU._solve(lu, pivots, signs.expand(A.shape[:-1]) / n, False).sign(), True)
    return ~(amax(largest) * torch.linalg.vector_norm(A, 1, dim=-2).amax(-1) < 0.01 / CUT)


def solve(factors: tuple[Tensor, ...], rhs: Tensor, transpose: bool) -> Tensor:
    """The Jacobian's inverse, or its transpose's, times a vector; of a singular one the least squares solution."""
    lu, pivots, rows, columns, singular = factors
    before, after = (columns, rows) if transpose else (rows, columns)
    scaled = rhs / before
    x = LU._solve(lu, pivots, scaled, transpose)
    if bool(singular.any()):
        least = times(lu.mT if transpose else lu, scaled)
        x = torch.where(singular.unsqueeze(-1), least, x)
    return x / after
