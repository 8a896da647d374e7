"""Experts on several processes: the same script with python, and with torchrun.

    python examples/expert_parallel.py
    torchrun --nproc-per-node 2 examples/expert_parallel.py

A network learns basis functions for the logistic equation `u_t = r u (1 - u)` with a bump in the beginning. Eight
experts, side by side in x, find coefficients for their own boxes, so that each solves a small problem; nothing crosses
x in this equation, so every one of them is well-posed. Under torchrun each process solves its share of the experts; all
of them see the whole field, compute the same loss, and get the gradients that one process would get. A line at the end
compares with the solution in closed form, and the derivative of the field by the rate r with the exact one.

Only what is marked with `mesh` below has to do with processes.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

from difflayers.pde import PDE, Box, DomainExperts, HardBoxes, Initial, PDEConstraint, Sobol

EXPERTS, BASIS, WIDTH = 8, 24, 32
RATE = 2.0


class Logistic(PDE):
    """Growth with a limit, at every x for itself."""

    coords = ("t", "x")
    domain = Box(t=(0.0, 2.0), x=(-1.0, 1.0))
    terms = ("u", "u_t")
    params = {"r": RATE}  # noqa: RUF012
    conditions = (Initial("u0"),)

    def residual(self, T, p):
        return T["u_t"] - p["r"] * T["u"] * (1 - T["u"])


def bump(points: Tensor) -> Tensor:
    return 0.5 * torch.exp(-4 * points[:, 1] ** 2)


def solution(points: Tensor, r: float) -> tuple[Tensor, Tensor]:
    """The field, and its derivative by the rate."""
    t, u0 = points[:, 0], bump(points)
    u = u0 / (u0 + (1 - u0) * torch.exp(-r * t))
    return u, t * u * (1 - u)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    mesh, rank = None, 0
    if "RANK" in os.environ:  # torchrun
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("expert",))
        rank = dist.get_rank()
    torch.manual_seed(0)  # the same network in every process
    pde = Logistic()
    net = nn.Sequential(nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, BASIS))
    net.double()
    constraint = PDEConstraint(pde, sampler=Sobol(128, 16), row_weights={"initial": 10.0}, ridge=1e-8)
    layer = DomainExperts(constraint, HardBoxes(x=EXPERTS), mesh=mesh).double()

    r = torch.tensor([RATE], dtype=torch.float64, requires_grad=True)
    axes = [torch.linspace(low, high, 41, dtype=torch.float64) for low, high in pde.domain.bounds]
    points = torch.cartesian_prod(*axes)
    exact, slope = solution(points, RATE)

    def error() -> tuple[float, float]:
        """Of the field, and of the derivative of its mean by r."""
        u = layer(net, {"r": r}, {"u0": bump})(points)
        (by_r,) = torch.autograd.grad(u.mean(), r)
        miss = torch.linalg.vector_norm(u.detach() - exact) / torch.linalg.vector_norm(exact)
        return float(miss), float((by_r - slope.mean()).abs() / slope.mean().abs())

    before, _ = error()
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    begin = time.perf_counter()
    for _ in tqdm(range(steps), disable=rank > 0):
        optimiser.zero_grad()
        field = layer(net, values={"u0": bump})
        T = field.terms
        misses = T["u_t"] - RATE * T["u"] * (1 - T["u"])
        misses.square().mean().backward()
        optimiser.step()
    seconds = time.perf_counter() - begin
    after, by_rate = error()
    if rank == 0:
        processes = 1 if mesh is None else mesh.size()
        print(
            f"{EXPERTS} experts on {processes} process{'es' * (processes > 1)}, {1e3 * seconds / steps:.0f} ms a step"
        )
        print(f"relative error of the field {before:.2e} before training, {after:.2e} after")
        print(f"relative error of d mean(u) / d r: {by_rate:.2e}")
        print(f"largest jump between experts {float(field.jumps.max()):.1e}")
    if mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
