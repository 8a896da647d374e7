"""Data parallel: hypergradients, the layer and all methods over the processes of a group.

Oracle, written before the code: one process with all the data. With the samples divided among 1, 2 and 3 processes,
hypergradients with every adjoint, adjoints, the layer's value, gradient and second derivative, and variables and
statistics of every method after two steps are those of one process at 1e-12, in every process; also with unequal
parts under `samples`, with a process that has nothing, and with functions that leave x or y aside in some processes.
Dropout has a mask in each process: the oracle is the mean over these masks written out. What goes wrong in one process
is an error in all of them, well within the time limit of a message.

These fail where a crossing or its transpose is left out, sums instead of averaging, or where `tied` is (they hang).
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from difflayers import bilevel
from difflayers.bilevel import Method
from tests.bilevel import distributed_worker as worker
from tests.processes import SECONDS, Outcomes, spawned

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
WORLDS = (1, 2, 3)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return spawned("tests.bilevel.distributed_worker", tmp_path_factory.mktemp("group"), WORLDS)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", list(worker.CASES))
def test_a_group_finds_what_one_process_finds(outcomes: Outcomes, name: str, world: int):
    expected = outcomes[0][0][name]
    assert not isinstance(expected, str), expected
    assert len(outcomes[world]) == world
    for rank, each in enumerate(outcomes[world]):
        got = each[name]
        assert not isinstance(got, str), f"process {rank}: {got}"
        assert len(got) == len(expected) > 0
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert a.dtype == b.dtype and a.shape == b.shape, i
            largest = max(1.0, b.abs().max().item())
            assert torch.isfinite(b).all()
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * largest if a.is_floating_point() else 0)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_processes_agree_to_the_last_bit(outcomes: Outcomes, world: int):
    """Otherwise loops could end at different steps in different processes."""
    first, *others = outcomes[world]
    for other in others:
        for name in worker.CASES:
            assert all(torch.equal(a, b) for a, b in zip(first[name], other[name], strict=True)), name


def said(outcomes: Outcomes, name: str, world: int) -> list[str]:
    """The errors of a case that has to fail in every process."""
    errors = [each[name] for each in outcomes[world]]
    assert all(isinstance(error, str) for error in errors), errors
    return errors


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("failing gradient", "Trouble: 'Grüße'"),
        ("failing layer", "Trouble: 'Grüße'"),
        ("failing step", "RuntimeError: size mismatch"),
        (
            "one bad block",
            "SolveError: hypergradient (adjoint): the lower Hessian is not positive definite at y in blocks",
        ),
        ("one unsolved block", "SolveError: ArgminLayer"),
        ("captured", "ValueError: lower: expected a function of its arguments alone, got one that captures `free`"),
        ("odd batch", "ValueError: batch: expected None or a pair (upper_batch, lower_batch), got 1 items"),
        ("bad samples", "ValueError: samples: expected a number of at least 0 for the upper batch, got -1"),
    ],
)
def test_an_error_in_one_process_is_one_in_all(outcomes: Outcomes, name: str, origin: str, world: int):
    *others, last = said(outcomes, name, world)
    assert last.startswith(origin)
    for error in others:
        assert error.startswith(f"RuntimeError: other processes of the group failed. process {world - 1}: {origin}")


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other x", "ValueError: x: expected the same numbers in all processes of the group, got others in {}"),
        ("other y", "ValueError: y: expected the same numbers in all processes of the group, got others in {}"),
        ("other init", "ValueError: init: expected the same numbers in all processes of the group, got others in {}"),
        (
            "other rows",
            "ValueError: adjoint: expected the same numbers in all processes of the group, got others in {}",
        ),
        ("shapes", "ValueError: upper output: expected the same shape and dtype in all processes of the group"),
        ("no samples", "ValueError: samples: expected some in the upper batch of one process at least"),
        ("two groups", "ValueError: x: expected the process group of `group`, got another one"),
    ],
)
def test_what_differs_between_processes_is_refused(outcomes: Outcomes, name: str, message: str, world: int):
    for error in said(outcomes, name, world):
        assert error.startswith(message.format(f"process {world - 1}")), error


def test_nobody_waits_in_vain(outcomes: Outcomes):
    """An error comes at once, not when the time of a message is over."""
    for world in WORLDS[1:]:
        for each in outcomes[world]:
            assert each["seconds"] < SECONDS / 2


def test_no_method_is_left_out():
    public = [getattr(bilevel, name) for name in bilevel.__all__]
    methods = {m.__name__ for m in public if isinstance(m, type) and issubclass(m, Method) and m is not Method}
    assert methods and methods == methods & {name.split(",")[0] for name in worker.CASES}


@pytest.mark.parametrize("value", ["world", 3, object()])
def test_group_has_to_be_one(value: Any):
    with pytest.raises(ValueError, match=r"group: expected None or a process group of torch.distributed, got"):
        worker.problem(value)


def test_samples_has_to_be_a_function():
    with pytest.raises(ValueError, match="samples: expected None or a callable, got int"):
        worker.problem(None, samples=3)


def test_example_runs_as_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    monkeypatch.setattr(sys, "argv", ["example", "--steps", "50"])
    import bilevel_data_parallel as example

    example.main()
    del sys.modules["bilevel_data_parallel"]
    said = capsys.readouterr().out
    assert "600 digits on 1 process," in said and "hypergradient of one process 0.0e+00" in said
