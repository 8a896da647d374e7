r"""BO-REP: upper steps of a set length, for upper objectives whose curvature grows with their gradient.

.. math:: q \mathrel{-}= \nu (H q - \nabla_y F), \qquad m \leftarrow \beta m + (1 - \beta)(\nabla_x F - J q), \qquad
    x \mathrel{-}= \eta\, m / \lVert m \rVert

where y is refined before the first step, and moves at every I-th step only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._evaluation import Evaluation, _leaves
from ._group import group_of
from ._method import Method, Seen, _snapshot, norm
from ._objective import Objective
from ._options import check_count, check_number
from ._oracles import _gradient, _joined
from ._problem import Bilevel
from ._schedules import Constant, Power, Schedule, as_schedule


class BOREP(Method):
    r"""Normalised upper steps with momentum; the lower variables are refined at first and then from time to time.

    Solves ``min_x upper(x, y*(x))`` for a strongly convex lower objective and an upper one whose gradient need not be
    Lipschitz, as of recurrent networks: ``|grad^2 F| <= L0 + L1 |grad F|`` is enough. With H and J the second
    derivatives of f at the new y: ``q -= nu (H q - grad_y F)``, with the new q ``m = beta m + (1 - beta)(grad_x F -
    J q)``, and ``x -= eta m / |m|``; one product with each a step. Before the first step y is refined by epochs of
    gradient steps, each of twice as many of half the length from the mean of the last; then N gradient steps follow at
    every I-th step.

    A step is as long as its schedule says, however small the gradient: at a constant step x ends on an orbit around the
    optimum, with a radius of a multiple of that length. It vanishes with a falling schedule whose sum is infinite, such
    as the default.

    Args:
        problem: The problem; of its optional parts `project_upper`.
        x: Upper variables: tensor, pytree of tensors, or module.
        y: Lower variables.
        step: eta, the distance that x moves in a step.
        step_lower: Of y; below ``2 / L_f``.
        step_adjoint: nu, of q; below ``2 / L_f``.
        momentum: beta, in [0, 1).
        period: I.
        inner_steps: N; also the length of the first epoch.
        epochs: Of the refinement before the first step, on its batch; 0 for none, see :meth:`refine`.

    ``infeasibility`` is ``|grad_y f(x, y)|``, ``stationarity`` the norm of m (of the part of it that a projection lets
    x follow).

    Attributes:
        adjoint: q, with the structure of y; ``init`` of :func:`hypergradient`.

    Raises:
        ValueError: For bad input, naming the argument; in a step for gradients that are not finite. The method is then
            as before the step.

    Differentiable in nothing.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import BOREP, Bilevel
        >>> problem = Bilevel(
        ...     upper=lambda x, y, batch: (3 * (y - 1)).cosh().sum(),
        ...     lower=lambda x, y, batch: (y - 2 * x).square().sum() / 2,
        ... )
        >>> algo = BOREP(problem, torch.full((1,), 5.0), torch.zeros(1))  # slope 2e12
        >>> for _ in range(900):
        ...     stats = algo.step()
        >>> bool((algo.x - 0.5).abs() < 0.02)
        True

    Source: J. Hao, X. Gong, M. Liu, Bilevel Optimization under Unbounded Smoothness: A New Algorithm and Convergence
    Analysis, 2024, algorithms 1 to 3.

    Departure: the gradient steps on y of one step see the same batch, and no ball around the last y; the default step
    falls.
    """

    def __init__(
        self,
        problem: Bilevel,
        x: Any,
        y: Any,
        *,
        step: float | Schedule = Power(0.1, -0.5),
        step_lower: float | Schedule = Constant(0.5),
        step_adjoint: float | Schedule = Constant(0.5),
        momentum: float = 0.9,
        period: int = 2,
        inner_steps: int = 4,
        epochs: int = 3,
    ) -> None:
        super().__init__(problem, x, y)
        self.eta, self.alpha = as_schedule("step", step), as_schedule("step_lower", step_lower)
        self.nu = as_schedule("step_adjoint", step_adjoint)
        self.momentum = check_number("momentum", momentum, high=1.0, ends="[)")
        self.period, self.inner_steps = check_count("period", period), check_count("inner_steps", inner_steps)
        self.epochs = check_count("epochs", epochs, least=0)
        self.state["q"], self.state["m"] = torch.zeros_like(self.state["y"]), torch.zeros_like(self.state["x"])

    @property
    def adjoint(self) -> Any:
        """The adjoint, with the structure of y."""
        return self.y_variables.present(self.state["q"])

    def refine(self, lower_batches: Sequence[Any], epochs: int = 3) -> Any:
        """The refinement of y on many batches, in the place of the one that the first step does on its own.

        Args:
            lower_batches: Batches of the lower objective, taken in turn, a new one for every gradient step.
            epochs: How many; the first has ``inner_steps`` steps.

        Returns:
            The new ``algo.y``.

        Raises:
            ValueError: For no batches.
        """
        if len(lower_batches) == 0:
            raise ValueError("lower_batches: expected at least one batch, got none")
        for name, variables in (("x", self.x_variables), ("y", self.y_variables)):
            if variables.module is not None:
                self.state[name] = _snapshot(variables)
        group, taken = group_of(self.problem, self.x_variables, self.y_variables), 0

        def slope(x: Tensor, y: Tensor) -> Tensor:
            nonlocal taken
            batch = lower_batches[taken % len(lower_batches)]
            taken += 1
            objective = Objective(self.problem.lower, "lower", self.x_variables, self.y_variables, group=group)
            objective.refuse_captured(batch)
            xs, ys = _leaves(self.x_variables, x, False), _leaves(self.y_variables, y, True)
            with torch.enable_grad():
                value = objective(xs, ys, batch)
            return _joined(_gradient(value, ys))

        self.state["y"] = self._epochs(slope, check_count("epochs", epochs), self.steps)
        self.counts["lower"] += taken
        self._write_modules()
        return self.y

    def _epochs(self, slope: Callable[[Tensor, Tensor], Tensor], epochs: int, k: int) -> Tensor:
        """New y: epochs of gradient steps, each from the mean of the last."""
        x, y, alpha, steps = self.state["x"], self.state["y"], self.alpha(k), self.inner_steps
        for _ in range(epochs):
            total = torch.zeros_like(y)
            for _ in range(steps):
                y = y - alpha * slope(x, y)
                total = total + y
            y, alpha, steps = total / steps, alpha / 2, 2 * steps
        return y

    def _update(self, at: Evaluation, k: int) -> Seen:
        x, y, q, m = (self.state[name] for name in "xyqm")
        eta, alpha = self.eta(k), self.alpha(k)
        if k == 0:
            y = self._epochs(at.lower_in_y, self.epochs, k)
        elif k % self.period == 0:
            for _ in range(self.inner_steps):
                y = y - alpha * at.lower_in_y(x, y)
        upper, (lower, slope) = at.upper(x, y), at.slope(x, y)
        q = q - self.nu(k) * (slope.pull(q) - upper.y)
        m = self.momentum * m + (1 - self.momentum) * (upper.x - slope.cross(q))
        at.refuse_infinite(lower_gradient_in_y=slope.value, adjoint=q, hypergradient=m)
        size = norm(m)
        x_next = self._onto_upper(x - eta * m / torch.where(size > 0, size, 1))
        self.state.update(x=x_next, y=y, q=q, m=m)
        return Seen(upper.value, lower, size * norm(x - x_next) / eta, norm(slope.value.detach()))
