"""`python -m benchmarks.expert_throughput` compares two processes that share experts with one that has all of them.

Eight experts with 1000 points and 64 basis functions each solve Burgers' equation with a small network as their basis;
one step is the forward pass, a loss on the residual of the whole field, and the backward pass to the weights. One
process of one thread takes turns with two gloo processes of one thread each, and the ratio is that of neighbours in
time, so that what else the machine does strikes both. It must have a core for each; the load is printed.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

from benchmarks.harness import ROOT, cpu_model
from difflayers.pde import Burgers, DomainExperts, HardBoxes, PDEConstraint, Sobol

EXPERTS, POINTS, BASIS, WIDTH = 8, 1000, 64, 64
TARGET = 1.4


def start(points: Tensor) -> Tensor:
    return -torch.sin(torch.pi * points[:, 1])


class Step:
    """Forward and backward of one training step, without the step."""

    def __init__(self, mesh: Any, experts: int, points: int) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, BASIS)]
        self.net = nn.Sequential(*layers).double()
        constraint = PDEConstraint(Burgers(nu=0.1), sampler=Sobol(points, 64), ridge=1e-3)
        self.layer = DomainExperts(constraint, HardBoxes(x=experts), mesh=mesh).double()

    def __call__(self) -> tuple[float, list[Tensor]]:
        field = self.layer(self.net, values={"u0": start})
        T = field.terms
        loss = (T["u_t"] + T["u"] * T["u_x"] - 0.1 * T["u_xx"]).square().mean()
        return loss.item(), list(torch.autograd.grad(loss, list(self.net.parameters())))


def work(pipe: Connection, rank: int, world: int, store: str, experts: int, points: int) -> None:
    """A process: makes a step whenever it is told to, and says how long it took."""
    torch.set_num_threads(1)
    mesh = None
    if world > 1:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world),
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=300),
        )
        mesh = init_device_mesh("cpu", (world,))
    step = Step(mesh, experts, points)
    step()
    while pipe.recv():
        begin, busy = time.perf_counter(), time.process_time()
        loss, grads = step()
        numbers = [loss, *(float(g.norm()) for g in grads)]
        pipe.send((time.perf_counter() - begin, time.process_time() - busy, numbers))
    if world > 1:
        dist.destroy_process_group()


def turn(pipes: list[Connection]) -> tuple[float, float, list[float]]:
    """One step of a team: seconds until all are done, the largest processor time, and what came out."""
    begin = time.perf_counter()
    for pipe in pipes:
        pipe.send(True)
    answers = [pipe.recv() for pipe in pipes]
    return time.perf_counter() - begin, max(busy for _, busy, _ in answers), answers[0][2]


def measure(repetitions: int, experts: int = EXPERTS, points: int = POINTS) -> dict[str, Any]:
    """Seconds of both teams in turns, and their ratio."""
    context = multiprocessing.get_context("spawn")
    load = [os.getloadavg()[0]]
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryDirectory() as folder:
        teams, processes = [], []
        for world in (1, 2):
            pipes = []
            for rank in range(world):
                mine, other = context.Pipe()
                args = (other, rank, world, f"{folder}/store", experts, points)
                processes.append(context.Process(target=work, args=args, daemon=True))
                processes[-1].start()
                pipes.append(mine)
            teams.append(pipes)
        for pipes in teams:
            turn(pipes)
        rows = [[turn(pipes) for pipes in teams] for _ in tqdm(range(repetitions), desc="turns")]
        load.append(os.getloadavg()[0])
        for pipe in (pipe for pipes in teams for pipe in pipes):
            pipe.send(False)
        for process in processes:
            process.join()
    one, two = ([row[i] for row in rows] for i in range(2))
    worst = max(
        abs(a - b) / max(abs(a), 1e-300)
        for first, second in zip(one, two, strict=True)
        for a, b in zip(first[2], second[2], strict=True)
    )
    ratios = [first[0] / second[0] for first, second in zip(one, two, strict=True)]
    return {
        "name": "expert_throughput",
        "experts": experts,
        "points": points,
        "basis_functions": BASIS,
        "torch": torch.__version__,
        "device": cpu_model(),
        "cores": os.cpu_count(),
        "load_before": load[0],
        "load_after": load[1],
        "one_process_seconds": [first[0] for first in one],
        "two_processes_seconds": [second[0] for second in two],
        "one_process_cpu_seconds": statistics.median(first[1] for first in one),
        "two_processes_cpu_seconds": statistics.median(second[1] for second in two),
        "largest_relative_difference": worst,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[0]] * 2 if len(ratios) < 2 else statistics.quantiles(ratios, n=4)[::2],
    }


def main() -> None:
    """Measures, prints and writes `benchmarks/results/expert_throughput.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--scratch", action="store_true", help="do not write the result")
    options = parser.parse_args()
    found = measure(options.repetitions)
    one, two = (statistics.median(found[f"{team}_seconds"]) for team in ("one_process", "two_processes"))
    low, high = found["ratio_quartiles"]
    print(f"{found['device']}, {found['cores']} cores, load {found['load_before']:.2f} to {found['load_after']:.2f}")
    print(f"{EXPERTS} experts, {POINTS} points, {BASIS} basis functions, forward and backward:")
    print(
        f"  one process    {one * 1e3:7.1f} ms, of which the processor {found['one_process_cpu_seconds'] * 1e3:.1f} ms"
    )
    print(f"  two processes  {two * 1e3:7.1f} ms, each at most {found['two_processes_cpu_seconds'] * 1e3:.1f} ms")
    print(f"  ratio {found['ratio']:.2f} (quartiles {low:.2f} to {high:.2f}), wanted at least {TARGET}")
    fair = found["one_process_cpu_seconds"] / found["two_processes_cpu_seconds"]
    print(f"  ratio of processor times {fair:.2f}: without waiting for each other and for others")
    print(f"  largest relative difference of loss and gradients {found['largest_relative_difference']:.1e}")
    if found["load_before"] > 0.5:
        print("  the machine was busy: the ratio says little")
    if not options.scratch:
        path = ROOT / "benchmarks" / "results" / "expert_throughput.json"
        path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
