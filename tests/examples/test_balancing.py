"""The examples of self-labelling and of balanced routing run in a few seconds and write what they promise."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_self_label_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plot_self_label as example

    monkeypatch.setattr(sys, "argv", ["example", "--seeds", "1", "--rounds", "3", "--out", str(tmp_path)])
    example.main()
    del sys.modules["plot_self_label"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["nmi"]["equal sizes"][0] > results["nmi"]["largest prediction"][0]
    assert results["largest cluster"]["equal sizes"][0] < 0.15 < results["largest cluster"]["largest prediction"][0]
    assert (tmp_path / "self_label.png").stat().st_size > 10_000
    assert "K-means" in capsys.readouterr().out


def test_balanced_routing_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plot_balanced_routing as example

    monkeypatch.setattr(sys, "argv", ["example", "--seeds", "1", "--steps", "40", "--out", str(tmp_path)])
    example.main()
    del sys.modules["plot_balanced_routing"]
    late = json.loads((tmp_path / "results.json").read_text())["means"]["imbalance, second half"]
    assert late["Sinkhorn"] < late["ALF-LB"] < late["top-1 alone"]
    assert (tmp_path / "balanced_routing.png").stat().st_size > 10_000
    assert "Sinkhorn" in capsys.readouterr().out
