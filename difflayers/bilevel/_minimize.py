"""Running a method: batches, progress bar, history."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._method import Method, StepStats
from ._options import check_count


@dataclass(frozen=True)
class MethodHistory:
    """The statistics of a run.

    Attributes:
        stats: One :class:`StepStats` for every recorded step.
    """

    stats: list[StepStats]

    @property
    def step(self) -> list[int]:
        """The recorded steps, from 1."""
        return [s.step for s in self.stats]

    @property
    def gradients(self) -> list[int]:
        """Gradients of both levels up to them."""
        return [s.gradients for s in self.stats]

    @property
    def products(self) -> list[int]:
        """Products with second derivatives up to them."""
        return [s.products for s in self.stats]

    @property
    def upper(self) -> Tensor:
        """``(recorded,)`` upper objectives."""
        return self._column("upper")

    @property
    def lower(self) -> Tensor:
        """``(recorded,)`` lower objectives."""
        return self._column("lower")

    @property
    def stationarity(self) -> Tensor:
        """``(recorded,)`` norms of the direction."""
        return self._column("stationarity")

    @property
    def infeasibility(self) -> Tensor:
        """``(recorded,)`` distances from a lower solution."""
        return self._column("infeasibility")

    def _column(self, name: str) -> Tensor:
        column = [getattr(s, name) for s in self.stats]
        return torch.stack(column) if column else torch.empty(0, device="cpu")


def minimize(
    algo: Method,
    steps: int,
    *,
    upper_batches: Iterable[Any] | None = None,
    lower_batches: Iterable[Any] | None = None,
    blocks: Iterable[Any] | None = None,
    record_every: int = 1,
    check_every: int = 100,
    progress: bool = True,
) -> MethodHistory:
    """Takes many steps of a method.

    Args:
        algo: The method; it holds the result, and goes on from where it is.
        steps: How many more.
        upper_batches: None, or what to take the batches of the upper objective from: started again where it runs out
            (a ``DataLoader`` shuffles again), so it has to be more than a generator. A full batch: ``[batch]``.
        lower_batches: The same for the lower objective.
        blocks: The same for the indices ``(I,)`` of the blocks that a step is to see, in step with the batches, of a
            problem that has blocks. None: all of them.
        record_every: Steps between two entries of the history.
        check_every: Steps between two looks at whether all numbers are finite.
        progress: Show a progress bar.

    Returns:
        :class:`MethodHistory`.

    Raises:
        ValueError: For bad arguments.
        FloatingPointError: Where the variables are not finite any more: steps too long, or a lower problem without a
            minimum.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import F2SA, Bilevel, minimize
        >>> problem = Bilevel(
        ...     upper=lambda x, y, batch: (y - batch).square().sum() / 2,
        ...     lower=lambda x, y, batch: (y - 2 * x).square().sum() / 2,
        ... )
        >>> algo = F2SA(problem, torch.zeros(1), torch.zeros(1))
        >>> history = minimize(algo, 300, upper_batches=[torch.ones(1)], progress=False)
        >>> algo.x, history.gradients[-1]
        (tensor([0.5000]), 1800)
    """
    if not isinstance(algo, Method):
        raise ValueError(f"algo: expected a method, got {type(algo).__name__}")
    check_count("steps", steps, least=0)
    check_count("record_every", record_every)
    check_count("check_every", check_every)
    upper = _endless("upper_batches", upper_batches)
    lower = _endless("lower_batches", lower_batches)
    sampled = _endless("blocks", blocks)
    bar: Any = nullcontext()
    if progress:
        from tqdm import tqdm

        bar = tqdm(total=steps, mininterval=0.5, desc=type(algo).__name__)
    history: list[StepStats] = []
    with bar:
        for k in range(1, steps + 1):
            rows = {} if blocks is None else {"blocks": next(sampled)}
            stats = algo.step(next(upper), next(lower), **rows)
            if k % record_every == 0 or k == steps:
                history.append(stats)
            if k % check_every == 0 or k == steps:
                _refuse_infinite(algo)
                if progress:
                    bar.set_postfix_str(
                        f"upper {float(stats.upper):.4g}, stationarity {float(stats.stationarity):.2g}, "
                        f"infeasibility {float(stats.infeasibility):.2g}",
                        refresh=False,
                    )
            if progress:
                bar.update()
    return MethodHistory(history)


def _endless(name: str, batches: Iterable[Any] | None) -> Iterator[Any]:
    """The batches over and over; None for ever where there are none."""
    if batches is None:
        while True:
            yield None
    if isinstance(batches, Tensor):
        raise ValueError(f"{name}: expected an iterable of batches, got a tensor; for one full batch write [batch]")
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError(f"{name}: expected an iterable with batches that can be started again, got an empty one")


def _refuse_infinite(algo: Method) -> None:
    finite = torch.stack([torch.isfinite(value).all() for value in algo.state.values()])
    if not bool(finite.all()):
        bad = [name for name, value in algo.state.items() if not bool(torch.isfinite(value).all())]
        raise FloatingPointError(
            f"{type(algo).__name__}: {', '.join(bad)} not finite after {algo.steps} steps. Likely causes: "
            "(a) steps too long for the curvature (times the penalty), (b) a lower problem without a minimum, "
            "(c) NaN in the data"
        )
