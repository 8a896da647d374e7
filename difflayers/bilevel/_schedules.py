"""Step lengths, penalties and tolerances that change from step to step: functions of the number of the step, from 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Constant:
    """The same number at every step.

    Args:
        value: The number.

    Example:
        >>> from difflayers.bilevel import Constant
        >>> Constant(0.5)(100)
        0.5
    """

    value: float

    def __call__(self, step: int) -> float:
        """The value at a step."""
        return self.value


@dataclass(frozen=True)
class Power:
    """``c0 * (step + offset) ** p``: falls for a negative exponent, grows for a positive one.

    Args:
        c0: Factor.
        p: Exponent.
        offset: Added to the number of the step, above 0.

    Raises:
        ValueError: For an offset that is not positive.

    Example:
        >>> from difflayers.bilevel import Power
        >>> Power(1.0, -0.5)(3)
        0.5
    """

    c0: float
    p: float
    offset: float = 1.0

    def __post_init__(self) -> None:
        if not self.offset > 0:
            raise ValueError(f"offset: expected a number above 0, got {self.offset!r}")

    def __call__(self, step: int) -> float:
        """The value at a step."""
        return self.c0 * (step + self.offset) ** self.p


@dataclass(frozen=True)
class Exponential:
    """``c0 * rate ** step``, but at least `floor`.

    Args:
        c0: Value at step 0.
        rate: Factor from one step to the next.
        floor: Smallest value.

    Example:
        >>> from difflayers.bilevel import Exponential
        >>> Exponential(1.0, 0.5)(3)
        0.125
    """

    c0: float
    rate: float
    floor: float = 0.0

    def __call__(self, step: int) -> float:
        """The value at a step."""
        return max(self.c0 * self.rate**step, self.floor)


@dataclass(frozen=True)
class Linear:
    """From `start` to `end` in `steps` equal steps, then `end`.

    Args:
        start: Value at step 0.
        end: Value from step `steps` on.
        steps: Length of the ramp, at least 1.

    Raises:
        ValueError: For a ramp of no steps.

    Example:
        >>> from difflayers.bilevel import Linear
        >>> Linear(0.0, 1.0, steps=4)(1)
        0.25
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if not self.steps >= 1:
            raise ValueError(f"steps: expected an integer of at least 1, got {self.steps!r}")

    def __call__(self, step: int) -> float:
        """The value at a step."""
        return self.end if step >= self.steps else self.start + (self.end - self.start) * step / self.steps


def as_schedule(name: str, value: Any) -> Schedule:
    """A schedule as it is, a number as a constant."""
    if callable(value):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a number or a schedule, got {value!r}")
    return Constant(float(value))
