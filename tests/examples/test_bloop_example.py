"""The example of Bloop runs in a few steps, and writes what it promises."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The examples are scripts: they see their own folder, and nobody sees it afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    sys.modules.pop("plot_bloop", None)


def test_bloop(tmp_path, monkeypatch, capsys):
    import plot_bloop as example

    monkeypatch.setattr(sys, "argv", ["example", "--steps", "40", "--out", str(tmp_path)])
    monkeypatch.setattr(example, "WEIGHTS", {"weighted sum": (0.1, 1.0), "Bloop": (0.1, 1.0)})
    example.main()
    results = json.loads((tmp_path / "results.json").read_text())
    for points in results["fronts"].values():  # a larger weight is better in the second loss
        assert points[1]["auxiliary"] < points[0]["auxiliary"] < 1.5
    assert (tmp_path / "bloop.png").stat().st_size > 10_000
    assert "better in both losses" in capsys.readouterr().out
