"""The example on penalties by gradients runs in a few seconds and writes what it promises."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_hyperparameters_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plot_hyperparameters as example

    monkeypatch.setattr(sys, "argv", ["example", "--quick", "--out", str(tmp_path)])
    example.main()
    del sys.modules["plot_hyperparameters"]
    results = json.loads((tmp_path / "results.json").read_text())
    needed = results["evaluations to 1e-4"]
    assert max(needed["HOAG, quadratic"], needed["HOAG, cubic"]) < 250 < needed["exact"]  # which is never there
    for name, reference in (("diabetes", "RidgeCV"), ("breast_cancer", "LogisticRegressionCV")):
        (seed,) = results["unseen"][name]
        assert seed["HOAG, one penalty"]["loss"] < 1.05 * seed[reference]["loss"]
    assert 5 < results["unseen"]["diabetes"][0]["elastic net, one for each feature"]["features"] < 30
    assert (tmp_path / "hyperparameters.png").stat().st_size > 10_000
    assert "thirty penalties" in capsys.readouterr().out
