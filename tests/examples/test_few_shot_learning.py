"""The few-shot example runs in a few seconds, learns, and writes what it promises."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_few_shot_learning_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plot_few_shot_learning as example

    monkeypatch.setattr(
        sys, "argv", ["example", "--seeds", "1", "--steps", "12", "--tests", "30", "--out", str(tmp_path)]
    )
    example.main()
    del sys.modules["plot_few_shot_learning"]
    (run,) = json.loads((tmp_path / "results.json").read_text())
    assert run["implicit"]["loss"][-1] < 0.8 * run["implicit"]["loss"][0]
    assert run["implicit"]["accuracy"] > run["from scratch"]["accuracy"]
    strength = run["implicit"]["strength"]
    assert len(strength) == 4 and max(strength) > 1.2 * min(strength)
    assert (tmp_path / "few_shot_learning.png").stat().st_size > 10_000
    assert "trained on all" in capsys.readouterr().out
