"""Bloop over the processes of a group.

Oracle, written before the code: one process with all the samples. Parameters and average after three steps of Adam are
the same at 1e-10 (single precision: 1e-5) in every process of 2 and 3, also where one of them alone uses a parameter.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from difflayers.bilevel import Bloop
from tests.bilevel import bloop_worker as worker
from tests.processes import Outcomes, spawned

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return spawned("tests.bilevel.bloop_worker", Path(tmp_path_factory.mktemp("group")), (2, 3))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", list(worker.CASES))
def test_a_group_trains_as_one_process_does(outcomes: Outcomes, name: str, world: int):
    expected = outcomes[0][0][name]
    assert not isinstance(expected, str), expected
    for rank, each in enumerate(outcomes[world]):
        got = each[name]
        assert not isinstance(got, str), f"process {rank}: {got}"
        for a, b, c in zip(got, expected, outcomes[world][0][name], strict=True):
            tolerance = 1e-10 if a.dtype == torch.float64 and len(a) != 2 else 1e-5
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
            assert torch.equal(a, c)


def test_a_group_that_is_none_is_named():
    with pytest.raises(ValueError, match="group: expected None or a process group"):
        Bloop([torch.nn.Parameter(torch.ones(2))], group="all")
