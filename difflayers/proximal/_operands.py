"""The front door of every operator: what may be passed in, and where its dimensions go.

An operator is a formula on the last dimension (or the last two), written for any batch shape. Around it stand the same
checks, the move of `dim`, and the lift of half precision:

    def prox_l1(x, t, *, weights=None, dim=-1):
        return on_vectors(_shrink, x, per_element("t", t, at_least=0), per_entry("weights", weights), dim=dim)

where ``_shrink(x, t, weights)`` gets `t` as a number or ``(*batch, 1)`` and `weights` shaped to broadcast with `x`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difflayers._checks import check_tensor, compute_dtype, fits
from difflayers.linalg._autodiff import autocast_off, autocasting, physical

Number = float | Tensor


class Operand(NamedTuple):
    """A parameter of an operator.

    Attributes:
        name: As in the signature.
        value: A number, a tensor, or None where it was left out.
        ndim: Trailing dimensions that belong to one element, aligned with those of `x`; 0: one number an element.
        at_least: Smallest value allowed.
        above: The value must be larger than this.
        event: The trailing shape, where it is not that of `x`: a matrix, one number a group.
        optional: Whether it may be left out.
    """

    name: str
    value: Number | None
    ndim: int
    at_least: float = -math.inf
    above: float = -math.inf
    event: tuple[int, ...] | None = None
    optional: bool = False


def per_element(name: str, value: Number | None, *, at_least: float = -math.inf, above: float = -math.inf) -> Operand:
    """One number for the whole batch or for each of its elements: a step size, a radius."""
    return Operand(name, value, 0, at_least, above)


def per_entry(name: str, value: Number | None, *, at_least: float = -math.inf, above: float = -math.inf) -> Operand:
    """One number for all entries, or a tensor that broadcasts with `x`: weights, labels, bounds."""
    return Operand(name, value, 1, at_least, above)


def per_event(
    name: str, value: Number | None, event: tuple[int, ...], *, at_least: float = -math.inf, above: float = -math.inf
) -> Operand:
    """Numbers of shape `event` for the whole batch or for each of its elements: a matrix, weights of groups."""
    return Operand(name, value, len(event), at_least, above, event)


def optional(operand: Operand) -> Operand:
    """The same, which may be left out."""
    return operand._replace(optional=True)


def on_vectors(formula: Callable[..., Tensor], x: Tensor, *operands: Operand, dim: int = -1) -> Tensor:
    """``formula(x, *operands)`` along `dim`, which the formula sees as the last dimension."""
    check_tensor("x", x, min_ndim=1)
    if not isinstance(dim, int) or not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim: expected a dimension of x, which has {x.ndim}, got {dim}")
    dim = dim % x.ndim - x.ndim  # counted from the end: operands may have fewer dimensions
    return _on_events(formula, x, operands, dim, 1)


def on_matrices(formula: Callable[..., Tensor], x: Tensor, *operands: Operand) -> Tensor:
    """``formula(x, *operands)`` on the last two dimensions."""
    check_tensor("x", x, min_ndim=2)
    return _on_events(formula, x, operands, -1, 2)


def _on_events(formula: Callable[..., Tensor], x: Tensor, operands: tuple[Operand, ...], dim: int, ndim: int) -> Tensor:
    dtype = compute_dtype(x.dtype)
    lifted = x if dtype == x.dtype else x.to(dtype)
    if dim != -1:
        lifted = lifted.movedim(dim, -1)
    values = [_prepare(operand, x, lifted, dim, ndim) for operand in operands]
    if autocasting(x):
        with autocast_off(x):
            z = formula(lifted, *values)
    else:
        z = formula(lifted, *values)
    if dim != -1:
        z = z.movedim(-1, dim)
    return z if z.dtype == x.dtype else z.to(x.dtype)


def _prepare(operand: Operand, x: Tensor, lifted: Tensor, dim: int, ndim: int) -> Any:
    """The operand as the formula wants it: a number, None, or a tensor that broadcasts with the moved `x`."""
    name, value, own_ndim, event = operand.name, operand.value, operand.ndim, operand.event
    if value is None:
        if not operand.optional:
            raise ValueError(f"{name}: expected a number or a tensor, got None")
        return None
    check_range(operand)
    if not isinstance(value, Tensor):
        return float(value)
    check_tensor(name, value)
    if value.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} as of x, got {value.device}")
    # half precision is lifted by the formula's own dtype, so a float32 step beside a half x is fine
    if compute_dtype(value.dtype) != lifted.dtype:
        raise ValueError(f"{name}: expected dtype {x.dtype} as of x, got {value.dtype}")
    value = value.to(lifted.dtype)
    batch = lifted.shape[: lifted.ndim - ndim]
    if own_ndim == 0:
        if not fits(value.shape, batch):
            raise ValueError(
                f"{name}: expected a number or a shape that broadcasts to the batch {tuple(batch)} of x, "
                f"got {tuple(value.shape)}"
            )
        return value[(...,) + (None,) * ndim]
    if event is not None:
        if tuple(value.shape[-own_ndim:]) != event or not fits(value.shape[:-own_ndim], batch):
            raise ValueError(
                f"{name}: expected shape {event}, or the same behind dimensions that broadcast to the batch "
                f"{tuple(batch)} of x, got {tuple(value.shape)}"
            )
        return value
    if not fits(value.shape, x.shape):
        raise ValueError(
            f"{name}: expected a number or a shape that broadcasts to {tuple(x.shape)} as of x, "
            f"got {tuple(value.shape)}"
        )
    if dim != -1 and value.ndim >= -dim:
        return value.movedim(dim, -1)
    return value.unsqueeze(-1) if dim != -1 and value.ndim else value


def check_range(operand: Operand) -> None:
    """Refuses numbers outside the range, NaN too. Of a tensor this reads one flag (never in a compiled graph)."""
    name, value, at_least, above = operand.name, operand.value, operand.at_least, operand.above
    if value is None:
        return
    # a tuple of types: Dynamo of torch 2.6 breaks the graph at a union
    if not isinstance(value, Tensor) and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
    if at_least == above == -math.inf:
        return
    expected = f"at least {at_least:g}" if at_least > -math.inf else f"more than {above:g}"
    if not isinstance(value, Tensor):
        if not (value >= at_least and (above == -math.inf or value > above)):
            raise ValueError(f"{name}: expected {expected}, got {value}")
        return
    if torch.compiler.is_compiling() or value.is_meta or not value.is_floating_point():
        return
    plain = physical(value)
    right = lambda v: (v >= at_least) & (v > above)  # noqa: E731  false for NaN
    if plain.numel() and not bool(right(plain.amin())):  # which is NaN, if there is one
        wrong = ~right(plain)
        worst = plain[wrong].flatten()[0].item()
        expected = f"finite numbers, {expected}" if math.isnan(worst) else expected
        raise ValueError(f"{name}: expected {expected}, got {worst:g} in {int(wrong.sum())} of {wrong.numel()} entries")


def check_that(right: bool | Tensor, message: Callable[[], str]) -> None:
    """Refuses a combination of operands. Of a tensor this reads one flag (never in a compiled graph)."""
    if isinstance(right, Tensor):
        if torch.compiler.is_compiling() or right.is_meta:
            return
        right = bool(physical(right).all())
    if not right:
        raise ValueError(message())


def as_tensor(number: Number, x: Tensor) -> Tensor:
    """A number as a tensor of no dimensions beside `x`."""
    return number if isinstance(number, Tensor) else x.new_full((), number)


def as_column(number: Number, x: Tensor) -> Tensor:
    """A number for each element as ``(*batch, 1)`` or ``(1,)``."""
    return number if isinstance(number, Tensor) else x.new_full((1,), number)


def shown(number: Number) -> str:
    """A number, or the range of a tensor, for messages."""
    if not isinstance(number, Tensor):
        return f"{number:g}"
    plain = physical(number)
    low, high = float(plain.min()), float(plain.max())
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
