r"""F2SA: the hypergradient from gradients alone, by a penalty that grows.

With two lower variables, y near the minimiser of :math:`F + \lambda f` and z near that of f,

.. math:: \nabla_x F(x, y) + \lambda\,(\nabla_x f(x, y) - \nabla_x f(x, z)) \to \nabla \Phi(x)

as :math:`\lambda \to \infty`, with an error proportional to :math:`1 / \lambda`.
"""

from __future__ import annotations

from typing import Any

from ._evaluation import Evaluation
from ._method import Seen
from ._options import check_number
from ._problem import Bilevel
from ._schedules import Constant, Power, Schedule, as_schedule
from ._twin import TwinMethod


class F2SA(TwinMethod):
    r"""Fully first-order method with two lower variables and a growing multiplier.

    Solves ``min_x upper(x, y*(x))`` for a strongly convex lower objective, by gradients alone. In step k, `inner_steps`
    times ``z -= gamma grad_y f(x, z)`` and ``y -= alpha (grad_y F + lambda grad_y f)(x, y)``, then
    ``x -= ratio alpha [grad_x F(x, y) + lambda (grad_x f(x, y) - grad_x f(x, z))]``.

    The minimiser for the last lambda is approached: its hypergradient is off by a constant divided by lambda, and the
    upper objective may be *below* the optimum.

    Args:
        problem: The problem; of its optional parts `project_upper`.
        x: Upper variables: tensor, pytree of tensors, or module.
        y: Lower variables; start of z too.
        step: alpha, of y and x. Below ``2 / (L_F + lambda L_f)``, so it has to fall as lambda grows.
        step_lower: gamma, of z; below ``2 / L_f``.
        multiplier: lambda. None: ``gamma / (2 alpha)``.
        ratio: Of the step of x to that of y.
        inner_steps: Steps of z and y for each of x.
        momentum: None, or the weight of the new direction, in (0, 1]: variance-reduced directions for noisy batches
            (F3SA), at twice the gradients.

    ``infeasibility`` is ``f(x, y) - f(x, z)``.

    Raises:
        ValueError: For bad input, naming the argument.

    Differentiable in nothing.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import F2SA, Bilevel
        >>> problem = Bilevel(
        ...     upper=lambda x, y, batch: (y - 1).square().sum() / 2,
        ...     lower=lambda x, y, batch: (y - 2 * x).square().sum() / 2,
        ... )
        >>> algo = F2SA(problem, torch.zeros(1), torch.zeros(1))
        >>> for _ in range(300):
        ...     stats = algo.step()
        >>> algo.x
        tensor([0.5000])

    Source: J. Kwon, D. Kwon, S. Wright, R. Nowak, A Fully First-Order Method for Stochastic Bilevel Optimization, 2023,
    algorithm 1, with momentum algorithm 2. The exponents of (step, step_lower) are there: no noise (-1/3, 0), the
    default; noise in the upper gradients (-3/5, -2/5); in both (-5/7, -4/7).

    Departure: lambda is a function of the step, in place of a sum of increments; the default factors suit objectives
    with curvature of about one.
    """

    def __init__(
        self,
        problem: Bilevel,
        x: Any,
        y: Any,
        *,
        step: float | Schedule = Power(0.25, -1 / 3),
        step_lower: float | Schedule = Constant(0.5),
        multiplier: float | Schedule | None = None,
        ratio: float = 1.0,
        inner_steps: int = 1,
        momentum: float | Schedule | None = None,
    ) -> None:
        super().__init__(problem, x, y, inner_steps=inner_steps, momentum=momentum)
        self.alpha, self.gamma = as_schedule("step", step), as_schedule("step_lower", step_lower)
        self.multiplier = None if multiplier is None else as_schedule("multiplier", multiplier)
        self.ratio = check_number("ratio", ratio)

    def _update(self, at: Evaluation, k: int) -> Seen:
        alpha, gamma = self.alpha(k), self.gamma(k)
        weight = gamma / (2 * alpha) if self.multiplier is None else self.multiplier(k)
        return self._twin_step(at, k, self.ratio * alpha, alpha, gamma, weight)
