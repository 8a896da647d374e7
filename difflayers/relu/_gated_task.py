r"""The gated problem of a batch of training sets: fit, objective, optimality, lower bound.

.. math:: \min_u \sum_k s_k\, l(f_k, y_k) + \beta \sum_i \|u_i\|, \qquad f = \sum_i Z_i u_i, \quad
    Z_i = \mathrm{diag}(M_{\cdot i}) X

The matrix of all :math:`Z_i` is never formed: :math:`f = (M \circ X U^T) 1`, and :math:`Z_i^T \nu` are the rows of
:math:`(M \circ \nu 1^T)^T X`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ._losses import Loss, lower_bound


def lengths(u: Tensor) -> Tensor:
    """Norms of the blocks, with derivative zero of every order at zero blocks."""
    active = (u != 0).any(-1, keepdim=True)
    return torch.where(active.squeeze(-1), torch.linalg.vector_norm(torch.where(active, u, 1), dim=-1), 0)


def directions(u: Tensor) -> Tensor:
    """Blocks over their norms; zero where a block is zero."""
    active = (u != 0).any(-1, keepdim=True)
    safe = torch.where(active, u, 1)
    return torch.where(active, safe / torch.linalg.vector_norm(safe, dim=-1, keepdim=True), 0)


def gated_fit(u: Tensor, X: Tensor, M: Tensor) -> Tensor:
    """``sum_i Z_i u_i``: the predictions ``(*batch, n)`` of neurons ``(*batch, P, d)``."""
    return (M * (X @ u.mT)).sum(-1)


@dataclass(frozen=True)
class GatedTask:
    """The data of a batch of gated problems.

    Attributes:
        X: ``(*batch, n, d)``.
        M: ``(*batch, n, P)`` patterns, zeros and ones in the dtype of X.
        y: ``(*batch, n)``.
        s: ``(*batch, n)``, at least 0.
        beta: ``(*batch)``, more than 0.
        loss: Loss of one prediction.
    """

    X: Tensor
    M: Tensor
    y: Tensor
    s: Tensor
    beta: Tensor
    loss: Loss

    def take(self, rows: Tensor) -> GatedTask:
        """The problems of some elements of one batch dimension."""
        data = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "loss"}
        return replace(self, **data)

    def fit(self, u: Tensor) -> Tensor:
        """The predictions."""
        return gated_fit(u, self.X, self.M)

    def pull(self, nu: Tensor) -> Tensor:
        """``Z_i^T nu`` for every block: ``(*batch, P, d)``."""
        return (self.M * nu.unsqueeze(-1)).mT @ self.X

    def slope(self, f: Tensor) -> Tensor:
        """The derivative of the loss in every block, at the predictions `f`."""
        return self.pull(self.s * self.loss.slope(f, self.y))

    def curvature(self, f: Tensor) -> Tensor:
        """The weighted second derivative of the loss at the predictions."""
        return self.s * self.loss.curvature(f, self.y)

    def data_term(self, f: Tensor) -> Tensor:
        """The weighted loss."""
        return (self.s * self.loss.value(f, self.y)).sum(-1)

    def bend(self, f: Tensor, g: Tensor) -> Tensor:
        """How far the loss at the predictions `g` lies above its tangent at `f`."""
        loss, y = self.loss, self.y
        return (self.s * (loss.value(g, y) - loss.value(f, y) - loss.slope(f, y) * (g - f))).sum(-1)

    def objective(self, u: Tensor) -> Tensor:
        """What is minimised."""
        return self.data_term(self.fit(u)) + self.beta * lengths(u).sum(-1)

    def residual(self, u: Tensor) -> Tensor:
        """Stationarity of the active blocks; the block itself where it is zero."""
        active = (u != 0).any(-1, keepdim=True)
        slope = self.slope(self.fit(u)) + self.beta[..., None, None] * directions(u)
        return torch.where(active, slope, u)

    def violation(self, u: Tensor, slope: Tensor) -> Tensor:
        """The length of the shortest subgradient, of the block where it is longest, given the slope of the loss."""
        active = (u != 0).any(-1)
        beta = self.beta.unsqueeze(-1)
        on = torch.linalg.vector_norm(slope + beta.unsqueeze(-1) * directions(u), dim=-1)
        off = (torch.linalg.vector_norm(slope, dim=-1) - beta).clamp_min(0)
        return torch.where(active, on, off).amax(-1)

    def noise(self, u: Tensor, f: Tensor) -> Tensor:
        """What rounding can add to a violation: the unit of accuracy that a solver can ask for."""
        terms = (self.M * (self.X @ u.mT)).abs().sum(-1)
        each = self.s * self.loss.slope(f, self.y).abs() + self.curvature(f) * (terms + self.y.abs())
        largest = (each * torch.linalg.vector_norm(self.X, dim=-1)).sum(-1)
        return torch.finfo(u.dtype).eps * torch.maximum(largest, self.beta)

    def lower_bound(self, u: Tensor, nu: Tensor | None = None) -> Tensor:
        """A lower bound on the optimal value, from the slopes at `u`: tight where `u` is optimal.

        A loss with kinks has many slopes there: `nu` are minus those to take, times the weights of the samples.
        """
        if nu is None:
            t = self.loss.slope(self.fit(u), self.y)
        else:
            t = torch.where(self.s > 0, -nu / torch.where(self.s > 0, self.s, 1), 0)
        largest = torch.linalg.vector_norm(self.pull(self.s * t), dim=-1).amax(-1)
        most = torch.where(largest > 0, self.beta / torch.where(largest > 0, largest, 1), torch.inf)
        return lower_bound(self.loss, self.s, self.y, t, most)
