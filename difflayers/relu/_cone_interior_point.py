r"""An interior-point method for networks that keep to their cells: Mehrotra's predictor-corrector on the conic form.

.. math:: \min \tfrac12 \|F p - y\|_S^2 + \beta \textstyle\sum t_i, \quad \|p_i\| \le t_i, \quad K_i p_i = s_i \ge 0.

The dual pair of ``(t_i, p_i)`` is ``(beta, z_i)``, whose first entry never moves, so t leaves every Newton system by
elimination; what remains is in :mod:`._cone_newton`. One factorisation a step serves predictor, corrector and
refinement. S. Mehrotra, On the implementation of a primal-dual interior point method, 1992; L. Vandenberghe, The CVXOPT
linear and quadratic cone program solvers, 2010, sections 4 to 7.

Symbols: ``rho`` multipliers of the cones, ``r_d, r_p`` residuals of stationarity and of ``K p = s``, ``mu`` mean
complementarity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._checks import check_options
from difflayers._solution import Status

from ._cone_certificate import optimality_error
from ._cone_finish import finish
from ._cone_newton import NewtonSystem, SecondOrderScaling, gram_of
from ._cone_problem import ConeProblem, ConeSolution, normalise, or_one

_SHORT = 0.99  # of the way to the boundary
_PATIENCE, _NEAR = 6, 1e-3  # steps without a better point, once the error is below the second


class _Point(NamedTuple):
    p: Tensor  # (*B, Q, d)
    t: Tensor  # (*B, Q)
    z: Tensor  # (*B, Q, d)
    s: Tensor  # (*B, Q, n)
    rho: Tensor  # (*B, Q, n)


@dataclass(frozen=True, kw_only=True)
class InteriorPoint:
    """Mehrotra's predictor-corrector method with a Newton system of size n, or d P where that is less.

    It works in float64 whatever the data. A step costs O(n d^2 P + min(n, d P)^2 max(n, d P)); some 20 to 40 steps
    reach the tolerance, at any beta and for cells of any shape.

    Args:
        rtol: Certified duality gap relative to the objective, and violation of the cones relative to the data. None:
            1e-8 in float64, 1e-7 in float32.
        max_steps: Newton steps.
        check_every: Steps between read-backs of the one flag that stops the loop.
    """

    rtol: float | None = None
    max_steps: int = 100
    check_every: int = 1

    def __post_init__(self) -> None:
        check_options(self, max_steps=1, check_every=1)

    def solve(self, problem: ConeProblem, init: ConeSolution | None = None) -> ConeSolution:
        """See :class:`._cone_problem.ConeSolver`; an interior point gains nothing from `init`."""
        dtype = problem.X.dtype
        rtol = self.rtol if self.rtol is not None else (1e-8 if dtype == torch.float64 else 1e-7)
        wide = problem.to(torch.float64)
        unit, scales, zero = normalise(wide)
        loop = _Loop(unit)
        lengths = or_one(torch.linalg.vector_norm(unit.X, dim=-1))[..., None, :]
        status = torch.full(problem.beta.shape, int(Status.MAX_STEPS), device=problem.X.device)
        steps = torch.zeros_like(status)
        status = torch.where(zero, int(Status.CONVERGED), status)
        running = ~zero
        point = loop.start()
        best, best_score = point, torch.full_like(unit.beta, torch.inf)
        since = torch.zeros_like(status)
        for k in range(self.max_steps + 1):
            score = optimality_error(unit, point.p, point.rho / lengths)
            better = running & (score < best_score)
            best = _where(better, point, best)
            best_score = torch.where(better, score, best_score)
            since = torch.where(better | (best_score > _NEAR), 0, since + 1)
            for ended, code in (
                (score <= rtol, Status.CONVERGED),
                (~torch.isfinite(score), Status.DIVERGED),
                (since > _PATIENCE, Status.MAX_STEPS),
            ):
                status = torch.where(running & ended, int(code), status)
                running = running & ~ended
            if k == self.max_steps or (k % self.check_every == 0 and not bool(running.any())):
                break
            steps = steps + running
            point = _where(running, loop.step(point), point)
        # a lost element that had come close enough is none
        status = torch.where((status == Status.DIVERGED) & torch.isfinite(best_score), int(Status.MAX_STEPS), status)
        return finish(wide, unit, scales, zero, best.p, best.rho / lengths, status, steps, rtol, dtype)


def _over(x: Tensor, like: Tensor) -> Tensor:
    """`x`, an entry of the batch each, with the trailing dimensions of `like`."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def _where(mask: Tensor, a: _Point, b: _Point) -> _Point:
    return _Point(*(torch.where(_over(mask, u), u, v) for u, v in zip(a, b, strict=True)))


def _inverse_step(t: Tensor, p: Tensor, dt: Tensor | float, dp: Tensor) -> Tensor:
    """One over the step from ``(t, p)`` along ``(dt, dp)`` to the boundary of the second-order cone."""
    norm, slope = torch.linalg.vector_norm(p, dim=-1), torch.linalg.vector_norm(dp, dim=-1)
    c = ((t - norm) * (t + norm)).clamp(min=1e-300)
    b = t * dt - (p * dp).sum(-1)
    root = (b * b - (dt - slope) * (dt + slope) * c).clamp(min=0).sqrt()
    return ((root - b) / c).amax(-1)


class _Loop:
    """Steps and residuals of one batch, in units of one."""

    def __init__(self, problem: ConeProblem) -> None:
        self.problem = problem
        # rows of length one; the multipliers are those of these rows. Points at the origin bind nothing.
        self.rows = problem.X / or_one(torch.linalg.vector_norm(problem.X, dim=-1, keepdim=True))
        self.bound = problem.side != 0  # (*B, Q, n)
        self.degree = self.bound.sum((-2, -1)) + problem.side.shape[-2]
        self.gram = gram_of(problem)
        self.dyads = problem.X.shape[-1] <= 64  # memory n d^2
        if self.dyads:
            self.outer = (self.rows[..., :, None] * self.rows[..., None, :]).flatten(-2)

    def cones(self, p: Tensor) -> Tensor:
        return self.problem.side * (p @ self.rows.mT)

    def adjoint(self, rho: Tensor) -> Tensor:
        return (self.problem.side * rho) @ self.rows

    def start(self) -> _Point:
        side, beta = self.problem.side, self.problem.beta
        Q, _n, d = side.shape[-2], side.shape[-1], self.problem.X.shape[-1]
        zero = self.problem.X.new_zeros((*beta.shape, Q, d))
        # the loss of 1/2 at the zero network bounds the norms of all networks to come; a small beta lets go of that
        size = (1 / (2 * beta * max(Q, 1))).clamp(max=1.0)[..., None].expand(*beta.shape, Q)
        # every pair starts with the same product
        rho = torch.where(self.bound, beta[..., None, None], 0)
        s = torch.where(self.bound, size[..., None], 1.0)
        return _Point(zero, size, zero, s, rho)

    def residuals(self, u: _Point) -> tuple[Tensor, Tensor]:
        """``(r_d, r_p)``."""
        nu = self.problem.s * (self.problem.y - self.problem.fit(u.p))
        r_d = -self.problem.fit_adjoint(nu) - self.adjoint(u.rho) - u.z
        return r_d, torch.where(self.bound, self.cones(u.p) - u.s, 0)

    def complementarity(self, u: _Point) -> Tensor:
        pairs = u.t * self.problem.beta[..., None] + (u.p * u.z).sum(-1)
        return (torch.where(self.bound, u.s, 0) * u.rho).sum((-2, -1)) + pairs.sum(-1)

    def step(self, u: _Point) -> _Point:
        problem, beta = self.problem, self.problem.beta[..., None]
        r_d, r_p = self.residuals(u)
        beta_q = beta.expand_as(u.t)
        scaling = SecondOrderScaling(u.t, u.p, beta_q, u.z)
        ratio = u.rho / u.s
        if self.dyads:
            A = (ratio @ self.outer).unflatten(-1, (u.p.shape[-1],) * 2)
        else:
            A = (ratio[..., None, :] * self.rows.mT[..., None, :, :]) @ self.rows[..., None, :, :]
        c, u_norm = scaling.curvature()
        A.diagonal(dim1=-2, dim2=-1).add_(c[..., None])
        system = NewtonSystem(problem, self.gram, A, u_norm)
        l0, l1 = scaling.apply(beta_q, u.z)
        mu = self.complementarity(u) / self.degree

        def direction(keep: Tensor | float, linear: Tensor, c0: Tensor, c1: Tensor) -> _Point:
            """The Newton step for ``s d_rho + rho d_s = -linear`` and ``W^-1 d(t, p) + W d(beta, z) = c``."""
            a, b = scaling.apply(c0, c1, inverse=True)
            g = scaling.eliminate(a, b)
            rhs = -keep * r_d + g - self.adjoint((u.rho * (keep * r_p) + linear) / u.s)
            dp = system.solve(rhs)
            ds = torch.where(self.bound, self.cones(dp) + keep * r_p, 0)
            drho = (-linear - u.rho * ds) / u.s
            dt = scaling.bound_step(a, dp)
            # from stationarity, so that rounding in W does not enter it
            dz = g - c[..., None] * dp + u_norm * (u_norm * dp).sum(-1, keepdim=True)
            return _Point(dp, dt, dz, ds, drho)

        def length(w: _Point) -> Tensor:
            primal, dual = -w.s / u.s, torch.where(self.bound, -w.rho / u.rho, 0)
            inverse = torch.maximum(primal, dual).amax((-2, -1))
            cones = torch.maximum(_inverse_step(u.t, u.p, w.t, w.p), _inverse_step(beta_q, u.z, 0.0, w.z))
            return 1 / torch.maximum(torch.maximum(inverse, cones), torch.full_like(inverse, 1e-30))

        product = u.s * u.rho
        affine = direction(1.0, product, -l0, -l1)
        sigma = (1 - length(affine).clamp(max=1)) ** 3
        target = sigma * mu
        # the products of the predictor's steps, in the scaled space, and what Jordan division by lambda makes of them
        p0, p1 = scaling.apply(affine.t, affine.p, inverse=True)
        z0, z1 = scaling.apply(torch.zeros_like(affine.t), affine.z)
        d0 = (p0 * z0 + (p1 * z1).sum(-1)) - target[..., None]
        d1 = p0[..., None] * z1 + z0[..., None] * p1
        norm = torch.linalg.vector_norm(l1, dim=-1)
        determinant = ((l0 - norm) * (l0 + norm)).clamp(min=1e-300)
        x0 = (l0 * d0 - (l1 * d1).sum(-1)) / determinant
        x1 = (d1 - x0[..., None] * l1) / l0[..., None]
        linear = torch.where(self.bound, product + affine.s * affine.rho - target[..., None, None], 0)
        keep = (1 - sigma)[..., None, None]
        w = direction(keep, linear, -l0 - x0, -l1 - x1)
        alpha = (_SHORT * length(w)).clamp(max=1)
        return _Point(*(x + _over(alpha, x) * dx for x, dx in zip(u, w, strict=True)))
