"""Problems whose data can be divided among processes, for test_distributed.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from difflayers.bilevel import Bilevel

F64 = torch.float64
SAMPLES, FEATURES = 24, 5
Batch = tuple[Tensor, Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def place(world: int) -> Any:
    """Nothing, or the group of all."""
    return dist.group.WORLD if world else None


def rank_of(group: Any) -> int:
    return 0 if group is None else dist.get_rank(group)


def size_of(group: Any) -> int:
    return 1 if group is None else dist.get_world_size(group)


def data(seed: int, n: int = SAMPLES) -> Batch:
    return randn(n, FEATURES, seed=seed), randn(n, seed=seed + 100)


def part(batch: Batch, group: Any, processes: int | None = None) -> Batch:
    """The samples of this process: the first `processes` divide them, the others have none."""
    W, r = processes or size_of(group), rank_of(group)
    W = min(W, size_of(group))
    n = len(batch[0])
    own = slice(min(r, W) * n // W, min(r + 1, W) * n // W)
    return batch[0][own], batch[1][own]


def count(batch: Batch) -> int:
    return len(batch[0])


def upper(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
    X, t = batch
    return (X @ y - t).cos().mean() + 0.1 * (x.sin() * y).sum()


def lower(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
    """Logistic loss with one weight decay for each feature, and something mixed in every sample."""
    X, t = batch
    return nn.functional.softplus(X @ y * t.sign() + 0.3 * (X * x).sum(-1)).mean() + (x.exp() * y.square()).sum() / 2


def problem(group: Any, **options: Any) -> Bilevel:
    return Bilevel(upper, lower, group=group, **options)


def soft_threshold(v: Tensor, x: Tensor, step: Any) -> Tensor:
    return v.sign() * (v.abs() - 0.02 * step * x.exp()).clamp_min(0)


def plane(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y.sum() - x.sum().sin(), (y * x).sum() - 0.1])


def start() -> tuple[Tensor, Tensor]:
    return 0.3 * randn(FEATURES, seed=1), 0.3 * randn(FEATURES, seed=2)


class Net(nn.Module):
    """A module as a variable, with a BatchNorm that is in evaluation mode and a parameter that stays."""

    def __init__(self, outputs: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, 4, dtype=F64), nn.Linear(4, outputs, dtype=F64)
        self.norm = nn.BatchNorm1d(4, dtype=F64).eval()
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(0.5 * randn(*p.shape, seed=seed + i))

    def forward(self, X: Tensor) -> Tensor:
        return self.b(self.norm(torch.tanh(self.a(X))))


def module_upper(x: nn.Module, y: nn.Module, batch: Batch) -> Tensor:
    X, t = batch
    return (y(X).squeeze(-1) - t).square().mean()


def module_lower(x: nn.Module, y: nn.Module, batch: Batch) -> Tensor:
    """Samples weighted by a net."""
    X, t = batch
    decay = torch.stack([p.square().sum() for p in y.parameters()]).sum()
    return (torch.sigmoid(x(X).squeeze(-1)) * (y(X).squeeze(-1) - t).square()).mean() + 3 * decay


def pieces_upper(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
    terms = {0: y.square().sum(), 1: (y * x).sum().sin(), 2: x.square().sum(), 3: x.new_ones(())}
    return torch.stack([terms[i % 4] for i in batch.tolist()]).mean()


def pieces_lower(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
    """Terms that leave x, y or both aside, or do not mix them: a process may have some kinds only."""
    terms = {0: y.square().sum() * 3, 1: (y * x).sum().exp(), 2: (x**3).sum(), 3: x.new_ones(()), 4: (y - 1).sum()}
    return torch.stack([terms[i] for i in batch.tolist()]).mean()


PIECES = torch.tensor([0, 0, 0, 2, 3, 4, 1, 1, 0, 3, 2, 3])  # even parts for 1, 2, 3 processes


def rows_upper(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
    """Blocks: tasks with a target each, the batch."""
    return (y - batch).square().sum(-1) / 2 + 0.1 * (x.sin() * y).sum(-1)


def rows_lower(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
    return (y - batch - x).square().sum(-1) / 2 + (x.exp() * y.square()).sum(-1) / 2 + 0.1 * (y**4).sum(-1)


def share(m: int, group: Any) -> slice:
    """The blocks of this process, of m."""
    W, r = size_of(group), rank_of(group)
    return slice(r * m // W, (r + 1) * m // W)


def rows_problem(m: int, group: Any, **options: Any) -> Bilevel:
    own = share(m, group)
    return Bilevel(rows_upper, rows_lower, blocks=own.stop - own.start, group=group, **options)


def whole(own: Tensor, m: int, group: Any) -> Tensor:
    """The rows of all processes."""
    out = own.new_zeros(m, *own.shape[1:])
    out[share(m, group)] = own
    if group is not None:
        dist.all_reduce(out, group=group)
    return out


def averaged(tensors: Any, group: Any) -> list[Tensor]:
    """As DistributedDataParallel does to gradients."""
    out = [t.detach().clone() for t in tensors]
    for t in out:
        if group is not None:
            dist.all_reduce(t, group=group)
            t /= size_of(group)
    return out
