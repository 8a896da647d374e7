"""What a process of a group does with Bloop: see test_bloop_distributed.py."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from difflayers.bilevel import Bloop


def place(world: int) -> Any:
    return dist.group.WORLD if world else None


def trained(group: Any, *, wrapped: bool = False) -> list[Tensor]:
    """Parameters and average after three steps; two micro-batches a step, a process has every world-th sample."""
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    spare = nn.Parameter(torch.ones(2, dtype=torch.float32))  # of which one process alone knows
    draw = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, 2, 12, 4, generator=draw, dtype=torch.float64), torch.randint(3, (3, 2, 12), generator=draw)
    net = DistributedDataParallel(model, process_group=group) if wrapped and group is not None else model
    bloop = Bloop([*model.parameters(), spare], weight=0.7, rho=0.4, group=group)
    optimizer = torch.optim.Adam([*model.parameters(), spare], lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):
            mine = slice(rank, None, world)
            if net is model:
                out = net(x[step, part, mine])
            else:
                with net.no_sync():
                    out = net(x[step, part, mine])
            main, aux = cross_entropy(out, t[step, part, mine]) / 2, out.square().sum(-1).mean() / 2
            if rank == 0:
                main = main + world * spare.square().sum().double()  # its share of the mean is the whole
            bloop.backward(main, aux, update=part == 1)
        optimizer.step()
    return [*(p.detach().clone() for p in model.parameters()), spare.detach().double(), *bloop.average]


CASES = {"plain": trained, "wrapped": lambda group: trained(group, wrapped=True)}
ERRORS: dict[str, Any] = {}
