"""Training of a two-layer ReLU network with weight decay: its convex program against gradient methods from 20 starts.

The objective is `1/2 ||(X W)_+ a - y||^2 + beta/2 (||W||^2 + ||a||^2)`. Ours solves the convex program over activation
patterns, turns the solution into a network, and evaluates this objective at it. Gradient methods train a network of 100
units, far more than the optimum has, from 20 random starts: SGD with momentum on a quarter of the data a step and Adam
on all data, all starts as one batch, both with a rate that falls as a cosine and is the best of a ladder; L-BFGS of
SciPy, one start after the other.

The clock of a peer stops at its first start within 1e-3 of ours, so the others cost nothing; a peer that gets there
with none has done another job, whatever its time. What all starts reach without that stop stands in the last column, as
multiples of our objective. All patterns of the small case are enumerated: there nothing can lie below ours. The larger
case has 200 random patterns of a number that cannot be counted out, and networks that are free to leave their cells end
far below: a random choice of patterns is no substitute for training where the best neurons are few and particular.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Case, Contender, Options, run
from difflayers.relu import Gates, convex_relu, enumerate_gates, sample_gates, to_network

STARTS, WIDTH = 20, 100
TARGET = 1e-3
STEPS = 1500
LOOK = 25  # steps between two looks at the clock's rule
F64 = torch.float64
Weights = tuple[Tensor, Tensor]


class Task:
    """Data, weight decay, and the objective of networks `W (..., m, d)`, `a (..., m)`."""

    def __init__(self, X: Tensor, y: Tensor, beta: float) -> None:
        self.X, self.y, self.beta = X, y, beta

    def objective(self, W: Tensor, a: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        X, y = self.X[rows], self.y[rows]
        fit = ((X @ W.mT).relu() * a.unsqueeze(-2)).sum(-1)
        loss = (fit - y).square().sum(-1) / 2 * (len(self.y) / len(y))
        return loss + self.beta / 2 * (W.square().sum((-2, -1)) + a.square().sum(-1))

    def starts(self) -> Weights:
        """As torch initialises linear maps, roughly."""
        generator = torch.Generator().manual_seed(0)
        d = self.X.shape[1]
        W = torch.randn(STARTS, WIDTH, d, generator=generator, dtype=F64) / math.sqrt(d)
        return W, torch.randn(STARTS, WIDTH, generator=generator, dtype=F64) / math.sqrt(WIDTH)

    def convex(self, gates: Callable[[Tensor], Gates]) -> Tensor:
        network = to_network(convex_relu(self.X, self.y, self.beta, gates(self.X)))
        return self.objective(network.weight.detach(), network.output.detach())


def by_steps(task: Task, kind: str, rate: float, enough: float) -> Tensor:
    """The lowest objective of every start, until one of them is `enough`."""
    W, a = (t.requires_grad_() for t in task.starts())
    optimiser: torch.optim.Optimizer
    optimiser = torch.optim.Adam([W, a], lr=rate) if kind == "Adam" else torch.optim.SGD([W, a], rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    generator, n = torch.Generator().manual_seed(1), len(task.y)
    least = torch.full((STARTS,), math.inf, dtype=F64)
    for step in range(STEPS):
        rows = slice(None) if kind == "Adam" else torch.randperm(n, generator=generator)[: n // 4]
        optimiser.zero_grad()
        value = task.objective(W, a, rows)
        value.sum().backward()
        optimiser.step()
        schedule.step()
        if (step + 1) % LOOK == 0:
            with torch.no_grad():
                least = torch.fmin(least, task.objective(W, a))
            if least.min() <= enough:
                break
    return least


class Found(Exception):
    """A start of L-BFGS is good enough."""


def by_lbfgs(task: Task, enough: float) -> Tensor:
    """The same, one start after the other."""
    from scipy.optimize import minimize

    least = torch.full((STARTS,), math.inf, dtype=F64)
    d = task.X.shape[1]
    for k, (W0, a0) in enumerate(zip(*task.starts(), strict=True)):

        def value_and_slope(x: np.ndarray, k: int = k) -> tuple[float, np.ndarray]:
            flat = torch.from_numpy(x).requires_grad_()
            value = task.objective(flat[: WIDTH * d].view(WIDTH, d), flat[WIDTH * d :])
            (slope,) = torch.autograd.grad(value, flat)
            least[k] = torch.fmin(least[k], value.detach())
            if least[k] <= enough:
                raise Found
            return value.item(), slope.numpy()

        start = torch.cat([W0.flatten(), a0]).numpy()
        try:
            minimize(
                value_and_slope, start, jac=True, method="L-BFGS-B", options={"maxiter": STEPS, "maxfun": 2 * STEPS}
            )
        except Found:
            break
    return least


class Peer:
    """A gradient method with the best rate of its ladder: what its starts reach, how soon the first is near ours."""

    def __init__(self, task: Task, kind: str, rates: list[float], ours: float) -> None:
        self.task, self.kind, self.rates, self.ours = task, kind, rates, ours
        self.rate, self.told = math.nan, ""

    def train(self, rate: float, enough: float) -> Tensor:
        if self.kind == "L-BFGS":
            return by_lbfgs(self.task, enough)
        return by_steps(self.task, self.kind, rate, enough)

    def __call__(self) -> Tensor:
        if not self.told:
            self._survey()
        # below ours is no error
        return self.train(self.rate, (1 + TARGET) * self.ours).nan_to_num(nan=math.inf).min().clamp_min(self.ours)

    def settings(self) -> str:
        return self.told

    def _survey(self) -> None:
        runs = {rate: self.train(rate, -math.inf).nan_to_num(nan=math.inf) for rate in self.rates}
        self.rate = min(runs, key=lambda rate: float(runs[rate].min()))
        reached = (runs[self.rate] / self.ours).sort().values
        good = int((reached <= 1 + TARGET).sum())
        self.told = f"{good} of {STARTS} starts get there; best {reached[0]:.4f}, median {reached.median():.4f}, "
        self.told += f"worst {reached[-1]:.5g} of ours" + (f"; rate {self.rate:g}" if len(self.rates) > 1 else "")


def small() -> tuple[str, Task, Callable[[Tensor], Gates]]:
    """A curve of one variable, and a bias: every pattern is there."""
    generator = torch.Generator().manual_seed(0)
    n = 200
    x = 2 * torch.rand(n, generator=generator, dtype=F64) - 1
    y = torch.sin(8 * x) + 0.2 * torch.randn(n, generator=generator, dtype=F64)
    X = torch.stack([x, torch.ones_like(x)], -1)
    return "n = 200, a curve, all 400 patterns", Task(X, y, 0.05), enumerate_gates


def large() -> tuple[str, Task, Callable[[Tensor], Gates]]:
    """Labels of a network with five neurons, and noise."""
    generator = torch.Generator().manual_seed(0)
    n, d = 500, 10

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    X = draw(n, d)
    y = (X @ draw(d, 5)).relu() @ draw(5) + 0.1 * draw(n)

    def gates(X: Tensor) -> Gates:
        return sample_gates(X, 200, generator=torch.Generator().manual_seed(1))

    return "n = 500, d = 10, 200 random patterns", Task(X, y, 0.01 * n), gates


def case(name: str, task: Task, gates: Callable[[Tensor], Gates]) -> Case:
    best = task.convex(gates)
    contenders = [Contender("difflayers.relu.convex_relu", lambda: task.convex(gates))]
    ladders = {"SGD": [1e-4, 3e-4, 1e-3], "Adam": [3e-3, 1e-2, 3e-2], "L-BFGS": [math.nan]}
    for kind, rates in ladders.items():
        peer = Peer(task, kind, rates, float(best))
        contenders.append(Contender(f"{kind}, until a start is within 1e-3", peer, settings=peer.settings))
    return Case(name, contenders, best, memory=False, target=TARGET)


def main(options: Options) -> None:
    run("relu_training", [case(*small()), case(*large())], options)
