"""The example on sets of optimal networks runs in a few seconds and writes what it promises."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_optimal_set_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plot_optimal_set as example

    arguments = ["--splits", "2", "--patients", "60", "120", "--gates", "120", "100", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["example", *arguments])
    example.main()
    del sys.modules["plot_optimal_set"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(row["dimension"] > 0 for row in results["few patients"])
    assert results["same fit"][0]["dimension"] == 0
    assert (tmp_path / "optimal_set.png").stat().st_size > 10_000
    assert "pruned for nothing" in capsys.readouterr().out
