r"""Projection on symmetric matrices with bounded eigenvalues; the cone of positive semidefinite matrices among them.

.. math:: P(A) = Q \,\mathrm{diag}(\min(\max(\lambda_i, l), u))\, Q^T = l I + R(A - l I) + u I - R(u I - A) - A

with the ramp R of ``_spectral.py``: the first form gives the value, the second the derivatives, in which an infinite
bound has no part. N. Higham, Computing a nearest symmetric positive semidefinite matrix, 1988.

Symbols: ``A`` symmetric matrix, ``l``, ``u`` bounds of its eigenvalues.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from difflayers.linalg._autodiff import physical

from ._identify import identify
from ._operands import Number, on_matrices, per_element
from ._spectral import Constants, Potential, bend, eigen, into, operate, ratio, split


def project_spectral_box(x: Tensor, lower: Number = 0.0, upper: Number = math.inf) -> Tensor:
    """The nearest symmetric matrix whose eigenvalues lie between `lower` and `upper`.

    Solves ``argmin_z 1/2 ||z - x||^2 s.t. z = z^T, lower * I <= z <= upper * I``. By default the set is the cone of
    positive semidefinite matrices. Of `x` only the symmetric part counts: the other part is orthogonal to the set.

    Args:
        x: ``(*batch, n, n)``.
        lower: Least eigenvalue, ``-inf`` for none: a number, or a tensor that broadcasts to the batch.
        upper: Largest eigenvalue, ``inf`` for none: likewise.

    Returns:
        The projection, shaped like `x`; NaN for a matrix that contains NaN or Inf.

    Raises:
        ValueError: For a matrix that is not square, bounds that are NaN or leave nothing between them, a shape that
            does not broadcast, or a dtype that is not floating point.

    Differentiable in `x`, `lower` and `upper`, to second order (a third derivative raises ``RuntimeError``). Repeated
    eigenvalues are no exception. At a kink, an eigenvalue equal to a bound, the derivative is that of the bound.

    Example:
        >>> import torch
        >>> project_spectral_box(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])

    Source: N. Higham, Computing a nearest symmetric positive semidefinite matrix, 1988, theorem 2.1.
    """
    if isinstance(x, Tensor) and x.ndim >= 2 and x.shape[-1] != x.shape[-2]:
        raise ValueError(f"x: expected square matrices, got shape {tuple(x.shape)}")
    _check_bounds(lower, upper)
    return on_matrices(_clipped, x, per_element("lower", lower), per_element("upper", upper))


def _check_bounds(lower: Any, upper: Any) -> None:
    """Refuses an empty set, and NaN. Of tensors this reads one flag (never in a compiled graph)."""
    bounds: list[Any] = []
    for name, bound in (("lower", lower), ("upper", upper)):
        if not isinstance(bound, Tensor):
            if isinstance(bound, bool) or not isinstance(bound, (int, float)):  # no union: see check_range
                raise ValueError(f"{name}: expected a number or a tensor, got {type(bound).__name__}")
            bounds.append(bound)
            continue
        if torch.compiler.is_compiling() or bound.is_meta or not bound.is_floating_point():
            return
        bounds.append(physical(bound))
    low, high = bounds
    try:
        fine = (low <= high) & (low < math.inf) & (high > -math.inf)
    except RuntimeError:
        return  # shapes or devices that do not fit, which is said elsewhere
    if not (fine if isinstance(fine, bool) else bool(fine.all())):
        raise ValueError(f"lower: expected bounds with lower <= upper and a number between, got {lower} and {upper}")


def _clipped(x: Tensor, lower: Number, upper: Number) -> Tensor:
    A = (x + x.mT) / 2
    l, u = (b[..., 0, 0] if isinstance(b, Tensor) else A.new_full((), b) for b in (lower, upper))
    l, u = l.expand(A.shape[:-2]), u.expand(A.shape[:-2])
    constants = identify(_spectrum, A, l, u, ndims=(2, 0, 0), found_ndims=SpectralBox.ndims)
    packed = operate(_BOX, torch.cat([A.flatten(-2), l.unsqueeze(-1), u.unsqueeze(-1)], -1), constants)
    return packed[..., :-2].unflatten(-1, A.shape[-2:])


def _spectrum(A: Tensor, l: Tensor, u: Tensor) -> Constants:
    """Eigenvectors, clipped eigenvalues, and how far these lie on either side of each bound."""
    values, Q = eigen(A)
    l, u = l.unsqueeze(-1), u.unsqueeze(-1)
    size = values.abs().amax(-1, keepdim=True) if values.shape[-1] else values
    z_l, n_l = split(values - l, size, A.shape[-1])
    z_u, n_u = split(u - values, size, A.shape[-1])
    w = torch.where(z_l == 0, l, torch.where(z_u == 0, u, values))
    for inward, outward, bound in [(z_l, n_l, l), (z_u, n_u, u)]:
        far = torch.isinf(bound)  # any distance will do
        inward.masked_fill_(far, 1)
        outward.masked_fill_(far, 0)
    return Q, w, z_l, n_l, z_u, n_u


class SpectralBox(Potential):
    r"""The gradient of :math:`\tfrac12\|A\|^2 - \tfrac12\|A - P(A)\|^2` in (A, l, u), packed.

    Constants ``Q, w, z_l, n_l, z_u, n_u``: eigenvectors, the eigenvalues of the projection, and how far those of A lie
    on the inner side z and on the outer side n of each bound.
    """

    ndim = 1
    ndims = (2, 1, 1, 1, 1, 1)

    def gradient(self, constants: Constants) -> Tensor:
        Q, w, _, n_l, _, n_u = constants
        P = (Q * w.unsqueeze(-2)) @ Q.mT
        return torch.cat([P.flatten(-2), -n_l.sum(-1, keepdim=True), n_u.sum(-1, keepdim=True)], -1)

    def slope(self, constants: Constants, h: Tensor) -> Tensor:
        Q, w, z_l, n_l, z_u, n_u = constants
        H, l, u = _parts(Q, h)
        M = Q.mT @ H @ Q
        at_l, at_u = (z_l == 0).to(M.dtype), (z_u == 0).to(M.dtype)
        inner, outer = _differences(w).abs(), _differences(n_u - n_l).abs()
        # an eigenvalue moves as far inside the box as outside of it; equal ones are both free, or both at a bound
        gap = inner + outer
        free = ratio(inner, gap) + (1 - gap.sign()) * (1 - at_l - at_u).clamp_min(0).unsqueeze(-1)
        D = free * M
        D.diagonal(dim1=-2, dim2=-1).add_(at_l * l + at_u * u)
        diagonal = M.diagonal(dim1=-2, dim2=-1)
        return _from_basis(Q, D, (at_l * (diagonal - l)).sum(-1), (at_u * (diagonal - u)).sum(-1))

    def curvature(self, constants: Constants, h: Tensor, k: Tensor) -> Tensor:
        Q, _, z_l, n_l, z_u, n_u = constants
        (H, l, u), (K, l_k, u_k) = ((into(Q, H), l, u) for H, l, u in (_parts(Q, h), _parts(Q, k)))
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        B_l = bend(z_l, n_l, H - l.unsqueeze(-1) * eye, K - l_k.unsqueeze(-1) * eye)
        B_u = bend(z_u, n_u, H - u.unsqueeze(-1) * eye, K - u_k.unsqueeze(-1) * eye)
        traces = (B.diagonal(dim1=-2, dim2=-1).sum(-1) for B in (-B_l, B_u))
        return _from_basis(Q, B_l - B_u, *traces)


def _differences(v: Tensor) -> Tensor:
    return v.unsqueeze(-1) - v.unsqueeze(-2)


def _parts(Q: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix of a packed triple and its two numbers, ``(*batch, 1)``."""
    return h[..., :-2].unflatten(-1, Q.shape[-2:]), h[..., -2:-1], h[..., -1:]


def _from_basis(Q: Tensor, D: Tensor, l: Tensor, u: Tensor) -> Tensor:
    return torch.cat([(Q @ D @ Q.mT).flatten(-2), l.unsqueeze(-1), u.unsqueeze(-1)], -1)


_BOX = SpectralBox()
