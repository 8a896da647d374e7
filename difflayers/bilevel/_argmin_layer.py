"""The lower solution of a bilevel problem as a layer: a function of the upper variables, to second order and beyond."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import optree
import torch
from torch import Tensor, nn

from difflayers._checks import renamed
from difflayers._solution import Info, OnFailure, Solution, Status, check_policy, settle
from difflayers.implicit import Equality, Implicit, Inequality, Neumann, OneStep, Prox, Unrolled
from difflayers.implicit._argmin import ARGMIN
from difflayers.implicit._constraints import ConstrainedSolution, Constraint
from difflayers.implicit._iterate import IterativeSolver
from difflayers.implicit._problem import solve_inner
from difflayers.linalg._autodiff import autocast_off, gradients, opaque, transforms_active
from difflayers.linalg._captured import gradients_wanted, refuse_held, refuse_seen

from ._group import alone, announced, entering, group_of, leaving, process_group
from ._hypergradient import definite
from ._mfac import MFAC
from ._objective import REMEDY, Objective
from ._optimality import step_length, support_curvature
from ._oracles import _gradient
from ._problem import Bilevel, check_problem
from ._variables import Variables, check_devices

_LOOKS = 3  # products that a step length is guessed from: any positive one does

LayerAdjoint = Implicit | Neumann | OneStep | Unrolled | MFAC


class ArgminLayer(nn.Module):
    r"""The solution of the lower problem, as a differentiable function of the upper variables.

    Solves ``argmin_y lower(x, y, batch) + g(y, x)  subject to  y in Y(x), constraint(x, y) <= 0`` (or ``= 0``) with
    what the problem has of it. The upper function of the problem is not used: what comes behind the layer is.

    Args:
        problem: The problem. With blocks all lower problems are solved at once, each until it has converged.
        solver: A solver of :mod:`difflayers.implicit`. None: ``LBFGS()``; with a prox or a projection
            ``AcceleratedProximalGradient()`` (also ``Anderson()``, ``Picard()``, ``Newton()`` on the fixed point, which
            may end at a point that is no minimum); with constraints ``InteriorPoint()`` (with equalities alone also
            ``Newton()`` on the KKT conditions, which finds any stationary point).
        adjoint: ``Implicit(solver, damping)``, ``Neumann(terms)``, ``Unrolled(max_steps)`` or :class:`MFAC`; with a
            prox also ``OneStep()``, with constraints ``Implicit`` alone, without blocks :class:`MFAC`. None:
            ``Implicit()``. A dense solver of a smooth problem is Cholesky, which raises at a saddle; so does that of a
            KKT matrix. Damping is for smooth problems.
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
    any order, forward and reverse; with a prox wherever no coordinate is about to enter or leave the support. An
    inequality with a positive multiplier counts as an equality, any other is absent. The start carries no gradient.

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
                f"adjoint: expected Implicit, Neumann, Unrolled, MFAC or (with a prox) OneStep, got "
                f"{type(adjoint).__name__}"
            )
        smooth = problem.smooth
        if isinstance(adjoint, Implicit) and adjoint.damping and not smooth:
            raise ValueError(
                "adjoint: expected damping=0 with a prox or a constraint, where it would not be that of the Hessian, "
                f"got {adjoint.damping}"
            )
        if isinstance(adjoint, MFAC) and (not smooth or problem.blocks is not None):
            raise ValueError("adjoint: expected Implicit or Neumann with a prox, a constraint or blocks, got MFAC")
        if isinstance(adjoint, OneStep) and problem.proximal is None:
            raise ValueError("adjoint: expected Implicit, Neumann, Unrolled or MFAC without a prox, got OneStep")
        if problem.constraint is not None and not isinstance(adjoint, Implicit | None):
            raise ValueError(f"adjoint: expected Implicit with a constraint, got {type(adjoint).__name__}")
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
        group = None if self.problem.blocks is None else process_group(self.problem, x, start)
        if group is None:
            return self._solution(_Call(self.problem, x, start, batch), on_failure)
        return alone(group, x, start, lambda: self._solution(_Call(self.problem, x, start, batch, group), on_failure))

    def _solution(self, call: _Call, on_failure: OnFailure) -> Solution[Any]:
        y, z = call.y, call.start
        names = {f"args[{i}]": name for i, name in enumerate(call.names)}
        args = tuple(call.args)
        options: dict[str, Any] = {
            "event_ndim": 1, "arg_ndims": None, "adjoint": self.adjoint, "on_failure": on_failure
        }  # fmt: skip
        with renamed(**names):
            if self.problem.smooth:
                if isinstance(self.adjoint, Implicit):
                    options["adjoint"] = definite(self.adjoint, z.shape[-1])
            else:
                options["constraint"] = call.constraint()
            kind = replace(ARGMIN, name="ArgminLayer", argument="lower")
            solution = solve_inner(kind, call.lower, z, args, solver=self.solver, **options)
            if self.problem.proximal is not None and not transforms_active():
                solution = call.checked(solution, on_failure)
        z = solution.value if call.group is None else leaving(call.group.handle, [solution.value])[0]
        if isinstance(solution, ConstrainedSolution):
            return replace(solution, value=y.present(z))
        return Solution(y.present(z), solution.status, solution.steps, solution.residual)


class _Call:
    """One call of the layer: functions of the flat unknown and of the tensors that carry gradients.

    Args:
        problem: The problem.
        x: Upper variables.
        start: Where the solve starts.
        batch: The batch of the lower objective.
        alone: None, or a process group whose processes solve their own blocks, without a message.
    """

    def __init__(self, problem: Bilevel, x: Any, start: Any, batch: Any, alone: Any = None) -> None:
        self.problem = problem
        with announced(problem, x, start) if alone is None else contextlib.nullcontext():
            self.x, self.y = Variables("x", x), Variables("init", start, problem.blocks)
            leaves, self.batch_spec = optree.tree_flatten(batch, none_is_leaf=True)
            self.batch_leaves = leaves
            self.places = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point()]
            self.group = group_of(problem, self.x, self.y) if alone is None else None
            if alone is None:
                of_x = self.x.leaves if self.group is None else entering(self.group.handle, self.x.leaves)
            else:
                of_x = leaving(alone, entering(alone, self.x.leaves))
            self.args = [*of_x, *(leaves[i] for i in self.places)]
            self.names = [*self.x.labels, *(f"batch, leaf {i}" for i in self.places)]
            starts = zip(self.y.labels, self.y.leaves, strict=True)
            check_devices([*starts, *zip(self.names, self.args, strict=True)])
        for i in self.places:
            leaves[i] = None  # the graph keeps what it needs of them
        self.objective = Objective(problem.lower, "lower", self.x, self.y, group=self.group)
        constants = [a.detach() for a in self.args]
        k = len(self.x.leaves)
        self.objective.refuse_captured(self.batch(constants[k:]))
        if problem.constraint is not None:
            self.h = Objective(problem.constraint, "constraint", self.x, self.y, scalar=False, group=self.group)
            self.h.refuse_captured()
        # the first evaluation of all draws the random numbers that every other one repeats
        with torch.no_grad(), autocast_off(self.args[0]):
            at = self.y.constants(False)
            if self.objective.draws is None or self.group is not None:  # processes call equally often
                self.objective(constants[:k], at, self.batch(constants[k:]))
            if problem.constraint is not None:
                self.h(constants[:k], at)
        self.start = self.y.join(self.y.constants(False))
        self.constants: list[Tensor] = []
        if problem.proximal is not None:
            self._look_at_prox(constants)
            self.constants = constants  # until the solution was looked at
        self.x.leaves, self.y.leaves = [], []

    def _look_at_prox(self, constants: Sequence[Tensor]) -> None:
        """Refuses a prox that takes a differentiated tensor from its surroundings, and blocks that it cannot serve."""
        name = self.prox_name
        if len({len(shape) for shape in self.y.shapes}) > 1 and self.problem.prox_lower and self.y.blocks is not None:
            raise ValueError(
                "prox_lower: expected tensors of y with as many dimensions as each other next to blocks, whose step "
                f"lengths differ, got shapes {[(self.y.blocks, *shape) for shape in self.y.shapes]}"
            )
        if not gradients_wanted():
            return
        refuse_held(getattr(self.problem, name), name, REMEDY)
        if transforms_active():  # inside of transforms the engine looks
            return
        with torch.enable_grad(), autocast_off(self.start):
            one = torch.ones_like(self.start[..., 0])
            refuse_seen([self.prox(self.start, one, *constants)], name, REMEDY)

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

    def constraint(self) -> Constraint:
        """What the engine is to keep the solution in."""
        if self.problem.proximal is not None:
            return Prox(self.prox)
        return Equality(self.conditions) if self.problem.equality else Inequality(self.conditions)

    def checked(self, solution: Solution[Any], on_failure: OnFailure) -> Solution[Any]:
        """The solution with a status where f + g was seen to bend downwards: a fixed point of the step, no minimum."""
        z, args, self.constants = solution.value.detach().requires_grad_(), self.constants, []
        with torch.enable_grad(), autocast_off(z):
            (slope,) = _gradient(self.lower(z, *args), [z], create_graph=True)

        def product(v: Tensor) -> Tensor:
            return _gradient_of(slope, z, v)

        with torch.no_grad(), autocast_off(z):
            step = step_length(product, z.detach(), _LOOKS)
            point, one = (z - step * slope).detach(), torch.ones_like(z[..., 0])
            bent = support_curvature(product, lambda v: self.prox(v, step * one, *args), point, step).negative()
        if bent is None:
            return solution
        bent = bent & (solution.status == Status.CONVERGED)
        status = torch.where(bent, int(Status.SINGULAR), solution.status)
        info = Info(status, solution.steps, solution.residual)
        only = info._replace(status=torch.where(bent, status, int(Status.CONVERGED)))  # the rest has had its warning
        value = settle(solution.value, only, on_failure, name="ArgminLayer", present=self.y.present)
        return Solution(value, *info)

    def conditions(self, z: Tensor, *args: Tensor) -> Tensor:
        """The constraint."""
        return self.h(args[: len(self.x.shapes)], self.y.split(z))

    @property
    def prox_name(self) -> str:
        """What messages call the prox."""
        return "prox_lower" if self.problem.project_lower is None else "project_lower"

    def prox(self, z: Tensor, step: Tensor, *args: Tensor) -> Tensor:
        """The prox of g, or the projection."""
        assert self.problem.proximal is not None
        x, rows = self.x.tree(args[: len(self.x.shapes)]), None if self.y.blocks is None else len(z)
        if rows is not None:
            step = step.reshape(step.shape + (1,) * len(self.y.shapes[0]))
        return self.y.returned(self.prox_name, self.problem.proximal(self.y.present(z), x, step), rows)


def _gradient_of(slope: Tensor, z: Tensor, v: Tensor) -> Tensor:
    """The Hessian times a vector."""
    if not slope.requires_grad:
        return torch.zeros_like(v)
    return gradients(slope, z, v, retain_graph=True)[0]
