"""What the library's Functions need from autograd, and where torch needs a hand.

Everything here works at any nesting of ``torch.func`` transforms, under plain autograd, and inside a Function's
forward.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._functorch import pyfunctorch as _functorch_stack
from torch.func import vjp

from difflayers._checks import compute_dtype

F = TypeVar("F", bound=Callable[..., Any])
_functorch = torch._C._functorch
_hooks = torch._C._autograd

# The level of forward mode belongs to the process and not to the thread (still so in torch 2.13), so two threads in
# torch.func.jvp fail, or worse. Whoever enters it, or asks whether it is on before entering, holds this.
forward_mode_lock = threading.RLock()


def transforms_active() -> bool:
    """Whether a ``torch.func`` transform or forward mode is running at this point."""
    return bool(_functorch.maybe_current_level()) or forward_ad._current_level >= 0


@functools.cache
def _derives_in_inference_mode() -> bool:
    """Whether torch.func does. In torch 2.6 it does not, and says nothing: every derivative is zero; 2.13 is right."""
    with torch.inference_mode():
        one = torch.ones((), device="cpu")
        return bool(vjp(torch.square, one)[1](one)[0] == 2)


def check_inference_mode() -> None:
    """Refuses inference mode before a derivative is taken, where this torch would return zeros."""
    if torch.compiler.is_compiling():  # Dynamo cannot follow the question
        return
    if torch.is_inference_mode_enabled() and not _derives_in_inference_mode():
        raise RuntimeError(
            f"torch {torch.__version__} takes every derivative to be zero inside torch.inference_mode(), and this call "
            "needs some: use torch.no_grad() instead, or a newer torch"
        )


def pullback(
    f: Callable[..., Tensor], *primals: Tensor, record: bool | None = None
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """``f(*primals)`` and its pullback: ``torch.func.vjp``, at half its cost.

    Outside of transforms plain autograd does it: on aliases of the primals, so that only the paths through them count,
    and recording the products themselves where `record` (None: grad mode) says so. The pullback may be called several
    times.
    """
    check_inference_mode()
    if transforms_active() or torch.is_inference_mode_enabled():  # inference mode records no graph of its own
        return vjp(f, *primals)
    record = torch.is_grad_enabled() if record is None else record
    with torch.enable_grad():
        aliases = [p.view_as(p) if record and p.requires_grad else p.detach().requires_grad_() for p in primals]
        out = f(*aliases)
    if not out.requires_grad:
        return out, lambda g: tuple(torch.zeros_like(p) for p in primals)

    def pull(g: Tensor) -> tuple[Tensor, ...]:
        return gradients(out, aliases, g, retain_graph=True, create_graph=record)

    return (out if record else out.detach()), pull


def gradients(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    cotangents: Tensor | Sequence[Tensor] | None = None,
    *,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    rows: int | None = None,
) -> tuple[Tensor, ...]:
    """``torch.autograd.grad`` with zeros for inputs that take no part, of as many `rows` as the cotangents have.

    In torch 2.6 those of ``materialize_grads=True`` require a gradient whether a graph is wanted or not, and in no
    version do they have the rows of batched cotangents.
    """
    inputs = [inputs] if isinstance(inputs, Tensor) else inputs
    found = torch.autograd.grad(
        outputs, inputs, cotangents, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True,
        is_grads_batched=rows is not None,
    )  # fmt: skip
    shape = () if rows is None else (rows,)
    return tuple(
        t.new_zeros((*shape, *t.shape), requires_grad=create_graph) if g is None else g
        for g, t in zip(found, inputs, strict=True)
    )


def push_forward(f: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """Jacobian-vector product."""
    return linearise(f, *primals)[1](*tangents)


def linearise(f: Callable[..., Tensor], *primals: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
    """``f(*primals)`` and its directional derivative by two reverse passes: torch does not nest forward mode."""
    record = torch.is_grad_enabled()
    out, pull = pullback(f, *primals, record=True)
    u = torch.zeros_like(out)
    if transforms_active() or torch.is_inference_mode_enabled():
        _, push = vjp(pull, u)
        return out, lambda *tangents: push(tuple(tangents))[0]
    with torch.enable_grad():
        u.requires_grad_()
        columns = pull(u)

    def push_plain(*tangents: Tensor) -> Tensor:
        pairs = [(c, t) for c, t in zip(columns, tangents, strict=True) if c.requires_grad]
        if not pairs:
            return torch.zeros_like(out)
        outputs, moves = zip(*pairs, strict=True)
        return gradients(outputs, u, moves, retain_graph=True, create_graph=record)[0]

    return (out if record else out.detach()), push_plain


def vjp_where(f: Callable[..., Tensor], primals: Sequence[Any], wanted: Sequence[bool], g: Tensor) -> list[Any]:
    """Cotangents of the `wanted` primals, None for the others (integers, absent, or nobody asks)."""
    picked = [i for i, w in enumerate(wanted) if w]
    if not picked:
        return [None] * len(primals)
    _, pull = pullback(_restrict(f, primals, picked), *(primals[i] for i in picked))
    cotangents = dict(zip(picked, pull(g), strict=True))
    return [cotangents.get(i) for i in range(len(primals))]


def jvp_where(f: Callable[..., Tensor], primals: Sequence[Any], tangents: Sequence[Tensor | None]) -> Tensor | None:
    """The directional derivative along the tangents that exist, None where there is none."""
    picked = [i for i, t in enumerate(tangents) if t is not None]
    if not picked:
        return None
    # primals are expanded over the batch where a failed element was masked, and their tangents are not
    moving = [t.expand_as(primals[i]) for i, t in enumerate(tangents) if t is not None]
    return push_forward(_restrict(f, primals, picked), [primals[i] for i in picked], moving)


def _restrict(f: Callable[..., Tensor], primals: Sequence[Any], picked: Sequence[int]) -> Callable[..., Tensor]:
    """`f` as a function of the picked arguments only."""
    if len(picked) == len(primals):
        return f

    def restricted(*some: Tensor) -> Tensor:
        full = list(primals)
        for i, t in zip(picked, some, strict=True):
            full[i] = t
        return f(*full)

    return restricted


@contextlib.contextmanager
def plain_forward(like: Tensor) -> Iterator[None]:
    """What a Function's forward runs in: autocast off, and no hooks on saved tensors.

    Solvers work in the dtype they were given. Hooks set by the user (activation checkpointing, offloading) are for what
    the user's graph saves, which a Function declares itself; its own temporary graphs are none of their business, and
    ``torch.func`` refuses to run under them.
    """
    removed = []
    top: Any = getattr(_hooks, "_top_saved_tensors_default_hooks", lambda _: None)  # before torch 2.8 they stay
    while True:
        pair: Any = top(True)
        if pair is None:
            break
        removed.append(pair)
        _hooks._pop_saved_tensors_default_hooks()
    try:
        with autocast_off(like):
            yield
    finally:
        for pair in reversed(removed):
            _hooks._push_saved_tensors_default_hooks(*pair)


def autocasting(like: Tensor) -> bool:
    """Whether autocast is on for the device of `like`."""
    return like.device.type != "meta" and torch.is_autocast_enabled(like.device.type)


def lifted_under_autocast(t: Any) -> Any:
    """Half precision to float32 where autocast is on: activations are halved there, weights and matrices are not."""
    if isinstance(t, Tensor) and t.is_floating_point() and autocasting(t):
        return t.to(compute_dtype(t.dtype))
    return t


def autocast_off(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast switched off for the device of `like`, if it is on."""
    return torch.autocast(like.device.type, enabled=False) if autocasting(like) else contextlib.nullcontext()


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Forward mode switched on, inside the rules of a Function.

    torch switches it off there, which loses the derivative of `jvp` along an outer forward-mode level without a word;
    :func:`primal` is the other half of the remedy.
    """
    before = torch._C._is_fwd_grad_enabled()
    torch._C._set_fwd_grad_enabled(True)
    try:
        yield
    finally:
        torch._C._set_fwd_grad_enabled(before)


def primal(t: Any) -> Any:
    """`t` without its tangent at the current level: inside `jvp`, only outer levels may still follow it."""
    return forward_ad.unpack_dual(t).primal if isinstance(t, Tensor) and t.is_floating_point() else t


def alive(t: Any) -> Any:
    """`t` out of the wrapper of a ``torch.func`` level that has ended.

    ``jacrev`` calls backward after its level is closed, and torch trips over such a wrapper in nested transforms.
    """
    return _functorch.unwrap_if_dead(t) if isinstance(t, Tensor) else t


def opaque(function: F) -> F:
    """Decorator: under ``torch.compile`` the call is one graph break and runs as it does without.

    ``torch.compiler.disable`` imports the compiler, which takes a second; whoever compiles has imported it already.
    """
    disabled: Any = None

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    wrapper._torchdynamo_disable = True  # type: ignore[attr-defined]
    return wrapper  # type: ignore[return-value]


def plain(name: str, constant: Any) -> Any:
    """An integer tensor without the wrappers that ``torch.func`` puts on whatever is computed inside a transform.

    The solve runs outside them, where a wrapped tensor that a function holds on to cannot be used.
    """
    if torch.compiler.is_compiling():  # Dynamo can follow neither the wrappers nor the question
        return constant
    while isinstance(constant, Tensor) and _functorch.is_functorch_wrapped_tensor(constant):
        if _functorch.is_batchedtensor(constant):
            raise ValueError(f"{name}: expected an integer tensor that vmap does not batch, got one that it does")
        constant = _functorch.get_unwrapped(constant)
    return constant


def outside_transforms() -> contextlib.AbstractContextManager[Any]:
    """For tensors that have nothing to do with the transforms around, which would wrap all that is made inside them.

    What they wrap has no array, and in torch 2.6 no `tolist` either.
    """
    return _functorch_stack.temporarily_clear_interpreter_stack()


def physical(t: Tensor) -> Tensor:
    """`t` without any wrapper of ``torch.func``, vmapped dimensions visible: to look at data in an error path.

    A transform wraps anew what is computed of it, which `bool`, `int` and `float` can read; for the rest, see
    :func:`outside_transforms`.
    """
    if torch.compiler.is_compiling():  # as in `plain`
        return t.detach()
    while _functorch.is_functorch_wrapped_tensor(t):
        t = _functorch.get_unwrapped(t)
    return t.detach()


def sample(t: Tensor) -> Tensor:
    """A plain tensor with the shape `t` has at this level, and its numbers: the first of every vmapped dimension.

    Ones where such a dimension is empty.
    """
    while _functorch.is_functorch_wrapped_tensor(t):
        dim = _functorch.maybe_get_bdim(t) if _functorch.is_batchedtensor(t) else None
        t = _functorch.get_unwrapped(t)
        if dim is not None and t.shape[dim] == 0:
            t = t.new_ones([size for i, size in enumerate(t.shape) if i != dim])
        elif dim is not None:
            t = t.select(dim, 0)
    return t.detach()


def quick_apply(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Class decorator: binds the signature of `forward` once; ``apply`` would inspect it at every call."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function
