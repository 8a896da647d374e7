r"""Total variation on a graph, solved for its flow: projected gradients come near, the partition makes it exact.

The dual of :math:`\min_z \sum_e b_e |(Dz)_e| + \tfrac12 \|z - x\|^2` asks for a flow along the edges,

.. math:: \min_p \tfrac12 \|x - D^T p\|^2 \quad \text{s.t.} \quad |p_e| \le b_e, \qquad z = x - D^T p .

1. Accelerated projected gradients with restart, for each element, with the step :math:`1 / (\deg i + \deg j)` for an
   edge between i and j (A. Beck, M. Teboulle, Fast gradient-based algorithms for constrained total variation image
   denoising and deblurring problems, 2009; T. Pock, A. Chambolle, Diagonal preconditioning, 2011).
2. Now and then a look at the edges whose flow is at its bound. If they are those across which the solution jumps, the
   others connect its pieces, and on each piece C it is a mean: the candidate. Conjugate gradients change the flow
   inside the pieces to the one that the candidate needs. For *any* admissible flow p the candidate is as near to the
   solution as the duality gap says,

   .. math:: \tfrac12 \|z - z^*\|^2 \le \tfrac12 \|z - (x - D^T p)\|^2 + \sum_e b_e |(Dz)_e| - p_e (Dz)_e ,

   so a right partition is known to be right, long before the gradients have converged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._solution import Info, Status

from ._partition import block_largest, levels

TIE = 8  # rounding units by which the values of neighbouring pieces may differ and still count as equal
TIGHT = 1e-10


@dataclass(frozen=True)
class DualGradient:
    """Accelerated projected gradients on the flow, finished exactly on the pieces.

    Args:
        rtol: Largest distance to the solution that the duality gap may leave possible, relative to the distance of x
            from its mean. None: 1e-10, in practice exact; isotropic total variation: 1e-3.
        max_steps: Largest number of gradient steps.
        check_every: Gradient steps before the first look at the pieces. Later looks come after a quarter more steps
            each; a look takes at most as many conjugate gradient steps as there were gradient steps since the last.
    """

    rtol: float | None = None
    max_steps: int = 20_000
    check_every: int = 10

    def __post_init__(self) -> None:
        if self.rtol is not None and not self.rtol > 0:
            raise ValueError(f"rtol: expected more than 0, got {self.rtol}")
        for name in ("max_steps", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Edges:
    """A graph: edge e leads from node ``tail[e]`` to node ``head[e]``."""

    tail: Tensor
    head: Tensor
    nodes: int

    def difference(self, z: Tensor) -> Tensor:
        """``D z``: along every edge, ``(..., m)``."""
        return self.at_heads(z) - self.at_tails(z)

    def divergence(self, p: Tensor) -> Tensor:
        """``D^T p``: what flows into a node less what flows out of it, ``(..., n)``."""
        nodes = p.new_zeros((*p.shape[:-1], self.nodes))
        return nodes.scatter_add(-1, self.head.expand_as(p), p).scatter_add(-1, self.tail.expand_as(p), -p)

    def at_tails(self, z: Tensor) -> Tensor:
        """What each edge's tail carries."""
        return z.gather(-1, self.tail.expand(*z.shape[:-1], -1))

    def at_heads(self, z: Tensor) -> Tensor:
        """What each edge's head carries."""
        return z.gather(-1, self.head.expand(*z.shape[:-1], -1))

    def components(self, open: Tensor) -> Tensor:
        """The smallest node that each node is connected to by `open` edges ``(B, m)``: ``(B, n)``."""
        found = torch.arange(self.nodes, device=open.device).expand(open.shape[0], -1).contiguous()
        while True:  # pieces hook on to neighbours with a smaller number, so that their count halves
            tails, heads = self.at_tails(found), self.at_heads(found)
            low = torch.minimum(tails, heads)
            if not bool((open & (tails != heads)).any()):
                return found
            for end in (tails, heads):
                found = found.scatter_reduce(-1, end, torch.where(open, low, end), "amin")
            for _ in range(3):
                found = found.gather(-1, found)

    def pieces(self, z: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
        """Where a solution ``(B, n)`` is constant, and the signs of its jumps; an edge without bound joins nothing."""
        jumps = self.difference(z).sign()
        return self.components((jumps == 0) & (bound > 0)), jumps

    def steps(self, dtype: torch.dtype) -> Tensor:
        """The gradient step of each edge, ``1 / (deg i + deg j)``."""
        ends = torch.cat([self.tail, self.head])
        degree = torch.zeros(self.nodes, dtype=dtype, device=ends.device)
        degree = degree.index_add(0, ends, torch.ones_like(ends, dtype=dtype))
        return 1 / (degree[self.tail] + degree[self.head])


class Candidate(NamedTuple):
    """A partition, the solution if it is right, the flow that goes with it, and how far from the solution it can be."""

    z: Tensor
    flow: Tensor
    error: Tensor


def minimise(x: Tensor, bound: Tensor, edges: Edges, solver: DualGradient) -> tuple[Tensor, Info]:
    """The solution ``(B, n)`` for a signal ``(B, n)`` and bounds ``(B, m)``, and the report of every element."""
    if not x.numel():
        zero = torch.zeros(x.shape[:1], dtype=torch.int64, device=x.device)
        return x, Info(zero + int(Status.CONVERGED), zero, x.new_zeros(x.shape[:1]))
    tau = edges.steps(x.dtype)
    p = q = torch.zeros_like(bound)
    a = torch.ones_like(x[:, :1])
    norm = torch.linalg.vector_norm
    goal = (solver.rtol or TIGHT) * norm(x - x.mean(-1, keepdim=True), dim=-1)
    goal = torch.maximum(goal, TIE * torch.finfo(x.dtype).eps * norm(x, dim=-1))
    best, error = x, torch.full_like(goal, torch.inf)
    steps = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    busy = torch.ones_like(steps, dtype=torch.bool)
    looked, look_at = 0, min(solver.check_every, solver.max_steps)
    for step in range(1, solver.max_steps + 1):
        new = (q + tau * edges.difference(x - edges.divergence(q))).clamp(-bound, bound)
        overshot = ((q - new) / tau * (new - p)).sum(-1, keepdim=True) > 0
        faster = (1 + (1 + 4 * a * a).sqrt()) / 2
        q = new + torch.where(overshot, 0, (a - 1) / faster) * (new - p)
        p, a = new, torch.where(overshot, 1, faster)
        if step < look_at:
            continue
        candidate = _candidate(x, bound, p, edges, step - looked, goal)
        looked, look_at = step, min(step + max(solver.check_every, step // 4), solver.max_steps)
        better = busy & (candidate.error < error)
        best = torch.where(better.unsqueeze(-1), candidate.z, best)
        error = torch.where(better, candidate.error, error)
        steps = torch.where(busy, step, steps)
        busy = busy & (error > goal)
        if not bool(busy.any()):
            break
        # a flow of less energy is the better place to go on from
        energy, other = ((x - edges.divergence(f)).square().sum(-1, keepdim=True) for f in (p, candidate.flow))
        p, a = torch.where(other < energy, candidate.flow, p), torch.where(other < energy, 1, a)
        q = torch.where(other < energy, p, q)
    status = torch.where(busy, int(Status.MAX_STEPS), int(Status.CONVERGED))
    return best, Info(status, steps, error)


def _candidate(x: Tensor, bound: Tensor, p: Tensor, edges: Edges, max_steps: int, goal: Tensor) -> Candidate:
    inner = p.abs() < bound
    pieces = edges.components(inner)
    across = edges.at_tails(pieces) != edges.at_heads(pieces)
    pulled = x - edges.divergence(torch.where(across, p, 0))
    z = levels(pulled, pieces)
    # ties: pieces with equal values become one, up to the rounding of means; what is equal was not averaged
    largest, smallest = block_largest(pulled, pieces), -block_largest(-pulled, pieces)
    size = torch.where(largest == smallest, 0, torch.maximum(largest.abs(), smallest.abs()))
    rounding = TIE * torch.finfo(x.dtype).eps * torch.maximum(edges.at_tails(size), edges.at_heads(size))
    tie = across & (bound > 0) & (edges.difference(z).abs() <= rounding)
    z = levels(pulled, edges.components(inner | tie))
    flow = p + _correction(x - edges.divergence(p) - z, edges, inner, max_steps, goal)
    flow = flow.clamp(-bound, bound)
    jump = edges.difference(z)
    gap = (x - edges.divergence(flow) - z).square().sum(-1) / 2
    gap = gap + torch.where(jump != 0, bound * jump.abs() - flow * jump, 0).sum(-1)
    return Candidate(z, flow, (2 * gap).clamp_min(0).sqrt())


def _correction(r: Tensor, edges: Edges, inner: Tensor, max_steps: int, goal: Tensor) -> Tensor:
    """A flow along the `inner` edges whose divergence is r, up to a tenth of the goal: conjugate gradients."""
    laplacian = lambda v: edges.divergence(torch.where(inner, edges.difference(v), 0))  # noqa: E731
    potential = torch.zeros_like(r)
    direction = r
    square = r.square().sum(-1, keepdim=True)
    enough = (goal / 10).square().unsqueeze(-1)
    for k in range(max_steps):
        busy = square > enough
        if k % 10 == 0 and not bool(busy.any()):
            break
        image = laplacian(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        length = torch.where(busy & (curvature > 0), square / curvature, 0)
        potential = potential + length * direction
        r = r - length * image
        after = r.square().sum(-1, keepdim=True)
        direction = torch.where(busy, r + after / square * direction, direction)
        square = torch.where(busy, after, square)
    return torch.where(inner, edges.difference(potential), 0)
