"""Experts over the processes of a device mesh.

Oracle, written before the code: one process. Values, gradients of every order, statuses and errors of a mesh of 1, 2
and 3 processes are those of the layer without a mesh at 1e-12, in every process, also where the experts cannot be
divided evenly. What goes wrong in one process is an error in all of them, within the time limit of a message.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.pde import expert_worker as worker
from tests.processes import Outcomes, spawned

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
    # torch's own
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]
WORLDS = (1, 2, 3)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return spawned("tests.pde.expert_worker", tmp_path_factory.mktemp("mesh"), WORLDS)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", list(worker.CASES))
def test_a_mesh_gives_what_one_process_gives(outcomes: Outcomes, name: str, world: int):
    expected = outcomes[0][0][name]
    assert not isinstance(expected, str), expected
    for rank, each in enumerate(outcomes[world]):
        got = each[name]
        assert not isinstance(got, str), f"process {rank}: {got}"
        assert len(got) == len(expected) > 0
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert a.dtype == b.dtype and a.shape == b.shape, i
            if a.is_floating_point():
                largest = b.nan_to_num(0).abs().max().item() if b.numel() else 0.0
                tolerance = (1e-12 if b.dtype == torch.float64 else 1e-6) * max(1.0, largest)
                torch.testing.assert_close(a, b, rtol=0, atol=tolerance, equal_nan=True)
            else:
                assert torch.equal(a, b), i


@pytest.mark.parametrize("world", WORLDS[1:])
def test_processes_agree_to_the_last_bit(outcomes: Outcomes, world: int):
    """Otherwise their networks would drift apart."""
    first, *others = (each["training"] for each in outcomes[world])
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("policy", ["nan", "ignore"])
def test_failure_of_one_expert_leaves_the_others_alone(outcomes: Outcomes, policy: str):
    for world in (0, *WORLDS):
        for each in outcomes[world]:
            same, status, *_ = each[f"diverging, {policy}"]
            assert bool(same)
            assert (status > 1).tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("world", WORLDS)
def test_warnings_are_those_of_one_process(outcomes: Outcomes, world: int):
    for each in outcomes[world]:
        for name in worker.CASES:
            expected, got = (
                [w for w in found.get(f"{name}, warnings", []) if "torch.jit" not in w]
                for found in (outcomes[0][0], each)
            )
            assert got == expected, name


def said(outcomes: Outcomes, name: str, world: int) -> list[str]:
    """The errors of a case that has to fail in every process."""
    errors = [each[name] for each in outcomes[world]]
    assert all(isinstance(error, str) for error in errors), errors
    return errors


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("one raises", "ValueError: residual: the last expert does not like it"),
        ("one raises plainly", "KeyError: 'Grüße'"),
    ],
)
def test_error_in_one_process_is_one_in_all(outcomes: Outcomes, name: str, origin: str, world: int):
    *others, last = said(outcomes, name, world)
    assert last == origin
    for error in others:
        assert error == f"RuntimeError: experts of other processes of the mesh failed. process {world - 1}: {origin}"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("closure", "ValueError: basis: expected on a mesh an nn.Module"),
        ("closure of values", "ValueError: values['u0']: expected on a mesh an nn.Module"),
        ("hidden tensor", "ValueError: basis: expected on a mesh an nn.Module"),
        ("hidden condition", "ValueError: mesh: expected everything that is differentiated among the arguments"),
        ("bad meshes", "ValueError: mesh: expected a one-dimensional DeviceMesh (init_device_mesh), got int / mesh:"),
    ],
)
def test_what_would_lose_a_gradient_is_refused(outcomes: Outcomes, name: str, start: str, world: int):
    for error in said(outcomes, name, world):
        assert error.startswith(start), error


@pytest.mark.parametrize("world", WORLDS[1:])
def test_processes_with_other_numbers_are_refused(outcomes: Outcomes, world: int):
    for error in said(outcomes, "other weights", world):
        assert error.startswith("ValueError: basis.b.bias: expected the same numbers in all processes"), error
        assert f"in process {world - 1} than" in error


def test_errors_of_the_mesh_name_it(outcomes: Outcomes):
    for world in WORLDS[1:]:
        for error in said(outcomes, "bad meshes", world):
            assert "got 2 dimensions" in error and f"at most {world - 1} processes, one an expert, got {world}" in error


def test_example_runs_as_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    monkeypatch.setattr(sys, "argv", ["example", "--steps", "5"])
    import expert_parallel as example

    example.main()
    del sys.modules["expert_parallel"]
    assert "8 experts on 1 process" in capsys.readouterr().out
