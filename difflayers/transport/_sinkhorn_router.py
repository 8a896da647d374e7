r"""Balanced routing of tokens to experts by entropic transport.

.. math:: \max_P \; \langle S, P \rangle - \epsilon \, \mathrm{KL}(P \,|\, a b^T) \quad \text{s.t.} \quad
    P 1 = a, \; P^T 1 = b

for scores S of T tokens, masses a = 1/T (0 for padding), and the shares b of the experts, 1/E each if nothing else is
said. A token's entries of the plan are ordered as :math:`S_{ij} + g_j + \epsilon \log b_j`: the potentials g of the
experts are the bias that balances them.

A. Clark et al., Unified Scaling Laws for Routed Language Models, 2022, section 3 (S-BASE).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from difflayers._checks import check_same, check_shape, check_tensor
from difflayers._solution import OnFailure, check_policy
from difflayers.implicit import solution_map
from difflayers.linalg import LinearSolver

from ._coupling import centred, plan_unless_failed, prepare
from ._routing import Routing, check_gates, check_top_k, choose, renamed
from ._sinkhorn_solve import problem_for
from ._solvers import TransportSolver


def sinkhorn_routing(
    logits: Tensor,
    mask: Tensor | None = None,
    shares: Tensor | None = None,
    *,
    eps: float | Tensor = 0.1,
    top_k: int = 1,
    plan_weights: bool = False,
    normalize: bool = False,
    solver: TransportSolver | None = None,
    adjoint: LinearSolver | None = None,
    on_failure: OnFailure = "raise",
) -> Routing:
    """Experts for tokens, so that every expert gets its share.

    Solves ``argmax_P <logits, P> - eps KL(P | a b^T) s.t. P 1 = a, P^T 1 = b`` and takes the `top_k` largest entries of
    every row. The plan has the right sums; first choices have them as far as rows of the plan are near to one expert,
    for an `eps` that is small against the differences of the logits. The plan says nothing of further choices: with
    `top_k` above 1 their loads are better than those of the logits, but not equal, as :class:`AuxLossFreeBalancer`
    makes them.

    Args:
        logits: ``(*batch, tokens, experts)`` scores, of any sign. The tokens of one batch element are balanced
            together: flatten sequences that share experts into one.
        mask: ``(*batch, tokens)`` booleans, False for padding. None: no padding.
        shares: ``(*batch, experts)`` of the load, at least 0, scaled to sum to one. None: equal ones.
        eps: Strength of the entropy, above 0, in the unit of the logits.
        top_k: Experts a token.
        plan_weights: Weights are entries of the plan times the number of tokens, so that a row of the plan sums to one,
            and their gradient goes through the whole plan. False: softmax of the logits at the chosen experts, whose
            gradient goes through that softmax; the plan only chooses.
        normalize: Divides the weights of a token by their sum. With ``top_k=1`` they are then 1, without a gradient.
        solver: As for :func:`sinkhorn`.
        adjoint: As for :func:`sinkhorn`.
        on_failure: ``"raise"``, ``"nan"`` (weights NaN in failed elements alone) or ``"ignore"``.

    Returns:
        :class:`Routing`.

    Raises:
        ValueError: For bad input, naming the argument.
        SolveError: For elements without a solution in the range of the numbers.

    Weights are differentiable in `logits`, and with `plan_weights` in `shares` and `eps`, to any order, forward and
    reverse, for the choice that was made; the choice itself has derivative zero.

    Example:
        >>> import torch
        >>> from difflayers.transport import sinkhorn_routing
        >>> logits = torch.tensor([[2.0, 0.0], [1.5, 0.0], [1.0, 0.0], [0.2, 0.0]])
        >>> logits.argmax(-1)  # one expert gets all
        tensor([0, 0, 0, 0])
        >>> routing = sinkhorn_routing(logits)
        >>> routing.experts.squeeze(-1), routing.load
        (tensor([0, 0, 1, 1]), tensor([2, 2]))

    Source: A. Clark et al., Unified Scaling Laws for Routed Language Models, 2022, section 3.
    Departure: solved to a tolerance, and differentiable through the plan where that is asked for.
    """
    return _route(
        logits, mask, shares, eps, top_k, plan_weights, normalize, solver=solver, adjoint=adjoint, on_failure=on_failure
    )[0]


class SinkhornRouter(nn.Module):
    """Balanced routing in training; in evaluation by the same bias, so that no token depends on another one.

    In training the experts of a batch are balanced by :func:`sinkhorn_routing`, and the potentials that do it are
    averaged over steps in the buffer ``potential``. In evaluation they are added to the logits, and the largest sums
    are taken: what a batch, or a later token, looks like no longer matters.

    Args:
        experts: Number of experts.
        top_k: Experts a token.
        eps: As for :func:`sinkhorn_routing`.
        plan_weights: As for :func:`sinkhorn_routing`.
        normalize: As for :func:`sinkhorn_routing`.
        momentum: Weight of a new batch in the average, in (0, 1]; the first one counts in full.
        solver: As for :func:`sinkhorn_routing`.
        on_failure: As for :func:`sinkhorn_routing`.

    Example:
        >>> import torch
        >>> from difflayers.transport import SinkhornRouter
        >>> router = SinkhornRouter(4, top_k=2, plan_weights=True)
        >>> weights, experts, load = router(torch.randn(16, 4))
        >>> weights.shape, experts.shape, load.sum()
        (torch.Size([16, 2]), torch.Size([16, 2]), tensor(32))
    """

    potential: Tensor
    steps: Tensor

    def __init__(
        self,
        experts: int,
        *,
        top_k: int = 1,
        eps: float = 0.1,
        plan_weights: bool = False,
        normalize: bool = False,
        momentum: float = 0.1,
        solver: TransportSolver | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        check_policy(on_failure)
        check_top_k(top_k, experts)
        if not isinstance(eps, int | float) or not 0 < eps < math.inf:
            raise ValueError(f"eps: expected a finite number above 0, got {eps}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum: expected a number in (0, 1], got {momentum}")
        self.experts, self.top_k, self.eps, self.momentum = experts, top_k, float(eps), momentum
        self.plan_weights, self.normalize, self.solver, self.on_failure = plan_weights, normalize, solver, on_failure
        device = torch.get_default_device()
        self.register_buffer("potential", torch.zeros(experts, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    def forward(self, logits: Tensor, mask: Tensor | None = None, shares: Tensor | None = None) -> Routing:
        """Routes tokens.

        Args:
            logits: ``(*batch, tokens, experts)``.
            mask: ``(*batch, tokens)``, False for padding, or None.
            shares: ``(*batch, experts)`` or None.

        Returns:
            :class:`Routing`.
        """
        check_gates("logits", logits, mask, self.top_k)
        check_shape("logits", logits.shape[-1:], (self.experts,), " in its last dimension")
        common = mask, shares, self.eps, self.top_k, self.plan_weights, self.normalize
        if not self.training:
            return _route_by_potential(logits, self.potential, *common)
        routing, g = _route(logits, *common, solver=self.solver, on_failure=self.on_failure)
        if g is not None:
            self._remember(g, mask)
        return routing

    @torch.no_grad()
    def _remember(self, g: Tensor, mask: Tensor | None) -> None:
        """Averages potentials over steps, and over those elements of the batch that have any."""
        g = g - g.mean(-1, keepdim=True)
        sound = torch.isfinite(g).all(-1)
        if mask is not None:
            sound = sound & mask.any(-1)
        count = sound.sum()
        mean = torch.where(sound.unsqueeze(-1), g, 0).reshape(-1, self.experts).sum(0) / count.clamp(min=1)
        rate = torch.where(self.steps == 0, 1.0, self.momentum) * (count > 0)
        self.potential.lerp_(mean.to(self.potential), rate.to(self.potential))
        self.steps.add_(count > 0)

    def extra_repr(self) -> str:
        """Settings."""
        parts = [f"{self.experts}, top_k={self.top_k}, eps={self.eps:.4g}"]
        parts += [f"{name}=True" for name in ("plan_weights", "normalize") if getattr(self, name)]
        parts += [f"solver={self.solver!r}"] if self.solver is not None else []
        return ", ".join(parts)


def _masses(shares: Tensor | None, logits: Tensor) -> Tensor:
    E = logits.shape[-1]
    if shares is None:
        return logits.new_full((E,), 1 / E)
    check_shape("shares", check_tensor("shares", shares, min_ndim=1).shape[-1:], (E,), " as logits has experts")
    check_same([("logits", logits), ("shares", shares)])
    return shares / shares.sum(-1, keepdim=True).abs()  # a negative total keeps its sign, and is refused


def _route(
    logits: Tensor,
    mask: Tensor | None,
    shares: Tensor | None,
    eps: Any,
    top_k: int,
    plan_weights: bool,
    normalize: bool,
    *,
    solver: TransportSolver | None = None,
    adjoint: LinearSolver | None = None,
    on_failure: OnFailure = "raise",
) -> tuple[Routing, Tensor | None]:
    """The routing, and the potentials of the experts; None without tokens."""
    check_policy(on_failure)
    check_gates("logits", logits, mask, top_k)
    b = _masses(shares, logits)
    if logits.numel() == 0:
        return choose(logits, logits, mask, top_k, normalize), None
    T = logits.shape[-2]
    if mask is None:
        count, a = logits.new_full((), float(T)), logits.new_full((T,), 1 / T)
    else:
        count = mask.sum(-1).to(logits.dtype)
        a = mask / count.clamp(min=1).unsqueeze(-1)
        b = torch.where((count > 0).unsqueeze(-1), b, 0)  # no tokens, nothing to share
    # the gradient of a failed element is NaN, which is the plan's business
    attached = plan_weights or on_failure == "nan"
    cost, b = (-logits, b) if attached else (-logits.detach(), b.detach())
    with renamed(cost="logits", b="shares"):
        data = prepare(cost, a, b, eps, None, None)
        z = solution_map(*problem_for(data, solver, adjoint), on_failure=on_failure)
    g = centred(z.detach(), data)[1]
    plan = plan_unless_failed(z, data, on_failure).to(logits.dtype)
    if plan_weights:
        gates = plan * count[..., None, None]
    else:
        failed = torch.isnan(plan)
        gates = torch.where(failed, plan, torch.where(failed, 0, logits).softmax(-1))
    # in the logarithm, where no two entries are zero
    scores = _scores(logits, g, b, eps)
    return choose(scores, gates, mask, top_k, normalize), g


def _scores(logits: Tensor, g: Tensor, b: Tensor, eps: Any) -> Tensor:
    e = eps[..., None, None] if isinstance(eps, Tensor) else eps
    return logits.detach() + g.unsqueeze(-2) + e * b.log().unsqueeze(-2)


def _route_by_potential(
    logits: Tensor,
    g: Tensor,
    mask: Tensor | None,
    shares: Tensor | None,
    eps: float,
    top_k: int,
    plan_weights: bool,
    normalize: bool,
) -> Routing:
    """Each token by itself."""
    bias = g + eps * _masses(shares, logits).log()
    moved = logits + bias.unsqueeze(-2)
    gates = (moved / eps if plan_weights else logits).softmax(-1).to(logits.dtype)
    return choose(moved, gates, mask, top_k, normalize)
