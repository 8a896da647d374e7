"""The inverse of a symmetric matrix that a whole batch shares, where that is as good as a solver and much cheaper.

With a small condition number the error of an explicit inverse is that of a solve with the factor, and every derivative
follows from plain torch. Matrices close to singular, and those that differ between elements, are left to a solver that
can name the failure.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from difflayers._solution import OnFailure
from difflayers.linalg._autodiff import physical


def shared_inverse(H: Tensor) -> Tensor | None:
    """The inverse of `H`, symmetric ``(n, n)``, differentiable to any order; None where a solver should be asked.

    This reads one flag. With eigenvalues ``lambda`` of a matrix of size n, the product of the Frobenius norms of matrix
    and inverse is at least ``lambda_max / lambda_min + n - 2``, so that `H` is well conditioned where it is not much
    more than n.
    """
    if H.is_meta or physical(H).ndim != 2 or not H.shape[-1]:
        return None
    indefinite = torch.linalg.cholesky_ex(physical(H)).info
    inverse = torch.linalg.inv_ex(H).inverse  # the derivative of torch.cholesky_inverse in forward mode is wrong
    size, inverse_size = (torch.linalg.matrix_norm(physical(M)) for M in (H, inverse))
    return inverse if bool((indefinite == 0) & (size * inverse_size <= 3 * H.shape[-1])) else None


def on_sound(f: Callable[[Tensor], Tensor], rhs: Tensor, on_failure: OnFailure) -> Tensor | None:
    """``f(rhs)``, NaN and without derivative for vectors that are not finite; None if a solver should refuse them.

    This reads one flag.
    """
    if bool(torch.isfinite(physical(rhs).sum())):
        return f(rhs)
    if on_failure == "raise":
        return None
    failed = ~torch.isfinite(rhs.detach()).all(-1, keepdim=True)
    return torch.where(failed, math.nan, f(torch.where(failed, 0, rhs)))
