"""What a solve returns, how it fails, and how to watch it: the vocabulary shared by every layer.

Every solver of the library reports one :class:`Info` per call, with one number per batch element. :func:`settle` is the
only place that turns such a report into an exception, a warning or NaN, so the failure policy reads the same
everywhere.
"""

from __future__ import annotations

import contextlib
import contextvars
import enum
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
OnFailure = Literal["raise", "nan", "ignore"]


class Status(enum.IntEnum):
    """How the solve of one batch element ended. Everything beyond ``MAX_STEPS`` is a failure."""

    CONVERGED = 0
    MAX_STEPS = 1
    DIVERGED = 2
    INFEASIBLE = 3
    UNBOUNDED = 4
    SINGULAR = 5


_CAUSES = {
    Status.DIVERGED: "(a) no solution near `init`, (b) the iteration is not a contraction or the step is too long, "
    "(c) overflow: rescale the problem",
    Status.INFEASIBLE: "(a) the constraints contradict each other, (b) data of another element was passed, "
    "(c) a bound has the wrong sign",
    Status.UNBOUNDED: "(a) a sign is wrong in the objective, (b) a constraint is missing, (c) no regularisation",
    Status.SINGULAR: "(a) dependent rows or columns, (b) a matrix that is not positive definite where it must be, "
    "(c) a degenerate or repeated solution, where no derivative exists; a small ridge removes (a) and (c)",
}

_ADVICE = "raise `max_steps` if it was reached, else the solver stagnated: loosen `rtol`, rescale, or improve `init`."


class Info(NamedTuple):
    """One report per batch element: integer ``status``, ``steps`` taken, ``residual`` norm reached."""

    status: Tensor
    steps: Tensor
    residual: Tensor


@dataclass(frozen=True)
class Solution(Generic[T]):
    """The result of an ``_ex`` function, returned unchecked.

    Attributes:
        value: The solution, with the structure and shape of the unknown.
        status: ``(*batch)`` integers, see :class:`Status`.
        steps: ``(*batch)`` number of solver steps each element took.
        residual: ``(*batch)`` norm of the solver's own error measure at the returned value.
    """

    value: T
    status: Tensor
    steps: Tensor
    residual: Tensor

    @property
    def converged(self) -> Tensor:
        """``(*batch)`` booleans: the elements that met their tolerance."""
        return self.status == Status.CONVERGED

    @property
    def failed(self) -> Tensor:
        """``(*batch)`` booleans: the elements that ended in a status beyond ``MAX_STEPS``."""
        return self.status > Status.MAX_STEPS


class SolveError(RuntimeError):
    """Some batch elements have no usable solution. ``error.solution`` carries the whole :class:`Solution`."""

    def __init__(self, message: str, solution: Solution[Any]) -> None:
        super().__init__(message)
        self.solution = solution

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.solution)


class SolveWarning(UserWarning):
    """A solve stopped before it met its tolerance; the result is returned and may be inaccurate."""


@dataclass(frozen=True)
class Record:
    """One solve seen by :func:`trace`.

    Attributes:
        name: The layer or function that solved.
        phase: ``"forward"`` or ``"adjoint"`` (the linear solve of a derivative).
        status: ``(*batch)`` integers, see :class:`Status`.
        steps: ``(*batch)`` steps taken.
        residual: ``(*batch)`` residual norm reached.
        seconds: Wall-clock time of the solve.
    """

    name: str
    phase: str
    status: Tensor
    steps: Tensor
    residual: Tensor
    seconds: float


_listeners: contextvars.ContextVar[tuple[list[Record], ...]] = contextvars.ContextVar("difflayers_trace", default=())


@contextlib.contextmanager
def trace() -> Iterator[list[Record]]:
    """Records every solve, forward and adjoint, that runs inside the block.

    The list fills while the block runs; an adjoint solve is recorded by the trace under which its forward ran, even
    when ``backward()`` is called after the block or on another thread. Values are never kept.

    Example:
        >>> import torch, difflayers
        >>> a = torch.tensor([2.0, 3.0], requires_grad=True)
        >>> with difflayers.trace() as solves:
        ...     root = difflayers.implicit.root_find(lambda z, a: z**2 - a, torch.ones(2), (a,), event_ndim=0)
        ...     root.sum().backward()
        >>> [solve.phase for solve in solves]
        ['forward', 'adjoint']
    """
    records: list[Record] = []
    token = _listeners.set((*_listeners.get(), records))
    try:
        yield records
    finally:
        _listeners.reset(token)


def current_listeners() -> tuple[list[Record], ...]:
    """The traces that listen here; kept on ``ctx`` so that a backward pass reports to the trace of its forward."""
    return _listeners.get()


@contextlib.contextmanager
def listening(listeners: tuple[list[Record], ...]) -> Iterator[None]:
    """Adds `listeners` to the current ones: a backward pass may run on a thread that has no context of its own."""
    current = _listeners.get()
    token = _listeners.set((*current, *(one for one in listeners if not any(one is other for other in current))))
    try:
        yield
    finally:
        _listeners.reset(token)


def timed(name: str, phase: str, solve: Callable[[], tuple[Any, Info]]) -> tuple[Any, Info]:
    """Runs `solve() -> (result, info)` and tells the listening traces about it."""
    listeners = _listeners.get()
    if not listeners:
        return solve()
    start = time.perf_counter()
    result, info = solve()
    seconds = time.perf_counter() - start
    status, steps, residual = (x.detach().clone() for x in info)
    record = Record(name, phase, status, steps, residual, seconds)
    for records in listeners:
        records.append(record)
    return result, info


def check_policy(on_failure: str) -> None:
    """Refuses a failure policy that does not exist."""
    if on_failure not in ("raise", "nan", "ignore"):
        raise ValueError(f'on_failure: expected "raise", "nan" or "ignore", got {on_failure!r}')


def settle(
    value: Tensor,
    info: Info,
    on_failure: OnFailure,
    *,
    name: str,
    phase: str = "forward",
    present: Callable[[Tensor], Any] = lambda value: value,
    diagnose: Callable[[], None] = lambda: None,
    excused: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    remedy: str = "",
) -> Tensor:
    """Applies the failure policy to a finished solve: raises, warns, masks with NaN, or does nothing.

    Args:
        value: ``(*batch, event...)`` result.
        info: Report with one entry per batch element.
        on_failure: ``"raise"``, ``"nan"`` or ``"ignore"``.
        name: The layer, for messages.
        phase: ``"forward"`` or ``"adjoint"``.
        present: Turns `value` into what the user knows, for ``SolveError.solution``.
        diagnose: Called before a ``SolveError``; may raise a clearer error (bad input).
        excused: Called only where some element failed: the value with what can be known without a solve, and the
            elements whose failure is none.
        remedy: What to do about ``MAX_STEPS`` with this solver, in place of the general advice.

    Returns:
        The value, with NaN in failed elements under ``"nan"``.
    """
    if on_failure == "ignore" and excused is not None:
        return excused(value)[0]
    if on_failure == "ignore" or info.status.numel() == 0 or info.status.is_meta:
        return value
    worst = int(info.status.max())  # the one read-back of a clean solve
    if worst == Status.CONVERGED:
        return value
    if excused is not None:
        value, fine = excused(value)
        info = info._replace(status=torch.where(fine, int(Status.CONVERGED), info.status))
        worst = int(info.status.max())
    failed = info.status > Status.MAX_STEPS
    if worst > Status.MAX_STEPS:
        if on_failure == "raise":
            diagnose()
            solution = Solution(present(value), *info)
            raise SolveError(_describe(info, failed, name, phase), solution)
        value = torch.where(failed[(...,) + (None,) * (value.ndim - failed.ndim)], math.nan, value)
    starved = info.status == Status.MAX_STEPS
    if bool(starved.any()):
        warnings.warn(
            f"{name} ({phase}): {int(starved.sum())} of {starved.numel()} batch elements stopped after "
            f"{int(info.steps[starved].max())} steps before they met the tolerance; largest residual "
            f"{float(info.residual[starved].max()):.2e}. The result and its gradient may be inaccurate: "
            + (remedy or _ADVICE),
            SolveWarning,
            stacklevel=_stacklevel(),
        )
    return value


def _stacklevel() -> int:
    """Points a warning at the first line outside this library and torch, where the user called."""
    import sys

    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("difflayers", "torch"):
        frame, level = frame.f_back, level + 1  # type: ignore[assignment]
    return max(level, 1)


def _describe(info: Info, failed: Tensor, name: str, phase: str) -> str:
    where = failed.nonzero()
    # entry by entry: `tolist` of torch 2.6 fails on what is computed inside a transform
    first = [tuple(int(i) for i in index) for index in where[:8]]
    shown = ", ".join(str(index[0] if len(index) == 1 else index) for index in first)
    more = f" and {len(where) - 8} more" if len(where) > 8 else ""
    which = f" (elements {shown}{more})" if failed.ndim else ""
    kinds = sorted({Status(int(code)) for code in info.status[failed].unique()})
    causes = "; ".join(f"{kind.name}: {_CAUSES[kind]}" for kind in kinds)
    return (
        f"{name} ({phase}): {len(where)} of {failed.numel()} batch elements failed{which}. "
        f"Likely causes of {causes}. The error's `.solution` carries every element; "
        'on_failure="nan" returns NaN for these alone.'
    )
