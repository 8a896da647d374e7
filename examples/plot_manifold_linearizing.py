"""Clustering digits without labels: doubly stochastic neighbours, and features that are learned with them.

Spectral clustering of 300 digits, by three affinities: the cosines of the pictures; their projection onto doubly
stochastic matrices, which gives every picture as many neighbours as all others; and that projection for features that
manifold linearizing and clustering has learned from the same pictures, by maximising the rate of all features less the
rate of the neighbourhoods. Labels serve to count errors; gamma and the number of steps were chosen on the first draw of
300 digits, and are the same for all.

    python examples/plot_manifold_linearizing.py [--quick] [--draws 3] [--steps 40] [--out out/manifold_linearizing]

Source: T. Ding et al., Unsupervised Manifold Linearizing and Clustering, 2023. There the features come from a deep
network on augmented pictures; here from a linear map of 64 pixels, which starts as the principal components.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from difflayers.transport import ManifoldLinearizing, doubly_stochastic

COUNT, DIMENSION = 300, 32
GAMMA, DISTORTION = 0.2, 0.5
NAMES = ("cosines", "projected", "learned")


def digits(seed: int) -> tuple[Tensor, np.ndarray]:
    """Centred pictures of unit length and their labels."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    picked = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:COUNT]
    x = torch.tensor(x / 16, dtype=torch.float32)[picked]
    return F.normalize(x - x.mean(0), dim=-1), labels[picked.numpy()]


def learn(x: Tensor, steps: int, name: str) -> tuple[Tensor, list[float]]:
    """The membership of learned features, and the loss on the way."""
    components = torch.linalg.svd(x, full_matrices=False).Vh[:DIMENSION]
    heads = [nn.Linear(x.shape[-1], DIMENSION, bias=False) for _ in range(2)]
    for head in heads:
        head.weight.data.copy_(components)
    loss = ManifoldLinearizing(gamma=GAMMA, distortion=DISTORTION)
    optimizer = torch.optim.Adam([p for head in heads for p in head.parameters()], 3e-3)
    values = []
    for _ in tqdm(range(steps), desc=name, mininterval=1.0):
        optimizer.zero_grad()
        value = loss(*(head(x) for head in heads))
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    with torch.no_grad():
        return loss.membership(heads[1](x)), values


def spectral(affinity: Tensor) -> np.ndarray:
    """Ten clusters of a nonnegative affinity."""
    from sklearn.cluster import SpectralClustering

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # affinities of zero
        method = SpectralClustering(10, affinity="precomputed", random_state=0, n_init=10)
        return method.fit_predict(affinity.clamp(min=0).double().numpy())


def accuracy(clusters: np.ndarray, labels: np.ndarray) -> float:
    """Share that is right under the best naming of the clusters."""
    from scipy.optimize import linear_sum_assignment

    table = np.zeros((10, 10))
    np.add.at(table, (clusters, labels), 1)
    return float(table[linear_sum_assignment(-table)].sum() / len(labels))


def within(affinity: Tensor, labels: np.ndarray) -> float:
    """Share of the affinity between different pictures that joins pictures of one digit."""
    same = torch.from_numpy(labels[:, None] == labels)
    others = affinity.clamp(min=0) * (1 - torch.eye(len(labels)))
    return float(others[same].sum() / others.sum())


def draw(affinities: dict[str, Tensor], labels: np.ndarray, curves: list, table: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    order = np.argsort(labels, kind="stable")
    edges = np.flatnonzero(np.diff(labels[order])) + 0.5
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.7), layout="constrained")
    titles = {"cosines": "cosines", "projected": "doubly stochastic", "learned": "doubly stochastic, learned"}
    for ax, (name, affinity) in zip(axes, affinities.items(), strict=False):
        matrix = affinity[order][:, order].clamp(min=0)
        matrix = matrix / torch.quantile(matrix, 0.98)
        ax.imshow(matrix.numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        for edge in edges:
            ax.axhline(edge, color="white", linewidth=0.3)
            ax.axvline(edge, color="white", linewidth=0.3)
        ax.set_title(f"{titles[name]}\n{100 * table[name]['accuracy'][0]:.0f} % right")
        ax.set_xticks([])
        ax.set_yticks([])
    axes[0].set_ylabel("digits of the first draw, by label")
    for values in curves:
        axes[3].plot(values)
    axes[3].set(xlabel="step", title="minus the rate reduction,\none line for each draw")
    axes[3].spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/manifold_linearizing"))
    options = parser.parse_args()
    if options.quick:
        options.draws, options.steps = 1, 5
    options.out.mkdir(parents=True, exist_ok=True)
    from sklearn.metrics import normalized_mutual_info_score

    torch.set_num_threads(1)
    start = time.perf_counter()
    table: dict[str, dict[str, list[float]]] = {n: {"accuracy": [], "information": [], "within": []} for n in NAMES}
    curves, first = [], None
    for seed in range(options.draws):
        x, labels = digits(seed)
        cosines = x @ x.T
        learned, values = learn(x, options.steps, f"draw {seed}")
        affinities = dict(zip(NAMES, (cosines, doubly_stochastic(cosines, GAMMA), learned), strict=True))
        first = first or (affinities, labels)
        curves.append(values)
        for name, affinity in affinities.items():
            clusters = spectral(affinity)
            table[name]["accuracy"].append(accuracy(clusters, labels))
            table[name]["information"].append(float(normalized_mutual_info_score(labels, clusters)))
            table[name]["within"].append(within(affinity, labels))

    print(f"\n{'affinity':>10} {'accuracy':>10} {'mutual information':>20} {'weight within digits':>22}")
    means = {name: {key: float(np.mean(values)) for key, values in row.items()} for name, row in table.items()}
    for name, row in means.items():
        print(f"{name:>10} {row['accuracy']:10.3f} {row['information']:20.3f} {row['within']:22.3f}")
    each = {name: [round(v, 3) for v in row["accuracy"]] for name, row in table.items()}
    print(f"accuracy of each draw: {each}. {time.perf_counter() - start:.0f} s")
    (options.out / "results.json").write_text(json.dumps({"table": table, "loss": curves}, indent=2))
    draw(*first, curves, table, options.out / "manifold_linearizing.png")
    if not options.quick:
        assert all(values[-1] < values[0] for values in curves), "the loss should fall"
        assert means["projected"]["within"] > means["cosines"]["within"] + 0.05, "neighbours should be of one digit"
    if options.steps >= 40:
        assert means["learned"]["within"] > means["projected"]["within"] + 0.05, "and more so when learned"
        assert means["learned"]["accuracy"] > means["cosines"]["accuracy"] + 0.03, "learning should help"


if __name__ == "__main__":
    main()
