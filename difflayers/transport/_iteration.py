"""What the solvers of entropic transport share: the problem, its start, its error, the passage to the wanted eps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HANDOVER = 1e-2  # relative error of the sums from which Newton's method may take over; at which a stage of eps ends
STAGE_STEPS = 100  # at most, for each value of eps on the way


class Problem(NamedTuple):
    """One flat batch.

    Attributes:
        cost: ``(B, n, m)``; inf forbids an entry.
        a: ``(B, n)`` masses of rows.
        b: ``(B, m)`` masses of columns.
        eps: ``(B,)``.
        soft_a: ``(B,)`` one over the penalty of the row sums; 0: they are constraints.
        soft_b: ``(B,)`` the same for the column sums.
    """

    cost: Tensor
    a: Tensor
    b: Tensor
    eps: Tensor
    soft_a: Tensor
    soft_b: Tensor

    def pick(self, rows: Tensor) -> Problem:
        """Some elements of the batch, by index or mask."""
        return Problem(*(t[rows] for t in self))


def times(M: Tensor, v: Tensor) -> Tensor:
    """Matrices times vectors, as rows times matrices: a batch of those is several times quicker."""
    return (v.unsqueeze(-2) @ M.mT).squeeze(-2)


def start(problem: Problem) -> tuple[Tensor, Tensor]:
    """Potentials with ``f + g <= cost`` and an equality in every row and column.

    No entry of the kernel then overflows and no sum of it vanishes at any eps. Only rows and columns with mass are
    looked at.
    """
    cost, a, b, *_ = problem
    inf = torch.inf
    f = torch.where((b > 0).unsqueeze(-2), cost, inf).amin(-1)
    g = torch.where((a > 0).unsqueeze(-1), cost - f.unsqueeze(-1), inf).amin(-2)
    return f, g


def kernel(problem: Problem, f: Tensor, g: Tensor, eps: Tensor) -> Tensor:
    """``exp((f + g - cost) / eps)``, finite also between a row and a column without mass, where it means nothing."""
    moved = (f.unsqueeze(-1) + g.unsqueeze(-2) - problem.cost).div_(eps[:, None, None])
    return moved.clamp_(max=largest_log(moved.dtype)).exp_()


def largest_log(dtype: torch.dtype) -> float:
    """Of a ratio of two numbers that are not extreme themselves."""
    return 300.0 if dtype == torch.float64 else 80.0


def plan_of(problem: Problem, f: Tensor, g: Tensor) -> Tensor:
    """The plan of potentials."""
    P = kernel(problem, f, g, problem.eps)
    return P.mul_(problem.a.unsqueeze(-1)).mul_(problem.b.unsqueeze(-2))


def wanted(mass: Tensor, potential: Tensor, soft: Tensor) -> Tensor:
    """The sums that a plan must have: the mass itself, or another one where deviations are only penalised."""
    return mass * (-potential * soft.unsqueeze(-1)).exp()


def sums_error(problem: Problem, f: Tensor, g: Tensor, plan: Tensor) -> Tensor:
    """``(B,)`` the L1 error of the sums on both sides, relative to the mass."""
    rows, columns = plan.sum(-1), plan.sum(-2)
    off_rows = (rows - wanted(problem.a, f, problem.soft_a)).abs().sum(-1)
    return (off_rows + (columns - wanted(problem.b, g, problem.soft_b)).abs().sum(-1)) / rows.sum(-1)


def gain(mass: Tensor, potential: Tensor, soft: Tensor) -> Tensor:
    """What a potential adds to the dual: its mean; with a penalty rho, that of ``rho (1 - exp(-potential / rho))``."""
    soft = soft.unsqueeze(-1)
    some = torch.where(soft > 0, soft, 1)
    return (mass * torch.where(soft > 0, -torch.expm1(-potential * some) / some, potential)).sum(-1)


def best_shift(problem: Problem, f: Tensor, g: Tensor) -> Tensor:
    """``(B,)`` the best constant to move from g to f, where both marginals are penalised; elsewhere 0."""
    _, a, b, _, soft_a, soft_b = problem
    both = (soft_a > 0) & (soft_b > 0)
    ratio = wanted(a, f, soft_a).sum(-1).log() - wanted(b, g, soft_b).sum(-1).log()
    return torch.where(both, ratio / torch.where(both, soft_a + soft_b, 1), 0)


def spread(problem: Problem) -> Tensor:
    """``(B,)`` the range of the costs that are not forbidden."""
    cost = problem.cost
    top = torch.where(torch.isposinf(cost), -torch.inf, cost).amax((-2, -1))
    return top - cost.amin((-2, -1))


def first_eps(problem: Problem, scaling: bool) -> Tensor:
    """Where eps starts: at the range of the cost where it is far below that, else where it ends."""
    if not scaling:
        return problem.eps
    wide = spread(problem)
    return torch.where(problem.eps < 5e-3 * wide, wide, problem.eps)


def rounding(problem: Problem) -> Tensor:
    """``(B,)`` the relative error of the sums that rounding of the potentials leaves."""
    return torch.finfo(problem.cost.dtype).eps * (4 + spread(problem) / problem.eps / 2)


def too_slow(error: Tensor, before: Tensor, tol: Tensor, patience: float) -> Tensor:
    """``(B,)`` elements near the solution that need more than `patience` looks more, at the rate since the last one."""
    rate = (error / before).log()
    return (error <= HANDOVER) & ~((tol / error).log() >= patience * rate) & torch.isfinite(before)
