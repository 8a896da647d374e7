r"""Finding the coefficients: one linear solve, or damped Gauss-Newton ended by Newton steps, every element on its own.

.. math:: \min_v \tfrac12 \sum_n s_n^2 F(T_n^0 + B_n v)^2 + \tfrac12 \|A v - y\|^2 + \tfrac\lambda2 \|v - v_0\|^2

on plain tensors, without equalities (the caller restricts the basis to their solutions) and with the weights of the
rows in A and y.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._checks import default_rtol
from difflayers._solution import Status
from difflayers.implicit import LevenbergMarquardt
from difflayers.linalg._direct import solve_columns, tiny_pivots
from difflayers.linalg._kkt import solve_forward
from difflayers.linalg._system import expand_mask, times

from ._pointwise import Params, Pointwise

_NEWTON_STEPS = 8
_MOST_DAMPING = 1e12
_PLAIN_STEPS = 10  # of Gauss and Newton alone, before the exact Hessian is asked too
_HANDOVER = (3e-1, 1e-3)  # step lengths at which Newton's method is tried undamped: it takes over, or hands back


def where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Per element."""
    return torch.where(expand_mask(mask, new.ndim - mask.ndim), new, old)


class Point(NamedTuple):
    """Coefficients v with what F says there: terms T, weighted residuals R and derivatives Fs, row misfits e."""

    v: Tensor
    T: Tensor
    R: Tensor
    Fs: Tensor
    e: Tensor
    objective: Tensor

    @staticmethod
    def pick(mask: Tensor, new: Point, old: Point) -> Point:
        """`new` where the mask holds."""
        return Point(*(where(mask, a, b) for a, b in zip(new, old, strict=True)))


class Found(NamedTuple):
    """Coefficients, a triangular factor of the Hessian, and how it went."""

    v: Tensor
    R: Tensor
    singular: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    linear: Tensor


@dataclass(frozen=True)
class Fit:
    """The problem: basis `B` ``(*, N, T, K)``, offset `T0`, weights `s` or None, rows `A`, `y`, ridge or None."""

    F: Pointwise
    params: Params
    B: Tensor
    T0: Tensor | None
    s: Tensor | None
    A: Tensor
    y: Tensor
    ridge: Tensor | None
    center: Tensor | None

    def at(self, v: Tensor) -> Point:
        """The problem linearised at v."""
        T = times(self.B.flatten(-3, -2), v).unflatten(-1, self.B.shape[-3:-1])
        T = T if self.T0 is None else T + self.T0
        R, Fs = self.F.linearise(T, self.params)
        if self.s is not None:
            R, Fs = self.s.unsqueeze(-1) * R, self.s[..., None, None] * Fs
        e = times(self.A, v) - self.y
        f = (R.square().sum((-2, -1)) + e.square().sum(-1)) / 2
        if self.ridge is not None:
            f = f + self.ridge * self.from_center(v).square().sum(-1) / 2
        return Point(v, T, R, Fs, e, f)

    def from_center(self, v: Tensor) -> Tensor:
        """What the ridge holds small."""
        return v if self.center is None else v - self.center

    def jacobian(self, p: Point) -> Tensor:
        """``(*batch, N Q, K)``: the derivatives of F times the basis, a term at a time."""
        J = p.Fs[..., 0, None] * self.B[..., None, 0, :]
        for t in range(1, self.B.shape[-2]):
            J = torch.addcmul(J, p.Fs[..., t, None], self.B[..., None, t, :])
        return J.flatten(-3, -2)

    def gradient(self, p: Point) -> Tensor:
        """The derivative of the objective by v."""
        h = (p.Fs * p.R.unsqueeze(-1)).sum(-2)
        g = times(self.B.flatten(-3, -2).mT, h.flatten(-2)) + times(self.A.mT, p.e)
        return g if self.ridge is None else g + self.ridge.unsqueeze(-1) * self.from_center(p.v)

    def gauss_newton(self, p: Point) -> Tensor:
        """The Hessian without the curvature of F."""
        J = self.jacobian(p)
        G = J.mT @ J + self.A.mT @ self.A
        return G if self.ridge is None else G + torch.diag_embed(self.ridge.unsqueeze(-1).expand(G.shape[:-1]))

    def with_curvature(self, G: Tensor, p: Point) -> Tensor:
        """The exact Hessian: the Gauss-Newton matrix and the curvature of F, of the terms in which F is not linear."""
        P = self.curved(p)
        bent = (torch.isfinite(P) & (P != 0)).flatten(0, -3).any(0)
        used = (bent.any(0) | bent.any(1)).nonzero().squeeze(-1)
        if not used.numel():
            return where(torch.isfinite(P).flatten(-3).all(-1), G, G * math.nan)
        B = self.B.index_select(-2, used)
        P = P.index_select(-2, used).index_select(-1, used)
        PB = P[..., 0, None] * B[..., None, 0, :]
        for t in range(1, used.numel()):
            PB = torch.addcmul(PB, P[..., t, None], B[..., None, t, :])
        return G + B.flatten(-3, -2).mT @ PB.flatten(-3, -2)

    def curved(self, p: Point) -> Tensor:
        """``(*batch, N, T, T)``: the curvature of F, weighted with the residuals."""
        return self.F.curvature(p.T, p.R if self.s is None else self.s.unsqueeze(-1) * p.R, self.params)

    def hessian_product(self, p: Point, P: Tensor | None, z: Tensor) -> Tensor:
        """The Hessian times z, with curvature `P` or without; in factors, where ``J z`` keeps its digits."""
        B = self.B.flatten(-3, -2)
        Bz = times(B, z).unflatten(-1, self.B.shape[-3:-1])
        h = (p.Fs * (p.Fs * Bz.unsqueeze(-2)).sum(-1, keepdim=True)).sum(-2)
        h = h if P is None else h + times(P, Bz)
        out = times(B.mT, h.flatten(-2)) + times(self.A.mT, times(self.A, z))
        return out if self.ridge is None else out + self.ridge.unsqueeze(-1) * z

    def damping(self, G: Tensor, mu: Tensor) -> Tensor:
        """What mu adds to the diagonal of G: of the part that F has there, for rows and ridge are as they seem.

        Of all of it once mu is large: coefficients that F does not see here may matter elsewhere.
        """
        D = G.diagonal(dim1=-2, dim2=-1)
        D, mu = torch.where(D > 0, D, 1), mu.unsqueeze(-1)
        part = D - self.A.square().sum(-2)
        part = part if self.ridge is None else part - self.ridge.unsqueeze(-1)
        return mu * torch.maximum(part, mu.clamp_max(1) * D)

    def sizes(self, p: Point) -> tuple[Tensor, Tensor]:
        """What residuals are made of, before anything cancels, the scale that rounding has: without the rows, and all.

        Rows may be heavy: rounding in them is not what limits the others.
        """
        light = (p.Fs * p.T.unsqueeze(-2)).abs().sum(-1).square().sum((-2, -1)) + p.R.square().sum((-2, -1))
        if self.ridge is not None:
            light = light + self.ridge * self.from_center(p.v).square().sum(-1)
        rows = times(self.A, p.v).square().sum(-1) + p.e.square().sum(-1)
        return light.sqrt(), (light + rows).sqrt()

    def lengths(self, p: Point, d: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """The change of the residuals that d stands for, without the rows and that of the rows.

        `square` is that of all in the norm of a Hessian, which has curvature too.
        """
        Bd = times(self.B.flatten(-3, -2), d).unflatten(-1, self.B.shape[-3:-1])
        light = (p.Fs * Bd.unsqueeze(-2)).sum(-1).square().sum((-2, -1))
        if self.ridge is not None:
            light = light + self.ridge * d.square().sum(-1)
        rows = times(self.A, d).square().sum(-1)
        return torch.maximum(light, square - rows).clamp_min(0).sqrt(), rows.sqrt()


def factorise(H: Tensor) -> tuple[Tensor, Tensor]:
    """``R`` with ``R^T R = H``, and the elements where H is not positive definite."""
    scale = H.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(scale > 0, scale, 1).sqrt()
    L, info = torch.linalg.cholesky_ex(H / scale.unsqueeze(-1) / scale.unsqueeze(-2))
    pivots = L.diagonal(dim1=-2, dim2=-1) ** 2
    return L.mT * scale.unsqueeze(-2), (info != 0) | tiny_pivots(pivots, torch.ones_like(pivots))


def gram_solve(R: Tensor, b: Tensor) -> Tensor:
    """``(R^T R)^-1 b``."""
    # cholesky_solve copies its factor, which takes longer than the solve where that is large
    solve = lambda R, b: torch.linalg.solve_triangular(  # noqa: E731
        R, torch.linalg.solve_triangular(R.mT, b, upper=False), upper=True
    )
    return solve_columns(solve, (R,), (2,), b)


def minimise(fit: Fit, start: Tensor, options: LevenbergMarquardt, gauss_newton: bool) -> Found:
    """The minimiser of every element: in one step where F is linear in the terms, by iteration elsewhere."""
    first = fit.at(start)
    # an element that is not finite is none for the iteration either
    candidate = constant_derivative(fit, first) | ~torch.isfinite(first.objective)
    iterate = not candidate.is_meta and not bool(candidate.all())
    if candidate.is_meta or not bool(candidate.any()):
        return _iterated(fit, first, options, gauss_newton)
    found, linear = _linear(fit, first, candidate)
    if not iterate and bool(linear.all()):
        return found
    other = _iterated(fit, first, options, gauss_newton)
    return Found(*(where(linear, a, b) for a, b in zip(found, other, strict=True)))


# ------------------------------------------------------------------------------------------------------------- linear


def constant_derivative(fit: Fit, p: Point) -> Tensor:
    """Per element: F is at two other places what its derivatives at p say, and they are the same there."""
    T, same = p.T, torch.ones(p.T.shape[:-2], dtype=torch.bool, device=p.T.device)
    size = 1 + torch.nan_to_num(T).abs().amax(-2, keepdim=True)
    ramp = torch.arange(T.shape[-2] * T.shape[-1], dtype=T.dtype, device=T.device).reshape(T.shape[-2:])
    for scale, shift in ((1.0, 0.3), (-10.0, 2.1)):
        same = same & _as_predicted(fit, p, T + scale * size * (1.5 + torch.cos(1.7 * ramp + shift)))
    return same


def _as_predicted(fit: Fit, p: Point, T: Tensor) -> Tensor:
    """Per element: no value of F at T, nor a derivative, differs from what is known at p. A jump shows in values."""
    R, Fs = fit.F.linearise(T, fit.params)
    if fit.s is not None:
        R, Fs = fit.s.unsqueeze(-1) * R, fit.s[..., None, None] * Fs
    rounding = 1e3 * torch.finfo(T.dtype).eps
    close = ((Fs - p.Fs).abs() <= rounding * p.Fs.abs().amax(-3, keepdim=True)).flatten(-3).all(-1)
    made = (p.Fs * (T.abs() + p.T.abs()).unsqueeze(-2)).abs().sum(-1) + p.R.abs()
    miss = R - p.R - (p.Fs * (T - p.T).unsqueeze(-2)).sum(-1)
    return close & (miss.abs() <= rounding * made.amax(-2, keepdim=True)).flatten(-2).all(-1)


def _linear(fit: Fit, p: Point, candidate: Tensor) -> tuple[Found, Tensor]:
    """One linear least-squares problem; and the candidates that are at its solution what was predicted."""
    J = fit.jacobian(p)
    target = times(J, p.v) - p.R.flatten(-2)
    batch = p.v.shape[:-1]
    rows = torch.cat([J, fit.A.expand(*batch, *fit.A.shape[-2:])], -2)
    target = torch.cat([target, fit.y.expand(*batch, fit.y.shape[-1])], -1)
    center = None if fit.ridge is None else fit.center
    v, info, (R, singular) = solve_forward(rows, target, None, fit.ridge, center, None, None)
    end = fit.at(v)
    miss = times(rows.mT, torch.cat([end.R.flatten(-2), end.e], -1))
    if fit.ridge is not None:
        miss = miss + fit.ridge.unsqueeze(-1) * fit.from_center(v)
    finite = torch.isfinite(p.objective) & torch.isfinite(end.T).flatten(-2).all(-1)
    linear = candidate & (_as_predicted(fit, p, end.T) | ~finite)
    lost = ~torch.isfinite(p.objective) | (~torch.isfinite(end.objective) & (info.status != Status.SINGULAR))
    status = torch.where(lost, int(Status.DIVERGED), info.status)
    residual = torch.linalg.vector_norm(miss, dim=-1)
    steps = torch.ones_like(status)
    return Found(v, R, singular.expand(batch), status, steps, residual, linear), linear


# ---------------------------------------------------------------------------------------------------------- nonlinear


def _iterated(fit: Fit, p: Point, options: LevenbergMarquardt, gauss_newton: bool) -> Found:
    """Damped Gauss-Newton until Newton's method may take over; where that does not contract, further on."""
    rtol = default_rtol(options.rtol, p.v.dtype)
    steps = torch.zeros(p.v.shape[:-1], dtype=torch.int64, device=p.v.device)
    mu = torch.full_like(p.objective, options.damping)
    pending = torch.isfinite(p.objective)
    state = _State(p, mu, steps)
    near = arrived = torch.zeros_like(pending)
    for exact, tol in ((False, _HANDOVER[0]), (True, _HANDOVER[1]), (True, rtol)):
        state, close = _damped(fit, state, options, tol, pending, exact)
        near = torch.where(pending, close, near)
        state, R, singular, done = _newton(fit, state, close, options, rtol)
        arrived = arrived | done
        pending = pending & ~arrived & (state.steps < options.max_steps)
        if pending.is_meta or not bool(pending.any()):
            break
    p = state.p
    if gauss_newton:
        R, singular = factorise(fit.gauss_newton(p))
    status = torch.where(arrived, int(Status.CONVERGED), int(Status.MAX_STEPS))
    status = torch.where(near & singular, int(Status.SINGULAR), status)
    status = torch.where(torch.isfinite(p.objective), status, int(Status.DIVERGED))
    residual = torch.linalg.vector_norm(fit.gradient(p), dim=-1)
    return Found(p.v, R, singular, status, state.steps, residual, torch.zeros_like(arrived))


@dataclass(frozen=True)
class _State:
    p: Point
    mu: Tensor
    steps: Tensor


def _damped(
    fit: Fit, state: _State, options: LevenbergMarquardt, tol: float, active: Tensor, exact: bool
) -> tuple[_State, Tensor]:
    """Levenberg-Marquardt on the active elements, and those that came within `tol`.

    Damping falls where the objective went down by half of what was predicted and rises below a quarter, as in MINPACK
    (J. More, The Levenberg-Marquardt algorithm, 1978): a step that gains a hair is taken, but trusted less, or the
    iteration zigzags. The step is measured by the change of the residuals that it stands for, so that an
    ill-conditioned basis costs nothing. With `exact` it is the better one of two: that of Gauss and Newton, which
    crosses kinks of F, and Newton's, which is quick where F bends and the residuals stay.
    """
    p, mu, steps = state.p, state.mu, state.steps
    near = torch.zeros_like(active)
    every = options.check_every or options.max_steps
    eps = torch.finfo(p.v.dtype).eps
    for k in range(options.max_steps if exact else min(_PLAIN_STEPS, options.max_steps)):
        G, g = fit.gauss_newton(p), fit.gradient(p)
        damping = fit.damping(G, mu)
        d, sound, trial = _trial(fit, p, G, G, damping, g)
        gain = _predicted(G, g, d)
        if exact:
            H = fit.with_curvature(G, p)
            other, positive, place = _trial(fit, p, H, G, damping, g)
            lower = positive & (~sound | (place.objective < trial.objective))
            gain = where(lower, _predicted(H, g, other), gain)
            d, sound, trial = where(lower, other, d), sound | positive, Point.pick(lower, place, trial)
        # an increase within rounding is taken too: close to the minimum the objective cannot tell a step from none
        better = sound & (trial.objective <= p.objective * (1 + 8 * eps))
        length = (times(G, d) * d).sum(-1).clamp_min(0).sqrt() * (1 + mu)
        steps = steps + active
        taken = active & better
        whole = fit.lengths(p, (1 + mu).unsqueeze(-1) * d, length.square())
        close = taken & (mu <= 1) & _within(whole, fit.sizes(trial), options.atol, tol)
        # so close that the objective cannot tell better from worse: its gradient can, and Newton's method looks there
        close = close | (active & sound & (length.square() <= 64 * eps * p.objective))
        ratio = (p.objective - trial.objective) / gain
        good = (ratio > 0.5) | (length.square() <= 64 * eps**0.5 * trial.objective)  # no ratio of small differences
        p = Point.pick(taken, trial, p)
        near = near | close
        lower = torch.where(taken & good, (mu / 5).clamp_min(1e-12), mu)
        mu = torch.where(active & ~(taken & (good | (ratio > 0.25))), mu * 4, lower)
        active = active & ~close & (mu <= _MOST_DAMPING) & (steps < options.max_steps)
        if (k + 1) % every == 0 and not active.is_meta and not bool(active.any()):
            break
    return _State(p, mu.clamp_max(_MOST_DAMPING), steps), near


def _trial(fit: Fit, p: Point, H: Tensor, G: Tensor, damping: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Point]:
    """``-(H + diag(damping))^-1 g``, whether it is one (H is positive definite and F finite), and where it leads."""
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1).sqrt()
    damped = (H + torch.diag_embed(damping)) / scale.unsqueeze(-1) / scale.unsqueeze(-2)
    L, info = torch.linalg.cholesky_ex(damped)
    d = -gram_solve(L.mT, g / scale) / scale
    trial = fit.at(p.v + d)
    return d, (info == 0) & torch.isfinite(trial.objective), trial


def _within(lengths: tuple[Tensor, Tensor], sizes: tuple[Tensor, Tensor], atol: float, tol: float) -> Tensor:
    """Both lengths are small against what they change."""
    light, rows = (length <= atol + tol * size for length, size in zip(lengths, sizes, strict=True))
    return light & rows


def _relative(lengths: tuple[Tensor, Tensor], sizes: tuple[Tensor, Tensor]) -> Tensor:
    light, rows = (x / size.clamp_min(torch.finfo(x.dtype).tiny) for x, size in zip(lengths, sizes, strict=True))
    return torch.maximum(light, rows)


def _predicted(H: Tensor, g: Tensor, d: Tensor) -> Tensor:
    """By how much a quadratic model falls along d."""
    return -((g + times(H, d) / 2) * d).sum(-1)


def _newton(
    fit: Fit, state: _State, active: Tensor, options: LevenbergMarquardt, rtol: float
) -> tuple[_State, Tensor, Tensor, Tensor]:
    """Newton's method with the exact Hessian: state, factor, where that is not positive definite, and who arrived.

    A step counts where the next one with the same factor is shorter; both are taken then. An element rests once the
    second is within the tolerance, and leaves where it does not contract.
    """
    p, steps, done = state.p, state.steps, torch.zeros_like(active)
    eps = torch.finfo(p.v.dtype).eps
    for k in range(_NEWTON_STEPS):
        R, singular = factorise(fit.with_curvature(fit.gauss_newton(p), p))
        active = active & ~singular & (steps < options.max_steps)
        if active.is_meta or not bool(active.any()) or k + 1 == _NEWTON_STEPS:
            break
        d = -gram_solve(R, fit.gradient(p))
        trial = fit.at(p.v + d)
        again = -gram_solve(R, fit.gradient(trial))
        length, rest = (fit.lengths(p, t, times(R, t).square().sum(-1)) for t in (d, again))
        steps = steps + active
        sizes = fit.sizes(p)
        last = fit.at(trial.v + again)
        contracts = _relative(rest, sizes) <= _relative(length, sizes) / 2
        contracts = contracts & (last.objective <= p.objective * (1 + eps**0.5))
        rounding = ~contracts & _within(length, sizes, options.atol, rtol)  # nothing left to gain
        p = Point.pick(active & contracts, last, p)
        done = done | (active & (rounding | (contracts & _within(rest, sizes, options.atol, rtol))))
        active = active & contracts & ~done
    return replace(state, p=p, steps=steps), R, singular, done
