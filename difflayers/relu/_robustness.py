r"""Balls in which an adversary may move the inputs, and margins that hold in all of them.

A neuron p is linear on the ball around x where :math:`|x^T p| \ge \epsilon \|p\|_*` (the dual norm of the ball), and
there the worst change of a sum of neurons is :math:`\epsilon \|\sum p\|_*`. Y. Bai, T. Gautam, S. Sojoudi, Efficient
Global Optimization of Two-Layer ReLU Networks, 2023, section 5.
"""

from __future__ import annotations

import operator
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_same, check_shape, check_tensor
from difflayers.linalg._autodiff import autocast_off, lifted_under_autocast, outside_transforms, physical
from difflayers.proximal._operands import check_range, per_element

from ._gates import Gates
from ._relu_solution import ConvexReLUSolution
from ._robust_rows import NARROW, widths


@dataclass(frozen=True, eq=False)
class Robustness(ABC):
    """How far an adversary may move each input: ``||delta|| <= epsilon``, in perturbed columns.

    Args:
        epsilon: Radius of the ball, at least 0: a number, or a tensor with one entry an element of the batch.
        fixed_columns: Columns of X that are not perturbed, for example ``(-1,)`` for a column of ones at the end.
    """

    epsilon: float | Tensor
    fixed_columns: Sequence[int] = ()
    dual: ClassVar[Literal["l1", "l2"]]

    def perturbed(self, d: int) -> tuple[int, ...]:
        """The perturbed ones of d columns."""
        try:
            fixed = [operator.index(column) for column in self.fixed_columns]
        except TypeError:
            raise ValueError(f"fixed_columns: expected a tuple of integers, got {self.fixed_columns!r}") from None
        for column in fixed:
            if not -d <= column < d:
                raise ValueError(f"fixed_columns: expected columns from {-d} to {d - 1} as of X, got {column}")
        return tuple(j for j in range(d) if j not in fixed and j - d not in fixed)

    def radius(self, like: Tensor) -> Tensor:
        """Epsilon as a tensor; checked."""
        epsilon = self.epsilon
        if not isinstance(epsilon, Tensor):
            check_range(per_element("epsilon", epsilon, at_least=0.0))
            return torch.full((), float(epsilon), dtype=like.dtype, device=like.device)
        check_tensor("epsilon", epsilon)
        # NaN is left to the solve, which fails that element alone
        check_range(per_element("epsilon", torch.where(torch.isnan(epsilon), 0, epsilon), at_least=0.0))
        return epsilon

    def dual_norm(self, t: Tensor) -> Tensor:
        """The largest change ``t^T delta`` in a ball of radius 1, over perturbed columns."""
        t = t[..., list(self.perturbed(t.shape[-1]))]
        return torch.linalg.vector_norm(t, ord=1 if self.dual == "l1" else 2, dim=-1)


@dataclass(frozen=True, eq=False)
class LInf(Robustness):
    """Every perturbed entry of an input may move by `epsilon`."""

    dual = "l1"


@dataclass(frozen=True, eq=False)
class L2(Robustness):
    """The perturbed part of an input may move by a vector of length `epsilon`."""

    dual = "l2"


def check_robustness(robustness: Any) -> Robustness:
    """Refuses anything else."""
    if not isinstance(robustness, Robustness):
        raise ValueError(f"robustness: expected LInf(epsilon) or L2(epsilon), got {robustness!r}")
    return robustness


def certified_margin(solution: ConvexReLUSolution, X: Tensor, y: Tensor, robustness: Robustness) -> Tensor:
    r"""A margin that no perturbation can push a point below.

    A lower bound on ``min_delta y f(x + delta)``, exact where no neuron changes sides in the ball: at the points that
    :func:`robust_convex_relu` was trained on, for a ball no larger than that of the training. Elsewhere it is the
    larger one of two bounds: that of the network linearised at the point, less what neurons that can change sides may
    add, and that of every neuron at its own worst.

    Args:
        solution: Of a ReLU network, constrained to its cells, by :func:`robust_convex_relu` or :func:`convex_relu`.
        X: ``(*batch, m, d)`` points, with the bias column if the training data had one.
        y: ``(*batch, m)`` labels, usually -1 and 1.
        robustness: :class:`LInf` or :class:`L2`.

    Returns:
        ``(*batch, m)`` margins. A positive one certifies that no perturbation in the ball changes the class.

    Raises:
        ValueError: For a gated solution, whose predictions jump; for a wrong shape or dtype.

    Differentiable in `X`, `y`, epsilon and the neurons (which have a derivative if their training has one).

    Example:
        >>> import torch
        >>> from difflayers.relu import Hinge, LInf, certified_margin, robust_convex_relu
        >>> X, y = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([-1.0, -1.0, 1.0, 1.0])
        >>> network = robust_convex_relu(X, y, 0.01, torch.tensor([[1.0], [-1.0]]), LInf(0.5), loss=Hinge())
        >>> certified_margin(network, X, y, LInf(0.5)).round(decimals=1)
        tensor([3., 1., 1., 3.])

    Source: Y. Bai, T. Gautam, S. Sojoudi, Efficient Global Optimization of Two-Layer ReLU Networks, 2023, section 5,
    for training points; the bounds elsewhere are ours.
    """
    check_robustness(robustness)
    if solution.w is None:
        raise ValueError("solution: expected a ReLU network, got a gated one, whose predictions jump at its gates")
    X, y = check_tensor("X", X, min_ndim=2), check_tensor("y", y, min_ndim=1)
    neurons = check_tensor("v", solution.v, min_ndim=2), check_tensor("w", solution.w, min_ndim=2)
    d = solution.v.shape[-1]
    if X.shape[-1] != d:
        raise ValueError(f"X: expected {d} columns as the network has inputs, got shape {tuple(X.shape)}")
    check_shape("y", tuple(y.shape[-1:]), tuple(X.shape[-2:-1]), " in its last dimension as X has rows")
    given = {"X": X, "y": y, "epsilon": robustness.radius(X), "v": neurons[0], "w": neurons[1]}
    given = {name: lifted_under_autocast(t) for name, t in given.items()}
    check_same(given.items())
    ndims = {"X": 2, "y": 1, "epsilon": 0, "v": 2, "w": 2}
    broadcast_batch((name, tuple(t.shape[: t.ndim - ndims[name]])) for name, t in given.items())
    X, y, epsilon, v, w = given.values()
    with autocast_off(X):
        p = torch.cat(torch.broadcast_tensors(v, w), -2)
        sign = torch.cat([v.new_ones(v.shape[-2]), -v.new_ones(v.shape[-2])])
        heights = X @ p.mT
        reach = (epsilon.unsqueeze(-1) * robustness.dual_norm(p)).unsqueeze(-2)
        helps = sign * y.unsqueeze(-1) > 0
        margin = y * (heights.relu() * sign).sum(-1)
        open_sum = (heights > 0).to(p.dtype) * sign @ p
        linear = epsilon.unsqueeze(-1) * robustness.dual_norm(open_sum)
        linear = linear + torch.where(helps, 0, (reach - heights.abs()).relu()).sum(-1)
        fall = heights.relu() - (heights - reach).relu()
        each = torch.where(helps, fall, (heights + reach).relu() - heights.relu()).sum(-1)
        return margin - y.abs() * torch.minimum(linear, each)


def narrow_gates(X: Tensor, gates: Gates | Tensor, robustness: Robustness) -> Tensor:
    """The gates whose cells are too narrow for a ball: no neuron but zero keeps its side on all balls.

    These are the patterns i without a u such that ``e_ki x_k^T u > epsilon ||u||_*`` for all k. A gate that no vector
    realises strictly is one of them for every epsilon above 0.

    Args:
        X: ``(*batch, n, d)`` training data.
        gates: Gates, as for :func:`robust_convex_relu`.
        robustness: :class:`LInf` or :class:`L2`.

    Returns:
        ``(*batch, P)`` booleans; False for an epsilon of 0, and NaN or Inf count as too wide a ball.

    Raises:
        ValueError: For a wrong shape or dtype.

    Not differentiable. Runs on the CPU in float64.

    Example:
        >>> import torch
        >>> from difflayers.relu import LInf, narrow_gates
        >>> X = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> narrow_gates(X, torch.tensor([[1.0, 1.0], [1.0, -1.0]]), LInf(0.6))
        tensor([True, True])
        >>> narrow_gates(X, torch.tensor([[1.0, 1.0], [1.0, -1.0]]), LInf(0.4))
        tensor([False, False])

    Source: Y. Bai, T. Gautam, S. Sojoudi, Efficient Global Optimization of Two-Layer ReLU Networks, 2023, section 5.
    """
    X = check_tensor("X", X, min_ndim=2)
    G = check_tensor("gates", gates.vectors if isinstance(gates, Gates) else gates, min_ndim=2)
    check_shape("gates", tuple(G.shape[-1:]), tuple(X.shape[-1:]), " in its last dimension as of X")
    epsilon = check_robustness(robustness).radius(X)
    given = {"X": X, "gates": G, "epsilon": epsilon}
    check_same(given.items())
    batch = torch.Size(
        broadcast_batch(
            (name, tuple(t.shape[: t.ndim - k])) for (name, t), k in zip(given.items(), (2, 2, 0), strict=True)
        )
    )
    columns = robustness.perturbed(X.shape[-1])
    X, G, epsilon = (physical(t) for t in given.values())
    with outside_transforms():  # inside, no tensor has an array
        M, B = X @ G.mT >= 0, batch.numel()
        X, M = (t.expand(*batch, *t.shape[-2:]).reshape(B, *t.shape[-2:]) for t in (X, M))
        radii = epsilon.expand(batch).reshape(B)
        found = [_is_narrow(*one, columns, robustness.dual) for one in zip(X, M, radii, strict=True)]
    return torch.stack(found or [M.new_zeros(0)]).reshape(*batch, G.shape[-2])


def _is_narrow(X: Tensor, M: Tensor, epsilon: Tensor, columns: tuple[int, ...], norm: Any) -> Tensor:
    if not bool(torch.isfinite(X).all() & torch.isfinite(epsilon)):
        return torch.ones_like(M[0])
    if float(epsilon) == 0 or not columns:
        return torch.zeros_like(M[0])
    data, size = X.cpu().double().numpy(), float(X.abs().max()) or 1.0
    width, _ = widths(data / size, M.cpu().numpy(), float(epsilon) / size, np.array(columns), norm)
    return torch.as_tensor(width <= NARROW, device=X.device)
