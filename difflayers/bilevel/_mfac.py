"""Products with the inverse of a damped empirical Fisher matrix, from the last gradients alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from difflayers._checks import check_finite, check_tensor
from difflayers._solution import Info, Status
from difflayers.linalg import LinearSolver
from difflayers.linalg._system import LinearSystem, Params, times


class MFAC:
    r"""Inverse-Hessian products from the last gradients, without a second derivative.

    Solves ``(damping I + G^T G / m) q = v`` with the m gradients seen last as rows of G, exactly:

    .. math:: q = \lambda^{-1} \big(v - G^T (m \lambda I + G G^T)^{-1} G v\big) .

    An adjoint of :func:`hypergradient` and :class:`ArgminLayer`. The matrix stands for the Hessian near a well-fitted
    model with a likelihood loss, and nowhere else; gradients are those of single examples or small batches, because at
    a minimum that of all data vanishes.

    Args:
        rank: Largest number of gradients kept; a further one replaces the oldest.
        damping: The multiple of the identity.

    Raises:
        ValueError: For a rank below 1, a damping that is not positive, gradients of another size, and a solve before
            the first gradient.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import MFAC
        >>> mfac = MFAC(rank=2, damping=1.0)
        >>> mfac.update(torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
        >>> mfac.solve(torch.ones(3))  # of diag(3, 3, 1)
        tensor([0.3333, 0.3333, 1.0000])

    Source: E. Frantar, E. Kurtic, D. Alistarh, M-FAC: Efficient Matrix-Free Approximations of Second-Order Information,
    NeurIPS 2021, section 3.2.

    Departure: m counts the gradients seen so far until the buffer is full (the published code divides by the rank, and
    rows not filled yet count as zero gradients); one Cholesky factorisation in float64 instead of a recurrence.
    """

    def __init__(self, rank: int, damping: float = 1e-5) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank: expected an integer of at least 1, got {rank!r}")
        if not 0 < damping < math.inf:
            raise ValueError(f"damping: expected a positive number, got {damping!r}")
        self.rank, self.damping = rank, damping
        self._rows: Tensor | None = None
        self._gram: Tensor | None = None  # G G^T in float64
        self._seen = 0
        self._factor: Tensor | None = None

    def __repr__(self) -> str:
        return f"MFAC(rank={self.rank}, damping={self.damping})"

    @property
    def count(self) -> int:
        """How many gradients are kept."""
        return min(self._seen, self.rank)

    @torch.no_grad()
    def update(self, gradients: Any) -> None:
        """Takes in one gradient, or rows of them.

        Args:
            gradients: A tree of tensors with the structure of y (for example what ``torch.autograd.grad`` returns), one
                vector ``(d,)``, or rows ``(k, d)``.
        """
        if isinstance(gradients, Tensor):
            rows = check_tensor("gradients", gradients).detach()
            rows = rows if rows.ndim == 2 else rows.reshape(1, -1)
        else:
            leaves = [check_tensor("gradients", leaf) for leaf in optree.tree_leaves(gradients)]
            rows = torch.cat([leaf.detach().reshape(-1) for leaf in leaves]).unsqueeze(0)
        if self._rows is None:
            self._rows = rows.new_zeros(self.rank, rows.shape[-1])
            self._gram = rows.new_zeros(self.rank, self.rank, dtype=torch.float64)
        if rows.shape[-1] != self._rows.shape[-1]:
            raise ValueError(f"gradients: expected {self._rows.shape[-1]} numbers, got {rows.shape[-1]}")
        assert self._gram is not None
        first = max(0, len(rows) - self.rank)  # of more rows than there is room for, the last ones
        self._seen += first
        for row in rows[first:].to(self._rows):
            place = self._seen % self.rank
            self._rows[place] = row
            products = times(self._rows, row).double()
            self._gram[place], self._gram[:, place] = products, products
            self._seen += 1
        self._factor = None

    @torch.no_grad()
    def solve(self, v: Tensor) -> Tensor:
        """The inverse times a vector.

        Args:
            v: ``(*batch, d)``.

        Returns:
            ``(*batch, d)``.
        """
        if self._rows is None or self._gram is None:
            raise ValueError("MFAC: expected gradients before the first solve, got none (call `update`)")
        if v.shape[-1:] != self._rows.shape[-1:]:
            raise ValueError(f"v: expected {self._rows.shape[-1]} numbers, got shape {tuple(v.shape)}")
        m = self.count
        G = self._rows[:m].to(v)
        if self._factor is None:
            eye = torch.eye(m, dtype=torch.float64, device=self._gram.device)
            self._factor, bad = torch.linalg.cholesky_ex(self._gram[:m, :m] + m * self.damping * eye)
            if bool(bad):
                check_finite([("gradients", self._rows)])
                self._factor = torch.full_like(self._factor, math.nan)
        weights = torch.cholesky_solve(times(G, v).double().unsqueeze(-1), self._factor).squeeze(-1)
        return (v - times(G.mT, weights.to(v.dtype))) / self.damping

    def solver(self, n: int, symmetric: bool) -> LinearSolver:
        """The inverse as a linear solver, for the engine."""
        return MFACSolver(self)


@dataclass(frozen=True, eq=False)
class MFACSolver(LinearSolver):
    """The matrix it inverts is its own: the system is not asked."""

    mfac: MFAC

    def solve(
        self, system: LinearSystem, params: Params, factors: Params, rhs: Tensor, transpose: bool, init: Tensor | None
    ) -> tuple[Tensor, Info]:
        x = self.mfac.solve(rhs)
        finite = torch.isfinite(x).all(-1)
        status = torch.where(finite, int(Status.CONVERGED), int(Status.DIVERGED))
        return x, Info(status, torch.full_like(status, self.mfac.count), torch.zeros_like(rhs[..., 0]))
