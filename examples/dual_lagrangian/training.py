"""Instances as the training wants them, and what is measured of a trained proxy."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from difflayers.conic import (
    BoxCompletion,
    DualInstances,
    DualProxy,
    DualTrainingRecord,
    Knapsack,
    NonNegative,
    ProductionPlanning,
    dual_bound,
    train_dual_proxy,
)


@dataclass(frozen=True, eq=False)
class Instances:
    """Instances that are written as conic programs only when they are asked for, which saves memory.

    `scale` is what the bounds are divided by in the loss; with the optima in it, a loss is 1 plus (or minus) a gap.
    """

    data: Knapsack | ProductionPlanning
    scale: Tensor

    def __len__(self) -> int:
        return len(self.scale)

    def __getitem__(self, index: Tensor) -> DualInstances:
        k = type(self.data)(*(t[index] for t in self.data))
        return DualInstances(k, k.A, k.b, k.c, k.completion, self.scale[index])


def rough_scale(data: Knapsack | ProductionPlanning) -> Tensor:
    """The size of the optimum, within a factor of two or so, without solving anything."""
    if isinstance(data, Knapsack):
        return data.prices.double().sum(-1) / 3
    _, e, rho, v = (t.double() for t in data)
    return (e * rho).sqrt().sum(-1).square() / v


def proxy_of(network: nn.Module, data: Knapsack | ProductionPlanning) -> DualProxy:
    """The certified form of a network: the rows of both problems are inequalities."""
    return DualProxy(network, NonNegative(), data.completion)


def train(
    proxy: DualProxy,
    data: Knapsack | ProductionPlanning,
    validation: Knapsack | ProductionPlanning,
    optima: Tensor,
    *,
    lr: float = 1e-2,
    patience: int = 6,
    **options,
) -> tuple[DualTrainingRecord, list[tuple[float, float]], bool]:
    """Adam, its rate halved from `lr` to a hundredth whenever `patience` epochs brought nothing: the recipe.

    Returns:
        The record, the curve of mean validation gaps over seconds, and whether the recipe came to its end.
    """
    record = train_dual_proxy(
        proxy,
        Instances(data, rough_scale(data)),
        validation=Instances(validation, optima.abs()),
        lr=lr,
        min_lr=lr / 100,
        patience=patience,
        **options,
    )
    gap = record.validation_losses + optima.sign().mean()  # of -L / |L*|
    times = torch.linspace(0, record.seconds, len(gap) + 1)[1:]
    rates = record.learning_rates
    ended = len(rates) > 0 and float(rates[-1]) < 2 * lr / 100 and stale(record) >= patience
    return record, list(zip(times.tolist(), gap.tolist(), strict=True)), ended


def stale(record: DualTrainingRecord) -> int:
    """Epochs at the end, at one rate, without a better validation loss."""
    last = int((record.learning_rates == record.learning_rates[-1]).sum())
    return min(last, len(record.losses) - 1 - record.best_epoch)


@torch.no_grad()
def bounds(proxy: DualProxy, data: Knapsack | ProductionPlanning) -> Tensor:
    """Certified bounds of all instances."""
    return inference(proxy, compiled=False, numbers=200_000)(*data)


def gaps(found: Tensor, optima: Tensor) -> Tensor:
    """Relative distances below the optimum; a negative one would be no bound."""
    return (optima - found) / optima.abs()


def fixed_share(data: Knapsack | ProductionPlanning, optima: Tensor, share: float) -> Tensor:
    """Gaps of a rule without a network: the same share of the natural unit for every multiplier."""
    k = type(data)(*(t.double() for t in data))
    if isinstance(k, Knapsack):
        y = share * k.prices.sum(-1, keepdim=True) / (k.capacity.shape[-1] * k.capacity)
    else:
        y = share * ((k.ordering * k.resources).sqrt().sum(-1) / k.capacity).square().unsqueeze(-1)
    return gaps(dual_bound(y, k.A, k.b, k.c, k.completion).bound, optima)


def best_fixed_share(data: Knapsack | ProductionPlanning, optima: Tensor) -> float:
    """The share with the smallest mean gap on these instances."""
    shares = torch.linspace(0.05, 1.0, 191).tolist()
    return min(shares, key=lambda share: float(fixed_share(data, optima, share).mean()))


def inference(proxy: DualProxy, *, compiled: bool, numbers: int = 2_000_000) -> Callable[..., Tensor]:
    """From the tensors of many instances to their bounds, in chunks of about so many `numbers`, which caches hold."""
    problem = Knapsack if isinstance(proxy.completion, BoxCompletion) else ProductionPlanning

    def infer(*tensors: Tensor) -> Tensor:
        k = problem(*tensors)
        with torch.no_grad():
            return proxy(k, k.A, k.b, k.c).bound

    run = torch.compile(infer, dynamic=False) if compiled else infer

    def in_chunks(*tensors: Tensor) -> Tensor:
        one = max(1, sum(t[:1].numel() for t in tensors))
        chunk = max(64, 2 ** int(math.log2(max(1, numbers / one))))
        parts = [run(*part) for part in zip(*(t.split(chunk) for t in tensors), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return in_chunks


def race(run: Callable[..., Tensor], test: Any, solvers: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    """Seconds for one instance, of `run` on all of them at once and of solvers on a few, in turn.

    Returns:
        Medians of five rounds: "each_seconds", and by solver "solver_seconds" and the "ratios" within one round.
    """
    few, count = type(test)(*(t[:64] for t in test)), len(test[0])
    run(*test)
    rounds = []
    for _ in range(5):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run(*test)
            times.append(time.perf_counter() - start)
        each = statistics.median(times) / count
        rounds.append([each, *(solve(few, progress=False).seconds for solve in solvers.values())])
    each, *others = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratios = [statistics.median(row[k] / row[0] for row in rounds) for k in range(1, 1 + len(solvers))]
    return {
        "each_seconds": each,
        "solver_seconds": dict(zip(solvers, others, strict=True)),
        "ratios": dict(zip(solvers, ratios, strict=True)),
    }
