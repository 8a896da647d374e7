"""The examples of the bilevel applications run small, and write what they promise."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example, and returns its numbers and what it printed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def example(name, *options, **constants):
        module = __import__(f"plot_{name}")
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
        monkeypatch.setattr(sys, "argv", ["example", *options, "--out", str(tmp_path)])
        try:
            module.main()
        finally:
            del sys.modules[f"plot_{name}"]
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        return json.loads((tmp_path / "results.json").read_text()), capsys.readouterr().out

    return example


def test_pruning(run):
    results, printed = run("bilevel_pruning", "--gradients", "200", "--seeds", "1", SPARSITIES=(0.5, 0.95))
    assert min(results["dense"]) > 0.8  # it asserts itself that the sparsity is exact
    assert results["BilevelPruning"]["0.95"][0] > results["once"]["0.95"][0] - 0.01
    assert "95 % sparse, BilevelPruning against pruning once" in printed


def test_self_tuning(run):
    options = ("--steps", "150", "--trials", "1", "--seeds", "1")
    results, printed = run(
        "self_tuning", *options, GAIN=-0.1, SLACK=0.1, WARM_UP=50
    )  # too short a run to learn by heart
    assert results["mean"]["SelfTuning"]["accuracy"] > 0.8
    assert results["runs"][0]["valid"][-1] < results["runs"][0]["valid"][0] / 2
    assert "of the gradients" in printed


def test_dataset_distillation(run):
    results, printed = run("dataset_distillation", "--steps", "30", "--seeds", "1", NETWORKS=1, EPOCHS=150)
    assert results["accuracy"]["distilled"]["perceptron"][0] > 0.65
    assert sum(results["losses"][0][-10:]) < 0.9 * sum(results["losses"][0][:10])
    assert "trained on" in printed
