"""The examples of UPGrad run in a few steps, and write what they promise."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The examples are scripts: they see their own folder, and nobody sees it afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in ("plot_upgrad_digits", "plot_instance_risk"):
        sys.modules.pop(name, None)


def test_upgrad_digits(tmp_path, monkeypatch, capsys):
    import plot_upgrad_digits as example

    monkeypatch.setattr(sys, "argv", ["example", "--steps", "12", "--out", str(tmp_path)])
    example.main()  # which asserts that no step of UPGrad raises a loss
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["mean"]["steps that raise a loss"] > 0 == results["UPGrad"]["steps that raise a loss"]
    assert (tmp_path / "upgrad_digits.png").stat().st_size > 10_000
    assert "0 steps raise a loss" in capsys.readouterr().out


def test_instance_risk(tmp_path, monkeypatch, capsys):
    import plot_instance_risk as example

    monkeypatch.setattr(sys, "argv", ["example", "--steps", "20", "--out", str(tmp_path)])
    monkeypatch.setattr(example, "RATES", (0.4,))
    monkeypatch.setattr(example, "SEEDS", 2)
    example.main()  # which asserts that UPGrad hurts nobody
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["mean"]["share of examples hurt"] > 0.05
    assert results["UPGrad"]["training loss at the end"] < results["mean"]["training loss at the end"]
    assert (tmp_path / "instance_risk.png").stat().st_size > 10_000
    assert "accuracy on unseen pictures" in capsys.readouterr().out
