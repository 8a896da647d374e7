"""The examples on spectral risk, label noise and feasible learning run in a few seconds and write what they promise."""

import json
import sys

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, steps: int, tmp_path, monkeypatch) -> dict:
    import importlib

    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module(f"plot_{name}")
    monkeypatch.setattr(sys, "argv", ["example", "--steps", str(steps), "--out", str(tmp_path)])
    example.main()
    del sys.modules[f"plot_{name}"]
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    return json.loads((tmp_path / "results.json").read_text())


def test_spectral_risk_example(tmp_path, monkeypatch, capsys):
    results = run("spectral_risk", 8, tmp_path, monkeypatch)
    tail = "mean of the largest tenth of the losses"
    assert results["superquantile(0.9)"][tail] < results["mean"][tail]
    assert "extremile(5)" in capsys.readouterr().out


def test_label_noise_example(tmp_path, monkeypatch, capsys):
    results = run("label_noise", 40, tmp_path, monkeypatch)
    assert all(numbers["0.0"] > 0.7 for name, numbers in results.items() if name != "MAE")  # which starts slowly
    assert "ALDR" in capsys.readouterr().out


def test_feasible_learning_example(tmp_path, monkeypatch, capsys):
    results = run("feasible_learning", 200, tmp_path, monkeypatch)
    assert all(numbers["accuracy"] > 0.7 for numbers in results.values())
    assert "resilient" in capsys.readouterr().out
