"""Self-labelling digits: a network that learns from labels which it gives itself, in clusters of equal size.

Rounds alternate two steps. The network's predictions for all pictures are turned into labels,

    min_Q -<Q, log p> + eps KL(Q | b a^T)  subject to  Q 1 = 1 / N, Q^T 1 = 1 / K,

and the network is trained on these labels with pictures that are shifted, turned and scaled a little. No digit's name
is used. Without the condition on the columns, labels are the largest predictions, and all pictures end up in few
clusters. How well clusters agree with the ten digits is measured by normalised mutual information (NMI), as it is for
K-means.

    python examples/plot_self_label.py [--quick] [--seeds 3] [--rounds 24] [--out out/self_label]

Source: Y. M. Asano, C. Rupprecht, A. Vedaldi, Self-labelling via simultaneous clustering and representation learning,
2020.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from difflayers.transport import self_label

CLUSTERS = 10
BATCH = 150
EPS = 0.04
METHODS = {"equal sizes": "#1f5fa8", "largest prediction": "#d9822b"}


def digits() -> tuple[Tensor, np.ndarray]:
    """Pictures of 8 x 8 pixels in [-1, 1], and the digits they show."""
    from sklearn.datasets import load_digits

    x, names = load_digits(return_X_y=True)
    return torch.tensor(x / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8), names


def agreement(labels: Tensor, names: np.ndarray) -> float:
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(names, labels.numpy()))


def changed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures turned by up to 15 degrees, scaled by up to a tenth and shifted by up to a pixel, with some noise."""
    angle, scale, *shift = (2 * torch.rand(4, len(x), generator=generator) - 1).unbind()
    angle, scale = angle * math.pi / 12, 1 + scale / 10
    rows = [scale * angle.cos(), -angle.sin(), shift[0] / 4, angle.sin(), scale * angle.cos(), shift[1] / 4]
    grid = F.affine_grid(torch.stack(rows, -1).reshape(-1, 2, 3), list(x.shape), align_corners=False)
    moved = F.grid_sample(x + 1, grid, align_corners=False) - 1
    return moved + 0.1 * torch.randn(x.shape, generator=generator)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, CLUSTERS),
    )


def train(x: Tensor, names: np.ndarray, seed: int, rounds: int, *, balanced: bool, bar: tqdm) -> dict:
    """Rounds of labelling and learning: NMI and the share of the largest cluster in each, and the last labels."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = network()
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    history: dict = {"nmi": [], "largest": []}
    for _ in range(rounds):
        model.eval()
        with torch.no_grad():
            log_probs = model(x).log_softmax(-1)
        labels = self_label(log_probs, eps=EPS) if balanced else log_probs.argmax(-1)
        history["nmi"].append(agreement(labels, names))
        history["largest"].append(float(labels.bincount().max()) / len(x))
        model.train()
        for index in torch.randperm(len(x), generator=generator).split(BATCH):
            optimiser.zero_grad()
            F.cross_entropy(model(changed(x[index], generator)), labels[index]).backward()
            optimiser.step()
        bar.update()
    history["labels"] = labels
    return history


def k_means(x: Tensor, names: np.ndarray, seed: int) -> float:
    from sklearn.cluster import KMeans

    found = KMeans(CLUSTERS, n_init=10, random_state=seed).fit_predict(x.flatten(1).numpy())
    return agreement(torch.tensor(found), names)


def draw(x: Tensor, runs: dict, means: list[float], path: Path) -> None:
    """Agreement and largest cluster over rounds, and pictures of every cluster of the first run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", width_ratios=(1.1, 1.1, 1))
    for name, colour in METHODS.items():
        for axis, key in zip(axes, ("nmi", "largest"), strict=False):
            curves = np.array([run[key] for run in runs[name]])
            axis.plot(curves.T, color=colour, alpha=0.35, linewidth=1)
            axis.plot(curves.mean(0), color=colour, linewidth=2.2, label=name)
    axes[0].axhline(np.mean(means), color="0.35", linestyle="--", label="K-means")
    axes[1].axhline(1 / CLUSTERS, color="0.35", linestyle=":", label="equal")
    axes[0].set(xlabel="round", ylabel="NMI with the digits", ylim=(0, 1), title="agreement")
    axes[1].set(xlabel="round", ylabel="share of all pictures", ylim=(0, 1), title="largest cluster")
    for axis in axes[:2]:
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    labels = runs["equal sizes"][0]["labels"]
    tiles = np.full((CLUSTERS * 9 + 1, 12 * 9 + 1), 0.0)
    for k in range(CLUSTERS):
        for j, i in enumerate((labels == k).nonzero().flatten()[:12].tolist()):
            tiles[k * 9 + 1 : k * 9 + 9, j * 9 + 1 : j * 9 + 9] = -x[i, 0].numpy()
    axes[2].imshow(tiles, cmap="gray", vmin=-1, vmax=1)
    axes[2].set(title="one cluster a row", xticks=[], yticks=[])
    axes[2].spines[:].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs from different networks")
    parser.add_argument(
        "--rounds", type=int, default=24, help="labellings, each followed by one pass over the pictures"
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/self_label"))
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.rounds = 1, 3
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    x, names = digits()
    with tqdm(total=2 * options.seeds * options.rounds, desc="rounds", mininterval=1.0) as bar:
        runs = {
            name: [
                train(x, names, seed, options.rounds, balanced=name == "equal sizes", bar=bar)
                for seed in range(options.seeds)
            ]
            for name in METHODS
        }
    means = [k_means(x, names, seed) for seed in range(options.seeds)]
    draw(x, runs, means, options.out / "self_label.png")
    nmi = {name: [run["nmi"][-1] for run in group] for name, group in runs.items()} | {"K-means": means}
    largest = {name: [run["largest"][-1] for run in group] for name, group in runs.items()}
    (options.out / "results.json").write_text(json.dumps({"nmi": nmi, "largest cluster": largest}, indent=2))
    for what, table in (("NMI", nmi), ("largest cluster", largest)):
        for name, values in table.items():
            print(f"{what}, {name}: mean {np.mean(values):.3f}, {min(values):.3f} to {max(values):.3f}")
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    if options.rounds >= 20:
        assert max(largest["equal sizes"]) < 1.05 / CLUSTERS
        assert min(nmi["equal sizes"]) > max(means) + 0.05  # about 0.85 against 0.74
        assert min(largest["largest prediction"]) > 0.4
        assert max(nmi["largest prediction"]) < min(means)


if __name__ == "__main__":
    main()
