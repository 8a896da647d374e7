"""Clauses on ``torch.func`` transforms and ``torch.compile``."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vjp, vmap

from ._case import Inputs, LayerCase, close, close_all, leaves, wave, weighted
from ._clauses import clause, requires
from ._derivatives import gradients


def looped(case: LayerCase, inputs: Inputs) -> Tensor:
    """The value of every element on its own."""
    return torch.stack([case.fn(*case.element(inputs, i)) for i in range(case.size)])


def nudged(case: LayerCase, inputs: Inputs) -> tuple[Inputs, tuple[int | None, ...]]:
    """Shared inputs stacked with slightly larger copies, and the dimensions to vmap them over."""
    stacked = tuple(t if b else torch.stack([t, t * 1.02]) for t, b in zip(inputs, case.batched, strict=True))
    return stacked, tuple(None if b else 0 for b in case.batched)


@clause(needs=requires("size"))
def vmap_equals_loop(case: LayerCase, device: torch.device) -> None:
    """A batch, vmap and a loop over its elements give the same numbers, with the batch in any dimension."""
    inputs = case.at(device)
    loop = looped(case, inputs)
    close(case.fn(*inputs), loop, "batch against loop", case.tol)
    close(vmap(case.fn, in_dims=case.in_dims)(*inputs), loop, "vmap against loop", case.tol)
    last = tuple(t.ndim - 1 if b else None for t, b in zip(inputs, case.batched, strict=True))
    moved = case.each(inputs, lambda t: t.movedim(0, -1))
    close(vmap(case.fn, in_dims=last, out_dims=-1)(*moved).movedim(-1, 0), loop, "vmap over the last", case.tol)


@clause(needs=requires("shared"), quick=False)
def vmap_over_shared(case: LayerCase, device: torch.device) -> None:
    """Vmap over a shared parameter equals a loop over it, value and gradient."""
    inputs = case.at(device)
    stacked, dims = nudged(case, inputs)
    copies = [tuple(t if d is None else t[k] for t, d in zip(stacked, dims, strict=True)) for k in range(2)]
    loop = torch.stack([case.fn(*c) for c in copies])
    close(vmap(case.fn, in_dims=dims)(*stacked), loop, "value", case.tol)
    every = tuple(range(len(inputs)))
    per_copy = vmap(grad(lambda *x: weighted(case.fn(*x)), every), in_dims=dims)(*stacked)
    expected = [torch.stack(g) for g in zip(*(gradients(case.fn, c) for c in copies), strict=True)]
    close_all(per_copy, expected, "gradient", case.tol)


@clause(needs=requires("size"), quick=False)
def nested_vmap(case: LayerCase, device: torch.device) -> None:
    """Vmap inside vmap, also with shared parameters mapped by one of them, equals a double loop."""
    inputs = case.at(device)
    if case.shared:
        stacked, dims = nudged(case, inputs)
    else:
        stacked, dims = tuple(torch.stack([t, t * 1.02]) for t in inputs), (0,) * len(inputs)
    copies = [tuple(t if d is None else t[k] for t, d in zip(stacked, dims, strict=True)) for k in range(2)]
    loop = torch.stack([looped(case, c) for c in copies])
    inner = vmap(case.fn, in_dims=case.in_dims)
    close(vmap(inner, in_dims=dims)(*stacked), loop, "parameters outside", case.tol)
    if case.shared:
        outer_batch = vmap(vmap(case.fn, in_dims=dims), in_dims=case.in_dims)
        close(outer_batch(*stacked), loop.transpose(0, 1), "parameters inside", case.tol)


@clause(needs=requires("size"))
def per_sample_gradients(case: LayerCase, device: torch.device) -> None:
    """Vmap of grad gives the gradient of every sample in every input."""
    inputs = case.at(device)
    every = tuple(range(len(inputs)))
    scalar = lambda *x: weighted(case.fn(*x))  # noqa: E731
    found = vmap(grad(scalar, every), in_dims=case.in_dims)(*inputs)
    loop = [gradients(case.fn, case.element(inputs, i)) for i in range(case.size)]
    close_all(found, [torch.stack(g) for g in zip(*loop, strict=True)], "gradient", case.tol)


@clause(needs=requires("size"), quick=False)
def vmapped_hessian(case: LayerCase, device: torch.device) -> None:
    """Vmap of hessian gives the Hessian of every sample."""
    inputs = case.at(device)
    every = tuple(range(len(inputs)))
    scalar = lambda *x: weighted(case.fn(*x))  # noqa: E731
    found = vmap(hessian(scalar, every), in_dims=case.in_dims)(*inputs)
    loop = [torch.autograd.functional.hessian(scalar, case.element(inputs, i)) for i in range(case.size)]
    for a in every:
        for b in every:
            expected = torch.stack([h[a][b] for h in loop])
            close(found[a][b], expected, f"inputs {a} and {b}", case.tol)


@clause(quick=False)
def products_agree(case: LayerCase, device: torch.device) -> None:
    """torch.func jvp and vjp are transposes of each other, and jvp composes with vmap and grad."""
    inputs = case.at(device)
    tangents = tuple(wave(t, 0.7) for t in inputs)
    value, moved = jvp(case.fn, inputs, tangents)
    out, pull = vjp(case.fn, *inputs)
    close(value, out, "value", case.tol)
    g = wave(out)
    dual = sum((p * t).sum() for p, t in zip(pull(g), tangents, strict=True))
    close((g * moved).sum(), dual, "<g, J t> against <J^T g, t>", case.tol)
    several = vmap(lambda *t: jvp(case.fn, inputs, t)[1])(*(torch.stack([t, 2 * t]) for t in tangents))
    close(several, torch.stack([moved, 2 * moved]), "vmap of jvp", case.tol)
    cotangents = vmap(lambda g: pull(g))(torch.stack([g, 2 * g]))
    close_all(cotangents, [torch.stack([p, 2 * p]) for p in pull(g)], "vmap of vjp", case.tol)
    slope = grad(lambda s: (g * jvp(case.fn, inputs, tuple(s * t for t in tangents))[1]).sum())(g.new_tensor(0.5))
    close(slope, (g * moved).sum(), "grad of jvp in its tangent", case.tol)


@clause(needs=requires("representative"), quick=False)
def compiled(case: LayerCase, device: torch.device) -> None:
    """torch.compile gives the same value and first derivative."""
    inputs = case.at(device)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its tracing
        fast = torch.compile(lambda *x: case.fn(*x), backend="aot_eager")
        x = leaves(inputs)
        value = fast(*x)
        found = torch.autograd.grad(weighted(value), x)
    torch._dynamo.reset()
    close(value, case.fn(*inputs), "value", case.tol)
    close_all(found, gradients(case.fn, inputs), "gradient", case.tol)
