r"""Soft thresholding and its relatives: entries shrink towards zero.

.. math:: \operatorname{prox}_{t \|\cdot\|_1}(x)_i = \operatorname{sign}(x_i) \max(|x_i| - t, 0)

N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.5.2. Everything here is piecewise linear, so autograd through
the formula is exact at every order; a clamp passes its cotangent at its bounds, which makes the zero branch the one
that counts at a kink.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._operands import Number, on_vectors, per_element, per_entry


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
        >>> prox_l1(torch.tensor([3.0, -0.5, -2.0]), 1.0)
        tensor([ 2.,  0., -1.])

    Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.5.2.
    """
    operands = per_element("t", t, at_least=0), per_entry("weights", weights, at_least=0)
    return on_vectors(_shrink, x, *operands, dim=dim)


def _shrink(x: Tensor, t: Any, weights: Any) -> Tensor:
    bound = t * weights
    return x - x.clamp(-bound, bound)
