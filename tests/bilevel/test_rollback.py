"""A step that is interrupted is a step that has not begun, whatever interrupts it and wherever.

Oracle: state, counts and modules before the step, to the last bit, and a twin that was never interrupted.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import difflayers.bilevel
from difflayers.bilevel import BSVRB, F2SA, LVHBA, SABA, Bilevel, Method
from tests.bilevel.method_toys import Quadratic, start, tensor

Q = Quadratic.random(3)
HERE = str(Path(difflayers.bilevel.__file__).parent)
METHODS = [
    m
    for name in difflayers.bilevel.__all__
    if inspect.isclass(m := getattr(difflayers.bilevel, name)) and issubclass(m, Method) and m is not Method
]
OPTIONS = {SABA: {"upper_blocks": 2, "lower_blocks": 2}}
CASES = [(m, OPTIONS.get(m, {})) for m in METHODS] + [(F2SA, {"momentum": 0.3})]
IDS = [f"{m.__name__}{'-momentum' if 'momentum' in o else ''}" for m, o in CASES]


class Weights(nn.Module):
    """A vector in two parameters, with a buffer that training changes."""

    def __init__(self, values):
        super().__init__()
        self.first, self.rest = (nn.Parameter(v.clone()) for v in (values[:1], values[1:]))
        self.norm = nn.BatchNorm1d(len(values), affine=False, dtype=torch.float64)

    def forward(self):
        v = torch.cat([self.first, self.rest])
        return v + 0.01 * self.norm(torch.stack([v, v.sin()]))[0]


class Interrupted:
    """The functions of a problem, of which the k-th call raises."""

    def __init__(self):
        self.left, self.error, self.calls = None, None, 0

    def wrap(self, function):
        def run(*args):
            self.calls += 1
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise self.error
            return function(*args)

        return run


def vector(v):
    return v() if isinstance(v, nn.Module) else v


def make(method, options, modules):
    """A method on T4 with every optional part that it takes, and its batches."""
    p, calls = Q.problem(), Interrupted()
    x, y = start(0, 3, 4)
    parts = {
        "upper": lambda x, y, b: p.upper(vector(x), vector(y), None) + (0 if b is None else b) * vector(y).sum(),
        "lower": lambda x, y, b: p.lower(vector(x), vector(y), None) + (0 if b is None else b) * vector(y).sum(),
    }
    if "blocks" in method.needs:
        y = y.repeat(3, 1)
        parts = {
            "upper": lambda x, y, b: 0.5 * (y - b).square().sum(-1) + 0.1 * vector(x).square().sum(),
            "lower": lambda x, y, b: 0.5 * (y - b).square().sum(-1) - y.sum(-1) * vector(x).sum(),
        }
    if "project_upper" in method.takes:
        parts["project_upper"] = lambda x: torch.utils._pytree.tree_map(lambda v: v.clamp(-5, 5), x)
    if "prox_lower" in method.takes:
        parts["prox_lower"] = lambda v, x, s: torch.utils._pytree.tree_map(lambda w: w / (1 + 0.1 * s), v)
    if method is LVHBA:
        rows = tensor(np.random.default_rng(8).normal(size=(1, 4)))
        parts["constraint"] = lambda x, y: vector(x).sum() + rows @ vector(y) - 0.5
        if modules:
            parts["constraint"] = lambda x, y: x.rest.sum() + y.rest.sum() - 0.5  # affine
    functions = {name: calls.wrap(function) for name, function in parts.items()}
    flags = {"equality": True} if method is LVHBA else {}
    problem = Bilevel(**functions, **flags, blocks=3 if method is BSVRB else None)
    if modules:
        x, y = Weights(x), y if method is BSVRB else Weights(y)
    return method(problem, x, y, **options), calls


def step(algo, k):
    shift = [tensor(0.1 * k), tensor(-0.2 * k)]
    if isinstance(algo, SABA):
        return algo.step((k % 2, shift[0]), ((k + 1) % 2, shift[1]))
    if isinstance(algo, BSVRB):
        return algo.step(shift[0], shift[1], blocks=[k % 3, (k + 1) % 3])
    return algo.step(*shift)


def everything(algo):
    modules = [v.module for v in (algo.x_variables, algo.y_variables) if v.module is not None]
    tensors = {f"state {key}": value.clone() for key, value in algo.state.items()}
    for i, module in enumerate(modules):
        tensors.update({f"module {i} {key}": value.clone() for key, value in module.state_dict().items()})
    return tensors, algo.steps, dict(algo.counts), copy.deepcopy(algo.plain)


def assert_as(before, algo):
    tensors, *rest = everything(algo)
    assert rest == list(before[1:])
    assert set(tensors) == set(before[0])
    for key, value in before[0].items():
        assert torch.equal(tensors[key], value), key


@pytest.mark.parametrize("modules", [False, True], ids=["tensors", "modules"])
@pytest.mark.parametrize("method, options", CASES, ids=IDS)
def test_raised_in_any_call_of_a_function(method, options, modules):
    algo, calls = make(method, options, modules)
    twin, _ = make(method, options, modules)
    for k in range(4):
        wanted = step(twin, k)
        for left in count(0 if k in (0, 2) else 1000):
            before = everything(algo)
            calls.left, calls.error = left, (KeyboardInterrupt if left % 2 else ZeroDivisionError)("stop")
            try:
                stats = step(algo, k)
                break  # the step is over before that call
            except (KeyboardInterrupt, ZeroDivisionError) as error:
                assert error is calls.error
                assert_as(before, algo)
        assert stats == wanted and left > 1
    assert_as(everything(twin), algo)


@pytest.mark.parametrize("method, options, modules", [(*case, i % 2 == 1) for i, case in enumerate(CASES)], ids=IDS)
def test_interrupted_at_any_line(method, options, modules):
    """Ctrl-C comes between any two lines of the library: at a sample of them, and at all of the last of a step."""
    algo, _ = make(method, options, modules)
    step(algo, 0)
    seen, stop = 0, None

    def trace(frame, event, arg):
        nonlocal seen
        if not frame.f_code.co_filename.startswith(HERE):
            return None
        if event == "line":
            seen += 1
            if seen - 1 == stop:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    def run(at, line):
        nonlocal seen, stop
        seen, stop, old = 0, line, sys.gettrace()
        sys.settrace(trace)
        try:
            step(at, 1)
        finally:
            sys.settrace(old)
            torch.set_grad_enabled(True)  # Python itself may be interrupted between the end of a `with` and its exit

    start_of, before = algo.state_dict(), everything(algo)
    run(algo, None)
    total, after = seen, everything(algo)
    for line in [*range(5, total - 25, max(total // 3, 1)), *range(max(total - 25, 0), total)]:
        algo.load_state_dict(start_of)
        with contextlib.suppress(KeyboardInterrupt):
            run(algo, line)
        assert_as(after if algo.steps == 2 else before, algo)
