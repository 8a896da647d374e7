r"""The smallest weight decay at which a network is zero.

A neuron of gate i wants to grow from zero where :math:`\beta` is less than the largest decrease of the loss along a
unit vector: :math:`\|Z_i^T \nu\|` for a gated neuron, with :math:`\nu_k = -s_k\, l'(0, y_k)`; for a ReLU neuron,
which stays in its cell, :math:`\max \{\pm \nu^T Z_i u : K_i u \ge 0, \|u\| \le 1\}`, the norm of a projection on the
cell, and never larger. A. Mishkin, M. Pilanci, Optimal Sets and Solution Paths of ReLU Networks, 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers.linalg import linear_solve
from difflayers.linalg._autodiff import autocast_off
from difflayers.proximal._identify import identify

from ._cell_projection import cell_multipliers
from ._cone_problem import or_one
from ._gates import Gates
from ._losses import Loss
from ._training_call import checked_call, wide_dtype

PULLS, DEPENDENT = 1e-7, 1e-6  # of multipliers and of rows of length one: what counts as more than rounding


def beta_max(
    X: Tensor,
    y: Tensor,
    gates: Gates | Tensor,
    *,
    sample_weight: Tensor | None = None,
    loss: Loss | None = None,
    gated: bool = True,
) -> Tensor:
    """The smallest weight decay at which a trained network is zero.

    Computes ``max_i ||g_i||`` with ``g_i = sum_k s_k 1[x_k^T gate_i >= 0] l'(0, y_k) x_k`` for gated networks; for ReLU
    networks the norms of the projections of ``g_i`` and ``-g_i`` on the cell of gate i, which are never larger.

    Args:
        X: ``(*batch, n, d)`` training data.
        y: ``(*batch, n)`` labels.
        gates: Gates, as for :func:`convex_gated_relu`.
        sample_weight: ``(*batch, n)`` weights, or None.
        loss: Loss, or None for :class:`Squared`.
        gated: For :func:`convex_gated_relu`; if False for :func:`convex_relu`.

    Returns:
        ``(*batch)``.

    Raises:
        ValueError: For a wrong shape or dtype.

    Differentiable in `X`, `y` and `sample_weight`, to any order; where several neurons attain the maximum, as for them.

    Example:
        >>> import torch
        >>> from difflayers.relu import beta_max
        >>> beta_max(torch.tensor([[3.0], [4.0]]), torch.tensor([1.0, 1.0]), torch.tensor([[1.0]]))
        tensor(7.)

    Source: A. Mishkin, M. Pilanci, Optimal Sets and Solution Paths of ReLU Networks, 2023, section 3.
    """
    call = checked_call(X, y, 1.0, gates, sample_weight, loss)
    X, y, s, _, M = call.args[:5]
    with autocast_off(X):
        slope = call.loss.slope(torch.zeros_like(y), y)
        pulled = (M.to(X.dtype) * (s * slope).unsqueeze(-1)).mT @ X
        if not gated:
            pulled = _on_cell(X, M, pulled)
        return torch.linalg.vector_norm(pulled, dim=-1).amax(-1).to(call.dtype)


def _on_cell(X: Tensor, M: Tensor, pulled: Tensor) -> Tensor:
    """``(*batch, 1, d)``: the longest projection of a vector or its negative on its cell.

    Given the rows C of the cell in which it lies on the border, it is ``g - C^T (C C^T)^-1 C g``.
    """
    at, sign, rows, used = identify(_longest, X.detach(), M, pulled.detach(), ndims=(2, 2, 2), found_ndims=(1, 2, 1, 1))
    g = sign * torch.take_along_dim(pulled, at.unsqueeze(-1), -2)
    if not rows.shape[-1]:
        return g
    X = X.expand(*at.shape[:-1], *X.shape[-2:])
    C = torch.where(used.unsqueeze(-1), torch.take_along_dim(X, rows.unsqueeze(-1), -2), 0)
    gram = C @ C.mT + torch.diag_embed((~used).to(C.dtype))
    return g - linear_solve(gram, (C @ g.mT).squeeze(-1), on_failure="nan").unsqueeze(-2) @ C


def _longest(X: Tensor, M: Tensor, pulled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which vector, its sign, the rows on whose border its projection is, padded to d - 1, and which of them count."""
    dtype = pulled.dtype
    X, pulled = X.to(wide_dtype(X)), pulled.to(wide_dtype(pulled))
    batch = pulled.shape[:-2]
    X = X.expand(*batch, *X.shape[-2:])
    side = (2 * M.mT.to(X.dtype) - 1).expand(*batch, M.shape[-1], M.shape[-2])
    side, g = torch.cat([side, side], -2), torch.cat([pulled, -pulled], -2)
    rho = cell_multipliers(X, side, g)
    norm = torch.linalg.vector_norm(g + (side * rho) @ X, dim=-1)
    best = norm.argmax(-1, keepdim=True)
    force = torch.take_along_dim(rho, best.unsqueeze(-1), -2).squeeze(-2) * torch.linalg.vector_norm(X, dim=-1)
    length = or_one(torch.linalg.vector_norm(g, dim=-1).gather(-1, best))
    rows, used = _independent(X, force > PULLS * length)
    half = pulled.shape[-2]
    sign = torch.where(best < half, 1.0, -1.0).to(dtype).unsqueeze(-1)
    return best % half, sign, rows, used


def _independent(X: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """At most d - 1 rows that span those marked, and which places hold one: of points that coincide the first."""
    rest = torch.where(among.unsqueeze(-1), X / or_one(torch.linalg.vector_norm(X, dim=-1, keepdim=True)), 0)
    chosen, used = [], []
    for _ in range(min(X.shape[-1] - 1, X.shape[-2])):
        length, at = torch.linalg.vector_norm(rest, dim=-1).max(-1, keepdim=True)
        row = torch.take_along_dim(rest, at.unsqueeze(-1), -2) / or_one(length).unsqueeze(-1)
        rest = rest - (rest @ row.mT) * row
        chosen.append(at)
        used.append(length > DEPENDENT)
    if not chosen:
        return among.new_zeros((*among.shape[:-1], 0), dtype=torch.long), among[..., :0]
    return torch.cat(chosen, -1), torch.cat(used, -1)
