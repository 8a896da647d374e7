"""Clauses on the value and its derivatives: against an oracle, finite differences, unrolled steps, each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import gradcheck as torch_gradcheck
from torch.autograd import gradgradcheck as torch_gradgradcheck
from torch.func import hessian, jacfwd, jacrev

from ._case import Inputs, LayerCase, close, close_all, finite, leaves, wave, weighted
from ._clauses import clause, requires


def gradients(fn: object, inputs: Inputs, shift: float = 0.0) -> tuple[Tensor, ...]:
    """First derivatives of a weighted sum of the value."""
    x = leaves(inputs)
    return torch.autograd.grad(weighted(fn(*x), shift), x)  # type: ignore[operator]


def once_more(first: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Derivatives of a weighted sum of first derivatives; zeros where these are constant."""
    total = torch.stack([(wave(g, 0.3) * g).sum() for g in first]).sum()
    if not total.requires_grad:
        return tuple(map(torch.zeros_like, wanted))
    return torch.autograd.grad(total, wanted, materialize_grads=True)


def second_gradients(fn: object, inputs: Inputs) -> tuple[Tensor, ...]:
    """Derivatives of a weighted sum of the first derivatives."""
    x = leaves(inputs)
    return once_more(torch.autograd.grad(weighted(fn(*x)), x, create_graph=True), x)  # type: ignore[operator]


def single(case: LayerCase, device: torch.device) -> Inputs:
    """The first element alone, or the inputs as they are where nothing is batched."""
    inputs = case.at(device)
    return case.element(inputs, 0) if case.size else inputs


@clause(needs=requires("oracle"))
def oracle(case: LayerCase, device: torch.device) -> None:
    """The value equals an independent computation."""
    inputs = case.at(device)
    assert case.oracle is not None
    value = case.fn(*inputs)
    finite(value, "value")
    close(value, case.oracle(*inputs).to(value), "value against the oracle", case.oracle_tol)


@clause(needs=requires("invariants"))
def invariants(case: LayerCase, device: torch.device) -> None:
    """The value satisfies its optimality conditions."""
    inputs = case.at(device)
    value = case.fn(*inputs)
    for i, invariant in enumerate(case.invariants):
        left = invariant(value, *inputs)
        close(left, torch.zeros_like(left), f"invariant {i}", case.oracle_tol)


@clause()
def gradcheck(case: LayerCase, device: torch.device) -> None:
    """First derivatives equal finite differences: reverse, forward, batched cotangents (fast mode)."""
    torch_gradcheck(case.fn, leaves(case.at(device)), check_forward_ad=True, check_batched_grad=True, fast_mode=True)


@clause(needs=requires("representative"), quick=False)
def gradcheck_full(case: LayerCase, device: torch.device) -> None:
    """First derivatives equal finite differences, entry by entry."""
    torch_gradcheck(case.fn, leaves(case.at(device)), check_forward_ad=True, check_batched_grad=True)


@clause()
def gradgradcheck(case: LayerCase, device: torch.device) -> None:
    """Second derivatives equal finite differences: reverse over reverse, forward over reverse (fast mode)."""
    torch_gradgradcheck(case.fn, leaves(case.at(device)), check_fwd_over_rev=True, fast_mode=True)


@clause(needs=requires("unrolled"))
def implicit_equals_unrolled(case: LayerCase, device: torch.device) -> None:
    """Value, first and second derivatives equal those of autograd through an unrolled computation."""
    inputs = case.at(device)
    close(case.fn(*inputs), case.unrolled(*inputs), "value", case.tol)  # type: ignore[misc]
    close_all(gradients(case.fn, inputs), gradients(case.unrolled, inputs), "first derivative", case.tol)
    close_all(second_gradients(case.fn, inputs), second_gradients(case.unrolled, inputs), "second derivative", case.tol)


@clause()
def jacfwd_equals_jacrev(case: LayerCase, device: torch.device) -> None:
    """Forward and reverse Jacobians agree, for the batch and for one element."""
    every = tuple(range(len(case.inputs)))
    for what, inputs in (("batch", case.at(device)), ("one element", single(case, device))):
        close_all(jacfwd(case.fn, every)(*inputs), jacrev(case.fn, every)(*inputs), what, case.tol)


@clause(quick=False)
def hessians_agree(case: LayerCase, device: torch.device) -> None:
    """Every order of forward and reverse mode, torch.func or autograd, gives one and the same symmetric Hessian."""
    inputs = single(case, device)
    every = tuple(range(len(inputs)))

    def scalar(*x: Tensor) -> Tensor:
        return weighted(case.fn(*x))

    reference = torch.autograd.functional.hessian(scalar, inputs)
    by_name = {
        "hessian": hessian(scalar, every)(*inputs),
        "jacfwd of jacfwd": jacfwd(jacfwd(scalar, every), every)(*inputs),
        "jacrev of jacrev": jacrev(jacrev(scalar, every), every)(*inputs),
        "jacrev of jacfwd": jacrev(jacfwd(scalar, every), every)(*inputs),
    }
    for name, found in by_name.items():
        for i in every:
            close_all(found[i], reference[i], f"{name}, row {i}", case.tol)
    for i in every:
        for j in every[:i]:
            a, b = reference[i][j], reference[j][i]
            a = a.reshape(inputs[i].numel(), inputs[j].numel()).mT
            close(a, b.reshape(inputs[j].numel(), inputs[i].numel()), f"symmetry of inputs {i} and {j}", case.tol)


@clause(needs=requires("shared", "size"))
def shared_gradient_is_a_sum(case: LayerCase, device: torch.device) -> None:
    """The gradient of a shared parameter is the sum of the gradients of the batch elements, at both orders."""
    inputs = case.at(device)
    weights = wave(case.fn(*inputs))

    def of_batch(*x: Tensor) -> Tensor:
        return (weights * case.fn(*x)).sum()

    shared = case.shared

    def derivatives(scalar: object, at: Inputs) -> list[Tensor]:
        x = leaves(at)
        wanted = [x[i] for i in shared]
        first = torch.autograd.grad(scalar(*x), wanted, create_graph=True)  # type: ignore[operator]
        return [*first, *once_more(first, wanted)]

    parts = [
        derivatives(lambda *x, i=i: (weights[i] * case.fn(*x)).sum(), case.element(inputs, i)) for i in range(case.size)
    ]
    sums = [torch.stack(p).sum(0) for p in zip(*parts, strict=True)]
    for name, found, expected in zip(
        [f"{order} derivative, input {i}" for order in ("first", "second") for i in shared],
        derivatives(of_batch, inputs),
        sums,
        strict=True,
    ):
        close(found, expected, name, case.tol)
