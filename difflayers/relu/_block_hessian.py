r"""Linear systems with the Hessian of the gated problem on its active blocks A.

.. math:: H = Z_A^T \Lambda Z_A + \mathrm{blkdiag}\,\frac{I - h_i h_i^T}{\omega_i}, \qquad
    h_i = u_i / \|u_i\|, \quad \omega_i = \|u_i\| / \beta

with :math:`\Lambda = \mathrm{diag}(s_k l''_k)`. It is nonsingular exactly if the columns :math:`Z_i h_i` are
independent: if the network is minimal. Two forms, whichever is smaller:

*Direct*: H itself, of size :math:`|A| d`.

*Saddle*: with :math:`R = \Lambda^{1/2}`, :math:`\Phi = [Z_i h_i]_A` and

.. math:: T = (X X^T) \circ (M_A \omega M_A^T) - \Phi \omega \Phi^T \succeq 0, \quad
    b = \sum_i \omega_i Z_i (I - h_i h_i^T) g_i, \quad \gamma_i = h_i^T g_i,

the solution of :math:`H q = g` comes from one system with :math:`I + R T R`, of the size of the training set, and one
of the size of A, both positive definite also where weights are zero:

.. math:: (I + R T R)\,\tau - R \Phi \alpha = R b, \quad \Phi^T R \tau = \gamma, \quad
    q_i = \omega_i (I - h_i h_i^T)(g_i - Z_i^T R \tau) + h_i \alpha_i .

Blocks that are held to subspaces, as ReLU neurons with kinks on points of the data are, have projections
:math:`\Pi_i \perp h_i` on what they may not leave: H is restricted to the rest, where :math:`I - h_i h_i^T` becomes
:math:`I - h_i h_i^T - \Pi_i`; so it does in T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from difflayers.linalg._direct import solve_columns, tiny_pivots

FACTOR_NDIMS = (2, 1, 2, 1, 0)


class Factors(NamedTuple):
    """Cholesky factors with the scales that make diagonals one.

    Attributes:
        whole: ``(a d, a d)`` of H, or ``(n, n)`` of ``I + R T R`` in saddle form.
        whole_scale: Square roots of the diagonal.
        schur: ``(a, a)`` of the second system; a 1 in direct form.
        schur_scale: ``(a)``, or a 1.
        singular: Whether the columns ``Z_i h_i`` depend on each other.
    """

    whole: Tensor
    whole_scale: Tensor
    schur: Tensor
    schur_scale: Tensor
    singular: Tensor


class Blocks(NamedTuple):
    """The active blocks of a batch, padded with zeros to the same number.

    Attributes:
        X: ``(*batch, n, d)`` data.
        M: ``(*batch, n, a)`` patterns, zero where a place is not used.
        h: ``(*batch, a, d)`` directions, zero there.
        omega: ``(*batch, a)`` norms over beta, 1 there.
        curvature: ``(*batch, n)`` of the weighted loss.
        used: ``(*batch, a)``.
        held: ``(*batch, a, d, d)`` projections on directions in which blocks do not move; None if there are none.
    """

    X: Tensor
    M: Tensor
    h: Tensor
    omega: Tensor
    curvature: Tensor
    used: Tensor
    held: Tensor | None = None

    @staticmethod
    def of(
        X: Tensor,
        M: Tensor,
        u: Tensor,
        beta: Tensor,
        curvature: Tensor,
        index: Tensor,
        used: Tensor,
        held: Tensor | None = None,
    ) -> Blocks:
        """The blocks `index` of `u`."""
        h = take_along(u, index.unsqueeze(-1), -2)
        length = torch.where(used, torch.linalg.vector_norm(h, dim=-1), 1)
        h = torch.where(used.unsqueeze(-1), h / length.unsqueeze(-1), 0)
        M = take_along(M, index.unsqueeze(-2), -1) * used.unsqueeze(-2)
        return Blocks(X, M, h, torch.where(used, length / beta.unsqueeze(-1), 1), curvature, used, held)

    @property
    def direct(self) -> bool:
        """Whether H itself is the smaller system."""
        return self.h.shape[-2] * self.h.shape[-1] <= self.X.shape[-2]

    def fit(self, q: Tensor) -> Tensor:
        """``sum_i Z_i q_i``."""
        return (self.M * (self.X @ q.mT)).sum(-1)

    def pull(self, t: Tensor) -> Tensor:
        """``Z_i^T t`` for every block."""
        return (self.M * t.unsqueeze(-1)).mT @ self.X

    def across(self, q: Tensor) -> Tensor:
        """``(I - h_i h_i^T - Pi_i) q_i``."""
        return self.free(q - self.h * (self.h * q).sum(-1, keepdim=True))

    def free(self, q: Tensor) -> Tensor:
        """``(I - Pi_i) q_i``."""
        return q if self.held is None else q - (self.held @ q.unsqueeze(-1)).squeeze(-1)

    def times(self, q: Tensor) -> Tensor:
        """``H q`` for any q, held or not."""
        bends = q - self.h * (self.h * q).sum(-1, keepdim=True)
        return self.pull(self.curvature * self.fit(q)) + bends / self.omega.unsqueeze(-1)

    def factorise(self, ridge: float = 0.0) -> Factors:
        """Both Cholesky factors; `ridge` is added along the directions ``h_i``, relative to what is there."""
        root = self.curvature.clamp_min(0).sqrt()
        if self.direct:
            Z = ((self.M * root.unsqueeze(-1)).unsqueeze(-1) * self._moves()).flatten(-2)
            H = Z.mT @ Z
            a, d = self.h.shape[-2:]
            eye = torch.eye(d, dtype=H.dtype, device=H.device)
            bends = (eye - self.h.unsqueeze(-1) * self.h.unsqueeze(-2)) / self.omega[..., None, None]
            if ridge:
                along = (Z.unflatten(-1, (a, d)) * self.h.unsqueeze(-3)).sum(-1).square().sum(-2)
                bends = bends + ridge * along[..., None, None] * self.h.unsqueeze(-1) * self.h.unsqueeze(-2)
            at = torch.arange(a, device=H.device)
            H.unflatten(-1, (a, d)).unflatten(-3, (a, d)).movedim(-2, -3)[..., at, at, :, :] += bends
            whole, scale, singular = _cholesky(H, 0.0)
            batch = H.shape[:-2]
            return Factors(whole, scale, H.new_ones((*batch, 1, 1)), H.new_ones((*batch, 1)), singular)
        omega = torch.where(self.used, self.omega, 0).unsqueeze(-2)
        Phi = self.M * (self.X @ self.h.mT)
        A = root.unsqueeze(-1) * self.X
        K = (A @ A.mT).mul_((self.M * omega) @ self.M.mT)
        W = root.unsqueeze(-1) * Phi
        K.sub_((W * omega) @ W.mT)
        if self.held is not None:
            still = (root.unsqueeze(-1) * self.M * omega.sqrt()).unsqueeze(-1) * (self.X.unsqueeze(-2) - self._moves())
            K.sub_(still.flatten(-2) @ still.flatten(-2).mT)
        K.diagonal(dim1=-2, dim2=-1).add_(1)
        whole, info = torch.linalg.cholesky_ex(K)  # its pivots are at least 1
        scale, bad = torch.ones_like(root), info != 0
        W = torch.linalg.solve_triangular(whole, W, upper=False)
        C = W.mT @ W
        C.diagonal(dim1=-2, dim2=-1).add_((~self.used).to(C.dtype))
        schur, schur_scale, singular = _cholesky(C, ridge)
        return Factors(whole, scale, schur, schur_scale, bad | singular)

    def solve(self, factors: Factors, g: Tensor, *, refinements: int = 1) -> Tensor:
        """``H^-1 g`` for ``(*extra, *batch, a, d)``; zero stays zero where a place is not used."""
        g = self.free(g)
        q = self._solve_once(factors, g)
        for _ in range(refinements):
            q = q + self._solve_once(factors, g - self.free(self.times(q)))
        return q

    def _moves(self) -> Tensor:
        """``(n, 1 or a, d)``: the rows ``x_k (I - Pi_i)``."""
        X = self.X.unsqueeze(-2)
        return X if self.held is None else X - (self.X.unsqueeze(-3) @ self.held).movedim(-3, -2)

    def _solve_once(self, factors: Factors, g: Tensor) -> Tensor:
        whole, scale, schur, schur_scale, _ = factors
        if self.direct:
            return self.free(_solve(whole, scale, g.flatten(-2)).unflatten(-1, g.shape[-2:]))
        root = self.curvature.clamp_min(0).sqrt()
        omega = torch.where(self.used, self.omega, 0).unsqueeze(-1)
        Phi = self.M * (self.X @ self.h.mT)
        first = _solve(whole, scale, root * self.fit(omega * self.across(g)))
        missing = (self.h * g).sum(-1) - (Phi * (root * first).unsqueeze(-1)).sum(-2)
        alpha = _solve(schur, schur_scale, missing)
        tau = first + _solve(whole, scale, root * (Phi * alpha.unsqueeze(-2)).sum(-1))
        return omega * self.across(g - self.pull(root * tau)) + self.h * alpha.unsqueeze(-1)


def take_along(t: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries of `t` at an index, batch dimensions broadcast."""
    rank = max(t.ndim, index.ndim)
    wide, at = (x.reshape((*[1] * (rank - x.ndim), *x.shape)) for x in (t, index))
    return torch.take_along_dim(wide, at, dim)


def _cholesky(A: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """The factor after scaling to a diagonal of ones, the scale, and whether a pivot is rounding noise."""
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1).sqrt()
    scaled = A / scale.unsqueeze(-1) / scale.unsqueeze(-2)
    if ridge:
        scaled.diagonal(dim1=-2, dim2=-1).add_(ridge)
    factor, info = torch.linalg.cholesky_ex(scaled)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    return factor, scale, (info != 0) | tiny_pivots(pivots, torch.ones_like(pivots))


def _solve(factor: Tensor, scale: Tensor, rhs: Tensor) -> Tensor:
    return solve_columns(lambda L, b: torch.cholesky_solve(b, L), (factor,), (2,), rhs / scale) / scale
