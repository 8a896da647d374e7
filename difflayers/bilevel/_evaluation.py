"""What a method asks of both objectives on one pair of batches: gradients and products at any point, counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from difflayers._checks import check_finite

from ._group import group_of
from ._objective import Objective
from ._oracles import Recorded, _gradient, _joined, check_graph
from ._variables import Variables

if TYPE_CHECKING:
    from ._method import Method


class Gradient(NamedTuple):
    """Value of an objective and its gradients in x and in y; see :class:`Evaluation` for those of blocks."""

    value: Tensor
    x: Tensor
    y: Tensor


class Evaluation:
    """Both objectives on one pair of batches, at any x and y (vectors); random numbers are the same at all points.

    With blocks, y is a matrix of one row for each of the sampled blocks, which are ``state["y"][at.rows]``: gradients
    in y are each block's own, row by row, and values and everything in x are means over these blocks.

    Attributes:
        rows: Indices of the sampled blocks; ``slice(None)`` for all of them, or without blocks.
    """

    def __init__(self, method: Method, upper_batch: Any, lower_batch: Any, blocks: Tensor | None = None) -> None:
        self.x, self.y, self.counts = method.x_variables, method.y_variables, method.counts
        self.rows: Tensor | slice = slice(None) if blocks is None else blocks
        problem = method.problem
        self.batches = {"upper": upper_batch, "lower": lower_batch}
        self.group = group = group_of(problem, self.x, self.y)
        self.objectives = {
            name: Objective(function, name, self.x, self.y, group=group)
            for name, function in (("upper", problem.upper), ("lower", problem.lower))
        }
        for name, objective in self.objectives.items():
            objective.refuse_captured(self.batches[name], rows=blocks)

    def refuse_infinite(self, **named: Tensor) -> None:
        """A ``ValueError`` where numbers are not finite, in all processes alike; names with underscores for spaces."""
        together = torch.stack([torch.isfinite(t.detach()).all() for t in named.values()]).all()

        def look() -> None:
            if not bool(together):
                check_finite((name.replace("_", " "), t.detach()) for name, t in named.items())

        if self.group is not None and self.y.blocks is not None:
            self.group.together(look, together.device)
        else:
            look()

    def put(self, whole: Tensor, part: Tensor) -> Tensor:
        """A matrix of all blocks with new rows for the sampled ones; the others keep their bits."""
        if isinstance(self.rows, slice):
            return part
        out = whole.clone()
        out[self.rows] = part
        return out

    def upper(self, x: Tensor, y: Tensor) -> Gradient:
        """The upper objective with both gradients."""
        return self._both("upper", x, y)

    def lower(self, x: Tensor, y: Tensor) -> Gradient:
        """The lower objective with both gradients."""
        return self._both("lower", x, y)

    def upper_in_y(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradient of the upper objective in y alone."""
        return self._one("upper", x, y, in_x=False)

    def lower_in_y(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradient of the lower objective in y alone."""
        return self._one("lower", x, y, in_x=False)

    def lower_in_x(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradient of the lower objective in x alone."""
        return self._one("lower", x, y, in_x=True)

    def slope(self, x: Tensor, y: Tensor) -> tuple[Tensor, Recorded]:
        """The lower objective, and its gradient in y with the graph for products ``H v`` and ``J v``."""
        self.counts["lower"] += 1
        xs, ys = _leaves(self.x, x, True), _leaves(self.y, y, True)
        with torch.enable_grad():
            value = self.objectives["lower"](xs, ys, self.batches["lower"])
            check_graph("lower", value)
            slope = self.y.join(_gradient(value, ys, create_graph=True))
        lower = self.objectives["lower"]
        return lower.mean(value), Recorded(slope, ys, xs, True, self.counts, count=lower.rows)

    def mixed_slope(self, x: Tensor, y: Tensor, mu: float) -> tuple[Gradient, tuple[Tensor, Tensor], Recorded]:
        """The upper gradients, the lower value and gradient in y, and that of ``mu F + (1 - mu) f`` with its graph."""
        self.counts["upper"] += 1
        self.counts["lower"] += 1
        xs, ys = _leaves(self.x, x, True), _leaves(self.y, y, True)
        with torch.enable_grad():
            upper = self.objectives["upper"](xs, ys, self.batches["upper"])
            lower = self.objectives["lower"](xs, ys, self.batches["lower"])
            check_graph("upper", upper)
            check_graph("lower", lower)
            parts = _gradient(upper, [*xs, *ys], create_graph=True)
            upper_x = self.objectives["upper"].of_mean(_joined(parts[: len(xs)]), upper)
            upper_y = self.y.join(parts[len(xs) :])
            lower_y = self.y.join(_gradient(lower, ys, create_graph=True))
            slope = mu * upper_y + (1 - mu) * lower_y
        means = {name: self.objectives[name].mean(value) for name, value in (("upper", upper), ("lower", lower))}
        gradient = Gradient(means["upper"], upper_x.detach(), upper_y.detach())
        recorded = Recorded(slope, ys, xs, True, self.counts, count=self.objectives["lower"].rows)
        return gradient, (means["lower"], lower_y.detach()), recorded

    def _both(self, level: str, x: Tensor, y: Tensor) -> Gradient:
        self.counts[level] += 1
        xs, ys = _leaves(self.x, x, True), _leaves(self.y, y, True)
        with torch.enable_grad():
            value = self.objectives[level](xs, ys, self.batches[level])
        check_graph(level, value)
        parts = _gradient(value, [*xs, *ys])
        objective, k = self.objectives[level], len(xs)
        in_x = objective.of_mean(_joined(parts[:k]), value)
        return Gradient(objective.mean(value), in_x, self.y.join(parts[k:]))

    def _one(self, level: str, x: Tensor, y: Tensor, *, in_x: bool) -> Tensor:
        self.counts[level] += 1
        xs, ys = _leaves(self.x, x, in_x), _leaves(self.y, y, not in_x)
        with torch.enable_grad():
            value = self.objectives[level](xs, ys, self.batches[level])
        parts = _gradient(value, xs if in_x else ys)
        return self.objectives[level].of_mean(_joined(parts), value) if in_x else self.y.join(parts)


def _leaves(variables: Variables, vector: Tensor, wanted: bool) -> list[Tensor]:
    return [leaf.detach().requires_grad_(wanted) for leaf in variables.split(vector)]
