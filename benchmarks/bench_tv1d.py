"""Total variation of signals, forward and backward: ours against accelerated gradients on the dual.

The dual method is what libraries offer for this prox (Beck and Teboulle's, with momentum and a fixed number of steps).
It gets the fewest steps of a ladder with which the result has an error of at most 1e-6 in value and gradient; where
nothing on the ladder reaches that, the most, and the table says so. "Unrolled" is differentiated by autograd through
its steps. "Forward only" records no graph and returns the value alone, so its time is a lower bound for whatever
backward pass could be added to it.

The reference is the dynamic programme of N. A. Johnson, 2013, in numpy, and the means over its pieces.
"""

from collections import deque
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.harness import AsLooseAs, Case, Contender, Options, Result, run
from difflayers.proximal import prox_tv1d

TARGET = 1e-6
UNROLLED = (100, 1000)
FORWARD = (1000, 3000, 10_000, 30_000)


def dynamic_programme(x: np.ndarray, t: float) -> np.ndarray:
    """The derivative of the best cost so far as a queue of knots: position, change of slope and of offset."""
    n = len(x)
    low, high = np.empty(n - 1), np.empty(n - 1)
    knots: deque[tuple[float, float, float]] = deque()
    a, b, c, d = 1.0, -x[0], 1.0, -x[0]  # slope and offset of the first and of the last piece
    for i in range(n - 1):
        while knots and a * knots[0][0] + b < -t:
            _, da, db = knots.popleft()
            a, b = a + da, b + db
        low[i] = (-t - b) / a
        while knots and c * knots[-1][0] + d > t:
            _, da, db = knots.pop()
            c, d = c - da, d - db
        high[i] = (t - d) / c
        knots.appendleft((low[i], a, b + t))
        knots.append((high[i], -c, t - d))
        a, b, c, d = 1.0, -t - x[i + 1], 1.0, t - x[i + 1]
    while knots and a * knots[0][0] + b < 0:
        _, da, db = knots.popleft()
        a, b = a + da, b + db
    z = np.empty(n)
    z[-1] = -b / a
    for i in reversed(range(n - 1)):
        z[i] = min(max(z[i + 1], low[i]), high[i])
    return z


def reference(x: Tensor, t: float, g: Tensor) -> tuple[Tensor, Tensor]:
    """Value, and the cotangent of `x`: the mean of `g` over each piece."""
    values, cotangents = [], []
    for row, cotangent in zip(x.cpu().numpy(), g.cpu().numpy(), strict=True):
        z = dynamic_programme(row, t)
        piece = np.cumsum(np.diff(z, prepend=z[0]) != 0)
        means = np.bincount(piece, cotangent) / np.bincount(piece)
        values.append(z)
        cotangents.append(means[piece])
    return torch.from_numpy(np.stack(values)).to(x), torch.from_numpy(np.stack(cotangents)).to(x)


def dual(x: Tensor, t: float, steps: int) -> Tensor:
    """Accelerated projected gradients on the flow between neighbours."""
    p = q = torch.zeros_like(x[..., 1:])
    momentum = 1.0
    for _ in range(steps):
        z = x - pad(q, (1, 0)) + pad(q, (0, 1))
        new = (q + z.diff(dim=-1) / 4).clamp(-t, t)
        faster = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        p, q, momentum = new, new + (momentum - 1) / faster * (new - p), faster
    return x - pad(p, (1, 0)) + pad(p, (0, 1))


def forward_only(x: Tensor, t: float, steps: int) -> Result:
    with torch.no_grad():
        return dual(x, t, steps)


def make_case(batch: int, n: int, t: float, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    noise, g = (torch.randn(batch, n, generator=generator, dtype=torch.float64) for _ in range(2))
    steps = torch.randn(batch, n // 100 + 1, generator=generator, dtype=torch.float64).repeat_interleave(100, -1)
    x, g = (steps[:, :n] + 0.2 * noise).to(device), g.to(device)
    exact = reference(x, t, g)
    leaf = x.clone().requires_grad_()

    def ours() -> Result:
        z = prox_tv1d(leaf, t)
        return z.detach(), *torch.autograd.grad(z, leaf, g)

    def unrolled(steps: int) -> Result:
        z = dual(leaf, t, steps)
        return z.detach(), *torch.autograd.grad(z, leaf, g)

    backward = AsLooseAs(lambda k: partial(unrolled, k), UNROLLED, exact, TARGET, "steps")
    forward = AsLooseAs(lambda k: partial(forward_only, x, t, k), FORWARD, exact[0], TARGET, "steps")
    contenders = [
        Contender("difflayers.prox_tv1d", ours),
        Contender("dual, unrolled", backward, settings=backward.settings),
        Contender("dual, forward only", forward, exact[0], forward.settings),
    ]
    return Case(f"prox_tv1d {batch}x{n}, t = {t:g}", contenders, exact, target=TARGET)


def main(options: Options) -> None:
    sizes = [(1, 1000, 1.0), (1, 10_000, 1.0), (64, 1000, 1.0)]
    run("tv1d", [make_case(*size, options.device) for size in sizes], options)
