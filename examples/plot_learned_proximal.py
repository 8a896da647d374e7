"""Learned proximal networks: the prox and the prior of Laplacian data, learned from samples alone.

Clean numbers x have the density exp(-|x|) / 2. A network that is the gradient of a convex potential learns to remove
Gaussian noise of unit variance, first by the absolute error, then by proximal matching with ever narrower widths. It
ends near the prox of ``-log p``, which is soft thresholding, and its potential tells the prior: ``|x|`` up to a
constant.

    python examples/plot_learned_proximal.py [--quick] [--full] [--out out/learned_proximal]

``--full`` trains the published network with the published schedule (some minutes).

Source: Z. Fang, S. Buchanan, J. Sulam, What's in a Prior? Learned Proximal Networks for Inverse Problems, ICLR 2024,
section 5.1.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from difflayers.proximal import (
    InputConvexNetwork,
    LearnedProximal,
    MatchingSchedule,
    MatchingStage,
    prox_l1,
    train_proximal,
)

BLUE, ORANGE, GREY = "#1f5fa8", "#d9822b", "#999999"


def laplacian(count: int, generator: torch.Generator) -> Tensor:
    """Fresh samples ``(count, 1)`` of unit scale: the difference of two exponential ones."""
    return torch.log1p(-torch.rand(2, count, 1, generator=generator)).diff(dim=0).squeeze(0)


def evaluate(prox: LearnedProximal) -> dict[str, float]:
    """Distances to soft thresholding and to the absolute value; how well the prior's gradient and inverse agree."""
    prox = prox.double()
    y = torch.linspace(-3, 3, 601, dtype=torch.float64)[:, None]
    x = torch.linspace(-2, 2, 401, dtype=torch.float64)[:, None].requires_grad_()
    R = prox.prior(x)
    (slope,) = torch.autograd.grad(R.sum(), x)
    with torch.no_grad():
        error = (prox(y) - prox_l1(y, 1.0)).abs()
        distance = R - x.abs().squeeze(-1)
        distance = distance - (distance.max() + distance.min()) / 2  # the constant is free
        gap = slope - (prox.inverse(x) - x)
        h = 1e-5
        difference = (prox.prior(x + h) - prox.prior(x - h)) / (2 * h)
    return {
        "mean distance to soft thresholding": error.mean().item(),
        "largest distance to soft thresholding": error.max().item(),
        "largest distance of the prior": distance.abs().max().item(),
        "gradient of the prior against the inverse": gap.abs().max().item(),
        "gradient of the prior against differences": (slope.squeeze(-1) - difference).abs().max().item(),
    }


def draw(after_l1: Tensor, prox: LearnedProximal, losses: Tensor, schedule: MatchingSchedule, path: Path) -> None:
    """The learned prox and prior over the true ones, and the losses of the stages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    y = torch.linspace(-4, 4, 801, dtype=torch.float64)[:, None]
    x = torch.linspace(-2.5, 2.5, 501, dtype=torch.float64)[:, None]
    with torch.no_grad():
        soft, learned, prior = prox_l1(y, 1.0), prox(y), prox.prior(x)
        prior = prior - (prior - x.abs().squeeze(-1)).median()
        means = losses.unfold(0, min(50, len(losses)), 1).mean(-1)
    y, x, soft, learned, prior, means, after_l1 = (t.numpy() for t in (y, x, soft, learned, prior, means, after_l1))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    left.plot(y, soft, color="black", linewidth=1, label="soft thresholding")
    left.plot(y, after_l1, color=ORANGE, label="learned, absolute error")
    left.plot(y, learned, color=BLUE, label="learned, proximal matching")
    left.set(title="prox", xlabel="y", ylabel="f(y)")
    middle.plot(x, abs(x), color="black", linewidth=1, label="$|x|$")
    middle.plot(x, prior, color=BLUE, label="learned prior R(x)")
    middle.set(title="prior, up to a constant", xlabel="x", ylim=(-0.4, 2.8))
    right.plot(means, color=BLUE)
    for end in torch.tensor([s.steps for s in schedule.stages]).cumsum(0)[:-1].tolist():
        right.axvline(end, color=GREY, linewidth=0.5)
    right.set(title="loss of each stage", xlabel="training step")
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    middle.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def train(prox: LearnedProximal, schedule: MatchingSchedule, batch_size: int) -> tuple[Tensor, Tensor, float]:
    """The prox after the l1 stages (drawn), all losses, and seconds."""
    first = [s for s in schedule.stages if s.gamma is None]
    rest = [s for s in schedule.stages if s.gamma is not None]
    losses, seconds, after_l1 = [], 0.0, torch.zeros(0)
    for k, stages in enumerate((first, rest)):
        part = MatchingSchedule(tuple(stages))
        record = train_proximal(prox, laplacian, noise_std=1.0, schedule=part, batch_size=batch_size, seed=k)
        losses.append(record.losses)
        seconds += record.seconds
        if k == 0:
            with torch.no_grad():
                after_l1 = prox(torch.linspace(-4, 4, 801)[:, None])
    return after_l1, torch.cat(losses), seconds


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the published network and schedule")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/learned_proximal"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # a small network: threads would only wait for each other
    torch.manual_seed(0)
    start = time.perf_counter()
    schedule = MatchingSchedule.paper_scalar() if options.full else MatchingSchedule.fast_scalar()
    if options.quick:
        schedule = MatchingSchedule(
            (MatchingStage(steps=20, learning_rate=3e-3), MatchingStage(steps=10, learning_rate=1e-3, gamma=0.5))
        )
    size = {"hidden": 50, "layers": 4} if options.full else {"hidden": 32, "layers": 2}
    prox = LearnedProximal(InputConvexNetwork(1, **size))
    after_l1, losses, seconds = train(prox, schedule, batch_size=2000)
    measures = evaluate(prox)
    draw(after_l1, prox, losses, schedule, options.out / "laplacian.png")
    (options.out / "results.json").write_text(json.dumps(measures | {"seconds of training": seconds}, indent=2))
    for name, value in measures.items():
        print(f"{name:<45} {value:.3g}")
    if not options.quick:
        assert measures["mean distance to soft thresholding"] <= 0.12
        assert measures["largest distance to soft thresholding"] <= 0.30
        assert measures["largest distance of the prior"] <= 0.25
        assert measures["gradient of the prior against the inverse"] <= 1e-6
        assert measures["gradient of the prior against differences"] <= 1e-6
    print(f"trained in {seconds:.0f} s of {time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    return options.out


if __name__ == "__main__":
    main()
