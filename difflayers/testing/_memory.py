"""What a forward pass keeps for its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class _Saved:
    """A tensor in a graph; it dies with the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(run: Callable[[], T]) -> tuple[T, int]:
    """Calls a function and counts the memory that autograd keeps for the backward pass of what it returns.

    Distinct storages of saved tensors, parameters and inputs among them; what the function used on its way and dropped
    is not counted, nor is the result itself unless the graph holds it too.

    Args:
        run: ``run() -> result``.

    Returns:
        The result, and the bytes.

    Example:
        >>> import torch
        >>> from difflayers.testing import saved_bytes
        >>> x = torch.ones(100, requires_grad=True)
        >>> saved_bytes(lambda: x.exp())[1], saved_bytes(lambda: x.exp().exp())[1]
        (400, 800)
    """
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = run()
    storages = [saved.tensor.untyped_storage() for saved in alive]
    return result, sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
