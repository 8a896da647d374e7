r"""The entropic projection of a symmetric affinity onto doubly stochastic matrices.

.. math:: \min_\Pi \; -\langle A, \Pi \rangle + \gamma \sum_{ij} \Pi_{ij} \log \Pi_{ij} \quad \text{s.t.} \quad
    \Pi 1 = \Pi^T 1 = 1

For a symmetric A the solution is symmetric, :math:`\Pi_{ij} = \exp((p_i + p_j + A_{ij}) / \gamma)` with one potential
p, which is the root of :math:`\gamma \log \sum_j \Pi_{ij} = 0`. The Jacobian of that is :math:`I + \Pi`.

R. Sinkhorn, A Relationship Between Arbitrary Positive Matrices and Doubly Stochastic Matrices, 1964; P. Knight,
D. Ruiz, B. Ucar, A Symmetry Preserving Algorithm for Matrix Scaling, 2014; T. Ding et al., Unsupervised Manifold
Linearizing and Clustering, 2023.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_options, check_same, check_shape, check_tensor, compute_dtype
from difflayers._solution import Info, OnFailure, Solution, Status
from difflayers.implicit import ImplicitProblem, solution_map, solution_map_ex
from difflayers.linalg import CG, Cholesky, LinearSolver
from difflayers.linalg._autodiff import opaque, transforms_active

from . import _schur as schur
from . import _symmetric_newton as symmetric
from ._coupling import Coupling, _number
from ._iteration import largest_log

_PATIENT = CG(max_steps=300, check_every=5)


@dataclass(frozen=True, kw_only=True)
class SymmetricNewton:
    """Options of :func:`doubly_stochastic`: damped steps in the logarithm, then Newton's method on the dual.

    Args:
        rtol: L1 error of the row sums, relative to n. None: 1e-10 in float64, 1e-5 in float32. Below what rounding of
            the potential allows, that is what is asked for.
        max_steps: Of Newton's method. Where 20 are not enough, the solution is followed from a large gamma to the
            wanted one, with as many steps for each.
    """

    rtol: float | None = None
    max_steps: int = 100

    def __post_init__(self) -> None:
        check_options(self, max_steps=1)


def doubly_stochastic(
    affinity: Tensor,
    gamma: float | Tensor,
    *,
    solver: SymmetricNewton | None = None,
    adjoint: LinearSolver | None = None,
    warm_start: Coupling | Solution[Coupling] | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The doubly stochastic matrix nearest to a symmetric affinity, in the sense of entropy.

    Solves ``argmin_P -<A, P> + gamma sum P log P s.t. P 1 = P^T 1 = 1`` for the symmetric part A of `affinity`.

    Args:
        affinity: ``(*batch, n, n)``, of any sign; ``(affinity + affinity^T) / 2`` counts. ``-inf`` forbids a pair, for
            example every point with itself. What is left must carry a doubly stochastic matrix that is positive there.
        gamma: Strength of the entropy, above 0, in the unit of the affinity: a number or ``(*batch)``.
        solver: Options of the solver.
        adjoint: How the linear system of the derivative is solved: ``Cholesky()`` or ``CG()``. None: the first up to
            n = 256, the second above, and the first where that does not end, up to 2048.
        warm_start: An earlier result of :func:`doubly_stochastic_ex` to start from. No gradient flows to it.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        ``(*batch, n, n)``, symmetric to the bit.

    Raises:
        ValueError: For a matrix that is not square, NaN, a `gamma` that is not positive, naming the argument.
        SolveError: For elements whose allowed pairs carry no doubly stochastic matrix (``INFEASIBLE``).

    Differentiable in `affinity` and `gamma`, to any order, forward and reverse, at a cost and a memory that do not
    depend on the number of steps; the gradient in `affinity` is symmetric.

    Example:
        >>> import torch
        >>> from difflayers.transport import doubly_stochastic
        >>> affinity = torch.tensor([[1.0, 0.8, 0.0], [0.8, 1.0, 0.1], [0.0, 0.1, 1.0]])
        >>> doubly_stochastic(affinity, 0.2)
        tensor([[0.7274, 0.2669, 0.0057],
                [0.2669, 0.7237, 0.0094],
                [0.0057, 0.0094, 0.9849]])

    Source: T. Ding et al., Unsupervised Manifold Linearizing and Clustering, 2023, equation 5.
    Departure: Newton's method with one potential instead of Sinkhorn's iteration with two, whose derivative would be
    that of the steps taken.
    """
    problem, args, _ = _posed(affinity, gamma, solver, adjoint, warm_start)
    p = solution_map(problem, args, on_failure=on_failure)
    return _plan(p, *args[:2], checked=on_failure == "raise").to(affinity.dtype)


def doubly_stochastic_ex(
    affinity: Tensor,
    gamma: float | Tensor,
    *,
    solver: SymmetricNewton | None = None,
    adjoint: LinearSolver | None = None,
    warm_start: Coupling | Solution[Coupling] | None = None,
) -> Solution[Coupling]:
    """As :func:`doubly_stochastic`, with the potential, as an unchecked :class:`~difflayers.Solution`.

    Args:
        affinity: Affinity.
        gamma: Strength of the entropy.
        solver: Options of the solver.
        adjoint: Solver of the derivative's linear system.
        warm_start: Earlier result.

    Returns:
        A :class:`Coupling` whose two potentials are the same tensor, with the status and steps of every element and
        the L1 error of the row sums, relative to n. Where the allowed pairs form a bipartite graph a constant can be
        moved from the potentials of one side to those of the other: there only the plan has a derivative.
    """
    problem, args, shift = _posed(affinity, gamma, solver, adjoint, warm_start)
    found = solution_map_ex(problem, args)
    plan = _plan(found.value, *args[:2], checked=False).to(affinity.dtype)
    p = (found.value - shift.unsqueeze(-1) / 2).to(affinity.dtype)
    return Solution(Coupling(plan, p, p), found.status, found.steps, found.residual)


def _posed(
    affinity: Tensor,
    gamma: float | Tensor,
    solver: SymmetricNewton | None,
    adjoint: LinearSolver | None,
    warm_start: Coupling | Solution[Coupling] | None,
) -> tuple[ImplicitProblem, tuple[Tensor, ...], Tensor]:
    """The problem, its arguments, and what was taken from the affinity.

    The arguments are the symmetric part, at most 0, since a large constant would cost digits, with finite numbers for
    what is forbidden.
    """
    n, m = check_tensor("affinity", affinity, min_ndim=2).shape[-2:]
    if n != m or n == 0:
        raise ValueError(f"affinity: expected square matrices of at least one row, got shape {tuple(affinity.shape)}")
    gamma = _number("gamma", gamma, affinity)
    check_same([("affinity", affinity), ("gamma", gamma)])
    broadcast_batch([("affinity", tuple(affinity.shape[:-2])), ("gamma", tuple(gamma.shape))])
    solver = SymmetricNewton() if solver is None else solver
    if not isinstance(solver, SymmetricNewton):
        raise ValueError(f"solver: expected SymmetricNewton() or None, got {solver!r}")
    if not (adjoint is None or isinstance(adjoint, CG | Cholesky)):
        raise ValueError(f"adjoint: expected Cholesky(), CG() or None, got {adjoint!r}")
    work = compute_dtype(affinity.dtype)
    A, gamma = affinity.to(work), gamma.to(work)
    none = torch.isneginf(A) | torch.isneginf(A).mT
    A = (torch.where(none, 0, A) + torch.where(none, 0, A).mT) / 2
    least = symmetric.forbidden(work)
    top = torch.where(none, least, A).detach().amax((-2, -1)) if A.numel() else A.new_zeros(A.shape[:-2])
    shift = torch.where(torch.isfinite(top) & (top > least), top, 0)
    args: tuple[Tensor, ...] = torch.where(none, least, A - shift[..., None, None]), gamma
    if warm_start is not None:
        args = (*args, _earlier(warm_start, A) + shift.unsqueeze(-1) / 2)
    dense = isinstance(adjoint, Cholesky) or (adjoint is None and n <= symmetric.DENSE_LIMIT)
    wanted = transforms_active() or (torch.is_grad_enabled() and any(t.requires_grad for t in args))
    iterated = None if dense and wanted else adjoint if isinstance(adjoint, CG) else _PATIENT
    return _problem(solver, iterated, len(args)), args, shift


def _earlier(warm_start: Coupling | Solution[Coupling], A: Tensor) -> Tensor:
    coupling = warm_start.value if isinstance(warm_start, Solution) else warm_start
    p = getattr(coupling, "f", None)
    if not isinstance(p, Tensor):
        got = type(coupling).__name__
        raise ValueError(f"warm_start: expected a Solution of doubly_stochastic_ex or its Coupling, got {got}")
    check_shape("warm_start", p.shape[-1:], A.shape[-1:], " for its potential")
    return p.detach().to(A.device, A.dtype)


@opaque
@functools.lru_cache(maxsize=64)
def _problem(solver: SymmetricNewton, iterated: CG | None, count: int) -> ImplicitProblem:
    return ImplicitProblem(
        solve=functools.partial(_solve, solver=solver, factors=iterated is None),
        residual=_row_sums,
        linear_solve=functools.partial(_linear_solve, iterated=iterated),
        cotangents=_cotangents,
        value_ndim=1,
        arg_ndims=(2, 0, 1)[:count],
        factor_ndims=() if iterated else (2, 0),
        name="doubly_stochastic",
        arg_names=("affinity", "gamma", "warm_start")[:count],
    )


def _log_plan(p: Tensor, affinity: Tensor, gamma: Tensor) -> Tensor:
    moved = ((p.unsqueeze(-1) + p.unsqueeze(-2)) + affinity) / gamma[..., None, None]
    return moved.clamp(max=largest_log(moved.dtype))


def _row_sums(p: Tensor, affinity: Tensor, gamma: Tensor, *_: Tensor) -> Tensor:
    """Zero at a solution, in the unit of the affinity."""
    return gamma.unsqueeze(-1) * _log_plan(p, affinity, gamma).exp().sum(-1).log()


def _solve(
    A: Tensor, gamma: Tensor, *init: Tensor, solver: SymmetricNewton, factors: bool
) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    batch = torch.broadcast_shapes(A.shape[:-2], gamma.shape, *(t.shape[:-1] for t in init))
    n = A.shape[-1]
    flat = A.expand(*batch, n, n).reshape(-1, n, n), gamma.expand(batch).reshape(-1)
    if bool((gamma <= 0).any()):
        raise ValueError(f"gamma: expected numbers above 0, got {float(gamma.min())}")
    earlier = init[0].expand(*batch, n).reshape(-1, n) if init else None
    problem = symmetric.Problem(*flat)
    p, info = symmetric.symmetric_newton(problem, earlier, rtol=solver.rtol, max_steps=solver.max_steps)
    value, info = p.reshape(*batch, n), Info(*(t.reshape(batch) for t in info))
    if not factors:
        return value, info, ()
    L, ill = symmetric.factorise(_scaled(p, problem.affinity, problem.gamma)[0])
    return value, info, (L.reshape(*batch, n, n), ill.reshape(batch))


def _scaled(p: Tensor, A: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    plan = symmetric.plan_of(A, gamma, p)
    root = plan.sum(-1).rsqrt()
    return symmetric.scaled_plan(plan, root), root


def _linear_solve(
    p: Tensor, args: tuple[Tensor, ...], factors: tuple[Tensor, ...], rhs: Tensor, transpose: bool, iterated: CG | None
) -> tuple[Tensor, Info]:
    """With ``I + D^-1 Pi``, or its transpose, D the row sums, which are 1 up to the error of the solution."""
    scaled, root = _scaled(p, *args[:2])
    right = rhs * root if transpose else rhs / root
    if iterated is None:
        x = schur.solve_factorised(factors[0], right)
        status = torch.where(factors[1], int(Status.SINGULAR), int(Status.CONVERGED)).expand(x.shape[:-1])
        info = Info(status, torch.zeros_like(status), torch.zeros_like(x[..., 0]))
    else:
        x, info = symmetric.solve_iterated(scaled, right, iterated)
        early = info.status != Status.CONVERGED
        if iterated is _PATIENT and p.shape[-1] <= symmetric.LARGEST and bool(early.any()):
            L, ill = symmetric.factorise(scaled)
            x = torch.where(early.unsqueeze(-1), schur.solve_factorised(L, right), x)
            info = info._replace(status=torch.where(early, int(Status.SINGULAR) * ill, info.status))
    x = x / root if transpose else x * root
    bad = ~torch.isfinite(x).all(-1)
    return x, info._replace(status=torch.where(bad, int(Status.SINGULAR), info.status))


def _cotangents(p: Tensor, args: tuple[Tensor, ...], w: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Those of the arguments at the cotangent `w` of :func:`_row_sums`, written out."""
    plan = symmetric.plan_of(args[0], args[1], p)
    rows = plan.sum(-1)
    u = w / rows
    rules = (
        lambda: u.unsqueeze(-1) * plan,
        lambda: (w * rows.log() - u * torch.special.xlogy(plan, plan).sum(-1)).sum(-1),
    )
    found = [
        rule().sum_to_size(t.shape) if asked else None for rule, t, asked in zip(rules, args, wanted, strict=False)
    ]
    return found + [None] * (len(args) - len(found))


def _plan(p: Tensor, A: Tensor, gamma: Tensor, *, checked: bool) -> Tensor:
    """The plan of potentials; NaN where those are NaN, with zero derivatives for all that failed elements share."""
    if checked:  # then there are none
        return _log_plan(p, A, gamma).exp()
    failed = torch.isnan(p).any(-1)
    one, two = failed.unsqueeze(-1), failed[..., None, None]
    plan = _log_plan(torch.where(one, 0, p), torch.where(two, 0, A), torch.where(failed, 1, gamma)).exp()
    return torch.where(two, torch.where(failed, p.sum(-1), 0)[..., None, None], plan)
