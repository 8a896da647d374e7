"""The loop that every iterative solver runs in: per-element stopping with one flag read back per check.

A solver is a `start` and a `step`, both pure functions of tensors. :func:`iterate` runs them without gradient and stops
each element on its own; :func:`unroll` runs the same step a fixed number of times under autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from difflayers._checks import default_rtol
from difflayers._solution import Info, Status
from difflayers.linalg._system import norm

Function = Callable[[Tensor], Tensor]

_RUNAWAY = 1e6  # an error that grew by this factor is not on its way to anything


class Step(NamedTuple):
    """What a solver says after one step; all per batch element.

    `z` and `state` go into the next step. `final` is the value to return if this element stops here, `error` its error
    measure and `scale` what the error is compared with. `status`, where not None, ends elements with a code above 0.
    """

    z: Tensor
    state: Any
    final: Tensor
    error: Tensor
    scale: Tensor
    status: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class IterativeSolver:
    """Options every iterative solver has.

    Args:
        rtol: Relative tolerance. None: 1e-10 in float64, 1e-5 in float32.
        atol: Absolute tolerance, added.
        max_steps: Largest number of steps.
        check_every: Steps between read-backs of the stopping flag. None: exactly `max_steps` steps and no read-back.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int = 100
    check_every: int | None = 1

    finds: ClassVar[str] = "root"
    keeps_best: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    floors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1, got {self.max_steps}")
        if self.check_every is not None and self.check_every < 1:
            raise ValueError(f"check_every: expected at least 1 or None, got {self.check_every}")
        if self.rtol is not None and not self.rtol >= 0:
            raise ValueError(f"rtol: expected a number of at least 0, got {self.rtol}")
        if not self.atol >= 0:
            raise ValueError(f"atol: expected a number of at least 0, got {self.atol}")

    def start(self, function: Function, z: Tensor) -> Any:
        """The state before the first step."""
        return None

    def step(self, function: Function, z: Tensor, state: Any, k: int) -> Step:
        """One step from `z`."""
        raise TypeError(f"{type(self).__name__} defines no step")

    def solve(self, function: Function, z: Tensor) -> tuple[Tensor, Info]:
        """Runs to the tolerance, without gradient."""
        return iterate(self, function, z)


def iterate(solver: IterativeSolver, function: Function, z: Tensor) -> tuple[Tensor, Info]:
    """Runs `solver` from `z` of shape ``(*batch, n)`` until every element has stopped.

    An element stops at ``error <= atol + rtol * scale``, with a floor of a few rounding units of its first scale (so
    that a solution at zero is reached too), or when its error is no longer a number. Elements that have stopped go on
    iterating unseen: their result is already stored, and no element sees another.
    """
    counts = torch.zeros(z.shape[:-1], dtype=torch.int64, device=z.device)
    if z.numel() == 0:
        return z, Info(counts, counts, torch.zeros(z.shape[:-1], dtype=z.dtype, device=z.device))
    if solver.check_every is None:
        return unroll(solver, function, z, solver.max_steps)
    rtol = default_rtol(solver.rtol, z.dtype)
    state = solver.start(function, z)
    floor = first = best = stored = None
    remaining = counts.numel()
    for k in range(solver.max_steps):
        s = solver.step(function, z, state, k)
        if floor is None:
            floor, first = _floor(solver, s), s.error
        last = k + 1 == solver.max_steps
        if last or (k + 1) % solver.check_every == 0:
            active, status = _verdict(s, floor, rtol)
            if stored is not None:
                active = active & stored.active
            if solver.keeps_best:
                best = _Best.update(best, s)
            before, remaining = remaining, int(active.sum()) if counts.numel() > 1 else int(active)
            if remaining < before or last:
                stored = _Stored.update(stored, s, status, active, counts, k + 1, best if last else None)
            if remaining == 0:
                break
        z, state = s.z, s.state
    assert stored is not None and first is not None
    runaway = stored.active & (stored.error > _RUNAWAY * first)
    status = torch.where(stored.active, int(Status.MAX_STEPS), stored.status)
    return stored.final, Info(_not_finite(status, stored.error, runaway), stored.steps, stored.error.to(z.dtype))


def _floor(solver: IterativeSolver, s: Step) -> Tensor:
    """The part of the tolerance that does not follow the iterate."""
    if not solver.floors:
        return torch.full_like(s.scale, solver.atol)
    return s.scale * (4 * torch.finfo(s.z.dtype).eps) + solver.atol


def _verdict(s: Step, floor: Tensor, rtol: float) -> tuple[Tensor, Tensor | None]:
    """The elements that go on, and the status of those that end; a met tolerance outweighs a complaint."""
    active = s.error > torch.add(floor, s.scale, alpha=rtol)  # False for NaN: nothing more to be had
    if s.status is None:
        return active, None
    status = torch.where(active | torch.isnan(s.error), s.status, 0)
    return active & (status == 0), status


def _lost_in_scale(s: Step) -> Tensor:
    """The error, infinite where its scale overflowed: compared with that, anything would look converged."""
    return torch.where(torch.isfinite(s.scale), s.error, math.inf)


def _not_finite(status: Tensor, error: Tensor, runaway: Tensor | bool = False) -> Tensor:
    """`status`, with DIVERGED where the error ran away or is no longer a number."""
    lost = (runaway | ~torch.isfinite(error)) & (status <= Status.MAX_STEPS)
    return torch.where(lost, int(Status.DIVERGED), status)


class _Best(NamedTuple):
    """The iterate with the smallest error so far: what a starved element returns."""

    final: Tensor
    error: Tensor

    @staticmethod
    def update(best: _Best | None, s: Step) -> _Best:
        if best is None:
            return _Best(s.final, s.error)
        better = ~(s.error >= best.error)
        return _Best(torch.where(better.unsqueeze(-1), s.final, best.final), torch.where(better, s.error, best.error))


class _Stored(NamedTuple):
    """Results of the elements that have stopped; entries of active ones are stale until they stop."""

    final: Tensor
    error: Tensor
    steps: Tensor
    status: Tensor
    active: Tensor

    @staticmethod
    def update(
        old: _Stored | None,
        s: Step,
        status: Tensor | None,
        active: Tensor,
        zeros: Tensor,
        k: int,
        best: _Best | None,
    ) -> _Stored:
        final, error = s.final, _lost_in_scale(s)
        status = zeros if status is None else status
        if best is not None:
            starved = active & torch.isfinite(best.error)
            final = torch.where(starved.unsqueeze(-1), best.final, final)
            error = torch.where(starved, best.error, error)
        if old is None:
            return _Stored(final, error, zeros + k, status, active)
        now = old.active  # stopped since the last update, or still running: refresh both
        return _Stored(
            torch.where(now.unsqueeze(-1), final, old.final),
            torch.where(now, error, old.error),
            torch.where(now, k, old.steps),
            torch.where(now, status, old.status),
            active,
        )


class Progress(NamedTuple):
    """Where an unrolled solve stands between two steps."""

    z: Tensor
    state: Any
    active: Tensor
    steps: Tensor
    status: Tensor
    result: Tensor | None = None
    error: Tensor | None = None
    floor: Tensor | None = None


def advance(solver: IterativeSolver, function: Function, at: Progress, start: int, stop: int) -> Progress:
    """The steps from `start` to `stop` under autograd; finished elements keep their value."""
    z, state, active, steps, status, result, error, floor = at
    rtol = default_rtol(solver.rtol, z.dtype)
    if start == 0:
        state = solver.start(function, z)
    for k in range(start, stop):
        s = solver.step(function, z, state, k)
        now = s._replace(error=s.error.detach(), scale=s.scale.detach())
        now = now._replace(error=_lost_in_scale(now))
        floor = _floor(solver, now) if floor is None else floor
        go_on, ended = _verdict(now, floor, rtol)
        steps = steps + active
        result = s.final if result is None else torch.where(active.unsqueeze(-1), s.final, result)
        error = now.error if error is None else torch.where(active, now.error, error)
        if ended is not None:
            status = torch.where(active, ended, status)
        active = active & go_on
        # a finished element stays where it is: its unused steps are finite, and so are their zero gradients
        z = torch.where(active.unsqueeze(-1), s.z, result.detach())
        state = s.state
    return Progress(z, state, active, steps, status, result, error, floor)


def before_first(z: Tensor) -> Progress:
    """No step taken."""
    steps = torch.zeros(z.shape[:-1], dtype=torch.int64, device=z.device)
    return Progress(z, None, torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device), steps, steps)


def report(at: Progress) -> tuple[Tensor, Info]:
    """The result of an unrolled solve."""
    assert at.result is not None and at.error is not None
    status = torch.where(at.active, int(Status.MAX_STEPS), at.status)
    return at.result, Info(_not_finite(status, at.error), at.steps, at.error.to(at.z.dtype))


def unroll(solver: IterativeSolver, function: Function, z: Tensor, max_steps: int) -> tuple[Tensor, Info]:
    """Exactly `max_steps` steps under autograd, never stopping on data; finished elements keep their value."""
    return report(advance(solver, function, before_first(z), 0, max_steps))


def size(z: Tensor) -> Tensor:
    """Euclidean norm of each event."""
    return norm(z)
