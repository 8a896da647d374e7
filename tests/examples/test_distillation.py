"""The examples of distillation by transport and of online transport run in a few steps, and write what they promise."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("cvxpy")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The examples are scripts: they see their own folder, and nobody sees it afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in ("plot_sinkhorn_distillation", "plot_mirror_sinkhorn"):
        sys.modules.pop(name, None)


def test_sinkhorn_distillation(tmp_path, monkeypatch, capsys):
    import plot_sinkhorn_distillation as example

    monkeypatch.setattr(sys, "argv", ["example", "--steps", "60", "--out", str(tmp_path)])
    monkeypatch.setattr(example, "SEEDS", 2)
    example.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["accuracy"]) == ["teacher", "CE", "CE + KL", "CE + KL + SinKD"]
    off = results["error of unrolled gradients"]
    assert off["5"] > off["20"] > off["100"]
    assert (tmp_path / "sinkhorn_distillation.png").stat().st_size > 10_000
    assert "gain over KL" in capsys.readouterr().out


def test_mirror_sinkhorn(tmp_path, monkeypatch, capsys):
    import plot_mirror_sinkhorn as example

    monkeypatch.setattr(sys, "argv", ["example", "--steps", "320", "--out", str(tmp_path)])
    monkeypatch.setattr(example, "N", 12)
    example.main()  # which asserts that no plan beats the optimum, and that gaps fall
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["cheapest"]["0.0"]["gap"] < 0.05
    assert (tmp_path / "mirror_sinkhorn.png").stat().st_size > 10_000
    assert "slope" in capsys.readouterr().out
