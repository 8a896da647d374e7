"""torch's older vmap, used by ``torch.autograd.grad(..., is_grads_batched=True)``, knows no vmap rules of Functions.

Its batched tensors reach ``Function.forward`` as they are, where nothing may depend on data. These helpers take one
level of that batching off, so that a forward always works on plain tensors, and put it back on the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def is_grads_batched(tensors: Sequence[Tensor]) -> bool:
    """Whether any tensor is batched by ``is_grads_batched=True`` (or vectorised autograd.functional)."""
    return any(_is_batched(t) for t in tensors)


def strip(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int | None], int, Callable[[Tensor], Tensor]]:
    """Takes the innermost level off: tensors, the dimension it became (or None), its size, and the way back."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    while True:
        # a tensor without this level is expanded to the given size instead, so size 0 tells the two apart
        peeled = [torch._remove_batch_dim(t, level, 0, 0) if _is_batched(t) else None for t in tensors]
        present = [p is not None and p.shape[0] != 0 for p in peeled]
        if any(present) or level <= 1:
            break
        level -= 1
    out = [p if here else t for p, t, here in zip(peeled, tensors, present, strict=True)]
    size = next(p.shape[0] for p, here in zip(peeled, present, strict=True) if here and p is not None)
    return out, [0 if here else None for here in present], size, lambda t: torch._add_batch_dim(t, 0, level)  # type: ignore[return-value]
