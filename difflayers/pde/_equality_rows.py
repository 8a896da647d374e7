r"""Rows :math:`C w = d` that hold exactly: what they fix of the coefficients, and what they leave free.

With a QR factorisation of :math:`C^T` the coefficients are :math:`w = Q_1 R^{-T} d + Z v` with v free. A row of C that
is exactly zero, with d = 0, is none: elements of a batch may have different numbers of rows. Such rows are sorted
behind the others, where the factorisation leaves them alone, and their columns of Q join Z.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from difflayers.linalg._direct import solve_columns, tiny_pivots
from difflayers.linalg._system import times


def is_row(C: Tensor) -> Tensor:
    """``(*batch, p)``: the rows of C that are not exactly zero. NaN counts."""
    return (C != 0).any(-1)


class EqualityRows(NamedTuple):
    """The split of the coefficients. `order` puts rows that are zero last, `real` tells the others in that order."""

    Q1: Tensor
    Z: Tensor
    R: Tensor
    order: Tensor
    real: Tensor

    @staticmethod
    def factorise(C: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """``Q``, ``R``, the elements with dependent rows, and how many columns Z needs."""
        p, K = C.shape[-2:]
        order, real = _sorted(C)
        C = torch.take_along_dim(C, order.unsqueeze(-1), -2)
        Q, R = torch.linalg.qr(C.mT, mode="complete")
        R = R[..., :p, :] + torch.diag_embed((~real).to(R.dtype))
        dependent = tiny_pivots(R.diagonal(dim1=-2, dim2=-1), torch.linalg.vector_norm(C, dim=-1))
        missing = 0 if real.is_meta or not real.numel() else int((~real).sum(-1).max())
        return Q, R, dependent, K - p + missing

    @staticmethod
    def of(C: Tensor, Q: Tensor, R: Tensor, free: int) -> EqualityRows:
        """The split into `free` coefficients and the others; an element with fewer has columns of zeros in Z."""
        p, K = C.shape[-2:]
        order, real = _sorted(C)
        Q1, Z = Q[..., :p], Q[..., K - free :]
        if free > K - p:
            taken = torch.nn.functional.pad(real, (0, K - p))[..., K - free :]
            Q1, Z = torch.where(real.unsqueeze(-2), Q1, 0), torch.where(taken.unsqueeze(-2), 0, Z)
        return EqualityRows(Q1, Z, R, order, real)

    def idle(self) -> Tensor:
        """``(*batch, missing, free)``: rows that keep the coefficients of zero columns of Z at zero."""
        K, free = self.Z.shape[-2:]
        p = self.real.shape[-1]
        missing = free - (K - p)
        used = self.real[..., p - missing :]
        return torch.nn.functional.pad(torch.diag_embed(used.to(self.Z.dtype)), (0, K - p))

    def particular(self, d: Tensor) -> Tensor:
        """The shortest w with ``C w = d``."""
        return times(self.Q1, _lower_solve(self.R, _entries(d, self.order)))

    def multipliers(self, g: Tensor, h: Tensor | None = None) -> Tensor:
        """``nu`` with ``C^T nu = g`` in the span of the rows; `h`, or 0, where there is no row."""
        nu = _upper_solve(self.R, times(self.Q1.mT, g))
        if h is not None:
            nu = torch.where(self.real, nu, _entries(h, self.order))
        return _entries(nu, self.order.argsort(-1))


def _sorted(C: Tensor) -> tuple[Tensor, Tensor]:
    real = is_row(C)
    order = (~real).to(torch.uint8).argsort(dim=-1, stable=True)
    return order, torch.take_along_dim(real, order, -1)


def _entries(v: Tensor, order: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(v.shape[:-1], order.shape[:-1])
    return v.expand(*batch, v.shape[-1]).gather(-1, order.expand(*batch, order.shape[-1]))


def _lower_solve(R: Tensor, v: Tensor) -> Tensor:
    """``R^-T v``."""
    return solve_columns(lambda R, b: torch.linalg.solve_triangular(R.mT, b, upper=False), (R,), (2,), v)


def _upper_solve(R: Tensor, v: Tensor) -> Tensor:
    """``R^-1 v``."""
    return solve_columns(lambda R, b: torch.linalg.solve_triangular(R, b, upper=True), (R,), (2,), v)
