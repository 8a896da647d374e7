"""The denoising example runs on small pictures, and writes what it promises."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_denoising_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plot_denoising as example

    monkeypatch.setattr(sys, "argv", ["example", "--quick", "--out", str(tmp_path)])
    example.main()
    del sys.modules["plot_denoising"]
    results = json.loads((tmp_path / "results.json").read_text())
    ends, best = results["loss at the end"], results["Nelder-Mead"]
    for accuracy in ("0.1", "1", "10", "100"):
        assert ends[f"MAID from {accuracy}"] <= 1.05 * best
    assert results["test PSNR"]["total variation, MAID"] > results["test PSNR"]["noisy"] + 2
    assert results["parameters"] == 101
    for figure in ("loss.png", "pictures.png"):
        assert (tmp_path / figure).stat().st_size > 10_000
    assert "Nelder-Mead: loss" in capsys.readouterr().out
