"""Networks that predict multipliers from the data of an instance.

`Flat` is the paper's: all data in a row, two hidden layers of sigmoids. Its first layer grows with the square of the
instance. The two others are graph networks between items and constraints. A trial price goes to the items, every item
answers how much of it is taken at that price, each constraint adds up what is used and a small network corrects the
price from that. Their weights do not depend on the number of items or constraints, nor on the units of the data.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difflayers.conic import Knapsack, ProductionPlanning


def small(inputs: int, hidden: int, outputs: int = 1) -> nn.Sequential:
    """One hidden layer, whose output starts at zero."""
    layers = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    return layers


class Flat(nn.Module):
    """The paper's network on standardised data: `features` in, positive multipliers out.

    `outputs` multipliers are softplus of the last layer times `unit`, about the size of a multiplier.
    """

    def __init__(self, sample: Tensor, outputs: int, hidden: int, unit: float | Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", sample.mean(0).float())
        self.register_buffer("deviation", sample.std(0).clamp(min=1e-6).float())
        self.register_buffer("unit", torch.as_tensor(unit, dtype=torch.float32))
        inputs = sample.shape[-1]
        self.layers = nn.Sequential(
            *(nn.Linear(inputs, hidden), nn.Sigmoid()),
            *(nn.Linear(hidden, hidden), nn.Sigmoid()),
            nn.Linear(hidden, outputs),
        )
        nn.init.constant_(self.layers[-1].bias, math.log(math.e - 1))  # so that multipliers start at `unit`

    def forward(self, instances: Knapsack | ProductionPlanning) -> Tensor:
        x = (instances.features.to(self.mean) - self.mean) / self.deviation
        return self.unit * F.softplus(self.layers(x))


class KnapsackPrices(nn.Module):
    """A price for every constraint of a knapsack, from what is used of it at one trial price.

    The trial is the same share of the total value for every constraint. With `newton`, the constraints also learn how
    much their usage would change with each other's price, and the correction starts from a Newton step: a linear system
    with as many unknowns as there are constraints.
    """

    def __init__(self, hidden: int = 16, *, newton: bool = False) -> None:
        super().__init__()
        self.newton = newton
        self.trial = nn.Parameter(torch.tensor(0.28))
        self.log_width = nn.Parameter(torch.tensor(-3.8))
        self.threshold = nn.Parameter(torch.tensor(0.0))
        self.log_ridge = nn.Parameter(torch.tensor(-3.0), requires_grad=newton)
        self.head = small(4 if newton else 2, hidden)

    def forward(self, instances: Knapsack) -> Tensor:
        p, W, v = (t.to(self.trial) for t in instances)
        m, n = W.shape[-2:]
        worth = p.mean(-1, keepdim=True)
        unit = n * worth / (m * v)  # all that the items are worth, shared evenly by the constraints
        width = self.log_width.exp()
        margin = (p - self.trial * (unit.unsqueeze(-1) * W).sum(-2)) / worth
        margin = (margin - self.threshold) / width
        taken = 0.5 + 0.5 * F.softsign(margin)  # cheaper than a sigmoid, and as good
        usage = (W * taken.unsqueeze(-2)).sum(-1) / v - 1
        mean = usage.mean(-1, keepdim=True).expand_as(usage)
        if not self.newton:
            return unit * (self.trial + self.head(8 * torch.stack([usage, mean], -1)).squeeze(-1))
        N = W * (unit / worth).unsqueeze(-1)
        slope = 0.5 / (width * (1 + margin.abs()).square())
        G = (N * slope.unsqueeze(-2)) @ N.mT
        ridge = torch.diag_embed(self.log_ridge.exp() * G.diagonal(dim1=-2, dim2=-1))
        step = torch.linalg.solve(G + ridge, usage * n / m)
        size = step.square().mean(-1, keepdim=True).sqrt().expand_as(step)
        features = 8 * torch.stack([usage, mean, step, size], -1)
        return unit * (self.trial + step + 0.1 * self.head(features).squeeze(-1))


class PlanningPrice(nn.Module):
    """The price of the resource in production planning, from what is used of it at a few trial prices.

    Without holding costs the best price is a closed form. It bounds the price from above, and is the unit here.
    """

    def __init__(self, trials: int = 2, hidden: int = 16) -> None:
        super().__init__()
        self.log_trials = nn.Parameter(torch.linspace(-1.0, 0.0, trials) if trials > 1 else torch.tensor([-0.1]))
        self.head = small(trials, hidden)
        nn.init.constant_(self.head[-1].bias, 2.0)

    def forward(self, instances: ProductionPlanning) -> Tensor:
        d, e, rho, v = (t.to(self.log_trials) for t in instances)
        share = (e * rho).sqrt()
        total = share.sum(-1, keepdim=True)
        unit = (total / v.unsqueeze(-1)).square()
        free = d / (rho * unit)
        usage = torch.stack([(share * (free + trial).rsqrt()).sum(-1) for trial in self.log_trials.exp()], -1) / total
        return unit * torch.sigmoid(self.head(4 * (usage - 1)))
