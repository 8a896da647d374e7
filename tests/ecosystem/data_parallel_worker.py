"""What a process of DistributedDataParallel finds for every model of :mod:`tests.ecosystem.models`."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.ecosystem.models import NAMES, built, loss_of


def place(world: int) -> int | None:
    """The number of the process, None without a group."""
    return dist.get_rank() if world else None


def trained(name: str, rank: int | None) -> list[Tensor]:
    """The parameters after two steps of SGD, and the gradients of the last one."""
    model, x = built(name)
    forward: Any = model
    if rank is not None:
        forward, x = DistributedDataParallel(model), x.chunk(dist.get_world_size())[rank]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(forward(x)).backward()
        optimizer.step()
    return [t.detach() for p in model.parameters() for t in (p, p.grad)]


CASES = {name: functools.partial(trained, name) for name in NAMES}
ERRORS: dict[str, Any] = {}
