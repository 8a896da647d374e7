r"""Picard iteration :math:`z \leftarrow z + d\,(T(z) - z)`: the plain loop, for contractions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from difflayers.linalg._system import wide_norm

from ._iterate import Function, IterativeSolver, Step


@dataclass(frozen=True, kw_only=True)
class Picard(IterativeSolver):
    """Repeats the update. Converges linearly for contractions; :class:`Anderson` is faster on slow ones.

    Stops at ``||T(z) - z|| <= atol + rtol ||T(z)||``.

    Args:
        damping: Fraction of the step that is taken, in (0, 1].
    """

    max_steps: int = 1000
    damping: float = 1.0

    finds: ClassVar[str] = "fixed_point"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping: expected a number in (0, 1], got {self.damping}")

    def step(self, function: Function, z: Tensor, state: Any, k: int) -> Step:
        """One application of the update."""
        new = function(z)
        move = new - z
        if self.damping != 1.0:
            new = z + self.damping * move
        return Step(new, None, new, wide_norm(move.detach()), wide_norm(new.detach()))
