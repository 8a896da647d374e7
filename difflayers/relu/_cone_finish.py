"""From the point at which a solver stopped to what it reports: exact zeros, last digits, units, gap and violation."""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers._solution import Status

from ._cone_certificate import lower_bound, optimality_error
from ._cone_polish import polish
from ._cone_problem import ConeProblem, ConeSolution, Scales


def pruned(problem: ConeProblem, p: Tensor, rho: Tensor) -> Tensor:
    r"""Blocks that vanish at the optimum as exact zeros, where the objective allows it.

    As a solver converges, either a block or the room :math:`\beta - \|\sigma_i Z_i^T \nu + K_i^T \rho_i\|` goes to
    zero: the smaller of both, relative to its size, is the one that does.
    """
    nu = problem.s * (problem.y - problem.fit(p))
    pull = torch.linalg.vector_norm(problem.fit_adjoint(nu) + problem.cones_adjoint(rho), dim=-1)
    norms = torch.linalg.vector_norm(p, dim=-1)
    largest = norms.amax(-1, keepdim=True) if norms.shape[-1] else norms
    beta = problem.beta[..., None]
    fewer = torch.where((norms * beta < (beta - pull) * largest)[..., None], 0, p)
    value = problem.objective(p)
    allowed = value + torch.maximum(2 * (value - lower_bound(problem, p, rho)).abs(), 1e-12 * value)
    for sparser in (fewer, torch.zeros_like(p)):  # near the largest useful beta every neuron is small beside the data
        p = torch.where((problem.objective(sparser) <= allowed)[..., None, None], sparser, p)
    return p


def finish(
    problem: ConeProblem,
    unit: ConeProblem,
    scales: Scales,
    zero: Tensor,
    p: Tensor,
    rho: Tensor,
    status: Tensor,
    steps: Tensor,
    rtol: float,
    dtype: torch.dtype,
) -> ConeSolution:
    """Prunes, polishes and judges `p` and `rho`, which are those of `unit`; failed elements become NaN.

    Elements of `zero` are zero. What a solver could not bring to `rtol` in its steps, the polish may.
    """
    p, rho = (torch.where(zero[..., None, None], 0, t) for t in (p, rho))
    # a bound holds for every network; pruning alone spoils that of the dual point that belongs to p
    bound = lower_bound(problem, *_in_units(scales, p, rho))
    p, rho, error = polish(unit, pruned(unit, p, rho), rho, optimality_error(unit, p, rho))
    error = torch.where(zero, 0, error)
    status = torch.where((status == Status.MAX_STEPS) & (error <= rtol), int(Status.CONVERGED), status)
    p, rho = _in_units(scales, p, rho)
    bound = torch.maximum(bound, lower_bound(problem, p, rho))
    lost = (status > Status.MAX_STEPS)[..., None, None]
    # judged as it is handed out, rounded
    p, rho = (torch.where(lost, torch.nan, t.to(dtype)).to(problem.X.dtype) for t in (p, rho))
    value, violation = problem.objective(p), problem.violation(p)
    reals = tuple(t.to(dtype) for t in (p, rho, value, value - bound, violation, error))
    half = p.shape[-2] // 2
    parts = (t[..., rows, :] for t in reals[:2] for rows in (slice(half), slice(half, None)))
    v, w, rho_v, rho_w = parts
    return ConeSolution(v, w, rho_v, rho_w, reals[2], reals[3], reals[4], status, steps, reals[5])


def _in_units(scales: Scales, p: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    return p * (scales.y / scales.x)[..., None, None], rho * (scales.s * scales.y)[..., None, None]
