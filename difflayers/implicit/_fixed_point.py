r"""Fixed points of an update as a layer: :math:`z^* = T(z^*, \theta)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from difflayers._solution import OnFailure, Solution

from ._adjoints import Adjoint, Implicit
from ._anderson import Anderson
from ._iterate import IterativeSolver
from ._problem import Kind, same, solve_inner


def _residual(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda z, *args: z - function(z, *args)


FIXED_POINT = Kind(
    name="fixed_point",
    argument="update",
    residual=_residual,
    adapt={"fixed_point": same, "root": lambda function: lambda z: z - function(z)},
    one_step=True,
)


def fixed_point(
    update: Callable[..., Any],
    init: Any,
    args: tuple[Any, ...] = (),
    *,
    event_ndim: int = 1,
    arg_ndims: tuple[Any, ...] | None = None,
    solver: IterativeSolver = Anderson(),
    adjoint: Adjoint = Implicit(),
    on_failure: OnFailure = "raise",
) -> Any:
    r"""Solves :math:`z = T(z, \theta)` and differentiates the solution by the implicit function theorem.

    Args:
        update: ``fn(z, *args)`` with the structure and shapes of `z`; each batch element alone. Whatever needs a
            gradient comes in through `args`: a captured parameter is refused.
        init: Tensor or pytree of tensors ``(*batch, event...)`` the solver starts from; carries no gradient.
        args: Tuple of pytrees of tensors.
        event_ndim: Trailing dimensions of `init` that form one unknown; 0 for one scalar per element.
        arg_ndims: Trailing dimensions of each argument that belong to one batch element. When given, batch dimensions
            of `init` and `args` broadcast, `update` must broadcast over leading dimensions, ``vmap`` moves dimensions
            instead of vmapping the code, and a failed element is fully separated from the others.
        solver: ``Anderson()``, ``Picard()``, or a root solver, ``Newton()``, applied to ``z - T(z)``.
        adjoint: ``Implicit()``, ``Neumann(terms)``, ``OneStep()`` or ``Unrolled(max_steps)``.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone; without `arg_ndims` a failed element may
            still reach the gradients of shared arguments) or ``"ignore"``.

    Returns:
        The solution, with the structure of `init`.

    Raises:
        ValueError: For bad input, naming the argument; a captured tensor; batch elements that see each other.
        SolveError: If an element failed, or in backward if ``I - dT/dz`` is singular there.

    Differentiable in every tensor of `args`, to any order, forward and reverse.

    Example:
        >>> import torch
        >>> from difflayers.implicit import fixed_point
        >>> a = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        >>> z = fixed_point(lambda z, a: torch.cos(a * z), torch.zeros((), dtype=torch.float64), (a,), event_ndim=0)
        >>> print(f"{z.item():.6f}")
        0.739085
        >>> (slope,) = torch.autograd.grad(z, a)
        >>> print(f"{slope.item():.6f}")
        -0.297474

    Source: the implicit function theorem; for the layer, S. Bai, J. Z. Kolter, V. Koltun, Deep Equilibrium Models,
    2019.
    """
    return solve_inner(
        FIXED_POINT,
        update,
        init,
        args,
        event_ndim=event_ndim,
        arg_ndims=arg_ndims,
        solver=solver,
        adjoint=adjoint,
        on_failure=on_failure,
    ).value


def fixed_point_ex(
    update: Callable[..., Any],
    init: Any,
    args: tuple[Any, ...] = (),
    *,
    event_ndim: int = 1,
    arg_ndims: tuple[Any, ...] | None = None,
    solver: IterativeSolver = Anderson(),
    adjoint: Adjoint = Implicit(),
) -> Solution[Any]:
    """As :func:`fixed_point`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        update: ``fn(z, *args)``.
        init: Start.
        args: Arguments.
        event_ndim: Trailing dimensions that form one unknown.
        arg_ndims: The same for every argument.
        solver: Fixed-point or root solver.
        adjoint: Adjoint.

    Returns:
        The solution with status, steps and error of every element.
    """
    return solve_inner(
        FIXED_POINT,
        update,
        init,
        args,
        event_ndim=event_ndim,
        arg_ndims=arg_ndims,
        solver=solver,
        adjoint=adjoint,
        on_failure="ignore",
    )
