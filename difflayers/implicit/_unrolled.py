"""``adjoint=Unrolled``: autograd through the solver's own steps, under the same failure policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from difflayers._checks import check_finite
from difflayers._solution import Info, OnFailure, Solution, Status, settle, timed
from difflayers.linalg._autodiff import (
    alive,
    autocast_off,
    forward_mode,
    primal,
    quick_apply,
    transforms_active,
)
from difflayers.linalg._grads_batched import batched_backward
from difflayers.linalg._system import harmless, mask_failed

from ._adjoints import Unrolled
from ._checkpoint import unroll_in_segments
from ._iterate import IterativeSolver, unroll


@quick_apply
class _Settle(torch.autograd.Function):
    """The failure policy of an unrolled solve: reads data, so it runs in a Function's forward."""

    @staticmethod
    def forward(task: Any, value: Tensor, *rest: Tensor) -> Tensor:
        name, on_failure, present, names = task
        info, tensors = Info(*rest[:3]), rest[3:]
        timed(name, "forward", lambda: (None, info))
        named = list(zip(names, tensors, strict=True))
        return settle(value, info, on_failure, name=name, present=present, diagnose=lambda: check_finite(named)).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        task, _, status, *_rest = inputs
        ctx.count, ctx.masked = len(inputs), task[1] == "nan"
        ctx.save_for_backward(output, status)
        ctx.save_for_forward(output, status)

    @staticmethod
    @batched_backward
    def backward(ctx: Any, g: Tensor) -> Any:
        output, status = map(alive, ctx.saved_tensors)
        g = mask_failed(g, g, status > Status.MAX_STEPS, output, 1) if ctx.masked else g
        return (None, g, *([None] * (ctx.count - 2)))

    @staticmethod
    def jvp(ctx: Any, _task: Any, tangent: Tensor, *_: Any) -> Tensor:
        with forward_mode():
            tangent, (output, status) = primal(tangent), map(primal, ctx.saved_tensors)
            failed = status > Status.MAX_STEPS
            return mask_failed(tangent, tangent, failed, output, 1) if ctx.masked else tangent.clone()

    @staticmethod
    def vmap(info: Any, in_dims: Any, task: Any, *tensors: Tensor) -> Any:
        moved = [
            t.expand((info.batch_size, *t.shape)) if d is None else t.movedim(d, 0)
            for t, d in zip(tensors, in_dims[1:], strict=True)
        ]
        return _Settle.apply(task, *moved), 0


def solve_unrolled(
    name: str,
    adapt: Callable[[Any], Any],
    bound: Callable[[Sequence[Tensor]], Any],
    z: Tensor,
    tensors: Sequence[Tensor],
    solver: IterativeSolver,
    adjoint: Unrolled,
    on_failure: OnFailure,
    present: Callable[[Tensor], Any],
    names: Sequence[str],
    ndims: Sequence[int] | None,
) -> Solution[Tensor]:
    """Runs ``adjoint.max_steps`` steps under autograd and applies the failure policy to where they end."""

    def run(z: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Info]:
        length = adjoint.segment
        # inside a transform of torch.func every step is kept: it records what it differentiates itself
        if length is None or length >= adjoint.max_steps or transforms_active() or not torch.is_grad_enabled():
            return unroll(solver, adapt(bound(tensors)), z, adjoint.max_steps)
        return unroll_in_segments(solver, lambda t: adapt(bound(t)), z, tensors, adjoint.max_steps, length)

    with autocast_off(z):
        value, info = run(z, tensors)
        if on_failure == "nan":  # autograd would carry NaN from a failed element into what the batch shares: once more
            failed = info.status > Status.MAX_STEPS
            (clean_z,) = harmless([z], (1,), failed)
            value, _ = run(clean_z, harmless(tensors, ndims, failed))
    task = (name, on_failure, present, ("init", *names))
    return Solution(_Settle.apply(task, value, *info, z, *tensors), *info)
