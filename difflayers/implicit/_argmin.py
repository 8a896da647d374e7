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
)


def argmin(
    objective: Callable[..., Any],
    init: Any,
    args: tuple[Any, ...] = (),
    *,
    event_ndim: int = 1,
    arg_ndims: tuple[Any, ...] | None = None,
    solver: IterativeSolver = LBFGS(),
    adjoint: Adjoint = Implicit(),
    on_failure: OnFailure = "raise",
) -> Any:
    r"""Minimises :math:`f(z, \theta)` over z and differentiates the minimiser by the implicit function theorem.

    Args:
        objective: ``fn(z, *args)`` with one number per batch element, twice differentiable; each batch element alone.
            Whatever needs a gradient comes in through `args`: a captured parameter is refused.
        init: Tensor or pytree of tensors ``(*batch, event...)`` the solver starts from; carries no gradient.
        args: Tuple of pytrees of tensors.
        event_ndim: Trailing dimensions of `init` that form one unknown; 0 for one scalar per element.
        arg_ndims: Trailing dimensions of each argument that belong to one batch element. When given, batch dimensions
            of `init` and `args` broadcast, `objective` must broadcast over leading dimensions, ``vmap`` moves
            dimensions instead of vmapping the code, and a failed element is fully separated from the others.
        solver: ``LBFGS()``, or a root solver, ``Newton()``, applied to the gradient (it also accepts saddles).
        adjoint: ``Implicit()``, ``Neumann(terms)`` or ``Unrolled(max_steps)``.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone; without `arg_ndims` a failed element may
            still reach the gradients of shared arguments) or ``"ignore"``.

    Returns:
        The solution, with the structure of `init`.

    Raises:
        ValueError: For bad input, naming the argument; a captured tensor; batch elements that see each other.
        SolveError: If an element failed, or in backward if the Hessian is singular there.

    Differentiable in every tensor of `args`, to any order, forward and reverse.

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

    Source: the implicit function theorem at a stationary point; S. Gould et al., On differentiating parameterized
    argmin and argmax problems with application to bi-level optimization, 2016.
    """
    return solve_inner(
        ARGMIN,
        objective,
        init,
        args,
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
    event_ndim: int = 1,
    arg_ndims: tuple[Any, ...] | None = None,
    solver: IterativeSolver = LBFGS(),
    adjoint: Adjoint = Implicit(),
) -> Solution[Any]:
    """As :func:`argmin`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        objective: ``fn(z, *args)``.
        init: Start.
        args: Arguments.
        event_ndim: Trailing dimensions that form one unknown.
        arg_ndims: The same for every argument.
        solver: Minimiser or root solver.
        adjoint: Adjoint.

    Returns:
        The solution with status, steps and error of every element.
    """
    return solve_inner(
        ARGMIN,
        objective,
        init,
        args,
        event_ndim=event_ndim,
        arg_ndims=arg_ndims,
        solver=solver,
        adjoint=adjoint,
        on_failure="ignore",
    )
