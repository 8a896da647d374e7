"""Entry-wise functions that know their value and their partial derivatives.

The root of a scalar equation has no formula that autograd could follow, or none that keeps its digits; but its partial
derivatives are short expressions in the root itself. :func:`entrywise` saves its own *output*, so that these
expressions move with it, and differentiating them again gives the derivatives of every order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from difflayers.linalg._autodiff import alive, autocast_off, forward_mode, opaque, plain_forward, primal, quick_apply
from difflayers.linalg._grads_batched import batched_backward
from difflayers.linalg._system import align

Value = Callable[..., Tensor]
Slopes = Callable[..., Sequence[Callable[[], Tensor]]]


@quick_apply
class _Entrywise(torch.autograd.Function):
    """``z = value(*args)`` with ``dz = sum_i slopes(z, *args)[i]() dargs_i``."""

    @staticmethod
    def forward(value: Value, slopes: Slopes, *args: Tensor) -> Tensor:
        with plain_forward(args[0]):
            return value(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.slopes = inputs[1]
        ctx.save_for_backward(output, *inputs[2:])
        ctx.save_for_forward(output, *inputs[2:])

    @staticmethod
    @batched_backward
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, *args = map(alive, ctx.saved_tensors)
        with autocast_off(z):
            pairs = zip(ctx.slopes(z, *args), args, ctx.needs_input_grad[2:], strict=True)
            return (None, None, *((g * slope()).sum_to_size(a.shape) if wanted else None for slope, a, wanted in pairs))

    @staticmethod
    def jvp(ctx: Any, _value: Any, _slopes: Any, *tangents: Tensor | None) -> Tensor:
        with forward_mode(), autocast_off(next(t for t in tangents if t is not None)):
            z, *args = map(primal, ctx.saved_tensors)
            pairs = zip(ctx.slopes(z, *args), tangents, strict=True)
            return sum((slope() * primal(t) for slope, t in pairs if t is not None), start=torch.zeros_like(z))

    @staticmethod
    def vmap(info: Any, in_dims: Any, value: Value, slopes: Slopes, *args: Tensor) -> tuple[Tensor, int]:
        return _Entrywise.apply(value, slopes, *align(args, in_dims[2:], (0,) * len(args))), 0


@opaque
def entrywise(value: Value, slopes: Slopes, *args: Tensor) -> Tensor:
    """A function of numbers, on tensors that broadcast, with derivatives of every order.

    Args:
        value: ``(*args) -> z`` on plain tensors; may loop and branch, records no gradient.
        slopes: ``(z, *args) -> one function for each argument``, which returns the partial derivative of `z` in it:
            differentiable in `z` and `args`, and finite where `z` is.
        *args: Floating-point tensors.

    Returns:
        ``z``, of the shape that the arguments broadcast to.
    """
    return _Entrywise.apply(value, slopes, *args)
