"""The linear solve that carries its own derivative: ``x`` with ``A(params) x = rhs`` for any family of linear maps.

Both Functions here run `forward` on plain tensors (also inside ``torch.func`` transforms), so a solver may branch on
data. The derivative of a solve is another solve with the transposed map and the *same* factorisation, which enters as a
non-differentiable input; derivatives flow through ``apply(params, x)``, never through the factor. So forward, backward
and double backward cost one factorisation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from difflayers._checks import check_finite
from difflayers._solution import Info, OnFailure, Status, current_listeners, listening, settle, timed

from ._autodiff import alive, autocast_off, forward_mode, jvp_where, plain_forward, primal, quick_apply, vjp_where
from ._grads_batched import batched_backward

Params = tuple[Tensor, ...]


class LinearSolver(ABC):
    """How a system is solved. Direct solvers factorise; iterative ones return no factors."""

    factor_ndims: tuple[int, ...] = ()
    remedy: str = ""  # what to do where it stops short of its tolerance; empty: the general advice

    def factor(self, system: LinearSystem, params: Params, like: Tensor) -> Params:
        """The factorisation of ``A(params)`` for vectors shaped like `like`; plain tensors."""
        return ()

    @abstractmethod
    def solve(
        self, system: LinearSystem, params: Params, factors: Params, rhs: Tensor, transpose: bool, init: Tensor | None
    ) -> tuple[Tensor, Info]:
        """Solves on plain tensors; an element that fails must not touch another."""


@dataclass(frozen=True, eq=False)
class LinearSystem(ABC):
    """A family of linear maps ``v -> A(params) v`` on ``(*batch, event...)`` and the solver that inverts it.

    Attributes:
        solver: Inverts the map.
        param_ndims: Event dimensions of each parameter, or None where unknown (then ``vmap`` lifts the code).
        vector_ndim: Event dimensions of a vector.
        factor_ndims: Event dimensions of each factor.
        on_failure: Failure policy of forward and adjoint solves.
        name: The layer, for messages.
        symmetric: The map equals its transpose.
    """

    solver: LinearSolver
    param_ndims: tuple[int, ...] | None
    vector_ndim: int = 1
    factor_ndims: tuple[int, ...] = ()
    on_failure: OnFailure = "raise"
    name: str = "linear_solve"
    param_names: tuple[str, ...] = ()
    symmetric: bool = False

    @abstractmethod
    def apply(self, params: Params, v: Tensor, transpose: bool) -> Tensor:
        """``A v`` or ``A^T v``: differentiable in `params` and `v`, batch dimensions broadcast."""

    def operator(self, params: Params, like: Tensor, transpose: bool) -> Callable[[Tensor], Tensor]:
        """The map for repeated products on plain tensors, without gradient."""
        return lambda v: self.apply(params, v, transpose)

    def matrix(self, params: Params, like: Tensor) -> Tensor:
        """``A(params)`` as ``(*batch, n, n)``: one product per unit vector, all batch elements at once."""
        eye = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
        columns = torch.func.vmap(lambda e: self.apply(params, e.expand(like.shape), False))(eye)
        return columns.movedim(0, -1)  # out_dims=-1 brings torch down where the result does not depend on e

    def lift(self, in_dims: tuple[int | None, ...]) -> LinearSystem:
        """The same system with one more leading batch dimension, for ``param_ndims=None``."""
        return LiftedSystem(
            self.solver, None, self.vector_ndim, self.factor_ndims, self.on_failure, self.name, self.param_names,
            self.symmetric, inner=self, in_dims=in_dims,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class LiftedSystem(LinearSystem):
    """A system under one more ``vmap``."""

    inner: LinearSystem = None  # type: ignore[assignment]
    in_dims: tuple[int | None, ...] = ()

    def apply(self, params: Params, v: Tensor, transpose: bool) -> Tensor:
        return torch.func.vmap(lambda v, *p: self.inner.apply(p, v, transpose), in_dims=(0, *self.in_dims))(v, *params)


def times(M: Tensor, v: Tensor) -> Tensor:
    """Matrices times vectors; one matrix for a whole batch makes a single product."""
    return v @ M.mT if M.ndim == 2 else (M @ v.unsqueeze(-1)).squeeze(-1)


def norm(t: Tensor, keepdim: bool = False) -> Tensor:
    """Euclidean norm over the last dimension; squares of small float32 numbers must not vanish in it."""
    return wide_norm(t, keepdim).to(t.dtype)


def wide_norm(t: Tensor, keepdim: bool = False) -> Tensor:
    """The same in float64 where `t` is float32: for comparisons alone, without the way back."""
    wide = torch.float64 if t.device.type != "mps" else t.dtype  # which knows no float64
    return torch.linalg.vector_norm(t, dim=-1, keepdim=keepdim, dtype=wide)


def align(tensors: Sequence[Tensor], in_dims: Sequence[int | None], ndims: Sequence[int]) -> list[Tensor]:
    """Moves the vmapped dimension first and pads batch dimensions, so that ordinary broadcasting pairs them up."""
    rank = max(t.ndim - (d is not None) - k for t, d, k in zip(tensors, in_dims, ndims, strict=True))
    out = []
    for t, d, k in zip(tensors, in_dims, ndims, strict=True):
        if d is not None:
            t = t.movedim(d, 0)
            t = t.reshape(t.shape[0], *([1] * (rank - (t.ndim - 1 - k))), *t.shape[1:])
        out.append(t)
    return out


def harmless(tensors: Sequence[Tensor], ndims: Sequence[int] | None, failed: Tensor) -> list[Tensor]:
    """`tensors` with the slices of failed elements replaced by those of an element that did not fail.

    A zero cotangent times NaN would be NaN, and reach gradients shared by the batch; a copy of a good element is the
    one replacement at which every layer's derivatives are known to be finite (a constant: nothing flows back to it).
    Without declared dimensions only NaN entries can be told apart; they become 1.
    """
    if ndims is None:
        return [torch.where(torch.isnan(t), 1, t) if t.is_floating_point() else t for t in tensors]
    batch, out = failed.shape, []
    good = (~failed).flatten().to(torch.int8).argmax() if failed.numel() else None
    for t, k in zip(tensors, ndims, strict=True):
        if t.ndim > k and good is not None:
            event = t.shape[t.ndim - k :]
            wide = t.expand((*batch, *event))
            copy = wide.detach().reshape(-1, *event).index_select(0, good[None]).reshape(event)
            if t.is_floating_point():  # only where every element failed
                copy = torch.where(torch.isfinite(copy), copy, 1)
            t = torch.where(expand_mask(failed, k), copy, wide)
        out.append(t)
    return out


def pass_through(x: Tensor, rhs: Tensor, event_ndim: int) -> tuple[Tensor, Tensor]:
    """Adjoint solves that need no system: the corrected solution, and the elements whose failure is none.

    A cotangent of zeros has a zero solution, singular system or not. One that is not finite is the caller's (gradient
    scalers probe for it) and stays so.
    """
    flat = rhs.unsqueeze(-1) if event_ndim == 0 else rhs.flatten(rhs.ndim - event_ndim)
    zero, unfit = (flat == 0).all(-1), ~torch.isfinite(flat).all(-1)
    return torch.where(expand_mask(zero, event_ndim), 0, x), zero | unfit


def expand_mask(mask: Tensor, event_ndim: int) -> Tensor:
    """A per-element mask with trailing ones, to meet ``(*batch, event...)``."""
    return mask[(...,) + (None,) * event_ndim]


def asked_for(g: Tensor, event_ndim: int) -> Tensor:
    """The elements whose cotangent is not exactly zero: someone depends on them."""
    nonzero = g != 0
    return nonzero.flatten(nonzero.ndim - event_ndim).any(-1) if event_ndim else nonzero


def mask_failed(w: Tensor, g: Tensor, failed: Tensor, output: Tensor, event_ndim: int) -> Tensor:
    """Adjoint of a failed element: exactly zero if nobody depends on it, NaN otherwise.

    The NaN hangs on the element's `output`, so that the next derivative is NaN too, and not zero.
    """
    asked = expand_mask(failed & asked_for(g.detach(), event_ndim), event_ndim)
    # where on both sides of the product: no cotangent of another element passes the NaN
    nan = torch.where(asked, torch.where(asked, output, 0) * math.nan, 0)
    return torch.where(expand_mask(failed, event_ndim), nan, w)


def unless_all_failed(grads: list[Any], g: Tensor, failed: Tensor, event_ndim: int) -> list[Any]:
    """Cotangents of the arguments, exactly zero where every element failed and nobody asks for any.

    There is no good element then to put in the place of a failed one.
    """
    nothing = failed.all() & ~asked_for(g.detach(), event_ndim).any()
    return [None if t is None else torch.where(nothing, 0, t) for t in grads]


@quick_apply
class Factorise(torch.autograd.Function):
    """The factors of ``A(params)``: computed once, on plain tensors, and never differentiated."""

    @staticmethod
    def forward(system: LinearSystem, like: Tensor, *params: Tensor) -> Params:
        with plain_forward(like):
            return system.solver.factor(system, params, like)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Params) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.counts = len(inputs), len(output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return (None,) * ctx.counts[0]

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        return (None,) * ctx.counts[1]

    @staticmethod
    def vmap(info: Any, in_dims: Any, system: LinearSystem, like: Tensor, *params: Tensor) -> Any:
        if all(d is None for d in in_dims[2:]):  # the matrix is not mapped, so neither are its factors
            like = like if in_dims[1] is None else like.select(in_dims[1], 0)
            out = Factorise.apply(system, like, *params)
            return out, (None,) * len(out)
        system, (like, *moved) = lifted(system, info.batch_size, in_dims[1:], (like, *params))
        out = Factorise.apply(system, like, *moved)
        return out, factor_dims(out, system.factor_ndims, like.ndim - system.vector_ndim)


def factor_dims(factors: Sequence[Tensor], ndims: Sequence[int], batch_rank: int) -> tuple[int | None, ...]:
    """Where each factor carries the dimension that a vmap rule moved to the front of a batch of `batch_rank`.

    Batch dimensions are aligned, so a factor made from a mapped parameter has all of them, and any other fewer.
    """
    return tuple(0 if f.ndim - k == batch_rank else None for f, k in zip(factors, ndims, strict=True))


def lifted(
    system: LinearSystem, size: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor], extra: Sequence[int] = ()
) -> tuple[LinearSystem, list[Tensor]]:
    """One vmap level less: `tensors` are ``(vector, *extra, *params)`` with `extra` event dimensions known."""
    vector, *_ = tensors
    if in_dims[0] is None:
        vector = vector.expand(size, *vector.shape)
    tensors, in_dims = [vector, *tensors[1:]], [0 if in_dims[0] is None else in_dims[0], *in_dims[1:]]
    head = 1 + len(extra)
    if system.param_ndims is not None:
        return system, align(tensors, in_dims, (system.vector_ndim, *extra, *system.param_ndims))
    params = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors[head:], in_dims[head:], strict=True)]
    system = system.lift(tuple(None if d is None else 0 for d in in_dims[head:]))
    return system, [*align(tensors[:head], in_dims[:head], (system.vector_ndim, *extra)), *params]


@quick_apply
class SystemSolve(torch.autograd.Function):
    """``(x, status, steps, residual)`` with ``A(params) x = rhs`` or ``A(params)^T x = rhs``."""

    @staticmethod
    def forward(
        system: LinearSystem, transpose: bool, phase: str, init: Tensor | None, rhs: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        k = len(system.factor_ndims)
        factors, params = tensors[:k], tensors[k:]

        def solve() -> tuple[Tensor, Info]:
            x, info = system.solver.solve(system, params, factors, rhs, transpose, init)
            if current_listeners():  # a trace wants to know how good a direct solve is, too
                miss = system.operator(params, rhs, transpose)(x) - rhs
                flat = miss.flatten(rhs.ndim - system.vector_ndim) if system.vector_ndim else miss.unsqueeze(-1)
                info = info._replace(residual=torch.linalg.vector_norm(flat, dim=-1))
            return x, info

        with plain_forward(rhs):
            x, info = timed(system.name, phase, solve)
        names = system.param_names or tuple(f"params[{i}]" for i in range(len(params)))
        checked = [*zip(names, params, strict=True), ("b", rhs)]
        checked += [] if init is None else [("init", init)]
        x = settle(
            x,
            info,
            system.on_failure,
            name=system.name,
            phase=phase,
            diagnose=lambda: check_finite(checked),
            excused=None if phase == "forward" else lambda x: pass_through(x, rhs, system.vector_ndim),
            remedy=system.solver.remedy,
        )
        return (x, *info)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.system, ctx.transpose, _, _, _, *tensors = inputs
        ctx.listeners = current_listeners()
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no cotangent, no adjoint solve
        ctx.save_for_backward(*output[:2], *tensors)
        ctx.save_for_forward(*output[:2], *tensors)

    @staticmethod
    def unpack(
        ctx: Any, read: Callable[[Any], Any] = alive
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None, list[Tensor], list[Tensor]]:
        """Solution, (failed elements, their output) unless none is masked, factors, parameters: all harmless."""
        x, status, *tensors = map(read, ctx.saved_tensors)
        system = ctx.system
        k = len(system.factor_ndims)
        factors, params = tensors[:k], tensors[k:]
        if system.on_failure != "nan":
            return x, None, factors, params
        failed = status > Status.MAX_STEPS
        clean = torch.where(expand_mask(failed, system.vector_ndim), 0, x)
        factors = harmless(factors, system.factor_ndims, failed)
        return clean, (failed, x), factors, harmless(params, system.param_ndims, failed)

    @staticmethod
    @batched_backward
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
        system, transpose = ctx.system, ctx.transpose
        x, masked, factors, params = SystemSolve.unpack(ctx)
        clean = g if masked is None else torch.where(expand_mask(masked[0], system.vector_ndim), 0, g)
        with listening(ctx.listeners), autocast_off(x):
            w = SystemSolve.apply(system, not transpose, "adjoint", None, clean, *factors, *params)[0]
            if masked is not None:
                w = mask_failed(w, g, masked[0], masked[1], system.vector_ndim)
            wanted = [
                n and p.is_floating_point() for n, p in zip(ctx.needs_input_grad[-len(params) :], params, strict=True)
            ]
            grads = vjp_where(lambda *p: system.apply(p, x, transpose), params, wanted, -w)
            if masked is not None:
                grads = unless_all_failed(grads, g, masked[0], system.vector_ndim)
        return (None, None, None, None, w, *([None] * len(factors)), *grads)

    @staticmethod
    def jvp(ctx: Any, _s: Any, _t: Any, _p: Any, _i: Any, rhs_t: Tensor | None, *tangents: Any) -> Any:
        system, transpose = ctx.system, ctx.transpose
        with (
            forward_mode(),
            listening(ctx.listeners),
            autocast_off(next(t for t in (rhs_t, *tangents) if t is not None)),
        ):
            x, masked, factors, params = SystemSolve.unpack(ctx, primal)
            rhs_t, *tangents = (primal(t) for t in (rhs_t, *tangents))  # type: ignore[assignment]
            moved = jvp_where(lambda *p: system.apply(p, x, transpose), params, tangents[len(factors) :])
            rhs = rhs_t if moved is None else -moved if rhs_t is None else rhs_t - moved
            assert rhs is not None  # torch calls jvp only where some tangent exists
            rhs = rhs.expand_as(x)
            clean = rhs if masked is None else torch.where(expand_mask(masked[0], system.vector_ndim), 0, rhs)
            x_t = SystemSolve.apply(system, transpose, "adjoint", None, clean, *factors, *params)[0]
            if masked is not None:
                x_t = mask_failed(x_t, rhs, masked[0], masked[1], system.vector_ndim)
        return (x_t, None, None, None)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, system: LinearSystem, transpose: bool, phase: str, init: Tensor | None, *rest: Tensor
    ) -> Any:
        if init is not None and in_dims[3] is not None:
            init = init.movedim(in_dims[3], 0)
        system, (rhs, *tensors) = lifted(system, info.batch_size, in_dims[4:], rest, extra=system.factor_ndims)
        out = SystemSolve.apply(system, transpose, phase, init, rhs, *tensors)
        return out, (0,) * len(out)


def solve_system(
    system: LinearSystem, rhs: Tensor, params: Params, init: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factorises once and solves: ``(x, status, steps, residual)``."""
    factors = Factorise.apply(system, rhs, *params) if system.factor_ndims else ()
    return SystemSolve.apply(system, False, "forward", init, rhs, *factors, *params)


def with_solver(system: LinearSystem, solver: LinearSolver) -> LinearSystem:
    """`system` solved by `solver`."""
    return replace(system, solver=solver, factor_ndims=solver.factor_ndims)
