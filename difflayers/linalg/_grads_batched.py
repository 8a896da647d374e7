"""torch's older vmap, behind ``torch.autograd.grad(..., is_grads_batched=True)``, knows few operators and no Functions.

It hands a backward rule batched cotangents of its own kind. :func:`batched_backward` runs the rule under
``torch.func.vmap`` instead, which knows all operators and our vmap rules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._autodiff import opaque

_is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def batched_backward(rule: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A backward rule ``(ctx, g, *ignored)`` that also takes cotangents batched by ``is_grads_batched=True``."""

    @opaque  # of a step that is compiled with its `backward()`, Dynamo would follow the rules, and fail
    @functools.wraps(rule)
    def backward(ctx: Any, g: Tensor | None, *ignored: Any) -> tuple[Any, ...]:
        if g is None:  # nobody depends on the output (with gradients not materialised)
            return (None,) * len(ctx.needs_input_grad)
        if not _is_batched(g):
            return rule(ctx, g, *ignored)
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        while True:
            # a tensor without this level is expanded to the given size 0 instead, which tells the two apart
            plain = torch._remove_batch_dim(g, level, 0, 0)
            if plain.shape[0] != 0 or level <= 1:
                break
            level -= 1
        places: list[int] = []

        def present(g: Tensor) -> tuple[Tensor, ...]:
            out = backward(ctx, g, *ignored)
            places[:] = [i for i, t in enumerate(out) if t is not None]
            places.append(len(out))
            return tuple(t for t in out if t is not None)

        cotangents = torch.func.vmap(present)(plain)
        full: list[Any] = [None] * places.pop()
        for i, t in zip(places, cotangents, strict=True):
            full[i] = torch._add_batch_dim(t, 0, level)
        return tuple(full)

    return backward
