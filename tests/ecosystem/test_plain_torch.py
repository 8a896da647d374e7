"""Layers where torch's own tools put them: a Sequential, functional calls, ensembles, autocast, checkpoints, threads.

Oracle: plain use of the same model, whose gradients are first compared with differences.
"""

from __future__ import annotations

import copy
import io
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import difflayers
from difflayers.implicit import FixedPoint, WarmStart
from difflayers.linalg import _autodiff
from difflayers.proximal import jacobian_nuclear_norm
from difflayers.testing import check_gradient
from difflayers.testing.cases import conic
from tests.ecosystem.models import F64, MAKERS, NAMES, Cell, built, loss_of, numbers, plain, same
from tests.modes import inference, needs_inference

every = pytest.mark.parametrize("name", NAMES)


@every
def test_inside_a_sequential(name: str):
    model, x = built(name)
    width = model(x).reshape(len(x), -1).shape[1]
    whole = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), model, nn.Unflatten(0, (6, 1)), nn.Flatten(), nn.Linear(width, 2))
    check_gradient(whole.to(F64), x, directions=1, step=1e-5)


@every
def test_functional_call(name: str):
    model, x = built(name)
    parameters = {key: p.detach().clone() for key, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # what the module holds must not be used

    def loss(parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        value = functional_call(model, parameters, (x,))
        return loss_of(value), value

    (grads, batch), value = grad(loss, (0, 1), has_aux=True)(parameters, x)
    same({"value": value, "batch": batch, **grads}, plain(name), 1e-12)


@every
def test_an_ensemble_under_vmap(name: str):
    models, x = [built(name)[0] for _ in range(3)], built(name)[1]
    with torch.no_grad():
        for k, model in enumerate(models):
            for p in model.parameters():
                p.mul_(1 + 0.1 * k)
    parameters, _ = stack_module_state(models)
    buffers = dict(models[0].named_buffers())  # data that all have in common: not stacked
    call = lambda p, x: functional_call(models[0], (p, buffers), (x,))  # noqa: E731
    values = vmap(call, in_dims=(0, None))(parameters, x)
    grads = vmap(grad(lambda p, x: loss_of(call(p, x))), in_dims=(0, None))(parameters, x)
    for k, model in enumerate(models):
        want = numbers(model, dict(model.named_parameters()), x)
        got = {key: g[k] for key, g in grads.items()}
        same({"value": values[k], "batch": want["batch"], **got}, want, 1e-10)


@every
def test_autocast(name: str):
    """Networks in front of a layer run in bfloat16, the layer in float32: the result is right to bfloat16."""
    model, x = built(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = numbers(model, dict(model.named_parameters()), x)
    want = plain(name, torch.float32)
    assert all(got[key].dtype == expected.dtype for key, expected in want.items() if key != "value")
    # a differential equation takes derivatives of its basis, and they lose more
    tolerance = 0.3 if name == "PDEConstraint" else 0.05
    assert (got["value"].float() - want["value"]).norm() < tolerance * want["value"].norm()
    halved, full = (torch.cat([t.flatten() for key, t in found.items() if key != "value"]) for found in (got, want))
    assert (halved - full).norm() < tolerance * full.norm()


def test_autocast_leaves_the_solve_in_single_precision():
    model, x = built("FixedPoint", torch.float32)
    first, layer = model[0], model[1]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = first(x)
        value = layer(hidden)
    assert hidden.dtype == torch.bfloat16
    assert torch.equal(value.float(), layer(hidden.float()).to(value.dtype).float())
    assert not torch.equal(value.float(), model(x))


# --------------------------------------------------------------------------------------------------------- inference


@needs_inference
@every
def test_inference_mode(name: str):
    """A fresh model, so that its first look at everything is inside; on a tensor made inside, and one made outside."""
    (model, x), want = built(name), plain(name)
    with torch.inference_mode():
        inside = [model(x), model(x.clone())]
    assert all(torch.equal(value, want["value"]) for value in inside)
    same(numbers(model, dict(model.named_parameters()), x), want)  # and nothing of it stays behind


@needs_inference
def test_a_cone_program_in_inference_mode():
    """Its derivative is prepared in the forward pass."""
    case = next(case for case in conic.CASES if case.name == "conic_program SecondOrder")
    with torch.inference_mode():
        value = case.fn(*(t.clone() for t in case.inputs))
    assert torch.equal(value, case.fn(*case.inputs))


class Normed(Cell):
    """An update with a buffer."""

    def __init__(self) -> None:
        super().__init__(4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return super().forward(0.5 * self.norm(z), x)


@needs_inference
def test_buffers_in_inference_mode():
    layer, x = FixedPoint(Normed()).double().eval(), built("FixedPoint")[1]
    with torch.inference_mode():
        value = layer(x)
    assert torch.equal(value, layer(x))


def test_derivatives_that_would_be_zero_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_autodiff, "_derives_in_inference_mode", lambda: False)
    (model, x), want = built("ArgminLayer"), plain("ArgminLayer")
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch.no_grad\(\) instead"):
        model(x)
    with torch.no_grad():
        assert torch.equal(model(x), want["value"])


# ----------------------------------------------------------------------------------------------------- checkpointing


@every
def test_activation_checkpointing(name: str):
    """To the last bit, and from the first call on: what a layer looks at only once must not be recorded."""
    model, x = built(name)
    if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):  # before torch 2.8 hooks hear everything
        model(x)
    got = numbers(lambda x: checkpoint(model, x, use_reentrant=False), dict(model.named_parameters()), x)
    same(got, plain(name))


def test_frozen_dropout_under_checkpointing():
    """The recomputed forward draws the mask of the first one, since checkpoint keeps the random state."""
    layer, x = FixedPoint(Cell(4, dropout=0.5), dropout="frozen").double(), built("FixedPoint")[1]
    parameters, found = dict(layer.named_parameters()), []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        found.append(numbers(call, parameters, x))
    same(found[1], found[0])
    torch.manual_seed(4)
    assert not torch.equal(numbers(layer, parameters, x)["value"], found[0]["value"])


class Warm(nn.Module):
    """Starts each solve from the last solution, which it keeps inside or outside of the checkpoint."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.layer, self.warm, self.inside = FixedPoint(Cell(4)), WarmStart(6), inside

    def solve(self, x: Tensor, start: Tensor) -> Tensor:
        value = self.layer(x, init=start)
        if self.inside:
            self.warm.store(torch.arange(6), value)
        return value

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(6)
        if self.inside:
            return checkpoint(lambda x: self.solve(x, self.warm(index, torch.zeros_like(x))), x, use_reentrant=False)
        value = checkpoint(self.solve, x, self.warm(index, torch.zeros_like(x)), use_reentrant=False)
        self.warm.store(index, value)
        return value


@pytest.mark.parametrize("inside", [False, True])
def test_warm_starts_under_checkpointing(inside: bool):
    """Recomputation starts where the solve did or, where the store is inside, at its solution: right both times."""
    x = built("FixedPoint")[1]
    torch.manual_seed(5)
    model = Warm(inside).double()
    parameters = dict(model.named_parameters())
    want = numbers(model.layer, parameters, x)
    with difflayers.trace() as solves:
        for _ in range(2):
            same(numbers(model, parameters, x), want, 1e-8)
    first, again, second, _ = (int(s.steps.max()) for s in solves if s.phase == "forward")
    assert again < first if inside else again == first
    assert second < first


# ------------------------------------------------------------------------------------------------------------ copies


@every
def test_copies_and_saved_states(name: str):
    model, x = built(name)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)  # of no concern to the copy
    stream = io.BytesIO()
    torch.save(copied.state_dict(), stream)
    stream.seek(0)
    torch.manual_seed(9)
    fresh = MAKERS[name]().to(F64)
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    for other in (copied, fresh):
        same(numbers(other, dict(other.named_parameters()), x), plain(name))


@every
def test_threads_find_what_one_thread_finds(name: str):
    """One model in four threads at once: inference and gradients, to the last bit."""
    model, x = built(name)
    batches, parameters = [x + 0.1 * k for k in range(4)], dict(model.named_parameters())

    def infer(x: Tensor) -> Tensor:
        with inference():
            return model(x).clone()

    def work(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return infer(x), numbers(model, parameters, x)

    serial = [work(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(work, batches))
    for (value, got), (expected, want) in zip(parallel, serial, strict=True):
        assert torch.equal(value, expected)
        same(got, want)


def tall(x: Tensor) -> Tensor:
    """A function with more outputs than inputs, whose Jacobian is made column by column."""
    return torch.cat([x.sin(), x.cos() * x], -1)


@pytest.mark.parametrize("name", ["PDEConstraint", "jacobian_nuclear_norm"])
def test_threads_in_forward_mode_keep_apart(name: str):
    """torch.func.jvp of two threads fails or is wrong: torch counts its level for all of them together."""
    model, x = built("PDEConstraint")
    call = (lambda: model(x)) if name == "PDEConstraint" else (lambda: jacobian_nuclear_norm(tall, x, event_ndim=1))
    interval, want = sys.getswitchinterval(), call()
    try:
        sys.setswitchinterval(1e-5)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: call(), range(300)))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(value, want) for value in found)
