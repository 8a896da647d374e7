r"""The kernel :math:`\exp((f_i + g_j - C_{ij}) / \epsilon)` between points, never stored, by blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ._costs import Cosine, Cost, SquaredEuclidean
from ._iteration import exp_, largest_log, times
from ._point_blocks import Blockwise, by_blocks

ENTRIES = {"cpu": 2**18}  # of a block, so that it stays in the cache
MANY_ENTRIES = 2**22  # elsewhere


def block_rows(cost: Cost, x: Tensor, y: Tensor, batch: torch.Size) -> int:
    """As many rows as have that many entries; a cost that is not known may keep differences of all pairs."""
    width = 1 if isinstance(cost, SquaredEuclidean | Cosine) else max(1, x.shape[-1])
    entries = ENTRIES.get(x.device.type, MANY_ENTRIES)
    return max(1, entries // max(1, batch.numel() * y.shape[-2] * width))


class Kernel:
    """On plain tensors, without derivative; batch dimensions broadcast.

    Args:
        cost: Of points.
        x: ``(*batch, n, d)``.
        y: ``(*batch, m, d)``.
        f: ``(*batch, n)``.
        g: ``(*batch, m)``.
        eps: ``(*batch)``.
        size: Rows of a block.
    """

    def __init__(self, cost: Cost, x: Tensor, y: Tensor, f: Tensor, g: Tensor, eps: Tensor, size: int) -> None:
        f = f.expand(*batch_of(x, y, f, g, eps), f.shape[-1])  # blocks then have their shape from the start
        self.cost, self.x, self.y, self.f, self.g, self.eps, self.size = cost, x, y, f, g, eps, size
        self.count = x.shape[-2]
        self.buffer: Tensor | None = None
        self.fused = x.dtype == torch.float64
        self.factors = self._factors() if type(cost) is SquaredEuclidean else None
        self.only = self._block(0, self.count) if self.count <= size else None

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Two thin matrices whose product is the exponent, or in single precision (more exact so) the negative cost."""
        origin = self.y.mean(-2, keepdim=True)
        x, y = self.x - origin, self.y - origin
        left, right = -x.square().sum(-1), -y.square().sum(-1)
        x = 2 * x
        if self.fused:
            e = self.eps.unsqueeze(-1)
            x, left, right = x / e.unsqueeze(-1), (self.f + left) / e, (self.g + right) / e
        batch = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1], x.shape[:-2])
        left, right = (t.expand(*batch, t.shape[-1]).unsqueeze(-1) for t in (left, right))
        x, y = (t.expand(*batch, *t.shape[-2:]) for t in (x, y))
        return (
            torch.cat([x, left, torch.ones_like(left)], -1),
            torch.cat([y, torch.ones_like(right), right], -1).mT,
        )

    def _block(self, start: int, stop: int) -> Tensor:
        """In the memory of the last one, where its shape is the same: the next is asked for when that is done with."""
        if self.factors is not None and self.fused:
            left, right = self.factors
            same = self.buffer is not None and self.buffer.shape[-2] == stop - start
            self.buffer = moved = torch.matmul(left[..., start:stop, :], right, out=self.buffer if same else None)
        else:
            moved = self.f[..., start:stop].unsqueeze(-1) + self.g.unsqueeze(-2)
            if self.factors is not None:
                moved.add_(self.factors[0][..., start:stop, :] @ self.factors[1])
            else:
                moved.sub_(self.cost(self.x[..., start:stop, :], self.y))
            moved.div_(self.eps[..., None, None])
        return exp_(moved)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their part of the kernel."""
        if self.only is not None:
            yield slice(0, self.count), self.only
            return
        for start in range(0, self.count, self.size):
            stop = min(start + self.size, self.count)
            yield slice(start, stop), self._block(start, stop)

    def there_and_back(
        self, v: Tensor, turn: Callable[[slice, Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """A product with the kernel and one with its transpose at the price of one.

        Args:
            v: ``(*batch, m)``.
            turn: Of the rows of a block and their products with `v`: what to keep, and what to send back.

        Returns:
            ``(*batch, n)`` what was kept, and ``(*batch, m)`` the transpose times what was sent.
        """
        kept = total = v.new_empty(0)
        for rows, K in self.blocks():
            keep, send = turn(rows, times(K, v))
            part = times(K.mT, send)
            if rows.start == 0:
                # small tensors that stay are allocated once: between those that come and go they would leave holes
                kept, total = keep.new_empty((*keep.shape[:-1], self.count)), torch.zeros_like(part)
            kept[..., rows] = keep
            total += part
        return kept, total

    def there(self, v: Tensor) -> Tensor:
        """``K v``."""
        found = v.new_empty(0)
        for rows, K in self.blocks():
            part = times(K, v)
            if rows.start == 0:
                found = part.new_empty((*part.shape[:-1], self.count))
            found[..., rows] = part
        return found

    def back(self, u: Tensor) -> Tensor:
        """``K^T u``."""
        total = u.new_empty(0)
        for rows, K in self.blocks():
            part = times(K.mT, u[..., rows])
            total = torch.zeros_like(part) if rows.start == 0 else total
            total += part
        return total

    def sums(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """``K b`` and ``K^T a``."""
        return self.there_and_back(b, lambda rows, t: (t, a[..., rows].expand(t.shape)))


def products(
    cost: Cost, size: int, x: Tensor, y: Tensor, f: Tensor, g: Tensor, eps: Tensor, **vectors: Tensor
) -> list[Tensor]:
    """``K right`` for ``right`` of ``(*batch, m, k)``, ``K^T left`` for ``left`` of ``(*batch, n, k)``: what is given.

    Differentiable in all of them; ``less_one``, in the place of ``right``, is for ``K - 1``.
    """
    names = tuple(vectors)

    def fn(x: Tensor, y: Tensor, f: Tensor, g: Tensor, eps: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        moved = log_kernel(cost, x, y, f, g, eps)
        K = moved.exp() if "less_one" not in names else torch.expm1(moved)
        return tuple((K.mT if name == "left" else K) @ v for name, v in zip(names, given, strict=True))

    batch = batch_of(x, y, f, g, eps)
    ends = {"left": y.shape[-2], "right": x.shape[-2], "less_one": x.shape[-2]}
    shapes = tuple(
        (*torch.broadcast_shapes(batch, v.shape[:-2]), ends[name], v.shape[-1]) for name, v in vectors.items()
    )
    rows = (-2, None, -1, None, None, *(-2 if name == "left" else None for name in names))
    outputs = tuple(None if name == "left" else -2 for name in names)
    return by_blocks(Blockwise(fn, rows, outputs, shapes, size), x, y, f, g, eps, *vectors.values())


def matrix(cost: Cost, size: int, x: Tensor, y: Tensor, f: Tensor, g: Tensor, eps: Tensor) -> Tensor:
    """``K`` itself, differentiable; what led to it is not kept."""

    def fn(*given: Tensor) -> tuple[Tensor, ...]:
        return (log_kernel(cost, *given).exp(),)

    shape = (*batch_of(x, y, f, g, eps), x.shape[-2], y.shape[-2])
    return by_blocks(Blockwise(fn, (-2, None, -1, None, None), (-2,), (shape,), size), x, y, f, g, eps)[0]


def log_kernel(cost: Cost, x: Tensor, y: Tensor, f: Tensor, g: Tensor, eps: Tensor) -> Tensor:
    """As ``log_ratio`` of a matrix."""
    moved = f.unsqueeze(-1) + g.unsqueeze(-2) - cost(x, y)
    lowest = -1e60 if moved.dtype == torch.float64 else -1e18
    return (moved.clamp(min=lowest) / eps[..., None, None]).clamp(max=largest_log(moved.dtype))


def batch_of(x: Tensor, y: Tensor, f: Tensor, g: Tensor, eps: Tensor, *_: Any) -> torch.Size:
    """Of the kernel."""
    return torch.broadcast_shapes(x.shape[:-2], y.shape[:-2], f.shape[:-1], g.shape[:-1], eps.shape)
