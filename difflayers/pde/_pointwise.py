r"""A pointwise residual: :math:`r_n = F(T_n; \phi)` from the differential terms of a field at each point alone.

Since F sees one point at a time, its derivatives by the terms of all points come from one product each:
:math:`\partial F / \partial T` from one backward pass a component, :math:`\sum_q c_q F_q''` from one more a term.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from difflayers._checks import check_shape, dimensions
from difflayers.linalg._autodiff import plain_forward, pullback
from difflayers.linalg._captured import refuse_coupling

Params = tuple[Tensor, ...]


class Terms(dict[str, Tensor]):
    """The declared terms by name; any other name is refused."""

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(f"residual: expected one of the terms {', '.join(self)}, got {name!r}, which was not declared")


@dataclass(frozen=True)
class Pointwise:
    """A user's residual on stacked terms ``(*batch, N, T)`` and a flat tuple of tensors.

    Attributes:
        function: ``fn(terms, params)`` of shape ``(*batch, N)`` or ``(*batch, N, Q)``.
        names: Names of the terms, handed over as a dictionary; None: stacked.
        spec: Structure of the parameters.
        leaves: The parameters that are numbers, None where a tensor stands.
    """

    function: Callable[..., Any]
    names: tuple[str, ...] | None
    spec: Any
    leaves: tuple[Any, ...]

    def __call__(self, T: Tensor, params: Params) -> Tensor:
        """``(*batch, N, Q)`` residuals."""
        terms: Any = T if self.names is None else Terms(zip(self.names, T.unbind(-1), strict=True))
        queue = iter(params)
        leaves: Any = [next(queue) if leaf is None else leaf for leaf in self.leaves]
        out = self.function(terms, self.spec.unflatten(leaves))
        if not isinstance(out, Tensor):
            raise ValueError(f"residual output: expected a tensor, got {type(out).__name__}")
        if out.dtype != T.dtype or out.device != T.device:
            raise ValueError(
                f"residual output: expected {T.dtype} on {T.device} as the terms are, got {out.dtype} on {out.device}"
            )
        points = T.shape[:-1]
        if out.ndim == len(points) + 1 and out.shape[:-1] == points and out.shape[-1] > 0:
            return out
        check_shape("residual output", out.shape, points, ", a number a point (or with components behind)")
        return out.unsqueeze(-1)

    def pull(self, T: Tensor, params: Params) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        """The residuals and the pullback of a cotangent to the terms."""
        live = torch.is_grad_enabled() and any(t.requires_grad for t in (T, *params))
        return pullback(lambda T: self(T, params), T, record=live)

    def linearise(self, T: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """``(*batch, N, Q)`` residuals and their ``(*batch, N, Q, T)`` derivatives, as numbers."""
        r, pull = pullback(lambda T: self(T, params), T, record=False)
        unit = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
        return r, torch.stack([pull(e.expand_as(r))[0] for e in unit.unbind()], -2)

    def curvature(self, T: Tensor, c: Tensor, params: Params) -> Tensor:
        """``(*batch, N, T, T)``: the Hessians of F by the terms, summed over the components with factors `c`."""
        _, pull = pullback(lambda T: self.pull(T, params)[1](c)[0], T, record=False)
        unit = torch.eye(T.shape[-1], dtype=T.dtype, device=T.device)
        return torch.stack([pull(e.expand_as(T))[0] for e in unit.unbind()], -2)

    def refuse_coupled_points(self, T: Tensor, params: Params) -> bool:
        """Finds points that see each other. Returns whether it could look."""
        try:
            with plain_forward(T):  # what is looked at once must not be counted by hooks, such as a checkpoint's
                return refuse_coupling(lambda T: self(T, params), T, "", "residual")
        except ValueError as error:
            if "do not see each other" not in str(error):
                raise
            raise ValueError(
                "residual: expected a pointwise function, got one whose value at a point depends on the terms at "
                "another (a mean over the points, a difference between neighbours?); derivatives are terms of their own"
            ) from None


def stacked(named: Any, name: str, event_ndim: int) -> tuple[Any, tuple[str, ...] | None]:
    """Terms by name as one tensor with a dimension for them, behind that of the points."""
    if not isinstance(named, Mapping):
        return named, None
    for key, value in named.items():
        if not isinstance(value, Tensor) or value.ndim < event_ndim:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}[{key!r}]: expected a tensor of at least {dimensions(event_ndim)}, got {got}")
    if not named:
        raise ValueError(f"{name}: expected at least one term, got none")
    shapes = {key: tuple(value.shape) for key, value in named.items()}
    if len({(s[-event_ndim:]) for s in shapes.values()}) > 1:
        raise ValueError(f"{name}: expected terms of one shape, got {shapes}")
    terms = torch.broadcast_tensors(*named.values())
    return torch.stack(terms, -event_ndim), tuple(named)


def flat_params(
    params: Any, param_ndims: Any, points: int
) -> tuple[Any, tuple[Any, ...], list[Any], list[int], list[str]]:
    """Structure, numbers, tensors, event dimensions and names of the parameters."""
    tree: Any = params
    leaves, spec = optree.tree_flatten(tree)
    names = ["params" + "".join(f"[{k!r}]" for k in path) for path in optree.tree_paths(tree)]
    if param_ndims is None:
        ndims: list[int | None] = [None] * len(leaves)
    else:
        try:
            ndims = optree.broadcast_prefix(param_ndims, tree)
        except (ValueError, TypeError) as error:
            raise ValueError(f"param_ndims: expected the structure of `params` or a prefix of it: {error}") from None
    tensors, kept, events = [], [], []
    for name, leaf, k in zip(names, leaves, ndims, strict=True):
        if not isinstance(leaf, Tensor):
            if not isinstance(leaf, bool | int | float):
                raise ValueError(f"{name}: expected a tensor or a Python number, got {type(leaf).__name__}")
            continue
        if not leaf.is_floating_point() and leaf.dtype != torch.bool:
            raise ValueError(
                f"{name}: expected a floating-point tensor, got {leaf.dtype} (indices may be captured: they carry no "
                "gradient)"
            )
        if k is None:
            leaf = leaf.unsqueeze(-1) if leaf.ndim == 0 else leaf
            if leaf.shape[-1] not in (1, points):
                raise ValueError(
                    f"{name}: expected 1 or {points} entries in the last dimension, one for all points or one for each "
                    f"(a number a batch element has shape (*batch, 1); `param_ndims` allows other shapes), got shape "
                    f"{tuple(leaf.shape)}"
                )
        elif leaf.ndim < k:
            raise ValueError(f"{name}: expected at least {dimensions(k)} (param_ndims), got shape {tuple(leaf.shape)}")
        tensors.append(leaf)
        kept.append(name)
        events.append(1 if k is None else k)
    return spec, tuple(None if isinstance(t, Tensor) else t for t in leaves), tensors, events, kept
