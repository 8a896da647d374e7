r"""Nonlinear least squares as a layer: :math:`z^* = \arg\min_z \frac12\|r(z, \theta)\|^2`, so :math:`J^T r = 0`.

The Jacobian of that condition is :math:`J^T J + \sum_i r_i \nabla^2 r_i`. Dropping the second term (Gauss-Newton) is
wrong wherever the residual is not zero, so the exact curvature is the default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from difflayers._solution import OnFailure, Solution
from difflayers.linalg._autodiff import pullback, push_forward

from ._adjoints import Adjoint, Implicit
from ._iterate import IterativeSolver
from ._levenberg_marquardt import LevenbergMarquardt, half_square, stationarity
from ._problem import Kind, same, solve_inner


@dataclass(frozen=True)
class Exact:
    """The exact Hessian of the objective in the adjoint."""

    product = None


@dataclass(frozen=True)
class GaussNewton:
    """``J^T J`` in the adjoint: cheaper and positive semidefinite, but *biased* wherever the residual is not zero."""

    @staticmethod
    def product(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``(value, args, v, transpose) -> J^T J v``."""

        def jacobian_product(value: Tensor, args: tuple[Tensor, ...], v: Tensor, transpose: bool) -> Tensor:
            at = lambda z: function(z, *args)  # noqa: E731
            return pullback(at, value)[1](push_forward(at, [value], [v]))[0]

        return jacobian_product


def _residual(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda z, *args: stationarity(lambda z: function(z, *args))(z)


LEAST_SQUARES = Kind(
    name="nonlinear_least_squares",
    argument="residual",
    residual=_residual,
    adapt={"least_squares": same, "minimum": half_square, "root": stationarity},
    like_unknown=False,
    symmetric=True,
)


def nonlinear_least_squares(
    residual: Callable[..., Any],
    init: Any,
    args: tuple[Any, ...] = (),
    *,
    event_ndim: int = 1,
    arg_ndims: tuple[Any, ...] | None = None,
    solver: IterativeSolver = LevenbergMarquardt(),
    curvature: Exact | GaussNewton = Exact(),
    adjoint: Adjoint = Implicit(),
    on_failure: OnFailure = "raise",
) -> Any:
    r"""Minimises :math:`\frac12\|r(z, \theta)\|^2` over z and differentiates the minimiser.

    Args:
        residual: ``fn(z, *args)`` of shape ``(*batch, m)`` (``(*batch, m1, ..., mk)`` for ``event_ndim=k > 1``); each
            batch element alone. Whatever needs a gradient comes in through `args`.
        init: Tensor or pytree of tensors ``(*batch, event...)`` the solver starts from; carries no gradient.
        args: Tuple of pytrees of tensors.
        event_ndim: Trailing dimensions of `init` that form one unknown.
        arg_ndims: Trailing dimensions of each argument that belong to one batch element; see :func:`root_find`.
        solver: ``LevenbergMarquardt()``, or a minimiser or root solver.
        curvature: ``Exact()``, or ``GaussNewton()``, which is biased wherever the residual is not zero.
        adjoint: ``Implicit()``, ``Neumann(terms)`` or ``Unrolled(max_steps)``.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone; without `arg_ndims` a failed element may
            still reach the gradients of shared arguments) or ``"ignore"``.

    Returns:
        The minimiser, with the structure of `init`.

    Raises:
        ValueError: For bad input, naming the argument; a captured tensor; batch elements that see each other.
        SolveError: If an element failed, or in backward if its Hessian is singular.

    Differentiable in every tensor of `args`, to any order, forward and reverse (first order is exact with ``Exact``).

    Example:
        >>> import torch
        >>> from difflayers.implicit import nonlinear_least_squares
        >>> t, y = torch.linspace(0, 1, 5, dtype=torch.float64), torch.tensor([1.0, 1.2, 1.7, 2.0, 2.8]).double()
        >>> y.requires_grad_()
        tensor([1.0000, 1.2000, 1.7000, 2.0000, 2.8000], dtype=torch.float64,
               requires_grad=True)
        >>> fit = nonlinear_least_squares(lambda z, y: (z * t).exp() - y, torch.zeros(1).double(), (y,))
        >>> print(f"{fit.item():.4f}")
        1.0048
        >>> torch.autograd.grad(fit.sum(), y)[0].shape
        torch.Size([5])

    Source: the implicit function theorem on ``J^T r = 0``.
    """
    return solve_inner(
        LEAST_SQUARES,
        residual,
        init,
        args,
        event_ndim=event_ndim,
        arg_ndims=arg_ndims,
        solver=solver,
        adjoint=adjoint,
        on_failure=on_failure,
        curvature=curvature.product,
    ).value


def nonlinear_least_squares_ex(
    residual: Callable[..., Any],
    init: Any,
    args: tuple[Any, ...] = (),
    *,
    event_ndim: int = 1,
    arg_ndims: tuple[Any, ...] | None = None,
    solver: IterativeSolver = LevenbergMarquardt(),
    curvature: Exact | GaussNewton = Exact(),
    adjoint: Adjoint = Implicit(),
) -> Solution[Any]:
    """As :func:`nonlinear_least_squares`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        residual: ``fn(z, *args)``.
        init: Start.
        args: Arguments.
        event_ndim: Trailing dimensions that form one unknown.
        arg_ndims: The same for every argument.
        solver: Least-squares solver.
        curvature: ``Exact()`` or ``GaussNewton()``.
        adjoint: Adjoint.

    Returns:
        The solution with status, steps and error of every element.
    """
    return solve_inner(
        LEAST_SQUARES,
        residual,
        init,
        args,
        event_ndim=event_ndim,
        arg_ndims=arg_ndims,
        solver=solver,
        adjoint=adjoint,
        on_failure="ignore",
        curvature=curvature.product,
    )
