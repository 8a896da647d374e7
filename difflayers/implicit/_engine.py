r"""The engine: the solution of an inner problem as a differentiable function of its arguments.

A layer says when a value solves it, :math:`F(z^*, \theta) = 0`, and brings any algorithm that finds one. By the
implicit function theorem, with :math:`A = \partial F / \partial z` at the solution,

.. math:: \bar\theta = -\Big(\frac{\partial F}{\partial \theta}\Big)^T v, \qquad A^T v = \bar z .

:class:`SolutionMap` is that rule. It saves its own *output*, so that the backward pass can be differentiated again (the
value moves with the arguments), and leaves the linear solve to :class:`~difflayers.linalg._system.SystemSolve`, which
carries its own derivative. This file is the only one above ``linalg`` that knows autograd.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_finite, check_same, dimensions
from difflayers._solution import (
    Info,
    OnFailure,
    Solution,
    Status,
    check_policy,
    current_listeners,
    listening,
    settle,
    timed,
)
from difflayers.linalg._autodiff import (
    alive,
    autocast_off,
    forward_mode,
    jvp_where,
    opaque,
    physical,
    plain_forward,
    primal,
    quick_apply,
    transforms_active,
    vjp_where,
)
from difflayers.linalg._captured import Seen, gradients_wanted, refuse_complex, refuse_held, refuse_probed, refuse_seen
from difflayers.linalg._grads_batched import batched_backward
from difflayers.linalg._system import (
    Factorise,
    SystemSolve,
    align,
    expand_mask,
    factor_dims,
    harmless,
    mask_failed,
    unless_all_failed,
)

from ._implicit_problem import AuthorSolver, ImplicitProblem, Recorded, ResidualSystem

_looked_at = Seen()


@dataclass(frozen=True, eq=False)
class Task:
    """One call: the problem and what the caller wants to happen when it fails."""

    problem: ImplicitProblem
    on_failure: OnFailure = "raise"
    present: Callable[[Tensor], Any] = lambda value: value

    def lift(self, in_dims: tuple[int | None, ...]) -> Task:
        """The call under one more ``vmap``."""
        return Task(self.problem.lift(in_dims), self.on_failure)

    @property
    def own_factors(self) -> int:
        """How many factors the forward pass made."""
        return len(self.problem.factor_ndims)

    def system(self, value: Tensor) -> ResidualSystem:
        """The linear system of the derivative at `value`."""
        p = self.problem
        ndims = None if p.arg_ndims is None else (p.value_ndim, *p.arg_ndims)
        if p.linear_solve is not None:
            return ResidualSystem(
                AuthorSolver(p), ndims, p.value_ndim, p.factor_ndims, self.on_failure, p.name, problem=p
            )
        n = value.shape[value.ndim - p.value_ndim :].numel()
        solver = p.adjoint.solver(n, p.symmetric)
        return ResidualSystem(
            solver, ndims, 1, solver.factor_ndims, self.on_failure, p.name, symmetric=p.symmetric, problem=p
        )

    def to_vector(self, t: Tensor) -> Tensor:
        """Events flattened for the linear solver, as they are for the layer's own."""
        if self.problem.linear_solve is not None or self.problem.value_ndim == 1:
            return t
        return t.reshape(*t.shape[: t.ndim - self.problem.value_ndim], -1)


@quick_apply
class SolutionMap(torch.autograd.Function):
    """``(init, *args) -> (value, status, steps, residual, *factors)`` with ``F(value, *args) = 0``."""

    @staticmethod
    def forward(task: Task, init: Tensor | None, *args: Tensor) -> tuple[Tensor, ...]:
        problem = task.problem

        def solve() -> tuple[Any, Info]:
            value, info, factors = problem.solve(*args) if init is None else problem.solve(init, *args)
            given = {a.untyped_storage()._cdata for a in args}  # torch.export has no data to point to
            # a projection of an inside point is the point; torch wants outputs of their own
            own = [t.clone() if t.untyped_storage()._cdata in given else t for t in (value, *factors)]
            return (own[0], own[1:]), info

        with plain_forward(args[0] if init is None else init):
            (value, factors), info = timed(problem.name, "forward", solve)

        def diagnose() -> None:
            names = problem.arg_names or tuple(f"args[{i}]" for i in range(len(args)))
            named = [*zip(names, args, strict=True), *([] if init is None else [("init", init)])]
            (problem.diagnose or check_finite)(named)

        value = settle(
            value,
            info,
            task.on_failure,
            name=problem.name,
            present=task.present,
            diagnose=diagnose,
        )
        return (value, *info, *factors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.task, _, *args = inputs
        ctx.listeners = current_listeners()
        ctx.factors = None
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no cotangent, no adjoint solve
        saved = (*output[:2], *output[4:], *args)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def unpack(
        ctx: Any, read: Callable[[Any], Any] = alive
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Sequence[Tensor], Sequence[Tensor]]:
        """Value, (failed elements, their output) unless the policy masks none, factors, arguments: all harmless."""
        value, status, *rest = map(read, ctx.saved_tensors)
        task: Task = ctx.task
        factors, args = rest[: task.own_factors], rest[task.own_factors :]
        if task.on_failure != "nan":
            return value, None, factors, args
        ndims = task.problem.arg_ndims
        failed = status > Status.MAX_STEPS
        factors = harmless(factors, task.problem.factor_ndims, failed)
        if ndims is None:
            (clean,) = harmless([value], (task.problem.value_ndim,), failed)
            return clean, (failed, value), factors, harmless(args, None, failed)
        clean, *args = harmless([value, *args], (task.problem.value_ndim, *ndims), failed)
        return clean, (failed, value), factors, args

    @staticmethod
    def linear_solve(
        ctx: Any, transpose: bool, g: Tensor, value: Tensor, masked: Any, factors: Any, args: Any, recorded: Any = None
    ) -> Tensor:
        """``A^-1 g`` or ``A^-T g``, failed elements exactly zero unless somebody asks for them."""
        if g.numel() == 0:
            return g.clone()
        task: Task = ctx.task
        system = task.system(value)
        if recorded is not None:
            system = replace(system, recorded=recorded)
        k = task.problem.value_ndim
        rhs = task.to_vector(g if masked is None else torch.where(expand_mask(masked[0], k), 0, g))
        if task.problem.linear_solve is None and system.factor_ndims:
            factors = ctx.factors
            if factors is None:
                factors = Factorise.apply(system, task.to_vector(value), value, *args)
                if torch.is_grad_enabled() and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, factors)):
                    ctx.factors = factors  # double backward comes through this node again, with the same factorisation
        # where nothing records, the rule itself: the apply of a Function takes as long as a small solve
        recording = torch.is_grad_enabled() or transforms_active()
        solve = SystemSolve.apply if recording else SystemSolve.forward
        w = solve(system, transpose, "adjoint", None, rhs, *factors, value, *args)[0].reshape(g.shape)
        return w if masked is None else mask_failed(w, g, masked[0], masked[1], k)

    @staticmethod
    @batched_backward
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
        value, masked, factors, args = SolutionMap.unpack(ctx)
        heard = listening(ctx.listeners) if ctx.listeners else contextlib.nullcontext()
        with heard, autocast_off(value):
            if not (physical(value).numel() and physical(g).numel()):  # torch's vmap trips over functions of nothing
                picked = zip(ctx.needs_input_grad[2:], args, strict=True)
                return (None, None, *(torch.zeros_like(a) if n and a.is_floating_point() else None for n, a in picked))
            residual, written = ctx.task.problem.residual, ctx.task.problem.cotangents
            wanted = [n and a.is_floating_point() for n, a in zip(ctx.needs_input_grad[2:], args, strict=True)]
            if torch.is_grad_enabled() or transforms_active() or g.numel() == 0:
                v = SolutionMap.linear_solve(ctx, True, g, value, masked, factors, args)
                grads = vjp_where(lambda *a: residual(value, *a), args, wanted, -v)
            elif written is not None:
                v = SolutionMap.linear_solve(ctx, True, g, value, masked, factors, args)
                grads = written(value, tuple(args), -v, wanted)
            else:
                recorded = Recorded.at(residual, value, args, wanted)
                v = SolutionMap.linear_solve(ctx, True, g, value, masked, factors, args, recorded)
                grads = recorded.cotangents(-v)
            if masked is not None:
                grads = unless_all_failed(grads, g, masked[0], ctx.task.problem.value_ndim)
        return (None, None, *grads)

    @staticmethod
    def jvp(ctx: Any, _task: Any, _init: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        with forward_mode(), listening(ctx.listeners), autocast_off(next(t for t in tangents if t is not None)):
            value, masked, factors, args = SolutionMap.unpack(ctx, primal)
            if not physical(value).numel():
                return (torch.zeros_like(value), *([None] * (3 + ctx.task.own_factors)))
            moved = jvp_where(lambda *a: ctx.task.problem.residual(value, *a), args, [primal(t) for t in tangents])
            if moved is None:
                moved = torch.zeros_like(value)
            value_t = SolutionMap.linear_solve(ctx, False, -moved, value, masked, factors, args)
        return (value_t, *([None] * (3 + ctx.task.own_factors)))

    @staticmethod
    def vmap(info: Any, in_dims: Any, task: Task, init: Tensor | None, *args: Tensor) -> Any:
        ndims = task.problem.arg_ndims
        if init is not None and in_dims[1] is None:
            init, in_dims = init.expand(info.batch_size, *init.shape), (None, 0, *in_dims[2:])
        if ndims is None:
            assert init is not None
            moved = [t if d is None else t.movedim(d, 0) for t, d in zip((init, *args), in_dims[1:], strict=True)]
            out = SolutionMap.apply(task.lift(tuple(None if d is None else 0 for d in in_dims[2:])), *moved)
        elif init is None:
            out = SolutionMap.apply(task, None, *align(args, in_dims[2:], ndims))
        else:
            out = SolutionMap.apply(task, *align((init, *args), in_dims[1:], (task.problem.value_ndim, *ndims)))
        factors = factor_dims(out[4:], task.problem.factor_ndims, out[0].ndim - task.problem.value_ndim)
        return out, (0, 0, 0, 0, *factors)


@opaque
def _apply(problem: ImplicitProblem, args: Sequence[Tensor], on_failure: OnFailure) -> Solution[Tensor]:
    check_policy(on_failure)
    if problem.arg_ndims is None or len(problem.arg_ndims) != len(args):
        raise ValueError(f"arg_ndims: expected {len(args)} numbers, one per argument, got {problem.arg_ndims}")
    names = problem.arg_names or tuple(f"args[{i}]" for i in range(len(args)))
    for name, arg, k in zip(names, args, problem.arg_ndims, strict=True):
        if not isinstance(arg, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(arg).__name__}")
        if arg.ndim < k:
            raise ValueError(f"{name}: expected at least {dimensions(k)}, got shape {tuple(arg.shape)}")
    check_same((n, a) for n, a in zip(names, args, strict=True) if a.is_floating_point())
    broadcast_batch((n, tuple(a.shape[: a.ndim - k])) for n, a, k in zip(names, args, problem.arg_ndims, strict=True))
    look = gradients_wanted()
    if look:
        refuse_complex(zip(names, args, strict=True))
        refuse_held(problem.residual, "residual")
    solution = Solution(*SolutionMap.apply(Task(problem, on_failure), None, *args)[:4])
    if look and not _looked_at.knows(problem.residual):
        tensors = (solution.value, *args)
        if transforms_active():
            refuse_probed(problem.residual, tensors, "residual")
        else:
            with torch.enable_grad():  # on constants: a result with a gradient captured something
                refuse_seen([problem.residual(*(t.detach() for t in tensors))], "residual")
            _looked_at.remember(problem.residual)
    return solution


def solution_map(problem: ImplicitProblem, args: Sequence[Tensor], *, on_failure: OnFailure = "raise") -> Tensor:
    """The solution of an inner problem as a differentiable function of its arguments: for authors of layers.

    Args:
        problem: Residual, solver and adjoint; batch dimensions broadcast.
        args: Tensors; floating-point ones are differentiable, others (indices, masks) are data.
        on_failure: ``"raise"``, ``"nan"`` or ``"ignore"``.

    Returns:
        ``(*batch, event...)`` solution.

    Raises:
        ValueError: For arguments that do not fit `problem.arg_ndims`.
        SolveError: Where the solve, or in backward its adjoint, failed.

    Differentiable in every floating-point argument, to any order, forward and reverse; factors made by
    ``problem.solve`` are reused at every order.

    Example:
        >>> import torch
        >>> from difflayers.implicit import ImplicitProblem, Info, Status, solution_map
        >>> def solve(a):
        ...     ok = torch.full(a.shape, int(Status.CONVERGED))
        ...     return a.sqrt(), Info(ok, torch.ones_like(ok), torch.zeros_like(a)), ()
        >>> root = ImplicitProblem(solve=solve, residual=lambda z, a: z * z - a, value_ndim=0, arg_ndims=(0,))
        >>> a = torch.tensor([4.0, 9.0], requires_grad=True)
        >>> torch.autograd.grad(solution_map(root, (a,)).sum(), a)
        (tensor([0.2500, 0.1667]),)
    """
    return _apply(problem, args, on_failure).value


def solution_map_ex(problem: ImplicitProblem, args: Sequence[Tensor]) -> Solution[Tensor]:
    """As :func:`solution_map`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        problem: Residual, solver and adjoint.
        args: Tensors.

    Returns:
        The solution with status, steps and residual of every element.
    """
    return _apply(problem, args, "ignore")
