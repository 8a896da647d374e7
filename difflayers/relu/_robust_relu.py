r"""ReLU networks trained to the global optimum against an adversary who may move the inputs, as a layer.

.. math:: \min_{v, w} \sum_k s_k \max_{\|\delta_k\| \le \epsilon} l(f(x_k + \delta_k), y_k)
    + \beta \sum_{i=1}^P (\|v_i\| + \|w_i\|)

with cells that hold on the whole ball, :math:`e_{ki}\, x_k^T v_i \ge \epsilon \|v_i\|_*` (the same of w), so that f is
linear on it and the worst case is known: with :math:`a_k = \|\sum_i d_{ki} (v_i - w_i)\|_*` the margin is
:math:`y_k f_k - \epsilon |y_k| a_k`, the residual :math:`|f_k - y_k| + \epsilon a_k`. Y. Bai, T. Gautam, S. Sojoudi,
Efficient Global Optimization of Two-Layer ReLU Networks, 2023.

The value is differentiated by the envelope theorem: with multipliers :math:`\rho` of the cells and subgradients of the
loss at its kinks held, the derivative is that of the Lagrangian at fixed neurons. For example

.. math:: \frac{dp^*}{d\epsilon} = \sum_k s_k l'_k a_k + \sum_{ik} \rho_{ik} \|p_i\|_* .
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_same, compute_dtype
from difflayers._solution import Info, OnFailure, Solution, Status, _stacklevel, check_policy
from difflayers.implicit import ImplicitProblem, envelope, solution_map, solution_map_ex
from difflayers.linalg._autodiff import autocast_off, lifted_under_autocast, opaque

from ._gates import Gates
from ._losses import Hinge, Logistic, Loss, Squared
from ._relu_solution import ConvexReLUSolution
from ._robust_program import Kind, RobustData, solve_robust
from ._robust_rows import Norm
from ._robustness import Robustness, check_robustness
from ._training_call import TrainingCall, for_solver, without_failed

NAMES = ("X", "y", "sample_weight", "beta", "gates", "epsilon")
NDIMS = (2, 1, 1, 0, 2, 0)
KINDS: dict[type[Loss], Kind] = {Squared: "squared", Hinge: "hinge", Logistic: "logistic"}
NO_DERIVATIVE = (
    "robust_convex_relu: expected a first derivative of `objective`, got a backward pass through the neurons `v`, `w` "
    "or a second derivative: neurons of a cone program may not be unique, and have no derivative here. Differentiate "
    "the objective once, and detach the neurons"
)


@dataclass(frozen=True)
class ClarabelSolver:
    """Clarabel, an interior-point method for cone programs: in float64 on the CPU, one element after the other.

    Args:
        rtol: Largest duality gap, relative to the objective of the zero network, that counts as converged. The method
            aims a thousand times lower.
        max_steps: Most iterations, in up to three attempts: another one follows where one misses that aim.
    """

    rtol: float = 1e-7
    max_steps: int = 300

    def __post_init__(self) -> None:
        if not (isinstance(self.rtol, int | float) and self.rtol > 0):
            raise ValueError(f"rtol: expected a number above 0, got {self.rtol!r}")
        if not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise ValueError(f"max_steps: expected an integer of at least 1, got {self.max_steps!r}")


def robust_convex_relu(
    X: Tensor,
    y: Tensor,
    beta: float | Tensor,
    gates: Gates | Tensor,
    robustness: Robustness,
    *,
    sample_weight: Tensor | None = None,
    loss: Loss | None = None,
    solver: ClarabelSolver | None = None,
    on_failure: OnFailure = "raise",
) -> ConvexReLUSolution:
    """The two-layer ReLU network that fits a training set best in the worst case of moved inputs: the global optimum.

    Solves ``min_{v,w} sum_k s_k max_delta loss(f(x_k + delta), y_k) + beta * sum_i (||v_i|| + ||w_i||)`` over neurons
    that keep their side of the gate on the whole ball around every point. The loss is a sum over the samples, not a
    mean.

    Args:
        X: ``(*batch, n, d)`` training data; a bias is a column of ones, to be named in ``fixed_columns``.
        y: ``(*batch, n)`` labels: -1 and 1 for classification.
        beta: More than 0: a number, or a tensor ``(*batch)``.
        gates: :class:`Gates`, or their vectors ``(P, d)`` or ``(*batch, P, d)``. The patterns are those of `X`.
        robustness: The ball: ``LInf(epsilon, fixed_columns=(-1,))``, or :class:`L2`.
        sample_weight: ``(*batch, n)``, at least 0; ones if None. A sample of weight 0 does not count in the loss; its
            ball in the cells stays.
        loss: :class:`Squared` (None), :class:`Hinge` or :class:`Logistic`.
        solver: :class:`ClarabelSolver` with its tolerance and limits.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        A :class:`ConvexReLUSolution` with the worst-case objective and its duality gap, over patterns whose cells are
        wide enough for the ball; neurons of other cells are zero (:func:`narrow_gates` tells which). Neurons lie in
        their cells, so the objective is attained. The margin is None.

    Raises:
        ValueError: For a beta that is not positive, a negative epsilon or weight, a wrong shape or dtype, a loss
            without a worst case, NaN or Inf, naming the argument.
        SolveError: For elements that Clarabel could not solve.

    Warns:
        UserWarning: Where every cell is too narrow, so that the network is zero whatever the data say.

    The objective is differentiable once in `X`, `y`, `beta`, `sample_weight` and epsilon, forward and reverse, with the
    patterns held and without a linear solve. At kinks of the value (an epsilon at which a cell closes, say) it is one
    of the slopes. The neurons have no derivative: neurons of a cone program need not be unique. A backward pass through
    them, or a second derivative of the objective, raises a ``RuntimeError``; forward mode gives NaN there.

    Example:
        >>> import torch
        >>> from difflayers.relu import Hinge, LInf, certified_margin, enumerate_gates, robust_convex_relu
        >>> X = torch.tensor([[-2.0, 1.0], [-1.0, 1.0], [1.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
        >>> y = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
        >>> ball = LInf(torch.tensor(0.25, dtype=torch.float64, requires_grad=True), fixed_columns=(-1,))
        >>> network = robust_convex_relu(X, y, 0.01, enumerate_gates(X), ball, loss=Hinge())
        >>> certified_margin(network, X, y, ball).min().round(decimals=4)
        tensor(1., dtype=torch.float64, grad_fn=<RoundBackward1>)
        >>> bool(torch.autograd.grad(network.objective, ball.epsilon)[0] > 0)
        True

    Source: Y. Bai, T. Gautam, S. Sojoudi, Efficient Global Optimization of Two-Layer ReLU Networks, 2023, section 5.

    Departure: sums and ``log(1 + exp(-y f))`` in place of the paper's scaled forms. Its mean hinge loss with weight
    decay b is ours with ``beta = n b``; its cross-entropy ``log(1 + exp(-2 y f))`` is ours with ``beta = b / 2``, and
    has half our neurons. Weights, fixed columns and the length of the perturbation as a norm are ours, and so is the
    derivative.
    """
    return _value(on_failure, X, y, beta, gates, robustness, sample_weight, loss, solver)


def robust_convex_relu_ex(
    X: Tensor,
    y: Tensor,
    beta: float | Tensor,
    gates: Gates | Tensor,
    robustness: Robustness,
    *,
    sample_weight: Tensor | None = None,
    loss: Loss | None = None,
    solver: ClarabelSolver | None = None,
) -> Solution[ConvexReLUSolution]:
    """As :func:`robust_convex_relu`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        X: Training data.
        y: Labels.
        beta: Strength of weight decay.
        gates: Gates.
        robustness: Ball.
        sample_weight: Weights of the samples.
        loss: Loss.
        solver: Solver.

    Returns:
        The network with status and steps of every element. The residual is the duality gap relative to the objective
        of the zero network.
    """
    return _solution(X, y, beta, gates, robustness, sample_weight, loss, solver)


# ------------------------------------------------------------------------------------------------------- the problem


class _Packed:
    """The unknown of the engine: neurons, multipliers of cells, subgradients of the loss and the gap in one vector."""

    def __init__(self, value: Tensor, X: Tensor, M: Tensor) -> None:
        (n, d), P = X.shape[-2:], M.shape[-1]
        sizes = [2 * P * d, 2 * P * n, n, 1]
        p, rho, self.slope, gap = value.split(sizes, -1)
        self.p = p.unflatten(-1, (2 * P, d))
        self.rho = rho.unflatten(-1, (2 * P, n))
        self.gap = gap.squeeze(-1)


@lru_cache(maxsize=64)
def _problem(kind: Kind, norm: Norm, columns: tuple[int, ...], solver: ClarabelSolver) -> ImplicitProblem:
    return ImplicitProblem(
        solve=partial(_solve, kind, norm, columns, solver),
        residual=_residual,
        linear_solve=_linear_solve,
        value_ndim=1,
        arg_ndims=NDIMS,
        name="robust_convex_relu",
        arg_names=NAMES,
    )


def _residual(value: Tensor, *args: Tensor) -> Tensor:
    """Stands in for a condition that nobody solves for: NaN of a failed element must find its arguments."""
    moved = [
        a.flatten(a.ndim - k).sum(-1) if k else a for a, k in zip(args, NDIMS, strict=True) if a.is_floating_point()
    ]
    return value + 0 * sum(moved[1:], moved[0]).unsqueeze(-1)


def _linear_solve(value: Tensor, args: Any, factors: Any, rhs: Tensor, transpose: bool) -> tuple[Tensor, Info]:
    """Refuses, unless nothing is asked for."""
    if transpose and bool((rhs != 0).any()):
        raise RuntimeError(NO_DERIVATIVE)
    # forward mode passes here on its way to the objective too, which leaves the tangent of the neurons out
    x = torch.full_like(rhs, 0 if transpose else math.nan)
    status = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    return x, Info(status, status, torch.zeros(x.shape[:-1], dtype=x.dtype, device=x.device))


def _solve(
    kind: Kind, norm: Norm, columns: tuple[int, ...], solver: ClarabelSolver, *args: Tensor
) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    batch, sound, flat = for_solver(args, NDIMS)
    sound = sound & torch.isfinite(flat[5])
    found, codes, steps, residuals, narrow = [], [], [], [], 0
    n, P = flat[4].shape[-2:]
    d = flat[0].shape[-1]
    length = 2 * P * (d + n) + n + 1
    for i, fine in enumerate(sound.tolist()):
        if not fine:
            found.append(torch.full((length,), math.nan, dtype=torch.float64, device="cpu"))
            codes.append(int(Status.DIVERGED))
            steps.append(0)
            residuals.append(math.nan)
            continue
        X, y, s, beta, M, epsilon = (t[i].cpu().numpy() for t in flat)
        data = RobustData(X, y, s, float(beta), float(epsilon), M)
        one = solve_robust(data, np.array(columns, dtype=int), kind, norm, solver.rtol, solver.max_steps)
        parts = [torch.from_numpy(part).flatten() for part in (one.p, one.rho, one.slope)]
        found.append(torch.cat([*parts, parts[0].new_full((1,), one.gap)]))
        status = Status.CONVERGED if one.residual <= solver.rtol else Status.MAX_STEPS
        codes.append(int(status if bool(torch.isfinite(found[-1][:-1]).all()) else Status.DIVERGED))
        steps.append(one.steps)
        residuals.append(one.residual)
        narrow += one.narrow
    if narrow:
        _warn(narrow, len(found), P)
    like = args[0]
    value = torch.stack(found) if found else like.new_zeros((0, length))
    value = value.to(like.dtype).to(like.device).reshape(*batch, length)
    info = Info(
        torch.tensor(codes, dtype=torch.int64, device=like.device).reshape(batch),
        torch.tensor(steps, dtype=torch.int64, device=like.device).reshape(batch),
        torch.tensor(residuals, dtype=like.dtype, device=like.device).reshape(batch),
    )
    return value, info, ()


def _warn(narrow: int, count: int, P: int) -> None:
    warnings.warn(
        f"robust_convex_relu: in {narrow} of {count} batch elements the cells of all {P} gates are too narrow for "
        "epsilon, so that the network is zero whatever the data say. Lower epsilon, name columns that are not "
        "perturbed in `fixed_columns` (a bias), or give gates with wider cells; `narrow_gates` tells which ones are "
        "too narrow.",
        UserWarning,
        stacklevel=_stacklevel(),
    )


def _lagrangian(kind: Kind, robustness: Robustness, value: Tensor, *args: Tensor) -> Tensor:
    """The objective at the neurons, with the slopes of the Lagrangian."""
    X, y, s, beta, M, epsilon = args
    at = _Packed(value, X, M)
    D = M.to(X.dtype)
    v, w = at.p.chunk(2, -2)
    q = D @ (v - w)
    f, radius = (X * q).sum(-1), epsilon.unsqueeze(-1)
    worse = radius * robustness.dual_norm(q)
    decay = beta * torch.linalg.vector_norm(at.p, dim=-1).sum(-1)
    if kind == "squared":
        smooth, each = (at.slope * (f - y) + worse).square() / 2, ((f - y).abs() + worse).square() / 2
    else:
        margin = y * f - y.abs() * worse
        if kind == "hinge":
            smooth, each = at.slope * (1 - margin), (1 - margin).relu()
        else:
            smooth = each = -torch.nn.functional.logsigmoid(margin)
    E = (2 * D - 1).mT
    room = torch.cat([E, E], -2) * (at.p @ X.mT) - (radius * robustness.dual_norm(at.p)).unsqueeze(-1)
    lagrangian = (s * smooth).sum(-1) + decay - (at.rho * room).sum((-2, -1))
    return lagrangian + ((s * each).sum(-1) + decay - lagrangian).detach()


# ---------------------------------------------------------------------------------------------------------- the layer


def _checked(
    X: Any, y: Any, beta: Any, gates: Any, robustness: Any, sample_weight: Any, loss: Any, solver: Any
) -> tuple[TrainingCall, ImplicitProblem, Kind, tuple[Tensor, ...]]:
    check_robustness(robustness)
    solver = solver or ClarabelSolver()
    if not isinstance(solver, ClarabelSolver):
        raise ValueError(f"solver: expected ClarabelSolver() or None, got {solver!r}")
    call = TrainingCall(X, y, beta, gates, sample_weight, loss)
    kind = KINDS.get(type(call.loss))
    if kind is None:
        raise ValueError(f"loss: expected Squared(), Hinge() or Logistic() under perturbations, got {loss!r}")
    epsilon = lifted_under_autocast(robustness.radius(y))
    check_same([("X", lifted_under_autocast(X)), ("epsilon", epsilon)])
    broadcast_batch(
        (name, tuple(t.shape[: t.ndim - k])) for name, t, k in zip(NAMES, (*call.args[:5], epsilon), NDIMS, strict=True)
    )
    args = (*call.args[:5], epsilon.to(compute_dtype(epsilon.dtype)))
    return call, _problem(kind, robustness.dual, robustness.perturbed(X.shape[-1]), solver), kind, args


def _present(
    call: TrainingCall, kind: Kind, robustness: Robustness, args: Sequence[Tensor], value: Tensor, tolerant: bool
) -> ConvexReLUSolution:
    X, y, s, beta, M, epsilon = args
    with autocast_off(X):
        bad = torch.isnan(value.detach()).any(-1) if tolerant else None
        point = value
        if bad is not None:
            point = torch.where(bad[..., None], 0, value)
            X, y, s, beta = without_failed(bad, X, y, s, beta)
            epsilon = torch.where(bad, 0, epsilon)
        lagrangian = partial(_lagrangian, kind, replace(robustness, epsilon=0.0))
        objective = envelope(lagrangian, point, (X, y, s, beta, M, epsilon))
        at = _Packed(value, X, M)
        if bad is not None:
            # NaN, and so are gradients of whoever asks for them
            objective = torch.where(bad, value.sum(-1), objective)
        v, w = at.p.to(call.dtype).chunk(2, -2)
    gates = Gates(call.vectors.to(call.dtype), call.args[4])
    return ConvexReLUSolution(v, w, objective.to(call.dtype), at.gap.detach().to(call.dtype), gates)


@opaque
def _value(on_failure: OnFailure, *given: Any) -> ConvexReLUSolution:
    check_policy(on_failure)
    call, problem, kind, args = _checked(*given)
    value = solution_map(problem, args, on_failure=on_failure)
    return _present(call, kind, given[4], args, value, on_failure == "nan")


@opaque
def _solution(*given: Any) -> Solution[ConvexReLUSolution]:
    call, problem, kind, args = _checked(*given)
    found = solution_map_ex(problem, args)
    return replace(found, value=_present(call, kind, given[4], args, found.value, True))  # type: ignore[arg-type, return-value]
