"""What all methods share: variables, gradients at any point, statistics, state that can be saved."""

from __future__ import annotations

import abc
import copy
import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from difflayers._checks import check_same, check_shape

from ._argmin_layer import ArgminLayer
from ._evaluation import Evaluation
from ._objective import Objective
from ._problem import OPTIONAL, Bilevel
from ._variables import Variables


@dataclass(frozen=True)
class StepStats:
    """What one step of a method saw; 0-dim tensors, read by nobody until you do.

    Attributes:
        step: Number of steps taken, this one counted.
        upper: The upper objective where the step evaluated its gradient.
        lower: The lower objective at the same point and the lower batch.
        stationarity: How far the step moved divided by its length: the norm of the (projected) direction, zero where
            the method rests. Of x; for methods that move x and y together, of both.
        infeasibility: How far y is from a lower solution in the terms of the method, see there.
        gradients: Gradients of both levels so far.
        products: Products with second derivatives so far.
    """

    step: int
    upper: Tensor
    lower: Tensor
    stationarity: Tensor
    infeasibility: Tensor
    gradients: int
    products: int


class Seen(NamedTuple):
    """What the update of a method hands to :meth:`Method.step`."""

    upper: Tensor
    lower: Tensor
    stationarity: Tensor
    infeasibility: Tensor


class Method(abc.ABC):
    """Base of the methods: an optimiser of both levels at once.

    ``stats = algo.step(upper_batch, lower_batch)`` takes one step. Tensors and pytrees given as `x` and `y` are left
    alone, ``algo.x`` and ``algo.y`` are the current ones; modules are trained in place, as by an optimiser, and
    whatever else changes their parameters between two steps is respected.

    Attributes:
        problem: The problem.
        counts: Evaluations so far: ``"upper"`` and ``"lower"`` gradients, ``"hvp"`` and ``"cross"`` products.
        steps: Steps taken.
        state: The variables as vectors by name: ``"x"``, ``"y"`` and what the method carries along. With blocks,
            ``"y"`` is a matrix of one row a block.
        plain: What the method carries along besides: numbers, strings, None, and lists, tuples and dicts of them.
        takes: Names of the optional parts of a :class:`Bilevel` that the method can use; others are refused.
        needs: Names of those that it cannot do without.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"project_upper"})
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, problem: Bilevel, x: Any, y: Any) -> None:
        if not isinstance(problem, Bilevel):
            raise ValueError(f"problem: expected a Bilevel, got {type(problem).__name__}")
        self._refuse(problem)
        self.problem = problem
        self.x_variables, self.y_variables = Variables("x", x), Variables("y", y, problem.blocks)
        both = (self.x_variables, self.y_variables)
        check_same((label, leaf) for v in both for label, leaf in zip(v.labels, v.leaves, strict=True))
        self.counts: Counter[str] = Counter()
        self.steps = 0
        self.plain: dict[str, Any] = {}
        self.state = {"x": _snapshot(self.x_variables), "y": _snapshot(self.y_variables)}

    @property
    def x(self) -> Any:
        """The upper variables, with the structure they came in; a module is the module itself."""
        return self._present(self.x_variables, "x")

    @property
    def y(self) -> Any:
        """The lower variables alike."""
        return self._present(self.y_variables, "y")

    def step(
        self, upper_batch: Any = None, lower_batch: Any = None, *, blocks: Tensor | Sequence[int] | None = None
    ) -> StepStats:
        """Takes one step.

        Args:
            upper_batch: Handed to the upper objective as it is.
            lower_batch: Handed to the lower objective.
            blocks: Of a problem with blocks, the different indices ``(I,)`` of those that the step is to see: functions
                get their rows of y and return ``(I,)`` numbers, and the batches are theirs. None: all.

        Returns:
            :class:`StepStats` of the point the step started from.

        Raises:
            ValueError: For blocks of a problem that has none, or that are no different indices.
        """
        index = self._sampled(blocks)
        for name, variables in (("x", self.x_variables), ("y", self.y_variables)):
            if variables.module is not None:
                self.state[name] = _snapshot(variables)
        before = dict(self.state), copy.deepcopy(self.plain), self.counts.copy(), self.steps
        try:
            seen = self._update(Evaluation(self, upper_batch, lower_batch, index), self.steps)
            # a view into something larger may lie elsewhere in memory, which shows in the last bit of a sum
            self.state = {key: v.clone() if v.storage_offset() else v for key, v in self.state.items()}
            self.steps += 1
            self._write_modules()
        except BaseException:  # also Ctrl-C: as if the step had not begun
            self.state, self.plain, self.counts, self.steps = before
            self._undo()
            self._write_modules()
            raise
        count = self.counts
        return StepStats(
            self.steps, *seen, gradients=count["upper"] + count["lower"], products=count["hvp"] + count["cross"]
        )

    def polish(self, lower_batch: Any = None, **options: Any) -> Any:
        """Solves the lower problem at the current x, from the current y, which becomes the solution.

        What is left of the bias of a penalty is then in x alone.

        Args:
            lower_batch: The batch of the lower problem.
            **options: Of :class:`ArgminLayer`, such as ``solver``.

        Returns:
            The new ``algo.y``.

        Raises:
            SolveError: Where the lower problem was not solved; y is then as before.
        """
        with torch.no_grad():
            y = ArgminLayer(self.problem, init=self.y, **options)(self.x, lower_batch)
        self.state["y"] = self.y_variables.read("y", y).clone()
        self._write_modules()
        return self.y

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on but the batches, copied: tensors and plain Python objects."""
        return {
            "method": type(self).__name__,
            "steps": self.steps,
            "counts": dict(self.counts),
            "state": {name: value.clone() for name, value in self.state.items()},
            "plain": copy.deepcopy(self.plain),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken, to the last bit.

        Args:
            state_dict: Of the same method with the same options, on variables of the same shapes.

        Raises:
            ValueError: For the state of another method or of other shapes; nothing has changed then.
        """
        name = type(self).__name__
        if state_dict.get("method") != name:
            raise ValueError(f"state_dict: expected the state of {name}, got that of {state_dict.get('method')}")
        found, plain = state_dict["state"], state_dict["plain"]
        if set(found) != set(self.state):
            raise ValueError(f"state_dict: expected tensors {sorted(self.state)}, got {sorted(found)}")
        if set(plain) != set(self.plain):
            raise ValueError(f"state_dict: expected values of {sorted(self.plain)}, got {sorted(plain)}")
        for key, value in self.state.items():
            check_shape(f"state_dict[{key!r}]", found[key].shape, value.shape)
        self.state = {key: found[key].detach().to(value, copy=True) for key, value in self.state.items()}
        self.plain = copy.deepcopy(dict(plain))
        self.steps, self.counts = int(state_dict["steps"]), Counter(state_dict["counts"])
        self._write_modules()

    @abc.abstractmethod
    def _update(self, at: Evaluation, k: int) -> Seen:
        """Replaces the tensors of `state` (never in place) and what is in `plain` by those after step k."""

    def _undo(self) -> None:  # noqa: B027 (most have nothing to take back)
        """Takes back what an interrupted update has done in place."""

    def _refuse(self, problem: Bilevel) -> None:
        """Refuses a problem with parts that the method has no use for, or without those that it needs."""
        own = type(self).__name__
        for part in OPTIONAL:
            value = getattr(problem, part)
            if value is not None and part not in self.takes:
                others = ", ".join(sorted(m.__name__ for m in _methods(Method) if part in m.takes)) or "no method yet"
                got = "a function" if callable(value) else repr(value)
                raise ValueError(f"{part}: expected None for {own}, got {got}; it is taken by {others}")
            if value is None and part in self.needs:
                raise ValueError(f"{part}: expected {_KINDS.get(part, 'a function')} for {own}, got None")

    def _sampled(self, blocks: Any) -> Tensor | None:
        """The indices of the blocks that a step is to see."""
        if blocks is None:
            return None
        m = self.problem.blocks
        if m is None:
            raise ValueError("blocks: expected None for a problem without blocks, got indices")
        index = torch.as_tensor(blocks, device=self.state["y"].device)
        if index.ndim != 1 or not len(index) or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"blocks: expected indices (I,), got {index.dtype} of shape {tuple(index.shape)}")
        if not 0 <= int(index.min()) <= int(index.max()) < m or len(index.unique()) < len(index):
            raise ValueError(f"blocks: expected different indices from 0 to {m - 1}, got {index.tolist()}")
        return index

    def _onto_upper(self, x: Tensor) -> Tensor:
        """The projection of the upper variables."""
        if self.problem.project_upper is None:
            return x
        with torch.no_grad():
            return self.x_variables.returned("project_upper", self.problem.project_upper(self.x_variables.present(x)))

    def _onto_joint(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The projection of both."""
        assert self.problem.project_joint is not None
        with torch.no_grad():
            pair = self.problem.project_joint(self.x_variables.present(x), self.y_variables.present(y))
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ValueError(f"project_joint output: expected a pair (x, y), got {type(pair).__name__}")
            both = (self.x_variables, self.y_variables)
            new_x, new_y = (v.returned("project_joint", tree) for v, tree in zip(both, pair, strict=True))
            return new_x, new_y

    def _prox(self, y: Tensor, x: Tensor, step: float) -> Tensor:
        """The prox of the lower problem, or the projection of y, at these upper variables."""
        prox = self.problem.proximal
        if prox is None:
            return y
        name = "prox_lower" if self.problem.project_lower is None else "project_lower"
        v, variables, rows = self.y_variables.present(y), self.y_variables, len(y) if y.ndim == 2 else None
        with torch.no_grad():
            if self.x_variables.module is None:
                return variables.returned(name, prox(v, self.x_variables.present(x), step), rows)

            def of_module(module: Any, _: Any) -> Tensor:
                return variables.returned(name, prox(v, module, step), rows)

            call = Objective(of_module, name, self.x_variables, variables, scalar=False)
            return call(self.x_variables.split(x), variables.split(y))

    def _present(self, variables: Variables, name: str) -> Any:
        return variables.present(self.state[name]) if variables.module is None else variables.module

    def _write_modules(self) -> None:
        for name, variables in (("x", self.x_variables), ("y", self.y_variables)):
            if variables.module is not None:
                with torch.no_grad():
                    for leaf, value in zip(variables.leaves, variables.split(self.state[name]), strict=True):
                        leaf.copy_(value)


_KINDS = {"blocks": "a number of blocks", "group": "a process group"}


def _methods(base: Any) -> set[Any]:
    """The public methods of the library."""
    public = base.__module__.startswith("difflayers.") and not base.__name__.startswith("_")
    own = {base} if public and not inspect.isabstract(base) else set()
    return own.union(*(_methods(c) for c in base.__subclasses__()))


def norm(*vectors: Tensor) -> Tensor:
    """Euclidean norm of all of them together."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v) for v in vectors]))


def _snapshot(variables: Variables) -> Tensor:
    return variables.join([leaf.detach() for leaf in variables.leaves]).clone()
