r"""A lower bound on a conic program from multipliers of some of its constraints.

.. math:: \min_x c^T x \quad \text{s.t.} \quad Ax - b \in K, \; Hx - h \in C

Every y in the dual cone of K gives the bound L(y) of :class:`~difflayers.conic.Completion`. L is concave, and its
derivative is that of the Lagrangian at the fixed minimiser (J. M. Danskin, 1967):

.. math:: \bar y = b - Ax, \quad \bar b = y, \quad \bar c = x, \quad \bar A = -y x^T .

M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, NeurIPS 2024, sections 3 and 4.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_finite, check_same, check_shape, check_tensor, compute_dtype
from difflayers._solution import Info, OnFailure, Solution, Status, check_policy
from difflayers.linalg._autodiff import autocast_off, autocasting, physical

from ._completion import Completed, Completion, dot, spoil

MAY_BE_INFINITE = ("lower", "upper", "h")


class DualPoint(NamedTuple):
    """A bound and where it comes from.

    Attributes:
        bound: ``(*batch)`` lower bounds L(y).
        x: ``(*batch, n)`` (matrices for :class:`SpectraplexCompletion`) where the completion's minimum is attained. It
            obeys ``Hx - h in C``, not ``Ax - b in K``.
        z: ``(*batch, ...)`` multipliers of ``Hx - h in C``, as the completion's class lays them out.
    """

    bound: Tensor
    x: Tensor
    z: Tensor


def dual_bound(
    y: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    completion: Completion,
    *,
    w: Tensor | None = None,
    on_failure: OnFailure = "raise",
) -> DualPoint:
    r"""The best lower bound that multipliers `y` give.

    Solves ``b^T y + min_x r^T x s.t. Hx - h in C`` with ``r = c - A^T y``: a lower bound of ``min_x c^T x s.t. Ax - b
    in K, Hx - h in C`` for every `y` in the dual cone of K. (A row ``Wx <= v`` is ``-Wx - (-v) >= 0``: pass ``A = -W,
    b = -v``, and ``y >= 0``.) K is not asked for: `y` is taken as it is; see :class:`DualProxy` for a network that
    projects. Every argument is shared by the batch or has one entry for each of its elements.

    Args:
        y: ``(*batch, m)`` multipliers of ``Ax - b in K``.
        A: ``(*batch, m, n)``; ``(*batch, m, k, k)`` where x is a matrix.
        b: ``(*batch, m)``.
        c: ``(*batch, n)``; ``(*batch, k, k)`` where x is a matrix.
        completion: The block ``Hx - h in C`` that bounds x, or the objective's quadratic part.
        w: ``(*batch, n)`` what :class:`BoxQuadraticCompletion` needs beside `y`; None for all others.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone, and no NaN of theirs in the gradient of what
            all share) or ``"ignore"``. Closed forms never raise: of NaN they make NaN.

    Returns:
        Bound, minimiser and completed multipliers, in the dtype of `y`; a bound of float32 numbers may be wrong by its
        rounding. Minus infinity where the minimum is not bounded from below.

    Raises:
        ValueError: For shapes, dtypes or devices that do not fit, naming the argument.
        SolveError: For elements that a solver could not complete.

    The bound is differentiable in every argument and the data of `completion`: to first order by the envelope theorem,
    without a linear solve; second derivatives are right too, and exactly zero where the block is polyhedral. Where the
    minimiser is not unique the derivative in `y` is the supergradient ``b - A x`` of the x that is returned. `x` and
    `z` have the derivatives of their formulas.

    Example:
        >>> import torch
        >>> from difflayers.conic import BoxCompletion, dual_bound
        >>> y = torch.tensor([0.5], requires_grad=True)  # of x_1 + 2 x_2 >= 1
        >>> A, b, c = torch.tensor([[1.0, 2.0]]), torch.tensor([1.0]), torch.tensor([1.0, 1.5])
        >>> point = dual_bound(y, A, b, c, BoxCompletion(0.0, 1.0))  # the optimum is 0.75
        >>> point.bound
        tensor(0.5000, grad_fn=<AddBackward0>)
        >>> torch.autograd.grad(point.bound, y)
        (tensor([1.]),)

    Source: M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024, sections 3 and 4.
    """
    check_policy(on_failure)
    return _bound(y, A, b, c, completion, w, on_failure)[0]


def dual_bound_ex(
    y: Tensor, A: Tensor, b: Tensor, c: Tensor, completion: Completion, *, w: Tensor | None = None
) -> Solution[DualPoint]:
    """As :func:`dual_bound`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        y: Multipliers.
        A: Rows.
        b: Their right-hand sides.
        c: Costs.
        completion: Completion.
        w: What it needs beside `y`, or None.

    Returns:
        The point with status (``UNBOUNDED`` where the bound is minus infinity), steps and residual of the solver.
    """
    point, info = _bound(y, A, b, c, completion, w, None)
    if info is None:
        bound = point.bound.detach()
        status = torch.where(bound == -math.inf, int(Status.UNBOUNDED), int(Status.CONVERGED))
        status = torch.where(torch.isnan(bound), int(Status.DIVERGED), status)
        info = Info(status, torch.zeros_like(status), torch.zeros_like(bound))
    return Solution(point, *(t.expand(point.bound.shape) for t in info))


def _bound(
    y: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    completion: Completion,
    w: Tensor | None,
    on_failure: OnFailure | None,
) -> tuple[DualPoint, Info | None]:
    batch = _check(y, A, b, c, completion, w)
    dtype, work = y.dtype, compute_dtype(y.dtype)
    data: list[Any] = [t if t is None or dtype == work else t.to(work) for t in (y, A, b, c, w)]
    if dtype != work:
        completion = completion.to(work)
    spoilt = None
    if on_failure == "nan":
        data, spoilt = _without_spoilt(data, (1, 1 + completion.ndim, 1, completion.ndim, 1))
    try:
        if autocasting(y):
            with autocast_off(y):
                bound, x, z, info = _complete(completion, on_failure, *data)
        else:
            bound, x, z, info = _complete(completion, on_failure, *data)
    except ValueError:  # name what the caller passed, not what was made of it
        given = [("y", y), ("A", A), ("b", b), ("c", c), *([] if w is None else [("w", w)])]
        check_finite([(name, physical(t)) for name, t in given])
        check_finite([(name, physical(t)) for name, t in completion.tensors.items() if name not in MAY_BE_INFINITE])
        raise
    if spoilt is not None:
        bound = spoil(bound, spoilt)
        x, z = (
            torch.where(spoilt[(...,) + (None,) * completion.ndim], math.nan, x),
            torch.where(spoilt.unsqueeze(-1), math.nan, z),
        )
    x, z = x.expand(*batch, *x.shape[x.ndim - completion.ndim :]), z.expand(*batch, z.shape[-1])
    return DualPoint(bound.to(dtype), x.to(dtype), z.to(dtype)), info


def _complete(
    completion: Completion, on_failure: OnFailure | None, y: Tensor, A: Tensor, b: Tensor, c: Tensor, w: Tensor | None
) -> Completed:
    """The completion's minimum, with ``b^T y`` added to its value."""
    if completion.ndim == 1:
        r = c - _row_times(y, A)
    else:
        r = c - _row_times(y, A.flatten(-2)).unflatten(-1, c.shape[-2:])
    found = completion._complete(r, w, on_failure)
    return found._replace(value=dot(b, y) + found.value)


def _row_times(y: Tensor, A: Tensor) -> Tensor:
    """``A^T y``, several times faster than the product with the transposed view."""
    return y @ A if A.ndim == 2 else (y.unsqueeze(-2) @ A).squeeze(-2)


def _without_spoilt(data: list[Any], ndims: tuple[int, ...]) -> tuple[list[Any], Tensor]:
    """Zero for numbers that are not finite, and the elements that have any: else 0 * NaN enters shared gradients."""
    pairs = [(t, torch.isfinite(t), ndim) for t, ndim in zip(data, ndims, strict=True) if t is not None]
    sound = [finite.flatten(finite.ndim - ndim).all(-1) for _, finite, ndim in pairs]
    spoilt = ~functools.reduce(torch.logical_and, sound)
    cleaned = iter([torch.where(finite, t, 0) for t, finite, _ in pairs])
    return [None if t is None else next(cleaned) for t in data], spoilt


def _check(y: Tensor, A: Tensor, b: Tensor, c: Tensor, completion: Completion, w: Tensor | None) -> tuple[int, ...]:
    """Refuses what does not fit; returns the batch shape."""
    if not isinstance(completion, Completion):
        raise ValueError(f"completion: expected a Completion, got {type(completion).__name__}")
    k = completion.ndim
    given = [("y", y, 1), ("A", A, 1 + k), ("b", b, 1), ("c", c, k)]
    for name, t, ndim in given:
        check_tensor(name, t, min_ndim=ndim)
    m, event = y.shape[-1], tuple(c.shape[-k:])
    check_shape("A", A.shape[-1 - k :], (m, *event), " in its last dimensions as of y and c")
    check_shape("b", b.shape[-1:], (m,), " in its last dimension as of y")
    count = completion.predicted(event[-1])
    if (w is not None) != bool(count):
        got = "None" if w is None else "a tensor"
        raise ValueError(f"w: expected {'a tensor' if count else 'None'} for {type(completion).__name__}, got {got}")
    if w is not None:
        given.append(("w", check_tensor("w", w, min_ndim=1), 1))
        check_shape("w", w.shape[-1:], (count,), " in its last dimension as of c")
    completion._check(event)
    given += [(name, t, min(t.ndim, completion.event_ndims[name])) for name, t in completion.tensors.items()]
    check_same([(name, t) for name, t, _ in given])
    return tuple(broadcast_batch([(name, tuple(t.shape[: t.ndim - ndim])) for name, t, ndim in given]))
