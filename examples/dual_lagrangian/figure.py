"""The figure of both examples: gaps against the time of training, and how they are spread over unseen instances."""

from pathlib import Path

import numpy as np

COLOURS = ("#1f5fa8", "#d9822b", "#777777", "#4d9a57")
Curve = list[tuple[float, float]]


def draw(curves: dict[str, Curve], spread: dict[str, np.ndarray], levels: dict[str, float], path: Path) -> None:
    """`curves` of mean gaps over seconds, histograms of `spread`, horizontal `levels`; all gaps are fractions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    percent = FuncFormatter(lambda value, _: f"{100 * value:.10f}".rstrip("0").rstrip(".") + " %")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained", width_ratios=(1.25, 1))
    colours = dict(zip(curves, COLOURS, strict=False))
    for name, curve in curves.items():
        times, values = np.array(curve).T
        left.plot(times, values, color=colours[name], linewidth=1.8, label=name)
    for name, level in levels.items():
        left.axhline(level, color="black", linewidth=0.9, linestyle=":", label=name)
    left.set(yscale="log", xlim=(0, None), xlabel="seconds of training", ylabel="mean gap")
    left.set_title("unseen instances, while training", loc="left")
    reached = [values for curve in curves.values() for _, values in curve]
    left.set_ylim(min(reached) / 3, 20 * max(reached))
    left.legend(frameon=False, loc="upper right", fontsize=9, ncols=2)
    everything = np.concatenate(list(spread.values()))
    lowest = min(np.quantile(values, 0.02) for values in spread.values())  # what is smaller stands in the first bar
    edges = np.geomspace(max(lowest, everything.max() * 1e-7), everything.max() * 1.1, 60)
    for name, values in spread.items():
        right.hist(np.clip(values, edges[0], None), edges, color=colours[name], alpha=0.75, label=name)
    right.set(xscale="log", xlabel="gap", ylabel="test instances")
    right.set_title("after training", loc="left")
    right.set_ylim(0, 1.3 * right.get_ylim()[1])
    right.legend(frameon=False, loc="upper left", fontsize=9)
    left.yaxis.set_major_formatter(percent)
    right.xaxis.set_major_formatter(percent)
    if edges[-1] > 1e4 * edges[0]:
        right.xaxis.set_major_locator(LogLocator(100))
        right.xaxis.set_minor_locator(NullLocator())
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
