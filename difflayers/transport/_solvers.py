"""The solvers of entropic transport that iterate, on the kernel or in the logarithm, and finish by Newton's method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from difflayers._checks import check_options, default_rtol
from difflayers._solution import Info

from ._dual_newton import dual_newton, staged_newton
from ._iteration import Problem, judged, plan_of, rounding, start, sums_error
from ._kernel_sinkhorn import kernel_sinkhorn
from ._log_sinkhorn import log_sinkhorn, soft_minimum
from ._schur import DENSE_LIMIT

_WARM = 10  # steps of Newton's method from an earlier solution, before it is given up
_EASY = 500  # iterations after which Newton's method is tried anyway
Start = tuple[Tensor, Tensor]
Iteration = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


class TransportSolver(Protocol):
    """Finds potentials of one flat batch; no gradient is asked of it. A frozen dataclass."""

    def __hash__(self) -> int: ...

    def solve(self, problem: Problem, init: Start | None) -> tuple[Tensor, Tensor, Info]:
        """``(f, g, info)``; the residual of `info` is the L1 error of the sums, relative to the mass."""


@dataclass(frozen=True, kw_only=True)
class _Sinkhorn:
    """Options of both.

    Args:
        rtol: L1 error of the sums of the plan, relative to its mass. None: 1e-10 in float64, 1e-5 in float32. Below
            what rounding of the potentials allows, that is what is asked for.
        max_steps: Iterations; those of Newton's method, and of a second attempt, are counted beside them.
        check_every: Iterations between looks at the error.
        scaling: Whether an eps far below the range of the cost is reached in stages.
        newton_steps: Steps of Newton's method, from an error of 1e-2 on where it is quicker. Where they fail, Newton's
            method follows the solution from a large eps to the wanted one, with as many steps for each; where that
            fails, the iteration goes on alone. 0: only the iteration.
    """

    rtol: float | None = None
    max_steps: int = 10_000
    check_every: int = 10
    scaling: bool = True
    newton_steps: int = 100

    def __post_init__(self) -> None:
        check_options(self, max_steps=1, check_every=1, newton_steps=0)

    def _solve(self, problem: Problem, init: Start | None, iterate: Iteration) -> tuple[Tensor, Tensor, Info]:
        """The iteration and Newton's method; where that fails, Newton's method in stages; then the iteration alone."""
        begin = start(problem)
        tol = rounding(problem, *begin).clamp(min=default_rtol(self.rtol, problem.cost.dtype))
        state = _State(problem, begin if init is None else init)
        staged = self.scaling and (init is None or self.newton_steps > 0)
        all_steps, few = self.max_steps, min(self.max_steps, _EASY)
        if self.newton_steps and init is not None:
            state.improve(lambda p, f, g, i: dual_newton(p, f, g, tol[i], max_steps=min(self.newton_steps, _WARM)))
            state.narrow(tol, begin)
        if self.newton_steps:
            # what four steps of Newton's method take, in steps on the kernel
            wait = 100 + problem.b.shape[-1]
            state.improve(lambda p, f, g, i: self._iterate(iterate, p, f, g, tol[i], few, staged, wait))
            state.narrow(tol)
            state.improve(lambda p, f, g, i: dual_newton(p, f, g, tol[i], max_steps=self.newton_steps))
            state.narrow(tol)
            if staged and state.index.numel() and problem.b.shape[-1] <= DENSE_LIMIT:
                state.improve(lambda p, f, g, i: staged_newton(p, tol[i], max_steps=self.newton_steps))
            state.narrow(tol)
        if (not self.newton_steps or all_steps > few) and state.index.numel():
            staged = staged and not self.newton_steps
            state.improve(lambda p, f, g, i: self._iterate(iterate, p, f, g, tol[i], all_steps, staged))
        status = judged(problem, state.f, state.g, state.error, tol)
        return state.f, state.g, Info(status, state.steps, state.error)

    def _iterate(
        self,
        iterate: Iteration,
        p: Problem,
        f: Tensor,
        g: Tensor,
        goal: Tensor,
        max_steps: int,
        scaling: bool,
        patience: float = math.inf,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        options: dict[str, Any] = {"max_steps": max_steps, "check_every": self.check_every, "patience": patience}
        f, g, _, steps, broken = iterate(p, f, g, goal, scaling=scaling, **options)
        if bool(broken.any()):  # left the range of the kernel
            some = p.pick(broken), f[broken], g[broken], goal[broken]
            slow = log_sinkhorn(*some, scaling=False, **options)
            f[broken], g[broken] = slow[:2]
            steps[broken] += slow[3]
        # of both sides, at the wanted eps, from the potentials alone: nothing that a caller could not measure
        error = sums_error(p, f, g, plan_of(p, f, g))
        lost = ~(error < 1)  # stopped at a larger eps, whose potentials are none for this one
        if bool(lost.any()):
            q = p.pick(lost)
            f[lost] = soft_minimum(q, g[lost], q.eps, rows=True)
            g[lost] = soft_minimum(q, f[lost], q.eps, rows=False)
            error[lost] = sums_error(q, f[lost], g[lost], plan_of(q, f[lost], g[lost]))
        return f, g, error, steps


class _State:
    """The best potentials so far of every element, and those that are still to be improved."""

    def __init__(self, problem: Problem, found: Start) -> None:
        self.problem, (self.f, self.g) = problem, (t.clone() for t in found)
        self.error = torch.full_like(problem.eps, torch.inf)
        self.steps = torch.zeros_like(problem.eps, dtype=torch.int64)
        self.index = torch.arange(self.error.shape[0], device=self.error.device)

    def improve(self, way: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
        """Takes what `way` finds where it is better."""
        every = self.index.numel() == self.error.numel()  # spares a copy of the costs
        problem = self.problem if every else self.problem.pick(self.index)
        f, g, error, steps = way(problem, self.f[self.index], self.g[self.index], self.index)
        self.steps[self.index] += steps
        better = ~(error >= self.error[self.index])  # NaN is new too, in an element where nothing else is
        at = self.index[better]
        self.f[at], self.g[at], self.error[at] = f[better], g[better], error[better]

    def narrow(self, tol: Tensor, again: Start | None = None) -> None:
        """Leaves out what is solved, and what is not a number; the rest starts anew where `again` says so."""
        tol = torch.maximum(tol, rounding(self.problem, self.f, self.g))[self.index]
        error = self.error[self.index]
        rest = error > tol if again is None else ~(error <= tol)
        self.index = self.index[rest & (torch.isfinite(error) | (again is not None))]
        if again is not None:
            self.f[self.index], self.g[self.index] = again[0][self.index], again[1][self.index]
            self.error[self.index] = torch.inf


@dataclass(frozen=True, kw_only=True)
class KernelSinkhorn(_Sinkhorn):
    __doc__ = (_Sinkhorn.__doc__ or "").replace("Options of both.", "Iterates on the exponential kernel: the default.")

    def solve(self, problem: Problem, init: Start | None) -> tuple[Tensor, Tensor, Info]:
        """See :class:`TransportSolver`."""
        return self._solve(problem, init, kernel_sinkhorn)


@dataclass(frozen=True, kw_only=True)
class LogSinkhorn(_Sinkhorn):
    __doc__ = (_Sinkhorn.__doc__ or "").replace(
        "Options of both.", "Iterates in the logarithm: slower, without limits."
    )

    def solve(self, problem: Problem, init: Start | None) -> tuple[Tensor, Tensor, Info]:
        """See :class:`TransportSolver`."""
        return self._solve(problem, init, log_sinkhorn)
