"""Units of a constrained problem, Newton steps on its active set, and the nearest point where its constraints hold."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._constraints import Layout
from ._iterate import iterate, size
from ._kkt import Parts, balanced, derivatives
from ._levenberg_marquardt import LevenbergMarquardt


class Units(NamedTuple):
    """What makes unknown, gradients and multipliers numbers of order one; one set per element."""

    length: Tensor  # of the unknown
    slope: Tensor  # of the objective's gradient
    rows: Tensor  # (*batch, p + m): of the gradient of each constraint

    @staticmethod
    def at(parts: Parts, z: Tensor) -> Units:
        """Units from values and derivatives at `z`."""
        only = z.new_zeros(*z.shape[:-1], parts.layout.p + parts.layout.m)
        found = derivatives(parts, z, torch.cat([torch.ones_like(z[..., :1]), only], -1))
        return Units.of(parts.layout, z, *found)

    @staticmethod
    def of(layout: Layout, z: Tensor, out: Tensor, J: Tensor, H: Tensor) -> Units:
        """Units from ``(f, h, g)`` at `z`, its Jacobian, and a Hessian."""
        slope, bend = size(J[..., 0, :]), torch.linalg.vector_norm(H, dim=(-2, -1))
        rows, values = size(J[..., 1:, :]), out[..., 1:]
        away = torch.where(rows > 0, values.abs() / torch.where(rows > 0, rows, 1), 0)
        violated = (values > 0) | (torch.arange(values.shape[-1], device=z.device) < layout.p)
        none = torch.zeros_like(z[..., :1])
        length = torch.maximum(size(z), torch.cat([none, torch.where(violated, away, 0)], -1).amax(-1))
        # a Newton step of the objective, or the way to inequalities that hold, whichever is shorter
        newton = torch.where((slope > 0) & (bend > 0), slope / torch.where(bend > 0, bend, 1), math.inf)
        free = ~violated & (away > 0)
        mean = torch.where(free, torch.where(free, away, 1).log(), 0).sum(-1) / free.sum(-1)  # NaN where there is none
        other = torch.fmin(newton, mean.exp())
        length = _usable(torch.where(torch.isfinite(other), torch.maximum(length, other), length))
        values = values.abs()
        slope = _usable(torch.maximum(slope, bend * length))
        return Units(length, slope, _usable(torch.maximum(rows, values / length.unsqueeze(-1))))

    def scaled(self, parts: Parts) -> Parts:
        """The problem in these units."""
        length = self.length.unsqueeze(-1)
        by = torch.cat([self.slope.unsqueeze(-1), self.rows], -1) * length
        return Parts(lambda u: parts.function(u * length) / by, parts.layout)

    def scaled_derivatives(self, out: Tensor, J: Tensor, H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values, Jacobian and Hessian of the Lagrangian in these units."""
        length = self.length[..., None, None]
        by = torch.cat([self.slope.unsqueeze(-1), self.rows], -1)
        return (
            out / by / self.length.unsqueeze(-1),
            J / by.unsqueeze(-1),
            H * (length / self.slope[..., None, None]),
        )

    def original(self, value: Tensor, layout: Layout) -> Tensor:
        """``(z, nu, lambda)`` of the problem from that in these units."""
        return value * self._factor(layout)

    def own(self, value: Tensor, layout: Layout) -> Tensor:
        """The way back."""
        return value / self._factor(layout)

    def _factor(self, layout: Layout) -> Tensor:
        length = self.length.unsqueeze(-1).expand(*self.length.shape, layout.n)
        return torch.cat([length, self.slope.unsqueeze(-1) / self.rows], -1)


def _usable(t: Tensor) -> Tensor:
    return torch.where((t > 0) & torch.isfinite(t), t, 1)


def sharpen(parts: Parts, value: Tensor, tol: float, steps: int = 4) -> tuple[Tensor, Tensor]:
    """Newton steps on the active set, kept where the conditions come closer; and how far they are from met.

    An inequality is taken for active where its multiplier exceeds its slack, both in units of the problem; a multiplier
    that no coordinate's gradient can tell from zero is none.
    """
    layout = parts.layout
    n, p = layout.n, layout.p
    one, eps = torch.ones_like(value[..., :1]), torch.finfo(value.dtype).eps
    best = first = value
    least = torch.full_like(value[..., 0], math.inf)
    # of the objective alone: multipliers without bound (no constraint qualification) would make every gradient small
    units = Units.at(parts, value[..., :n])
    x, restarted = units.own(value, layout), torch.zeros_like(least, dtype=torch.bool)
    for k in range(steps + 1):
        derived = derivatives(parts, value[..., :n], torch.cat([one, value[..., n:]], -1))
        out, J, H = units.scaled_derivatives(*derived)
        z, nu, lam = x[..., :n], x[..., n : n + p], x[..., n + p :]
        h, g = out[..., 1 : 1 + p], out[..., 1 + p :]
        active = lam + g > 0
        clean = torch.cat([z, nu, torch.where(active, lam, 0)], -1)
        terms = torch.cat([one, clean[..., n:]], -1).unsqueeze(-1) * J
        largest = terms.abs().amax(-2)
        # multipliers of rows that depend on each other cancel, whatever their size: nothing is measured against them
        most = tol**-0.5
        own = torch.maximum(largest, torch.linalg.vector_norm(H, dim=-1)).clamp_max(most)
        counts = (terms[..., 1 + p :, :].abs() > 0.1 * tol * own.unsqueeze(-2)).any(-1)
        lam = torch.where(active & counts, lam, 0)
        clean = torch.cat([z, nu, lam], -1)
        slope = (torch.cat([one, nu, lam], -1).unsqueeze(-2) @ J).squeeze(-2)
        # a row was let go beside its bound: each coordinate it touches has to rest by its own numbers, however small
        close = (lam == 0) & (g > -(tol**0.25))
        touched = (close.unsqueeze(-1) & (J[..., 1 + p :, :] != 0)).any(-2)
        size_of_terms = 1 + largest.amax(-1, keepdim=True)
        whole = size_of_terms.clamp_max(most)
        unmet = torch.cat(
            [
                slope / torch.where(touched, torch.minimum(own.clamp_min(eps), whole), whole),
                h,
                torch.minimum(lam / whole, -g),
            ],
            -1,
        )
        error = torch.linalg.vector_norm(unmet, math.inf, dim=-1)
        if k == 0:
            better, first = torch.ones_like(error, dtype=torch.bool), clean
        else:
            near = size((clean - first)[..., :n]) <= 0.1 * (1 + size(first[..., :n]))
            better = (error < least) & near
        best = torch.where(better.unsqueeze(-1), clean, best)
        least = torch.where(better, error, least)
        # as good as rounding lets it be, or out of reach
        cancel = (size_of_terms > most).squeeze(-1)
        goes_on = cancel | restarted | (better & (error < 1e-2))
        if k == steps or not bool((goes_on & (error > 1e-4 * tol)).any()):
            break
        restarted = cancel  # from no multipliers: what cancels would stay
        near_by = torch.where(restarted.unsqueeze(-1), 0, clean[..., n:])
        move = _active_newton(H, J, out, near_by, active, p)
        x = torch.cat([z + move[..., :n], move[..., n:]], -1)
        value = units.original(x, layout)
    return units.original(best, layout), least


def _active_newton(H: Tensor, J: Tensor, out: Tensor, multipliers: Tensor, active: Tensor, p: int) -> Tensor:
    """Step in z and new multipliers from the linearised conditions of the active set."""
    f, rows = J[..., 0, :], J[..., 1:, :]
    held = torch.cat([torch.ones_like(out[..., 1 : 1 + p], dtype=torch.bool), active], -1)
    rows = torch.where(held.unsqueeze(-1), rows, 0)
    # a trace of regularisation where rows depend on each other: it only slows the steps
    corner = torch.where(held, -(torch.finfo(H.dtype).eps ** 0.75), 1.0).to(H.dtype)
    K = torch.cat([torch.cat([H, rows.mT], -1), torch.cat([rows, torch.diag_embed(corner)], -1)], -2)
    rhs = torch.cat([-f, torch.where(held, corner * multipliers - out[..., 1:], 0)], -1)
    B, scale = balanced(K)
    x, _ = torch.linalg.solve_ex(B, (scale * rhs).unsqueeze(-1))
    return scale * x.squeeze(-1)


def restore(parts: Parts, z: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """A point near `z` where the violation is smallest, and whether there is none left."""
    units = Units.at(parts, z)
    scaled = units.scaled(parts)
    p = parts.layout.p

    def violation(u: Tensor) -> Tensor:
        out = scaled.function(u)
        return torch.cat([out[..., 1 : 1 + p], out[..., 1 + p :].relu()], -1)

    length = units.length.unsqueeze(-1)
    u, _ = iterate(LevenbergMarquardt(), violation, z / length)
    left = size(violation(u)) if parts.layout.p + parts.layout.m else torch.zeros_like(units.length)
    return u * length, ~(left > tol**0.5)
