r"""Projection on matrices with orthonormal columns: the polar factor.

.. math:: P(X) = U V^T \quad \text{for} \quad X = U \,\mathrm{diag}(\sigma)\, V^T, \qquad
    \text{the root of} \quad Q X^T Q = X .

With :math:`A = U^T G V`, the derivative of that condition is inverted by

.. math:: G \mapsto U (A_{ij} / (\sigma_i + \sigma_j)) V^T + (I - U U^T) G V \,\mathrm{diag}(1/\sigma)\, V^T,

which has poles only where two singular values are zero. N. Higham, Functions of Matrices, 2008, theorem 8.4 and
section 8.2.

Symbols: ``X`` matrix, ``Q`` its polar factor, ``U``, ``s``, ``V`` its thin singular value decomposition.
"""

from __future__ import annotations

from torch import Tensor

from ._identify import identify
from ._operands import on_matrices
from ._spectral import Constants, Potential, operate, ratio, singular, split, sums


def project_stiefel(x: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns: the orthogonal factor of the polar decomposition.

    Solves ``argmin_z 1/2 ||z - x||^2 s.t. z^T z = I``.

    Args:
        x: ``(*batch, m, n)`` with m at least n.

    Returns:
        The projection, shaped like `x`; NaN for a matrix that contains NaN or Inf. It is unique where `x` has full
        rank; otherwise it is one of the nearest.

    Raises:
        ValueError: For fewer rows than columns, or a dtype that is not floating point.

    Differentiable in `x`, to second order (a third derivative raises ``RuntimeError``), where `x` has full rank,
    repeated singular values included. Where it has not, directions between two zero singular values count as zero.

    Example:
        >>> import torch
        >>> project_stiefel(torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 2.0]]))
        tensor([[0.6000, 0.0000],
                [0.8000, 0.0000],
                [0.0000, 1.0000]])

    Source: N. Higham, Functions of Matrices, 2008, theorem 8.4.
    """
    if isinstance(x, Tensor) and x.ndim >= 2 and x.shape[-2] < x.shape[-1]:
        raise ValueError(f"x: expected at least as many rows as columns, got shape {tuple(x.shape)}")
    return on_matrices(_polar, x)


def _polar(X: Tensor) -> Tensor:
    return operate(_POLAR, X, identify(_decomposed, X, ndims=(2,), found_ndims=Polar.ndims))


def _decomposed(X: Tensor) -> Constants:
    """Thin SVD, singular values within rounding of zero made zero."""
    U, s, V = singular(X)
    return U, split(s, s[..., :1], X.shape[-2])[0], V


class Polar(Potential):
    """The gradient of the nuclear norm; constants ``U, s, V``."""

    ndim = 2
    ndims = (2, 1, 2)

    def gradient(self, constants: Constants) -> Tensor:
        U, _, V = constants
        return U @ V.mT

    def slope(self, constants: Constants, h: Tensor) -> Tensor:
        U, _, V = constants
        HV = h @ V
        A = U.mT @ HV
        return self.solve(constants, A - A.mT, HV, A)

    def curvature(self, constants: Constants, h: Tensor, k: Tensor) -> Tensor:
        """The second derivative of ``Q X^T Q = X``, where every term with two first derivatives counts."""
        U, s, V = constants
        Q, SV = U @ V.mT, s.unsqueeze(-1) * V.mT
        D, E = self.slope(constants, h), self.slope(constants, k)
        # mixed terms: (D K^T + E H^T) Q + Q (H^T E + K^T D) + D X^T E + E X^T D
        right = (D @ k.mT + E @ h.mT) @ Q + Q @ (h.mT @ E + k.mT @ D)
        XD, XE = SV.mT @ (U.mT @ D), SV.mT @ (U.mT @ E)
        right = right + D @ XE + E @ XD
        RV = right @ V
        A = U.mT @ RV
        return -self.solve(constants, A, RV, A)

    @staticmethod
    def solve(constants: Constants, inner: Tensor, GV: Tensor, A: Tensor) -> Tensor:
        """The inverse in the head of this file, of `inner` in the column space and of ``G V`` out of it."""
        U, s, V = constants
        left = U @ ratio(inner, sums(s))
        if U.shape[-2] > U.shape[-1]:
            left = left + ratio(GV - U @ A, s.unsqueeze(-2))
        return left @ V.mT


_POLAR = Polar()
