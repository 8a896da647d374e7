"""A layer as the contract sees it: one function of tensors, its inputs, and what is known about its result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from difflayers._solution import Solution

Inputs = tuple[Tensor, ...]
Function = Callable[..., Tensor]


class Hostile(NamedTuple):
    """Input that breaks careless layers, and what this one promises for it.

    Attributes:
        name: What is hostile about it, for example ``"tie"`` or ``"rank deficient"``.
        inputs: Float64 tensors, as many as the case has.
        raises: The exception, or one of several, to expect. None: value and first derivative are finite, or the
            backward pass raises; never a silent NaN.
        match: A regular expression that the message must contain.
        fn: Another function of `inputs`, where the case's own is not meant.
        oracle: What the value has to be; None: the oracle of the case, if there is one.
        may_fail: An honest SolveError or SolveWarning is as good as a sound result.
    """

    name: str
    inputs: Inputs
    raises: type[Exception] | tuple[type[Exception], ...] | None = None
    match: str = ""
    fn: Function | None = None
    oracle: Function | None = None
    may_fail: bool = False


class Wrong(NamedTuple):
    """A call that must end in a ``ValueError``.

    Attributes:
        name: What is wrong.
        inputs: The tensors to pass.
        match: A regular expression for the message: the argument, what was expected, what came.
        fn: Another function of `inputs`, where the case's own is not meant.
    """

    name: str
    inputs: Inputs
    match: str
    fn: Function | None = None


@dataclass(frozen=True, eq=False)
class LayerCase:
    """One layer with small inputs, ready for :func:`~difflayers.testing.check_layer`.

    Only the first three fields are needed; each other one switches on the clauses that use it. Functions take the
    tensors of `inputs` in order, float64 on any device, and must accept any number of leading batch dimensions.

    Args:
        name: Identifies the case in reports, ``"layer solver variant"``.
        fn: ``fn(*inputs) -> value`` of shape ``(*batch, event...)``; raises where a solve fails.
        inputs: At most 24 float64 numbers in all. Each tensor has one batch dimension, or none if all elements share
            it. Derivatives are taken in every one of them, so the function must be smooth there.
        oracle: ``oracle(*inputs) -> value`` by a computation independent of the layer: a closed form, numpy, scipy,
            brute force. Gets what `fn` gets and is never differentiated.
        invariants: Functions ``(value, *inputs) -> tensor`` that must return zeros: optimality, feasibility.
        event_ndims: Trailing dimensions of each input that belong to one element. None: everything behind the first
            dimension, so that all inputs are batched.
        names: The name of each input in error messages; None where messages do not name it. Empty: not known.
        layer: The public function or class under test; None: the first word of `name`.
        source: Where the layer comes from, for ``python -m difflayers list``.
        representative: Runs the costly clauses too (full gradcheck, ``torch.compile``): one case a layer.
        unrolled: The same value by plain torch or unrolled steps, with exact derivatives by autograd.
        tolerant: `fn` with ``on_failure="nan"``.
        solution: `fn` as its ``_ex`` form, returning a :class:`~difflayers.Solution`.
        starved: `fn` with a solver that stops after one step; must warn.
        starved_solution: Its ``_ex`` form.
        bad: Index of an input with a batch dimension, and the event that makes an element fail. None: NaN in the first
            batched input.
        captured: ``captured(t)`` runs the layer on a function that takes ``t``, shaped like the first input, from its
            closure: must be refused when ``t`` is differentiated, and work when it is not.
        hostile: Input beyond the generic list (NaN, Inf, duplicates, one bad element).
        wrong: Calls that must end in a ``ValueError``.
        make_module: Builds an ``nn.Module`` in float64, for layers that have one.
        module_inputs: Tensors to call that module with.
        half: The layer accepts half precision by lifting it.
        exact_bits: Other elements do not feel a bad one to the bit. False: to 100 rounding units.
        exempt: Clauses that do not hold by design, with the reason.
        tol: Relative tolerance between two computations of the same number in float64.
        oracle_tol: Relative tolerance to the oracle and of invariants.
        single_tol: Relative tolerance of a float32 result to the float64 one.
    """

    name: str
    fn: Function
    inputs: Inputs
    oracle: Function | None = None
    invariants: tuple[Callable[..., Tensor], ...] = ()
    event_ndims: tuple[int, ...] | None = None
    names: tuple[str | None, ...] = field(default=(), kw_only=True)
    layer: str | None = field(default=None, kw_only=True)
    source: str = field(default="", kw_only=True)
    representative: bool = field(default=False, kw_only=True)
    unrolled: Function | None = field(default=None, kw_only=True)
    tolerant: Function | None = field(default=None, kw_only=True)
    solution: Callable[..., Solution[Tensor]] | None = field(default=None, kw_only=True)
    starved: Function | None = field(default=None, kw_only=True)
    starved_solution: Callable[..., Solution[Tensor]] | None = field(default=None, kw_only=True)
    bad: tuple[int, Tensor] | None = field(default=None, kw_only=True)
    captured: Function | None = field(default=None, kw_only=True)
    hostile: tuple[Hostile, ...] = field(default=(), kw_only=True)
    wrong: tuple[Wrong, ...] = field(default=(), kw_only=True)
    make_module: Callable[[], nn.Module] | None = field(default=None, kw_only=True)
    module_inputs: Inputs = field(default=(), kw_only=True)
    half: bool = field(default=True, kw_only=True)
    exact_bits: bool = field(default=True, kw_only=True)
    exempt: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    tol: float = field(default=1e-8, kw_only=True)
    oracle_tol: float = field(default=1e-8, kw_only=True)
    single_tol: float = field(default=1e-3, kw_only=True)

    def __post_init__(self) -> None:
        for i, t in enumerate(self.inputs):
            if t.dtype != torch.float64:
                raise ValueError(f"inputs[{i}]: expected float64 in case {self.name!r}, got {t.dtype}")
        if self.event_ndims is not None and len(self.event_ndims) != len(self.inputs):
            raise ValueError(f"event_ndims: expected {len(self.inputs)} numbers, got {len(self.event_ndims)}")
        for i, (t, k) in enumerate(zip(self.inputs, self.ndims, strict=True)):
            if t.ndim - k not in (0, 1):
                raise ValueError(
                    f"inputs[{i}]: expected {k} or {k + 1} dimensions in case {self.name!r}, got shape {tuple(t.shape)}"
                )
        sizes = {t.shape[0] for t, b in zip(self.inputs, self.batched, strict=True) if b}
        if len(sizes) > 1:
            raise ValueError(f"inputs: expected one batch size in case {self.name!r}, got {sorted(sizes)}")
        if sum(t.numel() for t in self.inputs) > 24:
            raise ValueError(f"inputs: expected at most 24 numbers in case {self.name!r}")

    @property
    def ndims(self) -> tuple[int, ...]:
        """Trailing dimensions of each input that belong to one element."""
        return tuple(t.ndim - 1 for t in self.inputs) if self.event_ndims is None else self.event_ndims

    @property
    def batched(self) -> tuple[bool, ...]:
        """Which inputs carry a batch dimension; the others are shared by all elements."""
        return tuple(t.ndim > k for t, k in zip(self.inputs, self.ndims, strict=True))

    @property
    def shared(self) -> tuple[int, ...]:
        """Indices of the inputs that all elements share."""
        return tuple(i for i, b in enumerate(self.batched) if not b)

    @property
    def in_dims(self) -> tuple[int | None, ...]:
        """For ``vmap`` over the batch."""
        return tuple(0 if b else None for b in self.batched)

    @property
    def size(self) -> int:
        """Number of batch elements; 0 where no input carries a batch dimension."""
        return next((t.shape[0] for t, b in zip(self.inputs, self.batched, strict=True) if b), 0)

    @property
    def of(self) -> str:
        """The layer this case belongs to."""
        return self.layer or self.name.split()[0]

    def at(self, device: torch.device, dtype: torch.dtype = torch.float64) -> Inputs:
        """Fresh copies of the inputs."""
        return tuple(t.detach().to(device, dtype, copy=True) for t in self.inputs)

    def element(self, inputs: Inputs, i: int) -> Inputs:
        """The inputs of one batch element, shared ones as they are."""
        return tuple(t[i] if b else t for t, b in zip(inputs, self.batched, strict=True))

    def each(self, inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The inputs with `change` applied to those that carry a batch dimension."""
        return tuple(change(t) if b else t for t, b in zip(inputs, self.batched, strict=True))

    def spoiled(self, inputs: Inputs, position: int) -> Inputs:
        """The inputs with the element at `position` replaced by one that fails."""
        index, event = self.bad or (
            self.batched.index(True),
            torch.full((), math.nan, dtype=torch.float64, device="cpu"),
        )
        out = list(inputs)
        spoilt = out[index].clone()
        spoilt[position] = event.to(spoilt)
        out[index] = spoilt
        return tuple(out)


def leaves(inputs: Inputs) -> Inputs:
    """Copies that require a gradient."""
    return tuple(t.detach().clone().requires_grad_() for t in inputs)


def wave(like: Tensor, shift: float = 0.0) -> Tensor:
    """Fixed numbers between 0.5 and 2.5 without pattern: weights for sums, cotangents, tangents."""
    ramp = torch.arange(like.numel(), dtype=like.dtype, device=like.device).reshape(like.shape)
    return torch.cos(ramp * 1.7 + shift) + 1.5


def weighted(value: Tensor, shift: float = 0.0) -> Tensor:
    """One number of a value; not linear, so that its second derivative is not that of the value alone."""
    return (wave(value, shift) * (value + value.square() / 2)).sum()


def close(got: Tensor, expected: Tensor, what: str, tol: float) -> None:
    """Compares shape, dtype and numbers; the tolerance is relative to the largest expected entry, at least 1."""
    assert got.shape == expected.shape, f"{what}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    assert got.dtype == expected.dtype, f"{what}: expected {expected.dtype}, got {got.dtype}"
    if expected.numel() == 0:
        return
    got, expected = got.detach(), expected.detach()
    nan = torch.isnan(got) != torch.isnan(expected)
    assert not bool(nan.any()), f"{what}: NaN in {int(nan.sum())} of {nan.numel()} entries where the other has none"
    error = torch.nan_to_num(got - expected).abs().max()
    scale = torch.nan_to_num(expected).abs().max().clamp_min(1.0)
    assert bool(error <= tol * scale), f"{what}: differ by {float(error):.2e}, allowed {float(tol * scale):.2e}"


def close_all(got: Any, expected: Any, what: str, tol: float) -> None:
    """:func:`close` for tuples of tensors."""
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        close(g, e, f"{what}, input {i}", tol)


def finite(t: Tensor, what: str) -> None:
    """Refuses NaN and Inf."""
    bad = ~torch.isfinite(t)
    assert not bool(bad.any()), f"{what}: {int(bad.sum())} of {bad.numel()} entries are NaN or Inf"
