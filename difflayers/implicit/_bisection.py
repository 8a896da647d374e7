"""Bisection for one increasing or decreasing scalar equation per batch element."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from difflayers._solution import Status

from ._iterate import Function, IterativeSolver, Step

_DOUBLINGS = 40  # a bracket of 2**40 times the first width covers 12 orders of magnitude


@dataclass(frozen=True, kw_only=True)
class Bisection(IterativeSolver):
    """Halves a bracket that contains a sign change: slow, and it cannot diverge. For events of one number.

    Stops when the bracket is shorter than ``atol + rtol |z|``. An element without a sign change in its bracket ends
    with ``INFEASIBLE``.

    Args:
        lower: Lower end for every element. None: searched downwards from `init` in doubling steps.
        upper: Upper end for every element. None: searched upwards.
    """

    max_steps: int = 200
    lower: float | None = None
    upper: float | None = None

    finds: ClassVar[str] = "root"
    differentiable: ClassVar[bool] = False  # its iterates depend on signs alone

    def start(self, function: Function, z: Tensor) -> Any:
        """The bracket."""
        if z.shape[-1] != 1:
            raise ValueError(f"init: expected one number per element for Bisection, got {z.shape[-1]}")
        width = z.abs().clamp_min(1.0)
        lower = z - width if self.lower is None else torch.full_like(z, self.lower)
        upper = z + width if self.upper is None else torch.full_like(z, self.upper)
        f_lower, f_upper = function(lower), function(upper)
        if self.lower is None or self.upper is None:
            for _ in range(_DOUBLINGS):
                open_ = f_lower.sign() == f_upper.sign()
                width = width * 2
                if self.lower is None:
                    lower = torch.where(open_, z - width, lower)
                    f_lower = function(lower)
                if self.upper is None:
                    upper = torch.where(open_, z + width, upper)
                    f_upper = function(upper)
        bracketed = f_lower.sign() * f_upper.sign() <= 0
        return lower, upper, f_lower.sign(), bracketed

    def step(self, function: Function, z: Tensor, state: Any, k: int) -> Step:
        """One halving."""
        lower, upper, sign, bracketed = state
        middle = lower + (upper - lower) / 2
        value = function(middle)
        right = value.sign() == sign  # the sign change is to the right of the middle
        lower, upper = torch.where(right, middle, lower), torch.where(right, upper, middle)
        exact = value == 0
        lower, upper = torch.where(exact, middle, lower), torch.where(exact, middle, upper)
        error = (upper - lower).abs() + 0 * value.detach()  # NaN where the function is not a number
        error = torch.where(bracketed, error, math.inf)
        status = torch.where(bracketed, 0, int(Status.INFEASIBLE))
        return Step(
            middle,
            (lower, upper, sign, bracketed),
            middle,
            error.squeeze(-1),
            middle.abs().squeeze(-1),
            status.squeeze(-1),
        )
