"""An unrolled solve in segments, recomputed one at a time in backward: memory grows with the square root of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from difflayers._solution import Info

from ._iterate import IterativeSolver, advance, before_first, report


class _Segment(torch.autograd.Function):
    """``run(*tensors) -> tensors`` that saves its inputs alone."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        given = {id(t) for t in tensors}
        out = tuple(t.clone() if id(t) in given else t for t in run(*tensors))
        ctx.mark_non_differentiable(*(t for t in out if not t.is_floating_point()))
        return out

    @staticmethod
    def backward(ctx: Any, *g: Tensor | None) -> tuple[Tensor | None, ...]:
        again, wanted = torch.is_grad_enabled(), ctx.needs_input_grad[1:]
        with torch.enable_grad():
            # on aliases, so that only what happens inside the segment is differentiated here
            saved = ctx.saved_tensors
            inputs = [
                (t.view_as(t) if again else t.detach().requires_grad_()) if w else t
                for t, w in zip(saved, wanted, strict=True)
            ]
            pairs = [(o, gi) for o, gi in zip(ctx.run(*inputs), g, strict=True) if gi is not None and o.requires_grad]
        leaves = [t for t, w in zip(inputs, wanted, strict=True) if w]
        if not pairs or not leaves:
            return (None,) * (1 + len(saved))
        outputs, cotangents = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, leaves, cotangents, create_graph=again, allow_unused=True))
        return (None, *(next(found) if w else None for w in wanted))


def unroll_in_segments(
    solver: IterativeSolver,
    function: Callable[[Sequence[Tensor]], Any],
    z: Tensor,
    tensors: Sequence[Tensor],
    max_steps: int,
    length: int,
) -> tuple[Tensor, Info]:
    """As :func:`unroll` for ``function(tensors)``, keeping nothing of a segment of `length` steps but its start."""
    at: Any = before_first(z)
    count = len(tensors)
    for start in range(0, max_steps, length):
        leaves, spec = optree.tree_flatten(at)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        after: list[Any] = []

        def run(
            *given: Tensor, start: int = start, leaves: Any = leaves, spec: Any = spec, places: Any = places,
            after: Any = after,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            filled = list(leaves)
            for i, t in zip(places, given[count:], strict=True):
                filled[i] = t
            progress: Any = spec.unflatten(filled)
            stop = min(start + length, max_steps)
            tree: Any = advance(solver, function(given[:count]), progress, start, stop)
            found, shape = optree.tree_flatten(tree)
            after[:] = [shape, [None if isinstance(leaf, Tensor) else leaf for leaf in found]]
            return tuple(leaf for leaf in found if isinstance(leaf, Tensor))

        out = iter(_Segment.apply(run, *tensors, *(leaves[i] for i in places)))
        for i in places:
            leaves[i] = None  # the graph keeps what it needs
        shape, others = after
        at = shape.unflatten([next(out) if other is None else other for other in others])
    return report(at)
