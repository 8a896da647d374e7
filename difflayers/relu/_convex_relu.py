r"""ReLU networks trained to the global optimum, as a layer.

.. math:: \min_{v, w} \sum_k s_k\, l(f_k, y_k) + \beta \sum_{i=1}^P (\|v_i\| + \|w_i\|), \quad
    f_k = \sum_i d_{ki}\, x_k^T (v_i - w_i), \quad (2 d_{ki} - 1)\, x_k^T v_i \ge 0, \; (2 d_{ki} - 1)\, x_k^T w_i \ge 0

with activation patterns d. Neurons keep to the cells of their patterns, so f is the ReLU network
:math:`\sum_i (x^T v_i)_+ - (x^T w_i)_+`. Over all patterns its optimum is that of training with weight decay. M.
Pilanci, T. Ergen, Neural Networks are Convex Regularizers, 2020.
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

from ._cone_admm import ADMM
from ._cone_interior_point import InteriorPoint
from ._cone_lagrangian import AugmentedLagrangian
from ._gates import Gates
from ._losses import Hinge, Loss
from ._relu_problem import Neurons, certificate, lagrangian, relu_problem
from ._relu_solution import ConvexReLUSolution
from ._robust_relu import ClarabelSolver, robust_convex_relu, robust_convex_relu_ex
from ._robustness import LInf, Robustness
from ._training_call import TrainingCall, WarmStart, without_failed

ConeMethod = InteriorPoint | ADMM | AugmentedLagrangian


def convex_relu(
    X: Tensor,
    y: Tensor,
    beta: float | Tensor,
    gates: Gates | Tensor,
    *,
    sample_weight: Tensor | None = None,
    loss: Loss | None = None,
    solver: ConeMethod | ClarabelSolver | None = None,
    warm_start: WarmStart = None,
    robustness: Robustness | None = None,
    on_failure: OnFailure = "raise",
) -> ConvexReLUSolution:
    """The two-layer ReLU network that fits a training set best, under weight decay: the global optimum.

    Solves ``argmin_{v,w} sum_k s_k loss(f_k, y_k) + beta * sum_i (||v_i|| + ||w_i||)`` with
    ``f_k = sum_i (x_k^T v_i)_+ - (x_k^T w_i)_+`` over neurons ``v_i, w_i`` whose activation pattern on the data is that
    of gate i, or on its border. Over all patterns (:func:`enumerate_gates`) no network of any width does better,
    however it is trained; over some of them it is the best network with neurons in their cells. The loss is a sum over
    the samples, not a mean.

    Args:
        X: ``(*batch, n, d)`` training data; a bias is a column of ones.
        y: ``(*batch, n)`` labels.
        beta: More than 0: a number, or a tensor ``(*batch)``. From ``beta_max(..., gated=False)`` on the network is
            zero; less than about 1e-5 below that, relative, it counts as zero.
        gates: :class:`Gates`, or their vectors ``(P, d)`` or ``(*batch, P, d)``. The patterns are those of `X`.
        sample_weight: ``(*batch, n)``, at least 0; ones if None. A sample of weight 0 does not count in the loss; its
            place in the patterns stays.
        loss: :class:`Squared` (None), :class:`Logistic` or :class:`Huber`; or :class:`Hinge`, which goes the way of
            `robustness`, with a ball of radius zero.
        solver: :class:`InteriorPoint` (None), or the first-order methods :class:`ADMM` and
            :class:`AugmentedLagrangian`, which end at a thousandth unless the active set is found.
        warm_start: An earlier result with as many gates, for a first-order solver to start from; no gradient flows to
            it.
        robustness: ``LInf(epsilon)`` or ``L2(epsilon)``: against the worst case of moved inputs, which is
            :func:`robust_convex_relu`, where only the objective has a derivative.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        A :class:`ConvexReLUSolution`, minimal: no neuron can be dropped without a change of the fit. Where optimal
        networks are not unique it is one of them; the predictions may differ then between points of the data.

    Raises:
        ValueError: For a beta that is not positive, a negative weight, a wrong shape or dtype, labels 0 of a logistic
            loss, NaN or Inf, naming the argument.
        SolveError: If an element diverges (one that stops before it meets its tolerance warns). In backward, where the
            network has no derivative: active neurons that depend on each other (pruning makes that an accident), or an
            active set that could not be settled.

    Differentiable in `X`, `y`, `beta` and `sample_weight`, to any order, forward and reverse, with the patterns held;
    the objective by the envelope theorem, without a linear solve. Optimal neurons generically have kinks exactly on
    points of the data: these move with the points, and their part of the derivative is there. A neuron just about to
    become active counts as inactive, a kink just about to leave its point stays on it if its multiplier is positive;
    coinciding points on a kink share its multiplier. The margin says how near such a change is. The gap is a number
    without derivative.

    Example:
        >>> import torch
        >>> from difflayers.relu import convex_relu, enumerate_gates, predict
        >>> X = torch.tensor([[-2.0, 1.0], [-1.0, 1.0], [1.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
        >>> y = torch.tensor([2.0, 1.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> network = convex_relu(X, y, 0.1, enumerate_gates(X))
        >>> bool(network.gap < 1e-9)
        True
        >>> predict(network, X.new_tensor([[3.0, 1.0]])).shape
        torch.Size([1])

    Source: M. Pilanci, T. Ergen, Neural Networks are Convex Regularizers, 2020, equation 8 and theorem 1. The
    derivative follows from the optimality conditions.

    Departure: an interior-point method with an n x n system takes the place of the paper's general conic solver;
    Newton's method on the neurons and their kinks finishes, and the network is merged and pruned to a minimal one,
    without which it has no derivative.
    """
    robustness = _robustness(robustness, loss)
    if robustness is not None:
        options = _robust_options(sample_weight, loss, solver, warm_start)
        return robust_convex_relu(X, y, beta, gates, robustness, on_failure=on_failure, **options)
    return _value(on_failure, X, y, beta, gates, sample_weight, loss, solver, warm_start)


def convex_relu_ex(
    X: Tensor,
    y: Tensor,
    beta: float | Tensor,
    gates: Gates | Tensor,
    *,
    sample_weight: Tensor | None = None,
    loss: Loss | None = None,
    solver: ConeMethod | ClarabelSolver | None = None,
    warm_start: WarmStart = None,
    robustness: Robustness | None = None,
) -> Solution[ConvexReLUSolution]:
    """As :func:`convex_relu`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        X: Training data.
        y: Labels.
        beta: Strength of weight decay.
        gates: Gates.
        sample_weight: Weights of the samples.
        loss: Loss.
        solver: Solver.
        warm_start: An earlier result, or None.
        robustness: A ball around inputs, or None.

    Returns:
        The network with status and steps of every element. The residual is the duality gap relative to the objective,
        or the violation of the cells relative to the data where that is larger.
    """
    robustness = _robustness(robustness, loss)
    if robustness is not None:
        options = _robust_options(sample_weight, loss, solver, warm_start)
        return robust_convex_relu_ex(X, y, beta, gates, robustness, **options)
    return _solution(X, y, beta, gates, sample_weight, loss, solver, warm_start)


def _robustness(robustness: Robustness | None, loss: Loss | None) -> Robustness | None:
    """The hinge loss has a cone program, and no smooth one: that of a ball of radius zero."""
    return LInf(0.0) if robustness is None and isinstance(loss, Hinge) else robustness


def _robust_options(sample_weight: Any, loss: Any, solver: Any, warm_start: Any) -> dict[str, Any]:
    if warm_start is not None:
        raise ValueError(
            f"warm_start: expected None with robustness or the hinge loss, got {type(warm_start).__name__}"
        )
    return {"sample_weight": sample_weight, "loss": loss, "solver": solver}


def _checked(
    X: Any, y: Any, beta: Any, gates: Any, sample_weight: Any, loss: Any, solver: Any, warm_start: Any
) -> tuple[TrainingCall, ImplicitProblem]:
    solver = solver or InteriorPoint()
    if not isinstance(solver, ConeMethod):
        raise ValueError(f"solver: expected InteriorPoint(), ADMM(), AugmentedLagrangian() or None, got {solver!r}")
    call = TrainingCall(X, y, beta, gates, sample_weight, loss, warm_start, signed=True)
    return call, relu_problem(call.loss, solver, warm_start is not None)


def _present(call: TrainingCall, value: Tensor, tolerant: bool) -> ConvexReLUSolution:
    """Objective and certificate to the neurons."""
    args = call.args[:5]
    with autocast_off(value):
        bad = torch.isnan(value.detach()).any(-1).any(-1) if tolerant else None
        point = value
        if bad is not None:
            point = torch.where(bad[..., None, None], 0, value)
            args = (*without_failed(bad, *args[:4]), args[4])
        objective = envelope(partial(lagrangian, call.loss), point, args)
        with torch.no_grad():
            gap, margin = certificate(call.loss, point.detach(), tuple(t.detach() for t in args))
        if bad is not None:
            # NaN, and so are gradients of whoever asks for them
            objective, gap = torch.where(bad, value.sum((-2, -1)), objective), torch.where(bad, torch.nan, gap)
            margin = torch.where(bad, torch.nan, margin)
        v, w = Neurons.of(value, call.args[0].shape[-1]).p.to(call.dtype).chunk(2, -2)
    gates = Gates(call.vectors.to(call.dtype), call.args[4])
    objective, gap = objective.to(call.dtype), gap.clamp_min(0).to(call.dtype)
    return ConvexReLUSolution(v, w, objective, gap, gates, margin.to(call.dtype))


@opaque
def _value(on_failure: OnFailure, *given: Any) -> ConvexReLUSolution:
    call, problem = _checked(*given)
    value = solution_map(problem, call.args, on_failure=on_failure)
    return _present(call, value, on_failure == "nan")


@opaque
def _solution(*given: Any) -> Solution[ConvexReLUSolution]:
    call, problem = _checked(*given)
    found = solution_map_ex(problem, call.args)
    return replace(found, value=_present(call, found.value, True))  # type: ignore[arg-type, return-value]
