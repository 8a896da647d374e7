r"""Soft thresholding and its relatives: separable penalties whose prox is piecewise linear.

.. math:: \operatorname{prox}_{t \|\cdot\|_1}(x)_i = \operatorname{sign}(x_i) \max(|x_i| - t, 0)

N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6. Autograd through such a formula is exact at every order, if
its building blocks (``_pieces.py``) choose the branch that is meant at a kink.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._operands import Number, as_tensor, on_vectors, per_element, per_entry
from ._pieces import soften


def prox_l1(x: Tensor, t: Number, *, weights: Number = 1.0, dim: int = -1) -> Tensor:
    """Soft thresholding: the prox of the weighted sum of absolute values.

    Solves ``argmin_z t * sum_i weights_i |z_i| + 1/2 ||z - x||^2``.

    Args:
        x: Any shape.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        weights: At least 0: a number, or a tensor that broadcasts with `x`.
        dim: The dimension of one vector.

    Returns:
        The minimiser, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `t` or `weights`, a shape that does not broadcast, or a dtype that is not
            floating point.

    Differentiable in `x`, `t` and `weights`, to any order. At a kink, ``|x_i| = t * weights_i``, the derivative is that
    of the zero branch.

    Example:
        >>> import torch
        >>> prox_l1(torch.tensor([3.0, -2.0, 0.5]), 1.0)
        tensor([ 2., -1.,  0.])

    Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.5.2.
    """
    operands = per_element("t", t, at_least=0), per_entry("weights", weights, at_least=0)
    return on_vectors(lambda x, t, weights: soften(x, t * weights), x, *operands, dim=dim)


def prox_nonnegative_l1(x: Tensor, t: Number, *, dim: int = -1) -> Tensor:
    """One-sided soft thresholding: the prox of the sum of entries that must not be negative.

    Solves ``argmin_z t * sum_i z_i + 1/2 ||z - x||^2 s.t. z >= 0``.

    Args:
        x: Any shape.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        dim: The dimension of one vector.

    Returns:
        The minimiser, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `t`, a shape that does not broadcast, or a dtype that is not floating point.

    Differentiable in `x` and `t`, to any order. At a kink, ``x_i = t``, the derivative is that of the zero branch.

    Example:
        >>> import torch
        >>> prox_nonnegative_l1(torch.tensor([3.0, -2.0, 0.5]), 1.0)
        tensor([2., 0., 0.])

    Source: A. Beck, First-Order Methods in Optimization, 2017, section 6.9.
    """
    return on_vectors(lambda x, t: torch.relu(x - t), x, per_element("t", t, at_least=0), dim=dim)


def prox_squared_l2(x: Tensor, t: Number, *, dim: int = -1) -> Tensor:
    """Shrinkage by a factor: the prox of half the *squared* Euclidean norm.

    Solves ``argmin_z t/2 ||z||^2 + 1/2 ||z - x||^2``. For the norm itself see :func:`prox_l2`.

    Args:
        x: Any shape.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        dim: The dimension of one vector.

    Returns:
        The minimiser ``x / (1 + t)``, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `t`, a shape that does not broadcast, or a dtype that is not floating point.

    Differentiable in `x` and `t`, to any order.

    Example:
        >>> import torch
        >>> prox_squared_l2(torch.tensor([3.0, -2.0]), 1.0)
        tensor([ 1.5000, -1.0000])

    Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.1.1.
    """
    return on_vectors(lambda x, t: x / (1 + t), x, per_element("t", t, at_least=0), dim=dim)


def prox_elastic_net(x: Tensor, t: Number, *, l1: Number = 1.0, l2: Number = 1.0, dim: int = -1) -> Tensor:
    """The prox of the elastic net penalty.

    Solves ``argmin_z t * (l1 ||z||_1 + l2/2 ||z||^2) + 1/2 ||z - x||^2``.

    Args:
        x: Any shape.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        l1: Weight of the absolute values, at least 0: a number, or a tensor that broadcasts to the batch.
        l2: Weight of the squares, at least 0: the same.
        dim: The dimension of one vector.

    Returns:
        The minimiser, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `t`, `l1` or `l2`, a shape that does not broadcast, or a dtype that is not
            floating point.

    Differentiable in `x`, `t`, `l1` and `l2`, to any order. At a kink, ``|x_i| = t * l1``, the derivative is that of
    the zero branch.

    Example:
        >>> import torch
        >>> prox_elastic_net(torch.tensor([3.0, -2.0, 0.5]), 1.0)
        tensor([ 1.0000, -0.5000,  0.0000])

    Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.5.3.
    """
    operands = [per_element(name, value, at_least=0) for name, value in (("t", t), ("l1", l1), ("l2", l2))]
    return on_vectors(lambda x, t, l1, l2: soften(x, t * l1) / (1 + t * l2), x, *operands, dim=dim)


def prox_huber(x: Tensor, t: Number, *, delta: Number = 1.0, dim: int = -1) -> Tensor:
    """The prox of the Huber function, which is quadratic within `delta` of zero and linear beyond.

    Solves ``argmin_z t * sum_i h(z_i) + 1/2 ||z - x||^2`` with ``h(z) = z^2 / (2 delta)`` where ``|z| <= delta``, else
    ``|z| - delta / 2``.

    Args:
        x: Any shape.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        delta: More than 0: a number, or a tensor that broadcasts to the batch.
        dim: The dimension of one vector.

    Returns:
        The minimiser, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `t`, a `delta` that is not positive, a shape that does not broadcast, or a
            dtype that is not floating point.

    Differentiable in `x`, `t` and `delta`, to any order. At a kink, ``|x_i| = delta + t``, the derivative is that of
    the quadratic branch.

    Example:
        >>> import torch
        >>> prox_huber(torch.tensor([3.0, -2.0, 0.5]), 1.0)
        tensor([ 2.0000, -1.0000,  0.2500])

    Source: A. Beck, First-Order Methods in Optimization, 2017, section 6.7.
    """
    operands = per_element("t", t, at_least=0), per_element("delta", delta, above=0)
    return on_vectors(_huber, x, *operands, dim=dim)


def prox_hinge(x: Tensor, t: Number, labels: Number, *, dim: int = -1) -> Tensor:
    """The prox of the hinge loss of a support vector machine.

    Solves ``argmin_z t * sum_i max(0, 1 - labels_i z_i) + 1/2 ||z - x||^2``.

    Args:
        x: Any shape.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        labels: Usually -1 or 1, but any numbers: a number, or a tensor that broadcasts with `x`.
        dim: The dimension of one vector.

    Returns:
        The minimiser, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `t`, a shape that does not broadcast, or a dtype that is not floating point.

    Differentiable in `x`, `t` and `labels`, to any order. Where ``labels_i x_i`` is 1 or ``1 - t labels_i^2``, the
    derivative is that of the branch ``labels_i z_i = 1``.

    Example:
        >>> import torch
        >>> prox_hinge(torch.tensor([3.0, 0.5, -2.0]), 1.0, torch.ones(3))
        tensor([ 3.,  1., -1.])

    Source: A. Beck, First-Order Methods in Optimization, 2017, section 6.9.
    """
    return on_vectors(_hinge, x, per_element("t", t, at_least=0), per_entry("labels", labels), dim=dim)


def _huber(x: Tensor, t: Any, delta: Any) -> Tensor:
    bound = delta + t
    # the slope is delta/bound up to the kink and 1 beyond: a sum of terms of one sign, so that no digit cancels
    return x * (delta / bound) + soften(x, bound) * (t / bound)


def _hinge(x: Tensor, t: Any, labels: Any) -> Tensor:
    y = as_tensor(labels, x)
    push = t * y
    on, away, below = _sides_of_margin(x.detach(), y.detach(), push.detach())
    # on the margin y z = 1, which needs no x and no t; away from it z is x or x + t y
    z = on / (y + torch.finfo(x.dtype).tiny)  # a label of 0 has no margin
    return torch.addcmul(torch.addcmul(z, below, push), away, x)


def _sides_of_margin(x: Tensor, y: Tensor, push: Tensor) -> tuple[Tensor, ...]:
    """1 where ``y z`` is 1; where it is not; and where it is less."""
    margin = (y * x).sub_(1)
    below = torch.addcmul(margin, push, y).neg_().sign_().relu_()
    away = margin.sign_().relu_() + below
    return 1 - away, away, below
