r"""Total variation of a signal: the nearest signal with few jumps.

.. math:: \operatorname{prox}(x) = \arg\min_z \; t \sum_i w_i |z_{i+1} - z_i| + \tfrac12 \|z - x\|^2

The result is constant on pieces, and on a piece C it is the mean of x plus what its neighbours pull,

.. math:: z_C = \operatorname{mean}_C(x) + \frac{t}{|C|} \sum_{\text{borders } i} w_i \operatorname{sign}(z_i - z_C) .

To find the pieces, start from one. For any level l, the entries above l minimise a binary energy, ``sum_i (l - x_i) s_i
+ t sum_i w_i |s_{i+1} - s_i|`` over s in {0, 1}; with l the value that a piece has if it is one, it either is, or is
cut. All pieces of all batch elements are asked at once, so the number of rounds is the depth of the tree of cuts: a few
dozen at most, since a round that peels off little uses up orders of magnitude of the range of values. D. S. Hochbaum,
An efficient algorithm for image segmentation, Markov random fields and related problems, 2001; A. Chambolle, J. Darbon,
On total variation minimization and surface evolution using parametric maximum flows, 2009, section 4.

The binary energy on a chain is a dynamic programme with the message ``m -> clip(m + c_i, -t_i, t_i)``. Such maps
compose to maps of the same kind, so a parallel prefix scan runs it in log2 n steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from difflayers._checks import check_tensor

from ._identify import identify
from ._operands import Number, on_vectors, per_element, per_entry
from ._partition import block_means, block_sums, levels, merge_ties, number

ROUNDING = 4  # rounding units of the sums by which a message may pass its bound


def prox_tv1d(x: Tensor, t: Number, *, weights: Number | None = None, dim: int = -1) -> Tensor:
    """The prox of total variation along one dimension (the fused lasso's smoothing part).

    Solves ``argmin_z t * sum_i weights_i |z_{i+1} - z_i| + 1/2 ||z - x||^2``.

    Args:
        x: Any shape.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        weights: At least 0, one for each pair of neighbours: a number, or a tensor that broadcasts with `x` after its
            first entry along `dim` is dropped. None: all 1.
        dim: The dimension of one signal.

    Returns:
        The minimiser, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `t` or `weights`, a shape that does not broadcast, or a dtype that is not
            floating point.

    Differentiable in `x`, `t` and `weights`, to any order. At a kink (neighbouring pieces with equal values) the
    derivative is that of one joint piece. Neighbours whose pair has no weight are never joined.

    Example:
        >>> import torch
        >>> prox_tv1d(torch.tensor([0.0, 0.2, 3.0, 3.4]), 0.5)
        tensor([0.3500, 0.3500, 2.9500, 2.9500])

    Source: A. Chambolle, J. Darbon, On total variation minimization and surface evolution using parametric maximum
    flows, 2009, section 4.
    Departure: on a chain the cuts come from a parallel scan instead of a maximum flow.
    """
    entries = per_entry("weights", _padded(x, weights, dim), at_least=0)
    return on_vectors(_tv, x, per_element("t", t, at_least=0), entries, dim=dim)


def _padded(x: Tensor, weights: Number | None, dim: int) -> Number:
    """Weights with a pair more, behind the last entry, that has none: shaped like `x`."""
    if weights is None:
        return 1.0
    if not isinstance(weights, Tensor) or not isinstance(x, Tensor) or not weights.ndim:
        return weights
    check_tensor("weights", weights)
    if not -x.ndim <= dim < x.ndim:
        return weights  # refused in a moment
    dim = dim % x.ndim - x.ndim
    if weights.ndim < -dim:
        return weights
    pairs = x.shape[dim] - 1
    if weights.shape[dim] not in (1, pairs):
        raise ValueError(
            f"weights: expected {pairs} entries along dim {dim}, one for each pair of neighbours, "
            f"got shape {tuple(weights.shape)}"
        )
    shape = [pairs if i == weights.ndim + dim else n for i, n in enumerate(weights.shape)]
    return pad(weights.expand(shape), (0, 0) * (-dim - 1) + (0, 1))


def _tv(x: Tensor, t: Any, w: Any) -> Tensor:
    if not x.numel():
        return x * t * w
    t, w = (v.expand_as(x) if isinstance(v, Tensor) else torch.full_like(x, v) for v in (t, w))
    blocks, jumps, z = identify(_pieces, x, t, w, ndims=(1, 1, 1), found_ndims=(1, 1, 1))
    across = jumps != 0  # an infinite step makes no jumps, and no NaN
    pull = torch.where(across, t, 0) * torch.where(across, w, 0) * jumps
    return z + block_means(pulled(x, pull) - z, blocks)


def pulled(x: Tensor, pull: Tensor) -> Tensor:
    """The signal plus what its jumps pull: up by ``pull[i]`` at i, down by as much at i + 1."""
    return x + pull - pad(pull[..., :-1], (1, 0))


def _pieces(x: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Blocks, signs of the jumps between them, and values, in float64 whatever comes in."""
    y, bound = torch.broadcast_tensors(x.double(), (t * w).double())
    sound = torch.isfinite(y).all(-1, keepdim=True)
    jumps = _cut(torch.where(sound, y, 0), bound)
    free = pad(bound[..., :-1] == 0, (1, 0), value=True)
    first = pad(jumps[..., :-1] != 0, (1, 0), value=True) | free
    v = pulled(y, torch.where(jumps != 0, bound * jumps, 0))
    z = levels(v, number(first))
    first = merge_ties(z, v, first, free)
    jumps = torch.where(pad(first[..., 1:], (0, 1)), jumps, 0)
    blocks = number(first)
    # a pair that pulls nothing yet has a direction all the same, which the derivative in its weight is made of
    jumps = torch.where(pad(free[..., 1:], (0, 1)), pad(z.diff().sign(), (0, 1)), jumps)
    return blocks, jumps.to(x.dtype), z.to(x.dtype)


def _cut(x: Tensor, bound: Tensor) -> Tensor:
    """The signs of the jumps.

    All signals are laid end to end, with pairs of no weight between them, so that they are just pieces of one.
    """
    shape, n = x.shape, x.shape[-1]
    y = x.reshape(-1)
    t = pad(bound[..., :-1], (0, 1)).reshape(-1)
    jumps = torch.zeros_like(y)
    place = torch.arange(y.numel(), device=y.device)
    ones = torch.ones_like(y)
    last = t == 0
    piece = _ending_at(last)
    length = block_sums(ones, piece)
    longest = n
    while longest > 1:  # a round cuts a piece or is done with it
        c = block_sums(y, piece) / length - y
        c = c - block_sums(c, piece) / length  # now it sums to zero, whatever the level lost to rounding
        slack = ROUNDING * torch.finfo(y.dtype).eps * (block_sums(c.abs(), piece) + t)
        above = _minimise(c, t, slack, last, longest).to(y.dtype)
        jump = torch.where(last, 0, pad(above.diff(), (0, 1)))
        jumps.index_add_(0, place, jump)
        y = pulled(y, torch.where(jump != 0, t * jump, 0))
        busy = block_sums(jump.abs(), piece) > 0
        last = last | (jump != 0)
        t = torch.where(last, 0, t)
        piece = _ending_at(last)
        length = block_sums(ones, piece)
        longest, count = (int(k) for k in torch.stack([torch.where(busy, length, 0).amax(), busy.sum()]).tolist())
        if 2 * count < y.numel():
            y, t, last, place, length, ones = (v[busy] for v in (y, t, last, place, length, ones))
            piece = _ending_at(last)
    return jumps.reshape(shape)


def _ending_at(last: Tensor) -> Tensor:
    """Piece numbers from the marks of last entries."""
    return last.cumsum(0) - last.to(torch.int64)


def _minimise(c: Tensor, t: Tensor, slack: Tensor, last: Tensor, longest: int) -> Tensor:
    """``argmin over s in {0, 1} of sum_i c_i s_i + t_i |s_{i+1} - s_i|``: each entry's message decides, or the next.

    The message into entry i is what s_i = 1 costs more than s_i = 0, all entries before it at their best.
    """
    message = c + pad(_scan(c, -t, t, longest)[:-1], (1, 0))
    one = message < -t - slack
    decided = one | (message > t + slack) | last
    place = torch.arange(c.numel(), device=c.device)
    code = torch.where(decided, 2 * place.flip(0) + one, -1)  # backwards, the latest decision has the largest code
    return code.flip(0).cummax(0).values.flip(0) % 2


def _scan(a: Tensor, low: Tensor, high: Tensor, longest: int) -> Tensor:
    """All results of the maps ``m -> clip(m + a_i, low_i, high_i)`` applied in order, from m = 0.

    The last map of a piece is constant, and so are all composed maps that span `longest` entries.
    """
    if longest <= 1:
        return low
    n = a.numel()
    if n % 2:
        a, low, high = pad(a, (0, 1)), pad(low, (0, 1), value=-torch.inf), pad(high, (0, 1), value=torch.inf)
    (a_1, a_2), (low_1, low_2), (high_1, high_2) = ((v[0::2], v[1::2]) for v in (a, low, high))
    pairs = a_1 + a_2, (low_1 + a_2).clamp(low_2, high_2), (high_1 + a_2).clamp(low_2, high_2)
    second = _scan(*pairs, (longest + 1) // 2)
    first = (pad(second[:-1], (1, 0)) + a_1).clamp(low_1, high_1)
    return torch.stack([first, second], -1).flatten()[:n]
