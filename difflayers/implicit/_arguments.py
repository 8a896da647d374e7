"""A user's trees as flat tensors: the unknown as one vector per element, the arguments as a tuple of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_same, check_shape, check_tensor, dimensions


class Unknown:
    """The unknown's pytree and its flat form ``(*batch, n)``."""

    def __init__(self, tree: Any, event_ndim: int) -> None:
        leaves, self.spec = optree.tree_flatten(tree)
        if not leaves:
            raise ValueError("init: expected a tensor or a pytree of tensors, got an empty tree")
        if event_ndim < 0:
            raise ValueError(f"event_ndim: expected at least 0, got {event_ndim}")
        names = ["init"] if len(leaves) == 1 and self.spec.is_leaf() else leaf_names(tree, "init")
        for name, leaf in zip(names, leaves, strict=True):
            check_tensor(name, leaf, min_ndim=event_ndim)
        check_same(zip(names, leaves, strict=True))
        self.leaves: list[Tensor] = leaves
        self.dtype = leaves[0].dtype
        self.event_ndim = event_ndim
        self.events = [leaf.shape[leaf.ndim - event_ndim :] for leaf in leaves]
        self.sizes = [event.numel() for event in self.events]
        self.batch = broadcast_batch(
            (name, tuple(leaf.shape[: leaf.ndim - event_ndim])) for name, leaf in zip(names, leaves, strict=True)
        )
        self.plain = self.spec.is_leaf() and event_ndim == 1

    def start(self, batch: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The given values as the solver's start."""
        leaves = [
            leaf.detach().to(dtype).expand((*batch, *e)) for leaf, e in zip(self.leaves, self.events, strict=True)
        ]
        return leaves[0] if self.plain else self.join(leaves, batch)

    def forget(self) -> None:
        """Lets go of the values: the graph keeps what it needs of them itself."""
        self.leaves = []

    def join(self, leaves: Sequence[Tensor], batch: tuple[int, ...]) -> Tensor:
        """Leaves to one vector per element."""
        flat = [leaf.reshape((*batch, size)) for leaf, size in zip(leaves, self.sizes, strict=True)]
        return flat[0] if len(flat) == 1 else torch.cat(flat, -1)

    def split(self, z: Tensor) -> Any:
        """One vector per element back to the user's tree."""
        if self.plain:
            return z
        parts = [z] if len(self.sizes) == 1 else z.split(self.sizes, -1)
        batch = z.shape[:-1]
        return self.spec.unflatten([p.reshape((*batch, *e)) for p, e in zip(parts, self.events, strict=True)])

    def check_output(self, out: Any, z: Tensor, argument: str) -> Tensor:
        """The function's output as one vector per element, or a ``ValueError`` that says what differs."""
        if self.plain and isinstance(out, Tensor):
            if out.shape != z.shape:
                check_shape(f"{argument} output", out.shape, z.shape, " as the unknown has")
            leaves = [out]
        else:
            leaves, spec = optree.tree_flatten(out)
            if spec != self.spec:
                raise ValueError(f"{argument} output: expected the structure of `init`, {self.spec}, got {spec}")
            for leaf, event in zip(leaves, self.events, strict=True):
                check_output_tensor(leaf, argument)
                check_shape(f"{argument} output", leaf.shape, (*z.shape[:-1], *event), " as the unknown has")
        check_output_dtype(leaves[0], z, argument)
        return leaves[0] if self.plain else self.join(leaves, z.shape[:-1])


def check_output_tensor(out: Any, argument: str) -> None:
    if not isinstance(out, Tensor):
        raise ValueError(f"{argument} output: expected a tensor, got {type(out).__name__}")


def check_output_dtype(out: Tensor, z: Tensor, argument: str) -> None:
    if out.dtype != z.dtype or out.device != z.device:
        raise ValueError(
            f"{argument} output: expected {z.dtype} on {z.device} as the unknown is, got {out.dtype} on {out.device}"
        )


def leaf_names(tree: Any, prefix: str) -> list[str]:
    return [
        prefix + "".join(f"[{key!r}]" if isinstance(key, int | str) else f".{key}" for key in path)
        for path in optree.tree_paths(tree)
    ]


class Arguments:
    """The argument pytree and its flat tuple of tensors; Python numbers stay where they are."""

    def __init__(self, args: Any, arg_ndims: Any) -> None:
        if isinstance(args, Tensor) or not isinstance(args, tuple | list):
            raise ValueError(f"args: expected a tuple of arguments, got {type(args).__name__}")
        tree: Any = tuple(args)
        leaves, self.spec = optree.tree_flatten(tree)
        self.flat = flat = all(isinstance(a, Tensor) for a in tree)  # the common case needs no walk along paths
        names = [f"args[{i}]" for i in range(len(tree))] if flat else leaf_names(tree, "args")
        self.leaves = leaves
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.names = tuple(names[i] for i in self.places)
        self.tensors: list[Tensor] = [leaves[i] for i in self.places]
        for name, leaf in zip(names, leaves, strict=True):
            if isinstance(leaf, Tensor):
                if not leaf.is_floating_point() and leaf.dtype != torch.bool:
                    raise ValueError(
                        f"{name}: expected a floating-point tensor, got {leaf.dtype} (indices may be captured: "
                        "they carry no gradient)"
                    )
            elif not isinstance(leaf, bool | int | float):
                raise ValueError(f"{name}: expected a tensor or a Python number, got {type(leaf).__name__}")
        self.ndims: tuple[int, ...] | None = None
        if arg_ndims is not None:
            try:
                prefix: Any = tuple(arg_ndims)
                spread = optree.broadcast_prefix(prefix, tree)
            except (ValueError, TypeError) as error:
                raise ValueError(f"arg_ndims: expected the structure of `args` or a prefix of it: {error}") from None
            self.ndims = tuple(spread[i] for i in self.places)
            for name, t, k in zip(self.names, self.tensors, self.ndims, strict=True):
                if t.ndim < k:
                    raise ValueError(
                        f"{name}: expected at least {dimensions(k)} (arg_ndims), got shape {tuple(t.shape)}"
                    )

    def batch(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and batch shapes of the arguments with declared dimensions."""
        if self.ndims is None:
            return []
        return [(n, tuple(t.shape[: t.ndim - k])) for n, t, k in zip(self.names, self.tensors, self.ndims, strict=True)]

    def forget(self) -> None:
        """Lets go of the tensors: the graph keeps what it needs of them itself."""
        self.tensors = []
        for i in self.places:
            self.leaves[i] = None

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The user's tree with these tensors in it."""
        if self.flat:
            return tensors
        leaves = list(self.leaves)
        for i, t in zip(self.places, tensors, strict=True):
            leaves[i] = t
        return self.spec.unflatten(leaves)
