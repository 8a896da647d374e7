"""The figures of `docs/benchmarks.md`: one a group, a line a peer, a dot a case. matplotlib is needed to draw them."""

import hashlib
import json
from pathlib import Path

from benchmarks.harness import ROOT
from benchmarks.page import GROUPS, RESULTS, STEPS, figure_name, load

FOLDER = ROOT / "docs" / "_static" / "benchmarks"
INK, BLUE, ORANGE, GREY = "#1c2430", "#1f5fa8", "#d9822b", "#8a94a0"
Points = dict[str, list[tuple[float, bool]]]


def points(group: str, results: Path = RESULTS) -> Points:
    """Ratios and whether they count, by benchmark and peer."""
    found: Points = {}
    for name in GROUPS[group]:
        stored = load(name, results)
        for entries in stored.cases.values() if stored else ():
            for e in entries:
                if not e.ours:
                    peer = STEPS.sub("", e.contender)
                    found.setdefault(f"{name}: {peer}", []).append((e.ratio, e.right))
    return found


def digest(found: Points) -> str:
    """Stands in the file, so that a test can tell whether it was drawn from these numbers."""
    return "drawn from " + hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def draw(group: str, found: Points, path: Path) -> None:
    """One line a peer: orange where it is faster than ours, blue where it is not, hollow where it is inaccurate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = {"svg.fonttype": "none", "svg.hashsalt": "difflayers", "font.size": 9, "font.family": "sans-serif"}
    with plt.rc_context(settings):
        figure, axis = plt.subplots(figsize=(7.6, 0.7 + 0.22 * len(found)), layout="constrained")
        axis.axvline(1, color=INK, linewidth=1)
        for y, ratios in enumerate(found.values()):
            axis.axhline(y, color="#eef1f4", linewidth=0.8, zorder=0)
            for value, right in ratios:
                colour = GREY if not right else ORANGE if value < 1 else BLUE
                axis.plot(value, y, "o", color=colour, markerfacecolor=colour if right else "white", markersize=5)
        axis.set(xscale="log", ylim=(len(found) - 0.4, -0.6), xlabel="time of the peer / ours")
        axis.set_yticks(range(len(found)), [name if len(name) <= 50 else name[:47] + "..." for name in found])
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
        about = {"Title": group, "Description": digest(found), "Date": None, "Creator": None}
        figure.savefig(path, metadata=about, facecolor="white")
        plt.close(figure)


def draw_all(results: Path = RESULTS, folder: Path = FOLDER) -> None:
    """Every group with a stored result."""
    folder.mkdir(parents=True, exist_ok=True)
    for group in GROUPS:
        found = points(group, results)
        if found:
            draw(group, found, folder / figure_name(group))
