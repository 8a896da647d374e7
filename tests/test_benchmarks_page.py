"""docs/benchmarks.md says what the stored results say."""

import json

from benchmarks.__main__ import NAMES
from benchmarks.figures import FOLDER, digest, points
from benchmarks.page import GROUPS, OTHERS, PAGE, RESULTS, Entry, fastest, figure_name, page


def test_the_page_is_that_of_the_stored_results():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m benchmarks --page`"


def test_the_figures_are_those_of_the_stored_results():
    """Drawn again they could differ with the version of matplotlib, so a figure says what it was drawn from."""
    sizes = 0
    for group in GROUPS:
        drawn = (FOLDER / figure_name(group)).read_text(encoding="utf-8")
        assert digest(points(group)) in drawn, "run `python -m benchmarks --page`"
        sizes += len(drawn)
    assert sizes < 300_000
    assert f"_static/benchmarks/{figure_name('Transport')}" in PAGE.read_text(encoding="utf-8")


def test_every_benchmark_has_its_place():
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == NAMES
    stored = {path.stem for path in RESULTS.glob("*.json")}
    assert stored <= {*grouped, *OTHERS}


def row(case, contender, ratio, error, **fields):
    found = {"case": case, "contender": contender, "ours": ratio == 1, "ratio_to_ours": ratio, "relative_error": error}
    return found | {"median_seconds": ratio, "target": 1e-4, "settings": "", "peak_bytes": None} | fields


def test_a_peer_that_wins_stands_first_and_one_that_is_off_is_marked(tmp_path):
    rows = [
        row("easy", "difflayers", 1, 1e-8),
        row("easy", "slow", 3.0, 1e-8, peak_bytes=2**21),
        row("easy", "sloppy", 0.1, 1e-2, settings="tol 1|2"),
        row("hard", "difflayers", 1, 1e-8),
        row("hard", "difflayers, another solver", 0.2, 1e-8),
        row("hard", "quick", 0.5, 1e-8),
        row("hard", "quick, forward alone", 0.05, 1e-8),
    ]
    about = {"versions": {"torch": "2.6"}, "device": "a processor", "threads": 1}
    (tmp_path / "lasso.json").write_text(json.dumps({"name": "lasso", **about, "rows": rows}))
    text = page(tmp_path).replace("\N{NON-BREAKING HYPHEN}", "-")
    first, rest = text.split("## Summary")
    assert "In 1 of 2 cases" in first and "a processor, 1 thread" in first and "`proximal`" in first
    lost = [line for line in first.splitlines() if line.startswith("| 0.")]
    assert lost == [
        "| 0.05 | quick, forward alone, **does less** | [lasso](#lasso) | 1 of 1 | hard: 50 ms against 1 s |",
        "| 0.50 | quick | [lasso](#lasso) | 1 of 1 | hard: 500 ms against 1 s |",
    ]
    assert "| [lasso](#lasso) | 2 | 1 of 2 | 0.50 | 1.75 | 3.00 |" in rest
    assert "| hard | difflayers | ours |" in rest and "| easy | difflayers | ours |" in rest
    assert rest.index("| hard | difflayers | ours |") < rest.index("| easy | difflayers | ours |")
    assert "|  | slow | 3.00 | 3 s | 1e-08 | 2.0 MiB |  |" in rest
    assert r"|  | sloppy | 0.10 | 100 ms | 1e-02, **inaccurate** | - | tol 1\|2 |" in rest
    assert "|  | quick | **0.50** |" in rest and "|  | difflayers, another solver | 0.20 |" in rest


def test_an_inaccurate_result_of_ours_beats_nobody():
    names = ("case", "contender", "ours", "ratio_to_ours", "median_seconds", "relative_error", "target")

    def entries(ours: float, ratio: float) -> list[Entry]:
        rows = [row("c", "difflayers", 1, ours), row("c", "peer", ratio, 1e-8)]
        return [Entry(*(r[name] for name in names), None, "") for r in rows]

    assert fastest(entries(1e-3, 3.0)) is None
    for beaten in (fastest(entries(1e-8, 3.0)), fastest(entries(1e-3, 0.5))):
        assert beaten is not None and beaten.contender == "peer"
