r"""Separable losses whose prox is the root of a smooth scalar equation: entropy, Poisson, logistic.

.. math:: z + t\, \phi'(z) = x

Poisson has a closed form. The others take a few Newton steps from a start from which these cannot fail. Derivatives are
those of the equation at the root, written with the root. P. L. Combettes, J.-C. Pesquet, Proximal splitting
methods in signal processing, 2011, table 1; L. M. Briceno-Arias, G. Chierchia, E. Chouzenoux, J.-C. Pesquet, A random
block-coordinate Douglas-Rachford splitting method with low computational complexity for binary logistic regression,
2019.

Symbols: ``w = log z``; ``omega(y)`` the Wright function, root of ``u + log u = y``; ``s`` margin, ``p`` probability.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._entrywise import entrywise
from ._operands import Number, as_tensor, on_vectors, per_element, per_entry

Slope = Callable[[], Tensor]


def prox_entropy(x: Tensor, t: Number, *, dim: int = -1) -> Tensor:
    """The prox of the negative entropy.

    Solves ``argmin_z t * sum_i z_i log(z_i) + 1/2 ||z - x||^2``.

    Args:
        x: Any shape.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        dim: The dimension of one vector.

    Returns:
        The minimiser, shaped like `x`: positive, though it may be too small for the dtype and then is zero; for ``t =
        0`` the projection ``max(x, 0)``.

    Raises:
        ValueError: For a negative or NaN `t`, a shape that does not broadcast, or a dtype that is not floating point.

    Differentiable in `x` and `t`, to any order (at ``t = 0`` and ``x_i = 0`` the derivative is zero).

    Example:
        >>> import torch
        >>> prox_entropy(torch.tensor([3.0, 1.0, -2.0]), 1.0)
        tensor([1.5571, 0.5671, 0.0475])

    Source: P. L. Combettes, J.-C. Pesquet, Proximal splitting methods in signal processing, 2011, table 1.
    """

    def formula(x: Tensor, t: Number) -> Tensor:
        return entrywise(_entropy, _entropy_slopes, x, as_tensor(t, x))

    return on_vectors(formula, x, per_element("t", t, at_least=0), dim=dim)


def prox_poisson(x: Tensor, t: Number, counts: Number, *, dim: int = -1) -> Tensor:
    """The prox of the negative log-likelihood of Poisson counts (of the Kullback-Leibler divergence).

    Solves ``argmin_z t * sum_i (z_i - counts_i log(z_i)) + 1/2 ||z - x||^2`` over ``z >= 0``.

    Args:
        x: Any shape.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        counts: At least 0: a number, or a tensor that broadcasts with `x`.
        dim: The dimension of one vector.

    Returns:
        The minimiser, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `t` or `counts`, a shape that does not broadcast, or a dtype that is not
            floating point.

    Differentiable in `x`, `t` and `counts`, to any order. Where ``t * counts_i = 0`` and ``x_i = t``, a kink, the
    derivative is that of the zero branch.

    Example:
        >>> import torch
        >>> prox_poisson(torch.tensor([3.0, 1.0, -2.0]), 1.0, torch.tensor([3.0, 1.0, 0.0]))
        tensor([3., 1., 0.])

    Source: P. L. Combettes, J.-C. Pesquet, A Douglas-Rachford splitting approach to nonsmooth convex variational signal
    recovery, 2007, section 5.
    """
    operands = per_element("t", t, at_least=0), per_entry("counts", counts, at_least=0)
    return on_vectors(lambda x, t, counts: positive_root(x - t, as_tensor(t * counts, x)), x, *operands, dim=dim)


def prox_logistic(x: Tensor, t: Number, labels: Number, *, dim: int = -1) -> Tensor:
    """The prox of the logistic loss.

    Solves ``argmin_z t * sum_i log(1 + exp(-labels_i z_i)) + 1/2 ||z - x||^2``.

    Args:
        x: Any shape.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        labels: Usually -1 or 1, but any numbers: a number, or a tensor that broadcasts with `x`.
        dim: The dimension of one vector.

    Returns:
        The minimiser, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `t`, a shape that does not broadcast, or a dtype that is not floating point.

    Differentiable in `x`, `t` and `labels`, to any order.

    Example:
        >>> import torch
        >>> prox_logistic(torch.tensor([3.0, 0.0, -2.0]), 1.0, torch.ones(3))
        tensor([ 3.0454,  0.4011, -1.2268])

    Source: L. M. Briceno-Arias, G. Chierchia, E. Chouzenoux, J.-C. Pesquet, A random block-coordinate Douglas-Rachford
    splitting method with low computational complexity for binary logistic regression, 2019.
    """

    def formula(x: Tensor, t: Number, labels: Number) -> Tensor:
        return logistic(x, as_tensor(t, x), as_tensor(labels, x))

    return on_vectors(formula, x, per_element("t", t, at_least=0), per_entry("labels", labels), dim=dim)


# ---------------------------------------------------------------------------------------------------------- Poisson


def positive_root(d: Tensor, c: Tensor) -> Tensor:
    """``(d + sqrt(d^2 + 4 c)) / 2`` for c of at least 0: the larger root of ``z^2 = d z + c``."""
    return entrywise(_positive_root, _positive_root_slopes, d, c)


def _positive_root(d: Tensor, c: Tensor) -> Tensor:
    positive = torch.relu(d)
    # d/2 and the root, of the two signs that do not cancel: the product of both solutions is -c
    larger = torch.addcmul(c, d, d, value=0.25).sqrt_().add_(positive).sub_(d, alpha=0.5)
    return torch.addcdiv(positive, c, larger.clamp_min_(torch.finfo(d.dtype).tiny))


def _positive_root_slopes(z: Tensor, d: Tensor, c: Tensor) -> tuple[Slope, ...]:
    root = torch.lerp(d, z, 2.0)  # 2 z - d
    return lambda: z / _above_zero(root), lambda: root.sign() / _above_zero(root)


# ---------------------------------------------------------------------------------------------------------- entropy


def _entropy(x: Tensor, t: Tensor) -> Tensor:
    """Newton's method for ``w = log z``, so that no exponential overflows."""
    log_t = t.log()
    y = x / t - 1 - log_t
    w = log_omega(y) + log_t
    z = w.exp()
    # one step more, in z or in its logarithm: y has lost the digits that x has behind those of x/t
    z = torch.where(z > t, z * ((x - t * w) / (z + t)), (w - (z + t * (w + 1) - x) / (z + t)).exp())
    return torch.where(torch.isfinite(y), z, x.clamp_min(0))  # no step, or none that could be seen


def _entropy_slopes(z: Tensor, x: Tensor, t: Tensor) -> tuple[Slope, ...]:
    slope = z / _above_zero(z + t)
    return lambda: slope, lambda: -(z.clamp_min(torch.finfo(z.dtype).tiny).log() + 1) * slope


def exponential(x: Tensor, t: Tensor) -> Tensor:
    """The prox of the conjugate of the entropy, ``sum exp(z - 1)``."""
    return entrywise(_exponential, _exponential_slopes, x, t)


def _exponential(x: Tensor, t: Tensor) -> Tensor:
    log_t = t.log()
    z = log_omega(x - 1 + log_t) + (1 - log_t)
    growth = t * (z - 1).exp()
    return z - (z + growth - x) / (1 + growth)


def _exponential_slopes(z: Tensor, x: Tensor, t: Tensor) -> tuple[Slope, ...]:
    e = (z - 1).exp()
    return lambda: 1 / (1 + t * e), lambda: -e / (1 + t * e)


def log_omega(y: Tensor, steps: int = 3) -> Tensor:
    """The logarithm of Wright's function: root ``v`` of ``e^v + v = y``, by Halley's method from above."""
    y = y.clamp(-1e30, 1e30)
    v = torch.minimum(torch.minimum(y, (y - 1) / 2), y.clamp_min(1).log())
    for _ in range(steps):
        e = v.exp()
        newton = (e + v - y) / (1 + e)
        v = v - newton / (1 - newton * (e / (1 + e)) / 2)
    return v


# --------------------------------------------------------------------------------------------------------- logistic


def logistic(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The prox of the logistic loss, entry by entry."""
    return entrywise(_logistic, _logistic_slopes, x, t, labels)


def _logistic(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    # the margin s = labels * z solves s - c sigmoid(-s) = a; by symmetry s >= 0
    a, c = labels * x, t * labels * labels
    flip = a < -c / 2
    a = torch.where(flip, -a - c, a)
    # the equation with exp(-s) for sigmoid(-s) has its root nearby; where that would cancel, so has the one without s
    near = (a + log_omega(c.log() - a, steps=1).exp()).clamp_min(0)
    s = torch.where(a < -10, (c / -a - 1).log().clamp_min(0), near)
    for _ in range(6 if x.dtype == torch.float64 else 4):
        p = torch.sigmoid(-s)
        # concave from 0 on: after the first step Newton comes from the left and stays there
        s = (s - (s - c * p - a) / (1 + c * p * (1 - p))).clamp_min(0)
    s = torch.where(flip, -s, s)
    p = torch.sigmoid(-s)
    # of two formulas the one in which x does not cancel
    return torch.where(c * p * (1 - p) > 1, s / torch.where(labels == 0, 1, labels), x + t * labels * p)


def _logistic_slopes(z: Tensor, x: Tensor, t: Tensor, labels: Tensor) -> tuple[Slope, ...]:
    p = torch.sigmoid(-labels * z)
    bend = p * (1 - p)
    slope = 1 / (1 + t * labels * labels * bend)
    return lambda: slope, lambda: labels * p * slope, lambda: t * (p - labels * z * bend) * slope


# ------------------------------------------------------------------------------------------------------------- both


def _above_zero(a: Tensor) -> Tensor:
    """A denominator of at least 0, whose numerator is 0 where it is."""
    return a.clamp_min(torch.finfo(a.dtype).tiny)
