"""One evaluation of a level's function, which leaves modules, buffers and the random state as it found them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from difflayers._checks import check_shape
from difflayers.implicit._fixed_point_module import _lock, _own_tensors, _random_state
from difflayers.linalg._autodiff import transforms_active
from difflayers.linalg._captured import Seen, _held, gradients_wanted, refuse_held, refuse_seen

from ._group import Group
from ._variables import Variables

REMEDY = (
    "Make it part of x, y or the batch; a module's parameters are variables when the module itself is x or y, and "
    "constants after `.requires_grad_(False)`"
)
_looked_at = Seen()


class _Scope(nn.Module):
    """Everything whose tensors one evaluation replaces."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.inner = nn.ModuleList(modules)
        self.training = True

    def forward(self, function: Callable[..., Tensor], args: tuple[Any, ...]) -> Tensor:
        return function(*args)


class Objective:
    """``function(x, y, *rest)`` of leaves: parameters of modules put in, buffers of all modules in reach cloned.

    The first evaluation draws its random numbers as usual; every further one draws the same, and leaves the random
    state alone. Modules keep the mode (training or evaluation) that they had when this was built.

    Args:
        function: The user's function.
        name: What messages call it.
        x: Variables of the upper level.
        y: Variables of the lower level.
        scalar: The function returns one number.
        group: None, or the processes whose mean the function stands for: every call is a collective one.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        x: Variables,
        y: Variables,
        *,
        scalar: bool = True,
        group: Group | None = None,
    ) -> None:
        self.function, self.name, self.x, self.y, self.scalar, self.group = function, name, x, y, scalar, group
        modules = [m for m in (x.module, y.module) if m is not None] + _modules_in_reach(function)
        self.scope = _Scope(modules) if modules else None
        if self.scope is not None:
            owner = {id(p): (v, i) for v in (x, y) if v.module is not None for i, p in enumerate(v.leaves)}
            own = _own_tensors(self.scope, "_parameters")
            self.places = {place: owner[id(p)] for place, p in own.items() if id(p) in owner}
            self.modes = [(m, m.training) for m in self.scope.modules()]
        self.device = y.leaves[0].device
        self.compared = False
        self.rows = 0  # blocks that all processes evaluate
        self.known: Tensor | None = None  # their mean
        self.failure: Exception | None = None
        self.draws: bool | None = None
        self.state = _random_state(self.device)

    def __call__(self, x: Sequence[Tensor], y: Sequence[Tensor], *rest: Any) -> Tensor:
        if self.group is None:
            return self._own(x, y, *rest)
        compare, self.compared = not self.compared, True
        function = lambda x, y: self._own(x, y, *rest)  # noqa: E731
        if self.y.blocks is None:
            return self.group.mean(function, self.name, x, y, rest, compare, self.failure)
        if compare:
            self.rows = self.group.rows(x, y, self.failure)
        value, self.known = self.group.blocks(function, x, y, self.rows)
        return value

    def _own(self, x: Sequence[Tensor], y: Sequence[Tensor], *rest: Any) -> Tensor:
        """What this process has."""
        if self.draws is None:
            self.state = _random_state(self.device)
            out = self._evaluate(x, y, rest)
            self.draws = not torch.equal(self.state, _random_state(self.device))
        elif self.draws:
            now = _random_state(self.device)
            _set_random_state(self.state, self.device)
            try:
                out = self._evaluate(x, y, rest)
            finally:
                _set_random_state(now, self.device)
        else:
            out = self._evaluate(x, y, rest)
        return self._check(out, None if self.y.blocks is None else len(y[0]))

    def mean(self, value: Tensor) -> Tensor:
        """The value that the last call returned; of blocks their mean, of those of all processes."""
        return value.detach().mean() if self.known is None else self.known

    def of_mean(self, gradient: Tensor, value: Tensor) -> Tensor:
        """A derivative by x of the sum of the value, as that of the mean over all blocks."""
        return gradient if value.ndim == 0 else gradient / (self.rows or len(value))

    def refuse_captured(self, *rest: Any, rows: Tensor | None = None) -> None:
        """Refuses a function that takes a tensor which is differentiated from somewhere else than its arguments.

        The rest of the arguments is for these rows of y alone.
        """
        if not gradients_wanted():
            return
        try:
            self._look(rest, rows)
        except Exception as error:
            if self.group is None:
                raise
            self.failure = error  # for all processes, when they meet

    def _look(self, rest: tuple[Any, ...], rows: Tensor | None) -> None:
        refuse_held(self.function, self.name, REMEDY)
        if transforms_active() or _looked_at.knows(self.function):  # inside of transforms the engine looks
            return
        with torch.enable_grad():
            try:
                y = self.y.constants(False)
                y = y if rows is None else [leaf[rows] for leaf in y]
                out = self._own(self.x.constants(False), y, *_constant(rest))
            except RuntimeError:  # it differentiates inside, which constants do not allow: nothing to be seen
                return
        refuse_seen([out], self.name, REMEDY)
        _looked_at.remember(self.function)

    def _evaluate(self, x: Sequence[Tensor], y: Sequence[Tensor], rest: tuple[Any, ...]) -> Any:
        args = tuple(v.tree(t) if v.module is None else v.module for v, t in ((self.x, x), (self.y, y)))
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            return self._call(x, y, (*args, *rest))

    def _call(self, x: Sequence[Tensor], y: Sequence[Tensor], args: tuple[Any, ...]) -> Any:
        if self.scope is None:
            return self.function(*args)
        tensors = {place: (x if v is self.x else y)[i] for place, (v, i) in self.places.items()}
        with self._modes():
            buffers = {name: b.clone() for name, b in _own_tensors(self.scope, "_buffers").items()}
            return functional_call(self.scope, {**tensors, **buffers}, (self.function, args), tie_weights=False)

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        """The modes of the start: a backward pass may come after somebody's ``eval()``."""
        with contextlib.ExitStack() as stack:
            for m in self.scope.inner if self.scope is not None else ():
                stack.enter_context(_lock(m))
            moved = [(m, m.training) for m, mode in self.modes if m.training != mode]
            try:
                for m, mode in moved:
                    m.training = not mode
                yield
            finally:
                for m, mode in moved:
                    m.training = mode

    def _check(self, out: Any, rows: int | None) -> Tensor:
        if not isinstance(out, Tensor):
            raise ValueError(f"{self.name} output: expected a tensor, got {type(out).__name__}")
        if not out.is_floating_point():
            raise ValueError(f"{self.name} output: expected a floating-point tensor, got {out.dtype}")
        if self.scalar and rows is not None:
            check_shape(f"{self.name} output", out.shape, (rows,), ", one number a block")
        elif self.scalar:
            check_shape(f"{self.name} output", out.shape, (), ", one number (take the mean or the sum)")
        return out


def _constant(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, tuple | list):
        items = [_constant(item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return {key: _constant(item) for key, item in tree.items()} if isinstance(tree, dict) else tree


def _modules_in_reach(function: Any) -> list[nn.Module]:
    """Modules that a function holds or finds among the globals it names, and so on through the functions it names."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    waiting = [function]
    while waiting:
        value = waiting.pop()
        if isinstance(value, nn.Module):
            found[id(value)] = value
        elif callable(value) and not isinstance(value, type) and id(value) not in seen:
            seen.add(id(value))
            waiting += [held for _, held in _held(value)]
            code, scope = getattr(value, "__code__", None), getattr(value, "__globals__", None)
            if code is not None and scope is not None and scope.get("__name__", "").split(".")[0] != "torch":
                waiting += [scope[name] for name in code.co_names if name in scope]
    return list(found.values())


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
