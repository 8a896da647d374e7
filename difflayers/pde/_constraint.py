"""A network whose output satisfies a differential equation: all parts of the family in one layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from difflayers._checks import check_same, renamed
from difflayers._solution import OnFailure, Solution, check_policy
from difflayers.implicit import Exact, GaussNewton, LevenbergMarquardt
from difflayers.implicit._engine import _apply
from difflayers.linalg._autodiff import autocast_off, opaque

from ._conditions import Block
from ._declaration import PDE
from ._derivatives import Basis, Derivatives, Jvp, check_derivatives, evaluated
from ._exact_rows import independent_rows
from ._fit_call import FitCall
from ._levenberg_marquardt import Fit, constant_derivative
from ._residual_least_squares import ResidualSolution
from ._samplers import Fixed, Grid, Place, Sobol

Given = Mapping[str, Any]


@dataclass(frozen=True)
class ConstrainedField(Solution[Tensor]):
    """A field that satisfies a differential equation as well as its basis allows, see :class:`PDEConstraint`.

    ``field(points)`` is ``(*batch, N)`` at points ``(N, d)`` of the domain, or ``(*batch, N, Q)`` for Q fields, unless
    the basis was given as values on a grid.

    Attributes:
        value: ``(*batch, K)`` coefficients of the basis functions, also as `weights`.
        status: ``(*batch)`` integers, see :class:`~difflayers.Status`.
        steps: ``(*batch)`` steps of the solver.
        residual: ``(*batch)`` norm of the gradient of the Lagrangian at the coefficients.
        multipliers: ``(*batch, p)`` Lagrange multipliers of the exact rows.
        linear: ``(*batch)`` booleans: the equation was linear, one solve was enough.
        points: ``(N, d)`` points at which the equation was enforced.
        terms: The terms of the field there, ``(*batch, N)`` each: differentiable, so is all but `norms`.
        norms: Root mean square of the equation's residual (``"residual"``) and of every condition's by its name,
            ``(*batch)`` each, as numbers.

    Example:
        >>> import torch
        >>> from difflayers.pde import Box, PDEConstraint, Poisson
        >>> layer = PDEConstraint(Poisson(domain=Box(x=(0.0, 1.0)))).double()
        >>> field = layer(lambda point: point ** torch.arange(4, dtype=torch.float64))
        >>> field(torch.tensor([[0.5]], dtype=torch.float64))
        tensor([0.1250], dtype=torch.float64)
    """

    multipliers: Tensor
    linear: Tensor
    points: Tensor
    terms: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]
    _evaluate: Callable[[Tensor, Tensor], Tensor] = field(repr=False)

    @property
    def weights(self) -> Tensor:
        """``(*batch, K)`` coefficients of the basis functions."""
        return self.value

    def __call__(self, points: Tensor) -> Tensor:
        """The field at points of the domain."""
        return self._evaluate(points, self.value)


class _Residual:
    """The residual of an equation as the solver calls it: unknown parameters are refused by name."""

    def __init__(self, pde: PDE) -> None:
        self.pde = pde

    def __call__(self, T: Mapping[str, Tensor], p: Mapping[str, Any]) -> Tensor:
        return self.pde.residual(T, _Named(p))


class _Named(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        raise ValueError(f"residual: expected one of the parameters {', '.join(self)}, got {name!r}")


class _Rows(NamedTuple):
    """Rows of one condition, ``A w = y``."""

    block: Block
    A: Tensor
    y: Tensor


class PDEConstraint(nn.Module):
    r"""The last layer of a network: its outputs become basis functions, and the field a solution of an equation.

    .. math:: w^* = \arg\min_w \frac{s_0^2}{2N} \sum_n \|F(T_n(w))\|^2 + \sum_c \frac{s_c^2}{2 m_c} \|A_c w - y_c\|^2
        + \frac\lambda2 \|w\|^2 \quad\text{s.t.}\quad \text{exact conditions}

    with the differential terms T of ``u = offset + basis . w`` at the sampled points. Equations that are linear are
    found out, and take one step. Of exact rows that depend on each other enough are dropped.

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
        ``layer(basis, params, values, offset=None)``: `basis` as :class:`Jvp` or the grids want it; `params` replace
        those of the equation; `values` are those that conditions ask for by name: numbers, tensors ``(*batch, 1)`` or
        ``(*batch, m)``, or functions of points. `offset` is a field to which the basis adds, in the form of a basis
        without its last dimension (one that satisfies the initial values, beside basis functions that vanish there).
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
            raise ValueError(f"pde: expected an instance of PDE, got {pde!r}")
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
        self._residual = _Residual(pde)
        self.register_buffer("_like", torch.empty(0, device="cpu"), persistent=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the conditions, in `row_weights` and in the norms of the result."""
        return tuple(block.label for block in self.pde.blocks)

    def extra_repr(self) -> str:
        """Equation, derivatives, points."""
        return f"{self.pde}, {self.derivatives}, {self.sampler}"

    def forward(
        self, basis: Basis, params: Given | None = None, values: Given | None = None, *, offset: Basis | None = None
    ) -> ConstrainedField:
        """The field that the equation makes of a basis."""
        return _solved(self, basis, params, values, offset)


@opaque
def _solved(
    layer: PDEConstraint, basis: Basis, params: Given | None, values: Given | None, offset: Basis | None
) -> ConstrainedField:
    pde, like = layer.pde, _like(basis, layer._like)
    given = _supplied(pde, params, values)
    inside = layer.sampler.interior(pde, like)
    B = layer.derivatives.terms(basis, inside, pde, pde.terms)
    T0 = None if offset is None else _offset(layer, offset, inside, pde.terms)
    named = {name: _number_at(given[name], f"params[{name!r}]", inside.points) for name in pde.params}
    named |= dict(zip(pde.coords, inside.points.unbind(-1), strict=True))
    rows = [_rows(layer, block, basis, offset, given, like) for block in pde.blocks]
    N = B.shape[-3]
    weights = like.new_full((N,), layer.row_weights["residual"] / math.sqrt(N))
    soft, hard = [r for r in rows if not r.block.exact], [r for r in rows if r.block.exact]
    s = [like.new_full(r.y.shape[-1:], layer.row_weights[r.block.label] / math.sqrt(r.y.shape[-1])) for r in soft]
    soft_rows = (*_joined(soft), torch.cat(s)) if soft else None
    equality = None
    if hard:
        C, d = _joined(hard)
        equality = independent_rows(C, d, [r.block.label for r in hard for _ in range(r.y.shape[-1])])
    found = _fitted(
        layer,
        (
            dict(zip(pde.terms, B.unbind(-2), strict=True)),
            layer._residual,
            named,
            None if T0 is None else dict(zip(pde.terms, T0.unbind(-1), strict=True)),
            weights,
            soft_rows,
            equality,
            layer.ridge,
            *(None,) * 3,
        ),
    )
    w = found.value
    T = (B * w[..., None, None, :]).sum(-1)
    terms = dict(zip(pde.terms, (T if T0 is None else T + T0).unbind(-1), strict=True))
    with torch.no_grad():
        F = layer._residual(terms, named)
        F = F if F.ndim < terms[pde.terms[0]].ndim + 1 else torch.linalg.vector_norm(F, dim=-1)
        misses = {"residual": F} | {r.block.label: (r.A * w.unsqueeze(-2)).sum(-1) - r.y for r in rows}
        norms = {name: miss.square().mean(-1).sqrt() for name, miss in misses.items()}

    def evaluate(points: Tensor, w: Tensor) -> Tensor:
        if isinstance(basis, Tensor):
            raise ValueError("field: expected a basis that is a function of a point, got values on a grid")
        pde.domain.check("points", points)
        event = 1 if len(pde.fields) == 1 else 2
        flat = points.flatten(0, -2)
        u = evaluated(basis, flat, pde).unflatten(-1 - event, points.shape[:-1])
        u = (u * w[(..., *(None,) * event, slice(None))]).sum(-1)
        if offset is None:
            return u
        assert callable(offset)
        u0 = evaluated(lambda x: offset(x).unsqueeze(-1), flat, pde).squeeze(-1)
        return u + u0.unflatten(-event, points.shape[:-1])

    return ConstrainedField(
        w,
        found.status,
        found.steps,
        found.residual,
        found.multipliers,
        found.linear,
        inside.points,
        terms,
        norms,
        evaluate,
    )


def _fitted(layer: PDEConstraint, given: tuple[Any, ...]) -> ResidualSolution:
    """As :func:`residual_least_squares_ex`, with the policy of the layer for elements that failed."""
    with renamed(basis_terms="basis", y="values"):
        call = FitCall(*given)
        fit = call.problem(layer.solver, layer.curvature)
        found = _apply(fit.implicit("PDEConstraint"), call.args, layer.on_failure)
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


def _like(basis: Any, own: Tensor) -> Tensor:
    """A tensor of the dtype and device to work in."""
    if isinstance(basis, nn.Module):
        own = next((p for p in basis.parameters() if p.is_floating_point()), own)
    elif isinstance(basis, Tensor):
        own = basis
    elif not callable(basis):
        raise ValueError(f"basis: expected a tensor or a function of a point, got {type(basis).__name__}")
    return torch.empty(0, dtype=own.dtype, device=own.device)


def _supplied(pde: PDE, params: Given | None, values: Given | None) -> dict[str, Any]:
    """Parameters and values by name, none missing and none too many."""
    asked = [block.value for block in pde.blocks if isinstance(block.value, str)]
    asked += [c for block in pde.blocks for c, _ in block.combination if isinstance(c, str)]
    wanted = [name for name in dict.fromkeys(asked) if name not in pde.params]
    for what, names, got in (("params", list(pde.params), params or {}), ("values", wanted, values or {})):
        for name in got:
            if name not in names:
                raise ValueError(f"{what}: expected names of {', '.join(names) or '(none)'}, got {name!r}")
    out = {**pde.params, **(params or {}), **(values or {})}
    for name in (*pde.params, *wanted):
        if out.get(name) is None:
            what = "params" if name in pde.params else "values"
            raise ValueError(f"{what}[{name!r}]: expected a number, a tensor or a function of points, got none")
    return out


def _number_at(value: Any, name: str, points: Tensor) -> Any:
    """A number, or a tensor ``(*batch, 1)`` or ``(*batch, N)``, of whatever was given."""
    if not isinstance(value, Tensor) and callable(value):
        value = value(points)
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a function that returns a tensor, got {type(value).__name__}")
    if isinstance(value, Tensor):
        check_same([("points", points), (name, value)])
        if value.ndim and value.shape[-1] not in (1, points.shape[-2]):
            raise ValueError(
                f"{name}: expected 1 or {points.shape[-2]} entries in the last dimension, one for each point, got "
                f"shape {tuple(value.shape)}"
            )
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: expected a number, a tensor or a function of points, got {type(value).__name__}")
    return value


def _offset(layer: PDEConstraint, offset: Basis, place: Place, names: Sequence[str]) -> Tensor:
    wide: Basis = offset.unsqueeze(-1) if isinstance(offset, Tensor) else lambda x: offset(x).unsqueeze(-1)
    return layer.derivatives.terms(wide, place, layer.pde, names).squeeze(-1)


def _rows(
    layer: PDEConstraint, block: Block, basis: Basis, offset: Basis | None, given: dict[str, Any], like: Tensor
) -> _Rows:
    """The rows of one condition."""
    pde, names = layer.pde, [term for _, term in block.combination]
    place = layer.sampler.face(pde, block.axis, block.upper, like)
    y = _number_at(given[block.value] if isinstance(block.value, str) else block.value, block.label, place.points)
    y = y if isinstance(y, Tensor) else like.new_full((), y)
    y = y.unsqueeze(-1) if y.ndim == 0 else y
    coefficients = []
    for c, _ in block.combination:
        value = given[c] if isinstance(c, str) else c(given) if callable(c) else c
        value = _number_at(value, block.label, place.points)
        coefficients.append(value if isinstance(value, Tensor) else like.new_full((), value))

    def combined(terms: Tensor) -> Tensor:
        """Along the terms, ``(*batch, m, T, k)``."""
        parts = [c.unsqueeze(-1) * t if c.ndim else c * t for c, t in zip(coefficients, terms.unbind(-2), strict=True)]
        out = parts[0]
        for part in parts[1:]:
            out = out + part
        return out

    def at(function: Callable[[Place], Tensor]) -> Tensor:
        out = combined(function(place))
        if not block.paired:
            return out
        return out - combined(function(layer.sampler.face(pde, block.axis, True, like)))

    A = at(lambda where: layer.derivatives.terms(basis, where, pde, names))
    if offset is not None:
        y = y - at(lambda where: _offset(layer, offset, where, names).unsqueeze(-1)).squeeze(-1)
    return _Rows(block, A, y.expand(*y.shape[:-1], A.shape[-2]))


def _joined(rows: list[_Rows]) -> tuple[Tensor, Tensor]:
    """All rows behind each other, with one batch."""
    batch = torch.broadcast_shapes(*(r.A.shape[:-2] for r in rows), *(r.y.shape[:-1] for r in rows))
    A = torch.cat([r.A.expand(*batch, *r.A.shape[-2:]) for r in rows], -2)
    return A, torch.cat([r.y.expand(*batch, *r.y.shape[-1:]) for r in rows], -1)
