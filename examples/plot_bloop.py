"""A network fits digits first and shifted digits second: Bloop against weighted sums of the two losses.

The main loss is the fit of 500 digits as they are, the auxiliary one the fit of the same digits shifted by a pixel. A
weighted sum gives up some of the first for the second, more with every weight. Bloop follows the gradient of the main
loss whole, and of the auxiliary one the part that is orthogonal to the moving average of the main gradients,

    d = g_main + weight (g_aux - <g_aux, m> / |m|^2 m),    m <- (1 - rho) m + rho g_main,

so that the weight says how fast the second loss is followed, not what the first pays for it. Both get the same network,
batches, number of steps and optimiser, and a range of weights.

What is shown is a front of finite training. At minima of the sums no method is better in both losses; and directions
that are orthogonal to an average of the past are so to the gradient only while steps are short: at a rate of 0.01, and
not 0.003 as here, the weighted sums are ahead. With rho = 0.1, and not 0.01, little of the lead is left. Other seeds
give the same picture; task, rate and rho were chosen after a look at a few.

    python examples/plot_bloop.py [--quick] [--steps 1000] [--out out/bloop]

Source: Y.-G. Hsieh, J. Thornton, E. Ndiaye, M. Klein, M. Cuturi, P. Ablin, Careful with that Scalpel: Improving
Gradient Surgery with an EMA, 2024.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from tqdm import tqdm

from difflayers.bilevel import Bloop

WEIGHTS = {"weighted sum": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), "Bloop": (0.1, 0.3, 1.0, 3.0, 10.0)}
COLOURS = {"weighted sum": "#d9822b", "Bloop": "#1f5fa8"}
SHIFTS = ((0, 1), (0, -1), (1, 0), (-1, 0))
RATE, RHO, BATCH = 0.003, 0.01, 128
Data = tuple[Tensor, Tensor]


def digits() -> tuple[Data, Data]:
    """Pictures ``(n, 8, 8)`` and labels: 500 to learn from, 1297 to test on."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    x, labels = torch.tensor(x / 16, dtype=torch.float32).view(-1, 8, 8), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    learn, test = order[:500], order[500:]
    return (x[learn], labels[learn]), (x[test], labels[test])


def shifted(x: Tensor, direction: int) -> Tensor:
    """Pictures moved by a pixel."""
    return torch.roll(x, SHIFTS[direction], dims=(1, 2))


def misfit(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of the outputs from the labels."""
    return (model(x) - one_hot(labels, 10)).square().sum(-1).mean()


def train(way: str, weight: float, data: Data, steps: int) -> nn.Module:
    """A network after training with one weight."""
    x, labels = data
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    bloop = Bloop(model, weight=weight, rho=RHO)
    draw = torch.Generator().manual_seed(1)
    for _ in tqdm(range(steps), desc=f"{way} {weight:g}", mininterval=1.0):
        batch = torch.randint(len(x), (BATCH,), generator=draw)
        direction = int(torch.randint(len(SHIFTS), (1,), generator=draw))
        main = misfit(model, x[batch], labels[batch])
        aux = misfit(model, shifted(x[batch], direction), labels[batch])
        optimizer.zero_grad()
        if way == "Bloop":
            bloop.backward(main, aux)
        else:
            (main + weight * aux).backward()
        optimizer.step()
    return model


@torch.no_grad()
def judge(model: nn.Module, data: Data, unseen: Data) -> dict[str, float]:
    """Both losses, and accuracies on unseen digits."""
    x, labels = data
    new, wanted = unseen
    return {
        "main": misfit(model, x, labels).item(),
        "auxiliary": sum(misfit(model, shifted(x, k), labels).item() for k in range(4)) / 4,
        "accuracy": (model(new).argmax(-1) == wanted).float().mean().item(),
        "accuracy shifted": sum((model(shifted(new, k)).argmax(-1) == wanted).float().mean().item() for k in range(4))
        / 4,
    }


def beaten(points: list[dict[str, float]], by: list[dict[str, float]]) -> int:
    """How many points have another one that is better in both losses."""
    return sum(any(q["main"] < p["main"] and q["auxiliary"] < p["auxiliary"] for q in by) for p in points)


def draw(fronts: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Losses on the training digits, accuracies on unseen ones; a point a weight."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for way, points in fronts.items():
        for axis, (a, b), scale in (
            (axes[0], ("main", "auxiliary"), 1),
            (axes[1], ("accuracy", "accuracy shifted"), 100),
        ):
            at = [scale * p[a] for p in points], [scale * p[b] for p in points]
            axis.plot(*at, "o-", color=COLOURS[way], label=way, markersize=5)
            for weight, *place in zip(WEIGHTS[way], *at, strict=True):
                axis.annotate(
                    f"{weight:g}", place, xytext=(5, 4), textcoords="offset points", color=COLOURS[way], fontsize=8
                )
    axes[0].set(xscale="log", xlabel="main loss: digits as they are", ylabel="auxiliary loss: shifted digits")
    axes[0].set_title("training digits, both to be small")
    axes[0].set_xticks([0.03, 0.05, 0.1, 0.2], ["0.03", "0.05", "0.1", "0.2"])
    axes[0].minorticks_off()
    axes[1].set(xlabel="accuracy, %", ylabel="accuracy on shifted digits, %", title="unseen digits, both to be large")
    axes[0].legend(frameon=False, title="numbers: weight")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="steps of each training")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/bloop"))
    options = parser.parse_args()
    if options.quick:
        options.steps = 40
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    data, unseen = digits()
    fronts = {
        way: [judge(train(way, weight, data, options.steps), data, unseen) for weight in weights]
        for way, weights in WEIGHTS.items()
    }
    draw(fronts, options.out / "bloop.png")
    of_sums = beaten(fronts["weighted sum"], fronts["Bloop"])
    of_bloop = beaten(fronts["Bloop"], fronts["weighted sum"])
    results = {"fronts": fronts, "weights": WEIGHTS, "sums beaten by Bloop": of_sums, "Bloop beaten by sums": of_bloop}
    (options.out / "results.json").write_text(json.dumps(results, indent=2))
    for way, points in fronts.items():
        for weight, p in zip(WEIGHTS[way], points, strict=True):
            print(
                f"{way} {weight:g}: main {p['main']:.3f}, auxiliary {p['auxiliary']:.3f}; unseen "
                f"{100 * p['accuracy']:.1f} %, shifted {100 * p['accuracy shifted']:.1f} %"
            )
    print(f"better in both losses: Bloop than {of_sums} of the sums, a sum than {of_bloop} of Bloop's")
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    if options.steps >= 1000:
        assert of_sums >= 3 and of_bloop <= 1


if __name__ == "__main__":
    main()
