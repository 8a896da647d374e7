"""A tensor, a pytree of tensors or the parameters of a module as one flat vector, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from difflayers._checks import check_same, check_shape, check_tensor
from difflayers.implicit._arguments import leaf_names


class Variables:
    """What one level decides.

    Of a module these are the parameters that require a gradient, each once, however many places share it. With blocks
    every leaf is of shape ``(m, ...)``, and in place of a vector there is a matrix of one row a block; `join` and
    `split` also take the rows of some blocks alone.

    Attributes:
        module: The module, or None.
        names: Names of the leaves, for messages; of a module, the keys of its presentation.
        leaves: The tensors as they came.
        blocks: The number of blocks, or None.
        group: The process group that a DistributedDataParallel brought along, or None. Its module is the one inside.
    """

    def __init__(self, argument: str, tree: Any, blocks: int | None = None) -> None:
        self.argument, self.blocks, self.group = argument, blocks, None
        if isinstance(tree, DistributedDataParallel):
            tree, self.group = tree.module, tree.process_group
        self.module = tree if isinstance(tree, nn.Module) else None
        if self.module is not None and blocks is not None:
            raise ValueError(
                f"{argument}: expected a tensor or a pytree of tensors with blocks, got {type(tree).__name__} (see "
                "torch.func.stack_module_state)"
            )
        if self.module is not None:
            named = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
            self.names, self.leaves = list(named), list(named.values())
            labels = [f"{argument}.{name}" for name in self.names]
            if not self.leaves:
                raise ValueError(
                    f"{argument}: expected a module with parameters that require a gradient, got none in "
                    f"{type(tree).__name__}"
                )
        else:
            self.leaves, self.spec = optree.tree_flatten(tree)
            if not self.leaves:
                raise ValueError(f"{argument}: expected a tensor, a pytree of tensors or a module, got an empty tree")
            labels = [argument] if self.spec.is_leaf() else leaf_names(tree, argument)
            self.names = labels
        for label, leaf in zip(labels, self.leaves, strict=True):
            check_tensor(label, leaf)
        self.labels = labels
        check_same(zip(labels, self.leaves, strict=True))
        self.shapes = [leaf.shape for leaf in self.leaves]
        self.sizes = [leaf.numel() for leaf in self.leaves]
        if blocks is not None:
            for label, shape in zip(labels, self.shapes, strict=True):
                if shape[:1] != (blocks,):
                    raise ValueError(f"{label}: expected shape ({blocks}, ...), a row a block, got {tuple(shape)}")
            self.shapes = [shape[1:] for shape in self.shapes]
            self.sizes = [size // blocks for size in self.sizes]

    @property
    def size(self) -> int:
        """How many numbers they are, in each block."""
        return sum(self.sizes)

    def constants(self, wanted: bool = True) -> list[Tensor]:
        """The leaves cut off from their history, as leaves of a new graph if `wanted`."""
        plain = [leaf.clone() if leaf.is_inference() else leaf.detach() for leaf in self.leaves]
        return [leaf.requires_grad_() for leaf in plain] if wanted else plain

    def join(self, leaves: Sequence[Tensor]) -> Tensor:
        """Leaves to one vector."""
        if self.blocks is None:
            flat = [leaf.reshape(-1) for leaf in leaves]
        else:
            flat = [leaf.reshape(len(leaf), size) for leaf, size in zip(leaves, self.sizes, strict=True)]
        return flat[0] if len(flat) == 1 else torch.cat(flat, -1)

    def split(self, vector: Tensor) -> list[Tensor]:
        """One vector to leaves."""
        parts = [vector] if len(self.sizes) == 1 else vector.split(self.sizes, -1)
        rows = () if self.blocks is None else vector.shape[:1]
        return [part.reshape((*rows, *shape)) for part, shape in zip(parts, self.shapes, strict=True)]

    def tree(self, leaves: Sequence[Tensor]) -> Any:
        """Leaves in the structure of the user; a dict from names to tensors for a module."""
        if self.module is not None:
            return dict(zip(self.names, leaves, strict=True))
        return self.spec.unflatten(leaves)

    def present(self, vector: Tensor) -> Any:
        """One vector in the structure of the user."""
        return self.tree(self.split(vector))

    def returned(self, argument: str, tree: Any, rows: int | None = None) -> Tensor:
        """What a function of the problem returned in their structure, as a vector with its graph.

        Args:
            argument: The function, for messages.
            tree: What it returned.
            rows: With blocks, of how many.
        """
        own = self.argument
        got: Any
        if self.module is not None:
            if not isinstance(tree, dict) or set(tree) != set(self.names):
                got = list(tree) if isinstance(tree, dict) else type(tree).__name__
                raise ValueError(f"{argument} output: expected a dict of {self.names} as {own} has, got {got}")
            leaves = [tree[name] for name in self.names]
        else:
            leaves, spec = optree.tree_flatten(tree)
            if spec != self.spec:
                raise ValueError(f"{argument} output: expected the structure of {own}, {self.spec}, got {spec}")
        for leaf, part in zip(leaves, self.shapes, strict=True):
            shape = part if rows is None else (rows, *part)
            if not isinstance(leaf, Tensor) or leaf.shape != shape:
                got = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ValueError(f"{argument} output: expected shape {tuple(shape)} as {own} has, got {got}")
        return self.join(leaves)

    def read(self, argument: str, tree: Any) -> Tensor:
        """Another tree of the same structure (a module, or the dict that stands for it) as a vector."""
        if self.module is not None and isinstance(tree, dict):
            if list(tree) != self.names:
                raise ValueError(f"{argument}: expected tensors named {self.names}, got {list(tree)}")
            leaves = list(tree.values())
        else:
            other = Variables(argument, tree, self.blocks)
            leaves = other.leaves
            if (other.module is None) != (self.module is None) or (self.module is None and other.spec != self.spec):
                raise ValueError(f"{argument}: expected the structure of `{self.argument}`, got another one")
        first = self.leaves[0]
        for label, leaf, own in zip(self.labels, leaves, self.leaves, strict=True):
            check_shape(argument, leaf.shape, own.shape, f" as {label} has")
        return self.join([leaf.detach().to(first) for leaf in leaves])


def check_devices(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuses tensors on different devices."""
    first: tuple[str, Tensor] | None = None
    for name, t in named:
        first = (name, t) if first is None else first
        if t.device != first[1].device:
            raise ValueError(f"{name}: expected device {first[1].device} as of {first[0]}, got {t.device}")
