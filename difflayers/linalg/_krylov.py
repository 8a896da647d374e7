"""Krylov solvers that need only products with the matrix: CG and GMRES, each element stopping on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._checks import default_rtol
from difflayers._solution import Info, Status

from ._system import LinearSolver, LinearSystem, Params

Preconditioner = Callable[[Params, Tensor], Tensor]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=-1, keepdim=True)


def _finish(x: Tensor, norm: Tensor, tol: Tensor, steps: Tensor, broken: Tensor) -> tuple[Tensor, Info]:
    status = torch.where(broken, int(Status.SINGULAR), int(Status.MAX_STEPS))
    status = torch.where(norm <= tol, int(Status.CONVERGED), status)
    status = torch.where(torch.isfinite(norm), status, int(Status.DIVERGED))
    return x, Info(status.squeeze(-1), steps.squeeze(-1), norm.squeeze(-1))


@dataclass(frozen=True)
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

    def solve(
        self, system: LinearSystem, params: Params, factors: Params, rhs: Tensor, transpose: bool, init: Tensor | None
    ) -> tuple[Tensor, Info]:
        product = system.operator(params, rhs, transpose)
        precondition = self.preconditioner or (lambda params, r: r)
        tol = self.atol + default_rtol(self.rtol, rhs.dtype) * _norm(rhs)
        x = torch.zeros_like(rhs) if init is None else init.expand_as(rhs)
        r = rhs if init is None else rhs - product(x)
        z = precondition(params, r)
        p, rz, norm = z, _dot(r, z), _norm(r)
        active = norm > tol
        broken = torch.zeros_like(active)
        steps = torch.zeros(norm.shape, dtype=torch.int64, device=rhs.device)
        for k in range(self.max_steps):
            if self.check_every and k % self.check_every == 0 and not bool(active.any()):
                break
            Ap = product(p)
            curvature = _dot(p, Ap)
            broken = broken | (active & (curvature <= 0))
            active = active & ~broken
            alpha = torch.where(active, rz / torch.where(active, curvature, 1), 0)
            x = x + alpha * p
            r = r - alpha * Ap
            z = precondition(params, r)
            rz_new = _dot(r, z)
            p = z + torch.where(active, rz_new / torch.where(active, rz, 1), 0) * p
            rz = rz_new
            steps = steps + active
            norm = _norm(r)
            active = active & (norm > tol)
        norm = _norm(rhs - product(x))
        # the recurrence may drift from the true residual by rounding; a small factor keeps the verdict honest
        return _finish(x, norm, 10 * tol, steps, broken)


@dataclass(frozen=True)
class GMRES(LinearSolver):
    """Restarted minimal residuals for any square map.

    The adaptive simpler variant: search directions are kept together with their orthonormal images, so the iterate and
    its residual are known at every step and each element stops on its own without a small least-squares problem. The
    next direction is the residual while it shrinks, the last image where it stalls.

    Args:
        rtol: Relative tolerance on ``||b - A x||``; None picks it by dtype.
        atol: Absolute tolerance.
        max_steps: Largest number of products.
        restart: Directions kept; memory is ``2 * restart`` vectors per element.
        check_every: Steps between read-backs of the stopping flag; None runs `max_steps` without one.
        preconditioner: ``fn(params, r)``, an approximate inverse, applied from the right.

    Source: P. Jiranek, M. Rozloznik, Adaptive version of simpler GMRES, Numerical Algorithms 53, 2010 (algorithm 1).
    Departure: directions are updated with their images (as in GCR) instead of a triangular solve at the end of a cycle,
    and images are orthogonalised twice.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int = 1000
    restart: int = 30
    check_every: int | None = 1
    preconditioner: Preconditioner | None = None

    def solve(
        self, system: LinearSystem, params: Params, factors: Params, rhs: Tensor, transpose: bool, init: Tensor | None
    ) -> tuple[Tensor, Info]:
        product = system.operator(params, rhs, transpose)
        precondition = self.preconditioner or (lambda params, r: r)
        tol = self.atol + default_rtol(self.rtol, rhs.dtype) * _norm(rhs)
        x = torch.zeros_like(rhs) if init is None else init.expand_as(rhs).clone()
        r = rhs if init is None else rhs - product(x)
        norm = _norm(r)
        active = norm > tol
        steps = torch.zeros(norm.shape, dtype=torch.int64, device=rhs.device)
        broken = torch.zeros_like(active)
        m, noise = min(self.restart, rhs.shape[-1]), 10 * torch.finfo(rhs.dtype).eps
        for k in range(self.max_steps):
            if self.check_every and k % self.check_every == 0 and not bool(active.any()):
                break
            j = k % m
            if j == 0:  # a new cycle, from the true residual
                if k:
                    r = rhs - product(x)
                    active = active & (_norm(r) > tol)
                U = rhs.new_zeros(*rhs.shape[:-1], m, rhs.shape[-1])
                Q = torch.zeros_like(U)
                direction = r
            direction = direction / torch.where(active, _norm(direction), 1)
            u = precondition(params, direction)
            q = product(u)
            size = _norm(q)
            if j:
                images, directions = Q[..., :j, :], U[..., :j, :]
                for _ in range(2):
                    c = images @ q.unsqueeze(-1)
                    q = q - (c.mT @ images).squeeze(-2)
                    u = u - (c.mT @ directions).squeeze(-2)
            h = _norm(q)
            # the space is exhausted: the map is singular on it (a lucky end has already met its tolerance)
            broken = broken | (active & (h <= noise * size))
            active = active & ~broken
            h = torch.where(active, h, 1)
            q, u = q / h, u / h
            Q[..., j, :], U[..., j, :] = q, u
            a = torch.where(active, _dot(q, r), 0)
            x = x + a * u
            r_new = r - a * q
            norm_new = _norm(r_new)
            direction = torch.where(norm_new < 0.9 * norm, r_new, q)
            r, norm = r_new, norm_new
            steps = steps + active
            active = active & (norm > tol)
        norm = _norm(rhs - product(x))
        return _finish(x, norm, 10 * tol, steps, broken)
