"""Digits with a rare class: training on the largest losses instead of on their mean.

Of the digit 8 only 20 pictures are left among 800. A linear classifier of eight principal components cannot fit all
pictures, and the mean loss lets it give up on a fortieth of them. A spectral risk counts large losses more,

    R(l) = max_q  q . l - penalty(q),   q a mixture of permutations of the spectrum,

with a superquantile, the spectrum that counts the largest losses alone, or an extremile. The gradient with respect to
the losses is q. Nobody tells the classifier which class is rare.

Eight random splits are trained at once: losses of shape (8, 800) give eight risks. Each risk is minimised by L-BFGS
until it stands still, for four strengths of weight decay, and each is judged at the strength that is best for it: a
classifier that is hardly regularised comes closer to fitting all pictures, whatever the risk.

    python examples/plot_spectral_risk.py [--quick] [--steps 300] [--out out/spectral_risk]

Source: R. Mehta, V. Roulet, K. Pillutla, Z. Harchaoui, Distributionally Robust Optimization with Bias and Variance
Reduction, 2024.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from difflayers.conic import ChiSquare, extremile, spectral_risk, superquantile

RARE, KEPT = 8, 20
SPLITS, PICTURES, COMPONENTS = 8, 800, 8
DECAYS = (1e-5, 1e-4, 1e-3, 3e-3)
SPECTRA = (superquantile(0.8), superquantile(0.9), extremile(5.0))
PENALTY = ChiSquare(0.02)
CHOSEN = "superquantile(0.9)"
COLOURS = {"mean": "#8a8f98", "superquantile(0.8)": "#7fb3e6", CHOSEN: "#1f5fa8", "extremile(5)": "#d9822b"}

Risk = Callable[[Tensor], Tensor]


class Data(NamedTuple):
    """Pictures ``(splits, count, components)`` and labels ``(splits, count)``, to learn from and to test on."""

    x: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor


def digits() -> Data:
    """Random splits, in which the rare class is cut down, each in its own principal components."""
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    pictures, labels = torch.tensor(pictures / 16, dtype=torch.float32), torch.tensor(labels)
    parts = []
    for seed in range(SPLITS):
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
        learn, test = order[:1000], order[1000:]
        rare = labels[learn] == RARE
        learn = torch.cat([learn[rare][:KEPT], learn[~rare][: PICTURES - KEPT]])
        mean = pictures[learn].mean(0)
        axes = torch.linalg.svd(pictures[learn] - mean, full_matrices=False)[2][:COMPONENTS].mT
        parts.append(((pictures[learn] - mean) @ axes, labels[learn], (pictures[test] - mean) @ axes, labels[test]))
    x, *rest = (torch.stack(part) for part in zip(*parts, strict=True))
    size = x.std(1, keepdim=True)
    return Data(x / size, rest[0], rest[1] / size, rest[2])


def cross_entropy(x: Tensor, labels: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """The loss of every picture, ``(splits, count)``."""
    return F.cross_entropy((x @ W + b).movedim(-1, 1), labels, reduction="none")


def learn(risk: Risk, data: Data, decay: float, steps: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression on a risk of the losses, all splits at once."""
    W = torch.zeros(SPLITS, COMPONENTS, 10, requires_grad=True)
    b = torch.zeros(SPLITS, 1, 10, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [W, b], max_iter=steps, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        total = risk(cross_entropy(data.x, data.labels, W, b)).sum() + decay * W.square().sum()
        total.backward()
        return total

    optimiser.step(closure)
    return W.detach(), b.detach()


def measure(data: Data, W: Tensor, b: Tensor) -> dict[str, Tensor]:
    """For each split recall of every class and accuracy on unseen pictures, and the losses of those learned from."""
    right = ((data.test @ W + b).argmax(-1) == data.test_labels).float()
    of_class = F.one_hot(data.test_labels, 10).float()
    return {
        "recall": (right.unsqueeze(-1) * of_class).sum(1) / of_class.sum(1),
        "accuracy": right.mean(-1),
        "losses": cross_entropy(data.x, data.labels, W, b),
    }


def best(found: dict[float, dict[str, Tensor]]) -> dict[str, Tensor]:
    """At the weight decay for which the worst class is recognised best."""
    return max(found.values(), key=lambda m: float(m["recall"].amin(-1).mean()))


def draw(found: dict[str, dict[float, dict[str, Tensor]]], path: Path) -> None:
    """The trade between all and the rare class, recall of every class, and the tails of the losses."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 3.9), layout="constrained", width_ratios=(1, 1.3, 1))
    for name, by_decay in found.items():
        points = [(float(m["accuracy"].mean()), float(m["recall"][:, RARE].mean())) for m in by_decay.values()]
        axes[0].plot(*zip(*points, strict=True), "-", color=COLOURS[name], linewidth=1)
        axes[0].scatter(*zip(*points, strict=True), s=(12, 24, 42, 66), color=COLOURS[name], label=name, zorder=3)
    axes[0].set(title="unseen pictures", xlabel="accuracy", ylabel=f"recall of the rare digit, {RARE}")
    axes[0].set_xticks([0.84, 0.85, 0.86, 0.87, 0.88])
    axes[0].legend(frameon=False, loc="upper left", title="dots grow with weight decay", alignment="left")

    for k, name in enumerate(("mean", CHOSEN)):
        recall = best(found[name])["recall"]
        axes[1].bar(
            [digit + 0.4 * (k - 0.5) for digit in range(10)],
            recall.mean(0).tolist(),
            0.38,
            yerr=recall.std(0).tolist(),
            color=COLOURS[name],
            error_kw={"elinewidth": 0.8, "ecolor": "#444444"},
            label=name,
        )
    axes[1].set(title="recall of each digit, each risk at its best decay", xlabel="digit", ylim=(0, 1.22))
    axes[1].set_xticks(range(10))
    axes[1].set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes[1].legend(frameon=False, ncols=2, loc="upper center")

    share = torch.linspace(0.0, 0.999, 500)
    decay = DECAYS[1]
    for name in ("mean", CHOSEN):
        curve = found[name][decay]["losses"].flatten().quantile(share)
        axes[2].plot(share.tolist(), curve.tolist(), color=COLOURS[name], label=name)
    axes[2].set(title=f"losses learned from, decay {decay:g}", xlabel="quantile", xlim=(0.5, 1), ylim=(0, 4))
    axes[2].legend(frameon=False, loc="upper left")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="at most so many steps of L-BFGS for each training")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/spectral_risk"))
    options = parser.parse_args()
    if options.quick:
        options.steps = 10
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    data = digits()
    risks: dict[str, Risk] = {"mean": lambda losses: losses.mean(-1)}
    risks |= {repr(s): lambda losses, s=s: spectral_risk(losses, s, penalty=PENALTY) for s in SPECTRA}
    found: dict[str, dict[float, dict[str, Tensor]]] = {name: {} for name in risks}
    for name, decay in tqdm([(name, decay) for name in risks for decay in DECAYS], desc="trainings", mininterval=1.0):
        found[name][decay] = measure(data, *learn(risks[name], data, decay, options.steps))
    results = {}
    for name, by_decay in found.items():
        m, tail = best(by_decay), spectral_risk(by_decay[DECAYS[1]]["losses"], superquantile(0.9))
        results[name] = {
            "worst recall": float(m["recall"].amin(-1).mean()),
            "accuracy": float(m["accuracy"].mean()),
            "mean of the largest tenth of the losses": float(tail.mean()),
        }
    draw(found, options.out / "spectral_risk.png")
    (options.out / "results.json").write_text(json.dumps(results, indent=2))
    for name, numbers in results.items():
        print(f"{name}: " + ", ".join(f"{what} {value:.3f}" for what, value in numbers.items()))
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    if options.steps >= 300:
        mean, ours = results["mean"], results[CHOSEN]
        tail = "mean of the largest tenth of the losses"
        assert ours["worst recall"] >= mean["worst recall"] + 0.04
        assert ours["accuracy"] >= mean["accuracy"] - 0.01
        assert ours[tail] <= 0.9 * mean[tail]


if __name__ == "__main__":
    main()
