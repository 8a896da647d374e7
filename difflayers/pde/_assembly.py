"""An equation, a basis and points, put together to the least-squares problem of the coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from difflayers._checks import check_same
from difflayers.linalg._system import times

from ._conditions import Block
from ._declaration import PDE
from ._derivatives import Basis, Derivatives
from ._exact_rows import independent_rows
from ._samplers import Place, Sampler

Given = Mapping[str, Any]


class Residual:
    """The residual of an equation as the solver calls it: unknown parameters are refused by name."""

    def __init__(self, pde: PDE) -> None:
        self.pde = pde

    def __call__(self, T: Mapping[str, Tensor], p: Mapping[str, Any]) -> Tensor:
        return self.pde.residual(T, _Named(p))


class _Named(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        raise ValueError(f"residual: expected one of the parameters {', '.join(self)}, got {name!r}")


class Rows(NamedTuple):
    """Rows of one condition, ``A w = y``; `present` is ``(*batch, m)``, or None where all of them are."""

    block: Block
    A: Tensor
    y: Tensor
    present: Tensor | None


@dataclass(frozen=True)
class Recipe:
    """What a layer says once, for every basis.

    Attributes:
        pde: The equation.
        residual: Its residual, the same object at every call.
        derivatives: How terms are computed.
        sampler: Where.
        row_weights: Factors of the equation and of weighted conditions, by name.
    """

    pde: PDE
    residual: Residual
    derivatives: Derivatives
    sampler: Sampler
    row_weights: Mapping[str, float]

    def offset_terms(self, offset: Basis, place: Place, names: Sequence[str]) -> Tensor:
        """``(*batch, N, T)`` terms of a field to which the basis adds."""
        wide: Basis = offset.unsqueeze(-1) if isinstance(offset, Tensor) else lambda x: offset(x).unsqueeze(-1)
        return self.derivatives.terms(wide, place, self.pde, names).squeeze(-1)


@dataclass(frozen=True)
class Assembly:
    """The least-squares problem of the coefficients, in its parts.

    Attributes:
        recipe: Equation and discretisation.
        inside: The points.
        B: ``(*batch, N, T, K)`` terms of the basis.
        T0: ``(*batch, N, T)`` terms of the offset, or None.
        params: Parameters and coordinates at the points.
        weights: ``(N)`` or ``(*experts, N)`` factors of the residuals.
        rows: Those of the conditions.
    """

    recipe: Recipe
    inside: Place
    B: Tensor
    T0: Tensor | None
    params: Mapping[str, Any]
    weights: Tensor
    rows: list[Rows]

    def call(self, ridge: float, init: Tensor | None) -> tuple[Any, ...]:
        """The arguments of :func:`residual_least_squares`, in their order."""
        names = self.recipe.pde.terms
        return (
            dict(zip(names, self.B.unbind(-2), strict=True)),
            self.recipe.residual,
            dict(self.params),
            None if self.T0 is None else dict(zip(names, self.T0.unbind(-1), strict=True)),
            self.weights,
            self.soft(),
            self.exact(),
            ridge,
            None,
            init,
            None,
        )

    def soft(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows in the least-squares sense, their right-hand sides and weights; those of a condition are averaged."""
        some = [r for r in self.rows if not r.block.exact]
        if not some:
            return None
        weights = []
        for r in some:
            factor = self.recipe.row_weights[r.block.label] / self.recipe.pde.scale(r.block.field)
            weights.append(factor * averaging(r.present, r.y))
        batch = torch.broadcast_shapes(*(s.shape[:-1] for s in weights))
        return (*joined(some), torch.cat([s.expand(*batch, s.shape[-1]) for s in weights], -1))

    def exact(self) -> tuple[Tensor, Tensor] | None:
        """Independent ones of the rows that hold exactly."""
        some = [r for r in self.rows if r.block.exact]
        if not some:
            return None
        return independent_rows(*joined(some), [r.block.label for r in some for _ in range(r.y.shape[-1])])

    def terms(self, w: Tensor) -> dict[str, Tensor]:
        """``(*batch, N)`` terms of the field with coefficients ``(*batch, K)``."""
        T = weighed(self.B, w, 2)
        return dict(zip(self.recipe.pde.terms, (T if self.T0 is None else T + self.T0).unbind(-1), strict=True))

    @torch.no_grad()
    def norms(self, w: Tensor, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Root mean square of the residual and of every condition's."""
        F = self.recipe.residual(terms, dict(self.params))
        F = F if F.ndim < next(iter(terms.values())).ndim + 1 else torch.linalg.vector_norm(F, dim=-1)
        out = {"residual": root_mean_square(F, self.inside.present)}
        for r in self.rows:
            out[r.block.label] = root_mean_square((r.A * w.unsqueeze(-2)).sum(-1) - r.y, r.present)
        return out


def assemble(
    recipe: Recipe, basis: Basis, params: Given | None, values: Given | None, offset: Basis | None, like: Tensor
) -> Assembly:
    """The problem of a basis; `like` has the dtype and device to work in."""
    pde = recipe.pde
    given = _supplied(pde, params, values)
    inside = recipe.sampler.interior(pde, like)
    B = recipe.derivatives.terms(basis, inside, pde, pde.terms)
    T0 = None if offset is None else recipe.offset_terms(offset, inside, pde.terms)
    named = {name: _number_at(given[name], f"params[{name!r}]", inside) for name in pde.params}
    named |= dict(zip(pde.coords, inside.points.unbind(-1), strict=True))
    rows = [_rows(recipe, block, basis, offset, given, like) for block in pde.blocks]
    weights = recipe.row_weights["residual"] / pde.scale("residual") * averaging(inside.present, inside.points[..., 0])
    return Assembly(recipe, inside, B, T0, named, weights, rows)


def weighed(basis: Tensor, w: Tensor, dims: int) -> Tensor:
    """The sum over basis functions ``(*batch, ..., K)`` with coefficients that lack the `dims` dimensions before K.

    Where coefficients are NaN, so is the field, by their sum alone: NaN times a zero cotangent would be NaN, and spoil
    the gradient of a network that other elements share.
    """
    lost = torch.isnan(w).any(-1)
    clean, total = torch.where(lost.unsqueeze(-1), 0, w), w.sum(-1)
    if dims == 0:
        return torch.where(lost, total, (basis * clean).sum(-1))
    shape = basis.shape[-1 - dims : -1]
    out = times(basis.flatten(-1 - dims, -2), clean).unflatten(-1, shape)
    wide = (..., *(None,) * dims)
    return torch.where(lost[wide], total[wide], out)


def averaging(present: Tensor | None, like: Tensor) -> Tensor:
    """Weights whose squares add up to 1: 1 over the root of the number of rows, 0 for rows that are not there."""
    if present is None:
        return like.new_full(like.shape[-1:], 1 / math.sqrt(like.shape[-1]))
    return present.to(like) / present.sum(-1, keepdim=True).clamp_min(1).to(like).sqrt()


def root_mean_square(miss: Tensor, present: Tensor | None) -> Tensor:
    """Over the last dimension, of what is there."""
    if present is None:
        return miss.square().mean(-1).sqrt()
    count = present.sum(-1).clamp_min(1).to(miss)
    return (torch.where(present, miss.square(), 0).sum(-1) / count).sqrt()


def dtype_and_device(basis: Any, own: Tensor) -> Tensor:
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


def _number_at(value: Any, name: str, place: Place) -> Any:
    """A number, or a tensor that broadcasts with ``(*batch, N)``, of whatever was given."""
    points = place.points
    if not isinstance(value, Tensor) and callable(value):
        value = value(points.flatten(0, -2))
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a function that returns a tensor, got {type(value).__name__}")
        check_same([("points", points), (name, value)])
        if value.ndim and value.shape[-1] not in (1, points.shape[:-1].numel()):
            raise ValueError(
                f"{name}: expected a function that returns one number for each of {points.shape[:-1].numel()} points, "
                f"got shape {tuple(value.shape)}"
            )
        if value.ndim == 0 or value.shape[-1] == 1:
            return place.spread(value) if value.ndim else value
        return value.unflatten(-1, points.shape[:-1])
    if isinstance(value, Tensor):
        check_same([("points", points), (name, value)])
        if value.ndim and value.shape[-1] not in (1, place.numbers):
            raise ValueError(
                f"{name}: expected 1 or {place.numbers} entries in the last dimension, one for each point, got shape "
                f"{tuple(value.shape)}"
            )
        return place.spread(value) if value.ndim else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: expected a number, a tensor or a function of points, got {type(value).__name__}")
    return value


def _rows(
    recipe: Recipe, block: Block, basis: Basis, offset: Basis | None, given: dict[str, Any], like: Tensor
) -> Rows:
    """The rows of one condition."""
    pde, names = recipe.pde, [term for _, term in block.combination]
    place = recipe.sampler.face(pde, block.axis, block.upper, like)
    y = _number_at(given[block.value] if isinstance(block.value, str) else block.value, block.label, place)
    y = y if isinstance(y, Tensor) else like.new_full((), y)
    y = y.unsqueeze(-1) if y.ndim == 0 else y
    coefficients = []
    for c, _ in block.combination:
        value = given[c] if isinstance(c, str) else c(given) if callable(c) else c
        value = _number_at(value, block.label, place)
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
        return out - combined(function(recipe.sampler.face(pde, block.axis, True, like)))

    A = at(lambda where: recipe.derivatives.terms(basis, where, pde, names))
    if offset is not None:
        y = y - at(lambda where: recipe.offset_terms(offset, where, names).unsqueeze(-1)).squeeze(-1)
    y = y.expand(*y.shape[:-1], A.shape[-2])
    if place.present is not None:  # what is not there may be anything, and 0 times NaN is NaN
        A, y = torch.where(place.present.unsqueeze(-1), A, 0), torch.where(place.present, y, 0)
    return Rows(block, A, y, place.present)


def joined(rows: list[Rows]) -> tuple[Tensor, Tensor]:
    """All rows behind each other, with one batch."""
    batch = torch.broadcast_shapes(*(r.A.shape[:-2] for r in rows), *(r.y.shape[:-1] for r in rows))
    A = torch.cat([r.A.expand(*batch, *r.A.shape[-2:]) for r in rows], -2)
    return A, torch.cat([r.y.expand(*batch, *r.y.shape[-1:]) for r in rows], -1)
