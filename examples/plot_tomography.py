"""Limited-angle tomography: scikit-image's phantom with a third of the angles missing, by `restore`.

The operator is a Radon transform in a few lines of torch: rotate and sum. Its adjoint comes by automatic
differentiation, and so does its norm. Filtered back projection smears what the missing angles would have told; total
variation as the prior of plug-and-play ADMM puts it back.

    python examples/plot_tomography.py [--quick] [--full] [--out out/tomography]

``--full`` works on 128x128 pixels instead of 64x64.

Source: Z. Fang, S. Buchanan, J. Sulam, What's in a Prior? Learned Proximal Networks for Inverse Problems, ICLR 2024,
section 5.3 (there with a learned prior).
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from difflayers import SolveWarning
from difflayers.proximal import ADMM, ProximalGradient, Restoration, restore

DEGREES = np.linspace(-60, 60, 60)
NOISE = 0.01
VARIATION = 6e-4  # weight of total variation against the data term


def phantom(size: int) -> Tensor:
    """The Shepp-Logan phantom ``(1, 1, size, size)``."""
    from skimage.data import shepp_logan_phantom
    from skimage.transform import resize

    return torch.from_numpy(resize(shepp_logan_phantom(), (size, size), anti_aliasing=True)).float()[None, None]


def radon(size: int) -> Callable[[Tensor], Tensor]:
    """The operator ``(batch, 1, size, size) -> (batch, 1, angles, size)``: means along lines at every angle."""
    angle = torch.from_numpy(DEGREES).float() * math.pi / 180
    c, s = angle.cos(), angle.sin()
    centre = 1 / size  # the axis of scikit-image: the middle of pixel size // 2, in units of half an image
    turn = torch.stack(
        [torch.stack([c, s, (1 - c - s) * centre], -1), torch.stack([-s, c, (1 - c + s) * centre], -1)], 1
    )
    grid = F.affine_grid(turn, [len(angle), 1, size, size], align_corners=False).reshape(1, -1, size, 2)

    def operator(x: Tensor) -> Tensor:
        rotated = F.grid_sample(x, grid.expand(len(x), -1, -1, -1), align_corners=False)
        return rotated.unflatten(2, (len(angle), size)).mean(-2)

    return operator


def back_projection(sinogram: Tensor, size: int) -> Tensor:
    """Filtered back projection by scikit-image, of the angles there are."""
    from skimage.transform import iradon

    image = iradon(sinogram[0, 0].T.numpy() * size, theta=DEGREES, circle=True)
    share = (DEGREES[-1] - DEGREES[0]) / 180
    return torch.from_numpy(image).float()[None, None] * share


def total_variation(weight: float) -> Callable[[Tensor], Tensor]:
    """The prox of total variation, by scikit-image."""
    from skimage.restoration import denoise_tv_chambolle

    def prox(x: Tensor) -> Tensor:
        done = [denoise_tv_chambolle(image[0].numpy(), weight, eps=1e-6, max_num_iter=200) for image in x]
        return torch.stack([torch.from_numpy(image) for image in done]).unsqueeze(1).to(x)

    return prox


def psnr(x: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio in dB."""
    return -10 * math.log10((x.clamp(0, 1) - clean).square().mean())


@torch.no_grad()
def run(size: int, steps: int) -> tuple[dict[str, Tensor], Restoration]:
    """The images, and the run of ADMM."""
    clean, operator = phantom(size), radon(size)
    sinogram = operator(clean)
    sinogram = sinogram + NOISE * torch.randn(sinogram.shape, generator=torch.Generator().manual_seed(0))
    start = back_projection(sinogram, size)
    with warnings.catch_warnings():
        # with a penalty above ||A^T A|| ADMM converges for learned priors too; for a convex one any penalty will do
        warnings.simplefilter("ignore", SolveWarning)
        solver = ADMM(penalty=0.01, rtol=1e-3, max_steps=steps)
        admm = restore(sinogram, operator, total_variation(VARIATION / 0.01), solver=solver, init=start)
        ridge = restore(
            sinogram, operator, lambda x: x / 1.01, solver=ProximalGradient(rtol=1e-3, max_steps=steps), init=start
        )
    return {
        "phantom": clean,
        "filtered back projection": start,
        "ridge": ridge.value,
        "total variation": admm.value,
    }, admm


def draw(images: dict[str, Tensor], admm: Restoration, path: Path) -> None:
    """The images side by side, and the run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(images) + 1, figsize=(13, 2.9), layout="constrained")
    clean = images["phantom"]
    for axis, (name, image) in zip(axes, images.items(), strict=False):
        axis.imshow(image[0, 0].numpy(), cmap="gray", vmin=0, vmax=0.6)
        shown = name if image is clean else f"{name}\n{psnr(image, clean):.1f} dB"
        axis.set(xticks=[], yticks=[])
        axis.set_title(shown, fontsize=10)
    axes[-1].plot(admm.residuals[:, 0].numpy(), color="#1f5fa8")
    axes[-1].set(yscale="log", xlabel="step of ADMM")
    axes[-1].set_title("length of the step", fontsize=10)
    axes[-1].spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="128x128 pixels")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/tomography"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    size = 128 if options.full else 16 if options.quick else 64
    images, admm = run(size, 3 if options.quick else 60)
    draw(images, admm, options.out / "phantom.png")
    measures = {name: psnr(image, images["phantom"]) for name, image in images.items() if name != "phantom"}
    (options.out / "results.json").write_text(json.dumps(measures, indent=2))
    for name, value in measures.items():
        print(f"{name:<26} {value:.2f} dB")
    if not options.quick:
        assert measures["total variation"] >= measures["filtered back projection"] + 1.5
        assert measures["total variation"] >= measures["ridge"] + 0.5
    print(f"{int(admm.steps)} steps of ADMM, {time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    return options.out


if __name__ == "__main__":
    main()
