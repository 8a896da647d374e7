"""Sparse matrices: a pattern that all elements share, and values with a gradient."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difflayers._checks import check_tensor

from ._autodiff import plain


class SparseMatrix(NamedTuple):
    """A matrix in compressed sparse row format whose values are an ordinary tensor.

    Where a layer takes a sparse matrix, it takes one of these. Unlike with a tensor of layout ``torch.sparse_csr``,
    values may differ by batch element, and derivatives of every order and all transforms work, since torch sees dense
    tensors.

    Attributes:
        crow_indices: ``(rows + 1)`` integers: where each row begins in the values.
        col_indices: ``(nnz)`` integers, rising within each row.
        values: ``(*batch, nnz)``.
        shape: Rows and columns.

    Example:
        >>> import torch
        >>> from difflayers.linalg import SparseMatrix, linear_solve
        >>> values = torch.tensor([2.0, 4.0], requires_grad=True)
        >>> A = SparseMatrix(torch.tensor([0, 1, 2]), torch.tensor([0, 1]), values, (2, 2))
        >>> x = linear_solve(A, torch.tensor([2.0, 2.0]))
        >>> x, torch.autograd.grad(x.sum(), values)[0]
        (tensor([1.0000, 0.5000], grad_fn=<...>), tensor([-0.5000, -0.1250]))
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    shape: tuple[int, int]


Matrix = Tensor | SparseMatrix


@dataclass(frozen=True, eq=False)
class Pattern:
    """Where the values of a matrix stand."""

    crow: Tensor
    rows: Tensor
    cols: Tensor
    shape: tuple[int, int]

    def times(self, values: Tensor, v: Tensor, transpose: bool = False) -> Tensor:
        """``M v`` or ``M^T v``, batch dimensions broadcast."""
        source, target = (self.rows, self.cols) if transpose else (self.cols, self.rows)
        terms = values * v[..., source]
        return terms.new_zeros((*terms.shape[:-1], self.shape[transpose])).index_add(-1, target, terms)

    def dense(self, values: Tensor) -> Tensor:
        """The matrix ``(*batch, rows, columns)``."""
        r, n = self.shape
        key = self.rows * n + self.cols
        return values.new_zeros((*values.shape[:-1], r * n)).index_add(-1, key, values).unflatten(-1, (r, n))

    @functools.cached_property
    def transposed(self) -> tuple[Pattern, Tensor]:
        """The pattern of the transpose, and the order in which it takes the values."""
        r, n = self.shape
        order = torch.argsort(self.cols * r + self.rows)
        crow = torch.searchsorted(self.cols[order].contiguous(), torch.arange(n + 1, device=order.device))
        return Pattern(crow, self.cols[order], self.rows[order], (n, r)), order

    @functools.cached_property
    def _mirror(self) -> tuple[int, Tensor]:
        """Entries of ``M - M^T``, and where the values and their mirror images stand among them."""
        n = self.shape[0]
        keys, place = torch.unique(
            torch.cat([self.rows * n + self.cols, self.cols * n + self.rows]), return_inverse=True
        )
        return len(keys), place

    def skew(self, values: Tensor) -> Tensor:
        """``(*batch)`` largest entry of ``M - M^T`` relative to the largest of M."""
        count, place = self._mirror
        both = torch.cat([values, -values], -1)
        gap = values.new_zeros((*values.shape[:-1], count)).index_add(-1, place, both).abs().amax(-1)
        size = values.abs().amax(-1)
        return gap / torch.where(size > 0, size, 1)


def is_sparse(M: object) -> bool:
    """Whether an argument is a matrix in one of the two sparse forms, or in one that :func:`take_apart` refuses."""
    return isinstance(M, SparseMatrix) or (isinstance(M, Tensor) and M.layout != torch.strided)


def check_layout(name: str, M: Tensor) -> None:
    """Refuses sparse layouts other than CSR."""
    if M.layout != torch.sparse_csr:
        raise ValueError(
            f"{name}: expected a SparseMatrix or a tensor of layout torch.sparse_csr, as to_sparse_csr() makes it, "
            f"got layout {M.layout}"
        )


def take_apart(name: str, M: Matrix) -> tuple[Pattern, Tensor]:
    """Pattern and values of a sparse or dense matrix, checked."""
    if isinstance(M, SparseMatrix):
        crow, cols, values, shape = M
        if not (isinstance(shape, tuple) and len(shape) == 2):
            raise ValueError(f"{name}.shape: expected two numbers, got {shape}")
        return _pattern(name, crow, cols, check_tensor(f"{name}.values", values, min_ndim=1), shape), values
    if is_sparse(M):
        check_layout(name, M)
        if M.ndim != 2:
            raise ValueError(f"{name}: expected a sparse matrix that the batch shares, got shape {tuple(M.shape)}")
        values = _Values.apply(check_tensor(name, M))
        return _pattern(name, M.crow_indices(), M.col_indices(), values, (M.shape[0], M.shape[1])), values
    r, n = check_tensor(name, M, min_ndim=2).shape[-2:]
    index, crow = torch.arange(r * n, device=M.device), torch.arange(r + 1, device=M.device) * n
    crow, rows, cols = (plain(name, t) for t in (crow, index // max(n, 1), index % max(n, 1)))
    return Pattern(crow, rows, cols, (r, n)), M.flatten(-2)


def _pattern(name: str, crow: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int]) -> Pattern:
    """Refuses indices that are no pattern: solvers would read beyond their arrays."""
    for what, t in (("crow_indices", crow), ("col_indices", cols)):
        if not isinstance(t, Tensor) or t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name}.{what}: expected a tensor of integers, got {got}")
        if t.device != values.device:
            raise ValueError(f"{name}.{what}: expected device {values.device} as of the values, got {t.device}")
    crow, cols = (plain(name, plain(name, t).to(torch.int64)) for t in (crow, cols))
    r, n = shape
    if crow.shape != (r + 1,) or cols.ndim != 1 or values.shape[-1] != len(cols):
        raise ValueError(
            f"{name}: expected {r + 1} row offsets and as many columns as values, got {tuple(crow.shape)}, "
            f"{tuple(cols.shape)} and {tuple(values.shape)}"
        )
    length = crow.diff()
    if bool((length < 0).any()) or int(crow[0]) != 0 or int(crow[-1]) != len(cols):
        raise ValueError(f"{name}: expected row offsets that rise from 0 to {len(cols)}")
    rows = plain(name, torch.repeat_interleave(torch.arange(r, device=crow.device), length))
    key = rows * n + cols
    if bool(((cols < 0) | (cols >= n)).any()) or bool((key.diff() <= 0).any()):
        raise ValueError(f"{name}: expected columns in 0..{n - 1} that rise within each row")
    return Pattern(crow, rows, cols, (r, n))


def from_coordinates(name: str, M: Tensor) -> SparseMatrix:
    """A tensor of layout ``torch.sparse_coo``, entries of one place summed up, as a :class:`SparseMatrix`."""
    check_tensor(name, M)
    if M.ndim != 2 or M.dense_dim():
        raise ValueError(f"{name}: expected a sparse matrix of two dimensions, got shape {tuple(M.shape)}")
    with torch.no_grad():
        rows, cols = M.detach().coalesce().indices()
    crow = torch.searchsorted(rows.contiguous(), torch.arange(M.shape[0] + 1, device=rows.device))
    return SparseMatrix(crow, cols, _Values.apply(M), (M.shape[0], M.shape[1]))


class _Values(torch.autograd.Function):
    """The values of a sparse tensor; the gradient is a sparse tensor of the same pattern.

    torch's own can be differentiated once, and loses the second derivative without a word.
    """

    @staticmethod
    def forward(ctx: Any, M: Tensor) -> Tensor:
        M = M if M.layout == torch.sparse_csr else M.coalesce()
        ctx.save_for_backward(*((M.crow_indices(), M.col_indices()) if M.layout == torch.sparse_csr else M.indices()))
        ctx.size, ctx.layout = M.shape, M.layout
        return M.values().clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _FromValues.apply(*ctx.saved_tensors, g, ctx.size, ctx.layout)


class _FromValues(torch.autograd.Function):
    """A sparse tensor of values."""

    @staticmethod
    def forward(ctx: Any, crow: Tensor, cols: Tensor, values: Tensor, size: torch.Size, layout: torch.layout) -> Tensor:
        like: Any = {"dtype": values.dtype, "device": values.device, "check_invariants": False}
        if layout == torch.sparse_csr:
            return torch.sparse_csr_tensor(crow, cols, values, size, **like)
        return torch.sparse_coo_tensor(torch.stack([crow, cols]), values, size, is_coalesced=True, **like)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, Tensor, None, None]:
        return None, None, _Values.apply(g), None, None
