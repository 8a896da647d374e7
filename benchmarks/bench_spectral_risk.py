"""Spectral risk, forward and backward: ours against a loop over isotonic regression, and against plain CVaR code.

With a penalty every contender computes the risk and its gradient in the losses. The loop sorts each row in numpy, calls
scikit-learn's or scipy's isotonic regression, which are compiled, one row after the other, and takes the optimal
weights for the gradient; it has no second derivative. For the Kullback-Leibler penalty there is no such routine: the
loop pools adjacent violators in Python.

Without a penalty the superquantile is the mean of the largest losses, which is one line of torch with `sort` or `topk`;
no other spectrum is.

The reference pools adjacent violators in Python, one block after the other, from block sums and logarithms; without a
penalty it is the sorted mean in numpy.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Case, Contender, Options, Result, run
from difflayers.conic import KL, ChiSquare, Divergence, esrm, spectral_risk, superquantile

STRENGTH = 0.05
ALPHA = 0.9
SIZES = ((1, 1_000), (64, 1_000), (1, 100_000), (64, 100_000))
TARGET = 1e-9


def chi_square_blocks(x: np.ndarray, sigma: np.ndarray, scale: float) -> np.ndarray:
    """The first entry of every block, by a stack of sums."""
    sums, counts = [], []
    for v in (x / scale - sigma).tolist():
        total, count = v, 1
        while sums and sums[-1] * count > total * counts[-1]:
            total, count = total + sums.pop(), count + counts.pop()
        sums.append(total)
        counts.append(count)
    return np.cumsum([0, *counts[:-1]])


def kl_blocks(x: np.ndarray, sigma: np.ndarray, scale: float) -> np.ndarray:
    """The same with logarithms of sums."""
    logs, totals, counts, values = [], [], [], []
    for u, s in zip(((x - x[-1]) / scale).tolist(), sigma.tolist(), strict=True):
        log, total, count, value = u, s, 1, u - math.log(s)
        while values and values[-1] > value:
            values.pop()
            a, b = (logs.pop(), log) if logs[-1] < log else (log, logs.pop())
            log, total, count = b + math.log1p(math.exp(a - b)), total + totals.pop(), count + counts.pop()
            value = log - math.log(total)
        logs.append(log)
        totals.append(total)
        counts.append(count)
        values.append(value)
    return np.cumsum([0, *counts[:-1]])


def risk_and_weights(
    x: np.ndarray, sigma: np.ndarray, first: np.ndarray, kind: type[Divergence], scale: float
) -> tuple[float, np.ndarray]:
    """Sorted losses and the first entries of their blocks."""
    n, sizes = len(x), np.diff([*first, len(x)])
    mean = np.repeat(np.add.reduceat(sigma, first) / sizes, sizes)
    if kind is ChiSquare:
        q = mean + (x - np.repeat(np.add.reduceat(x, first) / sizes, sizes)) / scale
        return q @ x - scale / 2 * ((q - 1 / n) ** 2).sum(), q
    e = np.exp((x - np.repeat(np.maximum.reduceat(x, first), sizes)) / scale)
    q = mean * e / np.repeat(np.add.reduceat(e, first) / sizes, sizes)
    return q @ x - scale * (q * np.log(np.maximum(n * q, 1e-300))).sum(), q


def loop(
    losses: np.ndarray, sigma: np.ndarray, kind: type[Divergence], blocks: Callable[..., np.ndarray]
) -> tuple[Tensor, Tensor]:
    """Row after row in numpy."""
    n = losses.shape[-1]
    scale = 2 * n * STRENGTH if kind is ChiSquare else STRENGTH
    risks, weights = np.empty(len(losses)), np.empty_like(losses)
    for i, row in enumerate(losses):
        order = np.argsort(row)
        x = row[order]
        risks[i], weights[i, order] = risk_and_weights(x, sigma, blocks(x, sigma, scale), kind, scale)
    return torch.from_numpy(risks), torch.from_numpy(weights)


def scikit_learn(x: np.ndarray, sigma: np.ndarray, scale: float) -> np.ndarray:
    from sklearn.isotonic import isotonic_regression

    z = isotonic_regression(x / scale - sigma)
    return np.flatnonzero(np.diff(z, prepend=-np.inf))


def scipy(x: np.ndarray, sigma: np.ndarray, scale: float) -> np.ndarray:
    from scipy.optimize import isotonic_regression

    return isotonic_regression(x / scale - sigma).blocks[:-1]


def draw(batch: int, n: int) -> Tensor:
    """Losses as those of a classifier: positive, most of them small."""
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.softplus(torch.randn(batch, n, generator=generator, dtype=torch.float64) - 1)


def with_gradient(risk: Callable[[Tensor], Tensor], losses: Tensor) -> Callable[[], Result]:
    leaf = losses.clone().requires_grad_()

    def job() -> Result:
        value = risk(leaf)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    return job


def penalised(kind: type[Divergence], batch: int, n: int, device: str) -> Case:
    losses, spectrum = draw(batch, n), esrm(3.0)
    sigma = spectrum.weights(n, dtype=torch.float64)
    rows, weights = losses.numpy(), sigma.numpy()
    python = chi_square_blocks if kind is ChiSquare else kl_blocks
    expected = tuple(t.to(device) for t in loop(rows, weights, kind, python))
    ours = with_gradient(lambda x: spectral_risk(x, spectrum, penalty=kind(STRENGTH)), losses.to(device))
    contenders = [Contender("difflayers.spectral_risk", ours)]
    on_host = tuple(t.cpu() for t in expected)
    if kind is ChiSquare:
        ways = {"sklearn isotonic_regression, loop": scikit_learn, "scipy isotonic_regression, loop": scipy}
        contenders += [
            Contender(name, lambda way=way: loop(rows, weights, kind, way), on_host) for name, way in ways.items()
        ]
    else:
        contenders.append(Contender("pooling in Python, loop", lambda: loop(rows, weights, kind, python), on_host))
    # a process that measures memory would compute the reference again
    return Case(f"{kind.__name__} {batch}x{n}", contenders, expected, memory=batch * n < 100_000, target=TARGET)


def superquantiles(batch: int, n: int, device: str) -> Case:
    losses, tail = draw(batch, n), round(n * (1 - ALPHA))
    order = np.argsort(losses.numpy(), axis=-1)[:, -tail:]
    gradient = np.zeros(losses.shape)
    np.put_along_axis(gradient, order, 1 / tail, -1)
    mean = np.take_along_axis(losses.numpy(), order, -1).mean(-1)
    expected = torch.from_numpy(mean).to(device), torch.from_numpy(gradient).to(device)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "difflayers.spectral_risk": lambda x: spectral_risk(x, superquantile(ALPHA)),
        "torch.sort and mean": lambda x: x.sort(-1)[0][..., -tail:].mean(-1),
        "torch.topk and mean": lambda x: x.topk(tail, -1)[0].mean(-1),
    }
    contenders = [Contender(name, with_gradient(way, losses.to(device))) for name, way in ways.items()]
    return Case(f"superquantile {batch}x{n}", contenders, expected, memory=batch * n < 100_000, target=TARGET)


def main(options: Options) -> None:
    cases = [penalised(ChiSquare, *size, options.device) for size in SIZES]
    cases += [penalised(KL, *size, options.device) for size in SIZES[:3]]
    cases += [superquantiles(*size, options.device) for size in SIZES]
    run("spectral_risk", cases, options)
