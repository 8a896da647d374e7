"""The clustering examples run in a few seconds and write what they promise."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "arguments", "key"),
    [
        ("laplacian_clustering", ["--episodes", "3", "--steps", "5"], "lam"),
        ("manifold_linearizing", ["--draws", "1", "--steps", "5"], "loss"),
    ],
)
def test_example(name, arguments, key, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = __import__(f"plot_{name}")
    monkeypatch.setattr(example, "SWEEP", (0.0, 0.5), raising=False)
    monkeypatch.setattr(sys, "argv", ["example", *arguments, "--out", str(tmp_path)])
    example.main()
    del sys.modules[f"plot_{name}"]
    assert key in json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
