r"""Roots of a residual as a layer: :math:`F(z^*, \theta) = 0`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from difflayers._solution import OnFailure, Solution

from ._adjoints import Adjoint, Implicit
from ._iterate import IterativeSolver
from ._newton import Newton
from ._problem import Kind, same, solve_inner

ROOT = Kind(name="root_find", argument="residual", residual=lambda function: function, adapt={"root": same})


def root_find(
    residual: Callable[..., Any],
    init: Any,
    args: tuple[Any, ...] = (),
    *,
    event_ndim: int = 1,
    arg_ndims: tuple[Any, ...] | None = None,
    solver: IterativeSolver = Newton(),
    adjoint: Adjoint = Implicit(),
    on_failure: OnFailure = "raise",
) -> Any:
    r"""Solves :math:`F(z, \theta) = 0` and differentiates the solution by the implicit function theorem.

    Args:
        residual: ``fn(z, *args)`` with the structure and shapes of `z`; each batch element alone. Whatever needs a
            gradient comes in through `args`: a captured parameter is refused.
        init: Tensor or pytree of tensors ``(*batch, event...)`` the solver starts from; carries no gradient.
        args: Tuple of pytrees of tensors.
        event_ndim: Trailing dimensions of `init` that form one unknown; 0 for one scalar per element.
        arg_ndims: Trailing dimensions of each argument that belong to one batch element. When given, batch dimensions
            of `init` and `args` broadcast, `residual` must broadcast over leading dimensions, ``vmap`` moves dimensions
            instead of vmapping the code, and a failed element is fully separated from the others.
        solver: ``Newton()`` or ``Bisection()``.
        adjoint: ``Implicit()``, ``Neumann(terms)`` or ``Unrolled(max_steps)``.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone; without `arg_ndims` a failed element may
            still reach the gradients of shared arguments) or ``"ignore"``.

    Returns:
        The solution, with the structure of `init`.

    Raises:
        ValueError: For bad input, naming the argument; a captured tensor; batch elements that see each other.
        SolveError: If an element failed, or in backward if its Jacobian is singular.

    Differentiable in every tensor of `args`, to any order, forward and reverse.

    Example:
        >>> import torch
        >>> from difflayers.implicit import root_find
        >>> a = torch.tensor([2.0, 10.0], requires_grad=True)
        >>> y = root_find(lambda y, a: y**3 + y - a, torch.ones(2), (a,), event_ndim=0)
        >>> y.detach()
        tensor([1., 2.])
        >>> torch.autograd.grad(y.sum(), a)
        (tensor([0.2500, 0.0769]),)

    Source: the implicit function theorem; for the layer, S. Bai, J. Z. Kolter, V. Koltun, Deep Equilibrium Models,
    2019.
    """
    return solve_inner(
        ROOT,
        residual,
        init,
        args,
        event_ndim=event_ndim,
        arg_ndims=arg_ndims,
        solver=solver,
        adjoint=adjoint,
        on_failure=on_failure,
    ).value


def root_find_ex(
    residual: Callable[..., Any],
    init: Any,
    args: tuple[Any, ...] = (),
    *,
    event_ndim: int = 1,
    arg_ndims: tuple[Any, ...] | None = None,
    solver: IterativeSolver = Newton(),
    adjoint: Adjoint = Implicit(),
) -> Solution[Any]:
    """As :func:`root_find`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        residual: ``fn(z, *args)``.
        init: Start.
        args: Arguments.
        event_ndim: Trailing dimensions that form one unknown.
        arg_ndims: The same for every argument.
        solver: Root solver.
        adjoint: Adjoint.

    Returns:
        The solution with status, steps and error of every element.
    """
    return solve_inner(
        ROOT,
        residual,
        init,
        args,
        event_ndim=event_ndim,
        arg_ndims=arg_ndims,
        solver=solver,
        adjoint=adjoint,
        on_failure="ignore",
    )
