"""Solving a lower problem to a gradient norm, from a start that may be good enough already."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._solution import Status
from difflayers.implicit import LBFGS
from difflayers.implicit._iterate import size


class Descent(NamedTuple):
    """Where a solve ended.

    ``rounded`` says that rounding stopped it above the tolerance, where it counts as converged.
    """

    y: Tensor
    gradient: float
    status: Status
    steps: int
    stiffness: float = 0.0
    rounded: bool = False


def descend(
    solver: LBFGS, function: Callable[[Tensor], Tensor], y: Tensor, tolerance: float, stiffness: float
) -> Descent:
    """Runs to ``|gradient| <= tolerance``; a start within it takes one evaluation.

    Args:
        solver: Its tolerances are not used.
        function: Of the flat unknown.
        y: Start.
        tolerance: Of the gradient.
        stiffness: Curvature that the first trial is as long as; 0 leaves that to the solver.
    """
    state = solver.start(function, y)
    if stiffness > 0:
        state = state._replace(t=torch.full_like(state.t, 1 / stiffness))
    gradient, steps = float(size(state.g)), 0
    while not gradient <= tolerance:
        if steps == solver.max_steps:
            return Descent(y, gradient, Status.MAX_STEPS, steps)
        step = solver.step(function, y, state, steps)
        y, state, steps = step.z, step.state, steps + 1
        gradient = float(size(state.g))
        if not math.isfinite(gradient):
            return Descent(y, gradient, Status.DIVERGED, steps)
        if gradient > tolerance:
            # a step below the rounding of y reports no error; a line search without trials left stops at MAX_STEPS
            status = Status(int(step.status)) if step.status is not None else Status.CONVERGED
            if status > Status.MAX_STEPS:
                return Descent(y, gradient, status, steps)
            if status == Status.MAX_STEPS or float(step.error) == 0:
                return Descent(y, gradient, Status.CONVERGED, steps, stiffness, rounded=True)
    last = float(state.stiffness)
    return Descent(y, gradient, Status.CONVERGED, steps, last if 0 < last < math.inf else stiffness)
