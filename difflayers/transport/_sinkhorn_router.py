r"""Balanced routing of tokens to experts by entropic transport.

.. math:: \max_P \; \langle S, P \rangle - \epsilon \, \mathrm{KL}(P \,|\, a b^T) \quad \text{s.t.} \quad
    P 1 = a, \; P^T 1 = b

for scores S of T tokens, masses a = 1/T (0 for padding), and the shares b of the experts, 1/E each if nothing else is
said. A token's entries of the plan are ordered as :math:`S_{ij} + g_j + \epsilon \log b_j`: the potentials g of the
experts are the bias that balances them. Further choices are made by further plans, in which what a token has chosen is
forbidden to it, and b is what the experts lack of their shares of all choices so far.

A. Clark et al., Unified Scaling Laws for Routed Language Models, 2022, section 3 (S-BASE).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from difflayers._checks import broadcast_batch, check_same, check_shape, check_tensor, compute_dtype, renamed
from difflayers._solution import OnFailure, check_policy
from difflayers.implicit import solution_map
from difflayers.linalg import LinearSolver

from ._coupling import centred, of_total_one, plan_unless_failed, prepare
from ._routing import Routing, check_gates, check_top_k, choose, routing_of
from ._sinkhorn_solve import problem_for
from ._solvers import TransportSolver

_SWEEPS = 30  # of a look whether a further plan has the sums it should have


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

    Solves ``argmax_P <logits, P> - eps KL(P | a b^T) s.t. P 1 = a, P^T 1 = b`` and takes the largest entry of every
    row. The plan has the right sums; choices have them as far as rows of the plan are near to one expert, for an `eps`
    that is small against the differences of the logits. With `top_k` above 1 as many plans are solved, one after
    another: what a token has chosen is forbidden to it from then on, and ``b`` becomes what the experts lack of their
    shares of all choices so far. No expert gets more than all tokens, whatever its share.

    Args:
        logits: ``(*batch, tokens, experts)`` scores, of any sign. The tokens of one batch element are balanced
            together: flatten sequences that share experts into one.
        mask: ``(*batch, tokens)`` booleans, False for padding. None: no padding.
        shares: ``(*batch, experts)`` of the load, at least 0, scaled to sum to one. None: equal ones.
        eps: Strength of the entropy, above 0, in the unit of the logits.
        top_k: Experts a token.
        plan_weights: Weights are entries of the plan times the number of tokens, so that a row of the plan sums to one;
            those of a further plan are of what the earlier weights leave of that one. Their gradient goes through the
            whole plans. False: softmax of the logits at the chosen experts, whose gradient goes through that softmax;
            the plans only choose.
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
    averaged over steps in the buffer ``potential``, ``(top_k, experts)``. In evaluation they are added to the logits,
    those of the first choice for the first choice and so on, and the largest sums are taken: what a batch, or a later
    token, looks like no longer matters.

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
        if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 < momentum <= 1:
            raise ValueError(f"momentum: expected a number in (0, 1], got {momentum}")
        self.experts, self.top_k, self.eps, self.momentum = experts, top_k, float(eps), momentum
        self.plan_weights, self.normalize, self.solver, self.on_failure = plan_weights, normalize, solver, on_failure
        device = torch.get_default_device()
        self.register_buffer("potential", torch.zeros(top_k, experts, device=device))
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
        routing, moves = _route(logits, *common, solver=self.solver, on_failure=self.on_failure)
        if moves is not None:
            self._remember(moves)
        return routing

    @torch.no_grad()
    def _remember(self, moves: Tensor) -> None:
        """Averages ``(top_k, *batch, experts)`` over steps, and over the numbers among them, of every expert by itself.

        There is none of an expert that no token may choose any more.
        """
        moves = moves.reshape(self.top_k, -1, self.experts)
        sound = torch.isfinite(moves)
        centre = torch.where(sound, moves, 0).sum(-1) / sound.sum(-1).clamp(min=1)
        count = sound.sum(1)
        mean = torch.where(sound, moves - centre.unsqueeze(-1), 0).sum(1) / count.clamp(min=1)
        rate = torch.where(self.steps == 0, 1.0, self.momentum) * (count > 0)
        self.potential.lerp_(mean.to(self.potential), rate.to(self.potential))
        self.steps.add_(count.any())

    def extra_repr(self) -> str:
        """Settings."""
        parts = [f"{self.experts}, top_k={self.top_k}, eps={self.eps:.4g}"]
        parts += [f"{name}=True" for name in ("plan_weights", "normalize") if getattr(self, name)]
        parts += [f"solver={self.solver!r}"] if self.solver is not None else []
        return ", ".join(parts)


def _masses(shares: Tensor | None, logits: Tensor) -> Tensor:
    E, work = logits.shape[-1], compute_dtype(logits.dtype)
    if shares is None:
        return logits.new_full((E,), 1 / E, dtype=work)
    check_shape("shares", check_tensor("shares", shares, min_ndim=1).shape[-1:], (E,), " as logits has experts")
    check_same([("logits", logits), ("shares", shares)])
    return of_total_one("shares", shares.to(work))


def _for_all(logits: Tensor, b: Tensor, eps: Any) -> Tensor:
    """Logits of every element, where these differ by their shares or eps alone."""
    batch = broadcast_batch(
        (("logits", logits.shape[:-2]), ("shares", b.shape[:-1]), ("eps", eps.shape if isinstance(eps, Tensor) else ()))
    )
    return logits.expand(*batch, *logits.shape[-2:])


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
    """The routing, and what it added to the logits in every turn, less ``eps log shares``; None without tokens."""
    check_policy(on_failure)
    check_gates("logits", logits, mask, top_k)
    b, dtype, work = _masses(shares, logits), logits.dtype, compute_dtype(logits.dtype)
    if logits.numel() == 0:
        return choose(logits, logits, mask, top_k, normalize), None
    if isinstance(eps, Tensor) and eps.dtype == dtype:
        eps = eps.to(work)
    logits, T = _for_all(logits.to(work), b, eps), logits.shape[-2]
    if mask is None:
        count, a = logits.new_full((), float(T)), logits.new_full((T,), 1 / T)
    else:
        count = mask.sum(-1).to(work)
        a = mask / count.clamp(min=1).unsqueeze(-1)
        b = torch.where((count > 0).unsqueeze(-1), b, 0)  # no tokens, nothing to share
    # the gradient of a failed element is NaN, which is the plan's business
    attached = plan_weights or on_failure == "nan"
    first, b = (-logits, b) if attached else (-logits.detach(), b.detach())
    cost = first
    unit = eps[..., None] if isinstance(eps, Tensor) else eps
    left = logits.new_ones(())
    weights, moves, taken = [], [], _Taken(logits)
    for turn in range(top_k):
        rows, columns = a, b
        if turn > 0:
            left_over = torch.where(taken.chosen, math.inf, first)
            rows, columns = _further(a, b, left_over, taken.load(mask) / count.clamp(min=1).unsqueeze(-1), turn)
            # what has no mass needs no forbidden entries, of which it may have nothing but
            cost = torch.where((rows == 0).unsqueeze(-1) | (columns == 0).unsqueeze(-2), 0, left_over)
        with renamed(cost="logits", b="shares"):
            data = prepare(cost, rows, columns, eps, None, None)
            z = solution_map(*problem_for(data, solver, adjoint), on_failure=on_failure)
        plan, g = plan_unless_failed(z, data, on_failure), centred(z.detach(), data)[1]
        # in the logarithm, where no two entries are zero
        best = taken.best(logits.detach() + (g + unit * columns.detach().log()).unsqueeze(-2))
        moves.append(g + unit * torch.where(b > 0, (columns / b).log(), 0).detach())
        failed = torch.isnan(plan)
        if plan_weights:
            entries = (plan * count[..., None, None]).gather(-1, best)
            weights.append(_times(entries, left))
            left = (left - weights[-1]).clamp(min=0)  # rounding alone takes it below
        else:
            gates = torch.where(failed, plan, torch.where(failed, 0, logits).softmax(-1))
            weights.append(gates.gather(-1, best))
    routing = routing_of(taken.experts, torch.cat(weights, -1).to(dtype), mask, normalize, logits.shape[-1])
    return routing, torch.where((count > 0).unsqueeze(-1), torch.stack(torch.broadcast_tensors(*moves)), math.nan)


def _times(entries: Tensor, left: Tensor) -> Tensor:
    """Their product; of failed elements NaN, which is nothing that others would multiply by zero."""
    failed, lost = torch.isnan(entries), torch.isnan(left)
    return torch.where(failed, entries, torch.where(failed, 0, entries) * torch.where(failed | lost, 1, left))


class _Taken:
    """The choices of every token so far."""

    def __init__(self, logits: Tensor) -> None:
        self.chosen = torch.zeros_like(logits, dtype=torch.bool)
        self.each: list[Tensor] = []

    def best(self, scores: Tensor) -> Tensor:
        """``(*batch, tokens, 1)`` the next choice, of equal scores the first; never one that was made before."""
        lowest = torch.finfo(scores.dtype).min
        scores = torch.where(self.chosen, -math.inf, scores.nan_to_num(lowest, None, lowest))
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., :1]
        self.chosen = self.chosen.scatter(-1, best, True)
        self.each.append(best)
        return best

    def load(self, mask: Tensor | None) -> Tensor:
        chosen = self.chosen if mask is None else self.chosen & mask.unsqueeze(-1)
        return chosen.sum(-2)

    @property
    def experts(self) -> Tensor:
        return torch.cat(self.each, -1)


def _further(a: Tensor, b: Tensor, cost: Tensor, load: Tensor, turn: int) -> tuple[Tensor, Tensor]:
    """The masses of a further plan: those of tokens that may choose once more, and what experts lack of their shares.

    An expert gets no more than the tokens that may choose it; what that leaves is spread over others, of experts with a
    share if they have room for it. Where no plan has these sums, it is those of one that comes near, a constant.
    """
    open_ = cost.detach() != math.inf
    rows = torch.where(open_.any(-1), a, 0)
    room, total = (rows.unsqueeze(-1) * open_).sum(-2), rows.sum(-1, keepdim=True)
    columns = torch.minimum(((turn + 1) * b - load).clamp(min=0), room)
    missing, spare = total - columns.sum(-1, keepdim=True), room - columns
    own = torch.where(b > 0, spare, 0)
    spare = torch.where(own.sum(-1, keepdim=True) >= missing, own, spare)
    spread = missing.clamp(min=0) * spare / spare.sum(-1, keepdim=True).clamp(min=1e-30)
    columns = columns + spread
    columns = columns * total / columns.sum(-1, keepdim=True).clamp(min=1e-30)
    near = _reachable(rows, columns.detach(), open_)
    fits = (near - columns.detach()).abs().sum(-1, keepdim=True) <= 1e-5
    return rows, torch.where(fits, columns, near)


def _reachable(rows: Tensor, columns: Tensor, open_: Tensor) -> Tensor:
    """Column sums of a plan with the right row sums on the open entries, after a few of Sinkhorn's steps."""
    columns = torch.where((rows.unsqueeze(-1) * open_).sum(-2) > 0, columns.clamp(min=1e-12), 0)
    v = columns
    for _ in range(_SWEEPS):
        u = _ratio(rows, (open_ * v.unsqueeze(-2)).sum(-1))
        reached = (open_ * u.unsqueeze(-1)).sum(-2)
        v, near = _ratio(columns, reached), v * reached
    return near


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """0 where `x` is."""
    return torch.where(x > 0, x / torch.where(x > 0, y, 1), 0)


def _route_by_potential(
    logits: Tensor,
    potential: Tensor,
    mask: Tensor | None,
    shares: Tensor | None,
    eps: float,
    top_k: int,
    plan_weights: bool,
    normalize: bool,
) -> Routing:
    """Each token by itself."""
    dtype, b = logits.dtype, _masses(shares, logits)
    logits = _for_all(logits.to(torch.promote_types(compute_dtype(dtype), potential.dtype)), b, eps)
    softmax, left = logits.softmax(-1), logits.new_ones(())
    weights, taken = [], _Taken(logits)
    for g in potential:
        moved = torch.where(taken.chosen, -math.inf, logits + (g + eps * b.log()).unsqueeze(-2))
        best = taken.best(moved.detach())
        if plan_weights:
            weights.append((moved / eps).softmax(-1).gather(-1, best) * left)
            left = (left - weights[-1]).clamp(min=0)  # rounding alone takes it below
        else:
            weights.append(softmax.gather(-1, best))
    return routing_of(taken.experts, torch.cat(weights, -1).to(dtype), mask, normalize, logits.shape[-1])
