"""Refuses functions that would lose a gradient silently: captured tensors, and residuals that couple batch elements.

A tensor that an inner function takes from its surroundings receives no gradient through the implicit function theorem,
because the engine never sees it. Constants may be captured; anything that is differentiated may not.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import optree
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ._autodiff import sample, transforms_active

_functorch = torch._C._functorch


def _differentiated(t: Tensor) -> bool:
    """Whether a derivative or a ``vmap`` follows `t` at any level. Under ``torch.func`` constants are wrapped too."""
    while True:
        if _functorch.is_batchedtensor(t) or t.requires_grad:
            return True
        if t.is_floating_point() and forward_ad.unpack_dual(t).tangent is not None:
            return True
        if not _functorch.is_functorch_wrapped_tensor(t):
            return False
        t = _functorch.get_unwrapped(t)


def _held(function: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Names and values a callable holds on to: closure cells, defaults, partial arguments, a bound self."""
    if isinstance(function, functools.partial):
        yield from ((f"argument {i} of the partial", a) for i, a in enumerate(function.args))
        yield from ((f"argument `{k}` of the partial", a) for k, a in function.keywords.items())
        yield from _held(function.func, depth)
        return
    if isinstance(function, torch.nn.Module):
        yield "the module itself", function
        return
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, type(torch)):
        yield "the bound `self`", owner
        function = function.__func__ if hasattr(function, "__func__") else function
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is not None and cells:
        for name, cell in zip(code.co_freevars, cells, strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # a cell that is not filled yet holds nothing
                continue
            yield f"`{name}`", content
            if depth < 3 and callable(content) and not isinstance(content, torch.nn.Module | type):
                yield from _held(content, depth + 1)
    defaults = getattr(function, "__defaults__", None)
    for i, value in enumerate(defaults or ()):
        yield f"default argument {i}", value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        tree: Any = value
        yield from (leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor))


_REMEDY = (
    "Pass it in `args` (for a module: implicit.FixedPoint, or torch.func.functional_call with its parameters in `args`)"
)


def _refuse(name: str, argument: str, remedy: str) -> None:
    raise ValueError(
        f"{argument}: expected a function of its arguments alone, got one that captures {name}, a tensor that is being "
        f"differentiated; its gradient would be lost. {remedy}"
    )


def gradients_wanted() -> bool:
    """Whether anything could be differentiated here: without, nothing is lost by capturing."""
    return torch.is_grad_enabled() or transforms_active()


def refuse_probed(function: Callable[..., Tensor], tensors: Sequence[Tensor], argument: str, remedy: str = "") -> None:
    """One evaluation on constants: inside a ``torch.func`` transform a captured tensor shows in the result."""
    refuse_seen([function(*map(sample, tensors))], argument, remedy or _REMEDY)


def refuse_complex(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuses complex tensors that are differentiated: unknowns are real, and the gradient would be lost."""
    for name, t in named:
        if t.is_complex() and _differentiated(t):
            raise ValueError(
                f"{name}: expected real numbers where a gradient is wanted, got {t.dtype}; pass its real view"
            )


def refuse_held(function: Any, argument: str, remedy: str = _REMEDY) -> None:
    """Looks at what the callable holds, before anything is evaluated.

    Tensors only: a method may well read a number of a module whose weights it takes as arguments, so modules and other
    objects are judged by the first evaluation.
    """
    for name, value in _held(function):
        for t in _tensors(value):
            if _differentiated(t):
                _refuse(name, argument, remedy)


def refuse_seen(outputs: Sequence[Tensor], argument: str, remedy: str = _REMEDY) -> None:
    """Looks at the result of an evaluation on constants: whatever is differentiated in it was captured."""
    for t in outputs:
        if _differentiated(t):
            _refuse("from an outer scope", argument, remedy)


class Seen:
    """Functions that have passed a check, remembered as long as they live, together with what was asked of them.

    A plain function without a closure is remembered by its code, so that a lambda written in a ``forward`` is checked
    once.
    """

    def __init__(self) -> None:
        self._questions: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()

    def remember(self, function: Any, question: Any = None) -> None:
        """The function has passed."""
        with contextlib.suppress(TypeError):  # not hashable, or no weak references: check every time
            self._questions.setdefault(self._key(function), set()).add(question)

    def knows(self, function: Any, question: Any = None) -> bool:
        """Whether the function has passed."""
        with contextlib.suppress(TypeError):
            return question in self._questions.get(self._key(function), ())
        return False

    @staticmethod
    def _key(function: Any) -> Any:
        if isinstance(function, types.FunctionType) and not function.__closure__ and not function.__defaults__:
            return function.__code__
        return function


def refuse_coupling(function: Callable[[Tensor], Tensor], z: Tensor, event_ndim_name: str, argument: str) -> bool:
    """Finds batch elements that see each other: the gradient of one in the unknown of another.

    Any two elements differ in some bit of their flattened index, so two products a bit, with cotangents on the elements
    that have it (or have it not), find every pair. Plain tensors. Returns whether it could look at every element.
    """
    batch = z.shape[:-1]
    if batch.numel() < 2:
        return False
    with torch.enable_grad():
        if transforms_active():  # where no tensor may ask for a gradient
            out, pull = torch.func.vjp(function, z.detach())
        else:
            z = z.detach().requires_grad_()
            out = function(z)
            if not out.requires_grad:  # inference mode records nothing
                return False

            def pull(cotangent: Tensor) -> tuple[Tensor, ...]:
                return torch.autograd.grad(out, z, cotangent, retain_graph=True)

        count = batch.numel()
        index = torch.arange(count, device=z.device).reshape(batch)
        weight = torch.cos(torch.arange(out.numel(), device=z.device, dtype=z.dtype)).reshape(out.shape) + 1.5
        halves = [(index >> bit) % 2 == 1 for bit in range((count - 1).bit_length())]
        for chosen in (*halves, *(~half for half in halves)):
            mask = chosen.reshape(chosen.shape + (1,) * (out.ndim - chosen.ndim))
            (g,) = pull(torch.where(mask, weight, 0))
            leak = torch.where(chosen.unsqueeze(-1), 0, g)
            if bool((torch.isfinite(leak) & (leak != 0)).any()):
                raise ValueError(
                    f"{argument}: expected batch elements that do not see each other, got one whose value at an "
                    "element depends on another (a mean over the batch, BatchNorm, attention across it?); its gradient "
                    f"would be wrong. Raise `{event_ndim_name}` so that coupled elements form one unknown"
                )
        return bool(torch.isfinite(out).all())
