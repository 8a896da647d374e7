r"""The penalty method with a proximal map of the lower problem.

.. math:: \psi_\sigma(x) = \frac{1}{\sigma} \Big(\min_y [\sigma F(x, y) + f(x, y)] - \min_z f(x, z)\Big)

is within a multiple of :math:`\sigma` of :math:`\Phi`; its gradient is formed from gradients alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ._evaluation import Evaluation
from ._method import Seen
from ._problem import Bilevel
from ._schedules import Constant, Power, Schedule, as_schedule
from ._twin import TwinMethod


class PenaltyMethod(TwinMethod):
    r"""Gradient method on a penalised objective, for lower problems with constraints.

    Solves ``min_{x in X} upper(x, y)`` over the lower solutions ``y`` in Y, where `project_lower` of the problem is the
    projection onto Y (or `prox_lower` the prox of any g of y alone). In step k, `inner_steps` times a proximal gradient
    step of z on f and of y on ``sigma F + f``, then a projected one of x on ``psi_sigma``.

    The minimiser for the last sigma is approached; its value is off by a multiple of sigma, and the upper objective may
    be *below* the optimum.

    Args:
        problem: The problem; of its optional parts `project_upper`, and `project_lower` or `prox_lower`, that may not
            depend on x.
        x: Upper variables: tensor, pytree of tensors, or module.
        y: Lower variables; start of z too.
        weight: sigma.
        step: Of x, below one over the curvature of ``psi_sigma``.
        step_lower: Of y and z, below ``2 / (sigma L_F + L_f)``.
        inner_steps: Steps of z and y for each of x.
        momentum: None, or the weight of the new direction, in (0, 1]: variance-reduced directions for noisy batches, at
            twice the gradients.

    ``infeasibility`` is ``f(x, y) - f(x, z)``.

    Raises:
        ValueError: For bad input, naming the argument.

    Differentiable in nothing.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import Bilevel, PenaltyMethod
        >>> problem = Bilevel(  # y = min(2 x, 1)
        ...     upper=lambda x, y, batch: (y - 3).square().sum() / 2 + x.square().sum() / 2,
        ...     lower=lambda x, y, batch: (y - 2 * x).square().sum() / 2,
        ...     project_lower=lambda y, x: y.clamp(max=1),
        ... )
        >>> algo = PenaltyMethod(problem, torch.zeros(1), torch.zeros(1), weight=0.1, step=0.02)
        >>> for _ in range(500):
        ...     stats = algo.step()
        >>> algo.x, algo.y  # 1/2 up to the bias
        (tensor([0.4878]), tensor([1.]))

    Source: J. Kwon, D. Kwon, S. Wright, R. Nowak, On Penalty Methods for Nonconvex Bilevel Optimization and First-Order
    Stochastic Approximation, 2024, algorithms 1 and 2 (momentum).

    Departure: the default sigma falls as ``(k + 1)^(-1/5)``, which is the rate of algorithm 2; the paper writes its
    steps and inner iterations as functions of constants of the problem, here they are options.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"prox_lower", "project_lower", "project_upper"})

    def __init__(
        self,
        problem: Bilevel,
        x: Any,
        y: Any,
        *,
        weight: float | Schedule = Power(1.0, -1 / 5),
        step: float | Schedule = Constant(0.05),
        step_lower: float | Schedule = Constant(0.5),
        inner_steps: int = 1,
        momentum: float | Schedule | None = None,
    ) -> None:
        super().__init__(problem, x, y, inner_steps=inner_steps, momentum=momentum)
        self.weight = as_schedule("weight", weight)
        self.alpha, self.gamma = as_schedule("step", step), as_schedule("step_lower", step_lower)

    def _update(self, at: Evaluation, k: int) -> Seen:
        sigma, gamma = self.weight(k), self.gamma(k)
        return self._twin_step(at, k, self.alpha(k), gamma * sigma, gamma, 1 / sigma)
