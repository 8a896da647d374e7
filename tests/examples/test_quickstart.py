"""The examples run, in configurations of a few seconds, and write what they promise."""

import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The examples are scripts: they see their own folder, and nobody sees it afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in [
        n for n in sys.modules if n.partition(".")[0] in ("quickstart", "chapters", "plot_convergent_graph_solver")
    ]:
        del sys.modules[name]


def test_quickstart_writes_one_self_contained_page(tmp_path, capsys):
    import quickstart

    page = quickstart.main(["--tiny", "--out", str(tmp_path)])
    html = page.read_text(encoding="utf-8")
    assert page == tmp_path / "index.html"
    assert html.count("<h2>") == 7 and html.count("data:image/png;base64,") == 27
    assert 'name="viewport"' in html and "A tiny run" in html
    links = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"<script|@import|url\(", html)
    assert re.findall(r'alt="[^"]+"', html)
    printed = capsys.readouterr().out
    assert "test accuracy" in printed and "solver steps" in printed and "unrolled" in printed
    numbers = json.loads((tmp_path / "implicit" / "implicit.json").read_text())
    assert "with a say" in printed
    few, many, *unrolled = (row["saved"] for row in numbers["memory"])
    assert few == many < unrolled[0] < unrolled[1]
    assert len(set(numbers["parameters"].values())) == 1
    numbers = json.loads((tmp_path / "proximal" / "proximal.json").read_text())
    assert numbers["change"] < 1e-3 and numbers["sparse code"]["consulted"] < 30
    numbers = json.loads((tmp_path / "conic" / "conic.json").read_text())
    assert numbers["program"]["covered"] == 1 and numbers["statuses"][1] == "INFEASIBLE" and numbers["same"]
    assert numbers["certified"] >= numbers["program"]["dearer"] >= -1e-3
    numbers = json.loads((tmp_path / "transport" / "transport.json").read_text())
    assert numbers["Sinkhorn"]["crowd"] < 1.001 < numbers["softmax"]["crowd"] and numbers["same"]
    kept = numbers["gradients"]["layer_kept"]
    assert kept[0] == kept[1] < numbers["gradients"]["kept"][0] and "DIVERGED" in numbers["statuses"]
    numbers = json.loads((tmp_path / "relu" / "relu.json").read_text())
    assert numbers["gap"] < 1e-9 and numbers["gradients"]["error"] < 1e-4 and min(numbers["adam"]) > -1e-9
    assert len(numbers["trust"]) == 8 and numbers["beta"][0] != numbers["beta"][-1]
    numbers = json.loads((tmp_path / "pde" / "pde.json").read_text())
    few, *_ = numbers["gradients"]
    assert few["exact"] < 1e-5 < 1e-3 < few["gauss_newton"] and len(numbers["errors"]["descent"]) == 4
    numbers = json.loads((tmp_path / "bilevel" / "bilevel.json").read_text())
    *unrolled, layer = numbers["gradients"]["errors"]
    assert layer < 1e-3 < 0.1 < min(unrolled) and numbers["loss"][1] < numbers["loss"][0]


def test_quickstart_runs_a_chapter_by_name(tmp_path, capsys):
    import quickstart

    quickstart.main(["--list", "--out", str(tmp_path)])
    listed = capsys.readouterr().out
    names = ("implicit", "proximal", "conic", "transport", "relu", "pde", "bilevel")
    assert all(name in listed for name in names) and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        quickstart.main(["--chapter", "nothing", "--out", str(tmp_path)])
    assert "there are: implicit, proximal, conic, transport, relu, pde, bilevel" in capsys.readouterr().err


def test_page_escapes_what_it_shows(tmp_path):
    from chapters import Chapter, Code, Heading, Table, Text
    from chapters._page import render

    blocks = [Text("a < b"), Heading("<i>"), Code("x & y"), Table(("<h>",), [("1 > 0",)], "<c>")]
    html = render({"one": (Chapter("one", "A & B", 1, lambda settings: blocks), blocks)}, "<f>")
    for shown in ("a &lt; b", "&lt;i&gt;", "x &amp; y", "&lt;h&gt;", "1 &gt; 0", "&lt;c&gt;", "A &amp; B", "&lt;f&gt;"):
        assert shown in html


def test_shoppers_buy_the_cheapest_basket():
    """Against HiGHS: what the training data say is right, up to the little square that makes baskets unique."""
    import torch
    from chapters.conic import shops
    from scipy.optimize import linprog

    generator = torch.Generator().manual_seed(0)
    made = shops(torch.rand(40, 64, generator=generator), torch.arange(40) % 10, 12, seed=0)
    assert made.prices.shape == made.basket.shape == (12, 8) and len({*made.images[0].sum(-1).tolist()}) == 8
    for i in range(12):
        c, A, b = (t[i].numpy() for t in (made.prices, made.contents, made.needs))
        best = linprog(c, -A, -b, bounds=(0, 1), method="highs")
        bought = made.basket[i].numpy()
        assert best.fun - 1e-8 <= c @ bought <= best.fun + 0.04 and (A @ bought >= b - 1e-9).all()


def test_plans_of_both_ways_agree_where_they_have_converged():
    import torch
    from chapters._plan_gradients import compare, converged, layer, unrolled

    cost = torch.rand(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for plan in (unrolled(cost, 0.2, 500), converged(cost, 0.2, 500)):
        torch.testing.assert_close(plan, layer(cost, 0.2), rtol=0, atol=1e-9)
    found = compare(lambda p: p.square().sum((-2, -1)), cost, 0.2, tiny=True)
    assert found.error < 1e-6 < 1e-3 < found.errors[0]


def test_unrolled_training_tends_to_the_trained_network():
    """Steps that share no code with the layer, in value and gradient, and Adam, which ends above."""
    import torch
    from chapters._training_gradients import compare, descend, unrolled

    from difflayers.relu import convex_gated_relu, sample_gates

    generator = torch.Generator().manual_seed(0)
    X = torch.randn((24, 3), generator=generator, dtype=torch.float64)
    y, who = X[:, 0].sign() * X[:, 1], torch.arange(24) % 3
    gates, beta = sample_gates(X, 6, generator=generator), torch.tensor(0.5, dtype=torch.float64)
    trust = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)[who]
    network = convex_gated_relu(X, y, beta, gates.vectors, sample_weight=trust)
    steps = unrolled(X, y, trust, beta, gates, 3000)
    torch.testing.assert_close(steps, network.v, rtol=0, atol=1e-8)
    found = compare(X, y, trust, beta, gates, who, X[:5], y[:5].sign(), tiny=False)
    assert found.error < 1e-6 and found.errors[-1] < 1e-3 < found.errors[0]
    assert min(descend(X, y, trust, beta, gates, starts=3, steps=50).ends) > 0


def test_people_are_as_careful_as_told():
    from chapters.relu import WRONG, load

    data = load(200, 20)
    wrong = (data.said != data.right).double()
    assert len(data.test[0]) == 1797 - 1600 - 20
    for i, share in enumerate(WRONG):
        assert abs(wrong[data.who == i].mean() - share) < 0.12
    assert (data.test[1].abs() == 1).all()


def test_the_law_of_a_rod_is_found_from_readings_without_noise():
    """Readings of a law that can be fitted, from finite volumes that share no code with the layer."""
    import numpy as np
    import torch
    from chapters._rod import NOISE, START, Readings, at_thermometers, finite_volumes, log_law, measure
    from chapters.pde import constraint, misfit

    law = START + torch.tensor([0.6, 1.2, -0.3, 0.0, 0.0], dtype=torch.float64)
    exact = torch.tensor(at_thermometers(lambda u: np.exp(log_law(u, law.numpy())), 264))
    data = Readings(measure().points, exact)
    assert abs(finite_volumes(lambda u: 0.03 + 0 * u, 64).mean(1).std()) < 1e-8  # insulated
    layer = constraint(256)
    assert misfit(layer, law, data) * NOISE**2 < 2e-3**2 < misfit(layer, START, data) * NOISE**2


def test_process_peak_is_measured():
    from chapters.implicit import peak_bytes

    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    assert peak_bytes("implicit", 3) >= 0


def test_convergent_graph_solver_example(tmp_path, monkeypatch, capsys):
    import plot_convergent_graph_solver as example

    monkeypatch.setattr(sys, "argv", ["example", "--steps", "2", "--out", str(tmp_path)])
    monkeypatch.setattr(example, "SIZES", {"20 to 30 states": (2, (20, 30))})
    example.main()
    rows = json.loads((tmp_path / "results.json").read_text())
    assert len(rows) == 4 and (tmp_path / "value_iteration.png").stat().st_size > 10_000
    assert "5 to 10 actions" in capsys.readouterr().out


def test_value_iteration_targets():
    import plot_convergent_graph_solver as example
    import torch

    batch = example.random_graphs(3, (20, 50), (5, 10), torch.Generator().manual_seed(0))
    state, other = batch.edge_index
    assert (state != other).all()
    action = batch.reward + 0.9 * batch.value[other]
    want = torch.stack([action[state == i].max() for i in range(len(batch.value))])
    torch.testing.assert_close(batch.value, want)
