"""GMRES that carries a subspace from cycle to cycle and from system to system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._checks import check_options, check_tensor, compute_dtype
from difflayers._solution import Info

from ._krylov import Preconditioner, _dot, _finish, _norm, _scaled
from ._system import LinearSolver, LinearSystem, Params

Product = Callable[[Tensor], Tensor]


class RecycledSpace:
    """What :class:`RecycledGMRES` carries from one solve to the next: directions, without gradient.

    Solves with the matrix and with its transpose (adjoint systems) keep directions of their own, and so do solves whose
    right-hand sides differ in shape, dtype or device (of the last 16 such kinds). Systems of one space should be near
    each other; directions of a system that is not only cost their products.

    Example:
        >>> import torch
        >>> from difflayers.linalg import RecycledGMRES, RecycledSpace, linear_solve_ex
        >>> A = torch.diag(torch.arange(1.0, 101.0, dtype=torch.float64) ** 2)
        >>> b, space = torch.ones(100, dtype=torch.float64), RecycledSpace()
        >>> solver = RecycledGMRES(restart=20, recycle=8, space=space)
        >>> first, second = (int(linear_solve_ex(A, b, solver=solver).steps) for _ in range(2))
        >>> second < first
        True
    """

    def __init__(self) -> None:
        self._held: dict[tuple[object, ...], Tensor] = {}

    def clear(self) -> None:
        """Forgets all directions."""
        self._held.clear()

    def get(self, rhs: Tensor, transpose: bool) -> Tensor | None:
        """Directions ``(*batch, k, n)`` for a right-hand side, None where there are none."""
        return self._held.get(self._key(rhs, transpose))

    def put(self, rhs: Tensor, transpose: bool, U: Tensor) -> None:
        """Keeps directions."""
        key = self._key(rhs, transpose)
        self._held.pop(key, None)
        self._held[key] = U
        while len(self._held) > 16:  # oldest first
            del self._held[next(iter(self._held))]

    def __repr__(self) -> str:
        return f"RecycledSpace({', '.join(str(tuple(U.shape)) for U in self._held.values())})"

    @staticmethod
    def _key(rhs: Tensor, transpose: bool) -> tuple[object, ...]:
        return transpose, tuple(rhs.shape), rhs.dtype, rhs.device


@dataclass(frozen=True, kw_only=True)
class RecycledGMRES(LinearSolver):
    """GMRES with deflated restarts and a subspace recycled between systems (GCRO-DR), for any square map.

    A restart does not forget: the directions of the smallest harmonic Ritz values stay, those that slow GMRES down.
    Given a `space`, the next system starts from them, which saves most of its steps where it is near the last one;
    :func:`sort_systems` brings a sequence into such an order. The space carries no gradient, and the derivative is that
    of ``A x = b``.

    Args:
        rtol: Relative tolerance on ``||b - A x||``; None picks it by dtype.
        atol: Absolute tolerance.
        max_steps: Largest number of products per element.
        restart: Largest dimension of the search space, doubled after a cycle that gained nothing; memory is twice as
            many vectors per element.
        recycle: Directions that stay, one more where a complex pair would be cut.
        space: Carries directions from call to call; None: within one solve only.
        check_every: Steps between read-backs of the stopping flag; None runs `max_steps` without one.
        preconditioner: ``fn(params, r)``, an approximate inverse, linear in `r`, applied from the right.

    Steps count products, also those that bring recycled directions into a new system; not the one after each cycle that
    measures the residual.

    Source: M. L. Parks, E. de Sturler, G. Mackey, D. D. Johnson, S. Maiti, Recycling Krylov subspaces for sequences of
    linear systems, 2006; sequences sorted as by H. Wang et al., Accelerating data generation for neural operators via
    Krylov subspace recycling, 2024.
    Departure: recycled images are orthonormalised by a singular value decomposition, so that dependent ones drop out,
    and an element stops within a cycle, by the residual of its left null vector. Fewer than 4 unknowns recycle nothing.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int = 1000
    restart: int = 40
    recycle: int = 10
    space: RecycledSpace | None = None
    check_every: int | None = 1
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_options(self, max_steps=0, recycle=1)
        if not isinstance(self.restart, int) or self.restart < self.recycle + 2:
            raise ValueError(f"restart: expected an integer of at least recycle + 2, got {self.restart!r}")
        if self.space is not None and not isinstance(self.space, RecycledSpace):
            raise ValueError(f"space: expected None or a RecycledSpace, got {type(self.space).__name__}")

    def solve(
        self, system: LinearSystem, params: Params, factors: Params, rhs: Tensor, transpose: bool, init: Tensor | None
    ) -> tuple[Tensor, Info]:
        product = system.operator(params, rhs, transpose)
        whole = rhs
        precondition = self.preconditioner or (lambda params, r: r)
        B = lambda v: product(precondition(params, v))  # noqa: E731
        length, rhs, init, tol = _scaled(rhs, init, self.atol, self.rtol)
        r = start = rhs if init is None else rhs - product(init)
        t, norm = torch.zeros_like(rhs), _norm(r)
        active = norm > tol
        steps = torch.zeros(norm.shape, dtype=torch.int64, device=rhs.device)
        n = rhs.shape[-1]
        keep = max(min(self.recycle, n // 2 - 1), 0)
        U = C = nothing = rhs.new_zeros((*rhs.shape[:-1], 0, n))
        known = self.space.get(whole, transpose) if self.space is not None else None
        if known is not None and keep and not self._done(active, 0):
            image = torch.stack([B(u) for u in known.unbind(-2)], -2)
            U, C = _orthonormal(known, image)
            steps = steps + active * known.shape[-2]
            t, r = _project(t, r, U, C, active)
            norm = _norm(r)
        met, broken, taken, limit = ~active, torch.zeros_like(active), 0, min(self.restart, n)
        active = active & (norm > tol)
        while taken < self.max_steps and not self._done(active, taken):
            held = U.shape[-2]
            width = min(max(limit - held, 1), self.max_steps - taken)
            cycle = self._cycle(B, t, r, U, C, active, tol, width, keep)
            searched = held + cycle[3]
            t, U, C, used, ended, exhausted, more = cycle
            taken, steps = taken + used, steps + more
            before, r = norm, start - B(t)
            t, r = _project(t, r, U, C, active)
            norm = torch.where(active, _norm(r), norm)
            gained = norm < 0.9 * before
            # the space is exhausted, or all of it was searched, and the residual stays: the map is singular on it
            vain = exhausted | ~ended if searched >= n else exhausted
            lost = active & vain & (norm > tol) & ~gained
            met = met | (active & ended & ~exhausted)
            # a cycle that gained nothing gains something only with more directions
            hope = gained if limit == n else gained | ~ended
            if held and self.check_every is not None and bool(lost.any()):
                # the images of what was kept may hide the way on, of no other map than a singular one without them
                keep, U, C, hope, lost = 0, nothing, nothing, hope | lost, torch.zeros_like(lost)
            broken = broken | lost
            active = active & (norm > tol) & ~broken & hope
            if self.check_every is not None and limit < n and bool((active & ~gained).any()):
                limit = min(2 * limit, n)
        if self.space is not None and U.shape[-2]:
            self.space.put(whole, transpose, U)
        x = precondition(params, t)
        x = x if init is None else init + x
        return _finish(x, _norm(rhs - product(x)), tol, steps, broken, length, met)

    def _done(self, active: Tensor, taken: int) -> bool:
        return self.check_every is not None and taken % self.check_every == 0 and not bool(active.any())

    def _cycle(
        self,
        B: Product,
        t: Tensor,
        r: Tensor,
        U: Tensor,
        C: Tensor,
        active: Tensor,
        tol: Tensor,
        width: int,
        keep: int,
    ) -> tuple[Tensor, Tensor, Tensor, int, Tensor, Tensor, Tensor]:
        """Up to `width` steps from a residual orthogonal to C.

        Returns the iterate, the new U and C, steps used, elements that ended, exhausted ones, steps of each.
        """
        K, noise, began = U.shape[-2], 10 * torch.finfo(r.dtype).eps, active
        # B Z = W G, column by column, in rows here: Z directions, W orthonormal
        Z = r.new_zeros((*r.shape[:-1], K + width, r.shape[-1]))
        W = r.new_zeros((*r.shape[:-1], K + width + 1, r.shape[-1]))
        G = r.new_zeros((*r.shape[:-1], K + width + 1, K + width))
        size = _norm(U)
        scale = torch.where(size > 0, 1 / torch.where(size > 0, size, 1), 1)
        Z[..., :K, :], W[..., :K, :] = U * scale, C
        G[..., :K, :K] = torch.diag_embed(scale.squeeze(-1))
        norm = _norm(r)
        W[..., K, :] = torch.where(active, r / torch.where(active, norm, 1), 0)
        null = r.new_zeros((*r.shape[:-1], width + 1))  # left null vector of the Hessenberg matrix: gives the residual
        null[..., 0] = 1
        square, steps = torch.ones_like(norm), torch.zeros(norm.shape, dtype=torch.int64, device=r.device)
        exhausted, used = torch.zeros_like(active), 0
        for j in range(width):
            at = K + j
            z = torch.where(active, W[..., at, :], 0)
            q = B(z)
            images = W[..., : at + 1, :]
            length = _norm(q)
            for _ in range(2):  # twice is enough
                c = q.unsqueeze(-2) @ images.mT
                q = q - (c @ images).squeeze(-2)
                G[..., : at + 1, at] += c.squeeze(-2)
            h = _norm(q)
            last = active & (h <= noise * length)
            exhausted, going = exhausted | last, active & ~last
            h = torch.where(going, h, 1)
            Z[..., at, :], W[..., at + 1, :] = z, torch.where(going, q / h, 0)
            # an element at rest has zeros for directions and images: any coefficient will do that is not zero
            G[..., at + 1, at] = torch.where(last, 0, h).squeeze(-1)
            w = torch.where(going, -_dot(null[..., : j + 1], G[..., K : at + 1, at]) / h, 0)
            null[..., j + 1], square = w.squeeze(-1), square + w * w
            steps = steps + active
            active = going & (norm > tol * square.sqrt())
            used = j + 1
            if self.check_every and used % self.check_every == 0 and not bool(active.any()):
                break
        Z, W, G = Z[..., : K + used, :], W[..., : K + used + 1, :], G[..., : K + used + 1, : K + used]
        Q, R = torch.linalg.qr(G)
        diagonal = R.diagonal(dim1=-2, dim2=-1).abs()
        tiny = ~(diagonal > noise * diagonal.amax(-1, keepdim=True))
        R = R + torch.diag_embed(tiny * R.new_full((), torch.finfo(R.dtype).max ** 0.5))  # leaves the coefficient out
        y = torch.linalg.solve_triangular(R, Q.mT @ (W @ r.unsqueeze(-1)), upper=True)
        t = torch.where(began, t + (y.mT @ Z).squeeze(-2), t)
        if keep:
            Xi = _smallest(torch.linalg.solve_triangular(R, Q.mT @ (W @ Z.mT), upper=True), keep)
            new, coordinates = _orthonormal(Xi.mT @ Z, (G @ Xi).mT)
            rows = new.shape[-2]
            pad = r.new_zeros((*r.shape[:-1], max(rows - K, 0), r.shape[-1]))
            here = began.unsqueeze(-1)
            U = torch.where(here, new, torch.cat([U, pad], -2)[..., :rows, :])
            C = torch.where(here, coordinates @ W, torch.cat([C, pad], -2)[..., :rows, :])
        return t, U, C, used, ~active, exhausted, steps


def _project(t: Tensor, r: Tensor, U: Tensor, C: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Takes the part of the residual along C away, by a step along U."""
    c = r.unsqueeze(-2) @ C.mT
    return (
        torch.where(active, t + (c @ U).squeeze(-2), t),
        torch.where(active, r - (c @ C).squeeze(-2), r),
    )


def _orthonormal(U: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Combinations of the rows of U whose images are orthonormal, and these; zeros where images are dependent."""
    good = (torch.isfinite(image).all(-1) & torch.isfinite(U).all(-1)).unsqueeze(-1)
    U, image = torch.where(good, U, 0), torch.where(good, image, 0)
    size = _norm(image)
    size = torch.where(size > 0, size, 1)
    P, S, C = torch.linalg.svd(image / size, full_matrices=False)
    fine = (100 * torch.finfo(S.dtype).eps < S).unsqueeze(-1)
    mixed = P.mT @ (U / size) / torch.where(fine, S.unsqueeze(-1), 1)
    return torch.where(fine, mixed, 0), torch.where(fine, C, 0)


def _smallest(inverse: Tensor, keep: int) -> Tensor:
    """``(*batch, size, keep + 1)``: a real basis for the largest eigenvalues of `inverse`, the last column often zero.

    It is there for the second member of a complex pair that would be cut.
    """
    clean = torch.where(torch.isfinite(inverse).all(-1, keepdim=True).all(-2, keepdim=True), inverse, 0)
    values, vectors = (e.to(inverse.device) for e in torch.linalg.eig(clean.cpu()))
    # members of a pair are neighbours, the one with positive imaginary part first, and stay so
    order = values.abs().sort(dim=-1, descending=True, stable=True).indices[..., : keep + 1]
    values = values.gather(-1, order)
    vectors = vectors.gather(-1, order.unsqueeze(-2).expand(*vectors.shape[:-1], order.shape[-1]))
    real = torch.where((values.imag >= 0).unsqueeze(-2), vectors.real, vectors.imag)
    if order.shape[-1] > keep:
        cut = (values[..., keep - 1].imag > 0)[..., None, None]
        real = torch.cat([real[..., :keep], torch.where(cut, real[..., keep:], 0)], -1)
    return real


def sort_systems(parameters: Tensor, *, start: int = 0) -> Tensor:
    """An order of systems in which each is followed by the nearest one not yet visited.

    Args:
        parameters: ``(systems, ...)`` what the systems depend on: coefficients, matrices, values on a pattern.
        start: The first system.

    Returns:
        ``(systems)`` indices.

    Raises:
        ValueError: For anything but a tensor with at least one dimension, or a `start` out of range.

    Differentiable in nothing: indices.

    Example:
        >>> import torch
        >>> from difflayers.linalg import sort_systems
        >>> sort_systems(torch.tensor([[0.0], [5.0], [1.0], [4.0]]))
        tensor([0, 2, 3, 1])

    Source: H. Wang et al., Accelerating data generation for neural operators via Krylov subspace recycling, 2024
    (algorithm 1: greedy, in the Frobenius distance).
    """
    flat = check_tensor("parameters", parameters, min_ndim=1).detach()
    flat = flat.to(compute_dtype(flat.dtype))
    flat = flat.reshape(flat.shape[0], -1) if flat.numel() else flat.new_zeros((flat.shape[0], 1))
    count = flat.shape[0]
    if not isinstance(start, int) or not -1 < start < max(count, 1):
        raise ValueError(f"start: expected a number from 0 to {count - 1}, got {start}")
    order = torch.zeros(count, dtype=torch.int64, device=flat.device)
    open_ = torch.ones(count, dtype=torch.bool, device=flat.device)
    here = torch.full((), start, dtype=torch.int64, device=flat.device)
    for i in range(count):
        order[i] = here
        open_ = open_.index_fill(0, here, False)
        distance = torch.linalg.vector_norm(flat - flat[here], dim=-1)
        distance = torch.where(torch.isnan(distance), torch.inf, distance)
        # an infinite distance of an open system still beats a closed one
        here = torch.where(open_, -distance.clamp_max(torch.finfo(flat.dtype).max), -torch.inf).argmax()
    return order
