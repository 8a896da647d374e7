"""The field that a layer returns: coefficients with their report, and its values anywhere in the domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from difflayers._checks import check_same
from difflayers._solution import Solution

from ._assembly import Recipe, weighed
from ._declaration import Box
from ._derivatives import Basis, evaluated
from ._gates import Seam, Tiling
from ._samplers import Grid


@dataclass(frozen=True)
class Evaluator:
    """Values of ``offset + basis . w`` at points."""

    recipe: Recipe
    basis: Basis
    offset: Basis | None
    tiling: Tiling | None = None

    def __call__(self, points: Tensor | None, w: Tensor) -> Tensor:
        pde = self.recipe.pde
        event = 1 if len(pde.fields) == 1 else 2
        shape: tuple[int, ...]
        grid = getattr(self.recipe.derivatives, "grid", None)
        if points is None:
            if not isinstance(grid, Grid):
                raise ValueError("points: expected a tensor where there is no grid of derivatives, got None")
            flat, shape = grid.points(w), grid.shape
        elif isinstance(self.basis, Tensor):
            raise ValueError(
                "points: expected a basis that is a function of a point, got values on a grid; call the field without "
                "points for its values there"
            )
        else:
            check_same([("the field", w), ("points", points)])
            pde.domain.check("points", points)
            flat, shape = points.flatten(0, -2), tuple(points.shape[:-1])
        out = self._mixed(self._at(self.basis, flat, event), w, flat, event, shape)
        if self.offset is None:
            return out
        offset = self.offset
        wide: Basis = offset.unsqueeze(-1) if isinstance(offset, Tensor) else lambda x: offset(x).unsqueeze(-1)
        return out + self._at(wide, flat, event).squeeze(-1).unflatten(-event, shape)

    def _at(self, basis: Basis, flat: Tensor, event: int) -> Tensor:
        """``(*batch, M, K)``, or ``(*batch, M, Q, K)``."""
        if not isinstance(basis, Tensor):
            return evaluated(basis, flat, self.recipe.pde)
        d = len(self.recipe.pde.coords)
        return basis.flatten(-d - event, -1 - event)

    def _mixed(self, u: Tensor, w: Tensor, flat: Tensor, event: int, shape: tuple[int, ...]) -> Tensor:
        if self.tiling is None:
            return weighed(u, w, event).unflatten(-event, shape)
        index, share = self.tiling.mix(flat)
        c = w.index_select(-2, index.flatten()).unflatten(-2, index.shape)  # (*batch, M, s, K)
        c = c.squeeze(-2) if share is None else (c * share.unsqueeze(-1)).sum(-2)
        return weighed(u, c, event - 1).unflatten(-event, shape)


@dataclass(frozen=True)
class ConstrainedField(Solution[Tensor]):
    """A field that satisfies a differential equation as well as its basis allows, see :class:`PDEConstraint`.

    ``field(points)`` is ``(*batch, ...)`` at points ``(..., d)`` of the domain, at least ``(N, d)``, and has a last
    dimension for several fields. Where derivatives are taken on a grid, ``field()`` has the values on it, ``(*batch,
    n_1, ..., n_d)``; a basis that was given as values on the grid has no others.

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
    _evaluate: Evaluator = field(repr=False)
    _objective: Callable[[], Tensor] = field(repr=False)

    @property
    def objective(self) -> Tensor:
        """``(*batch)`` what was minimised, ridge included, computed when it is asked for.

        By the envelope theorem its gradient needs no linear solve, nor curvature of the equation: as the loss of a
        network it is cheaper than one of `terms`, and bears kinks that keep the solver from its tolerance.
        """
        return self._objective()

    @property
    def weights(self) -> Tensor:
        """``(*batch, K)`` coefficients of the basis functions."""
        return self.value

    def __call__(self, points: Tensor | None = None) -> Tensor:
        """The field at points of the domain, or on the grid of the derivatives."""
        return self._evaluate(points, self.value)


@dataclass(frozen=True)
class ExpertField(ConstrainedField):
    """A field made of those of E experts, see :class:`DomainExperts`; all of :class:`ConstrainedField`, and more.

    Shapes are those of :class:`ConstrainedField` with a dimension for the experts behind the batch: `value`
    ``(*batch, E, K)``, `status`, `steps`, `residual`, `linear`, each of the `norms`, and `objective` ``(*batch, E)``,
    `points` ``(E, N, d)``, each of the `terms` ``(*batch, E, N)``. Experts with fewer points repeat one, see `present`.
    Under :class:`Continuity` there is one problem: `objective` is ``(*batch)``, `multipliers` ``(*batch, p)``.

    Attributes:
        present: ``(E, N)`` booleans: points that count; None: all of them.
        boxes: The box of every expert, with what it shares with others.
        seams: Pairs of neighbours.
        jumps: ``(*batch, S)`` root mean square of the difference of neighbours on each of the seams, as numbers; on a
            grid at the first nodes of the upper box.

    Example:
        >>> import torch
        >>> from difflayers.pde import Box, DomainExperts, HardBoxes, PDEConstraint, Poisson
        >>> line = Poisson(domain=Box(x=(0.0, 1.0)))
        >>> experts = DomainExperts(PDEConstraint(line, ridge=1e-6), HardBoxes(x=2)).double()
        >>> field = experts(lambda point: point ** torch.arange(4, dtype=torch.float64))
        >>> field.value.shape, field.seams[0].at, field.jumps.shape
        (torch.Size([2, 4]), 0.5, torch.Size([1]))
    """

    present: Tensor | None
    boxes: tuple[Box, ...]
    seams: tuple[Seam, ...]
    jumps: Tensor
