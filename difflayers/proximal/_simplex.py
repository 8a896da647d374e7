r"""Projections that subtract one threshold: the simplex, the l1 ball, the capped simplex, and what is built on them.

.. math:: P(x) = \operatorname{clip}(x - \tau, 0, u), \qquad \sum_i P(x)_i = \rho

The left side of the equation for the threshold is piecewise linear and falls with it. Without caps it is convex, and
Newton's method finds the root in a finite number of steps from the left: no sort is needed. C. Michelot, A finite
algorithm for finding the projection of a point onto the canonical simplex, 1986; L. Condat, Fast projection onto the
simplex and the l1 ball, 2016, section 3. With caps Newton is kept inside a bracket; R. Cominetti, W. Mascarenhas,
P. Silva, A Newton's method for the continuous quadratic knapsack problem, 2014.

The search carries no derivative; one step more, in plain torch, lands on the same threshold and has all of them.

Symbols: ``rho`` radius or total, ``tau`` threshold, ``u`` caps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from difflayers.linalg._autodiff import opaque, physical, transforms_active

from ._identify import identify
from ._operands import Number, as_column, check_that, on_vectors, per_element, per_entry, shown
from ._pieces import clip


def project_simplex(x: Tensor, radius: Number = 1.0, *, dim: int = -1) -> Tensor:
    """The nearest point with non-negative entries that sum to `radius` (``sparsemax`` at radius 1).

    Solves ``argmin_z 1/2 ||z - x||^2 s.t. z >= 0, sum(z) = radius``.

    Args:
        x: Any shape; entries of ``-inf`` become zero.
        radius: At least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        dim: The dimension of one vector.

    Returns:
        The projection, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `radius` (the set is empty), a shape that does not broadcast, or a dtype that
            is not floating point.

    Differentiable in `x` and `radius`, to any order. At a kink (an entry that just reaches zero) the derivative is that
    of the zero branch.

    Example:
        >>> import torch
        >>> project_simplex(torch.tensor([1.0, 0.5, -1.0]))
        tensor([0.7500, 0.2500, 0.0000])

    Source: C. Michelot, A finite algorithm for finding the projection of a point onto the canonical simplex, 1986.
    """
    return on_vectors(_onto_simplex, x, per_element("radius", radius, at_least=0), dim=dim)


def project_l1_ball(x: Tensor, radius: Number = 1.0, *, dim: int = -1) -> Tensor:
    """The nearest point whose absolute values sum to at most `radius`.

    Solves ``argmin_z 1/2 ||z - x||^2 s.t. ||z||_1 <= radius``.

    Args:
        x: Any shape.
        radius: At least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        dim: The dimension of one vector.

    Returns:
        The projection, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `radius` (the set is empty), a shape that does not broadcast, or a dtype that
            is not floating point.

    Differentiable in `x` and `radius`, to any order. At a kink (an entry that just reaches zero) the derivative is that
    of the zero branch; on the boundary of the ball it is that of the inside.

    Example:
        >>> import torch
        >>> project_l1_ball(torch.tensor([1.0, -0.5, 0.1]))
        tensor([ 0.7500, -0.2500,  0.0000])

    Source: L. Condat, Fast projection onto the simplex and the l1 ball, 2016, section 2.
    """
    return on_vectors(onto_l1_ball, x, per_element("radius", radius, at_least=0), dim=dim)


def project_capped_simplex(x: Tensor, total: Number, *, upper: Number = 1.0, dim: int = -1) -> Tensor:
    """The nearest point with entries between 0 and `upper` that sum to `total`.

    Solves ``argmin_z 1/2 ||z - x||^2 s.t. 0 <= z <= upper, sum(z) = total``.

    Args:
        x: Any shape; entries of ``-inf`` become zero.
        total: Between 0 and the sum of `upper`: a number, or a tensor that broadcasts to the batch (the shape of `x`
            without `dim`).
        upper: Caps, at least 0: a number, or a tensor that broadcasts with `x`.
        dim: The dimension of one vector.

    Returns:
        The projection, shaped like `x`.

    Raises:
        ValueError: Where the set is empty, for a shape that does not broadcast, or a dtype that is not floating point.

    Differentiable in `x`, `total` and `upper`, to any order. At a kink (an entry that just reaches zero or its cap) the
    derivative is that of the entry staying there, so at a total of 0 it is zero.

    Example:
        >>> import torch
        >>> project_capped_simplex(torch.tensor([3.0, 0.5, 0.25, -1.0]), 1.5)
        tensor([1.0000, 0.3750, 0.1250, 0.0000])

    Source: R. Cominetti, W. Mascarenhas, P. Silva, A Newton's method for the continuous quadratic knapsack problem,
    2014.
    """
    operands = per_element("total", total, at_least=0), per_entry("upper", upper, at_least=0)
    return on_vectors(_onto_capped_simplex, x, *operands, dim=dim)


def soft_topk(x: Tensor, k: Number, *, temperature: Number = 1.0, dim: int = -1) -> Tensor:
    """Weights between 0 and 1 that sum to `k` and mark the `k` largest entries, smoothly for large temperatures.

    Solves ``argmin_z 1/2 ||z - x / temperature||^2 s.t. 0 <= z <= 1, sum(z) = k``: the projection of ``x /
    temperature`` on the capped simplex. It marks exactly the `k` largest where these lead by `temperature` or more.

    Args:
        x: Any shape; ``n`` entries along `dim`; those of ``-inf`` get no weight.
        k: Between 0 and ``n``, not necessarily an integer: a number, or a tensor that broadcasts to the batch (the
            shape of `x` without `dim`).
        temperature: More than 0: the same.
        dim: The dimension of one vector.

    Returns:
        The weights, shaped like `x`.

    Raises:
        ValueError: For `k` or `temperature` out of range, a shape that does not broadcast, or a dtype that is not
            floating point.

    Differentiable in `x`, `k` and `temperature`, to any order; kinks as in :func:`project_capped_simplex`.

    Example:
        >>> import torch
        >>> soft_topk(torch.tensor([3.0, 0.0, 2.0, 1.5]), 2)
        tensor([1.0000, 0.0000, 0.7500, 0.2500])

    Source: B. Amos, V. Koltun, J. Z. Kolter, The limited multi-label projection layer, 2019, with the Euclidean norm
    for the entropy.
    """
    operands = per_element("k", k, at_least=0), per_element("temperature", temperature, above=0)
    return on_vectors(_soft_topk, x, *operands, dim=dim)


def _onto_simplex(x: Tensor, rho: Any) -> Tensor:
    x, rho = _from_the_top(x), as_column(rho, x)
    return _above(x, _threshold(x, rho), rho)


def onto_l1_ball(x: Tensor, rho: Any) -> Tensor:
    """The projection on the l1 ball, along the last dimension."""
    rho = as_column(rho, x)
    s = x.detach().sign()
    within = x.detach().abs().sum(-1, keepdim=True) <= rho.detach()
    inside = within.to(x.dtype)
    a = _from_the_top(s * x)
    tau = _threshold(a, torch.where(within, 1, rho))  # a radius may be infinite
    # inside the ball the point itself counts, also at its zeros
    return inside * x + (1 - inside) * (s * _above(a, tau, rho))


def _from_the_top(x: Tensor) -> Tensor:
    """The entries less the largest: no digit of a small radius is lost beside large numbers."""
    return x - x.detach().amax(-1, keepdim=True) if x.numel() else x


def _threshold(x: Tensor, rho: Tensor) -> Tensor:
    """What to subtract, so that the positive rest sums to `rho`; the largest entry of `x` is 0."""
    tau, count = identify(_find_threshold, x, rho, ndims=(1, 1), found_ndims=(1, 1))
    return tau + _no_more_than_its_slope((torch.relu(x - tau).sum(-1, keepdim=True) - rho) / count)


def _above(x: Tensor, tau: Tensor, rho: Tensor) -> Tensor:
    """What lies above the threshold. For a radius of 0 that is nothing, but a larger one would go to the top."""
    z = torch.relu(x - tau)
    if not rho.requires_grad and not transforms_active():
        return z
    nothing = rho.detach() == 0
    top = ((x.detach() == 0) & nothing).to(x.dtype)
    return z + top / top.sum(-1, keepdim=True).clamp_min(1) * torch.where(nothing, rho, 0)


def _no_more_than_its_slope(step: Tensor) -> Tensor:
    """Zero with the derivatives of `step`: were tau to move by rounding, an entry at zero might change sides."""
    return step - step.detach()


def _find_threshold(x: Tensor, rho: Tensor) -> tuple[Tensor, ...]:
    """The threshold, and how many entries are above it."""
    if not x.numel():
        return (x.sum(-1, keepdim=True) - rho, torch.ones_like(rho))
    # no entry of the projection is larger than rho, and the mean of all is a bound too; Newton moves right from there
    tau = torch.maximum(-rho, (x.sum(-1, keepdim=True) - rho) / x.shape[-1])
    count = torch.full_like(tau, math.inf)
    while True:
        above = torch.relu(x - tau)
        before, count = count, above.sign().sum(-1, keepdim=True).clamp_min(1)
        moving = count < before  # more are above only by rounding: then it was there
        if not bool(moving.any()):  # the one read-back of a step; seldom more than ten
            return tau, count
        tau = torch.where(moving, tau + (above.sum(-1, keepdim=True) - rho) / count, tau)


def _onto_capped_simplex(x: Tensor, rho: Any, u: Any) -> Tensor:
    rho = as_column(rho, x)
    room = x.shape[-1] * u if not isinstance(u, Tensor) else u.expand(*u.shape[:-1], x.shape[-1]).sum(-1, keepdim=True)
    check_that(
        rho <= room * (1 + 8 * torch.finfo(x.dtype).eps),
        lambda: f"total: expected at most {shown(room)}, the sum of upper, got {shown(rho)}",
    )
    _check_masked("total", x, rho, u)
    return _cap(x, rho, u)


@opaque
def _check_masked(name: str, x: Tensor, rho: Tensor, u: Any) -> None:
    """Refuses a total that the entries above ``-inf`` cannot reach. Reads one flag, and a second if there are masks."""
    if x.is_meta or not x.numel() or not bool(physical(x).amin() == -math.inf):
        return
    room = ((x.detach() > -math.inf) * u).sum(-1, keepdim=True)
    lowest = x.detach().amin(-1, keepdim=True) == -math.inf  # false for NaN
    check_that(
        ~lowest | (rho.detach() <= room * (1 + 8 * torch.finfo(x.dtype).eps)),
        lambda: f"{name}: expected at most {shown(room)}, all that entries above -inf can hold, got {shown(rho)}",
    )


def _soft_topk(x: Tensor, k: Any, temperature: Any) -> Tensor:
    k, n = as_column(k, x), x.shape[-1]
    check_that(k <= n, lambda: f"k: expected at most {n}, the number of entries, got {shown(k)}")
    # a masked entry has no derivative in the temperature, though minus infinity times zero would be one
    _check_masked("k", x, k, 1.0)
    masked = x == -math.inf
    return _cap(torch.where(masked, -math.inf, torch.where(masked, 0, x) / temperature), k, 1.0)


def _cap(x: Tensor, rho: Tensor, u: Any) -> Tensor:
    caps = as_column(u, x)
    shift, tau, count = identify(_find_capped_threshold, x, rho, caps, ndims=(1, 1, 1), found_ndims=(1, 1, 1))
    x = x - shift
    step = (clip(x - tau, 0.0, u).sum(-1, keepdim=True) - rho) / count.clamp_min(1)
    # without a free entry nothing moves
    return clip(x - (tau + (count > 0) * _no_more_than_its_slope(step)), 0.0, u)


def _find_capped_threshold(x: Tensor, rho: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    """The threshold in two parts, and how many entries are neither zero nor at their cap.

    Beside a large threshold the caps have few digits: so the second search starts from the result of the first.
    """
    if not x.numel():
        return (x.sum(-1, keepdim=True) - rho,) * 3
    shift = _search(x, rho, u, (x.sum(-1, keepdim=True) - rho) / x.shape[-1])
    x = x - shift
    tau = _search(x, rho, u, torch.zeros_like(shift))
    z = torch.minimum(torch.relu(x - tau), u)
    step = (z.sum(-1, keepdim=True) - rho) / _free(z, u).clamp_min(1)
    tau = tau + (_free(z, u) > 0) * step
    return shift, tau, _free(torch.minimum(torch.relu(x - tau), u), u)


def _free(z: Tensor, u: Tensor) -> Tensor:
    return (z.sign() * (u - z).sign()).sum(-1, keepdim=True)


def _search(x: Tensor, rho: Tensor, u: Tensor, tau: Tensor) -> Tensor:
    """The threshold from a guess."""
    high = x.amax(-1, keepdim=True)
    # an entry of -inf stays at zero whatever the threshold
    others = x.nan_to_num(nan=math.nan, posinf=math.inf, neginf=math.inf)
    low, high = torch.broadcast_tensors((others - torch.minimum(u, rho)).amin(-1, keepdim=True), high)
    tau = tau.clamp(low, high)
    width = high - low
    rounding = 4 * torch.finfo(x.dtype).eps
    for k in range(300):
        z = torch.minimum(torch.relu(x - tau), u)
        free = _free(z, u)
        excess = z.sum(-1, keepdim=True) - rho
        moving = excess.abs() > rounding * (rho + free * tau.abs())  # false for NaN
        if not bool(moving.any()):  # the one read-back of a step; seldom more than ten
            break
        low, high = torch.where(excess >= 0, tau, low), torch.where(excess <= 0, tau, high)
        step = tau + excess / free
        newton = (step > low) & (step < high)
        if k % 4 == 3:  # Newton may jump to and fro: where the bracket is not shorter by half, halve it
            newton, width = newton & (high - low < width / 2), high - low
        tau = torch.where(moving, torch.where(newton, step, low + (high - low) / 2), tau)
    return tau
