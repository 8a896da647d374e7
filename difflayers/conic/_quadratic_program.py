r"""Quadratic programs as layers.

.. math:: \min_x \tfrac12 x^T P x + q^T x \quad \text{s.t.} \quad A x = b, \; G x \le h

with multipliers y of the equalities and :math:`z \ge 0` of the inequalities. B. Amos, J. Z. Kolter, OptNet, 2017,
section 3.1; M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024, uses the same
derivative in its generic completion.

The derivative is that of the equations that hold at the solution: an inequality with a positive multiplier is an
equality there, one with a zero multiplier is none. It is exact under strict complementarity; a constraint that is
active with a zero multiplier counts as inactive.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._checks import check_same, check_tensor, compute_dtype
from difflayers._solution import OnFailure, Solution
from difflayers.implicit import solution_map, solution_map_ex
from difflayers.linalg._system import times

from ._interior_point import InteriorPoint
from ._moreau import Moreau
from ._program_problem import NAMES, NDIMS, ProgramSolver, program_problem


class ProgramPoint(NamedTuple):
    """A point of a program.

    Attributes:
        x: ``(*batch, n)`` variables.
        y: ``(*batch, p)`` multipliers of the equalities.
        z: ``(*batch, m)`` multipliers of the inequalities, at least 0.
        s: ``(*batch, m)`` slacks ``h - G x``, at least 0.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    s: Tensor


def quadratic_program(
    P: Tensor,
    q: Tensor,
    G: Tensor | None = None,
    h: Tensor | None = None,
    A: Tensor | None = None,
    b: Tensor | None = None,
    *,
    solver: ProgramSolver | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The minimiser of a convex quadratic function under linear constraints.

    Solves ``argmin_x 1/2 x^T P x + q^T x s.t. A x = b, G x <= h``. Every argument is shared by the batch or has one
    entry for each of its elements.

    Args:
        P: ``(*batch, n, n)`` positive semidefinite; of a matrix that is not symmetric the symmetric part counts.
        q: ``(*batch, n)``.
        G: ``(*batch, m, n)`` inequalities, or None.
        h: ``(*batch, m)`` their bounds; ``inf`` where there is none.
        A: ``(*batch, p, n)`` equalities, or None.
        b: ``(*batch, p)`` their right-hand sides.
        solver: :class:`Moreau` or :class:`InteriorPoint`. None: the first on a CPU, the second elsewhere.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        ``(*batch, n)`` minimisers.

    Raises:
        ValueError: For shapes that do not fit, a `P` that is not positive semidefinite (of which the first element is
            named), NaN or Inf, naming the argument.
        SolveError: For elements that are infeasible or unbounded; in backward, where the solution is not unique or
            dependent constraints make a multiplier's derivative undefined.

    Differentiable in every argument, to any order, forward and reverse; gradients of shared arguments are sums over the
    batch. Constraints that hold with a zero multiplier count as absent. At the vertex of a linear program the
    derivative in `q` is exactly zero.

    Example:
        >>> import torch
        >>> from difflayers.conic import quadratic_program
        >>> q = torch.tensor([-2.0, -3.0], requires_grad=True)
        >>> x = quadratic_program(torch.eye(2), q, torch.tensor([[1.0, 1.0]]), torch.tensor([2.0]))
        >>> x
        tensor([0.5000, 1.5000], grad_fn=<SliceBackward0>)
        >>> torch.autograd.grad(x[0], q)
        (tensor([-0.5000,  0.5000]),)

    Source: B. Amos, J. Z. Kolter, OptNet: Differentiable Optimization as a Layer in Neural Networks, 2017, section 3.1.
    Departure: the derivative is solved on the active set, which is exact; the interior-point system is biased.
    """
    parts, args = _prepare(P, q, G, h, A, b)
    point = solution_map(program_problem(parts, solver or _default(q)), args, on_failure=on_failure)
    return point[..., : q.shape[-1]].to(q.dtype)


def quadratic_program_ex(
    P: Tensor,
    q: Tensor,
    G: Tensor | None = None,
    h: Tensor | None = None,
    A: Tensor | None = None,
    b: Tensor | None = None,
    *,
    solver: ProgramSolver | None = None,
) -> Solution[ProgramPoint]:
    """As :func:`quadratic_program`, with multipliers and slacks, as an unchecked :class:`~difflayers.Solution`.

    Args:
        P: Quadratic part.
        q: Linear part.
        G: Inequalities.
        h: Their bounds.
        A: Equalities.
        b: Their right-hand sides.
        solver: Solver.

    Returns:
        A :class:`ProgramPoint`, all of it differentiable, with status, steps and the largest violation of an optimality
        condition.
    """
    parts, args = _prepare(P, q, G, h, A, b)
    found = solution_map_ex(program_problem(parts, solver or _default(q)), args)
    n, p = q.shape[-1], 0 if A is None else A.shape[-2]
    x, y, z = found.value.split((n, p, found.value.shape[-1] - n - p), -1)
    s = x.new_zeros((*x.shape[:-1], 0)) if G is None or h is None else h - times(G, x)
    point = ProgramPoint(*(t.to(q.dtype) for t in (x, y, z, s)))
    return Solution(point, found.status, found.steps, found.residual)


def project_polyhedron(
    x: Tensor,
    G: Tensor | None = None,
    h: Tensor | None = None,
    A: Tensor | None = None,
    b: Tensor | None = None,
    *,
    solver: ProgramSolver | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The nearest point of a polyhedron.

    Solves ``argmin_z 1/2 ||z - x||^2 s.t. A z = b, G z <= h``.

    Args:
        x: ``(*batch, n)``.
        G: ``(*batch, m, n)`` inequalities, or None.
        h: ``(*batch, m)`` their bounds.
        A: ``(*batch, p, n)`` equalities, or None.
        b: ``(*batch, p)`` their right-hand sides.
        solver: As for :func:`quadratic_program`.
        on_failure: ``"raise"``, ``"nan"`` or ``"ignore"``.

    Returns:
        ``(*batch, n)`` projection.

    Raises:
        ValueError: For shapes that do not fit, NaN or Inf.
        SolveError: For elements whose polyhedron is empty.

    Differentiable in every argument, to any order.

    Example:
        >>> import torch
        >>> from difflayers.conic import project_polyhedron
        >>> project_polyhedron(torch.tensor([2.0, 2.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([2.0]))
        tensor([1., 1.])

    Source: B. Amos, J. Z. Kolter, OptNet: Differentiable Optimization as a Layer in Neural Networks, 2017, section 3.1.
    """
    check_tensor("x", x, min_ndim=1)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return quadratic_program(eye, -x, G, h, A, b, solver=solver, on_failure=on_failure)


def _default(q: Tensor) -> ProgramSolver:
    return Moreau() if q.device.type == "cpu" else InteriorPoint()


def _prepare(*data: Tensor | None) -> tuple[tuple[bool, bool], tuple[Tensor, ...]]:
    P, q = check_tensor("P", data[0], min_ndim=2), check_tensor("q", data[1], min_ndim=1)
    G, h, A, b = data[2:]
    given = [
        (name, check_tensor(name, t, min_ndim=k))
        for name, t, k in zip(NAMES, data, NDIMS, strict=True)
        if t is not None
    ]
    check_same(given)
    n = q.shape[-1]
    if P.shape[-2:] != (n, n):
        raise ValueError(f"P: expected shape (..., {n}, {n}) as of q, got {tuple(P.shape)}")
    for M, v, names in ((G, h, "Gh"), (A, b, "Ab")):
        if (M is None) != (v is None):
            raise ValueError(f"{names[0]}, {names[1]}: expected both or none, got one of them")
        if M is None or v is None:
            continue
        if M.shape[-1] != n:
            raise ValueError(f"{names[0]}: expected {n} columns as of q, got {tuple(M.shape)}")
        if M.shape[-2] != v.shape[-1]:
            raise ValueError(
                f"{names[1]}: expected {M.shape[-2]} entries, one per row of {names[0]}, got {tuple(v.shape)}"
            )
    lift = compute_dtype(q.dtype)
    P = (P + P.mT) / 2
    args = tuple(t.to(lift) for t in (P, q, G, h, A, b) if t is not None)
    return (G is not None, A is not None), args
