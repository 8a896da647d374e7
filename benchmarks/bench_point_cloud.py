"""Entropic transport between two clouds of points: value and gradient in the points, with and without a matrix.

Every contender computes the value between n and n uniform points in the plane, for squared distances and an eps of 0.05
of their range, without debiasing, and its gradient in the points of the first cloud, in float32. Ours runs at its
default tolerance. The SamplesLoss of geomloss is given half the squared distance, half the eps, and scaling=0.9; at
0.95 its gradient has two thirds of the error at twice the time. Its backends "online" and "multiscale" need KeOps, a
compiler of its own, so that "tensorized" stands for it. A contender that stores matrices of more than 5e7 entries has
no row.

The reference is Sinkhorn's iteration on the stored kernel in float64, until the L1 error of the sums is below 1e-12,
and the envelope theorem.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Case, Contender, Options, run
from difflayers.transport import PointCloud, sinkhorn_value

EPS = 0.1  # of squared distances up to 2
TARGET = 1e-4
STORED = 5e7
SIZES = (4_000, 10_000)

Value = Callable[[Tensor, Tensor], Tensor]


def points(x: Tensor, y: Tensor) -> Tensor:
    return sinkhorn_value(PointCloud(x, y), eps=EPS)


def matrix(x: Tensor, y: Tensor) -> Tensor:
    return sinkhorn_value(PointCloud(x, y).matrix(), eps=EPS)


def geomloss(x: Tensor, y: Tensor) -> Tensor:
    from geomloss import SamplesLoss

    loss = SamplesLoss("sinkhorn", p=2, blur=(EPS / 2) ** 0.5, scaling=0.9, debias=False, backend="tensorized")
    return 2 * loss(x, y)


def with_gradient(value: Value, x: Tensor, y: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    def job() -> tuple[Tensor, Tensor]:
        leaf = x.detach().clone().requires_grad_()
        out = value(leaf, y)
        return out.detach().double(), torch.autograd.grad(out, leaf)[0].double()

    return job


def reference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y, n = x.double(), y.double(), len(x)
    C = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square_()
    K, v = (C / -EPS).exp_(), x.new_ones(n)
    for _ in range(100_000):
        u = n / (K @ v)
        v = n / (K.mT @ u)
        if float((u * (K @ v) - n).abs().sum()) < 1e-12 * n * n:
            break
    # potentials eps log u and eps log v, for masses 1/n on both sides: P = u K v / n^2
    value = EPS * (u.log().mean() + v.log().mean())
    gradient = 2 * (x * (u * (K @ v)).unsqueeze(-1) - u.unsqueeze(-1) * (K @ (v.unsqueeze(-1) * y))) / n**2
    return value, gradient


def case(n: int, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(n, 2, generator=generator) for _ in range(2))
    expected = tuple(t.to(device) for t in reference(x, y))
    x, y = x.to(device), y.to(device)
    ways: list[tuple[str, Value, bool]] = [
        ("difflayers.transport.sinkhorn_value, PointCloud", points, False),
        ("difflayers.transport.sinkhorn_value, matrix", matrix, True),
        ("geomloss.SamplesLoss, tensorized", geomloss, True),
    ]
    contenders = [
        Contender(name, with_gradient(way, x, y)) for name, way, stores in ways if not (stores and n * n > STORED)
    ]
    return Case(f"{n} and {n} points", contenders, expected, target=TARGET)


def main(options: Options) -> None:
    run("point_cloud", [case(n, options.device) for n in SIZES], options)
