"""From a user's function to a problem the engine can solve: pytrees, batch dimensions, checks.

Inside, every unknown is one tensor ``(*batch, n)`` and the arguments are a flat tuple of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from difflayers._checks import broadcast_batch, check_same, check_shape, compute_dtype
from difflayers._solution import Info, OnFailure, Solution, check_policy
from difflayers.linalg import Cholesky
from difflayers.linalg._autodiff import autocasting, forward_mode, opaque, transforms_active
from difflayers.linalg._captured import Seen, gradients_wanted, refuse_coupling, refuse_held, refuse_probed, refuse_seen

from ._accelerated_proximal_gradient import AcceleratedProximalGradient
from ._adjoints import Adjoint, Implicit, OneStep, Unrolled
from ._arguments import Arguments, Unknown, check_output_dtype, check_output_tensor
from ._composite import Composite, composite_kind
from ._constraints import (
    ConstrainedSolution,
    Layout,
    Projection,
    Prox,
    flat_map,
    join_conditions,
    refuse_capturing,
    split_constraint,
)
from ._engine import SolutionMap, Task
from ._implicit_problem import ImplicitProblem
from ._interior_point import InteriorPoint
from ._iterate import Function, IterativeSolver
from ._kkt import KKTFactorisation, kkt_kind
from ._unrolled import solve_unrolled

_uncoupled = Seen()


@dataclass(frozen=True)
class Kind:
    """What a family of inner problems means.

    Attributes:
        name: The public function.
        argument: Name of its function argument.
        residual: Turns ``function(z, *args)`` into the optimality residual.
        adapt: For every ``solver.finds`` that fits, turns ``function(z)`` into what that solver works on.
        scalar: The function returns one number per element.
        like_unknown: The function returns the structure of the unknown.
        symmetric: The Jacobian of the residual is symmetric.
        one_step: The residual is ``z - T(z)``, so that the identity may stand for its Jacobian.
        run: ``(solver, adapt, function(z), init) -> (value, info)``, where the value is more than the unknown.
        default: The solver where none is given.
    """

    name: str
    argument: str
    residual: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
    adapt: dict[str, Callable[[Function], Function]]
    scalar: bool = False
    like_unknown: bool = True
    symmetric: bool = False
    one_step: bool = False
    run: Callable[..., tuple[Tensor, Info]] | None = None
    default: IterativeSolver | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class InnerProblem(ImplicitProblem):
    """A problem given by a user's function, which can be vmapped where its arguments have no declared dimensions."""

    kind: Kind
    function: Callable[..., Tensor]
    solver: IterativeSolver
    curvature: Callable[..., Any] | None = None
    user_function: Any = None
    check_capture: bool = True
    check_coupling: bool = False

    @staticmethod
    def make(
        kind: Kind,
        function: Callable[..., Tensor],
        solver: IterativeSolver,
        curvature: Any,
        user_function: Any,
        check_capture: bool,
        **options: Any,
    ) -> InnerProblem:
        """The problem of `function`: its residual, its solve, its approximate curvature if any."""

        def solve(init: Tensor, *args: Tensor) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
            args = tuple(a.detach() for a in args)
            at = bind(function, args)
            init, watched = init.detach().clone(), at  # a solve that ends where it starts returns no alias
            if check_capture and init.numel():
                watched = _watch_first(at, kind.argument, args)
                if not kind.like_unknown:  # the solver sees derivatives of it, where nothing could be told
                    watched(init)
                    watched = at
                if isinstance(at, Composite):
                    _watch_first(at.prox, "constraint", args)(init, torch.ones_like(init[..., 0]))
            adapt = kind.adapt[solver.finds]
            if kind.run is None:
                value, info = solver.solve(adapt(watched), init)
            else:
                value, info = kind.run(solver, adapt, watched, init)
            found = value[..., : init.shape[-1]]
            looked = (
                options.get("check_coupling")
                and found.numel() > 0
                and refuse_coupling(at, found, "event_ndim", kind.argument)
            )
            if looked and isinstance(at, Composite):
                one = torch.ones_like(found[..., 0])
                refuse_coupling(lambda z: at.prox(z, one), found, "event_ndim", "constraint")
            if looked:
                _uncoupled.remember(*user_function)
            return value, info, ()

        return InnerProblem(
            kind=kind,
            function=function,
            solver=solver,
            curvature=curvature,
            user_function=user_function,
            check_capture=check_capture,
            solve=solve,
            residual=kind.residual(function),
            value_ndim=1,
            # a root of the gradient may be a saddle, where the Hessian is not definite
            symmetric=kind.symmetric and solver.finds != "root",
            jacobian_product=None if curvature is None else curvature(function),
            name=kind.name,
            **options,
        )

    def lift(self, in_dims: tuple[int | None, ...]) -> InnerProblem:
        return InnerProblem.make(
            self.kind,
            lift(self.function, in_dims),
            self.solver,
            self.curvature,
            self.user_function,
            self.check_capture,
            arg_ndims=None,
            adjoint=self.adjoint,
            arg_names=self.arg_names,
            check_coupling=self.check_coupling,
        )


def bind(function: Any, tensors: Sequence[Tensor]) -> Any:
    """`function` at given arguments."""
    return function.bind(tensors) if isinstance(function, Composite) else lambda z: function(z, *tensors)


def lift(function: Any, in_dims: tuple[int | None, ...]) -> Any:
    """`function` under one more ``vmap``."""
    return function.lift(in_dims) if isinstance(function, Composite) else vmap(function, in_dims=(0, *in_dims))


def same(function: Function) -> Function:
    """For solvers that work on the function as it is."""
    return function


def _watch_first(function: Callable[..., Tensor], argument: str, args: Sequence[Tensor]) -> Callable[..., Tensor]:
    """`function`, first evaluated under grad mode on constants: a result with a gradient captured something.

    What it is given must be left alone, too: the solver still needs the iterate, and the caller the arguments.
    """
    fresh = True

    def watched(*inputs: Tensor) -> Tensor:
        nonlocal fresh
        if not fresh:
            return function(*inputs)
        fresh = False
        counted = [t for t in (*inputs, *args) if not t.is_inference()]
        versions = [t._version for t in counted]
        with torch.enable_grad(), forward_mode():
            out = function(*inputs)
            refuse_seen([out], argument)
        if versions != [t._version for t in counted]:
            raise ValueError(
                f"{argument}: expected a function that leaves its arguments alone, got one that writes into them"
            )
        return out.detach()

    return watched


@opaque
def solve_inner(
    kind: Kind,
    function: Callable[..., Any],
    init: Any,
    args: Any,
    *,
    event_ndim: int,
    arg_ndims: Any,
    solver: IterativeSolver | None,
    adjoint: Adjoint,
    on_failure: OnFailure,
    curvature: Any = None,
    constraint: Any = None,
) -> Solution[Any]:
    """Checks what came in, builds the problem, solves it, and gives the user's structure back."""
    check_policy(on_failure)
    if not callable(function):
        raise ValueError(f"{kind.argument}: expected a callable, got {type(function).__name__}")
    unknown, arguments = Unknown(init, event_ndim), Arguments(args, arg_ndims)
    lifted = autocasting(unknown.leaves[0])  # activations are halved there, weights are not
    same_dtype = [("init", unknown.leaves[0]), *zip(arguments.names, arguments.tensors, strict=True)]
    check_same((n, t.to(compute_dtype(t.dtype)) if lifted else t) for n, t in same_dtype)
    check_capture = gradients_wanted()
    if check_capture:
        refuse_held(function, kind.argument)
    batch = broadcast_batch([("init", unknown.batch), *arguments.batch()])
    dtype = compute_dtype(unknown.dtype)
    tensors = [t.to(dtype) if t.is_floating_point() else t for t in arguments.tensors]
    z = unknown.start(batch, dtype)
    n = z.shape[-1]
    unknown.forget()
    arguments.forget()
    flat: Any = _flat_function(kind, function, unknown, arguments)
    if check_capture and transforms_active():
        refuse_probed(flat, (z, *tensors), kind.argument)
    layout = None
    if constraint is not None:
        kind, flat, layout = _constrained(kind, flat, constraint, unknown, arguments, z, tensors, check_capture)
    solver = solver or kind.default
    if solver is None or solver.finds not in kind.adapt:
        raise ValueError(f"solver: expected one that finds a {' or '.join(kind.adapt)}, got {type(solver).__name__}")
    adjoint = _checked_adjoint(kind, adjoint, solver, layout)
    present = lambda v: unknown.split(v[..., :n].to(unknown.dtype))  # noqa: E731
    if isinstance(adjoint, Unrolled):
        solution = solve_unrolled(
            kind.name, kind.adapt[solver.finds], lambda tensors: bind(flat, tensors), z, tensors, solver, adjoint,
            on_failure, present, arguments.names, arguments.ndims,
        )  # fmt: skip
    else:
        problem = InnerProblem.make(
            kind,
            flat,
            solver,
            curvature,
            (function, (kind.name, event_ndim)),
            check_capture,
            arg_ndims=arguments.ndims,
            adjoint=adjoint,
            arg_names=arguments.names,
            check_coupling=torch.Size(batch).numel() > 1
            and not z.is_meta
            and not torch.compiler.is_compiling()  # torch.export: there are no numbers to look at
            and (constraint is not None or not _uncoupled.knows(function, (kind.name, event_ndim))),
        )
        task = Task(problem, on_failure, present)
        solution = Solution(*SolutionMap.apply(task, z, *tensors)[:4])
    value = solution.value if solution.value.shape[-1] == n else solution.value[..., :n]
    value = value if dtype == unknown.dtype else value.to(unknown.dtype)
    report = (solution.status, solution.steps, solution.residual)
    if layout is None:
        return Solution(unknown.split(value), *report)
    return ConstrainedSolution(unknown.split(value), *report, layout.multipliers(solution.value, unknown.dtype))


def _constrained(
    kind: Kind,
    flat: Callable[..., Tensor],
    constraint: Any,
    unknown: Unknown,
    arguments: Arguments,
    z: Tensor,
    tensors: Sequence[Tensor],
    check_capture: bool,
) -> tuple[Kind, Any, Layout | None]:
    """The problem under a constraint: its kind, its flat functions, and where multipliers lie if there are any."""
    (first, *_) = split_constraint(constraint)
    if isinstance(first, Projection | Prox):
        composite = Composite(flat, flat_map(first, unknown, arguments))
        if check_capture:
            refuse_capturing(constraint, [(composite.prox, (z, torch.ones_like(z[..., 0]), *tensors))])
        return composite_kind(kind, AcceleratedProximalGradient()), composite, None
    if check_capture:
        refuse_capturing(constraint, [])
    parts, layout = join_conditions(flat, constraint, unknown, arguments, z, tensors)
    if check_capture:
        refuse_capturing(constraint, [(parts, (z, *tensors))])
    return kkt_kind(kind, layout, InteriorPoint()), parts, layout


def _checked_adjoint(kind: Kind, adjoint: Adjoint, solver: IterativeSolver, layout: Layout | None) -> Adjoint:
    """The adjoint, or a ``ValueError`` where it does not fit."""
    if layout is not None:
        if not isinstance(adjoint, Implicit) or adjoint.damping:
            got = f"damping={adjoint.damping}" if isinstance(adjoint, Implicit) else type(adjoint).__name__
            raise ValueError(
                "adjoint: expected Implicit without damping under an equality or inequality (the KKT matrix is not "
                f"definite), got {got}"
            )
        return adjoint if adjoint.linear_solver is not None else Implicit(KKTFactorisation(layout.n, layout.p))
    if isinstance(adjoint, Implicit) and isinstance(adjoint.linear_solver, Cholesky) and not kind.symmetric:
        raise ValueError(
            f"adjoint: expected a linear solver for maps that are not symmetric for {kind.name}, such as LU() or "
            "GMRES(), got Cholesky(), which reads one triangle of the Jacobian"
        )
    if isinstance(adjoint, OneStep) and not kind.one_step:
        raise ValueError(f"adjoint: expected Implicit, Neumann or Unrolled for {kind.name}, got OneStep()")
    if isinstance(adjoint, Unrolled) and not solver.differentiable:
        raise ValueError(f"adjoint: expected Implicit or Neumann for {type(solver).__name__}, got Unrolled")
    return adjoint


def _flat_function(
    kind: Kind, function: Callable[..., Any], unknown: Unknown, arguments: Arguments
) -> Callable[..., Tensor]:
    """`function` on one vector per element and flat arguments, its output checked at every call."""

    def flat(z: Tensor, *tensors: Tensor) -> Tensor:
        out = function(unknown.split(z), *arguments.rebuild(tensors))
        if kind.like_unknown:
            return unknown.check_output(out, z, kind.argument)
        check_output_tensor(out, kind.argument)
        check_output_dtype(out, z, kind.argument)
        batch = z.shape[:-1]
        if kind.scalar:
            check_shape(f"{kind.argument} output", out.shape, batch, ", one number per batch element")
            return out
        if out.shape[: len(batch)] != batch or out.ndim != len(batch) + max(unknown.event_ndim, 1):
            want = (*batch, *["m"] * max(unknown.event_ndim, 1))
            raise ValueError(f"{kind.argument} output: expected shape {want}, got {tuple(out.shape)}")
        return out.flatten(len(batch))

    return flat
