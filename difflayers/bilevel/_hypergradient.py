r"""The derivative of the upper objective through the lower solution, by one linear solve.

.. math:: \nabla \Phi = \nabla_x F - J q, \qquad H q = \nabla_y F

with :math:`H = \nabla^2_{yy} f` and :math:`J = \nabla^2_{xy} f`. The graph of :math:`\nabla_y f` is built once for all
products; memory does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from difflayers._checks import check_finite
from difflayers._solution import Info, OnFailure, Solution, SolveError, Status, check_policy, settle, timed
from difflayers.implicit import Implicit, Neumann, OneStep, Unrolled
from difflayers.linalg import CG, GMRES, LU, MINRES, QR, Cholesky, LinearSolver
from difflayers.linalg._autodiff import autocast_off, opaque
from difflayers.linalg._linear_solve import DENSE_LIMIT
from difflayers.linalg._system import LinearSystem, Params

from ._finite_difference import Differences, FiniteDifference
from ._mfac import MFAC, MFACSolver
from ._optimality import multipliers
from ._oracles import Oracles, Recorded
from ._problem import Bilevel, check_problem
from ._variables import Variables

Adjoint = Implicit | Neumann | OneStep | MFAC | FiniteDifference


@dataclass(frozen=True)
class Hypergradient:
    """What :func:`hypergradient` returns.

    Attributes:
        grad: The hypergradient, with the structure of `x`; a dict from names to tensors where `x` is a module.
        adjoint: The solution q of the adjoint system, with the structure of `y`: ``init`` of the next outer step.
        value: The upper objective.
        stationarity: Norm of what is zero at a lower solution (its gradient, the fixed-point or KKT residual): the
            hypergradient is that of the exact solution up to a multiple of it.
        status: How the adjoint solve ended, see :class:`~difflayers.Status`; a 0-dim tensor, like the next two.
        steps: Steps the adjoint solve took.
        residual: ``||H q - grad_y F||``.
        products: Number of products with the Hessian, all told.
    """

    grad: Any
    adjoint: Any
    value: Tensor
    stationarity: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    products: int

    @property
    def converged(self) -> Tensor:
        """Whether the adjoint solve met its tolerance."""
        return self.status == Status.CONVERGED

    @property
    def failed(self) -> Tensor:
        """Whether the adjoint solve ended in a status beyond ``MAX_STEPS``."""
        return self.status > Status.MAX_STEPS


@opaque
def hypergradient(
    problem: Bilevel,
    x: Any,
    y: Any,
    batch: Any = None,
    *,
    adjoint: Adjoint | None = None,
    init: Any = None,
    on_failure: OnFailure = "raise",
) -> Hypergradient:
    r"""The gradient of the upper objective in `x`, through the lower solution `y`.

    Solves ``H q = grad_y upper`` at ``(x, y)`` and returns ``grad_x upper - J q``, where H is the Hessian of the lower
    objective in y and J its mixed derivative. With a prox the system is that of its fixed point (support-aware: zero
    through coordinates that rest at a kink), with equalities the KKT system.

    Args:
        problem: The problem.
        x: Upper variables: tensor, pytree of tensors, or module.
        y: Lower variables, at (or near) the lower solution: the error of the hypergradient is proportional to theirs.
        batch: None, or ``(upper_batch, lower_batch)``, handed to the two functions as they are.
        adjoint: ``Implicit(solver, damping)`` with a linear solver, ``Neumann(terms)``, ``OneStep()`` (the first term
            of it), :class:`MFAC` or :class:`FiniteDifference`. None: ``Implicit(CG())``, with ``GMRES()`` for a prox
            and ``MINRES()`` for equalities. A dense solver of a smooth problem is Cholesky, which knows a minimum.
            Damping is added to the Hessian alone.
        init: The ``adjoint`` of an earlier call to start the iteration from.
        on_failure: What to do when the adjoint system has no solution: ``"raise"``, ``"nan"`` or ``"ignore"``.

    Returns:
        :class:`Hypergradient`, detached.

    Raises:
        ValueError: For bad input, naming the argument: a function that returns more than one number or takes a
            differentiated tensor from its surroundings, a batch that is no pair, NaN.
        SolveError: Where the Hessian is not positive definite, or the iteration diverged. ``MAX_STEPS`` (also a Neumann
            series that grows) is a :class:`~difflayers.SolveWarning`.

    Differentiable in nothing: it is a derivative itself. :class:`ArgminLayer` has derivatives of higher order.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import Bilevel, hypergradient
        >>> problem = Bilevel(lambda x, y, batch: y.square().sum(), lambda x, y, batch: (y - 3 * x).square().sum())
        >>> x = torch.tensor([1.0, 2.0])
        >>> hypergradient(problem, x, 3 * x).grad  # of (3 x)^2
        tensor([18., 36.])

    Source: F. Pedregosa, Hyperparameter optimization with approximate gradient, 2016, section 2; J. Lorraine, P. Vicol,
    D. Duvenaud, Optimizing Millions of Hyperparameters by Implicit Differentiation, 2020.
    """
    check_policy(on_failure)
    with torch.inference_mode(False):
        oracles = Oracles(check_problem(problem), x, y, batch)
        with autocast_off(oracles.y[0]):
            return _solve(oracles, adjoint, init, on_failure)


def _solve(oracles: Oracles, adjoint: Adjoint | None, init: Any, on_failure: OnFailure) -> Hypergradient:
    problem = oracles.problem
    value, upper_x, upper_y = oracles.upper()
    y_vars = oracles.y_variables
    if isinstance(adjoint, FiniteDifference):
        if problem.prox_lower is not None or problem.constraint is not None:
            raise ValueError("adjoint: expected Implicit or Neumann with a prox or a constraint, got FiniteDifference")
        recorded: Recorded | Differences = Differences(oracles, adjoint.radius)
        adjoint = adjoint.adjoint
    else:
        smooth = problem.prox_lower is None and problem.constraint is None
        damping = adjoint.damping if isinstance(adjoint, Implicit) and not smooth else 0.0
        recorded = oracles.optimality(damping)
        if damping and isinstance(adjoint, Implicit):
            adjoint = replace(adjoint, damping=0.0)
    n, extra = y_vars.size, recorded.value.numel() - y_vars.size
    solver = _linear_solver(problem, adjoint, recorded.value.numel())
    rhs = torch.cat([upper_y, upper_y.new_zeros(extra)]) if extra else upper_y
    start = None if init is None else _start(recorded, y_vars.read("init", init), upper_y)
    system = _AdjointSystem(solver, None, name="hypergradient", symmetric=recorded.symmetric, recorded=recorded)

    def solve() -> tuple[Tensor, Info]:
        factors = solver.factor(system, (), rhs)
        q, info = solver.solve(system, (), factors, rhs, True, start)
        if factors or isinstance(solver, MFACSolver):  # which do not look
            info = info._replace(residual=torch.linalg.vector_norm(recorded.pull(q) - rhs))
        return q, info

    with torch.no_grad():
        q, info = timed("hypergradient", "adjoint", solve)
        grad = upper_x - recorded.cross(q)
    products = oracles.counts["hvp"]

    def result(grad: Tensor) -> Hypergradient:
        return Hypergradient(
            grad=oracles.x_variables.present(grad),
            adjoint=y_vars.present(q[:n]),
            value=value,
            stationarity=torch.linalg.vector_norm(recorded.value.detach()),
            status=info.status,
            steps=info.steps,
            residual=info.residual,
            products=products,
        )

    def diagnose() -> None:
        _name_bad_input(oracles, upper_y, info, grad, result)

    return result(settle(grad, info, on_failure, name="hypergradient", phase="adjoint", diagnose=diagnose))


def _start(recorded: Recorded | Differences, q: Tensor, upper_y: Tensor) -> Tensor:
    """An earlier adjoint, with the multipliers that go best with it."""
    if isinstance(recorded, Differences) or recorded.normals is None:
        return q
    A = recorded.normals
    with torch.no_grad():
        pulled = recorded.pull(torch.cat([q, q.new_zeros(len(A))]))[: q.numel()]
    return torch.cat([q, multipliers(A, upper_y - pulled)])


def _linear_solver(problem: Bilevel, adjoint: Any, n: int) -> LinearSolver:
    """The solver of the adjoint system, refused where it needs a structure that the system has not."""
    smooth = problem.prox_lower is None and problem.constraint is None
    if adjoint is None:
        adjoint = Implicit(CG() if smooth else GMRES() if problem.prox_lower is not None else MINRES())
    if isinstance(adjoint, OneStep):
        adjoint = Neumann(1)
    if isinstance(adjoint, Unrolled):
        raise ValueError(
            "adjoint: expected Implicit, Neumann, OneStep, MFAC or FiniteDifference, got Unrolled: a hypergradient "
            "starts from the solution; ArgminLayer unrolls its solver"
        )
    if not isinstance(adjoint, Implicit | Neumann | MFAC):
        raise ValueError(f"adjoint: expected Implicit, Neumann, OneStep, MFAC or FiniteDifference, got {adjoint!r}")
    if not smooth and isinstance(adjoint, MFAC):
        raise ValueError("adjoint: expected Implicit or Neumann with a prox or a constraint, got MFAC")
    if isinstance(adjoint, Implicit):
        inner = adjoint.linear_solver
        refused = (CG, Cholesky, MINRES) if problem.prox_lower is not None else () if smooth else (CG, Cholesky)
        if isinstance(inner, refused):
            fitting = "GMRES() or LU()" if problem.prox_lower is not None else "MINRES(), GMRES() or LU()"
            raise ValueError(
                f"adjoint: expected {fitting} for a lower problem with a prox or constraints, whose adjoint system is "
                f"not positive definite, got {type(inner).__name__}"
            )
        if smooth:
            adjoint = definite(adjoint, n)
    return adjoint.solver(n, smooth)


def definite(adjoint: Implicit, n: int) -> Implicit:
    """Direct solvers made to tell a saddle from a minimum: Cholesky instead of LU and QR."""
    inner = adjoint.linear_solver
    if isinstance(inner, LU | QR) or (inner is None and n <= DENSE_LIMIT):
        return replace(adjoint, linear_solver=Cholesky())
    return adjoint


@dataclass(frozen=True, eq=False)
class _AdjointSystem(LinearSystem):
    """The Jacobian of the optimality conditions at one point."""

    recorded: Recorded | Differences = None  # type: ignore[assignment]

    def apply(self, params: Params, v: Tensor, transpose: bool) -> Tensor:
        return self.recorded.pull(v) if transpose else self.recorded.push(v)

    def matrix(self, params: Params, like: Tensor) -> Tensor:
        return self.recorded.matrix().mT


def _name_bad_input(
    oracles: Oracles, upper_y: Tensor, info: Info, grad: Tensor, result: Callable[[Tensor], Hypergradient]
) -> None:
    """Why an adjoint solve failed: NaN that came in, or a Hessian that is none of a minimum."""
    for variables in (oracles.x_variables, oracles.y_variables):
        _check_leaves(variables)
    check_finite([("upper: gradient in y", upper_y)])
    if int(info.status) == Status.SINGULAR and oracles.problem.prox_lower is None:
        message = (
            "hypergradient (adjoint): the lower Hessian is not positive definite at y"
            if oracles.problem.constraint is None
            else "hypergradient (adjoint): the KKT matrix of the lower problem is singular at y"
        )
        found = result(grad)
        raise SolveError(
            f"{message} ({int(info.steps)} steps, residual {float(info.residual):.2e}). Likely causes: (a) y is no "
            "minimum: solve the lower problem further, (b) its minimum is not isolated: add a ridge to `lower`, or "
            "damping to the adjoint, Implicit(CG(), damping=1e-3), (c) MINRES() solves singular and indefinite "
            "systems that have a solution. The error's `.solution` carries what was reached.",
            Solution(found, info.status, info.steps, info.residual),
        )


def _check_leaves(variables: Variables) -> None:
    check_finite((label, leaf.detach()) for label, leaf in zip(variables.labels, variables.leaves, strict=True))
