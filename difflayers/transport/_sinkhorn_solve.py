"""Finds the potentials of a batch of transport problems, cold or from earlier ones, and refuses what has none."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from difflayers._solution import Info, Solution
from difflayers.implicit import ImplicitProblem
from difflayers.linalg import CG, Cholesky, LinearSolver
from difflayers.linalg._autodiff import opaque, transforms_active

from ._coupling import Coupling, Prepared, refused, unequal, warm_potentials
from ._iteration import Problem, start
from ._log_sinkhorn import soft_minimum
from ._point_cloud import PointCoupling
from ._schur import DENSE_LIMIT, EAGER_LIMIT
from ._sinkhorn_problem import ARGS, NDIMS, PATIENT, factors_at, sinkhorn_problem
from ._solvers import KernelSinkhorn, TransportSolver
from ._sparse_newton import SparseNewton

Adjoint = LinearSolver | None
Earlier = Coupling | PointCoupling | Solution[Coupling] | Solution[PointCoupling] | None


def problem_for(
    data: Prepared, solver: TransportSolver | None, adjoint: Adjoint, warm_start: Earlier = None
) -> tuple[ImplicitProblem, tuple[Tensor, ...]]:
    """The problem and its arguments; an earlier solution is one more, on which the new one does not depend."""
    solver = default_solver(data.args[0].shape[-1]) if solver is None else solver
    if not hasattr(solver, "solve"):
        raise ValueError(f"solver: expected KernelSinkhorn(), SparseNewton() or their like, got {solver!r}")
    if not (adjoint is None or isinstance(adjoint, CG | Cholesky)):
        raise ValueError(f"adjoint: expected Cholesky(), CG() or None, got {adjoint!r}")
    eager = isinstance(adjoint, Cholesky) or (adjoint is None and data.args[0].shape[-1] <= EAGER_LIMIT)
    iterated = None if eager and _differentiated(data.args) else adjoint if isinstance(adjoint, CG) else PATIENT
    problem = _problem(solver, iterated, data.wide, warm_start is not None)
    return problem, (data.args if warm_start is None else (*data.args, _earlier(warm_start, data)))


def default_solver(side: int) -> TransportSolver:
    """For a shorter side: where nothing is factorised any more, sparse products are quicker than dense ones at any eps.

    Below, that depends on eps and on the costs, which are not looked at.
    """
    return KernelSinkhorn() if side <= DENSE_LIMIT else SparseNewton()


def _differentiated(args: tuple[Tensor, ...]) -> bool:
    return transforms_active() or (torch.is_grad_enabled() and any(t.requires_grad for t in args))


@opaque
@functools.lru_cache(maxsize=64)
def _problem(solver: TransportSolver, iterated: CG | None, wide: bool, warm: bool) -> ImplicitProblem:
    names = ("cost", "b", "a", "eps", "rho_b", "rho_a") if wide else ARGS
    solve = functools.partial(_solve, solver=solver, factors=iterated is None, names=names)
    cold = sinkhorn_problem(solve, iterated, names, f"sinkhorn[{solver!r}]")
    if not warm:
        return cold
    return dataclasses.replace(cold, arg_ndims=(*NDIMS, 1), arg_names=(*names, "warm_start"))


def _earlier(warm_start: Earlier, data: Prepared) -> Tensor:
    """The potentials of an earlier coupling as one constant."""
    coupling = warm_start.value if isinstance(warm_start, Solution) else warm_start
    f, g = getattr(coupling, "f", None), getattr(coupling, "g", None)
    if not isinstance(f, Tensor) or not isinstance(g, Tensor):
        raise ValueError(
            f"warm_start: expected a Solution of sinkhorn_ex or its Coupling, got {type(coupling).__name__}"
        )
    cost = data.args[0]
    n, m = cost.shape[-2:][::-1] if data.wide else cost.shape[-2:]
    if (f.shape[-1], g.shape[-1]) != (n, m):
        got = tuple(f.shape), tuple(g.shape)
        raise ValueError(f"warm_start: expected potentials of {n} rows and {m} columns, got shapes {got[0]}, {got[1]}")
    f, g = (t.detach().to(cost.device, cost.dtype) for t in (f, g))
    return warm_potentials(f, g, data)


def _solve(
    *tensors: Tensor, solver: TransportSolver, factors: bool, names: tuple[str, ...]
) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    ndims = (*NDIMS, 1)[: len(tensors)]
    batch = torch.broadcast_shapes(*(t.shape[: t.ndim - k] for t, k in zip(tensors, ndims, strict=True)))
    flat = [_flat(t, batch, k) for t, k in zip(tensors, ndims, strict=True)]
    problem = Problem(*flat[: len(NDIMS)])
    holes = _looked_at(problem, names)
    init = None if len(tensors) == len(NDIMS) else _usable(problem, flat[-1])
    f, g, info = solver.solve(problem, init)
    if holes:  # the sums say nothing of the potentials there
        f = torch.where(problem.a > 0, f, soft_minimum(problem, g, problem.eps, rows=True))
        g = torch.where(problem.b > 0, g, soft_minimum(problem, f, problem.eps, rows=False))
    z = torch.cat([f, g], -1)
    value, info = z.reshape((*batch, z.shape[-1])), Info(*(t.reshape(batch) for t in info))
    if not factors:
        return value, info, ()
    factor, ill = factors_at(z, problem)
    return value, info, (factor.reshape((*batch, *factor.shape[-2:])), ill.reshape(batch))


def _flat(t: Tensor, batch: torch.Size, ndim: int) -> Tensor:
    event = t.shape[t.ndim - ndim :]
    return t.expand((*batch, *event)).reshape((batch.numel(), *event))


def _usable(problem: Problem, z: Tensor) -> tuple[Tensor, Tensor]:
    """An earlier solution, where it is one; the usual start elsewhere."""
    n = problem.cost.shape[-2]
    f, g = start(problem)
    good = torch.isfinite(z).all(-1, keepdim=True)
    return torch.where(good, z[..., :n], f), torch.where(good, z[..., n:], g)


def _looked_at(problem: Problem, names: tuple[str, ...]) -> bool:
    """Refuses what has no solution, and says whether some mass is zero. Reads the flags once.

    What is not a number is the business of the element's status.
    """
    _, a, b, eps, soft_a, soft_b = problem
    hard = (soft_a == 0) & (soft_b == 0)
    totals = a.sum(-1), b.sum(-1)
    close = 5e-6 if a.dtype == torch.float64 else 1e-4
    wrong = {
        f"{names[1]}: expected masses of at least 0": (a < 0).any(-1),
        f"{names[2]}: expected masses of at least 0": (b < 0).any(-1),
        "eps: expected numbers above 0": eps <= 0,
        f"{names[4]}: expected numbers above 0": (soft_a < 0) | torch.isinf(soft_a),
        f"{names[5]}: expected numbers above 0": (soft_b < 0) | torch.isinf(soft_b),
        "a, b: expected equal totals, or a penalty rho_a or rho_b": hard & unequal(*totals, close),
    }
    any_wrong, holes = torch.stack([torch.stack(list(wrong.values())).any(), (a == 0).any() | (b == 0).any()]).tolist()
    if any_wrong and (error := refused(wrong, totals)):
        raise error
    return holes
