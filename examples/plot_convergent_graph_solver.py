"""Convergent graph solvers: learning value iteration on random decision graphs.

In every state ``i`` of a graph one may take an edge to ``j`` and earns its reward. The value of a state is

    V_i = max over edges (i, j) of  r_ij + 0.9 V_j,

an equilibrium over the whole graph. A network sees the rewards and learns the values. It is trained twice from the same
parameters, once with the equilibrium of its contracting linear maps (one linear solve), once with 3 steps of them, and
tested on graphs of the training size and on larger ones. With 5 to 10 actions in a state the values hardly depend on
anything far away; with 1 to 3 they do.

    python examples/plot_convergent_graph_solver.py [--quick] [--steps 400] [--out out/convergent_graph_solver]

Source: J. Park, J. Choo, J. Park, Convergent Graph Solvers, ICLR 2022, section 6.2.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from difflayers.equilibrium import ConvergentGraphSolver, disjoint_union, edge_softmax

DISCOUNT = 0.9
FINITE_STEPS = 3
KAPPA = 0.8
LEARNING_RATE = 1e-2


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass
class Batch:
    """Several graphs side by side: rewards on edges, values on nodes."""

    edge_index: Tensor
    reward: Tensor
    value: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Node features (the number of actions), edge features (the reward), edges."""
        actions = torch.zeros(len(self.value)).index_add(0, self.edge_index[0], torch.ones_like(self.reward))
        return actions[:, None] / 10, self.reward[:, None], self.edge_index


def best(edge_index: Tensor, action_value: Tensor, nodes: int) -> Tensor:
    """The largest action value of every node."""
    return torch.full((nodes,), -torch.inf).scatter_reduce(0, edge_index[0], action_value, "amax")


def random_graphs(count: int, sizes: tuple[int, int], actions: tuple[int, int], generator: torch.Generator) -> Batch:
    """Graphs with the same number of actions in every state, rewards uniform in [-1, 1], and their values."""
    parts = []
    for _ in range(count):
        n = int(torch.randint(sizes[0], sizes[1] + 1, (), generator=generator))
        k = int(torch.randint(actions[0], actions[1] + 1, (), generator=generator))
        state = torch.arange(n).repeat_interleave(k)
        other = (state + torch.randint(1, n, (n * k,), generator=generator)) % n  # never the state itself
        reward = torch.rand(n * k, 1, generator=generator) * 2 - 1
        parts.append((torch.ones(n, 1), reward, torch.stack([state, other])))
    _, reward, edge_index, graph = disjoint_union(*zip(*parts, strict=True))
    reward = reward.squeeze(-1)
    value = torch.zeros(len(graph))
    for _ in range(200):  # 0.9^200 < 1e-9
        value = best(edge_index, reward + DISCOUNT * value[edge_index[1]], len(value))
    return Batch(edge_index, reward, value)


# --------------------------------------------------------------------------------------------------------------- model


class FiniteSteps(ConvergentGraphSolver):
    """The same network with a few message-passing steps in place of the equilibrium."""

    def equilibrium(self, edge_weights, edge_index, B, kappa):
        H = B
        for _ in range(FINITE_STEPS):
            messages = edge_weights[..., None] * H[..., edge_index[1], :]
            H = B + kappa[..., None, None] * torch.zeros_like(B).index_add(-2, edge_index[0], messages)
        return H


def make(kind: type[ConvergentGraphSolver], seed: int) -> ConvergentGraphSolver:
    """A network; the same parameters for both kinds."""
    torch.manual_seed(seed)
    return kind(1, 1, 1, hidden=32, heads=8, kappa=KAPPA, learn_kappa=True, edge_weights=edge_softmax)


def train(model: ConvergentGraphSolver, actions: tuple[int, int], steps: int, seed: int, name: str) -> list[float]:
    """Adam on fresh graphs of 20 to 50 states."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in (bar := tqdm(range(steps), desc=name, mininterval=1.0)):
        batch = random_graphs(6, (20, 50), actions, generator)
        loss = (model(*batch.inputs).squeeze(-1) - batch.value).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return losses


@torch.no_grad()
def evaluate(model: ConvergentGraphSolver, batch: Batch) -> dict[str, float]:
    """Errors of the values, and how often the best action under predicted values is the best one."""
    guess = model(*batch.inputs).squeeze(-1)
    state, other = batch.edge_index
    action = batch.reward + DISCOUNT * guess[other]
    chosen = action >= best(batch.edge_index, action, len(guess))[state]
    optimal = batch.reward + DISCOUNT * batch.value[other] >= batch.value[state] - 1e-5
    error = guess - batch.value
    return {
        "mean absolute error": error.abs().mean().item(),
        "unexplained variance": (error.square().mean() / batch.value.var()).item(),
        "best action found": optimal[chosen].float().mean().item(),
    }


# -------------------------------------------------------------------------------------------------------------- figure

FAMILIES = {"5 to 10 actions": (5, 10), "1 to 3 actions": (1, 3)}
KINDS = {"equilibrium": ConvergentGraphSolver, f"{FINITE_STEPS} steps": FiniteSteps}
SIZES = {"20 to 50 states": (64, (20, 50)), "150 to 250 states": (16, (150, 250))}
COLOURS = {"equilibrium": "#1f5fa8", f"{FINITE_STEPS} steps": "#d9822b"}


def run(steps: int, seed: int = 0) -> tuple[dict, dict, dict]:
    """Trains both kinds on both families: losses, measures, and predictions on the larger graphs."""
    losses, measures, points = {}, {}, {}
    for family, actions in FAMILIES.items():
        generator = torch.Generator().manual_seed(1000)  # training graphs come from other seeds
        tests = {size: random_graphs(count, bounds, actions, generator) for size, (count, bounds) in SIZES.items()}
        for kind, model_class in KINDS.items():
            model = make(model_class, seed)
            losses[family, kind] = train(model, actions, steps, seed, f"{family}, {kind}")
            for size, batch in tests.items():
                measures[family, kind, size] = evaluate(model, batch)
            with torch.no_grad():
                points[family, kind] = batch.value, model(*batch.inputs).squeeze(-1)
    return losses, measures, points


def draw(losses: dict, points: dict, path: Path) -> None:
    """Training curves, and predicted against true values on graphs larger than any seen in training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(10.5, 6.6), layout="constrained")
    for row, family in zip(axes, FAMILIES, strict=True):
        for kind, colour in COLOURS.items():
            loss = torch.tensor(losses[family, kind])
            window = max(1, len(loss) // 25)
            smooth = loss.unfold(0, window, 1).mean(-1)
            row[0].plot(range(window, len(loss) + 1), smooth, color=colour, label=kind)
        row[0].set(yscale="log", xlabel="training step", ylabel="squared error", title=f"{family}: training")
        row[0].legend(frameon=False)
        for axis, kind in zip(row[1:], COLOURS, strict=True):
            value, guess = points[family, kind]
            axis.scatter(value, guess, s=4, alpha=0.4, color=COLOURS[kind], linewidths=0)
            ends = [float(value.min()), float(value.max())]
            axis.plot(ends, ends, color="black", linewidth=0.8)
            axis.set(xlabel="true value", ylabel="predicted", title=f"{kind}, 150 to 250 states")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="training steps for each of the four networks")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/convergent_graph_solver"))
    options = parser.parse_args()
    if options.quick:
        options.steps = 20
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # small graphs: threads would only wait for each other
    start = time.perf_counter()
    losses, measures, points = run(options.steps)
    draw(losses, points, options.out / "value_iteration.png")
    rows = [{"graphs": f, "network": k, "test on": s, **m} for (f, k, s), m in measures.items()]
    (options.out / "results.json").write_text(json.dumps(rows, indent=2))
    print(f"{'graphs':<16} {'network':<12} {'test on':<18} {'abs. error':>11} {'unexplained':>12} {'best action':>12}")
    for row in rows:
        *names, error, unexplained, found = row.values()
        print("{:<16} {:<12} {:<18}".format(*names), f"{error:>11.3f} {unexplained:>12.1%} {found:>12.1%}")
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")


if __name__ == "__main__":
    main()
