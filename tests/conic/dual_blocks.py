"""Every completion with the block of constraints it stands for: what its formulas are compared with."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor, nn

from difflayers.conic import (
    BallCompletion,
    BoxCompletion,
    Completion,
    EllipsoidCompletion,
    HyperbolicCompletion,
    NonNegative,
    PolytopeCompletion,
    PositiveSemidefinite,
    Product,
    RotatedSecondOrder,
    SecondOrder,
    SimplexCompletion,
    SpectraplexCompletion,
    Zero,
)

N = 4


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Block:
    """A completion, its set in cvxpy, and the rows ``Hx - h in cone`` whose multipliers it completes (None: none)."""

    name: str
    completion: Completion
    constraints: Callable[[cp.Variable], list]
    H: Tensor | None = None
    h: Tensor | None = None
    cone: Product | None = None
    positive: bool = False  # the minimum is finite for positive costs alone

    def minimum(self, r: np.ndarray) -> float:
        """The inner minimum by Clarabel."""
        x = cp.Variable(r.shape, symmetric=r.ndim == 2)
        problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(r, x))), self.constraints(x))
        tolerances = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-10)
        return float(problem.solve(solver=cp.CLARABEL, **tolerances))

    def distance(self, x: Tensor) -> float:
        """How far a point is from obeying the constraints."""
        variable = cp.Variable(x.shape, symmetric=x.ndim == 2)
        variable.value = x.numpy()
        constraints = self.constraints(variable)
        return max(float(np.max(constraint.violation())) for constraint in constraints)


LOWER, UPPER = numbers([-1.0, 0.0, -0.5, 0.3]), numbers([0.5, 2.0, 1.0, 0.9])
CENTER = numbers([0.4, -0.2, 0.1, 0.6])
D = rand(1, N, N) + 3 * torch.eye(N)
VERTICES = rand(2, 5, N)
EYE, ROW = torch.eye(N, dtype=torch.float64), torch.ones(1, N, dtype=torch.float64)
NONE = torch.zeros(1, N, dtype=torch.float64)
K = 3


def _hyperbola() -> tuple[Tensor, Tensor]:
    """(x_j, t_j, sqrt 2) in the rotated cone, one pair after the other."""
    rows = [row for j in range(2) for row in (EYE[j], EYE[j + 2], NONE[0])]
    return torch.stack(rows), numbers([0.0, 0.0, -math.sqrt(2)] * 2)


BLOCKS = [
    Block(
        "box",
        BoxCompletion(LOWER, UPPER),
        lambda x: [x >= LOWER.numpy(), x <= UPPER.numpy()],
        torch.cat([EYE, -EYE]),
        torch.cat([LOWER, -UPPER]),
        Product([(NonNegative(), 2 * N)]),
    ),
    Block(
        "ball",
        BallCompletion(1.3, center=CENTER),
        lambda x: [cp.norm(x - CENTER.numpy()) <= 1.3],
        torch.cat([NONE, EYE]),
        torch.cat([numbers([-1.3]), CENTER]),
        Product([(SecondOrder(), N + 1)]),
    ),
    *(
        Block(f"ball p={p:g}", BallCompletion(1.3, p, CENTER), lambda x, p=p: [cp.norm(x - CENTER.numpy(), p) <= 1.3])
        for p in (1, 1.25, 3, math.inf)
    ),
    Block(
        "ellipsoid",
        EllipsoidCompletion(D, 2.0, CENTER),
        lambda x: [cp.norm(D.numpy() @ (x - CENTER.numpy())) <= 2],
        torch.cat([NONE, D]),
        torch.cat([numbers([-2.0]), D @ CENTER]),
        Product([(SecondOrder(), N + 1)]),
    ),
    Block(
        "simplex",
        SimplexCompletion(2.5),
        lambda x: [x >= 0, cp.sum(x) == 2.5],
        torch.cat([EYE, ROW]),
        numbers([0.0] * N + [2.5]),
        Product([(NonNegative(), N), (Zero(), 1)]),
    ),
    Block("polytope", PolytopeCompletion(VERTICES), lambda x: _hull(x)),
    Block(
        "hyperbola",
        HyperbolicCompletion(),
        lambda x: [cp.SOC(x[j] + x[j + 2], cp.hstack([2, x[j] - x[j + 2]])) for j in range(2)],
        *_hyperbola(),
        Product([(RotatedSecondOrder(), 3), (RotatedSecondOrder(), 3)]),
        positive=True,
    ),
    Block(
        "spectraplex",
        SpectraplexCompletion(1.5),
        lambda X: [X >> 0, cp.trace(X) == 1.5],
        torch.cat([torch.eye(K * K), torch.eye(K).reshape(1, -1)]).double(),
        numbers([0.0] * K * K + [1.5]),
        Product([(PositiveSemidefinite(), K * K), (Zero(), 1)]),
    ),
]


def _hull(x: cp.Variable) -> list:
    weights = cp.Variable(len(VERTICES))
    if x.value is not None:
        weights.value = np.linalg.lstsq(np.vstack([VERTICES.numpy().T, np.ones(5)]), np.append(x.value, 1))[0]
    return [x == VERTICES.numpy().T @ weights, weights >= 0, cp.sum(weights) == 1]


def costs(block: Block, seed: int, count: int) -> Tensor:
    """Random costs for which the minimum is finite."""
    k = block.completion.ndim
    r = rand(seed, count, *((N,) if k == 1 else (K, K)))
    r = (r + r.mT) / 2 if k == 2 else r
    return r.abs() + 0.1 if block.positive else r


def network(inputs: int, outputs: int, seed: int = 0, size: float = 1.0) -> nn.Module:
    """In float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))
    with torch.no_grad():
        for p in layers.parameters():
            p.mul_(size)
    return layers
