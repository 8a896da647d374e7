"""Ten pictures to learn digits from: one for each class, made so that networks trained on them read real ones.

`DatasetDistillation` starts from ten random digits and moves their pixels and targets along the implicit gradient of
the error that small networks, trained on the ten, make on 1,200 real digits. It is compared with the ten it started
from and with the means of the classes: new networks are trained on each set in the usual way, and read 597 digits that
nobody has seen. One kind is the perceptron that the pictures were made with, the other a convolutional network that
they have never met. Each figure is the mean over three networks, for three starts.

    python examples/plot_dataset_distillation.py [--quick] [--steps 300] [--seeds 3] [--out out/dataset_distillation]

Source: N. Loo, R. Hasani, M. Lechner, D. Rus, Dataset Distillation with Convexified Implicit Gradients, ICML 2023.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from tqdm import tqdm

from difflayers.bilevel import DatasetDistillation

BATCH = 256
NETWORKS = 3
EPOCHS = 300  # of the networks that are trained on ten pictures, which are one batch
COLOURS = {"random digits": "#888888", "class means": "#d9822b", "distilled": "#1f5fa8"}

Set = tuple[Tensor, Tensor]


def digits() -> tuple[Set, Set]:
    """Pictures ``(N, 1, 8, 8)`` about zero, and centred one-hot targets; for training and test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    t = one_hot(torch.tensor(data.target), 10).float() - 0.1
    train, test = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).tensor_split([1200])
    x = x - x[train].mean()
    return (x[train], t[train]), (x[test], t[test])


def perceptron() -> nn.Module:
    """Features of a perceptron."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())


def convolutional() -> nn.Module:
    """Features of a convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten()
    )  # fmt: skip


KINDS = {"perceptron": (perceptron, 128), "convolutional": (convolutional, 512)}


def accuracy(data: Set, test: Set, kind: str) -> float:
    """Of new networks that are trained on these data."""
    make, width = KINDS[kind]
    right = 0.0
    for seed in range(NETWORKS):
        torch.manual_seed(1000 + seed)
        model = nn.Sequential(make(), nn.Linear(width, 10))
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(EPOCHS):
            loss = (model(data[0]) - data[1]).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right += (model(test[0]).argmax(1) == test[1].argmax(1)).float().mean().item()
    return right / NETWORKS


def one_of_each(train: Set, generator: torch.Generator) -> Set:
    """A random digit of each class."""
    places = [train[1].argmax(1).eq(c).nonzero()[:, 0] for c in range(10)]
    chosen = torch.stack([p[torch.randint(len(p), (), generator=generator)] for p in places])
    return train[0][chosen], train[1][chosen]


def class_means(train: Set) -> Set:
    """The mean picture of each class."""
    labels = train[1].argmax(1)
    return torch.stack([train[0][labels == c].mean(0) for c in range(10)]), torch.eye(10) - 0.1


def distil(start: Set, train: Set, steps: int, seed: int, generator: torch.Generator) -> tuple[Set, list[float]]:
    """The synthetic set, and the error on real digits on the way."""
    distillation = DatasetDistillation(perceptron, *start, seed=seed)
    losses = []
    for _ in tqdm(range(steps), desc=f"distillation {seed}", mininterval=0.5):
        i = torch.randint(len(train[0]), (BATCH,), generator=generator)
        losses.append(float(distillation.step((train[0][i], train[1][i])).upper))
    return distillation.dataset(), losses


# ------------------------------------------------------------------------------------------------------------- figure


def draw(sets: dict[str, Set], results: dict[str, dict[str, list[float]]], path: Path) -> None:
    """The pictures of one start, and what networks learn from them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 3.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.2, 1))
    axes = left.subplots(len(sets), 10)
    for row, (name, (images, _)) in zip(axes, sets.items(), strict=True):
        limit = images.abs().amax((1, 2, 3))
        for axis, image, top in zip(row, images[:, 0], limit, strict=True):
            axis.imshow(-image.numpy(), cmap="gray", vmin=-top, vmax=top)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=9)
    axis = right.subplots()
    for shift, (name, rows) in enumerate(results.items()):
        place = [k + 0.2 * (shift - 1) for k in range(len(rows))]
        means = [100 * sum(row) / len(row) for row in rows.values()]
        axis.plot(place, means, "_", markersize=18, markeredgewidth=2.5, color=COLOURS[name], label=name)
        for p, row in zip(place, rows.values(), strict=True):
            axis.plot([p] * len(row), [100 * a for a in row], "o", markersize=4, color=COLOURS[name], alpha=0.5)
    axis.set_xticks(range(len(KINDS)), list(KINDS))
    axis.set(xlim=(-0.5, len(KINDS) - 0.5), ylabel="test accuracy in %", title="networks trained on ten pictures")
    axis.legend(frameon=False, fontsize=8, loc="center")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/dataset_distillation"))
    options = parser.parse_args()
    if options.quick:
        options.steps, options.seeds = 10, 1
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    train, test = digits()
    results: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in COLOURS}
    for kind in KINDS:
        results["class means"][kind].append(accuracy(class_means(train), test, kind))
    shown: dict[str, Set] = {}
    losses: list[list[float]] = []
    for seed in range(options.seeds):
        generator = torch.Generator().manual_seed(seed)
        first = one_of_each(train, generator)
        distilled, path = distil(first, train, options.steps, seed, generator)
        losses.append(path)
        for name, data in (("random digits", first), ("distilled", distilled)):
            for kind in KINDS:
                results[name][kind].append(accuracy(data, test, kind))
        if seed == 0:
            shown = {"random digits": first, "class means": class_means(train), "distilled": distilled}
    draw(shown, results, options.out / "dataset_distillation.png")
    (options.out / "results.json").write_text(json.dumps({"accuracy": results, "losses": losses}, indent=2))
    mean = {name: {kind: sum(row) / len(row) for kind, row in rows.items()} for name, rows in results.items()}
    print(f"{'trained on':<16}" + "".join(f"{kind:>16}" for kind in KINDS))
    for name, rows in mean.items():
        print(f"{name:<16}" + "".join(f"{row:>16.1%}" for row in rows.values()))
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    for kind in KINDS if not options.quick else ():
        gain = mean["distilled"][kind] - mean["random digits"][kind]
        assert gain > 0.1, f"expected the {kind} network to gain ten points over random digits, got {100 * gain:.1f}"


if __name__ == "__main__":
    main()
