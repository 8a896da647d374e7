"""The examples on few-shot heads and Net-Trim run in a few seconds and write what they promise."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUICK = {
    "plot_few_shot_head": ["--seeds", "1", "--steps", "3"],
    "plot_net_trim": ["--seeds", "1", "--steps", "50", "--samples", "100", "--tolerances", "0.1"],
}


@pytest.mark.parametrize("name", list(QUICK))
def test_example_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, *QUICK[name], "--out", str(tmp_path)])
    example = __import__(name)
    example.main()
    del sys.modules[name]
    assert (tmp_path / f"{name.removeprefix('plot_')}.png").stat().st_size > 10_000
    assert "figure and numbers in" in capsys.readouterr().out
