"""A network whose output satisfies a differential equation: all parts of the family in one layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from difflayers._checks import renamed
from difflayers._solution import OnFailure, check_policy
from difflayers.implicit import Exact, GaussNewton, LevenbergMarquardt
from difflayers.implicit._engine import _apply
from difflayers.linalg._autodiff import autocast_off, opaque

from ._assembly import Given, Recipe, Residual, assemble, dtype_and_device
from ._declaration import PDE
from ._derivatives import Basis, Derivatives, Jvp, check_derivatives
from ._field import ConstrainedField, Evaluator
from ._fit_call import FitCall
from ._levenberg_marquardt import Fit, constant_derivative
from ._residual_least_squares import ResidualSolution, optimal_value
from ._samplers import Fixed, Grid, Sampler, Sobol


class PDEConstraint(nn.Module):
    r"""The last layer of a network: its outputs become basis functions, and the field a solution of an equation.

    .. math:: w^* = \arg\min_w \frac{s_0^2}{2N} \sum_n \|F(T_n(w))\|^2 + \sum_c \frac{s_c^2}{2 m_c} \|A_c w - y_c\|^2
        + \frac\lambda2 \|w\|^2 \quad\text{s.t.}\quad \text{exact conditions}

    with the differential terms T of ``u = offset + basis . w`` at the sampled points, and every s divided by the scale
    of the equation or field (see :class:`PDE`). Equations that are linear are found out, and take one step. Of exact
    rows that depend on each other enough are dropped.

    Args:
        pde: A :class:`PDE`.
        derivatives: :class:`Jvp`, :class:`FiniteDifference` or :class:`Spectral`.
        sampler: :class:`Sobol`, :class:`Grid` or :class:`Fixed`; None: ``Sobol()``, or the grid of the derivatives.
        solver: ``LevenbergMarquardt()`` of :mod:`difflayers.implicit`.
        row_weights: The s by name, ``"residual"`` for the equation and those of :attr:`names` for weighted conditions;
            1 where left out.
        ridge: :math:`\lambda`, at least 0. Needed where basis functions depend on each other.
        curvature: ``Exact()``, or the *biased* ``GaussNewton()``.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Shape:
        ``layer(basis, params, values, offset=None, init=None)``: `basis` as :class:`Jvp` or the grids want it; `params`
        replace those of the equation; `values` are those that conditions ask for by name: numbers, tensors ``(*batch,
        1)`` or ``(*batch, m)``, or functions of points. `offset` is a field to which the basis adds, in the form of a
        basis without its last dimension (one that satisfies the initial values, beside basis functions that vanish
        there). `init`, ``(*batch, K)``, is where the iteration starts, such as the coefficients of the last call: no
        gradient flows to it.
        Returns a :class:`ConstrainedField`. The dtype and device are those of the basis if it is a tensor or a module
        with parameters, else of the layer (``layer.double()``, ``layer.to(device)``).

    Raises:
        ValueError: For a residual of the wrong shape, a term that was not declared, a value that is missing, points
            outside the domain, exact rows that contradict each other or leave no freedom; naming the argument.
        SolveError: For an element that diverged, or whose minimiser is not unique.

    Differentiable in the parameters of the network, in `params` and `values`, also through functions of points, to any
    order; with the exact Hessian. Points carry no gradient.

    Example:
        >>> import math, torch
        >>> from difflayers.pde import Heat, PDEConstraint
        >>> def basis(point):
        ...     t, x = point.unbind()
        ...     return t ** torch.arange(8, dtype=t.dtype) * torch.sin(x)
        >>> field = PDEConstraint(Heat(c=0.5)).double()(basis, values={"u0": lambda points: points[:, 1].sin()})
        >>> value = field(torch.tensor([[1.0, math.pi / 2]], dtype=torch.float64))
        >>> print(f"{value.item():.6f}, {math.exp(-0.5):.6f}")
        0.606531, 0.606531

    Source: G. Negiar, M. W. Mahoney, A. S. Krishnapriyan, Learning differentiable solvers for systems with hard
    constraints, 2023; N. Chalapathi, Y. Du, A. S. Krishnapriyan, Scaling physics-informed hard constraints with
    mixture-of-experts, 2024.

    Departure: rows are averaged, not summed, so that weights and ridge do not depend on the number of points; the
    gradient is that of a stationary point, see :func:`residual_least_squares`; conditions may hold exactly.
    """

    _like: Tensor

    def __init__(
        self,
        pde: PDE,
        *,
        derivatives: Derivatives = Jvp(),
        sampler: Sobol | Grid | Fixed | None = None,
        solver: LevenbergMarquardt = LevenbergMarquardt(),
        row_weights: Mapping[str, float] | None = None,
        ridge: float = 0.0,
        curvature: Exact | GaussNewton = Exact(),
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        check_policy(on_failure)
        if not isinstance(pde, PDE):
            raise ValueError(f"pde: expected an instance of PDE, such as Burgers(), got {pde!r}")
        self.pde, self.derivatives = pde, check_derivatives(derivatives)
        grid = None if isinstance(self.derivatives, Jvp) else self.derivatives.grid
        if grid is not None and sampler is not None and sampler is not grid:
            raise ValueError("sampler: expected None or the grid of the derivatives, got another")
        self.sampler = sampler or grid or Sobol()
        self.solver, self.ridge, self.curvature, self.on_failure = solver, ridge, curvature, on_failure
        self.row_weights = {"residual": 1.0, **{b.label: 1.0 for b in pde.blocks if not b.exact}}
        for name, weight in (row_weights or {}).items():
            if name not in self.row_weights:
                raise ValueError(f"row_weights: expected names of {', '.join(self.row_weights)}, got {name!r}")
            if not 0 <= weight < math.inf:
                raise ValueError(f"row_weights[{name!r}]: expected a number of at least 0, got {weight!r}")
            self.row_weights[name] = float(weight)
        self._residual = Residual(pde)
        self.register_buffer("_like", torch.empty(0, device="cpu"), persistent=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the conditions, in `row_weights` and in the norms of the result."""
        return tuple(block.label for block in self.pde.blocks)

    def recipe(self, sampler: Sampler) -> Recipe:
        """What assembles the problem of a basis at the points of a sampler."""
        return Recipe(self.pde, self._residual, self.derivatives, sampler, self.row_weights)

    def extra_repr(self) -> str:
        """Equation, derivatives, points."""
        return f"{self.pde}, {self.derivatives}, {self.sampler}"

    def forward(
        self,
        basis: Basis,
        params: Given | None = None,
        values: Given | None = None,
        *,
        offset: Basis | None = None,
        init: Tensor | None = None,
    ) -> ConstrainedField:
        """The field that the equation makes of a basis."""
        return _solved(self, basis, params, values, offset, init)


@opaque
def _solved(
    layer: PDEConstraint,
    basis: Basis,
    params: Given | None,
    values: Given | None,
    offset: Basis | None,
    init: Tensor | None,
) -> ConstrainedField:
    recipe = layer.recipe(layer.sampler)
    parts = assemble(recipe, basis, params, values, offset, dtype_and_device(basis, layer._like))
    found, objective = fitted(layer, parts.call(layer.ridge, init), layer.on_failure, "PDEConstraint")
    terms = parts.terms(found.value)
    report = found.status, found.steps, found.residual, found.multipliers, found.linear
    norms, evaluate = parts.norms(found.value, terms), Evaluator(recipe, basis, offset)
    return ConstrainedField(found.value, *report, parts.inside.points, terms, norms, evaluate, objective)


def fitted(
    layer: PDEConstraint, given: tuple[Any, ...], on_failure: OnFailure, name: str
) -> tuple[ResidualSolution, Callable[[], Tensor]]:
    """As :func:`residual_least_squares_ex` with a policy for elements that failed, and what computes the objective."""
    with renamed(basis_terms="basis", y="values"):
        call = FitCall(*given)
        fit = call.problem(layer.solver, layer.curvature)
        found = _apply(fit.implicit(name), call.args, on_failure)
    x = found.value
    with torch.no_grad(), autocast_off(x):
        data, params = fit.unpack(tuple(t.detach() for t in call.args))
        B = data["basis_terms"]
        assert B is not None
        nothing = B.new_zeros(0, call.K), B.new_zeros(0)
        point = Fit(fit.F, params, B, data["offset"], None, *nothing, None, None)
        linear = constant_derivative(point, point.at(x.detach()[..., : call.K]))
    w, nu = x[..., : call.K].to(call.dtype), x[..., call.K :].to(call.dtype)
    solution = ResidualSolution(w, found.status, found.steps, found.residual, nu, linear)
    return solution, lambda: optimal_value(call, fit, x, on_failure)
