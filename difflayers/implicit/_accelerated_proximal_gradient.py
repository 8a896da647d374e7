r"""Accelerated proximal gradient: :math:`z^+ = \mathrm{prox}_{s g}(y - s \nabla f(y))` with momentum and restarts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from difflayers._checks import default_rtol
from difflayers._solution import Info, Status
from difflayers.linalg import LU
from difflayers.linalg._linear_solve import DENSE_LIMIT

from ._composite import Composite, step_length
from ._iterate import IterativeSolver, Step, iterate, size
from ._lbfgs import value_and_gradient
from ._newton import newton_direction, polish

_PATIENCE = 300  # steps until a small event gets its Newton steps
_NEWTON_STEPS = 8


class _State(NamedTuple):
    last: Tensor  # the iterate before; z itself carries the momentum
    step: Tensor
    t: Tensor  # the momentum sequence of FISTA


@dataclass(frozen=True, kw_only=True)
class AcceleratedProximalGradient(IterativeSolver):
    """FISTA with a step length from the curvature met and adaptive restarts; :func:`argmin`'s default with a prox.

    Every element has its own step length and restarts: one step is one trial, so no element waits for another. Stops
    where a step moves by ``atol + rtol ||z||`` at most. Events up to 64 numbers that take more than 300 steps get a few
    Newton steps on the fixed point, and all end with at most two, kept where they reduce its residual.

    Source: A. Beck, M. Teboulle, A fast iterative shrinkage-thresholding algorithm for linear inverse problems, 2009;
    restarts: B. O'Donoghue, E. Candes, Adaptive restart for accelerated gradient schemes, 2015.
    Departure: the step is judged by the curvature along it, from two gradients, which rounding spoils less than the
    difference of two values; it may grow again.
    """

    max_steps: int = 5000

    finds: ClassVar[str] = "composite"

    def start(self, function: Any, z: Tensor) -> Any:
        """No momentum, and a first trial as long as the point is far from zero."""
        at: Composite = function
        _, g = value_and_gradient(at.objective, z)
        length = size(g.detach())
        step = size(z.detach()).clamp_min(1.0) / torch.where((length > 0) & torch.isfinite(length), length, 1)
        return _State(z, step, torch.ones_like(step))

    def step(self, function: Any, z: Tensor, state: Any, k: int) -> Step:
        """One proximal step from the extrapolated point `z`; a rejected one shortens the next."""
        at: Composite = function
        s: _State = state
        _, g = value_and_gradient(at.objective, z)
        new = at.prox(z - s.step.unsqueeze(-1) * g, s.step)
        f_new, g_new = value_and_gradient(at.objective, new)
        # lengths of steps are decisions, not part of the iterate's derivative
        d, change, here = (new - z).detach(), (g_new - g).detach(), new.detach()
        length = size(d)
        square, bend = length.square(), (change * d).sum(-1)
        noise = 8 * torch.finfo(z.dtype).eps * size(g.detach()) * length
        finite = torch.isfinite(bend) & torch.isfinite(f_new.detach())
        accept = (bend * s.step <= square + noise * s.step) & finite
        exact = 0.9 * square / torch.where(finite & (bend > 0), bend, 1)
        shorter = torch.where(finite & (bend > 0), torch.minimum(exact, s.step / 2), s.step / 10)
        # room above: longer, but not beyond what the curvature met allows
        longer = torch.where(bend > 0, exact.clamp(max=1.5 * s.step).clamp(min=s.step), 1.5 * s.step)
        step = torch.where(accept, torch.where(length > 0, longer, s.step), shorter)
        restart = ((z.detach() - here) * (here - s.last.detach())).sum(-1) > 0
        t_next = (1 + (1 + 4 * s.t.square()).sqrt()) / 2
        momentum = torch.where(restart, 0, (s.t - 1) / t_next).unsqueeze(-1)
        keep = accept.unsqueeze(-1)
        z_next = torch.where(keep, new + momentum * (new - s.last), z)
        # no gradient where the momentum led: back; none without momentum either, or no prox: nothing helps
        lost = ~torch.isfinite(size(g.detach()))
        hopeless = (lost & (z == s.last).all(-1)) | (~lost & torch.isnan(here).any(-1))
        z_next = torch.where(lost.unsqueeze(-1), s.last, z_next)
        retry = 1 + size(z.detach()) + torch.where(lost, 0, size(g.detach()))
        far = size(here) > torch.finfo(z.dtype).max ** 0.4
        unbounded = torch.isneginf(f_new.detach()) | (far & torch.isfinite(size(z.detach())))
        return Step(
            z=z_next,
            state=_State(
                torch.where(keep, new, s.last),
                step,
                torch.where(accept, torch.where(restart, 1.0, t_next), torch.where(lost, 1.0, s.t)),
            ),
            final=new,
            error=torch.where(accept, length, torch.where(hopeless, math.nan, retry)),
            scale=torch.where(accept, size(here), size(z.detach())),
            status=torch.where(unbounded, int(Status.UNBOUNDED), 0),
        )

    def solve(self, function: Any, z: Tensor) -> tuple[Tensor, Info]:
        """Runs to the tolerance, then sharpens small events."""
        at: Composite = function
        small = z.shape[-1] <= DENSE_LIMIT and self.max_steps > _PATIENCE and self.check_every is not None
        z, info = iterate(replace(self, max_steps=_PATIENCE) if small else self, function, z)
        if self.check_every is None or z.numel() == 0:
            return z, info
        starved = info.status == Status.MAX_STEPS
        if small and bool(starved.any()):
            # ill-conditioned: the support is mostly known by now, and Newton steps do not mind
            near = _newton_steps(at, z, starved)
            there, more = iterate(replace(self, max_steps=self.max_steps - _PATIENCE), function, near)
            z = torch.where(starved.unsqueeze(-1), there, z)
            info = Info(
                torch.where(starved, more.status, info.status),
                torch.where(starved, info.steps + more.steps, info.steps),
                torch.where(starved, more.residual, info.residual),
            )
        step = step_length(at.objective, z)
        return polish(lambda z: z - at.move(z, step), z, info, default_rtol(self.rtol, z.dtype))


def _newton_steps(at: Composite, z: Tensor, where: Tensor) -> Tensor:
    """A few Newton steps on the fixed point, kept where they reduce its residual."""
    step = step_length(at.objective, z)
    residual = lambda z: z - at.move(z, step)  # noqa: E731
    r = residual(z)
    for _ in range(_NEWTON_STEPS):
        delta, status = newton_direction(residual, z, r, LU())
        r_trial = residual(z - delta)
        better = (where & (status == 0) & (size(r_trial) < size(r))).unsqueeze(-1)
        z, r = torch.where(better, z - delta, z), torch.where(better, r_trial, r)
    return z
