r"""Operators of the nuclear and the spectral norm: soft thresholds of singular values.

.. math:: \operatorname{prox}_{t\|\cdot\|_*}(X) = U \,\mathrm{diag}((\sigma_i - t)_+)\, V^T, \qquad
    P_\rho(X) = \operatorname{prox}_{\tau\|\cdot\|_*}(X) \ \text{ with } \ \|P_\rho(X)\|_* = \rho .

In the thin SVD of a matrix with at least as many rows as columns, with :math:`A = U^T H V`, :math:`z = (\sigma - t)_+`
and :math:`n = (t - \sigma)_+`, the derivative along H is

.. math:: U \Big(\tfrac{z_i + z_j}{z_i + z_j + n_i + n_j} \tfrac{A_{ij} + A_{ji}}{2}
    + \tfrac{z_i + z_j}{\sigma_i + \sigma_j} \tfrac{A_{ij} - A_{ji}}{2}\Big) V^T
    + (I - U U^T) H V \,\mathrm{diag}(z_i / \sigma_i)\, V^T,

every factor between 0 and 1. Second derivatives are those of the ramp of the symmetric matrix

.. math:: C = \begin{pmatrix} -t I & X \\ X^T & -t I \end{pmatrix}, \qquad
    \tfrac12 \|R(C)\|_F^2 = \tfrac12 \|\operatorname{prox}_{t\|\cdot\|_*}(X)\|_F^2 .

J.-F. Cai, E. Candes, Z. Shen, A singular value thresholding algorithm for matrix completion, 2010, theorem 2.1; A.
Beck, First-Order Methods in Optimization, 2017, section 7.3.

Symbols: ``X`` matrix, ``t`` step, ``rho`` radius, ``tau`` threshold, ``k`` number of singular values above it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._identify import identify
from ._operands import Number, on_matrices, per_element
from ._spectral import Constants, Potential, bend, into, operate, ratio, singular, split, steepness, sums


def prox_nuclear(x: Tensor, t: Number) -> Tensor:
    """Soft thresholding of the singular values: the prox of the nuclear norm.

    Solves ``argmin_z t * ||z||_* + 1/2 ||z - x||^2``, where the nuclear norm is the sum of the singular values.

    Args:
        x: ``(*batch, m, n)``.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch.

    Returns:
        The minimiser, shaped like `x`; NaN for a matrix that contains NaN or Inf.

    Raises:
        ValueError: For a negative or NaN `t`, a shape that does not broadcast, or a dtype that is not floating point.

    Differentiable in `x` and `t`, to second order (a third derivative raises ``RuntimeError``). Repeated and zero
    singular values are no exception. At a kink, a singular value equal to `t`, the derivative is that of the zero
    branch.

    Example:
        >>> import torch
        >>> prox_nuclear(torch.tensor([[3.0, 0.0], [0.0, 0.5]]), 1.0)
        tensor([[2., 0.],
                [0., 0.]])

    Source: J.-F. Cai, E. Candes, Z. Shen, A singular value thresholding algorithm for matrix completion, 2010,
    theorem 2.1.
    """
    return on_matrices(_shrunk, x, per_element("t", t, at_least=0))


def project_nuclear_ball(x: Tensor, radius: Number = 1.0) -> Tensor:
    """The nearest matrix whose singular values sum to at most `radius`.

    Solves ``argmin_z 1/2 ||z - x||^2 s.t. ||z||_* <= radius``.

    Args:
        x: ``(*batch, m, n)``.
        radius: At least 0: a number, or a tensor that broadcasts to the batch.

    Returns:
        The projection, shaped like `x`; NaN for a matrix that contains NaN or Inf.

    Raises:
        ValueError: For a negative or NaN `radius` (the set is empty), a shape that does not broadcast, or a dtype that
            is not floating point.

    Differentiable in `x` and `radius`, to second order (a third derivative raises ``RuntimeError``). At a kink, a
    singular value that just reaches zero, the derivative is that of the zero branch; on the boundary of the ball it is
    that of the inside, and at radius 0 it is zero.

    Example:
        >>> import torch
        >>> project_nuclear_ball(torch.tensor([[3.0, 0.0], [0.0, 2.5]]), 1.5)
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])

    Source: A. Beck, First-Order Methods in Optimization, 2017, section 7.3.
    """
    return on_matrices(_into_ball, x, per_element("radius", radius, at_least=0))


def prox_spectral_l2(x: Tensor, t: Number) -> Tensor:
    """Clips the largest singular values to a common height: the prox of the operator norm.

    Solves ``argmin_z t * ||z||_2 + 1/2 ||z - x||^2``, where the operator norm is the largest singular value: `x`
    less its projection on the nuclear ball of radius `t`, by Moreau's identity.

    Args:
        x: ``(*batch, m, n)``.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch.

    Returns:
        The minimiser, shaped like `x`; NaN for a matrix that contains NaN or Inf.

    Raises:
        ValueError: For a negative or NaN `t`, a shape that does not broadcast, or a dtype that is not floating point.

    Differentiable in `x` and `t`, to second order (a third derivative raises ``RuntimeError``). At a kink, a singular
    value that the height just reaches, the derivative is that of the value that stays as it is; so at ``t = 0`` the
    derivative in `t` is zero.

    Example:
        >>> import torch
        >>> prox_spectral_l2(torch.tensor([[3.0, 0.0], [0.0, 2.5]]), 1.5)
        tensor([[2., 0.],
                [0., 2.]])

    Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.7.3.
    """
    return on_matrices(lambda x, t: x - _into_ball(x, t), x, per_element("t", t, at_least=0))


def _per_matrix(number: Number, X: Tensor) -> Tensor:
    """A number for each matrix as ``(*batch)``."""
    number = number[..., 0, 0] if isinstance(number, Tensor) else X.new_full((), number)
    return number.expand(X.shape[:-2])


def _shrunk(X: Tensor, t: Number) -> Tensor:
    if X.shape[-2] < X.shape[-1]:
        return _shrunk(X.mT, t).mT
    t = _per_matrix(t, X)
    constants = identify(_above_step, X, t, ndims=(2, 0), found_ndims=Shrink.ndims)
    return unpack(operate(_SHRINK, pack(X, t), constants), *X.shape[-2:])[0]


def _into_ball(X: Tensor, rho: Number) -> Tensor:
    if X.shape[-2] < X.shape[-1]:
        return _into_ball(X.mT, rho).mT
    if X.shape[-1] == 0:
        return X.clone()
    rho = _per_matrix(rho, X)
    inside, *constants = identify(_above_threshold, X, rho, ndims=(2, 0), found_ndims=(0, *Ball.ndims))
    on_sphere = unpack(operate(_BALL, pack(X, rho), constants), *X.shape[-2:])[0]
    return torch.where(inside[..., None, None], X, on_sphere)


def _above_step(X: Tensor, t: Tensor) -> Constants:
    """The spectrum of X, and how far it lies above and below t."""
    U, s, V = singular(X)
    return U, s, *split(s - t.unsqueeze(-1), s[..., :1], X.shape[-2]), V


def _above_threshold(X: Tensor, rho: Tensor) -> Constants:
    """Whether X lies inside, its spectrum, and how far this lies above and below the threshold."""
    U, s, V = singular(X)
    rho = rho.unsqueeze(-1)
    counts = torch.arange(1, s.shape[-1] + 1, dtype=s.dtype, device=s.device)
    thresholds = (s.cumsum(-1) - rho) / counts
    # with k values positive; right for the largest k whose last value lies above it
    k = (s > thresholds).sum(-1, keepdim=True).clamp_min(1)
    tau = thresholds.gather(-1, k - 1).clamp_min(0)
    return (s.sum(-1) <= rho.squeeze(-1)), U, s, *split(s - tau, s[..., :1], X.shape[-2]), V


# ---------------------------------------------------------------------------------------------------------- derivatives


class Shrink(Potential):
    r"""Singular values lowered by t: the gradient :math:`(Z, -\|Z\|_*)` of half the squared norm of Z, in (X, t).

    Arguments and values are packed; constants ``U, s, z, n, V`` with singular values s, z above and n below t.
    """

    ndim = 1
    ndims = (2, 1, 1, 1, 2)

    def gradient(self, constants: Constants) -> Tensor:
        U, _, z, _, V = constants
        return pack((U * z.unsqueeze(-2)) @ V.mT, -z.sum(-1))

    def step(self, number: Tensor, trace: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of the threshold and of the last entry; those of the k largest values sum to `trace`."""
        return number, count * number - trace

    def slope(self, constants: Constants, h: Tensor) -> Tensor:
        U, s, z, n, V = constants
        H, number = unpack(h, U.shape[-2], V.shape[-2])
        HV = H @ V
        A = U.mT @ HV
        active = (z > 0).to(z.dtype)
        dt, last = self.step(number, (active * A.diagonal(dim1=-2, dim2=-1)).sum(-1), active.sum(-1))
        even, odd = steepness(z, n), ratio(sums(z), sums(s))
        inner = torch.addcmul(odd * A, even - odd, A + A.mT, value=0.5)
        inner.diagonal(dim1=-2, dim2=-1).sub_(active * dt.unsqueeze(-1))
        left = U @ inner
        if U.shape[-2] > V.shape[-2]:  # what leaves the column space
            left = left + (HV - U @ A) * ratio(z, s).unsqueeze(-2)
        return pack(left @ V.mT, last)

    def curvature(self, constants: Constants, h: Tensor, k: Tensor) -> Tensor:
        """By the ramp of the matrix C in the head of this file, whose eigenvalues are s - t, -s - t, and -t."""
        U, s, z, n, V = constants
        rows, columns = U.shape[-2], V.shape[-2]
        t = (s - z + n)[..., :1]
        half = math.sqrt(0.5)
        left, right, below = [U * half, U * half], [V * half, V * -half], [n, s + t]
        if rows > columns:  # the null space of X^T
            left.append(torch.linalg.qr(U, mode="complete").Q[..., columns:])
            right.append(torch.zeros_like(left[-1][..., :1, :]).expand(*V.shape[:-1], rows - columns))
            below.append(t.expand(*t.shape[:-1], rows - columns))
        Q, under = torch.cat([torch.cat(left, -1), torch.cat(right, -1)], -2), torch.cat(below, -1)
        over = torch.cat([z, torch.zeros_like(under[..., columns:])], -1)
        H, K = (into(Q, _dilated(v, rows, columns)) for v in (h, k))
        B = Q @ bend(over, under, H, K) @ Q.mT
        corner = B[..., :rows, rows:] + B[..., rows:, :rows].mT
        return pack(corner, -B.diagonal(dim1=-2, dim2=-1).sum(-1))


class Ball(Shrink):
    """The same with the threshold that makes the nuclear norm equal to the number; its gradient's last entry."""

    def gradient(self, constants: Constants) -> Tensor:
        U, s, z, n, V = constants
        return pack((U * z.unsqueeze(-2)) @ V.mT, (s - z + n)[..., 0])

    def step(self, number: Tensor, trace: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        dt = (trace - number) / count.clamp_min(1)
        return dt, dt

    def curvature(self, constants: Constants, h: Tensor, k: Tensor) -> Tensor:
        """That of :class:`Shrink` along the moving threshold, which itself bends to keep the norm."""
        U, _, z, _, V = constants
        rows, columns = U.shape[-2], V.shape[-2]
        h, k = (self._along_threshold(constants, v) for v in (h, k))
        B, fall = unpack(Shrink.curvature(self, constants, h, k), rows, columns)
        active = (z > 0).to(z.dtype)
        bent = -fall / active.sum(-1).clamp_min(1)
        return pack(B - bent[..., None, None] * ((U * active.unsqueeze(-2)) @ V.mT), bent)

    def _along_threshold(self, constants: Constants, v: Tensor) -> Tensor:
        """A direction with the move of the threshold in place of that of the radius."""
        moved = self.slope(constants, v)[..., -1:]
        return torch.cat([v[..., :-1].expand(*moved.shape[:-1], -1), moved], -1)


def pack(X: Tensor, t: Tensor) -> Tensor:
    """A matrix and a number as one vector."""
    return torch.cat([X.flatten(-2), t.unsqueeze(-1)], -1)


def unpack(y: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The matrix and the number."""
    return y[..., :-1].unflatten(-1, (rows, columns)), y[..., -1]


def _dilated(y: Tensor, rows: int, columns: int) -> Tensor:
    """The symmetric matrix C of a packed pair."""
    X, t = unpack(y, rows, columns)
    C = torch.diag_embed(-t.unsqueeze(-1).expand(*t.shape, rows + columns))
    C[..., :rows, rows:] = X
    C[..., rows:, :rows] = X.mT
    return C


_SHRINK, _BALL = Shrink(), Ball()
