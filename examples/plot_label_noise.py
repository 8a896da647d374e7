"""Digits with wrong labels: losses that expect the label to be wrong.

Up to 60 % of the labels are replaced by another digit. A network with cross-entropy learns the wrong labels by heart.
The label-distributionally robust loss

    L(f, y) = max_p  sum_k p_k (f_k - f_y) - temperature * KL(p || 1/K)

is cross-entropy at temperature 1. At a high temperature p stays near uniform and the loss near linear: whether a label
is fitted or not, it pulls with about the same force, and labels that are wrong at random cancel. The adaptive form
lowers the temperature of a sample whose loss is large, within bounds, and solves for it in every step. MAE (twice the
probability that the label does not get) is robust because its sum over all labels is constant.

Sixteen networks, four for each share of wrong labels, are trained at once for each loss.

    python examples/plot_label_noise.py [--quick] [--steps 700] [--out out/label_noise]

Source: D. Zhu, Y. Ying, T. Yang, Label Distributionally Robust Losses for Multi-class Classification, 2023.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from difflayers.conic import label_robust_loss

SHARES = (0.0, 0.2, 0.4, 0.6)
SEEDS = 4
LEARN, BATCH, HIDDEN = 1200, 100, 128
WARM = 5.0

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Less log 10, which changes nothing."""
    return label_robust_loss(logits, labels, temperature=1.0, reduction="none")


def mean_absolute_error(logits: Tensor, labels: Tensor) -> Tensor:
    return 2 * (1 - logits.softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1))


def robust(logits: Tensor, labels: Tensor) -> Tensor:
    return label_robust_loss(logits, labels, temperature=WARM, reduction="none")


def adaptive(logits: Tensor, labels: Tensor) -> Tensor:
    return label_robust_loss(logits, labels, temperature=WARM, adaptive=1.2, reduction="none")


LOSSES: dict[str, Loss] = {
    "cross-entropy": cross_entropy,
    "MAE": mean_absolute_error,
    f"LDR, temperature {WARM:g}": robust,
    f"ALDR, temperature {WARM / 6:.2f} to {WARM:g}": adaptive,
}


def digits() -> tuple[Tensor, ...]:
    """Pictures and noisy labels ``(models, 1200, ...)``, then pictures and right labels to test on."""
    from sklearn.datasets import load_digits

    pictures, right = load_digits(return_X_y=True)
    pictures, right = torch.tensor(pictures / 16, dtype=torch.float32), torch.tensor(right)
    parts = []
    for share in SHARES:
        for seed in range(SEEDS):
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(pictures), generator=generator)
            learn, test = order[:LEARN], order[LEARN:]
            wrong = torch.rand(LEARN, generator=generator) < share
            others = (right[learn] + torch.randint(1, 10, (LEARN,), generator=generator)) % 10
            parts.append((pictures[learn], torch.where(wrong, others, right[learn]), pictures[test], right[test]))
    return tuple(torch.stack(part) for part in zip(*parts, strict=True))


def learn(loss: Loss, x: Tensor, labels: Tensor, steps: int, name: str) -> Callable[[Tensor], Tensor]:
    """One hidden layer, Adam, the same pictures and starts for every loss."""
    models = len(x)
    generator = torch.Generator().manual_seed(0)

    def layer(rows: int, columns: int) -> list[Tensor]:
        W = torch.randn(models, rows, columns, generator=generator) / rows**0.5
        return [W.requires_grad_(), torch.zeros(models, 1, columns, requires_grad=True)]

    parameters = [*layer(64, HIDDEN), *layer(HIDDEN, 10)]
    optimiser = torch.optim.Adam(parameters, lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def network(x: Tensor) -> Tensor:
        return (x @ parameters[0] + parameters[1]).relu() @ parameters[2] + parameters[3]

    for _ in tqdm(range(steps), desc=name, mininterval=1.0):
        pick = torch.randint(LEARN, (models, BATCH), generator=generator)
        batch = x.gather(1, pick.unsqueeze(-1).expand(-1, -1, 64))
        optimiser.zero_grad()
        loss(network(batch), labels.gather(1, pick)).mean(-1).sum().backward()
        optimiser.step()
        schedule.step()
    return network


def draw(found: dict[str, Tensor], path: Path) -> None:
    """Accuracy against the share of wrong labels, and how losses grow with the margin of a wrong label."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 3.9), layout="constrained")
    colours = ("#8a8f98", "#d9822b", "#7fb3e6", "#1f5fa8")
    for (name, accuracy), colour in zip(found.items(), colours, strict=True):
        mean, spread = accuracy.mean(-1).tolist(), accuracy.std(-1).tolist()
        axes[0].errorbar(SHARES, mean, spread, fmt="o-", color=colour, markersize=4, capsize=2, label=name)
    axes[0].set(title="accuracy on unseen pictures, right labels", xlabel="share of wrong labels")
    axes[0].set_xticks(SHARES)
    axes[0].legend(frameon=False, loc="lower left")

    gap = torch.linspace(-6, 12, 300)
    logits = torch.zeros(300, 10)
    logits[:, 1] = gap  # another class leads the label by this much
    for (name, loss), colour in zip(LOSSES.items(), colours, strict=True):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, torch.zeros(300, dtype=torch.int64))
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        axes[1].plot(gap.tolist(), (value - value[gap.abs().argmin()]).tolist(), color=colour, label=name)
        axes[2].plot(gap.tolist(), slope[:, 1].tolist(), color=colour, label=name)
    axes[1].set(title="loss, less that of equal logits", xlabel="logit of a wrong class less that of the label")
    axes[2].set(
        title="its slope: what pushes the wrong class down", xlabel="logit of a wrong class less that of the label"
    )
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=700, help="steps of each training")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/label_noise"))
    options = parser.parse_args()
    if options.quick:
        options.steps = 40
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    x, labels, test, test_labels = digits()
    found = {}
    for name, loss in LOSSES.items():
        network = learn(loss, x, labels, options.steps, name)
        with torch.no_grad():
            right = (network(test).argmax(-1) == test_labels).float().mean(-1)
        found[name] = right.reshape(len(SHARES), SEEDS)
    results = {name: dict(zip(map(str, SHARES), a.mean(-1).tolist(), strict=True)) for name, a in found.items()}
    draw(found, options.out / "label_noise.png")
    (options.out / "results.json").write_text(json.dumps(results, indent=2))
    for name, numbers in results.items():
        print(f"{name}: " + ", ".join(f"{float(share):.0%} wrong {value:.1%}" for share, value in numbers.items()))
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    if options.steps >= 700:
        plain, _, fixed, adapted = results.values()
        for one in (fixed, adapted):
            assert one["0.6"] >= plain["0.6"] + 0.03
            assert one["0.0"] >= plain["0.0"] - 0.02


if __name__ == "__main__":
    main()
