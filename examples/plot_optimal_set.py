"""One training problem, many optimal networks? And how few neurons will do?

Gated ReLU networks are trained to the global optimum on the breast cancer data. All optimal networks of a training
problem form a polytope, which can be written down: same fit of the training data, same weight decay, other predictions.

1. With 20 patients and two features, many random gates look alike on the training data. The optimum is far from unique,
   and its corners differ in accuracy on other patients, in some splits by several points; the training data cannot say
   which is best. This is the far end: of the sizes tried, from 12 patients to 398 and from two features to all, it has
   the largest differences; four features leave mostly less than two points, 60 patients none.
2. With all thirty features there is nothing to choose: of 100 patients and 500 gates, or 398 and 300, the optimal
   network is unique. Where gates outnumber patients other networks have the same fit, but at the price of a larger
   penalty: how they differ in accuracy says nothing about optima.
3. An optimal network with more neurons than it needs loses them for nothing, by optimal pruning, until it is minimal.
   To drop the smallest neurons instead costs at once.
4. Below minimality something is lost. Rescaling the neurons that stay, by least squares, saves most of it.

    python examples/plot_optimal_set.py [--quick] [--splits 8] [--out out/optimal_set]

Source: A. Mishkin, M. Pilanci, Optimal Sets and Solution Paths of ReLU Networks, 2023.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from difflayers.relu import (
    ConvexReLUSolution,
    convex_gated_relu,
    minimal_network,
    optimal_set,
    predict,
    prune_network,
)

DECAY = 1e-3  # beta over the number of patients
SLACKS = (0.0, 0.15, 0.2, 0.25, 0.3, 0.5)
BLUE, LIGHT, ORANGE, GREY = "#1f5fa8", "#9bb8d9", "#d9822b", "#8a8a8a"


class Task(NamedTuple):
    """Patients to learn from and others to test on, with a column of ones."""

    X: Tensor
    y: Tensor
    X_test: Tensor
    y_test: Tensor
    gates: Tensor

    @property
    def beta(self) -> float:
        """Weight decay."""
        return DECAY * len(self.X)

    def train(self) -> ConvexReLUSolution:
        """The optimal network."""
        return convex_gated_relu(self.X, self.y, self.beta, self.gates)

    def accuracy(self, network: ConvexReLUSolution) -> float:
        """In percent, on the test patients."""
        return 100 * (predict(network, self.X_test).sign() == self.y_test).double().mean().item()

    def squared_error(self, network: ConvexReLUSolution) -> float:
        """Mean, on the training patients."""
        return (predict(network, self.X) - self.y).square().mean().item()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def breast_cancer(split: int, patients: int, features: int | None, gates: int) -> Task:
    """A random split; the features are principal components of those to learn from, or all of them."""
    from sklearn.datasets import load_breast_cancer

    X, y = load_breast_cancer(return_X_y=True)
    X, y = torch.tensor(X), 2.0 * torch.tensor(y) - 1
    order = torch.randperm(len(X), generator=generator(split))
    learn, test = order[:patients], order[patients:]
    X = (X - X[learn].mean(0)) / X[learn].std(0)
    if features is not None:
        _, _, Vh = torch.linalg.svd(X[learn], full_matrices=False)
        X = X @ Vh[:features].mT
    X = torch.nn.functional.pad(X, (0, 1), value=1.0).double()
    vectors = torch.randn(gates, X.shape[1], generator=generator(1), dtype=torch.float64)
    return Task(X[learn], y[learn].double(), X[test], y[test].double(), vectors)


def active(network: ConvexReLUSolution) -> int:
    return int((network.v != 0).any(-1).sum())


def penalty(network: ConvexReLUSolution) -> float:
    return network.v.norm(dim=-1).sum().item()


# ------------------------------------------------------------------------------------------------------------- measures


def few_patients(splits: int) -> list[dict]:
    """Accuracies over the corners of the optimal set, for several splits."""
    rows = []
    for split in tqdm(range(splits), desc="few patients", mininterval=1.0):
        task = breast_cancer(split, 20, 2, 500)
        best = task.train()
        networks = optimal_set(best, task.X, task.y, task.beta)
        corners = networks.extreme_points(40, generator=generator(2))
        apart = max(abs(one.objective - best.objective).item() for one in corners) / best.objective.item()
        half = len(task.X_test) // 2  # an oracle that has seen half of the test patients, for the other half
        chosen = networks.best_on(task.X_test[:half], task.y_test[:half])
        unseen = task._replace(X_test=task.X_test[half:], y_test=task.y_test[half:])
        rows.append(
            {
                "dimension": networks.dimension,
                "corners": [task.accuracy(one) for one in corners],
                "least norm": task.accuracy(networks.minimum_norm()),
                "validated": unseen.accuracy(chosen) - unseen.accuracy(networks.minimum_norm()),
                "objective": apart,
            }
        )
    return rows


def same_fit(task: Task, best: ConvexReLUSolution) -> list[dict]:
    """Networks of the same fit, as the penalty may grow."""
    rows = []
    for slack in tqdm(SLACKS, desc="same fit, larger penalty", mininterval=1.0):
        networks = optimal_set(best, task.X, task.y, task.beta, slack=slack or None)
        corners = networks.extreme_points(8, generator=generator(2))
        rows.append(
            {
                "slack": slack,
                "dimension": networks.dimension,
                "penalty": [penalty(one) / penalty(best) for one in corners],
                "accuracy": [task.accuracy(one) for one in corners],
                "fit": max((predict(one, task.X) - predict(best, task.X)).abs().max().item() for one in corners),
            }
        )
    return rows


def free_pruning(task: Task) -> dict[str, list[tuple[int, float]]]:
    """Objective over its optimum, against the number of neurons, from the center of the optimal set."""
    best = task.train()
    networks = optimal_set(best, task.X, task.y, task.beta)
    center = networks.center()
    minimal = active(minimal_network(center, task.X))
    excess = lambda one: (one.objective / best.objective).item() - 1  # noqa: E731
    ours = [(k, excess(prune(center, task, k))) for k in (active(center), *range(minimal, 1, -1))]
    size = center.v.norm(dim=-1)[networks.blocks]
    order = size.argsort(descending=True)
    plain = []
    for k in range(active(center), 1, -1):
        kept = torch.zeros_like(size).index_copy(0, order[:k], size[order[:k]])
        plain.append((k, excess(networks.network(kept))))
    return {"optimal pruning, then corrected": ours, "the smallest neurons dropped": plain}


def prune(network: ConvexReLUSolution, task: Task, neurons: int, **options) -> ConvexReLUSolution:
    return prune_network(network, task.X, task.y, task.beta, neurons=neurons, **options)


def below_minimality(task: Task, best: ConvexReLUSolution) -> dict[str, list[tuple[int, float, float]]]:
    """Neurons, test accuracy and training error for every score, with and without correction."""
    curves = {}
    sizes = [active(best), *(k for k in (120, 100, 80, 60, 50, 40, 30, 25, 20, 15, 10, 8, 6, 5, 4, 3, 2))]
    for correct in (True, False):
        for score in ("residual", "fit", "norm", "gradient"):
            network, curve = best, []
            for k in tqdm(sizes, desc=f"{score}{', corrected' if correct else ''}", mininterval=1.0, leave=False):
                network = prune(network, task, k, score=score, correct=correct)
                curve.append((k, task.accuracy(network), task.squared_error(network)))
            curves[f"{score}{', corrected' if correct else ''}"] = curve
    return curves


# --------------------------------------------------------------------------------------------------------------- figure


def draw(few: list[dict], same: list[dict], free: dict, below: dict, path: Path) -> None:
    """Four panels, in the order of the text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(11, 7.2), layout="constrained")
    few = sorted(few, key=lambda row: max(row["corners"]) - min(row["corners"]))
    for place, row in enumerate(few):
        a.plot([place, place], [min(row["corners"]), max(row["corners"])], color=LIGHT, linewidth=6, zorder=1)
        a.plot([place] * len(row["corners"]), row["corners"], "_", color=BLUE, markersize=11, zorder=2)
        a.plot(place, row["least norm"], "o", color=ORANGE, markersize=5, zorder=3)
        a.annotate(f"dim {row['dimension']}", (place, min(row["corners"])), (0, -11), textcoords="offset points",
                   ha="center", fontsize=8, color=GREY)  # fmt: skip
    a.plot([], [], "_", color=BLUE, markersize=11, label="corners of the optimal set")
    a.plot([], [], "o", color=ORANGE, markersize=5, label="optimum of least norm")
    a.set(title="20 patients, 2 features: optima differ", ylabel="test accuracy (%)", xlabel="split", xticks=[])
    a.margins(y=0.12)
    a.legend(frameon=False, loc="lower left", fontsize=9)

    for row in same:
        b.plot([100 * (price - 1) for price in row["penalty"]], row["accuracy"], ".", color=BLUE, markersize=7)
    b.plot(0, same[0]["accuracy"][0], "o", color=ORANGE, markersize=7, label="the optimum: unique")
    b.plot([], [], ".", color=BLUE, markersize=7, label="networks with the same fit")
    b.set(title="100 patients, 30 features, 500 gates: nothing to choose", ylabel="test accuracy (%)")
    b.set(xlabel="penalty above the least (%)")
    b.margins(y=0.6)
    b.legend(frameon=False, loc="upper left", fontsize=9)

    for (name, curve), colour in zip(free.items(), (BLUE, ORANGE), strict=True):
        c.plot([k for k, _ in curve], [100 * max(e, 1e-12) for _, e in curve], ".-", color=colour, label=name)
    least = free["optimal pruning, then corrected"][1][0]
    c.axvline(least, color=GREY, linewidth=0.8, linestyle=":")
    c.annotate(f"minimal: {least}", (least, 1e-7), (5, 0), textcoords="offset points", color=GREY, fontsize=9)
    c.set(
        yscale="log",
        ylim=(1e-11, None),
        xlabel="active neurons",
        ylabel="objective above the optimum (%)",
    )
    c.annotate("nothing, up to rounding", (30, 1e-10), (0, 5), textcoords="offset points", color=GREY, fontsize=9)
    c.set(title="Pruning is free until the network is minimal")
    c.legend(frameon=False, fontsize=9)

    for name, curve in below.items():
        corrected = "corrected" in name
        style = {"residual": "-", "fit": "--", "norm": ":", "gradient": "-."}[name.split(",")[0]]
        d.plot(
            [k for k, _, _ in curve], [e for _, _, e in curve], style, color=BLUE if corrected else ORANGE, label=name
        )
    d.set(xscale="log", yscale="log", xlabel="active neurons", ylabel="mean squared error on training data")
    d.set_xticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
    d.minorticks_off()
    d.set(title="Below minimality correction wins, whatever the score")
    d.legend(frameon=False, fontsize=8, ncols=2)
    for axis in (a, b, c, d):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--splits", type=int, default=8, help="splits with few patients")
    parser.add_argument("--patients", type=int, nargs=2, default=(100, 398), help="of the two larger problems")
    parser.add_argument("--gates", type=int, nargs=2, default=(500, 300), help="of the two larger problems")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/optimal_set"))
    options = parser.parse_args()
    if options.quick:
        options.splits, options.patients, options.gates = 2, (60, 120), (120, 100)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    few = few_patients(options.splits)
    middle, large = (breast_cancer(0, n, None, gates) for n, gates in zip(options.patients, options.gates, strict=True))
    best, only = large.train(), middle.train()
    unique = [optimal_set(one, task.X, task.y, task.beta) for one, task in ((only, middle), (best, large))]
    same = same_fit(middle, only)
    free = free_pruning(breast_cancer(2, 20, 2, 500))
    below = below_minimality(large, best)
    draw(few, same, free, below, options.out / "optimal_set.png")

    spreads = [max(row["corners"]) - min(row["corners"]) for row in few]
    validated = sum(row["validated"] for row in few) / len(few)
    last = same[-1]
    minimal, first = free["optimal pruning, then corrected"][1], free["the smallest neurons dropped"]
    at = {name: {k: (accuracy, error) for k, accuracy, error in curve} for name, curve in below.items()}
    print(
        f"20 patients, 2 features: optimal sets of dimension {[row['dimension'] for row in few]}; accuracy over "
        f"corners differs by {[round(s, 1) for s in spreads]} points; "
        f"picking by other patients gains {validated:+.1f} points"
    )
    for one, task, networks in ((only, middle, unique[0]), (best, large, unique[1])):
        print(
            f"{len(task.X)} patients, 30 features, {len(task.gates)} gates: dimension {networks.dimension}, "
            f"{active(one)} neurons, margin {one.margin.item():.1e}, accuracy {task.accuracy(one):.1f} %"
        )
    print(
        f"  with the same fit and a penalty up to {100 * (max(last['penalty']) - 1):.0f} % larger: accuracy "
        f"{min(last['accuracy']):.1f} to {max(last['accuracy']):.1f} %, the first with {options.patients[0]} patients"
    )
    print(f"pruned for nothing from {first[0][0]} to {minimal[0]} neurons, objective {minimal[1]:+.0e} relative")
    for name in at:
        print(f"  20 neurons by {name}: accuracy {at[name][20][0]:.1f} %, training error {at[name][20][1]:.3f}")
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    results = {"few patients": few, "same fit": same, "free pruning": free, "below minimality": below}
    (options.out / "results.json").write_text(json.dumps(results, indent=2))

    assert all(row["objective"] < 1e-8 for row in few), "corners are optimal"
    assert max(row["fit"] for row in same) < 1e-8, "the fit is the same"
    assert all(networks.is_unique for networks in unique)
    assert abs(minimal[1]) < 1e-8 < min(e for _, e in first[1:])
    for score in ("residual", "fit", "norm", "gradient"):
        assert at[f"{score}, corrected"][20][1] < 0.6 * at[score][20][1]
    if options.splits >= 8:
        assert max(spreads) > 8 and sum(spreads) / len(spreads) > 2


if __name__ == "__main__":
    main()
