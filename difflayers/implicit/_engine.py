r"""The engine: the solution of an inner problem as a differentiable function of its arguments.

A layer says when a value solves it, :math:`F(z^*, \theta) = 0`, and brings any algorithm that finds one. By the
implicit function theorem, with :math:`A = \partial F / \partial z` at the solution,

.. math:: \bar\theta = -\Big(\frac{\partial F}{\partial \theta}\Big)^T v, \qquad A^T v = \bar z .

:class:`SolutionMap` is that rule. It saves its own *output*, so that the backward pass can be differentiated again (the
value moves with the arguments), and leaves the linear solve to :class:`~difflayers.linalg._system.SystemSolve`, which
carries its own derivative. This file is the only one above ``linalg`` that knows autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from difflayers._checks import broadcast_batch, check_finite, check_same
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
from difflayers.linalg import LinearSolver
from difflayers.linalg._autodiff import (
    alive,
    autocast_off,
    forward_mode,
    jvp_where,
    linearise,
    opaque,
    plain_forward,
    primal,
    pullback,
    push_forward,
    quick_apply,
    transforms_active,
    vjp_where,
)
from difflayers.linalg._captured import Seen, gradients_wanted, refuse_held, refuse_probed, refuse_seen
from difflayers.linalg._grads_batched import batched_backward
from difflayers.linalg._system import (
    Factorise,
    LinearSystem,
    Params,
    SystemSolve,
    align,
    expand_mask,
    factor_dims,
    harmless,
    mask_failed,
    unless_all_failed,
)

from ._adjoints import Implicit, Neumann, OneStep

_looked_at = Seen()


@dataclass(frozen=True, eq=False, kw_only=True)
class ImplicitProblem:
    """An inner problem as the engine sees it: what a solution is, how to find one, how to solve with its Jacobian.

    Args:
        solve: ``(*args) -> (value, Info, factors)`` on plain tensors; may branch on data, records no gradient, treats
            each batch element alone. `factors` is a tuple of tensors kept for `linear_solve` (empty if none).
        residual: ``(value, *args) -> like value``, zero at a solution. Plain torch, each batch element alone, batch
            dimensions broadcast.
        linear_solve: ``(value, args, factors, rhs, transpose) -> (x, Info)`` with ``(dF/dvalue) x = rhs`` or its
            transpose; numbers only, it is never differentiated itself. None: the adjoint's own solver.
        value_ndim: Trailing dimensions of the value that make one unknown.
        arg_ndims: The same for every argument.
        factor_ndims: The same for every factor.
        adjoint: ``Implicit``, ``Neumann`` or ``OneStep``; used where `linear_solve` is None.
        symmetric: The Jacobian is a Hessian.
        jacobian_product: ``(value, args, v, transpose) -> A v``, differentiable, to replace the Jacobian of the
            residual by an approximation of it. None: the exact Jacobian.
        name: The layer, in messages and traces.
        arg_names: Names of the arguments in messages.
    """

    solve: Callable[..., tuple[Tensor, Info, Params]]
    residual: Callable[..., Tensor]
    linear_solve: Callable[..., tuple[Tensor, Info]] | None = None
    value_ndim: int
    arg_ndims: tuple[int, ...] | None
    factor_ndims: tuple[int, ...] = ()
    adjoint: Implicit | Neumann | OneStep = field(default_factory=Implicit)
    symmetric: bool = False
    jacobian_product: Callable[..., Tensor] | None = None
    name: str = "solution_map"
    arg_names: tuple[str, ...] = ()

    def lift(self, in_dims: tuple[int | None, ...]) -> ImplicitProblem:
        """The problem under one more ``vmap``, for ``arg_ndims=None`` (see ``_problem.py``)."""
        raise TypeError("arg_ndims: expected one number per argument, got None")


@dataclass(frozen=True, eq=False)
class ResidualSystem(LinearSystem):
    """``A = dF/dvalue`` at ``params = (value, *args)``, acting on flattened events."""

    problem: ImplicitProblem = None  # type: ignore[assignment]

    def apply(self, params: Params, v: Tensor, transpose: bool) -> Tensor:
        problem = self.problem
        value, *args = params
        k = value.ndim - problem.value_ndim
        batch = torch.broadcast_shapes(value.shape[:k], v.shape[: v.ndim - self.vector_ndim])
        # expanded before vjp: a batched vector needs a batched value
        value = value.expand((*batch, *value.shape[k:]))
        y = v.expand((*batch, *v.shape[v.ndim - self.vector_ndim :])).reshape(value.shape)
        if problem.jacobian_product is not None:
            out = problem.jacobian_product(value, tuple(args), y, transpose)
        elif transpose:
            out = pullback(lambda z: problem.residual(z, *args), value)[1](y)[0]
        else:
            out = push_forward(lambda z: problem.residual(z, *args), [value], [y])
        return out.reshape(*batch, *v.shape[v.ndim - self.vector_ndim :])

    def operator(self, params: Params, like: Tensor, transpose: bool) -> Callable[[Tensor], Tensor]:
        problem = self.problem
        if problem.jacobian_product is not None:
            return lambda v: self.apply(params, v, transpose)
        value, *args = params
        k = value.ndim - problem.value_ndim
        value = value.expand((*like.shape[:-1], *value.shape[k:]))
        residual = lambda z: problem.residual(z, *args)  # noqa: E731
        if transpose:  # one graph, one backward pass a product
            _, pull = pullback(residual, value, record=False)
            return lambda v: pull(v.reshape(value.shape))[0].reshape(v.shape)
        _, push = linearise(residual, value)
        return lambda v: push(v.reshape(value.shape)).reshape(v.shape)

    def matrix(self, params: Params, like: Tensor) -> Tensor:
        n, problem = like.shape[-1], self.problem
        if problem.jacobian_product is not None:
            return LinearSystem.matrix(self, params, like)
        value, *args = params
        batch, event = value.shape[: value.ndim - problem.value_ndim], value.shape[value.ndim - problem.value_ndim :]
        eye = torch.eye(n, dtype=value.dtype, device=value.device)
        if problem.arg_ndims is not None and not transforms_active():
            # batch dimensions broadcast: n copies of the value, one backward pass
            copies = value.expand((n, *value.shape))
            units = eye.reshape((n, *[1] * len(batch), *event)).expand((n, *value.shape))
            rows = pullback(lambda z: problem.residual(z, *args), copies)[1](units)[0]
        else:
            _, pull = pullback(lambda z: problem.residual(z, *args), value)
            rows = vmap(lambda e: pull(e.reshape(event).expand_as(value))[0], out_dims=0)(eye)
        return rows.reshape((n, *batch, n)).movedim(0, -2)


@dataclass(frozen=True)
class AuthorSolver(LinearSolver):
    """The layer's own structured adjoint, fed with the factors of its forward pass."""

    problem: ImplicitProblem

    def solve(
        self, system: LinearSystem, params: Params, factors: Params, rhs: Tensor, transpose: bool, init: Tensor | None
    ) -> tuple[Tensor, Info]:
        assert self.problem.linear_solve is not None
        return self.problem.linear_solve(params[0], params[1:], factors, rhs, transpose)


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
            if any(value.data_ptr() == a.data_ptr() for a in args):  # a projection of an inside point is the point
                value = value.clone()
            return (value, factors), info

        with plain_forward(args[0] if init is None else init):
            (value, factors), info = timed(problem.name, "forward", solve)
        names = problem.arg_names or tuple(f"args[{i}]" for i in range(len(args)))
        named = [*zip(names, args, strict=True), *([] if init is None else [("init", init)])]
        value = settle(
            value,
            info,
            task.on_failure,
            name=problem.name,
            present=task.present,
            diagnose=lambda: check_finite(named),
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
        ctx: Any, transpose: bool, g: Tensor, value: Tensor, masked: Any, factors: Any, args: Any
    ) -> Tensor:
        """``A^-1 g`` or ``A^-T g``, failed elements exactly zero unless somebody asks for them."""
        if g.numel() == 0:
            return g.clone()
        task: Task = ctx.task
        system = task.system(value)
        k = task.problem.value_ndim
        rhs = task.to_vector(g if masked is None else torch.where(expand_mask(masked[0], k), 0, g))
        if task.problem.linear_solve is None and system.factor_ndims:
            factors = ctx.factors
            if factors is None:
                factors = Factorise.apply(system, task.to_vector(value), value, *args)
                if torch.is_grad_enabled() and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, factors)):
                    ctx.factors = factors  # double backward comes through this node again, with the same factorisation
        w = SystemSolve.apply(system, transpose, "adjoint", None, rhs, *factors, value, *args)[0].reshape(g.shape)
        return w if masked is None else mask_failed(w, g, masked[0], masked[1], k)

    @staticmethod
    @batched_backward
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
        value, masked, factors, args = SolutionMap.unpack(ctx)
        with listening(ctx.listeners), autocast_off(value):
            v = SolutionMap.linear_solve(ctx, True, g, value, masked, factors, args)
            wanted = [n and a.is_floating_point() for n, a in zip(ctx.needs_input_grad[2:], args, strict=True)]
            grads = vjp_where(lambda *a: ctx.task.problem.residual(value, *a), args, wanted, -v)
            if masked is not None:
                grads = unless_all_failed(grads, g, masked[0], ctx.task.problem.value_ndim)
        return (None, None, *grads)

    @staticmethod
    def jvp(ctx: Any, _task: Any, _init: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        with forward_mode(), listening(ctx.listeners), autocast_off(next(t for t in tangents if t is not None)):
            value, masked, factors, args = SolutionMap.unpack(ctx, primal)
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
            raise ValueError(f"{name}: expected at least {k} dimensions, got shape {tuple(arg.shape)}")
    check_same((n, a) for n, a in zip(names, args, strict=True) if a.is_floating_point())
    broadcast_batch((n, tuple(a.shape[: a.ndim - k])) for n, a, k in zip(names, args, problem.arg_ndims, strict=True))
    look = gradients_wanted()
    if look:
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
