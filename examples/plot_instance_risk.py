"""Instance-wise risk minimisation: every example of a batch is an objective of its own.

A step on the mean loss may raise the losses of some examples to lower those of others. Instance-wise risk minimisation
takes the loss of every example for an objective, and combines their gradients by UPGrad into a step that raises none of
them, to first order,

    g = sum_i 1/m argmin_g {||g - J_i||^2 : J g >= 0},

with one gradient a row of J, computed by `torch.func`. Both ways train the same network on few digits with the same
batches. All rates and seeds train at once: per-example gradients are vmapped over networks, and UPGrad takes a batch of
Jacobians. For each way the rate with the smallest training loss over the whole run counts.

    python examples/plot_instance_risk.py [--quick] [--steps 300] [--out out/instance_risk]

Source: P. Quinton, V. Rey, Jacobian Descent For Multi-Objective Optimization, 2024, section 3.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from difflayers.conic import UPGrad

RATES = (0.2, 0.4, 0.8, 1.6)  # the best of both ways lies inside
WAYS = ("mean", "UPGrad")
COLOURS = {"mean": "#d9822b", "UPGrad": "#1f5fa8"}
SEEDS = 3
BATCH = 32
EXAMPLES = 512
LOOK_EVERY = 10


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures of 8 x 8 pixels and their labels: some to learn from, 1000 to test on."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    x, labels = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    learn, test = order[:EXAMPLES], order[-1000:]
    return x[learn], labels[learn], x[test], labels[test]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def flat(parameters: dict[str, Tensor]) -> Tensor:
    """One row of all parameters for each network, ``(networks, d)``."""
    return torch.cat([p.flatten(1) for p in parameters.values()], -1)


def unflat(rows: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    pieces = rows.split([p[0].numel() for p in like.values()], -1)
    return {name: piece.view(len(rows), *p.shape[1:]) for (name, p), piece in zip(like.items(), pieces, strict=True)}


def train(way: str, data: tuple[Tensor, ...], steps: int) -> dict[str, Tensor]:
    """Networks ``(rates, seeds)`` at once: training loss, accuracy and examples that a step hurts, along the way."""
    x, labels, test, test_labels = data
    models = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        models.append(network())
    shape = torch.zeros(len(RATES), SEEDS)
    parameters = {name: p.detach() for name, p in stack_module_state(models)[0].items()}
    parameters = {name: p.repeat(len(RATES), *[1] * (p.ndim - 1)) for name, p in parameters.items()}
    rate = torch.tensor(RATES).repeat_interleave(SEEDS).unsqueeze(-1)
    model, combine = models[0], UPGrad()

    def loss(p: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, p, (image,)), label)

    def logits(p: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(model, p, (images,))

    per_example = vmap(vmap(grad(loss), in_dims=(None, 0, 0)))
    everywhere = vmap(logits, in_dims=(0, None))
    curves: dict[str, list[Tensor]] = {"loss": [], "accuracy": [], "hurt": []}
    generators = [torch.Generator().manual_seed(seed) for seed in range(SEEDS)]
    for step in tqdm(range(steps + 1), desc=way, mininterval=1.0):
        if step % LOOK_EVERY == 0:
            scores, unseen = everywhere(parameters, x), everywhere(parameters, test)
            losses = cross_entropy(scores.flatten(0, 1), labels.repeat(len(rate)), reduction="none").view(len(rate), -1)
            curves["loss"].append(losses.mean(-1).view_as(shape))
            curves["accuracy"].append((unseen.argmax(-1) == test_labels).float().mean(-1).view_as(shape))
        pick = torch.stack([torch.randint(len(x), (BATCH,), generator=g) for g in generators]).repeat(len(RATES), 1)
        gradients = per_example(parameters, x[pick], labels[pick])
        J = torch.cat([g.flatten(2) for g in gradients.values()], -1)
        g = combine(J) if way == "UPGrad" else J.mean(-2)
        if step % LOOK_EVERY == 0:
            slopes = (J @ g.unsqueeze(-1)).squeeze(-1)
            hurt = slopes < -1e-4 * J.norm(dim=-1) * g.norm(dim=-1, keepdim=True)
            curves["hurt"].append(hurt.float().mean(-1).view_as(shape))
        parameters = unflat(flat(parameters) - rate * g, parameters)
    return {name: torch.stack(curve, -1) for name, curve in curves.items()}


def draw(curves: dict[str, dict[str, Tensor]], best: dict[str, int], path: Path) -> None:
    """Losses along the way at the best rates, what each rate gives, and how many examples a step hurts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained", width_ratios=(1.4, 1, 1))
    for way, curve in curves.items():
        colour, loss = COLOURS[way], curve["loss"][best[way]]
        at = torch.arange(loss.shape[-1]) * LOOK_EVERY
        axes[0].plot(at, loss.mean(0), color=colour, label=f"{way}, rate {RATES[best[way]]}")
        axes[0].fill_between(at, loss.amin(0), loss.amax(0), color=colour, alpha=0.2, linewidth=0)
        axes[1].plot(RATES, curve["loss"].mean((-1, -2)), "o-", color=colour, markersize=4, label=way)
        axes[2].plot(at, 100 * curve["hurt"][best[way]].mean(0), color=colour, label=way)
    axes[0].set(yscale="log", xlabel="step", ylabel="loss", title=f"training loss, {SEEDS} seeds")
    axes[1].set(xscale="log", yscale="log", xlabel="rate", ylabel="loss", title="training loss, mean over the run")
    axes[1].set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    axes[1].set_yticks((0.2, 0.5, 1, 2, 4), ("0.2", "0.5", "1", "2", "4"))
    axes[1].minorticks_off()
    axes[2].set(xlabel="step", ylabel="percent of the batch", title="examples that a step hurts", ylim=(-1, None))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="steps of each training")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/instance_risk"))
    options = parser.parse_args()
    if options.quick:
        options.steps = 20
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    data = digits()
    curves = {way: train(way, data, options.steps) for way in WAYS}
    best = {way: int(curve["loss"].mean((-1, -2)).argmin()) for way, curve in curves.items()}
    draw(curves, best, options.out / "instance_risk.png")
    results = {
        way: {
            "rate": RATES[best[way]],
            "training loss over the run": curve["loss"][best[way]].mean().item(),
            "training loss at the end": curve["loss"][best[way], :, -1].mean().item(),
            "accuracy on unseen pictures": curve["accuracy"][best[way], :, -1].mean().item(),
            "share of examples hurt": curve["hurt"][best[way]].mean().item(),
        }
        for way, curve in curves.items()
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=2))
    for way, numbers in results.items():
        print(f"{way}: " + ", ".join(f"{name} {number:.4g}" for name, number in numbers.items()))
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    ours, theirs = results["UPGrad"], results["mean"]
    assert ours["share of examples hurt"] < 0.001
    if options.steps >= 200:
        assert theirs["share of examples hurt"] > 0.1
        assert ours["training loss over the run"] < 0.7 * theirs["training loss over the run"]
        assert ours["training loss at the end"] < 0.5 * theirs["training loss at the end"]


if __name__ == "__main__":
    main()
