"""The example of recycled Krylov spaces runs for a short sequence, and writes what it promises."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_recycled_krylov_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plot_recycled_krylov as example

    threads = torch.get_num_threads()
    monkeypatch.setattr(example, "GRID", 24)
    monkeypatch.setattr(sys, "argv", ["example", "--systems", "8", "--out", str(tmp_path)])
    example.main()
    torch.set_num_threads(threads)
    del sys.modules["plot_recycled_krylov"]
    products = json.loads((tmp_path / "results.json").read_text())["products"]
    assert products["recycled, as drawn"] < products["GMRES, twice the memory"]
    assert (tmp_path / "recycled_krylov.png").stat().st_size > 10_000
    assert "products a system" in capsys.readouterr().out
