"""The curves of the bilevel methods: each comes nearer to the known optimum, the exact ones fastest."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_bilevel_methods_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plot_bilevel_methods as example

    monkeypatch.setattr(example, "SCALES", (0.125, 0.5))
    monkeypatch.setattr(sys, "argv", ["example", "--calls", "250", "--out", str(tmp_path)])
    example.main()
    del sys.modules["plot_bilevel_methods"]
    ends = {
        panel: {n: e[1] for n, e in by.items()}
        for panel, by in json.loads((tmp_path / "results.json").read_text()).items()
    }
    assert set(ends) == {"strongly convex", "merely convex", "not convex", "coupled"}
    strongly = ends["strongly convex"]
    assert len(strongly) == 13 and all(distance < 1 for distance in strongly.values())
    assert strongly["ImplicitSGD"] < 0.2 and strongly["HOAG"] < 0.2
    assert (tmp_path / "bilevel_methods.png").stat().st_size > 10_000
    assert "LVHBA" in capsys.readouterr().out
