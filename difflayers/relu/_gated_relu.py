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

from difflayers._checks import broadcast_batch, check_finite, check_same, check_shape, check_tensor, compute_dtype
from difflayers._solution import OnFailure, Solution
from difflayers.implicit import ImplicitProblem, envelope, solution_map, solution_map_ex
from difflayers.linalg._autodiff import autocast_off, lifted_under_autocast, opaque, physical

from ._gated_problem import as_task, gated_problem, without_repetitions
from ._gated_solver import FISTA
from ._gated_task import GatedTask
from ._gates import Gates
from ._losses import Loss, Squared
from ._relu_solution import ConvexReLUSolution


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
        loss: :class:`Squared` (None) or :class:`Logistic`, for labels -1 and 1.
        solver: :class:`FISTA` with its tolerance and limits.
        warm_start: An earlier result with as many gates, to start from; no gradient flows to it.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        A :class:`ConvexReLUSolution`, minimal: no neuron can be dropped without a change of the fit. Where optimal
        networks are not unique (gates with equal patterns, more gates than samples at a small beta), it is one of them.

    Raises:
        ValueError: For a beta that is not positive, a negative weight, a wrong shape or dtype, labels 0 of a logistic
            loss, NaN or Inf, naming the argument.
        SolveError: In backward, where the active neurons depend on each other; pruning makes that an accident.

    Differentiable in `X`, `y`, `beta` and `sample_weight`, to any order, forward and reverse, with the patterns held;
    the objective by the envelope theorem, without a linear solve. A neuron just about to become active counts as
    inactive. The gap is a number without derivative. From `beta_max` on all derivatives of the network are zero.

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


def beta_max(
    X: Tensor,
    y: Tensor,
    gates: Gates | Tensor,
    *,
    sample_weight: Tensor | None = None,
    loss: Loss | None = None,
) -> Tensor:
    """The smallest weight decay at which the gated network is zero.

    Computes ``max_i ||sum_k s_k 1[x_k^T g_i >= 0] l'(0, y_k) x_k||``.

    Args:
        X: ``(*batch, n, d)`` training data.
        y: ``(*batch, n)`` labels.
        gates: Gates, as for :func:`convex_gated_relu`.
        sample_weight: ``(*batch, n)`` weights, or None.
        loss: Loss, or None for :class:`Squared`.

    Returns:
        ``(*batch)``.

    Raises:
        ValueError: For a wrong shape or dtype.

    Differentiable in `X`, `y` and `sample_weight`.

    Example:
        >>> import torch
        >>> from difflayers.relu import beta_max
        >>> beta_max(torch.tensor([[3.0], [4.0]]), torch.tensor([1.0, 1.0]), torch.tensor([[1.0]]))
        tensor(7.)

    Source: A. Mishkin, M. Pilanci, Optimal Sets and Solution Paths of ReLU Networks, 2023, section 3.
    """
    call = checked_call(X, y, 1.0, gates, sample_weight, loss)
    X, y, s, _, M = call.args[:5]
    with autocast_off(X):
        slope = call.loss.slope(torch.zeros_like(y), y)
        pulled = (M.to(X.dtype) * (s * slope).unsqueeze(-1)).mT @ X
        return torch.linalg.vector_norm(pulled, dim=-1).amax(-1).to(call.dtype)


class _Call:
    """The problem that a call means and its checked arguments in the dtype of the solve."""

    problem: ImplicitProblem
    args: tuple[Tensor, ...]

    def __init__(
        self,
        X: Any,
        y: Any,
        beta: Any,
        gates: Any,
        sample_weight: Any,
        loss: Loss | None,
        solver: FISTA | None,
        warm_start: Any,
    ) -> None:
        X, y = check_tensor("X", X, min_ndim=2), check_tensor("y", y, min_ndim=1)
        n, d = X.shape[-2:]
        if not n or not d:
            raise ValueError(f"X: expected at least one row and one column, got shape {tuple(X.shape)}")
        check_shape("y", tuple(y.shape[-1:]), (n,), " in its last dimension as X has rows")
        G = check_tensor("gates", gates.vectors if isinstance(gates, Gates) else gates, min_ndim=2)
        if G.shape[-1] != d or not G.shape[-2]:
            raise ValueError(f"gates: expected vectors of shape (..., P, {d}) as of X, P > 0, got {tuple(G.shape)}")
        check_finite([("gates", physical(G))])
        loss, solver = loss or Squared(), solver or FISTA()
        if not isinstance(loss, Loss):
            raise ValueError(f"loss: expected Squared() or Logistic(), got {loss!r}")
        if not isinstance(solver, FISTA):
            raise ValueError(f"solver: expected FISTA() or None, got {solver!r}")
        loss.check_labels(y)
        s = torch.ones(n, dtype=y.dtype, device=y.device)
        if sample_weight is not None:
            s = check_tensor("sample_weight", sample_weight, min_ndim=1)
            check_shape("sample_weight", tuple(s.shape[-1:]), (n,), " in its last dimension as X has rows")
            _at_least_zero("sample_weight", s, strict=False)
        if not isinstance(beta, Tensor):
            beta = torch.full((), float(beta), dtype=y.dtype, device=y.device)
        _at_least_zero("beta", check_tensor("beta", beta), strict=True)
        named = {"X": X, "y": y, "sample_weight": s, "beta": beta, "gates": G}
        if warm_start is not None:
            earlier = warm_start.value if isinstance(warm_start, Solution) else warm_start
            init = check_tensor("warm_start", earlier.v, min_ndim=2).detach()
            check_shape("warm_start", tuple(init.shape[-2:]), tuple(G.shape[-2:]), " of its last two dimensions")
            named["warm_start"] = init
        named = {name: lifted_under_autocast(t) for name, t in named.items()}
        check_same(named.items())
        ndims = {"X": 2, "y": 1, "sample_weight": 1, "beta": 0, "gates": 2, "warm_start": 2}
        broadcast_batch((name, tuple(t.shape[: t.ndim - ndims[name]])) for name, t in named.items())
        self.dtype = y.dtype
        with autocast_off(named["X"]):
            named = {name: t.to(compute_dtype(t.dtype)) for name, t in named.items()}
            self.vectors = named["gates"].detach()
            named["gates"] = named["X"].detach() @ self.vectors.mT >= 0
        self.args, self.loss = tuple(named.values()), loss
        self.problem = gated_problem(loss, solver, warm_start is not None)


@opaque
def checked_call(X: Tensor, y: Tensor, beta: Any, gates: Any, sample_weight: Any, loss: Loss | None) -> _Call:
    """Checked arguments, for other functions of the same problem."""
    return _Call(X, y, beta, gates, sample_weight, loss, None, None)


def _at_least_zero(name: str, value: Tensor, *, strict: bool) -> None:
    """NaN is left to the solve, which fails that element alone."""
    plain = physical(value)
    if plain.is_meta:
        return
    wrong = plain <= 0 if strict else plain < 0
    if bool(wrong.any()):
        least = "more than 0" if strict else "at least 0"
        raise ValueError(f"{name}: expected {least}, got {float(plain[wrong].amin()):g}")


def _objective(loss: Loss, u: Tensor, *args: Tensor) -> Tensor:
    return as_task(loss, *args).objective(u)


def _present(call: _Call, u: Tensor, tolerant: bool) -> ConvexReLUSolution:
    """Objective, gap and gates to the neurons."""
    args = call.args[:5]
    with autocast_off(u):
        bad = torch.isnan(u.detach()).any(-1).any(-1) if tolerant else None
        point = u
        if bad is not None:  # nothing of a failed element may reach the gradients of arguments that others share
            X, y, s, beta, M = args
            point = torch.where(bad[..., None, None], 0, u)
            X, y = torch.where(bad[..., None, None], 0, X), torch.where(bad[..., None], 0, y)
            s, beta = torch.where(bad[..., None], 1, s), torch.where(bad, 1, beta)
            args = X, y, s, beta, M
        objective = envelope(partial(_objective, call.loss), point, args)
        with torch.no_grad():
            task = as_task(call.loss, *(t.detach() for t in args))
            gap = objective.detach() - task.lower_bound(point.detach())
            margin = _margin(task, point.detach())
        if bad is not None:
            # NaN, and so are gradients of whoever asks for them
            objective, gap = torch.where(bad, u.sum((-2, -1)), objective), torch.where(bad, torch.nan, gap)
            margin = torch.where(bad, torch.nan, margin)
    gates = Gates(call.vectors.to(call.dtype), call.args[4])
    objective, gap = objective.to(call.dtype), gap.clamp_min(0).to(call.dtype)
    return ConvexReLUSolution(u.to(call.dtype), None, objective, gap, gates, margin.to(call.dtype))


def _margin(task: GatedTask, u: Tensor) -> Tensor:
    """The least distance of an inactive neuron from becoming active, relative to beta."""
    M = without_repetitions(task.M > 0, task.s > 0)  # the twin of an active neuron is none of them
    slope = replace(task, M=M.to(task.X.dtype)).slope(task.fit(u))
    room = 1 - torch.linalg.vector_norm(slope, dim=-1) / task.beta.unsqueeze(-1)
    return torch.where((u != 0).any(-1), 1, room).amin(-1).clamp_min(0)


@opaque
def _value(on_failure: OnFailure, *given: Any) -> ConvexReLUSolution:
    call = _Call(*given)
    u = solution_map(call.problem, call.args, on_failure=on_failure)
    return _present(call, u, on_failure == "nan")


@opaque
def _solution(*given: Any) -> Solution[ConvexReLUSolution]:
    call = _Call(*given)
    found = solution_map_ex(call.problem, call.args)
    return replace(found, value=_present(call, found.value, True))  # type: ignore[arg-type, return-value]
