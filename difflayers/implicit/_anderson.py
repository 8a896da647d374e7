r"""Anderson acceleration of a fixed-point iteration.

With residuals :math:`g_i = T(z_i) - z_i` of the last m iterates,

.. math:: \min_{\sum\alpha_i = 1} \Big\|\sum_i \alpha_i g_i\Big\|^2, \qquad z^+ = \sum_i \alpha_i (z_i + \beta g_i).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._iterate import Function, IterativeSolver, Step, size


@dataclass(frozen=True, kw_only=True)
class Anderson(IterativeSolver):
    """Anderson acceleration; the default for :func:`fixed_point`.

    Stops at ``||T(z) - z|| <= atol + rtol ||T(z)||`` and returns the iterate that was measured; a starved element
    returns the best one it saw.

    Args:
        window: Number of iterates that are mixed.
        damping: The factor beta of the residual part, in (0, 1].

    Source: D. G. Anderson, Iterative procedures for nonlinear integral equations, 1965; H. Walker, P. Ni, 2011.
    Departure: residuals are scaled to unit length before the normal equations, so that the ridge is relative to each of
    them. A ridge relative to the largest stalls once the newest residual is small.
    """

    max_steps: int = 200
    window: int = 6
    damping: float = 1.0

    finds: ClassVar[str] = "fixed_point"
    keeps_best: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window: expected at least 1, got {self.window}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping: expected a number in (0, 1], got {self.damping}")

    def step(self, function: Function, z: Tensor, state: Any, k: int) -> Step:
        """One evaluation of the update and one mixing."""
        new = function(z)
        move = new - z
        target = new if self.damping == 1.0 else z + self.damping * move
        error = size(move.detach())  # scales and stops, and so is not differentiated: a norm has no derivative at zero
        tiny = torch.finfo(z.dtype).tiny
        unit = (move / error.clamp_min(tiny).unsqueeze(-1)).unsqueeze(-2)
        if k == 0 or self.window == 1:
            gram = unit @ unit.mT
            return Step(target, (unit, target.unsqueeze(-2), error.unsqueeze(-1), gram), z, error, size(new.detach()))
        units, targets, sizes, gram = state
        if units.shape[-2] == self.window:
            units, targets, sizes = units[..., 1:, :], targets[..., 1:, :], sizes[..., 1:]
            gram = gram[..., 1:, 1:]
        units, targets = torch.cat([units, unit], -2), torch.cat([targets, target.unsqueeze(-2)], -2)
        sizes = torch.cat([sizes, error.unsqueeze(-1)], -1)
        row = unit @ units.mT  # the only new row of the Gram matrix
        gram = torch.cat([torch.cat([gram, row[..., :-1]], -2), row.mT], -1)
        ridge = torch.eye(gram.shape[-1], dtype=z.dtype, device=z.device) * (100 * torch.finfo(z.dtype).eps)
        factor, _ = torch.linalg.cholesky_ex(gram + ridge)
        # the constraint in scaled variables; a residual of nothing counts as one rounding unit of the newest
        newest = error.clamp_min(tiny).unsqueeze(-1)
        weight = newest / torch.maximum(sizes, newest * torch.finfo(z.dtype).eps).clamp_min(tiny)
        alpha = torch.cholesky_solve(weight.unsqueeze(-1), factor).squeeze(-1) * weight
        alpha = alpha / alpha.sum(-1, keepdim=True)
        mixed = (alpha.unsqueeze(-2) @ targets).squeeze(-2)
        return Step(mixed, (units, targets, sizes, gram), z, error, size(new.detach()))
