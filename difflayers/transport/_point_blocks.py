"""Sums over pairs by blocks of rows, recomputed for every derivative: nothing of the size of a matrix is kept.

A block function sees some rows and all columns. Its derivative on those rows is a block function again, so that one
Function serves all orders, forward and reverse, and ``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from difflayers.linalg._autodiff import (
    alive,
    autocast_off,
    forward_mode,
    linearise,
    plain_forward,
    primal,
    pullback,
    quick_apply,
)
from difflayers.linalg._grads_batched import batched_backward


@dataclass(frozen=True, eq=False)
class Blockwise:
    """What is computed, and how inputs and outputs are cut.

    Attributes:
        fn: ``(*tensors) -> tuple of tensors`` of a block; plain torch, holds no tensor that is differentiated.
        rows: The dimension of each input that counts rows, from the end; None: all blocks see all of it.
        outputs: The same of each output; None: the sum over the blocks is wanted.
        shapes: Of the outputs.
        size: Rows of a block.
        lead: Dimensions that ``vmap`` has put in front of the outputs.
    """

    fn: Callable[..., tuple[Tensor, ...]]
    rows: tuple[int | None, ...]
    outputs: tuple[int | None, ...]
    shapes: tuple[tuple[int, ...], ...]
    size: int
    lead: int = 0

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """All outputs, one behind the other: Functions of one output are simpler to differentiate."""
        count = next(t.shape[d] for t, d in zip(tensors, self.rows, strict=True) if d is not None)
        whole: list[Tensor] = []
        for start in range(0, count, self.size):
            length = min(self.size, count - start)
            cut = zip(tensors, self.rows, strict=True)
            found = self.fn(*(t if d is None else t.narrow(d, start, length) for t, d in cut))
            if not whole:  # allocated once: between tensors that come and go, those that stay would leave holes
                whole = [torch.zeros_like(t) if d is None else _longer(t, d, count) for t, d in self._cuts(found)]
            for all_of_it, (out, d) in zip(whole, self._cuts(found), strict=True):
                if d is None:
                    all_of_it += out
                else:
                    all_of_it.narrow(d, start, length).copy_(out)
        return torch.cat([t.reshape(*t.shape[: self.lead], -1) for t in whole], -1)

    def _cuts(self, found: Sequence[Tensor]) -> list[tuple[Tensor, int | None]]:
        return list(zip(found, self.outputs, strict=True))

    def split(self, flat: Tensor) -> list[Tensor]:
        """The outputs."""
        parts = flat.split([torch.Size(s).numel() for s in self.shapes], -1)
        return [p.reshape((*flat.shape[:-1], *s)) for p, s in zip(parts, self.shapes, strict=True)]

    def pulled_back(self, tensors: Sequence[Tensor], wanted: Sequence[int]) -> Blockwise:
        """``(*tensors, *cotangents of the outputs) -> cotangents of the wanted tensors``."""
        fn, count = self.fn, len(self.rows)

        def cotangents(*given: Tensor) -> tuple[Tensor, ...]:
            def product(*some: Tensor) -> Tensor:
                full = list(given[:count])
                for i, t in zip(wanted, some, strict=True):
                    full[i] = t
                return sum(
                    ((o * g).sum() for o, g in zip(fn(*full), given[count:], strict=True)), full[0].new_zeros(())
                )

            out, pull = pullback(product, *(given[i] for i in wanted))
            return pull(torch.ones_like(out))

        shapes = tuple(tuple(tensors[i].shape) for i in wanted)
        outputs = tuple(self.rows[i] for i in wanted)
        return Blockwise(cotangents, (*self.rows, *self.outputs), outputs, shapes, self.size)

    def pushed_forward(self, moving: Sequence[int]) -> Blockwise:
        """``(*tensors, *tangents of the moving ones) -> tangents of the outputs``."""
        fn, count = self.fn, len(self.rows)

        def tangents(*given: Tensor) -> tuple[Tensor, ...]:
            shapes: list[torch.Size] = []

            def joined(*some: Tensor) -> Tensor:
                full = list(given[:count])
                for i, t in zip(moving, some, strict=True):
                    full[i] = t
                found = fn(*full)
                shapes[:] = [o.shape for o in found]
                return torch.cat([o.reshape(-1) for o in found])

            out = linearise(joined, *(given[i] for i in moving))[1](*given[count:])
            parts = out.split([s.numel() for s in shapes])
            return tuple(p.reshape(s) for p, s in zip(parts, shapes, strict=True))

        return replace(self, fn=tangents, rows=(*self.rows, *(self.rows[i] for i in moving)))

    def lifted(self, in_dims: tuple[int | None, ...], count: int) -> Blockwise:
        """The same under one more ``vmap``, with blocks that are smaller by as much."""
        return replace(self, fn=vmap(self.fn, in_dims=in_dims), size=max(1, self.size // count), lead=self.lead + 1)


def _longer(t: Tensor, dim: int, count: int) -> Tensor:
    shape = list(t.shape)
    shape[dim] = count
    return t.new_empty(shape)


@quick_apply
class _ByBlocks(torch.autograd.Function):
    @staticmethod
    def forward(job: Blockwise, *tensors: Tensor) -> Tensor:
        with plain_forward(tensors[0]):
            return job.flat(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.job, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    @batched_backward
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
        tensors, job = [alive(t) for t in ctx.saved_tensors], ctx.job
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        with autocast_off(g):
            back = job.pulled_back(tensors, wanted)
            found = dict(zip(wanted, by_blocks(back, *tensors, *job.split(g)), strict=True))
        return (None, *(found.get(i) for i in range(len(tensors))))

    @staticmethod
    def jvp(ctx: Any, _job: Any, *tangents: Tensor | None) -> Tensor | None:
        moving = [i for i, t in enumerate(tangents) if t is not None]
        with forward_mode(), autocast_off(ctx.saved_tensors[0]):
            tensors = [primal(t) for t in ctx.saved_tensors]
            moves = [primal(tangents[i]) for i in moving]
            return _ByBlocks.apply(ctx.job.pushed_forward(moving), *tensors, *moves)

    @staticmethod
    def vmap(info: Any, in_dims: Any, job: Blockwise, *tensors: Tensor) -> Any:
        moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims[1:], strict=True)]
        dims = tuple(None if d is None else 0 for d in in_dims[1:])
        return _ByBlocks.apply(job.lifted(dims, info.batch_size), *moved), 0


def by_blocks(job: Blockwise, *tensors: Tensor) -> list[Tensor]:
    """The outputs of a job, differentiable in every tensor to any order, in the memory of its inputs and of a block."""
    return job.split(_ByBlocks.apply(job, *tensors))
