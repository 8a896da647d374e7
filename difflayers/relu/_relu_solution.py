"""What training a convex ReLU network returns, and its predictions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_same, check_tensor
from difflayers.linalg._autodiff import autocast_off, lifted_under_autocast

from ._gates import Gates


class ConvexReLUSolution(NamedTuple):
    """A trained two-layer network in convex form.

    Attributes:
        v: ``(*batch, P, d)`` neurons, one a gate; exactly zero where a neuron is not active.
        w: Neurons with negative output weight, of the same shape; None for a gated network, which needs none.
        objective: ``(*batch)`` value of the objective.
        gap: ``(*batch)`` how far the objective may lie above the optimum over these gates: a certificate by duality.
        gates: The :class:`Gates`, their patterns those of the data the network was trained on.
        margin: ``(*batch)`` how far at least the inactive neurons are from becoming active: the least
            ``1 - ||q_i|| / beta``, with q_i the slope of the loss in neuron i; of ReLU neurons also how far kinks are
            from leaving their points, as a share of the range of their multipliers. Near zero the derivative is about
            to jump, or the network is not unique. None where it is not known.
    """

    v: Tensor
    w: Tensor | None
    objective: Tensor
    gap: Tensor
    gates: Gates
    margin: Tensor | None = None


def predict(solution: ConvexReLUSolution, X: Tensor) -> Tensor:
    """The predictions of a trained network.

    Computes ``sum_i 1[x^T g_i >= 0] x^T v_i`` for a gated network, ``sum_i (x^T v_i)_+ - (x^T w_i)_+`` for a ReLU one.

    Args:
        solution: Of :func:`convex_gated_relu`, :func:`convex_relu` or another function that makes one.
        X: ``(*batch, m, d)`` points, with the bias column if the training data had one.

    Returns:
        ``(*batch, m)`` predictions.

    Raises:
        ValueError: For a wrong shape or dtype.

    Differentiable in the neurons of the solution, so in the training set, and in `X`, to any order; the gates are
    constant.

    Example:
        >>> import torch
        >>> from difflayers.relu import convex_gated_relu, enumerate_gates, predict
        >>> X, y = torch.tensor([[-1.0], [1.0], [2.0]]), torch.tensor([1.0, 1.0, 2.0])
        >>> network = convex_gated_relu(X, y, 0.01, enumerate_gates(X))
        >>> predict(network, torch.tensor([[-3.0], [3.0]])).round(decimals=2)
        tensor([2.9700, 2.9900])

    Source: A. Mishkin, A. Sahiner, M. Pilanci, Fast Convex Optimization for Two-Layer ReLU Networks, 2022, section 2.
    """
    v, w = solution.v, solution.w
    X = lifted_under_autocast(check_tensor("X", X, min_ndim=2))
    if X.shape[-1] != v.shape[-1]:
        raise ValueError(f"X: expected {v.shape[-1]} columns as the network has inputs, got shape {tuple(X.shape)}")
    check_same([("X", X), ("solution", v)])
    broadcast_batch([("X", tuple(X.shape[:-2])), ("solution", tuple(v.shape[:-2]))])
    with autocast_off(X):
        # the NaN of a failed element must not reach the gradient of points that others share
        failed = torch.isnan(v.detach()).any(-1).any(-1)[..., None, None]
        u = torch.where(failed, 0, v)
        if w is None:
            open_gates = X.detach() @ solution.gates.vectors.mT >= 0
            found = torch.where(open_gates, X @ u.mT, 0).sum(-1)
        else:
            found = (X @ u.mT).relu().sum(-1) - (X @ torch.where(failed, 0, w).mT).relu().sum(-1)
        return torch.where(failed.squeeze(-1), v.sum((-2, -1)).unsqueeze(-1), found)
