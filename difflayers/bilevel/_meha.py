r"""MEHA: the lower problem as one inequality with its Moreau envelope.

.. math:: v_\gamma(x, y) = \min_\theta f(x, \theta) + g(x, \theta) + \tfrac{1}{2 \gamma} \|\theta - y\|^2

is at most :math:`f + g`, with equality at the lower solutions. The method descends
:math:`F / c + f + g - v_\gamma` with the gradients of :math:`v_\gamma` that the envelope theorem gives:
:math:`\nabla_x (f + g)(x, \theta)` and :math:`(y - \theta) / \gamma`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._evaluation import Evaluation
from ._method import Method, Seen, norm
from ._objective import Objective
from ._options import check_number
from ._oracles import _gradient, _joined
from ._problem import Bilevel
from ._schedules import Constant, Power, Schedule, as_schedule


class MEHA(Method):
    r"""Proximal gradient method on the gap to the Moreau envelope, without inner loop and second derivatives.

    Solves ``min_{x in X, y} upper(x, y)`` over the solutions (for a weakly convex f: proximal stationary points) of
    ``min_y f(x, y) + g(x, y)``, where `prox_lower` of the problem is the prox of g (`project_lower`: of a set). Each
    step is one proximal gradient step of theta, of x (with the new theta) and of y (with the new theta and x).

    The lower solution need not be unique and f need not be convex. The penalised problem of the last ``c`` is what is
    solved; infeasibility falls as c grows.

    Args:
        problem: The problem; of its optional parts `project_upper`, and `prox_lower` or `project_lower`.
        x: Upper variables: tensor, pytree of tensors, or module.
        y: Lower variables; start of theta too.
        step: alpha, of x.
        step_lower: beta, of y.
        step_theta: eta, of theta.
        proximal: gamma, of the Moreau envelope; below ``1 / (2 rho)`` for a rho-weakly convex f.
        penalty: c, that grows with an exponent of less than 1/2.
        nonsmooth: None, or ``g(x, y) -> 0-dim tensor`` itself, needed where g depends on x: its gradient in x.

    ``infeasibility`` is ``|y - theta| / gamma``, the norm of the gradient of the envelope.

    Raises:
        ValueError: For bad input, naming the argument.

    Differentiable in nothing.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import MEHA, Bilevel
        >>> problem = Bilevel(
        ...     upper=lambda x, y, batch: (y - 1).square().sum() / 2,
        ...     lower=lambda x, y, batch: (y - 2 * x).square().sum() / 2,
        ... )
        >>> algo = MEHA(problem, torch.zeros(1), torch.zeros(1))
        >>> for _ in range(1000):
        ...     stats = algo.step()
        >>> algo.x
        tensor([0.5000])

    Source: R. Liu, Z. Liu, W. Yao, S. Zeng, J. Zhang, Moreau Envelope for Nonconvex Bi-Level Optimization: A
    Single-Loop and Hessian-Free Solution Strategy, 2024, algorithm 1.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"prox_lower", "project_lower", "project_upper"})

    def __init__(
        self,
        problem: Bilevel,
        x: Any,
        y: Any,
        *,
        step: float | Schedule = Constant(0.1),
        step_lower: float | Schedule = Constant(0.1),
        step_theta: float | Schedule = Constant(0.1),
        proximal: float = 1.0,
        penalty: float | Schedule = Power(1.0, 0.3),
        nonsmooth: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__(problem, x, y)
        self.alpha, self.beta = as_schedule("step", step), as_schedule("step_lower", step_lower)
        self.eta, self.penalty = as_schedule("step_theta", step_theta), as_schedule("penalty", penalty)
        if nonsmooth is not None and problem.prox_lower is None:
            raise ValueError("nonsmooth: expected None for a problem without prox_lower, got a function")
        self.proximal, self.nonsmooth = check_number("proximal", proximal), nonsmooth
        self.state["theta"] = self.state["y"].clone()

    def _update(self, at: Evaluation, k: int) -> Seen:
        x, y, theta = (self.state[name] for name in ("x", "y", "theta"))
        alpha, beta, eta, c, gamma = self.alpha(k), self.beta(k), self.eta(k), self.penalty(k), self.proximal
        theta = self._prox(theta - eta * (at.lower_in_y(x, theta) + (theta - y) / gamma), x, eta)
        upper, lower = at.upper(x, y), at.lower(x, y)
        direction = upper.x / c + lower.x - at.lower_in_x(x, theta)
        if self.nonsmooth is not None:
            direction = direction + self._nonsmooth_in_x(x, y) - self._nonsmooth_in_x(x, theta)
        x_next = self._onto_upper(x - alpha * direction)
        slope = at.upper_in_y(x_next, y) / c + at.lower_in_y(x_next, y) - (y - theta) / gamma
        y_next = self._prox(y - beta * slope, x_next, beta)
        self.state.update(x=x_next, y=y_next, theta=theta)
        moved = norm((x - x_next) / alpha, (y - y_next) / beta)
        return Seen(upper.value, lower.value, moved, norm(y - theta) / gamma)

    def _nonsmooth_in_x(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.nonsmooth is not None
        objective = Objective(self.nonsmooth, "nonsmooth", self.x_variables, self.y_variables)
        xs = [leaf.detach().requires_grad_() for leaf in self.x_variables.split(x)]
        with torch.enable_grad():
            value = objective(xs, self.y_variables.split(y))
        return _joined(_gradient(value, xs))
