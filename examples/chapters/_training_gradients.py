"""The trained network beside its rivals: Adam on its weights, and gradients through unrolled training."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from chapters._plots import BLUE, ORANGE, axes, save
from difflayers.relu import ConvexReLUSolution, Gates, convex_gated_relu
from difflayers.testing import saved_bytes

# ---------------------------------------------------------------------------------------------------------------- Adam


@dataclass
class Descent:
    """Objective less its optimum, relative to it."""

    steps: list[int]
    excess: list[list[float]]  # by step, of each start
    ends: list[float]


def descend(X: Tensor, y: Tensor, s: Tensor, beta: Tensor, gates: Gates, *, starts: int, steps: int) -> Descent:
    """Trains the weights of the network itself, with weight decay, from random starts side by side."""
    optimum = convex_gated_relu(X, y, beta, gates.vectors, sample_weight=s).objective.item()
    generator, M = torch.Generator().manual_seed(1), (X @ gates.vectors.mT >= 0).to(X.dtype)
    P, d = gates.vectors.shape
    W = torch.randn((starts, P, d), generator=generator, dtype=X.dtype).div(d**0.5).requires_grad_()
    a = torch.randn((starts, P), generator=generator, dtype=X.dtype).div(P**0.5).requires_grad_()
    optimiser = torch.optim.Adam([W, a], 0.01)
    out = Descent([], [], [])
    for step in range(steps + 1):
        fit = (M * (X @ W.mT) * a.unsqueeze(-2)).sum(-1)
        decay = beta / 2 * (W.square().sum((-2, -1)) + a.square().sum(-1))
        objective = (s * (fit - y).square()).sum(-1) / 2 + decay
        if step % max(steps // 50, 1) == 0:
            out.steps.append(step)
            out.excess.append((objective.detach() / optimum - 1).tolist())
        optimiser.zero_grad()
        objective.sum().backward()
        optimiser.step()
    out.ends = out.excess[-1]
    return out


def draw_descent(found: Descent, path: Path) -> Path:
    """One line a start."""
    figure, axis = axes()
    axis.semilogy(found.steps, found.excess, color=ORANGE, lw=1.2)
    axis.set(title="Adam: excess over the optimum", xlabel="step")
    return save(figure, path)


# ----------------------------------------------------------------------------------------------------------- gradients


@dataclass
class Comparison:
    """Of a loss of the trained network, in the weights of groups of samples and in the weight decay."""

    iterations: list[int]
    errors: list[float]  # unrolled, relative
    unrolled: list[int]  # bytes kept
    error: float  # of the layer
    kept: int


def compare(
    X: Tensor,
    y: Tensor,
    s: Tensor,
    beta: Tensor,
    gates: Gates,
    who: Tensor,
    query: Tensor,
    label: Tensor,
    *,
    tiny: bool,
) -> Comparison:
    """Gradients along three random directions, against central differences of networks that are certified optimal."""
    first = torch.stack([s[who == i][0] for i in range(int(who.max()) + 1)])
    at = torch.cat([first.clamp(0.05, 0.95).logit(), beta.log().reshape(1)])
    open_gates = (query @ gates.vectors.mT >= 0).to(X.dtype)

    def loss(neurons: Tensor) -> Tensor:
        answer = (open_gates * (query @ neurons.mT)).sum(-1)
        return torch.nn.functional.softplus(-2 * label * answer).mean(-1)

    def data(z: Tensor) -> tuple[Tensor, Tensor]:
        return z[..., :-1].sigmoid()[..., who], z[..., -1].exp()

    def layer(z: Tensor) -> ConvexReLUSolution:
        weight, decay = data(z)
        return convex_gated_relu(X, y, decay, gates.vectors, sample_weight=weight)

    directions = torch.randn((3, len(at)), generator=torch.Generator().manual_seed(0), dtype=at.dtype)
    moved = layer(torch.cat([at + 1e-5 * directions, at - 1e-5 * directions]))
    assert bool((moved.gap < 1e-9 * moved.objective).all())
    plus, minus = loss(moved.v).chunk(2)
    truth = (plus - minus) / 2e-5

    def measured(train: Callable[[Tensor], Tensor]) -> tuple[float, int]:
        z = at.clone().requires_grad_()
        neurons, kept = saved_bytes(lambda: train(z))
        (gradient,) = torch.autograd.grad(loss(neurons), z)
        return ((directions @ gradient - truth).norm() / truth.norm()).item(), kept

    counts = [3, 10] if tiny else [10, 30, 100, 300, 1000]
    rows = [measured(lambda z, n=n: unrolled(X, y, *data(z), gates, n)) for n in counts]
    error, kept = measured(lambda z: layer(z).v)
    return Comparison(counts, [row[0] for row in rows], [row[1] for row in rows], error, kept)


def unrolled(X: Tensor, y: Tensor, s: Tensor, beta: Tensor, gates: Gates, iterations: int) -> Tensor:
    """What one writes first: accelerated proximal gradient steps, recorded by autograd."""
    M = (X @ gates.vectors.mT >= 0).to(X.dtype)
    with torch.no_grad():
        root = s.sqrt()
        step = 1 / torch.linalg.eigvalsh(root[:, None] * (X @ X.mT) * (M @ M.mT) * root)[-1]
    u = v = X.new_zeros(gates.vectors.shape)
    t = 1.0
    for _ in range(iterations):
        residual = s * ((M * (X @ v.mT)).sum(-1) - y)
        z = v - step * (M * residual[:, None]).mT @ X
        size = z.norm(dim=-1, keepdim=True)
        new = z * (1 - step * beta / size.clamp_min(1e-12)).clamp_min(0)
        after = (1 + (1 + 4 * t * t) ** 0.5) / 2
        u, v, t = new, new + (t - 1) / after * (new - u), after
    return u


def draw_errors(found: Comparison, path: Path) -> Path:
    """Error against the number of iterations."""
    figure, axis = axes()
    axis.loglog(found.iterations, found.errors, "o-", ms=3, color=ORANGE, label="unrolled")
    axis.axhline(found.error, color=BLUE, label="layer")
    axis.set(title="Relative error of the gradient", xlabel="iterations")
    axis.legend(loc="center left")
    return save(figure, path)
