r"""Losses of one prediction, as the convex programs need them: in the prediction, and in its slope.

Every loss is convex in the prediction f, and with the conjugate :math:`l^*(t, y) = \max_f t f - l(f, y)` it is
:math:`l(f, y) = \max_t t f - l^*(t, y)`, with the slope t in an interval. With slopes :math:`t_k` at hand and
:math:`\nu_k = -s_k t_k`, any :math:`c \in [0, 1]` with :math:`c \max_i \|Z_i^T \nu\| \le \beta` gives the lower bound
:math:`-\sum_k s_k\, l^*(c\, t_k, y_k)` on the optimal value (Fenchel duality).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from difflayers.linalg._autodiff import physical


class Loss(ABC):
    """A convex loss ``l(f, y)`` of a prediction f and a label y, entry by entry."""

    curved = True  # whether the curvature depends on the prediction
    smooth = True  # whether the slope is continuous
    boxed = False  # whether the curvature jumps: a linear-quadratic loss, whose slopes have an interval

    @abstractmethod
    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """The loss."""

    @abstractmethod
    def slope(self, f: Tensor, y: Tensor) -> Tensor:
        """Its derivative in `f`."""

    @abstractmethod
    def curvature(self, f: Tensor, y: Tensor) -> Tensor:
        """Its second derivative in `f`."""

    def largest_curvature(self, y: Tensor) -> Tensor:
        """The largest that it has."""
        return self.curvature(torch.zeros_like(y), y)

    @abstractmethod
    def conjugate(self, t: Tensor, y: Tensor) -> Tensor:
        """``max_f t f - l(f, y)`` for slopes that the loss has."""

    def conjugate_slope(self, t: Tensor, y: Tensor) -> Tensor:
        """The prediction at which a boxed loss has the slope `t` inside the interval."""
        raise TypeError(f"loss: expected one of linear and quadratic pieces, got {self!r}")

    def conjugate_curvature(self, t: Tensor, y: Tensor) -> Tensor:
        """How fast that prediction moves with `t`."""
        raise TypeError(f"loss: expected one of linear and quadratic pieces, got {self!r}")

    def interval(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest slope of a boxed loss, of the shape of `y`."""
        ends = torch.full_like(y, torch.inf)
        return -ends, ends

    def reach(self, f: Tensor, y: Tensor) -> Tensor:
        """How far f may move before a parabola says little about the loss; for a boxed loss the ends see to that."""
        return torch.full_like(f * y, torch.inf)

    def longest(self, weight: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The c that makes the lower bound best where no pattern limits it: 1, or a better guess."""
        return torch.ones_like((weight * t).sum(-1))

    def in_units(self, weight: Tensor, y: Tensor) -> tuple[Loss, Tensor]:
        """The loss of predictions and labels over a unit of theirs, and the unit, ``(*batch)``."""
        return self, torch.ones_like((weight * y).sum(-1))

    def check_labels(self, y: Tensor) -> None:
        """Refuses labels that make no sense. Reads data."""
        del y  # most losses take any


def lower_bound(loss: Loss, s: Tensor, y: Tensor, t: Tensor, most: Tensor) -> Tensor:
    """``(*batch)``: the lower bound of the slopes `t`, each in the interval of the loss, times at most `most`."""
    c = torch.minimum(loss.longest(s, t, y), most)
    return -(s * loss.conjugate(c.unsqueeze(-1) * t, y)).sum(-1)


def _parabola(weight: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The maximiser of ``-sum s (c^2 t^2 / 2 + c t y)``."""
    size = (weight * t.square()).sum(-1)
    return torch.where(size > 0, -(weight * t * y).sum(-1) / torch.where(size > 0, size, 1), 1).clamp_min(0)


def _size(weight: Tensor, y: Tensor) -> Tensor:
    """The weighted length of the labels, for weights of at most 1."""
    size = (weight.sqrt() * y).norm(dim=-1)
    return torch.where(size == 0, 1, size)


@dataclass(frozen=True)
class Squared(Loss):
    """``1/2 (f - y)^2``: regression."""

    curved = False

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """``1/2 (f - y)^2``."""
        return (f - y).square() / 2

    def slope(self, f: Tensor, y: Tensor) -> Tensor:
        """``f - y``."""
        return f - y

    def curvature(self, f: Tensor, y: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(f - y)

    def conjugate(self, t: Tensor, y: Tensor) -> Tensor:
        """``t^2 / 2 + t y``."""
        return t * (t / 2 + y)

    def longest(self, weight: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The maximiser of a parabola."""
        return _parabola(weight, t, y)

    def in_units(self, weight: Tensor, y: Tensor) -> tuple[Loss, Tensor]:
        """The length of the labels."""
        return self, _size(weight, y)


@dataclass(frozen=True)
class Huber(Loss):
    """``1/2 (f - y)^2`` up to the distance `delta`, ``delta |f - y| - delta^2 / 2`` beyond: regression with outliers.

    Args:
        delta: More than 0: the distance beyond which the loss grows linearly.
    """

    boxed = True
    delta: Any = 1.0  # a tensor in units of a batch

    def __post_init__(self) -> None:
        if not isinstance(self.delta, Real) or not float(self.delta) > 0:
            raise ValueError(f"delta: expected a number more than 0, got {self.delta!r}")

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """The parabola up to `delta`, its tangents beyond."""
        r = (f - y).abs()
        inner = r.clamp(max=self.delta)
        return inner * (r - inner / 2)

    def slope(self, f: Tensor, y: Tensor) -> Tensor:
        """The residual, at most `delta`."""
        r = f - y
        return torch.where(r.abs() < self.delta, r, r.sign() * self.delta)

    def curvature(self, f: Tensor, y: Tensor) -> Tensor:
        """1 up to `delta`, 0 from there on."""
        r = f - y
        return torch.where(r.abs() < self.delta, torch.ones_like(r), 0)

    def largest_curvature(self, y: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(y)

    def conjugate(self, t: Tensor, y: Tensor) -> Tensor:
        """``t^2 / 2 + t y``."""
        return t * (t / 2 + y)

    def conjugate_slope(self, t: Tensor, y: Tensor) -> Tensor:
        """``t + y``."""
        return t + y

    def conjugate_curvature(self, t: Tensor, y: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def interval(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Up to `delta`."""
        ends = torch.ones_like(y) * self.delta
        return -ends, ends

    def longest(self, weight: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The maximiser of a parabola, as far as slopes go."""
        largest = torch.where(weight > 0, t, 0).abs().amax(-1)
        delta = self.delta.squeeze(-1) if isinstance(self.delta, Tensor) else self.delta
        room = torch.where(largest > 0, delta / torch.where(largest > 0, largest, 1), torch.inf)
        return torch.minimum(_parabola(weight, t, y), room.clamp_min(1))

    def in_units(self, weight: Tensor, y: Tensor) -> tuple[Loss, Tensor]:
        """The length of the labels, `delta` among them."""
        size = _size(weight, y)
        scaled = copy(self)
        # a tensor, past the check of what users give
        object.__setattr__(scaled, "delta", self.delta / size.unsqueeze(-1))
        return scaled, size


@dataclass(frozen=True)
class Logistic(Loss):
    """``log(1 + exp(-y f))``: classification with labels -1 and 1; others weigh the margin."""

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """``log(1 + exp(-y f))``."""
        return -torch.nn.functional.logsigmoid(y * f)

    def slope(self, f: Tensor, y: Tensor) -> Tensor:
        """``-y sigmoid(-y f)``."""
        return -y * torch.sigmoid(-y * f)

    def curvature(self, f: Tensor, y: Tensor) -> Tensor:
        """``y^2 p (1 - p)`` with ``p = sigmoid(-y f)``."""
        return y.square() * torch.sigmoid(-y * f) * torch.sigmoid(y * f)

    def conjugate(self, t: Tensor, y: Tensor) -> Tensor:
        """Minus the entropy of ``-t / y``."""
        p = _share(t, y)
        return torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)

    def reach(self, f: Tensor, y: Tensor) -> Tensor:
        """As far as p grows or falls by a factor, or further where it is next to 0 or 1."""
        return (y * f).abs().div(2).clamp(min=1) / torch.where(y == 0, 1, y).abs()

    def check_labels(self, y: Tensor) -> None:
        """A label 0 has no margin: most likely the classes are called 0 and 1."""
        _check_signs(y, "logistic")


@dataclass(frozen=True)
class Hinge(Loss):
    """``max(0, 1 - y f)``: classification with a margin, for labels -1 and 1; others weigh the margin."""

    smooth = False
    boxed = True

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """``max(0, 1 - y f)``."""
        return (1 - y * f).clamp(min=0)

    def slope(self, f: Tensor, y: Tensor) -> Tensor:
        """``-y`` within the margin, 0 beyond, and half of it at the kink."""
        room = 1 - y * f
        return torch.where(room > 0, -y, torch.where(room < 0, 0, -y / 2))

    def curvature(self, f: Tensor, y: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(y * f)

    def conjugate(self, t: Tensor, y: Tensor) -> Tensor:
        """``t / y``."""
        return -_share(t, y)

    def conjugate_slope(self, t: Tensor, y: Tensor) -> Tensor:
        """``1 / y``."""
        return (1 / torch.where(y == 0, 1, y)).expand_as(t * y)

    def conjugate_curvature(self, t: Tensor, y: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(t * y)

    def interval(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """From 0 to ``-y``."""
        return (-y).clamp(max=0), (-y).clamp(min=0)

    def check_labels(self, y: Tensor) -> None:
        """As for the logistic loss."""
        _check_signs(y, "hinge")


def _share(t: Tensor, y: Tensor) -> Tensor:
    """``-t / y``, between 0 and 1."""
    return (-t / torch.where(y == 0, 1, y)).clamp(0, 1)


def _check_signs(y: Tensor, name: str) -> None:
    plain = physical(y)
    zeros = 0 if plain.is_meta else int((plain == 0).sum())
    if zeros:
        raise ValueError(f"y: expected labels -1 and 1 for the {name} loss, got {zeros} labels 0 of {y.numel()}")
