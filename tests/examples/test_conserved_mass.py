"""The example of conserved mass runs in a few seconds and writes what it promises."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_conservation_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plot_conservation as example

    monkeypatch.setattr(sys, "argv", ["example", "--seeds", "1", "--steps", "60", "--out", str(tmp_path)])
    example.main()
    del sys.modules["plot_conservation"]
    results = json.loads((tmp_path / "results.json").read_text())
    for problem in (results["porous medium"], results["Stefan"]):
        for way, errors in problem["mass"].items():
            assert max(errors) > 1e-4 if way.endswith("network") else max(errors) < 1e-10
    assert (tmp_path / "conservation.png").stat().st_size > 10_000
    assert "HardC" in capsys.readouterr().out
