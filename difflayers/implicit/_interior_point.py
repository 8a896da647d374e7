r"""A primal-dual interior point method for :math:`\min f(z)` subject to :math:`h(z) = 0`, :math:`g(z) \le 0`.

Newton steps on the conditions of the barrier problem with slacks :math:`g(z) + s = 0` and :math:`s_i \lambda_i = \mu`,
for :math:`\mu \to 0`; the condensed system is

.. math:: \begin{bmatrix} H + A^T \Sigma A + \delta I & E^T \\ E & 0 \end{bmatrix}
    \begin{bmatrix} dz \\ d\nu \end{bmatrix} =
    -\begin{bmatrix} r_d + A^T (\Sigma r_g - s^{-1} r_c) \\ h \end{bmatrix}, \qquad \Sigma = \lambda / s ,

with the smallest :math:`\delta` that leaves it as many negative eigenvalues as there are equalities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from difflayers._checks import default_rtol
from difflayers._solution import Info, Status
from difflayers.linalg._autodiff import pullback

from ._iterate import IterativeSolver, Step, iterate, size
from ._kkt import Parts, Symmetric, derivatives
from ._kkt_units import Units, restore, sharpen


class _State(NamedTuple):
    mu: Tensor
    penalty: Tensor  # weight of the violation in the merit
    shift: Tensor  # the last delta that was needed


class _Point(NamedTuple):
    """An iterate: unknown, slacks, multipliers."""

    z: Tensor
    s: Tensor
    nu: Tensor
    lam: Tensor

    @staticmethod
    def of(w: Tensor, parts: Parts) -> _Point:
        n, p, m = parts.layout.n, parts.layout.p, parts.layout.m
        z, s, nu, lam = w.split([n, m, p, m], -1)
        return _Point(z, s, nu, lam)

    def join(self) -> Tensor:
        return torch.cat(self, -1)


@dataclass(frozen=True, kw_only=True)
class InteriorPoint(IterativeSolver):
    """Primal-dual interior point; the default of :func:`argmin` under equalities and inequalities.

    For smooth problems of small and medium size: a step takes the Hessian as a matrix and one factorisation. The start
    may violate the constraints. Stops where stationarity and violation are at most ``tol = atol + rtol``, and products
    of multiplier and slack ``tol**1.5``, in units of the problem (the residual that is reported, too). Then Newton
    steps on the active set sharpen the solution, and multipliers of inactive constraints are set to zero. An element
    ends with ``INFEASIBLE`` where the violation has a minimum that is not zero (without convexity, a local one), and
    with ``UNBOUNDED`` where a feasible objective falls without end. Without convexity it finds a local minimiser,
    but stays where it starts on a maximiser or saddle (a backward pass then raises), and so may the status
    ``INFEASIBLE`` belong to the neighbourhood of the start alone. Equalities alone make it Newton's method on the
    Lagrangian.

    Source: A. Waechter, L. Biegler, On the implementation of an interior-point filter line-search algorithm, 2006
    (barrier, steps, inertia).
    Departure: an exact penalty, or a decrease of the conditions themselves where the system needed no shift, in place
    of the filter; a least-squares solve of the violation in place of its restoration phase.
    """

    max_steps: int = 200

    finds: ClassVar[str] = "constrained"
    differentiable: ClassVar[bool] = False

    def start(self, function: Any, z: Tensor) -> Any:
        """The first barrier."""
        one = torch.ones_like(z[..., 0])
        return _State(0.1 * one, 0 * one, 0 * one)

    def step(self, function: Any, z: Tensor, state: Any, k: int) -> Step:
        """One Newton step, shortened until it makes progress."""
        parts: Parts = function
        tol = default_rtol(self.rtol, z.dtype) + self.atol
        x, eps = _Point.of(z, parts), torch.finfo(z.dtype).eps
        p = parts.layout.p
        out, J, H = derivatives(parts, x.z, _weights(x))
        E, A = J[..., 1 : 1 + p, :], J[..., 1 + p :, :]
        now = _Conditions.at(out, _pull(J, _weights(x)), x, p)
        # products count more than the rest: small ones tell active constraints from others
        error = torch.maximum(now.error(x, state.mu, products=False), now.largest_product(x) / tol**0.5)
        mu = state.mu
        for _ in range(4):
            met = now.error(x, mu) <= 10 * mu
            mu = torch.where(met, torch.minimum(0.2 * mu, mu**1.5).clamp_min(tol**1.5 / 10), mu)
        column = mu.unsqueeze(-1)
        r_c = x.s * x.lam - column
        sigma = x.lam / x.s
        top = now.slope + _pull(A, sigma * now.gap - r_c / x.s)
        M = H + A.mT @ (sigma.unsqueeze(-1) * A)
        step, shift = _newton(M, E, torch.cat([top, now.h], -1), state.shift)
        dz, dnu = step[..., : parts.layout.n], step[..., parts.layout.n :]
        ds = -now.gap - (A @ dz.unsqueeze(-1)).squeeze(-1)
        dlam = -r_c / x.s - sigma * ds
        tau = torch.clamp(1 - column, min=0.99)
        longest, longest_dual = _to_boundary(x.s, ds, tau), _to_boundary(x.lam, dlam, tau)

        # merit: barrier objective and violation, whose weight makes the step one of descent
        away = now.violation()
        fall = (J[..., 0, :] * dz).sum(-1) - mu * (ds / x.s).sum(-1)
        bend = (dz * (H @ dz.unsqueeze(-1)).squeeze(-1)).sum(-1) + shift * dz.square().sum(-1)
        needed = (fall + bend.clamp_min(0) / 2) / (0.9 * torch.where(away > 0, away, 1))
        kept = torch.where(mu < state.mu, 0, state.penalty)
        penalty = torch.where(away > eps, torch.maximum(kept, 1.1 * needed), kept)
        slope = fall - penalty * away
        merit, before = now.merit(x, mu, penalty), now.norm(x, mu)

        t = longest
        lam = (x.lam + longest_dual.unsqueeze(-1) * dlam).clamp_min(0)
        best: _Point | None = None
        done = torch.zeros_like(t, dtype=torch.bool)
        lost = ~torch.isfinite(merit + fall)
        for trial in range(30):
            there = x._replace(z=x.z + t.unsqueeze(-1) * dz, nu=x.nu + t.unsqueeze(-1) * dnu, lam=lam)
            out_t, pull = pullback(parts.function, there.z, record=False)
            slack = torch.maximum(x.s + t.unsqueeze(-1) * ds, -out_t[..., 1 + p :])
            there = there._replace(s=torch.where(torch.isfinite(slack), slack, x.s))
            then = _Conditions.at(out_t, pull(_weights(there))[0], there, p)
            reached = then.merit(there, mu, penalty)
            enough = reached <= merit + 1e-4 * t * slope + 10 * eps * merit.abs()
            closer = (shift == 0) & (then.norm(there, mu) <= 0.9 * before)
            accept = ~done & (enough | closer) & torch.isfinite(reached)
            best = (
                there
                if best is None
                else _Point(*map(lambda a, b: torch.where(accept.unsqueeze(-1), a, b), there, best))
            )
            done = done | accept
            if trial == 29 or bool((done | lost).all()):
                break
            t = torch.where(done, t, t / 2)
        assert best is not None
        lam = best.lam.clamp(column / (1e10 * best.s), 1e10 * column / best.s) if parts.layout.m else best.lam
        keep = done.unsqueeze(-1)
        z_next = torch.where(keep, best._replace(lam=lam).join(), z)

        doubtful = now.certified(x, E, A) & (away > tol**0.5)
        low = (out[..., 0] < -(eps**-0.5)) & (size(x.z) > eps**-0.75) & (away <= 1)
        unbounded = torch.isneginf(out[..., 0]) | low
        status = torch.where(~done & ~lost, int(Status.MAX_STEPS), 0)
        status = torch.where(unbounded, int(Status.UNBOUNDED), status)
        # of the linearised constraints only: the violation itself decides, in `solve`
        status = torch.where(doubtful, int(Status.MAX_STEPS), status)
        return Step(z_next, _State(mu, penalty, shift), z, error, torch.ones_like(error), status)

    def solve(self, function: Any, z: Tensor) -> tuple[Tensor, Info]:
        """Interior points in units of the problem, then Newton steps on the active set; ``(z, nu, lambda)``."""
        parts: Parts = function
        layout = parts.layout
        if z.numel() == 0 or layout.n == 0:
            counts = torch.zeros(z.shape[:-1], dtype=torch.int64, device=z.device)
            value = torch.cat([z, z.new_zeros(*z.shape[:-1], layout.p + layout.m)], -1)
            return value, Info(counts, counts, torch.zeros(z.shape[:-1], dtype=z.dtype, device=z.device))
        tol = default_rtol(self.rtol, z.dtype) + self.atol
        value, info = self._from(parts, z, tol)
        for _ in range(2 if self.max_steps > 1 else 0):
            stopped = info.status == Status.MAX_STEPS
            if not bool(stopped.any()):
                break
            # stuck, or solved in the wrong units: once more from where the constraints hold, unless that is nowhere
            start, possible = restore(parts, value[..., : layout.n], tol)
            again, more = self._from(parts, start, tol)
            helps = stopped & possible & (more.residual < info.residual)
            status = torch.where(stopped & ~possible, int(Status.INFEASIBLE), info.status)
            nowhere = torch.cat([start, value[..., layout.n :]], -1)  # the point of least violation
            value = torch.where((stopped & ~possible).unsqueeze(-1), nowhere, value)
            value = torch.where(helps.unsqueeze(-1), again, value)
            info = Info(
                torch.where(helps, more.status, status),
                torch.where(stopped, info.steps + more.steps, info.steps),
                torch.where(helps, more.residual, info.residual),
            )
        return value, info

    def _from(self, parts: Parts, z: Tensor, tol: float) -> tuple[Tensor, Info]:
        """One run from `z`, and its sharpening."""
        units = Units.at(parts, z)
        scaled: Any = units.scaled(parts)
        start = z / units.length.unsqueeze(-1)
        g = scaled.function(start)[..., 1 + parts.layout.p :]
        s = torch.where(-g > 0.1, -g, 0.1)
        nu = z.new_zeros(*z.shape[:-1], parts.layout.p)
        w, info = iterate(self, scaled, _Point(start, s, nu, 0.1 / s).join())
        found = _Point.of(w, scaled)
        value = units.original(torch.cat([found.z, found.nu, found.lam], -1), parts.layout)
        value, error = sharpen(parts, value, tol)
        fine = error <= tol
        status = torch.where(fine & (info.status <= Status.MAX_STEPS), int(Status.CONVERGED), info.status)
        status = torch.where(~fine & (status == Status.CONVERGED) & (error > 10 * tol), int(Status.MAX_STEPS), status)
        return value, Info(status, info.steps, error)


class _Conditions(NamedTuple):
    """What the conditions leave at a point."""

    f: Tensor
    h: Tensor
    gap: Tensor  # g + s
    slope: Tensor  # of the Lagrangian
    product: Tensor  # s lambda
    against: Tensor  # <nu, h> + <lambda, g>

    @staticmethod
    def at(out: Tensor, slope: Tensor, x: _Point, p: int) -> _Conditions:
        h, g = out[..., 1 : 1 + p], out[..., 1 + p :]
        return _Conditions(out[..., 0], h, g + x.s, slope, x.s * x.lam, (x.nu * h).sum(-1) + (x.lam * g).sum(-1))

    def error(self, x: _Point, mu: Tensor, products: bool = True) -> Tensor:
        """The largest entry, large multipliers counted out."""
        weight = self.weight(x).unsqueeze(-1)
        parts = [self.slope / weight, self.h, self.gap]
        parts += [(self.product - mu.unsqueeze(-1)) / weight] if products else []
        return torch.linalg.vector_norm(torch.cat(parts, -1), math.inf, dim=-1)

    def largest_product(self, x: _Point) -> Tensor:
        """Of slack and multiplier."""
        none = torch.zeros_like(self.f).unsqueeze(-1)
        return torch.cat([none, self.product], -1).amax(-1) / self.weight(x)

    def weight(self, x: _Point) -> Tensor:
        """The mean multiplier in hundreds, at least 1."""
        count = max(x.nu.shape[-1] + x.lam.shape[-1], 1)
        return (torch.cat([x.nu, x.lam], -1).abs().sum(-1) / count).clamp_min(100) / 100

    def norm(self, x: _Point, mu: Tensor) -> Tensor:
        """Euclidean norm of all of them."""
        return size(torch.cat([self.slope, self.h, self.gap, self.product - mu.unsqueeze(-1)], -1))

    def violation(self) -> Tensor:
        """Sum of absolute values."""
        return self.h.abs().sum(-1) + self.gap.abs().sum(-1)

    def merit(self, x: _Point, mu: Tensor, penalty: Tensor) -> Tensor:
        """Barrier objective and weighted violation."""
        return self.f - mu * x.s.log().sum(-1) + penalty * self.violation()

    def certified(self, x: _Point, E: Tensor, A: Tensor) -> Tensor:
        """Whether the multipliers say that the linearised constraints have no solution anywhere near.

        A point u that meets them has ``0 >= <nu, h> + <lambda, g> + <E^T nu + A^T lambda, u - z>``.
        """
        left = _pull(E, x.nu) + _pull(A, x.lam)
        return (self.against > 0) & (size(left) * (1 + size(x.z)) <= 1e-6 * self.against)


def _weights(x: _Point) -> Tensor:
    return torch.cat([torch.ones_like(x.z[..., :1]), x.nu, x.lam], -1)


def _pull(J: Tensor, v: Tensor) -> Tensor:
    return (v.unsqueeze(-2) @ J).squeeze(-2)


def _to_boundary(v: Tensor, dv: Tensor, tau: Tensor) -> Tensor:
    """The longest step up to 1 that keeps ``v > (1 - tau) v``."""
    ratio = torch.where(dv < 0, -tau * v / torch.where(dv < 0, dv, -1), math.inf)
    return torch.cat([torch.ones_like(tau), ratio], -1).amin(-1)


def _newton(M: Tensor, E: Tensor, rhs: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """The solution of the condensed system with ``-rhs``, and the shift that made it a minimum along the equalities."""
    n, p = M.shape[-1], E.shape[-2]
    eye = torch.eye(n, dtype=M.dtype, device=M.device)
    # dependent equalities: a trace of regularisation, which vanishes with the step in nu
    corner = -(torch.finfo(M.dtype).eps ** 0.75) * torch.eye(p, dtype=M.dtype, device=M.device)
    low = torch.cat([E, corner.expand(*E.shape[:-2], p, p)], -1)
    shift = torch.zeros_like(last)
    grow = torch.where(last > 0, 8.0, 100.0).to(M.dtype)
    for _ in range(30):
        K = torch.cat([torch.cat([M + shift[..., None, None] * eye, E.mT], -1), low], -2)
        factors = Symmetric.of(K)
        wrong = ((factors.negative != p) | factors.zero) & factors.finite
        if not bool(wrong.any()):
            break
        more = torch.where(shift > 0, shift * grow, torch.where(last > 0, last / 3, 1e-4))
        shift = torch.where(wrong, more, shift)
    return factors.solve(-rhs), shift
