r"""An interior-point method for the Euclidean projection on transport plans.

.. math:: P - X + f 1^T + 1 g^T = Z, \quad P 1 = a, \quad P^T 1 = b, \quad P \circ Z = \mu, \quad P, Z > 0,
    \qquad \mu \to 0 .

Each Newton step eliminates P and Z; with weights :math:`D = P / (P + Z)` the potentials solve

.. math:: \begin{pmatrix} \mathrm{diag}(D 1) & D \\ D^T & \mathrm{diag}(D^T 1) \end{pmatrix}
    \begin{pmatrix} \delta f \\ \delta g \end{pmatrix} = r,

by a Cholesky factor of the Schur complement of its first block, which serves predictor and corrector. S. Mehrotra, On
the implementation of a primal-dual interior point method, 1992; S. Wright, Primal-Dual Interior-Point Methods, 1997,
chapter 10.

Symbols: ``X`` matrix, ``a``, ``b`` sums, ``P`` plan, ``Z`` multiplier of ``P >= 0``, ``f``, ``g`` potentials.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
TO_THE_BOUNDARY = 0.995  # of the longest step that keeps P and Z non-negative


def outer_sum(f: Tensor, g: Tensor) -> Tensor:
    """``f_i + g_j``."""
    return f.unsqueeze(-1) + g.unsqueeze(-2)


def margins(P: Tensor) -> Pair:
    """Sums of rows and of columns."""
    return P.sum(-1), P.sum(-2)


def interior_point(
    X: Tensor, a: Tensor, b: Tensor, live: Tensor, max_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``P, Z, f, g`` near the solution, and the steps taken.

    Args:
        X: ``(*batch, n, m)``.
        a: ``(*batch, n)`` row sums.
        b: ``(*batch, m)`` column sums with the same total.
        live: ``(*batch, n, m)`` entries whose row and column sum are positive; the others stay 0.
        max_steps: At most so many steps.
    """
    eps = torch.finfo(X.dtype).eps
    largest = torch.maximum(a.amax(-1), b.amax(-1))
    count, alive, dead = live.sum((-1, -2)), live.to(X.dtype), (~live).to(X.dtype)
    P = torch.where(live, a.unsqueeze(-1) * b.unsqueeze(-2) / a.sum(-1)[..., None, None], 0)
    f = torch.where(live, X - P, -math.inf).amax(-1) + largest.unsqueeze(-1)
    f, g = torch.where(live.any(-1), f, 0), torch.zeros_like(b)
    # at least as large as the largest sum, also where X is so large that this vanishes in it
    Z = torch.where(live, (P - X + outer_sum(f, g)).maximum(largest[..., None, None]), 1)
    steps = torch.zeros(a.shape[:-1], dtype=torch.int64, device=X.device)
    before = torch.full_like(largest, math.inf)
    for _ in range(max_steps):
        mu = (P * Z).sum((-1, -2)) / count
        relative = mu / (largest * largest)
        # where the potentials are not unique, rounding ends the progress a little earlier
        active = (relative > eps**1.2) & ((mu < 0.9 * before) | (relative > eps))
        if not bool(active.any()):  # the one read-back of a step
            break
        before = torch.where(active, mu, 0)
        moves = _newton(X, a, b, alive, dead, mu, P, Z, f, g)
        on, cell = active.unsqueeze(-1), active[..., None, None]
        P, Z = (torch.where(cell, old + new, old) for old, new in zip((P, Z), moves[:2], strict=True))
        f, g = (torch.where(on, old + new, old) for old, new in zip((f, g), moves[2:], strict=True))
        steps = steps + active
    shift = ((f.mean(-1) - g.mean(-1)) / 2).unsqueeze(-1)  # the smaller the potentials, the less their rounding
    return P, Z, f - shift, g + shift, steps


def _newton(
    X: Tensor, a: Tensor, b: Tensor, alive: Tensor, dead: Tensor, mu: Tensor, P: Tensor, Z: Tensor, f: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of predictor and corrector; dead entries, P = 0 and Z = 1, stay as they are."""
    E = alive / (P + Z)
    D = P * E
    missing = X - P - outer_sum(f, g) + Z
    rows, columns = margins(P)
    solve, base, safe = _potentials(D), D * (missing - Z), P + dead

    def direction(free: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where `free` is the change of P that would leave the potentials as they are."""
        top, bottom = margins(free)
        df, dg = solve(top + rows - a, bottom + columns - b)
        move = outer_sum(df, dg)
        dP = free - D * move
        return dP, (dP + move - missing) * alive, df, dg

    dP, dZ, *_ = direction(base)
    reach = [(1 / _decay(V, dV).clamp_min(1))[..., None, None] for V, dV in ((safe, dP), (Z, dZ))]
    predicted = ((P + reach[0] * dP) * (Z + reach[1] * dZ)).sum((-1, -2)) / alive.sum((-1, -2))
    target = (predicted / mu) ** 3 * mu
    moves = direction(base + E * (target[..., None, None] - dP * dZ))
    decay = torch.maximum(_decay(safe, moves[0]), _decay(Z, moves[1]))
    length = TO_THE_BOUNDARY / decay.clamp_min(TO_THE_BOUNDARY)
    cell, row = length[..., None, None], length.unsqueeze(-1)
    return cell * moves[0], cell * moves[1], row * moves[2], row * moves[3]


def _decay(V: Tensor, dV: Tensor) -> Tensor:
    """The largest part of an entry of V that a full step would take from it."""
    return (-dV / V).amax((-1, -2))


def _potentials(D: Tensor) -> Callable[[Tensor, Tensor], Pair]:
    """Solves for the potentials; constants that move from g to f are fixed, rows and columns without weight stay."""
    tiny, eps = torch.finfo(D.dtype).tiny, torch.finfo(D.dtype).eps
    r, c = margins(D)
    by_row = torch.where(r > tiny, 1 / r, 0)
    scale = torch.where(c > tiny, c.rsqrt(), 0)
    null = torch.where(c > tiny, c.sqrt(), 0)
    null = null / torch.linalg.vector_norm(null, dim=-1, keepdim=True).clamp_min(tiny)
    # scaled to a unit diagonal before elimination: weights range over many orders of magnitude
    scaled = D * scale.unsqueeze(-2)
    S = null.unsqueeze(-1) * null.unsqueeze(-2) - scaled.mT @ (scaled * by_row.unsqueeze(-1))
    # parts of the plan that come to be disconnected have potentials of their own, which must not drift on rounding
    S = S + torch.diag_embed(torch.full_like(c, 1 + eps**0.75))
    factor = torch.linalg.cholesky_ex(S).L

    def solve(rows: Tensor, columns: Tensor) -> Pair:
        q = (columns - (D.mT @ (by_row * rows).unsqueeze(-1)).squeeze(-1)) * scale
        dg = torch.cholesky_solve(q.unsqueeze(-1), factor).squeeze(-1) * scale
        return by_row * (rows - (D @ dg.unsqueeze(-1)).squeeze(-1)), dg

    return solve
