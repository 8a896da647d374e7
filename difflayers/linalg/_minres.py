"""Minimal residuals by a recurrence of three terms, for symmetric maps that need not be definite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._checks import check_options
from difflayers._solution import Info

from ._krylov import Preconditioner, _dot, _finish, _norm, _scaled
from ._system import LinearSolver, LinearSystem, Params


@dataclass(frozen=True, kw_only=True)
class MINRES(LinearSolver):
    """Minimal residuals for symmetric maps: indefinite ones, and singular ones where the system has a solution.

    Stops an element at ``||b - A x|| <= atol + rtol ||b||``. Of a singular system with solutions it finds the one that
    differs least from `init`, without `init` the shortest. Where only a least-squares solution is left, or the
    preconditioner is not positive definite, the element ends with status ``SINGULAR``.

    The adjoint of a singular system is singular too: it has a solution where the loss does not depend on what the
    system leaves free (take the mean off a potential that is known up to a constant, before anything else).

    Args:
        rtol: Relative tolerance; None picks it by dtype.
        atol: Absolute tolerance.
        max_steps: Largest number of products.
        check_every: Steps between read-backs of the stopping flag; None runs `max_steps` without one.
        preconditioner: ``fn(params, r)``, an approximate inverse of the map's absolute value, symmetric positive
            definite.

    Source: C. C. Paige, M. A. Saunders, Solution of sparse indefinite systems of linear equations, 1975.
    Departure: with a preconditioner the residual itself is carried along, so that its own norm stops the iteration;
    where it has drifted from ``b - A x`` by rounding, it all starts again from the true one, as long as that helps.
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
        norm = _norm(r)
        active = norm > tol
        met, broken = ~active, torch.zeros_like(active)
        steps = torch.zeros(norm.shape, dtype=torch.int64, device=rhs.device)
        taken = 0
        while taken < self.max_steps and not self._done(active, taken):
            start, before = x, norm
            x, best, floor, suspect, used, ended, failed, steps = self._pass(
                product, params, x, r, active, tol, steps, taken
            )
            taken += used
            r = rhs - product(x)
            norm = _norm(r)
            # what is minimised cannot grow but by rounding, and where it was suspected to be all it does not shrink
            lost = norm > torch.where(suspect, 0.9, 1) * floor
            if self.check_every is None or bool(lost.any()):
                x = torch.where(lost, best, x)
                norm = _norm(rhs - product(x))
                x, norm = torch.where(norm > before, start, x), torch.minimum(norm, before)
            broken, met = broken | failed | (lost & suspect), met | (ended & ~lost)
            active = active & (norm > tol) & ~broken & ~lost & (norm < torch.where(suspect, floor, 0.1 * before))
        return _finish(x, norm, tol, steps, broken, length, met)

    def _done(self, active: Tensor, taken: int) -> bool:
        return self.check_every is not None and taken % self.check_every == 0 and not bool(active.any())

    def _pass(
        self,
        product: Callable[[Tensor], Tensor],
        params: Params,
        x: Tensor,
        r: Tensor,
        active: Tensor,
        tol: Tensor,
        steps: Tensor,
        taken: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int, Tensor, Tensor, Tensor]:
        """From `r` until all have ended.

        Returns the iterate, that which may be the best there is with its residual and whether it is suspected to be,
        steps used, elements that met the tolerance, those with a bad preconditioner, and all counts of steps.
        """
        precondition, eps = self.preconditioner, torch.finfo(r.dtype).eps
        y = precondition(params, r) if precondition else r
        square = _dot(r, y)
        broken = active & ~(square > 0)
        active = active & ~broken
        left = torch.where(active, square, 1).sqrt()  # of the residual, in the norm that is minimised
        z = r / left  # Lanczos vector, and its image under the preconditioner
        v = y / left if precondition else z
        zero = torch.zeros_like(left)
        z_old = d = d_old = torch.zeros_like(r)
        beta = delta = epsilon = size = zero
        c, s, used = -torch.ones_like(left), zero, 0
        best, norm = x, _norm(r)
        floor, over, suspect, since = norm, torch.zeros_like(active), torch.zeros_like(active), zero
        while taken + used < self.max_steps and not self._done(active, taken + used):
            w = torch.addcmul(product(v), beta, z_old, value=-1)
            alpha = _dot(v, w)
            w = torch.addcmul(w, alpha, z, value=-1)
            y = precondition(params, w) if precondition else w
            square = _dot(w, y)
            size = size + alpha.square() + beta.square()  # of the tridiagonal matrix, row by row
            beta = square.clamp(min=0).sqrt()
            # the column of the tridiagonal matrix under the last two rotations, and the rotation that ends it
            before, upper, corner = epsilon, c * delta + s * alpha, s * delta - c * alpha
            epsilon, delta = s * beta, -c * beta
            # The map takes the residual to (almost) nothing: a least-squares solution, or a small eigenvalue is left.
            # The latter brings the residual down sooner or later, the former leads x astray.
            image, whole = corner.square() + delta.square(), size + beta.square()
            new = active & ~suspect & (image <= eps * whole)
            best, floor, suspect = torch.where(new, x, best), torch.where(new, norm, floor), suspect | new
            since = torch.where(new, used, since)
            hopeless = image <= (10 * eps) ** 2 * whole
            if used % 16 == 0:
                hopeless = hopeless | (suspect & (since < used / 2 - 20))
            over = over | (active & hopeless)
            active = active & ~over
            if precondition:
                broken = broken | (active & (square < 0))
                active = active & ~broken
            size = whole
            pivot = torch.where(active, torch.hypot(corner, beta), 1)
            c, s = corner / pivot, beta / pivot
            onward = torch.addcmul(torch.addcmul(v, before, d_old, value=-1), upper, d, value=-1)
            d, d_old = onward * torch.where(active, 1 / pivot, 0), d
            gain = torch.where(active, c * left, 0)
            x = torch.addcmul(x, gain, d)
            scale = torch.where(beta > 0, beta, 1)
            z, z_old = w / scale, z
            left = torch.where(active, s * left, left)
            if precondition:  # else the norms are one
                v = y / scale
                r = torch.addcmul(torch.where(active, s.square(), 1) * r, gain * s, z, value=-1)
                norm = _norm(r)
            else:
                v, norm = z, torch.where(active, left.abs(), norm)
            steps = steps + active
            used += 1
            active = active & (norm > tol)
        return x, best, floor, suspect, used, ~(active | broken | over), broken, steps
