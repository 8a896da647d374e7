r"""Balancing of experts without an auxiliary loss, by a bias that is learned from the loads.

The routing that maximises the gates :math:`\sum_{ij} x_{ij} \gamma_{ij}` over choices of K experts a token, with load
L = K T / E for every expert, has the dual

.. math:: D(p) = \sum_i \max_{x_i} \sum_j x_{ij} (\gamma_{ij} + p_j) - L \sum_j p_j ,

convex, with subgradient :math:`A - L` for the loads A of the choice by :math:`\gamma + p`. A step against it,
:math:`p \leftarrow p + u (L - A)`, or against its signs, is the update of the bias.

X. Y. Han, Y. Zhong, A Theoretical Framework for Auxiliary-Loss-Free Load Balancing of Sparse Mixture-of-Experts in
Large-Scale AI Models, 2025; L. Wang et al., Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from difflayers._checks import check_shape

from ._routing import Routing, check_gates, check_top_k, choose


class AuxLossFreeBalancer(nn.Module):
    r"""Top-k routing by gates plus a bias that grows for experts with too little load: ALF-LB.

    Chooses the largest ``gates + bias`` and weighs with the gates alone. In training the loads of all calls are added
    up in the buffer ``load``; :meth:`update`, once a training step, moves the bias and starts counting anew. In
    evaluation the bias is used, and nothing is counted.

    On several processes each counts its own tokens. Sum the counts before the update, so that all have one bias:
    ``torch.distributed.all_reduce(balancer.load); balancer.update()``.

    Args:
        experts: Number of experts.
        top_k: Experts a token.
        rate: Length u of a step, above 0: in the unit of the gates, or, without signs, that a token.
        signed: :math:`p_j \leftarrow p_j + u \, \mathrm{sign}(L - A_j)`; False: :math:`p_j + u (L - A_j)`, with
            loads in tokens.
        decay: Makes step t as long as ``rate / t``. With a constant rate the loads end up swinging by what one step
            moves.
        normalize: Divides the weights of a token by their sum. With ``top_k=1`` they are then 1, without a gradient.

    The weights are differentiable in the chosen gates; the choice has derivative zero, and the bias none. The bias
    stays in float32 or float64 where the module is moved to half precision, in which small steps would be lost.

    Example:
        >>> import torch
        >>> from difflayers.transport import AuxLossFreeBalancer
        >>> gates = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.55, 0.45]])
        >>> balancer = AuxLossFreeBalancer(2, rate=0.1)
        >>> for step in range(3):
        ...     routing = balancer(gates)
        ...     balancer.update()
        >>> routing.load, balancer.bias
        (tensor([2, 2]), tensor([-0.2000,  0.2000]))

    Source: X. Y. Han, Y. Zhong, A Theoretical Framework for Auxiliary-Loss-Free Load Balancing, 2025; the update with
    signs: L. Wang et al., Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, 2024, algorithm 1.
    """

    bias: Tensor
    load: Tensor
    steps: Tensor

    def __init__(
        self,
        experts: int,
        *,
        top_k: int = 1,
        rate: float = 1e-3,
        signed: bool = True,
        decay: bool = False,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        check_top_k(top_k, experts)
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise ValueError(f"rate: expected a finite number above 0, got {rate}")
        self.experts, self.top_k, self.rate = experts, top_k, rate
        self.signed, self.decay, self.normalize = signed, decay, normalize
        device = torch.get_default_device()
        self.register_buffer("bias", torch.zeros(experts, device=device))
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    def forward(self, gates: Tensor, mask: Tensor | None = None) -> Routing:
        """Routes tokens.

        Args:
            gates: ``(*batch, tokens, experts)``, softmax or sigmoid of the router's logits as a rule.
            mask: ``(*batch, tokens)`` booleans, False for padding. None: no padding.

        Returns:
            :class:`Routing`.
        """
        check_gates("gates", gates, mask, self.top_k)
        check_shape("gates", gates.shape[-1:], (self.experts,), " in its last dimension")
        # in the wider of both: a small bias would be rounded away in half precision
        scores = gates.detach().to(torch.promote_types(gates.dtype, self.bias.dtype)) + self.bias
        routing = choose(scores, gates, mask, self.top_k, self.normalize)
        if self.training:
            self.load.add_(routing.load.detach().reshape(-1, self.experts).sum(0))
        return routing

    @torch.no_grad()
    def update(self, load: Tensor | None = None) -> None:
        """One step of the bias, and a new count. Without tokens nothing happens.

        Args:
            load: ``(experts,)`` tokens of the step, for all processes. None: what was counted here.
        """
        load = self.load if load is None else load
        if not isinstance(load, Tensor):
            raise ValueError(f"load: expected a tensor, got {type(load).__name__}")
        check_shape("load", tuple(load.shape), (self.experts,))
        load = load.to(self.bias)
        missing = load.mean() - load
        step = missing.sign() if self.signed else missing
        some = load.sum() > 0
        self.steps.add_(some)
        rate = self.rate / self.steps.clamp(min=1) if self.decay else self.rate
        self.bias.add_(torch.where(some, rate * step, 0))
        self.load.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Keeps the bias out of half precision."""
        before = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype in (torch.float16, torch.bfloat16):
            self.bias = before.to(self.bias.device)
        return self

    def extra_repr(self) -> str:
        """Settings."""
        flags = [f"{name}={getattr(self, name)}" for name in ("decay", "normalize") if getattr(self, name)]
        flags += [] if self.signed else ["signed=False"]
        return ", ".join([f"{self.experts}, top_k={self.top_k}, rate={self.rate:.4g}", *flags])
