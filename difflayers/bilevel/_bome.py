r"""BOME: descend the upper objective as far as the lower gap keeps falling.

With :math:`q(x, y) = f(x, y) - f(x, \hat y)`, where :math:`\hat y` is y after a few gradient steps, held constant, both
variables move along :math:`\nabla F + \lambda \nabla q` with the smallest :math:`\lambda \ge 0` for which
:math:`\langle \nabla F + \lambda \nabla q, \nabla q \rangle \ge \phi`.
"""

from __future__ import annotations

from typing import Any

import torch

from ._evaluation import Evaluation
from ._method import Method, Seen, norm
from ._options import check_count, check_number
from ._problem import Bilevel
from ._schedules import Constant, Schedule, as_schedule


class BOME(Method):
    r"""Dynamic barrier method on the lower gap, by gradients alone.

    Solves ``min_{x, y} upper(x, y)`` over the lower solutions, also where these are not unique. With ``T`` gradient
    steps from y to ``y'`` and ``grad q = (grad_x f(x, y) - grad_x f(x, y'), grad_y f(x, y))``, both variables move
    along ``grad F + lambda grad q`` with ``lambda = max(0, (phi - <grad F, grad q>) / |grad q|^2)``, 0 where ``grad q``
    is.

    The multiplier adapts, so that there is no penalty and no bias of one. Two others remain: a constant step leaves the
    iterates in a neighbourhood of the optimum whose radius is a multiple of it, and too few gradient steps bias the
    result by about the fraction of the way to the lower solution that they leave, ``(1 - step_lower mu)^T`` for a
    mu-strongly convex f.

    Args:
        problem: The problem; of its optional parts `project_upper`.
        x: Upper variables: tensor, pytree of tensors, or module.
        y: Lower variables.
        step: Of x and y.
        step_lower: Of the gradient steps to ``y'``; below ``2 / L_f``.
        inner_steps: T.
        control: eta; ``phi = eta |grad q|^2``.
        by_value: ``phi = eta q`` instead.
        ratio: Of the step of x to that of y, where gradients in x are of another size altogether. This is the method
            in the variable ``x / sqrt(ratio)``: products of directions are those of that variable.

    ``infeasibility`` is q, ``f(x, y) - f(x, y')``.

    Raises:
        ValueError: For bad input, naming the argument.

    Differentiable in nothing.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import BOME, Bilevel, Power
        >>> problem = Bilevel(
        ...     upper=lambda x, y, batch: (y - 1).square().sum() / 2,
        ...     lower=lambda x, y, batch: (y - 2 * x).square().sum() / 2,
        ... )
        >>> algo = BOME(problem, torch.zeros(1), torch.zeros(1))
        >>> for _ in range(1000):
        ...     stats = algo.step()
        >>> algo.x
        tensor([0.5000])

    Source: B. Liu, M. Ye, S. Wright, P. Stone, Q. Liu, BOME! Bilevel Optimization Made Easy: A Simple First-Order
    Approach, 2022, algorithm 1.
    """

    def __init__(
        self,
        problem: Bilevel,
        x: Any,
        y: Any,
        *,
        step: float | Schedule = Constant(0.05),
        step_lower: float | Schedule = Constant(0.5),
        inner_steps: int = 10,
        control: float | Schedule = Constant(0.5),
        by_value: bool = False,
        ratio: float = 1.0,
    ) -> None:
        super().__init__(problem, x, y)
        self.xi, self.alpha = as_schedule("step", step), as_schedule("step_lower", step_lower)
        self.eta, self.by_value = as_schedule("control", control), by_value
        self.ratio = check_number("ratio", ratio)
        self.inner_steps = check_count("inner_steps", inner_steps)

    def _update(self, at: Evaluation, k: int) -> Seen:
        x, y = self.state["x"], self.state["y"]
        xi, alpha, eta = self.xi(k), self.alpha(k), self.eta(k)
        upper, lower = at.upper(x, y), at.lower(x, y)
        y_hat = y - alpha * lower.y
        for _ in range(self.inner_steps - 1):
            y_hat = y_hat - alpha * at.lower_in_y(x, y_hat)
        rest = at.lower(x, y_hat)
        gap, q_x, q_y = lower.value - rest.value, lower.x - rest.x, lower.y
        square = self.ratio * (q_x * q_x).sum() + (q_y * q_y).sum()
        along = self.ratio * (upper.x * q_x).sum() + (upper.y * q_y).sum()
        bound = eta * (gap if self.by_value else square)
        steep = square > 0
        weight = torch.where(steep, ((bound - along) / torch.where(steep, square, 1)).clamp_min(0), 0)
        x_next = self._onto_upper(x - xi * self.ratio * (upper.x + weight * q_x))
        y_next = y - xi * (upper.y + weight * q_y)
        self.state.update(x=x_next, y=y_next)
        return Seen(upper.value, lower.value, norm((x - x_next) / self.ratio, y - y_next) / xi, gap)
