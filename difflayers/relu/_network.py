r"""Between convex solutions and ordinary networks.

A neuron p of the convex program with sign :math:`\sigma` is the unit with weights :math:`p / \sqrt{\|p\|}` and output
weight :math:`\sigma \sqrt{\|p\|}`. Weight decay :math:`\tfrac\beta2 (\|W\|^2 + \|\alpha\|^2)` of the network then
equals the penalty :math:`\beta \sum \|p\|`. M. Pilanci, T. Ergen, Neural Networks are Convex Regularizers, 2020,
theorem 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from difflayers._checks import check_shape, check_tensor

from ._cell_projection import cell_multipliers
from ._cone_certificate import lower_bound
from ._cone_problem import ConeProblem
from ._gated_problem import as_task
from ._gated_solver import prune
from ._gated_task import GatedTask
from ._gates import Gates
from ._losses import Loss
from ._relu_solution import ConvexReLUSolution
from ._training_call import checked_call


class TwoLayerReLU(nn.Module):
    """A network with one hidden layer, ``f(x) = sum_j output_j (x^T weight_j)_+``.

    Args:
        weight: ``(m, d)`` weights of the hidden units; a bias is a last column, for inputs with a column of ones.
        output: ``(m)`` output weights.

    Shape:
        Input ``(*batch, d)``, output ``(*batch)``.

    Differentiable in input and parameters; a unit exactly at its kink counts as closed.

    Example:
        >>> import torch
        >>> from difflayers.relu import TwoLayerReLU
        >>> network = TwoLayerReLU(torch.tensor([[1.0], [-1.0]]), torch.tensor([1.0, 1.0]))
        >>> network(torch.tensor([[-2.0], [3.0]])).tolist()
        [2.0, 3.0]

    Source: M. Pilanci, T. Ergen, Neural Networks are Convex Regularizers, 2020, equation 1.
    """

    def __init__(self, weight: Tensor, output: Tensor) -> None:
        super().__init__()
        _check_weights(weight, output)
        self.weight = nn.Parameter(weight.detach().clone())
        self.output = nn.Parameter(output.detach().clone())

    def extra_repr(self) -> str:
        """Sizes."""
        return f"inputs={self.weight.shape[1]}, units={self.weight.shape[0]}"

    def forward(self, x: Tensor) -> Tensor:
        """The predictions."""
        _check_input(x, self.weight)
        return (x @ self.weight.mT).relu() @ self.output


class GatedReLU(nn.Module):
    """A network whose hidden units are linear where a fixed gate is open.

    Computes ``f(x) = sum_j output_j 1[x^T gate_j >= 0] x^T weight_j``.

    Args:
        gates: ``(m, d)`` vectors of the gates, a buffer.
        weight: ``(m, d)`` weights of the hidden units.
        output: ``(m)`` output weights.

    Shape:
        Input ``(*batch, d)``, output ``(*batch)``.

    Differentiable in input (the gates do not move) and parameters.

    Example:
        >>> import torch
        >>> from difflayers.relu import GatedReLU
        >>> network = GatedReLU(torch.tensor([[1.0]]), torch.tensor([[-1.0]]), torch.tensor([2.0]))
        >>> network(torch.tensor([[-2.0], [3.0]])).tolist()
        [0.0, -6.0]

    Source: A. Mishkin, A. Sahiner, M. Pilanci, Fast Convex Optimization for Two-Layer ReLU Networks, 2022, section 2.
    """

    gates: Tensor

    def __init__(self, gates: Tensor, weight: Tensor, output: Tensor) -> None:
        super().__init__()
        _check_weights(weight, output)
        check_shape("gates", tuple(check_tensor("gates", gates).shape), tuple(weight.shape), " as of weight")
        self.register_buffer("gates", gates.detach().clone())
        self.weight = nn.Parameter(weight.detach().clone())
        self.output = nn.Parameter(output.detach().clone())

    def extra_repr(self) -> str:
        """Sizes."""
        return f"inputs={self.weight.shape[1]}, units={self.weight.shape[0]}"

    def forward(self, x: Tensor) -> Tensor:
        """The predictions."""
        _check_input(x, self.weight)
        return torch.where(x @ self.gates.mT >= 0, x @ self.weight.mT, 0) @ self.output


def to_network(solution: ConvexReLUSolution) -> TwoLayerReLU | GatedReLU:
    """The ordinary network of a convex solution, with the same predictions everywhere.

    Args:
        solution: Of one element, as by :func:`convex_gated_relu`.

    Returns:
        A :class:`GatedReLU` of the active neurons (a :class:`TwoLayerReLU` where the solution has negative neurons
        `w`), balanced: its weight decay is the penalty of the convex program.

    Raises:
        ValueError: For a solution with batch dimensions.

    Not differentiable: the parameters are new leaves. :func:`predict` is differentiable in the training set.

    Example:
        >>> import torch
        >>> from difflayers.relu import convex_gated_relu, enumerate_gates, to_network
        >>> X, y = torch.tensor([[-1.0], [1.0], [2.0]]), torch.tensor([1.0, 1.0, 2.0])
        >>> to_network(convex_gated_relu(X, y, 0.01, enumerate_gates(X)))
        GatedReLU(inputs=1, units=2)

    Source: M. Pilanci, T. Ergen, Neural Networks are Convex Regularizers, 2020, theorem 1.
    """
    v, w = solution.v.detach(), solution.w
    if v.ndim != 2:
        raise ValueError(f"solution: expected one network, got neurons of shape {tuple(v.shape)}; pick an element")
    if w is None:
        on, weight, output = _units(v)
        return GatedReLU(solution.gates.vectors[on], weight, output)
    parts = [_units(v), _units(w.detach())]
    return TwoLayerReLU(torch.cat([part[1] for part in parts]), torch.cat([parts[0][2], -parts[1][2]]))


def from_network(
    network: TwoLayerReLU | GatedReLU,
    X: Tensor,
    y: Tensor,
    beta: float | Tensor,
    *,
    sample_weight: Tensor | None = None,
    loss: Loss | None = None,
) -> ConvexReLUSolution:
    """The point of the convex program that an ordinary network stands for, with objective and duality gap.

    Args:
        network: A :class:`TwoLayerReLU` or :class:`GatedReLU`, however it was trained.
        X: ``(n, d)`` training data.
        y: ``(n)`` labels.
        beta: Weight decay.
        sample_weight: Weights of the samples, or None.
        loss: Loss, or None for :class:`Squared`.

    Returns:
        A :class:`ConvexReLUSolution` with one gate a unit (of a ReLU unit: its own direction). The objective is at most
        that of the network, and equals it where the units are balanced. The gap bounds the distance to the optimum over
        these patterns; with the hinge loss it is loose where samples lie on the kink, as they do at the optimum, since
        the network does not tell their multipliers.

    Raises:
        ValueError: As :func:`convex_gated_relu`.

    Not differentiable.

    Example:
        >>> import torch
        >>> from difflayers.relu import TwoLayerReLU, from_network
        >>> network = TwoLayerReLU(torch.tensor([[1.0], [-1.0]]), torch.tensor([1.0, 1.0]))
        >>> X, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([1.0, 1.0])
        >>> float(from_network(network, X, y, 0.5).objective)
        1.0

    Source: M. Pilanci, T. Ergen, Neural Networks are Convex Regularizers, 2020, theorem 1.
    """
    if not isinstance(network, TwoLayerReLU | GatedReLU):
        raise ValueError(f"network: expected a TwoLayerReLU or a GatedReLU, got {type(network).__name__}")
    weight, output = network.weight.detach(), network.output.detach().unsqueeze(-1)
    gated = isinstance(network, GatedReLU)
    vectors = network.gates if isinstance(network, GatedReLU) else nn.functional.normalize(weight, dim=-1)
    call = checked_call(X, y, beta, vectors, sample_weight, loss)
    task = as_task(call.loss, *(t.detach() for t in call.args[:5]))
    signed = (weight * output).to(task.X.dtype)
    v, w = signed, None
    if not gated:
        positive = output.to(signed.dtype) > 0
        v, w = torch.where(positive, signed, 0), torch.where(positive, 0, -signed)
        # in its own cell a unit is linear, so the gated formulas hold with the sign
    objective = task.objective(signed)
    bound = task.lower_bound(signed) if w is None else _lower_bound(task, torch.cat([v, w], -2))
    gap = (objective - bound).clamp_min(0)
    return ConvexReLUSolution(v, w, objective, gap, Gates(vectors.detach(), call.args[4]))


def _lower_bound(task: GatedTask, p: Tensor) -> Tensor:
    """What no network with neurons in these cells is below."""
    problem = ConeProblem(task.X, task.y, task.s, task.beta, task.M, task.loss)
    slope = task.s * task.loss.slope(problem.fit(p), task.y)
    return lower_bound(problem, p, cell_multipliers(problem.X, problem.side, -problem.fit_adjoint(slope)))


def minimal_network(solution: ConvexReLUSolution, X: Tensor) -> ConvexReLUSolution:
    """A smaller network as good as the given one: optimal pruning.

    While the activations ``Z_i p_i`` of active neurons on the data depend on each other, their null vector c gives
    factors ``1 - c_i / c_j >= 0`` that scale one neuron to zero without a change of the fit; nor of the penalty, if the
    solution is optimal. Neurons that are multiples of each other are merged by the same rule.

    Args:
        solution: Optimal, of :func:`convex_gated_relu`, or a network from elsewhere by :func:`from_network`.
        X: ``(*batch, n, d)`` data that it was trained on.

    Returns:
        The solution with at most n active neurons, whose activations are independent, so that none can be dropped by
        scaling the others. Fit as before, up to rounding; objective too where `solution` is optimal, else at most that.

    Raises:
        ValueError: For a wrong shape or dtype.

    Not differentiable: a network that is not minimal has no derivative. :func:`convex_gated_relu` returns minimal ones.

    Example:
        >>> import torch
        >>> from difflayers.relu import TwoLayerReLU, from_network, minimal_network
        >>> network = TwoLayerReLU(torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 1.0]))
        >>> X, y = torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 6.0])
        >>> minimal_network(from_network(network, X, y, 0.1), X).v.squeeze(-1).round(decimals=4).sort().values
        tensor([0., 3.])

    Source: A. Mishkin, M. Pilanci, Optimal Sets and Solution Paths of ReLU Networks, 2023, algorithm 1.
    """
    v, w, patterns = solution.v.detach(), solution.w, solution.gates.patterns
    X = check_tensor("X", X, min_ndim=2).detach()
    check_shape("X", tuple(X.shape[-2:]), (patterns.shape[-2], v.shape[-1]), " in its last two dimensions")
    p, M = v, patterns.to(v.dtype)
    if w is not None:
        p, M = torch.cat([v, w.detach()], -2), torch.cat([M, -M], -1)
    batch = torch.broadcast_shapes(p.shape[:-2], X.shape[:-2], M.shape[:-2])
    flat = [t.expand(*batch, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (X, M, p)]
    every = torch.ones_like(flat[0][..., 0], dtype=torch.bool)
    p = prune(flat[0], flat[1], every, flat[2]).reshape(*batch, *p.shape[-2:])
    if w is None:
        return solution._replace(v=p)
    v, w = p.split(v.shape[-2], -2)
    return solution._replace(v=v, w=w)


def _units(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Active neurons: their places, weights, output weights."""
    size = torch.linalg.vector_norm(p, dim=-1)
    on = size > 0
    root = size[on].sqrt()
    return on, p[on] / root.unsqueeze(-1), root


def _check_weights(weight: Tensor, output: Tensor) -> None:
    if check_tensor("weight", weight).ndim != 2:
        raise ValueError(f"weight: expected shape (m, d), got {tuple(weight.shape)}")
    check_shape("output", tuple(check_tensor("output", output).shape), (len(weight),), ", one entry a row of weight")


def _check_input(x: Tensor, weight: Tensor) -> None:
    if check_tensor("x", x, min_ndim=1).shape[-1] != weight.shape[-1]:
        raise ValueError(f"x: expected {weight.shape[-1]} entries in the last dimension, got shape {tuple(x.shape)}")
