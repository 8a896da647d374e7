"""From a user's function to a problem the engine can solve: pytrees, batch dimensions, checks.

Inside, every unknown is one tensor ``(*batch, n)`` and the arguments are a flat tuple of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from difflayers._checks import broadcast_batch, check_same, check_shape, check_tensor, compute_dtype
from difflayers._solution import Info, OnFailure, Solution, check_policy
from difflayers.linalg._autodiff import autocasting, forward_mode, opaque, transforms_active
from difflayers.linalg._captured import Seen, gradients_wanted, refuse_coupling, refuse_held, refuse_probed, refuse_seen

from ._adjoints import Adjoint, OneStep, Unrolled
from ._engine import SolutionMap, Task
from ._implicit_problem import ImplicitProblem
from ._iterate import Function, IterativeSolver
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
    """

    name: str
    argument: str
    residual: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
    adapt: dict[str, Callable[[Function], Function]]
    scalar: bool = False
    like_unknown: bool = True
    symmetric: bool = False
    one_step: bool = False


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
            at = lambda z: function(z, *args)  # noqa: E731
            init, watched = init.detach().clone(), at  # a solve that ends where it starts returns no alias
            if check_capture:
                watched = _watch_first(at, kind.argument, args)
                if not kind.like_unknown:  # the solver sees derivatives of it, where nothing could be told
                    watched(init)
                    watched = at
            value, info = solver.solve(kind.adapt[solver.finds](watched), init)
            looked = options.get("check_coupling") and refuse_coupling(at, value, "event_ndim", kind.argument)
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
            vmap(self.function, in_dims=(0, *in_dims)),
            self.solver,
            self.curvature,
            self.user_function,
            self.check_capture,
            arg_ndims=None,
            adjoint=self.adjoint,
            arg_names=self.arg_names,
            check_coupling=self.check_coupling,
        )


def same(function: Function) -> Function:
    """For solvers that work on the function as it is."""
    return function


def _watch_first(function: Function, argument: str, args: Sequence[Tensor]) -> Function:
    """`function`, first evaluated under grad mode on constants: a result with a gradient captured something.

    What it is given must be left alone, too: the solver still needs the iterate, and the caller the arguments.
    """
    fresh = True

    def watched(z: Tensor) -> Tensor:
        nonlocal fresh
        if not fresh:
            return function(z)
        fresh = False
        versions = [t._version for t in (z, *args)]
        with torch.enable_grad(), forward_mode():
            out = function(z)
            refuse_seen([out], argument)
        if versions != [t._version for t in (z, *args)]:
            raise ValueError(
                f"{argument}: expected a function that leaves its arguments alone, got one that writes into them"
            )
        return out.detach()

    return watched


class Unknown:
    """The unknown's pytree and its flat form ``(*batch, n)``."""

    def __init__(self, tree: Any, event_ndim: int) -> None:
        leaves, self.spec = optree.tree_flatten(tree)
        if not leaves:
            raise ValueError("init: expected a tensor or a pytree of tensors, got an empty tree")
        if event_ndim < 0:
            raise ValueError(f"event_ndim: expected at least 0, got {event_ndim}")
        names = ["init"] if len(leaves) == 1 and self.spec.is_leaf() else _leaf_names(tree, "init")
        for name, leaf in zip(names, leaves, strict=True):
            check_tensor(name, leaf, min_ndim=event_ndim)
        check_same(zip(names, leaves, strict=True))
        self.leaves: list[Tensor] = leaves
        self.dtype = leaves[0].dtype
        self.event_ndim = event_ndim
        self.events = [leaf.shape[leaf.ndim - event_ndim :] for leaf in leaves]
        self.sizes = [event.numel() for event in self.events]
        self.batch = broadcast_batch(
            (name, tuple(leaf.shape[: leaf.ndim - event_ndim])) for name, leaf in zip(names, leaves, strict=True)
        )
        self.plain = self.spec.is_leaf() and event_ndim == 1

    def start(self, batch: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The given values as the solver's start."""
        leaves = [
            leaf.detach().to(dtype).expand((*batch, *e)) for leaf, e in zip(self.leaves, self.events, strict=True)
        ]
        return leaves[0] if self.plain else self.join(leaves, batch)

    def forget(self) -> None:
        """Lets go of the values: the graph keeps what it needs of them itself."""
        self.leaves = []

    def join(self, leaves: Sequence[Tensor], batch: tuple[int, ...]) -> Tensor:
        """Leaves to one vector per element."""
        flat = [leaf.reshape((*batch, size)) for leaf, size in zip(leaves, self.sizes, strict=True)]
        return flat[0] if len(flat) == 1 else torch.cat(flat, -1)

    def split(self, z: Tensor) -> Any:
        """One vector per element back to the user's tree."""
        if self.plain:
            return z
        parts = [z] if len(self.sizes) == 1 else z.split(self.sizes, -1)
        batch = z.shape[:-1]
        return self.spec.unflatten([p.reshape((*batch, *e)) for p, e in zip(parts, self.events, strict=True)])

    def check_output(self, out: Any, z: Tensor, argument: str) -> Tensor:
        """The function's output as one vector per element, or a ``ValueError`` that says what differs."""
        if self.plain and isinstance(out, Tensor):
            if out.shape != z.shape:
                check_shape(f"{argument} output", out.shape, z.shape, " as the unknown has")
            leaves = [out]
        else:
            leaves, spec = optree.tree_flatten(out)
            if spec != self.spec:
                raise ValueError(f"{argument} output: expected the structure of `init`, {self.spec}, got {spec}")
            for leaf, event in zip(leaves, self.events, strict=True):
                _check_output_tensor(leaf, argument)
                check_shape(f"{argument} output", leaf.shape, (*z.shape[:-1], *event), " as the unknown has")
        _check_output_dtype(leaves[0], z, argument)
        return leaves[0] if self.plain else self.join(leaves, z.shape[:-1])


def _check_output_tensor(out: Any, argument: str) -> None:
    if not isinstance(out, Tensor):
        raise ValueError(f"{argument} output: expected a tensor, got {type(out).__name__}")


def _check_output_dtype(out: Tensor, z: Tensor, argument: str) -> None:
    if out.dtype != z.dtype or out.device != z.device:
        raise ValueError(
            f"{argument} output: expected {z.dtype} on {z.device} as the unknown is, got {out.dtype} on {out.device}"
        )


def _leaf_names(tree: Any, prefix: str) -> list[str]:
    return [
        prefix + "".join(f"[{key!r}]" if isinstance(key, int | str) else f".{key}" for key in path)
        for path in optree.tree_paths(tree)
    ]


class Arguments:
    """The argument pytree and its flat tuple of tensors; Python numbers stay where they are."""

    def __init__(self, args: Any, arg_ndims: Any) -> None:
        if isinstance(args, Tensor) or not isinstance(args, tuple | list):
            raise ValueError(f"args: expected a tuple of arguments, got {type(args).__name__}")
        tree: Any = tuple(args)
        leaves, self.spec = optree.tree_flatten(tree)
        self.flat = flat = all(isinstance(a, Tensor) for a in tree)  # the common case needs no walk along paths
        names = [f"args[{i}]" for i in range(len(tree))] if flat else _leaf_names(tree, "args")
        self.leaves = leaves
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.names = tuple(names[i] for i in self.places)
        self.tensors: list[Tensor] = [leaves[i] for i in self.places]
        for name, leaf in zip(names, leaves, strict=True):
            if isinstance(leaf, Tensor):
                if not leaf.is_floating_point() and leaf.dtype != torch.bool:
                    raise ValueError(
                        f"{name}: expected a floating-point tensor, got {leaf.dtype} (indices may be captured: "
                        "they carry no gradient)"
                    )
            elif not isinstance(leaf, bool | int | float):
                raise ValueError(f"{name}: expected a tensor or a Python number, got {type(leaf).__name__}")
        self.ndims: tuple[int, ...] | None = None
        if arg_ndims is not None:
            try:
                prefix: Any = tuple(arg_ndims)
                spread = optree.broadcast_prefix(prefix, tree)
            except (ValueError, TypeError) as error:
                raise ValueError(f"arg_ndims: expected the structure of `args` or a prefix of it: {error}") from None
            self.ndims = tuple(spread[i] for i in self.places)
            for name, t, k in zip(self.names, self.tensors, self.ndims, strict=True):
                if t.ndim < k:
                    raise ValueError(
                        f"{name}: expected at least {k} dimensions (arg_ndims), got shape {tuple(t.shape)}"
                    )

    def batch(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and batch shapes of the arguments with declared dimensions."""
        if self.ndims is None:
            return []
        return [(n, tuple(t.shape[: t.ndim - k])) for n, t, k in zip(self.names, self.tensors, self.ndims, strict=True)]

    def forget(self) -> None:
        """Lets go of the tensors: the graph keeps what it needs of them itself."""
        self.tensors = []
        for i in self.places:
            self.leaves[i] = None

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The user's tree with these tensors in it."""
        if self.flat:
            return tensors
        leaves = list(self.leaves)
        for i, t in zip(self.places, tensors, strict=True):
            leaves[i] = t
        return self.spec.unflatten(leaves)


@opaque
def solve_inner(
    kind: Kind,
    function: Callable[..., Any],
    init: Any,
    args: Any,
    *,
    event_ndim: int,
    arg_ndims: Any,
    solver: IterativeSolver,
    adjoint: Adjoint,
    on_failure: OnFailure,
    curvature: Any = None,
) -> Solution[Any]:
    """Checks what came in, builds the problem, solves it, and gives the user's structure back."""
    check_policy(on_failure)
    if not callable(function):
        raise ValueError(f"{kind.argument}: expected a callable, got {type(function).__name__}")
    if solver.finds not in kind.adapt:
        raise ValueError(f"solver: expected one that finds a {' or '.join(kind.adapt)}, got {type(solver).__name__}")
    if isinstance(adjoint, OneStep) and not kind.one_step:
        raise ValueError(f"adjoint: expected Implicit, Neumann or Unrolled for {kind.name}, got OneStep()")
    if isinstance(adjoint, Unrolled) and not solver.differentiable:
        raise ValueError(f"adjoint: expected Implicit or Neumann for {type(solver).__name__}, got Unrolled")
    unknown, arguments = Unknown(init, event_ndim), Arguments(args, arg_ndims)
    lift = autocasting(unknown.leaves[0])  # activations are halved there, weights are not
    same_dtype = [("init", unknown.leaves[0]), *zip(arguments.names, arguments.tensors, strict=True)]
    check_same((n, t.to(compute_dtype(t.dtype)) if lift else t) for n, t in same_dtype)
    check_capture = gradients_wanted()
    if check_capture:
        refuse_held(function, kind.argument)
    batch = broadcast_batch([("init", unknown.batch), *arguments.batch()])
    dtype = compute_dtype(unknown.dtype)
    tensors = [t.to(dtype) if t.is_floating_point() else t for t in arguments.tensors]
    z = unknown.start(batch, dtype)
    unknown.forget()
    arguments.forget()
    flat = _flat_function(kind, function, unknown, arguments)
    if check_capture and transforms_active():
        refuse_probed(flat, (z, *tensors), kind.argument)
    present = lambda v: unknown.split(v.to(unknown.dtype))  # noqa: E731
    if isinstance(adjoint, Unrolled):
        solution = solve_unrolled(
            kind.name, kind.adapt[solver.finds], flat, z, tensors, solver, adjoint, on_failure, present,
            arguments.names, arguments.ndims,
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
            and not _uncoupled.knows(function, (kind.name, event_ndim)),
        )
        task = Task(problem, on_failure, present)
        solution = Solution(*SolutionMap.apply(task, z, *tensors)[:4])
    value = solution.value if dtype == unknown.dtype else solution.value.to(unknown.dtype)
    return Solution(unknown.split(value), solution.status, solution.steps, solution.residual)


def _flat_function(
    kind: Kind, function: Callable[..., Any], unknown: Unknown, arguments: Arguments
) -> Callable[..., Tensor]:
    """`function` on one vector per element and flat arguments, its output checked at every call."""

    def flat(z: Tensor, *tensors: Tensor) -> Tensor:
        out = function(unknown.split(z), *arguments.rebuild(tensors))
        if kind.like_unknown:
            return unknown.check_output(out, z, kind.argument)
        _check_output_tensor(out, kind.argument)
        _check_output_dtype(out, z, kind.argument)
        batch = z.shape[:-1]
        if kind.scalar:
            check_shape(f"{kind.argument} output", out.shape, batch, ", one number per batch element,")
            return out
        if out.shape[: len(batch)] != batch or out.ndim != len(batch) + max(unknown.event_ndim, 1):
            want = (*batch, *["m"] * max(unknown.event_ndim, 1))
            raise ValueError(f"{kind.argument} output: expected shape {want}, got {tuple(out.shape)}")
        return out.flatten(len(batch))

    return flat
