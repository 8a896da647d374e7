"""Products with second derivatives by differences of gradients: no graph of a graph."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers.implicit import Implicit, Neumann, OneStep
from difflayers.linalg import CG

from ._oracles import Oracles


@dataclass(frozen=True)
class FiniteDifference:
    r"""Second-order products by central differences, for lower objectives that are differentiable only once.

    .. math:: H v \approx \frac{\nabla_y f(x, y + \epsilon v) - \nabla_y f(x, y - \epsilon v)}{2 \epsilon}, \qquad
        \epsilon = \text{radius} / \|v\|

    and the mixed product alike, from the gradients in x; two gradients a product, exact for a quadratic lower objective
    up to rounding. For :func:`hypergradient`. All products see the same random numbers.

    Args:
        adjoint: How the system is solved with these products: ``Implicit(solver, damping)`` with an iterative solver,
            ``Neumann(terms)`` or ``OneStep()``. Tolerances below the error of a difference are not met. None:
            ``Implicit(CG(rtol))`` with 1e-6 in double and 1e-4 in single precision.
        radius: How far the lower variables move. None: cube root of the rounding unit, times the norm of y, at least 1.

    Raises:
        ValueError: For a radius that is not positive.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import Bilevel, FiniteDifference, hypergradient
        >>> problem = Bilevel(lambda x, y, batch: y.square().sum(), lambda x, y, batch: (y - 3 * x).square().sum())
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> hypergradient(problem, x, 3 * x, adjoint=FiniteDifference()).grad.round(decimals=6)
        tensor([18., 36.], dtype=torch.float64)

    Source: H. Liu, K. Simonyan, Y. Yang, DARTS: Differentiable Architecture Search, 2019, equation 8.

    Departure: the paper takes the mixed product alone (the inverse Hessian replaced by a step length) with radius 0.01;
    that is ``FiniteDifference(Neumann(1, step), radius=0.01)``.
    """

    adjoint: Implicit | Neumann | OneStep | None = None
    radius: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.adjoint, Implicit | Neumann | OneStep | None):
            raise ValueError(f"adjoint: expected Implicit, Neumann or OneStep, got {type(self.adjoint).__name__}")
        if self.radius is not None and not 0 < self.radius < math.inf:
            raise ValueError(f"radius: expected None or a positive number, got {self.radius!r}")

    def inner(self, dtype: torch.dtype) -> Implicit | Neumann | OneStep:
        """How the system is solved; the error of a difference is near ``eps^(2/3)``."""
        rtol = max(1e-6, 4 * torch.finfo(dtype).eps ** (2 / 3))
        return self.adjoint if self.adjoint is not None else Implicit(CG(rtol=rtol))


class Differences:
    """The lower gradient as a function of y and x, its Jacobians by differences; as ``_oracles.Recorded``."""

    symmetric = True

    def __init__(self, oracles: Oracles, radius: float | None) -> None:
        self.oracles = oracles
        self.y = oracles.y_variables.join([leaf.detach() for leaf in oracles.y])
        self.value = oracles.lower_gradients_at(self.y)[1]
        self.gap = torch.linalg.vector_norm(self.value, dim=-1)
        if radius is None:
            size = torch.linalg.vector_norm(self.y, dim=-1, keepdim=True).clamp_min(1)
            self.radius = torch.finfo(self.y.dtype).eps ** (1 / 3) * size
        else:
            self.radius = self.y.new_full((), radius)

    def pull(self, v: Tensor) -> Tensor:
        """``H v``."""
        self.oracles.counts["hvp"] += 1
        return self._difference(v, 1)

    push = pull

    def cross(self, v: Tensor) -> Tensor:
        """``J v``."""
        self.oracles.counts["cross"] += 1
        return self._difference(v, 0)

    def matrix(self) -> Tensor:
        """H, symmetrised."""
        eye = torch.eye(self.y.shape[-1], dtype=self.y.dtype, device=self.y.device)
        H = torch.stack([self.pull(e.expand_as(self.y)) for e in eye], -2)
        return (H + H.mT) / 2

    def _difference(self, v: Tensor, which: int) -> Tensor:
        # the gradients in x are means over the blocks: these move by one length
        radius, norm = self.radius, torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        if which == 0:
            radius, norm = radius.min(), torch.linalg.vector_norm(v)
        epsilon = radius / torch.where(norm > 0, norm, 1)
        ahead = self.oracles.lower_gradients_at(self.y + epsilon * v)[which]
        behind = self.oracles.lower_gradients_at(self.y - epsilon * v)[which]
        return (ahead - behind) / (2 * epsilon)  # zero for v = 0
