"""Layers in other processes: data parallel training, and workers that load data.

Oracle: this process, with all the data.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from difflayers.conic import project_polyhedron
from tests.ecosystem.models import F64, NAMES, built
from tests.processes import Outcomes, spawned


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return spawned("tests.ecosystem.data_parallel_worker", tmp_path_factory.mktemp("group"), (2,))


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("name", NAMES)
def test_data_parallel_training(outcomes: Outcomes, name: str):
    """Two steps in two processes with half of the batch each: those of one process with all of it."""
    want, found = outcomes[0][0][name], [each[name] for each in outcomes[2]]
    assert not isinstance(want, str), want
    before = list(built(name)[0].parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, want[::2], strict=True))
    for got in found:
        assert not isinstance(got, str), got
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * max(1.0, b.abs().max().item()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Solved(Dataset[tuple[Tensor, Tensor]]):
    """Samples that are solutions: a layer in every call of a worker."""

    def __init__(self, name: str) -> None:
        self.model, x = built(name)
        self.rows = torch.cat([x, 2 * x])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.rows[index].unsqueeze(0).requires_grad_()
        value = self.model(x)
        (slope,) = torch.autograd.grad(value.square().sum(), x)
        return value.detach()[0], slope[0]


def projected(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A layer in ``collate_fn``: the batch, projected onto ``sum <= 1``."""
    values = torch.stack([value for value, _ in samples])
    G, h = torch.ones(1, values.shape[1], dtype=F64), torch.ones(1, dtype=F64)
    return project_polyhedron(values, G, h), torch.stack([slope for _, slope in samples])


def loaded(name: str, workers: int, context: str | None = None) -> list[Tensor]:
    """All batches."""
    loader = DataLoader(
        Solved(name),
        batch_size=3,
        num_workers=workers,
        multiprocessing_context=context,
        collate_fn=projected,
        timeout=60 if workers else 0,
    )
    return [t for batch in loader for t in batch]


# Forked after this process has solved, with whatever threads that has left behind: pytest's own process has some, too.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("name", ["QuadraticProgram", "SparseCoding", "FixedPoint"])
def test_forked_workers(name: str):
    expected = loaded(name, 0)
    for got, want in zip(loaded(name, 2, "fork"), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.slow
def test_spawned_workers():
    """Everything that the dataset holds is pickled, the layer and its solver too."""
    for got, want in zip(loaded("QuadraticProgram", 1, "spawn"), loaded("QuadraticProgram", 0), strict=True):
        assert torch.equal(got, want)
