"""Krylov solvers that need only products with the matrix: CG and GMRES, each element stopping on its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._checks import check_options, default_rtol
from difflayers._solution import Info, Status

from ._system import LinearSolver, LinearSystem, Params
from ._system import norm as safe_norm

_PLAIN = 40  # plain corrections before GMRES proper: no dearer than the 10 steps or so that GMRES saves

Preconditioner = Callable[[Params, Tensor], Tensor]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=-1, keepdim=True)


def _scaled(
    rhs: Tensor, init: Tensor | None, atol: float, rtol: float | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The system for a right-hand side of unit length, so that no product of small numbers underflows.

    Returns the length, the scaled right-hand side and start, and the tolerance in that scale.
    """
    length = safe_norm(rhs, keepdim=True)
    zero = length == 0
    length = torch.where(zero, 1, length)
    start = None if init is None else torch.where(zero, 0, init.expand_as(rhs) / length)
    return length, rhs / length, start, atol / length + default_rtol(rtol, rhs.dtype)


def _finish(
    x: Tensor, norm: Tensor, tol: Tensor, steps: Tensor, broken: Tensor, length: Tensor, met: Tensor
) -> tuple[Tensor, Info]:
    status = torch.where(broken, int(Status.SINGULAR), int(Status.MAX_STEPS))
    # recurrences drift from the true residual by rounding: where they met the tolerance, a small factor is granted
    status = torch.where(norm <= torch.where(met, 10 * tol, tol), int(Status.CONVERGED), status)
    finite = torch.isfinite(norm)
    status = torch.where(finite, status, int(Status.DIVERGED))
    x = torch.where(finite, x * length, math.nan)
    return x, Info(status.squeeze(-1), steps.squeeze(-1), (norm * length).squeeze(-1))


@dataclass(frozen=True, kw_only=True)
class CG(LinearSolver):
    """Conjugate gradients for symmetric positive definite maps.

    Stops an element at ``||b - A x|| <= atol + rtol ||b||``. A direction of non-positive curvature ends the element
    with status ``SINGULAR``: the map is not positive definite.

    Args:
        rtol: Relative tolerance; None picks it by dtype.
        atol: Absolute tolerance.
        max_steps: Largest number of products.
        check_every: Steps between read-backs of the stopping flag; None runs `max_steps` without one.
        preconditioner: ``fn(params, r)``, an approximate inverse, symmetric positive definite.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int = 1000
    check_every: int | None = 1
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_options(self, max_steps=0)

    def solve(
        self, system: LinearSystem, params: Params, factors: Params, rhs: Tensor, transpose: bool, init: Tensor | None
    ) -> tuple[Tensor, Info]:
        product = system.operator(params, rhs, transpose)
        length, rhs, init, tol = _scaled(rhs, init, self.atol, self.rtol)
        x = torch.zeros_like(rhs) if init is None else init
        r = rhs if init is None else rhs - product(x)
        solve = self._alone if rhs.ndim == 1 and self.check_every == 1 else self._together
        x, norm, steps, ended = solve(product, params, x, r, tol)
        broken = ended & (norm > tol)  # of those that have ended: what met a direction without curvature
        return _finish(x, _norm(rhs - product(x)), tol, steps, broken, length, ended)

    def _together(
        self, product: Callable[[Tensor], Tensor], params: Params, x: Tensor, r: Tensor, tol: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Iterate, norm of its residual, steps, elements that have ended."""
        z = self.preconditioner(params, r) if self.preconditioner else r
        p, rz, norm = z, _dot(r, z), _norm(r)
        active = norm > tol
        steps = torch.zeros(norm.shape, dtype=torch.int64, device=r.device)
        for k in range(self.max_steps):
            if self.check_every and k % self.check_every == 0 and not bool(active.any()):
                break
            Ap = product(p)
            curvature = _dot(p, Ap)
            active = active & (curvature > 0)
            alpha = torch.where(active, rz / curvature, 0)
            x = torch.addcmul(x, alpha, p)
            r = torch.addcmul(r, alpha, Ap, value=-1)
            z = self.preconditioner(params, r) if self.preconditioner else r
            rz_new = _dot(r, z)
            p = torch.addcmul(z, torch.where(active, rz_new / rz, 0), p)
            rz = rz_new
            steps = steps + active
            norm = _norm(r) if self.preconditioner else rz.sqrt()
            active = active & (norm > tol)
        return x, norm, steps, ~active

    def _alone(
        self, product: Callable[[Tensor], Tensor], params: Params, x: Tensor, r: Tensor, tol: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same for one system: the loop ends with it, so nothing is masked, which is half of the small work."""
        z = self.preconditioner(params, r) if self.preconditioner else r
        p, rz, norm = z, torch.linalg.vecdot(r, z), _norm(r)
        last, bent, active, k = (x, norm), None, norm > tol, 0
        while k < self.max_steps and bool(active):
            Ap = product(p)
            curvature = torch.linalg.vecdot(p, Ap)
            alpha = rz / curvature
            last, x = (x, norm), torch.addcmul(x, alpha, p)
            r = torch.addcmul(r, alpha, Ap, value=-1)
            z = self.preconditioner(params, r) if self.preconditioner else r
            rz, before = torch.linalg.vecdot(r, z), rz
            p = torch.addcmul(z, rz / before, p)
            norm = torch.linalg.vector_norm(r) if self.preconditioner else rz.sqrt()
            bent = ~(curvature > 0)
            active = (norm > tol) & ~bent
            k += 1
        steps = torch.full(tol.shape, k, dtype=torch.int64, device=r.device)
        if bent is not None:  # the step along such a direction is taken back
            x, norm, steps = torch.where(bent, last[0], x), torch.where(bent, last[1], norm), steps - bent.long()
        return x, norm.reshape(tol.shape), steps, ~active.reshape(tol.shape)


@dataclass(frozen=True, kw_only=True)
class GMRES(LinearSolver):
    """Restarted minimal residuals for any square map.

    The adaptive simpler variant: the images of the search directions are kept orthonormal, so the residual is known at
    every step and each element stops on its own, without a small least-squares problem. The next direction is the
    residual while it shrinks, the last image where it stalls.

    Args:
        rtol: Relative tolerance on ``||b - A x||``; None picks it by dtype.
        atol: Absolute tolerance.
        max_steps: Largest number of products.
        restart: Directions kept in the first cycle, doubled in every further one up to n; memory is twice as many
            vectors per element.
        check_every: Steps between read-backs of the stopping flag; None runs `max_steps` without one.
        preconditioner: ``fn(params, r)``, an approximate inverse, applied from the right.

    Source: P. Jiranek, M. Rozloznik, Adaptive version of simpler GMRES, Numerical Algorithms 53, 2010 (algorithm 1).
    Departure: images are orthogonalised twice, and plain corrections ``x + r`` come first where they are about to
    finish: a step of GMRES costs several of them.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int = 1000
    restart: int = 30
    check_every: int | None = 1
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_options(self, max_steps=0, restart=1)

    def solve(
        self, system: LinearSystem, params: Params, factors: Params, rhs: Tensor, transpose: bool, init: Tensor | None
    ) -> tuple[Tensor, Info]:
        product = system.operator(params, rhs, transpose)
        precondition = self.preconditioner or (lambda params, r: r)
        length, rhs, init, tol = _scaled(rhs, init, self.atol, self.rtol)
        x = torch.zeros_like(rhs) if init is None else init
        r = rhs if init is None else rhs - product(x)
        norm = _norm(r)
        active = norm > tol
        steps = torch.zeros(norm.shape, dtype=torch.int64, device=rhs.device)
        taken = 0
        # Plain corrections first: where the map is close to the identity (the adjoint of a strong contraction) nothing
        # is cheaper. An element stays while it may be expected to finish this way soon.
        plain, some = active, True
        while taken < min(self.max_steps, _PLAIN) and some:
            d = precondition(params, r)
            r_new = r - product(d)
            norm_new = _norm(r_new)
            ratio = norm_new / norm  # where norm is 0 the element has ended
            steps = steps + plain
            stay = plain & ((ratio < 0.1) | (norm_new * ratio**_PLAIN <= tol))
            plain = stay & (norm_new > tol)
            # one read-back: whether anyone goes on, and whether everyone took the correction (then nothing is masked)
            some, everyone = torch.stack([plain.any(), stay.all()]).tolist() if self.check_every else (True, False)
            if everyone:
                x, r, norm = x + d, r_new, norm_new
            else:
                x, r, norm = torch.where(stay, x + d, x), torch.where(stay, r_new, r), torch.where(stay, norm_new, norm)
            active = active & (norm > tol)
            taken += 1
        met = ~active
        broken = torch.zeros_like(active)
        taken, width = 0, min(self.restart, rhs.shape[-1])  # the plain corrections of one element cost no other a step
        while taken < self.max_steps and not self._done(active, taken):
            x, used, ended, exhausted, steps = self._cycle(
                product, precondition, params, x, r, active, tol, steps, min(width, self.max_steps - taken)
            )
            taken += used
            before, r = norm, rhs - product(x)
            norm = _norm(r)
            broken, met = broken | exhausted, met | (ended & ~exhausted)
            # a cycle that gained nothing gains something only with more directions
            active = active & (norm > tol) & ~broken & ((norm < 0.9 * before) | (width < rhs.shape[-1]))
            width = min(2 * width, rhs.shape[-1])
        return _finish(x, norm, tol, steps, broken, length, met)

    def _done(self, active: Tensor, taken: int) -> bool:
        return self.check_every is not None and taken % self.check_every == 0 and not bool(active.any())

    def _cycle(
        self,
        product: Callable[[Tensor], Tensor],
        precondition: Preconditioner,
        params: Params,
        x: Tensor,
        r: Tensor,
        active: Tensor,
        tol: Tensor,
        steps: Tensor,
        width: int,
    ) -> tuple[Tensor, int, Tensor, Tensor, Tensor]:
        """Up to `width` steps from `r`: iterate, steps used, elements that ended, exhausted ones, step counts."""
        m, noise = width, 10 * torch.finfo(r.dtype).eps
        U = r.new_empty((*r.shape[:-1], m, r.shape[-1]))  # directions
        Q = torch.empty_like(U)  # their orthonormal images: A U = R^T Q, row by row
        R = r.new_zeros((*r.shape[:-1], m, m))
        a = r.new_zeros((*r.shape[:-1], m))
        broken = torch.zeros_like(active)
        norm = _norm(r)
        direction = r / torch.where(active, norm, 1)
        used = 0
        for j in range(m):
            u = precondition(params, direction)
            q = product(u)
            size = _norm(q)
            if j:
                images = Q[..., :j, :]
                for _ in range(2):  # twice is enough
                    c = q.unsqueeze(-2) @ images.mT
                    q = q - (c @ images).squeeze(-2)
                    R[..., :j, j] += c.squeeze(-2)
            h = _norm(q)
            # the space is exhausted: the map is singular on it (a lucky end has already met its tolerance)
            broken = broken | (active & (h <= noise * size))
            active = active & ~broken
            h = torch.where(active, h, 1)
            q = q / h
            U[..., j, :], Q[..., j, :], R[..., j, j] = u, q, h.squeeze(-1)
            gain = torch.where(active, _dot(q, r), 0)
            a[..., j] = gain.squeeze(-1)
            r = r - gain * q
            before, norm = norm, _norm(r)
            # the residual while it shrinks, the last image where it stalls
            direction = torch.where(norm < 0.9 * before, r / torch.where(norm > 0, norm, 1), q)
            steps = steps + active
            active = active & (norm > tol)
            direction = torch.where(active, direction, 0)  # a finished element must not grow while others go on
            used = j + 1
            if self.check_every and used % self.check_every == 0 and not bool(active.any()):
                break
        y = torch.linalg.solve_triangular(R[..., :used, :used], a[..., :used].unsqueeze(-1), upper=True)
        return x + (y.mT @ U[..., :used, :]).squeeze(-2), used, ~active, broken, steps
