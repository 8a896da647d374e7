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
    assert html.count("<h2>") == 4 and html.count("data:image/png;base64,") == 17
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


def test_quickstart_runs_a_chapter_by_name(tmp_path, capsys):
    import quickstart

    quickstart.main(["--list", "--out", str(tmp_path)])
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("implicit", "proximal", "conic", "transport")) and not list(
        tmp_path.iterdir()
    )
    with pytest.raises(SystemExit):
        quickstart.main(["--chapter", "nothing", "--out", str(tmp_path)])
    assert "there are: implicit, proximal, conic, transport" in capsys.readouterr().err


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
