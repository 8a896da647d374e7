r"""The value of an inner problem, :math:`\varphi(\theta) = \min_z f(z, \theta)`, by the envelope theorem.

At a minimiser :math:`\nabla_z f = 0`, so :math:`\nabla\varphi = \partial_\theta f(z^*, \theta)` at fixed :math:`z^*`:
no linear solve. The second derivative does see the minimiser move, and gets that from the map that made it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from difflayers._checks import check_tensor
from difflayers.linalg._autodiff import (
    alive,
    autocast_off,
    forward_mode,
    jvp_where,
    opaque,
    plain_forward,
    primal,
    quick_apply,
    transforms_active,
    vjp_where,
)
from difflayers.linalg._captured import gradients_wanted, refuse_held, refuse_probed, refuse_seen
from difflayers.linalg._grads_batched import batched_backward


@quick_apply
class _Envelope(torch.autograd.Function):
    """``f(value, *args)`` whose cotangent of the value leaves out the first order, where it is zero."""

    @staticmethod
    def forward(objective: Callable[..., Tensor], count: int, look: bool, *tensors: Tensor) -> Tensor:
        with plain_forward(tensors[0]):
            if not look:
                return objective(*tensors)
            with torch.enable_grad(), forward_mode():  # on constants: a result with a gradient captured something
                out = objective(*(t.detach() for t in tensors))
                refuse_seen([out], "objective")
            return out.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.objective, ctx.count, _, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    @batched_backward
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
        tensors = [alive(t) for t in ctx.saved_tensors]
        wanted = [n and t.is_floating_point() for n, t in zip(ctx.needs_input_grad[3:], tensors, strict=True)]
        wanted[: ctx.count] = [False] * ctx.count  # the values: here they only carry the second order
        with autocast_off(g):
            return (None, None, None, *vjp_where(ctx.objective, tensors, wanted, g))

    @staticmethod
    def jvp(ctx: Any, _o: Any, _c: Any, _l: Any, *tangents: Tensor | None) -> Tensor | None:
        with forward_mode(), autocast_off(ctx.saved_tensors[0]):
            tensors = [primal(t) for t in ctx.saved_tensors]
            moving = [None if i < ctx.count else primal(t) for i, t in enumerate(tangents)]
            out = jvp_where(ctx.objective, tensors, moving)
            return torch.zeros_like(ctx.objective(*tensors)) if out is None else out

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, objective: Callable[..., Tensor], count: int, look: bool, *tensors: Tensor
    ) -> Any:
        moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims[3:], strict=True)]
        dims = tuple(None if d is None else 0 for d in in_dims[3:])
        return _Envelope.apply(vmap(objective, in_dims=dims), count, look, *moved), 0


@opaque
def envelope(objective: Callable[..., Tensor], value: Any, args: Sequence[Any]) -> Tensor:
    r"""The optimal value :math:`f(z^*(\theta), \theta)` with the envelope gradient, right to second order.

    Args:
        objective: ``fn(value, *args)``: any tensor, often one number per batch element. Stationary in `value`.
        value: Minimiser (or maximiser) as returned by a layer, with its graph: a tensor or a pytree.
        args: Tuple of the tensors or pytrees the layer was solved for.

    Returns:
        The objective at the minimiser.

    Raises:
        ValueError: For a value or argument that is not a tensor, or an objective that captures a differentiated tensor.

    Differentiable in `args`: first order without a linear solve; second order through the layer that made `value`.
    Wrong, without a possible check, where `value` is not stationary: differentiate the objective itself there.

    Example:
        >>> import torch
        >>> from difflayers.implicit import argmin, envelope
        >>> def energy(z, a):
        ...     return (z - a).square().sum(-1) / 2 + z.square().sum(-1) / 2
        >>> a = torch.tensor([2.0, 4.0], dtype=torch.float64, requires_grad=True)
        >>> phi = envelope(energy, argmin(energy, torch.zeros(2, dtype=torch.float64), (a,)), (a,))
        >>> torch.autograd.grad(phi, a)  # phi = ||a||^2 / 4
        (tensor([1., 2.], dtype=torch.float64),)

    Source: J. M. Danskin, The theory of max-min, 1967; P. Milgrom, I. Segal, Envelope theorems for arbitrary choice
    sets, 2002.
    """
    values, value_spec = optree.tree_flatten(value)
    tree: Any = tuple(args)
    leaves, spec = optree.tree_flatten(tree)
    for i, t in enumerate(values):
        check_tensor("value" if value_spec.is_leaf() else f"value leaf {i}", t)
    for i, t in enumerate(leaves):
        if not isinstance(t, Tensor):
            raise ValueError(f"args leaf {i}: expected a tensor, got {type(t).__name__}")
    look, count = gradients_wanted(), len(values)
    if look:
        refuse_held(objective, "objective")

    def flat(*tensors: Tensor) -> Tensor:
        return objective(value_spec.unflatten(tensors[:count]), *spec.unflatten(tensors[count:]))

    if look and transforms_active():
        refuse_probed(flat, (*values, *leaves), "objective")
    return _Envelope.apply(flat, count, look, *values, *leaves)
