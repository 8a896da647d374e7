"""Data-parallel objectives: the mean over the processes of a group, differentiable to any order."""

from __future__ import annotations

import contextlib
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from difflayers._distributed import Crossing, agreed, crossed, fingerprint, tied, together
from difflayers.linalg._autodiff import physical, transforms_active

from ._mfac import MFAC
from ._problem import Bilevel
from ._variables import Variables

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Group:
    """What replaces a function of x and y by the mean of those of all processes.

    x and y are the same in all processes, and so is all that is computed from the mean: conditions of loops, solvers,
    steps. Only the function itself, of its batch, is a process's own.

    Attributes:
        handle: The process group.
        samples: None, or how many samples a batch has.
    """

    handle: Any
    samples: Callable[[Any], Any] | None

    @property
    def size(self) -> int:
        """The number of processes."""
        return torch.distributed.get_world_size(self.handle)

    def mean(
        self,
        function: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
        name: str,
        x: Sequence[Tensor],
        y: Sequence[Tensor],
        rest: tuple[Any, ...],
        compare: bool,
        failure: Exception | None = None,
    ) -> Tensor:
        """The function's mean over the processes, or an error in all of them. A collective call.

        Args:
            function: Of leaves of x and y; does not communicate.
            name: What messages call it.
            x: Leaves of x.
            y: Leaves of y.
            rest: The batch, or nothing.
            compare: See whether x and y are the same everywhere.
            failure: What has gone wrong in this process already.
        """
        own_x, own_y = crossed("local", self.handle, x), crossed("local", self.handle, y)
        device = y[0].device
        value, count, prints, number = y[0].new_zeros(()), 1.0, [0, 0], 0.0
        try:
            if failure is None:
                count = self._count(name, rest)
                if compare:
                    prints = [fingerprint(x), fingerprint(y)]
                if count:
                    value = function(own_x, own_y)
                number = 0.0 if value.ndim or transforms_active() else float(value.detach())
        except Exception as error:
            failure = error
        kind = zlib.crc32(repr((value.dtype, physical(value).shape)).encode()) if count else 0
        rows = agreed(self.handle, failure, device, (kind, *prints, _bits(count), _bits(number)))
        counts, numbers = [_number(row[3]) for row in rows], [_number(row[4]) for row in rows]
        self._check(name, rows, counts)
        total, known = math.fsum(counts), None
        if not value.ndim and not transforms_active():  # one number: it came with the message
            known = value.new_tensor(sum(c * n for c, n in zip(counts, numbers, strict=True)) / total)
        weight = count * len(counts) / total
        value = tied(value if weight == 1 else value * weight, own_x, own_y)
        mean: Tensor = Crossing.apply("mean", self.handle, value, known)
        return mean

    def blocks(
        self,
        function: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
        x: Sequence[Tensor],
        y: Sequence[Tensor],
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        """One number for each of a process's own blocks, and the mean over the `rows` of all. A collective call.

        Derivatives by x of what a process makes of its numbers are sums over the processes.
        """
        m, own, device = len(y[0]), self.of_blocks(x), y[0].device
        value, number, failure = y[0].new_zeros(m), 0.0, None
        try:
            value = tied(function(own, y), own, y)
            number = float(value.detach().sum())
        except Exception as error:
            failure = error
        found = agreed(self.handle, failure, device, (_bits(number),))
        return value, value.new_tensor(sum(_number(row[0]) for row in found) / rows)

    def of_blocks(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Leaves of x for use by a process's own blocks."""
        return crossed("copy", self.handle, x)

    def smallest(self, t: Tensor) -> Tensor:
        """The smallest of a number that each process has. A collective call."""
        rows = agreed(self.handle, None, t.device, (_bits(float(t)),))
        return t.new_tensor(min(_number(row[0]) for row in rows))

    def rows(self, x: Sequence[Tensor], y: Sequence[Tensor], failure: Exception | None) -> int:
        """The number of blocks that all processes evaluate together, once x is seen to be the same everywhere."""
        device = y[0].device
        found = agreed(self.handle, failure, device, (len(y[0]), fingerprint(x)))
        _compare("x", [row[1] for row in found])
        return sum(row[0] for row in found)

    def refuse_different(self, init: Tensor | None, adjoint: Any, device: torch.device) -> None:
        """Refuses a start or rows of a MFAC that are not the same everywhere: processes would take different steps."""
        found = [] if init is None else [("init", fingerprint([init]))]
        if isinstance(adjoint, MFAC):
            found.append(("adjoint", 0 if adjoint._rows is None else fingerprint([adjoint._rows])))
        for name, own in found:
            _compare(name, [row[0] for row in agreed(self.handle, None, device, (own,))])

    def together(self, action: Callable[[], None], device: torch.device) -> None:
        """What may fail in one process, as an error in all. A collective call."""
        together(self.handle, action, device)

    def any(self, flag: Tensor) -> Tensor:
        """Whether it holds in any process. A collective call."""
        rows = agreed(self.handle, None, flag.device, (int(flag),))
        return flag.new_tensor(any(row[0] for row in rows))

    def _count(self, name: str, rest: tuple[Any, ...]) -> float:
        if self.samples is None or not rest:
            return 1.0
        count = float(self.samples(rest[0]))
        if not 0 <= count < math.inf:
            raise ValueError(f"samples: expected a number of at least 0 for the {name} batch, got {count}")
        return count

    def _check(self, name: str, rows: list[list[int]], counts: list[float]) -> None:
        """Refuses what differs between processes, in all of them."""
        _compare("x", [row[1] for row in rows])
        _compare("y", [row[2] for row in rows])
        full = [(rank, row[0]) for rank, row in enumerate(rows) if counts[rank]]
        if not full:
            raise ValueError(f"samples: expected some in the {name} batch of one process at least, got none in any")
        for rank, kind in full:
            if kind != full[0][1]:
                raise ValueError(
                    f"{name} output: expected the same shape and dtype in all processes of the group, got others in "
                    f"process {rank} than in process {full[0][0]}"
                )


def _bits(number: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits


def _number(bits: int) -> float:
    number: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return number


def _compare(name: str, prints: list[int]) -> None:
    """Refuses what differs between processes, in all of them."""
    for rank, own in enumerate(prints):
        if own != prints[0]:
            raise ValueError(
                f"{name}: expected the same numbers in all processes of the group, got others in process {rank} "
                "than in process 0 (the same seed? broadcast them from process 0)"
            )


def entering(handle: Any, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that a process goes on to use as the same everywhere, for what all compute alike."""
    return crossed("equal", handle, leaves)


def leaving(handle: Any, leaves: Sequence[Tensor]) -> list[Tensor]:
    """What all have computed alike, for use by each process in a loss of its own, whose mean is the total."""
    return crossed("local", handle, leaves)


def alone(handle: Any, x: Any, y: Any, action: Callable[[], T]) -> T:
    """What a process makes of its own blocks, without a message until it has.

    A collective call. An error, or another x, in one process is an error in all.
    """
    failure, result, own = None, None, 0
    try:
        own = fingerprint(Variables("x", x).leaves)
        result = action()
    except Exception as error:
        failure = error
    _compare("x", [row[0] for row in agreed(handle, failure, _device(y), (own,))])
    return result  # type: ignore[return-value]


@contextlib.contextmanager
def announced(problem: Bilevel, x: Any, y: Any) -> Iterator[None]:
    """What fails in a process in here, before the processes have met, fails in all of them when they do."""
    try:
        yield
    except Exception as error:
        handle = process_group(problem, x, y)
        if handle is not None:
            agreed(handle, error, _device(y))
        raise


def process_group(problem: Bilevel, x: Any, y: Any) -> Any:
    """The process group of the problem, or the one that x and y bring along; None without."""
    found = [tree.process_group for tree in (x, y) if isinstance(tree, DistributedDataParallel)]
    return found[0] if problem.group is None and found else problem.group


def _device(tree: Any) -> torch.device:
    tensors = tree.parameters() if isinstance(tree, nn.Module) else optree.tree_leaves(tree)
    return next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))


def group_of(problem: Bilevel, x: Variables, y: Variables) -> Group | None:
    """The group of the problem, or the one that x and y bring along."""
    found = [(name, g) for name, g in (("group", problem.group), ("x", x.group), ("y", y.group)) if g is not None]
    if not found:
        return None
    name, handle = found[0]
    for other, g in found[1:]:
        if g is not handle:
            raise ValueError(f"{other}: expected the process group of `{name}`, got another one")
    return Group(handle, problem.samples)
