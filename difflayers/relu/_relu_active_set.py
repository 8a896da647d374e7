r"""From a solver's point to a minimal network with its kinks exactly on their points: where derivatives exist.

1. Neurons on a border between cells, which solvers split, move to the first of these cells.
2. Optimal pruning, until the activations of the active neurons are independent.
3. Newton's method on the neurons and the multipliers of their kinks (``_cone_polish.py``), and a certificate.

Where that does not end in a certificate, some neuron is active that should not be: cells next to each other differ in
their slopes by the square of a small angle. Then the smallest are tried as none, and multipliers of inactive neurons
are computed rather than taken from the solver.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from difflayers._solution import Status

from ._cell_projection import cell_multipliers
from ._cone_certificate import optimality_error
from ._cone_interior_point import InteriorPoint
from ._cone_polish import polish
from ._cone_problem import ConeProblem, ConeSolution, ConeSolver, normalise
from ._gated_solver import active_blocks, prune

NEAR, FAR = 1e-12, 1e-8  # error that an interior point is asked for, and has to reach
DROPS = 6  # neurons that are tried as none, one after the other
ON_KINK = 1e-7  # distance of a point from a kink, relative to lengths, before Newton's method puts it there
SETTLED = 1e-9  # error of a point whose active set is right


def solve_closely(solver: ConeSolver, problem: ConeProblem, init: ConeSolution | None) -> ConeSolution:
    """A solution near enough to show which neurons are active.

    Neurons in neighbouring cells differ in their slopes by the square of an angle, so an interior point has to come
    nearer than anybody would ask for its own sake; where rounding forbids, its usual tolerance counts.
    """
    if not isinstance(solver, InteriorPoint) or solver.rtol is not None:
        return solver.solve(problem, init)
    found = replace(solver, rtol=NEAR).solve(problem, init)
    fine = (found.status == Status.MAX_STEPS) & (found.residual <= FAR)
    return found._replace(status=torch.where(fine, int(Status.CONVERGED), found.status))


def settle(problem: ConeProblem, found: ConeSolution) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Minimal neurons, multipliers (of active ones at kinks alone), the error, and whether the active set is right."""
    p, rho = torch.cat([found.v, found.w], -2), torch.cat([found.rho_v, found.rho_w], -2)
    p, rho = (torch.where(torch.isfinite(t), t, 0) for t in (p, rho))
    unit, scales, _ = normalise(problem)
    size_p, size_rho = (t[:, None, None] for t in (scales.y / scales.x, scales.s * scales.y))
    q, kinks, error = _polished(unit, p / size_p, rho / size_rho)
    for fewer in range(DROPS + 1):  # a neuron in a cell next to its own may be too small to be told from none
        late = ((error > SETTLED) & (found.status <= Status.MAX_STEPS)).nonzero().squeeze(-1)
        if not len(late):
            break
        smallest = _without_smallest(p[late] / size_p[late], fewer)
        some, _, _ = normalise(_elements(problem, late))
        parts = _polished(some, smallest, rho[late] / size_rho[late], exact=True)
        better = parts[2] < error[late]
        for whole, part in zip((q, kinks, error), parts, strict=True):
            whole[late] = torch.where(better.reshape(-1, *[1] * (part.ndim - 1)), part, whole[late])
    none = ~(p != 0).any(-1).any(-1)
    right = (error <= SETTLED) | ((found.status == Status.CONVERGED) & none)
    # a point that cannot be settled is handed out as it came, without a derivative
    q, kinks = (
        torch.where(right[:, None, None], a * size, b) for a, size, b in ((q, size_p, p), (kinks, size_rho, rho))
    )
    return q, kinks, error, right


def _polished(unit: ConeProblem, p: Tensor, rho: Tensor, *, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Minimal neurons, multipliers and error after Newton's method on the active set of `p`.

    Multipliers of inactive neurons stay what a solver left, or are computed for the certificate if `exact`.
    """
    p = prune(unit.X, unit.signed_gate.mT, unit.s > 0, _in_first_cells(unit, p))
    q, rho, error = polish(unit, p, rho, torch.full_like(unit.beta, torch.inf))
    if exact:
        pull = unit.fit_adjoint(unit.s * unit.loss.slope(unit.fit(q), unit.y))
        best = cell_multipliers(unit.X, unit.side, -pull)
        rho = torch.where((q != 0).any(-1, keepdim=True), rho, best)
        error = optimality_error(unit, q, rho)
    return q, rho, error


def _without_smallest(p: Tensor, count: int) -> Tensor:
    """Without the `count` smallest neurons that are not zero."""
    size = torch.linalg.vector_norm(p, dim=-1)
    size = torch.where(size > 0, size, torch.inf)
    order = size.argsort(-1).argsort(-1)
    return torch.where((order < count).unsqueeze(-1), 0, p)


def _elements(problem: ConeProblem, rows: Tensor) -> ConeProblem:
    """The problems of some elements."""
    X, y, s, beta, M = (t[rows] for t in (problem.X, problem.y, problem.s, problem.beta, problem.M))
    return replace(problem, X=X, y=y, s=s, beta=beta, M=M)


def _in_first_cells(problem: ConeProblem, p: Tensor) -> Tensor:
    """Neurons on the border of cells, in the first of them: so that their place in the result is a smooth function.

    Two that meet there are multiples of each other, or their sum would be shorter than both.
    """
    index, used = active_blocks(p)
    q = torch.where(used.unsqueeze(-1), torch.take_along_dim(p, index.unsqueeze(-1), -2), 0)
    half = p.shape[-2] // 2
    cells = cells_of(problem, q)
    home, lost = cells.to(torch.int8).argmax(-2), ~cells.any(-2)  # of equal maxima the first
    home = torch.where(lost, index, torch.where(index < half, home, home + half))
    return torch.zeros_like(p).scatter_add(-2, home.unsqueeze(-1).expand_as(q), q)


def cells_of(problem: ConeProblem, q: Tensor) -> Tensor:
    """``(*batch, P, a)``: which patterns a neuron agrees with, where points on its kink agree with all."""
    values = q @ problem.X.mT
    size = torch.linalg.vector_norm(q, dim=-1)[..., :, None] * torch.linalg.vector_norm(problem.X, dim=-1)[..., None, :]
    signs = torch.where(values.abs() > ON_KINK * size, values.sign(), 0)
    side = problem.side[..., : problem.gate.shape[-2], :]
    return side @ signs.mT == signs.abs().sum(-1).unsqueeze(-2)
