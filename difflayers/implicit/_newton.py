r"""Newton's method :math:`z \leftarrow z - t\,(\partial F/\partial z)^{-1} F(z)` with a line search."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from difflayers._solution import Info, Status
from difflayers.linalg import GMRES, LU, LinearSolver
from difflayers.linalg._autodiff import transforms_active
from difflayers.linalg._linear_solve import DENSE_LIMIT

from ._implicit_problem import ImplicitProblem, ResidualSystem
from ._iterate import Function, IterativeSolver, Step, size

_SHORTEST = 1e-7  # a step this short that still does not reduce the residual: there is no root downhill


def newton_direction(
    function: Function, z: Tensor, r: Tensor, linear_solver: LinearSolver | None
) -> tuple[Tensor, Tensor]:
    """``(dF/dz)^-1 r`` per element, and the status of that linear solve."""
    problem = ImplicitProblem(solve=_never, residual=function, value_ndim=1, arg_ndims=None)
    solver = linear_solver or (LU() if z.shape[-1] <= DENSE_LIMIT else GMRES())
    system = ResidualSystem(solver, (1,), problem=problem)
    if torch.is_grad_enabled() or transforms_active():
        # unrolled: by the inverse, because torch's own rules for triangular solves go wrong under vmap(hessian)
        inverse, info = torch.linalg.inv_ex(system.matrix((z,), z))
        return (inverse @ r.unsqueeze(-1)).squeeze(-1), torch.where(info != 0, int(Status.SINGULAR), 0)
    delta, info = solver.solve(system, (z,), solver.factor(system, (z,), z), r, False, None)
    return delta, info.status


def _never(*_: Tensor) -> Any:
    raise AssertionError("a direction is not a problem of its own")


@dataclass(frozen=True, kw_only=True)
class Newton(IterativeSolver):
    """Damped Newton; the default for :func:`root_find`.

    Stops when the full step is small, ``||delta|| <= atol + rtol ||z||``; the returned value has taken that step. A
    singular Jacobian ends the element with ``SINGULAR``, a line search that finds no descent with ``DIVERGED``.

    Args:
        linear_solver: Solver for the step. None: a dense factorisation for events up to 64 numbers, else GMRES.
    """

    max_steps: int = 50
    linear_solver: LinearSolver | None = None

    finds: ClassVar[str] = "root"

    def start(self, function: Function, z: Tensor) -> Any:
        """Residual at the start and full steps."""
        r = function(z)
        return r, torch.ones(z.shape[:-1], dtype=z.dtype, device=z.device)

    def step(self, function: Function, z: Tensor, state: Any, k: int) -> Step:
        """One linear solve and one trial of the line search; a rejected trial shortens the next one."""
        r, t = state
        delta, linear_status = newton_direction(function, z, r, self.linear_solver)
        trial = z - t.unsqueeze(-1) * delta
        r_trial = function(trial)
        # lengths of steps are decisions, not part of the iterate's derivative (and norms have none at zero)
        before, after = size(r.detach()), size(r_trial.detach())
        solved = before == 0
        delta = torch.where(solved.unsqueeze(-1), 0, delta)
        error, scale = size(delta.detach()), size(z.detach())
        accept = after <= (1 - 1e-4 * t) * before
        # minimiser of the parabola through both merits and the slope, kept within [t/10, t/2]
        curvature = after**2 + (2 * t - 1) * before**2
        shorter = t * (t * before**2 / torch.where(curvature > 0, curvature, 1)).clamp(0.1, 0.5)
        status = torch.where(linear_status > Status.MAX_STEPS, linear_status, 0)
        singular = status > 0
        stuck = ~accept & (t < _SHORTEST)
        rounding = error <= torch.finfo(z.dtype).eps ** 0.5 * scale
        stuck_status = torch.where(rounding, int(Status.MAX_STEPS), int(Status.DIVERGED))
        status = torch.where((status == 0) & stuck, stuck_status, status)
        keep = accept.unsqueeze(-1)
        return Step(
            z=torch.where(keep, trial, z),
            state=(torch.where(keep, r_trial, r), torch.where(accept, 1.0, torch.where(shorter > 0, shorter, t / 2))),
            final=torch.where(singular.unsqueeze(-1), z, z - delta),
            error=torch.where(singular, math.inf, error),
            scale=scale,
            status=status,
        )


def polish(function: Function, z: Tensor, info: Info, rtol: float, steps: int = 2) -> tuple[Tensor, Info]:
    """Newton steps on a residual that is almost zero, for converged elements, kept only where they reduce it.

    A first step that is not small shows that the element had not converged after all.
    """
    converged = info.status == Status.CONVERGED
    if z.shape[-1] > DENSE_LIMIT or z.numel() == 0:
        return z, info
    r = function(z)
    start = size(r)
    for k in range(steps):
        delta, status = newton_direction(function, z, r, LU())
        if k == 0:
            far = converged & (status == 0) & (size(delta) > rtol**0.5 * size(z)) & (size(delta) > rtol)
        trial = z - delta
        r_trial = function(trial)
        better = converged & ~far & (size(r_trial) < size(r)) & (status == 0)
        z = torch.where(better.unsqueeze(-1), trial, z)
        r = torch.where(better.unsqueeze(-1), r_trial, r)
    residual = torch.where(size(r) < start, size(r), info.residual)
    return z, Info(torch.where(far, int(Status.MAX_STEPS), info.status), info.steps, residual)
