"""What the example on data hyper-cleaning stands on, and that all methods run in it.

Oracles: the definition of the data (half wrong, no wrong label right); F1 as the harmonic mean of precision and recall;
the variational inequality of a projection; finite differences of the unrolled and of the tightly solved upper
objective; means over blocks.
"""

import json
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
    for name in [n for n in sys.modules if n.partition(".")[0] in ("hyper_cleaning", "plot_hyper_cleaning")]:
        del sys.modules[name]


def toy(n: int = 12):
    """Pictures with five features of three classes, in double precision."""
    g = torch.Generator().manual_seed(0)
    x, v = (torch.randn(n, 5, generator=g, dtype=torch.float64) for _ in range(2))
    labels, right = (torch.randint(3, (n,), generator=g) for _ in range(2))
    return (v, right), (x, labels)


def test_half_of_the_labels_are_wrong():
    from hyper_cleaning.data import features, split

    x, labels = features()
    d, again = split(3, 200, 100), split(3, 200, 100)
    truth = {tuple(row.tolist()): int(label) for row, label in zip(x, labels, strict=True)}
    right = torch.tensor([truth[tuple(row.tolist())] for row in d.x])
    assert torch.equal(d.labels != right, d.wrong) and int(d.wrong.sum()) == 100
    assert all(torch.equal(a, b) for a, b in zip(d, again, strict=True))
    rows = {tuple(row.tolist()) for part in (d.x, d.x_validate, d.x_test) for row in part}
    assert len(rows) == 200 + 100 + 2000  # no picture in two parts


def test_f1():
    from hyper_cleaning.running import f1

    kept, right = torch.rand(2, 50) < 0.4
    precision, recall = right[kept].float().mean(), kept[right].float().mean()
    assert f1(kept, right) == pytest.approx(float(2 / (1 / precision + 1 / recall)), rel=1e-6)


def test_blocks_average_to_the_whole():
    from hyper_cleaning.data import CLEANING

    _, (x, labels) = toy()
    weights, y = torch.randn(12, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    parts = [CLEANING.lower(weights, y, (x[r], labels[r], r)) for r in torch.arange(12).chunk(4)]
    torch.testing.assert_close(torch.stack(parts).mean(), CLEANING.lower(weights, y, (x, labels)))


def test_projection_onto_the_cone():
    from hyper_cleaning.data import coupled

    project = coupled(1.0).project_joint
    g = torch.Generator().manual_seed(0)
    for radius in (-5.0, -0.5, 0.5, 5.0):
        y = torch.randn(4, 3, generator=g, dtype=torch.float64)
        x = {"weights": torch.randn(2, dtype=torch.float64), "radius": torch.tensor(radius, dtype=torch.float64)}
        px, py = project(x, y)
        assert torch.equal(px["weights"], x["weights"])
        assert float(py.norm() - px["radius"]) < 1e-12
        others = torch.randn(100, 4, 3, generator=g, dtype=torch.float64)
        radii = others.flatten(1).norm(dim=1) * (1 + torch.rand(100, generator=g, dtype=torch.float64))
        inner = ((y - py) * (others - py)).sum((1, 2)) + (x["radius"] - px["radius"]) * (radii - px["radius"])
        assert float(inner.max()) < 1e-12


@pytest.mark.parametrize("name", ["unrolling", "implicit"])
def test_methods_by_hand_follow_the_slope(name):
    from hyper_cleaning.data import CLEANING
    from hyper_cleaning.double_loop import ImplicitGradient, Unrolling

    from difflayers.bilevel import ArgminLayer

    upper, lower = toy()
    x = torch.randn(12, dtype=torch.float64)
    start = torch.zeros(5, 3, dtype=torch.float64)
    layer = ArgminLayer(CLEANING, init=start)

    def value(x):
        y = start
        if name == "implicit":
            y = layer(x, lower)
        else:
            for _ in range(3):
                leaf = y.detach().requires_grad_()
                y = leaf.detach() - 0.5 * torch.autograd.grad(CLEANING.lower(x, leaf, lower), leaf)[0]
        return float(CLEANING.upper(x, y, upper))

    if name == "implicit":
        algo = ImplicitGradient(CLEANING, x, start, step=1.0, rtol=1e-10)
    else:
        algo = Unrolling(CLEANING, x, start, step=1.0, step_lower=0.5, inner_steps=3)
    algo.step(upper, lower)
    direction = torch.randn(12, dtype=torch.float64)
    expected = (value(x + 1e-4 * direction) - value(x - 1e-4 * direction)) / 2e-4
    assert float(((x - algo.x) * direction).sum()) == pytest.approx(expected, rel=1e-4)
    if name == "unrolling":
        assert dict(algo.counts) == {"upper": 1, "lower": 3, "hvp": 3, "cross": 3}


def test_all_methods_run(tmp_path, capsys):
    import plot_hyper_cleaning as example

    found = example.main(["--quick", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "hyper_cleaning.png").stat().st_size > 20_000
    assert set(written["methods"]) == set(example.RECIPES) == set(found["methods"])
    uniform = found["baselines"]["all labels"][0]
    for name, values in found["methods"].items():
        assert values["accuracy"][0] > uniform, name
        assert 60 <= values["gradients"] + values["products"] < 400, name
        assert values["calls"][0] == sorted(values["calls"][0]), name
    assert "MAID" in capsys.readouterr().out


def test_tuning_finds_the_best_of_all_settings(monkeypatch, capsys, tmp_path):
    import plot_hyper_cleaning as example

    monkeypatch.setattr(example, "held_out_loss", lambda recipe, settings, data, budget: abs(sum(settings) - 9.0))
    example.main(["--tune", "--methods", "VPBGD", "--out", str(tmp_path)])
    assert "VPBGD: (5.0, 3.0), loss 1.0000" in capsys.readouterr().out


def test_a_run_that_diverges_has_no_loss():
    from hyper_cleaning.data import split
    from hyper_cleaning.recipes import RECIPES, soba
    from hyper_cleaning.running import held_out_loss

    recipe = RECIPES["SOBA"]
    assert recipe.make is soba
    data = split(0, 200)
    assert held_out_loss(recipe, (0.2, 1e38), data, 40.0) == float("inf")
