"""The example of the sampled convex program runs in a few seconds and writes what it promises."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_sampled_program_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plot_sampled_program as example

    monkeypatch.setattr(example, "COUNTS", (10, 100, 1000))
    monkeypatch.setattr(example, "STRENGTHS", (0.1,))
    monkeypatch.setattr(sys, "argv", ["example", "--seeds", "1", "--starts", "2", "--out", str(tmp_path)])
    example.main()
    del sys.modules["plot_sampled_program"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["optimum"] < results["sampled"]["1000"] < results["sampled"]["10"]
    assert results["optimum"] < results["L-BFGS"]["best"]
    growth = {name: values["0.1"] for name, values in results["penalty over the gated one"].items()}
    assert 1 < growth["exact"] < growth["approximate"] < growth["closed"]
    assert (tmp_path / "sampled_program.png").stat().st_size > 10_000
    assert "optimum over all" in capsys.readouterr().out
