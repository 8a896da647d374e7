"""Cleaning of wrong labels with data on several processes: the same script with python, and with torchrun.

    python examples/bilevel_data_parallel.py
    torchrun --nproc-per-node 2 examples/bilevel_data_parallel.py

Half of 600 training digits have a wrong label. The upper problem gives every digit a weight such that the network
which the lower problem trains with these weights does well on 600 clean digits. Every process holds its share of the
digits, clean or not; weights and network are the same in all. In the end the processes compare a hypergradient with the
one that a single process finds with all digits.

Only what is marked with `group` below has to do with processes.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from difflayers.bilevel import SOBA, Bilevel, Constant, hypergradient, minimize
from difflayers.implicit import Implicit
from difflayers.linalg import CG

N = 600


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels, true labels, given labels (half of the first N are wrong), and the number of each digit."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    X, true = torch.tensor(pixels / 16, dtype=torch.float64)[order], torch.tensor(labels)[order]
    given = true.clone()
    given[: N // 2] = (
        true[: N // 2] + torch.randint(1, 10, (N // 2,), generator=torch.Generator().manual_seed(1))
    ) % 10
    return X, true, given, torch.arange(len(X))


def upper(x: Tensor, net: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    pixels, labels, _ = batch
    return cross_entropy(net(pixels), labels)


def lower(x: Tensor, net: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    pixels, labels, number = batch
    losses = cross_entropy(net(pixels), labels, reduction="none")
    decay = torch.stack([p.square().sum() for p in net.parameters()]).sum()
    return (x[number].sigmoid() * losses).mean() + 1e-3 * decay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    group, rank, processes = None, 0, 1
    if "RANK" in os.environ:  # torchrun
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        group, rank, processes = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same network in every process
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    wrapped = net if group is None else DistributedDataParallel(net, process_group=group)
    X, true, given, number = digits()
    everything = (X[N : 2 * N], true[N : 2 * N], number[N : 2 * N]), (X[:N], given[:N], number[:N])
    own = [tuple(t[rank::processes] for t in part) for part in everything]  # the share of this process
    test, x = slice(2 * N, None), torch.zeros(N, dtype=torch.float64)

    problem = Bilevel(upper, lower, samples=lambda batch: len(batch[0]))  # the network brings the group along
    algo = SOBA(problem, x, wrapped, step=Constant(100.0), step_lower=Constant(0.5))

    def accuracy() -> float:
        with torch.no_grad():
            return float((net(X[test]).argmax(-1) == true[test]).double().mean())

    begin = time.perf_counter()
    minimize(algo, steps, upper_batches=own[:1], lower_batches=own[1:], progress=rank == 0)
    seconds = time.perf_counter() - begin
    weight = algo.x.sigmoid()
    solver = Implicit(CG(rtol=1e-12), damping=1.0)  # the network has not converged: its Hessian bends downwards
    apart = hypergradient(problem, algo.x, wrapped, own, adjoint=solver).grad
    alone = hypergradient(Bilevel(upper, lower), algo.x, net, everything, adjoint=solver).grad
    off = torch.linalg.vector_norm(apart - alone) / torch.linalg.vector_norm(alone)
    if rank == 0:
        name = f"{processes} process{'es' * (processes > 1)}"
        print(f"{N} digits on {name}, {1e3 * seconds / steps:.1f} ms a step, {2 * N * steps / seconds:.0f} digits/s")
        print(f"test accuracy {accuracy():.3f}")
        print(f"mean weight of wrong labels {weight[: N // 2].mean():.3f}, of right ones {weight[N // 2 :].mean():.3f}")
        print(f"relative difference from the hypergradient of one process {float(off):.1e}")
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
