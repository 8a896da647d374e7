r"""What a dual completion is: the best bound that fixed multipliers leave.

With multipliers y of the rows ``Ax - b in K`` fixed, the block ``Hx - h in C`` is all that bounds x, and

.. math:: L(y) = b^T y + \min_x \{r^T x : Hx - h \in C\}
               = b^T y + \max_{z \in C^*} \{h^T z : H^T z = r\}, \qquad r = c - A^T y .

A completion knows the minimum for its block: value, minimiser x and multipliers z.

When does it exist? Where :math:`X = \{x : Hx - h \in C\}` is bounded and not empty, the minimum is attained for every
r, by compactness; where X also has a strictly feasible point, strong duality holds and z exists too (S. Boyd, L.
Vandenberghe, Convex Optimization, 2004, section 5.3.2). So there is a completion for *every* y; that y lies in the dual
cone K* is what makes L(y) a bound, not what makes it exist. Polyhedral C need no strictly feasible point. Where X is
unbounded, the minimum is minus infinity for some r: still a bound, of no use.

M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, NeurIPS 2024, section 3.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from difflayers._checks import check_tensor
from difflayers._solution import Info, OnFailure
from difflayers.linalg._autodiff import alive, forward_mode, primal, quick_apply
from difflayers.linalg._grads_batched import batched_backward
from difflayers.linalg._system import align
from difflayers.proximal._operands import Number

Self = TypeVar("Self", bound="Completion")


class Completed(NamedTuple):
    """A completed minimum: its value ``(*batch)``, minimiser, multipliers, and a report where a solver was asked."""

    value: Tensor
    x: Tensor
    z: Tensor
    info: Info | None = None


@dataclass(frozen=True, eq=False)
class Completion(ABC):
    """The block of constraints (or the objective's curvature) that bounds x, with its data.

    Fields are numbers or tensors. A tensor is shared by all instances, or has their batch dimensions in front.

    Attributes:
        ndim: Trailing dimensions of x: 1, or 2 for matrices.
        event_ndims: Trailing dimensions of each field that may be a tensor.
        solves: Whether a solver is asked, which may fail.
    """

    ndim: ClassVar[int] = 1
    solves: ClassVar[bool] = False
    event_ndims: ClassVar[Mapping[str, int]] = {}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        fields = {name: getattr(self, name) for name in self.event_ndims}
        return {name: value for name, value in fields.items() if isinstance(value, Tensor)}

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """The same with all tensors moved or cast as ``torch.Tensor.to`` does."""
        return self._with(lambda t, _: t.to(*args, **kwargs))

    def select(self: Self, index: Any) -> Self:
        """The completion of some instances; what all instances share is kept.

        Args:
            index: Of the first batch dimension: integers, a slice, a mask.
        """
        return self._with(lambda t, ndim: t[index] if t.ndim > ndim else t)

    def predicted(self, n: int) -> int:
        """How many numbers a network predicts beside the multipliers, for n variables."""
        return 0

    @abstractmethod
    def _complete(self, r: Tensor, w: Tensor | None, on_failure: OnFailure | None) -> Completed:
        """The minimum for costs `r`; a policy of None stands for a report instead."""

    @abstractmethod
    def _check(self, event: tuple[int, ...]) -> None:
        """Refuses data that do not fit an x of shape `event`."""

    def _with(self: Self, change: Callable[[Tensor, int], Tensor]) -> Self:
        """A copy with changed tensors; they were checked when this one was made."""
        twin = copy.copy(self)
        for name, t in self.tensors.items():
            object.__setattr__(twin, name, change(t, self.event_ndims[name]))
        return twin


def check_number(name: str, value: object) -> None:
    """Refuses what is neither a number nor a floating-point tensor."""
    if isinstance(value, Tensor):
        check_tensor(name, value)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: expected a number or a tensor, got {type(value).__name__}")


def check_matrix(name: str, value: object) -> None:
    """Refuses what is not a stack of matrices."""
    check_tensor(name, value, min_ndim=2)


def check_entries(name: str, value: Number | None, n: int) -> None:
    """Refuses a tensor that does not have one number, or one for each of n entries."""
    if isinstance(value, Tensor) and value.ndim and value.shape[-1] not in (1, n):
        raise ValueError(f"{name}: expected a number or {n} entries as x has, got shape {tuple(value.shape)}")


def beside(number: Number, r: Tensor) -> Tensor:
    """One number, or one for each entry, as a tensor beside `r`."""
    return number if isinstance(number, Tensor) else r.new_full((1,), number)


def column(number: Number, r: Tensor) -> Tensor:
    """One number, or one for each batch element, as ``(*batch, 1)``."""
    return number.unsqueeze(-1) if isinstance(number, Tensor) else r.new_full((1,), number)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over the last dimension."""
    return (a * b).sum(-1)


def least(values: Tensor) -> Tensor:
    """Constant weights of the smallest entries, which share 1 evenly. A NaN makes all of them NaN."""
    values = values.detach()
    lowest = (values == values.amin(-1, keepdim=True)).to(values.dtype)
    return lowest / lowest.sum(-1, keepdim=True)


@quick_apply
class _Spoil(torch.autograd.Function):
    """``value``, NaN where `failed`; the gradient there is NaN too if somebody asks for it, and zero if nobody does."""

    @staticmethod
    def forward(value: Tensor, failed: Tensor) -> Tensor:
        return torch.where(failed, math.nan, value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    @batched_backward
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        failed = alive(ctx.saved_tensors[0])
        return torch.where(failed, torch.where(g == 0, 0, math.nan), g), None

    @staticmethod
    def jvp(ctx: Any, value: Tensor, _: Any) -> Tensor:
        with forward_mode():
            return torch.where(primal(ctx.saved_tensors[0]), math.nan, primal(value))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
        return _Spoil.apply(*align(tensors, in_dims, (0, 0))), 0


def spoil(value: Tensor, failed: Tensor) -> Tensor:
    """NaN for failed elements, ``(*batch)`` both; gradients of others stay free of it, shared ones too."""
    value, failed = torch.broadcast_tensors(value, failed)
    return _Spoil.apply(value, failed)
