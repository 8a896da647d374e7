"""The examples on learned priors run in a few steps, and write what they promise."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")
pytest.importorskip("skimage")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The examples are scripts: they see their own folder, and nobody sees it afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in ("plot_learned_proximal", "plot_plug_and_play", "plot_tomography"):
        sys.modules.pop(name, None)


def written(folder: Path, figure: str) -> dict:
    """The numbers of a run, of which the figure must be there."""
    assert (folder / figure).stat().st_size > 10_000
    return json.loads((folder / "results.json").read_text())


def test_learned_proximal(tmp_path, capsys):
    import plot_learned_proximal as example

    numbers = written(example.main(["--quick", "--out", str(tmp_path)]), "laplacian.png")
    assert numbers["gradient of the prior against the inverse"] <= 1e-6
    assert numbers["gradient of the prior against differences"] <= 1e-6
    assert "distance to soft thresholding" in capsys.readouterr().out


def test_plug_and_play(tmp_path, capsys):
    import plot_plug_and_play as example

    numbers = written(example.main(["--quick", "--out", str(tmp_path)]), "digits.png")
    assert [row["image"] for row in numbers["psnr"]] == [
        *("observed", "total variation", "learned"),
        *("holes filled", "total variation", "learned"),
    ]
    assert numbers["prior"]["digits"] == 0.0 and (tmp_path / "prox_12.pt").exists()
    assert "deblurring" in capsys.readouterr().out


def test_tomography(tmp_path, capsys):
    import plot_tomography as example

    numbers = written(example.main(["--quick", "--out", str(tmp_path)]), "phantom.png")
    assert numbers["total variation"] > numbers["filtered back projection"]
    assert "dB" in capsys.readouterr().out


def test_radon_transform_is_that_of_scikit_image():
    import plot_tomography as example
    from skimage.transform import radon

    clean = example.phantom(64)
    found = example.radon(64)(clean)[0, 0] * 64
    expected = torch.from_numpy(radon(clean[0, 0].numpy(), example.DEGREES, circle=True)).T
    assert float((found - expected).norm() / expected.norm()) < 0.02
