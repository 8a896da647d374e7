"""Direct solvers: LU, Cholesky and QR, batched, with one singular element left to itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._solution import Info, Status

from ._system import LinearSolver, LinearSystem, Params


def direct_info(singular: Tensor, x: Tensor, event_ndim: int) -> Info:
    """The report of a direct solve. Its residual is not measured here (NaN); ``linear_solve_ex`` measures it."""
    finite = torch.isfinite(x.flatten(x.ndim - event_ndim)).all(-1)
    status = torch.where(finite, 0, int(Status.DIVERGED))
    status = torch.where(singular, int(Status.SINGULAR), status)
    return Info(status, torch.zeros_like(status), torch.full_like(status, math.nan, dtype=x.dtype))


def solve_columns(solve: Callable[..., Tensor], factors: Sequence[Tensor], ndims: Sequence[int], rhs: Tensor) -> Tensor:
    """Feeds vectors ``(*extra, *batch, n)`` to ``solve(*factors, columns)``, extra leading dimensions as columns.

    One factorisation then serves all cotangents of ``jacrev`` or ``vmap`` in one call.
    """
    batch = factors[0].shape[: factors[0].ndim - ndims[0]]
    extra = rhs.ndim - 1 - len(batch)
    lead = rhs.shape[: max(extra, 0)]
    columns = rhs.unsqueeze(-1) if extra <= 0 else rhs.flatten(0, extra - 1).movedim(0, -1)
    if len(batch) > 1 or batch != columns.shape[:-2]:
        # one batch dimension: torch's batched triangular and LU solves misread the strides of dimensions of size 1
        full = torch.broadcast_shapes(batch, columns.shape[:-2])
        factors = [_one_batch(f, full, k) for f, k in zip(factors, ndims, strict=True)]
        x = solve(*factors, _one_batch(columns, full, 2))
        x = x.reshape((*full, *x.shape[1:]))
    else:
        x = solve(*factors, columns)
    return x.squeeze(-1) if extra <= 0 else x.movedim(-1, 0).reshape((*lead, *x.shape[:-1]))


def _one_batch(t: Tensor, batch: torch.Size, event_ndim: int) -> Tensor:
    event = t.shape[t.ndim - event_ndim :]
    return t.expand((*batch, *event)).reshape((-1, *event))


def _scale(A: Tensor, dim: int) -> Tensor:
    """The largest magnitude along `dim`, 1 where all are zero: equilibration makes the singularity test scale-free."""
    scale = torch.linalg.vector_norm(A, math.inf, dim=dim)
    return torch.where(scale > 0, scale, 1)


def tiny_pivots(pivots: Tensor, columns: Tensor) -> Tensor:
    """Per element: some pivot is rounding noise of its column, or not a number."""
    n = pivots.shape[-1]
    noise = 4 * n**0.5 * torch.finfo(pivots.dtype).eps * columns
    return ~(pivots.abs() > noise).all(-1)


def _no_digit_left(
    solve: Callable[[Tensor], Tensor], solve_transposed: Callable[[Tensor], Tensor], A: Tensor
) -> Tensor:
    """Per element: eps times the condition number (in the 1-norm, estimated) exceeds one half.

    Two solves with the fresh factors, as in LAPACK's gecon. Pivots of a singular matrix are not always small enough to
    tell.
    """
    n = A.shape[-1]
    signs = 1 - 2 * (torch.arange(n, device=A.device) % 2).to(A.dtype)  # +1, -1, ...
    largest = solve_transposed(solve(signs.expand(A.shape[:-1]) / n).sign())
    inverse = torch.linalg.vector_norm(largest, math.inf, dim=-1)
    size = torch.linalg.vector_norm(A, 1, dim=-2).amax(-1)
    return ~(inverse * size * torch.finfo(A.dtype).eps < 0.5)


@dataclass(frozen=True)
class LU(LinearSolver):
    """LU factorisation with partial pivoting after row equilibration: for any square matrix.

    An element whose pivot is rounding noise is reported ``SINGULAR`` instead of returning large numbers.
    """

    factor_ndims = (2, 1, 1, 1, 0)

    def factor(self, system: LinearSystem, params: Params, like: Tensor) -> Params:
        A = system.matrix(params, like)
        rows = _scale(A, -1)
        scaled = A / rows.unsqueeze(-1)
        columns = _scale(scaled, -2)
        scaled = scaled / columns.unsqueeze(-2)
        lu, pivots, _ = torch.linalg.lu_factor_ex(scaled)
        smallest = lu.diagonal(dim1=-2, dim2=-1).abs().amin(-1)
        singular = ~(smallest > torch.finfo(A.dtype).eps ** 0.25)  # suspects, for a closer look
        if singular.is_meta or bool(singular.any()):
            singular = singular & _no_digit_left(
                lambda b: self._solve(lu, pivots, b, False), lambda b: self._solve(lu, pivots, b, True), scaled
            )
        return lu, pivots, rows, columns, singular

    @staticmethod
    def _solve(lu: Tensor, pivots: Tensor, b: Tensor, transpose: bool) -> Tensor:
        solve = lambda lu, pivots, b: torch.linalg.lu_solve(lu, pivots, b, adjoint=transpose)  # noqa: E731
        return solve_columns(solve, (lu, pivots), (2, 1), b)

    def solve(
        self, system: LinearSystem, params: Params, factors: Params, rhs: Tensor, transpose: bool, init: Tensor | None
    ) -> tuple[Tensor, Info]:
        lu, pivots, rows, columns, singular = factors
        before, after = (columns, rows) if transpose else (rows, columns)
        x = self._solve(lu, pivots, rhs / before, transpose) / after
        return x, direct_info(singular, x, 1)


@dataclass(frozen=True)
class Cholesky(LinearSolver):
    """Cholesky factorisation of a symmetric positive definite matrix, after diagonal scaling.

    Only the symmetric part of the matrix enters, so derivatives in the matrix are symmetric. An element that is not
    positive definite is reported ``SINGULAR``.
    """

    factor_ndims = (2, 1, 0)

    def factor(self, system: LinearSystem, params: Params, like: Tensor) -> Params:
        A = system.matrix(params, like)
        diagonal = A.diagonal(dim1=-2, dim2=-1)
        scale = torch.where(diagonal > 0, diagonal, 1).sqrt()
        scaled = A / scale.unsqueeze(-1) / scale.unsqueeze(-2)
        factor, info = torch.linalg.cholesky_ex((scaled + scaled.mT) / 2)
        pivots = factor.diagonal(dim1=-2, dim2=-1) ** 2
        return factor, scale, (info != 0) | tiny_pivots(pivots, torch.ones_like(pivots))

    def solve(
        self, system: LinearSystem, params: Params, factors: Params, rhs: Tensor, transpose: bool, init: Tensor | None
    ) -> tuple[Tensor, Info]:
        factor, scale, singular = factors
        x = solve_columns(_two_triangles, (factor,), (2,), rhs / scale) / scale
        return x, direct_info(singular, x, 1)


def _two_triangles(L: Tensor, b: Tensor) -> Tensor:
    """``(L L^T)^{-1} b``; torch.cholesky_solve copies the factor, which for few columns takes longer than the solve."""
    return torch.linalg.solve_triangular(L.mT, torch.linalg.solve_triangular(L, b, upper=False), upper=True)


@dataclass(frozen=True)
class QR(LinearSolver):
    """Householder QR of a square matrix: slower than LU, backward stable without pivot growth."""

    factor_ndims = (2, 2, 1, 1, 0)

    def factor(self, system: LinearSystem, params: Params, like: Tensor) -> Params:
        A = system.matrix(params, like)
        rows = _scale(A, -1)
        scaled = A / rows.unsqueeze(-1)
        columns = _scale(scaled, -2)
        scaled = scaled / columns.unsqueeze(-2)
        Q, R = torch.linalg.qr(scaled)
        singular = _no_digit_left(lambda b: self._solve(Q, R, b, False), lambda b: self._solve(Q, R, b, True), scaled)
        return Q, R, rows, columns, singular

    @staticmethod
    def _solve(Q: Tensor, R: Tensor, b: Tensor, transpose: bool) -> Tensor:
        if transpose:
            solve = lambda Q, R, b: Q @ torch.linalg.solve_triangular(R.mT, b, upper=False)  # noqa: E731
        else:
            solve = lambda Q, R, b: torch.linalg.solve_triangular(R, Q.mT @ b, upper=True)  # noqa: E731
        return solve_columns(solve, (Q, R), (2, 2), b)

    def solve(
        self, system: LinearSystem, params: Params, factors: Params, rhs: Tensor, transpose: bool, init: Tensor | None
    ) -> tuple[Tensor, Info]:
        Q, R, rows, columns, singular = factors
        before, after = (columns, rows) if transpose else (rows, columns)
        x = self._solve(Q, R, rhs / before, transpose) / after
        return x, direct_info(singular, x, 1)
