"""A safeguarded search for the root of a scalar equation, one equation an element, on plain tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from difflayers._solution import Info

Terms = tuple[Tensor, Tensor, Tensor, Tensor]
Equation = Callable[[Tensor], Terms]

MAX_STEPS = 200


def find_root(equation: Equation, low: Tensor, high: Tensor, start: Tensor) -> Tensor:
    """Newton's method inside a bracket, with bisection where it leaves the bracket or does not halve its step.

    Args:
        equation: ``x -> (value, step, other, size)``: a number that is negative left of the root and positive right of
            it, what Newton's method adds to `x` (NaN or Inf where it does not know), another such step, cut at the
            bracket, if that one is refused, and the size of the terms of the number, which bounds its rounding.
        low: Left end of the bracket.
        high: Right end.
        start: A point between.

    Returns:
        The root to rounding (relative for numbers above 1), NaN where `equation` is NaN. An element that has stopped
        keeps its value.
    """
    x, width = start, high - low
    eps = torch.finfo(x.dtype).eps
    done = torch.zeros_like(x, dtype=torch.bool)
    for _ in range(MAX_STEPS):
        value, step, other, size = equation(x)
        value = torch.where(value.abs() <= 2 * eps * size, 0, value)
        low, high = torch.where(value <= 0, x, low), torch.where(value >= 0, x, high)
        new = low + (high - low) / 2
        # the other step may end at the bracket, where the root often is, but has to lead away from x
        cut = torch.minimum(torch.maximum(x + other, low), high)
        for target, allowed in ((cut, cut != x), (x + step, (x + step >= low) & (x + step <= high))):
            new = torch.where(allowed & ((target - x).abs() <= width / 2), target, new)
        new = torch.where(torch.isnan(value), value, new)
        width = (new - x).abs()
        moves = width > 2 * eps * (1 + x.abs())  # false for NaN
        x = torch.where(done, x, new)
        done = done | ~moves
        if bool(done.all()):  # the one read-back of a step; seldom more than ten
            break
    return x


def widen(equation: Equation, start: Tensor) -> tuple[Tensor, Tensor]:
    """A bracket of the root around `start`: each end moves away, twice as far each time, until its sign is right."""
    low, high, reach = start - 1, start + 1, 1.0
    for _ in range(60):
        above, below = equation(low)[0] > 0, equation(high)[0] < 0
        if not bool((above | below).any()):
            break
        reach *= 2
        low, high = torch.where(above, low - reach, low), torch.where(below, high + reach, high)
    return low, high


def log_step(p: Tensor, q: Tensor, dp: Tensor, dq: Tensor, dm: Tensor, size: Tensor) -> Terms:
    """The equation ``p = q``, both sides divided by a common factor ``exp(m)``; a step of Newton on one of two forms.

    Exponentials on both sides make the logarithms almost linear; where one side vanishes the difference is.

    Args:
        p: Left side.
        q: Right side.
        dp: Its slope, as if m were a constant.
        dq: The same.
        dm: The slope of m.
        size: The size of all terms.
    """
    value, slope = p - q, dp - dq
    return value, (q.log() - p.log()) / (dp / p - dq / q), -value / (slope - dm * value), size


# ----------------------------------------------------------------------------- what the engine asks of such an equation


def certain(value: Tensor) -> Info:
    """A report of a search that cannot fail: its bracket is known."""
    zero = torch.zeros((), dtype=torch.int64, device=value.device)
    return Info(zero.expand(value.shape), zero.expand(value.shape), value.new_zeros(()).expand(value.shape))


def divide(
    value: Tensor, args: tuple[Tensor, ...], factors: tuple[Tensor, ...], rhs: Tensor, transpose: bool
) -> tuple[Tensor, Info]:
    """The linear system of a scalar equation, whose slope is its only factor."""
    x = rhs / factors[0]
    return x, certain(x)
