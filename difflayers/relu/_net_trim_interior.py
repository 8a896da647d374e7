r"""Net-Trim on a few columns and rows of the data, to rounding: a primal-dual interior-point method.

.. math:: \min_u \sum_j \|u_j\|_1 \quad \text{s.t. } \tfrac12 \sum_j (\|F_j u_j - f_j\|^2 + \rho_j^2) \le
    \tfrac12 \epsilon^2, \qquad B_j u_j \le 0

The neurons j meet in one number only, the multiplier of the ball, so that a Newton step is one Cholesky factorisation
for each of them and an update of rank one. With :math:`\epsilon = 0` the ball becomes :math:`F_j u_j = f_j`, whose
multipliers are damped by :math:`\delta` (a proximal method of multipliers; the rows may depend on each other).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_DAMPING = 1e-8
_PROXIMAL = 1e-5
_IMPOSSIBLE = 1e3  # times the norm of the least-squares solution: no lower bound of the norm is that large
_PATIENCE = 6  # steps without any progress


@dataclass(frozen=True, eq=False)
class Restricted:
    """Problems of E layers with m neurons each. Columns and rows that only fill up are zero."""

    F: Tensor  # (E, m, k, k)
    f: Tensor  # (E, m, k)
    rho2: Tensor  # (E, m)
    G: Tensor  # (E, m, k, k), F^T F
    B: Tensor  # (E, m, r, k)
    used: Tensor  # (E, m, r) which rows are any
    free: Tensor  # (E, m, k) columns that cost nothing
    eps: Tensor  # (E)
    penalty: Tensor  # (E) instead of the ball, its multiplier; 0: the ball

    @property
    def round(self) -> Tensor:
        """Which elements (E) have a ball."""
        return (self.eps > 0) & (self.penalty == 0)


@dataclass(frozen=True, eq=False)
class Point:
    """u = p - q with slacks s of the bounds |gradient| <= 1; slacks w, v and multipliers kappa, mu; nu of equations."""

    u: Tensor
    p: Tensor
    q: Tensor
    sp: Tensor
    sq: Tensor
    w: Tensor
    kappa: Tensor
    v: Tensor  # (E)
    mu: Tensor  # (E)
    nu: Tensor

    def moved(self, step: Point, length: Tensor) -> Point:
        """The point `length` (E) along `step`."""
        each = {
            name: value + getattr(step, name) * length.view((-1,) + (1,) * (value.ndim - 1))
            for name, value in vars(self).items()
        }
        return Point(**each)

    def where(self, keep: Tensor, other: Point) -> Point:
        """This point in the elements `keep` (E), the `other` elsewhere."""
        each = {
            name: torch.where(keep.view((-1,) + (1,) * (value.ndim - 1)), value, getattr(other, name))
            for name, value in vars(self).items()
        }
        return Point(**each)


@dataclass(frozen=True, eq=False)
class _Residuals:
    up: Tensor  # 1 + g - sp, or g of a free column
    down: Tensor  # 1 - g - sq
    rows: Tensor  # B u + w
    ball: Tensor  # c(u) + v
    equal: Tensor  # F u - f
    slope: Tensor  # of c


def times(A: Tensor, x: Tensor) -> Tensor:
    """Batched matrix-vector products."""
    return (A @ x.unsqueeze(-1)).squeeze(-1)


def _total(t: Tensor) -> Tensor:
    return t.flatten(1).sum(-1)


def interior_point(P: Restricted, rtol: float, max_steps: int) -> tuple[Point, Tensor, Tensor, Tensor]:
    """A solution, the relative error of every element, the number of its steps, and whether it has no solution."""
    equality = P.eps == 0
    count = 2 * _total((~P.free).to(P.f.dtype)) + _total(P.used.to(P.f.dtype)) + P.round.to(P.f.dtype)
    z = _start(P)
    best, least = z, z.mu.new_full(z.mu.shape, torch.inf)
    steps = torch.zeros(z.mu.shape, dtype=torch.long, device=z.mu.device)
    done, stalled = torch.zeros_like(equality), torch.zeros_like(steps)
    impossible, usual = torch.zeros_like(equality), _total(z.u.abs()) + z.u[0].numel()
    for _ in range(max_steps):
        res = _residuals(P, z, equality)
        error = _error(P, z, res, equality)
        better = (error < least) & ~done
        best, least = z.where(better, best), torch.where(better, error, least)
        stalled = torch.where(better | (P.penalty > 0), 0, stalled + 1)  # a penalty makes the error grow at first
        impossible = impossible | ((_bound(P, z, equality) > _IMPOSSIBLE * usual) & ~done)
        # in the end rounding has the better of it
        done = done | impossible | (least <= rtol) | ~torch.isfinite(error) | (stalled > _PATIENCE)
        if bool(done.all()):
            break
        steps = steps + (~done).long()
        H = _Newton(P, z, res, equality)
        zero = torch.zeros_like(z.mu)
        plain = H.direction(res, zero, None)
        length = _length(P, z, plain, equality)
        mean = _complementarity(P, z, equality) / count
        ahead = _complementarity(P, z.moved(plain, length), equality) / count
        centred = mean * (ahead / mean).clamp(0, 1) ** 3
        bent = _bent(P, res, plain, equality)
        step = H.direction(bent, centred, plain)
        length = 0.995 * _length(P, z, step, equality)
        length = torch.where(H.failed, 0, torch.minimum(length, _trusted(P, z, step)))
        done = done | H.failed
        z = z.where(done, _centred(P, z.moved(step, length), equality, count))
    return best, least, steps, impossible & (least > rtol)


def _centred(P: Restricted, z: Point, equality: Tensor, count: Tensor) -> Point:
    """With the slack that the point has inside the ball; outside, not one much smaller than its share.

    The ball is curved, so that steps along its boundary leave it, and a slack that vanishes early ends all progress.
    """
    share = 0.01 * _complementarity(P, z, equality) / count / torch.where(P.round, z.mu, 1)
    return replace(z, v=torch.where(P.round, torch.maximum(torch.maximum(z.v, -_ball(P, z.u)), share), z.v))


def _start(P: Restricted) -> Point:
    """Least squares, centred."""
    k = P.f.shape[-1]
    ridge = 1e-10 * P.G.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = torch.where(ridge > 0, ridge, 1)
    eye = torch.eye(k, dtype=P.f.dtype, device=P.f.device)
    L = torch.linalg.cholesky_ex(P.G + ridge[..., None, None] * eye)[0]
    u = torch.cholesky_solve(times(P.F.mT, P.f).unsqueeze(-1), L).squeeze(-1)
    size = u.abs().flatten(1).mean(-1)
    size = torch.where(size > 0, size, 1)
    wide = size[:, None, None]
    p, q = u.clamp_min(0) + wide, (-u).clamp_min(0) + wide
    w = torch.where(P.used, (-times(P.B, u)).clamp_min(wide), 1)
    c = _ball(P, u)
    v = torch.maximum(-c, 0.1 * P.eps**2)
    v = torch.where(P.round, v, 1)
    mu = torch.where(P.round, size / v, P.penalty)
    one = torch.ones_like(u)
    return Point(u, p, q, one, one, w, torch.where(P.used, wide / w, 0), v, mu, torch.zeros_like(u))


def _ball(P: Restricted, u: Tensor) -> Tensor:
    return (_total((times(P.F, u) - P.f) ** 2) + _total(P.rho2) - P.eps**2) / 2


def gradient(P: Restricted, z: Point, equality: Tensor) -> tuple[Tensor, Tensor]:
    """Of the constraints, with multipliers; and that of the ball alone, without."""
    slope = times(P.F.mT, times(P.F, z.u) - P.f)
    pulled = torch.where(equality[:, None, None], times(P.F.mT, z.nu), z.mu[:, None, None] * slope)
    return pulled + times(P.B.mT, z.kappa), slope


def _bound(P: Restricted, z: Point, equality: Tensor) -> Tensor:
    """What the multipliers, made feasible, say that the norm is at least."""
    miss = times(P.F, z.u) - P.f
    size = torch.sqrt(_total(miss**2) + _total(P.rho2))
    bound = z.mu * (_total(P.rho2) - _total(miss * P.f) - P.eps * size)
    bound = torch.where(equality, -_total(z.nu * P.f), bound)
    g = gradient(P, z, equality)[0]
    most = torch.where(P.free, 0, g.abs()).flatten(1).amax(-1).clamp_min(1)
    wrong = torch.where(P.free, g.abs(), 0).flatten(1).amax(-1)
    return torch.where(wrong <= 1e-6 * bound, bound, 0) / most


def _residuals(P: Restricted, z: Point, equality: Tensor) -> _Residuals:
    g, slope = gradient(P, z, equality)
    return _Residuals(
        up=torch.where(P.free, g, 1 + g - z.sp),
        down=torch.where(P.free, 0, 1 - g - z.sq),
        rows=torch.where(P.used, times(P.B, z.u) + z.w, 0),
        ball=torch.where(P.round, _ball(P, z.u) + z.v, 0),
        equal=torch.where(equality[:, None, None], times(P.F, z.u) - P.f, 0),
        slope=slope,
    )


def _bent(P: Restricted, res: _Residuals, step: Point, equality: Tensor) -> _Residuals:
    """The residuals with what a full step leaves behind at second order."""
    moved = times(P.F, step.u)
    bend = torch.where(equality[:, None, None], 0, step.mu[:, None, None] * times(P.F.mT, moved))
    return replace(
        res,
        up=res.up + bend,
        down=torch.where(P.free, 0, res.down - bend),
        ball=torch.where(P.round, res.ball + _total(moved**2) / 2, 0),
    )


def _complementarity(P: Restricted, z: Point, equality: Tensor) -> Tensor:
    bounds = torch.where(P.free, 0, z.p * z.sp + z.q * z.sq)
    rows = torch.where(P.used, z.w * z.kappa, 0)
    return _total(bounds) + _total(rows) + torch.where(P.round, z.v * z.mu, 0)


def _error(P: Restricted, z: Point, res: _Residuals, equality: Tensor) -> Tensor:
    """Gap, violations and slopes, relative."""
    size = torch.where(P.free, 0, z.u.abs())
    value = _total(size).clamp_min(1e-6)
    most = z.u.abs().flatten(1).amax(-1).clamp_min(1e-6)
    parts = [_complementarity(P, z, equality) / value, res.up.abs().flatten(1).amax(-1)]
    parts.append(res.down.abs().flatten(1).amax(-1))
    if res.rows.shape[-1]:
        parts.append(res.rows.abs().flatten(1).amax(-1) / most)
    parts.append(torch.where(P.round, res.ball.abs() / torch.where(P.round, P.eps**2, 1), 0))
    parts.append(res.equal.abs().flatten(1).amax(-1))
    return torch.stack(parts).amax(0)


def _length(P: Restricted, z: Point, step: Point, equality: Tensor) -> Tensor:
    """The longest step that keeps what is positive."""
    longest = torch.full_like(z.mu, 1.0)
    pairs = [(z.p, step.p), (z.q, step.q), (z.sp, step.sp), (z.sq, step.sq), (z.w, step.w), (z.kappa, step.kappa)]
    for at, d in [*pairs, (z.v[:, None], step.v[:, None]), (z.mu[:, None], step.mu[:, None])]:
        if at[0].numel():
            room = torch.where(d < 0, -at / torch.where(d < 0, d, -1), torch.inf)
            longest = torch.minimum(longest, room.flatten(1).amin(-1))
    return longest


def _trusted(P: Restricted, z: Point, step: Point) -> Tensor:
    """The longest step on which the ball is about what its linear model says, and curved about as much."""
    moved = torch.linalg.vector_norm(times(P.F, step.u).flatten(1), dim=-1)
    size = (P.eps**2 + 2 * _ball(P, z.u).clamp_min(0)).sqrt()
    shrink = torch.where(step.mu < 0, -0.9 * z.mu / torch.where(step.mu < 0, step.mu, -1), torch.inf)
    far = torch.where(moved > size, size / torch.where(moved > 0, moved, 1), torch.inf)
    return torch.where(P.round, torch.minimum(shrink, far), torch.inf)


class _Newton:
    """The factorised system at one point."""

    def __init__(self, P: Restricted, z: Point, res: _Residuals, equality: Tensor) -> None:
        self.P, self.z, self.equality = P, z, equality
        self.stiff = torch.where(P.free, 0, 1 / (z.p / z.sp + z.q / z.sq))
        self.pull = torch.where(P.used, z.kappa / z.w, 0)
        weight = torch.where(equality, 1 / _DAMPING, z.mu)[:, None, None, None]
        H = weight * P.G + P.B.mT @ (self.pull.unsqueeze(-1) * P.B) + torch.diag_embed(self.stiff)
        size = H.diagonal(dim1=-2, dim2=-1)
        jitter = torch.where(size > 0, 1e-15 * size, 1)
        self.L, info = torch.linalg.cholesky_ex(H + torch.diag_embed(jitter))
        self.failed = (info != 0).any(-1)
        self.slope = torch.where(P.round[:, None, None], res.slope, 0)
        self.across = self._block(self.slope)
        bend = torch.where(P.round, z.v / torch.where(P.round, z.mu, 1), 1) + _total(self.slope * self.across)
        self.bend = torch.where(bend > 0, bend, 1)

    def _block(self, b: Tensor) -> Tensor:
        return torch.cholesky_solve(b.unsqueeze(-1), self.L).squeeze(-1)

    def direction(self, res: _Residuals, centre: Tensor, plain: Point | None) -> Point:
        """The step to complementarity `centre`, with the second-order terms of the `plain` step."""
        P, z = self.P, self.z
        wide = centre[:, None, None]
        tp, tq, tw, tv = wide - z.p * z.sp, wide - z.q * z.sq, wide - z.w * z.kappa, centre - z.v * z.mu
        if plain is not None:
            tp, tq = tp - plain.p * plain.sp, tq - plain.q * plain.sq
            tw, tv = tw - plain.w * plain.kappa, tv - plain.v * plain.mu
        e = (tp - z.p * res.up) / z.sp - (tq - z.q * res.down) / z.sq
        rows = torch.where(P.used, self.pull * res.rows + tw / z.w, 0)
        ball = torch.where(P.round, res.ball + tv / torch.where(P.round, z.mu, 1), 0)
        rhs = torch.where(P.free, -res.up, self.stiff * e) - times(P.B.mT, rows)
        x = self._block(rhs - times(P.F.mT, res.equal) / _DAMPING)
        # the multiplier of the ball first: eliminated, it would cancel at the end
        mu = (_total(self.slope * x) + ball) / self.bend
        u = x - mu[:, None, None] * self.across
        g = torch.where(P.free, 0, self.stiff * (e - u))
        sp, sq = torch.where(P.free, 0, res.up + g), torch.where(P.free, 0, res.down - g)
        p = torch.where(P.free, 0, (tp - z.p * sp) / z.sp)
        q = torch.where(P.free, 0, (tq - z.q * sq) / z.sq)
        kappa = torch.where(P.used, self.pull * times(P.B, u) + rows, 0)
        w = torch.where(P.used, -res.rows - times(P.B, u), 0)
        v = torch.where(P.round, -res.ball - _total(self.slope * u), 0)
        nu = torch.where(self.equality[:, None, None], (times(P.F, u) + res.equal) / _DAMPING, 0)
        return Point(u, p, q, sp, sq, w, kappa, v, mu, nu)


def polish(P: Restricted, z: Point, steps: int = 12) -> Point:
    """Newton's method on the optimality conditions, to rounding where the solution is not degenerate.

    The weights that are not zero and the rows that are tight are those of the point at first, and then what their
    slopes say (a semismooth Newton method).
    """
    equality = P.eps == 0
    wide = equality[:, None, None]
    support, active = P.free | (z.p > z.sp) | (z.q > z.sq), P.used & (z.kappa > z.w)
    at = replace(z, u=torch.where(support, z.u, 0), kappa=torch.where(active, z.kappa, 0))
    sign = torch.where(P.free, 0, torch.where(z.p > z.q, 1.0, -1.0).to(z.u.dtype))
    size, pull = _mean(z.u.abs(), support), _mean(z.kappa, active) / _mean(z.w, P.used & ~active)
    for step in range(steps):
        F, B = P.F * support.unsqueeze(-2), P.B * (support.unsqueeze(-2) & active.unsqueeze(-1))
        own = replace(P, F=F, B=B)
        g, slope = gradient(own, at, equality)
        weight = torch.where(equality, 1 / _PROXIMAL, at.mu)[:, None, None, None]
        H = weight * (F.mT @ F) + B.mT @ B / _PROXIMAL + torch.diag_embed((~support).to(F.dtype))
        diagonal = H.diagonal(dim1=-2, dim2=-1)
        L = torch.linalg.cholesky_ex(H + torch.diag_embed(torch.where(diagonal > 0, 1e-15 * diagonal, 1)))[0]
        equal = torch.where(wide, times(F, at.u) - P.f, 0)
        rhs = torch.where(support, -sign - g, 0) - (times(B.mT, times(B, at.u)) + times(F.mT, equal)) / _PROXIMAL
        slope = torch.where(wide, 0, slope)
        x, across = torch.cholesky_solve(torch.stack([rhs, slope], -1), L).unbind(-1)
        bend = _total(slope * across)
        ball = torch.where(equality, 0, _ball(own, at.u))
        mu = torch.where(bend > 0, (_total(slope * x) + ball) / torch.where(bend > 0, bend, 1), 0)
        u = at.u + x - mu[:, None, None] * across
        equal = torch.where(wide, times(F, u) - P.f, 0)
        at = replace(at, u=u, mu=at.mu + mu, kappa=at.kappa + times(B, u) / _PROXIMAL, nu=at.nu + equal / _PROXIMAL)
        if step % 4 == 3 and step + 1 < steps:
            wanted = u - size * gradient(P, at, equality)[0]
            sign = torch.where(P.free, 0, wanted.sign())
            support = P.free | (wanted.abs() > size)
            active = P.used & (at.kappa + pull * times(P.B, u) > 0)
            at = replace(at, u=torch.where(support, u, 0), kappa=torch.where(active, at.kappa, 0))
    return at


def _mean(t: Tensor, where: Tensor) -> Tensor:
    """The mean (E, 1, 1) of some entries; 1 of none."""
    count = _total(where.to(t.dtype))
    found = _total(torch.where(where, t, 0)) / count.clamp_min(1)
    return torch.where(found > 0, found, 1)[:, None, None]
