"""Experts over the processes of a device mesh: what enters and leaves the part that each process solves alone.

Every process runs the whole program on the same numbers, but solves its own experts only. In between lies a boundary
with two crossings, each the transpose of another, so that derivatives of every order are right:

- *copy*: a replicated tensor enters. Its cotangents differ between processes, and are summed: *sum*.
- *gather*: the experts of all processes leave. The cotangent of the whole is replicated; each takes its *own* part.

The loss is replicated, and gradients carry no factor of the world size. All that moves is DTensor's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor, nn

from difflayers import _distributed
from difflayers._solution import Info, OnFailure, settle
from difflayers.linalg._autodiff import forward_mode, physical, primal, quick_apply, sample, transforms_active
from difflayers.linalg._captured import _differentiated, gradients_wanted
from difflayers.linalg._grads_batched import batched_backward

T = TypeVar("T")
_functorch = torch._C._functorch
_TRANSPOSED = {"copy": "sum", "sum": "copy", "gather": "own", "own": "gather"}


def share(E: int, mesh: Any) -> range:
    """The experts of this process, of E in all: their numbers differ by at most one."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise ValueError(f"mesh: expected a one-dimensional DeviceMesh (init_device_mesh), got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh: expected a one-dimensional DeviceMesh, got {mesh.ndim} dimensions; take one by its name, "
            'mesh["expert"]'
        )
    if mesh.get_coordinate() is None:
        raise ValueError("mesh: expected a one-dimensional DeviceMesh that this process is part of, got another")
    W, r = mesh.size(), mesh.get_local_rank()
    if E < W:
        raise ValueError(
            f"mesh: expected a one-dimensional DeviceMesh of at most {E} processes, one an expert, got {W}"
        )
    return _owned(E, W, r)


def _owned(E: int, W: int, r: int) -> range:
    return range(r * E // W, (r + 1) * E // W)


@quick_apply
class _Crossing(torch.autograd.Function):
    """One step over the boundary, ``(step, mesh, x) -> y``. Linear, with the transposed step as its derivative.

    DTensor has derivatives of its own; the second ones of ``from_local`` lack what was summed.
    """

    @staticmethod
    def forward(step: str, mesh: Any, x: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        x = x.detach()
        if step == "copy":
            return x.clone()
        if step == "own":
            return DTensor.from_local(x, mesh, [Replicate()]).redistribute(placements=[Shard(0)]).to_local().clone()
        return DTensor.from_local(x.contiguous(), mesh, [Partial() if step == "sum" else Shard(0)]).full_tensor()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.step, ctx.mesh, _ = inputs

    @staticmethod
    @batched_backward
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return None, None, _Crossing.apply(_TRANSPOSED[ctx.step], ctx.mesh, g)

    @staticmethod
    def jvp(ctx: Any, _step: Any, _mesh: Any, t: Tensor) -> Tensor:
        with forward_mode():
            return _Crossing.apply(ctx.step, ctx.mesh, primal(t))

    @staticmethod
    def vmap(info: Any, in_dims: Any, step: str, mesh: Any, x: Tensor) -> tuple[Tensor, int]:
        # the experts stay in front; torch 2.6 does not know -1
        return _Crossing.apply(step, mesh, x.movedim(in_dims[2], -1)), x.ndim - 1


def copied(tree: Any, mesh: Any) -> Any:
    """What is replicated, for use by this process alone: with gradients that are summed over the processes.

    A collective call. Tensors, numbers, modules and functions of tensors (which must not hold anything that is
    differentiated); refuses tensors that differ between processes. Names in errors are the keys of the tree.
    """
    together(mesh, lambda: _check_leaves(tree, mesh))
    paths, leaves, spec = optree.tree_flatten_with_path(tree)
    look = gradients_wanted()
    named: dict[str, Tensor] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        if isinstance(leaf, Tensor):
            named[_name(path)] = leaf
        elif isinstance(leaf, nn.Module):
            owned = {**dict(leaf.named_parameters()), **dict(leaf.named_buffers())}
            named |= {f"{_name(path)}.{key}": t for key, t in owned.items()}
    _check_replicated(named, mesh)
    copies = _copies({name: t for name, t in named.items() if look and _differentiated(t)}, mesh)
    out: list[Any] = []
    for path, leaf in zip(paths, leaves, strict=True):
        name = _name(path)
        if isinstance(leaf, Tensor):
            out.append(copies.get(name, leaf))
        elif isinstance(leaf, nn.Module):
            cut = len(name) + 1
            own = {key[cut:]: t for key, t in copies.items() if key.startswith(f"{name}.")}
            out.append(_Local(leaf, own, name, look))
        elif callable(leaf):
            out.append(_Guarded(leaf, name) if look else leaf)
        else:
            out.append(leaf)
    return optree.tree_unflatten(spec, out)


def copied_module(module: nn.Module, mesh: Any) -> nn.Module:
    """The module, with parameters as :func:`copied` makes them."""
    local: nn.Module = copied({"basis": module}, mesh)["basis"]
    return local


def gathered(local: Tensor, E: int, mesh: Any, dim: int, tied: Any = ()) -> Tensor:
    """The results of all E experts, along `dim`, of those of this process. A collective call.

    `tied` is what came out of :func:`copied`. A process whose experts leave some of it aside takes part in the sum of
    its gradients nevertheless; otherwise the others would wait.
    """
    return gathered_all([local], E, mesh, [dim], tied)[0]


def gathered_all(local: Sequence[Tensor], E: int, mesh: Any, dims: Sequence[int], tied: Any = ()) -> list[Tensor]:
    """As :func:`gathered`, for several results in one message for each dtype; integers and booleans are one."""
    fronts = [t.movedim(dim, 0) for t, dim in zip(local, dims, strict=True)]
    kinds = [t.dtype if t.is_floating_point() else torch.int64 for t in local]
    out: dict[int, Tensor] = {}
    for kind in dict.fromkeys(kinds):
        some = [i for i, k in enumerate(kinds) if k == kind]
        flat = [fronts[i].reshape(fronts[i].shape[0], fronts[i].shape[1:].numel()).to(kind) for i in some]
        every = _every(_tied(torch.cat(flat, 1), tied), E, mesh)
        for i, part in zip(some, every.split([f.shape[1] for f in flat], 1), strict=True):
            out[i] = part.reshape(E, *fronts[i].shape[1:]).to(local[i].dtype).movedim(0, dims[i])
    return [out[i] for i in range(len(local))]


def _every(x: Tensor, E: int, mesh: Any) -> Tensor:
    """``(E, n)`` rows of all processes."""
    W, most = mesh.size(), -(-E // mesh.size())
    if x.shape[0] < most:
        x = torch.cat([x, x.new_zeros(most - x.shape[0], *x.shape[1:])])
    every: Tensor = _Crossing.apply("gather", mesh, x)
    if E % W == 0:
        return every
    kept = [r * most + i for r in range(W) for i in range(len(_owned(E, W, r)))]
    return every.index_select(0, torch.tensor(kept, dtype=torch.int64, device=every.device))


def together(mesh: Any, action: Callable[[], T]) -> T:
    """The result of a process's own work, or an error in all processes if one has failed. A collective call.

    The action must not communicate, and what is differentiated must come to it through :func:`copied`. A process raises
    its own error; the others name it.
    """

    def checked() -> T:
        result = action()
        _refuse_strays(result)
        return result

    device = torch.device(mesh.device_type)
    return _distributed.together(mesh.get_group(), checked, device, "experts of other processes of the mesh")


def settled(value: Tensor, info: Info, on_failure: OnFailure, name: str) -> None:
    """Applies the failure policy to what was gathered: raises or warns, the same in every process.

    The processes have solved with ``"nan"`` or ``"ignore"``, so that nothing is left to be masked.
    """
    with torch.no_grad():
        settle(_in_front(value), Info(*map(_in_front, info)), on_failure, name=name)


def _in_front(t: Tensor) -> Tensor:
    """The plain tensor, with dimensions that are vmapped among those of the batch."""
    while _functorch.is_functorch_wrapped_tensor(t):
        dim = _functorch.maybe_get_bdim(t) if _functorch.is_batchedtensor(t) else None
        t = _functorch.get_unwrapped(t)
        t = t if dim is None else t.movedim(dim, 0)
    return t.detach()


class _Local(nn.Module):
    """A module with other tensors in place of its own."""

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor], name: str, look: bool) -> None:
        super().__init__()
        self.module, self.tensors, self.name, self.look = module, tensors, name, look

    def forward(self, x: Tensor) -> Tensor:
        if self.look:
            plain = {key: sample(t) for key, t in self.tensors.items()}
            _refuse_captured(lambda x: torch.func.functional_call(self.module, plain, (x,)), x, self.name)
            self.look = False
        out: Tensor = torch.func.functional_call(self.module, self.tensors, (x,))
        return out


class _Guarded:
    """A function, once seen to hold nothing that is differentiated."""

    def __init__(self, function: Callable[[Tensor], Any], name: str) -> None:
        self.function, self.name, self.look = function, name, True

    def __call__(self, x: Tensor) -> Any:
        if self.look:
            _refuse_captured(self.function, x, self.name)
            self.look = False
        return self.function(x)


def _refuse_captured(function: Callable[[Tensor], Any], x: Tensor, name: str) -> None:
    """One evaluation on constants: what is differentiated in its result came from elsewhere."""
    with torch.enable_grad():
        out = function(sample(x))
    if isinstance(out, Tensor) and _differentiated(out):
        raise ValueError(
            f"{name}: expected on a mesh an nn.Module (whose parameters are all that needs a gradient), a tensor, or a "
            "function that holds nothing that is being differentiated, got one that does; its gradient would miss the "
            "experts of other processes"
        )


def _refuse_strays(result: Any) -> None:
    """Follows the graph of a result to where it comes from; copies are the only way in."""
    if not torch.is_grad_enabled() or transforms_active():
        return
    todo: list[Any] = [t.grad_fn if t.grad_fn is not None else t for t in _tensors(result) if t.requires_grad]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node in seen or getattr(node, "step", None) == "copy":
            continue
        seen.add(node)
        stray = node if isinstance(node, Tensor) else getattr(node, "variable", None)
        if stray is not None:
            raise ValueError(
                "mesh: expected everything that is differentiated among the arguments of the layer, in modules and "
                f"tensors, got a tensor of shape {tuple(stray.shape)} from elsewhere (a closure, a number in a "
                "condition); its gradient would miss the experts of other processes"
            )
        todo.extend(following for following, _ in node.next_functions if following is not None)


def _tensors(result: Any) -> Iterator[Tensor]:
    for leaf in optree.tree_leaves(result):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])


def _check_leaves(tree: Any, mesh: Any) -> None:
    paths, leaves, _ = optree.tree_flatten_with_path(tree)
    for path, leaf in zip(paths, leaves, strict=True):
        if not (leaf is None or isinstance(leaf, Tensor | int | float) or callable(leaf)):
            raise ValueError(
                f"{_name(path)}: expected on a mesh a tensor, a number, a module or a function, got "
                f"{type(leaf).__name__}"
            )
        for t in [leaf] if isinstance(leaf, Tensor) else leaf.parameters() if isinstance(leaf, nn.Module) else ():
            if t.device.type != mesh.device_type:
                raise ValueError(f"mesh: expected one of {t.device.type} as {_name(path)} is, got {mesh.device_type}")


def _check_replicated(named: Mapping[str, Tensor], mesh: Any) -> None:
    """Refuses tensors that differ between processes, by three sums of each."""
    prints = []
    for t in named.values():
        x = physical(t)
        x = (torch.view_as_real(x) if x.is_complex() else x).detach().flatten().double()
        wave = torch.cos(torch.arange(x.numel(), dtype=x.dtype, device=x.device))
        prints.append(torch.stack([x.abs().sum(), x.sum(), (x * wave).sum(), x.new_tensor(float(x.numel()))]))
    if not prints:
        return
    each = _Crossing.apply("gather", mesh, torch.stack(prints).unsqueeze(0)).nan_to_num()
    off = (each - each[0]).abs() > 1e-6 * each[0, :, :1].abs()
    if bool(off.any()):
        rank, index, _ = (int(i) for i in off.nonzero()[0])
        raise ValueError(
            f"{list(named)[index]}: expected the same numbers in all processes of the mesh, got others in process "
            f"{rank} than in process 0 (the same seed, the same batch?)"
        )


def _copies(named: Mapping[str, Tensor], mesh: Any) -> dict[str, Tensor]:
    """The tensors, copied in one step for each dtype: the sum of their gradients is one message."""
    out: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(t.dtype for t in named.values()):
        some = {name: t for name, t in named.items() if t.dtype == dtype}
        real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in some.values()]
        flat = _Crossing.apply("copy", mesh, torch.cat([t.reshape(-1) for t in real]))
        for (name, t), r, part in zip(some.items(), real, flat.split([r.numel() for r in real]), strict=True):
            part = part.reshape(r.shape)
            out[name] = torch.view_as_complex(part) if t.is_complex() else part
    return out


def _tied(x: Tensor, tied: Any) -> Tensor:
    """`x`, as a function of everything copied, to any order: by sums over no elements."""
    if not x.is_floating_point():
        return x
    for leaf in optree.tree_leaves(tied):
        for t in leaf.tensors.values() if isinstance(leaf, _Local) else [leaf]:
            if isinstance(t, Tensor) and _differentiated(t):
                none = (torch.view_as_real(t) if t.is_complex() else t).reshape(-1)[:0]
                x = x + none.exp().sum().to(x.dtype)
    return x


def _name(path: Sequence[Any]) -> str:
    if not path:
        return "mesh"
    first, *rest = path
    return f"{first}" + "".join(f"[{key!r}]" for key in rest)
