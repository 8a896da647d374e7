r"""The cone of positive semidefinite matrices.

The projection is that on a spectral box without upper bound (:func:`~difflayers.proximal.project_spectral_box`). The
radial projection adds the least eigenvalue, if it is negative. Where that is a multiple one, of multiplicity k with
eigenvectors :math:`V_k`, its subgradients are the averages over unit vectors in their span, of which

.. math:: P = \tfrac{1}{k} V_k V_k^T

is the only one that does not depend on a choice of basis. A. S. Lewis, M. L. Overton, Eigenvalue optimization, 1996.
As :math:`\lambda_{\min}(A) = \langle P(A), A \rangle`, it is enough to differentiate the projector. With divided
differences, and c, c' inside and q, q' outside of the cluster, all matrices in the basis of eigenvectors,

.. math::
    P'[H]_{cq} = -G_{cq} H_{cq}, \qquad
    P''[H, K]_{ij} = \sum_k p[i, k, j] (H_{ik} K_{kj} + K_{ik} H_{kj}), \qquad
    k\,p[c, q, c'] = k\,p[c, c', q] = -G_{cq} G_{c'q}, \quad k\,p[c, q, q'] = G_{cq} G_{cq'}, \quad
    G_{cq} = \tfrac{1}{\lambda_q - \lambda_c} .
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from difflayers.proximal._identify import identify
from difflayers.proximal._spectral import Constants, Potential, eigen, into, operate
from difflayers.proximal._spectral_box import project_spectral_box

from ._cones import Cone


@dataclass(frozen=True)
class PositiveSemidefinite(Cone):
    """Symmetric matrices without negative eigenvalues, ``(*batch, n, n)``; its own dual.

    The space is that of symmetric matrices, as in CVXPY's ``PSD``: of `x` only the symmetric part counts, in the
    violation too.

    Default direction: the identity. Differentiable to second order (a third derivative raises ``RuntimeError``), also
    at repeated eigenvalues. At a kink, an eigenvalue equal to zero, the derivative of the projection is that of the
    zero branch. Where the smallest eigenvalue is a multiple one, the derivative of the radial projection is shared
    evenly between its eigenvectors.

    Example:
        >>> import torch
        >>> PositiveSemidefinite().project(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])

    Source: N. Higham, Computing a nearest symmetric positive semidefinite matrix, 1988, theorem 2.1.
    """

    ndim: ClassVar[int] = 2

    def dual(self) -> PositiveSemidefinite:
        """The cone itself."""
        return self

    def _event(self, size: int) -> tuple[int, ...]:
        n = math.isqrt(size)
        if n * n != size:
            raise ValueError("expected n * n entries of a square matrix")
        return (n, n)

    def _onto(self, x: Tensor) -> Tensor:
        return project_spectral_box(x)

    def _along(self, x: Tensor, direction: Tensor | None) -> Tensor:
        A = _symmetric(x)
        if not A.shape[-1]:
            return A
        if direction is None:
            D = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
            return A + torch.relu(-least_eigenvalue(A))[..., None, None] * D
        D = _symmetric(direction)
        return A + torch.relu(_to_boundary(A, D))[..., None, None] * D

    def _in_interior(self, x: Tensor) -> Tensor:
        return torch.linalg.cholesky_ex(_symmetric(x))[1] == 0


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) / 2


def least_eigenvalue(A: Tensor) -> Tensor:
    """``(*batch)`` smallest eigenvalue of symmetric matrices, differentiable to second order."""
    constants = identify(_spectrum, A, ndims=(2,), found_ndims=LeastProjector.ndims)
    return (operate(_LEAST, A, constants) * A).sum((-2, -1))


def _spectrum(A: Tensor) -> Constants:
    """Eigenvectors, the weights 1/k of those of the least eigenvalue, and G."""
    values, Q = eigen(A)
    size = values.abs().amax(-1, keepdim=True)
    above = values - values[..., :1]
    least = above <= size * (A.shape[-1] * torch.finfo(A.dtype).eps)
    weights = least.to(A.dtype) / least.sum(-1, keepdim=True).clamp_min(1)
    across = least.unsqueeze(-1) & ~least.unsqueeze(-2)
    G = torch.where(across, 1 / (values.unsqueeze(-2) - values.unsqueeze(-1)), 0)
    return Q, weights + 0 * values, G


class LeastProjector(Potential):
    """The gradient of the least eigenvalue: constants ``Q, weights, G``."""

    ndim = 2
    ndims = (2, 1, 2)

    def gradient(self, constants: Constants) -> Tensor:
        Q, weights, _ = constants
        return (Q * weights.unsqueeze(-2)) @ Q.mT

    def slope(self, constants: Constants, h: Tensor) -> Tensor:
        Q, weights, G = constants
        half = -weights.unsqueeze(-1) * G * into(Q, h)
        return Q @ (half + half.mT) @ Q.mT

    def curvature(self, constants: Constants, h: Tensor, k: Tensor) -> Tensor:
        Q, weights, G = constants
        H, K = into(Q, h), into(Q, k)
        inside = (weights > 0).to(H.dtype)
        inside, outside = (
            inside.unsqueeze(-1) * inside.unsqueeze(-2),
            (1 - inside).unsqueeze(-1) * (1 - inside).unsqueeze(-2),
        )
        h, k = G * H, G * K  # from the cluster (rows) to the rest (columns)
        corners = h.mT @ k - h @ k.mT
        across = G * (h @ (outside * K) + k @ (outside * H) - (inside * H) @ k - (inside * K) @ h)
        half = weights.amax(-1)[..., None, None] * (corners + across)
        return Q @ (half + half.mT) @ Q.mT


_LEAST = LeastProjector()


# ----------------------------------------------------------------------------------- radially, along another direction


def _to_boundary(A: Tensor, D: Tensor) -> Tensor:
    r"""``(*batch)`` least t for which ``A + t D`` is positive semidefinite, for positive definite D.

    By the projector at ``A + t D`` it is :math:`t = -\langle P, A \rangle / \langle P, D \rangle`, and this number
    hardly feels an error in P: with a constant P its first derivative is right, once more with P at that t also the
    second.
    """
    t, *spectrum = identify(_on_boundary, A, D, ndims=(2, 2), found_ndims=(0, *LeastProjector.ndims))
    P = _LEAST.gradient(tuple(spectrum))
    t = -(P * A).sum((-2, -1)) / (P * D).sum((-2, -1))
    P = operate(_LEAST, A + t[..., None, None] * D, spectrum)
    return -(P * A).sum((-2, -1)) / (P * D).sum((-2, -1))


def _on_boundary(A: Tensor, D: Tensor) -> Constants:
    """The number of :func:`_to_boundary`, and the spectrum there."""
    L = torch.linalg.cholesky_ex(D)[0]
    half = torch.linalg.solve_triangular(L, A, upper=False)
    values, _ = eigen(_symmetric(torch.linalg.solve_triangular(L, half.mT, upper=False)))
    t = -values[..., 0]
    return (t, *_spectrum(A + t[..., None, None] * D))
