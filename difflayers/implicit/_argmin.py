r"""Minimisers of a smooth objective as a layer: :math:`z^* = \arg\min_z f(z, \theta)`, so :math:`\nabla_z f = 0`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from difflayers._solution import OnFailure, Solution

from ._adjoints import Adjoint, Implicit
from ._iterate import IterativeSolver
from ._lbfgs import LBFGS, gradient_of, value_and_gradient
from ._problem import Kind, same, solve_inner


def _residual(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda z, *args: value_and_gradient(lambda z: function(z, *args), z)[1]


ARGMIN = Kind(
    name="argmin",
    argument="objective",
    residual=_residual,
    adapt={"minimum": same, "root": gradient_of},
    scalar=True,
    like_unknown=False,
    symmetric=True,
    default=LBFGS(),
)


def argmin(
    objective: Callable[..., Any],
    init: Any,
    args: tuple[Any, ...] = (),
    *,
    constraint: Any = None,
    event_ndim: int = 1,
    arg_ndims: tuple[Any, ...] | None = None,
    solver: IterativeSolver | None = None,
    adjoint: Adjoint = Implicit(),
    on_failure: OnFailure = "raise",
) -> Any:
    r"""Minimises :math:`f(z, \theta)` over z and differentiates the minimiser by the implicit function theorem.

    Args:
        objective: ``fn(z, *args)`` with one number per batch element, twice differentiable; each batch element alone.
            Whatever needs a gradient comes in through `args`: a captured parameter is refused.
        init: Tensor or pytree of tensors ``(*batch, event...)`` the solver starts from; carries no gradient.
        args: Tuple of pytrees of tensors.
        constraint: None; a :class:`Projection` onto a convex set or the :class:`Prox` of a term that is added; an
            :class:`Equality` or :class:`Inequality`, or a tuple of them. Its function takes the same arguments as
            `objective`. The start may violate it.
        event_ndim: Trailing dimensions of `init` that form one unknown; 0 for one scalar per element.
        arg_ndims: Trailing dimensions of each argument that belong to one batch element. When given, batch dimensions
            of `init` and `args` broadcast, `objective` must broadcast over leading dimensions, ``vmap`` moves
            dimensions instead of vmapping the code, and a failed element is fully separated from the others.
        solver: None: ``LBFGS()``; with a projection or prox ``AcceleratedProximalGradient()``; with equalities or
            inequalities ``InteriorPoint()``. A root solver, ``Newton()``, works on the gradient (it also accepts
            saddles), on the fixed point of a projection or prox (as ``Anderson()`` and ``Picard()`` do), or on the KKT
            conditions of equalities.
        adjoint: ``Implicit()``, ``Neumann(terms)`` or ``Unrolled(max_steps)``; with a projection or prox also
            ``OneStep()``; under equalities or inequalities only ``Implicit()``, whose matrix is that of the KKT
            conditions of the active set, or one with ``MINRES()`` or another solver for indefinite systems.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone; without `arg_ndims` a failed element may
            still reach the gradients of shared arguments) or ``"ignore"``.

    Returns:
        The solution, with the structure of `init`.

    Raises:
        ValueError: For bad input, naming the argument; a captured tensor; batch elements that see each other.
        SolveError: If an element failed (``INFEASIBLE``: the constraints have no common point, without convexity none
            near the start), or in backward if the Hessian is singular there. Under equalities and inequalities: if the
            gradients of those that are active depend on each other, or the Hessian of the Lagrangian is not positive
            definite along them.

    Differentiable in every tensor of `args`, to any order, forward and reverse. An inequality that holds with equality
    and has no multiplier counts as absent; on the boundary of a projection's set its own derivative decides.

    Example:
        >>> import torch
        >>> from difflayers.implicit import argmin
        >>> x = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
        >>> ridge = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        >>> def objective(z, x, ridge):
        ...     return (z - x).square().sum(-1) + ridge * z.square().sum(-1)
        >>> z = argmin(objective, torch.zeros(1, 2, dtype=torch.float64), (x, ridge))
        >>> torch.autograd.grad(z.sum(), ridge)
        (tensor(-1., dtype=torch.float64),)
        >>> from difflayers.implicit import Inequality
        >>> at_most = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        >>> def distance(z, x, at_most):
        ...     return (z - x).square().sum(-1)
        >>> budget = Inequality(lambda z, x, at_most: z.sum(-1) - at_most)
        >>> z = argmin(distance, torch.zeros(1, 2, dtype=torch.float64), (x, at_most), constraint=budget)
        >>> z.detach().round(decimals=6).abs(), torch.autograd.grad(z[0, 1], at_most)
        (tensor([[0., 2.]], dtype=torch.float64), (tensor(0.5000, dtype=torch.float64),))

    Source: the implicit function theorem at a stationary point; S. Gould et al., On differentiating parameterized
    argmin and argmax problems with application to bi-level optimization, 2016; under constraints: A. Fiacco,
    Sensitivity analysis for nonlinear programming using penalty methods, 1976.
    """
    return solve_inner(
        ARGMIN,
        objective,
        init,
        args,
        constraint=constraint,
        event_ndim=event_ndim,
        arg_ndims=arg_ndims,
        solver=solver,
        adjoint=adjoint,
        on_failure=on_failure,
    ).value


def argmin_ex(
    objective: Callable[..., Any],
    init: Any,
    args: tuple[Any, ...] = (),
    *,
    constraint: Any = None,
    event_ndim: int = 1,
    arg_ndims: tuple[Any, ...] | None = None,
    solver: IterativeSolver | None = None,
    adjoint: Adjoint = Implicit(),
) -> Solution[Any]:
    """As :func:`argmin`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        objective: ``fn(z, *args)``.
        init: Start.
        args: Arguments.
        constraint: Constraint.
        event_ndim: Trailing dimensions that form one unknown.
        arg_ndims: The same for every argument.
        solver: Minimiser or root solver.
        adjoint: Adjoint.

    Returns:
        The solution with status, steps and error of every element; under equalities and inequalities a
        :class:`ConstrainedSolution`, with multipliers.
    """
    return solve_inner(
        ARGMIN,
        objective,
        init,
        args,
        constraint=constraint,
        event_ndim=event_ndim,
        arg_ndims=arg_ndims,
        solver=solver,
        adjoint=adjoint,
        on_failure="ignore",
    )
