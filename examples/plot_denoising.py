"""Learning how to denoise: the weights of total variation, and whole filters of a field of experts, by MAID.

The lower problem is a convex denoiser, the upper one compares its pictures with clean ones. Both levels see all
pictures at once, as one batch. MAID needs neither an accuracy of the lower problem nor a step length tuned: started
from accuracies a thousand times apart it ends at the same loss, which Nelder and Mead confirm for the two parameters of
total variation. A field of experts has some hundred parameters, where they would be of no help; it starts as the
learned total variation.

    python examples/plot_denoising.py [--quick] [--full] [--out out/denoising]

``--full`` works on 96x96 pixels instead of 64x64, with 26 filters of 5x5 instead of 10 of 3x3 (some minutes).

Source: M. S. Salehi, S. Mukherjee, L. Roberts, M. J. Ehrhardt, An adaptively inexact first-order method for bilevel
optimization with application to hyperparameter learning, 2023, section 4.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from difflayers.bilevel import HOAG, MAID, ArgminLayer, Bilevel, Smoothness
from difflayers.implicit import LBFGS

NOISE = 0.1
TRAINING = {"camera": (90, 170), "coins": (60, 60), "chelsea": (50, 110), "coffee": (110, 200)}
TEST = {"astronaut": (0, 130), "rocket": (60, 250), "immunohistochemistry": (150, 150), "moon": (250, 60)}
STARTS = (1e-1, 1e0, 1e1, 1e2)
TIGHT = LBFGS(rtol=1e-7, max_steps=3000)


def pictures(places: dict[str, tuple[int, int]], size: int) -> Tensor:
    """Grey crops ``(pictures, 1, size, size)`` of pictures that scikit-image ships."""
    from skimage import color, data, transform, util

    crops = []
    for name, (row, column) in places.items():
        picture = util.img_as_float(getattr(data, name)())
        picture = color.rgb2gray(picture) if picture.ndim == 3 else picture
        crop = picture[row : row + 192, column : column + 192]
        crops.append(transform.resize(crop, (size, size), anti_aliasing=True))
    return torch.from_numpy(np.stack(crops)).unsqueeze(1)


def noise(clean: Tensor, seed: int) -> Tensor:
    """The pictures with Gaussian noise."""
    return clean + NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed), dtype=clean.dtype)


def psnr(x: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over the pictures."""
    return float((-10 * (x - clean).square().mean((1, 2, 3)).log10()).mean())


def smooth_abs(t: Tensor, rounding: Tensor) -> Tensor:
    """The absolute value, rounded off at zero."""
    return (t.square() + (2 * rounding).exp()).sqrt()


def upper(x: Any, y: Tensor, clean: Tensor) -> Tensor:
    return (y - clean).square().sum() / (2 * len(y))


def total_variation(x: Tensor, y: Tensor, noisy: Tensor) -> Tensor:
    """``x``: logarithms of the weight and of the rounding."""
    across = smooth_abs(y[..., 1:] - y[..., :-1], x[1]).sum()
    down = smooth_abs(y[..., 1:, :] - y[..., :-1, :], x[1]).sum()
    return ((y - noisy).square().sum() + x[0].exp() * (across + down)) / (2 * len(y))


def field_of_experts(x: dict[str, Tensor], y: Tensor, noisy: Tensor) -> Tensor:
    """``x``: filters, logarithms of their weights, and that of the rounding."""
    filters = actual(x["filters"]).unsqueeze(1)
    answers = F.conv2d(F.pad(y, (filters.shape[-1] // 2,) * 4, mode="replicate"), filters)
    experts = x["weights"].exp() @ smooth_abs(answers, x["rounding"]).sum((0, 2, 3))
    return ((y - noisy).square().sum() / 2 + experts) / len(y)


def actual(filters: Tensor) -> Tensor:
    """Filters that see no constant, in a unit that makes their gradients about as long as those of the weights."""
    return 0.3 * (filters - filters.mean((1, 2), keepdim=True))


def cosines(size: int) -> Tensor:
    """The filters of a discrete cosine transform but the constant one, ``(size^2 - 1, size, size)``."""
    k = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi * k.unsqueeze(1) * (k + 0.5) / size)
    filters = torch.einsum("ai,bj->abij", waves, waves).reshape(-1, size, size)[1:]
    return filters / filters.flatten(1).norm(dim=1)[:, None, None] / 0.3


def from_variation(x: Tensor, size: int) -> dict[str, Tensor]:
    """Total variation as a field of experts of two filters, and faint cosines to go on with."""
    filters, middle = cosines(size), size // 2
    differences = filters.new_zeros(2, size, size)
    differences[:, middle, middle] = -1 / 0.3
    differences[0, middle, middle + 1] = differences[1, middle + 1, middle] = 1 / 0.3
    weights = torch.cat([(x[0] - math.log(2)).expand(2), filters.new_full((len(filters),), -6.0)])
    return {"filters": torch.cat([differences, filters]), "weights": weights, "rounding": x[1]}


@dataclass
class Run:
    """What a method was seen to do: work so far, where it was, the accuracies MAID asked for."""

    work: list[int]
    x: list[Any]
    epsilon: list[float]


def work_of(counts: Any) -> int:
    """Gradients of the lower objective and products with its second derivatives."""
    return counts["lower"] + counts["hvp"] + counts["cross"] + 2 * counts["cross_t"]  # the last takes two passes


def follow(name: str, algo: Any, clean: Tensor, noisy: Tensor, budget: int) -> Run:
    """Runs a method until it rests or has spent its budget."""
    run = Run([0], [algo.x], [])
    with tqdm(total=budget, desc=name, leave=False) as bar:
        while run.work[-1] < budget:
            stats = algo.step(clean, noisy)
            run.work.append(work_of(algo.counts))
            run.x.append(algo.x)
            run.epsilon.append(getattr(stats, "epsilon", math.nan))
            bar.update(run.work[-1] - run.work[-2])
            if getattr(stats, "outcome", "moved") != "moved":
                break
    return run


class Denoiser:
    """A lower problem with its training pictures: methods, tight solves, the loss that counts."""

    def __init__(self, lower: Any, x0: Any, clean: Tensor, noisy: Tensor) -> None:
        self.problem, self.x0, self.clean, self.noisy = Bilevel(upper, lower), x0, clean, noisy
        self.layer = ArgminLayer(self.problem, solver=TIGHT)
        # the data term makes H at least 1 / N and the upper Hessian 1 / N; the other constants are estimated
        share = 1 / len(clean)
        self.known = Smoothness(strong_convexity=share, upper=share, upper_in_x=0.0)

    def maid(self, **options: Any) -> MAID:
        return MAID(self.problem, self.x0, self.noisy, smoothness=self.known, tol=1e-3, **options)

    @torch.no_grad()
    def apply(self, x: Any, noisy: Tensor, init: Tensor | None = None) -> Tensor:
        """The denoised pictures, solved tightly."""
        return self.layer(x, noisy, init=noisy if init is None else init)

    def losses(self, run: Run) -> list[float]:
        """The true loss along a run."""
        y, values = self.noisy, []
        for x in run.x:
            y = self.apply(x, self.noisy, y)
            values.append(float(upper(None, y, self.clean)))
        return values


def nelder_mead(denoiser: Denoiser) -> tuple[np.ndarray, float]:
    """The best two parameters without any derivative: tight solves alone."""
    from scipy.optimize import minimize

    last = [denoiser.noisy]

    def loss(x: np.ndarray) -> float:
        last[0] = denoiser.apply(torch.from_numpy(x), denoiser.noisy, last[0])
        return float(upper(None, last[0], denoiser.clean))

    options = {"xatol": 1e-2, "fatol": 1e-4, "maxiter": 120, "initial_simplex": [[-3, -3], [-2, -3], [-3, -4]]}
    found = minimize(loss, [-3, -3], method="Nelder-Mead", options=options)
    return found.x, float(found.fun)


def chambolle(noisy: Tensor, weight: float) -> Tensor:
    """Total variation as scikit-image solves it."""
    from skimage.restoration import denoise_tv_chambolle

    return torch.stack([torch.from_numpy(denoise_tv_chambolle(image[0].numpy(), weight))[None] for image in noisy])


def best_chambolle(clean: Tensor, noisy: Tensor) -> float:
    """Its weight with the smallest error on the training pictures."""
    weights = np.geomspace(0.02, 0.3, 25)
    return float(min(weights, key=lambda w: (chambolle(noisy, w) - clean).square().mean()))


def draw_runs(runs: dict[str, Run], losses: dict[str, list[float]], best: float, path: Path) -> None:
    """Loss above the best that Nelder and Mead found, and the accuracies asked for, against work."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    blues = iter(plt.get_cmap("Blues")(np.linspace(0.4, 1, len(STARTS))))
    dashes = iter(("-", "--"))
    for name, run in runs.items():
        maid = name.startswith("MAID")
        colour = next(blues) if maid else "#c05a1c" if name == "HOAG" else "#6b6b6b"
        style = {"color": colour, "linewidth": 1.5, "linestyle": next(dashes) if "fixed" in name else "-"}
        above = [value / best - 1 for value in losses[name]]
        axes[0].plot(run.work, above, label=name, marker="o", markersize=3, **style)
        if maid:
            axes[1].plot(run.work[1:], run.epsilon, label=name, marker="o", markersize=3, **style)
    axes[0].set(yscale="log", ylabel="loss above the best of Nelder-Mead, relative")
    axes[1].set(yscale="log", ylabel="accuracy asked of the lower solution")
    axes[0].legend(frameon=False, fontsize=8.5)
    axes[1].legend(frameon=False, fontsize=8.5)
    for axis in axes:
        axis.set_xlabel("gradients of the lower objective and products with its second derivatives")
        axis.xaxis.label.set_size(8.5)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_pictures(columns: dict[str, Tensor], clean: Tensor, filters: Tensor, weights: Tensor, path: Path) -> None:
    """Test pictures as every method leaves them, and the learned filters by their weight."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 6.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3, 1.15])
    axes = top.subplots(2, len(columns))
    for axis_column, (name, images) in zip(axes.T, columns.items(), strict=True):
        for axis, image in zip(axis_column, images, strict=False):
            axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        shown = name if images is clean else f"{name}\n{psnr(images, clean):.2f} dB"
        axis_column[0].set_title(shown, fontsize=10)
    strength = weights.exp() * filters.flatten(1).norm(dim=1)
    order = strength.argsort(descending=True)
    rows = 2 if len(filters) > 12 else 1
    for axis, i in zip(bottom.subplots(rows, -(-len(filters) // rows)).flat, order, strict=True):
        size = filters[i].abs().max()
        axis.imshow(filters[i].numpy(), cmap="RdBu", vmin=-size, vmax=size)
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{float(strength[i]):.3f}", fontsize=8)
    bottom.suptitle("learned filters, and weight times length", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="96x96 pixels and 26 filters of 5x5")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/denoising"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    size, width, budget, longer = 64, 3, 1400, 3000
    if options.full:
        size, width, budget, longer = 96, 5, 3000, 6000
    if options.quick:
        size, width, budget, longer = 24, 3, 600, 100
    clean, test = pictures(TRAINING, size), pictures(TEST, size)
    noisy, test_noisy = noise(clean, 0), noise(test, 1)
    f64 = {"dtype": torch.float64}

    variation = Denoiser(total_variation, torch.tensor([-5.0, -5.0], **f64), clean, noisy)
    best_x, best = nelder_mead(variation)
    algorithms = {f"MAID from {e:g}": variation.maid(epsilon=e, delta=e) for e in STARTS}
    for accuracy in (1e-5, 1e-8):  # never looser
        algorithms[f"fixed accuracy {accuracy:g}"] = variation.maid(epsilon=accuracy, delta=accuracy, relax=1.0)
    algorithms["HOAG"] = HOAG(variation.problem, variation.x0, noisy)
    runs = {name: follow(name, algo, clean, noisy, budget) for name, algo in algorithms.items()}
    losses = {name: variation.losses(run) for name, run in runs.items()}
    draw_runs(runs, losses, best, options.out / "loss.png")
    ends = {name: values[-1] for name, values in losses.items()}
    near = {
        name: next((w for w, value in zip(run.work, losses[name], strict=True) if value < 1.001 * best), None)
        for name, run in runs.items()
    }

    x_variation = runs["MAID from 0.1"].x[-1]
    experts = Denoiser(field_of_experts, from_variation(x_variation, width), clean, noisy)
    learned = follow("field of experts", experts.maid(), clean, noisy, longer)
    x = learned.x[-1]
    weight = best_chambolle(clean, noisy)
    columns = {
        "clean": test,
        "noisy": test_noisy,
        "Chambolle, tuned": chambolle(test_noisy, weight),
        "total variation, MAID": variation.apply(x_variation, test_noisy),
        "field of experts, MAID": experts.apply(x, test_noisy),
    }
    draw_pictures(columns, test, actual(x["filters"]), x["weights"], options.out / "pictures.png")
    quality = {name: psnr(images, test) for name, images in columns.items() if images is not test}
    quality["field of experts, its start"] = psnr(experts.apply(learned.x[0], test_noisy), test)
    fits = [float(upper(None, experts.apply(at, noisy), clean)) for at in (learned.x[0], x)]
    parameters = sum(t.numel() for t in x.values())
    results = {
        "loss at the end": ends, "Nelder-Mead": best, "work to 0.1 per cent above": near, "test PSNR": quality,
        "parameters": parameters, "training loss of the field of experts": fits,
    }  # fmt: skip
    (options.out / "results.json").write_text(json.dumps(results, indent=2))
    print(f"Nelder-Mead: loss {best:.4f} at {np.round(best_x, 2)}")
    for name, value in ends.items():
        end = runs[name].x[-1].numpy().round(2)
        print(f"{name:<24} loss {value:.4f} at {end}, within 0.1 per cent after {near[name]}")
    for name, value in quality.items():
        print(f"{name:<27} {value:.2f} dB on the test pictures")
    print(f"{parameters} parameters in the field of experts, training loss from {fits[0]:.3f} to {fits[1]:.3f}")
    if not options.quick:
        maid = [ends[f"MAID from {e:g}"] for e in STARTS]
        assert max(maid) <= 1.003 * best and max(maid) <= 1.002 * min(maid)
        work = [near[f"MAID from {e:g}"] for e in STARTS]
        assert sum(work) / len(work) < near["fixed accuracy 1e-08"] and max(work) < near["HOAG"]
        assert work[0] < near["fixed accuracy 1e-05"]
        assert quality["total variation, MAID"] > quality["noisy"] + 5
        assert quality["total variation, MAID"] > quality["Chambolle, tuned"] - 0.3  # isotropic, which this one is not
        assert fits[1] < 0.96 * best  # on few small pictures the test follows it slowly
        assert quality["field of experts, MAID"] > quality["total variation, MAID"]
    print(f"{time.perf_counter() - start:.0f} s; figures and numbers in {options.out}")
    return options.out


if __name__ == "__main__":
    main()
