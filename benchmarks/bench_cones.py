"""Projections on cones, forward and backward: ours against the closed form of each branch in plain torch.

4096 points in float64: at random, on all branches of their cone, and such as training meets and random numbers do not
(vectors of zeros, repeated eigenvalues, points next to a face). The contenders are what one writes first: `torch.where`
between branches, autograd through `eigh`, sixty steps of bisection for the exponential and the power cone followed by
one differentiable step of Newton. The reference computes 24 of the points and their cotangents in 40 digits where the
cone has a curved surface (or by eigenvalues), differentiated by central differences.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Case, Contender, Options, run
from difflayers import conic
from difflayers.testing.cases import _conic_oracles as oracles

BATCH, CHECKED = 4096, 24
TARGET = 1e-6


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------- branch by branch


def non_negative(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def second_order(v: Tensor) -> Tensor:
    t, x = v[..., :1], v[..., 1:]
    n = x.norm(dim=-1, keepdim=True)
    surface = (n + t) / 2 * torch.cat([torch.ones_like(t), x / n], -1)
    return torch.where(n <= t, v, torch.where(n <= -t, torch.zeros_like(v), surface))


def semidefinite(X: Tensor) -> Tensor:
    values, Q = torch.linalg.eigh((X + X.mT) / 2)
    return (Q * values.clamp_min(0).unsqueeze(-2)) @ Q.mT


def bisect(f: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Sixty halvings, and a step of Newton that carries the derivative."""
    with torch.no_grad():
        for _ in range(60):
            middle = (low + high) / 2
            below = f(middle) < 0
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        root = (low + high) / 2
    with torch.enable_grad():
        slope = torch.autograd.grad(f(root.requires_grad_()).sum(), root)[0].detach()
    return root.detach() - f(root.detach()) / slope


def exponential(v: Tensor) -> Tensor:
    r, s, t = v.detach().unbind(-1)
    inside = ((s > 0) & (s * (r / s).exp() <= t)) | ((r <= 0) & (s == 0) & (t >= 0))
    polar = ((r > 0) & (r * (s / r).exp() <= -math.e * t)) | ((r == 0) & (s <= 0) & (t <= 0))
    face = (r <= 0) & (s <= 0) & ~polar
    rest = ~(inside | polar | face)
    a, b, c = torch.where(rest.unsqueeze(-1), v, torch.ones_like(v)).unbind(-1)

    def equation(rho: Tensor) -> Tensor:
        D = (rho - 1) * rho + 1
        return ((rho - 1) * a + b) / D * rho.exp() - (a - rho * b) / D * (-rho).exp() - c

    low = torch.where(a > 0, 1 - b / a, -30.0).detach()
    high = torch.where(b > 0, a / b, 30.0).detach()
    rho = bisect(equation, low, high)
    tau = ((rho - 1) * a + b) / ((rho - 1) * rho + 1)
    surface = torch.stack([tau * rho, tau, tau * rho.exp()], -1)
    flat = torch.stack([v[..., 0], torch.zeros_like(v[..., 1]), v[..., 2].clamp_min(0)], -1)
    pick = lambda mask, x, y: torch.where(mask.unsqueeze(-1), x, y)  # noqa: E731
    return pick(inside, v, pick(polar, torch.zeros_like(v), pick(face, flat, surface)))


ALPHA = 0.3


def power(v: Tensor) -> Tensor:
    x, y, z = v.detach().unbind(-1)
    inside = (x >= 0) & (y >= 0) & (x.clamp_min(0) ** ALPHA * y.clamp_min(0) ** (1 - ALPHA) >= z.abs())
    dual = (-x).clamp_min(0) / ALPHA, (-y).clamp_min(0) / (1 - ALPHA)
    polar = (x <= 0) & (y <= 0) & (dual[0] ** ALPHA * dual[1] ** (1 - ALPHA) >= z.abs())
    rest = ~(inside | polar)
    a, b, c = torch.where(rest.unsqueeze(-1), v, torch.ones_like(v)).unbind(-1)
    q = c.abs()

    def halves(rho: Tensor) -> tuple[Tensor, Tensor]:
        m = rho * (q - rho)
        return (a + (a * a + 4 * ALPHA * m).sqrt()) / 2, (b + (b * b + 4 * (1 - ALPHA) * m).sqrt()) / 2

    def equation(rho: Tensor) -> Tensor:
        xi, eta = halves(rho)
        return rho - xi**ALPHA * eta ** (1 - ALPHA)

    rho = bisect(equation, torch.zeros_like(q).detach(), q.detach())
    surface = torch.stack([*halves(rho), c.sign() * rho], -1)
    pick = lambda mask, x, y: torch.where(mask.unsqueeze(-1), x, y)  # noqa: E731
    return pick(inside, v, pick(polar, torch.zeros_like(v), surface))


# ------------------------------------------------------------------------------------------------------------ the cases


class Problem(NamedTuple):
    """A cone, a formula for it, its points, the projection of one point, and what the points are."""

    cone: Any
    formula: Callable[[Tensor], Tensor]
    points: Tensor
    oracle: Callable[[np.ndarray], np.ndarray]
    kind: str = "random"


def problems() -> Iterator[Problem]:
    yield Problem(conic.NonNegative(), non_negative, normal(1, BATCH, 64), lambda x: np.maximum(x, 0))
    weights = torch.tensor([4.0] + [1.0] * 15, dtype=torch.float64)  # so that t compares with the norm of the others
    yield Problem(conic.SecondOrder(), second_order, normal(2, BATCH, 16) * weights, oracles.second_order)
    yield Problem(conic.PositiveSemidefinite(), semidefinite, normal(4, BATCH, 6, 6), oracles.semidefinite)
    yield Problem(conic.Exponential(), exponential, 2 * normal(5, BATCH, 3), oracles.exponential)
    yield Problem(conic.Power(ALPHA), power, normal(6, BATCH, 3), lambda x: oracles.power(x, ALPHA))
    zeros = normal(8, BATCH, 16) * (weights == 4)
    yield Problem(conic.SecondOrder(), second_order, zeros, oracles.second_order, "zero vectors")
    Q = torch.linalg.qr(normal(9, BATCH, 6, 6))[0]
    repeated = Q @ torch.tensor([2.0, 2, 1, -1, -1, -1], dtype=torch.float64).diag() @ Q.mT
    yield Problem(conic.PositiveSemidefinite(), semidefinite, repeated, oracles.semidefinite, "repeated eigenvalues")
    face = normal(10, BATCH, 3).abs() * torch.tensor([-60.0, 1, -1], dtype=torch.float64)
    yield Problem(conic.Exponential(), exponential, face, oracles.exponential, "next to a face")


def reference(problem: Problem, g: Tensor) -> tuple[Tensor, Tensor]:
    """Projections of the checked points, and cotangents by central differences along each coordinate."""
    x = problem.points[:CHECKED].numpy()
    onto = np.stack([problem.oracle(p) for p in x])
    pulled, step = np.zeros_like(x), 1e-5
    for index in np.ndindex(x.shape[1:]):
        shift = np.zeros(x.shape[1:])
        shift[index] = step
        up, down = (np.stack([problem.oracle(p + s) for p in x]) for s in (shift, -shift))
        slope = (up - down) / (2 * step)
        pulled[(slice(None), *index)] = (slope * g[:CHECKED].numpy()).reshape(CHECKED, -1).sum(-1)
    return torch.from_numpy(onto), torch.from_numpy(pulled)


def case(problem: Problem, device: str) -> Case:
    g = normal(7, *problem.points.shape)
    x, cotangent = problem.points.to(device, copy=True).requires_grad_(), g.to(device)

    def job(project: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def forward_backward() -> tuple[Tensor, ...]:
            z = project(x)
            (pulled,) = torch.autograd.grad(z, x, cotangent)
            return z.detach()[:CHECKED], pulled[:CHECKED]

        return forward_backward

    expected = tuple(t.to(device) for t in reference(problem, g))
    contenders = [
        Contender("difflayers", job(problem.cone.project)),
        Contender("torch, branch by branch", job(problem.formula)),
    ]
    return Case(f"{problem.cone}, {problem.kind}", contenders, expected, target=TARGET)


def main(options: Options) -> None:
    run("cones", [case(problem, options.device) for problem in problems()], options, memory=False)
