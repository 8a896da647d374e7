"""Processes of a group: crossings between what all of them hold alike and what each holds alone, with derivatives.

A crossing is linear, and its derivative is the transposed crossing, so that derivatives of every order are right, as
long as all processes cross equally often, in the same order. Two pairs, which differ by what a process means by the
cotangent of its own value:

- *copy* and *sum*: the total is the sum of what the processes have.
- *local* and *mean*: the total is their mean, as under DistributedDataParallel; *equal* goes back from *local* without
  a message, where all processes are known to hold the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from difflayers.linalg._autodiff import forward_mode, outside_transforms, physical, primal, quick_apply
from difflayers.linalg._captured import _differentiated
from difflayers.linalg._grads_batched import batched_backward

T = TypeVar("T")
_TRANSPOSED = {"copy": "sum", "sum": "copy", "local": "mean", "mean": "local", "equal": "local"}
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_ODD = 0x2545F4914F6CDD1D
_WHO = "other processes of the group"
_NUMBERS = 5  # in every message of an agreement


@quick_apply
class Crossing(torch.autograd.Function):
    """``(step, group, x, known) -> y``, with the transposed step as its derivative; y itself may be known already."""

    @staticmethod
    def forward(step: str, group: Any, x: Tensor, known: Tensor | None = None) -> Tensor:
        if known is not None:
            return known.detach().clone()
        y = x.detach().clone(memory_format=torch.contiguous_format)
        if step in ("sum", "mean"):
            torch.distributed.all_reduce(y, group=group)
        return y / torch.distributed.get_world_size(group) if step == "mean" else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.step, ctx.group, *_ = inputs

    @staticmethod
    @batched_backward
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return None, None, Crossing.apply(_TRANSPOSED[ctx.step], ctx.group, g), None

    @staticmethod
    def jvp(ctx: Any, _step: Any, _group: Any, t: Tensor, _known: Any = None) -> Tensor:
        with forward_mode():
            return Crossing.apply(ctx.step, ctx.group, primal(t))

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, step: str, group: Any, x: Tensor, known: Tensor | None = None
    ) -> tuple[Tensor, int]:
        return Crossing.apply(step, group, x.movedim(in_dims[2], -1)), x.ndim - 1  # torch 2.6 does not know -1


def crossed(step: str, group: Any, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one dtype over the boundary, as one message; those that nobody differentiates stay as they are.

    For steps that leave the numbers alone.
    """
    if not any(map(_differentiated, leaves)):
        return list(leaves)
    flat = leaves[0].reshape(-1) if len(leaves) == 1 else torch.cat([leaf.reshape(-1) for leaf in leaves])
    parts = Crossing.apply(step, group, flat).split([leaf.numel() for leaf in leaves])
    return [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]


def tied(value: Tensor, *many: Sequence[Tensor]) -> Tensor:
    """`value`, as a function of all the tensors, to any order and with all mixed derivatives: by sums over no elements.

    A process whose value leaves some of them aside takes part in the messages of a backward pass nevertheless;
    otherwise the others would wait.
    """
    nothing = sum(leaf.reshape(-1)[:0] for leaves in many for leaf in leaves)
    assert isinstance(nothing, Tensor)
    return value + nothing.exp().sum().to(value.dtype)


def every(group: Any, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """The integers of every process, as many in each."""
    with outside_transforms():
        own = torch.tensor(list(numbers), dtype=torch.int64, device=device)
        found = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(found, own, group=group)
        rows: list[list[int]] = torch.stack(found).tolist()
    return rows


def agreed(
    group: Any, failure: Exception | None, device: torch.device, numbers: Sequence[int] = (), who: str = _WHO
) -> list[list[int]]:
    """The integers of every process, or an error in all of them if one has failed.

    A process raises its own error; the others name it. All calls match each other: a process that has failed can call
    this in place of whatever call the others come to next.
    """
    assert len(numbers) <= _NUMBERS
    message = b"" if failure is None else f"{type(failure).__name__}: {failure}".encode()
    rows = every(group, [len(message), *numbers, *[0] * (_NUMBERS - len(numbers))], device)
    longest = max(row[0] for row in rows)
    if not longest:
        return [row[1:] for row in rows]
    texts = every(group, [*message, *[0] * (longest - len(message))], device)
    if failure is not None:
        raise failure
    said = [
        f"process {rank}: {bytes(text[:n]).decode()}"
        for rank, ((n, *_), text) in enumerate(zip(rows, texts, strict=True))
        if n
    ]
    raise RuntimeError(f"{who} failed. " + "; ".join(said))


def together(group: Any, action: Callable[[], T], device: torch.device, who: str = _WHO) -> T:
    """The result of a process's own work, which does not communicate, or an error in all if one has failed."""
    failure, result = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    agreed(group, failure, device, who=who)
    return result  # type: ignore[return-value]


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """An integer that differs where a bit does, nearly always; the same on any machine."""
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for i, t in enumerate(tensors):
        x = physical(t)
        x = (torch.view_as_real(x) if x.is_complex() else x).contiguous().reshape(-1)
        bits = x.view(_BITS[x.element_size()]).long()
        odd = 2 * torch.arange(bits.numel(), device=x.device) + 1  # products and sums are modulo 2**64
        total = total + (bits * odd * _ODD).sum() * (2 * i + 1)
    return int(total)
