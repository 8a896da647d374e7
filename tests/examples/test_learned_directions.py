"""The example of directions from a network runs on a small grid, and writes what it promises."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_learned_directions_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plot_learned_directions as example

    threads = torch.get_num_threads()
    monkeypatch.setattr(example, "GRID", 24)
    monkeypatch.setattr(sys, "argv", ["example", "--steps", "120", "--out", str(tmp_path)])
    example.main()
    torch.set_num_threads(threads)
    del sys.modules["plot_learned_directions"]
    found = json.loads((tmp_path / "results.json").read_text())["the square it was trained on"]
    assert found["learned directions"]["iterations"] < found["conjugate gradients"]["iterations"]
    assert (tmp_path / "learned_directions.png").stat().st_size > 10_000
    assert "iterations" in capsys.readouterr().out
