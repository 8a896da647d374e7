"""Convergent graph solvers: learning value iteration on random decision graphs.

In every state ``i`` of a graph one may take an edge to ``j`` and earns its reward. The value of a state is

    V_i = max over edges (i, j) of  r_ij + 0.9 V_j,

an equilibrium over the whole graph. A network sees the rewards and learns the values. It is trained twice with the same
parameters: once with the equilibrium of its contracting linear maps (by a linear solve), once with 3 steps of them, and
tested on graphs of the training size and on larger ones.

    python examples/plot_convergent_graph_solver.py [--steps 400] [--out out/convergent_graph_solver]

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

from difflayers.equilibrium import ConvergentGraphSolver, disjoint_union, graph_equilibrium
from difflayers.equilibrium import edge_softmax

DISCOUNT = 0.9
FINITE_STEPS = 3


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass
class Batch:
    """Several graphs side by side: rewards on edges, values on nodes."""

    edge_index: Tensor
    reward: Tensor
    value: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Node features (none: ones), edge features, edges."""
        return torch.ones(len(self.value), 1), self.reward[:, None], self.edge_index


def best(batch_index: Tensor, action_value: Tensor, nodes: int) -> Tensor:
    """The largest action value of every node."""
    return torch.full((nodes,), -torch.inf).scatter_reduce(0, batch_index[0], action_value, "amax")


def random_graphs(count: int, sizes: tuple[int, int], generator: torch.Generator, actions_range=(5, 10)) -> Batch:
    """Graphs with 5 to 10 actions a state, rewards uniform in [-1, 1], and their values."""
    parts = []
    for _ in range(count):
        n = int(torch.randint(sizes[0], sizes[1] + 1, (), generator=generator))
        actions = int(torch.randint(actions_range[0], actions_range[1] + 1, (), generator=generator))
        reader = torch.arange(n).repeat_interleave(actions)
        # any other node, never itself
        read = (reader + torch.randint(1, n, (n * actions,), generator=generator)) % n
        reward = torch.rand(n * actions, 1, generator=generator) * 2 - 1
        parts.append((torch.ones(n, 1), reward, torch.stack([reader, read])))
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
    return kind(1, 1, 1, hidden=32, heads=16, kappa=DISCOUNT, learn_kappa=True, edge_weights=edge_softmax)


def train(model: ConvergentGraphSolver, steps: int, seed: int, name: str) -> list[float]:
    """Adam on fresh graphs of 20 to 50 states."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
    losses = []
    for _ in (bar := tqdm(range(steps), desc=name, mininterval=1.0)):
        batch = random_graphs(8, (20, 50), generator)
        loss = (model(*batch.inputs).squeeze(-1) - batch.value).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return losses


@torch.no_grad()
def evaluate(model: ConvergentGraphSolver, batch: Batch) -> dict[str, float]:
    """Errors of the values, and how often the best action under predicted values is the best one."""
    guess = model(*batch.inputs).squeeze(-1)
    readers, read = batch.edge_index
    action = batch.reward + DISCOUNT * guess[read]
    chosen = action >= best(batch.edge_index, action, len(guess))[readers]
    true = batch.reward + DISCOUNT * batch.value[read]
    optimal = true >= batch.value[readers] - 1e-5
    error = guess - batch.value
    return {
        "mean absolute percentage error": 100 * (error / batch.value).abs().mean().item(),
        "unexplained variance, percent": 100 * (error.var() / batch.value.var()).item(),
        "policy accuracy, percent": 100 * optimal[chosen].float().mean().item(),
    }
