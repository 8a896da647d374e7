"""The lower solution of a bilevel problem as a layer: a function of the upper variables, to second order and beyond."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import optree
import torch
from torch import Tensor, nn

from difflayers._checks import renamed
from difflayers._solution import OnFailure, Solution, check_policy
from difflayers.implicit import LBFGS, Anderson, Implicit, Neumann, Newton, OneStep, Unrolled
from difflayers.implicit._argmin import ARGMIN
from difflayers.implicit._fixed_point import FIXED_POINT
from difflayers.implicit._iterate import IterativeSolver
from difflayers.implicit._lbfgs import gradient_of
from difflayers.implicit._problem import solve_inner
from difflayers.implicit._root_find import ROOT
from difflayers.linalg._autodiff import autocast_off, opaque, pullback

from ._hypergradient import definite
from ._mfac import MFAC
from ._objective import Objective
from ._optimality import like_y, step_length
from ._problem import Bilevel, check_problem
from ._variables import Variables, check_devices

LayerAdjoint = Implicit | Neumann | OneStep | Unrolled | MFAC


class ArgminLayer(nn.Module):
    r"""The solution of the lower problem, as a differentiable function of the upper variables.

    Solves ``argmin_y lower(x, y, batch) + g(y, x)  subject to  constraint(x, y) = 0`` with what the problem has of it.
    The upper function of the problem is not used: what comes behind the layer is.

    Args:
        problem: The problem.
        solver: A solver of :mod:`difflayers.implicit`. None: ``LBFGS()``; with a prox ``Anderson()`` on the proximal
            gradient step; with equalities ``Newton()`` on the KKT conditions (which finds any stationary point).
        adjoint: ``Implicit(solver, damping)``, ``Neumann(terms)``, ``Unrolled(max_steps)`` or :class:`MFAC`; with a
            prox also ``OneStep()``. None: ``Implicit()``. A dense solver of a smooth problem is Cholesky, which raises
            at a saddle. Damping is for smooth problems.
        init: Start of the solve: tensor, pytree of tensors, or module. Not part of the layer's state; none of its
            parameters belong to the layer.
        on_failure: ``"raise"``, ``"nan"`` or ``"ignore"``.

    Shape:
        ``layer(x, batch=None, *, init=None)``: `x` a tensor, a pytree or a module, `batch` that of `lower` alone,
        `init` instead of the layer's own (the last solution, for a warm start). The output has the structure of `init`;
        for a module it is a dict from names to tensors, for ``torch.func.functional_call``.

    Raises:
        ValueError: When called: for bad input, naming the argument; no start; a function that returns more than one
            number or takes a differentiated tensor from its surroundings.
        SolveError: Where the lower problem was not solved, or in backward where its Hessian (KKT matrix) is singular.

    Differentiable in every tensor of `x` (the parameters of a module) and every floating-point tensor of `batch`, to
    any order, forward and reverse; with a prox wherever no coordinate is about to enter or leave the support. The start
    carries no gradient.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import ArgminLayer, Bilevel
        >>> a = torch.tensor([1.0, 3.0], dtype=torch.float64)
        >>> ridge = Bilevel(
        ...     upper=lambda x, y, batch: y.sum(),
        ...     lower=lambda x, y, batch: ((y - a).square() + x * y.square()).sum(),
        ... )
        >>> x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> y = ArgminLayer(ridge)(x, init=torch.zeros(2, dtype=torch.float64))
        >>> torch.autograd.grad(y.sum(), x)  # - a / (1 + x)^2
        (tensor([-0.2500, -0.7500], dtype=torch.float64),)

    Source: S. Gould et al., On differentiating parameterized argmin and argmax problems with application to bi-level
    optimization, 2016; with a prox: Q. Bertrand et al., Implicit differentiation for fast hyperparameter selection in
    non-smooth convex learning, 2022.
    """

    def __init__(
        self,
        problem: Bilevel,
        *,
        solver: IterativeSolver | None = None,
        adjoint: LayerAdjoint | None = None,
        init: Any = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        check_policy(on_failure)
        self.problem = check_problem(problem)
        if adjoint is not None and not isinstance(adjoint, Implicit | Neumann | OneStep | Unrolled | MFAC):
            raise ValueError(
                f"adjoint: expected Implicit, Neumann, OneStep, Unrolled or MFAC, got {type(adjoint).__name__}"
            )
        smooth = problem.prox_lower is None and problem.constraint is None
        if isinstance(adjoint, Implicit) and adjoint.damping and not smooth:
            raise ValueError(
                "adjoint: expected damping=0 with a prox or a constraint, where it would not be that of the Hessian, "
                f"got {adjoint.damping}"
            )
        if isinstance(adjoint, MFAC) and not smooth:
            raise ValueError("adjoint: expected Implicit or Neumann with a prox or a constraint, got MFAC")
        self.solver = solver
        self.adjoint: LayerAdjoint = Implicit() if adjoint is None else adjoint
        self.on_failure: OnFailure = on_failure
        self._start = (init,)  # in a tuple: a module in it is no submodule

    def extra_repr(self) -> str:
        """The options that differ from one layer to another."""
        return f"solver={self.solver}, adjoint={self.adjoint}, on_failure={self.on_failure!r}"

    def forward(self, x: Any, batch: Any = None, *, init: Any = None) -> Any:
        """The lower solution at `x`."""
        return self._solve(x, batch, init, self.on_failure).value

    def forward_ex(self, x: Any, batch: Any = None, *, init: Any = None) -> Solution[Any]:
        """As calling the layer, returning an unchecked :class:`~difflayers.Solution`."""
        return self._solve(x, batch, init, "ignore")

    @opaque
    def _solve(self, x: Any, batch: Any, init: Any, on_failure: OnFailure) -> Solution[Any]:
        start = self._start[0] if init is None else init
        if start is None:
            raise ValueError("init: expected a tensor, a pytree of tensors or a module to start from, got None")
        call = _Call(self.problem, x, start, batch)
        y, z = call.y, call.start
        names = {f"args[{i}]": name for i, name in enumerate(call.names)}
        args = tuple(call.args)
        options: dict[str, Any] = {
            "event_ndim": 1, "arg_ndims": None, "adjoint": self.adjoint, "on_failure": on_failure
        }  # fmt: skip
        with renamed(**names):
            if self.problem.prox_lower is not None:
                kind, solver = FIXED_POINT, self.solver or Anderson(max_steps=1000)
                args = (*args, call.step(z))
                function: Callable[..., Tensor] = call.proximal_step
            elif self.problem.constraint is not None:
                kind, solver = ROOT, self.solver or Newton()
                z = torch.cat([z, z.new_zeros(call.equalities)])
                function = call.conditions
            else:
                kind, solver = ARGMIN, self.solver or LBFGS()
                if isinstance(self.adjoint, Implicit):
                    options["adjoint"] = definite(self.adjoint, z.numel())
                function = call.lower
            kind = replace(kind, name="ArgminLayer", argument="lower")
            solution = solve_inner(kind, function, z, args, solver=solver, **options)
        value = y.present(solution.value[..., : y.size])
        return Solution(value, solution.status, solution.steps, solution.residual)


class _Call:
    """One call of the layer: functions of the flat unknown and of the tensors that carry gradients."""

    def __init__(self, problem: Bilevel, x: Any, start: Any, batch: Any) -> None:
        self.problem = problem
        self.x, self.y = Variables("x", x), Variables("init", start)
        leaves, self.batch_spec = optree.tree_flatten(batch, none_is_leaf=True)
        self.batch_leaves = leaves
        self.places = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point()]
        self.args = [*self.x.leaves, *(leaves[i] for i in self.places)]
        self.names = [*self.x.labels, *(f"batch, leaf {i}" for i in self.places)]
        starts = zip(self.y.labels, self.y.leaves, strict=True)
        check_devices([*starts, *zip(self.names, self.args, strict=True)])
        for i in self.places:
            leaves[i] = None  # the graph keeps what it needs of them
        self.objective = Objective(problem.lower, "lower", self.x, self.y)
        constants = [a.detach() for a in self.args]
        k = len(self.x.leaves)
        self.objective.refuse_captured(self.batch(constants[k:]))
        # the first evaluation of all draws the random numbers that every other one repeats
        with torch.no_grad(), autocast_off(self.args[0]):
            at = self.y.constants(False)
            if self.objective.draws is None:
                self.objective(constants[:k], at, self.batch(constants[k:]))
            self.equalities = 0
            if problem.constraint is not None:
                self.h = Objective(problem.constraint, "constraint", self.x, self.y, scalar=False)
                self.h.refuse_captured()
                self.equalities = self.h(constants[:k], at).numel()
        self.start = self.y.join(self.y.constants(False))
        self.x.leaves, self.y.leaves = [], []

    def batch(self, tensors: Sequence[Tensor]) -> Any:
        """The batch with these tensors in it."""
        leaves = list(self.batch_leaves)
        for i, t in zip(self.places, tensors, strict=True):
            leaves[i] = t
        return self.batch_spec.unflatten(leaves)

    def lower(self, z: Tensor, *args: Tensor) -> Tensor:
        """The lower objective."""
        k = len(self.x.shapes)
        return self.objective(args[:k], self.y.split(z), self.batch(args[k:]))

    def conditions(self, z: Tensor, *args: Tensor) -> Tensor:
        """Gradient of the Lagrangian, and the constraint."""
        k, n = len(self.x.shapes), self.y.size
        y, nu = z[:n], z[n:]

        def lagrangian(y: Tensor) -> Tensor:
            return self.lower(y, *args) + (nu * self.h(args[:k], self.y.split(y)).reshape(-1)).sum()

        slope = _gradient_at(lagrangian, y, args)
        return torch.cat([slope, self.h(args[:k], self.y.split(y)).reshape(-1)])

    def proximal_step(self, z: Tensor, *args: Tensor) -> Tensor:
        """One step of proximal gradient descent; the step length is the last argument."""
        assert self.problem.prox_lower is not None
        *args_, step = args
        slope = _gradient_at(lambda z: self.lower(z, *args_), z, args)
        x = self.x.tree(args[: len(self.x.shapes)])
        return like_y("prox_lower", self.y, self.problem.prox_lower(self.y.present(z - step * slope), x, step))

    def step(self, z: Tensor) -> Tensor:
        """A step length that suits the curvature at the start."""
        with torch.no_grad(), autocast_off(z):
            args = [a.detach() for a in self.args]
            _, pull = pullback(gradient_of(lambda z: self.lower(z, *args)), z)
            return step_length(lambda v: pull(v)[0].detach(), z).detach()


def _gradient_at(function: Callable[[Tensor], Tensor], z: Tensor, args: Sequence[Tensor]) -> Tensor:
    """The gradient in `z`, recorded only where a derivative of it can be asked for: else it would look captured."""
    value, pull = pullback(function, z, record=torch.is_grad_enabled() and any(t.requires_grad for t in (z, *args)))
    return pull(torch.ones_like(value))[0]
