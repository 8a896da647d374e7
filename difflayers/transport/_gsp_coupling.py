r"""The coupling of generalized sum pooling: which share of every position goes to the prototypes.

.. math:: \min_{\rho, \pi \ge 0} \langle c_u, \rho \rangle + \langle c, \pi \rangle
    + \tfrac1\gamma \Big[ \sum \rho (\log \rho - 1) + \sum \pi (\log \pi - 1) \Big]
    \quad\text{s.t.}\quad \rho_j + \sum_i \pi_{ij} = \tfrac1n, \quad \sum_{ij} \pi_{ij} = \mu

Optimality leaves one unknown, the multiplier of the mass. With
:math:`k_j = \log \sum_i e^{-\gamma c_{ij}} + \gamma c_{u,j}`,

.. math:: \frac1n \sum_j \sigma_j = \mu, \quad \sigma_j = \frac{1}{1 + e^{-(s + k_j)}}, \qquad
    \pi_{ij} = \frac{\sigma_j}{n} \operatorname{softmax}_i(-\gamma c_{ij}), \quad \rho_j = \frac{1 - \sigma_j}{n},

whose left side grows with s. The root is an implicit function of k and the ratio; all else is plain torch, so every
derivative costs as much as a few passes over the cost. Y. Z. Gurbuz, O. Sener, A. A. Alatan, Generalized Sum Pooling
for Metric Learning, 2023, eq. 4.

Symbols: ``mu`` ratio, ``c_u`` cost of the residual, ``p`` the smaller of ``sigma_j`` and ``1 - sigma_j``, which keeps
its digits where both are extreme.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_same, check_shape, check_tensor, compute_dtype
from difflayers._solution import Info, Status
from difflayers.implicit import ImplicitProblem, solution_map
from difflayers.linalg._autodiff import autocast_off
from difflayers.proximal._operands import Number, as_tensor, check_range, check_that, per_element, shown

from ._costs import confined

MAX_STEPS = 80  # six or so in general; a bisection from the widest bracket to the last digit takes this many


class GSPCoupling(NamedTuple):
    """What stays at the positions, and what goes to the prototypes.

    Attributes:
        residual: ``(*batch, n)`` mass of every position that goes to no prototype; sums to ``1 - ratio``.
        plan: ``(*batch, m, n)`` mass from every position to every prototype; sums to ``ratio``.
    """

    residual: Tensor
    plan: Tensor


def gsp_coupling(cost: Tensor, ratio: Number, gamma: Number, *, residual_cost: Tensor | None = None) -> GSPCoupling:
    r"""The entropic plan that moves a share of the mass of n positions to m prototypes, wherever it costs least.

    Solves ``min <residual_cost, r> + <cost, P> + 1/gamma (sum r (log r - 1) + sum P (log P - 1))`` over ``r, P >= 0``
    ``s.t. r_j + sum_i P_ij = 1/n, sum P = ratio``.

    Args:
        cost: ``(*batch, m, n)`` finite costs of prototypes (rows) and positions (columns).
        ratio: ``(*batch)`` share of the mass that goes to the prototypes, above 0 and at most 1: a number or a tensor.
        gamma: ``(*batch)`` inverse temperature above 0: a number or a tensor. A large one selects positions, a small
            one weighs them alike.
        residual_cost: ``(*batch, n)`` cost of staying; None: zero.

    Returns:
        ``(residual, plan)`` of shapes ``(*batch, n)`` and ``(*batch, m, n)``; the masses hold to rounding.

    Raises:
        ValueError: For a ratio or gamma out of range, or a wrong shape, dtype or device, naming the argument.

    Differentiable in every argument, to any order, at the expense of a few passes over the cost. The derivative in
    `ratio` is zero at a ratio of 1, and where a large gamma makes every share 0 or 1 to within the square root of the
    smallest number of the dtype: there the plan has a kink.

    Example:
        >>> import torch
        >>> from difflayers.transport import gsp_coupling
        >>> cost = torch.tensor([[0.0, 0.5, 0.6], [1.0, 0.2, 0.8]], requires_grad=True)
        >>> residual, plan = gsp_coupling(cost, 0.5, 5.0)
        >>> plan.sum(), plan.sum(-2) + residual
        (tensor(0.5000, grad_fn=<...>), tensor([0.3333, 0.3333, 0.3333], grad_fn=<...>))
        >>> plan.sum(-2)  # mass of each position that is pooled
        tensor([0.2509, 0.1921, 0.0569], grad_fn=<...>)

    Source: Y. Z. Gurbuz, O. Sener, A. A. Alatan, Generalized Sum Pooling for Metric Learning, 2023, eq. 4.

    Departure: the exact root of the scalar equation, by Newton's method inside a bracket, in the place of 100 fixed
    iterations, which leave an error of the mass and overflow in float32; with derivatives in `ratio` and `gamma`.
    """
    check_cost(cost)
    n = cost.shape[-1]
    given = [("cost", cost)]
    if residual_cost is not None:
        check_shape("residual_cost", check_tensor("residual_cost", residual_cost, min_ndim=1).shape[-1:], (n,))
        given.append(("residual_cost", residual_cost))
    mu, gamma, given = checked(ratio, gamma, given)
    ndims = {"cost": 2, "residual_cost": 1}
    broadcast_batch((name, tuple(t.shape[: t.ndim - ndims.get(name, 0)])) for name, t in given)
    dtype, work = cost.dtype, compute_dtype(cost.dtype)
    with autocast_off(cost):
        safe, mark = confined(cost.to(work), 2)
        logs = safe * -as_tensor(gamma, cost).to(work)[..., None, None]
        k = log_sums(logs)
        if residual_cost is not None:
            safe, more = confined(residual_cost.to(work), 1)
            mark = mark + more
            k = k + safe * as_tensor(gamma, cost).to(work).unsqueeze(-1)
        share, rest = shares(k, as_tensor(mu, cost).to(work))
        plan = (share / n).unsqueeze(-2) * logs.softmax(-2)
        return GSPCoupling((rest / n + mark.unsqueeze(-1)).to(dtype), (plan + mark[..., None, None]).to(dtype))


def check_cost(cost: Tensor) -> None:
    """Refuses what has no prototype or no position."""
    m, n = check_tensor("cost", cost, min_ndim=2).shape[-2:]
    if m == 0 or n == 0:
        raise ValueError(f"cost: expected at least one row and one column, got shape {tuple(cost.shape)}")


def checked(
    ratio: Number, gamma: Number, given: list[tuple[str, Tensor]]
) -> tuple[Number, Number, list[tuple[str, Tensor]]]:
    """Both numbers in their ranges, and `given` with those that are tensors. Reads two flags of each tensor."""
    for name, number in (("ratio", ratio), ("gamma", gamma)):
        if number is None:
            raise ValueError(f"{name}: expected a number or a tensor, got None")
    check_range(per_element("ratio", ratio, above=0))
    check_that(ratio <= 1, lambda: f"ratio: expected at most 1, got {shown(ratio)}")
    check_range(per_element("gamma", gamma, above=0))
    check_that(gamma < torch.inf, lambda: f"gamma: expected a finite number, got {shown(gamma)}")
    given = given + [(name, t) for name, t in (("ratio", ratio), ("gamma", gamma)) if isinstance(t, Tensor)]
    for name, t in given:
        check_tensor(name, t)
    check_same(given)
    return ratio, gamma, given


def log_sums(logs: Tensor) -> Tensor:
    """``logsumexp`` over the prototypes.

    What is below rounding by far counts as a constant: such terms, and their products with a cotangent, would be
    denormal numbers, which are slow.
    """
    top = logs.detach().amax(-2, keepdim=True)
    lowest = math.log(torch.finfo(logs.dtype).tiny) / 2
    return (logs - top).clamp_min(lowest).exp().sum(-2).log() + top.squeeze(-2)


def shares(k: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """The share of every position that is transported, and the rest: ``sigma(s + k)`` and ``sigma(-s - k)``.

    Args:
        k: ``(*batch, n)`` logarithms of odds, up to a constant.
        mu: ``(*batch)`` their mean share.

    Returns:
        Two tensors ``(*batch, n)`` whose sum is one. For a ratio of 1 they are one and zero exactly.
    """
    n = k.shape[-1]
    batch = torch.broadcast_shapes(k.shape[:-1], mu.shape)
    top = k.detach().sort(-1, descending=True).values.expand(*batch, n)
    rank = (n * mu.detach()).ceil().clamp(1, n).long().expand(batch).unsqueeze(-1)
    # numbers are taken relative to the one at which the step from 1 to 0 would be at a low temperature: so a large k
    # costs no digits
    pivot, after = (top.gather(-1, r) for r in (rank - 1, rank.clamp(max=n - 1)))
    k = k - pivot
    s = solution_map(_PROBLEM, (k, mu, (pivot - after).squeeze(-1)), on_failure="ignore")
    transported, p = _smaller(k + s.unsqueeze(-1))
    all_of_it = (mu == 1).unsqueeze(-1)
    share = torch.where(transported, 1 - p, p)
    rest = torch.where(transported, p, 1 - p)
    return torch.where(all_of_it, 1, share), torch.where(all_of_it, 0, rest)


def _smaller(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whether ``sigma(x)`` is above a half, and the smaller of it and ``sigma(-x)``."""
    above = x.detach() > 0
    return above, torch.where(above, -x, x).sigmoid()


def _excess(s: Tensor, k: Tensor, mu: Tensor, gap: Tensor) -> Tensor:
    """``sum_j sigma(s + k_j) - n mu``, with all digits also where every share is close to 0 or 1."""
    above, p = _smaller(k + s.unsqueeze(-1))
    return torch.where(above, -p, p).sum(-1) + (above.sum(-1) - k.shape[-1] * mu)


def _slope(s: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """``(*batch, n)`` derivatives of the shares, and their sum."""
    _, p = _smaller(k + s.unsqueeze(-1))
    each = p * (1 - p)
    return each, each.sum(-1)


def _linear_solve(
    s: Tensor, args: tuple[Tensor, ...], factors: tuple[Tensor, ...], rhs: Tensor, transpose: bool
) -> tuple[Tensor, Info]:
    k, mu, _ = args
    _, slope = _slope(s, k)
    steep = (slope <= torch.finfo(s.dtype).tiny ** 0.5) | (mu == 1)
    x = torch.where(steep, 0, rhs / torch.where(steep, 1, slope))
    return x, _report(x)


def _cotangents(s: Tensor, args: tuple[Tensor, ...], w: Tensor, wanted: list[bool]) -> list[Tensor | None]:
    k, mu, _ = args
    each, _ = _slope(s, k)
    found = ((each * w.unsqueeze(-1)).sum_to_size(k.shape), (w * -k.shape[-1]).sum_to_size(mu.shape), None)
    return [g if want else None for g, want in zip(found, wanted, strict=True)]


def _report(s: Tensor) -> Info:
    zeros = torch.zeros(s.shape, dtype=torch.int64, device=s.device)
    return Info(zeros, zeros, torch.zeros_like(s))


def _solve(k: Tensor, mu: Tensor, gap: Tensor) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    """Newton's method on the logarithm of what is too much over what is too little, in a bracket.

    In both tails, and where a gap between positions leaves every share close to 0 or 1, that is a straight line.

    `k` is zero at the position of rank ``ceil(n mu)``, and ``-gap`` at the next: shares of the ranks before are larger
    and of those after are smaller, which bounds the root from both sides whatever the other numbers are.
    """
    batch = torch.broadcast_shapes(k.shape[:-1], mu.shape)
    n, tiny = k.shape[-1], torch.finfo(k.dtype).tiny
    mu, gap = mu.expand(batch).clone(), gap.expand(batch)
    full = mu == 1
    need, spare = n * mu, n * (1 - mu)
    rank = need.ceil().clamp(1, n)
    low = (need - (rank - 1)).clamp_min(tiny).log() - spare.clamp_min(tiny).log()
    high = need.clamp_min(tiny).log() - (rank - need).clamp_min(tiny).log()
    other = gap + need.log() - (rank + 1 - need).log()  # by the position after
    high = torch.where(rank < n, torch.minimum(high, other), need.log() - spare.clamp_min(tiny).log())
    slack = 8 * torch.finfo(k.dtype).eps * (1 + torch.maximum(low.abs(), high.abs()))
    low, high = low - slack, high + slack
    middle = (low + high) / 2
    alike = need.log() - spare.clamp_min(tiny).log() - k.mean(-1)  # the root, were all k close to their mean
    s = torch.where(gap < 8, torch.minimum(torch.maximum(alike, low), high), middle)
    active = ~full
    close = torch.finfo(k.dtype).eps ** 0.5 / 4
    steps = torch.zeros(batch, dtype=torch.int64, device=k.device)
    for _ in range(MAX_STEPS):
        x = k + s.unsqueeze(-1)
        above = x > 0
        p = (-x.abs()).sigmoid()
        upper, lower = p * above, p * ~above
        count = above.sum(-1)
        off = torch.where(count == n, spare, count - need)
        more, less = lower.sum(-1) + off.clamp_min(0), upper.sum(-1) - off.clamp_max(0)
        excess = more - less
        line = more.log() - less.log()
        slope = (lower * (1 - lower)).sum(-1) / more + (upper * (1 - upper)).sum(-1) / less
        low, high = torch.where(excess <= 0, s, low), torch.where(excess >= 0, s, high)
        moved = s - line / slope
        inside = (moved >= low) & (moved <= high)
        done = (inside & ((moved - s).abs() <= close)) | (high - low <= slack / 8) | excess.isnan()
        moved = torch.where(inside, moved, (low + high) / 2)
        moved = torch.where(excess == 0, s, torch.where(excess.isnan(), excess, moved))
        s = torch.where(active, moved, s)
        steps = steps + active
        active = active & ~done
        if not bool(active.any()):
            break
    return s, Info(torch.where(active, int(Status.MAX_STEPS), int(Status.CONVERGED)), steps, gap * 0), ()


_PROBLEM = ImplicitProblem(
    solve=_solve,
    residual=_excess,
    linear_solve=_linear_solve,
    cotangents=_cotangents,
    value_ndim=0,
    arg_ndims=(1, 0, 0),
    name="gsp_coupling",
    arg_names=("cost", "ratio", "gap"),
)
