"""The example of Newton's method with sparse Hessians runs on a small problem, and writes what it promises."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_sparse_newton(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    import plot_sparse_newton as example

    try:
        monkeypatch.setattr(sys, "argv", ["example", "--steps", "200", "--size", "150", "--out", str(tmp_path)])
        example.main()  # which asserts that Newton's method ends in 60 iterations
    finally:
        torch.set_num_threads(threads)
        sys.modules.pop("plot_sparse_newton")
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(both["Sinkhorn"]["to 1e-12"] is None for both in results.values())
    assert all(both["sparse Newton"]["to 1e-12"] for both in results.values())
    assert (tmp_path / "sparse_newton.png").stat().st_size > 10_000
    assert "more than" in capsys.readouterr().out
