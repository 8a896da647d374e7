r"""Gated ReLU networks trained to the global optimum, as a layer.

.. math:: \min_u \sum_k s_k\, l(f_k, y_k) + \beta \sum_{i=1}^P \|u_i\|, \qquad
    f_k = \sum_i 1[x_k^T g_i \ge 0]\, x_k^T u_i

with fixed gates :math:`g_i`: a group lasso, equal to training :math:`\sum_i 1[x^T g_i \ge 0]\, x^T w_i\, \alpha_i` with
weight decay :math:`\tfrac\beta2 \sum_i (\|w_i\|^2 + \alpha_i^2)`. A. Mishkin, A. Sahiner, M. Pilanci, Fast Convex
Optimization for Two-Layer ReLU Networks, 2022.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from difflayers._solution import OnFailure, Solution
from difflayers.implicit import ImplicitProblem, envelope, solution_map, solution_map_ex
from difflayers.linalg._autodiff import autocast_off, opaque

from ._gated_problem import as_task, gated_problem, without_repetitions
from ._gated_solver import FISTA
from ._gated_task import GatedTask
from ._gates import Gates
from ._hinge_problem import hinge_problem, lagrangian, split
from ._losses import Loss
from ._relu_solution import ConvexReLUSolution
from ._training_call import TrainingCall, without_failed


def convex_gated_relu(
    X: Tensor,
    y: Tensor,
    beta: float | Tensor,
    gates: Gates | Tensor,
    *,
    sample_weight: Tensor | None = None,
    loss: Loss | None = None,
    solver: FISTA | None = None,
    warm_start: ConvexReLUSolution | Solution[ConvexReLUSolution] | None = None,
    on_failure: OnFailure = "raise",
) -> ConvexReLUSolution:
    """The gated ReLU network that fits a training set best, under weight decay: the global optimum.

    Solves ``argmin_u sum_k s_k loss(f_k, y_k) + beta * sum_i ||u_i||`` with
    ``f_k = sum_i 1[x_k^T g_i >= 0] x_k^T u_i``. The loss is a sum over the samples, not a mean.

    Args:
        X: ``(*batch, n, d)`` training data; a bias is a column of ones.
        y: ``(*batch, n)`` labels.
        beta: More than 0: a number, or a tensor ``(*batch)``. From :func:`beta_max` on the network is zero.
        gates: :class:`Gates`, or their vectors ``(P, d)`` or ``(*batch, P, d)``. The patterns are those of `X`.
        sample_weight: ``(*batch, n)``, at least 0; ones if None. A sample of weight 0 is as good as absent.
        loss: :class:`Squared` (None) or :class:`Huber`; for labels -1 and 1 :class:`Logistic` or :class:`Hinge`.
        solver: :class:`FISTA` with its tolerance and limits; with the hinge loss an interior-point method takes both.
        warm_start: An earlier result with as many gates, to start from; no gradient flows to it. Of no use to the hinge
            loss.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        A :class:`ConvexReLUSolution`, minimal: no neuron can be dropped without a change of the fit. Where optimal
        networks are not unique (gates with equal patterns, more gates than samples at a small beta), it is one of them.

    Raises:
        ValueError: For a beta that is not positive, a negative weight, a wrong shape or dtype, labels 0 of a logistic
            or hinge loss, NaN or Inf, naming the argument.
        SolveError: In backward, where the active neurons depend on each other; pruning makes that an accident. With the
            hinge loss, samples beyond the margin or well within it hold no neuron in place, with Huber's those beyond
            the knee do not: where too few are left, the network is no function of its data. Its `objective` is, and has
            its gradient.

    Differentiable in `X`, `y`, `beta` and `sample_weight`, to any order, forward and reverse, with the patterns held;
    the objective by the envelope theorem, without a linear solve. A neuron just about to become active counts as
    inactive; a sample on the knee of Huber's loss as one beyond it; samples on the kink of the hinge loss stay there,
    by multipliers. The gap is a number without derivative. From `beta_max` on all derivatives of the network are zero.

    Example:
        >>> import torch
        >>> from difflayers.relu import convex_gated_relu, enumerate_gates
        >>> X = torch.tensor([[-2.0, 1.0], [-1.0, 1.0], [1.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
        >>> y = torch.tensor([2.0, 1.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> network = convex_gated_relu(X, y, 0.1, enumerate_gates(X))
        >>> bool(network.gap < 1e-12)
        True
        >>> torch.autograd.grad(network.objective, y)[0].sum() > 0
        tensor(True)

    Source: A. Mishkin, A. Sahiner, M. Pilanci, Fast Convex Optimization for Two-Layer ReLU Networks, 2022, equation 4
    (C-GReLU) and section 4 (R-FISTA).

    Departure: FISTA only comes near; Newton's method on the active neurons, or an interior-point method where that
    does not settle, finishes to rounding, and the network is pruned to a minimal one, without which it has no
    derivative.
    """
    return _value(on_failure, X, y, beta, gates, sample_weight, loss, solver, warm_start)


def convex_gated_relu_ex(
    X: Tensor,
    y: Tensor,
    beta: float | Tensor,
    gates: Gates | Tensor,
    *,
    sample_weight: Tensor | None = None,
    loss: Loss | None = None,
    solver: FISTA | None = None,
    warm_start: ConvexReLUSolution | Solution[ConvexReLUSolution] | None = None,
) -> Solution[ConvexReLUSolution]:
    """As :func:`convex_gated_relu`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        X: Training data.
        y: Labels.
        beta: Strength of weight decay.
        gates: Gates.
        sample_weight: Weights of the samples.
        loss: Loss.
        solver: Solver.
        warm_start: An earlier result, or None.

    Returns:
        The network with status and steps of every element. The residual is the largest norm of a neuron's shortest
        subgradient, relative to beta.
    """
    return _solution(X, y, beta, gates, sample_weight, loss, solver, warm_start)


def _objective(loss: Loss, u: Tensor, *args: Tensor) -> Tensor:
    return as_task(loss, *args).objective(u)


def _present(call: TrainingCall, value: Tensor, tolerant: bool) -> ConvexReLUSolution:
    """Objective, gap and gates to the neurons; with a loss that has kinks, `value` has multipliers too."""
    args = call.args[:5]
    smooth, (n, d) = call.loss.smooth, call.args[0].shape[-2:]
    with autocast_off(value):
        u = value if smooth else split(value, n, d)[0]
        bad = torch.isnan(u.detach()).any(-1).any(-1) if tolerant else None
        point = value
        if bad is not None:
            point = torch.where(bad[..., None, None] if smooth else bad[..., None], 0, value)
            args = (*without_failed(bad, *args[:4]), args[4])
        objective = envelope(partial(_objective if smooth else lagrangian, call.loss), point, args)
        with torch.no_grad():
            task = as_task(call.loss, *(t.detach() for t in args))
            point, nu = (point.detach(), None) if smooth else split(point.detach(), n, d)
            gap = objective.detach() - task.lower_bound(point, nu)
            margin = _margin(task, point, nu)
        if bad is not None:
            # NaN, and so are gradients of whoever asks for them
            objective, gap = torch.where(bad, u.sum((-2, -1)), objective), torch.where(bad, torch.nan, gap)
            margin = torch.where(bad, torch.nan, margin)
    gates = Gates(call.vectors.to(call.dtype), call.args[4])
    objective, gap = objective.to(call.dtype), gap.clamp_min(0).to(call.dtype)
    return ConvexReLUSolution(u.to(call.dtype), None, objective, gap, gates, margin.to(call.dtype))


def _margin(task: GatedTask, u: Tensor, nu: Tensor | None) -> Tensor:
    """The least distance of an inactive neuron from becoming active, relative to beta."""
    M = without_repetitions(task.M > 0, task.s > 0)  # the twin of an active neuron is none of them
    kept = replace(task, M=M.to(task.X.dtype))
    slope = kept.slope(task.fit(u)) if nu is None else kept.pull(nu)
    room = 1 - torch.linalg.vector_norm(slope, dim=-1) / task.beta.unsqueeze(-1)
    return torch.where((u != 0).any(-1), 1, room).amin(-1).clamp_min(0)


def _checked(
    X: Any, y: Any, beta: Any, gates: Any, sample_weight: Any, loss: Any, solver: Any, warm_start: Any
) -> tuple[TrainingCall, ImplicitProblem]:
    solver = solver or FISTA()
    if not isinstance(solver, FISTA):
        raise ValueError(f"solver: expected FISTA() or None, got {solver!r}")
    call = TrainingCall(X, y, beta, gates, sample_weight, loss, warm_start)
    make = gated_problem if call.loss.smooth else hinge_problem
    return call, make(call.loss, solver, warm_start is not None)


@opaque
def _value(on_failure: OnFailure, *given: Any) -> ConvexReLUSolution:
    call, problem = _checked(*given)
    u = solution_map(problem, call.args, on_failure=on_failure)
    return _present(call, u, on_failure == "nan")


@opaque
def _solution(*given: Any) -> Solution[ConvexReLUSolution]:
    call, problem = _checked(*given)
    found = solution_map_ex(problem, call.args)
    return replace(found, value=_present(call, found.value, True))  # type: ignore[arg-type, return-value]
