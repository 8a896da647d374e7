"""What all single-loop methods share: variables, gradients at any point, statistics, state that can be saved."""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import optree
import torch
from torch import Tensor

from difflayers._checks import check_same, check_shape

from ._argmin_layer import ArgminLayer
from ._objective import Objective
from ._optimality import like_y
from ._oracles import Recorded, _gradient, _joined
from ._problem import Bilevel
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


class Gradient(NamedTuple):
    """Value of an objective and its gradients in x and in y."""

    value: Tensor
    x: Tensor
    y: Tensor


class Evaluation:
    """Both objectives on one pair of batches, at any x and y (vectors); random numbers are the same at all points."""

    def __init__(self, method: Method, upper_batch: Any, lower_batch: Any) -> None:
        self.x, self.y, self.counts = method.x_variables, method.y_variables, method.counts
        problem = method.problem
        self.batches = {"upper": upper_batch, "lower": lower_batch}
        self.objectives = {
            name: Objective(function, name, self.x, self.y)
            for name, function in (("upper", problem.upper), ("lower", problem.lower))
        }
        for name, objective in self.objectives.items():
            objective.refuse_captured(self.batches[name])

    def upper(self, x: Tensor, y: Tensor) -> Gradient:
        """The upper objective with both gradients."""
        return self._both("upper", x, y)

    def lower(self, x: Tensor, y: Tensor) -> Gradient:
        """The lower objective with both gradients."""
        return self._both("lower", x, y)

    def upper_in_y(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradient of the upper objective in y alone."""
        return self._one("upper", x, y, in_x=False)

    def lower_in_y(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradient of the lower objective in y alone."""
        return self._one("lower", x, y, in_x=False)

    def lower_in_x(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradient of the lower objective in x alone."""
        return self._one("lower", x, y, in_x=True)

    def slope(self, x: Tensor, y: Tensor) -> tuple[Tensor, Recorded]:
        """The lower objective, and its gradient in y with the graph for products ``H v`` and ``J v``."""
        self.counts["lower"] += 1
        xs, ys = _leaves(self.x, x, True), _leaves(self.y, y, True)
        with torch.enable_grad():
            value = self.objectives["lower"](xs, ys, self.batches["lower"])
            slope = _joined(_gradient(value, ys, create_graph=True))
        return value.detach(), Recorded(slope, ys, xs, True, self.counts)

    def mixed_slope(self, x: Tensor, y: Tensor, mu: float) -> tuple[Gradient, tuple[Tensor, Tensor], Recorded]:
        """The upper gradients, the lower value and gradient in y, and that of ``mu F + (1 - mu) f`` with its graph."""
        self.counts["upper"] += 1
        self.counts["lower"] += 1
        xs, ys = _leaves(self.x, x, True), _leaves(self.y, y, True)
        with torch.enable_grad():
            upper = self.objectives["upper"](xs, ys, self.batches["upper"])
            lower = self.objectives["lower"](xs, ys, self.batches["lower"])
            parts = _gradient(upper, [*xs, *ys], create_graph=True)
            upper_x, upper_y = _joined(parts[: len(xs)]), _joined(parts[len(xs) :])
            lower_y = _joined(_gradient(lower, ys, create_graph=True))
            slope = mu * upper_y + (1 - mu) * lower_y
        gradient = Gradient(upper.detach(), upper_x.detach(), upper_y.detach())
        return gradient, (lower.detach(), lower_y.detach()), Recorded(slope, ys, xs, True, self.counts)

    def _both(self, level: str, x: Tensor, y: Tensor) -> Gradient:
        self.counts[level] += 1
        xs, ys = _leaves(self.x, x, True), _leaves(self.y, y, True)
        with torch.enable_grad():
            value = self.objectives[level](xs, ys, self.batches[level])
        parts = _gradient(value, [*xs, *ys])
        return Gradient(value.detach(), _joined(parts[: len(xs)]), _joined(parts[len(xs) :]))

    def _one(self, level: str, x: Tensor, y: Tensor, *, in_x: bool) -> Tensor:
        self.counts[level] += 1
        xs, ys = _leaves(self.x, x, in_x), _leaves(self.y, y, not in_x)
        with torch.enable_grad():
            value = self.objectives[level](xs, ys, self.batches[level])
        return _joined(_gradient(value, xs if in_x else ys))


class Method(abc.ABC):
    """Base of the single-loop methods: an optimiser of both levels at once.

    ``stats = algo.step(upper_batch, lower_batch)`` takes one step. Tensors and pytrees given as `x` and `y` are left
    alone, ``algo.x`` and ``algo.y`` are the current ones; modules are trained in place, as by an optimiser, and
    whatever else changes their parameters between two steps is respected.

    Attributes:
        problem: The problem.
        counts: Evaluations so far: ``"upper"`` and ``"lower"`` gradients, ``"hvp"`` and ``"cross"`` products.
        steps: Steps taken.
        state: The variables as vectors by name: ``"x"``, ``"y"`` and what the method carries along.
    """

    takes_prox: ClassVar[bool] = False
    takes_constraint: ClassVar[bool] = False

    def __init__(self, problem: Bilevel, x: Any, y: Any, *, project_upper: Callable[[Any], Any] | None = None) -> None:
        name = type(self).__name__
        if not isinstance(problem, Bilevel):
            raise ValueError(f"problem: expected a Bilevel, got {type(problem).__name__}")
        if problem.prox_lower is not None and not self.takes_prox:
            raise ValueError(f"prox_lower: expected None, {name} takes a smooth lower objective; see MEHA")
        if (problem.constraint is not None) != self.takes_constraint:
            expected = "a function" if self.takes_constraint else "None"
            raise ValueError(f"constraint: expected {expected} for {name}, got {problem.constraint!r}")
        if project_upper is not None and not callable(project_upper):
            raise ValueError(f"project_upper: expected a callable, got {type(project_upper).__name__}")
        self.problem, self.project_upper = problem, project_upper
        self.x_variables, self.y_variables = Variables("x", x), Variables("y", y)
        both = (self.x_variables, self.y_variables)
        check_same((label, leaf) for v in both for label, leaf in zip(v.labels, v.leaves, strict=True))
        self.counts: Counter[str] = Counter()
        self.steps = 0
        self.state = {"x": _snapshot(self.x_variables), "y": _snapshot(self.y_variables)}

    @property
    def x(self) -> Any:
        """The upper variables, with the structure they came in; a module is the module itself."""
        return self._present(self.x_variables, "x")

    @property
    def y(self) -> Any:
        """The lower variables alike."""
        return self._present(self.y_variables, "y")

    def step(self, upper_batch: Any = None, lower_batch: Any = None) -> StepStats:
        """Takes one step.

        Args:
            upper_batch: Handed to the upper objective as it is.
            lower_batch: Handed to the lower objective.

        Returns:
            :class:`StepStats` of the point the step started from.
        """
        for name, variables in (("x", self.x_variables), ("y", self.y_variables)):
            if variables.module is not None:
                self.state[name] = _snapshot(variables)
        before, counts = dict(self.state), self.counts.copy()
        try:
            seen = self._update(Evaluation(self, upper_batch, lower_batch), self.steps)
        except BaseException:  # also Ctrl-C: as if the step had not begun
            self.state, self.counts = before, counts
            raise
        # a view into something larger may lie elsewhere in memory, which shows in the last bit of a sum
        self.state = {key: v.clone() if v.storage_offset() else v for key, v in self.state.items()}
        self.steps += 1
        self._write_modules()
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
        found = state_dict["state"]
        if set(found) != set(self.state):
            raise ValueError(f"state_dict: expected tensors {sorted(self.state)}, got {sorted(found)}")
        for key, value in self.state.items():
            check_shape(f"state_dict[{key!r}]", found[key].shape, value.shape)
        self.state = {key: found[key].detach().to(value, copy=True) for key, value in self.state.items()}
        self.steps, self.counts = int(state_dict["steps"]), Counter(state_dict["counts"])
        self._write_modules()

    @abc.abstractmethod
    def _update(self, at: Evaluation, k: int) -> Seen:
        """Replaces the tensors of `state` (never in place) by those after step k."""

    def _onto_upper(self, x: Tensor) -> Tensor:
        """The projection of the upper variables."""
        if self.project_upper is None:
            return x
        with torch.no_grad():
            return like_x("project_upper", self.x_variables, self.project_upper(self.x_variables.present(x)))

    def _prox(self, y: Tensor, x: Tensor, step: float) -> Tensor:
        """The prox of the lower problem at these upper variables."""
        prox = self.problem.prox_lower
        if prox is None:
            return y
        v, variables = self.y_variables.present(y), self.y_variables
        with torch.no_grad():
            if self.x_variables.module is None:
                return like_y("prox_lower", variables, prox(v, self.x_variables.present(x), step))

            def of_module(module: Any, _: Any) -> Tensor:
                return like_y("prox_lower", variables, prox(v, module, step))

            call = Objective(of_module, "prox_lower", self.x_variables, variables, scalar=False)
            return call(self.x_variables.split(x), variables.split(y))

    def _present(self, variables: Variables, name: str) -> Any:
        return variables.present(self.state[name]) if variables.module is None else variables.module

    def _write_modules(self) -> None:
        for name, variables in (("x", self.x_variables), ("y", self.y_variables)):
            if variables.module is not None:
                with torch.no_grad():
                    for leaf, value in zip(variables.leaves, variables.split(self.state[name]), strict=True):
                        leaf.copy_(value)


def like_x(argument: str, variables: Variables, tree: Any) -> Tensor:
    """What a projection returned as a vector."""
    if variables.module is not None:
        leaves = [tree[name] for name in variables.names]
    else:
        leaves, spec = optree.tree_flatten(tree)
        if spec != variables.spec:
            raise ValueError(f"{argument} output: expected the structure of x, {variables.spec}, got {spec}")
    for leaf, shape in zip(leaves, variables.shapes, strict=True):
        check_shape(f"{argument} output", leaf.shape, shape, " as x has")
    return variables.join(leaves)


def check_count(name: str, value: Any) -> int:
    """Refuses anything but an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    return value


def check_ratio(value: Any) -> float:
    """Refuses anything but a positive ratio of two steps."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"ratio: expected a number above 0, got {value!r}")
    return float(value)


def norm(*vectors: Tensor) -> Tensor:
    """Euclidean norm of all of them together."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v) for v in vectors]))


def _snapshot(variables: Variables) -> Tensor:
    return variables.join([leaf.detach() for leaf in variables.leaves]).clone()


def _leaves(variables: Variables, vector: Tensor, wanted: bool) -> list[Tensor]:
    return [leaf.detach().requires_grad_(wanted) for leaf in variables.split(vector)]
