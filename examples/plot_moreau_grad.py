"""MoreauGrad: saliency maps of a digits classifier that are sparse, and that small changes of the image leave alone.

A saliency map says which pixels the score of a class depends on. The plain gradient answers for the image alone, and
answers something else for an image that looks the same. The gradient of the score's Moreau envelope answers for a
neighbourhood; with an l1 penalty most of its pixels are exactly zero. Here four maps of a small network are compared:
the gradient, its mean over noisy copies (SmoothGrad), MoreauGrad, and sparse MoreauGrad. Each is cut to the same number
of largest entries, and measured by how far it moves when the image is moved by a random perturbation of fixed length.

    python examples/plot_moreau_grad.py [--quick] [--images 30] [--out out/moreau_grad]

Source: J. Zhang, F. Farnia, MoreauGrad: Sparse and Robust Interpretation of Neural Networks via Moreau Envelope,
ICCV 2023.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from difflayers.proximal import L1, MoreauGrad

NOISE = 0.1  # of the range of an image
SAMPLES = 16
STEP = 0.3
WEIGHT = 2.0  # of the l1 norm; gradients reach 10
LENGTH = 0.5  # of a perturbation; an image is about 4 long
TRIALS = 3
COLOURS = {"gradient": "#888888", "SmoothGrad": "#d9822b", "MoreauGrad": "#5b9bd5", "sparse MoreauGrad": "#1f5fa8"}

Explain = Callable[[Tensor, Tensor], Tensor]


# ---------------------------------------------------------------------------------------------------- data and network


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images ``(N, 1, 8, 8)`` in [0, 1], and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1300], order[1300:]
    return x[train], y[train], x[test], y[test]


def train(x: Tensor, y: Tensor, steps: int, seed: int = 0) -> nn.Module:
    """A small convolutional network with smooth activations: the envelope wants a gradient without jumps."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.SiLU(),
        nn.Flatten(), nn.Linear(32 * 16, 64), nn.SiLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        batch = torch.randint(len(x), (128,))
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------- maps


def mean_gradient(model: nn.Module, noise: Tensor) -> Explain:
    """The gradient of the score, averaged over copies with this noise."""

    def explain(x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        spread = NOISE * (x.amax((-1, -2), keepdim=True) - x.amin((-1, -2), keepdim=True)).detach()
        copies = x + spread * noise[:, None]
        scores = model(copies.flatten(0, 1)).unflatten(0, copies.shape[:2])
        score = scores.gather(-1, y.expand(len(noise), -1)[..., None]).sum() / len(noise)
        return torch.autograd.grad(score, x)[0]

    return explain


def methods(model: nn.Module, noise: Tensor) -> dict[str, Explain]:
    """The four maps, with the same noise."""
    options = {"t": STEP, "noise": NOISE, "samples": len(noise)}
    plain, sparse = MoreauGrad(model, **options), MoreauGrad(model, L1(WEIGHT), **options)
    return {
        "gradient": mean_gradient(model, torch.zeros_like(noise[:1])),
        "SmoothGrad": mean_gradient(model, noise),
        "MoreauGrad": lambda x, y: plain(x, y, noise=noise),
        "sparse MoreauGrad": lambda x, y: sparse(x, y, noise=noise),
    }


def largest(maps: Tensor, counts: Tensor) -> Tensor:
    """The maps with only their largest entries, as many as said for each image."""
    flat = maps.flatten(1)
    rank = flat.abs().argsort(-1, descending=True).argsort(-1)
    return torch.where(rank < counts[:, None], flat, 0)


def run(model: nn.Module, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Every map of every image, and how it changes."""
    generator = torch.Generator().manual_seed(1)
    explain = methods(model, torch.randn(SAMPLES, *x.shape[1:], generator=generator))
    maps = {name: f(x, y) for name, f in explain.items()}
    counts = (maps["sparse MoreauGrad"] != 0).flatten(1).sum(-1)
    some = counts > 0  # a map without any entry cannot change in proportion
    measures = {}
    moves = torch.randn(TRIALS, *x.shape, generator=generator)
    moves = LENGTH * moves / moves.flatten(2).norm(dim=-1)[..., None, None, None]
    for name, f in explain.items():
        before = largest(maps[name], counts)
        after = torch.stack([largest(f(x + move, y), counts) for move in moves])
        change = (after - before).norm(dim=-1)[:, some] / before.norm(dim=-1)[some]
        kept = ((after != 0) & (before != 0)).sum(-1)[:, some] / counts[some]
        measures[name] = {
            "zeros": (maps[name] == 0).float().mean().item(),
            "change": change.mean().item(),
            "largest pixels kept": kept.mean().item(),
        }
    return maps, measures


# -------------------------------------------------------------------------------------------------------------- figure


def draw(x: Tensor, maps: dict[str, Tensor], measures: dict[str, dict[str, float]], path: Path) -> None:
    """Maps of a few digits, and how much each kind of map changes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = range(min(4, len(x)))
    figure = plt.figure(figsize=(11, 5.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.1, 1))
    axes = left.subplots(len(shown), 1 + len(maps), squeeze=False)
    for row, i in zip(axes, shown, strict=True):
        row[0].imshow(x[i, 0].numpy(), cmap="gray_r")
        for axis, (name, values) in zip(row[1:], maps.items(), strict=True):
            limit = values[i].abs().max().item()
            axis.imshow(values[i, 0].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
            if i == 0:
                axis.set_title(name, fontsize=9)
    axes[0, 0].set_title("image", fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axis = right.subplots()
    names = list(measures)[::-1]
    bars = axis.barh(names, [measures[name]["change"] for name in names], color=[COLOURS[name] for name in names])
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set(xlabel=f"relative change of the map\nwhen the image moves by {LENGTH}")
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=30, help="test images that are explained")
    parser.add_argument("--steps", type=int, default=400, help="training steps of the network")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/moreau_grad"))
    options = parser.parse_args()
    if options.quick:
        options.images, options.steps = 6, 150
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    x_train, y_train, x_test, y_test = digits()
    model = train(x_train, y_train, options.steps)
    with torch.no_grad():
        accuracy = (model(x_test).argmax(-1) == y_test).float().mean().item()
    x, y = x_test[: options.images], y_test[: options.images]
    maps, measures = run(model, x, y)
    draw(x, maps, measures, options.out / "moreau_grad.png")
    (options.out / "results.json").write_text(json.dumps({"accuracy": accuracy, **measures}, indent=2))
    print(f"test accuracy {accuracy:.1%}")
    print(f"{'map':<20} {'zeros':>8} {'change':>8} {'largest pixels kept':>20}")
    for name, row in measures.items():
        print(f"{name:<20} {row['zeros']:>8.1%} {row['change']:>8.3f} {row['largest pixels kept']:>20.1%}")
    ratio = measures["sparse MoreauGrad"]["change"] / measures["gradient"]["change"]
    print(f"sparse MoreauGrad changes {ratio:.2f} times as much as the gradient")
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    if not options.quick:
        assert ratio < 0.8, f"expected a map that changes less than the gradient, got {ratio:.2f} times as much"


if __name__ == "__main__":
    main()
