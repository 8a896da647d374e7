"""The gradient through a transport plan: of the layer and of unrolled iterations, its error and its memory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from chapters._plots import BLUE, ORANGE, axes, save
from difflayers.testing import saved_bytes
from difflayers.transport import KernelSinkhorn, sinkhorn, sinkhorn_ex

Plan = Callable[[Tensor], Tensor]


def layer(cost: Tensor, eps: float, solver: KernelSinkhorn | None = None) -> Tensor:
    """The plan whose rows and columns all add up to one."""
    ones = cost.new_ones(cost.shape[-1])
    return sinkhorn(cost, ones, ones, eps=eps, solver=solver)


def unrolled(cost: Tensor, eps: float, iterations: int) -> Tensor:
    """What one writes first: rows and columns in turn, in the logarithm, recorded by autograd."""
    log = -cost / eps
    for _ in range(iterations):
        log = log - log.logsumexp(-1, keepdim=True)
        log = log - log.logsumexp(-2, keepdim=True)
    return log.exp()


@torch.no_grad()
def converged(cost: Tensor, eps: float, iterations: int) -> Tensor:
    """As many iterations as it takes, on the kernel: shares no code with the layer."""
    kernel = (-cost / eps).exp()
    column = torch.ones_like(kernel[..., :1])
    for _ in range(iterations):
        row = 1 / (kernel @ column)
        column = 1 / (kernel.mT @ row)
    return row * kernel * column.mT


@dataclass
class Gradients:
    """Of a loss of the plan in the cost."""

    iterations: list[int]
    errors: list[float]  # unrolled, relative
    kept: list[int]  # bytes
    error: float  # of the layer
    layer_iterations: list[int]  # of its solver, which stops at several tolerances
    layer_kept: list[int]


def compare(loss: Callable[[Tensor], Tensor], cost: Tensor, eps: float, tiny: bool) -> Gradients:
    """Gradients along eight random directions, against central differences of plans that have converged.

    `loss` maps plans ``(*batch, n, n)`` to ``(*batch)``, in float64.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(8, *cost.shape, generator=generator, dtype=cost.dtype)
    width, enough = 1e-4 * eps, 100 if tiny else 4000
    moved = converged(torch.cat([cost + width * directions, cost - width * directions]), eps, enough)
    plus, minus = loss(moved).chunk(2)
    truth = (plus - minus) / (2 * width)

    def error(plan: Plan) -> float:
        c = cost.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(plan(c)), c)
        return (((directions * gradient).sum((-2, -1)) - truth).norm() / truth.norm()).item()

    counts = [5, 20] if tiny else [5, 10, 20, 50, 100, 200, 500]
    plans: list[Plan] = [lambda c, n=n: unrolled(c, eps, n) for n in counts]
    # without Newton's method, so that there are iterations to count
    solvers = [KernelSinkhorn(rtol=rtol, newton_steps=0, check_every=1) for rtol in (1e-2, 1e-10)]
    steps = [int(sinkhorn_ex(cost, eps=eps, solver=solver).steps) for solver in solvers]
    layers: list[Plan] = [lambda c, solver=solver: layer(c, eps, solver) for solver in solvers]
    errors, kept = [error(p) for p in plans], [kept_bytes(p, cost) for p in plans]
    return Gradients(counts, errors, kept, error(lambda c: layer(c, eps)), steps, [kept_bytes(p, cost) for p in layers])


def kept_bytes(plan: Plan, cost: Tensor) -> int:
    """Bytes of the distinct tensors that autograd keeps between forward and backward."""
    return saved_bytes(lambda: plan(cost.clone().requires_grad_()))[1]


def draw(found: Gradients, folder: Path) -> tuple[Path, Path]:
    """Error and memory against the number of iterations."""
    figure, axis = axes()
    axis.loglog(found.iterations, found.errors, "o-", ms=3, color=ORANGE, label="unrolled")
    axis.axhline(found.error, color=BLUE, label="layer")
    axis.set(title="Relative error of the gradient", xlabel="iterations")
    axis.legend(loc="center left")
    error = save(figure, folder / "error.png")
    figure, axis = axes()
    axis.loglog(found.iterations, [k / 2**20 for k in found.kept], "o-", ms=3, color=ORANGE, label="unrolled")
    axis.plot(found.layer_iterations, [k / 2**20 for k in found.layer_kept], "o-", ms=3, color=BLUE, label="layer")
    axis.set(title="Kept for the backward pass, MiB", xlabel="iterations")
    axis.legend(loc="upper left")
    return error, save(figure, folder / "kept.png")
