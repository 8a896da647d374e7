"""What the solvers of entropic transport share: the problem, its start, its error, the passage to the wanted eps."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._solution import Status

HANDOVER = 1e-2  # relative error of the sums from which Newton's method may take over; at which a stage of eps ends
_FAR = 1e5  # from one range of costs to another
_SAMPLE = 16  # rows and columns that tell the range of the costs
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
    return exp_((f.unsqueeze(-1) + g.unsqueeze(-2) - problem.cost).div_(eps[:, None, None]))


def exp_(logs: Tensor) -> Tensor:
    """In place, in the range of the numbers; with zeros for the smallest, which are slow to compute with."""
    most = largest_log(logs.dtype)
    logs.clamp_(min=-most, max=most).exp_()
    return torch.threshold_(logs, math.exp(1 - most), 0)


def largest_log(dtype: torch.dtype) -> float:
    """Of a ratio of two numbers that are not extreme themselves."""
    return 300.0 if dtype == torch.float64 else 80.0


def plan_of(problem: Problem, f: Tensor, g: Tensor) -> Tensor:
    """The plan of potentials."""
    P = kernel(problem, f, g, problem.eps)
    return P.mul_(problem.a.unsqueeze(-1)).mul_(problem.b.unsqueeze(-2))


def wanted(mass: Tensor, potential: Tensor, soft: Tensor) -> Tensor:
    """The sums that a plan must have: the mass itself, or another one where deviations are only penalised."""
    return mass * torch.where(mass > 0, -potential * soft.unsqueeze(-1), 0).exp()  # 0 * inf is no mass either


def sums_error(problem: Problem, f: Tensor, g: Tensor, plan: Tensor) -> Tensor:
    """``(B,)`` the L1 error of the sums on both sides, relative to the mass."""
    rows, columns = plan.sum(-1), plan.sum(-2)
    off_rows = (rows - wanted(problem.a, f, problem.soft_a)).abs().sum(-1)
    return (off_rows + (columns - wanted(problem.b, g, problem.soft_b)).abs().sum(-1)) / rows.sum(-1)


def gain(mass: Tensor, potential: Tensor, soft: Tensor) -> Tensor:
    """What a potential adds to the dual: its mean; with a penalty rho, that of ``rho (1 - exp(-potential / rho))``."""
    soft = soft.unsqueeze(-1)
    some = torch.where(soft > 0, soft, 1)
    grown = torch.expm1((-potential * some).clamp(max=largest_log(potential.dtype)))  # beyond it there is no mass
    return (mass * torch.where(soft > 0, -grown / some, potential)).sum(-1)


def best_shift(problem: Problem, f: Tensor, g: Tensor) -> Tensor:
    """``(B,)`` the best constant to move from g to f, where a marginal is penalised; elsewhere 0."""
    _, a, b, _, soft_a, soft_b = problem
    some = (soft_a > 0) | (soft_b > 0)
    ratio = wanted(a, f, soft_a).sum(-1).log() - wanted(b, g, soft_b).sum(-1).log()
    return torch.where(some, ratio / torch.where(some, soft_a + soft_b, 1), 0)


def evened(problem: Problem, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The same plan with equal means of the potentials, where a constant is free: a large one would cost digits."""
    _, a, b, _, soft_a, soft_b = problem
    mean_f, mean_g = ((torch.where(m > 0, t, 0) * m).sum(-1) / m.sum(-1) for t, m in ((f, a), (g, b)))
    move = torch.where((soft_a == 0) & (soft_b == 0), (mean_f - mean_g) / 2, 0).unsqueeze(-1)
    return f - move, g + move


def spread(problem: Problem) -> Tensor:
    """``(B,)`` the range of the costs that may matter.

    Those without mass do not, and neither do those that stand for forbidden entries, far above the lowest of a sample.
    """
    cost, inf = problem.cost, torch.inf
    counts = (problem.a > 0).unsqueeze(-1) & (problem.b > 0).unsqueeze(-2) & torch.isfinite(cost)
    least, most = (torch.where(counts, cost, bad) for bad in (inf, -inf))
    return credible(most.amax((-2, -1)) - least.amin((-2, -1)), least[:, *sampled(*cost.shape[-2:])])


def sampled(n: int, m: int) -> tuple[slice, slice]:
    """Some rows and columns."""
    return slice(None, None, -(-n // _SAMPLE)), slice(None, None, -(-m // _SAMPLE))


def credible(wide: Tensor, sample: Tensor) -> Tensor:
    """A range, cut to what the costs of a sample tell; those that do not count are inf."""
    sample = sample.flatten(-2).sort(-1).values
    number = torch.isfinite(sample).sum(-1, keepdim=True)
    same = (sample <= sample[:, :1]).sum(-1, keepdim=True)
    eighth = sample.gather(-1, torch.minimum(same + number // 8, (number - 1).clamp(min=0))) - sample[:, :1]
    wide = torch.where(eighth.squeeze(-1) > 0, torch.minimum(_FAR * eighth.squeeze(-1), wide), wide)
    return wide.nan_to_num(0, 0, 0)


def first_eps(problem: Problem, scaling: bool) -> Tensor:
    """Where eps starts: at the range of the cost where it is far below that, else where it ends."""
    if not scaling:
        return problem.eps
    wide = spread(problem)
    return torch.where(problem.eps < 5e-3 * wide, wide, problem.eps)


def rounding(problem: Problem, f: Tensor, g: Tensor) -> Tensor:
    """``(B,)`` the relative error of the sums that rounding of the potentials leaves, and never more than it may be.

    Large costs alone do no harm: the plan is zero there.
    """
    size = torch.where(problem.a > 0, f.abs(), 0).amax(-1) + torch.where(problem.b > 0, g.abs(), 0).amax(-1)
    unit = torch.finfo(f.dtype).eps
    return (unit * (4 + size / problem.eps)).clamp(max=unit**0.4)


def judged(problem: Problem, f: Tensor, g: Tensor, error: Tensor, tol: Tensor, *, has_costs: bool = True) -> Tensor:
    """``(B,)`` statuses of potentials whose sums have a relative error of `error`, where `tol` was wanted.

    Where the error is larger than the mass there is no plan to speak of. Without costs no entry can be told forbidden.
    """
    good = error <= tol + rounding(problem, f, g)
    status = torch.where(good, int(Status.CONVERGED), int(Status.MAX_STEPS))
    status = torch.where(error <= 1, status, int(Status.DIVERGED))  # NaN is not
    rest = (status == Status.MAX_STEPS).nonzero().squeeze(-1)
    if has_costs and rest.numel():
        none = without_plan(problem.pick(rest), f[rest], g[rest])
        status[rest] = torch.where(none, int(Status.INFEASIBLE), status[rest])
    return status


def without_plan(problem: Problem, f: Tensor, g: Tensor) -> Tensor:
    """``(B,)`` elements whose forbidden entries leave no plan, by a dual value above that of every possible plan."""
    cost, a, b, eps, soft_a, soft_b = problem
    zero, inf = torch.zeros_like(eps), torch.inf
    mass, P = a.sum(-1), plan_of(problem, f, g)
    dual = gain(a, f, zero) + gain(b, g, zero) - eps * P.sum((-2, -1))
    top = torch.where(torch.isposinf(cost), -inf, cost).amax((-2, -1))
    # an entry of a plan is at most the smaller mass: P / (a b) is at most one over the larger one
    least = torch.maximum(*(torch.where(t > 0, t, inf).amin(-1) for t in (a, b)))
    most = mass * (top + eps * (-least.log()).clamp(min=0)) - eps * mass
    size = mass * (f.abs().amax(-1) + g.abs().amax(-1) + top.abs() + eps)
    unbounded = torch.isfinite(dual) & (dual > most + 1e-3 * size.clamp(max=torch.finfo(f.dtype).max))
    return unbounded & torch.isposinf(cost).any(-1).any(-1) & (soft_a == 0) & (soft_b == 0)


def too_slow(error: Tensor, before: Tensor, tol: Tensor, patience: float) -> Tensor:
    """``(B,)`` elements near the solution that need more than `patience` looks more, at the rate since the last one."""
    rate = (error / before).log()
    if math.isinf(patience):
        return torch.zeros_like(error, dtype=torch.bool)
    return (error <= HANDOVER) & ~((tol / error).log() >= patience * rate) & torch.isfinite(before)
