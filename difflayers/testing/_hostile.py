"""Clauses on input that breaks careless layers: NaN, Inf, failing elements, starved solvers, captured tensors."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from difflayers._solution import SolveError, SolveWarning, Status, trace

from ._case import Hostile, Inputs, LayerCase, close, finite, leaves, wave, weighted
from ._clauses import clause, requires
from ._derivatives import once_more


def refused(call: Callable[[], object], kinds: tuple[type[Exception], ...], match: str, what: str) -> None:
    """`call` must raise one of `kinds` with a message that contains `match`."""
    try:
        call()
    except kinds as error:
        assert re.search(match, str(error)), f"{what}: expected a message with {match!r}, got {error}"
    else:
        raise AssertionError(f"{what}: expected {' or '.join(k.__name__ for k in kinds)}, got a value")


def same(got: Tensor, expected: Tensor, what: str, case: LayerCase) -> None:
    """Equal to the bit, or to 100 rounding units where the case says so."""
    if case.exact_bits:
        assert got.shape == expected.shape, f"{what}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
        # NaN differs from everything, so a NaN that got across is found too
        assert bool((got == expected).all()), (
            f"{what}: not equal to the bit, largest difference {float((got - expected).abs().max()):.1e}"
        )
    else:
        close(got, expected, what, 100 * torch.finfo(got.dtype).eps)


def _infinity_is_a_number(case: LayerCase, inputs: Inputs) -> bool:
    """Whether the layer has a finite value and finite derivatives there, as tanh has."""
    try:
        x = leaves(inputs)
        value = case.fn(*x)
        found = torch.autograd.grad(weighted(value), x)
    except (ValueError, SolveError, SolveWarning):
        return False
    return all(bool(torch.isfinite(t).all()) for t in (value, *found))


@clause(needs=requires("names", "tolerant"), quick=False)
def nan_and_inf_are_refused(case: LayerCase, device: torch.device) -> None:
    """NaN and Inf raise a ValueError that names the argument, also under vmap (unless Inf has a finite result)."""
    inputs = case.at(device)
    for i, name in enumerate(case.names):
        for number in (math.nan, math.inf):
            if name is not None and inputs[i].numel():
                spoilt = inputs[i].clone()
                spoilt.view(-1)[0] = number
                _refused_by_name(case, (*inputs[:i], spoilt, *inputs[i + 1 :]), number, name)


def _refused_by_name(case: LayerCase, inputs: Inputs, number: float, name: str) -> None:
    if number == math.inf and _infinity_is_a_number(case, inputs):
        return
    match = rf"(?<!\w){re.escape(name)}: .*finite"
    refused(lambda: case.fn(*inputs), (ValueError,), match, f"{number} in {name}")
    if case.size:
        mapped = vmap(case.fn, in_dims=case.in_dims)
        refused(lambda: mapped(*inputs), (ValueError,), match, f"{number} in {name} under vmap")


@clause(needs=requires("tolerant", "size"))
def failure_is_raised(case: LayerCase, device: torch.device) -> None:
    """A failing element raises, in a batch, alone, under vmap and under grad: never a silent number."""
    inputs = case.spoiled(case.at(device), case.size - 1)
    alone = case.element(inputs, case.size - 1)
    first = case.batched.index(True)
    calls: dict[str, Callable[[], object]] = {
        "in a batch": lambda: case.fn(*inputs),
        "alone": lambda: case.fn(*alone),
        "under vmap": lambda: vmap(case.fn, in_dims=case.in_dims)(*inputs),
        "under grad": lambda: grad(lambda *x: weighted(case.fn(*x)), first)(*inputs),
        "under jvp": lambda: jvp(case.fn, inputs, tuple(map(wave, inputs))),
    }
    for what, call in calls.items():
        refused(call, (SolveError, ValueError), "", what)


def derivatives(fn: Callable[..., Tensor], inputs: Inputs, g: Tensor) -> dict[str, Tensor]:
    """Value, first and second derivatives for the cotangent `g`."""
    x = leaves(inputs)
    value = fn(*x)
    first = torch.autograd.grad(value, x, g, create_graph=True)
    second = once_more(first, x)
    out = {"value": value.detach()}
    out |= {f"first derivative, input {i}": f.detach() for i, f in enumerate(first)}
    out |= {f"second derivative, input {i}": s for i, s in enumerate(second)}
    return out


@clause(needs=requires("tolerant"))
def tolerance_changes_nothing(case: LayerCase, device: torch.device) -> None:
    """Where nothing fails, on_failure="nan" gives the value and derivatives of "raise", at both orders."""
    assert case.tolerant is not None
    inputs = case.at(device)
    g = wave(case.fn(*inputs))
    expected = derivatives(case.fn, inputs, g)
    for name, got in derivatives(case.tolerant, inputs, g).items():
        close(got, expected[name], name, case.tol)


@clause(needs=requires("tolerant", "size"))
def one_bad_element(case: LayerCase, device: torch.device) -> None:
    """A bad element is NaN alone: others, and shared gradients, are bit-equal to a batch without it, at both orders."""
    assert case.tolerant is not None
    good = case.at(device)
    for k in range(case.size):
        bad = case.spoiled(good, k)
        others = [i for i in range(case.size) if i != k]
        value = case.tolerant(*good)
        g = wave(value)
        g[k] = 0  # nobody depends on the bad element
        clean, spoilt = derivatives(case.tolerant, good, g), derivatives(case.tolerant, bad, g)
        assert bool(torch.isnan(spoilt["value"][k]).all()), f"element {k}: expected NaN, got a number"
        for name, got in spoilt.items():
            index = None if name == "value" else int(name.split()[-1])
            batched = index is None or case.batched[index]
            what = f"bad element {k}, {name}"
            same(got[others] if batched else got, clean[name][others] if batched else clean[name], what, case)
            if batched and name.startswith("first"):
                assert bool((got[k] == 0).all()), f"{what}: expected exact zeros for the bad element, got {got[k]}"
    tangents = tuple(map(wave, good))
    _, clean_t = jvp(case.tolerant, good, tangents)
    _, spoilt_t = jvp(case.tolerant, bad, tangents)
    same(spoilt_t[others], clean_t[others], "tangent", case)
    mapped = vmap(case.tolerant, in_dims=case.in_dims)(*bad)
    same(mapped[others], vmap(case.tolerant, in_dims=case.in_dims)(*good)[others], "vmap", case)
    assert bool(torch.isnan(mapped[k]).all()), "vmap: expected NaN for the bad element, got a number"
    x = leaves(bad)
    asked = torch.autograd.grad(case.tolerant(*x)[k].sum(), x)
    nan = [bool(torch.isnan(a).any()) for a in asked]
    assert any(nan), "gradient of the bad element: expected NaN, got numbers"


@clause(needs=requires("size"))
def duplicates_stay_equal(case: LayerCase, device: torch.device) -> None:
    """Equal elements get equal values and gradients, whatever their neighbours do."""
    inputs = case.at(device)
    index = torch.tensor([*range(case.size), 0, 0], device=device)
    x = leaves(case.each(inputs, lambda t: t[index]))
    value = case.fn(*x)
    g = wave(value)
    g[-2:] = g[0]
    found = torch.autograd.grad(value, x, g)
    pairs = [("value", value), *((f"gradient {i}", f) for i, f in enumerate(found) if case.batched[i])]
    for name, t in pairs:
        for k in (-1, -2):
            close(t[k], t[0], name, 100 * torch.finfo(t.dtype).eps)


def _sound(case: LayerCase, hostile: Hostile, inputs: Inputs) -> None:
    fn = hostile.fn or case.fn
    value = fn(*inputs)
    finite(value, f"{hostile.name}: value")
    oracle = hostile.oracle or (None if hostile.fn else case.oracle)
    if oracle is not None:
        expected = oracle(*inputs).to(value)
        # relative to the size of the numbers at hand, which may be huge or tiny
        size = expected.abs().max()
        scale = torch.where(size > 0, size, 1)
        close(value / scale, expected / scale, f"{hostile.name}: value against the oracle", 1e3 * case.oracle_tol)
    x = leaves(inputs)
    try:
        found = torch.autograd.grad(weighted(fn(*x)), x)
    except SolveError:
        return  # says that there is no derivative here, which is an honest answer
    for i, f in enumerate(found):
        finite(f, f"{hostile.name}: gradient, input {i}")


@clause(needs=requires("hostile"), quick=False)
def hostile_input(case: LayerCase, device: torch.device) -> None:
    """Ties, zeros, extreme scales, dependent rows, infeasible problems: a sound result or the promised error."""
    for hostile in case.hostile:
        inputs = tuple(t.to(device) for t in hostile.inputs)
        if hostile.raises is None:
            try:
                _sound(case, hostile, inputs)
            except (SolveError, SolveWarning, ValueError) as error:
                if hostile.may_fail and not isinstance(error, ValueError):
                    continue
                raise AssertionError(f"{hostile.name}: expected a sound result, got {error}") from error
        else:
            fn = hostile.fn or case.fn
            kinds = hostile.raises if isinstance(hostile.raises, tuple) else (hostile.raises,)
            refused(lambda fn=fn, x=inputs: fn(*x), kinds, hostile.match, hostile.name)  # type: ignore[misc]


@clause(needs=requires("starved"))
def starved_solver_warns(case: LayerCase, device: torch.device) -> None:
    """A solver that stops too early gives a SolveWarning, in forward mode, reverse mode and under vmap, and a value."""
    assert case.starved is not None
    starved = case.starved
    inputs = case.at(device)
    calls: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: starved(*inputs),
        "with a graph": lambda: starved(*leaves(inputs)).detach(),
        "under jvp": lambda: jvp(starved, inputs, tuple(map(wave, inputs)))[0],
    }
    if case.size:
        calls["under vmap"] = lambda: vmap(starved, in_dims=case.in_dims)(*inputs)
    for what, call in calls.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = call()
        assert any(issubclass(w.category, SolveWarning) for w in caught), f"{what}: expected a SolveWarning, got none"
        assert bool(torch.isfinite(value).any()), f"{what}: expected the last iterate, got NaN"


@clause(needs=requires("solution"))
def status_is_reported(case: LayerCase, device: torch.device) -> None:
    """The _ex form reports a status for every element and never checks it: converged, starved, failed, empty."""
    assert case.solution is not None
    inputs = case.at(device)
    batch = (case.size,) if case.size else ()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SolveWarning)
        solution = case.solution(*inputs)
        for name in ("status", "steps", "residual"):
            shape = tuple(getattr(solution, name).shape)
            assert shape == batch, f"{name}: expected shape {batch}, got {shape}"
        assert bool(solution.converged.all()), (
            f"expected every element converged, got status {solution.status.tolist()}"
        )
        finite(solution.residual, "residual")
        close(solution.value, case.fn(*inputs), "value", case.tol)
        if case.size:
            status = case.solution(*case.each(inputs, lambda t: t[:0])).status
            assert status.shape == (0,), f"empty batch: expected status of shape (0,), got {tuple(status.shape)}"
        if case.starved_solution is not None:
            status = case.starved_solution(*inputs).status
            assert bool((status == Status.MAX_STEPS).any()), f"starved: expected MAX_STEPS, got {status.tolist()}"
        if case.tolerant is not None and case.size:
            solution = case.solution(*case.spoiled(inputs, 0))
            expected = [True] + [False] * (case.size - 1)
            assert solution.failed.tolist() == expected, f"failed: expected {expected}, got {solution.failed.tolist()}"


@clause(needs=requires("solution"))
def solves_are_traced(case: LayerCase, device: torch.device) -> None:
    """difflayers.trace() sees the forward solve, and the adjoint solve even when backward runs after the block."""
    x = leaves(case.at(device))
    with trace() as solves:
        value = case.fn(*x)
    phases = [s.phase for s in solves]
    assert "forward" in phases, f"expected a forward solve in the trace, got {phases}"
    status = solves[phases.index("forward")].status
    assert status.numel() == max(case.size, 1), f"expected one status an element, got shape {tuple(status.shape)}"
    weighted(value).backward()
    phases = [s.phase for s in solves]
    assert "adjoint" in phases, f"expected an adjoint solve in the trace, got {phases}"


@clause(needs=requires("captured"))
def captured_tensor_is_refused(case: LayerCase, device: torch.device) -> None:
    """A captured tensor is refused where it is differentiated: backward, grad, jvp, vmap; a constant is not."""
    assert case.captured is not None
    run = case.captured
    t = single_input(case, device)
    calls: dict[str, Callable[[], object]] = {
        "backward": lambda: run(t.clone().requires_grad_()),
        "grad": lambda: grad(lambda p: run(p).sum())(t),
        "jvp": lambda: jvp(run, (t,), (wave(t),)),
        "vmap": lambda: vmap(run)(torch.stack([t, t * 1.02])),
        "grad inside vmap": lambda: vmap(grad(lambda p: run(p).sum()))(torch.stack([t, t * 1.02])),
    }
    for what, call in calls.items():
        refused(call, (ValueError,), "captur", what)
    finite(run(t), "a captured constant")
    with torch.no_grad():
        finite(run(t), "a captured constant")


def single_input(case: LayerCase, device: torch.device) -> Tensor:
    """The first input, of one element."""
    t = case.at(device)[0]
    return t[0] if case.batched[0] else t
