r"""Levenberg-Marquardt: :math:`(J^T J + \mu\,\mathrm{diag}(J^T J))\,d = -J^T r`, every element with its own damping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import vmap

from difflayers._checks import default_rtol
from difflayers._solution import Info
from difflayers.linalg._autodiff import linearise, pullback

from ._iterate import Function, IterativeSolver, Step, iterate, size
from ._newton import polish


def jacobian(function: Function, z: Tensor) -> tuple[Tensor, Tensor]:
    """``r`` of shape ``(*batch, m)`` and ``dr/dz`` of shape ``(*batch, m, n)``, by the shorter direction."""
    m, n = function(z).shape[-1], z.shape[-1]
    if m < n:
        r, pull = pullback(function, z)
        eye = torch.eye(m, dtype=z.dtype, device=z.device)
        return r, vmap(lambda e: pull(e.expand_as(r))[0])(eye).movedim(0, -2)
    r, push = linearise(function, z)
    eye = torch.eye(n, dtype=z.dtype, device=z.device)
    # out_dims=-1 brings torch down where the result does not depend on e
    return r, vmap(lambda e: push(e.expand_as(z)))(eye).movedim(0, -1)


def half_square(function: Function) -> Function:
    r"""The objective :math:`\frac12\|r(z)\|^2`."""
    return lambda z: function(z).square().sum(-1) / 2


def stationarity(function: Function) -> Function:
    """``J^T r``: zero at a minimum."""

    def condition(z: Tensor) -> Tensor:
        r, pull = pullback(function, z)
        return pull(r)[0]

    return condition


@dataclass(frozen=True, kw_only=True)
class LevenbergMarquardt(IterativeSolver):
    """Damped Gauss-Newton; the default for :func:`nonlinear_least_squares`.

    Stops when the step, with its damping taken out, is small: ``(1 + mu) ||d|| <= atol + rtol ||z||``. Events up to 64
    numbers end with at most two Newton steps on the exact stationarity condition, kept where they reduce it.

    Args:
        damping: First value of mu.

    Source: D. Marquardt, An algorithm for least-squares estimation of nonlinear parameters, 1963.
    """

    max_steps: int = 200
    damping: float = 1e-3

    finds: ClassVar[str] = "least_squares"

    def start(self, function: Function, z: Tensor) -> Any:
        """The first damping."""
        return torch.full(z.shape[:-1], self.damping, dtype=z.dtype, device=z.device)

    def step(self, function: Function, z: Tensor, state: Any, k: int) -> Step:
        """One damped step, taken where it does not increase the objective."""
        mu = state
        r, J = jacobian(function, z)
        columns = torch.linalg.vector_norm(J, dim=-2)
        # a column of zeros leaves its variable where it is
        scale = torch.where(columns > 0, columns, 1)
        damped = torch.cat([J / scale.unsqueeze(-2), torch.diag_embed(mu.sqrt().unsqueeze(-1).expand_as(scale))], -2)
        # without Q, qr has no derivative: an unrolled solve pays for it
        _, R = torch.linalg.qr(damped, mode="reduced" if torch.is_grad_enabled() else "r")
        g = (J.mT @ r.unsqueeze(-1)) / scale.unsqueeze(-1)
        d = torch.linalg.solve_triangular(R.mT, -g, upper=False)
        d = torch.linalg.solve_triangular(R, d, upper=True).squeeze(-1) / scale
        trial = z + d
        before, after = r.square().sum(-1), function(trial).square().sum(-1)
        # an increase within rounding is taken too: close to the minimum the objective cannot tell a step from none
        accept = after <= before * (1 + 8 * torch.finfo(z.dtype).eps)
        mu_next = torch.where(accept, (mu / 5).clamp_min(1e-14), (mu * 4).clamp_max(1e14))
        z_next = torch.where(accept.unsqueeze(-1), trial, z)
        # the whole step is NaN where the element is: let its error say so
        # a step is short under strong damping wherever it is: no verdict there
        error = torch.where(mu > 1, math.inf, size(d.detach()) * (1 + mu))
        return Step(z_next, mu_next, z_next, error, size(z))

    def solve(self, function: Function, z: Tensor) -> tuple[Tensor, Info]:
        """Runs to the tolerance, then sharpens small events."""
        z, info = iterate(self, function, z)
        if self.check_every is None:
            return z, info
        return polish(stationarity(function), z, info, default_rtol(self.rtol, z.dtype))
