r"""Soft assignment of points to classes, where neighbours shall agree.

.. math:: \min_{Y \in \Delta^n} \; \langle A, Y \rangle - \frac{\lambda}{2} \sum_{pq} W_{pq} \langle Y_p, Y_q \rangle
    + \sum Y \log Y

A stationary point is a fixed point :math:`U = -A + \lambda W \, \mathrm{softmax}(U)` of logits, :math:`Y =
\mathrm{softmax}(U)`, for the symmetric part of W: the energy knows no other. One step of the fixed-point iteration
minimises a bound of the energy, if W is positive semidefinite. A step that is shortened to
:math:`t \le 1 / (1 + \lambda L)` does so for every W with eigenvalues of at least :math:`-L`: it is one of mirror
descent, on logits. Here t is halved, not below that, where the energy does not fall as it must.

In the form with prototypes, A is the squared distance to the weighted means of the classes, which move with Y. The
energy with the best prototypes is a minimum of functions that are linear in Y, so the bound holds all the same.

I. Ziko et al., Laplacian Regularized Few-Shot Learning, 2020; I. Ziko et al., Transductive Few-Shot Learning:
Clustering is All You Need?, 2021.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difflayers._checks import (
    broadcast_batch,
    check_options,
    check_same,
    check_shape,
    check_tensor,
    compute_dtype,
    default_rtol,
)
from difflayers._solution import Info, OnFailure, Solution, Status
from difflayers.implicit import Implicit, ImplicitProblem, solution_map, solution_map_ex
from difflayers.linalg import LinearSolver
from difflayers.linalg._autodiff import opaque

from ._costs import SquaredEuclidean
from ._symmetric_newton import forbidden

Unary = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class BoundOptimizer:
    """Options of :func:`laplacian_clustering` and :func:`transductive_clustering`.

    Args:
        rtol: Largest change of an assignment in one whole step. None: 1e-10 in float64, 1e-5 in float32.
            Below what rounding of the logits allows, that is what is asked for.
        max_steps: Steps.
    """

    rtol: float | None = None
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        check_options(self, max_steps=1)


def laplacian_clustering(
    unary: Tensor,
    affinity: Tensor,
    lam: float | Tensor,
    *,
    solver: BoundOptimizer | None = None,
    adjoint: LinearSolver | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """Assigns points to classes by their costs and by their neighbours.

    Solves ``min_Y <unary, Y> - lam / 2 sum_pq affinity_pq <Y_p, Y_q> + sum Y log Y`` over rows that sum to 1, from
    ``softmax(-unary)`` on; a stationary point, and the only one where ``lam |affinity| < 2`` in the spectral norm.

    Args:
        unary: ``(*batch, n, k)`` cost of each class for each point, of any sign; ``inf`` forbids one. In few-shot
            learning the squared distance to the prototypes.
        affinity: ``(*batch, n, n)``; the energy depends on ``(affinity + affinity^T) / 2`` alone, which is used.
        lam: Weight of the neighbours, a number or ``(*batch)``; below 0 they are to differ.
        solver: Options of the solver.
        adjoint: Solver of the derivative's linear system. None: by size, LU or GMRES.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        ``(*batch, n, k)`` probabilities.

    Raises:
        ValueError: For shapes that do not fit and for what is not a number, naming the argument.
        SolveError: If an element failed; ``INFEASIBLE``: no class is allowed for some point.

    Differentiable in `unary`, `affinity` and `lam`, to any order, forward and reverse, at the point that was found.

    Example:
        >>> import torch
        >>> from difflayers.transport import laplacian_clustering
        >>> unary = torch.tensor([[0.0, 2.0], [1.0, 0.9], [2.0, 0.0]])
        >>> neighbours = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> laplacian_clustering(unary, neighbours, 0.0)[1]
        tensor([0.4750, 0.5250])
        >>> laplacian_clustering(unary, neighbours, 1.0)[1]
        tensor([0.6738, 0.3262])

    Source: I. Ziko et al., Laplacian Regularized Few-Shot Learning, 2020, equation 8.
    Departure: the graph is made symmetric, and the energy that is watched has ``lam / 2``; the published code iterates
    with an unsymmetric graph and watches an energy that the steps do not lower. Iterates to a fixed point, in shorter
    steps where whole ones do not lower the energy.
    """
    problem, args, dtype = _posed(unary, affinity, lam, solver, adjoint)
    return _assignment(solution_map(problem, args, on_failure=on_failure)).to(dtype)


def laplacian_clustering_ex(
    unary: Tensor,
    affinity: Tensor,
    lam: float | Tensor,
    *,
    solver: BoundOptimizer | None = None,
    adjoint: LinearSolver | None = None,
) -> Solution[Tensor]:
    """As :func:`laplacian_clustering`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        unary: Costs.
        affinity: Affinity.
        lam: Weight of the neighbours.
        solver: Options of the solver.
        adjoint: Solver of the derivative's linear system.

    Returns:
        The assignment with status and steps; the residual is its largest change in one whole step.
    """
    problem, args, dtype = _posed(unary, affinity, lam, solver, adjoint)
    return _solution(solution_map_ex(problem, args), dtype)


def transductive_clustering(
    query: Tensor,
    support: Tensor,
    labels: Tensor,
    affinity: Tensor,
    lam: float | Tensor,
    *,
    solver: BoundOptimizer | None = None,
    adjoint: LinearSolver | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """As :func:`laplacian_clustering`, with prototypes that move with the assignment.

    Solves ``min_{Y, m} sum_qk Y_qk |x_q - m_k|^2 + sum_sk L_sk |x_s - m_k|^2 - lam / 2 sum_pq W_pq <Y_p, Y_q>
    + sum Y log Y`` for queries x_q, and x_s in the support with labels L, from the means of the support on.

    Args:
        query: ``(*batch, n, d)`` points to assign; their scale sets how sharp the assignment is.
        support: ``(*batch, s, d)`` points with known classes.
        labels: ``(*batch, s, k)`` weights of the classes, at least 0: one-hot as a rule. Each class has some.
        affinity: ``(*batch, n, n)`` of the queries.
        lam: Weight of the neighbours, a number or ``(*batch)``.
        solver: Options of the solver.
        adjoint: Solver of the derivative's linear system. None: by size, LU or GMRES.
        on_failure: ``"raise"``, ``"nan"`` or ``"ignore"``.

    Returns:
        ``(*batch, n, k)`` probabilities of the queries.

    Raises:
        ValueError: For shapes that do not fit and for what is not a number, naming the argument.
        SolveError: If an element failed.

    Differentiable in all tensors, to any order, forward and reverse, at the point that was found.

    Example:
        >>> import torch
        >>> from difflayers.transport import transductive_clustering
        >>> query = torch.tensor([[1.4], [2.0], [2.2], [0.1]])
        >>> support, labels = torch.tensor([[0.0], [3.0]]), torch.eye(2)
        >>> transductive_clustering(query, support, labels, torch.zeros(4, 4), 0.0)[0]
        tensor([0.3927, 0.6073])

    Source: I. Ziko et al., Transductive Few-Shot Learning: Clustering is All You Need?, 2021, section 3.
    Departure: prototypes are eliminated, so that assignment and prototypes are solved together; steps as in
    :func:`laplacian_clustering`.
    """
    problem, args, dtype = _posed_with_prototypes(query, support, labels, affinity, lam, solver, adjoint)
    return _assignment(solution_map(problem, args, on_failure=on_failure)).to(dtype)


def transductive_clustering_ex(
    query: Tensor,
    support: Tensor,
    labels: Tensor,
    affinity: Tensor,
    lam: float | Tensor,
    *,
    solver: BoundOptimizer | None = None,
    adjoint: LinearSolver | None = None,
) -> Solution[Tensor]:
    """As :func:`transductive_clustering`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        query: Points to assign.
        support: Points with known classes.
        labels: Their classes.
        affinity: Affinity.
        lam: Weight of the neighbours.
        solver: Options of the solver.
        adjoint: Solver of the derivative's linear system.

    Returns:
        The assignment with status and steps; the residual is its largest change in one whole step.
    """
    problem, args, dtype = _posed_with_prototypes(query, support, labels, affinity, lam, solver, adjoint)
    return _solution(solution_map_ex(problem, args), dtype)


def _posed(
    unary: Tensor, affinity: Tensor, lam: float | Tensor, solver: BoundOptimizer | None, adjoint: LinearSolver | None
) -> tuple[ImplicitProblem, tuple[Tensor, ...], torch.dtype]:
    n, k = check_tensor("unary", unary, min_ndim=2).shape[-2:]
    if k == 0:
        raise ValueError(f"unary: expected at least one class, got shape {tuple(unary.shape)}")
    rest = _graph(affinity, lam, n, ("unary", unary))
    named = (("unary", unary), ("affinity", affinity))
    check_same(named)
    broadcast_batch([*((name, tuple(t.shape[:-2])) for name, t in named), ("lam", tuple(rest[1].shape))])
    # a cost that is as good as inf, without derivatives 0 * inf
    work = compute_dtype(unary.dtype)
    costs = torch.where(torch.isposinf(unary), -forbidden(work), unary.to(work))
    return _problem(_fixed, solver, adjoint, "laplacian_clustering", 2), (costs, *rest), unary.dtype


def _posed_with_prototypes(
    query: Tensor,
    support: Tensor,
    labels: Tensor,
    affinity: Tensor,
    lam: float | Tensor,
    solver: BoundOptimizer | None,
    adjoint: LinearSolver | None,
) -> tuple[ImplicitProblem, tuple[Tensor, ...], torch.dtype]:
    n, d = check_tensor("query", query, min_ndim=2).shape[-2:]
    s = check_tensor("support", support, min_ndim=2).shape[-2]
    k = check_tensor("labels", labels, min_ndim=2).shape[-1]
    check_shape("support", support.shape[-1:], (d,), " in its last dimension as query has")
    check_shape("labels", labels.shape[-2:-1], (s,), " rows as support has")
    if k == 0 or s == 0:
        raise ValueError(f"labels: expected at least one class and one point, got shape {tuple(labels.shape)}")
    rest = _graph(affinity, lam, n, ("query", query))
    named = (("query", query), ("support", support), ("labels", labels), ("affinity", affinity))
    check_same(named)
    broadcast_batch([*((name, tuple(t.shape[:-2])) for name, t in named), ("lam", tuple(rest[1].shape))])
    args = (*(t.to(rest[0].dtype) for t in (query, support, labels)), *rest)
    return _problem(_moving, solver, adjoint, "transductive_clustering", 4), args, query.dtype


def _graph(affinity: Tensor, lam: Any, n: int, points: tuple[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The symmetric part of the affinity and the weight."""
    check_tensor("affinity", affinity, min_ndim=2)
    check_shape("affinity", affinity.shape[-2:], (n, n), " for the points")
    if not isinstance(lam, Tensor):
        if not isinstance(lam, int | float) or isinstance(lam, bool):
            raise ValueError(f"lam: expected a number or a tensor, got {type(lam).__name__}")
        lam = points[1].new_full((), lam)
    check_same([points, ("affinity", affinity), ("lam", check_tensor("lam", lam))])
    work = compute_dtype(affinity.dtype)
    W = affinity.to(work)
    return (W + W.mT) / 2, lam.to(work)


def _fixed(Y: Tensor, unary: Tensor) -> tuple[Tensor, Tensor]:
    """The costs and the part of the energy that is constant at them."""
    return unary, unary.new_zeros(())


def _moving(Y: Tensor, query: Tensor, support: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The costs at the best prototypes for an assignment, and what the support adds to the energy there."""
    weight = labels.sum(-2) + Y.sum(-2)
    means = (labels.mT @ support + Y.mT @ query) / weight.unsqueeze(-1)
    cost = SquaredEuclidean()
    return cost(query, means), (labels * cost(support, means)).sum((-2, -1))


@opaque
@functools.lru_cache(maxsize=64)
def _problem(
    unary: Unary, solver: BoundOptimizer | None, adjoint: LinearSolver | None, name: str, count: int
) -> ImplicitProblem:
    solver = BoundOptimizer() if solver is None else solver
    if not isinstance(solver, BoundOptimizer):
        raise ValueError(f"solver: expected BoundOptimizer() or None, got {solver!r}")
    if not (adjoint is None or isinstance(adjoint, LinearSolver)):
        raise ValueError(f"adjoint: expected LU(), GMRES(), another linear solver or None, got {adjoint!r}")
    names = ("unary",) if unary is _fixed else ("query", "support", "labels")

    def residual(U: Tensor, *args: Tensor) -> Tensor:
        Y = U.softmax(-1)
        *data, W, lam = args
        return U + unary(Y, *data)[0] - lam[..., None, None] * (W @ Y)

    return ImplicitProblem(
        solve=functools.partial(_solve, unary=unary, solver=solver),
        residual=residual,
        value_ndim=2,
        arg_ndims=(*(2,) * len(names), 2, 0),
        adjoint=Implicit(adjoint),
        name=name,
        arg_names=(*names, "affinity", "lam"),
    )


def _solve(*args: Tensor, unary: Unary, solver: BoundOptimizer) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    """The iteration; elements that have converged drop out of the work when they are half of it."""
    batch = torch.broadcast_shapes(*(t.shape[:-2] for t in args[:-1]), args[-1].shape)
    *data, W = (t.expand(*batch, *t.shape[-2:]).reshape(batch.numel(), *t.shape[-2:]) for t in args[:-1])
    graph = args[-1].expand(batch).reshape(-1, 1, 1) * W
    if unary is _moving:
        query, support, labels = data
        if bool((labels < 0).any()):
            raise ValueError(f"labels: expected weights of at least 0, got {float(labels.min())}")
        U = -SquaredEuclidean()(query, (labels.mT @ support) / labels.sum(-2).unsqueeze(-1))
    else:
        U = -data[0]
    nowhere = (forbidden(U.dtype) >= U).all(-1).any(-1)
    # Gershgorin's bound of what the graph lacks to be positive semidefinite
    diagonal = graph.diagonal(dim1=-2, dim2=-1)
    lacking = (graph.abs().sum(-1) - diagonal.abs() - diagonal).clamp(min=0)
    shortest = 1 / (1 + (lacking.amax(-1) if lacking.shape[-1] else graph.new_zeros(graph.shape[0])))
    now = _Point.at(unary, data, graph, U, torch.ones_like(shortest))
    index, rtol = torch.arange(len(U), device=U.device), default_rtol(solver.rtol, U.dtype)
    result, steps, residual, tol = U.clone(), *(torch.zeros_like(t) for t in (index, shortest, shortest))
    for step in range(solver.max_steps + 1):
        goal = now.rounding.clamp(min=rtol)
        active = now.change > goal
        left = int(active.sum())
        if left == 0 or step == solver.max_steps or 2 * left <= len(active):
            # one step more, as long as the last: nearer to where whole ones end, and where they alternate too
            result[index], residual[index], tol[index] = now.ahead(), now.change, goal
            index, shortest, now = index[active], shortest[active], now.pick(active)
            data, graph = [t[active] for t in data], graph[active]
            active = active[active]
        if left == 0 or step == solver.max_steps:
            break
        steps[index] += active
        trial = _Point.at(unary, data, graph, now.ahead(), now.size)
        fallen = trial.energy <= now.energy - (trial.Y - now.Y).square().sum((-2, -1)) / 4 + now.noise
        accept = active & (fallen | (now.size <= shortest))
        now = now.where(accept, trial)
        now.size = torch.where(active & ~accept, torch.maximum(now.size / 2, shortest), now.size)
    status = torch.where(residual <= tol, int(Status.CONVERGED), int(Status.MAX_STEPS))
    status = torch.where(torch.isfinite(residual), status, int(Status.DIVERGED))
    status = torch.where(nowhere, int(Status.INFEASIBLE), status)
    return result.reshape(*batch, *U.shape[-2:]), Info(*(t.reshape(batch) for t in (status, steps, residual))), ()


class _Point:
    """Logits, assignment, where a whole step leads, its change and the rounding of that, energy, rounding, step."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts
        self.U, self.Y, self.whole, self.change, self.rounding, self.energy, self.noise, self.size = parts

    @staticmethod
    def at(unary: Unary, data: Sequence[Tensor], graph: Tensor, U: Tensor, size: Tensor) -> _Point:
        Y = U.softmax(-1)
        costs, constant = unary(Y, *data)
        pull = graph @ Y
        terms = costs * Y, -0.5 * pull * Y, torch.special.xlogy(Y, Y)
        energy = torch.stack([t.sum((-2, -1)) for t in terms]).sum(0) + constant
        unit, sizes = torch.finfo(U.dtype).eps, torch.stack([t.abs().sum(-1) for t in terms]).sum(0)
        noise, whole = sizes.sum(-1) + constant.abs(), pull - costs
        change = _largest(whole.softmax(-1) - Y)
        rounding = (8 * unit * (1 + _largest(sizes.unsqueeze(-1)))).clamp(max=unit**0.4)
        return _Point(U, Y, whole, change, rounding, energy, 8 * unit * noise, size)

    def ahead(self) -> Tensor:
        return self.U + self.size[:, None, None] * (self.whole - self.U)

    def pick(self, keep: Tensor) -> _Point:
        return _Point(*(t[keep] for t in (*self.parts[:-1], self.size)))

    def where(self, mask: Tensor, other: _Point) -> _Point:
        pairs = zip((*self.parts[:-1], self.size), other.parts, strict=True)
        return _Point(*(torch.where(mask.reshape(-1, *(1,) * (t.ndim - 1)), o, t) for t, o in pairs))


def _largest(change: Tensor) -> Tensor:
    return change.abs().amax((-2, -1)) if change.shape[-2] else change.new_zeros(change.shape[:-2])


def _assignment(U: Tensor) -> Tensor:
    """Probabilities; NaN of NaN, with zero derivatives for all that failed elements share."""
    failed = torch.isnan(U).any(-1).any(-1)[..., None, None]
    Y = torch.where(failed, 0, U).softmax(-1)
    return torch.where(failed, torch.where(failed, U, 0).sum((-2, -1), keepdim=True), Y)


def _solution(found: Solution[Tensor], dtype: torch.dtype) -> Solution[Tensor]:
    return Solution(_assignment(found.value).to(dtype), found.status, found.steps, found.residual)
