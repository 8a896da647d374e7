r"""The sampled convex program: two-layer ReLU networks over given directions of their neurons, a lasso.

.. math:: \min_\alpha \sum_k s_k\, l(f_k, y_k) + \beta \|\alpha\|_1, \qquad f = H \alpha, \quad
    H = (X [u_1 \dots u_N])_+, \quad \|u_j\| = 1

The unit of direction j has weights :math:`\sqrt{|\alpha_j|}\, u_j` and output weight
:math:`\mathrm{sign}(\alpha_j) \sqrt{|\alpha_j|}`, so every :math:`\alpha` is a network and the optimal value lies above
that of the best network of any width; with more and more random directions it comes down to it. Y. Bai, T. Gautam,
S. Sojoudi, Efficient Global Optimization of Two-Layer ReLU Networks, 2023, algorithm 2.

For the solver this is a gated problem with one input, constantly 1, and "patterns" H: blocks of one entry. So all
losses, the pruning to independent columns and the derivative on the support are those of gated networks.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from difflayers._checks import check_tensor, compute_dtype, renamed
from difflayers._solution import Info, OnFailure, Solution, Status
from difflayers.implicit import ImplicitProblem, envelope, solution_map, solution_map_ex
from difflayers.linalg._autodiff import autocast_off, lifted_under_autocast, opaque
from difflayers.proximal import _lasso_solver

from ._block_hessian import Blocks
from ._gated_problem import NDIMS, as_task, gated_problem
from ._gated_solver import FISTA, active_blocks, minimise
from ._gated_task import GatedTask
from ._gates import Gates
from ._losses import Loss, Squared
from ._relu_solution import ConvexReLUSolution
from ._training_call import TrainingCall, WarmStart, for_solver, without_failed

NAMES = ("X", "y", "sample_weight", "beta", "directions", "warm_start")
Args = tuple[Tensor, ...]


def sampled_convex_program(
    X: Tensor,
    y: Tensor,
    beta: float | Tensor,
    directions: Gates | Tensor,
    *,
    sample_weight: Tensor | None = None,
    loss: Loss | None = None,
    solver: FISTA | None = None,
    warm_start: WarmStart = None,
    on_failure: OnFailure = "raise",
) -> ConvexReLUSolution:
    """The best ReLU network whose neurons have given directions: a lasso on their activations.

    Solves ``argmin_a sum_k s_k loss(f_k, y_k) + beta * sum_j |a_j|`` with ``f_k = sum_j a_j (x_k^T u_j)_+`` and u_j the
    directions at length one. The value is an upper bound on that of the best network of any width; over random
    directions it tends to it. :func:`convex_gated_relu` also finds the directions, inside the cells of its gates.

    Args:
        X: ``(*batch, n, d)`` training data; a bias is a column of ones.
        y: ``(*batch, n)`` labels.
        beta: More than 0: a number, or a tensor ``(*batch)``.
        directions: ``(N, d)`` or ``(*batch, N, d)``, of any length, as by :func:`sample_directions`; of :class:`Gates`
            the vectors are taken.
        sample_weight: ``(*batch, n)``, at least 0; ones if None.
        loss: :class:`Squared` (None) or another smooth loss.
        solver: :class:`FISTA` with its tolerance and limits.
        warm_start: An earlier result over as many directions, to start from; no gradient flows to it.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        A :class:`ConvexReLUSolution`: `v` holds the neurons ``a_j u_j`` with ``a_j > 0``, `w` the ``-a_j u_j`` of the
        others, `gates` the directions and their patterns. The gap bounds the distance to the optimum over these
        directions, and the margin is the least ``1 - |H_j^T nu| / beta`` of a direction that is not used. Where
        activations of used directions depend on each other, unused ones are pruned away: at most n neurons remain.

    Raises:
        ValueError: For a beta that is not positive, a negative weight, a wrong shape or dtype, NaN or Inf, naming the
            argument.
        SolveError: In backward, where activations of the used directions depend on each other; pruning makes that an
            accident.

    Differentiable in `X`, `y`, `beta`, `sample_weight` and `directions`, to any order, forward and reverse; the
    objective by the envelope theorem, without a linear solve. A direction just about to be used counts as unused, and
    a neuron whose kink lies on a point as closed there. The gap is a number without derivative.

    Example:
        >>> import torch
        >>> from difflayers.relu import predict, sample_directions, sampled_convex_program
        >>> X = torch.tensor([[-2.0, 1.0], [-1.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
        >>> y = torch.tensor([2.0, 1.0, 1.0, 2.0])
        >>> directions = sample_directions(X, 500, generator=torch.Generator().manual_seed(0))
        >>> network = sampled_convex_program(X, y, 0.01, directions)
        >>> predict(network, torch.tensor([[3.0, 1.0]])).round(decimals=1)
        tensor([3.])

    Source: Y. Bai, T. Gautam, S. Sojoudi, Efficient Global Optimization of Two-Layer ReLU Networks: Quadratic-Time
    Algorithms and Adversarial Training, 2023, algorithm 2 (SCP).

    Departure: the lasso is solved to rounding and pruned to independent activations, without which the network has no
    derivative; the paper leaves the solver open.
    """
    return _value(on_failure, X, y, beta, directions, sample_weight, loss, solver, warm_start)


def sampled_convex_program_ex(
    X: Tensor,
    y: Tensor,
    beta: float | Tensor,
    directions: Gates | Tensor,
    *,
    sample_weight: Tensor | None = None,
    loss: Loss | None = None,
    solver: FISTA | None = None,
    warm_start: WarmStart = None,
) -> Solution[ConvexReLUSolution]:
    """As :func:`sampled_convex_program`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        X: Training data.
        y: Labels.
        beta: Strength of weight decay.
        directions: Directions of the neurons.
        sample_weight: Weights of the samples.
        loss: Loss.
        solver: Solver.
        warm_start: An earlier result, or None.

    Returns:
        The network with status and steps of every element. The residual is the largest violation of an optimality
        condition, relative to beta.
    """
    return _solution(X, y, beta, directions, sample_weight, loss, solver, warm_start)


def sample_directions(X: Tensor, count: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Random directions of neurons, uniform on the sphere.

    Args:
        X: ``(*batch, n, d)`` data, whose dimension, dtype and device are taken.
        count: How many, at least 1.
        generator: Source of randomness, on the device of X.

    Returns:
        ``(count, d)`` vectors of length one.

    Raises:
        ValueError: For a count below 1 or data of a wrong shape or dtype.

    Not differentiable: nothing of `X` but its dimension matters.

    Example:
        >>> import torch
        >>> from difflayers.relu import sample_directions
        >>> sample_directions(torch.ones(5, 3), 7).norm(dim=-1)
        tensor([1., 1., 1., 1., 1., 1., 1.])

    Source: Y. Bai, T. Gautam, S. Sojoudi, Efficient Global Optimization of Two-Layer ReLU Networks: Quadratic-Time
    Algorithms and Adversarial Training, 2023, algorithm 2.
    """
    d = check_tensor("X", X, min_ndim=2).shape[-1]
    if not d:
        raise ValueError(f"X: expected at least one column, got shape {tuple(X.shape)}")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    drawn = torch.randn((count, d), generator=generator, dtype=X.dtype, device=X.device)
    return drawn / torch.linalg.vector_norm(drawn, dim=-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------- the problem


@lru_cache(maxsize=64)
def _problem(loss: Loss, solver: FISTA, warm: bool) -> ImplicitProblem:
    """In ``(X, y, s, beta, U)``, and a starting point if `warm`; the unknown is ``(*batch, N, 1)``."""
    gated = gated_problem(loss, solver, warm)
    return replace(
        gated,
        solve=partial(_solve, loss, solver),
        residual=partial(_residual, loss),
        linear_solve=partial(_linear_solve, gated),
        name="sampled_convex_program",
        arg_names=NAMES[: 5 + warm],
    )


def _gated(X: Tensor, y: Tensor, s: Tensor, beta: Tensor, U: Tensor, *_: Tensor) -> Args:
    """The arguments of the gated problem: one input, constantly 1, and activations in place of patterns."""
    return torch.ones_like(X[..., :1]), y, s, beta, (X @ U.mT).relu()


def _residual(loss: Loss, a: Tensor, *args: Tensor) -> Tensor:
    return as_task(loss, *_gated(*args)).residual(a)


def _linear_solve(
    gated: ImplicitProblem, a: Tensor, args: Args, factors: Args, rhs: Tensor, transpose: bool
) -> tuple[Tensor, Info]:
    assert gated.linear_solve is not None
    return gated.linear_solve(a, _gated(*args), factors, rhs, transpose)


def _solve(loss: Loss, solver: FISTA, *args: Tensor) -> tuple[Tensor, Info, Args]:
    dtype = args[0].dtype
    batch, sound, flat = for_solver(args, NDIMS)
    task = as_task(loss, *_gated(*flat))
    start = torch.zeros_like(task.M.mT @ task.X)
    if len(flat) == 6:
        start = torch.where(torch.isfinite(flat[5]), flat[5], 0)
    a, info = minimise(task, start, solver)
    lost = ((info.status == Status.MAX_STEPS) & (info.steps < solver.max_steps)).nonzero().squeeze(-1)
    if isinstance(loss, Squared) and len(lost):
        a[lost], again = _from_active_set(task.take(lost), solver)
        info.status[lost], info.residual[lost] = again.status, again.residual
        info.steps[lost] += again.steps
    index, used = active_blocks(a)
    blocks = Blocks.of(task.X, task.M, a, task.beta, task.curvature(task.fit(a)), index, used)
    factors = [t.to(dtype) if t.is_floating_point() else t for t in blocks.factorise()]
    status = torch.where(sound, info.status, int(Status.DIVERGED))
    info = info._replace(status=status, residual=info.residual.to(dtype))
    a = torch.where(sound[:, None, None], a.to(dtype), math.nan)
    back = [t.reshape((*batch, *t.shape[1:])) for t in (a, index, used, *factors)]
    return back[0], Info(*(t.reshape(batch) for t in info)), tuple(back[1:])


def _from_active_set(task: GatedTask, solver: FISTA) -> tuple[Tensor, Info]:
    """The same from where an exact active-set method ends: neighbours among thousands of directions look much alike."""
    root, n = task.s.sqrt(), task.M.shape[-1]
    zeros = torch.zeros_like(task.M[..., 0, :])
    P, atom, size = _lasso_solver.scaled(
        root.unsqueeze(-1) * task.M, root * task.y, task.beta.unsqueeze(-1).expand(-1, n), 0 * task.beta, zeros
    )
    z, _ = _lasso_solver.minimise(P, _lasso_solver.FISTA())
    return minimise(task, (z * size / atom).unsqueeze(-1), solver)


class _Call:
    """The problem that a call means, with the checked arguments in the dtype of the solve."""

    def __init__(
        self,
        X: Any,
        y: Any,
        beta: Any,
        directions: Any,
        sample_weight: Any,
        loss: Loss | None,
        solver: FISTA | None,
        warm_start: WarmStart,
    ) -> None:
        solver = solver or FISTA()
        if not isinstance(solver, FISTA):
            raise ValueError(f"solver: expected FISTA() or None, got {solver!r}")
        with renamed(gates="directions"):
            call = TrainingCall(X, y, beta, directions, sample_weight, loss, warm_start, signed=True)
        if not call.loss.smooth:
            raise ValueError(f"loss: expected a smooth loss, got {call.loss!r}, which has kinks")
        self.loss, self.dtype, self.problem = call.loss, call.dtype, _problem(call.loss, solver, warm_start is not None)
        X, y, s, beta, patterns, *init = call.args
        U = lifted_under_autocast(directions.vectors if isinstance(directions, Gates) else directions)
        with autocast_off(X):
            U = U.to(compute_dtype(U.dtype))
            length = torch.linalg.vector_norm(U.detach(), dim=-1, keepdim=True)
            safe = torch.where(length > 0, U, 1)
            self.directions = torch.where(length > 0, safe / torch.linalg.vector_norm(safe, dim=-1, keepdim=True), 0)
            start = []
            if init:
                v, w = torch.linalg.vector_norm(init[0], dim=-1, keepdim=True).chunk(2, -2)
                start = [v - w]
            self.args = (X, y, s, beta, self.directions, *start)
            self.gates = Gates(self.directions.detach().to(self.dtype), patterns)


def _objective(loss: Loss, a: Tensor, *args: Tensor) -> Tensor:
    return as_task(loss, *_gated(*args)).objective(a)


def _present(call: _Call, a: Tensor, tolerant: bool) -> ConvexReLUSolution:
    """Neurons, objective, gap and margin of the coefficients ``(*batch, N, 1)``."""
    args: Args = call.args[:5]
    with autocast_off(a):
        bad = torch.isnan(a.detach()).any(-1).any(-1)
        point = torch.where(bad[..., None, None], 0, a)
        if tolerant:
            args = (*without_failed(bad, *args[:4]), args[4])
        objective = envelope(partial(_objective, call.loss), point, args)
        with torch.no_grad():
            task = as_task(call.loss, *_gated(*(t.detach() for t in args)))
            gap = (objective.detach() - task.lower_bound(point.detach())).clamp_min(0)
            room = 1 - task.slope(task.fit(point.detach())).squeeze(-1).abs() / task.beta.unsqueeze(-1)
            margin = torch.where(point.detach().squeeze(-1) != 0, 1, room).amin(-1).clamp_min(0)
        v, w = (torch.where(bad[..., None, None], a, (sign * point).relu() * call.directions) for sign in (1, -1))
        if tolerant:  # NaN, and so are gradients of whoever asks for them
            objective = torch.where(bad, a.sum((-2, -1)), objective)
            gap, margin = (torch.where(bad, torch.nan, t) for t in (gap, margin))
    v, w, objective, gap, margin = (t.to(call.dtype) for t in (v, w, objective, gap, margin))
    return ConvexReLUSolution(v, w, objective, gap, call.gates, margin)


@opaque
def _value(on_failure: OnFailure, *given: Any) -> ConvexReLUSolution:
    call = _Call(*given)
    a = solution_map(call.problem, call.args, on_failure=on_failure)
    return _present(call, a, on_failure == "nan")


@opaque
def _solution(*given: Any) -> Solution[ConvexReLUSolution]:
    call = _Call(*given)
    found = solution_map_ex(call.problem, call.args)
    return replace(found, value=_present(call, found.value, True))  # type: ignore[arg-type, return-value]
