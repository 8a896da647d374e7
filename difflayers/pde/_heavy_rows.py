r"""Rows that outweigh the equation by so much that the Hessian has no digit left for the equation.

A row ``a`` of weight :math:`10^8` adds :math:`10^{16} a a^T` to the Hessian. In coordinates :math:`w = Q v` in which
the rows are triangular, :math:`A Q = L` with the heaviest row first, all of that stands in few entries of the diagonal,
and scaling takes it out (A. Bjorck, Numerical Methods for Least Squares Problems, 1996, section 4.4).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from difflayers._solution import Status
from difflayers.implicit import LevenbergMarquardt
from difflayers.linalg._system import times

from ._levenberg_marquardt import Fit, Found, minimise, where


def minimise_with_rows(fit: Fit, start: Tensor, options: LevenbergMarquardt, gauss_newton: bool) -> Found:
    """As ``minimise``; elements that lost their digits to heavy rows once more, in coordinates that separate these."""
    found = minimise(fit, start, options, gauss_newton)
    if not fit.A.shape[-2] or found.status.is_meta:
        return found
    pivots = found.R.diagonal(dim1=-2, dim2=-1) / torch.linalg.vector_norm(found.R, dim=-2)
    poor = ~(pivots.square() > torch.finfo(pivots.dtype).eps ** 0.75).all(-1)
    suspect = ~found.linear & (poor | (found.status != Status.CONVERGED))
    if not bool(suspect.any()):
        return found
    heavy = suspect & _heavy(fit, start)
    if not bool(heavy.any()):
        return found
    norms = torch.linalg.vector_norm(fit.A, dim=-1)
    A = torch.take_along_dim(fit.A, norms.argsort(-1, descending=True).unsqueeze(-1), -2)
    # an element that is not asked may hold NaN, which would be an error of the whole batch
    A = torch.where(torch.isfinite(A).flatten(-2).all(-1)[..., None, None], A, 0)
    Q, _ = torch.linalg.qr(A.mT, mode="complete")
    B = (fit.B.flatten(-3, -2) @ Q).unflatten(-2, fit.B.shape[-3:-1])
    center = None if fit.center is None else times(Q.mT, fit.center)
    turned = minimise(replace(fit, B=B, A=fit.A @ Q, center=center), times(Q.mT, start), options, gauss_newton)
    back = torch.where(heavy[..., None, None], turned.R, torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)) @ Q.mT
    _, R = torch.linalg.qr(torch.where(torch.isfinite(back), back, 0), mode="r")
    turned = turned._replace(v=times(Q, turned.v), R=R)
    return Found(*(where(heavy, a, b) for a, b in zip(turned, found, strict=True)))


def _heavy(fit: Fit, v: Tensor) -> Tensor:
    """Per element: some row is larger than the derivatives of the equation by the root of what rounding leaves."""
    J = fit.jacobian(fit.at(v))
    rows = fit.A.square().sum(-1).amax(-1)
    return rows * torch.finfo(J.dtype).eps ** 0.5 * J.shape[-1] > J.square().sum((-2, -1))
