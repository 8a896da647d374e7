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
    for errors in (results["porous medium"][0], results["Stefan"][0]):
        assert max(errors["mass"]["layer"]) < 1e-10 < 1e-4 < max(errors["mass"]["network"])
    assert (tmp_path / "conservation.png").stat().st_size > 10_000
    assert "HardC" in capsys.readouterr().out
