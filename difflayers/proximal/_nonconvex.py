r"""Penalties that do not shrink large entries: l0, logarithm, SCAD and MCP.

They are not convex, so that the prox may jump: where two minimisers tie the smaller one is returned, and a derivative
is that of the branch taken; it knows nothing of the jump. :func:`~difflayers.proximal.conjugate_prox` refuses them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from ._operands import Number, check_that, on_vectors, per_element, shown
from ._pieces import soften


def prox_l0(x: Tensor, t: Number, *, dim: int = -1) -> Tensor:
    """Hard thresholding: the prox of the number of non-zero entries.

    Solves ``argmin_z t * #{i: z_i != 0} + 1/2 ||z - x||^2``.

    Args:
        x: Any shape.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        dim: The dimension of one vector.

    Returns:
        A minimiser, shaped like `x`: the entries beyond ``sqrt(2 t)``; of two minimisers the one that is zero.

    Raises:
        ValueError: For a negative or NaN `t`, a shape that does not broadcast, or a dtype that is not floating point.

    Differentiable in `x` and `t`, to any order, except at the jump, ``|x_i| = sqrt(2 t)``, where the derivative is that
    of the zero branch. The derivative in `t` is zero.

    Example:
        >>> import torch
        >>> prox_l0(torch.tensor([3.0, -2.0, 0.5]), 1.0)
        tensor([ 3., -2.,  0.])

    Source: A. Beck, First-Order Methods in Optimization, 2017, example 6.10.
    """
    return on_vectors(_hard_threshold, x, per_element("t", t, at_least=0), dim=dim)


def prox_log(x: Tensor, t: Number, *, eps: Number = 1.0, dim: int = -1) -> Tensor:
    """The prox of the logarithmic penalty behind reweighted l1 minimisation.

    Solves ``argmin_z t * sum_i log(eps + |z_i|) + 1/2 ||z - x||^2``.

    Args:
        x: Any shape.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        eps: More than 0: a number, or a tensor that broadcasts to the batch.
        dim: The dimension of one vector.

    Returns:
        A minimiser, shaped like `x`; of two the one that is zero.

    Raises:
        ValueError: For a negative or NaN `t`, an `eps` that is not positive, a shape that does not broadcast, or a
            dtype that is not floating point.

    Differentiable in `x`, `t` and `eps`, to any order, except at the jump (for ``t > eps^2``) or kink (else, at
    ``|x_i| = t / eps``), where the derivative is that of the zero branch.

    Example:
        >>> import torch
        >>> prox_log(torch.tensor([3.0, -2.0, 0.5]), 1.0)
        tensor([ 2.7321, -1.6180,  0.0000])

    Source: P. Gong, C. Zhang, Z. Lu, J. Huang, J. Ye, A general iterative shrinkage and thresholding algorithm for
    non-convex regularized optimization problems, 2013, table 1.
    """
    operands = per_element("t", t, at_least=0), per_element("eps", eps, above=0)
    return on_vectors(_log_threshold, x, *operands, dim=dim)


def prox_scad(x: Tensor, t: Number, *, lam: Number = 1.0, a: Number = 3.7, dim: int = -1) -> Tensor:
    """The prox of the smoothly clipped absolute deviation (SCAD).

    Solves ``argmin_z t * sum_i p(z_i) + 1/2 ||z - x||^2`` with ``p(0) = 0`` and ``p'(z) = lam`` for ``0 < z <= lam``,
    ``max(a lam - z, 0) / (a - 1)`` beyond, and ``p(-z) = p(z)``.

    Args:
        x: Any shape.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        lam: Slope at zero, at least 0: a number, or a tensor that broadcasts to the batch.
        a: Where the penalty becomes constant, in units of `lam`; more than ``1 + t``: the same.
        dim: The dimension of one vector.

    Returns:
        The minimiser, shaped like `x`; entries beyond ``a * lam`` stay as they are.

    Raises:
        ValueError: For a negative or NaN `t` or `lam`, ``a <= 1 + t`` (the objective is not convex then), a shape that
            does not broadcast, or a dtype that is not floating point.

    Differentiable in `x`, `t`, `lam` and `a`, to any order. At a kink the derivative is that of the piece nearer to
    zero.

    Example:
        >>> import torch
        >>> prox_scad(torch.tensor([5.0, 3.0, -1.5, 0.5]), 1.0)
        tensor([ 5.0000,  2.5882, -0.5000,  0.0000])

    Source: J. Fan, R. Li, Variable selection via nonconcave penalized likelihood and its oracle properties, 2001,
    equation 2.8, at any step.
    """
    operands = [per_element("t", t, at_least=0), per_element("lam", lam, at_least=0), per_element("a", a)]
    return on_vectors(_scad, x, *operands, dim=dim)


def prox_mcp(x: Tensor, t: Number, *, lam: Number = 1.0, gamma: Number = 3.0, dim: int = -1) -> Tensor:
    """Firm thresholding: the prox of the minimax concave penalty (MCP).

    Solves ``argmin_z t * sum_i p(z_i) + 1/2 ||z - x||^2`` with ``p(0) = 0``, ``p'(z) = max(lam - z / gamma, 0)`` for
    ``z > 0``, and ``p(-z) = p(z)``.

    Args:
        x: Any shape.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        lam: Slope at zero, at least 0: a number, or a tensor that broadcasts to the batch.
        gamma: Where the penalty becomes constant, in units of `lam`; more than `t`: the same.
        dim: The dimension of one vector.

    Returns:
        The minimiser, shaped like `x`; entries beyond ``gamma * lam`` stay as they are.

    Raises:
        ValueError: For a negative or NaN `t` or `lam`, ``gamma <= t`` (the objective is not convex then), a shape that
            does not broadcast, or a dtype that is not floating point.

    Differentiable in `x`, `t`, `lam` and `gamma`, to any order. At a kink the derivative is that of the piece nearer to
    zero.

    Example:
        >>> import torch
        >>> prox_mcp(torch.tensor([5.0, 2.0, -1.5, 0.5]), 1.0)
        tensor([ 5.0000,  1.5000, -0.7500,  0.0000])

    Source: C.-H. Zhang, Nearly unbiased variable selection under minimax concave penalty, 2010, section 2.
    """
    operands = [per_element("t", t, at_least=0), per_element("lam", lam, at_least=0), per_element("gamma", gamma)]
    return on_vectors(_mcp, x, *operands, dim=dim)


def _hard_threshold(x: Tensor, t: Any) -> Tensor:
    if not isinstance(t, Tensor):
        return hardshrink(x, (2 * t) ** 0.5)
    keep = ~(x.detach().abs() <= (2 * t.detach()).sqrt())
    # a zero that depends on t, whose derivative is asked for and zero
    return keep.to(x.dtype) * x + 0 * t.clamp_max(torch.finfo(t.dtype).max)


def _log_threshold(x: Tensor, t: Any, eps: Any) -> Tensor:
    # the larger root of (z - a)(z + eps) + t for a = |x|, if there is one, against zero
    s = x.detach().sign()
    a = s * x
    square = (a + eps).square() - 4 * t
    # one that does not exist is replaced before it is differentiated
    none = (square.detach() <= 0).to(x.dtype)
    root = (square - none * square.detach() + none).sqrt()
    wide = a - eps
    beyond = (wide.detach() >= 0).to(x.dtype)
    half = (root + (2 * beyond - 1) * wide) / 2
    z = beyond * half + (1 - beyond) * ((a * eps - t) / half)  # of two formulas the one that does not cancel
    found, at = z.detach(), a.detach()
    worse = (found <= 0) | (found * (found / 2 - at) + t * torch.log1p(found.clamp_min(0) / eps) >= 0)
    return (s * (1 - none) * (~worse).to(x.dtype)) * z


def _scad(x: Tensor, t: Any, lam: Any, a: Any) -> Tensor:
    check_that(a > 1 + t, lambda: f"a: expected more than 1 + t, got {shown(a)} with t = {shown(t)}")
    steeper = t / (a - 1 - t)
    # slope 0, then 1, then 1 + steeper, then 1: every term has the sign of x, and none is larger than it has to be
    return soften(x, t * lam) + steeper * soften(_inside(x, a * lam), (1 + t) * lam)


def _mcp(x: Tensor, t: Any, lam: Any, gamma: Any) -> Tensor:
    check_that(gamma > t, lambda: f"gamma: expected more than t, got {shown(gamma)} with t = {shown(t)}")
    steeper = t / (gamma - t)
    return soften(x, t * lam) + steeper * soften(_inside(x, gamma * lam), t * lam)


def _inside(x: Tensor, bound: Any) -> Tensor:
    """`x` cut at `bound`; at the bound the derivative is that of the inside, as ``torch.clamp`` has it."""
    return x.clamp(-bound, bound)
