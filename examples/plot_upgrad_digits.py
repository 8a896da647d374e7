"""Four tasks on digits share a narrow network, and UPGrad lets none of them get worse.

Six hidden features of a picture have to serve the digit's class, its parity, whether it is at least 5, and the picture
itself. Gradient descent on the mean of the four losses follows the largest: on the way, smaller ones rise. UPGrad
projects every task's gradient on the cone of directions that no task resists, and takes the mean of the projections:

    g = sum_i 1/4 argmin_g {||g - J_i||^2 : J g >= 0}.

All pictures are in every step, so a loss that rises does so because of the other tasks, not by chance. UPGrad's steps
are longer than those of the mean; a third run follows the mean with steps as long as UPGrad would make them there.

    python examples/plot_upgrad_digits.py [--quick] [--steps 300] [--out out/upgrad_digits]

Source: P. Quinton, V. Rey, Jacobian Descent For Multi-Objective Optimization, 2024, section 3.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from tqdm import tqdm

from difflayers.conic import UPGrad

RATE = 0.2
FEATURES = 6
TASKS = ("class", "parity", "at least 5", "picture")
WAYS = {
    "mean": lambda J: J.mean(0),
    "mean, steps as long": lambda J: J.mean(0) * (UPGrad()(J).norm() / J.mean(0).norm()),
    "UPGrad": UPGrad(),
}
COLOURS = {"mean": "#d9822b", "mean, steps as long": "#b0a18f", "UPGrad": "#1f5fa8"}
NOISE = 1e-6  # of a loss in single precision


class Network(nn.Module):
    """Features of a picture, and a linear head for every task."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(64, FEATURES), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(FEATURES, size) for size in (10, 1, 1, 64))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.features(x)
        return [head(features) for head in self.heads]


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centred pictures of 8 x 8 pixels and their labels: 1000 to learn from, 797 to test on."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    x, labels = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    learn, test = order[:1000], order[1000:]
    mean = x[learn].mean(0)
    return x[learn] - mean, labels[learn], x[test] - mean, labels[test]


def losses_of(outputs: list[Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """One loss a task."""
    scores, odd, large, picture = outputs
    return torch.stack(
        [
            cross_entropy(scores, labels),
            binary_cross_entropy_with_logits(odd.squeeze(-1), (labels % 2).float()),
            binary_cross_entropy_with_logits(large.squeeze(-1), (labels >= 5).float()),
            (picture - x).square().sum(-1).mean(),
        ]
    )


def train(way: str, combine: Callable[[Tensor], Tensor], data: tuple[Tensor, ...], steps: int) -> tuple[Tensor, Tensor]:
    """Losses ``(steps + 1, tasks)`` along the way, and at the end on unseen pictures."""
    x, labels, test, test_labels = data
    torch.manual_seed(0)
    model = Network()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def losses(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        found = losses_of(functional_call(model, p, (x,)), x, labels)
        return found, found

    curve = []
    for step in tqdm(range(steps + 1), desc=way, mininterval=1.0):
        slopes, found = jacrev(losses, has_aux=True)(parameters)
        curve.append(found)
        if step < steps:
            g = combine(torch.cat([s.flatten(1) for s in slopes.values()], -1))
            pieces = g.split([p.numel() for p in parameters.values()])
            moves = zip(parameters.items(), pieces, strict=True)
            parameters = {name: p - RATE * piece.view_as(p) for (name, p), piece in moves}
    return torch.stack(curve), losses_of(functional_call(model, parameters, (test,)), test, test_labels)


def draw(curves: dict[str, Tensor], path: Path) -> None:
    """One panel a task; a dot where the loss rises."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TASKS), figsize=(14, 3.4), layout="constrained")
    for k, (axis, task) in enumerate(zip(axes, TASKS, strict=True)):
        for way, curve in curves.items():
            at, loss = torch.arange(1, len(curve) + 1), curve[:, k]
            axis.plot(at, loss, color=COLOURS[way], label=way)
            rises = (loss.diff() > NOISE).nonzero().squeeze(-1) + 1
            axis.plot(at[rises], loss[rises], "o", color=COLOURS[way], markersize=4)
        axis.set(xscale="log", xlabel="step", title=task)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="loss; a dot where it rises")
    axes[0].legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="steps of each training")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/upgrad_digits"))
    options = parser.parse_args()
    if options.quick:
        options.steps = 12
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    data = digits()
    runs = {way: train(way, combine, data, options.steps) for way, combine in WAYS.items()}
    draw({way: curve for way, (curve, _) in runs.items()}, options.out / "upgrad_digits.png")
    results = {
        way: {
            "steps that raise a loss": int((curve.diff(dim=0) > NOISE).any(-1).sum()),
            "largest rise": max(0.0, curve.diff(dim=0).max().item()),
            "loss": dict(zip(TASKS, curve[-1].tolist(), strict=True)),
            "loss on unseen pictures": dict(zip(TASKS, unseen.tolist(), strict=True)),
        }
        for way, (curve, unseen) in runs.items()
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=2))
    for way, numbers in results.items():
        unseen = ", ".join(f"{task} {value:.3f}" for task, value in numbers["loss on unseen pictures"].items())
        print(f"{way}: {numbers['steps that raise a loss']} steps raise a loss; on unseen pictures {unseen}")
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    assert results["UPGrad"]["steps that raise a loss"] == 0
    if options.steps >= 100:
        assert results["mean"]["steps that raise a loss"] >= 5
        for way in ("mean", "mean, steps as long"):
            assert all(results["UPGrad"]["loss"][task] < results[way]["loss"][task] for task in TASKS)


if __name__ == "__main__":
    main()
