"""The MoreauGrad example runs in a few seconds and writes what it promises."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_moreau_grad_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plot_moreau_grad as example

    monkeypatch.setattr(sys, "argv", ["example", "--steps", "150", "--images", "6", "--out", str(tmp_path)])
    monkeypatch.setattr(example, "SAMPLES", 4)
    monkeypatch.setattr(example, "TRIALS", 2)
    monkeypatch.setattr(example, "WEIGHT", 1.0)  # gradients are small after so few steps
    try:
        example.main()  # which asserts that the sparse map moves less than the gradient
    finally:
        del sys.modules["plot_moreau_grad"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["sparse MoreauGrad"]["zeros"] > 0.2 > results["MoreauGrad"]["zeros"]
    assert results["accuracy"] > 0.85
    assert (tmp_path / "moreau_grad.png").stat().st_size > 10_000
    assert "times as much as the gradient" in capsys.readouterr().out
