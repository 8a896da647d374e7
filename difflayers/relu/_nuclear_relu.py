r"""Gated ReLU networks with vector outputs, trained to the global optimum, as a layer.

.. math:: \min_U \tfrac12 \sum_k s_k \|f_k - y_k\|^2 + \beta \sum_{i=1}^P \|U_i\|_*, \qquad
    f_k = \sum_i 1[x_k^T g_i \ge 0]\, U_i^T x_k

The nuclear norm is weight decay of hidden units with vector output weights: with :math:`U_i = \sum_j w_j \alpha_j^T`
over the units j of gate i, :math:`\tfrac12 \sum_j (\|w_j\|^2 + \|\alpha_j\|^2) \ge \|U_i\|_*`, and an SVD attains it.
A. Sahiner, T. Ergen, J. Pauly, M. Pilanci, Vector-output ReLU Neural Network Problems are Copositive Programs, 2021.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from difflayers._checks import check_shape, check_tensor, renamed
from difflayers._solution import OnFailure, Solution
from difflayers.implicit import ImplicitProblem, envelope, solution_map, solution_map_ex
from difflayers.linalg._autodiff import autocast_off, lifted_under_autocast, opaque
from difflayers.proximal._identify import identify
from difflayers.proximal._spectral import singular

from ._gated_solver import FISTA
from ._gates import Gates
from ._nuclear_problem import nuclear_problem
from ._nuclear_task import as_task, products, ranks, shrunk_with_norm
from ._training_call import TrainingCall, wide_dtype, without_failed


class VectorReLUSolution(NamedTuple):
    """A trained gated ReLU network with c outputs in convex form.

    Attributes:
        neurons: ``(*batch, P, d, c)`` matrices, one a gate; exactly zero where a gate is not used. The rank of a matrix
            is the number of hidden units behind its gate.
        objective: ``(*batch)`` value of the objective.
        gap: ``(*batch)`` how far the objective may lie above the optimum over these gates: a certificate by duality.
        gates: The :class:`Gates`, their patterns those of the data the network was trained on.
    """

    neurons: Tensor
    objective: Tensor
    gap: Tensor
    gates: Gates


def convex_gated_relu_vector(
    X: Tensor,
    Y: Tensor,
    beta: float | Tensor,
    gates: Gates | Tensor,
    *,
    sample_weight: Tensor | None = None,
    solver: FISTA | None = None,
    warm_start: VectorReLUSolution | Solution[VectorReLUSolution] | None = None,
    on_failure: OnFailure = "raise",
) -> VectorReLUSolution:
    """The gated ReLU network with vector outputs that fits a training set best, under weight decay: the global optimum.

    Solves ``argmin_U 1/2 sum_k s_k ||f_k - y_k||^2 + beta * sum_i ||U_i||_*`` with
    ``f_k = sum_i 1[x_k^T g_i >= 0] U_i^T x_k`` and the nuclear norm, the sum of singular values. Hidden units serve all
    outputs together. That is not the network whose outputs have neurons of their own, :func:`convex_gated_relu` batched
    over the outputs (``multi_output`` of :class:`ConvexReLUHead`), with the larger penalty of all columns' norms.

    Args:
        X: ``(*batch, n, d)`` training data; a bias is a column of ones.
        Y: ``(*batch, n, c)`` labels, for classification one-hot.
        beta: More than 0: a number, or a tensor ``(*batch)``. From :func:`beta_max_vector` on the network is zero.
        gates: :class:`Gates`, or their vectors ``(P, d)`` or ``(*batch, P, d)``. The patterns are those of `X`.
        sample_weight: ``(*batch, n)``, at least 0; ones if None. A sample of weight 0 is as good as absent.
        solver: :class:`FISTA` with its tolerance and limits.
        warm_start: An earlier result with as many gates, to start from; no gradient flows to it.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        A :class:`VectorReLUSolution`, minimal: no unit can be dropped by scaling the others without a change of the
        fit. Where optimal networks are not unique (gates with equal patterns), it is one of them.

    Raises:
        ValueError: For a beta that is not positive, a negative weight, a wrong shape or dtype, NaN or Inf, naming the
            argument.
        SolveError: In backward, where the units depend on each other still, which takes a slope with a further
            singular value equal to beta.

    Differentiable in `X`, `Y`, `beta` and `sample_weight`, to second order (a third derivative raises
    ``RuntimeError``), forward and reverse, with the patterns held; the objective by the envelope theorem, without a
    linear solve. A unit just about to become active counts as inactive. The gap is a number without derivative. From
    :func:`beta_max_vector` on all derivatives of the network are zero. Computed in float64, but for devices without.

    Example:
        >>> import torch
        >>> from difflayers.relu import convex_gated_relu_vector, enumerate_gates
        >>> X = torch.tensor([[-2.0, 1.0], [-1.0, 1.0], [1.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
        >>> Y = torch.tensor([[2.0, 1.0], [1.0, 0.5], [1.0, 0.5], [2.0, 1.0]], dtype=torch.float64, requires_grad=True)
        >>> network = convex_gated_relu_vector(X, Y, 0.1, enumerate_gates(X))
        >>> bool(network.gap < 1e-12)
        True
        >>> torch.autograd.grad(network.objective, Y)[0].sum() > 0
        tensor(True)

    Source: A. Sahiner, T. Ergen, J. Pauly, M. Pilanci, Vector-output ReLU Neural Network Problems are Copositive
    Programs, 2021, for the nuclear norm; A. Mishkin, A. Sahiner, M. Pilanci, Fast Convex Optimization for Two-Layer
    ReLU Networks, 2022, for the gates and R-FISTA.

    Departure: FISTA only comes near; a proximal point method with Newton steps, pruning to a minimal network and
    Newton steps with the ranks held go to rounding.
    """
    return _value(on_failure, X, Y, beta, gates, sample_weight, solver, warm_start)


def convex_gated_relu_vector_ex(
    X: Tensor,
    Y: Tensor,
    beta: float | Tensor,
    gates: Gates | Tensor,
    *,
    sample_weight: Tensor | None = None,
    solver: FISTA | None = None,
    warm_start: VectorReLUSolution | Solution[VectorReLUSolution] | None = None,
) -> Solution[VectorReLUSolution]:
    """As :func:`convex_gated_relu_vector`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        X: Training data.
        Y: Labels.
        beta: Strength of weight decay.
        gates: Gates.
        sample_weight: Weights of the samples.
        solver: Solver.
        warm_start: An earlier result, or None.

    Returns:
        The network with status and steps of every element. The residual bounds the largest norm of a block's shortest
        subgradient, relative to beta.
    """
    return _solution(X, Y, beta, gates, sample_weight, solver, warm_start)


def beta_max_vector(X: Tensor, Y: Tensor, gates: Gates | Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
    """The smallest weight decay at which the gated network with vector outputs is zero.

    Computes ``max_i ||sum_k s_k 1[x_k^T g_i >= 0] x_k y_k^T||_2``, a largest singular value.

    Args:
        X: ``(*batch, n, d)`` training data.
        Y: ``(*batch, n, c)`` labels.
        gates: Gates, as for :func:`convex_gated_relu_vector`.
        sample_weight: ``(*batch, n)`` weights, or None.

    Returns:
        ``(*batch)``.

    Raises:
        ValueError: For a wrong shape or dtype.

    Differentiable in `X`, `Y` and `sample_weight`, to second order; of equal largest singular values by one of them.

    Example:
        >>> import torch
        >>> from difflayers.relu import beta_max_vector
        >>> beta_max_vector(torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0]]))
        tensor(5.)

    Source: A. Mishkin, M. Pilanci, Optimal Sets and Solution Paths of ReLU Networks, 2023, section 3, for one output.
    """
    call = _call(X, Y, 1.0, gates, sample_weight)
    task = as_task(*call.args)
    with autocast_off(task.X):
        slopes = task.pull(task.s.unsqueeze(-1) * task.Y)
        (below,) = identify(_below_largest, slopes, ndims=(3,), found_ndims=(1,))
        over = shrunk_with_norm(slopes, below, torch.ones_like(below, dtype=torch.long))[1]
        return (below + over).amax(-1).to(call.dtype)


def _below_largest(slopes: Tensor) -> tuple[Tensor]:
    """Thresholds that only the largest singular value exceeds: what remains above them has its derivatives."""
    s = singular(slopes)[1]
    return (torch.minimum((s[..., 0] + s[..., 1:2].sum(-1)) / 2, s[..., 0] * (1 - 1e-6)),)


def predict_vector(solution: VectorReLUSolution, X: Tensor) -> Tensor:
    """The predictions of a trained network with vector outputs.

    Computes ``sum_i 1[x^T g_i >= 0] U_i^T x``.

    Args:
        solution: Of :func:`convex_gated_relu_vector`.
        X: ``(*batch, m, d)`` points, with the bias column if the training data had one.

    Returns:
        ``(*batch, m, c)`` predictions.

    Raises:
        ValueError: For a wrong shape or dtype.

    Differentiable in the neurons of the solution, so in the training set, and in `X`, to any order; the gates are
    constant.

    Example:
        >>> import torch
        >>> from difflayers.relu import convex_gated_relu_vector, enumerate_gates, predict_vector
        >>> X, Y = torch.tensor([[-1.0], [1.0], [2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        >>> network = convex_gated_relu_vector(X, Y, 0.01, enumerate_gates(X))
        >>> predict_vector(network, torch.tensor([[-3.0], [3.0]])).round(decimals=2)
        tensor([[2.9700, 0.0000],
                [0.0000, 2.9900]])

    Source: A. Mishkin, A. Sahiner, M. Pilanci, Fast Convex Optimization for Two-Layer ReLU Networks, 2022, section 2.
    """
    U = solution.neurons
    X = lifted_under_autocast(check_tensor("X", X, min_ndim=2))
    if X.shape[-1] != U.shape[-2]:
        raise ValueError(f"X: expected {U.shape[-2]} columns as the network has inputs, got shape {tuple(X.shape)}")
    with autocast_off(X):
        open_gates = X.detach() @ solution.gates.vectors.mT >= 0
        return torch.where(open_gates.unsqueeze(-1), products(U, X), 0).sum(-2)


class VectorGatedReLU(nn.Module):
    """A network with vector outputs whose hidden units are linear where a fixed gate is open.

    Computes ``f(x) = sum_j output_j 1[x^T gate_j >= 0] x^T weight_j``.

    Args:
        gates: ``(m, d)`` vectors of the gates, a buffer; units may share one.
        weight: ``(m, d)`` weights of the hidden units.
        output: ``(m, c)`` output weights.

    Shape:
        Input ``(*batch, d)``, output ``(*batch, c)``.

    Differentiable in input (the gates do not move) and parameters.

    Example:
        >>> import torch
        >>> from difflayers.relu import VectorGatedReLU
        >>> network = VectorGatedReLU(torch.tensor([[1.0]]), torch.tensor([[-1.0]]), torch.tensor([[2.0, 1.0]]))
        >>> network(torch.tensor([[-2.0], [3.0]])).tolist()
        [[0.0, 0.0], [-6.0, -3.0]]

    Source: A. Sahiner, T. Ergen, J. Pauly, M. Pilanci, Vector-output ReLU Neural Network Problems are Copositive
    Programs, 2021.
    """

    gates: Tensor

    def __init__(self, gates: Tensor, weight: Tensor, output: Tensor) -> None:
        super().__init__()
        if check_tensor("weight", weight).ndim != 2:
            raise ValueError(f"weight: expected shape (m, d), got {tuple(weight.shape)}")
        if check_tensor("output", output).ndim != 2 or len(output) != len(weight):
            raise ValueError(f"output: expected shape ({len(weight)}, c), got {tuple(output.shape)}")
        check_shape("gates", tuple(check_tensor("gates", gates).shape), tuple(weight.shape), " as of weight")
        self.register_buffer("gates", gates.detach().clone())
        self.weight = nn.Parameter(weight.detach().clone())
        self.output = nn.Parameter(output.detach().clone())

    def extra_repr(self) -> str:
        """Sizes."""
        return f"inputs={self.weight.shape[1]}, units={self.weight.shape[0]}, outputs={self.output.shape[1]}"

    def forward(self, x: Tensor) -> Tensor:
        """The predictions."""
        if check_tensor("x", x, min_ndim=1).shape[-1] != self.weight.shape[-1]:
            raise ValueError(f"x: expected {self.weight.shape[-1]} entries in the last dimension, got {tuple(x.shape)}")
        return torch.where(x @ self.gates.mT >= 0, x @ self.weight.mT, 0) @ self.output


def to_network_vector(solution: VectorReLUSolution) -> VectorGatedReLU:
    """The ordinary network of a convex solution with vector outputs, with the same predictions everywhere.

    Args:
        solution: Of one element, as by :func:`convex_gated_relu_vector`.

    Returns:
        A :class:`VectorGatedReLU` with one hidden unit a singular value, balanced: weight ``sqrt(sigma) a`` and output
        weights ``sqrt(sigma) b`` of a singular triple, so that weight decay is the penalty of the convex program.

    Raises:
        ValueError: For a solution with batch dimensions.

    Not differentiable: the parameters are new leaves. :func:`predict_vector` is differentiable in the training set.

    Example:
        >>> import torch
        >>> from difflayers.relu import convex_gated_relu_vector, enumerate_gates, to_network_vector
        >>> X, Y = torch.tensor([[-1.0], [1.0], [2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        >>> to_network_vector(convex_gated_relu_vector(X, Y, 0.01, enumerate_gates(X)))
        VectorGatedReLU(inputs=1, units=2, outputs=2)

    Source: A. Sahiner, T. Ergen, J. Pauly, M. Pilanci, Vector-output ReLU Neural Network Problems are Copositive
    Programs, 2021.
    """
    U = solution.neurons.detach()
    if U.ndim != 3:
        raise ValueError(f"solution: expected one network, got neurons of shape {tuple(U.shape)}; pick an element")
    left, s, right = torch.linalg.svd(U, full_matrices=False)
    on = torch.arange(s.shape[-1], device=s.device) < ranks(U).unsqueeze(-1)
    root = s[on].sqrt().unsqueeze(-1)
    gates = solution.gates.vectors[on.nonzero()[:, 0]]
    return VectorGatedReLU(gates, left.mT[on] * root, right[on] * root)


@opaque
def _call(X: Any, Y: Any, beta: Any, gates: Any, sample_weight: Any, warm_start: Any = None) -> TrainingCall:
    """Checked arguments ``(X, Y, s, beta, M)`` in double precision, and a starting point where there is one."""
    X, Y = check_tensor("X", X, min_ndim=2), check_tensor("Y", Y, min_ndim=2)
    check_shape("Y", tuple(Y.shape[-2:-1]), tuple(X.shape[-2:-1]), " in its last dimension but one as X has rows")
    if not Y.shape[-1]:
        raise ValueError(f"Y: expected at least one output, got shape {tuple(Y.shape)}")
    with renamed(y="Y"):
        call = TrainingCall(X, Y[..., 0], beta, gates, sample_weight, None)
    given, Y = list(call.args), lifted_under_autocast(Y)
    if warm_start is not None:
        earlier = warm_start.value if isinstance(warm_start, Solution) else warm_start
        init = lifted_under_autocast(check_tensor("warm_start", earlier.neurons, min_ndim=3).detach())
        shape = (call.vectors.shape[-2], X.shape[-1], Y.shape[-1])
        check_shape("warm_start", tuple(init.shape[-3:]), shape, " of its last three dimensions")
        given.append(init)
    given[1] = Y
    with autocast_off(X):
        call.args = tuple(t.to(wide_dtype(t)) for t in given)
    return call


def _problem(
    X: Any, Y: Any, beta: Any, gates: Any, sample_weight: Any, solver: Any, warm_start: Any
) -> tuple[TrainingCall, ImplicitProblem]:
    solver = solver or FISTA()
    if not isinstance(solver, FISTA):
        raise ValueError(f"solver: expected FISTA() or None, got {solver!r}")
    return _call(X, Y, beta, gates, sample_weight, warm_start), nuclear_problem(solver, warm_start is not None)


def _objective(U: Tensor, *args: Tensor) -> Tensor:
    task = as_task(*args)
    (rank,) = identify(lambda U: (ranks(U),), U, ndims=(3,), found_ndims=(1,))
    norms = shrunk_with_norm(U, U.new_zeros(()), rank)[1]
    return task.data_term(task.fit(U)) + task.beta * norms.sum(-1)


def _present(call: TrainingCall, U: Tensor, tolerant: bool) -> VectorReLUSolution:
    """Objective, gap and gates to the neurons."""
    args = call.args[:5]
    with autocast_off(U):
        bad, point = None, U
        if tolerant:
            bad = torch.isnan(U.detach()).flatten(-3).any(-1)
            point = torch.where(bad[..., None, None, None], 0, U)
            args = (*without_failed(bad, *args[:4], y_ndim=2), args[4])
        objective = envelope(_objective, point, args)
        with torch.no_grad():
            gap = objective.detach() - as_task(*(t.detach() for t in args)).lower_bound(point.detach())
        if bad is not None:  # NaN, and so are gradients of whoever asks for them
            objective = torch.where(bad, U.sum((-3, -2, -1)), objective)
            gap = torch.where(bad, math.nan, gap)
    gates = Gates(call.vectors.to(call.dtype), call.args[4])
    objective, gap = objective.to(call.dtype), gap.clamp_min(0).to(call.dtype)
    return VectorReLUSolution(U.to(call.dtype), objective, gap, gates)


@opaque
def _value(on_failure: OnFailure, *given: Any) -> VectorReLUSolution:
    call, problem = _problem(*given)
    U = solution_map(problem, call.args, on_failure=on_failure)
    return _present(call, U, on_failure == "nan")


@opaque
def _solution(*given: Any) -> Solution[VectorReLUSolution]:
    call, problem = _problem(*given)
    found = solution_map_ex(problem, call.args)
    value = _present(call, found.value, True)
    return replace(found, value=value, residual=found.residual.to(call.dtype))  # type: ignore[arg-type, return-value]
