"""Identify, then write the closed form: how a piecewise smooth operator gets derivatives of every order.

A projection on the simplex subtracts the same number from the entries that stay positive. *Which* entries these are
takes an algorithm that may sort, loop and branch on data, and carries no derivative. *Given* them, the result is a
formula in plain torch, whose derivatives of all orders, in both modes, are those of the operator: the active set does
not move with the input, except at kinks, where it decides which one-sided derivative is meant.

:func:`identify` runs the first half on plain tensors, also inside ``torch.func`` transforms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from difflayers.linalg._autodiff import opaque, plain_forward, quick_apply
from difflayers.linalg._system import align

Find = Callable[..., tuple[Tensor, ...]]


@quick_apply
class _Identify(torch.autograd.Function):
    """``find(*tensors)`` on plain tensors; nothing that comes out is differentiable."""

    @staticmethod
    def forward(
        find: Find, ndims: tuple[int, ...], found_ndims: tuple[int, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        with plain_forward(tensors[0]):
            found = find(*tensors)
        batch = torch.broadcast_shapes(*(t.shape[: t.ndim - k] for t, k in zip(tensors, ndims, strict=True)))
        return tuple(
            f.expand(*batch, *f.shape[f.ndim - k :]).clone() if f.shape[: f.ndim - k] != batch else f
            for f, k in zip(found, found_ndims, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.found = len(output)
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[None, ...]:
        return (None,) * ctx.found

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, find: Find, ndims: tuple[int, ...], found_ndims: tuple[int, ...], *tensors: Tensor
    ) -> Any:
        found = _Identify.apply(find, ndims, found_ndims, *align(tensors, in_dims[3:], ndims))
        return found, (0,) * len(found)


@opaque
def identify(find: Find, *tensors: Tensor, ndims: tuple[int, ...], found_ndims: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Constants that an algorithm finds: an active set, a partition, a starting point.

    Args:
        find: ``(*tensors) -> tuple of tensors``, on plain tensors without gradient, batch dimensions broadcast; each
            batch element alone.
        *tensors: Its arguments.
        ndims: Trailing dimensions of each argument that belong to one element.
        found_ndims: The same for each result.

    Returns:
        What `find` returns, expanded to the common batch shape, not differentiable.
    """
    return _Identify.apply(find, ndims, found_ndims, *tensors)
