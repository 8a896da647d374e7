r"""A deep-equilibrium layer: the fixed point of any module, :math:`z^* = f_\theta(z^*, x)`."""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import optree
import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

from difflayers._checks import compute_dtype, renamed
from difflayers._solution import OnFailure, Solution, check_policy
from difflayers.linalg._autodiff import check_inference_mode, opaque, physical, plain

from ._adjoints import Adjoint, Implicit
from ._anderson import Anderson
from ._fixed_point import FIXED_POINT
from ._iterate import IterativeSolver
from ._problem import solve_inner

Tensors = dict[str, Tensor]
Masks = dict[str, list[Tensor]]

LAYER = replace(FIXED_POINT, name="FixedPoint", argument="module")
NAMES = {"args[0]": "parameters", "args[1]": "buffers", "args[2]": "masks", "args[3]": "inputs"}  # in errors


class FixedPoint(nn.Module):
    r"""The fixed point of `module` as a layer, differentiated by the implicit function theorem.

    .. math:: z^* = f_\theta(z^*, x)

    for every batch element alone. The forward pass records nothing, so memory does not grow with the solver's steps;
    the backward pass is one linear solve with :math:`I - \partial f / \partial z`.

    Args:
        module: Any ``nn.Module`` called as ``module(z, *inputs)`` that returns the structure and shapes of `z`. Batch
            elements must not see each other.
        solver: ``Anderson()``, ``Picard()``, or a root solver applied to ``z - f(z)``.
        adjoint: ``Implicit()``, ``Neumann(terms)``, ``OneStep()`` or ``Unrolled(max_steps)``.
        event_ndim: Trailing dimensions of `z` that form one unknown.
        init: ``init(*inputs) -> z``, the start of the solve. None: zeros shaped like the first input.
        dropout: ``"frozen"``: each ``nn.Dropout`` (also 1d, 2d, 3d) draws one mask a call, the same in every step and
            in every derivative. None: dropout that is active is refused, since a fixed point of a random map does not
            exist.
        spectral_normalization: None, or the largest operator norm that the weight of any linear or convolutional
            submodule may have: larger ones are scaled down to it, once a call, by exact singular values. For
            convolutions the sum over kernel taps of the norms is bounded, which bounds the operator with zero or
            circular padding. With ``f = tanh(linear(z) + x)`` a number below 1 makes `f` a contraction.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Shape:
        Inputs are pytrees of tensors and numbers; integer tensors (indices) are constants. The output has the structure
        of the start. `init` given in the call overrides the layer's own: for warm starts.

    Raises:
        ValueError: When called, for a submodule that cannot be iterated: BatchNorm in training mode, active dropout
            unless frozen, buffers changed in place, random numbers drawn in every evaluation; each named.
        SolveError: If an element failed, or in backward if :math:`I - \partial f/\partial z` is singular there.

    Differentiable in the module's parameters and buffers and in every floating-point input, to any order, forward and
    reverse, in training and in evaluation mode. With `spectral_normalization`, second derivatives exist where the
    singular values of the scaled weights are distinct, and are NaN elsewhere.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from difflayers.implicit import FixedPoint
        >>> class Cell(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = nn.Linear(8, 8)
        ...
        ...     def forward(self, z, x):
        ...         return torch.tanh(self.linear(z) + x)
        >>> layer = FixedPoint(Cell(), spectral_normalization=0.9)
        >>> z = layer(torch.randn(16, 8))
        >>> z.square().mean().backward()
        >>> layer.module.linear.weight.grad.shape
        torch.Size([8, 8])

    Source: S. Bai, J. Z. Kolter, V. Koltun, Deep Equilibrium Models, NeurIPS 2019.

    Departure: exact adjoint (the published code solves it loosely with Broyden's method); every batch element stops on
    its own; the published code freezes weight and variational dropout through state in the modules, here masks are
    arguments of the solve, so that they take part in ``vmap`` and higher derivatives; spectral norms are exact instead
    of one step of power iteration, so that they need no state and training agrees with evaluation.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        solver: IterativeSolver = Anderson(),
        adjoint: Adjoint = Implicit(),
        event_ndim: int = 1,
        init: Callable[..., Any] | None = None,
        dropout: Literal["frozen"] | None = None,
        spectral_normalization: float | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"module: expected an nn.Module, got {type(module).__name__} (fixed_point takes functions)"
            )
        if dropout not in (None, "frozen"):
            raise ValueError(f'dropout: expected None or "frozen", got {dropout!r}')
        bound = spectral_normalization
        if bound is not None and (isinstance(bound, bool) or not 0 < bound < math.inf):
            raise ValueError(f"spectral_normalization: expected None or a positive number, got {bound!r}")
        check_policy(on_failure)
        self.module = module
        self.solver = solver
        self.adjoint = adjoint
        self.event_ndim = event_ndim
        self.init = init
        self.dropout = dropout
        self.spectral_normalization = bound
        self.on_failure: OnFailure = on_failure
        self._updates: dict[tuple[bool, ...], _Update] = {}

    def extra_repr(self) -> str:
        """The options that differ from one layer to another."""
        return (
            f"solver={self.solver}, adjoint={self.adjoint}, event_ndim={self.event_ndim}, dropout={self.dropout!r}, "
            f"spectral_normalization={self.spectral_normalization}, on_failure={self.on_failure!r}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_updates": {}}  # a cache

    def forward(self, *inputs: Any, init: Any = None) -> Any:
        """The fixed point for `inputs`, solved from `init` if that is given."""
        return self._solve(inputs, init, self.on_failure).value

    def forward_ex(self, *inputs: Any, init: Any = None) -> Solution[Any]:
        """As calling the layer, returning an unchecked :class:`~difflayers.Solution`."""
        return self._solve(inputs, init, "ignore")

    def jacobian_penalty(
        self, z: Any, *inputs: Any, samples: int = 1, generator: torch.Generator | None = None
    ) -> Tensor:
        r"""An estimate of :math:`\|\partial f/\partial z\|_F^2 / n` at `z`, one number per batch element.

        Added to the loss, it keeps the update a fast contraction. Hutchinson's estimate with Gaussian probes,
        :math:`\mathbb E \|J^T \epsilon\|^2 / n`, where n is the size of one unknown.

        Args:
            z: The layer's output.
            inputs: The inputs it was computed from.
            samples: Number of probes; the cost is one backward pass of `module` each.
            generator: Source of the probes. Frozen dropout draws a mask of its own here.

        Returns:
            ``(*batch)`` estimates, differentiable in `z`, the inputs and the parameters.

        Source: S. Bai, V. Koltun, J. Z. Kolter, Stabilizing Equilibrium Models by Jacobian Regularization, ICML 2021.
        """
        if samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}")
        update, args = self._bind(z, inputs)
        leaves, spec = optree.tree_flatten(z)
        check_inference_mode()
        _, pull = vjp(lambda *leaves: tuple(optree.tree_leaves(update(spec.unflatten(leaves), *args))), *leaves)
        total, size = (
            torch.zeros((), device=leaves[0].device, dtype=leaves[0].dtype),
            sum(leaf.shape[leaf.ndim - self.event_ndim :].numel() for leaf in leaves),
        )
        for _ in range(samples):
            probes = tuple(
                torch.randn(leaf.shape, dtype=leaf.dtype, device=leaf.device, generator=generator) for leaf in leaves
            )
            for g in pull(probes):
                squares = g * g
                total = total + (squares.flatten(g.ndim - self.event_ndim).sum(-1) if self.event_ndim else squares)
        return total / (samples * size)

    @opaque
    def _solve(self, inputs: Any, init: Any, on_failure: OnFailure) -> Solution[Any]:
        start = self._start(inputs) if init is None else init
        dtypes = optree.tree_map(_dtype, start)
        first = next((leaf for leaf in optree.tree_leaves(start) if isinstance(leaf, Tensor)), None)
        autocast = first is not None and not first.is_meta and torch.is_autocast_enabled(first.device.type)
        if autocast:  # half-precision inputs meet float32 parameters; inside the solve autocast is off
            start, inputs = optree.tree_map(_lift, start), optree.tree_map(_lift, inputs)
        update, args = self._bind(start, inputs)
        with renamed(**NAMES):
            solution = solve_inner(
                LAYER,
                update,
                start,
                optree.tree_map(_lift, args) if autocast else args,
                event_ndim=self.event_ndim,
                arg_ndims=None,
                solver=self.solver,
                adjoint=self.adjoint,
                on_failure=on_failure,
            )
        if not autocast:
            return solution
        return replace(solution, value=optree.tree_map(lambda t, dtype: t.to(dtype), solution.value, dtypes))

    def _start(self, inputs: Any) -> Any:
        if self.init is not None:
            return self.init(*inputs)
        if not inputs or not isinstance(inputs[0], Tensor) or not inputs[0].is_floating_point():
            got = "none" if not inputs else getattr(inputs[0], "dtype", type(inputs[0]).__name__)
            raise ValueError(
                f"inputs[0]: expected a floating-point tensor shaped like the unknown, got {got}; otherwise give `init`"
            )
        return torch.zeros_like(inputs[0])

    def _bind(self, start: Any, inputs: Any) -> tuple[_Update, Any]:
        """What is iterated, and its arguments: parameters, buffers, masks, inputs."""
        with _lock(self.module):
            return self._bind_alone(start, inputs)

    def _bind_alone(self, start: Any, inputs: Any) -> tuple[_Update, Any]:
        modes = tuple(m.training for m in self.module.modules())
        update = self._updates.get(modes)
        if update is None or update.module is not self.module:
            update = self._updates[modes] = _Update(self.module, modes)
        dropping = [name for name, m in self.module.named_modules() if isinstance(m, _DropoutNd) and m.training and m.p]
        refuse_stateful(self.module, dropping if self.dropout is None else [])
        leaves, spec = optree.tree_flatten(inputs)
        constants = {i: plain(f"inputs, leaf {i}", leaf) for i, leaf in enumerate(leaves) if not _followed(leaf)}
        if constants:
            update = _Update(self.module, modes, constants)
            inputs = spec.unflatten([0 if i in constants else leaf for i, leaf in enumerate(leaves)])
        parameters = _own_tensors(self.module, "_parameters")
        if self.spectral_normalization is not None:
            parameters.update(_bounded(self.module, parameters, self.spectral_normalization))
        buffers = {name: b for name, b in _own_tensors(self.module, "_buffers").items() if _followed(b)}
        masks = update.draw(dropping, start, parameters, buffers, inputs) if dropping else {}
        return update, (parameters, buffers, masks, inputs)


class _Update:
    """`module` as a function of its arguments alone, in the modes it had when the layer was called.

    Backward evaluates it again, perhaps after somebody has called ``eval()`` or ``train()``.
    """

    def __init__(self, module: nn.Module, modes: tuple[bool, ...], constants: dict[int, Any] | None = None) -> None:
        self.module, self.modes, self.constants = module, modes, constants or {}
        self.checked = False

    def __call__(self, z: Any, parameters: Tensors, buffers: Tensors, masks: Masks, inputs: Any) -> Any:
        with self._replaced({name: _Replay(drawn) for name, drawn in masks.items()}):
            return self._evaluate(z, parameters, buffers, inputs)

    def draw(
        self, names: list[str], z: Any, parameters: Tensors, buffers: Tensors, inputs: Any
    ) -> dict[str, list[Tensor]]:
        """One mask for every call of the named dropout modules, by one evaluation at the start."""
        found = dict(self.module.named_modules())
        drawn: dict[str, list[Tensor]] = {name: [] for name in names}
        copies = {name: b.clone() for name, b in buffers.items()}
        with torch.no_grad(), self._replaced({name: _Draw(found[name], drawn[name]) for name in names}):
            self._call(z, {**parameters, **copies}, inputs)
        return drawn

    def _evaluate(self, z: Any, parameters: Tensors, buffers: Tensors, inputs: Any) -> Any:
        if self.checked:
            return self._call(z, {**parameters, **buffers}, inputs)
        # the first evaluation works on copies, so that a module which is refused keeps its buffers
        inference = torch.is_inference_mode_enabled()  # copies made in it would not count what is written into them
        with torch.inference_mode(False) if inference else contextlib.nullcontext():
            copies = {name: b.clone() for name, b in (_own_tensors(self.module, "_buffers") | buffers).items()}
        device = optree.tree_leaves(z)[0].device
        before = _random_state(device)
        out = self._call(z, {**parameters, **copies}, inputs)
        changed = [name for name, b in copies.items() if b._version]
        if changed:
            raise ValueError(
                f"{_owner(self.module, changed[0])}: expected a submodule that leaves its buffers alone, got one that "
                f"changes `{changed[0]}` in every evaluation, of which a solve makes many; call .eval() on it (for "
                "torch's spectral_norm: use spectral_normalization=)"
            )
        drawn = not torch.equal(before, _random_state(device))  # perhaps by another thread: then nothing changes
        if drawn and not _equal(out, self._call(z, {**parameters, **copies}, inputs)):
            raise ValueError(
                "module: expected the same result in every evaluation, got one that draws random numbers (dropout "
                "outside nn.Dropout, noise?): draw them outside and pass them as an input, or call .eval()"
            )
        self.checked = True
        return out

    def _call(self, z: Any, tensors: Tensors, inputs: Any) -> Any:
        if self.constants:
            leaves, spec = optree.tree_flatten(inputs)
            inputs = spec.unflatten([self.constants.get(i, leaf) for i, leaf in enumerate(leaves)])
        with _lock(self.module):
            return functional_call(self.module, tensors, (z, *inputs), tie_weights=False)

    @contextlib.contextmanager
    def _replaced(self, forwards: dict[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        with _lock(self.module), self._swapped(forwards):
            yield

    @contextlib.contextmanager
    def _swapped(self, forwards: dict[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """The modes of the call, and other `forward`s for some submodules."""
        moved = [
            (m, m.training) for m, mode in zip(self.module.modules(), self.modes, strict=True) if m.training != mode
        ]
        found = dict(self.module.named_modules()) if forwards else {}
        own = [(found[name], found[name].__dict__.get("forward")) for name in forwards]
        try:
            for m, mode in moved:
                m.training = not mode
            for name, forward in forwards.items():
                found[name].__dict__["forward"] = forward
            yield
        finally:
            for m, mode in moved:
                m.training = mode
            for m, before in own:
                m.__dict__.pop("forward", None)
                if before is not None:
                    m.__dict__["forward"] = before


def _equal(a: Any, b: Any) -> bool:
    pairs = zip(optree.tree_leaves(a), optree.tree_leaves(b), strict=True)
    return all(torch.equal(physical(x), physical(y)) for x, y in pairs)


_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def _lock(module: nn.Module) -> Any:
    """One lock a module: an evaluation swaps its tensors and modes, which no other thread may see."""
    lock = _locks.get(module)
    return _locks.setdefault(module, threading.RLock()) if lock is None else lock


class _Draw:
    """Stands for a dropout module: draws a mask and keeps it."""

    def __init__(self, module: nn.Module, drawn: list[Tensor]) -> None:
        self.forward, self.drawn = module.forward, drawn

    def __call__(self, x: Tensor) -> Tensor:
        mask = self.forward(torch.ones(x.shape, dtype=x.dtype, device=x.device))
        self.drawn.append(mask)
        return x * mask


class _Replay:
    """Stands for a dropout module: multiplies with the masks drawn before, in the order of the calls."""

    def __init__(self, masks: list[Tensor]) -> None:
        self.masks = iter(masks)

    def __call__(self, x: Tensor) -> Tensor:
        return x * next(self.masks)


def refuse_stateful(module: nn.Module, dropping: list[str]) -> None:
    """Refuses submodules that cannot be iterated, by name; `dropping` names active dropout that is not frozen."""
    for name, m in module.named_modules():
        kind, name = type(m).__name__, f"module.{name}".rstrip(".")
        if isinstance(m, _BatchNorm) and m.training:
            raise ValueError(
                f"{name}: expected evaluation mode, got {kind} in training mode: it couples batch elements and changes "
                "its statistics in every evaluation. Use LayerNorm or GroupNorm, or call .eval() on it"
            )
        if isinstance(m, nn.AlphaDropout | nn.FeatureAlphaDropout) and m.training and m.p:
            raise ValueError(f"{name}: expected Dropout or evaluation mode, got {kind}, which cannot be frozen")
        if isinstance(m, nn.MultiheadAttention | nn.RNNBase) and m.training and m.dropout:
            raise ValueError(f"{name}: expected dropout=0 or evaluation mode, got {kind} with dropout={m.dropout}")
    for name in dropping:
        raise ValueError(
            f"module.{name}".rstrip(".") + ": expected evaluation mode, got active dropout: a random map has no fixed "
            'point. dropout="frozen" draws one mask a call'
        )


def _bounded(module: nn.Module, parameters: Tensors, limit: float) -> Tensors:
    """Weights of linear and convolutional submodules, scaled down to operator norms of at most `limit`."""
    out = {}
    for prefix, m in module.named_modules():
        name = f"{prefix}.weight".lstrip(".")
        if isinstance(m, nn.Linear | _ConvNd) and name in parameters:
            weight = parameters[name]
            wide = weight.to(compute_dtype(weight.dtype))
            norm = _operator_norm(m, wide)
            out[name] = (wide * (limit / norm.clamp_min(limit))).to(weight.dtype)
    return out


def _operator_norm(m: nn.Module, weight: Tensor) -> Tensor:
    if isinstance(m, nn.Linear):
        return torch.linalg.matrix_norm(weight, 2)
    # a convolution is a sum over taps of shifts (of norm at most 1) and channel matrices, block diagonal in the groups;
    # a transposed one is the adjoint of that
    assert isinstance(m, _ConvNd | _ConvTransposeNd)
    blocks = weight.reshape(m.groups, weight.shape[0] // m.groups, weight.shape[1], -1)
    return torch.linalg.matrix_norm(blocks.movedim(-1, 0), 2).amax(-1).sum()


def _followed(leaf: Any) -> bool:
    """Whether `leaf` goes through the engine's arguments; integer tensors and other objects are constants."""
    if isinstance(leaf, Tensor):
        return leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.bool
    return isinstance(leaf, bool | int | float)


def _own_tensors(module: nn.Module, kind: str) -> Tensors:
    """Parameters or buffers by name, one name for each place in a module.

    A parameter shared by two modules has two names here, and its gradients add up. Ties are not left to
    ``functional_call``: in torch 2.13 it leaves a module that is reachable by two names with the wrong tensors.
    """
    places = ((prefix, getattr(m, kind)) for prefix, m in module.named_modules())
    return {f"{prefix}.{name}".lstrip("."): t for prefix, own in places for name, t in own.items() if t is not None}


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if isinstance(leaf, Tensor) else None


def _lift(leaf: Any) -> Any:
    return leaf.to(compute_dtype(leaf.dtype)) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _owner(module: nn.Module, name: str) -> str:
    """The submodule that owns a buffer, as a user would find it."""
    return f"module.{name.rpartition('.')[0]}".rstrip(".")
