r"""A batched primal-dual interior-point method for quadratic programs, in torch, on the device of the data.

With slacks s and multipliers z of the inequalities, every step solves the Newton system of

.. math:: P x + q + A^T y + G^T z = 0, \quad A x = b, \quad G x + s = h, \quad s \circ z = \sigma \mu 1

reduced to :math:`H = P + G^T D(z/s) G + A^T A` by elimination. Each element has its own step length, stops on its own,
and keeps the best point it has seen. S. Mehrotra, On the implementation of a primal-dual interior point method, 1992,
sections 2 to 4; B. Amos, J. Z. Kolter, OptNet, 2017, batched it.

Symbols: ``r_d, r_e, r_i`` residuals of stationarity, equalities and inequalities; ``mu`` mean complementarity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._solution import Status
from difflayers.linalg._system import times


class _Point(NamedTuple):
    x: Tensor
    y: Tensor
    z: Tensor
    s: Tensor


class _Data(NamedTuple):
    P: Tensor
    q: Tensor
    G: Tensor
    h: Tensor
    A: Tensor
    b: Tensor
    bounded: Tensor  # an inequality without a bound keeps slack 1 and multiplier 0


@dataclass(frozen=True)
class InteriorPoint:
    """Mehrotra's predictor-corrector method, batched.

    It works in float64 whatever the data, since the weights of its systems span more digits than float32 has; on a
    device without float64 it works in float32, at a looser tolerance. One factorisation a step serves the predictor,
    the corrector and their iterative refinement. Its point is only the start of the layer's: the layer solves the KKT
    system of the active set, corrects the set where signs disagree, and keeps the factors for its derivatives.

    Args:
        rtol: Relative tolerance of all three residuals and of the duality gap; None: 1e-9, and 1e-4 where there is no
            float64.
        max_steps: Newton steps.
        check_every: Steps between read-backs of the one flag that stops the loop.
    """

    rtol: float | None = None
    max_steps: int = 50
    check_every: int = 1

    def solve(
        self, P: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``(x, y, z, status, steps)``; vectors are ``(B, .)``, matrices shared or ``(B, ., .)``."""
        if q.dtype != torch.float64 and q.device.type != "mps":  # which knows no float64
            x, y, z, status, steps = self.solve(*(t.double() for t in (P, q, G, h, A, b)))
            return x.to(q.dtype), y.to(q.dtype), z.to(q.dtype), status, steps
        eps = self.rtol if self.rtol is not None else (1e-9 if q.dtype == torch.float64 else 1e-4)
        bounded = h != torch.inf
        norms = torch.linalg.vector_norm(G, dim=-1)
        norms = torch.where(norms > 0, norms, 1)  # rows of G are scaled to unit length
        data = _Data(P, q, G / norms.unsqueeze(-1), torch.where(bounded, h, 0) / norms, A, b, bounded)
        point = _start(data)
        best, best_score = point, torch.full_like(q[..., 0], torch.inf)
        status = torch.full(q.shape[:-1], int(Status.MAX_STEPS), device=q.device)
        steps = torch.zeros_like(status)
        running = torch.ones_like(status, dtype=torch.bool)
        for k in range(self.max_steps + 1):
            residuals = _residuals(data, point)
            score, infeasible, unbounded = _judge(data, point, residuals, eps)
            better = running & (score < best_score)
            best = _where(better, point, best)
            best_score = torch.where(better, score, best_score)
            for ended, code in (
                (score <= eps, Status.CONVERGED),
                (infeasible, Status.INFEASIBLE),
                (unbounded, Status.UNBOUNDED),
                (~torch.isfinite(score), Status.DIVERGED),
            ):
                status = torch.where(running & ended, int(code), status)
                running = running & ~ended
            if k == self.max_steps or (k % self.check_every == 0 and not bool(running.any())):
                break
            steps = steps + running
            point = _where(running, _step(data, point, residuals, eps), point)
        return best.x, best.y, best.z / norms, status, steps


def _where(mask: Tensor, a: _Point, b: _Point) -> _Point:
    mask = mask.unsqueeze(-1)
    return _Point(*(torch.where(mask, u, v) for u, v in zip(a, b, strict=True)))


def _residuals(d: _Data, p: _Point) -> tuple[Tensor, Tensor, Tensor]:
    return (
        times(d.P, p.x) + d.q + times(d.A.mT, p.y) + times(d.G.mT, p.z),
        times(d.A, p.x) - d.b,
        torch.where(d.bounded, times(d.G, p.x) + p.s - d.h, 0),
    )


def _energy(d: _Data, p: _Point) -> Tensor:
    return ((times(d.P, p.x) / 2 + d.q) * p.x).sum(-1)


def _size(v: Tensor) -> Tensor:
    return v.abs().amax(-1) if v.shape[-1] else v.new_zeros(v.shape[:-1])


def _largest(*sizes: Tensor) -> Tensor:
    out = sizes[0]
    for s in sizes[1:]:
        out = torch.maximum(out, s)
    return out


def _judge(d: _Data, p: _Point, r: tuple[Tensor, Tensor, Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The largest relative residual, and whether the point certifies infeasibility or unboundedness."""
    Px, Ay, Gz, Ax, Gx = times(d.P, p.x), times(d.A.mT, p.y), times(d.G.mT, p.z), times(d.A, p.x), times(d.G, p.x)
    Gx = torch.where(d.bounded, Gx, 0)
    dual = _size(r[0]) / (1 + _largest(*map(_size, (Px, Ay, Gz, d.q))))
    primal = _largest(
        _size(r[1]) / (1 + _largest(_size(Ax), _size(d.b))),
        _size(r[2]) / (1 + _largest(_size(Gx), _size(p.s), _size(d.h))),
    )
    linear = (d.q * p.x).sum(-1)
    gap = (p.s * p.z).sum(-1) / (1 + _energy(d, p).abs())
    theta = -((d.b * p.y).sum(-1) + (d.h * p.z).sum(-1))
    infeasible = (theta > 0) & (_size(Ay + Gz) <= 10 * eps * theta) & (primal > eps)
    rises = _largest(_size(Px), _size(Ax), _size(Gx.clamp_min(0)))
    unbounded = (linear < 0) & (rises <= 10 * eps * -linear) & (dual > eps)
    return _largest(dual, primal, gap), infeasible, unbounded


class _Reduced:
    """The Newton system at weights ``w = z/s``: factorised once, solved for predictor and corrector."""

    def __init__(self, d: _Data, w: Tensor) -> None:
        self.d, self.w = d, w
        n = d.q.shape[-1]
        eye = torch.eye(n, dtype=d.q.dtype, device=d.q.device)
        H = d.P + d.G.mT @ (w.unsqueeze(-1) * d.G) + d.A.mT @ d.A
        top = H.diagonal(dim1=-2, dim2=-1).abs().amax(-1)[..., None, None]
        top = torch.where(top > 0, top, 1)  # neither curvature nor rows: unbounded along -q
        shift = torch.finfo(H.dtype).eps * n
        self.L, info = torch.linalg.cholesky_ex(H + shift * top * eye)
        if bool((info != 0).any()):
            # an indefinite or rank-deficient H: a larger shift, at the price of a shorter step
            retry, again = torch.linalg.cholesky_ex(H + 1e-6 * top * eye)
            retry = torch.where((again != 0)[..., None, None], torch.nan, retry)
            self.L = torch.where((info != 0)[..., None, None], retry, self.L)
        self.S = None
        if d.A.shape[-2]:
            W = torch.linalg.solve_triangular(self.L, d.A.mT, upper=False)
            S = W.mT @ W
            scale = S.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
            eye_p = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
            self.S = torch.linalg.cholesky_ex(S + 16 * torch.finfo(S.dtype).eps * S.shape[-1] * scale * eye_p)[0]

    def once(self, t: Tensor, r_e: Tensor) -> tuple[Tensor, Tensor]:
        """``H dx + A^T dy = t``, ``A dx = -r_e``."""
        t = t - times(self.d.A.mT, r_e)
        if self.S is None:
            return _cholesky_solve(self.L, t), r_e
        dy = _cholesky_solve(self.S, times(self.d.A, _cholesky_solve(self.L, t)) + r_e)
        return _cholesky_solve(self.L, t - times(self.d.A.mT, dy)), dy

    def solve(self, t: Tensor, r_e: Tensor) -> tuple[Tensor, Tensor]:
        """As `once`, with one step of refinement."""
        d = self.d
        dx, dy = self.once(t, r_e)
        r_1 = t - times(d.P, dx) - times(d.G.mT, self.w * times(d.G, dx)) - times(d.A.mT, dy)
        r_2 = -r_e - times(d.A, dx)
        ex, ey = self.once(r_1, -r_2)
        return dx + ex, dy + ey


def _cholesky_solve(L: Tensor, v: Tensor) -> Tensor:
    return torch.cholesky_solve(v.unsqueeze(-1), L).squeeze(-1)


def _start(d: _Data) -> _Point:
    """The least-norm point, moved into the interior."""
    w = d.bounded.to(d.q.dtype).expand(d.q.shape[0], -1)
    x, y = _Reduced(d, w).solve(times(d.G.mT, d.h.expand_as(w)) - d.q, -d.b.expand(d.q.shape[0], -1))
    if not d.h.shape[-1]:
        return _Point(x, y, w, w)
    z = torch.where(d.bounded, times(d.G, x) - d.h, 1)
    s = torch.where(d.bounded, d.h - times(d.G, x), 1)
    return _Point(x, y, torch.where(d.bounded, _inside(z), 0), torch.where(d.bounded, _inside(s), 1))


def _inside(v: Tensor) -> Tensor:
    lowest = v.amin(-1, keepdim=True)
    return torch.where(lowest > 0, v, v - lowest + 1)


def _step(d: _Data, p: _Point, r: tuple[Tensor, Tensor, Tensor], eps: float) -> _Point:
    r_d, r_e, r_i = r
    count = d.bounded.sum(-1, keepdim=True).clamp_min(1)
    gap = (p.s * p.z).sum(-1, keepdim=True)
    mu = gap / count
    system = _Reduced(d, p.z / p.s)

    def back(dx: Tensor, r_c: Tensor) -> tuple[Tensor, Tensor]:
        ds = torch.where(d.bounded, -r_i - times(d.G, dx), 0)
        return (-r_c - p.z * ds) / p.s, ds

    def direction(r_c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dx, dy = system.solve(-r_d - times(d.G.mT, (p.z * r_i - r_c) / p.s), r_e)
        # refined once more on the whole system: the weights of the reduced one leave it few digits at the end
        dz, _ = back(dx, r_c)
        miss = -r_d - times(d.P, dx) - times(d.A.mT, dy) - times(d.G.mT, dz)
        ex, ey = system.once(miss, r_e + times(d.A, dx))
        dx, dy = dx + ex, dy + ey
        return dx, dy, *back(dx, r_c)

    _, _, dz, ds = direction(p.s * p.z)  # predictor
    alpha = _longest(p, dz, ds).clamp_max(1)
    sigma = (((p.s + alpha * ds) * (p.z + alpha * dz)).sum(-1, keepdim=True) / gap.clamp_min(1e-300)) ** 3
    # not below what the tolerance asks for: the weights z/s would span more digits than there are
    least = 0.1 * eps / count * (1 + _energy(d, p).abs().unsqueeze(-1))
    target = torch.where(d.bounded, torch.maximum(sigma.clamp(0, 1) * mu, torch.minimum(least, mu)), 0)
    dx, dy, dz, ds = direction(p.s * p.z + ds * dz - target)  # corrector
    alpha = ((1 - mu).clamp(0.99, 0.999) * _longest(p, dz, ds)).clamp_max(1)
    return _Point(p.x + alpha * dx, p.y + alpha * dy, p.z + alpha * dz, p.s + alpha * ds)


def _longest(p: _Point, dz: Tensor, ds: Tensor) -> Tensor:
    """The step to the boundary."""
    v, dv = torch.cat([p.s, p.z], -1), torch.cat([ds, dz], -1)
    if not v.shape[-1]:
        return v.new_ones((*v.shape[:-1], 1))
    falls = dv < 0
    return torch.where(falls, -v / torch.where(falls, dv, -1), torch.inf).amin(-1, keepdim=True)
