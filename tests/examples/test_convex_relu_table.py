"""The table of convex ReLU networks on real data runs for one seed, and writes what it promises."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_convex_relu_table_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plot_convex_relu_table as example

    monkeypatch.setattr(example, "DATA", ("wine", "diabetes"))
    monkeypatch.setattr(sys, "argv", ["example", "--seeds", "1", "--out", str(tmp_path)])
    example.main()
    del sys.modules["plot_convex_relu_table"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["scores"]["wine"]["convex ReLU"][0] > 0.9
    score, alpha = results["hypergradient"][0]
    assert score > 0.3 and 0.01 < alpha < 1
    assert (tmp_path / "convex_relu_table.png").stat().st_size > 10_000
    assert "hypergradient" in capsys.readouterr().out
