"""From the point at which a solver stopped to what it reports: exact zeros, last digits, units, gap and violation."""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers._solution import Status

from ._cone_certificate import lower_bound, optimality_error
from ._cone_polish import polish
from ._cone_problem import ConeProblem, ConeSolution, Scales


def pruned(problem: ConeProblem, p: Tensor, rho: Tensor, slope: Tensor) -> Tensor:
    r"""Blocks that vanish at the optimum as exact zeros, where the objective allows it.

    As a solver converges, either a block or the room :math:`\beta - \|\sigma_i Z_i^T \nu + K_i^T \rho_i\|` goes to
    zero: the smaller of both, relative to its size, is the one that does.
    """
    dual = problem.cones_adjoint(rho) - problem.fit_adjoint(problem.s * slope)
    pull = torch.linalg.vector_norm(dual, dim=-1)
    norms = torch.linalg.vector_norm(p, dim=-1)
    largest = norms.amax(-1, keepdim=True) if norms.shape[-1] else norms
    beta = problem.beta[..., None]
    fewer = torch.where((norms * beta < (beta - pull) * largest)[..., None], 0, p)
    value = problem.objective(p)
    allowed = value + torch.maximum(2 * (value - lower_bound(problem, p, rho, slope)).abs(), 1e-12 * value)
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
    slope: Tensor,
    status: Tensor,
    steps: Tensor,
    rtol: float,
    dtype: torch.dtype,
) -> ConeSolution:
    """Prunes, polishes and judges `p`, `rho` and `slope`, which are those of `unit`; failed elements become NaN.

    Elements of `zero` are zero. What a solver could not bring to `rtol` in its steps, the polish may.
    """
    p, rho = (torch.where(zero[..., None, None], 0, t) for t in (p, rho))
    slope = torch.where(zero[..., None], unit.slope(p), slope)
    # a bound holds for every network; pruning alone spoils that of the dual point that belongs to p
    bound = lower_bound(problem, *_in_units(scales, p, rho, slope))
    error = optimality_error(unit, p, rho, slope)
    p, rho, slope, error = polished(unit, pruned(unit, p, rho, slope), rho, slope, error)
    error = torch.where(zero, 0, error)
    status = torch.where((status == Status.MAX_STEPS) & (error <= rtol), int(Status.CONVERGED), status)
    p, rho, slope = _in_units(scales, p, rho, slope)
    bound = torch.maximum(bound, lower_bound(problem, p, rho, slope))
    lost = (status > Status.MAX_STEPS)[..., None, None]
    # judged as it is handed out, rounded
    p, rho = (torch.where(lost, torch.nan, t.to(dtype)).to(problem.X.dtype) for t in (p, rho))
    slope = torch.where(lost.squeeze(-1), torch.nan, slope)
    value, violation = problem.objective(p), problem.violation(p)
    reals = tuple(t.to(dtype) for t in (p, rho, value, value - bound, violation, error, slope))
    half = p.shape[-2] // 2
    parts = (t[..., rows, :] for t in reals[:2] for rows in (slice(half), slice(half, None)))
    v, w, rho_v, rho_w = parts
    return ConeSolution(v, w, rho_v, rho_w, reals[2], reals[3], reals[4], status, steps, reals[5], reals[6])


def polished(
    unit: ConeProblem, p: Tensor, rho: Tensor, slope: Tensor, error: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :func:`polish` makes of a point, with the slopes that belong to it."""
    if unit.gated or not unit.loss.smooth:
        return p, rho, slope, optimality_error(unit, p, rho, slope)
    q, multipliers, new = polish(unit, p, rho, error)
    return q, multipliers, torch.where((new < error)[..., None], unit.slope(q), slope), new


def _in_units(scales: Scales, p: Tensor, rho: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p, rho = p * (scales.y / scales.x)[..., None, None], rho * (scales.s * scales.y)[..., None, None]
    return p, rho, slope * scales.y[..., None]
