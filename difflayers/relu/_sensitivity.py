r"""How a trained network moves with weight decay and labels: one linear system for all of it.

On the active neurons and their kinks the optimality conditions are smooth equations; with their matrix H
(``_gated_problem.py``, ``_relu_problem.py``)

.. math:: \frac{\partial p}{\partial \beta} = -H^{-1} h, \qquad
    \frac{\partial p}{\partial y} = -H^{-1} G^T S\, \partial_y l', \qquad
    \frac{\partial f}{\partial y} = G\, \frac{\partial p}{\partial y}, \quad G = [\sigma_i Z_i] .

A. Mishkin, M. Pilanci, Optimal Sets and Solution Paths of ReLU Networks, 2023, section 4.3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp

from difflayers.linalg._autodiff import forward_mode_lock

from ._block_hessian import Blocks
from ._losses import Loss
from ._one_network import OneNetwork, nearest_in_cell
from ._relu_solution import ConvexReLUSolution

_CHUNK = 64  # labels at a time


class Sensitivity(NamedTuple):
    """First derivatives of a trained network, those of zero neurons being zero.

    Attributes:
        v_by_beta: ``(P, d)`` neurons by weight decay.
        w_by_beta: The same for neurons of negative output; None for a gated network.
        v_by_label: ``(P, d, n)`` neurons by labels.
        w_by_label: The same for neurons of negative output, or None.
        fit_by_beta: ``(n)`` predictions on the training data by weight decay.
        fit_by_label: ``(n, n)`` the same predictions by labels: row k is that of prediction k.
        hat_matrix: ``(n, n)`` ``G H^-1 G^T diag(s l'')``, with eigenvalues in [0, 1]. With the squared loss it is
            `fit_by_label`; with others, that of the weighted least squares problem which Newton's method solves last.
        leverage: ``(n)`` its diagonal: how much each sample pulls its own prediction.
        degrees_of_freedom: Its trace: as many parameters of a linear model would fit as freely.
    """

    v_by_beta: Tensor
    w_by_beta: Tensor | None
    v_by_label: Tensor
    w_by_label: Tensor | None
    fit_by_beta: Tensor
    fit_by_label: Tensor
    hat_matrix: Tensor
    leverage: Tensor
    degrees_of_freedom: Tensor


def sensitivity(
    solution: ConvexReLUSolution,
    X: Tensor,
    y: Tensor,
    beta: float | Tensor,
    *,
    sample_weight: Tensor | None = None,
    loss: Loss | None = None,
) -> Sensitivity:
    """How a trained network and its fit move with weight decay and with every label.

    Solves one linear system on the active neurons, with their kinks held on the points of the data that they lie on.

    Args:
        solution: Optimal and minimal, as of :func:`convex_gated_relu` or :func:`convex_relu`; without batch dimensions.
        X: ``(n, d)`` data that it was trained on.
        y: ``(n)`` labels.
        beta: Weight decay, a number.
        sample_weight: ``(n)`` weights, or None.
        loss: Smooth loss, or None for :class:`Squared`.

    Returns:
        A :class:`Sensitivity`.

    Raises:
        ValueError: For a network that is not minimal, which has no derivative; a loss with kinks; a wrong shape or
            dtype.

    Not differentiable itself; derivatives of any order, and those in X and the weights, come from autograd through
    :func:`convex_gated_relu` and :func:`convex_relu`, of which these are the Jacobians.

    Example:
        >>> import torch
        >>> from difflayers.relu import convex_gated_relu, enumerate_gates, sensitivity
        >>> X, y = torch.tensor([[-1.0], [1.0], [2.0]]), torch.tensor([1.0, 1.0, 2.0])
        >>> moves = sensitivity(convex_gated_relu(X, y, 0.1, enumerate_gates(X)), X, y, 0.1)
        >>> moves.leverage.round(decimals=2), float(moves.degrees_of_freedom.round(decimals=2))
        (tensor([1.0000, 0.2000, 0.8000]), 2.0)

    Source: A. Mishkin, M. Pilanci, Optimal Sets and Solution Paths of ReLU Networks, 2023, section 4.3.
    """
    network = OneNetwork.of(solution, X, y, beta, sample_weight, loss)
    p, f, on = network.p, network.fit(network.p), network.active.nonzero().squeeze(-1)
    n, d = network.X.shape
    by_beta, by_slope = torch.zeros_like(p), p.new_zeros((*p.shape, n))
    G = ((network.M[:, network.gates] * network.signs)[:, on].unsqueeze(-1) * network.X.unsqueeze(1)).flatten(1)
    if len(on):
        blocks = _blocks(network, f, on)
        factors = blocks.factorise()
        if bool(factors.singular):
            raise ValueError(
                f"solution: expected a minimal network, got {len(on)} active neurons that depend on each other; "
                f"prune it by `minimal_network` first"
            )
        by_beta[on] = blocks.solve(factors, blocks.free(-blocks.h), refinements=2)
        for some in torch.arange(n, device="cpu").split(_CHUNK):
            pulls = G[some].unflatten(-1, (len(on), d))
            by_slope[on[:, None], :, some] = blocks.solve(factors, blocks.free(pulls), refinements=2).movedim(0, 1)
    fit_by_beta, fit_by_slope = G @ by_beta[on].flatten(), G @ by_slope[on].flatten(0, 1)
    with forward_mode_lock:
        _, mixed = jvp(lambda y: network.loss.slope(f, y), (network.y,), (torch.ones_like(f),))
    weight, like, half = -network.s * mixed, solution.v.detach(), len(solution.v)
    hat = (fit_by_slope * network.s * network.loss.curvature(f, network.y)).to(like)
    by_beta, by_label = by_beta.to(like), (by_slope * weight).to(like)
    leverage = hat.diagonal()
    return Sensitivity(
        v_by_beta=by_beta[:half],
        w_by_beta=by_beta[half:] if network.constrained else None,
        v_by_label=by_label[:half],
        w_by_label=by_label[half:] if network.constrained else None,
        fit_by_beta=fit_by_beta.to(like),
        fit_by_label=(fit_by_slope * weight).to(like),
        hat_matrix=hat,
        leverage=leverage,
        degrees_of_freedom=leverage.sum(),
    )


def _blocks(network: OneNetwork, f: Tensor, on: Tensor) -> Blocks:
    """The active blocks, held where multipliers keep their kinks on points of the data."""
    curvature = network.s * network.loss.curvature(f, network.y)
    M = network.M[:, network.gates] * network.signs
    held = None
    if network.constrained:
        pull, d = network.pull(network.p), network.X.shape[1]
        held = network.p.new_zeros((len(on), d, d))
        for a, i in enumerate(on.tolist()):
            _, border = nearest_in_cell(pull[i], network.X, network.M[:, network.gates[i]])
            Q, _ = torch.linalg.qr(border.mT)
            held[a] = Q @ Q.mT
    used = torch.ones_like(on, dtype=torch.bool)
    return Blocks.of(network.X, M, network.p, network.beta, curvature, on, used, held)
