"""What routers of mixtures of experts share: the routing, and the choice of the largest scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._checks import check_shape, check_tensor


class Routing(NamedTuple):
    """Which experts every token goes to.

    Attributes:
        weights: ``(*batch, tokens, k)`` with which the experts' outputs are summed; 0 for padding.
        experts: ``(*batch, tokens, k)`` integers, the best one first. Padding has experts too, so that they may serve
            as an index.
        load: ``(*batch, experts)`` how many tokens each expert gets, padding left out.
    """

    weights: Tensor
    experts: Tensor
    load: Tensor

    @property
    def imbalance(self) -> Tensor:
        """``(*batch)`` largest load over the mean load, less one: 0 where all are equal, and without tokens."""
        mean = self.load.sum(-1) / self.load.shape[-1]
        return torch.where(mean > 0, self.load.amax(-1) / mean.clamp(min=1e-30) - 1, 0)


def check_gates(name: str, gates: Tensor, mask: Tensor | None, top_k: int) -> None:
    """Refuses what no router works with."""
    check_tensor(name, gates, min_ndim=2)
    if not _is_count(top_k) or not 1 <= top_k <= gates.shape[-1]:
        raise ValueError(f"top_k: expected 1 to {gates.shape[-1]} as {name} has experts, got {top_k}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask: expected booleans, True for tokens that are none of the padding, got {got}")
        check_shape("mask", tuple(mask.shape), tuple(gates.shape[:-1]), f" as {name} has tokens")


def check_top_k(top_k: int, experts: int | None = None) -> None:
    """Refuses settings of a module."""
    if experts is not None and (not _is_count(experts) or experts < 1):
        raise ValueError(f"experts: expected an integer of at least 1, got {experts}")
    if not _is_count(top_k) or top_k < 1 or (experts is not None and top_k > experts):
        raise ValueError(f"top_k: expected 1 to {experts or 'the number of experts'}, got {top_k}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def choose(scores: Tensor, gates: Tensor, mask: Tensor | None, top_k: int, normalize: bool) -> Routing:
    """The experts of the largest scores, with their gates for weights; of equal scores the first.

    The choice has no derivative; the weights are differentiable in `gates`.
    """
    experts = scores.detach().argsort(dim=-1, descending=True, stable=True)[..., :top_k]
    return routing_of(experts, gates.gather(-1, experts), mask, normalize, scores.shape[-1])


def routing_of(experts: Tensor, weights: Tensor, mask: Tensor | None, normalize: bool, count: int) -> Routing:
    """The routing of given choices among `count` experts."""
    if normalize:
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total == 0, 1, total)
    if mask is not None:
        weights = torch.where(mask.unsqueeze(-1), weights, 0)
    counted = torch.ones_like(experts) if mask is None else mask.unsqueeze(-1).expand(experts.shape).to(experts.dtype)
    load = experts.new_zeros(*experts.shape[:-2], count)
    return Routing(weights, experts, load.scatter_add(-1, experts.flatten(-2), counted.flatten(-2)))
