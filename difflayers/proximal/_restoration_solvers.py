r"""Plug-and-play iterations: a data term and a prox take turns.

With :math:`h = \tfrac12 \|A x - b\|^2` and a map f that is the prox of R, proximal gradients and ADMM look for
critical points of :math:`\eta h + R`; eta is the step, or one over the penalty. With u the point at which f is
evaluated last, the result is f(u), and

.. math:: u = f(u) - \eta A^T (A f(u) - b).

Half-quadratic splitting solves a smoothed problem, with :math:`A u` in the place of :math:`A f(u)`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from difflayers._checks import default_rtol
from difflayers._solution import Info, Status
from difflayers.linalg import CG, LinearSolver
from difflayers.linalg._operator import OperatorSystem
from difflayers.linalg._system import expand_mask

_RUNAWAY = 1e6  # a step that is so much longer than the first one is not on its way to anything
_MARGIN = 0.9  # of the longest step that is allowed, since power iteration finds the norm from below


def dot(a: Tensor, b: Tensor, event_ndim: int) -> Tensor:
    """The scalar product of every element."""
    product = a * b
    return product.flatten(product.ndim - event_ndim).sum(-1) if event_ndim else product


class Task(NamedTuple):
    """What a solver works on: plain tensors, each element alone.

    Attributes:
        gradient: ``x -> (h(x), A^T (A x - b))``.
        normal: ``x -> A^T A x``.
        adjoint: ``A^T b``.
        prox: ``u -> (f(u), R(f(u)))``, the latter None where it is not known.
        eta: ``(*batch)`` factor of the data term.
        event_ndim: Trailing dimensions of one element.
    """

    gradient: Callable[[Tensor], tuple[Tensor, Tensor]]
    normal: Callable[[Tensor], Tensor]
    adjoint: Tensor
    prox: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    eta: Tensor
    event_ndim: int

    def squared(self, x: Tensor) -> Tensor:
        """Squared norm of every element."""
        return dot(x, x, self.event_ndim)

    def wide(self, t: Tensor) -> Tensor:
        """One number for each element, to meet x."""
        return expand_mask(t, self.event_ndim)

    def regularised(self, solver: LinearSolver) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """``(z, init) -> argmin_x eta h(x) + 1/2 ||x - z||^2`` and where it was found accurately."""
        k, shape = self.event_ndim, self.adjoint.shape
        flat = (*shape[: len(shape) - k], -1)

        def matvec(_: tuple[Tensor, ...], v: Tensor) -> Tensor:
            x = v.reshape(*v.shape[:-1], *shape[len(shape) - k :])
            return (x + self.wide(self.eta) * self.normal(x)).reshape(v.shape)

        system = OperatorSystem(solver, (), symmetric=True, matvec=matvec)
        factors = solver.factor(system, (), self.adjoint.reshape(flat))

        def solve(z: Tensor, init: Tensor) -> tuple[Tensor, Tensor]:
            rhs = (z + self.wide(self.eta) * self.adjoint).reshape(flat)
            x, info = solver.solve(system, (), factors, rhs, False, init.reshape(flat))
            return x.reshape(shape), info.status == Status.CONVERGED

        return solve


class Iterate(NamedTuple):
    """What a step returns; `state` goes into the next one."""

    state: tuple[Tensor, ...]
    u: Tensor
    z: Tensor
    change: Tensor
    objective: Tensor | None
    accurate: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class RestorationSolver(ABC):
    """A plug-and-play iteration.

    Args:
        rtol: An element stops once it moves by at most `rtol` of its norm in a step. None: 1e-10 in float64, 1e-5 in
            float32.
        max_steps: Largest number of steps.
    """

    rtol: float | None = None
    max_steps: int = 1000

    smoothed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rtol is not None and not self.rtol >= 0:
            raise ValueError(f"rtol: expected None or a number of at least 0, got {self.rtol}")
        if self.max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1, got {self.max_steps}")

    @abstractmethod
    def eta(self, norm: Tensor) -> Tensor:
        """The factor of the data term for each element, given the norm of ``A^T A``."""

    def condition(self) -> str | None:
        """The condition under which convergence is proven, in words; None where there is none to break."""
        return None

    @abstractmethod
    def start(self, task: Task, x: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """The first state, and what is made once."""

    @abstractmethod
    def advance(self, task: Task, state: tuple[Tensor, ...], made: Any) -> Iterate:
        """One step."""

    def run(self, task: Task, x: Tensor) -> tuple[Tensor, Info, Tensor, Tensor | None]:
        """The point where the prox was evaluated last, the report, and traces ``(steps, *batch)``."""
        batch = x.shape[: x.ndim - task.event_ndim]
        active = torch.ones(batch, dtype=torch.bool, device=x.device)
        steps = torch.zeros(batch, dtype=torch.int64, device=x.device)
        state, made, rtol = *self.start(task, x), default_rtol(self.rtol, x.dtype)
        u, change, accurate = x, x.new_zeros(batch), active
        changes: list[Tensor] = []
        objectives: list[Tensor] = []
        for _ in range(self.max_steps):
            new = self.advance(task, state, made)
            keep = task.wide(active)  # an element that has stopped keeps its values
            state = tuple(torch.where(keep, n, o) for n, o in zip(new.state, state, strict=True))
            u, change = torch.where(keep, new.u, u), torch.where(active, new.change, change)
            accurate = accurate if new.accurate is None else torch.where(active, new.accurate, accurate)
            if new.objective is not None:
                objectives.append(torch.where(active, new.objective, objectives[-1]) if objectives else new.objective)
            changes.append(change)
            steps = steps + active
            active = active & (change > rtol * task.squared(new.z).sqrt())  # a NaN ends its element
            if not bool(active.any()):  # the one read-back of a step
                break
        status = torch.where(active | ~accurate, int(Status.MAX_STEPS), int(Status.CONVERGED))
        lost = ~torch.isfinite(change) | (change > _RUNAWAY * changes[0])
        status = torch.where(lost, int(Status.DIVERGED), status)
        trace = torch.stack(objectives) if objectives else None
        return u, Info(status, steps, change), torch.stack(changes), trace


def _objective(task: Task, h: Tensor, R: Tensor | None) -> Tensor | None:
    return None if R is None else task.eta * h + R


@dataclass(frozen=True, kw_only=True)
class ProximalGradient(RestorationSolver):
    """Proximal gradients, ``x <- f(x - step * A^T (A x - b))``; the objective falls in every step.

    The map f ignores the step, so the limit is a critical point of ``step * 1/2 ||A x - b||^2 + R``.

    Args:
        rtol: An element stops once it moves by at most `rtol` of its norm in a step. None: 1e-10 in float64, 1e-5 in
            float32.
        max_steps: Largest number of steps.
        step: Below ``1 / ||A^T A||``, where convergence is proven; a longer one is used with a warning. None: 0.9 of
            that bound, for each element.

    Source: Z. Fang, S. Buchanan, J. Sulam, What's in a Prior? Learned Proximal Networks for Inverse Problems, ICLR
    2024, section 4.
    """

    step: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step is not None and not 0 < self.step < math.inf:
            raise ValueError(f"step: expected None or a positive number, got {self.step}")

    def eta(self, norm: Tensor) -> Tensor:
        """The step."""
        return torch.full_like(norm, self.step) if self.step is not None else _longest(norm)

    def condition(self) -> str | None:
        """What to say of a step that is too long."""
        return None if self.step is None else f"step={self.step:g}: expected less than 1 / ||A^T A||"

    def start(self, task: Task, x: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """The start, and the gradient there."""
        return (x, task.gradient(x)[1]), None

    def advance(self, task: Task, state: tuple[Tensor, ...], made: Any) -> Iterate:
        """One gradient step and one prox."""
        x, gradient = state
        u = x - task.wide(task.eta) * gradient
        z, R = task.prox(u)
        h, gradient = task.gradient(z)
        return Iterate((z, gradient), u, z, task.squared(z - x).sqrt(), _objective(task, h, R))


@dataclass(frozen=True, kw_only=True)
class _Splitting(RestorationSolver):
    """Iterations with a penalty, of which every step solves a linear system."""

    penalty: float | None = None
    linear_solver: LinearSolver = CG(max_steps=100)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty is not None and not 0 < self.penalty < math.inf:
            raise ValueError(f"penalty: expected None or a positive number, got {self.penalty}")

    def eta(self, norm: Tensor) -> Tensor:
        """One over the penalty."""
        return torch.full_like(norm, 1 / self.penalty) if self.penalty is not None else _longest(norm)


@dataclass(frozen=True, kw_only=True)
class ADMM(_Splitting):
    """Alternating directions: ``x = argmin h + penalty/2 ||x - z + q||^2``, ``q <- q + x - z``, ``z = f(x + q)``.

    The limit is a critical point of ``1/2 ||A x - b||^2 + penalty * R``.

    Args:
        rtol: An element stops once it moves by at most `rtol` of its norm in a step. None: 1e-10 in float64, 1e-5 in
            float32.
        max_steps: Largest number of steps.
        penalty: Above ``||A^T A||``, where convergence is proven; a smaller one is used with a warning. None: that
            bound over 0.9, for each element.
        linear_solver: For the step in x; the scalar products of CG are those of one element.

    Source: Z. Fang, S. Buchanan, J. Sulam, What's in a Prior? Learned Proximal Networks for Inverse Problems, ICLR
    2024, section 4.
    """

    def condition(self) -> str | None:
        """What to say of a penalty that is too small."""
        return None if self.penalty is None else f"penalty={self.penalty:g}: expected more than ||A^T A||"

    def start(self, task: Task, x: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """``x = z`` and ``q = 0``."""
        return (x, x, torch.zeros_like(x)), task.regularised(self.linear_solver)

    def advance(self, task: Task, state: tuple[Tensor, ...], made: Any) -> Iterate:
        """The three updates in the order of the published code."""
        x, z, q = state
        x, accurate = made(z - q, x)
        q = q + x - z
        u = x + q
        z_new, R = task.prox(u)
        change = (task.squared(z_new - z) + task.squared(x - z_new)).sqrt()
        objective = None if R is None else _objective(task, task.gradient(z_new)[0], R)
        return Iterate((x, z_new, q), u, z_new, change, objective, accurate)


@dataclass(frozen=True, kw_only=True)
class HQS(_Splitting):
    """Half-quadratic splitting: ``x = argmin h + penalty/2 ||x - z||^2`` and ``z = f(x)``, in turns.

    Minimises ``1/2 ||A x - b||^2 + penalty * (1/2 ||x - z||^2 + R(z))`` over x and z for any positive penalty; every
    step lowers it.

    Args:
        rtol: An element stops once it moves by at most `rtol` of its norm in a step. None: 1e-10 in float64, 1e-5 in
            float32.
        max_steps: Largest number of steps.
        penalty: Positive; a large one keeps x near z. None: the default of :class:`ADMM`.
        linear_solver: For the step in x; the scalar products of CG are those of one element.

    Source: D. Geman, C. Yang, Nonlinear image recovery with half-quadratic regularization, 1995.
    """

    smoothed: ClassVar[bool] = True

    def start(self, task: Task, x: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """``z = x``."""
        return (x, x), task.regularised(self.linear_solver)

    def advance(self, task: Task, state: tuple[Tensor, ...], made: Any) -> Iterate:
        """Both minimisations."""
        x, z = state
        x, accurate = made(z, x)
        z_new, R = task.prox(x)
        objective = None
        if R is not None:
            objective = task.eta * task.gradient(x)[0] + task.squared(x - z_new) / 2 + R
        return Iterate((x, z_new), x, z_new, task.squared(z_new - z).sqrt(), objective, accurate)


def _longest(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, _MARGIN / torch.where(norm > 0, norm, 1), 1)
