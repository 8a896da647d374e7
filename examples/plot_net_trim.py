"""Net-Trim on digits: convex pruning of a trained network, layer by layer, against pruning by magnitude.

A network 64 - 60 - 30 - 10 is trained on pictures of digits. Each of its layers is then replaced by the one of least
absolute sum that keeps the layer's responses to 500 training pictures, up to a tolerance:

    min ||U||_1   s.t.   ||(X U^T - Y)_on|| <= tolerance * ||Y_on||,   (X U^T)_off <= 0.

No retraining, no labels. Pruning by magnitude removes as many weights of each layer, the smallest, so that both
networks have the same number of weights in every layer.

    python examples/plot_net_trim.py [--quick] [--seeds 3] [--out out/net_trim]

Source: A. Aghasi, A. Abdi, N. Nguyen, J. Romberg, Net-Trim: Convex Pruning of Deep Neural Networks with Performance
Guarantee, 2017.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from difflayers.relu import net_trim

WIDTHS = (64, 60, 30, 10)
TOLERANCES = (0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3)
SAMPLES = 500


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures and labels: 1200 to learn from, 597 to test on."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    x, labels = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    learn, test = order[:1200], order[1200:]
    return x[learn], labels[learn], x[test], labels[test]


def train(x: Tensor, labels: Tensor, seed: int, steps: int) -> nn.Sequential:
    """Adam with a little weight decay."""
    torch.manual_seed(seed)
    a, b, c, d = WIDTHS
    model = nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(), nn.Linear(c, d))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(steps):
        index = torch.randint(len(x), (128,))
        optimiser.zero_grad()
        F.cross_entropy(model(x[index]), labels[index]).backward()
        optimiser.step()
    return model


@torch.no_grad()
def trimmed(model: nn.Sequential, x: Tensor, tolerance: float) -> tuple[nn.Sequential, list[float]]:
    """Every layer for itself, on the responses of the whole network; and the sparsity of each."""
    parts, sparsity = [], []
    for part in model:
        if isinstance(part, nn.Linear):
            found = net_trim(part, x, tolerance=tolerance, relu=part.out_features != WIDTHS[-1])
            parts.append(found.layer)
            sparsity.append(found.sparsity)
        else:
            parts.append(copy.deepcopy(part))
        x = part(x)
    return nn.Sequential(*parts), sparsity


@torch.no_grad()
def by_magnitude(model: nn.Sequential, sparsity: list[float]) -> nn.Sequential:
    """The smallest weights of every layer set to zero, as many as asked for."""
    model = copy.deepcopy(model)
    for layer, share in zip((m for m in model if isinstance(m, nn.Linear)), sparsity, strict=True):
        smallest = layer.weight.abs().flatten().argsort()[: round(share * layer.weight.numel())]
        layer.weight.view(-1)[smallest] = 0
    return model


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """The share of right answers."""
    return (model(x).argmax(-1) == labels).double().mean().item()


def weights_left(model: nn.Sequential) -> float:
    """The share of all weights that are not zero."""
    weights = [m.weight for m in model if isinstance(m, nn.Linear)]
    return sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def study(seed: int, tolerances: tuple[float, ...], steps: int, samples: int) -> tuple[dict, list[nn.Sequential]]:
    """Sparsity and accuracy over the tolerance, of one network; and that network before and after, at one of them."""
    x, labels, test, test_labels = digits(seed)
    model = train(x, labels, seed, steps)
    rows: dict = {"whole": accuracy(model, test, test_labels), "sparsity": [], "net_trim": [], "magnitude": []}
    rows["layers"], shown = [], []
    for tolerance in tqdm(tolerances, desc=f"seed {seed}", mininterval=1.0):
        pruned, sparsity = trimmed(model, x[:samples], tolerance)
        rival = by_magnitude(model, sparsity)
        rows["layers"].append(sparsity)
        rows["sparsity"].append(1 - weights_left(pruned))
        rows["net_trim"].append(accuracy(pruned, test, test_labels))
        rows["magnitude"].append(accuracy(rival, test, test_labels))
        shown.append(pruned)
    return rows, [model, shown[-1 - min(3, len(shown) - 1)]]


def draw(tolerances: tuple[float, ...], rows: dict, shown: list[nn.Sequential], path: Path) -> None:
    """Accuracy over sparsity, sparsity of each layer over tolerance, and neurons of the first layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), layout="constrained", width_ratios=(1.5, 1.1, 0.8, 0.8))
    mean = lambda key: torch.tensor(rows[key], dtype=torch.float64).mean(0)  # noqa: E731
    for key, colour, name in (("net_trim", "#1f5fa8", "Net-Trim"), ("magnitude", "#d9822b", "smallest weights")):
        for sparsity, one in zip(rows["sparsity"], rows[key], strict=True):
            axes[0].plot(sparsity, one, "-", color=colour, alpha=0.25, linewidth=1)
        axes[0].plot(mean("sparsity"), mean(key), "o-", color=colour, markersize=4, label=name)
    axes[0].axhline(mean("whole"), color="#666666", linewidth=1, linestyle=":", label="the whole network")
    axes[0].set(
        xlabel="share of weights removed", ylabel="accuracy on unseen pictures", title="as many zeros in every layer"
    )
    axes[0].set_ylim(top=1.01)
    axes[0].legend(frameon=False, loc="lower left")
    layers = mean("layers")
    for k, colour in enumerate(("#12395f", "#1f5fa8", "#8fb3d9")):
        name = f"{WIDTHS[k]} to {WIDTHS[k + 1]}"
        axes[1].plot(tolerances, layers[:, k], "o-", color=colour, markersize=4, label=name)
    axes[1].legend(frameon=False, loc="lower right")
    axes[1].set(xlabel="tolerance", ylabel="share removed", title="of each layer", ylim=(0, 1))
    for axis, model, title in zip(axes[2:], shown, ("trained", "trimmed"), strict=True):
        strongest = shown[0][0].weight.norm(dim=1).argsort(descending=True)[:25]
        tiles = model[0].weight.detach()[strongest].reshape(5, 5, 8, 8)
        tiles = F.pad(tiles, (1, 1, 1, 1), value=float("nan")).movedim(2, 1).reshape(50, 50)
        axis.imshow(tiles.numpy(), cmap="RdBu", vmin=-0.6, vmax=0.6)
        axis.set(title=f"first layer, {title}", xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis in axes[:2]:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800, help="training steps of a network")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="pictures that the responses are kept on")
    parser.add_argument("--tolerances", type=float, nargs="+", default=TOLERANCES)
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/net_trim"))
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps, options.samples, options.tolerances = 1, 50, 100, TOLERANCES[::3]
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    tolerances = tuple(options.tolerances)
    found, shown = zip(
        *(study(s, tolerances, options.steps, options.samples) for s in range(options.seeds)), strict=True
    )
    rows = {key: [one[key] for one in found] for key in found[0]}
    draw(tolerances, rows, shown[0], options.out / "net_trim.png")
    (options.out / "results.json").write_text(json.dumps({"tolerances": tolerances, **rows}, indent=2))
    mean = {key: torch.tensor(value, dtype=torch.float64).mean(0) for key, value in rows.items()}
    print(f"the whole network: {mean['whole']:.1%}; mean of {options.seeds} networks")
    for k, tolerance in enumerate(tolerances):
        print(
            f"tolerance {tolerance:4.2f}: {mean['sparsity'][k]:5.1%} of the weights removed; accuracy "
            f"{mean['net_trim'][k]:.1%}, by magnitude {mean['magnitude'][k]:.1%}"
        )
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    if options.steps >= 500:
        assert bool((mean["net_trim"] >= mean["magnitude"] - 0.005).all())
        assert mean["net_trim"][0] > mean["whole"] - 0.01
        assert mean["sparsity"][0] > 0.3


if __name__ == "__main__":
    main()
