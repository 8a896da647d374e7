"""The solver of entropic transport at small eps: few steps of Sinkhorn, then Newton's with the entries that matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difflayers._checks import check_options, default_rtol
from difflayers._solution import Info, Status

from ._iteration import HANDOVER, Problem, judged, plan_of, rounding, start, sums_error
from ._kernel_sinkhorn import kernel_sinkhorn
from ._solvers import KernelSinkhorn, Start, _State
from ._sparse_steps import sparse_newton

_WARM = 10  # steps from an earlier solution, before it is given up
# Newton's method comes close from a smaller error than the first within as many steps as the second, or hardly ever
_REACH, _PATIENCE = 0.1, 10
_STAGES = 24  # values of eps on the way to the wanted one, at most


@dataclass(frozen=True, kw_only=True)
class SparseNewton:
    """Few iterations on the exponential kernel, then Newton's method with the large entries of the plan.

    For small eps, where a plan has few entries that matter and Sinkhorn's iteration hardly moves. The cut adapts: an
    element whose error does not halve in two steps keeps twice as many entries, and in the end all. All are kept from
    the start where nothing is to be saved: shorter sides up to 128, and plans with many entries that matter.

    Args:
        rtol: L1 error of the sums of the plan, relative to its mass. None: 1e-10 in float64, 1e-5 in float32. Below
            what rounding of the potentials allows, that is what is asked for.
        max_steps: Steps of Newton's method, for each value of eps on the way.
        sinkhorn_steps: Iterations before them.
        scaling: Whether elements that fail are tried again with an eps that is halved from the range of the cost on.
        fallback: Whether :class:`KernelSinkhorn` takes over what fails still.

    Example:
        >>> import torch
        >>> from difflayers.transport import SparseNewton, sinkhorn_ex
        >>> cost = torch.rand(200, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> found = sinkhorn_ex(cost, eps=1e-3, solver=SparseNewton())
        >>> int(found.steps) < 60, float(found.residual) < 1e-9
        (True, True)

    Source: X. Tang et al., Accelerating Sinkhorn Algorithm with Sparse Newton Iterations, 2024, algorithm 1.
    Departure: entries are kept by their share of the largest in their row or column, with a threshold that adapts,
    instead of a fixed number of them, which stagnates on some problems; steps are accepted by the error of the sums
    too, since rounding hides the growth of the dual near the solution; conjugate gradients on the Schur complement.
    """

    rtol: float | None = None
    max_steps: int = 100
    sinkhorn_steps: int = 20
    scaling: bool = True
    fallback: bool = True

    def __post_init__(self) -> None:
        check_options(self, max_steps=1, sinkhorn_steps=0)

    def solve(self, problem: Problem, init: Start | None) -> tuple[Tensor, Tensor, Info]:
        """See :class:`TransportSolver`."""
        begin = start(problem)
        tol = rounding(problem, *begin).clamp(min=default_rtol(self.rtol, problem.cost.dtype))
        state = _State(problem, begin if init is None else init)
        if init is not None:
            few = min(self.max_steps, _WARM)
            state.improve(lambda p, f, g, i: sparse_newton(p, f, g, tol[i], max_steps=few))
            state.narrow(tol, begin)
        state.improve(lambda p, f, g, i: self._near(p, f, g, tol[i], picky=self.scaling))
        state.narrow(tol)
        if self.scaling and state.index.numel():
            state.improve(lambda p, f, g, i: self._staged(p, tol[i]))
            state.narrow(tol)
        if self.fallback and state.index.numel():
            state.improve(lambda p, f, g, i: self._otherwise(p))
        status = judged(problem, state.f, state.g, state.error, tol)
        status = torch.where(torch.isfinite(problem.eps), status, int(Status.DIVERGED))
        return state.f, state.g, Info(status, state.steps, state.error)

    def _near(
        self, p: Problem, f: Tensor, g: Tensor, goal: Tensor, *, picky: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both iterations, at one eps; the second for all elements, or where it promises something."""
        options: dict[str, Any] = {"reach": _REACH, "patience": _PATIENCE} if picky else {}
        before = torch.zeros(goal.shape, dtype=torch.int64, device=goal.device)
        if self.sinkhorn_steps:
            many = self.sinkhorn_steps
            f, g, _, before, _ = kernel_sinkhorn(p, f, g, goal, max_steps=many, check_every=many, scaling=False)
        f, g, error, steps = sparse_newton(p, f, g, goal, max_steps=self.max_steps, **options)
        return f, g, error, before + steps

    def _staged(self, problem: Problem, tol: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From nothing: eps is halved from the range of the costs on."""
        f, g = start(problem)
        cost = problem.cost
        wide = torch.where(torch.isposinf(cost), -torch.inf, cost).amax((-2, -1)) - cost.amin((-2, -1))
        # all of the range: parts of the plan may be far from each other, and a stage too many costs little
        eps = torch.maximum(torch.minimum(wide, 2**_STAGES * problem.eps), problem.eps)
        error = torch.full_like(tol, torch.inf)
        steps = torch.zeros(tol.shape, dtype=torch.int64, device=tol.device)
        index = torch.isfinite(eps).nonzero().squeeze(-1)
        while index.numel():
            last = eps[index] <= problem.eps[index]
            now = problem.pick(index)._replace(eps=eps[index])
            goal = torch.where(last, tol[index], HANDOVER)
            f[index], g[index], error[index], more = self._near(now, f[index], g[index], goal)
            steps[index] += more
            eps = torch.maximum(eps / 2, problem.eps)
            index = index[~last & torch.isfinite(error[index])]
        return f, g, torch.where(torch.isfinite(error), error, torch.inf), steps

    def _otherwise(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        f, g, info = KernelSinkhorn(rtol=self.rtol).solve(problem, None)
        return f, g, sums_error(problem, f, g, plan_of(problem, f, g)), info.steps
