r"""The prox of norms that are not separable, and the projection on the Euclidean ball.

.. math:: \operatorname{prox}_{t \|\cdot\|_2}(x) = \max(1 - t / \|x\|_2, 0)\, x

N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.5. The norm has no derivative at zero, where all of these are
constant (or the identity): there its argument is replaced before it is differentiated, so that no order gives NaN.

Symbols: ``r`` norm, ``rho`` radius.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from difflayers.linalg._autodiff import opaque, physical, plain

from ._operands import Number, Operand, as_tensor, on_vectors, optional, per_element, per_entry, per_event
from ._simplex import onto_l1_ball


def prox_l2(x: Tensor, t: Number, *, dim: int = -1) -> Tensor:
    """Block soft thresholding: the prox of the Euclidean norm, which is *not* squared.

    Solves ``argmin_z t ||z||_2 + 1/2 ||z - x||^2``. For the square see :func:`prox_squared_l2`.

    Args:
        x: Any shape.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        dim: The dimension of one vector.

    Returns:
        The minimiser, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `t`, a shape that does not broadcast, or a dtype that is not floating point.

    Differentiable in `x` and `t`, to any order. At the kink, ``||x|| = t``, the derivative is that of the zero branch.

    Example:
        >>> import torch
        >>> prox_l2(torch.tensor([3.0, 4.0]), 1.0)
        tensor([2.4000, 3.2000])

    Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.5.1.
    """
    return on_vectors(lambda x, t: x * _shrinkage(norm(x), t), x, per_element("t", t, at_least=0), dim=dim)


def prox_linf(x: Tensor, t: Number, *, dim: int = -1) -> Tensor:
    """The prox of the largest absolute value: large entries are cut at one level.

    Solves ``argmin_z t ||z||_inf + 1/2 ||z - x||^2``.

    Args:
        x: Any shape.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        dim: The dimension of one vector.

    Returns:
        The minimiser ``x - project_l1_ball(x, t)``, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `t`, a shape that does not broadcast, or a dtype that is not floating point.

    Differentiable in `x` and `t`, to any order. At a kink, where an entry just reaches the level, the derivative is
    that of the entry below it; where ``||x||_1 = t`` it is that of the zero branch.

    Example:
        >>> import torch
        >>> prox_linf(torch.tensor([3.0, -2.0, 0.5]), 2.0)
        tensor([ 1.5000, -1.5000,  0.5000])

    Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.5.2.
    """
    return on_vectors(lambda x, t: x - onto_l1_ball(x, t), x, per_element("t", t, at_least=0), dim=dim)


def prox_group_l2(
    x: Tensor, t: Number, groups: int | Tensor, *, weights: Number | None = None, dim: int = -1
) -> Tensor:
    """Block soft thresholding of groups of entries: the prox of the group lasso penalty.

    Solves ``argmin_z t * sum_g weights_g ||z_g||_2 + 1/2 ||z - x||^2`` over disjoint groups ``g``.

    Args:
        x: Any shape; ``n`` entries along `dim`.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        groups: Size of equal groups of neighbours, a divisor of ``n``; or ``(n,)`` integers: the number of the group of
            each entry, from 0 on.
        weights: At least 0: a number, or ``(*batch, G)``, one for each of the ``G`` groups (the largest label and 1).
            None: 1.
        dim: The dimension of one vector.

    Returns:
        The minimiser, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `t` or `weights`, groups that do not fit, a shape that does not broadcast, or
            a dtype that is not floating point.

    Differentiable in `x`, `t` and `weights`, to any order. At a kink, ``||x_g|| = t * weights_g``, the derivative is
    that of the zero branch.

    Example:
        >>> import torch
        >>> prox_group_l2(torch.tensor([3.0, 4.0, 0.5, 0.0]), 1.0, 2)
        tensor([2.4000, 3.2000, 0.0000, 0.0000])
        >>> prox_group_l2(torch.tensor([3.0, 0.5, 4.0, 0.0]), 1.0, torch.tensor([0, 1, 0, 1]))
        tensor([2.4000, 0.0000, 3.2000, 0.0000])

    Source: M. Yuan, Y. Lin, Model selection and estimation in regression with grouped variables, 2006.
    """
    return scale_groups(_shrinkage, x, per_element("t", t, at_least=0), groups, weights, dim)


def project_l2_ball(x: Tensor, radius: Number = 1.0, *, center: Number | None = None, dim: int = -1) -> Tensor:
    """The nearest point at a Euclidean distance of at most `radius` from `center`.

    Solves ``argmin_z 1/2 ||z - x||^2 s.t. ||z - center||_2 <= radius``.

    Args:
        x: Any shape.
        radius: At least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        center: A number, or a tensor that broadcasts with `x`; None: zero.
        dim: The dimension of one vector.

    Returns:
        The projection, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `radius` (the set is empty), a shape that does not broadcast, or a dtype that
            is not floating point.

    Differentiable in `x`, `radius` and `center`, to any order. On the boundary the derivative is that of the inside.

    Example:
        >>> import torch
        >>> project_l2_ball(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])

    Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.5.1.
    """
    operands = per_element("radius", radius, at_least=0), optional(per_entry("center", center))
    return on_vectors(_onto_l2_ball, x, *operands, dim=dim)


def scale_groups(
    factor: Callable[[tuple[Tensor, Tensor], Any], Tensor],
    x: Tensor,
    t: Operand,
    groups: int | Tensor,
    weights: Number | None,
    dim: int,
) -> Tensor:
    """Every group of `x` times ``factor(norm of the group, t * its weight)``."""
    n = x.shape[dim] if isinstance(x, Tensor) and -x.ndim <= dim < x.ndim else 0  # on_vectors says what is wrong
    labels: Tensor | None = None
    if isinstance(groups, Tensor):
        labels, count = _check_labels(groups, n)
    else:
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or n % groups:
            raise ValueError(f"groups: expected a divisor of {n} or ({n},) integers, got {groups!r}")
        count = n // groups

    def formula(x: Tensor, t: Any, weights: Any) -> Tensor:
        bound = t * weights
        if labels is not None:
            return x * factor(_norms(x, labels, count), bound)[..., labels]
        blocks = x.unflatten(-1, (count, n // max(count, 1)))
        return (blocks * factor(norm(blocks), bound.unsqueeze(-1) if isinstance(bound, Tensor) else bound)).flatten(-2)

    weighted = per_event("weights", 1.0 if weights is None else weights, (count,), at_least=0)
    return on_vectors(formula, x, t, weighted, dim=dim)


def norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """The Euclidean norm of the last dimension, kept, as :func:`_root` gives it."""
    return _root(lambda x: (x * x).sum(-1, keepdim=True), x)


def _root(sum_of_squares: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The root of the sum of squares, 1 in place of 0, and 1 where it is not zero, else 0."""
    square = sum_of_squares(x)
    if x.dtype != torch.float32 or x.device.type == "mps":
        return _of_square(square)
    extreme = _out_of_range(square)
    if extreme is None:
        return _of_square(square)
    # only these elements: what the others get must not depend on their neighbours
    ordinary = _of_square(torch.where(extreme, 1, square))
    wide = _of_square(torch.where(extreme, sum_of_squares(x.double()), 1))
    r, positive = (torch.where(extreme, w.to(x.dtype), o) for w, o in zip(wide, ordinary, strict=True))
    return r, positive


def _of_square(square: Tensor) -> tuple[Tensor, Tensor]:
    zero = (square.detach() == 0).to(square.dtype)
    return (square + zero).sqrt(), 1 - zero


@opaque
def _out_of_range(square: Tensor) -> Tensor | None:
    """Which sums of squares are too large or too small for their digits; None if there are none. Reads one flag."""
    if square.is_meta or not square.numel():
        return None
    low, high = physical(square).aminmax()
    if bool((low > 1e-30) & (high < 1e30)):
        return None
    square = square.detach()
    return ~((square > 1e-30) & (square < 1e30))


def _shrinkage(r: tuple[Tensor, Tensor], t: Any) -> Tensor:
    """``max(1 - t / r, 0)``."""
    return torch.relu(1 - as_tensor(t, r[0]) / r[0]) * r[1]


def shortening(r: tuple[Tensor, Tensor], rho: Any) -> Tensor:
    """``min(rho / r, 1)``."""
    inside = r[0] * r[1] <= rho
    return torch.where(inside, 1, as_tensor(rho, r[0]) / torch.where(inside, 1, r[0]))


def _onto_l2_ball(x: Tensor, rho: Any, center: Any) -> Tensor:
    if center is None:
        return x * shortening(norm(x), rho)
    short = shortening(norm(x - center), rho)
    return torch.where(short == 1, x, center + (x - center) * short)


def _norms(x: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The norm of every group, ``(*batch, count)``, as :func:`_root` gives it."""
    return _root(lambda x: x.new_zeros((*x.shape[:-1], count)).index_add(-1, labels, x * x), x)


@opaque
def _check_labels(groups: Tensor, n: int) -> tuple[Tensor, int]:
    """The labels, and the number of groups."""
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise ValueError(f"groups: expected integers, got {groups.dtype}")
    if tuple(groups.shape) != (n,):
        raise ValueError(f"groups: expected shape ({n},), one label for each entry, got {tuple(groups.shape)}")
    labels = plain("groups", groups).to(torch.int64)
    if not n or labels.is_meta:
        return labels, n
    low, high = labels.aminmax()
    if int(low) < 0:
        raise ValueError(f"groups: expected labels of at least 0, got {int(low)}")
    return labels, int(high) + 1
