r"""The step that F2SA and the penalty method share: y of the penalised, z of the lower problem.

With a penalty :math:`\lambda = 1 / \sigma`, y descends :math:`F + \lambda f`, z descends f, and by the envelope theorem
:math:`\nabla_x F(x, y) + \lambda (\nabla_x f(x, y) - \nabla_x f(x, z))` is the gradient in x of
:math:`\min_y (F + \lambda f) - \lambda \min_z f`, which tends to :math:`\Phi` as lambda grows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._evaluation import Evaluation
from ._method import Method, Seen, norm
from ._options import check_count
from ._problem import Bilevel
from ._schedules import Schedule, as_schedule


class TwinMethod(Method):
    """Base of methods with a twin ``"z"`` of y."""

    def __init__(
        self,
        problem: Bilevel,
        x: Any,
        y: Any,
        *,
        inner_steps: int,
        momentum: float | Schedule | None,
    ) -> None:
        super().__init__(problem, x, y)
        self.inner_steps = check_count("inner_steps", inner_steps)
        self.momentum = None if momentum is None else as_schedule("momentum", momentum)
        self.state["z"] = self.state["y"].clone()
        if self.momentum is not None:
            if inner_steps != 1:
                raise ValueError(f"inner_steps: expected 1 with momentum, got {inner_steps}")
            self._points = {"z": "xz", "y": "xy", "x": "xyz"}  # what each direction is a function of
            for name, places in self._points.items():
                self.state[f"momentum_{name}"] = torch.zeros_like(self.state[name])
                for place in places:
                    self.state[f"last_{name}_{place}"] = self.state[place].clone()

    def _twin_step(self, at: Evaluation, k: int, x_step: float, y_step: float, z_step: float, weight: float) -> Seen:
        """One step of all three; the lengths are those along ``F + weight f`` for x and y, along f for z."""
        x, y, z = (self.state[name] for name in "xyz")

        def z_direction(x: Tensor, z: Tensor) -> Tensor:
            return at.lower_in_y(x, z)

        def y_direction(x: Tensor, y: Tensor) -> Tensor:
            return at.upper_in_y(x, y) + weight * at.lower_in_y(x, y)

        def x_direction(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            upper, lower, rest = at.upper(x, y), at.lower(x, y), at.lower(x, z)
            seen.extend((upper.value, lower.value, rest.value))
            return upper.x + weight * (lower.x - rest.x)

        seen: list[Tensor] = []
        for _ in range(self.inner_steps):
            z = self._prox(z - z_step * self._smoothed("z", k, z_direction, x, z), x, z_step)
            y = self._prox(y - y_step * self._smoothed("y", k, y_direction, x, y), x, y_step * weight)
        direction = self._smoothed("x", k, x_direction, x, y, z)
        moved = self._onto_upper(x - x_step * direction)
        self.state.update(x=moved, y=y, z=z)
        return Seen(seen[0], seen[1], norm(x - moved) / x_step, seen[1] - seen[2])

    def _smoothed(self, name: str, k: int, direction: Callable[..., Tensor], *points: Tensor) -> Tensor:
        """The direction, with momentum corrected by what the new sample says of the last point (STORM)."""
        now = direction(*points)
        if self.momentum is None:
            return now
        places = [f"last_{name}_{place}" for place in self._points[name]]
        if k > 0:
            before = direction(*(self.state[place] for place in places))
            now = now + (1 - self.momentum(k)) * (self.state[f"momentum_{name}"] - before)
        self.state.update(zip(places, points, strict=True))
        self.state[f"momentum_{name}"] = now
        return now
