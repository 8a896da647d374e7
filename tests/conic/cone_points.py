"""Points for tests of cones, and their projections in 40 digits."""

import itertools

import mpmath
import numpy as np
import torch

from difflayers.conic import (
    DualExponential,
    DualPower,
    Exponential,
    Free,
    NonNegative,
    PositiveSemidefinite,
    Power,
    Product,
    RotatedSecondOrder,
    SecondOrder,
    Zero,
)
from difflayers.testing.cases import _conic_oracles as oracles

THREE = (Exponential(), DualExponential(), Power(0.5), Power(0.3), Power(0.9), DualPower(0.3))
VECTORS = (Zero(), Free(), NonNegative(), SecondOrder(), RotatedSecondOrder(), *THREE)
MIXED = Product([(SecondOrder(), 3), (Exponential(), 3), (Exponential(), 3), (PositiveSemidefinite(), 4), (Free(), 1)])

SIZES = [0.0, 1.0, -1.0, 1e-9, -1e-9, 1e9, -1e9]


def by_name(cone) -> str:
    return str(cone)


def exact(cone, v):
    """The projection in 40 digits."""
    name = type(cone).__name__
    if name == "Exponential":
        return oracles.exponential.__wrapped__(mpmath, v)
    if name == "DualExponential":
        return oracles.dual_exponential.__wrapped__(mpmath, v)
    return oracles.power.__wrapped__(mpmath, v, cone.alpha, name == "DualPower")


def nearest(cone, points: torch.Tensor) -> torch.Tensor:
    with mpmath.workdps(40):
        return torch.tensor([[float(c) for c in exact(cone, p.tolist())] for p in points], dtype=torch.float64)


def extremes(seed: int, plain: int, mixed: int, corners: int) -> torch.Tensor:
    """Ordinary points, points whose coordinates differ by up to 18 orders of magnitude, and points on the faces."""
    generator = np.random.default_rng(seed)
    grid = np.array(list(itertools.product(SIZES, repeat=3)))
    wide = generator.standard_normal((mixed, 3)) * 10 ** generator.uniform(-9, 9, (mixed, 3))
    rows = [generator.standard_normal((plain, 3)), wide, grid[generator.permutation(len(grid))[:corners]]]
    return torch.from_numpy(np.concatenate(rows))


def batch(cone, size: int, seed: int = 0, n: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    event = {2: (n, n)}.get(
        cone.ndim, (3,) if cone in THREE else (sum(d for _, d in cone.parts),) if cone == MIXED else (n,)
    )
    return torch.randn(size, *event, generator=generator, dtype=torch.float64)


def largest(x: torch.Tensor, ndim: int = 1) -> torch.Tensor:
    return x.abs().flatten(-ndim).amax(-1)
