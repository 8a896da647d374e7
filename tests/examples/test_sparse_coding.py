"""The sparse coding example runs in a few seconds and writes what it promises."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_sparse_coding_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plot_sparse_coding as example

    monkeypatch.setattr(sys, "argv", ["example", "--steps", "20", "--out", str(tmp_path)])
    example.main()
    del sys.modules["plot_sparse_coding"]
    results = json.loads((tmp_path / "results.json").read_text())
    share = results["explained by 8 coefficients"]
    assert share["sparse codes"] > share["principal components"]
    assert (tmp_path / "sparse_coding.png").stat().st_size > 10_000
    assert "task-driven" in capsys.readouterr().out
