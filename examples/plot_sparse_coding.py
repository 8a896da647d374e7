"""Sparse coding on digits: atoms learned for the pictures, and atoms learned for the task.

A picture of a digit is written in few atoms of a dictionary,

    z(y) = argmin_z  1/2 ||y - D z||^2 + penalty * ||z||_1.

First the dictionary is learned so that pictures are written well. With as many coefficients as principal component
analysis it explains more, since every picture picks its own atoms. Then a linear classifier reads the codes, once with
that dictionary and once with a dictionary that the classifier's loss may change: the gradient goes through the codes,
exactly, by a solve on the support of each code.

    python examples/plot_sparse_coding.py [--quick] [--steps 300] [--out out/sparse_coding]

Source: J. Mairal, F. Bach, J. Ponce, Task-driven dictionary learning, 2012.
"""

import argparse
import copy
import json
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from difflayers.proximal import SparseCoding, lasso

SIDE = 6
ATOMS = SIDE**2
PENALTY = 0.3
BATCH = 200
TASK_PENALTY = 0.5


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centred pictures of 8 x 8 pixels and their labels: 1200 to learn from, 597 to test on."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    x, labels = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    learn, test = order[:1200], order[1200:]
    mean = x[learn].mean(0)
    return x[learn] - mean, labels[learn], x[test] - mean, labels[test]


def batches(count: int, steps: int, name: str):
    """Indices of random batches, with a progress bar."""
    generator = torch.Generator().manual_seed(1)
    for _ in tqdm(range(steps), desc=name, mininterval=1.0):
        yield torch.randint(count, (BATCH,), generator=generator)


# ------------------------------------------------------------------------------------------------------------ learning


def learn_dictionary(x: Tensor, steps: int) -> SparseCoding:
    """Adam on the objective of the codes; its gradient needs no linear solve."""
    torch.manual_seed(0)
    layer = SparseCoding(x.shape[-1], ATOMS, PENALTY)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.02)
    for index in batches(len(x), steps, "dictionary"):
        optimiser.zero_grad()
        layer.objective(x[index]).mean().backward()
        optimiser.step()
    return layer


def learn_classifier(layer: SparseCoding, x: Tensor, labels: Tensor, steps: int, *, task_driven: bool) -> nn.Module:
    """A linear map of the codes, alone or together with the dictionary."""
    torch.manual_seed(0)
    model = nn.Sequential(copy.deepcopy(layer), nn.Linear(ATOMS, 10))
    model[0].initial_penalty = TASK_PENALTY
    model[0].requires_grad_(task_driven)
    rates = [{"params": model[0].parameters(), "lr": 5e-3}, {"params": model[1].parameters(), "lr": 5e-2}]
    optimiser = torch.optim.Adam(rates)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for index in batches(len(x), steps, "task-driven" if task_driven else "classifier alone"):
        optimiser.zero_grad()
        F.cross_entropy(model(x[index]), labels[index]).backward()
        optimiser.step()
        schedule.step()
    return model


# ------------------------------------------------------------------------------------------------------------ measures


@torch.no_grad()
def explained(layer: SparseCoding, x: Tensor) -> list[tuple[float, float]]:
    """Mean number of coefficients and the share of variance they explain, for several penalties.

    Codes are shrunk towards zero; what a support can explain is seen by least squares on it, which is a Lasso whose
    weights are zero on the support and large elsewhere.
    """
    curve = []
    for penalty in (0.05, 0.1, 0.2, 0.4, 0.6, 0.9, 1.3):
        codes = lasso(layer.dictionary, x, penalty)
        refit = lasso(layer.dictionary, x, 1e3, weights=(codes == 0).to(x.dtype))
        miss = (x - layer.reconstruct(refit)).square().sum()
        curve.append(((codes != 0).sum(-1).float().mean().item(), 1 - (miss / x.square().sum()).item()))
    return curve


def principal_components(x: Tensor, test: Tensor) -> list[tuple[float, float]]:
    """The same for principal components."""
    _, _, Vh = torch.linalg.svd(x, full_matrices=False)
    shares = [(test @ Vh[:k].mT).square().sum() / test.square().sum() for k in range(1, 21)]
    return [(float(k), share.item()) for k, share in enumerate(shares, 1)]


def at(curve: list[tuple[float, float]], count: float) -> float:
    """A curve read at a number of coefficients."""
    curve = sorted(curve)
    for (a, low), (b, high) in pairwise(curve):
        if a <= count <= b:
            return low + (high - low) * (count - a) / (b - a)
    return curve[0][1] if count < curve[0][0] else curve[-1][1]


def draw(layer: SparseCoding, task: SparseCoding, curves: dict, accuracy: dict, path: Path) -> None:
    """Both dictionaries, the curves, the accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained", width_ratios=(1, 1, 1.25, 0.9))
    for axis, (title, one) in zip(axes, {"for the pictures": layer, "for the task": task}.items(), strict=False):
        atoms = one.dictionary.detach().mT.reshape(SIDE, SIDE, 8, 8)
        tiles = F.pad(atoms, (1, 1, 1, 1), value=float("nan")).movedim(2, 1).reshape(SIDE * 10, SIDE * 10)
        axis.imshow(tiles.numpy(), cmap="RdBu", vmin=-0.4, vmax=0.4)
        axis.set(title=f"atoms learned {title}", xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for (name, curve), colour in zip(curves.items(), ("#1f5fa8", "#d9822b"), strict=True):
        axes[2].plot(*zip(*curve, strict=True), "o-", color=colour, markersize=3.5, label=name)
    axes[2].set(xlabel="coefficients a picture", ylabel="variance explained", xlim=(0, 20), title="unseen pictures")
    axes[2].set_xticks(range(0, 21, 5))
    axes[2].legend(frameon=False, loc="lower right")
    bars = axes[3].bar(list(accuracy), list(accuracy.values()), color=("#9bb8d9", "#1f5fa8"), width=0.6)
    axes[3].bar_label(bars, fmt="{:.1%}")
    axes[3].set(ylim=(0.8, 1.0), title="accuracy on unseen pictures")
    for axis in axes[2:]:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="steps of each of the three trainings")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/sparse_coding"))
    options = parser.parse_args()
    if options.quick:
        options.steps = 20
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    x, labels, test, test_labels = digits()
    layer = learn_dictionary(x, options.steps)
    curves = {"sparse codes": explained(layer, test), "principal components": principal_components(x, test)}
    models = {
        "fixed atoms": learn_classifier(layer, x, labels, options.steps, task_driven=False),
        "task-driven": learn_classifier(layer, x, labels, options.steps, task_driven=True),
    }
    with torch.no_grad():
        accuracy = {name: (m(test).argmax(-1) == test_labels).float().mean().item() for name, m in models.items()}
    draw(layer, models["task-driven"][0], curves, accuracy, options.out / "sparse_coding.png")
    ten = {name: at(curve, 8.0) for name, curve in curves.items()}
    results = {"explained by 8 coefficients": ten, "accuracy": accuracy}
    (options.out / "results.json").write_text(json.dumps(results, indent=2))
    for what, numbers in results.items():
        print(f"{what}: " + ", ".join(f"{name} {value:.1%}" for name, value in numbers.items()))
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    if options.steps >= 100:
        assert ten["sparse codes"] > ten["principal components"]
        assert accuracy["task-driven"] > accuracy["fixed atoms"]


if __name__ == "__main__":
    main()
