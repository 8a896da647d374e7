r"""The sorted l1 norm, SLOPE or OWL: larger entries pay larger weights, and correlated entries end up equal.

.. math:: g(z) = \sum_i w_i |z|_{(i)}, \qquad |z|_{(1)} \ge |z|_{(2)} \ge \dots, \qquad w_1 \ge w_2 \ge \dots \ge 0

Sorted magnitudes less their weights must not rise: where they do, isotonic regression takes the mean of a block. What
ends up negative is set to zero; then signs and order are restored. M. Bogdan, E. van den Berg, C. Sabatti, W. Su, E. J.
Candes, SLOPE: adaptive variable selection via convex optimization, 2015, algorithm 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from difflayers.linalg._autodiff import physical

from ._identify import identify
from ._isotonic import pools
from ._operands import Number, Operand, check_range, on_vectors, per_element
from ._partition import block_largest, block_means, levels, number


def prox_slope(x: Tensor, t: Number, weights: Number, *, dim: int = -1) -> Tensor:
    """The prox of the sorted l1 norm (SLOPE, OWL; OSCAR for weights that fall linearly).

    Solves ``argmin_z t * sum_i weights_i |z|_(i) + 1/2 ||z - x||^2``, with ``|z|_(1)`` the largest magnitude.

    Args:
        x: Any shape.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        weights: At least 0 and not rising along `dim`: a number (which makes it the l1 norm), or a tensor that
            broadcasts with `x`. The first weight is that of the largest magnitude.
        dim: The dimension of one vector.

    Returns:
        The minimiser, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `t` or `weights`, rising `weights`, a shape that does not broadcast, or a
            dtype that is not floating point.

    Differentiable in `x`, `t` and `weights`, to any order. At a kink the derivative is that of the zero branch and,
    where magnitudes meet, that of one joint block; magnitudes that pay equal weights do not meet: there it is soft
    thresholding, which is smooth.

    Example:
        >>> import torch
        >>> prox_slope(torch.tensor([3.0, -2.5, 0.5]), 1.0, torch.tensor([2.0, 1.0, 0.5]))
        tensor([ 1.2500, -1.2500,  0.0000])

    Source: M. Bogdan et al., SLOPE: adaptive variable selection via convex optimization, 2015, algorithm 3.
    Departure: the blocks come from divide and conquer, all at once, instead of from a stack.
    """
    entries = Operand("weights", weights, 1, at_least=0)
    if isinstance(weights, Tensor) and weights.ndim:
        check_range(entries)
        _check_falling(weights, dim, x.ndim if isinstance(x, Tensor) else 1)
    return on_vectors(_shrink_sorted, x, per_element("t", t, at_least=0), entries, dim=dim)


def _check_falling(weights: Tensor, dim: int, ndim: int) -> None:
    """Refuses weights that rise. Reads one flag (never in a compiled graph)."""
    if torch.compiler.is_compiling() or weights.is_meta or not weights.is_floating_point():
        return
    from_end = dim if dim < 0 else dim - ndim
    if not -weights.ndim <= from_end < 0:
        return  # they broadcast along `dim`
    rises = physical(weights.detach().diff(dim=from_end) > 0)
    if bool(rises.any()):
        raise ValueError(
            f"weights: expected entries that do not rise along dim {dim}, got {int(rises.sum())} that are larger than "
            "the one before"
        )


def _shrink_sorted(x: Tensor, t: Any, w: Any) -> Tensor:
    bound = t * w
    bound = bound.expand_as(x) if isinstance(bound, Tensor) else torch.full_like(x, bound)
    if not x.numel():
        return x * bound
    order, rank, blocks, alive, level = identify(_sorted_blocks, x, bound, ndims=(1, 1), found_ndims=(1,) * 5)
    v = x.abs().gather(-1, order) - bound
    sorted_z = torch.where(alive, level + block_means(v - level, blocks), 0)
    return x.sign() * sorted_z.gather(-1, rank)


def _sorted_blocks(x: Tensor, bound: Tensor) -> tuple[Tensor, ...]:
    """The order of magnitudes and its inverse; in that order blocks, which of them are above zero, and their value."""
    x, bound = torch.broadcast_tensors(x, bound)
    order = x.abs().argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(x.shape[-1], device=x.device).expand_as(order))
    bound = bound.double()
    v = x.abs().gather(-1, order).double() - bound
    joined, blocks = (_apart(blocks, bound) for blocks in pools(-v))
    z = levels(v, blocks)
    return order, rank, joined, ~(z <= 0), z.to(x.dtype)


def _apart(blocks: Tensor, bound: Tensor) -> Tensor:
    """Entries of equal weight never exchange anything: each is a block of its own."""
    steep = block_largest(bound, blocks) > -block_largest(-bound, blocks)
    return number(pad(~steep[..., 1:] | (blocks.diff(dim=-1) > 0), (1, 0), value=True))
