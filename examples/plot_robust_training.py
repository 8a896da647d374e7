"""Adversarially robust training of a ReLU network, to the global optimum: two classes of digits.

Pictures of fours and nines, 4 x 4 pixels between 0 and 1, are told apart by a two-layer ReLU network that is trained as
a convex program, once plainly and once against an adversary who may move every pixel by epsilon (not the bias):

    min  sum_k (1 - y_k f(x_k) + epsilon a_k)_+  +  beta * sum_i (||v_i|| + ||w_i||)

over neurons that keep their side of the gate on the whole ball around every training picture, where a_k is the dual
norm of what the network does to picture k. Then both are attacked: by one step along the sign of the gradient (FGSM),
and by many such steps, projected to the ball (PGD). The certified accuracy is what no attack can push below.

Gates matter: a ball must fit into the cell of a gate on all training pictures. Random gates pass next to some picture
and are useless here; those that separate groups of similar pictures leave room.

    python examples/plot_robust_training.py [--quick] [--pictures 80] [--out out/robust_training]

Source: Y. Bai, T. Gautam, S. Sojoudi, Efficient Global Optimization of Two-Layer ReLU Networks, 2023.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from difflayers.relu import (
    ClarabelSolver,
    ConvexReLUSolution,
    Hinge,
    LInf,
    certified_margin,
    narrow_gates,
    robust_convex_relu,
    to_network,
)

CLASSES = (4, 9)
BETA = 0.05
GATES = 8
TRAINED = (0.0, 0.02, 0.04, 0.06, 0.08)
ATTACKS = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15)
HARD = 0.1
SOLVER = ClarabelSolver(rtol=1e-5)


def ball(epsilon: float | Tensor) -> LInf:
    """The bias, the last column, is not perturbed."""
    return LInf(epsilon, fixed_columns=(-1,))


def digits(pictures: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures with a column of ones and labels, to learn from and to test on."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    x = F.avg_pool2d(torch.tensor(x / 16).reshape(-1, 1, 8, 8), 2).flatten(1)
    labels = torch.tensor(labels)
    chosen = (labels == CLASSES[0]) | (labels == CLASSES[1])
    x, y = x[chosen], torch.where(labels[chosen] == CLASSES[0], 1.0, -1.0).double()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    X, y = F.pad(x[order], (0, 1), value=1.0), y[order]
    return X[:pictures], y[:pictures], X[pictures:], y[pictures:]


def wide_gates(X: Tensor) -> Tensor:
    """Of separators of groups of clusters those with room for the largest balls, and the gate that is always open."""
    from sklearn.cluster import KMeans

    candidates = []
    for count in range(2, 7):
        cluster = torch.tensor(KMeans(count, n_init=4, random_state=0).fit_predict(X[:, :-1].numpy()))
        for bits in range(1, 2 ** (count - 1)):
            side = 2.0 * (bits >> cluster & 1).double() - 1
            g = torch.linalg.solve(X.T @ X + 0.3 * torch.eye(X.shape[1]).double(), X.T @ side)
            candidates += [g, -g]
    gates = torch.stack(candidates)
    room = torch.stack([~narrow_gates(X, gates, ball(radius)) for radius in TRAINED[2:]]).sum(0)
    patterns, kept = X @ gates.mT >= 0, []
    for i in room.sort(descending=True, stable=True).indices.tolist():
        if not any(torch.equal(patterns[:, i], patterns[:, j]) for j in kept):
            kept.append(i)
    everywhere = F.pad(torch.zeros(1, X.shape[1] - 1).double(), (0, 1), value=1.0)
    return torch.cat([everywhere, gates[kept[:GATES]]])


# -------------------------------------------------------------------------------------------------------------- attacks


def attack(network: torch.nn.Module, X: Tensor, y: Tensor, epsilon: float, steps: int) -> Tensor:
    """Margins under signed gradient steps in the ball: one is FGSM; more, from the point and random starts, PGD."""
    generator = torch.Generator().manual_seed(0)
    free = torch.ones_like(X)
    free[:, -1] = 0
    worst = y * network(X).detach()
    for start in range(1 if steps == 1 else 4):
        delta = torch.zeros_like(X)
        if start:
            delta = (2 * torch.rand(X.shape, generator=generator, dtype=X.dtype) - 1) * epsilon * free
        for _ in range(steps):
            delta.requires_grad_()
            (slope,) = torch.autograd.grad((y * network(X + delta)).sum(), delta)
            step = epsilon if steps == 1 else 2.5 * epsilon / steps
            delta = (delta.detach() - step * slope.sign() * free).clamp(-epsilon, epsilon)
            worst = torch.minimum(worst, y * network(X + delta).detach())
    return worst


def accuracies(solution: ConvexReLUSolution, X: Tensor, y: Tensor, epsilon: float) -> dict[str, float]:
    """Share of pictures that are still told right."""
    network = to_network(solution).requires_grad_(False)
    margins = {
        "FGSM": attack(network, X, y, epsilon, 1),
        "PGD": attack(network, X, y, epsilon, 40),
        "certified": certified_margin(solution, X, y, ball(epsilon)),
    }
    assert bool((margins["certified"] <= margins["PGD"] + 1e-9).all()), "a certificate that an attack breaks"
    return {name: (margin > 0).double().mean().item() for name, margin in margins.items()}


# -------------------------------------------------------------------------------------------------------------- results


def train(X: Tensor, y: Tensor) -> tuple[dict[float, ConvexReLUSolution], dict[float, float], dict[float, int]]:
    """One network for every radius, the slope of the optimal value in the radius, and the cells with room."""
    gates = wide_gates(X)
    found, slopes, room = {}, {}, {}
    for radius in tqdm(TRAINED, desc="training"):
        epsilon = torch.tensor(radius, dtype=X.dtype, requires_grad=True)
        network = robust_convex_relu(X, y, BETA, gates, ball(epsilon), loss=Hinge(), solver=SOLVER)
        (slope,) = torch.autograd.grad(network.objective, epsilon)
        network = network._replace(v=network.v.detach(), w=network.w.detach(), objective=network.objective.detach())
        found[radius], slopes[radius] = network, slope.item()
        room[radius] = int((~narrow_gates(X, gates, ball(radius))).sum())
    return found, slopes, room


def draw(found: dict, slopes: dict, room: dict, curves: dict, path: Path) -> None:
    """Accuracy against the attack, accuracy against the training, the optimal value with its slopes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", width_ratios=(1.25, 1, 1))
    colours = {TRAINED[0]: "#d9822b", TRAINED[-1]: "#1f5fa8"}
    styles = {"PGD": "o-", "FGSM": "x--", "certified": ":"}
    for radius, colour in colours.items():
        for name, style in styles.items():
            what = "plain training" if radius == 0 else f"robust training, epsilon {radius:g}"
            heights = [curves[radius][e][name] for e in ATTACKS]
            label = what if name == "PGD" else None
            axes[0].plot(ATTACKS, heights, style, color=colour, markersize=4, label=label)
    for name, style in styles.items():
        axes[0].plot([], [], style, color="0.4", markersize=4, label=name)
    axes[0].set(xlabel="the attack moves every pixel by", ylabel="accuracy on unseen pictures", ylim=(0, 1.03))
    axes[0].set_title("plain training collapses under attack")
    axes[0].legend(frameon=False, loc="lower left", fontsize=8.5)
    parts = ("without attack", 0.0, "PGD", "#7a9e3b", "s-"), (f"PGD, {HARD:g}", HARD, "PGD", "#1f5fa8", "o-")
    for label, e, name, colour, style in (*parts, (f"certified, {HARD:g}", HARD, "certified", "#1f5fa8", ":")):
        heights = [curves[radius][e][name] for radius in TRAINED]
        axes[1].plot(TRAINED, heights, style, color=colour, markersize=4, label=label)
    for radius in TRAINED:
        axes[1].annotate(str(room[radius]), (radius, 0.03), ha="center", color="0.45", fontsize=8.5)
    axes[1].annotate("cells with room for the ball:", (0.0, 0.1), color="0.45", fontsize=8.5)
    axes[1].set(xlabel="epsilon of the training", ylim=(0, 1.03), title="what robustness costs and gains")
    axes[1].legend(frameon=False, loc="center right", fontsize=8.5)
    values = [found[radius].objective.item() for radius in TRAINED]
    axes[2].plot(TRAINED, values, "o", color="#1f5fa8", label="optimal value")
    for radius, value in zip(TRAINED, values, strict=True):
        span = torch.tensor([-0.007, 0.007])
        line = value + slopes[radius] * span
        axes[2].plot(
            radius + span, line, color="#d9822b", label="slope by the envelope theorem" if radius == 0 else None
        )
    axes[2].set(xlabel="epsilon of the training", title="the value, differentiated in epsilon")
    axes[2].set_ylim(bottom=0)
    axes[2].legend(frameon=False, loc="upper left", fontsize=8.5)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=80, help="pictures to learn from")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/robust_training"))
    options = parser.parse_args()
    if options.quick:
        options.pictures = 20
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    X, y, test, labels = digits(options.pictures)
    found, slopes, room = train(X, y)
    for radius, network in found.items():  # on training pictures the ball lies in a cell, where one step is the worst
        worst = attack(to_network(network).requires_grad_(False), X, y, radius, 1)
        assert bool((worst - certified_margin(network, X, y, ball(radius))).abs().max() < 1e-6)
        assert network.gap <= 1e-5 * len(X)
    curves = {r: {e: accuracies(network, test, labels, e) for e in ATTACKS} for r, network in found.items()}
    draw(found, slopes, room, curves, options.out / "robust_training.png")
    results = {
        f"trained with {r:g}": {
            "units": to_network(network).weight.shape[0],
            "cells": room[r],
            "without attack": curves[r][0.0]["PGD"],
            **{f"{name} {HARD:g}": value for name, value in curves[r][HARD].items()},
        }
        for r, network in found.items()
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=2))
    for what, numbers in results.items():
        print(
            f"{what}: " + ", ".join(f"{k} {v:.1%}" if isinstance(v, float) else f"{v} {k}" for k, v in numbers.items())
        )
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    plain, robust = curves[TRAINED[0]], curves[TRAINED[-1]]
    if options.pictures == 80:
        assert plain[HARD]["PGD"] < 0.7 and robust[HARD]["PGD"] > 0.85
        assert robust[HARD]["certified"] > 0.8
        assert robust[0.0]["PGD"] > plain[0.0]["PGD"] - 0.03


if __name__ == "__main__":
    main()
