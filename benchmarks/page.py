"""Writes `docs/benchmarks.md` from the stored results: what `python -m benchmarks --page` does.

The page measures nothing, so the same results give the same page to the letter; a test holds it to that.
"""

import ast
import json
import math
import re
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import LESS, OURS, ROOT

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
# A peer counts as right where its error is at most this, in a case whose benchmark sets no target.
DEFAULT_TARGET = 1e-3
ROWS_IN_VIEW = 16  # a longer table is folded

GROUPS: dict[str, tuple[str, ...]] = {
    "Engine and linear algebra": (*("overhead", "deq", "custom_root", "memory", "least_squares", "sparse_solvers"),),
    "Proximal operators": ("proximal", "tv1d", "lasso", "learned_proximal"),
    "Convex programs and risk": ("quadratic_program", "cvxpy_layer", "cones", "dual_bounds", "spectral_risk", "upgrad"),
    "Transport": ("sinkhorn", "sparse_newton", "point_cloud", "generalized_sum_pool"),
    "Convex ReLU networks": ("convex_relu", "gated_relu", "nuclear_relu", "relu_training"),
    "Partial differential equations": ("pde_constraint", "pde_theseus", "pde_unrolled", "pde_experts"),
    "Bilevel problems": ("hypergradient", "hypergradient_memory"),
}
# stored too, and shown in sections of their own
OTHERS = ("second_derivatives", "expert_throughput")
STEPS = re.compile(r", \d+ steps$")  # in names of contenders that differ in nothing else

INTRO = """
# Benchmarks

How long the layers take beside other people's code that does the same job, how accurate both are, and how much memory
they take. `make bench` measures all of it on your machine and writes this page; `python -m benchmarks --page` writes
the page from the stored results in `benchmarks/results/`.

*Time / ours* is the median over rounds of the peer's time divided by ours within the same round, so above 1 we are
faster and below 1 the peer is. All contenders of a case run in one process, in an order drawn anew for each round; a
sample lasts at least 20 ms. *Error* is the largest relative error over the tensors of a result, gradients included,
against a reference that the benchmark computes in another way. A peer with a larger error than the benchmark's target
has done another job: it is marked **inaccurate** and does not count as faster or slower; nor do we count as faster
where our own error is larger. Where a benchmark sets no target, 1e-3 is taken. Peers marked **does less** do a part of
the job only, such as the forward pass without what a gradient needs. *Memory* is the growth of the peak resident memory
during one call; a dash: not measured.
"""


@dataclass(frozen=True)
class Entry:
    """What is stored of one contender in one case."""

    case: str
    contender: str
    reference: bool
    ratio: float
    seconds: float
    error: float
    target: float
    peak_bytes: int | None
    settings: str

    @property
    def ours(self) -> bool:
        return self.reference or self.contender.startswith(OURS)

    @property
    def right(self) -> bool:
        return self.error <= self.target

    @property
    def less(self) -> bool:
        return any(words in self.contender for words in LESS)

    @property
    def wins(self) -> bool:
        return not self.ours and self.right and self.ratio < 1


@dataclass(frozen=True)
class Stored:
    """One benchmark: what it says of itself, where it ran, and its entries by case, in the order of the file."""

    name: str
    about: str
    device: str
    threads: int
    versions: dict[str, str]
    cases: dict[str, list[Entry]]


def load(name: str, results: Path = RESULTS) -> Stored | None:
    """The stored result of a benchmark, or None."""
    path = results / f"{name}.json"
    if not path.exists():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    cases: dict[str, list[Entry]] = {}
    for row in report["rows"]:
        target = DEFAULT_TARGET if row["target"] is None else row["target"]
        cases.setdefault(row["case"], []).append(
            Entry(
                *(row["case"], row["contender"], row["ours"], row["ratio_to_ours"], row["median_seconds"]),
                *(row["relative_error"], target, row["peak_bytes"], row["settings"]),
            )
        )
    source = (ROOT / "benchmarks" / f"bench_{name}.py").read_text(encoding="utf-8")
    about = (ast.get_docstring(ast.parse(source)) or name).splitlines()[0]
    return Stored(name, about, report["device"], report["threads"], report["versions"], cases)


def fastest(entries: Iterable[Entry]) -> Entry | None:
    """The fastest right peer that does the whole job, or None; nor is there one to beat for an inaccurate result."""
    entries = list(entries)
    peers = [e for e in entries if not e.ours and e.right and not e.less]
    best = min(peers, key=lambda e: e.ratio, default=None)
    ours_right = any(e.reference and e.right for e in entries)
    return best if best is None or ours_right or best.ratio < 1 else None


# ------------------------------------------------------------------------------------------------------------- words


def ratio(value: float) -> str:
    return f"{value:.1g}" if value < 0.01 else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def duration(seconds: float) -> str:
    unit, size = next((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)) if seconds >= s)
    return f"{seconds / size:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"


def memory(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else "< 1 MiB"


def error(entry: Entry) -> str:
    # with a hyphen at which no line breaks
    said = f"{entry.error:.0e}".replace("-", "\N{NON-BREAKING HYPHEN}") if math.isfinite(entry.error) else "NaN"
    return said if entry.right else f"{said}, **inaccurate**"


def contender(entry: Entry) -> str:
    return entry.contender + (", **does less**" if entry.less else "")


def paragraph(text: str) -> list[str]:
    return [*textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False), ""]


def table(head: Sequence[str], align: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown; `align` has a letter a column: l or r."""
    lines = [head, ["---" if a == "l" else "---:" for a in align]]
    lines += [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def folded(lines: list[str], count: int, what: str) -> list[str]:
    """A long table behind a line that opens it."""
    if count <= ROWS_IN_VIEW:
        return lines
    return ["<details>", f"<summary>{what}</summary>", "", *lines, "</details>", ""]


# ---------------------------------------------------------------------------------------------------------- the page


def page(results: Path = RESULTS) -> str:
    """The text of the page."""
    stored = {name: load(name, results) for names in GROUPS.values() for name in names}
    found = {name: s for name, s in stored.items() if s is not None}
    lines = ["<!-- Written by `python -m benchmarks --page` from benchmarks/results/. Do not edit. -->"]
    lines += [INTRO, _machines(list(found.values())), ""]
    if missing := [f"`{name}`" for name, s in stored.items() if s is None]:
        lines += [f"There is no stored result of {', '.join(missing)}.", ""]
    lines += [*_lost(list(found.values())), *_summary(list(found.values()))]
    for group, names in GROUPS.items():
        there = [found[name] for name in names if name in found]
        if there:
            lines += [f"## {group}", "", *_picture(group)]
            lines += [line for s in there for line in _section(s)]
    lines += [*_second_derivatives(results), *_throughput(results), *_files(results), *_versions(list(found.values()))]
    return "\n".join(lines).rstrip() + "\n"


def figure_name(group: str) -> str:
    return group.lower().replace(" ", "_") + ".svg"


def _machines(stored: list[Stored]) -> str:
    machines = sorted({f"{s.device}, {s.threads} thread{'s' if s.threads > 1 else ''}" for s in stored})
    return f"Measured on: {'; '.join(machines)}. [Versions](#versions) are at the end."


def _picture(group: str) -> list[str]:
    alt = f"{group}: time of every peer divided by ours, one dot a case, on a logarithmic axis."
    return [
        f"![{alt}](_static/benchmarks/{figure_name(group)})",
        "",
        "*One dot a case: time of the peer divided by ours. Left of the line the peer is faster. Hollow: inaccurate.*",
        "",
    ]


def _lost(stored: list[Stored]) -> list[str]:
    """Every peer that is right and faster somewhere, the worst for us first."""
    cases = [(s, entries) for s in stored for entries in s.cases.values()]
    whole = [peer for _, entries in cases if (peer := fastest(entries))]
    text = (
        f"In {sum(peer.wins for peer in whole)} of {len(whole)} cases with an accurate peer that does the whole job, "
        "one is faster than ours. These are the peers that are faster somewhere, with their best case. Every row of "
        "every case stands further down, cases that a peer wins first."
    )
    lines = ["## Where a peer is faster", "", *paragraph(text)]
    found: dict[tuple[str, str], list[tuple[Entry, Entry]]] = {}
    for s, entries in cases:
        for e in entries:
            if not e.ours and e.right:
                found.setdefault((s.name, STEPS.sub("", e.contender)), []).append((e, entries[0]))
    rows = []
    for (name, peer), pairs in found.items():
        best = min((e for e, _ in pairs), key=lambda e: e.ratio)
        if best.wins:
            wins = f"{sum(e.wins for e, _ in pairs)} of {len(pairs)}"
            said = peer + (", **does less**" if best.less else "")
            times = " against ".join(duration(e.seconds) for e in next(pair for pair in pairs if pair[0] is best))
            rows.append((best.ratio, (ratio(best.ratio), said, _link(name), wins, f"{best.case}: {times}")))
    head = ("time / ours", "peer", "benchmark", "faster in", "its best case")
    return [*lines, *table(head, "rllrl", (cells for _, cells in sorted(rows)))]


def _link(name: str) -> str:
    return f"[{name}](#{name.replace('_', '-')})"


def _summary(stored: list[Stored]) -> list[str]:
    rows: list[tuple[float, tuple[str, ...]]] = []
    for s in stored:
        peers = [peer for entries in s.cases.values() if (peer := fastest(entries))]
        link, count = _link(s.name), str(len(s.cases))
        if not peers:
            others = any(not e.ours for entries in s.cases.values() for e in entries)
            why = "no accurate peer" if others else "no peer, ours alone"
            rows.append((math.inf, (link, count, why, "", "", "")))
            continue
        ratios = sorted(peer.ratio for peer in peers)
        middle = statistics.median(ratios)
        wins = f"{sum(peer.wins for peer in peers)} of {len(peers)}"
        rows.append((middle, (link, count, wins, ratio(ratios[0]), ratio(middle), ratio(ratios[-1]))))
    head = ("benchmark", "cases", "peer is faster", "lowest", "median", "highest")
    text = (
        "Time of the fastest accurate peer that does the whole job, divided by ours: lowest, median and highest over "
        "the cases of each benchmark that have one. Above 1 ours is faster. Benchmarks in which ours does worst come "
        "first."
    )
    body = [cells for _, cells in sorted(rows, key=lambda row: row[0])]
    return ["## Summary", "", *paragraph(text), *table(head, "lrrrrr", body)]


def _section(s: Stored) -> list[str]:
    """Cases that a peer wins first, then the others in the order of the benchmark."""

    def rank(entries: list[Entry]) -> float:
        return min((e.ratio for e in entries if e.wins), default=1.0)

    cases = sorted(s.cases.values(), key=rank)
    rows = []
    for entries in cases:
        for i, e in enumerate(entries):
            time = "ours" if e.reference else f"**{ratio(e.ratio)}**" if e.wins else ratio(e.ratio)
            cells = (contender(e), time, duration(e.seconds), error(e), memory(e.peak_bytes), e.settings)
            rows.append((e.case if i == 0 else "", *cells))
    head = ["case", "contender", "time / ours", "median", "error", "memory", "settings"]
    if not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    lines = [f"### {s.name}", "", s.about, "", f"`python -m benchmarks {s.name}`", ""]
    return [*lines, *folded(table(head, "llrrrrl"[: len(head)], rows), len(rows), f"All {len(rows)} rows")]


def _second_derivatives(results: Path) -> list[str]:
    path = results / "second_derivatives.json"
    if not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    body = ((f"`{r['problem']}`", r["by"], f"{r['first']:.6f}", f"{r['second']:.6f}", r["verdict"]) for r in rows)
    text = (
        "First and second derivative of a scalar root and of a scalar fixed point. Where the second is wrong, it is "
        "so without a word. Part of `python -m benchmarks custom_root`."
    )
    head = ("problem", "by", "first", "second", "")
    return ["## Second derivatives", "", *paragraph(text), *table(head, "llrrl", body)]


def _throughput(results: Path) -> list[str]:
    path = results / "expert_throughput.json"
    if not path.exists():
        return []
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    one, two = (statistics.median(found[f"{n}_seconds"]) for n in ("one_process", "two_processes"))
    low, high = found["ratio_quartiles"]
    text = (
        f"{found['experts']} domain experts with {found['points']} points and {found['basis_functions']} basis "
        f"functions each, forward and backward: one process with one thread takes {duration(one)}, two processes with "
        f"one thread each take {duration(two)}. The ratio of neighbours in time is {found['ratio']:.2f} (quartiles "
        f"{low:.2f} and {high:.2f}); results differ by {found['largest_relative_difference']:.0e}. "
        "`python -m benchmarks.expert_throughput`"
    )
    return ["## Two processes that share experts", "", *paragraph(text)]


def _files(results: Path) -> list[str]:
    """Tables that other programs of this folder write, under headings of this page."""
    lines = []
    for name in ("relu_scaling", "dual_table"):
        path = results / f"{name}.md"
        if not path.exists():
            continue
        title, *text = path.read_text(encoding="utf-8").rstrip().splitlines()
        first = next(i for i, line in enumerate(text) if line.startswith("|"))
        rows = [*text[first:], ""]
        lines += [f"## {title.removeprefix('# ')}", "", f"`python -m benchmarks.{name}`", *text[:first]]
        if path.with_suffix(".png").exists():
            lines += [f"![{title.removeprefix('# ')}](../benchmarks/results/{name}.png)", ""]
        lines += folded(rows, len(rows), f"All {len(rows) - 3} rows") if name == "dual_table" else rows
    return lines


def _versions(stored: list[Stored]) -> list[str]:
    """Each package with the versions that results were measured with."""
    seen: dict[str, set[str]] = {}
    for s in stored:
        for package, version in s.versions.items():
            seen.setdefault(package, set()).add(version)
    rows = ((package, ", ".join(sorted(versions))) for package, versions in seen.items())
    return ["## Versions", "", *table(("package", "version"), "ll", rows)]
