"""Independent ones of many rows that have to hold exactly, and whether the others contradict them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difflayers.linalg._autodiff import physical
from difflayers.proximal._identify import identify


def independent_rows(C: Tensor, d: Tensor, owners: Sequence[str]) -> tuple[Tensor, Tensor] | None:
    """Rows of ``C w = d`` that span the others, as many as the element with most of them has.

    A row counts as dependent where what the others leave of it is below the square root of the rounding unit.

    Args:
        C: ``(*batch, m, K)``.
        d: ``(*batch, m)``, with the batch of `C`.
        owners: The condition that each row comes from, for messages.

    Returns:
        The rows and their right-hand sides, zero in elements that have fewer; None where all rows are zero.
    """
    K = C.shape[-1]
    order, rank, misfit = identify(_pivots, C, d, ndims=(2, 1), found_ndims=(1, 0, 1))
    plain, gaps = physical(rank), physical(misfit)
    if plain.is_meta or plain.numel() == 0:
        p = min(C.shape[-2], K - 1)
    else:
        if bool((gaps > 1).any()):
            worst = int(gaps.reshape(-1, gaps.shape[-1]).amax(0).argmax())
            raise ValueError(
                f"conditions: expected exact rows that some combination of the {K} basis functions satisfies, got a "
                f"contradiction in {owners[worst]!r}: conditions that disagree (at a corner?), or values that the "
                "basis cannot take; fewer boundary points, a richer basis, or weighted rows (exact=False) help"
            )
        p = max(int(plain.max()), int((plain < 0).any()))  # elements with NaN keep theirs, to be reported by the solver
    if p == 0:
        return None
    if p >= K:
        raise ValueError(
            f"conditions: expected fewer independent exact rows than the {K} basis functions, got {p}; take fewer "
            "boundary points, or weighted rows (exact=False)"
        )
    keep = order[..., :p]
    # picked in the order of what they add: dependent ones come last
    mine = (torch.arange(p, device=rank.device) < rank.unsqueeze(-1)) | (rank.unsqueeze(-1) < 0)
    rows, right = C.gather(-2, keep.unsqueeze(-1).expand(*keep.shape, K)), d.gather(-1, keep)
    return torch.where(mine.unsqueeze(-1), rows, 0), torch.where(mine, right, 0)


def _pivots(C: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pivoted Gram-Schmidt: the order of the rows, how many are independent, and the misfits over what is allowed."""
    m, K = C.shape[-2:]
    tol = torch.finfo(C.dtype).eps ** 0.5
    size = torch.linalg.vector_norm(C, dim=-1)
    size = torch.where(size > 0, size, 1)
    left, gap = C / size.unsqueeze(-1), (d / size).clone()
    allowed = gap.abs().amax(-1)
    sane = torch.isfinite(left).flatten(-2).all(-1) & torch.isfinite(gap).all(-1)
    rank = torch.zeros(C.shape[:-2], dtype=torch.int64, device=C.device)
    taken = torch.zeros(C.shape[:-1], dtype=torch.bool, device=C.device)
    order, square, w2 = [], left.square().sum(-1), torch.zeros_like(allowed)
    basis = left.new_zeros(*left.shape[:-2], 0, K)
    for _ in range(min(m, K)):
        pick = torch.where(taken, -1.0, torch.nan_to_num(square, nan=0.0, posinf=0.0)).argmax(-1, keepdim=True)
        order.append(pick)
        taken = taken.scatter(-1, pick, True)
        row = left.gather(-2, pick.unsqueeze(-1).expand(*pick.shape, K))
        row = row - (row @ basis.mT) @ basis  # once more: the row is small beside what was taken off
        norm = torch.linalg.vector_norm(row, dim=-1)
        alive = norm > tol
        q = torch.where(alive, 1 / torch.where(alive, norm, 1), 0).unsqueeze(-1) * row
        step = torch.where(alive, gap.gather(-1, pick) / torch.where(alive, norm, 1), 0)
        along = (left @ q.mT).squeeze(-1)
        left, gap = left - along.unsqueeze(-1) * q, gap - along * step
        square, w2 = left.square().sum(-1), w2 + step.squeeze(-1).square()
        basis = torch.cat([basis, q], -2)
        rank = rank + alive.squeeze(-1)
    misfit = gap.abs() / (10 * tol * (allowed + w2.sqrt())).clamp_min(torch.finfo(C.dtype).tiny).unsqueeze(-1)
    return torch.cat(order, -1), torch.where(sane, rank, -1), torch.where(sane.unsqueeze(-1), misfit, 0)
