"""The example of plane flows runs in a few seconds and writes what it promises."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_navier_stokes_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plot_navier_stokes as example

    monkeypatch.setattr(sys, "argv", ["example", "--seeds", "1", "--steps", "4", "--out", str(tmp_path)])
    example.main()
    del sys.modules["plot_navier_stokes"]
    (run,) = json.loads((tmp_path / "results.json").read_text())
    errors = {name: found["error"][0] for name, found in run.items()}
    assert errors["one constraint"] < errors["diffusion alone"] < errors["soft penalty"]  # hardly trained yet
    assert all(found["error"][1] < 1e-3 for found in run.values())  # the beginning is exact, but for the finer grid
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("navier_stokes.png", "field.png"))
    assert "one, then experts" in capsys.readouterr().out
