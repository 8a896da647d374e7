"""Digits with a bound on the loss of every picture instead of a small mean.

Feasible learning asks for a network that gives every picture's label a probability of at least 0.6,

    find theta:  loss_i(theta) <= log(1 / 0.6)  for all i,

by gradient descent on losses weighted by multipliers, one for each picture, which rise while that picture's loss is
above the bound and fall while it is below. The resilient form allows slack u_i at a price a/2 ||u||^2. A small network
(eight hidden units) trained on the mean loss fits most pictures far better than asked and gives up on a few.

    python examples/plot_feasible_learning.py [--quick] [--steps 1500] [--out out/feasible_learning]

Source: J. Ramirez et al., Feasible Learning, 2025.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from difflayers.conic import FeasibleLearning

SEEDS, LEARN, BATCH, HIDDEN = 3, 1000, 100, 8
TOLERANCE = math.log(1 / 0.6)
WAYS: dict[str, dict | None] = {
    "mean loss": None,
    "feasible": {"resilience": None},
    "feasible, resilient": {"resilience": 1.0},
}


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures and labels: 1000 to learn from, 797 to test on."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    x, labels = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    learn, test = order[:LEARN], order[LEARN:]
    return x[learn], labels[learn], x[test], labels[test]


def train(way: dict | None, seed: int, steps: int, name: str) -> tuple[nn.Module, Tensor]:
    """The network, and the multipliers of the pictures (ones for the mean loss)."""
    x, labels, _, _ = digits(seed)
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    constraints = None
    if way is not None:
        constraints = FeasibleLearning(LEARN, tolerance=TOLERANCE, dual_lr=0.1, reduction="mean", **way)
    for _ in tqdm(range(steps), desc=name, mininterval=1.0):
        index = torch.randint(LEARN, (BATCH,))
        losses = F.cross_entropy(network(x[index]), labels[index], reduction="none")
        optimiser.zero_grad()
        (losses.mean() if constraints is None else constraints(losses, index)).backward()
        optimiser.step()
        schedule.step()
    return network, torch.ones(LEARN) if constraints is None else constraints.multipliers


@torch.no_grad()
def measure(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """Losses of the pictures learned from and of unseen ones, and the accuracy on these."""
    x, labels, test, test_labels = digits(seed)
    logits = network(test)
    return {
        "learned": F.cross_entropy(network(x), labels, reduction="none"),
        "unseen": F.cross_entropy(logits, test_labels, reduction="none"),
        "accuracy": (logits.argmax(-1) == test_labels).float().mean(),
    }


def draw(found: dict[str, dict[str, Tensor]], multipliers: dict[str, Tensor], path: Path) -> None:
    """How many pictures have a loss above a bound, and which of them got a weight."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(WAYS, ("#8a8f98", "#7fb3e6", "#1f5fa8"), strict=True))
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.9), layout="constrained")
    for axis, which in zip(axes, ("learned", "unseen"), strict=False):
        for name, m in found.items():
            losses = m[which].flatten().sort()[0]
            share = 1 - torch.arange(len(losses)) / len(losses)
            axis.plot(losses.tolist(), share.tolist(), color=colours[name], label=name)
        axis.axvline(TOLERANCE, color="#444444", linewidth=0.8, linestyle=":")
        axis.set(yscale="log", ylim=(3e-4, 1.2), xlim=(-0.1, 6), xlabel="loss")
        axis.set_title({"learned": "pictures learned from", "unseen": "unseen pictures"}[which])
    axes[0].set_ylabel("share of pictures with a larger loss")
    axes[0].text(TOLERANCE + 0.06, 0.6, "bound", color="#444444")
    axes[0].legend(frameon=False, loc="upper right")
    for name in list(WAYS)[1:]:
        losses = found[name]["learned"].flatten().tolist()
        axes[2].scatter(losses, multipliers[name].flatten().tolist(), s=6, alpha=0.5, color=colours[name], label=name)
    axes[2].axvline(TOLERANCE, color="#444444", linewidth=0.8, linestyle=":")
    axes[2].set(title="multipliers", xlabel="loss", yscale="symlog")
    axes[2].legend(frameon=False, loc="lower right")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="steps of each training")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/feasible_learning"))
    options = parser.parse_args()
    if options.quick:
        options.steps = 60
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    found, multipliers, results = {}, {}, {}
    for name, way in WAYS.items():
        trained = [train(way, seed, options.steps, f"{name}, split {seed}") for seed in range(SEEDS)]
        measured = [measure(network, seed) for seed, (network, _) in enumerate(trained)]
        found[name] = {key: torch.stack([m[key] for m in measured]) for key in measured[0]}
        multipliers[name] = torch.stack([weights for _, weights in trained])
        m = found[name]
        results[name] = {
            "largest loss learned from": m["learned"].amax(-1).mean().item(),
            "unseen mean": m["unseen"].mean().item(),
            "unseen 99% quantile": m["unseen"].quantile(0.99, -1).mean().item(),
            "accuracy": m["accuracy"].mean().item(),
        }
    draw(found, multipliers, options.out / "feasible_learning.png")
    (options.out / "results.json").write_text(json.dumps(results, indent=2))
    for name, numbers in results.items():
        print(f"{name}: " + ", ".join(f"{what} {value:.3f}" for what, value in numbers.items()))
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    if options.steps >= 1500:
        mean, plain, resilient = results.values()
        for one in (plain, resilient):
            assert one["largest loss learned from"] < 0.5 * mean["largest loss learned from"]
            assert one["accuracy"] >= mean["accuracy"] - 0.02
        assert resilient["unseen 99% quantile"] < 0.85 * mean["unseen 99% quantile"]


if __name__ == "__main__":
    main()
