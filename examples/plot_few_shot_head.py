"""Few-shot episodes of digits: a feature network trained through a convex ReLU head, against a ridge head.

An episode has a task that the feature network has not seen: tell digits of one group from those of another, given a few
labelled pictures of each. The head is trained on these, to its global optimum, inside the forward pass, and the loss of
its answers for other pictures goes back through that training into the feature network:

    features -> head trained on the support set -> answers on the query set -> loss.

Both heads get the same network, episodes, steps and learning rates, and learn their own weight decay and scale. Tasks
are on digits that were never trained on.

Groups of two digits need not be separable by a plane when there are few features, which is what a head of ReLU units is
for. Groups of one digit nearly always are: there the heads do equally well, and ridge is the cheaper one. (The setting
was chosen on seeds 0 to 3, what is shown are later ones. With 5 pictures of a digit instead of 10, or 0.1 as the weight
decay to begin with, the lead of the ReLU head is smaller and not there for every seed.)

    python examples/plot_few_shot_head.py [--quick] [--seeds 4] [--steps 80] [--out out/few_shot_head]

Source: A. Mishkin, A. Sahiner, M. Pilanci, Fast Convex Optimization for Two-Layer ReLU Networks, 2022, for the head.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from difflayers.relu import ConvexReLUHead

SHOTS, QUERIES, EPISODES, GATES = 10, 15, 4, 12
FIRST_SEED = 4
SETTINGS = {
    "two digits or two others, 2 features": (2, 2),
    "two digits or two others, 4 features": (2, 4),
    "one digit or another, 4 features": (1, 4),
}
COLOURS = {"ridge head": "#d9822b", "convex ReLU head": "#1f5fa8"}


class RidgeHead(nn.Module):
    """Linear regression with weight decay, which is learned; the features and a one."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.log_beta = nn.Parameter(torch.tensor(beta).log())

    def forward(self, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
        """Trains on x and y, answers the query."""
        x, query = F.pad(x, (0, 1), value=1.0), F.pad(query, (0, 1), value=1.0)
        ridge = self.log_beta.exp() * torch.eye(x.shape[-1])
        weights = torch.linalg.solve(x.mT @ x + ridge, x.mT @ y.unsqueeze(-1))
        return (query @ weights).squeeze(-1)


class Digits:
    """Pictures of digits, and tasks that are drawn from them."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        x, labels = load_digits(return_X_y=True)
        self.x, self.labels = torch.tensor(x / 16 - 0.3, dtype=torch.float32), torch.tensor(labels)

    def episodes(self, digits: list[int], group: int, count: int, generator: torch.Generator) -> list[Tensor]:
        """Support set, its labels -1 and 1, query set, its labels: of `count` tasks, `group` digits on each side."""
        parts = []
        for _ in range(count):
            chosen = torch.tensor(digits)[torch.randperm(len(digits), generator=generator)[: 2 * group]]
            support, query = [], []
            for digit in chosen:
                index = (self.labels == digit).nonzero().squeeze(-1)
                index = index[torch.randperm(len(index), generator=generator)[: SHOTS + QUERIES]]
                support.append(self.x[index[:SHOTS]])
                query.append(self.x[index[SHOTS:]])
            side = torch.tensor([1.0, -1.0]).repeat_interleave(group)
            sides = side.repeat_interleave(SHOTS), side.repeat_interleave(QUERIES)
            parts.append((torch.cat(support), sides[0], torch.cat(query), sides[1]))
        return [torch.stack(part) for part in zip(*parts, strict=True)]


def head_of(name: str, features: int, seed: int) -> nn.Module:
    """A head with weight decay 1 to begin with."""
    if name == "ridge head":
        return RidgeHead(1.0)
    gates = torch.randn(GATES, features + 1, generator=torch.Generator().manual_seed(seed))
    return ConvexReLUHead(1.0, gates, bias=True, learn_beta=True)


def run(name: str, data: Digits, group: int, features: int, seed: int, steps: int) -> float:
    """Trains on six digits; accuracy on tasks with the other four."""
    unseen = [(4 * seed + 3 * k) % 10 for k in range(4)]
    seen = [digit for digit in range(10) if digit not in unseen]
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, features))
    head, log_scale = head_of(name, features, seed), nn.Parameter(torch.tensor(1.0))
    rates = [{"params": network.parameters(), "lr": 3e-3}, {"params": [*head.parameters(), log_scale], "lr": 2e-2}]
    optimiser = torch.optim.Adam(rates)
    generator = torch.Generator().manual_seed(100 + seed)
    for _ in range(steps):
        x, y, query, wanted = data.episodes(seen, group, EPISODES, generator)
        answers = head(network(x), y, network(query))
        loss = F.softplus(-log_scale.exp() * wanted * answers).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        x, y, query, wanted = data.episodes(unseen, group, 100, torch.Generator().manual_seed(999))
        return ((head(network(x), y, network(query)) > 0) == (wanted > 0)).double().mean().item()


def draw(results: dict, path: Path) -> None:
    """Every seed of every setting, with means."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    for k, heads in enumerate(results.values()):
        both = list(heads.values())
        for pair in zip(*both, strict=True):
            axis.plot((k - 0.15, k + 0.15), pair, "-", color="#cccccc", linewidth=1, zorder=1)
        for shift, (name, found) in zip((-0.15, 0.15), heads.items(), strict=True):
            label = name if k == 0 else None
            axis.scatter([k + shift] * len(found), found, color=COLOURS[name], s=22, alpha=0.6, zorder=2)
            mean = sum(found) / len(found)
            axis.plot((k + shift - 0.09, k + shift + 0.09), (mean, mean), color=COLOURS[name], linewidth=3, label=label)
            side, align = (22, "left") if shift > 0 else (-22, "right")
            style = {"textcoords": "offset points", "ha": align, "va": "center", "fontsize": 9, "color": COLOURS[name]}
            axis.annotate(f"{mean:.1%}", (k + shift, mean), (side, 0), **style)
    axis.set_xticks(range(len(results)), [name.replace(", ", "\n") for name in results])
    axis.set(ylabel="accuracy on digits not trained on", title=f"{SHOTS} pictures of each digit; dots are seeds")
    axis.set_xlim(-0.6, len(results) - 0.4)
    axis.legend(frameon=False, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=80, help="training steps of each network")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/few_shot_head"))
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps = 1, 3
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start, data = time.perf_counter(), Digits()
    results: dict[str, dict[str, list[float]]] = {name: {head: [] for head in COLOURS} for name in SETTINGS}
    jobs = [
        (name, head, seed)
        for name in SETTINGS
        for head in COLOURS
        for seed in range(FIRST_SEED, FIRST_SEED + options.seeds)
    ]
    for name, head, seed in tqdm(jobs, mininterval=1.0):
        results[name][head].append(run(head, data, *SETTINGS[name], seed, options.steps))
    draw(results, options.out / "few_shot_head.png")
    (options.out / "results.json").write_text(json.dumps(results, indent=2))
    gains = {}
    for name, heads in results.items():
        found = {head: torch.tensor(numbers, dtype=torch.float64) for head, numbers in heads.items()}
        gains[name] = (found["convex ReLU head"] - found["ridge head"]).mean().item()
        print(f"{name}: " + ", ".join(f"{h} {v.mean():.1%} (std {v.std(correction=0):.1%})" for h, v in found.items()))
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    if options.steps >= 80 and options.seeds >= 3:
        assert min(gain for name, gain in gains.items() if SETTINGS[name][0] == 2) > 0.01


if __name__ == "__main__":
    main()
