r"""Entropic optimal transport as a layer.

.. math:: \min_{P \ge 0} \; \langle C, P \rangle + \epsilon \, \mathrm{KL}(P \,|\, a b^T) \quad \text{s.t.} \quad
    P 1 = a, \; P^T 1 = b

or, where `rho_a` or `rho_b` is given, with :math:`\rho_a \mathrm{KL}(P 1 | a)` and
:math:`\rho_b \mathrm{KL}(P^T 1 | b)` in the place of a constraint. KL is that of measures,
:math:`\sum p \log (p / q) - p + q`. The plan is :math:`P_{ij} = a_i b_j \exp((f_i + g_j - C_{ij}) / \epsilon)` with
potentials f and g in the unit of the cost.

M. Cuturi, Sinkhorn Distances: Lightspeed Computation of Optimal Transport, 2013; L. Chizat et al., Scaling Algorithms
for Unbalanced Optimal Transport Problems, 2018; M. Eisenberger et al., A Unified Framework for Implicit Sinkhorn
Differentiation, 2022.
"""

from __future__ import annotations

from typing import Any, overload

from torch import Tensor

from difflayers._solution import OnFailure, Solution
from difflayers.implicit import solution_map, solution_map_ex
from difflayers.linalg import LinearSolver
from difflayers.linalg._autodiff import opaque

from ._coupling import Coupling, centred, plan_unless_failed, prepare
from ._point_cloud import PointCloud, PointCoupling
from ._point_sinkhorn import point_coupling, point_plan
from ._sinkhorn_solve import Earlier, problem_for
from ._solvers import TransportSolver


@opaque
def sinkhorn(
    cost: Tensor | PointCloud,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float | Tensor,
    rho_a: float | Tensor | None = None,
    rho_b: float | Tensor | None = None,
    solver: TransportSolver | None = None,
    adjoint: LinearSolver | None = None,
    warm_start: Earlier = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The entropic transport plan.

    Solves ``argmin_P <cost, P> + eps KL(P | a b^T) s.t. P 1 = a, P^T 1 = b``, or with penalties
    ``rho_a KL(P 1 | a)``, ``rho_b KL(P^T 1 | b)`` where they are given.

    Args:
        cost: ``(*batch, n, m)``, of any sign; ``inf`` forbids an entry. Or a :class:`PointCloud`, whose costs are not
            stored, for plans of up to 2^24 entries.
        a: ``(*batch, n)`` masses of the rows, at least 0; None: ``1 / n`` each.
        b: ``(*batch, m)`` masses of the columns, at least 0; None: ``1 / m`` each. Without penalties its total is that
            of `a`, to 5e-6 (float32: 1e-4).
        eps: Strength of the entropy, above 0, in the unit of the cost: a number or ``(*batch)``.
        rho_a: Strength of the penalty on the row sums, above 0, in the unit of the cost; None: they are constraints.
        rho_b: The same for the column sums.
        solver: :class:`KernelSinkhorn`, :class:`LogSinkhorn` or :class:`SparseNewton`. None: the first up to a shorter
            side of 1024, the last above.
        adjoint: How the linear system of the derivative is solved: ``Cholesky()`` of the Schur complement of the
            shorter side, or ``CG()`` on it, without forming it. None: the first up to a side of 512; the second above,
            and the first where that does not end, up to 1024.
        warm_start: An earlier result of :func:`sinkhorn_ex` to start from. No gradient flows to it.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        ``(*batch, n, m)`` plan.

    Raises:
        ValueError: For shapes that do not fit, NaN, a row or column without an entry that is allowed, a negative mass,
            totals that differ, `eps` or a penalty that is not positive, naming the argument.
        SolveError: For elements whose forbidden entries leave no plan, or without a solution in the range of the
            numbers.

    Differentiable in `cost`, `a`, `b`, `eps`, `rho_a` and `rho_b`, to any order, forward and reverse, at a cost and a
    memory that do not depend on the number of iterations. At a mass of zero the derivative is one-sided; an element
    without any mass has a plan of zeros, and zeros for derivatives, which do not exist there. Without penalties plans
    exist for equal totals alone: a change that makes them differ counts as if both sides were scaled to the geometric
    mean of their totals.

    Example:
        >>> import torch
        >>> from difflayers.transport import sinkhorn
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
        >>> plan = sinkhorn(cost, eps=0.5)
        >>> plan
        tensor([[0.4404, 0.0596],
                [0.0596, 0.4404]], grad_fn=<...>)
        >>> torch.autograd.grad(plan[0, 0], cost)[0]
        tensor([[-0.0525,  0.0525],
                [ 0.0525, -0.0525]])

    Source: M. Eisenberger et al., A Unified Framework for Implicit Sinkhorn Differentiation, 2022, theorem 3.
    Departure: the Schur complement of the shorter side with its null vector deflated, instead of LU of the whole.
    """
    if isinstance(cost, PointCloud):
        options: dict[str, Any] = {"solver": solver, "adjoint": adjoint, "warm_start": warm_start}
        return point_plan(cost, a, b, eps, rho_a, rho_b, on_failure=on_failure, **options)
    data = prepare(cost, a, b, eps, rho_a, rho_b)
    z = solution_map(*problem_for(data, solver, adjoint, warm_start), on_failure=on_failure)
    return plan_unless_failed(z, data, on_failure).to(cost.dtype)


@overload
def sinkhorn_ex(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float | Tensor,
    rho_a: float | Tensor | None = None,
    rho_b: float | Tensor | None = None,
    solver: TransportSolver | None = None,
    adjoint: LinearSolver | None = None,
    warm_start: Earlier = None,
) -> Solution[Coupling]: ...


@overload
def sinkhorn_ex(
    cost: PointCloud,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float | Tensor,
    rho_a: float | Tensor | None = None,
    rho_b: float | Tensor | None = None,
    solver: TransportSolver | None = None,
    adjoint: LinearSolver | None = None,
    warm_start: Earlier = None,
) -> Solution[PointCoupling]: ...


@opaque
def sinkhorn_ex(
    cost: Tensor | PointCloud,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float | Tensor,
    rho_a: float | Tensor | None = None,
    rho_b: float | Tensor | None = None,
    solver: TransportSolver | None = None,
    adjoint: LinearSolver | None = None,
    warm_start: Earlier = None,
) -> Solution[Coupling] | Solution[PointCoupling]:
    """As :func:`sinkhorn`, with potentials, as an unchecked :class:`~difflayers.Solution`.

    Args:
        cost: Cost.
        a: Masses of the rows.
        b: Masses of the columns.
        eps: Strength of the entropy.
        rho_a: Penalty of the row sums.
        rho_b: Penalty of the column sums.
        solver: Solver.
        adjoint: Solver of the derivative's linear system.
        warm_start: Earlier result.

    Returns:
        A :class:`Coupling`, or a :class:`PointCoupling` of a :class:`PointCloud`, all of it differentiable, with the
        status and steps of every element and the L1 error of the plan's sums, relative to its mass.
    """
    if isinstance(cost, PointCloud):
        options: dict[str, Any] = {"solver": solver, "adjoint": adjoint, "warm_start": warm_start}
        return point_coupling(cost, a, b, eps, rho_a, rho_b, **options)
    data = prepare(cost, a, b, eps, rho_a, rho_b)
    found = solution_map_ex(*problem_for(data, solver, adjoint, warm_start))
    parts = plan_unless_failed(found.value, data, "ignore"), *centred(found.value, data)
    coupling = Coupling(*(t.to(cost.dtype) for t in parts))
    return Solution(coupling, found.status, found.steps, found.residual)
