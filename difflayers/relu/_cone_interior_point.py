r"""An interior-point method for networks that keep to their cells: Mehrotra's predictor-corrector on the conic form.

.. math:: \min \textstyle\sum_k s_k\, l((F p)_k, y_k) + \beta \sum t_i, \quad \|p_i\| \le t_i, \quad
    K_i p_i = s_i \ge 0.

Where the curvature of the loss jumps, its slopes g are unknowns of their own, bound to the predictions by the slope of
the conjugate and multipliers of the ends of their interval, :math:`F p = (l^*)'(g) - a + b`. So losses with kinks are
no special case: each sample has one weight in the Newton system, the inverse of what the conjugate's curvature and the
ends add up to. Where the curvature varies, beta comes down with the slopes, and no step goes further than a parabola
says something about the loss.

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
_ROUNDING = 1e-9  # error below which two such steps are enough to say that rounding forbids more
# beta at the start over the largest useful one, its factor on the way down, the dual residual over beta below which it
# goes down, and the complementarity over beta that is kept meanwhile
_FIRST, _DOWN, _TAME, _DISTANCE = 0.1, 0.1, 2.0, 1.0
# for smooth losses: what complementarity keeps of the dual residual, how far above it a step may leave that, and the
# lengths tried
_FLOOR, _NEXT_TO, _SHORTER = 0.03, 10.0, tuple(0.5**k for k in range(5))
_WIDE = 4000  # samples up to which systems of their size are taken where precision is at stake


class _Point(NamedTuple):
    p: Tensor  # (*B, Q, d)
    t: Tensor  # (*B, Q)
    z: Tensor  # (*B, Q, d)
    s: Tensor  # (*B, Q, n)
    rho: Tensor  # (*B, Q, n)
    slope: Tensor  # (*B, n)
    low: Tensor  # (*B, n): multipliers of the ends of the slope's interval
    high: Tensor  # (*B, n)


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
        """A solution of every element; an interior point gains nothing from `init`."""
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
            score = optimality_error(unit, point.p, point.rho / lengths, point.slope)
            better = running & (score < best_score)
            best = _where(better, point, best)
            best_score = torch.where(better, score, best_score)
            since = torch.where(better | (best_score > _NEAR), 0, since + 1)
            for ended, code in (
                (score <= rtol, Status.CONVERGED),
                (~torch.isfinite(score), Status.DIVERGED),
                ((since > _PATIENCE) | ((since > 1) & (best_score < _ROUNDING)), Status.MAX_STEPS),
            ):
                status = torch.where(running & ended, int(code), status)
                running = running & ~ended
            if k == self.max_steps or (k % self.check_every == 0 and not bool(running.any())):
                break
            steps = steps + running
            point = _where(running, loop.step(loop.tightened(point)), point)
        # a lost element that had come close enough is none
        status = torch.where((status == Status.DIVERGED) & torch.isfinite(best_score), int(Status.MAX_STEPS), status)
        return finish(wide, unit, scales, zero, best.p, best.rho / lengths, best.slope, status, steps, rtol, dtype)


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
        self.boxed, self.there = problem.loss.boxed, problem.s > 0
        self.per_weight = 1 / torch.where(self.there, problem.s, torch.inf)
        if self.boxed:
            self.low, self.high = problem.loss.interval(problem.y)
            self.degree = self.degree + 2 * self.there.sum(-1)
        self.gram = None if problem.loss.curved else gram_of(problem, problem.s, once=True)
        # the weights of samples at a kink of the loss leave few digits to a system that sums over samples
        self.narrow = problem.loss.curved and not (problem.loss.boxed and problem.X.shape[-2] <= _WIDE)
        self.beta = problem.beta
        if problem.loss.curved:  # predictions have a long way to go where beta is small: it comes down with the slopes
            slope = problem.loss.slope(torch.zeros_like(problem.y), problem.y)
            pull = torch.linalg.vector_norm(problem.fit_adjoint(problem.s * slope), dim=-1)
            self.beta = torch.maximum(self.beta, _FIRST * pull.amax(-1)) if pull.shape[-1] else self.beta
        self.dyads = problem.X.shape[-1] <= 64  # memory n d^2
        if self.dyads:
            self.outer = (self.rows[..., :, None] * self.rows[..., None, :]).flatten(-2)

    def cones(self, p: Tensor) -> Tensor:
        return self.problem.side * (p @ self.rows.mT)

    def adjoint(self, rho: Tensor) -> Tensor:
        return (self.problem.side * rho) @ self.rows

    def start(self) -> _Point:
        side, beta = self.problem.side, self.beta
        Q, _n, d = side.shape[-2], side.shape[-1], self.problem.X.shape[-1]
        zero = self.problem.X.new_zeros((*beta.shape, Q, d))
        # the loss of 1/2 at the zero network bounds the norms of all networks to come; a small beta lets go of that
        size = (1 / (2 * beta * max(Q, 1))).clamp(max=1.0)[..., None].expand(*beta.shape, Q)
        self.size = size[..., 0]
        # every pair starts with the same product
        rho = torch.where(self.bound, beta[..., None, None], 0)
        s = torch.where(self.bound, size[..., None], 1.0)
        slope = self.problem.loss.slope(torch.zeros_like(self.problem.y), self.problem.y)
        low = high = torch.zeros_like(slope)
        if self.boxed:
            inner = 0.1 * (self.high - self.low)
            slope = slope.maximum(self.low + inner).minimum(self.high - inner)
            product = (beta * size[..., 0])[..., None]
            low = torch.where(self.there, product / (slope - self.low), 0)
            high = torch.where(self.there, product / (self.high - slope), 0)
        return _Point(zero, size, zero, s, rho, slope, low, high)

    def tightened(self, u: _Point) -> _Point:
        """The point for a smaller beta, where it is still too large and the point is close to its path."""
        if not self.problem.loss.curved:
            return u
        r_d = self.apart(self.residuals(u)[0])
        lower = torch.where(r_d <= _TAME * self.beta, torch.maximum(_DOWN * self.beta, self.problem.beta), self.beta)
        ratio, self.beta = lower / self.beta, lower
        return u._replace(z=_over(ratio, u.z) * u.z, rho=_over(ratio, u.rho) * u.rho)

    def apart(self, r_d: Tensor) -> Tensor:
        """How far a dual residual is from zero, in its largest block."""
        return torch.linalg.vector_norm(r_d, dim=-1).amax(-1)

    def shortened(self, u: _Point, w: _Point, alpha: Tensor, r_d: Tensor, mu: Tensor) -> Tensor:
        """A step at whose end the slopes are not much further from a stationary point than complementarity is."""
        problem, lengths = self.problem, torch.tensor(_SHORTER, dtype=alpha.dtype, device=alpha.device)
        steps = alpha * lengths.reshape(-1, *(1,) * alpha.ndim)  # (k, *B)
        f, df = problem.fit(u.p), problem.fit(w.p)
        slope = problem.loss.slope(f + steps[..., None] * df, problem.y)
        rest, change = (self.adjoint(x.rho) + x.z for x in (u, w))
        after = self.apart(problem.fit_adjoint(problem.s * slope) - rest - steps[..., None, None] * change)
        before = torch.maximum((1 - 0.2 * steps) * self.apart(r_d), _NEXT_TO * mu / self.size)
        fine = after <= before
        first = torch.where(fine, lengths.reshape(-1, *(1,) * alpha.ndim), lengths[-1]).amax(0)
        return alpha * first

    def residuals(self, u: _Point) -> tuple[Tensor, Tensor]:
        """``(r_d, r_p)``."""
        r_d = self.problem.fit_adjoint(self.problem.s * u.slope) - self.adjoint(u.rho) - u.z
        return r_d, torch.where(self.bound, self.cones(u.p) - u.s, 0)

    def slope_residual(self, u: _Point) -> Tensor:
        """How far predictions are from what slopes and their ends say."""
        f = self.problem.loss.conjugate_slope(u.slope, self.problem.y)
        return self.problem.fit(u.p) - f + (u.low - u.high) * self.per_weight

    def complementarity(self, u: _Point) -> Tensor:
        pairs = u.t * self.beta[..., None] + (u.p * u.z).sum(-1)
        total = (torch.where(self.bound, u.s, 0) * u.rho).sum((-2, -1)) + pairs.sum(-1)
        if self.boxed:
            total = total + ((u.slope - self.low) * u.low + (self.high - u.slope) * u.high).sum(-1)
        return total

    def step(self, u: _Point) -> _Point:
        problem, beta = self.problem, self.beta[..., None]
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
        f = problem.fit(u.p)
        if self.boxed:
            low_room, high_room = u.slope - self.low, self.high - u.slope
            bend = u.low / low_room + u.high / high_room
            bend = problem.loss.conjugate_curvature(u.slope, problem.y) + bend * self.per_weight
            weight = torch.where(self.there, problem.s / torch.where(self.there, bend, 1), 0)
            apart = self.slope_residual(u)
        else:
            weight = problem.s * problem.loss.curvature(f, problem.y)
        gram = gram_of(problem, weight) if self.narrow else self.gram
        system = NewtonSystem(problem, weight, gram, A, u_norm)
        l0, l1 = scaling.apply(beta_q, u.z)
        mu = self.complementarity(u) / self.degree

        def direction(keep: Tensor, linear: Tensor, ends: tuple[Tensor, Tensor], c0: Tensor, c1: Tensor) -> _Point:
            """The Newton step for ``s d_rho + rho d_s = -linear`` and ``W^-1 d(t, p) + W d(beta, z) = c``.

            `ends` are to the slopes' ends what `linear` is to the cones.
            """
            a, b = scaling.apply(c0, c1, inverse=True)
            g = scaling.eliminate(a, b)
            rhs = -keep * r_d + g - self.adjoint((u.rho * (keep * r_p) + linear) / u.s)
            if self.boxed:
                wanted = (ends[0] / low_room - ends[1] / high_room) * self.per_weight - keep.squeeze(-1) * apart
                dp, n = system.solve(rhs, wanted)
                dg = n * self.per_weight
                low, high = (-ends[0] - u.low * dg) / low_room, (-ends[1] + u.high * dg) / high_room
            else:
                dp, _ = system.solve(rhs)
                low = high = dg = torch.zeros_like(f)
            ds = torch.where(self.bound, self.cones(dp) + keep * r_p, 0)
            drho = (-linear - u.rho * ds) / u.s
            dt = scaling.bound_step(a, dp)
            # from stationarity, so that rounding in W does not enter it
            dz = g - c[..., None] * dp + u_norm * (u_norm * dp).sum(-1, keepdim=True)
            return _Point(dp, dt, dz, ds, drho, dg, low, high)

        def length(w: _Point) -> Tensor:
            primal, dual = -w.s / u.s, torch.where(self.bound, -w.rho / u.rho, 0)
            inverse = torch.maximum(primal, dual).amax((-2, -1))
            cones = torch.maximum(_inverse_step(u.t, u.p, w.t, w.p), _inverse_step(beta_q, u.z, 0.0, w.z))
            inverse = torch.maximum(inverse, cones)
            if self.boxed:
                pairs = -w.slope / low_room, w.slope / high_room, -w.low / or_one(u.low), -w.high / or_one(u.high)
                inverse = torch.maximum(inverse, torch.stack(pairs).amax((0, -1)))
            elif problem.loss.curved:
                change = problem.fit(w.p).abs() / problem.loss.reach(f, problem.y)
                inverse = torch.maximum(inverse, torch.where(self.there, change, 0).amax(-1))
            return 1 / torch.maximum(inverse, torch.full_like(inverse, 1e-30))

        product = u.s * u.rho
        at_ends = (u.low * low_room, u.high * high_room) if self.boxed else (product, product)
        affine = direction(torch.ones_like(mu)[..., None, None], product, at_ends, -l0, -l1)
        sigma = (1 - length(affine).clamp(max=1)) ** 3
        # the path of a beta that is on its way down is followed at some distance
        wide = torch.where(self.beta > problem.beta, _DISTANCE * self.beta * self.size, 0)
        target = torch.maximum(sigma * mu, wide.minimum(mu))
        smooth = problem.loss.curved and not self.boxed
        if smooth:  # complementarity waits for the slopes, which no Newton step brings all the way
            target = torch.maximum(target, (_FLOOR * self.apart(r_d) * self.size).minimum(mu))
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
        if self.boxed:
            wanted = torch.where(self.there, target[..., None], 0)
            low, high = affine.slope * affine.low - wanted, -affine.slope * affine.high - wanted
            at_ends = at_ends[0] + low, at_ends[1] + high
        w = direction(keep, linear, at_ends, -l0 - x0, -l1 - x1)
        alpha = (_SHORT * length(w)).clamp(max=1)
        if smooth:
            alpha = self.shortened(u, w, alpha, r_d, mu)
        new = _Point(*(x + _over(alpha, x) * dx for x, dx in zip(u, w, strict=True)))
        return new if self.boxed else new._replace(slope=problem.slope(new.p))
