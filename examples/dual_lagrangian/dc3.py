"""DC3, the paper's baseline: predict some dual variables, complete the others, correct by gradient steps.

The dual has equalities and inequalities. The network predicts as many variables as the equalities leave free, the rest
follows from the equalities; then gradient steps on half the squared violation of the inequalities move the free
variables. What is left of the violation is penalised in training and stays in the result: its value is no bound.

Departures: gradient steps are taken in variables scaled to order one, since the published step would diverge in the
units of the data. The published penalty of 10 is meant in those variables too; in the units of the data it is so strong
that the dual variables stay far inside.

Source: P. Donti, D. Rolnick, Z. Kolter, DC3: A learning method for optimization with hard constraints, ICLR 2021; M.
Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, NeurIPS 2024, section 5, for its use here.
"""

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from difflayers.conic import Knapsack, ProductionPlanning, dual_bound

from .networks import Flat, KnapsackPrices, PlanningPrice, small

STEPS, PENALTY = 10, 10.0


class Dual(NamedTuple):
    """A dual candidate: scaled objective and slacks, and the free variables they belong to."""

    objective: Tensor
    slacks: Tensor
    free: Tensor


class KnapsackDual:
    """``max -v y - sum z_u`` over ``y, z_l, z_u >= 0`` with ``z_l - z_u = W^T y - p``: y and z_u are free.

    Scaled: prices by their mean, y by the share of all value that falls to one constraint.
    """

    step = 1e-4

    def __init__(self, k: Knapsack) -> None:
        p, W, v = k
        self.m, self.n = W.shape[-2:]
        worth = p.mean(-1, keepdim=True)
        self.unit, self.value = self.n * worth / (self.m * v), worth.squeeze(-1)
        self.p, self.N = p / worth, W * (self.unit / worth).unsqueeze(-1)

    def complete(self, free: Tensor) -> Dual:
        y, upper = free.split((self.m, self.n), -1)
        lower = upper - self.margin(y)
        objective = -y.sum(-1) * self.n / self.m - upper.sum(-1)
        return Dual(objective, torch.cat([free, lower], -1), free)

    def margin(self, y: Tensor) -> Tensor:
        """What a unit of each item earns beyond its price."""
        return self.p - (y.unsqueeze(-2) @ self.N).squeeze(-2)

    def multipliers(self, free: Tensor) -> Tensor:
        return self.unit * free[..., : self.m]


class PlanningDual:
    """``max -v y + 2 sum q sqrt(e)`` over ``y >= 0`` and ``q <= sqrt(d + rho y)``: y and q are free.

    With ``sigma = -q sqrt(2 e)`` this is the cone ``2 pi tau >= sigma^2`` of completed ``pi = d + rho y, tau = e``.
    """

    step = 1e-5

    def __init__(self, k: ProductionPlanning) -> None:
        d, e, rho, v = k
        share = (e * rho).sqrt()
        total = share.sum(-1, keepdim=True)
        self.unit = (total / v.unsqueeze(-1)).square()
        self.share, self.free_part, self.value = share / total, d / (rho * self.unit), total.squeeze(-1).square() / v

    def complete(self, free: Tensor) -> Dual:
        y, q = free[..., :1], free[..., 1:]
        pi = self.free_part + y
        objective = -y.squeeze(-1) + 2 * (self.share * q).sum(-1)
        return Dual(objective, torch.cat([y, pi, pi.clamp(min=1e-12).sqrt() - q], -1), free)

    def multipliers(self, free: Tensor) -> Tensor:
        return self.unit * free[..., :1]


def dual_of(instances: Knapsack | ProductionPlanning) -> Any:
    """The scaled dual of instances, in float32 unless they are in float64."""
    return KnapsackDual(instances) if isinstance(instances, Knapsack) else PlanningDual(instances)


def correct(dual: Any, free: Tensor, steps: int = STEPS, step: float | None = None) -> Dual:
    """Gradient steps on half the squared violation; differentiable."""
    step = dual.step if step is None else step
    with torch.enable_grad():
        free = free if free.requires_grad else free.clone().requires_grad_()
        for _ in range(steps):
            half = violation(dual.complete(free)).square().sum() / 2
            free = free - step * torch.autograd.grad(half, free, create_graph=True)[0]
    return dual.complete(free)


def violation(point: Dual) -> Tensor:
    """By how much each inequality is violated."""
    return F.relu(-point.slacks)


class DC3(nn.Module):
    """A network for the free variables, and the correction.

    `prices` is a :class:`Flat` network with an output for every free variable, or a graph network for the multipliers:
    then a small network predicts, item by item, the variable that belongs to the item from its slack.
    """

    def __init__(self, prices: Flat | KnapsackPrices | PlanningPrice, hidden: int = 16) -> None:
        super().__init__()
        self.prices = prices
        self.items = None if isinstance(prices, Flat) else small(2, hidden)

    def forward(self, instances: Knapsack | ProductionPlanning) -> Dual:
        dual = dual_of(instances)
        return correct(dual, self.predict(dual, instances))

    def predict(self, dual: Any, instances: Knapsack | ProductionPlanning) -> Tensor:
        """The free variables before the correction."""
        if self.items is None:
            return self.prices(instances)
        y = self.prices(instances) / dual.unit
        if isinstance(dual, KnapsackDual):
            margin = dual.margin(y)
            features = torch.stack([margin, (8 * margin).tanh()], -1)
            return torch.cat([F.relu(y), F.softplus(self.items(features).squeeze(-1), beta=20.0)], -1)
        features = torch.stack([dual.free_part, y.expand_as(dual.free_part)], -1)
        return torch.cat([y, F.softplus(self.items(features).squeeze(-1))], -1)


class Judgement(NamedTuple):
    """What a DC3 model says of instances whose optima are known, in float64 from its float32 variables.

    Attributes:
        claimed: Mean relative gap of the claimed values; negative where they are above the optimum.
        completed: Mean relative gap of the bounds that its multipliers give once they are completed in closed form.
        above: Share of the claims above the optimum, which are no bounds.
        violation: Mean over the instances of the largest violation, in the scaled variables.
    """

    claimed: float
    completed: float
    above: float
    violation: float


def judge(model: DC3, data: Any, optima: Tensor, chunk: int = 512) -> Judgement:
    """Judges a model on instances."""
    rows = []
    for *part, optimum in zip(*(t.split(chunk) for t in (*data, optima)), strict=True):
        free = model(type(data)(*(t.float() for t in part))).free.detach().double()
        k = type(data)(*(t.double() for t in part))
        dual = dual_of(k)
        point = dual.complete(free)
        claim = point.objective * dual.value
        bound = dual_bound(dual.multipliers(free).relu(), k.A, k.b, k.c, k.completion).bound
        missed = [(optimum - value) / optimum.abs() for value in (claim, bound)]
        rows.append(torch.stack([*missed, (claim > optimum).double(), violation(point).amax(-1)], -1))
    return Judgement(*torch.cat(rows).mean(0).tolist())


def train_dc3(
    model: DC3,
    data: Any,
    seconds: float,
    *,
    steps: int | None = None,
    penalty: float = PENALTY,
    batch: int = 128,
    lr: float = 1e-2,
    watch=None,
    progress: bool = True,
) -> list[Any]:
    """Adam for a time; the rate falls from `lr` to a hundredth of it. `watch(seconds)` is asked 20 times, unpaid.

    With `steps` the training ends after so many, however long they take.
    """
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), lr)
    spent, done, taken, seen, count = 0.0, 0.0, 0, [], len(data[0])
    with tqdm(total=round(seconds), desc="DC3", disable=not progress, unit="s") as bar:
        while done < 1:
            start = time.perf_counter()
            for group in optimiser.param_groups:
                group["lr"] = lr * 0.01**done
            index = torch.randint(count, (batch,), generator=generator)
            point = model(type(data)(*(t[index].float() for t in data)))
            loss = -point.objective + penalty * violation(point).square().sum(-1)
            loss = loss / point.objective.detach().abs()
            optimiser.zero_grad()
            loss.mean().backward()
            optimiser.step()
            spent, taken = spent + time.perf_counter() - start, taken + 1
            done = spent / seconds if steps is None else taken / steps
            bar.update(max(0, round(done * bar.total) - bar.n))
            if watch is not None and done >= len(seen) / 20:
                seen.append(watch(spent))
    if watch is not None:
        seen.append(watch(spent))
    return seen
