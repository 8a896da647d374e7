"""An inner problem as the engine sees it, and the linear system of its derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from difflayers._solution import (
    Info,
)
from difflayers.linalg import LinearSolver
from difflayers.linalg._autodiff import (
    gradients,
    linearise,
    pullback,
    push_forward,
    transforms_active,
)
from difflayers.linalg._system import (
    LinearSystem,
    Params,
)

from ._adjoints import Implicit, Neumann, OneStep


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
        cotangents: ``(value, args, w, wanted) -> list`` with ``(dF/darg)^T w`` of the `wanted` arguments and None for
            the others, on plain tensors: a formula that is quicker than the graph of the residual in a first-order
            backward pass. None: the residual's own.
        value_ndim: Trailing dimensions of the value that make one unknown.
        arg_ndims: The same for every argument.
        factor_ndims: The same for every factor.
        adjoint: ``Implicit``, ``Neumann`` or ``OneStep``; used where `linear_solve` is None.
        symmetric: The Jacobian is a Hessian.
        jacobian_product: ``(value, args, v, transpose) -> A v``, differentiable, to replace the Jacobian of the
            residual by an approximation of it. None: the exact Jacobian.
        name: The layer, in messages and traces.
        arg_names: Names of the arguments in messages.
        diagnose: ``(named arguments) -> None``, called where an element failed: may raise a ``ValueError`` for data
            that explain it. None: NaN and Inf do.
    """

    solve: Callable[..., tuple[Tensor, Info, Params]]
    residual: Callable[..., Tensor]
    linear_solve: Callable[..., tuple[Tensor, Info]] | None = None
    cotangents: Callable[..., list[Tensor | None]] | None = None
    value_ndim: int
    arg_ndims: tuple[int, ...] | None
    factor_ndims: tuple[int, ...] = ()
    adjoint: Implicit | Neumann | OneStep = Implicit()  # one for all: Dynamo of torch 2.6 cannot call a factory
    symmetric: bool = False
    jacobian_product: Callable[..., Tensor] | None = None
    name: str = "solution_map"
    arg_names: tuple[str, ...] = ()
    diagnose: Callable[[Sequence[tuple[str, Tensor]]], None] | None = None

    def lift(self, in_dims: tuple[int | None, ...]) -> ImplicitProblem:
        """The problem under one more ``vmap``, for ``arg_ndims=None`` (see ``_problem.py``)."""
        raise TypeError("arg_ndims: expected one number per argument, got None")


@dataclass(frozen=True, eq=False)
class Recorded:
    """One evaluation of the residual with its graph: a plain first-order backward needs no second one."""

    value: Tensor
    args: tuple[Any, ...]
    residual: Tensor

    @staticmethod
    def at(residual: Callable[..., Tensor], value: Tensor, args: Sequence[Tensor], wanted: Sequence[bool]) -> Recorded:
        """The residual at constants, recorded for the value and the `wanted` arguments."""
        with torch.enable_grad():
            value = value.detach().requires_grad_()
            leaves = tuple(a.detach().requires_grad_(w) for a, w in zip(args, wanted, strict=True))
            return Recorded(value, leaves, residual(value, *leaves))

    def pull(self, v: Tensor) -> Tensor:
        """The cotangent of the value."""
        if not self.residual.requires_grad:  # it depends on nothing
            return torch.zeros_like(self.value)
        return gradients(self.residual, self.value, v, retain_graph=True)[0]

    def cotangents(self, v: Tensor) -> list[Tensor | None]:
        """Cotangents of the arguments, None where none is wanted or the residual does not depend on it."""
        if not self.residual.requires_grad:
            return [None] * len(self.args)
        wanted = [a for a in self.args if a.requires_grad]
        found = iter(torch.autograd.grad(self.residual, wanted, v, allow_unused=True) if wanted else ())
        return [next(found) if a.requires_grad else None for a in self.args]


@dataclass(frozen=True, eq=False)
class ResidualSystem(LinearSystem):
    """``A = dF/dvalue`` at ``params = (value, *args)``, acting on flattened events."""

    problem: ImplicitProblem = None  # type: ignore[assignment]
    recorded: Recorded | None = None

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
        return out.reshape((*batch, *v.shape[v.ndim - self.vector_ndim :]))

    def operator(self, params: Params, like: Tensor, transpose: bool) -> Callable[[Tensor], Tensor]:
        problem = self.problem
        if problem.jacobian_product is not None:
            return lambda v: self.apply(params, v, transpose)
        value, *args = params
        k = value.ndim - problem.value_ndim
        # an author's own solve takes whole events, others take them flattened
        value = value.expand((*like.shape[: like.ndim - self.vector_ndim], *value.shape[k:]))
        residual = lambda z: problem.residual(z, *args)  # noqa: E731
        if transpose:  # one graph, one backward pass a product
            recorded = self.recorded
            if recorded is not None and recorded.value.shape == value.shape:
                return lambda v: recorded.pull(v.reshape(value.shape)).reshape(v.shape)
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
            pull = (
                pullback(lambda z: problem.residual(z, *args), value)[1]
                if self.recorded is None
                else lambda g, recorded=self.recorded: (recorded.pull(g),)
            )
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
