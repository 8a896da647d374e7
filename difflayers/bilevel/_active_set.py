r"""Which inequalities hold a point, and with what multipliers: read off the point itself.

At a solution of :math:`\min f` subject to :math:`g \le 0`: :math:`\nabla f + A^T \nu = 0` with the gradients A of the
rows that hold with equality and :math:`\nu \ge 0`.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from difflayers._solution import SolveWarning, _stacklevel


def reach(dtype: torch.dtype) -> float:
    """How near to its bound a row may hold, relative to the length of the problem."""
    return torch.finfo(dtype).eps ** (1 / 3)


def length_of(y: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
    """What distances are compared with: the norm of y, or of the way to the minimum without constraints.

    The latter where y is zero, or nearly; at most 1, since a slope without curvature leads anywhere.
    """
    free = torch.linalg.vector_norm(slope) / torch.where(bend > 0, bend, 1)
    return torch.maximum(torch.linalg.vector_norm(y), torch.where(bend > 0, free, 1).clamp_max(1))


def active_rows(g: Tensor, A: Tensor, slope: Tensor, length: Tensor, bend: Tensor, numbers: Tensor) -> Tensor:
    """Places of the rows with a positive multiplier.

    Args:
        g: ``(m,)`` values of the constraint.
        A: ``(m, n)`` their gradients in y.
        slope: ``(n,)`` gradient of the objective in y.
        length: What distances are compared with.
        bend: Size of the Hessian.
        numbers: ``(m,)`` what messages call the rows.

    Raises:
        ValueError: Where a constraint is violated, or a row that holds with equality would have to pull.
    """
    delta = reach(g.dtype)
    lengths = torch.linalg.vector_norm(A, dim=-1)
    there = lengths > 0
    distance = torch.where(there, g / torch.where(there, lengths, 1), g)
    near, scale = delta * length, bend * length
    if bool((distance > delta * length.clamp_min(1)).any()):
        i = int(distance.argmax())
        raise ValueError(f"y: expected a point where constraint <= 0, got {float(g[i]):.3g} in row {int(numbers[i])}")
    rows = (there & (distance >= -near)).nonzero().flatten()
    B = (A[rows] / lengths[rows].unsqueeze(-1)).double()
    t = -slope.double()
    weights = nonnegative(B @ B.mT, B @ t)
    held = t - B.mT @ weights
    free = t - B.mT @ (torch.linalg.pinv(B.mT) @ t)
    gap = held.square().sum() - free.square().sum()
    if bool(gap > (1e-2 * torch.maximum(torch.linalg.vector_norm(t), delta * scale)).square()):
        i = int(rows[(B @ held).argmin()])
        raise ValueError(
            "y: expected a solution of the lower problem, got a point where the constraint holds nothing back in row "
            f"{int(numbers[i])}, which is at its bound: its multiplier would be negative"
        )
    if bool((weights > 0).sum() < len(rows)) and int(torch.linalg.matrix_rank(B)) < len(rows):
        # of dependent rows the nearest
        weights = nonnegative(B @ B.mT, B @ t + bend.double() * distance[rows].double())
    # a multiplier has to stand out from rounding, from what no row explains, and from the slope on the way to its
    # bound; one that is not small counts also where y is inexact
    size = torch.maximum(torch.linalg.vector_norm(t), scale.double())
    noise = torch.maximum(torch.linalg.vector_norm(held), bend.double() * distance[rows].double().abs())
    noise = torch.maximum(noise, 10 * torch.finfo(g.dtype).eps * size)
    clear = weights > 10 * noise
    kept = clear | (weights > delta * size)
    doubtful = ~clear & (kept | (weights > noise))
    if bool(doubtful.any()):
        warnings.warn(
            f"hypergradient: whether rows {numbers[rows[doubtful]].tolist()[:10]} of the constraint hold y cannot be "
            f"told: their multipliers are at most ten times the lower stationarity of y, {float(noise.max()):.2e}. "
            "Solve the lower problem further.",
            SolveWarning,
            stacklevel=_stacklevel(),
        )
    return rows[kept]


def nonnegative(G: Tensor, c: Tensor) -> Tensor:
    """The w >= 0 that minimises ``w^T G w / 2 - c^T w``, G positive semidefinite.

    Source: C. Lawson, R. Hanson, Solving Least Squares Problems, 1974, chapter 23.
    """
    w, used = torch.zeros_like(c), torch.zeros_like(c, dtype=torch.bool)
    small = 10 * torch.finfo(c.dtype).eps
    for _ in range(3 * len(c)):
        pull = torch.where(used, -torch.inf, c - G @ w)
        j = int(pull.argmax())
        if not float(pull[j]) > small * float(c.abs().max()):
            break
        used[j] = True
        while bool(used.any()):
            index = used.nonzero().flatten()
            s = torch.zeros_like(w)
            s[index] = torch.linalg.pinv(G[index][:, index], hermitian=True) @ c[index]
            low = used & (s <= 0)
            if not bool(low.any()):
                w = s
                break
            w = w + (w[low] / (w[low] - s[low])).min() * (s - w)
            used &= w > small * w.abs().max()
            w = torch.where(used, w, 0)
    return w
