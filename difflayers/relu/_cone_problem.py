r"""The convex program of a two-layer ReLU network over given activation patterns, as arrays: what its solvers see.

.. math:: \min_p \textstyle\sum_k s_k\, l(f_k, y_k) + \beta \sum_i \|p_i\|, \quad
    f = \textstyle\sum_i \sigma_i Z_i p_i, \quad K_i p_i \ge 0

Both signs of the output neuron lie behind one another: with P patterns there are 2 P blocks, the first P of sign +1
(``v``) and the rest of sign -1 (``w``). The n x d P matrix of gated data is never formed.
M. Pilanci, T. Ergen, Neural Networks are Convex Regularizers, 2020, equation (8).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ._losses import Loss, Squared


@dataclass(frozen=True, eq=False)
class ConeProblem:
    """One batch of programs; nothing of it is differentiated.

    Args:
        X: Inputs, ``(*B, n, d)``.
        y: Labels, ``(*B, n)``.
        s: Sample weights of at least 0, ``(*B, n)``.
        beta: Regularisation above 0, ``(*B)``.
        M: Patterns, 0 or 1, ``(*B, n, P)``, of the dtype of `X`.
        loss: Loss of one prediction.
        gated: Whether the neurons are those of a gated network, free of cones. Only their difference matters then.
    """

    X: Tensor
    y: Tensor
    s: Tensor
    beta: Tensor
    M: Tensor
    loss: Loss = field(default_factory=Squared)
    gated: bool = False

    @cached_property
    def gate(self) -> Tensor:
        """``(*B, P, n)``."""
        return self.M.mT.contiguous()

    @cached_property
    def signed_gate(self) -> Tensor:
        """``(*B, 2P, n)``: the patterns times the sign of the output neuron."""
        return torch.cat([self.gate, -self.gate], -2)

    @cached_property
    def side(self) -> Tensor:
        """``(*B, 2P, n)``: on which side of a point the cell of a pattern lies, 1 or -1; 0 for points at the origin."""
        if self.gated:
            return torch.zeros_like(self.signed_gate)
        sides = (2 * self.gate - 1) * (self.X != 0).any(-1).to(self.X.dtype).unsqueeze(-2)
        return torch.cat([sides, sides], -2)

    def fit(self, p: Tensor) -> Tensor:
        """``(*B, n)``: the network's values on the data."""
        return (self.signed_gate * (p @ self.X.mT)).sum(-2)

    def fit_adjoint(self, nu: Tensor) -> Tensor:
        """``(*B, 2P, d)``."""
        return (self.signed_gate * nu.unsqueeze(-2)) @ self.X

    def cones(self, p: Tensor) -> Tensor:
        """``(*B, 2P, n)``: at least 0 inside the cells."""
        return self.side * (p @ self.X.mT)

    def cones_adjoint(self, rho: Tensor) -> Tensor:
        """``(*B, 2P, d)``."""
        return (self.side * rho) @ self.X

    def objective(self, p: Tensor) -> Tensor:
        """``(*B)``."""
        loss = self.loss.value(self.fit(p), self.y)
        return (self.s * loss).sum(-1) + self.beta * torch.linalg.vector_norm(p, dim=-1).sum(-1)

    def slope(self, p: Tensor) -> Tensor:
        """``(*B, n)``: of the loss of each sample, without its weight."""
        return self.loss.slope(self.fit(p), self.y)

    def violation(self, p: Tensor) -> Tensor:
        """``(*B)``: how far a neuron leaves its cell, at most, in units of the output at a point."""
        return (-self.cones(p)).clamp(min=0).amax((-2, -1)) if p.numel() else p.new_zeros(p.shape[:-2])

    def to(self, dtype: torch.dtype) -> ConeProblem:
        """The same in another precision."""
        return replace(self, **{f.name: getattr(self, f.name).to(dtype) for f in fields(self)[:5]})


class ConeSolution(NamedTuple):
    """What a solver found, an entry of the batch each.

    ``v, w (*B, P, d)`` neurons with exact zeros, ``rho_v, rho_w (*B, P, n)`` multipliers of their cones of at least 0,
    ``objective``, ``gap`` (a bound of how far it lies above the optimum over these patterns), ``violation`` of the
    cones, and ``status, steps, residual``, all ``(*B)``; ``slope (*B, n)`` of the loss, without the weights of samples,
    at kinks of the loss the one that makes the network stationary.
    """

    v: Tensor
    w: Tensor
    rho_v: Tensor
    rho_w: Tensor
    objective: Tensor
    gap: Tensor
    violation: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    slope: Tensor | None = None


class ConeSolver(Protocol):
    """Solves one batch of constrained programs. A frozen dataclass."""

    def __hash__(self) -> int: ...

    def solve(self, problem: ConeProblem, init: ConeSolution | None = None) -> ConeSolution:
        """`init` is the solution of a similar problem with as many patterns, where one is at hand."""


class Scales(NamedTuple):
    """Units in which the rows of `X` are at most 1 long and the loss of the zero network is 1/2, or less."""

    x: Tensor
    y: Tensor
    s: Tensor
    beta: Tensor  # of what is zero: the largest beta that could matter


def or_one(t: Tensor) -> Tensor:
    """What may be divided by; NaN stays."""
    return torch.where(t == 0, 1, t)


def normalise(problem: ConeProblem) -> tuple[ConeProblem, Scales, Tensor]:
    """The problem in those units, the units, and which elements a bound shows to be zero at the optimum.

    No block of the zero network wants to grow where ``beta >= ||Z_i^T nu||`` for all i. There, and only there, `beta`
    is replaced by that bound, which keeps numbers of any size within range.
    """
    x = or_one(torch.linalg.vector_norm(problem.X, dim=-1).amax(-1))
    s = or_one(problem.s.amax(-1))
    loss, y = problem.loss.in_units(problem.s / s[..., None], problem.y)
    labels = problem.y / y[..., None]
    if loss.curved:  # the square has its units from the labels
        s = s * or_one(2 * (problem.s / s[..., None] * loss.value(torch.zeros_like(labels), labels)).sum(-1))
    X, weights = problem.X / x[..., None, None], problem.s / s[..., None]
    unit = replace(problem, X=X, y=labels, s=weights, beta=problem.beta / s / x / y, loss=loss)
    bound = torch.linalg.vector_norm(unit.fit_adjoint(weights * loss.slope(torch.zeros_like(labels), labels)), dim=-1)
    bound = bound.amax(-1) if bound.shape[-1] else torch.zeros_like(unit.beta)
    # rounding may leave a bound a little too low: 1e-12 of it is given away
    zero = unit.beta >= bound * (1 + 1e-12)
    beta = torch.where(zero, or_one(bound), unit.beta)
    return replace(unit, beta=beta), Scales(x, y, s, s * x * y), zero
