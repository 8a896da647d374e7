"""Four ways to balance a mixture of experts: what they do to the loads, and to the task.

Points of eight groups, of which two hold most of them, carry a number that each group computes by a linear map of its
own. A mixture of eight small experts learns it, with one expert for each point, chosen by a linear gate that starts out
skewed towards two experts. The loads are balanced

    by nothing, by a loss on the loads (Switch), by a bias that is learned from them (ALF-LB), or by Sinkhorn routing,

and what is looked at is the largest load over the mean load, less one, in every step, and the error on unseen points.
In evaluation the Sinkhorn router uses its averaged potentials, so that no point depends on the others.

    python examples/plot_balanced_routing.py [--quick] [--seeds 3] [--steps 400] [--out out/balanced_routing]

Sources: X. Y. Han, Y. Zhong, A Theoretical Framework for Auxiliary-Loss-Free Load Balancing, 2025; A. Clark et al.,
Unified Scaling Laws for Routed Language Models, 2022; W. Fedus et al., Switch Transformers, 2022 (the loss).
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

from difflayers.transport import AuxLossFreeBalancer, SinkhornRouter

EXPERTS = GROUPS = 8
FEATURES = 16
BATCH = 256
METHODS = {"top-1 alone": "0.45", "loss on loads": "#d9822b", "ALF-LB": "#3a8f5c", "Sinkhorn": "#1f5fa8"}


class Task:
    """Clouds of points with a linear map each; the first two groups hold 60 % of the points."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.centres = 2 * F.normalize(torch.randn(GROUPS, FEATURES, generator=self.generator), dim=-1)
        self.maps = torch.randn(GROUPS, FEATURES, generator=self.generator) / math.sqrt(FEATURES)
        self.sizes = torch.tensor([0.3, 0.3] + [0.4 / 6] * 6)

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        group = torch.multinomial(self.sizes, count, replacement=True, generator=self.generator)
        noise = torch.randn(count, FEATURES, generator=self.generator)
        return self.centres[group] + 0.4 * noise, (noise * self.maps[group]).sum(-1) + group / 4


class Mixture(nn.Module):
    """Experts with one hidden layer, one for each point, times the gate."""

    def __init__(self, method: str):
        super().__init__()
        self.method = method
        self.gate = nn.Linear(FEATURES, EXPERTS)
        with torch.no_grad():
            self.gate.bias.copy_(torch.tensor([2.0, 1.5] + [0.0] * (EXPERTS - 2)))  # skewed
        self.hidden = nn.Parameter(torch.randn(EXPERTS, FEATURES, 8) / math.sqrt(FEATURES))
        self.shift = nn.Parameter(torch.zeros(EXPERTS, 8))
        self.out = nn.Parameter(torch.randn(EXPERTS, 8) / math.sqrt(8))
        self.level = nn.Parameter(torch.zeros(EXPERTS))
        if method == "Sinkhorn":
            self.router: nn.Module = SinkhornRouter(EXPERTS, eps=0.05)
        else:  # without updates its bias stays zero: top-1 of the gates
            self.router = AuxLossFreeBalancer(EXPERTS, rate=0.01)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The answer, the penalty on the loads, and the imbalance."""
        logits = self.gate(x)
        gates = logits.softmax(-1)
        weights, experts, load = routing = self.router(logits if self.method == "Sinkhorn" else gates)
        e = experts.squeeze(-1)
        h = F.relu(torch.einsum("bd,bdh->bh", x, self.hidden[e]) + self.shift[e])
        answer = weights.squeeze(-1) * ((h * self.out[e]).sum(-1) + self.level[e])
        penalty = EXPERTS * (gates.mean(0) * load / len(x)).sum()
        return answer, penalty, routing.imbalance


def train(method: str, seed: int, steps: int, bar: tqdm) -> dict:
    """Imbalance in every step, and error and imbalance on unseen points."""
    torch.manual_seed(seed)
    task, model = Task(seed), Mixture(method)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    imbalance = []
    for _ in range(steps):
        x, y = task.batch(BATCH)
        answer, penalty, off = model(x)
        loss = F.mse_loss(answer, y) + (0.1 * penalty if method == "loss on loads" else 0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if method == "ALF-LB":
            model.router.update()
        imbalance.append(float(off))
        bar.update()
    model.eval()
    x, y = task.batch(8192)
    with torch.no_grad():
        answer, _, off = model(x)
    return {"imbalance": imbalance, "error": float(F.mse_loss(answer, y) / y.var()), "unseen": float(off)}


def draw(runs: dict, path: Path) -> None:
    """Imbalance over steps, and the error against it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(1.4, 1))
    width = 15
    for name, colour in METHODS.items():
        curves = np.array([run["imbalance"] for run in runs[name]])
        smooth = np.apply_along_axis(np.convolve, 1, curves, np.full(width, 1 / width), "valid")
        steps = np.arange(smooth.shape[1]) + width / 2
        axes[0].plot(steps, smooth.T, color=colour, alpha=0.3, linewidth=1)
        axes[0].plot(steps, smooth.mean(0), color=colour, linewidth=2, label=name)
        points = np.array([(run["unseen"], run["error"]) for run in runs[name]])
        axes[1].scatter(*points.T, color=colour, s=45, label=name)
    axes[0].axhline(EXPERTS - 1, color="0.7", linestyle=":")
    axes[0].text(len(steps), EXPERTS - 0.8, "one expert gets all", color="0.45", ha="right", va="bottom", fontsize=9)
    axes[0].set(xlabel="step", ylabel="largest load / mean load - 1", yscale="log", title="training batches")
    axes[1].set(xlabel="largest load / mean load - 1", ylabel="unexplained variance", title="unseen points")
    axes[1].set(xlim=(0, None), ylim=(0, None))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="tasks and networks")
    parser.add_argument("--steps", type=int, default=400, help="steps of each training")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/balanced_routing"))
    options = parser.parse_args()
    if options.quick:
        options.steps, options.seeds = 40, 1
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tqdm(total=len(METHODS) * options.seeds * options.steps, desc="steps", mininterval=1.0) as bar:
        runs = {name: [train(name, seed, options.steps, bar) for seed in range(options.seeds)] for name in METHODS}
    draw(runs, options.out / "balanced_routing.png")
    late = {
        n: float(np.mean([np.mean(r["imbalance"][len(r["imbalance"]) // 2 :]) for r in g])) for n, g in runs.items()
    }
    early = {n: float(np.mean([np.mean(r["imbalance"][:20]) for r in g])) for n, g in runs.items()}
    table = {
        "imbalance, first 20 steps": early,
        "imbalance, second half": late,
        "imbalance, unseen points": {n: float(np.mean([r["unseen"] for r in g])) for n, g in runs.items()},
        "unexplained variance, unseen": {n: float(np.mean([r["error"] for r in g])) for n, g in runs.items()},
    }
    (options.out / "results.json").write_text(json.dumps({"means": table, "runs": runs}, indent=2))
    print(f"{'':30}" + "".join(f"{name:>15}" for name in METHODS))
    for what, row in table.items():
        print(f"{what:30}" + "".join(f"{row[name]:15.3f}" for name in METHODS))
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    if options.steps >= 300:
        assert late["Sinkhorn"] < 0.1 < late["ALF-LB"] < 0.5 < late["top-1 alone"]
        assert early["Sinkhorn"] < 0.2 < 2 < early["ALF-LB"]  # balanced at once, not after some time
        unseen, error = table["imbalance, unseen points"], table["unexplained variance, unseen"]
        assert max(unseen["Sinkhorn"], unseen["ALF-LB"]) < 0.3
        assert max(error["Sinkhorn"], error["ALF-LB"]) < 1.15 * error["top-1 alone"]  # balance costs no accuracy here


if __name__ == "__main__":
    main()
