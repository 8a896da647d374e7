r"""The prox of a convex conjugate.

.. math:: \operatorname{prox}_{t g^*}(x) = x - t\, \operatorname{prox}_{g/t}(x/t)

J.-J. Moreau, Proximité et dualité dans un espace hilbertien, 1965. The two terms cancel where the result is small
beside `x`, which the identity does not show: so most operators of the library stand here with the formula that the
identity comes to. It is a projection for a norm; for a smooth `g` it is the gradient of `g` at the inner minimiser.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from difflayers._checks import check_tensor, compute_dtype
from difflayers.linalg._system import times

from ._nonconvex import prox_l0, prox_log, prox_mcp, prox_scad
from ._norms import norm, prox_group_l2, prox_l2, prox_linf, scale_groups, shortening
from ._operands import Number, as_tensor, check_range, on_vectors, per_element, per_entry
from ._pieces import clip, soften
from ._quadratic import minimise_quadratic, prox_quadratic, quadratic_arguments, quadratic_operands
from ._scalar_roots import (
    exponential,
    logistic,
    positive_root,
    prox_entropy,
    prox_logistic,
    prox_poisson,
)
from ._simplex import onto_l1_ball
from ._soft_threshold import prox_elastic_net, prox_hinge, prox_huber, prox_l1, prox_nonnegative_l1, prox_squared_l2

NONCONVEX: tuple[Callable[..., Tensor], ...] = (prox_l0, prox_log, prox_mcp, prox_scad)


def conjugate_prox(prox: Callable[..., Tensor], x: Tensor, t: Number, **kwargs: Any) -> Tensor:
    """The prox of the convex conjugate of a function whose own prox is known: Moreau's identity.

    Solves ``argmin_z t * g*(z) + 1/2 ||z - x||^2`` where `prox` solves it for ``g``, and ``g*(z) = sup_y <y, z> -
    g(y)``.

    Args:
        prox: A prox of a convex function: one of this package, or any ``prox(x, t, **kwargs)``.
        x: Any shape that `prox` takes.
        t: Step, more than 0: a number, or a tensor that broadcasts to the batch of `x`; for a `prox` from elsewhere,
            without `dim`, one of all dimensions of the batch of vectors.
        **kwargs: Further arguments of `prox`, by name; also its `dim`.

    Returns:
        The minimiser, shaped like `x`. For the penalties of single entries, norms of vectors and quadratics of this
        package it is computed without cancellation, at any scale of `x` and `t`; for others by the identity, with an
        error relative to `x`.

    Raises:
        ValueError: For a `t` that is not positive, a `prox` of this package whose function is not convex (``prox_l0``,
            ``prox_log``, ``prox_mcp``, ``prox_scad``), and whatever `prox` refuses.

    Differentiable in whatever `prox` is, to any order, with the same branches at kinks.

    Example:
        >>> import torch
        >>> from difflayers.proximal import prox_l1
        >>> conjugate_prox(prox_l1, torch.tensor([3.0, -2.0, 0.5]), 1.0)
        tensor([ 1.0000, -1.0000,  0.5000])

    Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 2.5.
    """
    if isinstance(prox, functools.partial) and not prox.args:
        return conjugate_prox(prox.func, x, t, **{**prox.keywords, **kwargs})
    if prox in NONCONVEX:
        raise ValueError(f"prox: expected the prox of a convex function, got {prox.__name__}, whose is not")
    if getattr(prox, "__module__", "").startswith(__package__) and prox.__name__.startswith("project_"):
        raise ValueError(
            f"prox: expected a function prox(x, t), got {prox.__name__}; for the indicator of a set, whose "
            "conjugate is its support function, the answer is x - t * projection(x / t)"
        )
    check_range(per_element("t", t, above=0))
    formula = _FORMULAS.get(prox)
    return _by_identity(prox, x, t, kwargs) if formula is None else formula(x, t, **kwargs)


def _by_identity(prox: Callable[..., Tensor], x: Tensor, t: Number, kwargs: dict[str, Any]) -> Tensor:
    check_tensor("x", x)
    dtype = x.dtype
    x = x.to(compute_dtype(dtype))
    step = t
    if isinstance(t, Tensor):
        step = t = t.to(x.dtype) if compute_dtype(t.dtype) == x.dtype else t
        if t.ndim:
            step = _step_of_entries(prox, x, t, kwargs.get("dim"))
    return (x - step * prox(x / step, 1 / t, **kwargs)).to(dtype)


def _step_of_entries(prox: Callable[..., Tensor], x: Tensor, t: Tensor, dim: int | None) -> Tensor:
    """One number for each element, so that it broadcasts with `x`: elements are vectors along `dim`, or matrices."""
    own = getattr(prox, "__module__", "").startswith("difflayers.")
    if own and "dim" not in inspect.signature(prox).parameters:
        return t[..., None, None]
    if not own and dim is None and t.ndim != x.ndim - 1:
        raise ValueError(
            f"t: expected a number, or {x.ndim - 1} dimensions beside an x of {x.ndim}, as prox may be one of vectors "
            f"or of matrices, got shape {tuple(t.shape)}"
        )
    dim = -1 if dim is None else dim
    dim = dim - x.ndim if dim >= 0 else dim
    return t.unsqueeze(dim) if t.ndim >= -dim - 1 else t


def _idle(z: Tensor, t: Number) -> Tensor:
    """A result that does not move with the step, whose derivative can be asked for all the same."""
    return z + 0 * t.clamp_max(torch.finfo(t.dtype).max) if isinstance(t, Tensor) else z


def _l1(x: Tensor, t: Number, *, weights: Number = 1.0, dim: int = -1) -> Tensor:
    operands = per_element("t", t, above=0), per_entry("weights", weights, at_least=0)
    return on_vectors(lambda x, t, w: _idle(clip(x, -w, w), t), x, *operands, dim=dim)


def _nonnegative_l1(x: Tensor, t: Number, *, dim: int = -1) -> Tensor:
    return on_vectors(lambda x, t: _idle(clip(x, -math.inf, 1.0), t), x, per_element("t", t, above=0), dim=dim)


def _elastic_net(x: Tensor, t: Number, *, l1: Number = 1.0, l2: Number = 1.0, dim: int = -1) -> Tensor:
    operands = per_element("t", t, above=0), per_element("l1", l1, at_least=0), per_element("l2", l2, at_least=0)
    return on_vectors(lambda x, t, a, b: clip(x, -a, a) + soften(x, a) * (b / (b + t)), x, *operands, dim=dim)


def _huber(x: Tensor, t: Number, *, delta: Number = 1.0, dim: int = -1) -> Tensor:
    operands = per_element("t", t, above=0), per_element("delta", delta, above=0)
    return on_vectors(lambda x, t, d: clip(x / (1 + t * d), -1.0, 1.0), x, *operands, dim=dim)


def _hinge(x: Tensor, t: Number, labels: Number, *, dim: int = -1) -> Tensor:
    def formula(x: Tensor, t: Any, labels: Any) -> Tensor:
        y = as_tensor(labels, x)
        return clip(x - t / torch.where(y == 0, 1, y), -torch.relu(y), torch.relu(-y))

    return on_vectors(formula, x, per_element("t", t, above=0), per_entry("labels", labels), dim=dim)


def _l2(x: Tensor, t: Number, *, dim: int = -1) -> Tensor:
    operand = per_element("t", t, above=0)
    return on_vectors(lambda x, t: _idle(x * shortening(norm(x), 1.0), t), x, operand, dim=dim)


def _linf(x: Tensor, t: Number, *, dim: int = -1) -> Tensor:
    return on_vectors(lambda x, t: _idle(onto_l1_ball(x, 1.0), t), x, per_element("t", t, above=0), dim=dim)


def _group_l2(x: Tensor, t: Number, groups: int | Tensor, *, weights: Number | None = None, dim: int = -1) -> Tensor:
    # a norm: no power of t is left in the radius
    free = (t * 0 + 1) if isinstance(t, Tensor) else 1.0
    return scale_groups(shortening, x, per_element("t", free), groups, weights, dim)


def _squared_l2(x: Tensor, t: Number, *, dim: int = -1) -> Tensor:
    return on_vectors(lambda x, t: x / (1 + t), x, per_element("t", t, above=0), dim=dim)


def _entropy(x: Tensor, t: Number, *, dim: int = -1) -> Tensor:
    return on_vectors(lambda x, t: exponential(x, as_tensor(t, x)), x, per_element("t", t, above=0), dim=dim)


def _poisson(x: Tensor, t: Number, counts: Number, *, dim: int = -1) -> Tensor:
    operands = per_element("t", t, above=0), per_entry("counts", counts, at_least=0)

    def formula(x: Tensor, t: Any, counts: Any) -> Tensor:
        c = as_tensor(t * counts, x)
        z = positive_root(1 - x, c)
        # of two formulas the one that does not cancel
        near = x < 0.5
        return torch.where(near, x - c / torch.where(near, z, 1), 1 - z)

    return on_vectors(formula, x, *operands, dim=dim)


def _logistic(x: Tensor, t: Number, labels: Number, *, dim: int = -1) -> Tensor:
    def formula(x: Tensor, t: Any, labels: Any) -> Tensor:
        labels = as_tensor(labels, x)
        return -labels * torch.sigmoid(-labels * logistic(x / t, as_tensor(1 / t, x), labels))

    return on_vectors(formula, x, per_element("t", t, above=0), per_entry("labels", labels), dim=dim)


def _quadratic(
    x: Tensor, t: Number, Q: Tensor, q: Tensor | None = None, *, dim: int = -1, on_failure: Any = "raise"
) -> Tensor:
    def formula(x: Tensor, t: Any, Q: Tensor, q: Any) -> Tensor:
        z = minimise_quadratic(quadratic_arguments(x / t, 1 / t, Q, q), on_failure)
        p = (times(Q, z) + times(Q.mT, z)) / 2
        return p if q is None else p + q

    return on_vectors(formula, x, *quadratic_operands(Q, q, t), dim=dim)


_FORMULAS: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    prox_elastic_net: _elastic_net,
    prox_entropy: _entropy,
    prox_group_l2: _group_l2,
    prox_hinge: _hinge,
    prox_huber: _huber,
    prox_l1: _l1,
    prox_l2: _l2,
    prox_linf: _linf,
    prox_logistic: _logistic,
    prox_nonnegative_l1: _nonnegative_l1,
    prox_poisson: _poisson,
    prox_quadratic: _quadratic,
    prox_squared_l2: _squared_l2,
}
