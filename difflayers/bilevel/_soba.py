r"""SOBA and SABA: lower variables, adjoint and upper variables move together.

.. math:: y \mathrel{-}= \rho \nabla_y f, \qquad q \mathrel{-}= \rho (H q - \nabla_y F), \qquad
    x \mathrel{-}= \gamma (\nabla_x F - J q)

all at the old point, so that each direction is linear in the samples: SABA reduces their variance by tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._evaluation import Evaluation
from ._method import Method, Seen, StepStats, norm
from ._options import check_count
from ._problem import Bilevel
from ._schedules import Constant, Power, Schedule, as_schedule


class SOBA(Method):
    r"""One gradient step on the lower problem, on the adjoint system and on the hypergradient at a time.

    Solves ``min_x upper(x, y*(x))`` for a strongly convex lower objective. With H and J the second derivatives of f at
    the old ``(x, y)``: ``y -= rho grad_y f``, ``q -= rho (H q - grad_y F)``, ``x -= gamma (grad_x F - J q)``; one
    product with each a step. Has no bias.

    Args:
        problem: The problem; of its optional parts `project_upper`.
        x: Upper variables: tensor, pytree of tensors, or module.
        y: Lower variables.
        step: gamma, of x.
        step_lower: rho, of y and q; below ``2 / L_f``.

    ``infeasibility`` is ``|grad_y f(x, y)|``.

    Attributes:
        adjoint: q, with the structure of y; ``init`` of :func:`hypergradient`.

    Raises:
        ValueError: For bad input, naming the argument.

    Differentiable in nothing.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import SOBA, Bilevel
        >>> problem = Bilevel(
        ...     upper=lambda x, y, batch: (y - 1).square().sum() / 2,
        ...     lower=lambda x, y, batch: (y - 2 * x).square().sum() / 2,
        ... )
        >>> algo = SOBA(problem, torch.zeros(1), torch.zeros(1), step=0.05, step_lower=0.5)
        >>> for _ in range(300):
        ...     stats = algo.step()
        >>> algo.x
        tensor([0.5000])

    Source: M. Dagréou, P. Ablin, S. Vaiter, T. Moreau, A framework for bilevel optimization that enables stochastic and
    global variance reduction algorithms, 2022, algorithm 1.

    Departure: q has the opposite sign of the paper's v, that of :func:`hypergradient`.
    """

    def __init__(
        self,
        problem: Bilevel,
        x: Any,
        y: Any,
        *,
        step: float | Schedule = Power(0.1, -0.5),
        step_lower: float | Schedule = Power(0.1, -0.5),
    ) -> None:
        super().__init__(problem, x, y)
        self.gamma, self.rho = as_schedule("step", step), as_schedule("step_lower", step_lower)
        self.state["q"] = torch.zeros_like(self.state["y"])

    @property
    def adjoint(self) -> Any:
        """The adjoint, with the structure of y."""
        return self.y_variables.present(self.state["q"])

    def _update(self, at: Evaluation, k: int) -> Seen:
        x, y, q = (self.state[name] for name in "xyq")
        upper, (lower, slope) = at.upper(x, y), at.slope(x, y)
        gradient, bend, cross = slope.value.detach(), slope.pull(q), slope.cross(q)
        upper_x, upper_y = self._reduced("upper", upper.x, upper.y)
        gradient_, bend, cross = self._reduced("lower", gradient, bend, cross)
        rho, gamma = self.rho(k), self.gamma(k)
        x_next = self._onto_upper(x - gamma * (upper_x - cross))
        self.state.update(x=x_next, y=y - rho * gradient_, q=q - rho * (bend - upper_y))
        return Seen(upper.value, lower, norm(x - x_next) / gamma, norm(gradient))

    def _reduced(self, level: str, *directions: Tensor) -> tuple[Tensor, ...]:
        """The directions of this level, with less variance where a method knows how."""
        return directions


class SABA(SOBA):
    r"""SOBA on finite sums, with the last direction of every block in a table (SAGA on all five terms).

    Solves what :class:`SOBA` does where both objectives are means over blocks of data: constant steps converge, without
    noise left. ``algo.step((i, upper_batch), (j, lower_batch))`` takes block i of the upper and block j of the lower
    data, which are drawn uniformly; tables hold, for every block, two vectors of y and one of x for the lower and one
    of each for the upper level.

    Args:
        problem: The problem; of its optional parts `project_upper`. Its objectives are those of a
            block.
        x: Upper variables: tensor, pytree of tensors, or module.
        y: Lower variables.
        upper_blocks: Number of blocks of the upper data.
        lower_blocks: Number of blocks of the lower data.
        step: gamma, of x.
        step_lower: rho, of y and q.

    Raises:
        ValueError: For bad input, naming the argument.

    Differentiable in nothing.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import SABA, Bilevel
        >>> problem = Bilevel(
        ...     upper=lambda x, y, batch: (y - batch).square().sum() / 2,
        ...     lower=lambda x, y, batch: (y - batch * x).square().sum() / 2,
        ... )
        >>> x, y = torch.zeros(1), torch.zeros(1)
        >>> algo = SABA(problem, x, y, upper_blocks=2, lower_blocks=2, step=0.02, step_lower=0.3)
        >>> blocks = [(0, torch.tensor([1.0])), (1, torch.tensor([3.0]))]
        >>> for k in range(400):
        ...     stats = algo.step(blocks[k % 2], blocks[k // 2 % 2])
        >>> algo.x  # y = 2 x is to be the mean of 1 and 3
        tensor([1.0000])

    Source: M. Dagréou, P. Ablin, S. Vaiter, T. Moreau, A framework for bilevel optimization that enables stochastic and
    global variance reduction algorithms, 2022, section 3 (SABA).

    Departure: tables start from zero, which is unbiased too, in place of a pass over all data.
    """

    def __init__(
        self,
        problem: Bilevel,
        x: Any,
        y: Any,
        *,
        upper_blocks: int,
        lower_blocks: int,
        step: float | Schedule = Constant(0.1),
        step_lower: float | Schedule = Constant(0.1),
    ) -> None:
        super().__init__(problem, x, y, step=step, step_lower=step_lower)
        self.blocks = {
            "upper": check_count("upper_blocks", upper_blocks),
            "lower": check_count("lower_blocks", lower_blocks),
        }
        self._index = {"upper": 0, "lower": 0}
        self._row: dict[str, Tensor] = {}
        n, d = self.state["x"].numel(), self.state["y"].numel()
        for level, width in (("upper", n + d), ("lower", 2 * d + n)):
            self.state[f"{level}_table"] = self.state["y"].new_zeros(self.blocks[level], width)
            self.state[f"{level}_mean"] = self.state["y"].new_zeros(width)

    def step(
        self, upper_batch: Any = None, lower_batch: Any = None, *, blocks: Tensor | Sequence[int] | None = None
    ) -> StepStats:
        """Takes one step.

        Args:
            upper_batch: ``(i, batch)``: the number of the block, and what the upper objective gets.
            lower_batch: ``(j, batch)``.
            blocks: None: these blocks of data are no blocks of the problem.

        Returns:
            :class:`StepStats` of the point the step started from, on these blocks.

        Raises:
            ValueError: For a batch without its number, or a number beyond the blocks.
        """
        batches = []
        for level, pair in (("upper", upper_batch), ("lower", lower_batch)):
            count = self.blocks[level]
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ValueError(f"{level}_batch: expected a pair (block, batch), got {type(pair).__name__}")
            if not 0 <= int(pair[0]) < count:
                raise ValueError(f"{level}_batch: expected a block from 0 to {count - 1}, got {int(pair[0])}")
            self._index[level] = int(pair[0])
            batches.append(pair[1])
        self._old: dict[str, Tensor] = {}
        return super().step(*batches, blocks=blocks)

    def _update(self, at: Evaluation, k: int) -> Seen:
        seen = super()._update(at, k)
        for level, i in self._index.items():
            table = self.state[f"{level}_table"]
            self._old[level] = table[i].clone()
            table[i] = self._row[level]  # in place: nobody else holds it
        return seen

    def _undo(self) -> None:
        for level, row in self._old.items():
            self.state[f"{level}_table"][self._index[level]] = row

    def _reduced(self, level: str, *directions: Tensor) -> tuple[Tensor, ...]:
        now, i = torch.cat(directions), self._index[level]
        table, mean = self.state[f"{level}_table"], self.state[f"{level}_mean"]
        change = now - table[i]
        self.state[f"{level}_mean"] = mean + change / self.blocks[level]
        self._row[level] = now
        return (change + mean).split([d.numel() for d in directions])
