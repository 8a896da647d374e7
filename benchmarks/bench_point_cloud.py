"""Entropic transport between two clouds of points: value and gradient in the points, with and without a matrix.

In the first cases every contender computes the value between n and n uniform points in the plane, for squared distances
and an eps of 0.05 of their range, without debiasing, and its gradient in the points of the first cloud, in float32.
Ours runs at its default tolerance. The SamplesLoss of geomloss is given half the squared distance, half the eps, and
scaling=0.9; at 0.95 its gradient has two thirds of the error at twice the time. Its backends "online" and "multiscale"
need KeOps, a compiler of its own, so that "tensorized" stands for it. A contender that stores matrices of more than 5e7
entries has no row.

The last two cases are the divergence of 40 and 30 points in float64 at eps = 0.08, as on the migration page of
geomloss: there a call costs more than its arithmetic. Ours and SamplesLoss, which takes a fixed number of steps, each
run at the loosest setting with which value and gradient reach the error in the name of the case; its default of 0.5 for
`scaling` comes first.

The reference is Sinkhorn's iteration on the stored kernel in float64, until the L1 error of the sums is below 1e-12,
and the envelope theorem.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import AsLooseAs, Case, Contender, Options, run
from difflayers.transport import KernelSinkhorn, PointCloud, sinkhorn_divergence, sinkhorn_value

EPS = 0.1  # of squared distances up to 2
TARGET = 1e-4
STORED = 5e7
SIZES = (4_000, 10_000)
FEW = (40, 30)
BLUR = 0.2  # eps = 2 BLUR^2
ERRORS = (5e-2, 1e-3)

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


def reference(x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, y, n, m = x.double(), y.double(), len(x), len(y)
    C = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square_()
    K, v = (C / -eps).exp_(), x.new_ones(m)
    for _ in range(100_000):
        u = m / (K @ v)
        v = n / (K.mT @ u)
        if float((u * (K @ v) - m).abs().sum()) < 1e-12 * n * m:
            break
    # potentials eps log u and eps log v, for masses 1/n and 1/m: P = u K v / (n m)
    value = eps * (u.log().mean() + v.log().mean())
    gradient = 2 * (x * (u * (K @ v)).unsqueeze(-1) - u.unsqueeze(-1) * (K @ (v.unsqueeze(-1) * y))) / (n * m)
    return value, gradient


def divergence_reference(x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    (cross, by_cross), (own, by_own), (other, _) = (reference(*pair, eps) for pair in ((x, y), (x, x), (y, y)))
    return cross - own / 2 - other / 2, by_cross - by_own  # OT(x, x) / 2 moves by the gradient in one of its arguments


def case(n: int, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(n, 2, generator=generator) for _ in range(2))
    expected = tuple(t.to(device) for t in reference(x, y, EPS))
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


def ours_divergence(rtol: float) -> Value:
    return lambda x, y: sinkhorn_divergence(x, y, eps=2 * BLUR**2, solver=KernelSinkhorn(rtol=rtol)) / 2


def their_divergence(scaling: float) -> Value:
    from geomloss import SamplesLoss

    return SamplesLoss("sinkhorn", p=2, blur=BLUR, scaling=scaling)


def divergence(error: float, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(n, 2, generator=generator, dtype=torch.float64) for n in FEW)
    y = y + 0.3
    expected = tuple(t.to(device) / 2 for t in divergence_reference(x, y, 2 * BLUR**2))
    x, y = x.to(device), y.to(device)

    def contender(name: str, way: Callable[[float], Value], ladder: tuple[float, ...], label: str) -> Contender:
        job = AsLooseAs(lambda setting: with_gradient(way(setting), x, y), ladder, expected, error, label)
        return Contender(name, job, settings=job.settings)

    contenders = [
        contender("difflayers.transport.sinkhorn_divergence", ours_divergence, (1e-1, 1e-2, 1e-3, 1e-4, 1e-5), "rtol"),
        contender("geomloss.SamplesLoss", their_divergence, (0.5, 0.7, 0.9, 0.95, 0.99, 0.995), "scaling"),
    ]
    name = f"divergence of {FEW[0]} and {FEW[1]} points to {error:g}"
    return Case(name, contenders, expected, memory=False, target=error)


def main(options: Options) -> None:
    cases = [case(n, options.device) for n in SIZES] + [divergence(error, options.device) for error in ERRORS]
    run("point_cloud", cases, options)
