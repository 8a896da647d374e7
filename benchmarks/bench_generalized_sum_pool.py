"""Generalized sum pooling, forward and backward, in single precision: ours against the published scheme.

Every contender pools 64 maps of 128 x 7 x 7 with 64 prototypes, and computes the cotangents of the maps and of the
prototypes for a given cotangent of what is pooled. The published scheme takes 100 iterations in the exponential domain;
its backward pass is the closed formula, or autograd through the iterations. Average pooling beside the distances to the
prototypes, forward and backward, is what any such layer costs at least: it has a reference of its own. At an inverse
temperature of 1000 the published scheme overflows.

The reference is in double precision: the multiplier of the mass by bisection, the closed formula of the derivative, and
autograd of `torch.cdist`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Contender, Options, run
from difflayers.transport import GeneralizedSumPool
from difflayers.transport._generalized_sum_pool import prototype_distances

SHAPE, PROTOTYPES, RATIO, STEPS = (64, 128, 7, 7), 64, 0.3, 100
TARGET = 1e-3  # single precision, a derivative by gamma in it

Couple = Callable[[Tensor, float], Tensor]


def in_ball(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1)


def distances(prototypes: Tensor, maps: Tensor) -> Tensor:
    points = in_ball(maps.flatten(2).mT)
    return torch.cdist(in_ball(prototypes).expand(len(maps), -1, -1), points)


# ------------------------------------------------------------------------------------------------ the published scheme


def iterations(cost: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Residual and plan."""
    kernel = (-gamma * cost).exp()
    sums, t = kernel.sum(-2), cost.new_full((len(cost), 1), RATIO)
    for _ in range(STEPS):
        p = 1 / cost.shape[-1] / (1 + t * sums)
        t = RATIO / (p * sums).sum(-1, keepdim=True)
    return p, t.unsqueeze(-1) * kernel * p.unsqueeze(-2)


def cost_cotangent(residual: Tensor, plan: Tensor, g: Tensor, gamma: float) -> Tensor:
    """For a cotangent of the residual."""
    n, mass = residual.shape[-1], plan.sum(-2)
    v = residual * g
    beta = -n * (mass * v).sum(-1, keepdim=True) / (RATIO - n * mass.square().sum(-1, keepdim=True))
    return gamma * plan * (n * (v - mass * beta) + beta).unsqueeze(-2)


class ClosedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cost: Tensor, gamma: float) -> Tensor:
        residual, plan = iterations(cost, gamma)
        ctx.save_for_backward(residual, plan)
        ctx.gamma = gamma
        return residual

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return cost_cotangent(*ctx.saved_tensors, g, ctx.gamma), None


def published(residual_of: Couple, gamma: float) -> Callable[[Tensor, Tensor], Tensor]:
    def pool(prototypes: Tensor, maps: Tensor) -> Tensor:
        residual = residual_of(distances(prototypes, maps), gamma)
        weights = (1 - maps.shape[2] * maps.shape[3] * residual) / RATIO
        return (maps.flatten(2) * weights.unsqueeze(-2)).mean(-1)

    return pool


# ----------------------------------------------------------------------------------------------------------------- ours


def ours(gamma: float, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    layer = GeneralizedSumPool(SHAPE[1], PROTOTYPES, RATIO, gamma, device=device)

    def pool(prototypes: Tensor, maps: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"prototypes": prototypes}, (maps,))

    return pool


def forward_backward(pool: Callable[[Tensor, Tensor], Tensor], *data: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    prototypes, maps, g = data
    prototypes, maps = prototypes.clone().requires_grad_(), maps.clone().requires_grad_()

    def job() -> tuple[Tensor, ...]:
        pooled = pool(prototypes, maps)
        return (pooled.detach(), *torch.autograd.grad(pooled, (prototypes, maps), g))

    return job


def least(distance: Callable[[Tensor, Tensor], Tensor], *data: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Average pooling and the distances, with a cotangent for each."""
    prototypes, maps, g = data
    prototypes, maps = prototypes.clone().requires_grad_(), maps.clone().requires_grad_()
    h = torch.ones(len(maps), PROTOTYPES, maps[0, 0].numel(), device=maps.device, dtype=maps.dtype)

    def job() -> tuple[Tensor, ...]:
        average, cost = maps.mean((-2, -1)), distance(prototypes, maps)
        return (average.detach(), *torch.autograd.grad((average, cost), (prototypes, maps), (g, h)))

    return job


def reference(prototypes: Tensor, maps: Tensor, g: Tensor, gamma: float) -> tuple[Tensor, ...]:
    prototypes, maps, g = (t.double() for t in (prototypes, maps, g))
    prototypes.requires_grad_(), maps.requires_grad_()
    cost = distances(prototypes, maps)
    n = cost.shape[-1]
    with torch.no_grad():
        k = (-gamma * cost).logsumexp(-2)
        low, high = -k.amax(-1, keepdim=True) - 40, 40 - k.amin(-1, keepdim=True)
        for _ in range(100):
            middle = (low + high) / 2
            above = (middle + k).sigmoid().mean(-1, keepdim=True) > RATIO
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        residual = (-low - k).sigmoid() / n
        plan = (low + k).sigmoid().unsqueeze(-2) / n * (-gamma * cost).softmax(-2)
        weights = (1 - n * residual) / (n * RATIO)
        columns = maps.flatten(2)
        pooled = (columns * weights.unsqueeze(-2)).sum(-1)
        bar = cost_cotangent(residual, plan, -(columns * g.unsqueeze(-1)).sum(-2) / RATIO, gamma)
    by_prototypes, by_maps = torch.autograd.grad(cost, (prototypes, maps), bar)
    direct = (g.unsqueeze(-1) * weights.unsqueeze(-2)).reshape(maps.shape)
    return pooled, by_prototypes, by_maps + direct


def case(gamma: float, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(SHAPE, generator=generator) / SHAPE[1] ** 0.5
    prototypes = torch.randn(PROTOTYPES, SHAPE[1], generator=generator) / SHAPE[1] ** 0.5
    g = torch.randn(SHAPE[:2], generator=generator)
    expected = tuple(t.to(device) for t in reference(prototypes, maps, g, gamma))
    data = tuple(t.to(device) for t in (prototypes, maps, g))
    twins = tuple(t.double() for t in data)
    ways = {
        "difflayers.transport.GeneralizedSumPool": ours(gamma, device),
        f"{STEPS} iterations, closed backward": published(ClosedBackward.apply, gamma),
        f"{STEPS} iterations, autograd": published(lambda cost, gamma: iterations(cost, gamma)[0], gamma),
    }
    contenders = [Contender(name, forward_backward(pool, *data)) for name, pool in ways.items()]
    for name, distance in {"difflayers' distances": _own_distances, "torch.cdist": distances}.items():
        contenders.append(
            Contender(f"least: average pooling and {name}", least(distance, *data), least(distances, *twins)())
        )
    return Case(f"{SHAPE}, {PROTOTYPES} prototypes, gamma {gamma:g}", contenders, expected, target=TARGET)


def _own_distances(prototypes: Tensor, maps: Tensor) -> Tensor:
    return prototype_distances(prototypes, maps.flatten(2))


def main(options: Options) -> None:
    run("generalized_sum_pool", [case(gamma, options.device) for gamma in (0.1, 20.0, 1000.0)], options)
