"""Checks of the numbers that methods take as options."""

from __future__ import annotations

import math
from typing import Any


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Refuses anything but an integer that is large enough."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return value


def check_number(name: str, value: Any, low: float = 0.0, high: float = math.inf, ends: str = "()") -> float:
    """Refuses anything but a number between two others; `ends` says which of them count, as brackets do."""
    fine = not isinstance(value, bool) and isinstance(value, int | float)
    if fine:
        above = value >= low if ends[0] == "[" else value > low
        fine = above and (value <= high if ends[1] == "]" else value < high)
    if not fine:
        least = f"of at least {low:g}" if ends[0] == "[" else f"above {low:g}"
        wanted = least if math.isinf(high) else f"in {ends[0]}{low:g}, {high:g}{ends[1]}"
        raise ValueError(f"{name}: expected a number {wanted}, got {value!r}")
    return float(value)
