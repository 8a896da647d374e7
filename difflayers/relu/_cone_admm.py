r"""ADMM for networks that keep to their cells, with an n x n system for all neurons together.

The splitting copies the neurons into v, which bears the group norm, and the values ``K p`` into slacks t. As
:math:`K_i^T K_i = X^T X` for every pattern, the least-squares step needs :math:`N = I + X^T X` and one n x n matrix
:math:`2 (X N^{-1} X^T) \circ (M M^T)`: O(n^2 + n d P) a step, where the paper factors a matrix of size 2dP.
Y. Bai, T. Gautam, S. Sojoudi, Efficient Global Optimization of Two-Layer ReLU Networks, 2023, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._checks import check_options
from difflayers._solution import Status

from ._cone_certificate import optimality_error
from ._cone_finish import finish
from ._cone_newton import solve_factor
from ._cone_problem import ConeProblem, ConeSolution, normalise

_BALANCE = 10.0  # the ratio of the residuals beyond which the penalty moves


@dataclass(frozen=True, kw_only=True)
class ADMM:
    """The alternating direction method of multipliers, with a balanced penalty.

    Every step costs O(n^2 + n d P), in the precision of the data. It finds a thousandth soon and more than that slowly:
    :class:`._cone_interior_point.InteriorPoint` is the way to an accurate solution.

    Args:
        rtol: Certified duality gap relative to the objective, and violation of the cones relative to the data. None:
            1e-3.
        max_steps: Iterations.
        check_every: Iterations between looks at the error and at the balance of the penalty.
        penalty: What the augmented Lagrangian starts with, in units in which the longest row of the data and the
            labels have length 1.
    """

    rtol: float | None = None
    max_steps: int = 10_000
    check_every: int = 50
    penalty: float = 3.0

    def __post_init__(self) -> None:
        check_options(self, max_steps=1, check_every=1)
        if not self.penalty > 0:
            raise ValueError(f"penalty: expected a number above 0, got {self.penalty}")

    def solve(self, problem: ConeProblem, init: ConeSolution | None = None) -> ConeSolution:
        """A solution of every element, starting from `init`."""
        rtol = 1e-3 if self.rtol is None else self.rtol
        if problem.loss.curved:
            raise ValueError(f"solver: expected InteriorPoint() for another loss than Squared(), got {self!r}")
        unit, scales, zero = normalise(problem)
        loop = _Loop(unit, self.penalty)
        if init is not None:
            p, rho = torch.cat([init.v, init.w], -2), torch.cat([init.rho_v, init.rho_w], -2)
            loop.warm(p * (scales.x / scales.y)[..., None, None], rho / (scales.s * scales.y)[..., None, None])
        p, rho = loop.v, loop.multipliers()
        best = torch.full_like(unit.beta, torch.inf)
        status = torch.full(best.shape, int(Status.MAX_STEPS), device=best.device)
        status = torch.where(zero, int(Status.CONVERGED), status)
        steps, running = torch.zeros_like(status), ~zero
        for k in range(self.max_steps + 1):
            if k % self.check_every == 0 or k == self.max_steps:
                error = optimality_error(unit, loop.v, loop.multipliers())
                better = (running & (error < best))[..., None, None]
                p, rho = torch.where(better, loop.v, p), torch.where(better, loop.multipliers(), rho)
                best = torch.where(running, torch.fmin(best, error), best)
                for ended, code in ((error <= rtol, Status.CONVERGED), (~torch.isfinite(error), Status.DIVERGED)):
                    status = torch.where(running & ended, int(code), status)
                    running = running & ~ended
                if k == self.max_steps or not bool(running.any()):
                    break
                if k:
                    loop.balance()
            steps = steps + running
            loop.step()
        return finish(problem, unit, scales, zero, p, rho, unit.slope(p), status, steps, rtol, problem.X.dtype)


class _Loop:
    """The iterates, blocks ``(*B, 2P, .)``: copies v, slacks t, scaled duals of both."""

    def __init__(self, problem: ConeProblem, penalty: float) -> None:
        self.problem = problem
        X, s = problem.X, problem.s
        d, root = X.shape[-1], s.sqrt()
        self.N = torch.linalg.cholesky_ex(torch.eye(d, dtype=X.dtype, device=X.device) + X.mT @ X).L
        kernel = 2 * (X @ torch.cholesky_solve(X.mT, self.N)) * (problem.M @ problem.M.mT)
        self.kernel = kernel * root[..., :, None] * root[..., None, :]
        self.root = root
        self.pull = problem.fit_adjoint(s * problem.y)
        self.v = torch.zeros_like(self.pull)
        self.t = X.new_zeros(problem.side.shape)
        self.dual_v, self.dual_t = torch.zeros_like(self.v), torch.zeros_like(self.t)
        self.penalty = torch.full_like(problem.beta, penalty)
        self.primal = self.dual = torch.zeros_like(problem.beta)
        self._factor()

    def _factor(self) -> None:
        shifted = self.kernel.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(self.penalty[..., None])
        self.L = torch.linalg.cholesky_ex(shifted).L

    def warm(self, p: Tensor, rho: Tensor) -> None:
        """Starts at neurons and multipliers of another solve."""
        problem, penalty = self.problem, self.penalty[..., None, None]
        self.v, self.t = p, problem.cones(p).clamp(min=0)
        self.dual_t = -rho / penalty
        nu = problem.s * (problem.y - problem.fit(p))
        self.dual_v = (problem.fit_adjoint(nu) + problem.cones_adjoint(rho)) / penalty

    def multipliers(self) -> Tensor:
        """Of the cones, at least 0."""
        return (-self.penalty[..., None, None] * self.dual_t).clamp(min=0)

    def _blocks(self, b: Tensor) -> Tensor:
        """N^-1, for every block."""
        return torch.cholesky_solve(b.mT, self.N).mT

    def step(self) -> None:
        """One iteration."""
        problem, penalty = self.problem, self.penalty[..., None, None]
        b = self.pull / penalty + self.v - self.dual_v + problem.cones_adjoint(self.t - self.dual_t)
        b = self._blocks(b)
        inner = solve_factor(self.L, self.root * problem.fit(b))
        u = b - self._blocks(problem.fit_adjoint(self.root * inner))
        values, moved = problem.cones(u), u + self.dual_v
        norm = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
        shrink = (1 - problem.beta[..., None, None] / (penalty * norm.clamp(min=1e-30))).clamp(min=0)
        v, t = shrink * moved, (values + self.dual_t).clamp(min=0)
        apart_v, apart_t = u - v, values - t
        change = (v - self.v) + problem.cones_adjoint(t - self.t)
        self.v, self.t = v, t
        self.dual_v, self.dual_t = self.dual_v + apart_v, self.dual_t + apart_t
        self.primal = (_square(apart_v) + _square(apart_t)).sqrt()
        self.dual = self.penalty * _square(change).sqrt()
        # relative to what they are differences of
        pull = self.penalty * _square(self.dual_v + problem.cones_adjoint(self.dual_t)).sqrt()
        self.primal = self.primal / (_square(u) + _square(values)).sqrt().clamp(min=1e-30)
        self.dual = self.dual / pull.clamp(min=1e-30)

    def balance(self) -> None:
        """Doubles or halves the penalty of elements whose residuals are far apart; the duals are scaled by it."""
        more, less = self.primal > _BALANCE * self.dual, self.dual > _BALANCE * self.primal
        factor = torch.where(more, 2.0, torch.where(less, 0.5, 1.0)).to(self.penalty.dtype)
        self.penalty = self.penalty * factor
        self.dual_v, self.dual_t = (x / factor[..., None, None] for x in (self.dual_v, self.dual_t))
        self._factor()


def _square(x: Tensor) -> Tensor:
    return (x * x).sum((-2, -1))
