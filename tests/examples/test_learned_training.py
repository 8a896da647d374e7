"""The examples on data augmentation and hyper-representation: their parts, and that they run.

Oracles: ``torch.rot90`` and ``torch.roll`` for transformations at the end of their range; finite differences of the
validation loss for the gradient in ranges, of the tightly solved loss for that in features; classifiers fitted to one
task at a time; labels of pictures for tasks.
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True, scope="module")
def importable():
    """The examples are scripts: they see their own folder, and nobody sees it afterwards."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield
    torch.set_num_threads(threads)
    for name in ("plot_augmentation", "plot_hyper_representation"):
        sys.modules.pop(name, None)


# --------------------------------------------------------------------------------------------------------- augmentation


def test_transformations_reach_the_end_of_their_range(monkeypatch):
    import plot_augmentation as example

    pictures = torch.rand(3, 1, 14, 14)
    generator = torch.Generator()
    torch.testing.assert_close(example.transform(pictures, example.NONE, generator), pictures)
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.ones(*shape))  # all draws are 1
    quarter = torch.tensor([math.pi / 2, 0.0, 0.0, 0.0, 0.0])
    turned = example.transform(pictures, quarter, generator)
    torch.testing.assert_close(turned, torch.rot90(pictures, 1, (-2, -1)), atol=1e-5, rtol=0)
    for k, axis in ((1, -1), (2, -2)):
        ranges = torch.zeros(5)
        ranges[k] = 2 / 7  # of half the width: two pixels
        moved = example.transform(pictures, ranges, generator).narrow(axis, 0, 12)
        torch.testing.assert_close(moved, torch.roll(pictures, -2, axis).narrow(axis, 0, 12), atol=1e-5, rtol=0)


def test_gradient_in_the_ranges(monkeypatch):
    import plot_augmentation as example

    from difflayers.implicit import LBFGS

    monkeypatch.setattr(example, "LEARN", 40)
    monkeypatch.setattr(example, "TEST", 10)
    task = example.Task(0)
    task.train.solver = LBFGS()

    def loss(ranges):
        task.generator.manual_seed(1)
        return task.validation_loss(task.learn(ranges, 1))

    ranges = torch.full((5,), 0.05, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(ranges), ranges)
    with torch.no_grad():
        for k in range(3):
            e = torch.zeros(5)
            e[k] = 0.002
            expected = float((loss(ranges + e) - loss(ranges - e)) / 0.004)
            assert float(slope[k]) == pytest.approx(expected, rel=0.1)


def test_augmentation_runs(tmp_path, monkeypatch, capsys):
    import plot_augmentation as example

    monkeypatch.setattr(example, "LEARN", 60)
    monkeypatch.setattr(example, "FINAL_COPIES", 2)
    example.main(["--steps", "2", "--seeds", "2", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(0.1 < a < 1 for accuracy in results["accuracy"].values() for a in accuracy)
    assert results["ranges"]["learned"][0] != example.START.tolist()
    assert (tmp_path / "augmentation.png").stat().st_size > 20_000
    assert "the true ranges" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- hyper-representation


def test_tasks_have_new_digits_and_no_picture_twice():
    import plot_hyper_representation as example

    d = example.data(0)
    assert d.learn.shape == (example.LEARN_TASKS, example.WAYS, example.SHOTS + example.QUERIES, 1, 14, 14)
    turns = [torch.rot90(d.pictures, k, (-2, -1)) for k in range(4)]
    known = {x.numpy().tobytes() for turned in turns for x in turned}
    assert all(x.numpy().tobytes() not in known for x in d.new.flatten(0, 2)[:200])
    assert all(x.numpy().tobytes() in known for x in d.learn.flatten(0, 2)[:200])
    for task in d.learn[:5]:
        assert len({x.numpy().tobytes() for x in task.flatten(0, 1)}) == example.WAYS * (
            example.SHOTS + example.QUERIES
        )
    assert example.targets(d.learn[:2], 2).tolist() == 2 * [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert torch.equal(example.labelled(d.learn)[3, 4], d.learn[3, 1, 1])
    assert torch.equal(example.others(d.learn)[3, 6], d.learn[3, 1, example.SHOTS + 1])


def test_classifiers_of_tasks_do_not_see_each_other():
    import plot_hyper_representation as example

    z = torch.randn(3, 15, 6, dtype=torch.float64)
    ridge, labels = torch.tensor(0.1, dtype=torch.float64), torch.arange(5).repeat_interleave(3)
    torch.set_default_dtype(torch.float64)
    try:
        together = example.fit(z, ridge, labels.repeat(3))
        alone = torch.cat([example.fit(one.unsqueeze(0), ridge, labels) for one in z])
        e = 1e-3 * torch.randn(3, 15, 6)
        a = z.clone().requires_grad_()
        (slope,) = torch.autograd.grad(example.fit(a, ridge, labels.repeat(3)).square().sum(), a)
        ends = [float(example.fit(z + s * e, ridge, labels.repeat(3)).square().sum()) for s in (1, -1)]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(together, alone, rtol=0.02, atol=0.02)
    assert float((slope * e).sum()) == pytest.approx((ends[0] - ends[1]) / 2, rel=0.05, abs=1e-4)


def test_hyper_representation_runs(tmp_path, monkeypatch, capsys):
    import plot_hyper_representation as example

    monkeypatch.setattr(example, "NEW_TASKS", 10)
    monkeypatch.setattr(example, "LEARN_TASKS", 12)
    monkeypatch.setattr(example, "RIDGES", (1e-2,))
    results = example.main(["--steps", "6", "--seeds", "1", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert all(0.3 < a <= 1 for accuracy in results.values() for a in accuracy)
    assert (tmp_path / "hyper_representation.png").stat().st_size > 20_000
    assert "bilevel" in capsys.readouterr().out
