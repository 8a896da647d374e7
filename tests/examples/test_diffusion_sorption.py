"""The example of diffusion-sorption runs in a few seconds and writes what it promises."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_diffusion_sorption_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plot_diffusion_sorption as example

    monkeypatch.setattr(example, "HELD_OUT", [0.05, 0.15])
    monkeypatch.setattr(sys, "argv", ["example", "--seeds", "1", "--budget", "0.05", "--out", str(tmp_path)])
    example.main()
    del sys.modules["plot_diffusion_sorption"]
    ways = json.loads((tmp_path / "results.json").read_text())["ways"]
    tied, apart = ways["4 experts, tied at seams"], ways["4 experts, own conditions"]
    assert tied["Chebyshev"] < 10 < 25 < apart["Chebyshev"]  # no training in these: the layer alone
    assert tied["jump"][0] < 0.1 < apart["jump"][0]
    assert (tmp_path / "diffusion_sorption.png").stat().st_size > 10_000
    assert "finite volumes" in capsys.readouterr().out
