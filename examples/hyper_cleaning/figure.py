"""Test accuracy against oracle calls, a panel a kind of method, and which labels were kept."""

import math
from pathlib import Path

import torch
from torch import Tensor

from .recipes import RECIPES

COLOURS = ("#1f5fa8", "#d9822b", "#3f8f5f", "#b3589a", "#5b5f66")


def mean_curve(calls: list[list[float]], curves: list[list[float]], at: Tensor) -> Tensor:
    """Mean over seeds of what each had reached with so many calls."""
    steps = [torch.searchsorted(torch.tensor(c), at, right=True) - 1 for c in calls]
    return torch.stack([torch.tensor(curve)[k] for curve, k in zip(curves, steps, strict=True)]).mean(0)


def draw(found: dict, baselines: dict[str, list[float]], path: Path) -> None:
    """Curves of all methods in four panels, and bars for the F1 of the labels they kept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys(recipe.group for recipe in RECIPES.values()))
    figure = plt.figure(figsize=(14, 6.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.6, 1))
    axes = left.subplots(2, 2, sharex=True, sharey=True)
    budget = max(max(calls) for result in found.values() for calls in result["calls"])
    at = torch.logspace(1, math.log10(budget), 400)
    colour_of = {}
    for axis, group in zip(axes.flat, groups, strict=True):
        names = [name for name, recipe in RECIPES.items() if recipe.group == group and name in found]
        for name, colour in zip(names, COLOURS, strict=False):
            colour_of[name] = colour
            curve = 100 * mean_curve(found[name]["calls"], found[name]["curves"], at)
            axis.plot(at.tolist(), curve.tolist(), color=colour, label=name)
        for name, style in (("all labels", ":"), ("clean half", "--")):
            level = 100 * sum(baselines[name]) / len(baselines[name])
            axis.axhline(level, color="#888888", linestyle=style, linewidth=1)
            axis.text(10.4, level + 0.2, name, fontsize=8, color="#666666")
        axis.set(xscale="log", xlim=(10, budget))
        axis.set_title(group, fontsize=10)
        axis.legend(frameon=False, fontsize=8, loc="lower right")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set(ylabel="test accuracy (%)")
    for axis in axes[1]:
        axis.set(xlabel="gradients and products with second derivatives")
    axis = right.subplots()
    names = sorted(colour_of, key=lambda name: sum(found[name]["f1"]))
    for k, name in enumerate(names):
        values = [100 * value for value in found[name]["f1"]]
        axis.barh(k, sum(values) / len(values) - 60, left=60, color="#c9ced6", height=0.7)
        axis.plot(values, [k] * len(values), "o", color="#222222", markersize=2.5)
        axis.text(60.5, k, name, va="center", fontsize=8)
    axis.axvline(66.7, color="#888888", linestyle=":", linewidth=1, zorder=0)
    axis.text(66.9, len(names) - 0.4, "all labels kept", fontsize=8, color="#666666")
    axis.set(yticks=[], xlim=(60, 100), ylim=(-0.6, len(names) + 0.2))
    axis.set_title("F1 of the labels kept (%), a dot a seed", fontsize=10)
    axis.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
