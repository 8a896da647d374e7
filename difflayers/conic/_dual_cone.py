r"""Projection on the dual cone of the rows of a matrix, in terms of its Gramian.

With the rows of J as generators and :math:`G = J J^T`, the point of :math:`\{g : J g \ge 0\}` nearest to
:math:`J^T u` is :math:`J^T w` with

.. math:: w = \arg\min_{w \ge u} \tfrac12 w^T G w, \qquad w \ge u, \quad G w \ge 0, \quad (w - u)^T G w = 0 .

P. Quinton, V. Rey, Jacobian Descent For Multi-Objective Optimization, 2024, proposition 1. Entries above their bound
are *free*; given them, w is the solution of a linear system. Many right-hand sides u share one Gramian, so everything
that is not a factorisation of free entries is one product of matrices for all of them.

Which entries are free is found in stages. The alternating direction method of multipliers, one product a step with one
inverse for all, comes close; D. Gabay, B. Mercier, 1976. From there block principal pivoting moves every entry that
violates its condition to the other side at once, and solves again; J. J. Júdice, F. M. Pires, A block principal
pivoting algorithm for large-scale strictly monotone linear complementarity problems, 1994. Where the number of
violations does not fall for a while, a primal active-set method goes on from the first guess, one entry a step, which
lowers the objective every time and so ends; C. L. Lawson, R. J. Hanson, Solving Least Squares Problems, 1974, chapter
23.

Symbols: ``M`` Gramian with unit diagonal, ``U`` and ``W`` rows u and w, ``F`` free entries, ``D = W M``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._solution import Info, Status
from difflayers.implicit import ImplicitProblem
from difflayers.linalg._autodiff import opaque
from difflayers.linalg._direct import solve_columns

CHUNK = 1 << 18  # numbers in the submatrices that are made at once: they should stay in the cache
PENALTY, RELAXATION = 0.6, 1.8  # of the alternating direction method, for a Gramian with unit diagonal
PROXIMAL_STEPS = 3  # of right-hand sides whose solution is not unique; a sound one takes none
LONG = 2  # steps an objective of that method, where pivots have trouble
CHECK_EVERY = 5  # of its steps lie between looks at the free entries
SETTLED = 0.25  # share of right-hand sides whose free entries may have changed since, for the pivots to take over
PATIENCE = 3  # steps of whole blocks without fewer violations, before single ones


@dataclass(frozen=True)
class BlockPivoting:
    """Finds the free entries of a projection on a dual cone: alternating directions, then block principal pivoting.

    Args:
        warm_steps: Most steps of the alternating direction method; each costs one product of matrices, and they spare
            pivots.
        max_steps: Pivots, each with one batched Cholesky factorisation of the free entries.
    """

    warm_steps: int = 30
    max_steps: int = 300

    def __post_init__(self) -> None:
        for name, least in (("warm_steps", 0), ("max_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")


@opaque
@functools.lru_cache(maxsize=64)
def dual_cone_problem(solver: BlockPivoting, names: tuple[str, str], keep_factors: bool) -> ImplicitProblem:
    """The projection as the engine sees it: ``W(M, U)``, ``M`` of ``(*batch, m, m)``, ``U`` and ``W`` of (k, m).

    Args:
        solver: The solver.
        names: What the caller calls the arguments.
        keep_factors: Whether anybody may ask for derivatives.
    """
    return ImplicitProblem(
        solve=functools.partial(_solve, solver=solver, keep_factors=keep_factors),
        residual=_residual,
        linear_solve=_linear_solve,
        value_ndim=2,
        arg_ndims=(2, 2),
        factor_ndims=(2, 3, 1) if keep_factors else (),
        name=f"dual_cone_weights[{solver!r}]",
        arg_names=names,
    )


def _residual(W: Tensor, M: Tensor, U: Tensor) -> Tensor:
    """Of a free entry its gradient, of any other its distance to the bound."""
    return torch.where(W > U, W @ M, W - U)


def _solve(
    M: Tensor, U: Tensor, *, solver: BlockPivoting, keep_factors: bool
) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    """In double precision, whatever comes in: the cost is nearly the same, and signs near zero are right."""
    batch = torch.broadcast_shapes(M.shape[:-2], U.shape[:-2])
    k, m = U.shape[-2:]
    eps, dtype = torch.finfo(M.dtype).eps, M.dtype
    wide = torch.float64 if M.device.type != "mps" else dtype  # which knows none
    M, U = (t.expand(*batch, *t.shape[-2:]).reshape(batch.numel(), *t.shape[-2:]).to(wide) for t in (M, U))
    factors: tuple[Tensor, ...] = ()
    if not U.numel():
        none = torch.zeros(batch, dtype=torch.int64, device=M.device)
        factors = (none.new_zeros(*batch, k, 0), M.new_zeros(*batch, k, 0, 0), M.new_zeros(*batch, k))
        return U.to(dtype).view(*batch, k, m), Info(none, none, none.to(dtype)), factors if keep_factors else ()
    W = _guess(M, U, solver.warm_steps)
    for i in range(PROXIMAL_STEPS):
        found, shifted = _pivot(M, U, W, eps, solver.max_steps, again=i > 0)
        W = found.W.view_as(U)
        W = torch.where(found.free.view_as(U) & (W > U), W, U)
        violation = found.violation.view(len(M), k)
        if not shifted:
            break
        D = W @ M
        violation = torch.where(W > U, D, D.clamp_max(0)).abs().amax(-1)
        if not bool((violation > 8 * eps * (1 + W.abs().amax(-1))).any()):
            break
    W, factors = W.to(dtype), ()
    if keep_factors:
        F, free = (W > U).flatten(0, 1), FreeSolve(M, k)
        order, sizes, _ = free.sizes(F.sum(-1))
        idx = free.listed(F, sizes[0] if sizes else 0)
        L, _ = free.factorise(idx, order.sort().values // free.k, found.shift)
        factors = tuple(t.reshape(*batch, k, *t.shape[1:]) for t in (idx, L, found.shift))
    status, steps = (t.view(len(M), k) for t in (found.status, found.steps))
    largest, violation = M.abs().amax((-2, -1)), violation.amax(-1)
    indefinite = (M.diagonal(dim1=-2, dim2=-1).amin(-1) < 0) | (largest > 1 + eps**0.5)  # products beyond the lengths
    status = torch.where(indefinite, int(Status.SINGULAR), status.amax(-1))
    status = torch.where(torch.isfinite(violation + largest), status, int(Status.DIVERGED))
    info = Info(*(t.reshape(batch) for t in (status, steps.amax(-1), violation.to(dtype))))
    return W.reshape(*batch, k, m), info, factors


# --------------------------------------------------------------------------------------------------------- first guess


def _guess(M: Tensor, U: Tensor, steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The alternating direction method on ``min 1/2 <W, W M>, W >= U``, in single precision: a start, no more."""
    U, M, given = U.to(dtype), M.to(dtype), U
    if not steps:
        return given
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    K = torch.cholesky_inverse(torch.linalg.cholesky_ex(M / PENALTY + eye)[0])
    Z, Y, free = U, (U @ M).relu_().div_(-PENALTY), None
    for i in range(1, steps + 1):
        H = torch.lerp(Z, (Z - Y) @ K, RELAXATION).add_(Y)
        Z = torch.maximum(H, U)
        Y = H.sub_(Z)
        if i % CHECK_EVERY == 0 and i < steps:
            free, last = Z > U, free
            changed = 1.0 if last is None else float((free != last).any(-1).double().mean())
            if changed < (SETTLED if dtype == torch.float32 else SETTLED / M.shape[-1]):
                break
    return torch.where(Z > U, Z.to(given.dtype), given)


# -------------------------------------------------------------------------------------------------------------- pivots


class _Rows(NamedTuple):
    """What is known of every right-hand side."""

    W: Tensor
    free: Tensor
    shift: Tensor  # what is added to the diagonal
    careful: Tensor  # primal steps, since block pivots do not help or are not safe
    fewest: Tensor  # violations seen
    patience: Tensor
    status: Tensor
    steps: Tensor
    violation: Tensor

    def at(self, rows: Tensor | None) -> _Rows:
        return self if rows is None else _Rows(*(t[rows] for t in self))

    def put(self, rows: Tensor | None, new: _Rows) -> _Rows:
        if rows is None:
            return new
        return _Rows(*(t.index_copy(0, rows, n) for t, n in zip(self, new, strict=True)))


def _pivot(M: Tensor, U: Tensor, start: Tensor, eps: float, max_steps: int, *, again: bool) -> tuple[_Rows, bool]:
    """Pivots from the free entries of `start`; every right-hand side stops on its own.

    Free entries whose submatrix is singular to working precision get a shifted one: the solution nearest to the start
    is meant (a proximal step), since all of them have the same point of the cone. `again` says that the start is what
    such a step has found.
    """
    (batch, k, m), tiny = U.shape, 8 * eps + 64 * torch.finfo(M.dtype).eps
    shift = eps ** (2 / 3)
    solve = FreeSolve(M, k, singular=shift / 2)
    start, U = start.flatten(0, 1), U.flatten(0, 1)
    zero = torch.zeros_like(U[:, 0])
    count = zero.long()
    rows, cautious, better = None, False, start
    state = _Rows(
        start, start > U, zero, zero > 0, count + (m + 1), count + PATIENCE, count + int(Status.MAX_STEPS), count, zero
    )
    order, sizes, _ = solve.sizes(state.free.sum(-1))

    def product(w: Tensor) -> Tensor:
        """``w M`` for the rows that still run."""
        if batch == 1:
            return w @ M[0]
        whole = w if rows is None else torch.zeros_like(U).index_copy_(0, rows, w)
        whole = (whole.unflatten(0, (batch, k)) @ M).flatten(0, 1)
        return whole if rows is None else whole[rows]

    for step in range(1, max_steps + 1):
        now = state.at(rows)
        u, f, s = U if rows is None else U[rows], now.free, now.shift
        w = torch.where(f, now.W, u)
        origin = (start if rows is None else start[rows]) if cautious else None

        def slope(w: Tensor, s: Tensor = s, origin: Tensor | None = origin) -> Tensor:
            return product(w) if origin is None else torch.addcmul(product(w), s.unsqueeze(-1), w - origin)

        move, weak = solve(f, order, sizes, s if cautious else None, rows, slope(w).neg_())
        weak, failed = weak & (s == 0), weak & (s > 0)
        length = _length(w - u, move, now.careful) if cautious else None
        hit = None
        if length is not None:
            hit = now.careful.unsqueeze(-1) & (length < 1) & f & (w + length * move - u <= tiny * (w - u))
            move = length * move
        w = w + move
        D = slope(w)
        tol = tiny * (1 + w.abs().amax(-1, keepdim=True))
        bad = torch.where(f, w - u - 2 * tol, D) < -tol
        if hit is not None:
            lowest = torch.where(f, 0, D).argmin(-1, keepdim=True)
            first = torch.zeros_like(bad).scatter_(-1, lowest, ~hit.any(-1, keepdim=True)) & bad & ~f
            bad = torch.where(now.careful.unsqueeze(-1), hit | first, bad)
        count = bad.sum(-1)
        fewer = count < now.fewest
        patience = torch.where(fewer | weak, PATIENCE, now.patience - 1)
        running = (count > 0) & ~failed | weak
        enter = weak | running & ~now.careful & (patience < 0)
        state = state.put(
            rows,
            _Rows(
                w,
                f ^ bad,
                torch.where(weak, shift, s),
                now.careful | (enter & ~weak),
                torch.where(weak, m + 1, torch.minimum(now.fewest, count)),
                patience,
                torch.where(failed, int(Status.SINGULAR), torch.where(running, int(Status.MAX_STEPS), 0)),
                torch.full_like(count, step),
                torch.where(f, D, D.clamp_max(0)).abs().amax(-1),
            ),
        )
        entries = torch.where(running, (f ^ bad).sum(-1), -1)
        order, sizes, (going, entering) = solve.sizes(entries, running.sum(), enter.sum())
        if not going:
            break
        if entering:  # with the rows that change their ways back to a start, and a better one
            better = better if cautious or again else _guess(M, U.view(batch, k, m), LONG * m, U.dtype).view_as(U)
            cautious = True
            fresh = enter if rows is None else torch.zeros_like(state.careful).index_copy_(0, rows, enter)
            back = fresh.unsqueeze(-1)
            start = torch.where(back, better, start)
            state = state._replace(W=torch.where(back, start, state.W), free=torch.where(back, start > U, state.free))
            whole = running if rows is None else torch.zeros_like(fresh).index_copy_(0, rows, running)
            order, sizes, _ = solve.sizes(torch.where(whole, state.free.sum(-1), -1))
            rows = order[:going]
        else:
            rows = order[:going] if rows is None else rows[order[:going]]
        order = torch.arange(going, device=M.device)
    return state, cautious


def _length(room: Tensor, move: Tensor, careful: Tensor) -> Tensor:
    """The share of a step that keeps all entries above their bounds, ``(R, 1)``; 1 for rows that are not careful."""
    limits = torch.where(move < 0, room / -move, torch.inf)
    return torch.where(careful, limits.amin(-1).clamp_max(1), 1).unsqueeze(-1)


class FreeSolve:
    """Systems with the free entries of many right-hand sides, in submatrices of few sizes.

    The free entries are listed, and the list is filled up with rows of an identity.

    Args:
        M: ``(B, m, m)`` matrices.
        k: Right-hand sides of each.
        singular: The squared pivot below which a submatrix counts as singular.
    """

    def __init__(self, M: Tensor, k: int, singular: float = 0.0) -> None:
        self.m, self.k, self.singular = M.shape[-1], max(1, k), singular
        self.chunk = max(1, CHUNK // max(1, self.m) ** 2)
        self.table = M.new_zeros(*M.shape[:-2], 2 * self.m, 2 * self.m)
        self.table[..., : self.m, : self.m] = M
        self.table.diagonal(dim1=-2, dim2=-1)[..., self.m :] = 1
        self.index = torch.int32 if self.table.numel() < 2**31 else torch.int64

    def sizes(self, entries: Tensor, *more: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Rows from many free entries to few, the size of each chunk of them, and numbers to read along the way."""
        entries, order = entries.sort(descending=True)
        read = torch.cat([entries[:: self.chunk], *(t.reshape(1) for t in more)]).tolist()  # the one read-back
        split = len(read) - len(more)
        return order, read[:split], read[split:]

    def __call__(
        self, F: Tensor, order: Tensor, sizes: list[int], shift: Tensor | None, rows: Tensor | None, b: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Solutions, zero where not free, and which submatrices are singular to working precision."""
        nothing = torch.zeros_like(b)
        if not sizes or sizes[0] < 1:
            return nothing, torch.zeros_like(F[:, 0])
        element = order if rows is None else rows[order]
        idx = self.listed(F[order], sizes[0])
        b = torch.cat([b[order], nothing], -1).gather(-1, idx)
        x, pivots, infos = torch.zeros_like(b), [], []
        for start, p in zip(range(0, len(F), self.chunk), sizes, strict=False):
            part, p = slice(start, start + self.chunk), max(1, p)
            on_diagonal = None if shift is None else shift[order[part]]
            L, info = self.factorise(idx[part, :p], element[part] // self.k, on_diagonal)
            x[part, :p] = torch.cholesky_solve(b[part, :p].unsqueeze(-1), L, upper=True).squeeze(-1)
            pivots.append(L.diagonal(dim1=-2, dim2=-1).amin(-1))
            infos.append(info)
        weak = (torch.cat(infos) != 0) | ~(torch.cat(pivots) ** 2 >= self.singular)
        x = torch.cat([nothing, nothing], -1).scatter_(-1, idx, x)[:, : self.m]
        return nothing.index_copy_(0, order, x), torch.zeros_like(weak).index_copy_(0, order, weak)

    def listed(self, F: Tensor, size: int) -> Tensor:
        """The free entries of each row, then rows of the identity."""
        every = torch.arange(self.m + size + 1, device=F.device)
        slot = torch.where(F, F.cumsum(-1) - 1, size)
        return every[self.m :].repeat(len(F), 1).scatter_(-1, slot, every[: self.m].expand_as(F))[:, :size]

    def factorise(self, idx: Tensor, element: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Upper Cholesky factors, with failures as LAPACK reports them."""
        width, p = 2 * self.m, idx.shape[-1]
        idx, element = idx.to(self.index), element.to(self.index)
        where = ((element * width).unsqueeze(-1) + idx).mul_(width).unsqueeze(-1) + idx.unsqueeze(-2)
        A = self.table.view(-1).index_select(0, where.view(-1)).view(len(idx), p, p)
        if shift is not None:
            A.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(-1))
        return torch.linalg.cholesky_ex(A, upper=True)


# --------------------------------------------------------------------------------------------------------- derivatives


def _linear_solve(
    value: Tensor, args: tuple[Tensor, ...], factors: tuple[Tensor, ...], rhs: Tensor, transpose: bool
) -> tuple[Tensor, Info]:
    """The Jacobian of the residual, or its transpose: a system of the free entries, and products."""
    M, U = args
    F = value > U
    idx, L, shift = factors
    M, r = M.to(L.dtype), rhs.to(L.dtype)
    batch = torch.broadcast_shapes(F.shape, r.shape)
    r, idx = r.expand(batch), idx.expand(*batch[:-1], idx.shape[-1])
    held = torch.where(F, 0, r)
    b = torch.where(F, r, 0) if transpose else torch.where(F, r - held @ M, 0)

    def inverse(b: Tensor) -> Tensor:
        if not idx.shape[-1]:
            return torch.zeros_like(b)
        picked = torch.cat([b, torch.zeros_like(b)], -1).gather(-1, idx)
        x = solve_columns(lambda L, c: torch.cholesky_solve(c, L, upper=True), (L,), (2,), picked)
        return torch.cat([b, b], -1).zero_().scatter(-1, idx, x)[..., : b.shape[-1]]

    def pseudoinverse(b: Tensor) -> Tensor:
        """The filter ``l^2 / (l + shift)^3`` of eigenvalues l: those that are rounding of zero count as zero."""
        x = inverse(b)
        for _ in range(2):
            x = inverse(torch.where(F, x @ M, 0))
        return x

    x = inverse(b)
    singular = (shift > 0).unsqueeze(-1)
    if bool(singular.any()):
        filtered = pseudoinverse(b)
        filtered = filtered + pseudoinverse(torch.where(F, b - filtered @ M, 0))
        x = torch.where(singular, filtered, x)
    x = x + (torch.where(F, 0, r - x @ M) if transpose else held)
    status = torch.where(torch.isfinite(x).flatten(-2).all(-1), 0, int(Status.DIVERGED))
    return x.to(rhs.dtype), Info(status, torch.zeros_like(status), torch.zeros_like(status, dtype=rhs.dtype))
