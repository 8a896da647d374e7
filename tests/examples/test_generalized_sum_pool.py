"""The example of generalized sum pooling runs in a few seconds and writes what it promises."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_generalized_sum_pool_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plot_generalized_sum_pool as example

    monkeypatch.setattr(sys, "argv", ["example", "--steps", "5", "--seeds", "1", "--out", str(tmp_path)])
    monkeypatch.setattr(example, "DISTRACTORS", (6,))
    example.main()
    del sys.modules["plot_generalized_sum_pool"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"digits", "faces"}
    assert all(0 <= value <= 1 for kinds in results.values() for runs in kinds.values() for value in runs["6"])
    assert (tmp_path / "generalized_sum_pool.png").stat().st_size > 10_000
    assert "sum pooling, zero-shot loss" in capsys.readouterr().out
