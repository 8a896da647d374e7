r"""Coefficients of basis functions for which a differential equation holds as well as it can, as a layer.

.. math:: w^* = \arg\min_w \tfrac12 \sum_n s_n^2 \|F(T_n^0 + B_n w; \phi)\|^2 + \tfrac12 \|S_A (A w - y)\|^2
    + \tfrac\lambda2 \|w - w_0\|^2 \quad\text{s.t.}\quad C w = d

Differentiation is linear, so the terms (:math:`u, u_t, u_x, \dots`) of all basis functions are computed once, outside,
and the solver only weighs them. G. Negiar, M. W. Mahoney, A. S. Krishnapriyan, Learning differentiable solvers for
systems with hard constraints, 2023; N. Chalapathi, Y. Du, A. S. Krishnapriyan, Scaling physics-informed
hard constraints with mixture-of-experts, 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difflayers._solution import OnFailure, Solution
from difflayers.implicit import (
    Exact,
    GaussNewton,
    LevenbergMarquardt,
    envelope,
    solution_map,
    solution_map_ex,
)
from difflayers.linalg._autodiff import autocast_off, opaque
from difflayers.linalg._system import harmless

from ._fit_call import FitCall
from ._fit_problem import FitProblem
from ._levenberg_marquardt import Fit, constant_derivative

Terms = Tensor | Mapping[str, Tensor]
Rows = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class ResidualSolution(Solution[Tensor]):
    """Coefficients with their report, see :func:`residual_least_squares_ex`.

    Attributes:
        multipliers: ``(*batch, p)`` Lagrange multipliers of the equalities, differentiable; p = 0 without.
        linear: ``(*batch)`` booleans: the residual is affine in the terms, so that one linear solve was enough. Found
            numerically, at three places and at the solution; False where a number is missing.
    """

    multipliers: Tensor
    linear: Tensor


def residual_least_squares(
    basis_terms: Terms,
    residual: Callable[..., Tensor],
    params: Any = (),
    *,
    offset: Terms | None = None,
    weights: Tensor | None = None,
    rows: Rows | None = None,
    equality: tuple[Tensor, Tensor] | None = None,
    ridge: float | Tensor = 0.0,
    center: Tensor | None = None,
    init: Tensor | None = None,
    param_ndims: Any = None,
    solver: LevenbergMarquardt = LevenbergMarquardt(),
    curvature: Exact | GaussNewton = Exact(),
    on_failure: OnFailure = "raise",
) -> Tensor:
    r"""The coefficients of basis functions with the smallest residual of a differential equation.

    Solves ``argmin_w 1/2 sum_n weights_n^2 |F(T_n)|^2 + 1/2 ||A w - y||^2 + ridge/2 ||w - center||^2`` subject to
    ``C w = d``, where ``T_n = offset_n + B_n w`` are the terms of the field at point n and F is pointwise. Where F is
    linear in the terms, which is found numerically, by one linear solve; by Levenberg-Marquardt and Newton's method
    elsewhere.

    Args:
        basis_terms: ``(*batch, N, T, K)``: T differential terms of K basis functions at N points; or a dictionary of
            terms ``(*batch, N, K)`` by name. Batch dimensions (samples, experts) of all arguments broadcast.
        residual: ``fn(terms, params)`` of shape ``(*batch, N)``, or ``(*batch, N, Q)`` for a system of equations, with
            terms ``(*batch, N, T)`` or the dictionary of them, each ``(*batch, N)``. Each point alone. Whatever needs a
            gradient comes in through `params`.
        params: Pytree of tensors and numbers for `residual`: coefficients of the equation, coordinates. A tensor is
            ``(*batch, 1)``, or ``(*batch, N)`` with a number for each point, or 0-dimensional.
        offset: ``(*batch, N, T)`` terms of a field to which the basis adds, or a dictionary ``(*batch, N)``.
        weights: ``(*batch, N)`` factors of the residuals; a point of weight 0 does not count, nor does NaN in its data
            (its terms, and parameters with a number for each point).
        rows: ``(A, y)``, or ``(A, y, row_weights)``, of shapes ``(*batch, m, K)``, ``(*batch, m)`` and ``(*batch, m)``:
            linear conditions in the least-squares sense, such as boundary and initial values. Weights of 0 as above. A
            large weight s takes digits from the derivative by A and y, ``eps s^2`` of it, which `equality` does not.
        equality: ``(C, d)`` of shapes ``(*batch, p, K)`` and ``(*batch, p)``: linear conditions that hold exactly, with
            independent rows and p < K. A row of C that is exactly zero, with d = 0, is none: its multiplier is zero.
            So elements may have different numbers of rows.
        ridge: At least 0, a number or a tensor ``(*batch)``. Needed where basis functions depend on each other.
        center: ``(*batch, K)`` point the ridge pulls to; zero if None.
        init: ``(*batch, K)`` start of the iteration, no gradient flows to it; `center` if None.
        param_ndims: Trailing dimensions of each parameter that belong to one batch element, in the structure of
            `params` or a prefix of it, for parameters of other shapes than those above.
        solver: ``LevenbergMarquardt()`` of :mod:`difflayers.implicit` with its tolerance and limits.
        curvature: ``Exact()``, or ``GaussNewton()``, which leaves the curvature of F out of the derivative and is
            *biased* wherever the residual is not zero.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        ``(*batch, K)`` coefficients.

    Raises:
        ValueError: For bad input, naming the argument; a residual that is not pointwise, that returns the wrong shape,
            asks for a term that is not there, or captures a tensor that needs a gradient.
        SolveError: For an element that diverged, or whose minimiser is not unique.

    Differentiable in every tensor argument but `init`, to any order, forward and reverse. The ridge is differentiable
    at values above 0; the derivative by the entries of a row of zeros in C, and of d there, is zero. An element that
    stopped before it was stationary gives a :class:`~difflayers.SolveWarning`. Memory does not grow with the steps.

    Example:
        >>> import torch
        >>> from difflayers.pde import residual_least_squares
        >>> x = torch.linspace(0, 1, 20, dtype=torch.float64)  # u' = -k u with u(0) = 1, in polynomials
        >>> powers = torch.arange(6, dtype=torch.float64)
        >>> basis = {"u": x[:, None] ** powers, "u_x": powers * x[:, None] ** (powers - 1).clamp_min(0)}
        >>> start = (basis["u"][:1], torch.ones(1, dtype=torch.float64))
        >>> k = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        >>> decay = lambda u, p: u["u_x"] + p["k"] * u["u"]
        >>> w = residual_least_squares(basis, decay, {"k": k}, equality=start)
        >>> end = basis["u"][-1] @ w
        >>> print(f"{end.item():.3f}, {torch.autograd.grad(end, k)[0].item():.3f}")  # exp(-k), -exp(-k)
        0.135, -0.135

    Source: G. Negiar, M. W. Mahoney, A. S. Krishnapriyan, Learning differentiable solvers for systems with hard
    constraints, 2023; N. Chalapathi, Y. Du, A. S. Krishnapriyan, Scaling physics-informed hard constraints with
    mixture-of-experts, 2024.

    Departure: the papers differentiate ``F = 0``; with more points than coefficients that does not hold, and the
    condition is stationarity. The solver ends with Newton steps on it.
    """
    given = basis_terms, residual, params, offset, weights, rows, equality, ridge, center, init, param_ndims
    return _coefficients(given, solver, curvature, on_failure)


def residual_least_squares_ex(
    basis_terms: Terms,
    residual: Callable[..., Tensor],
    params: Any = (),
    *,
    offset: Terms | None = None,
    weights: Tensor | None = None,
    rows: Rows | None = None,
    equality: tuple[Tensor, Tensor] | None = None,
    ridge: float | Tensor = 0.0,
    center: Tensor | None = None,
    init: Tensor | None = None,
    param_ndims: Any = None,
    solver: LevenbergMarquardt = LevenbergMarquardt(),
    curvature: Exact | GaussNewton = Exact(),
) -> ResidualSolution:
    """As :func:`residual_least_squares`, returning an unchecked :class:`ResidualSolution`.

    Args:
        basis_terms: Terms of the basis functions.
        residual: Pointwise residual.
        params: Its parameters.
        offset: Terms of a field to which the basis adds.
        weights: Factors of the residuals.
        rows: Linear conditions in the least-squares sense.
        equality: Linear conditions that hold exactly.
        ridge: Strength of the ridge.
        center: Point the ridge pulls to.
        init: Start of the iteration.
        param_ndims: Trailing dimensions of each parameter.
        solver: Options of the iteration.
        curvature: ``Exact()`` or ``GaussNewton()``.

    Returns:
        The coefficients with status, steps and the norm of the gradient for every element, the multipliers of the
        equalities, and whether the residual is linear in the terms.
    """
    given = basis_terms, residual, params, offset, weights, rows, equality, ridge, center, init, param_ndims
    return _solution(given, solver, curvature)


def residual_least_squares_value(
    basis_terms: Terms,
    residual: Callable[..., Tensor],
    params: Any = (),
    *,
    offset: Terms | None = None,
    weights: Tensor | None = None,
    rows: Rows | None = None,
    equality: tuple[Tensor, Tensor] | None = None,
    ridge: float | Tensor = 0.0,
    center: Tensor | None = None,
    init: Tensor | None = None,
    param_ndims: Any = None,
    solver: LevenbergMarquardt = LevenbergMarquardt(),
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The smallest value of the objective of :func:`residual_least_squares`, by the envelope theorem.

    Solves the same problem. Its first derivative needs no linear solve: that of the objective at fixed coefficients.

    Args:
        basis_terms: Terms of the basis functions, ``(*batch, N, T, K)`` or a dictionary.
        residual: Pointwise residual.
        params: Its parameters.
        offset: Terms of a field to which the basis adds.
        weights: Factors of the residuals.
        rows: Linear conditions in the least-squares sense.
        equality: Linear conditions that hold exactly.
        ridge: Strength of the ridge.
        center: Point the ridge pulls to.
        init: Start of the iteration.
        param_ndims: Trailing dimensions of each parameter.
        solver: Options of the iteration.
        on_failure: ``"raise"``, ``"nan"`` or ``"ignore"``.

    Returns:
        ``(*batch)`` values.

    Raises:
        ValueError: For bad input, naming the argument.
        SolveError: For an element that diverged, or whose minimiser is not unique.

    Differentiable in every tensor argument but `init`, to any order, forward and reverse; from the second order on
    through the coefficients.

    Example:
        >>> import torch
        >>> from difflayers.pde import residual_least_squares_value
        >>> basis = torch.ones(3, 1, 1, dtype=torch.float64)  # the best constant for data 0, 1, 2
        >>> data = torch.arange(3, dtype=torch.float64, requires_grad=True)
        >>> value = residual_least_squares_value(basis, lambda u, y: u[..., 0] - y, data)
        >>> value.item()
        1.0
        >>> torch.autograd.grad(value, data)
        (tensor([-1.,  0.,  1.], dtype=torch.float64),)

    Source: the envelope theorem, see :func:`difflayers.implicit.envelope`.
    """
    given = basis_terms, residual, params, offset, weights, rows, equality, ridge, center, init, param_ndims
    return _optimum(given, solver, on_failure)


@opaque
def _coefficients(given: tuple[Any, ...], solver: Any, curvature: Any, on_failure: OnFailure) -> Tensor:
    call = FitCall(*given)
    problem = call.problem(solver, curvature).implicit("residual_least_squares")
    x = solution_map(problem, call.args, on_failure=on_failure)
    return x[..., : call.K].to(call.dtype)


@opaque
def _solution(given: tuple[Any, ...], solver: Any, curvature: Any) -> ResidualSolution:
    call = FitCall(*given)
    fit = call.problem(solver, curvature)
    found = solution_map_ex(fit.implicit("residual_least_squares"), call.args)
    x = found.value
    with torch.no_grad(), autocast_off(x):
        data, params = fit.unpack(tuple(t.detach() for t in call.args))
        B = data["basis_terms"]
        assert B is not None
        nothing = B.new_zeros(0, call.K), B.new_zeros(0)
        point = Fit(fit.F, params, B, data["offset"], None, *nothing, None, None)
        linear = constant_derivative(point, point.at(x.detach()[..., : call.K]))
    w, nu = x[..., : call.K].to(call.dtype), x[..., call.K :].to(call.dtype)
    return ResidualSolution(w, found.status, found.steps, found.residual, nu, linear)


@opaque
def _optimum(given: tuple[Any, ...], solver: Any, on_failure: OnFailure) -> Tensor:
    call = FitCall(*given)
    fit = call.problem(solver, Exact())
    problem = fit.implicit("residual_least_squares_value")
    x = solution_map(problem, call.args, on_failure=on_failure)
    return optimal_value(call, fit, x, on_failure)


def optimal_value(call: FitCall, fit: FitProblem, x: Tensor, on_failure: OnFailure) -> Tensor:
    """The objective at the minimiser x, by the envelope theorem."""
    problem = fit.implicit("residual_least_squares_value")
    with autocast_off(x):
        if on_failure != "nan":
            return envelope(fit.lagrangian, x, tuple(call.args)).to(call.dtype)
        bad = torch.isnan(x.detach()).any(-1)
        assert problem.arg_ndims is not None
        # nothing of a failed element may reach the gradients of arguments that others share
        point, *args = harmless([x, *call.args], (1, *problem.arg_ndims), bad)
        value = envelope(fit.lagrangian, point, tuple(args))
        return torch.where(bad, x.sum(-1), value).to(call.dtype)
