r"""Quadratic programs as layers.

.. math:: \min_x \tfrac12 x^T P x + q^T x \quad \text{s.t.} \quad A x = b, \; G x \le h

with multipliers y of the equalities and :math:`z \ge 0` of the inequalities. B. Amos, J. Z. Kolter, OptNet, 2017,
section 3.1; M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024, uses the same
derivative in its generic completion.

The derivative is that of the equations that hold at the solution: an inequality with a positive multiplier is an
equality there, one with a zero multiplier is none. It is exact under strict complementarity; a constraint that is
active with a zero multiplier counts as inactive. ``smoothing`` replaces it by that of a point of the central path.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from difflayers._checks import check_same, check_tensor, compute_dtype
from difflayers._solution import OnFailure, Solution
from difflayers.implicit import solution_map, solution_map_ex
from difflayers.linalg._autodiff import autocast_off, lifted_under_autocast, opaque
from difflayers.linalg._captured import gradients_wanted
from difflayers.linalg._sparse_matrix import Matrix, SparseMatrix, is_sparse
from difflayers.linalg._system import times

from ._interior_point import InteriorPoint
from ._moreau import Moreau
from ._program_problem import NAMES, NDIMS, ProgramSolver, program_problem
from ._smoothing import check_smoothing, relaxed_problem
from ._sparse_program import sparse_program
from ._warm_program import earlier_multipliers, warm_problem


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


@opaque
def quadratic_program(
    P: Matrix,
    q: Tensor,
    G: Matrix | None = None,
    h: Tensor | None = None,
    A: Matrix | None = None,
    b: Tensor | None = None,
    *,
    solver: ProgramSolver | None = None,
    smoothing: float | None = None,
    warm_start: Solution[ProgramPoint] | ProgramPoint | None = None,
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
        A: ``(*batch, p, n)`` equalities, or None. If P, G or A is a :class:`SparseMatrix` or a CSR tensor, none of them
            is made dense: see below.
        b: ``(*batch, p)`` their right-hand sides.
        solver: :class:`Moreau` or :class:`InteriorPoint`. None: the first on a CPU, the second elsewhere; traces name
            it.
        smoothing: Complementarity kappa > 0 of the point whose derivative is taken, see below. None: the exact
            derivative.
        warm_start: An earlier result of :func:`quadratic_program_ex`, or its point, of the same number of inequalities.
            Elements whose active set has not changed need one linear solve and no step of the solver, which pays for
            large programs and batches. It does not change the result, and no gradient flows to it; elements that failed
            then start cold.
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

    With `smoothing`, the value is the same and all its derivatives are those of
    ``argmin_x 1/2 x^T P x + q^T x - kappa * sum(log(h - G x)) s.t. A x = b``, whose products of slack and multiplier
    are kappa: informative at vertices and where constraints turn active or inactive, biased by an amount of order
    kappa elsewhere. This point must exist: bounded solutions, and a point with ``G x < h``. Elements where Newton's
    method does not find it are reported as failed solves are.

    Sparse data are solved by :class:`Moreau` on the CPU, element by element; `solver` may hold its options, and
    `smoothing` is not available. The gradient of a CSR tensor is one of the same pattern, to first order (a second
    derivative in its values raises); the values of a :class:`SparseMatrix` have derivatives of all orders.

    Example:
        >>> import torch
        >>> from difflayers.conic import quadratic_program
        >>> q = torch.tensor([-2.0, -3.0], requires_grad=True)
        >>> x = quadratic_program(torch.eye(2), q, torch.tensor([[1.0, 1.0]]), torch.tensor([2.0]))
        >>> x
        tensor([0.5000, 1.5000], grad_fn=<...>)
        >>> torch.autograd.grad(x[0], q)
        (tensor([-0.5000,  0.5000]),)

    Source: B. Amos, J. Z. Kolter, OptNet: Differentiable Optimization as a Layer in Neural Networks, 2017, section 3.1.
    Departure: the derivative is solved on the active set, which is exact; the interior-point system is biased.
    """
    call = _Call((P, q, G, h, A, b), solver, smoothing, warm_start)
    point = solution_map(call.problem, call.args, on_failure=on_failure)
    if call.relaxed is not None:
        point = _moved(point, solution_map(call.relaxed, call.smooth_args(point), on_failure=on_failure))
    return point[..., : q.shape[-1]].to(q.dtype)


@opaque
def quadratic_program_ex(
    P: Matrix,
    q: Tensor,
    G: Matrix | None = None,
    h: Tensor | None = None,
    A: Matrix | None = None,
    b: Tensor | None = None,
    *,
    solver: ProgramSolver | None = None,
    smoothing: float | None = None,
    warm_start: Solution[ProgramPoint] | ProgramPoint | None = None,
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
        smoothing: Complementarity of the point whose derivative is taken, or None.
        warm_start: An earlier result, or None.

    Returns:
        A :class:`ProgramPoint`, all of it differentiable, with status, steps and the largest violation of an optimality
        condition.
    """
    call = _Call((P, q, G, h, A, b), solver, smoothing, warm_start)
    found = solution_map_ex(call.problem, call.args)
    value, status = found.value, found.status
    if call.relaxed is not None:
        smooth = solution_map_ex(call.relaxed, call.smooth_args(value))
        value, status = _moved(value, smooth.value), torch.where(found.converged, smooth.status, status)
    n, p = q.shape[-1], 0 if A is None else A.shape[-2]
    x, y, z = value.split((n, p, value.shape[-1] - n - p), -1)
    with autocast_off(x):
        s = x.new_zeros((*x.shape[:-1], 0)) if G is None or h is None else h - call.G_times(x)
    point = ProgramPoint(*(t.to(q.dtype) for t in (x, y, z, s)))
    return Solution(point, status, found.steps, found.residual)


def project_polyhedron(
    x: Tensor,
    G: Matrix | None = None,
    h: Tensor | None = None,
    A: Matrix | None = None,
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
    n = check_tensor("x", x, min_ndim=1).shape[-1]
    eye: Matrix
    if is_sparse(G) or is_sparse(A):
        index = torch.arange(n + 1, device=x.device)
        eye = SparseMatrix(index, index[:n], x.new_ones(n), (n, n))
    else:
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
    return quadratic_program(eye, -x, G, h, A, b, solver=solver, on_failure=on_failure)


class _Call:
    """The problem that a call means, its arguments, and the smoothed twin, if one is asked for.

    With a twin the sharp problem gets constants: its derivative is not wanted.
    """

    def __init__(
        self, data: tuple[Any, ...], solver: ProgramSolver | None, smoothing: float | None, warm_start: Any
    ) -> None:
        check_smoothing(smoothing)
        P, q, G, _, A, _ = data
        self.relaxed = None
        m = 0 if G is None else G.shape[-2]
        earlier = None if warm_start is None else earlier_multipliers(warm_start, m, check_tensor("q", q))
        if any(map(is_sparse, (P, G, A))):
            if smoothing is not None:
                raise ValueError(f"smoothing: expected None for sparse data, got {smoothing}")
            self.problem, self.args, pattern = sparse_program(data, solver, earlier)
            self.G_times = lambda x: pattern.times(self.args[2], x)
            return
        parts, whole = _prepare(*data)
        solver = solver or default_solver(q)
        if not callable(getattr(solver, "solve", None)):
            raise ValueError(f"solver: expected Moreau(), InteriorPoint() or None, got {solver!r}")
        self.args, self.G_times = whole, lambda x: times(whole[2], x)
        if smoothing is not None and parts[0] and gradients_wanted():
            self.relaxed = relaxed_problem(parts, float(smoothing))
            self.args = tuple(t.detach() for t in whole)
            # slacks of kappa / z are no number in single precision
            wide = torch.float64 if q.device.type != "mps" else self.args[0].dtype
            P, *rest = whole
            self.smooth_args = lambda start: tuple(t.to(wide) for t in ((P + P.mT) / 2, *rest, start))
        self.problem = program_problem(parts, solver)
        if earlier is not None:
            self.problem, self.args = warm_problem(parts, solver), (*self.args, earlier.to(self.args[1].dtype))


def _moved(sharp: Tensor, smooth: Tensor) -> Tensor:
    """The first value with the derivative of the second."""
    step = (smooth - smooth.detach()).to(sharp.dtype)
    return sharp.detach() + torch.where(torch.isfinite(step), step, 0)


def default_solver(like: Tensor) -> ProgramSolver:
    """Moreau on a CPU, ours elsewhere.

    On a CPU core Moreau is several times as fast at every size (n from 10 to 100) and batch (1 to 1024), also where
    each element has its own matrices; on an accelerator it would take the data to the CPU and back.
    """
    return Moreau() if like.device.type == "cpu" else InteriorPoint()


def _prepare(*data: Tensor | None) -> tuple[tuple[bool, bool], tuple[Tensor, ...]]:
    data = tuple(map(lifted_under_autocast, data))
    P, q = check_tensor("P", data[0], min_ndim=2), check_tensor("q", data[1], min_ndim=1)
    G, h, A, b = data[2:]
    given = [
        (name, check_tensor(name, t, min_ndim=k))
        for name, t, k in zip(NAMES, data, NDIMS, strict=True)
        if t is not None
    ]
    check_same(given)
    n = q.shape[-1]
    if n == 0:
        raise ValueError(f"q: expected at least 1 variable, got shape {tuple(q.shape)}")
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
    args = tuple(t.to(lift) for t in (P, q, G, h, A, b) if t is not None)
    return (G is not None, A is not None), args
