"""Clauses on shapes, dtypes, devices and defaults."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import jvp

from ._case import Inputs, LayerCase, close, close_all, leaves, wave, weighted
from ._clauses import clause, requires
from ._derivatives import gradients


@contextmanager
def default_device(device: str) -> Iterator[None]:
    """Factory calls without a device go to `device`."""
    with torch.device(device):
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Factory calls without a dtype use `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@clause(needs=requires("size"))
def empty_batch(case: LayerCase, device: torch.device) -> None:
    """A batch of no elements gives an empty value, and zero gradients for shared parameters."""
    inputs = case.each(case.at(device), lambda t: t[:0])
    expected = case.fn(*case.at(device))[:0]
    value = case.fn(*inputs)
    assert value.shape == expected.shape, f"expected shape {tuple(expected.shape)}, got {tuple(value.shape)}"
    assert value.dtype == expected.dtype, f"expected {expected.dtype}, got {value.dtype}"
    x = leaves(inputs)
    found = torch.autograd.grad(case.fn(*x).sum(), x, materialize_grads=True)
    close_all(found, [torch.zeros_like(t) for t in x], "gradient", 0.0)


@clause(needs=requires("size"))
def one_element_batch(case: LayerCase, device: torch.device) -> None:
    """A batch of one element gives what that element gives without a batch."""
    inputs = case.at(device)
    one = case.each(inputs, lambda t: t[:1])
    alone = case.element(inputs, 0)
    close(case.fn(*one)[0], case.fn(*alone), "value", case.tol)
    expected = case.each(gradients(case.fn, alone), lambda g: g.unsqueeze(0))
    close_all(gradients(case.fn, one), expected, "gradient", case.tol)


@clause(needs=requires("size"))
def several_batch_dimensions(case: LayerCase, device: torch.device) -> None:
    """Two batch dimensions give the same numbers as one, value and gradient."""
    inputs = case.at(device)
    twice = case.each(inputs, lambda t: torch.stack([t, t.flip(0)]))
    value = case.fn(*twice)
    flipped = case.each(inputs, lambda t: t.flip(0))
    close(value, torch.stack([case.fn(*inputs), case.fn(*flipped)]), "value", case.tol)

    def pull(at: Inputs, g: Tensor) -> tuple[Tensor, ...]:
        x = leaves(at)
        return torch.autograd.grad(case.fn(*x), x, g)

    g = wave(value)
    found, first, second = pull(twice, g), pull(inputs, g[0]), pull(flipped, g[1])
    for i, b in enumerate(case.batched):
        expected = torch.stack([first[i], second[i]]) if b else first[i] + second[i]
        close(found[i], expected, f"gradient, input {i}", case.tol)


@clause()
def not_contiguous(case: LayerCase, device: torch.device) -> None:
    """Strided and expanded inputs give the same numbers, and no input is changed in place."""
    inputs = case.at(device)
    before = [t.clone() for t in inputs]
    expected, slopes = case.fn(*inputs), gradients(case.fn, inputs)
    strided = tuple(torch.stack([t, -t], -1)[..., 0] for t in inputs)
    close(case.fn(*strided), expected, "strided value", case.tol)
    x = tuple(torch.stack([t, -t], -1).requires_grad_() for t in inputs)
    found = torch.autograd.grad(weighted(case.fn(*(t[..., 0] for t in x))), x)
    close_all([f[..., 0] for f in found], slopes, "strided gradient", case.tol)
    if case.size:
        expanded = case.each(inputs, lambda t: t[:1].expand_as(t))
        copied = case.each(inputs, lambda t: t[:1].expand_as(t).contiguous())
        close(case.fn(*expanded), case.fn(*copied), "expanded value", case.tol)
    close_all(inputs, before, "changed in place", 0.0)


@clause()
def float32_is_kept(case: LayerCase, device: torch.device) -> None:
    """float32 in, float32 out on the same device, close to float64; so are the gradients."""
    inputs = case.at(device, torch.float32)
    value = case.fn(*inputs)
    assert value.device == inputs[0].device, f"expected device {inputs[0].device}, got {value.device}"
    reference = tuple(t.double() for t in inputs)
    close(value, case.fn(*reference).float(), "value", case.single_tol)
    expected = [g.float() for g in gradients(case.fn, reference)]
    close_all(gradients(case.fn, inputs), expected, "gradient", 10 * case.single_tol)
    _, moved = jvp(case.fn, inputs, tuple(map(wave, inputs)))
    assert moved.dtype == torch.float32, f"tangent: expected torch.float32, got {moved.dtype}"


@clause(needs=requires("half"))
def half_is_lifted(case: LayerCase, device: torch.device) -> None:
    """bfloat16 in, bfloat16 out, as accurate as float32 rounded at the end; so are the gradients."""
    inputs = case.at(device, torch.bfloat16)
    lifted = tuple(t.float() for t in inputs)
    value = case.fn(*inputs)
    close(value, case.fn(*lifted).bfloat16(), "value", 0.02)
    x, y = leaves(inputs), leaves(lifted)
    out = case.fn(*x)
    g = wave(out)
    found = torch.autograd.grad(out, x, g)
    expected = torch.autograd.grad(case.fn(*y), y, g.float())
    close_all(found, [e.bfloat16() for e in expected], "gradient", 0.05)


@clause()
def autocast_of_forward(case: LayerCase, device: torch.device) -> None:
    """Under autocast float32 and float64 inputs are solved in their own dtype; backward runs outside, as torch asks."""
    for dtype in (torch.float32, torch.float64):
        inputs = case.at(device, dtype)
        expected, slopes = case.fn(*inputs), gradients(case.fn, inputs)
        x = leaves(inputs)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            value = case.fn(*x)
        # as accurate as without: bfloat16 anywhere inside would cost three digits
        tol = 1e-5 if dtype == torch.float32 else case.tol
        close(value, expected, f"value in {dtype}", tol)
        close_all(torch.autograd.grad(weighted(value), x), slopes, f"gradient in {dtype}", 10 * tol)


@clause(quick=False)
def autocast_of_backward(case: LayerCase, device: torch.device) -> None:
    """Under autocast backward and forward mode are solved in the dtype of the inputs too."""
    for dtype in (torch.float32, torch.float64):
        inputs = case.at(device, dtype)
        tangents = tuple(map(wave, inputs))
        slopes, moved = gradients(case.fn, inputs), jvp(case.fn, inputs, tangents)[1]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found, moved_there = gradients(case.fn, inputs), jvp(case.fn, inputs, tangents)[1]
        tol = 1e-4 if dtype == torch.float32 else case.tol
        close_all(found, slopes, f"gradient in {dtype}", tol)
        close(moved_there, moved, f"tangent in {dtype}", tol)


@clause()
def no_stray_device(case: LayerCase, device: torch.device) -> None:
    """Nothing is created without the device of the input: runs with the default device set to "meta"."""
    inputs = case.at(device)
    tangents = tuple(map(wave, inputs))
    expected, slopes = case.fn(*inputs), gradients(case.fn, inputs)
    _, moved = jvp(case.fn, inputs, tangents)
    with default_device("meta"):
        value, found = case.fn(*inputs), gradients(case.fn, inputs)
        _, moved_there = jvp(case.fn, inputs, tangents)
    for name, t in (("value", value), *((f"gradient {i}", g) for i, g in enumerate(found)), ("tangent", moved_there)):
        assert t.device == inputs[0].device, f"{name}: expected device {inputs[0].device}, got {t.device}"
    close(value, expected, "value", case.tol)
    close_all(found, slopes, "gradient", case.tol)
    close(moved_there, moved, "tangent", case.tol)


@clause(quick=False)
def no_stray_dtype(case: LayerCase, device: torch.device) -> None:
    """Nothing is created with the default dtype: runs with one that differs from the input's."""
    for default, dtype in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        inputs = case.at(device, dtype)
        with default_dtype(dtype):
            expected, slopes = case.fn(*inputs), gradients(case.fn, inputs)
        with default_dtype(default):
            value, found = case.fn(*inputs), gradients(case.fn, inputs)
        # the same numbers, not only the same dtype: a constant made in float32 keeps seven digits
        tol = 1e-12 if dtype == torch.float64 else 1e-5
        close(value, expected, f"value in {dtype}", tol)
        close_all(found, slopes, f"gradient in {dtype}", 10 * tol)


@clause(needs=requires("wrong"))
def wrong_input_is_refused(case: LayerCase, device: torch.device) -> None:
    """Wrong shapes and dtypes raise a ValueError that names the argument, what was expected and what came."""
    for wrong in case.wrong:
        inputs = tuple(t.to(device) for t in wrong.inputs)
        try:
            (wrong.fn or case.fn)(*inputs)
        except ValueError as error:
            assert re.search(wrong.match, str(error)), (
                f"{wrong.name}: expected a message with {wrong.match!r}, got {error}"
            )
        else:
            raise AssertionError(f"{wrong.name}: expected a ValueError, got a value")


@clause(needs=requires("names"))
def wrong_dtype_is_refused(case: LayerCase, device: torch.device) -> None:
    """Integers, mixed dtypes and mixed devices raise a ValueError that names an argument."""
    inputs = case.at(device)
    known = [n for n in case.names if n is not None]
    for i, name in enumerate(case.names):
        if name is None:
            continue
        changes = {"integers": inputs[i].round().long()}
        if len(inputs) > 1:
            changes |= {"float32 among float64": inputs[i].float(), "another device": inputs[i].to("meta")}
        for what, changed in changes.items():
            try:
                case.fn(*inputs[:i], changed, *inputs[i + 1 :])
            except ValueError as error:
                named = [name] if what == "integers" else [*known, "init"]
                patterns = [": expected device"] if what == "another device" else map(_argument, named)
                assert any(re.search(p, str(error)) for p in patterns), (
                    f"{what} in {name}: expected a message that names it, got {error}"
                )
            else:
                raise AssertionError(f"{what} in {name}: expected a ValueError, got a value")


def _argument(name: str) -> str:
    """A pattern for the name of an argument as a word of its own."""
    return rf"(?<!\w){re.escape(name)}"
