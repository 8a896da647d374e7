r"""Penalty-based gradient descent on both levels at once: the penalty is the lower gap, or the lower gradient.

.. math:: F(x, y) + \gamma\,(f(x, y) - \min_\omega f(x, \omega)) \qquad\text{or}\qquad
    F(x, y) + \gamma\,\|\nabla_y f(x, y)\|^2
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ._evaluation import Evaluation
from ._method import Method, Seen, norm
from ._options import check_count, check_number
from ._problem import Bilevel
from ._schedules import Constant, Schedule, as_schedule


class _Penalised(Method):
    """A joint projected gradient step on ``scale (F + gamma p)``."""

    takes: ClassVar[frozenset[str]] = frozenset({"project_upper", "project_joint"})

    def __init__(
        self,
        problem: Bilevel,
        x: Any,
        y: Any,
        *,
        penalty: float | Schedule,
        step: float | Schedule,
        ratio: float,
    ) -> None:
        super().__init__(problem, x, y)
        self.penalty, self.alpha = as_schedule("penalty", penalty), as_schedule("step", step)
        self.ratio = check_number("ratio", ratio)
        if problem.project_joint is not None and self.ratio != 1:
            raise ValueError(f"ratio: expected 1 with project_joint, got {ratio}")

    def _joint_step(self, k: int, in_x: Tensor, in_y: Tensor) -> Tensor:
        """Moves both along a direction; the norm of what came of it, divided by the step."""
        x, y = self.state["x"], self.state["y"]
        gamma = self.penalty(k)
        scale = 1 / max(gamma, 1.0)
        step = self.alpha(k) * scale
        if self.problem.project_joint is not None:
            x_next, y_next = self._onto_joint(x - step * in_x, y - step * in_y)
        else:
            x_next = self._onto_upper(x - step * self.ratio * in_x)
            y_next = self._prox(y - step * in_y, x_next, step * gamma)
        self.state.update(x=x_next, y=y_next)
        return norm((x - x_next) / self.ratio, y - y_next) / step


class VPBGD(_Penalised):
    r"""Gradient descent on the upper objective plus a multiple of the lower gap.

    Solves ``min_{x in X} upper(x, y)`` over the lower solutions y in Y, where `project_lower` of the problem is
    the projection onto Y. In each step, `inner_steps` times ``omega -= beta grad_y f(x, omega)``, then x and y together
    descend ``F + gamma (f(x, y) - f(x, omega))``, omega held constant; the loss is multiplied by ``min(1 / gamma, 1)``.

    The minimiser of the penalised objective is approached: for a strongly convex lower objective its distance to the
    optimum is a multiple of ``1 / gamma``, and the upper objective may be *below* the optimum.

    Args:
        problem: The problem; of its optional parts `project_upper`, and `project_lower` or `prox_lower`, that may not
            depend on x; or `project_joint` for x and y, with `project_lower` for omega.
        x: Upper variables: tensor, pytree of tensors, or module.
        y: Lower variables; start of omega too.
        penalty: gamma.
        step: alpha, of x and y on the multiplied loss.
        step_lower: beta, of omega; below ``2 / L_f``.
        ratio: Of the step of x to that of y: gradients in x may be of another size altogether.
        inner_steps: Steps of omega for each of x and y.

    ``infeasibility`` is ``f(x, y) - f(x, omega)``, below zero while omega lags behind.

    Raises:
        ValueError: For bad input, naming the argument.

    Differentiable in nothing.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import Bilevel, VPBGD
        >>> problem = Bilevel(
        ...     upper=lambda x, y, batch: (y - 1).square().sum() / 2,
        ...     lower=lambda x, y, batch: (y - 2 * x).square().sum() / 2,
        ... )
        >>> algo = VPBGD(problem, torch.zeros(1), torch.zeros(1))
        >>> for _ in range(1000):
        ...     stats = algo.step()
        >>> algo.x
        tensor([0.5000])

    Source: H. Shen, Q. Xiao, T. Chen, On Penalty-based Bilevel Gradient Descent Method, 2023, algorithm 1 (V-PBGD).

    Departure: the default penalty is constant; the paper's data cleaning raises it, ``Linear(0.0, 0.2, 30_000)`` in
    40 000 steps.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"prox_lower", "project_lower", "project_upper", "project_joint"})

    def __init__(
        self,
        problem: Bilevel,
        x: Any,
        y: Any,
        *,
        penalty: float | Schedule = Constant(10.0),
        step: float | Schedule = Constant(0.1),
        step_lower: float | Schedule = Constant(0.1),
        ratio: float = 1.0,
        inner_steps: int = 1,
    ) -> None:
        super().__init__(problem, x, y, penalty=penalty, step=step, ratio=ratio)
        self.beta, self.inner_steps = as_schedule("step_lower", step_lower), check_count("inner_steps", inner_steps)
        self.state["omega"] = self.state["y"].clone()

    def _update(self, at: Evaluation, k: int) -> Seen:
        x, y, omega = (self.state[name] for name in ("x", "y", "omega"))
        beta, gamma = self.beta(k), self.penalty(k)
        for _ in range(self.inner_steps):
            omega = self._prox(omega - beta * at.lower_in_y(x, omega), x, beta)
        upper, lower, rest = at.upper(x, y), at.lower(x, y), at.lower(x, omega)
        moved = self._joint_step(k, upper.x + gamma * (lower.x - rest.x), upper.y + gamma * lower.y)
        self.state["omega"] = omega
        return Seen(upper.value, lower.value, moved, lower.value - rest.value)


class GPBGD(_Penalised):
    r"""Gradient descent on the upper objective plus a multiple of the squared lower gradient.

    Solves ``min_{x in X} upper(x, y)`` over the lower stationary points, by descent of x and y together on
    ``F + gamma |grad_y f|^2``, multiplied by ``min(1 / gamma, 1)``; one product with each second derivative a step.
    The bias is as that of :class:`VPBGD`.

    Args:
        problem: The problem; of its optional parts `project_upper` or `project_joint`.
        x: Upper variables: tensor, pytree of tensors, or module.
        y: Lower variables.
        penalty: gamma.
        step: alpha, of x and y on the multiplied loss.
        ratio: Of the step of x to that of y: gradients in x may be of another size altogether.

    ``infeasibility`` is ``|grad_y f(x, y)|``.

    Raises:
        ValueError: For bad input, naming the argument.

    Differentiable in nothing.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import GPBGD, Bilevel
        >>> problem = Bilevel(
        ...     upper=lambda x, y, batch: (y - 1).square().sum() / 2,
        ...     lower=lambda x, y, batch: (y - 2 * x).square().sum() / 2,
        ... )
        >>> algo = GPBGD(problem, torch.zeros(1), torch.zeros(1), penalty=1.0)
        >>> for _ in range(1000):
        ...     stats = algo.step()
        >>> algo.x
        tensor([0.5000])

    Source: H. Shen, Q. Xiao, T. Chen, On Penalty-based Bilevel Gradient Descent Method, 2023, section 4 (G-PBGD).
    """

    def __init__(
        self,
        problem: Bilevel,
        x: Any,
        y: Any,
        *,
        penalty: float | Schedule = Constant(10.0),
        step: float | Schedule = Constant(0.05),
        ratio: float = 1.0,
    ) -> None:
        super().__init__(problem, x, y, penalty=penalty, step=step, ratio=ratio)

    def _update(self, at: Evaluation, k: int) -> Seen:
        x, y = self.state["x"], self.state["y"]
        upper, (lower, slope) = at.upper(x, y), at.slope(x, y)
        gradient, twice = slope.value.detach(), 2 * self.penalty(k)
        moved = self._joint_step(k, upper.x + twice * slope.cross(gradient), upper.y + twice * slope.pull(gradient))
        return Seen(upper.value, lower, moved, norm(gradient))
