"""Few-shot digits: how much the neighbours should count, learned by its own gradient.

One labelled picture of each of five digits, and fifteen pictures of each to assign. Without neighbours every picture
goes to the nearest labelled one. `laplacian_clustering` lets pictures that are near to each other agree,

    min_Y  scale <A, Y> - lam / 2 sum_pq W_pq <Y_p, Y_q> + sum Y log Y,

and its implicit derivative says how the loss of the assignment moves with lam and with the scale of the distances A: a
few dozen steps of Adam on episodes for validation find both, where a sweep would need a grid. For lam = 0 the scale is
tuned alone. `transductive_clustering` lets the prototypes move too. All numbers that are compared come from other
episodes, of pictures that tuning has not seen.

    python examples/plot_laplacian_clustering.py [--quick] [--episodes 100] [--steps 40] [--out FOLDER]

Source: I. Ziko et al., Laplacian Regularized Few-Shot Learning, 2020.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from difflayers.transport import BoundOptimizer, laplacian_clustering, transductive_clustering

WAYS, QUERIES, NEIGHBOURS = 5, 15, 3
CLOSE = BoundOptimizer(rtol=1e-6)  # enough to tell which class is the likeliest
SWEEP = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5)


class Episodes:
    """Labelled pictures, pictures to assign, their classes, and the graph of the nearest ones."""

    def __init__(self, x: Tensor, labels: Tensor, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        picked = []
        for _ in range(count):
            digits = torch.randperm(10, generator=generator)[:WAYS]
            members = [(labels == digit).nonzero().squeeze(-1) for digit in digits]
            picked.append(torch.stack([m[torch.randperm(len(m), generator=generator)[: QUERIES + 1]] for m in members]))
        index = torch.stack(picked)  # episodes, ways, 1 + queries
        self.support, self.query = x[index[:, :, 0]], x[index[:, :, 1:]].flatten(1, 2)
        self.classes = torch.arange(WAYS).repeat_interleave(QUERIES).expand(count, -1)
        self.unary = torch.cdist(self.query, self.support).square()
        apart = torch.cdist(self.query, self.query)
        apart.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
        nearest = apart.topk(NEIGHBOURS, largest=False).indices
        graph = torch.zeros_like(apart).scatter(-1, nearest, 1.0)
        self.graph = (graph + graph.mT) / 2

    def loss(self, Y: Tensor) -> Tensor:
        """Mean negative log likelihood of the right classes."""
        right = Y.gather(-1, self.classes.unsqueeze(-1))
        return -right.clamp(min=1e-12).log().mean()

    def accuracy(self, Y: Tensor) -> Tensor:
        """``(episodes)`` shares that are right."""
        return (Y.argmax(-1) == self.classes).double().mean(-1)


def pictures() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Centred pictures of unit length and their labels: half to tune on, half to test on."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    x, labels = torch.tensor(x / 16), torch.tensor(labels)
    x = F.normalize(x - x.mean(0), dim=-1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return tuple((x[part], labels[part]) for part in order.chunk(2))


def tune(episodes: Episodes, steps: int, *, neighbours: bool) -> tuple[float, float, list[list[float]]]:
    """Lam and the scale by Adam on the loss of the assignments, and their path."""
    lam, log_scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.0, math.log(5.0)))
    optimizer = torch.optim.Adam([lam, log_scale] if neighbours else [log_scale], 0.08)
    path = []
    for _ in tqdm(range(steps), desc="lam and scale" if neighbours else "scale alone", mininterval=1.0):
        path.append([float(lam.detach()), float(log_scale.detach().exp())])
        optimizer.zero_grad()
        Y = laplacian_clustering(log_scale.exp() * episodes.unary, episodes.graph, lam)
        episodes.loss(Y).backward()
        optimizer.step()
    return float(lam.detach()), float(log_scale.detach().exp()), path


def measured(episodes: Episodes, Y: Tensor) -> dict[str, float]:
    """Mean accuracy with its standard error, and the loss."""
    share = episodes.accuracy(Y)
    error = float(share.std() / math.sqrt(len(share)))
    return {"accuracy": float(share.mean()), "error": error, "loss": float(episodes.loss(Y))}


@torch.no_grad()
def compare(episodes: Episodes, settings: dict[str, tuple[float, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Of fixed and of moving prototypes, for named pairs of lam and scale."""
    found, onehot = {}, torch.eye(WAYS, dtype=torch.float64)
    for name, (lam, scale) in tqdm(settings.items(), desc="test episodes", mininterval=1.0):
        fixed = laplacian_clustering(scale * episodes.unary, episodes.graph, lam, solver=CLOSE)
        points = math.sqrt(scale) * episodes.query, math.sqrt(scale) * episodes.support
        moving = transductive_clustering(*points, onehot, episodes.graph, lam, solver=CLOSE)
        found[name] = {"fixed": measured(episodes, fixed), "moving": measured(episodes, moving)}
    return found


def draw(found: dict, lam: float, path: list[list[float]], file: Path) -> None:
    """Accuracy and loss over lam, and the path of the tuning."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for key, colour in (("fixed", "#1f5fa8"), ("moving", "#d9822b")):
        rows = [found[f"{v:.1f}"][key] for v in SWEEP]
        accuracy, error = ([100 * row[name] for row in rows] for name in ("accuracy", "error"))
        left.errorbar(SWEEP, accuracy, error, fmt="o-", color=colour, label=f"{key} prototypes", markersize=4)
        middle.plot(SWEEP, [row["loss"] for row in rows], "o-", color=colour, markersize=4)
        left.plot(lam, 100 * found["tuned"][key]["accuracy"], "*", color=colour, markersize=14)
        middle.plot(lam, found["tuned"][key]["loss"], "*", color=colour, markersize=14)
    left.set(xlabel="lam", ylabel="accuracy in %", title="five digits, one labelled picture each")
    left.legend(frameon=False)
    middle.axhline(found["scale alone"]["fixed"]["loss"], color="#9bb8d9", linestyle="--", linewidth=1)
    middle.set(xlabel="lam", ylabel="loss", title="stars: tuned by the gradient\ndashed: lam = 0, scale tuned alone")
    for index, label in enumerate(("lam", "scale")):
        right.plot([pair[index] for pair in path], label=label, color=("#1f5fa8", "#7a7a7a")[index])
    right.set(xlabel="step of Adam", title="tuning on validation episodes")
    right.legend(frameon=False)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=100, help="to test on")
    parser.add_argument("--steps", type=int, default=40, help="of each of the two tunings")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/laplacian_clustering"))
    options = parser.parse_args()
    if options.quick:
        options.episodes, options.steps = 10, 5
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    tuning, testing = pictures()
    validation = Episodes(*tuning, 40, 1)
    _, alone, _ = tune(validation, options.steps, neighbours=False)
    lam, scale, path = tune(validation, options.steps, neighbours=True)
    settings = {"scale alone": (0.0, alone), "tuned": (lam, scale)} | {f"{v:.1f}": (v, scale) for v in SWEEP}
    found = compare(Episodes(*testing, options.episodes, 2), settings)

    print(f"\n{'':>12} {'lam':>6} {'scale':>6} {'fixed prototypes':>26} {'moving prototypes':>26}")
    for name, row in found.items():
        cells = [f"{c['accuracy']:.1%} +- {c['error']:.1%}, loss {c['loss']:.3f}" for c in row.values()]
        shown = name if name in ("scale alone", "tuned") else ""
        print(f"{shown:>12} {settings[name][0]:6.2f} {settings[name][1]:6.2f} {cells[0]:>26} {cells[1]:>26}")
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")

    results = {"lam": lam, "scale": scale, "path": path, "test": found}
    (options.out / "results.json").write_text(json.dumps(results, indent=2))
    draw(found, lam, path, options.out / "laplacian_clustering.png")
    none, tuned = found["scale alone"]["fixed"], found["tuned"]["fixed"]
    if not options.quick:
        assert tuned["loss"] < none["loss"], "neighbours should make the right classes likelier"
    if options.steps >= 40:
        best = min(found[f"{v:.1f}"]["fixed"]["loss"] for v in SWEEP)
        assert tuned["accuracy"] > none["accuracy"] + 2 * none["error"], "and more of them right"
        assert tuned["loss"] < best + 0.01, "the gradient should find what the sweep finds"


if __name__ == "__main__":
    main()
