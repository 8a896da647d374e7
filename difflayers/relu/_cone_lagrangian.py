r"""The augmented Lagrangian method for networks that keep to their cells: accelerated proximal steps inside.

Inner problems :math:`\min_p \sum_k s_k\, l(f_k, y_k) + \tfrac1{2 \delta} \|(\gamma - \delta K p)_+\|^2 + \beta \sum_i
\|p_i\|` by FISTA with an adaptive step and restarts; outer steps :math:`\gamma \leftarrow (\gamma - \delta K p)_+`.
A. Mishkin, A. Sahiner, M. Pilanci, Fast Convex Optimization for Two-Layer ReLU Networks, 2022, section 4. Departure:
the penalty doubles where the violation did not halve, without the window of the paper's code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._checks import check_options
from difflayers._solution import Status

from ._cone_certificate import optimality_error
from ._cone_finish import finish
from ._cone_problem import ConeProblem, ConeSolution, normalise

_SHRINK, _GROW, _ROOM = 0.5, 1.25, 10.0  # of the step; it grows where the bound had room for ten times its length


@dataclass(frozen=True, kw_only=True)
class AugmentedLagrangian:
    """The method of multipliers over accelerated proximal gradient steps: only products with the data, O(n d P) a step.

    Args:
        rtol: Certified duality gap relative to the objective, and violation of the cones relative to the data. None:
            1e-3.
        max_steps: Proximal steps in all.
        max_inner: Proximal steps between two steps of the multipliers, at most.
        check_every: Proximal steps between looks at the error.
        penalty: Weight of the violation at the start, in units in which the longest row of the data has length 1.
    """

    rtol: float | None = None
    max_steps: int = 20_000
    max_inner: int = 500
    check_every: int = 25
    penalty: float = 1.0

    def __post_init__(self) -> None:
        check_options(self, max_steps=1, max_inner=1, check_every=1)
        if not self.penalty > 0:
            raise ValueError(f"penalty: expected a number above 0, got {self.penalty}")

    def solve(self, problem: ConeProblem, init: ConeSolution | None = None) -> ConeSolution:
        """A solution of every element, starting from `init`."""
        rtol = 1e-3 if self.rtol is None else self.rtol
        if not problem.loss.smooth:
            raise ValueError(f"solver: expected InteriorPoint() for a loss with kinks, {problem.loss!r}, got {self!r}")
        unit, scales, zero = normalise(problem)
        loop = _Loop(unit, self.penalty)
        if init is not None:
            loop.p = loop.ahead = torch.cat([init.v, init.w], -2) * (scales.x / scales.y)[..., None, None]
            loop.gamma = torch.cat([init.rho_v, init.rho_w], -2) / (scales.s * scales.y)[..., None, None]
        p, rho = loop.p, loop.gamma
        best = torch.full_like(unit.beta, torch.inf)
        status = torch.full(best.shape, int(Status.MAX_STEPS), device=best.device)
        status = torch.where(zero, int(Status.CONVERGED), status)
        steps, running, inner = torch.zeros_like(status), ~zero, torch.zeros_like(status)
        for k in range(self.max_steps + 1):
            if k % self.check_every == 0 or k == self.max_steps:
                multipliers = loop.multipliers(loop.p)
                error = optimality_error(unit, loop.p, multipliers)
                better = (running & (error < best))[..., None, None]
                p, rho = torch.where(better, loop.p, p), torch.where(better, multipliers, rho)
                best = torch.where(running, torch.fmin(best, error), best)
                for ended, code in ((error <= rtol, Status.CONVERGED), (~torch.isfinite(error), Status.DIVERGED)):
                    status = torch.where(running & ended, int(code), status)
                    running = running & ~ended
                if k == self.max_steps or not bool(running.any()):
                    break
                outer = (loop.stationarity() <= loop.goal) | (inner >= self.max_inner)
                loop.outer(outer, rtol)
                inner = torch.where(outer, 0, inner)
            steps, inner = steps + running, inner + 1
            loop.step()
        return finish(problem, unit, scales, zero, p, rho, unit.slope(p), status, steps, rtol, problem.X.dtype)


class _Loop:
    """Neurons p, the point `ahead` of them, multipliers gamma, and each element's step, momentum and penalty."""

    def __init__(self, problem: ConeProblem, penalty: float) -> None:
        self.problem = problem
        self.p = self.ahead = torch.zeros_like(problem.fit_adjoint(problem.y))
        self.gamma = torch.zeros_like(problem.side)
        one = torch.ones_like(problem.beta)
        self.eta, self.momentum, self.delta = one, one, one * penalty
        self.goal, self.violation = one * 0.1, one * torch.inf
        self.slack = 10 * torch.finfo(one.dtype).eps

    def multipliers(self, p: Tensor) -> Tensor:
        return (self.gamma - self.delta[..., None, None] * self.problem.cones(p)).clamp(min=0)

    def _smooth(self, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value of the smooth part, and what its gradient is made of."""
        problem, f, rho = self.problem, self.problem.fit(p), self.multipliers(p)
        loss = (problem.s * problem.loss.value(f, problem.y)).sum(-1)
        return loss + (rho * rho).sum((-2, -1)) / (2 * self.delta), problem.loss.slope(f, problem.y), rho

    def _gradient(self, slope: Tensor, rho: Tensor) -> Tensor:
        return self.problem.fit_adjoint(self.problem.s * slope) - self.problem.cones_adjoint(rho)

    def stationarity(self) -> Tensor:
        """The least norm of a subgradient, relative to beta."""
        _, slope, rho = self._smooth(self.p)
        g, norm = self._gradient(slope, rho), torch.linalg.vector_norm(self.p, dim=-1)
        beta = self.problem.beta[..., None]
        h = self.p / torch.where(norm > 0, norm, 1)[..., None]
        on = torch.linalg.vector_norm(g + beta[..., None] * h, dim=-1)
        off = (torch.linalg.vector_norm(g, dim=-1) - beta).clamp(min=0)
        return torch.linalg.vector_norm(torch.where(norm > 0, on, off), dim=-1) / self.problem.beta

    def step(self) -> None:
        """One proximal step; where the step proves too long it is shortened, and nothing else happens."""
        value, slope, rho = self._smooth(self.ahead)
        g = self._gradient(slope, rho)
        eta = self.eta[..., None, None]
        moved = self.ahead - eta * g
        norm = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
        reach = eta * self.problem.beta[..., None, None]
        new = moved * (1 - reach / torch.where(norm > reach, norm, reach))
        change = new - self.ahead
        curve = self._smooth(new)[0] - value - (g * change).sum((-2, -1))
        square = (change * change).sum((-2, -1))
        good = curve <= square / (2 * self.eta) + self.slack * value
        restart = ((new - self.p) * (self.ahead - new)).sum((-2, -1)) > 0
        grown = (1 + (1 + 4 * self.momentum * self.momentum).sqrt()) / 2
        along = torch.where(restart, 0, (self.momentum - 1) / grown)[..., None, None]
        ahead = new + along * (new - self.p)
        mask = good[..., None, None]
        self.ahead, self.p = torch.where(mask, ahead, self.ahead), torch.where(mask, new, self.p)
        self.momentum = torch.where(good, torch.where(restart, 1, grown), self.momentum)
        room = square > _ROOM * self.eta * curve
        self.eta = self.eta * torch.where(good, torch.where(room, _GROW, 1.0), _SHRINK).to(self.eta.dtype)

    def outer(self, now: Tensor, rtol: float) -> None:
        """Moves the multipliers of the elements `now`, and their penalty where the violation did not halve."""
        if not bool(now.any()):
            return
        mask = now[..., None, None]
        violation = self.problem.violation(self.p)
        self.gamma = torch.where(mask, self.multipliers(self.p), self.gamma)
        slow = now & (violation > self.violation / 2)
        self.delta = torch.where(slow, self.delta * 2, self.delta)
        self.violation = torch.where(now, violation, self.violation)
        self.goal = torch.where(now, (self.goal / 2).clamp(min=rtol / 10), self.goal)
        self.ahead, self.momentum = torch.where(mask, self.p, self.ahead), torch.where(now, 1, self.momentum)
