r"""Functions of singular values and of eigenvalues: one mechanism, right at repeated and at zero values.

Autograd through an SVD divides by differences of singular values. The map itself has no such poles. Each operator here
is the gradient of a convex potential in all its arguments together, so its derivatives of first and second order are
symmetric multilinear forms, and one routine for each serves forward and reverse mode. With the spectrum at hand as
constants, a :class:`Potential` states these routines; the Functions below link them.

What is piecewise linear in the spectrum reduces to the ramp of a symmetric matrix,

.. math:: R(C) = Q \,\mathrm{diag}((\lambda_i)_+)\, Q^T, \qquad C = Q \,\mathrm{diag}(\lambda)\, Q^T .

With :math:`z = (\lambda)_+`, :math:`n = (-\lambda)_+`, and all matrices in the basis Q,

.. math::
    R'[H]_{ij} = \tfrac{z_i + z_j}{z_i + z_j + n_i + n_j} H_{ij}, \qquad
    R''[H, K]_{ij} = \sum_k \lambda_+[i, j, k]\,(H_{ik} K_{kj} + K_{ik} H_{kj})

(Daleckii, Krein 1965; R. Bhatia, Matrix Analysis, 1997, chapter V.3), where the second divided difference vanishes
unless the three eigenvalues lie on both sides of zero. Then, with p, p' on the positive and q, q' on the other side, it
is a product, so that the sums are matrix products:

.. math::
    \lambda_+[p, p', q] = n_q G_{pq} G_{p'q}, \qquad \lambda_+[p, q, q'] = z_p G_{pq} G_{pq'}, \qquad
    G_{pq} = \tfrac{1}{z_p + n_q}.

Nothing is ever divided by the difference of two numbers on the same side. Numbers within rounding of zero count as
lying below: the zero branch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from difflayers.linalg._autodiff import alive, forward_mode, opaque, plain_forward, primal, quick_apply
from difflayers.linalg._grads_batched import batched_backward
from difflayers.linalg._system import align

Constants = tuple[Tensor, ...]


class Potential(ABC):
    """A potential whose gradient is the operator, with all that is known of the spectrum at hand as constants.

    Attributes:
        ndim: Trailing dimensions of the argument that belong to one element.
        ndims: The same for every constant.
    """

    ndim: int
    ndims: tuple[int, ...]

    @abstractmethod
    def gradient(self, constants: Constants) -> Tensor:
        """The operator itself."""

    @abstractmethod
    def slope(self, constants: Constants, h: Tensor) -> Tensor:
        """Its derivative along `h`."""

    @abstractmethod
    def curvature(self, constants: Constants, h: Tensor, k: Tensor) -> Tensor:
        """Its second derivative along `h` and `k`."""


# --------------------------------------------------------------------------------------------- derivatives for autograd


def _keep(ctx: Any, potential: Potential, *tensors: Tensor) -> None:
    ctx.potential = potential
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _fit(g: Tensor, like: Tensor) -> Tensor:
    """A cotangent summed over the batch dimensions that `like` does not have."""
    return g if g.shape == like.shape else g.sum_to_size(like.shape)


@quick_apply
class Gradient(torch.autograd.Function):
    """``(y, *constants)`` to the gradient of the potential at y."""

    @staticmethod
    def forward(potential: Potential, y: Tensor, *constants: Tensor) -> Tensor:
        with plain_forward(y):
            return potential.gradient(constants)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, *inputs)

    @staticmethod
    @batched_backward
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        y, *constants = map(alive, ctx.saved_tensors)
        return (None, _fit(Slope.apply(ctx.potential, y, g, *constants), y), *([None] * len(constants)))

    @staticmethod
    def jvp(ctx: Any, _potential: Any, y_t: Tensor, *_: Any) -> Tensor:
        with forward_mode():
            y, *constants = map(primal, ctx.saved_tensors)
            return Slope.apply(ctx.potential, y, primal(y_t), *constants)

    @staticmethod
    def vmap(info: Any, in_dims: Any, potential: Potential, *tensors: Tensor) -> Any:
        moved = align(tensors, in_dims[1:], (potential.ndim, *potential.ndims))
        return Gradient.apply(potential, *moved), 0


@quick_apply
class Slope(torch.autograd.Function):
    """``(y, h, *constants)`` to the derivative of the gradient along h: linear and self-adjoint in h."""

    @staticmethod
    def forward(potential: Potential, y: Tensor, h: Tensor, *constants: Tensor) -> Tensor:
        with plain_forward(y):
            return potential.slope(constants, h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, *inputs)

    @staticmethod
    @batched_backward
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        y, h, *constants = map(alive, ctx.saved_tensors)
        _, for_y, for_h, *_ = ctx.needs_input_grad
        y_bar = _fit(Curvature.apply(ctx.potential, y, h, g, *constants), y) if for_y else None
        h_bar = _fit(Slope.apply(ctx.potential, y, g, *constants), h) if for_h else None
        return (None, y_bar, h_bar, *([None] * len(constants)))

    @staticmethod
    def jvp(ctx: Any, _potential: Any, y_t: Tensor | None, h_t: Tensor | None, *_: Any) -> Tensor:
        with forward_mode():
            y, h, *constants = map(primal, ctx.saved_tensors)
            parts = []
            if y_t is not None:
                parts.append(Curvature.apply(ctx.potential, y, h, primal(y_t), *constants))
            if h_t is not None:
                parts.append(Slope.apply(ctx.potential, y, primal(h_t), *constants))
            return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    @staticmethod
    def vmap(info: Any, in_dims: Any, potential: Potential, *tensors: Tensor) -> Any:
        moved = align(tensors, in_dims[1:], (potential.ndim, potential.ndim, *potential.ndims))
        return Slope.apply(potential, *moved), 0


_NO_THIRD = "functions of singular values have derivatives of first and second order, not of third"


@quick_apply
class Curvature(torch.autograd.Function):
    """``(y, h, k, *constants)`` to the second derivative along h and k.

    It is symmetric and linear in h, in k and in its cotangent, and so it is its own derivative in h and k. In y it has
    none here.
    """

    @staticmethod
    def forward(potential: Potential, y: Tensor, h: Tensor, k: Tensor, *constants: Tensor) -> Tensor:
        with plain_forward(y):
            return potential.curvature(constants, h, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, *inputs)

    @staticmethod
    @batched_backward
    def backward(ctx: Any, g: Tensor) -> Any:
        y, h, k, *constants = map(alive, ctx.saved_tensors)
        _, for_y, for_h, for_k, *_ = ctx.needs_input_grad
        if for_y:
            raise RuntimeError(_NO_THIRD)
        h_bar = _fit(Curvature.apply(ctx.potential, y, g, k, *constants), h) if for_h else None
        k_bar = _fit(Curvature.apply(ctx.potential, y, h, g, *constants), k) if for_k else None
        return None, None, h_bar, k_bar, *([None] * len(constants))

    @staticmethod
    def jvp(ctx: Any, _potential: None, y_t: Tensor | None, h_t: Tensor | None, k_t: Tensor | None, *_: Any) -> Any:
        if y_t is not None:
            raise RuntimeError(_NO_THIRD)
        with forward_mode():
            y, h, k, *constants = map(primal, ctx.saved_tensors)
            parts = [] if h_t is None else [Curvature.apply(ctx.potential, y, primal(h_t), k, *constants)]
            parts += [] if k_t is None else [Curvature.apply(ctx.potential, y, h, primal(k_t), *constants)]
            return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info: Any, in_dims: Any, potential: Potential, *tensors: Tensor) -> Any:
        moved = align(tensors, in_dims[1:], (*[potential.ndim] * 3, *potential.ndims))
        return Curvature.apply(potential, *moved), 0


@opaque
def operate(potential: Potential, y: Tensor, constants: Sequence[Tensor]) -> Tensor:
    """The operator at `y`, differentiable in `y` to second order."""
    return Gradient.apply(potential, y, *constants)


# ------------------------------------------------------------------------------------------------------------ the ramp


def steepness(z: Tensor, n: Tensor) -> Tensor:
    """First divided differences of the ramp: exactly 1 above zero, exactly 0 below, between them across."""
    top = sums(z)
    return ratio(top, top + sums(n))


def bend(z: Tensor, n: Tensor, H: Tensor, K: Tensor) -> Tensor:
    """The second derivative of the ramp in the basis of eigenvectors, along symmetric `H` and `K`."""
    above, below = (z > 0).unsqueeze(-1), (z == 0).unsqueeze(-2)
    z, n = z.unsqueeze(-1), n.unsqueeze(-2)
    G = torch.where(above & below, 1 / (z + n), 0)
    h, k = G * H, G * K
    upper = (h * n) @ k.mT
    lower = (h * z).mT @ k
    inside = torch.where(above & above.mT, 1, 0).to(G.dtype)
    outside = torch.where(below & below.mT, 1, 0).to(G.dtype)
    across = ((inside * H) @ k + (inside * K) @ h) * n + z * (h @ (outside * K) + k @ (outside * H))
    half = (upper + lower) + G * across
    return half + half.mT


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """``a / b`` for `b` of at least 0, and 0 where it is 0."""
    return a * b.sign() / b.clamp_min(torch.finfo(b.dtype).tiny)


def sums(v: Tensor) -> Tensor:
    """Sums of all pairs."""
    return v.unsqueeze(-1) + v.unsqueeze(-2)


def into(Q: Tensor, H: Tensor) -> Tensor:
    """The symmetric part of `H` in the basis `Q`."""
    A = Q.mT @ H @ Q
    return (A + A.mT) / 2


# -------------------------------------------------------------------------------------------------------- the spectrum


def singular(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD ``U, s, V`` of plain tensors, NaN for elements that are not finite (LAPACK would refuse them all)."""
    U, s, Vh = torch.linalg.svd(X.nan_to_num(0, 0, 0), full_matrices=False)
    spoilt = _nan_if_spoilt(X)
    return U + spoilt[..., None, None], s + spoilt.unsqueeze(-1), Vh.mT


def eigen(A: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors ``lambda, Q`` of plain symmetric matrices, NaN for elements that are not finite."""
    values, Q = torch.linalg.eigh(A.nan_to_num(0, 0, 0))
    spoilt = _nan_if_spoilt(A)
    return values + spoilt.unsqueeze(-1), Q + spoilt[..., None, None]


def _nan_if_spoilt(X: Tensor) -> Tensor:
    """A number for each matrix: NaN where an entry is NaN or infinite, else 0."""
    return X.abs().amax((-2, -1)) * 0 if X.shape[-2] and X.shape[-1] else X.new_zeros(X.shape[:-2])


def split(values: Tensor, size: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """How far each value lies above zero and below it; what rounding cannot tell from zero lies below.

    Args:
        values: ``(*batch, n)``.
        size: ``(*batch, 1)`` norm of the matrix they come from.
        dimension: Its larger dimension.
    """
    above = values > size * (dimension * torch.finfo(values.dtype).eps)
    largest = torch.finfo(values.dtype).max  # a step may be infinite
    return torch.where(above, values, 0), torch.where(above, 0, -values).clamp(0, largest)
