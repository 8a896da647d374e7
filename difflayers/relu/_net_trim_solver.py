"""Net-Trim on all columns and rows of the data: ADMM to come near, an interior-point method on what it leaves.

ADMM tells which weights and which silent responses may matter. The problem on these alone is small and is solved to
rounding; columns and rows that its solution violates are added, until the duality gap over all of them closes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from difflayers._solution import Info, Status

from ._net_trim_interior import Point, Restricted, gradient, interior_point, polish

_ALMOST = 1e-4  # less accurate results are asked whether there are any
_PENALTY = 1e8
_NEAR = 1e-3  # where ADMM hands over
_ROUNDS = 15
_INNER_STEPS = 80
_ALL_COLUMNS = 96  # fewer columns are not worth a choice
_CHUNK = 2**24  # numbers in one QR factorisation


@dataclass(frozen=True, eq=False)
class Trimming:
    """E layers with d inputs and m outputs, on N samples, scaled."""

    X: Tensor  # (E, N, d)
    Y: Tensor  # (E, N, m)
    on: Tensor  # (E, N, m) the responses to be kept
    eps: Tensor  # (E)
    free: Tensor  # (d) columns that cost nothing

    def soften(self, U: Tensor, threshold: Tensor) -> Tensor:
        """Soft threshold, not of free columns."""
        return torch.where(self.free, U, U.sign() * (U.abs() - threshold[:, None, None]).clamp_min(0))

    def cost(self, U: Tensor) -> Tensor:
        """The norm (E)."""
        return torch.where(self.free, 0, U.abs()).sum((-2, -1))

    def off_by(self, V: Tensor) -> tuple[Tensor, Tensor]:
        """By how much responses V miss the ball (E), and the silent ones zero (E, N, m)."""
        miss = torch.linalg.vector_norm(torch.where(self.on, V - self.Y, 0).flatten(1), dim=-1)
        return (miss - self.eps).clamp_min(0), torch.where(self.on, 0, V.clamp_min(0))


@dataclass(frozen=True, eq=False)
class Trimmed:
    """Weights, the multiplier of half the ball's square, those of silent responses, and a report."""

    U: Tensor  # (E, m, d)
    mu: Tensor  # (E)
    kappa: Tensor  # (E, N, m)
    info: Info


def trim(X: Tensor, Y: Tensor, on: Tensor, eps: Tensor, free: int, rtol: float, max_steps: int) -> Trimmed:
    """The solution for float64 data without NaN; the last `free` columns cost nothing."""
    E, N, d = X.shape
    length = torch.linalg.matrix_norm(X.mT @ X, ord=2).sqrt() if X.numel() else X.new_zeros(E)
    sx = torch.where(length > 0, length / max(N, 1) ** 0.5, 1)
    Y = torch.where(on, Y, 0)
    total = torch.linalg.vector_norm(Y.flatten(1), dim=-1)
    sy = torch.where(total > 0, total / on.flatten(1).sum(-1).clamp_min(1).sqrt(), 1)
    unpaid = torch.arange(d, device=X.device) >= d - free
    T = Trimming(X / sx[:, None, None], Y / sy[:, None, None], on, eps / sy, unpaid)
    idle = (eps >= (1 - 1e-6) * total) & ((eps > 0) | (total == 0))  # the zero layer will do
    if bool(idle.all()):
        zero = torch.zeros_like(eps)
        info = Info(zero.long(), zero.long(), zero)
        return Trimmed(X.new_zeros(E, Y.shape[-1], d), zero, torch.zeros_like(Y), info)
    T = replace(T, eps=torch.where(idle, 2 * (total / sy) + 1, T.eps))  # away from the edge, where it is easy
    columns, rows, steps = _approach(T, max_steps)
    found = _finish(T, columns, rows, rtol)
    info = Info(
        torch.where(idle, int(Status.CONVERGED), found.info.status),
        torch.where(idle, 0, found.info.steps + steps),
        torch.where(idle, 0, found.info.residual),
    )
    each = ~idle[:, None, None]
    return Trimmed(
        torch.where(each, found.U * (sy / sx)[:, None, None], 0),
        torch.where(idle, 0, found.mu / (max(N, 1) * sx * sy)),
        torch.where(each, found.kappa / sx[:, None, None], 0),
        info,
    )


def _approach(T: Trimming, max_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """ADMM: how nearly columns and rows count (more than 1: they do, or may), and steps.

    Minimises ``||U2||_1`` where U1 is a set of allowed responses, ``U1 = X U3^T`` and ``U2 = U3``.
    """
    X, Y = T.X, T.Y
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    L = torch.linalg.cholesky(X.mT @ X + eye)
    start = torch.cholesky_solve(X.mT @ Y, L).mT
    rho = 1 / start.abs().flatten(1).mean(-1).clamp_min(1e-6)
    U2 = U3 = start
    V = X @ U3.mT
    L1, L2 = torch.zeros_like(Y), torch.zeros_like(U3)
    each = lambda t: t[:, None, None]  # noqa: E731
    norm = lambda t: torch.linalg.vector_norm(t.flatten(1), dim=-1)  # noqa: E731
    steps = torch.zeros(len(X), dtype=torch.long, device=X.device)
    active = torch.ones(len(X), dtype=torch.bool, device=X.device)
    for step in range(1, max_steps + 1):
        R = V - L1
        miss = torch.where(T.on, R - Y, 0)
        size = norm(miss)
        shrink = torch.where(size > T.eps, T.eps / torch.where(size > 0, size, 1), 1)
        U1 = torch.where(T.on, Y + each(shrink) * miss, R.clamp_max(0))
        N2 = T.soften(U3 - L2, 1 / rho)
        N3 = torch.cholesky_solve(X.mT @ (U1 + L1) + (N2 + L2).mT, L).mT
        W = X @ N3.mT
        D1, D2 = U1 - W, N2 - N3
        primal = torch.hypot(norm(D1), norm(D2)) / torch.hypot(norm(W), norm(N3)).clamp_min(1e-12)
        dual = torch.hypot(norm(W - V), norm(N3 - U3)) / torch.hypot(norm(L1 + D1), norm(L2 + D2)).clamp_min(1e-12)
        keep = each(active)
        L1, L2 = torch.where(keep, L1 + D1, L1), torch.where(keep, L2 + D2, L2)
        U2, U3, V = torch.where(keep, N2, U2), torch.where(keep, N3, U3), torch.where(keep, W, V)
        steps = steps + active.long()
        active = active & ((primal > _NEAR) | (dual > _NEAR))
        if step % 10 == 0:
            if not bool(active.any()):
                break
            factor = torch.where(primal > 5 * dual, 2.0, torch.where(dual > 5 * primal, 0.5, 1.0))
            factor = torch.where(active, factor, 1)
            rho, L1, L2 = rho * factor, L1 / each(factor), L2 / each(factor)
    columns = torch.maximum((each(rho) * L2).abs(), torch.where(U2 != 0, 2, 0))
    # a silent response counts where its multiplier is positive, and before others the closer it comes to zero
    rows = torch.where(T.on, -torch.inf, torch.where(-L1 * each(rho) > 0, 1, 0) + V)
    return torch.where(T.free, torch.inf, columns), rows, steps


def _finish(T: Trimming, score: Tensor, rank: Tensor, rtol: float) -> Trimmed:
    """Restricted problems with ever more columns and rows."""
    E, N, d = T.X.shape
    columns = (score > 0.9) | bool(d <= _ALL_COLUMNS)
    columns = columns | (T.eps == 0)[:, None, None]
    at_once = min(N, 3 * int(columns.sum(-1).max()) + 8)
    rows = _best(rank, at_once, -torch.inf)
    best = _Judged.nothing(T)
    steps = torch.zeros(E, dtype=torch.long, device=T.X.device)
    open_ = torch.ones_like(steps, dtype=torch.bool)
    rough = bool((~T.on & ~rows).any())  # the first answer asks for rows, it need not be good
    for _ in range(_ROUNDS):
        P, chosen = restricted(T, columns, rows)
        z, error, inner, _ = interior_point(P, _NEAR if rough else max(0.1 * rtol, 1e-10), _INNER_STEPS)
        steps = steps + torch.where(open_, inner, 0)
        alive = chosen.any & (P.free | (z.p > z.sp) | (z.q > z.sq))
        z = replace(z, u=torch.where(alive, z.u, 0), kappa=torch.where(z.kappa > z.w, z.kappa, 0))
        judged = _judge(T, P, z, chosen)
        if not rough:
            finer = _judge(T, P, polish(P, z), chosen)
            judged = finer.where(finer.residual < judged.residual, judged)
        best = judged.where(open_ & (judged.residual < best.residual), best)
        open_ = open_ & (best.residual > rtol) & ~judged.impossible
        if not bool(open_.any()):
            break
        late = _best(judged.late, at_once, 0.0) & open_[:, None, None]
        wanted = judged.slope.abs() > 1 + rtol
        # a problem that has no solution on its columns gets all of them
        wanted = (wanted | (error > _ALMOST)[:, None, None]) & open_[:, None, None]
        grown = bool((late & ~rows).any()) or bool((wanted & ~columns).any())
        if not grown and not rough:
            break
        rough = False
        columns, rows = columns | wanted, rows | late
    impossible = judged.impossible & (best.residual > _ALMOST)
    open_ = (best.residual > _ALMOST) & ~impossible
    if bool(open_.any()):  # a penalty in place of the ball settles whether any weights come that close
        P, _ = restricted(T, torch.ones_like(columns), rows)
        hopeless = interior_point(replace(P, penalty=torch.full_like(P.eps, _PENALTY)), 1e-9, _INNER_STEPS)[3]
        impossible = impossible | (open_ & hopeless)
    status = torch.where(best.residual <= rtol, int(Status.CONVERGED), int(Status.MAX_STEPS))
    status = torch.where(impossible, int(Status.INFEASIBLE), status)
    return Trimmed(best.U, best.mu, best.kappa, Info(status, steps, best.residual))


def _best(score: Tensor, count: int, above: float) -> Tensor:
    """The `count` largest entries over dim 1 that are `above` a number, as booleans."""
    picked = torch.zeros_like(score, dtype=torch.bool)
    if count and score.numel():
        top = score.topk(min(count, score.shape[1]), dim=1)
        picked.scatter_(1, top.indices, top.values > above)
    return picked


def places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of True in the last dimension, filled up to a common number, and which are any."""
    most = int(mask.sum(-1).max()) if mask.numel() else 0
    index = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    return index, mask.gather(-1, index)


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Where columns and rows of a restricted problem come from."""

    column: Tensor  # (E, m, k)
    any: Tensor  # (E, m, k) which of them are one
    row: Tensor  # (E, m, r)
    length: Tensor  # (E, m, r) rows are divided by it


def restricted(T: Trimming, columns: Tensor, rows: Tensor) -> tuple[Restricted, _Chosen]:
    """The problem on some columns (E, m, d) and rows (E, N, m); the ball in units of one sample."""
    E, N, _ = T.X.shape
    m, root = T.Y.shape[-1], max(N, 1) ** 0.5
    column, chosen = places(columns)
    row, used = places(rows.mT)
    k = column.shape[-1]
    layer = torch.arange(E, device=T.X.device)[:, None, None, None]
    B = T.X[layer, row.unsqueeze(-1), column.unsqueeze(-2)] * chosen.unsqueeze(-2)
    size = torch.linalg.vector_norm(B, dim=-1, keepdim=True)
    size = torch.where(size > 0, size, 1)
    used = used & (B != 0).any(-1)
    B = torch.where(used.unsqueeze(-1), B / size, 0)
    # the triangle of a QR factorisation says all about the responses to be kept
    parts = []
    at_once = max(1, _CHUNK // max(1, E * N * (k + 1)))
    for low in range(0, m, at_once):
        neurons = slice(low, low + at_once)
        sample = torch.arange(N, device=T.X.device)[None, None, :, None]
        A = T.X[layer, sample, column[:, neurons].unsqueeze(-2)] * chosen[:, neurons].unsqueeze(-2)
        A = torch.cat([A, T.Y[..., neurons].mT.unsqueeze(-1)], -1) * T.on[..., neurons].mT.unsqueeze(-1)
        if k + 1 > N:
            A = torch.nn.functional.pad(A, (0, 0, 0, k + 1 - N))
        parts.append(torch.linalg.qr(A, mode="r").R / root)
    R = torch.cat(parts, 1)
    F, f, rho = R[..., :k, :k], R[..., :k, k], R[..., k, k]
    free, ball = T.free[column] & chosen, T.eps / root
    P = Restricted(F, f, rho**2, F.mT @ F, B, used, free, ball, torch.zeros_like(ball))
    return P, _Chosen(column, chosen, row, size.squeeze(-1))


@dataclass(frozen=True, eq=False)
class _Judged:
    """An answer in all columns and rows, and what is wrong with it."""

    U: Tensor  # (E, m, d)
    mu: Tensor  # (E)
    kappa: Tensor  # (E, N, m)
    residual: Tensor  # (E) relative gap or violation
    slope: Tensor  # (E, m, d) of the constraints; at most 1 in size where no column is missing
    late: Tensor  # (E, N, m) by how much silent responses are not
    impossible: Tensor  # (E) for sure

    @staticmethod
    def nothing(T: Trimming) -> _Judged:
        """The zero answer, which is all wrong."""
        U, none = T.X.new_zeros(T.Y.shape[0], T.Y.shape[-1], T.X.shape[-1]), torch.zeros_like(T.Y)
        zero = torch.zeros_like(T.eps)
        return _Judged(U, zero, none, torch.full_like(zero, torch.inf), U, none, torch.zeros_like(zero) > 0)

    def where(self, keep: Tensor, other: _Judged) -> _Judged:
        """This one in the elements `keep`, the `other` elsewhere."""
        each = {
            name: torch.where(keep.view((-1,) + (1,) * (value.ndim - 1)), value, getattr(other, name))
            for name, value in vars(self).items()
        }
        return _Judged(**each)


def _judge(T: Trimming, P: Restricted, z: Point, chosen: _Chosen) -> _Judged:
    """Violations and duality gap over all columns and rows."""
    count = max(T.X.shape[1], 1)
    U = T.X.new_zeros(*chosen.column.shape[:2], T.X.shape[-1]).scatter(-1, chosen.column, z.u)
    V = T.X @ U.mT
    miss, late = T.off_by(V)
    # multipliers of single responses
    lam = torch.where(T.on, (z.mu / count)[:, None, None] * (V - T.Y), 0)
    pull = torch.where(P.used, z.kappa.clamp_min(0) / chosen.length, 0)
    kappa = torch.zeros_like(V.mT).scatter(-1, chosen.row, pull).mT
    slope = (lam + kappa).mT @ T.X
    bound = -(lam * T.Y).sum((-2, -1)) - T.eps * torch.linalg.vector_norm(lam.flatten(1), dim=-1)
    equality = T.eps == 0  # has all columns
    known = torch.zeros_like(U).scatter(-1, chosen.column, gradient(P, z, equality)[0])
    slope = torch.where(equality[:, None, None], known, slope)
    bound = torch.where(equality, -(z.nu * P.f).sum((-2, -1)), bound)
    bound = bound / torch.where(T.free, 0, slope.abs()).flatten(1).amax(-1).clamp_min(1)
    value = T.cost(U)
    slack = torch.where(T.free, (slope * U).abs(), 0).sum((-2, -1))
    gap = ((value - bound).abs() + slack) / value.clamp_min(1e-6)
    size = torch.linalg.vector_norm(T.Y.flatten(1), dim=-1)
    size = torch.where(size > 0, size, 1)
    residual = torch.maximum(torch.maximum(gap, miss / size), late.flatten(1).amax(-1))
    residual = torch.where(torch.isfinite(residual), residual, torch.inf)
    nearest = (P.rho2.sum(-1) * count).sqrt()
    impossible = chosen.any.flatten(1).all(-1) & (nearest > T.eps + 1e-6 * size)
    return _Judged(U, z.mu, kappa, residual, slope, late, impossible)
