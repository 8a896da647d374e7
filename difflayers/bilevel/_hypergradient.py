r"""The derivative of the upper objective through the lower solution, by one linear solve.

.. math:: \nabla \Phi = \nabla_x F - J q, \qquad H q = \nabla_y F

with :math:`H = \nabla^2_{yy} f` and :math:`J = \nabla^2_{xy} f`. The graph of :math:`\nabla_y f` is built once for all
products; memory does not depend on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from difflayers._checks import check_finite, compute_dtype
from difflayers._solution import Info, OnFailure, Solution, SolveError, Status, check_policy, settle, timed
from difflayers.implicit import Implicit, Neumann, OneStep, Unrolled
from difflayers.implicit._adjoints import Damped
from difflayers.linalg import CG, GMRES, LU, MINRES, QR, Cholesky, LinearSolver
from difflayers.linalg._autodiff import autocast_off, opaque, transforms_active
from difflayers.linalg._linear_solve import DENSE_LIMIT
from difflayers.linalg._system import LinearSystem, Params

from ._curvature import Curvature
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
        value: The upper objective (with blocks, their mean).
        stationarity: Norm of what is zero at a lower solution (its gradient, the fixed-point or KKT residual): the
            hypergradient is that of the exact solution up to a multiple of it.
        status: How the adjoint solve ended, see :class:`~difflayers.Status`; a 0-dim tensor, like the next two and
            `stationarity`, ``(m,)`` tensors with m blocks.
        steps: Steps the adjoint solve took.
        residual: ``||H q - grad_y F||``.
        products: Number of products with the Hessian, all told; one with those of all blocks counts once.
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
    objective in y and J its mixed derivative. With a prox or a projection of y the system is that of its fixed point
    (support-aware: zero through coordinates that rest at a kink), with constraints the KKT system. With blocks one
    adjoint system is solved for each, all at once; the gradient is that of the mean. That no block sees another is not
    checked: where one does, the result is wrong.

    Inequalities that hold y are read off y itself: rows nearer to their bound than ``eps^(1/3)`` (6e-6 in double, 5e-3
    in single precision) times the norm of y (where that is small: times the way to the minimum without constraints)
    count as equalities if their multipliers, a nonnegative least-squares fit of the lower gradient, are above
    ``eps^(1/3)`` of that gradient, or above ``100 eps`` of it and ten times what the fit leaves over. Others are
    absent; so is a weakly active one (at its bound without a multiplier), where only one-sided derivatives exist. A
    multiplier that y is too inexact to tell from zero is a :class:`~difflayers.SolveWarning`. A y that is farther than
    ``eps^(1/3)`` times its norm, at least 1, outside of its set or constraint is refused.

    A y that is no minimum is noticed by curvature. CG sees that of every direction it takes, Cholesky all of it.
    MINRES, GMRES and other solvers that end well on a saddle are judged by the first 6 products they ask for, a prox
    and constraints by 6 products on the support or along the constraint: up to 6 unknowns that is everything, beyond it
    what these products show. Neumann's series and OneStep, which solve no system, warn instead; where they are merely
    short, `residual` tells and `status` does not.

    Args:
        problem: The problem.
        x: Upper variables: tensor, pytree of tensors, or module.
        y: Lower variables, at (or near) the lower solution: the error of the hypergradient is proportional to theirs.
        batch: None, or ``(upper_batch, lower_batch)``, handed to the two functions as they are; data of more than one
            tensor are a tuple on each side.
        adjoint: ``Implicit(solver, damping)`` with a linear solver, ``Neumann(terms)``, ``OneStep()`` (the first term
            of it, with a step that 20 products estimate), :class:`MFAC` or :class:`FiniteDifference`. None:
            ``Implicit(CG())``, with ``GMRES()`` for a prox or projection and ``MINRES()`` for constraints. A dense
            solver of a smooth problem is Cholesky, which knows a minimum. Damping is added to the Hessian alone.
        init: The ``adjoint`` of an earlier call to start the iteration from.
        on_failure: What to do when the adjoint system has no solution: ``"raise"``, ``"nan"`` (the gradient is NaN: all
            of x hangs on every block) or ``"ignore"`` (what was reached). The adjoint is what was reached, always.

    Returns:
        :class:`Hypergradient`, detached.

    Raises:
        ValueError: For bad input, naming the argument: a function that returns more than one number (a block), has no
            derivative or takes a differentiated tensor from its surroundings, a batch that is no pair, NaN, a y that
            violates an inequality or would leave its bound; and inside of ``torch.func`` transforms.
        SolveError: Where the Hessian is not positive definite, or the iteration diverged; names the blocks.
            ``MAX_STEPS`` (also a Neumann series that grows) is a :class:`~difflayers.SolveWarning`.

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
    if transforms_active():
        raise ValueError(
            "hypergradient: expected a call outside of torch.func transforms (vmap, grad, jvp) and forward mode, got "
            "one inside; for many independent lower problems see `blocks` of Bilevel, for derivatives ArgminLayer"
        )
    with torch.inference_mode(False):
        oracles = Oracles(check_problem(problem), x, y, batch)
        with autocast_off(oracles.y[0]):
            return _solve(oracles, adjoint, init, on_failure)


def _solve(oracles: Oracles, adjoint: Adjoint | None, init: Any, on_failure: OnFailure) -> Hypergradient:
    problem = oracles.problem
    value, upper_x, upper_y = oracles.upper()
    y_vars, damping = oracles.y_variables, adjoint.damping if isinstance(adjoint, Implicit) else 0.0
    if isinstance(adjoint, FiniteDifference):
        if oracles.group is not None and problem.blocks is not None:
            raise ValueError(
                "adjoint: expected Implicit, Neumann or OneStep with blocks and a group, got FiniteDifference"
            )
        if not problem.smooth:
            raise ValueError("adjoint: expected Implicit or Neumann with a prox or a constraint, got FiniteDifference")
        recorded: Recorded | Differences = Differences(oracles, adjoint.radius)
        adjoint = adjoint.inner(upper_y.dtype)
        noise = 1e5
    else:
        recorded, noise = oracles.optimality(0.0 if problem.smooth else damping), 1.0
        if isinstance(adjoint, Implicit) and not problem.smooth:
            adjoint, damping = replace(adjoint, damping=0.0), 0.0
    n, size = y_vars.size, recorded.value.shape[-1]
    solver = _linear_solver(problem, adjoint, size, upper_y.dtype)
    rhs = torch.cat([upper_y, upper_y.new_zeros(size - n)]) if size > n else upper_y
    rhs = rhs.to(compute_dtype(rhs.dtype))
    start = None if init is None else _start(recorded, y_vars.read("init", init), upper_y).to(rhs)
    if oracles.group is not None:
        oracles.group.refuse_different(None if problem.blocks is not None else start, adjoint, rhs.device)
    looks = recorded.symmetric and problem.smooth and _needs_a_look(solver)
    seen = Curvature() if looks else None
    system = _AdjointSystem(
        solver, None, name="hypergradient", symmetric=recorded.symmetric, recorded=recorded, seen=seen
    )

    def solve() -> tuple[Tensor, Info]:
        scale = _extreme(rhs)
        b, q0 = rhs / scale, None if start is None else start / scale
        factors = solver.factor(system, (), b)
        q, info = solver.solve(system, (), factors, b, True, q0)
        if factors or isinstance(solver, MFACSolver):  # which do not look
            info = info._replace(residual=torch.linalg.vector_norm(system.apply((), q, True) - b, dim=-1))
        # a quadratic objective has no NaN in its products: what came in shows in the slope and in the upper objective
        lost = ~torch.isfinite(recorded.value.detach()).all(-1)
        if problem.blocks is None:
            lost = lost | torch.isnan(value)
        else:  # NaN of x alone is in no block's slope
            lost = lost | (torch.isnan(value) & torch.isfinite(upper_y).all() & ~lost.any())
        status = torch.where(lost, int(Status.DIVERGED), info.status)
        info = info._replace(residual=info.residual * scale.squeeze(-1), status=status)
        if isinstance(adjoint, Implicit | None) and not isinstance(recorded, Differences) and recorded.curvature:
            return q * scale, _bent(info, recorded.curvature().negative(), Status.SINGULAR)
        series = isinstance(adjoint, Neumann | OneStep)
        bent = None if seen is None else seen.negative(damping, noise)
        return q * scale, _bent(info, bent, Status.MAX_STEPS if series else Status.SINGULAR)

    with torch.no_grad():
        q, info = timed("hypergradient", "adjoint", solve)
        q = q.to(upper_y.dtype)
        grad = upper_x - recorded.cross(q)
    products = oracles.counts["hvp"]

    def result(grad: Tensor) -> Hypergradient:
        return Hypergradient(
            grad=oracles.x_variables.present(grad),
            adjoint=y_vars.present(q[..., :n]),
            value=value,
            stationarity=recorded.gap,
            status=info.status,
            steps=info.steps,
            residual=info.residual,
            products=products,
        )

    def diagnose() -> None:
        _name_bad_input(oracles, upper_y, info, grad, result)

    def judge() -> None:
        present = lambda _: result(grad)  # noqa: E731
        settle(q, info, on_failure, name="hypergradient", phase="adjoint", present=present, diagnose=diagnose)

    failed = (info.status > Status.MAX_STEPS).any()
    if oracles.group is not None and problem.blocks is not None:
        oracles.group.together(judge, q.device)
        failed = oracles.group.any(failed)
    else:
        judge()
    if on_failure == "nan":  # all of x hangs on every block
        grad = torch.where(failed, math.nan, grad)
    return result(grad)


def _extreme(rhs: Tensor) -> Tensor:
    """The largest number of a vector whose square might overflow or vanish, 1 for others."""
    size = rhs.abs().amax(-1, keepdim=True) if rhs.shape[-1] else rhs.new_zeros((*rhs.shape[:-1], 1))
    limits = torch.finfo(rhs.dtype)
    extreme = ((size < limits.tiny**0.25) | (size > limits.max**0.25)) & (size > 0) & torch.isfinite(size)
    return torch.where(extreme, size, 1)


def _bent(info: Info, bent: Tensor | None, status: Status) -> Info:
    """The report with a status for elements that were seen to bend downwards."""
    if bent is None:
        return info
    return info._replace(status=torch.where(bent, info.status.clamp_min(int(status)), info.status))


def _needs_a_look(solver: LinearSolver) -> bool:
    """Whether a solver ends well on an indefinite matrix."""
    inner = solver.inner if isinstance(solver, Damped) else solver
    return not isinstance(inner, CG | Cholesky | MFACSolver)


def _start(recorded: Recorded | Differences, q: Tensor, upper_y: Tensor) -> Tensor:
    """An earlier adjoint, with the multipliers that go best with it."""
    if isinstance(recorded, Differences) or recorded.normals is None:
        return q
    A = recorded.normals
    with torch.no_grad():
        pulled = recorded.pull(torch.cat([q, q.new_zeros(len(A))]))[: q.numel()]
    return torch.cat([q, multipliers(A, upper_y - pulled)])


def _linear_solver(problem: Bilevel, adjoint: Any, n: int, dtype: torch.dtype) -> LinearSolver:
    """The solver of the adjoint system, refused where it needs a structure that the system has not."""
    smooth = problem.smooth
    if adjoint is None:
        rtol = None if compute_dtype(dtype) == dtype else 4 * torch.finfo(dtype).eps  # products are no better
        kind: Any = CG if smooth else GMRES if problem.proximal is not None else MINRES
        adjoint = Implicit(kind(rtol=rtol))
    if isinstance(adjoint, OneStep):
        adjoint = Neumann(1)
    if isinstance(adjoint, Unrolled):
        raise ValueError(
            "adjoint: expected Implicit, Neumann, OneStep, MFAC or FiniteDifference, got Unrolled: a hypergradient "
            "starts from the solution; ArgminLayer unrolls its solver"
        )
    if not isinstance(adjoint, Implicit | Neumann | MFAC):
        raise ValueError(f"adjoint: expected Implicit, Neumann, OneStep, MFAC or FiniteDifference, got {adjoint!r}")
    if problem.blocks is not None and isinstance(adjoint, MFAC):
        raise ValueError("adjoint: expected Implicit, Neumann or OneStep with blocks, got MFAC, which is of one matrix")
    if not smooth and isinstance(adjoint, MFAC):
        raise ValueError("adjoint: expected Implicit or Neumann with a prox or a constraint, got MFAC")
    if isinstance(adjoint, Implicit):
        inner = adjoint.linear_solver
        refused = (CG, Cholesky, MINRES) if problem.proximal is not None else () if smooth else (CG, Cholesky)
        if isinstance(inner, refused):
            fitting = "GMRES() or LU()" if problem.proximal is not None else "MINRES(), GMRES() or LU()"
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
    """The Jacobian of the optimality conditions at one point; half precision is solved in single."""

    recorded: Recorded | Differences = None  # type: ignore[assignment]
    seen: Curvature | None = None

    def apply(self, params: Params, v: Tensor, transpose: bool) -> Tensor:
        u = v.to(self.recorded.value.dtype)
        out = (self.recorded.pull(u) if transpose else self.recorded.push(u)).to(v.dtype)
        if self.seen is not None:
            self.seen.add(v, out)
        return out

    def matrix(self, params: Params, like: Tensor) -> Tensor:
        return self.recorded.matrix().mT.to(like.dtype)


def _name_bad_input(
    oracles: Oracles, upper_y: Tensor, info: Info, grad: Tensor, result: Callable[[Tensor], Hypergradient]
) -> None:
    """Why an adjoint solve failed: NaN that came in, or a Hessian that is none of a minimum."""
    for variables in (oracles.x_variables, oracles.y_variables):
        _check_leaves(variables)
    check_finite([("upper: gradient in y", upper_y)])
    singular = info.status == Status.SINGULAR
    if not bool(singular.any()):
        return
    problem = oracles.problem
    where = f" in blocks {singular.nonzero().flatten().tolist()}" if singular.ndim else ""
    if problem.proximal is not None:
        said = "the adjoint system of the fixed point is singular, or the smooth part bends downwards on the support"
    elif problem.constraint is not None:
        said = "the KKT matrix of the lower problem is singular at y, or the Lagrangian bends downwards"
    else:
        said = "the lower Hessian is not positive definite at y"
    raise SolveError(
        f"hypergradient (adjoint): {said}{where} ({int(info.steps.max())} steps, residual "
        f"{float(info.residual[singular].max()):.2e}). Likely causes: (a) y is no minimum: solve the lower problem "
        "further, (b) its minimum is not isolated: add a ridge to `lower`, or damping to the adjoint, "
        "Implicit(CG(), damping=1e-3), (c) MINRES() solves singular systems that have a solution. The error's "
        "`.solution` carries what was reached.",
        Solution(result(grad), info.status, info.steps, info.residual),
    )


def _check_leaves(variables: Variables) -> None:
    check_finite((label, leaf.detach()) for label, leaf in zip(variables.labels, variables.leaves, strict=True))
