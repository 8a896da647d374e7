r"""sl-BAMM: averaging both levels makes the lower problem strongly convex where it is merely convex.

With :math:`\psi = \mu F + (1 - \mu) f` in place of f, and :math:`\mu \to 0`, hypergradients exist although the lower
solution is not unique.
"""

from __future__ import annotations

from typing import Any

import torch

from ._evaluation import Evaluation
from ._method import Method, Seen, norm
from ._options import check_number
from ._problem import Bilevel
from ._schedules import Constant, Power, Schedule, as_schedule


class BAMM(Method):
    r"""Single-loop averaged method of multipliers, for lower problems with more than one solution.

    Solves ``min_{x in X, y} upper(x, y)`` over the lower solutions, f convex and F strongly convex in y. With
    ``psi = mu F + (1 - mu) f``: ``y -= beta grad_y psi``, then at the new y ``v -= eta (H v - grad_y F)``, kept in a
    ball, and ``x -= alpha (grad_x F - J v)`` with the second derivatives H and J of psi; one product with each a step.

    The problem of the last mu is what is solved; the bias vanishes with mu.

    Args:
        problem: The problem; of its optional parts `project_upper`.
        x: Upper variables: tensor, pytree of tensors, or module.
        y: Lower variables.
        mixing: mu, in (0, 1), falling to 0.
        step: alpha, of x.
        step_lower: beta, of y; below ``2 / L_psi``.
        step_adjoint: eta, of v; below ``2 / L_psi``.
        radius: Of the ball of v.

    ``infeasibility`` is ``|grad_y f(x, y)|``.

    Raises:
        ValueError: For bad input, naming the argument.

    Differentiable in nothing.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import BAMM, Bilevel
        >>> problem = Bilevel(  # y = (2 x, anything)
        ...     upper=lambda x, y, batch: (y - 1).square().sum() / 2,
        ...     lower=lambda x, y, batch: (y[0] - 2 * x).square().sum() / 2,
        ... )
        >>> algo = BAMM(problem, torch.zeros(1), torch.zeros(2))
        >>> for _ in range(1000):
        ...     stats = algo.step()
        >>> algo.x, algo.y
        (tensor([0.5000]), tensor([1.0000, 1.0000]))

    Source: R. Liu, Y. Liu, W. Yao, S. Zeng, J. Zhang, Averaged Method of Multipliers for Bi-Level Optimization without
    Lower-Level Strong Convexity, 2023, algorithm 1.

    Departure: the default steps are constant but for mu; the theory lets eta and alpha fall with powers of k and mu,
    such as ``lambda k: 0.1 * (k + 1) ** (-3 * tau / 2) * mu(k) ** 3`` for alpha.
    """

    def __init__(
        self,
        problem: Bilevel,
        x: Any,
        y: Any,
        *,
        mixing: float | Schedule = Power(0.5, -0.25),
        step: float | Schedule = Constant(0.05),
        step_lower: float | Schedule = Constant(0.5),
        step_adjoint: float | Schedule = Constant(0.5),
        radius: float = 1000.0,
    ) -> None:
        super().__init__(problem, x, y)
        self.mu, self.alpha = as_schedule("mixing", mixing), as_schedule("step", step)
        self.beta, self.eta = as_schedule("step_lower", step_lower), as_schedule("step_adjoint", step_adjoint)
        self.radius = check_number("radius", radius, ends="(]")
        self.state["v"] = torch.zeros_like(self.state["y"])

    def _update(self, at: Evaluation, k: int) -> Seen:
        x, y, v = (self.state[name] for name in "xyv")
        mu, alpha = self.mu(k), self.alpha(k)
        y = y - self.beta(k) * (mu * at.upper_in_y(x, y) + (1 - mu) * at.lower_in_y(x, y))
        upper, (lower, lower_y), slope = at.mixed_slope(x, y, mu)
        v = v - self.eta(k) * (slope.pull(v) - upper.y)
        size = norm(v)
        v = v * torch.where(size > self.radius, self.radius / size, 1)
        x_next = self._onto_upper(x - alpha * (upper.x - slope.cross(v)))
        self.state.update(x=x_next, y=y, v=v)
        return Seen(upper.value, lower, norm(x - x_next) / alpha, norm(lower_y))
