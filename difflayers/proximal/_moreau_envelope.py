r"""The Moreau envelope of any function, and its prox by a solve where no formula is known.

.. math:: M_t f(x) = \min_z f(z) + \frac{1}{2t} \|z - x\|^2, \qquad
    \nabla_x M = \frac{x - z^*}{t}, \quad \partial_t M = -\frac{\|z^* - x\|^2}{2 t^2}, \quad
    \nabla_\theta M = \nabla_\theta f_\theta(z^*)

The first derivatives follow from the envelope theorem, without a linear solve. The second see the minimiser move:
:math:`\nabla^2 M = \nabla^2 f (I + t \nabla^2 f)^{-1}` at :math:`z^*`. H. H. Bauschke, P. L. Combettes, Convex Analysis
and Monotone Operator Theory in Hilbert Spaces, 2017, section 12.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_finite, check_same, check_shape, check_tensor, compute_dtype
from difflayers._solution import Info, OnFailure, Solution, Status, check_policy
from difflayers.implicit import LBFGS, IterativeSolver, argmin, argmin_ex, envelope
from difflayers.linalg._autodiff import autocast_off, physical
from difflayers.linalg._system import harmless

from ._operands import Number, check_range, per_element

Objective = Callable[..., Tensor]


class MoreauPoint(NamedTuple):
    """What :func:`moreau_envelope_ex` finds.

    Attributes:
        envelope: ``(*batch)`` values of the envelope.
        prox: ``(*batch, event...)`` minimisers.
    """

    envelope: Tensor
    prox: Tensor


def prox_of(
    objective: Objective,
    x: Tensor,
    t: Number = 1.0,
    args: tuple[Any, ...] = (),
    *,
    event_ndim: int = 1,
    arg_ndims: tuple[Any, ...] | None = None,
    solver: IterativeSolver = LBFGS(),
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The prox of any smooth function, by a solve.

    Solves ``argmin_z t * objective(z, *args) + 1/2 ||z - x||^2``.

    Args:
        objective: ``fn(z, *args)``, one number per batch element, twice differentiable; each batch element alone.
            Whatever needs a gradient comes in through `args`. With a kink, as in ``|z|``, the solve does not converge:
            take an operator of this module.
        x: ``(*batch, event...)``.
        t: Step, at least 0: a number or ``(*batch)``. The minimiser is unique where the objective is L-weakly convex
            and ``t < 1 / L``; beyond, it is a local one, if there is one.
        args: Pytrees of tensors and numbers.
        event_ndim: Trailing dimensions of `x` that form one point.
        arg_ndims: Trailing dimensions of each argument that belong to one batch element; see
            :func:`~difflayers.implicit.argmin`.
        solver: ``LBFGS()``, or ``Newton()`` applied to the gradient.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        The minimiser, shaped like `x`, with the batch dimensions of `t`.

    Raises:
        ValueError: For bad input, naming the argument, or an objective that captures a differentiated tensor.
        SolveError: If an element failed: ``UNBOUNDED`` where `t` is too large for a function that is not convex; in
            backward if ``I + t * Hessian`` is singular.

    Differentiable in `x`, `t` and every tensor of `args`, to any order, by the implicit function theorem.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0, -1.0]], dtype=torch.float64)
        >>> prox_of(lambda z: z.square().sum(-1) / 2, x, 0.5)
        tensor([[ 2.0000, -0.6667]], dtype=torch.float64)

    Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 1.1.
    """
    problem = _Problem(objective, x, t, args, event_ndim, arg_ndims, positive=False)
    return problem.solve(solver, on_failure).to(x.dtype)


def prox_of_ex(
    objective: Objective,
    x: Tensor,
    t: Number = 1.0,
    args: tuple[Any, ...] = (),
    *,
    event_ndim: int = 1,
    arg_ndims: tuple[Any, ...] | None = None,
    solver: IterativeSolver = LBFGS(),
) -> Solution[Tensor]:
    """As :func:`prox_of`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        objective: ``fn(z, *args)``.
        x: Points.
        t: Step.
        args: Arguments.
        event_ndim: Trailing dimensions of one point.
        arg_ndims: The same for every argument.
        solver: Minimiser.

    Returns:
        The prox with status, steps and residual of every element.
    """
    problem = _Problem(objective, x, t, args, event_ndim, arg_ndims, positive=False)
    solution = problem.solve_ex(solver)
    return replace(solution, value=solution.value.to(x.dtype))


def moreau_envelope(
    objective: Objective,
    x: Tensor,
    t: Number = 1.0,
    args: tuple[Any, ...] = (),
    *,
    prox: Callable[..., Tensor] | None = None,
    event_ndim: int = 1,
    arg_ndims: tuple[Any, ...] | None = None,
    solver: IterativeSolver = LBFGS(),
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The Moreau envelope: a smooth function below `objective` with the same minimisers.

    Solves ``min_z objective(z, *args) + ||z - x||^2 / (2 t)``.

    Args:
        objective: ``fn(z, *args)``, one number per batch element; each batch element alone. Twice differentiable,
            unless `prox` is given. Whatever needs a gradient comes in through `args`.
        x: ``(*batch, event...)``.
        t: Positive: a number or ``(*batch)``. Where the objective is L-weakly convex and ``t < 1 / L``, the envelope is
            differentiable, with a ``max(1 / t, L / (1 - t L))``-Lipschitz gradient; beyond, the solve finds a local
            minimum, or fails and says so.
        args: Pytrees of tensors and numbers.
        prox: ``prox(x, t, *args)``, the minimiser where it is known, as :func:`prox_l1` for ``z.abs().sum(-1)``. None:
            it is solved for.
        event_ndim: Trailing dimensions of `x` that form one point.
        arg_ndims: Trailing dimensions of each argument that belong to one batch element; see
            :func:`~difflayers.implicit.argmin`.
        solver: ``LBFGS()``, or ``Newton()`` applied to the gradient.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``; a given `prox` has a policy
            of its own.

    Returns:
        ``(*batch)`` values.

    Raises:
        ValueError: For bad input, naming the argument, or an objective that captures a differentiated tensor.
        SolveError: If an element failed: ``UNBOUNDED`` where `t` is too large for a function that is not convex.

    Differentiable in `x`, `t` and every tensor of `args`: the first order is ``(x - prox) / t``, without a solve; the
    second is right too, by the implicit function theorem (or through the given `prox`).

    Example:
        >>> import torch
        >>> from difflayers.proximal import moreau_envelope, prox_l1
        >>> x = torch.tensor([[2.0, 0.5]], requires_grad=True)
        >>> huber = moreau_envelope(lambda z: z.abs().sum(-1), x, 1.0, prox=prox_l1)
        >>> huber.detach(), torch.autograd.grad(huber, x)
        (tensor([1.6250]), (tensor([[1.0000, 0.5000]]),))

    Source: J.-J. Moreau, Proximite et dualite dans un espace hilbertien, 1965; for weakly convex functions J. Zhang,
    F. Farnia, MoreauGrad, ICCV 2023, theorem 1.
    """
    problem = _Problem(objective, x, t, args, event_ndim, arg_ndims, positive=True)
    z = problem.solve(solver, on_failure) if prox is None else problem.given(prox)
    # a z of NaN comes from this policy alone: a NaN of a given prox, or of "ignore", is for everybody to see
    return problem.value_at(z, masked=prox is None and on_failure == "nan").to(x.dtype)


def moreau_envelope_ex(
    objective: Objective,
    x: Tensor,
    t: Number = 1.0,
    args: tuple[Any, ...] = (),
    *,
    prox: Callable[..., Tensor] | None = None,
    event_ndim: int = 1,
    arg_ndims: tuple[Any, ...] | None = None,
    solver: IterativeSolver = LBFGS(),
) -> Solution[MoreauPoint]:
    """As :func:`moreau_envelope`, with the minimiser, as an unchecked :class:`~difflayers.Solution`.

    Args:
        objective: ``fn(z, *args)``.
        x: Points.
        t: Step.
        args: Arguments.
        prox: The minimiser where it is known.
        event_ndim: Trailing dimensions of one point.
        arg_ndims: The same for every argument.
        solver: Minimiser.

    Returns:
        ``value.envelope`` and ``value.prox``, both differentiable, with status, steps and residual of every element.
    """
    problem = _Problem(objective, x, t, args, event_ndim, arg_ndims, positive=True)
    if prox is None:
        solution = problem.solve_ex(solver)
    else:
        z = problem.given(prox)
        sound = torch.isfinite(_per_element(z.detach(), event_ndim))
        status = torch.where(sound, int(Status.CONVERGED), int(Status.DIVERGED))
        info = Info(status, torch.zeros_like(status), torch.zeros_like(sound, dtype=z.dtype))
        solution = Solution(z, *info)
    point = MoreauPoint(problem.value_at(solution.value).to(x.dtype), solution.value.to(x.dtype))
    return Solution(point, solution.status, solution.steps, solution.residual)


class _Problem:
    """Checked arguments in the dtype of the solve, and the two functions that are minimised."""

    def __init__(
        self, objective: Objective, x: Tensor, t: Number, args: Any, event_ndim: int, arg_ndims: Any, *, positive: bool
    ) -> None:
        if not callable(objective):
            raise ValueError(f"objective: expected a callable, got {type(objective).__name__}")
        if event_ndim < 0:
            raise ValueError(f"event_ndim: expected at least 0, got {event_ndim}")
        if isinstance(args, Tensor) or not isinstance(args, tuple | list):
            raise ValueError(f"args: expected a tuple of arguments, got {type(args).__name__}")
        check_tensor("x", x, min_ndim=event_ndim)
        check_range(per_element("t", t, above=0) if positive else per_element("t", t, at_least=0))
        work = compute_dtype(x.dtype)
        tree: Any = tuple(args)
        self.x = x.to(work)
        self.t: Number = check_tensor("t", t).to(compute_dtype(t.dtype)) if isinstance(t, Tensor) else float(t)
        self.args: tuple[Any, ...] = tuple(optree.tree_map(_lift, tree))
        self.named = [("x", self.x), *([("t", self.t)] if isinstance(self.t, Tensor) else [])]
        lifted: Any = self.args
        for path, leaf in zip(optree.tree_paths(tree), optree.tree_leaves(lifted), strict=True):
            if isinstance(leaf, Tensor):
                self.named.append(("args" + "".join(f"[{key!r}]" for key in path), leaf))
        for name, tensor in self.named:
            if tensor.dtype != torch.bool:
                check_tensor(name, tensor)
        check_same(self.named)
        self.event_ndim = event_ndim
        shapes = [("x", tuple(x.shape[: x.ndim - event_ndim]))]
        if isinstance(self.t, Tensor):
            shapes.append(("t", tuple(self.t.shape)))
        self.batch = broadcast_batch(shapes)
        self.event = x.shape[x.ndim - event_ndim :]
        self.ndims = None if arg_ndims is None else (event_ndim, 0, *arg_ndims)
        self.inputs = (self.x, self.t, *self.args)
        self.objective, self.energy = objective, _energy(objective, event_ndim)

    def _start(self) -> Tensor:
        """A point next to `x`: no method that follows gradients leaves a maximiser, and `x` may be one."""
        n = self.event.numel()
        ramp = torch.arange(1, n + 1, dtype=self.x.dtype, device=self.x.device)
        pattern = (ramp * 0.7548776662466927 % 1 - 0.5).reshape(self.event)
        if not n:
            return self.x.detach().expand(*self.batch, *self.event)
        x = self.x.detach()
        events = tuple(range(-self.event_ndim, 0))
        size = x.abs().amax(events, keepdim=True) if events else x.abs()
        nearby = x + math.sqrt(torch.finfo(x.dtype).eps) * torch.where(size > 0, size, 1) * pattern
        return nearby.expand(*self.batch, *self.event)

    def _options(self, solver: IterativeSolver) -> dict[str, Any]:
        return {"event_ndim": self.event_ndim, "arg_ndims": self.ndims, "solver": solver}

    def solve(self, solver: IterativeSolver, on_failure: OnFailure) -> Tensor:
        """The minimiser."""
        check_policy(on_failure)
        try:
            return argmin(self.energy, self._start(), self.inputs, **self._options(solver), on_failure=on_failure)
        except ValueError:
            # name what the caller passed, not what was made of it
            check_finite([(name, physical(tensor)) for name, tensor in self.named])
            raise

    def solve_ex(self, solver: IterativeSolver) -> Solution[Tensor]:
        """The minimiser, unchecked."""
        return argmin_ex(self.energy, self._start(), self.inputs, **self._options(solver))

    def given(self, prox: Callable[..., Tensor]) -> Tensor:
        """The minimiser by the caller's operator."""
        with autocast_off(self.x):
            z = prox(self.x, self.t, *self.args)
        check_shape("prox output", check_tensor("prox output", z).shape, (*self.batch, *self.event), " as of x")
        return z

    def value_at(self, z: Tensor, masked: bool = False) -> Tensor:
        """The envelope at its minimiser; with `masked` an element whose minimiser is NaN feeds nothing back."""
        tree: Any = self.inputs
        leaves, spec = optree.tree_flatten(tree)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        numbers = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        tensors, objective, event_ndim = [leaves[i] for i in places], self.objective, self.event_ndim

        def value(z: Tensor, *tensors: Tensor) -> Tensor:
            full: list[Any] = list(numbers)
            for i, tensor in zip(places, tensors, strict=True):
                full[i] = tensor
            inputs: Any = spec.unflatten(full)
            x, t, *args = inputs
            f, distance = _parts(objective, z, x, args, event_ndim)
            return f + distance / t

        if not masked:
            return envelope(value, z, tensors)
        ndims = None
        if self.ndims is not None:
            prefix: Any = self.ndims
            spread = optree.broadcast_prefix(prefix, tree)
            ndims = [event_ndim, *(spread[i] for i in places)]
        sums = _per_element(z, event_ndim)
        failed = torch.isnan(sums.detach())
        z_safe, *safe = harmless([z, *tensors], ndims, failed)
        # the minimiser answers a cotangent of zero with zero, and any other one with NaN
        return torch.where(failed, sums, envelope(value, z_safe, safe))


def _lift(leaf: Any) -> Any:
    """Half precision to float32."""
    return leaf.to(compute_dtype(leaf.dtype)) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _per_element(t: Tensor, event_ndim: int) -> Tensor:
    """The sum over each event."""
    return t.flatten(t.ndim - event_ndim).sum(-1) if event_ndim else t


def _parts(objective: Objective, z: Tensor, x: Tensor, args: Any, event_ndim: int) -> tuple[Tensor, Tensor]:
    """The objective and half the squared distance."""
    value = objective(z, *args)
    if not isinstance(value, Tensor):
        raise ValueError(f"objective output: expected a tensor, got {type(value).__name__}")
    batch = z.shape[: z.ndim - event_ndim]
    check_shape("objective output", value.shape, batch, ", one number per batch element")
    return value, _per_element((z - x).square(), event_ndim) / 2


def _energy(objective: Objective, event_ndim: int) -> Objective:
    """What the solver minimises."""

    def energy(z: Tensor, x: Tensor, t: Number, *args: Any) -> Tensor:
        value, distance = _parts(objective, z, x, args, event_ndim)
        return t * value + distance

    return energy
