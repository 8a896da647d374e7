"""Sparse systems: one pattern, values by element, factorised by SciPy's SuperLU or multiplied with on any device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import Info

from ._direct import direct_info
from ._sparse_matrix import Pattern
from ._system import LinearSolver, LinearSystem, Params


@dataclass(frozen=True, eq=False)
class SparseSystem(LinearSystem):
    """The system of a sparse matrix, its symmetric part where it is declared symmetric.

    Attributes:
        pattern: Where the values stand.
        made: Factorisations by ticket. A ticket is a number, so that it passes through transforms and stays with its
            element; the factorisations live as long as the graph that holds this system.
    """

    pattern: Pattern = None  # type: ignore[assignment]
    made: dict[int, Factors] = field(default_factory=dict)

    def apply(self, params: Params, v: Tensor, transpose: bool) -> Tensor:
        (values,) = params
        out = self.pattern.times(values, v, transpose)
        return (out + self.pattern.times(values, v, not transpose)) / 2 if self.symmetric else out

    def operator(self, params: Params, like: Tensor, transpose: bool) -> Callable[[Tensor], Tensor]:
        (values,) = params
        half = self._half(values)
        if values.ndim > 1 or like.device.type not in ("cpu", "cuda"):
            return lambda v: self.apply(params, v, transpose)
        one = _product(self.pattern, values, transpose)
        if not half:
            return one
        other = _product(self.pattern, values, not transpose)
        return lambda v: (one(v) + other(v)) / 2

    def matrix(self, params: Params, like: Tensor) -> Tensor:
        (values,) = params
        half = self._half(values)
        A = self.pattern.dense(values)
        return (A + A.mT) / 2 if half else A

    def _half(self, values: Tensor) -> bool:
        """Whether the symmetric part has to be taken; refuses what was never meant to be symmetric.

        Reads data, which is plain where this is called.
        """
        if not self.symmetric or not values.numel():
            return False
        if self.on_failure == "ignore" or values.is_meta:
            return True
        skew = self.pattern.skew(values)
        worst = float(torch.where(torch.isnan(skew), 0, skew).max())
        if worst > 1e-3:
            raise ValueError(
                f"A: expected a symmetric matrix for {type(self.solver).__name__}, got one that differs from its "
                "transpose by more than 0.1 %; use SuperLU() or GMRES()"
            )
        return worst > 0


def _product(pattern: Pattern, values: Tensor, transpose: bool) -> Callable[[Tensor], Tensor]:
    """Products of one matrix with plain vectors, by torch's CSR kernels."""
    if transpose:
        pattern, order = pattern.transposed
        values = values[order]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")  # what is used here has settled
        like: Any = {"dtype": values.dtype, "device": values.device, "check_invariants": False}
        # the kernels want 32 bits, and would convert in every product
        small = max(values.numel(), *pattern.shape) < 2**31
        crow, cols = (t.to(torch.int32) if small else t for t in (pattern.crow, pattern.cols))
        M = torch.sparse_csr_tensor(crow, cols, values, pattern.shape, **like)
    return lambda v: M @ v if v.ndim == 1 else (M @ v.reshape(-1, v.shape[-1]).mT).mT.reshape(v.shape)


class Factors:
    """SuperLU of one matrix after row and column equilibration; `lu` is None where it is singular.

    Args:
        A: SciPy CSR matrix of float64 numbers.
    """

    def __init__(self, A: Any) -> None:
        from scipy import sparse
        from scipy.sparse.linalg import splu

        n = A.shape[0]
        self.lu: Any = None
        if not np.isfinite(A.data).all():
            return
        size = abs(A)
        self.rows = _positive(size.max(axis=1))
        scaled = sparse.diags_array(1 / self.rows) @ A
        self.columns = _positive(abs(scaled).max(axis=0))
        scaled = (scaled @ sparse.diags_array(1 / self.columns)).tocsc()
        try:
            lu = splu(scaled)
        except RuntimeError:  # exactly singular
            return
        # eps times the condition number in the 1-norm, estimated by two solves as in LAPACK's gecon, says whether a
        # digit is left; pivots of a singular matrix are not always small enough to tell
        with np.errstate(all="ignore"):
            signs = 1.0 - 2.0 * (np.arange(n) % 2)
            largest = lu.solve(np.sign(lu.solve(signs / n)), trans="T")
            lost = np.abs(largest).max() * abs(scaled).sum(axis=0).max() * np.finfo(float).eps
        if lost < 0.5:  # NaN is not
            self.lu = lu

    def solve(self, columns: np.ndarray, transpose: bool) -> np.ndarray:
        """Solves for columns ``(n, count)``."""
        if self.lu is None:
            return np.full_like(columns, np.nan)
        before, after = (self.columns, self.rows) if transpose else (self.rows, self.columns)
        return self.lu.solve(columns / before[:, None], trans="T" if transpose else "N") / after[:, None]


def _positive(largest: Any) -> np.ndarray:
    scale = np.asarray(largest.todense() if hasattr(largest, "todense") else largest, dtype=float).ravel()
    return np.where(scale > 0, scale, 1.0)


@dataclass(frozen=True)
class SuperLU(LinearSolver):
    """Sparse LU factorisation by SciPy's SuperLU, on the CPU, for any square sparse matrix.

    Factorises in float64 after row and column equilibration, each element of a batch for itself (one matrix that the
    batch shares is factorised once, and solves all right-hand sides in one call); derivatives of every order reuse the
    factors. Data on an accelerator is copied to the host and back. An element without a digit left is reported
    ``SINGULAR`` instead of returning large numbers.
    """

    factor_ndims = (0, 0)

    def factor(self, system: LinearSystem, params: Params, like: Tensor) -> Params:
        if not isinstance(system, SparseSystem):
            raise ValueError("solver: expected a sparse A for SuperLU(), got a dense matrix or an operator; use LU()")
        from scipy import sparse

        (values,) = params
        cols, crow = system.pattern.cols.cpu().numpy(), system.pattern.crow.cpu().numpy()
        tickets, singular = [], []
        wide = values.detach().to("cpu", torch.float64).reshape(values.shape[:-1].numel(), values.shape[-1])
        for row in wide.numpy():
            factors = Factors(sparse.csr_array((row, cols, crow), shape=system.pattern.shape))
            tickets.append(len(system.made))
            singular.append(factors.lu is None)
            system.made[tickets[-1]] = factors
        batch, device = values.shape[:-1], values.device
        return (
            torch.tensor(tickets, dtype=torch.int64, device=device).reshape(batch),
            torch.tensor(singular, dtype=torch.bool, device=device).reshape(batch),
        )

    def solve(
        self, system: LinearSystem, params: Params, factors: Params, rhs: Tensor, transpose: bool, init: Tensor | None
    ) -> tuple[Tensor, Info]:
        assert isinstance(system, SparseSystem)
        tickets, singular = factors
        batch, n = torch.broadcast_shapes(tickets.shape, rhs.shape[:-1]), rhs.shape[-1]
        right = rhs.detach().to("cpu", torch.float64).expand((*batch, n)).reshape(-1, n).numpy()
        which = tickets.cpu().expand(batch).reshape(-1).numpy()
        out = np.empty_like(right)
        for ticket in np.unique(which):
            own = which == ticket
            out[own] = system.made[int(ticket)].solve(right[own].T, transpose).T
        x = torch.from_numpy(out.reshape((*batch, n))).to(rhs.device, rhs.dtype)
        return x, direct_info(singular.expand(batch), x, 1)
