"""A map given by the user, a function or a module, as a function of its input and the tensors it depends on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from difflayers._checks import compute_dtype
from difflayers.implicit._fixed_point_module import _lock, _own_tensors

from ._over_batches import with_rank


class UserMap:
    """A user's map, with the tensors of a module as arguments."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor], batch_ndim: int) -> None:
        if not callable(function):
            raise ValueError(f"{name}: expected a callable, got {type(function).__name__}")
        own: dict[str, Tensor] = {}
        if isinstance(function, nn.Module):
            own = _own_tensors(function, "_parameters") | _own_tensors(function, "_buffers")
        self.name, self.function, self.batch_ndim = name, function, batch_ndim
        self.keys = tuple(key for key, t in own.items() if t.is_floating_point())
        self.names = tuple(f"{name}.{key}" for key in self.keys)
        self.tensors = tuple(own[key].to(compute_dtype(own[key].dtype)) for key in self.keys)
        self.ndims = tuple(t.ndim for t in self.tensors)

    def alone(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """One call, at the rank the caller works with."""
        if not self.keys:
            return self.function(x)
        assert isinstance(self.function, nn.Module)
        with _lock(self.function):
            replaced = dict(zip(self.keys, tensors, strict=True))
            return functional_call(self.function, replaced, (x,), tie_weights=False)

    def __call__(self, x: Tensor, tensors: Sequence[Tensor], event_ndim: int) -> Tensor:
        """The map, vmapped over batch dimensions that transforms have put in front."""
        return with_rank(self.alone, x, tensors, self.ndims, self.batch_ndim, event_ndim)


class WithPrior(nn.Module):
    """A learned prox together with the prior at its result."""

    def __init__(self, prox: Any) -> None:
        super().__init__()
        self.prox = prox

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.prox.forward_and_prior(x)
