r"""Rounding a matrix to the transport polytope: the nearby coupling whose marginals are exact.

Rows that are too heavy are scaled down, then columns, and what is missing then in both is added as a product,

.. math:: P'' = D_r P D_c, \quad e_r = a - P'' 1, \quad e_c = b - P''^T 1, \quad P''' = P'' + e_r e_c^T / \|e_r\|_1 .

J. Altschuler, J. Weed, P. Rigollet, Near-linear time approximation algorithms for optimal transport via Sinkhorn
iteration, 2017, algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_same, check_shape, check_tensor, compute_dtype
from difflayers.linalg._autodiff import autocast_off
from difflayers.proximal._identify import identify

from ._coupling import _TOTALS, refused, unequal


def round_to_polytope(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A coupling with the given marginals near a matrix.

    In L1 it is at most ``2 (|plan 1 - a|_1 + |plan^T 1 - b|_1)`` away, in ``O(n m)``; it is no projection. A plan whose
    marginals are right stays as it is, to rounding.

    Args:
        plan: ``(*batch, n, m)`` at least 0, as an average or an approximate plan; negative entries count as 0.
        a: ``(*batch, n)`` masses of the rows, at least 0.
        b: ``(*batch, m)`` masses of the columns, at least 0, with the total of `a`, to 5e-6 (float32: 1e-4).

    Returns:
        ``(*batch, n, m)``, at least 0, with row sums `a` and column sums `b` to rounding.

    Raises:
        ValueError: For shapes that do not fit, negative masses and totals that differ.

    Differentiable in `plan`, `a` and `b`, to any order, where no sum of `plan` equals its mass. There one of the
    one-sided derivatives is taken, so that at a plan whose sums are all right it may not be the identity: apply this to
    results, not inside of what is differentiated.

    Example:
        >>> import torch
        >>> from difflayers.transport import round_to_polytope
        >>> plan = torch.tensor([[0.5, 0.1], [0.1, 0.2]])
        >>> round_to_polytope(plan, torch.tensor([0.5, 0.5]), torch.tensor([0.6, 0.4]))
        tensor([[0.4167, 0.0833],
                [0.1833, 0.3167]])

    Source: J. Altschuler et al., Near-linear time approximation algorithms for optimal transport via Sinkhorn
    iteration, 2017, algorithm 2.
    """
    n, m = check_tensor("plan", plan, min_ndim=2).shape[-2:]
    check_marginals(a, b, n, m, "plan", plan)
    work = compute_dtype(plan.dtype)
    with autocast_off(plan):
        P = rounded(*(t.to(work) for t in (plan, a, b)))
    return P.to(plan.dtype)


def check_marginals(
    a: Tensor, b: Tensor, n: int | None = None, m: int | None = None, name: str = "", like: Tensor | None = None
) -> None:
    """Refuses masses that no coupling has; what is not a number is the business of the element."""
    for label, t, size, what in (("a", a, n, "rows"), ("b", b, m, "columns")):
        check_tensor(label, t, min_ndim=1)
        if size is not None:
            check_shape(label, t.shape[-1:], (size,), f" as {name} has {what}")
        if t.shape[-1] == 0:
            raise ValueError(f"{label}: expected at least one mass, got shape {tuple(t.shape)}")
    named = [("a", a), ("b", b)] if like is None else [(name, like), ("a", a), ("b", b)]
    check_same(named)
    broadcast_batch((label, tuple(t.shape[: t.ndim - (2 if t is like else 1)])) for label, t in named)
    identify(_look, a, b, ndims=(1, 1), found_ndims=(0,))


def _look(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Raises; reads one flag."""
    work = compute_dtype(a.dtype)
    totals = a.to(work).sum(-1), b.to(work).sum(-1)
    wrong = {
        "a: expected masses of at least 0": (a < 0).any(-1),
        "b: expected masses of at least 0": (b < 0).any(-1),
        "a, b: expected equal totals": unequal(*totals, _TOTALS.get(a.dtype, 1e-4)),
    }
    if bool(torch.stack([bad.any() for bad in wrong.values()]).any()) and (error := refused(wrong, totals)):
        raise error
    return (totals[0] + totals[1],)


def rounded(P: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """:func:`round_to_polytope`, unchecked. Elements that are not finite are NaN, and leave alone what others share."""
    total = (P.sum((-2, -1)) + a.sum(-1) + b.sum(-1)) * 0
    bad = torch.isnan(total)
    P = torch.where(bad[..., None, None], 0, P).clamp(min=0)
    a, b = (torch.where(bad.unsqueeze(-1), 0, t) for t in (a, b))
    P = P * _down(P.sum(-1), a).unsqueeze(-1)
    P = P * _down(P.sum(-2), b).unsqueeze(-2)
    rows, columns = (a - P.sum(-1)).clamp(min=0), (b - P.sum(-2)).clamp(min=0)
    missing = rows.sum(-1)
    missing = torch.where(missing > 0, missing, 1)
    P = P + (rows / missing.unsqueeze(-1)).unsqueeze(-1) * columns.unsqueeze(-2)
    return torch.where(bad[..., None, None], total[..., None, None], P)


def _down(sums: Tensor, mass: Tensor) -> Tensor:
    """What makes sums that are too large right, and leaves the others."""
    heavy = sums > mass
    return torch.where(heavy, mass / torch.where(heavy, sums, 1), 1)
