r"""The gated problem with vector outputs, of a batch of training sets; and the set on which its solution is smooth.

.. math:: \min_U \tfrac12 \sum_k s_k \|f_k - y_k\|^2 + \beta \sum_i \|U_i\|_*, \qquad F = \sum_i Z_i U_i, \quad
    Z_i = \mathrm{diag}(M_{\cdot i}) X

A solution is a fixed point of a proximal gradient step, for every step length t:

.. math:: U = \operatorname{prox}_{t \beta \|\cdot\|_*}(V), \qquad V_i = U_i - t Z_i^T S (F - Y).

The derivative D of the prox is diagonal in a basis made of singular vectors of V (``proximal/_nuclear.py``), with
entries :math:`\delta \in [0, 1]`. Where they are not zero they span the tangent space T of the matrices of the rank of
U. With H the Hessian of the loss, a system with :math:`J = I - D (I - t H)` is one on T:

.. math:: K = P_T H P_T + \mathrm{diag}\,\kappa, \quad \kappa = \frac{1 - \delta}{t \delta}, \qquad
    J^{-1} g = g + \tfrac1t K^{-1} P_T (I - t H) g, \quad J^{-T} g = g + \tfrac1t (I - t H) K^{-1} P_T g .

K is singular exactly if there are symmetric :math:`Q_i` with :math:`\sum_i Z_i A_i Q_i B_i^T = 0`, for :math:`U_i = A_i
\Sigma_i B_i^T` (where no further singular value of a slope equals beta): if the network is not minimal.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from difflayers.linalg._direct import solve_columns, tiny_pivots
from difflayers.proximal._identify import identify
from difflayers.proximal._nuclear import Shrink, pack, unpack
from difflayers.proximal._spectral import operate, singular

from ._block_hessian import take_along

_SHRINK = Shrink()


@dataclass(frozen=True)
class NuclearTask:
    """The data of a batch of problems.

    Attributes:
        X: ``(*batch, n, d)``.
        M: ``(*batch, n, P)`` patterns, zeros and ones in the dtype of X.
        Y: ``(*batch, n, c)``.
        s: ``(*batch, n)``, at least 0.
        beta: ``(*batch)``, more than 0.
    """

    X: Tensor
    M: Tensor
    Y: Tensor
    s: Tensor
    beta: Tensor

    def take(self, rows: Tensor) -> NuclearTask:
        """The problems of some elements of one batch dimension."""
        return replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def fit(self, U: Tensor) -> Tensor:
        """``sum_i Z_i U_i``."""
        return vector_fit(U, self.X, self.M)

    def pull(self, N: Tensor) -> Tensor:
        """``Z_i^T N`` for every block: ``(*batch, P, d, c)``."""
        open_rows = self.M.unsqueeze(-1) * N.unsqueeze(-2)
        return (self.X.mT @ open_rows.flatten(-2)).unflatten(-1, open_rows.shape[-2:]).movedim(-2, -3)

    def slope(self, F: Tensor) -> Tensor:
        """The derivative of the loss in every block, at the predictions `F`."""
        return self.pull(self.s.unsqueeze(-1) * (F - self.Y))

    def hessian(self, W: Tensor) -> Tensor:
        """``H W``."""
        return self.pull(self.s.unsqueeze(-1) * self.fit(W))

    def data_term(self, F: Tensor) -> Tensor:
        """The weighted loss."""
        return (self.s * (F - self.Y).square().sum(-1)).sum(-1) / 2

    def noise(self, U: Tensor) -> Tensor:
        """What rounding can add to a subgradient."""
        terms = (self.M.unsqueeze(-1) * products(U, self.X)).abs().sum(-2) + self.Y.abs()
        each = self.s * torch.linalg.vector_norm(terms, dim=-1) * torch.linalg.vector_norm(self.X, dim=-1)
        return torch.finfo(U.dtype).eps * torch.maximum(each.sum(-1), self.beta)

    def lower_bound(self, U: Tensor) -> Tensor:
        """A lower bound on the optimal value, from the slopes at `U`: tight where `U` is optimal."""
        N = self.s.unsqueeze(-1) * (self.Y - self.fit(U))
        largest = spectral_norm(self.pull(N)).amax(-1)
        linear = (self.Y * N).sum((-2, -1))
        square = torch.where(self.s > 0, N.square().sum(-1) / torch.where(self.s > 0, self.s, 1), 0).sum(-1)
        c = torch.where(square > 0, linear / torch.where(square > 0, square, 1), 0).clamp_min(0)
        most = torch.where(largest > 0, self.beta / torch.where(largest > 0, largest, 1), torch.inf)
        c = torch.minimum(c, most)
        return c * linear - c.square() * square / 2


def as_task(X: Tensor, Y: Tensor, s: Tensor, beta: Tensor, M: Tensor) -> NuclearTask:
    """The task, with patterns as numbers."""
    return NuclearTask(X, M.to(X.dtype), Y, s, beta)


def products(U: Tensor, X: Tensor) -> Tensor:
    """``x_k^T U_i``: ``(*batch, n, P, c)``."""
    wide = U.movedim(-3, -2).flatten(-2)
    return (X @ wide).unflatten(-1, (U.shape[-3], U.shape[-1]))


def vector_fit(U: Tensor, X: Tensor, M: Tensor) -> Tensor:
    """The predictions ``(*batch, n, c)`` of neurons ``(*batch, P, d, c)``."""
    return (M.unsqueeze(-1) * products(U, X)).sum(-2)


def spectral_norm(U: Tensor) -> Tensor:
    """The largest singular value of plain matrices."""
    return torch.linalg.svdvals(U.nan_to_num(0, 0, 0))[..., 0]


# ------------------------------------------------------------------------------------------------------------ the prox


class Spectrum(NamedTuple):
    """Matrices ``(*batch, d, c)`` and a threshold: thin SVD, singular values above and below the threshold.

    Attributes:
        left: ``(*batch, d, p)``, p the smaller of d and c.
        s: ``(*batch, p)`` singular values.
        z: How far they lie above the threshold, 0 for those below.
        n: How far they lie below, 0 for those above.
        right: ``(*batch, c, p)``.
    """

    left: Tensor
    s: Tensor
    z: Tensor
    n: Tensor
    right: Tensor

    def shrunk(self) -> Tensor:
        """The prox."""
        return (self.left * self.z.unsqueeze(-2)) @ self.right.mT


def spectrum(V: Tensor, threshold: Tensor, rank: Tensor | None = None) -> Spectrum:
    """The spectrum of matrices; with a given rank so many values are above the threshold, whatever they are."""
    left, s, right = singular(V)
    over = s - threshold.unsqueeze(-1)
    if rank is None:
        above = over > s[..., :1] * (4 * torch.finfo(s.dtype).eps)
    else:
        above = torch.arange(s.shape[-1], device=s.device) < rank.unsqueeze(-1)
    z, n = torch.where(above, over.clamp_min(0), 0), torch.where(above, 0, (-over).clamp_min(0))
    return Spectrum(left, s, z, n, right)


def ranks(U: Tensor) -> Tensor:
    """The rank of every block of plain ``(*batch, P, d, c)``, to rounding of the largest one."""
    s = torch.linalg.svdvals(U.nan_to_num(0, 0, 0))
    dust = torch.finfo(U.dtype).eps ** 0.75 * s[..., 0].amax(-1, keepdim=True).unsqueeze(-1)
    return (s > dust).sum(-1)


def shrunk_with_norm(V: Tensor, threshold: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """The prox of matrices with the ranks held, and its nuclear norm; differentiable to second order."""
    if V.shape[-2] < V.shape[-1]:
        p, norm = shrunk_with_norm(V.mT, threshold, rank)
        return p.mT, norm
    threshold = threshold.expand(V.shape[:-2])
    constants = identify(spectrum, V, threshold, rank, ndims=(2, 0, 0), found_ndims=Shrink.ndims)
    p, less = unpack(operate(_SHRINK, pack(V, threshold), constants), *V.shape[-2:])
    return p, -less


def step_length(U: Tensor, X: Tensor, s: Tensor, beta: Tensor) -> Tensor:
    """A step on the scale of the solution, of plain tensors: any would do, a long one makes rounding worse."""
    size = spectral_norm(U).amax(-1) / beta
    bend = (s * X.square().sum(-1)).sum(-1)
    size = torch.where(bend > 0, torch.minimum(size, 1 / torch.where(bend > 0, bend, 1)), size)
    return torch.where(size > 0, size, 1)


# ------------------------------------------------------------------------------------------------------- tangent space


class Tangent(NamedTuple):
    """The span T of the directions in which the prox moves, in a basis in which its derivative is diagonal.

    Only blocks with a singular value above the threshold take part, padded to the same number a. The coordinates of a
    block are those of the square part A of ``left^T W right``: symmetric pairs ``(A_ij + A_ji) / sqrt 2`` above the
    diagonal, antisymmetric ones below it; other entries as they are. T picks some.

    Attributes:
        blocks: ``(*batch, a)`` which.
        left: ``(*batch, a, d, d)`` singular vectors, completed.
        right: ``(*batch, a, c, c)``.
        pick: ``(*batch, T)`` places in the coordinates ``(a d c)``, padded.
        used: ``(*batch, T)``.
        delta: ``(*batch, T)`` derivatives of the prox, 1 at padded places.
        bend: ``(*batch, T)`` of ``(1 - delta) / delta``, 0 at padded places.
    """

    blocks: Tensor
    left: Tensor
    right: Tensor
    pick: Tensor
    used: Tensor
    delta: Tensor
    bend: Tensor

    @staticmethod
    def of(spec: Spectrum) -> Tangent:
        """From the spectra of all blocks ``(B, P, ...)``."""
        active = (spec.z > 0).any(-1)
        index, there = first_true(active)
        left, right = (_blocks(t, index, 2) for t in (spec.left, spec.right))
        s, z, n = (_blocks(t, index, 1) for t in (spec.s, spec.z, spec.n))
        z = torch.where(there.unsqueeze(-1), z, 0)
        d, c, p = left.shape[-2], right.shape[-2], s.shape[-1]
        i = torch.arange(p, device=s.device)
        pairs = z.unsqueeze(-1) + z.unsqueeze(-2)
        below = torch.where(z > 0, s - z, s)
        even, odd = n.unsqueeze(-1) + n.unsqueeze(-2), below.unsqueeze(-1) + below.unsqueeze(-2)
        gain, lost = pairs, torch.where(i.unsqueeze(-1) <= i, even, odd)
        if d > p:
            gain = torch.cat([gain, z.unsqueeze(-2).expand(*z.shape[:-1], d - p, p)], -2)
            lost = torch.cat([lost, below.unsqueeze(-2).expand(*z.shape[:-1], d - p, p)], -2)
        if c > p:
            gain = torch.cat([gain, z.unsqueeze(-1).expand(*z.shape[:-1], p, c - p)], -1)
            lost = torch.cat([lost, below.unsqueeze(-1).expand(*z.shape[:-1], p, c - p)], -1)
        gain, lost = gain.flatten(-3), lost.flatten(-3)
        pick, used = first_true(gain > 0)
        gain, lost = gain.gather(-1, pick), lost.gather(-1, pick)
        bend = torch.where(used, lost / torch.where(used, gain, 1), 0)
        return Tangent(index, completed(left), completed(right), pick, used, 1 / (1 + bend), bend)

    def columns(self, X: Tensor, M: Tensor) -> Tensor:
        """The fit of every basis vector: ``(*batch, T, n c)``."""
        d, c = self.left.shape[-1], self.right.shape[-1]
        block, a, b = self.places()
        scale, twin = self._mixing()
        XL = (X.unsqueeze(-3) @ self.left).mT.flatten(-3, -2)  # (a d, n)
        R = self.right.mT.flatten(-3, -2)  # (a c, c)
        mask = take_along(take_along(M, self.blocks.unsqueeze(-2), -1).mT, block.unsqueeze(-1), -2)

        def part(row: Tensor, column: Tensor, weight: Tensor) -> Tensor:
            x = take_along(XL, (block * d + row).unsqueeze(-1), -2) * (mask * weight.unsqueeze(-1))
            return x.unsqueeze(-1) * take_along(R, (block * c + column).unsqueeze(-1), -2).unsqueeze(-2)

        used = self.used.to(X.dtype)
        both = part(a, b, scale * used) + part(b.clamp_max(d - 1), a.clamp_max(c - 1), twin * used)
        return both.flatten(-2)

    def into(self, W: Tensor) -> Tensor:
        """Coordinates on T of blocks ``(*batch, P, d, c)``."""
        A = self.left.mT @ _blocks(W, self.blocks, 2) @ self.right
        flat = self._turn(A, 1).flatten(-3)
        return take_along(flat, self.pick, -1) * self.used

    def outof(self, q: Tensor, P: int) -> Tensor:
        """Blocks of coordinates."""
        a, d, c = self.blocks.shape[-1], self.left.shape[-1], self.right.shape[-1]
        batch = torch.broadcast_shapes(q.shape[:-1], self.pick.shape[:-1])
        q = (q * self.used).expand(*batch, -1)
        flat = q.new_zeros((*batch, a * d * c)).scatter_add(-1, self.pick.expand_as(q), q)
        W = self.left @ self._turn(flat.unflatten(-1, (a, d, c)), -1) @ self.right.mT
        at = self.blocks[..., None, None].expand(*batch, a, d, c)
        return W.new_zeros((*batch, P, d, c)).scatter_add(-3, at, W)

    def square(self, q: Tensor) -> Tensor:
        """The square part of the blocks of coordinates in the singular basis: ``(*batch, a, p, p)``."""
        a, d, c = self.blocks.shape[-1], self.left.shape[-1], self.right.shape[-1]
        flat = q.new_zeros((*q.shape[:-1], a * d * c)).scatter_add(-1, self.pick, q * self.used)
        p = min(d, c)
        return self._turn(flat.unflatten(-1, (a, d, c)), -1)[..., :p, :p]

    def _turn(self, A: Tensor, way: int) -> Tensor:
        """From entries to coordinates (1) or back (-1)."""
        p = min(A.shape[-2:])
        square = A[..., :p, :p]
        i = torch.arange(p, device=A.device)
        order = (i - i.unsqueeze(-1)).sign().to(A.dtype) * way  # 1 above the diagonal
        turned = torch.where(order == 0, square, (square + order * square.mT) * 0.5**0.5)
        top = torch.cat([turned, A[..., :p, p:]], -1)
        return torch.cat([top, A[..., p:, :]], -2)

    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Block, row and column of the basis vectors."""
        d, c = self.left.shape[-1], self.right.shape[-1]
        return self.pick // (d * c), self.pick // c % d, self.pick % c

    def _mixing(self) -> tuple[Tensor, Tensor]:
        """Weights of ``u_a v_b^T`` and of ``u_b v_a^T`` in the basis vector ``(a, b)``."""
        p = min(self.left.shape[-1], self.right.shape[-1])
        _, a, b = self.places()
        mixed = (a != b) & (a < p) & (b < p)
        half = torch.full_like(self.delta, 0.5**0.5)
        sign = torch.where(a < b, half, -half)
        return torch.where(mixed, half, 1), torch.where(mixed, sign, 0)


class Curved(NamedTuple):
    """A Cholesky factor of K, after scaling to a diagonal of ones; whether K is singular to rounding."""

    factor: Tensor
    scale: Tensor
    singular: Tensor


def factorise(task: NuclearTask, tangent: Tangent, t: Tensor, ridge: float = 0.0) -> Curved:
    """K of one batch dimension."""
    A = tangent.columns(task.X, task.M) * task.s.sqrt().repeat_interleave(task.Y.shape[-1], -1).unsqueeze(-2)
    K = A @ A.mT
    K.diagonal(dim1=-2, dim2=-1).add_(torch.where(tangent.used, tangent.bend / t.unsqueeze(-1), 1))
    diagonal = K.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1).sqrt()
    K = K / scale.unsqueeze(-1) / scale.unsqueeze(-2)
    if ridge:
        K.diagonal(dim1=-2, dim2=-1).add_(ridge)
    factor, info = torch.linalg.cholesky_ex(K)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    return Curved(factor, scale, (info != 0) | tiny_pivots(pivots, torch.ones_like(pivots)))


def solve_curved(
    task: NuclearTask, tangent: Tangent, curved: Curved, t: Tensor, g: Tensor, refinements: int = 2
) -> Tensor:
    """``K^-1 g`` on T, batch dimensions broadcast."""
    P = task.M.shape[-1]

    def once(g: Tensor) -> Tensor:
        scaled = g / curved.scale
        return solve_columns(lambda L, b: torch.cholesky_solve(b, L), (curved.factor,), (2,), scaled) / curved.scale

    q = once(g)
    for _ in range(refinements):
        Kq = tangent.into(task.hessian(tangent.outof(q, P))) + tangent.bend / t.unsqueeze(-1) * q
        q = q + once(g - Kq)
    return q * tangent.used


def first_true(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices along the last dimension where `mask` holds, padded to the largest count, at least one; which are not."""
    most = max(int(mask.sum(-1).max()), 1) if mask.numel() else 1
    index = torch.argsort(mask.to(torch.int8), stable=True, dim=-1, descending=True)[..., :most]
    return index, mask.gather(-1, index)


def _blocks(t: Tensor, index: Tensor, ndim: int) -> Tensor:
    """Some blocks of ``(*batch, P, *event)`` with an event of so many dimensions."""
    return take_along(t, index[(...,) + (None,) * ndim], -1 - ndim)


def completed(Q: Tensor) -> Tensor:
    """Orthonormal columns completed to a square orthogonal matrix."""
    if Q.shape[-2] == Q.shape[-1]:
        return Q
    return torch.cat([Q, torch.linalg.qr(Q, mode="complete").Q[..., Q.shape[-1] :]], -1)
