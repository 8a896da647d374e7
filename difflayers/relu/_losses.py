r"""Losses of one prediction, as the convex programs need them: value, slope, curvature and conjugate.

Each is convex and smooth in the prediction f. With :math:`\nu_k = -s_k\, l'(f_k, y_k)`, any :math:`c \in [0, 1]` with
:math:`c \max_i \|Z_i^T \nu\| \le \beta` gives the lower bound :math:`-\sum_k s_k\, l^*(c\, l'_k, y_k)` on the optimal
value (Fenchel duality), where :math:`l^*(t, y) = \max_f t f - l(f, y)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers.linalg._autodiff import physical


class Loss(ABC):
    """A convex, smooth loss ``l(f, y)`` of a prediction f and a label y, entry by entry."""

    @abstractmethod
    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """The loss."""

    @abstractmethod
    def slope(self, f: Tensor, y: Tensor) -> Tensor:
        """Its derivative in `f`."""

    @abstractmethod
    def curvature(self, f: Tensor, y: Tensor) -> Tensor:
        """Its second derivative in `f`."""

    @abstractmethod
    def conjugate(self, c: Tensor, f: Tensor, y: Tensor) -> Tensor:
        """``max_z t z - l(z, y)`` at ``t = c * slope(f, y)`` for ``0 <= c <= 1``."""

    def longest(self, weight: Tensor, f: Tensor, y: Tensor) -> Tensor:
        """The c that makes the lower bound best where no pattern limits it: 1, or a better guess."""
        return torch.ones_like((weight * f).sum(-1))

    def check_labels(self, y: Tensor) -> None:
        """Refuses labels that make no sense. Reads data."""
        del y  # most losses take any


@dataclass(frozen=True)
class Squared(Loss):
    """``1/2 (f - y)^2``: regression."""

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """``1/2 (f - y)^2``."""
        return (f - y).square() / 2

    def slope(self, f: Tensor, y: Tensor) -> Tensor:
        """``f - y``."""
        return f - y

    def curvature(self, f: Tensor, y: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(f - y)

    def conjugate(self, c: Tensor, f: Tensor, y: Tensor) -> Tensor:
        """``t^2 / 2 + t y``."""
        t = c * (f - y)
        return t * (t / 2 + y)

    def longest(self, weight: Tensor, f: Tensor, y: Tensor) -> Tensor:
        """The maximiser of a parabola."""
        r = f - y
        size = (weight * r.square()).sum(-1)
        return torch.where(size > 0, -(weight * r * y).sum(-1) / torch.where(size > 0, size, 1), 1).clamp_min(0)


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

    def conjugate(self, c: Tensor, f: Tensor, y: Tensor) -> Tensor:
        """Minus the entropy of ``c sigmoid(-y f)``."""
        p = c * torch.sigmoid(-y * f)
        return torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)

    def check_labels(self, y: Tensor) -> None:
        """A label 0 has no margin: most likely the classes are called 0 and 1."""
        plain = physical(y)
        zeros = 0 if plain.is_meta else int((plain == 0).sum())
        if zeros:
            raise ValueError(f"y: expected labels -1 and 1 for the logistic loss, got {zeros} labels 0 of {y.numel()}")
