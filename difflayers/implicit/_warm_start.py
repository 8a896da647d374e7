"""Last solutions by sample index, to start the next solve from."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor, nn

from difflayers._solution import Solution, Status


class WarmStart(nn.Module):
    """Keeps the last solution of every sample and offers it as `init`; works with every solver of the library.

    One vector per sample is stored, outside of the graph. A sample that has not been seen, or whose stored solution is
    not finite (its solve failed), starts from the default. It is part of the ``state_dict``, so a resumed run starts
    warm; a new copy accepts the state of an old one.

    Args:
        size: Number of samples.

    Example:
        >>> import torch
        >>> from difflayers.implicit import Newton, WarmStart, root_find_ex
        >>> warm, index = WarmStart(100), torch.tensor([3, 7])
        >>> a = torch.tensor([2.0, 10.0], dtype=torch.float64)
        >>> for _ in range(2):
        ...     init = warm(index, torch.ones(2, dtype=torch.float64))
        ...     solution = root_find_ex(lambda y, a: y**3 + y - a, init, (a,), event_ndim=0)
        ...     warm.store(index, solution)
        >>> solution.steps
        tensor([1, 1])
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        self.size = size
        self._leaves: list[Tensor] = []
        self._seen: Tensor | None = None

    def forward(self, index: Tensor, default: Any) -> Any:
        """Starts for the samples in `index`.

        Args:
            index: ``(batch,)`` integers below `size`.
            default: Tensor or pytree ``(batch, ...)`` for samples that have no stored solution.

        Returns:
            `default` with the stored solutions in their rows, detached.
        """
        leaves, spec = optree.tree_flatten(default)
        index = self._check(index, leaves)
        leaves = [leaf.detach() for leaf in leaves]
        if self._seen is None:
            return spec.unflatten(leaves)
        if len(leaves) != len(self._leaves):
            raise ValueError(f"default: expected {len(self._leaves)} leaves as stored, got {len(leaves)}")
        seen = self._seen.to(index.device)[index]
        out = []
        for leaf, stored in zip(leaves, self._leaves, strict=True):
            if leaf.shape[1:] != stored.shape[1:]:
                raise ValueError(f"default: expected events {tuple(stored.shape[1:])}, got {tuple(leaf.shape[1:])}")
            rows = stored.to(leaf.device, leaf.dtype)[index]
            out.append(torch.where(seen.reshape(-1, *[1] * (leaf.ndim - 1)), rows, leaf))
        return spec.unflatten(out)

    @torch.no_grad()
    def store(self, index: Tensor, value: Any) -> None:
        """Keeps solutions for the samples in `index`.

        Args:
            index: ``(batch,)`` integers below `size`.
            value: A :class:`~difflayers.Solution`, tensor or pytree ``(batch, ...)``; failed or non-finite samples are
                skipped.
        """
        good: Tensor | None = None
        if isinstance(value, Solution):
            good, value = value.status <= Status.MAX_STEPS, value.value
        leaves = [leaf.detach() for leaf in optree.tree_leaves(value)]
        index = self._check(index, leaves)
        if self._seen is None:
            self._seen = torch.zeros(self.size, dtype=torch.bool, device=leaves[0].device)
            self._leaves = [leaf.new_zeros((self.size, *leaf.shape[1:])) for leaf in leaves]
        for leaf in leaves:
            finite = torch.isfinite(leaf).flatten(1).all(-1) if leaf.ndim > 1 else torch.isfinite(leaf)
            good = finite if good is None else good & finite
        assert good is not None
        rows = index[good].to(self._seen.device)
        for stored, leaf in zip(self._leaves, leaves, strict=True):
            stored[rows] = leaf[good].to(stored.device, stored.dtype)
        self._seen[rows] = True

    def _check(self, index: Tensor, leaves: list[Any]) -> Tensor:
        if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool or index.ndim != 1:
            got = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            raise ValueError(f"index: expected a vector of integers, got {got}")
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < self.size):
            raise ValueError(f"index: expected numbers from 0 to {self.size - 1}, got up to {int(index.max())}")
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or leaf.ndim < 1 or leaf.shape[0] != index.shape[0]:
                shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ValueError(f"value: expected {index.shape[0]} rows, one per index, got {shape}")
        return index

    def get_extra_state(self) -> dict[str, Any]:
        """Stored solutions, for ``state_dict``."""
        return {"leaves": list(self._leaves), "seen": self._seen}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Stored solutions, from ``state_dict``."""
        self._leaves, self._seen = [leaf.clone() for leaf in state["leaves"]], state["seen"]
        if self._seen is not None:
            self._seen = self._seen.clone()

    def extra_repr(self) -> str:
        """The size."""
        return f"size={self.size}"
