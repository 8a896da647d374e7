"""Lightning: a trainer's steps are those of a loop written by hand, and its checkpoints hold all there is."""

from __future__ import annotations

import sys
import warnings
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.ecosystem.models import F64, built, loss_of

imports = pytest.importorskip("lightning_utilities.core.imports")


def version(name: str) -> str:
    """As importlib.metadata has it, without torchvision."""
    if name == "torchvision":
        raise PackageNotFoundError(name)
    return metadata.version(name)


with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
    warnings.simplefilter("ignore")  # of its own imports: pkg_resources, torch.jit
    # Lightning imports torchvision wherever that is installed, and a torchvision for CUDA cannot be imported beside a
    # torch for the CPU. None is needed here.
    patch.setitem(sys.modules, "torchvision", None)
    patch.setattr(imports, "_version", version)
    lightning = pytest.importorskip("lightning")

pytestmark = [
    # It would like to have more workers for the data, and counts our few batches.
    pytest.mark.filterwarnings("ignore:The '(train|predict)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    # It calls parts of torch that torch has deprecated.
    pytest.mark.filterwarnings("ignore:.*(LeafSpec|treespec).*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*TreeSpec.*:FutureWarning"),
]


class Lit(lightning.LightningModule):
    """A model of ours, trained by SGD."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = built(name)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return loss_of(self(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(folder: Path, **options: Any) -> Any:
    """One process on the CPU that writes and prints nothing."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(accelerator="cpu", default_root_dir=folder, **quiet, **options)


def batches(name: str) -> DataLoader[Any]:
    """The batch in two halves."""
    return DataLoader(TensorDataset(built(name)[1]), batch_size=3)


@pytest.mark.parametrize("name", ["QuadraticProgram", "FixedPoint", "ArgminLayer"])
def test_training(name: str, tmp_path: Path):
    lit, by_hand = Lit(name), built(name)[0]
    trainer(tmp_path, max_epochs=2, enable_checkpointing=False).fit(lit, batches(name))
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.01)
    for _ in range(2):
        for (x,) in batches(name):
            optimizer.zero_grad()
            loss_of(by_hand(x)).backward()
            optimizer.step()
    first = built(name)[0]
    for got, want, start in zip(lit.model.parameters(), by_hand.parameters(), first.parameters(), strict=True):
        assert torch.equal(got, want)
        assert not torch.equal(got, start)


def test_a_checkpoint_comes_back(tmp_path: Path):
    """With ``weights_only=True``: nothing in it has to be unpickled."""
    lit, x = Lit("SparseCoding"), built("SparseCoding")[1]
    run = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    run.fit(lit, batches("SparseCoding"))
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = Lit.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True).to(F64)
    assert torch.equal(again(x), lit(x))
    assert not torch.equal(again(x), built("SparseCoding")[0](x))
