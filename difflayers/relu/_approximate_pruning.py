r"""Fewer neurons than an optimal network needs: pruning that changes the fit, as little as rescaling allows.

Without neuron j the others can be rescaled by :math:`1 + c_i`, where the least squares coefficients c write
:math:`z_j \approx \sum_i c_i z_i` with :math:`z_i = \sigma_i Z_i p_i`. However many neurons go, the fit is then the
projection of the first one onto the span of those that are left. A. Mishkin, M. Pilanci, Optimal Sets and Solution
Paths of ReLU Networks, 2023, algorithm 2.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ._gated_solver import prune
from ._losses import Loss
from ._one_network import OneNetwork
from ._relu_solution import ConvexReLUSolution

Score = Literal["norm", "fit", "gradient", "residual"]


def prune_network(
    solution: ConvexReLUSolution,
    X: Tensor,
    y: Tensor,
    beta: float | Tensor,
    *,
    neurons: int,
    score: Score = "residual",
    correct: bool = True,
    sample_weight: Tensor | None = None,
    loss: Loss | None = None,
) -> ConvexReLUSolution:
    """A network with at most so many active neurons, near the given one.

    Prunes optimally as long as that is possible, as :func:`minimal_network`. Below, it drops the neuron with the least
    score, one after the other, and rescales the others to make up for it.

    Args:
        solution: Of :func:`convex_gated_relu` or :func:`convex_relu`, or from elsewhere by :func:`from_network`;
            without batch dimensions.
        X: ``(n, d)`` data that it was trained on.
        y: ``(n)`` labels.
        beta: Weight decay, a number.
        neurons: Largest number of active neurons, at least 0.
        score: Of a neuron with contribution ``z_i = Z_i p_i`` to the fit: ``"residual"``, the distance of z_i from the
            span of the others; ``"fit"``, its norm; ``"norm"``, that of p_i; ``"gradient"``, ``|nu^T z_i|`` with the
            slope nu of the loss, at an optimal network the same order as by norm.
        correct: Rescale the neurons that are left. The fit is then the nearest to that of `solution`, in the norm of
            the sample weights, that these neurons reach by scaling.
        sample_weight: ``(n)`` weights, or None.
        loss: Smooth loss, or None for :class:`Squared`.

    Returns:
        The network with its objective and gap. As it came if it has no more neurons; with the same objective if it is
        optimal and need not go below minimality. A scale below 0 turns a ReLU neuron into one of negative output.

    Raises:
        ValueError: For a negative number of neurons, another score, a wrong shape or dtype.

    Not differentiable.

    Example:
        >>> import torch
        >>> from difflayers.relu import convex_gated_relu, predict, prune_network
        >>> X = torch.tensor([[-2.0, 1.0], [-1.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
        >>> y, gates = torch.tensor([2.0, 1.0, 1.0, 2.0]), torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 3.0]])
        >>> network = convex_gated_relu(X, y, 0.01, gates)
        >>> int((prune_network(network, X, y, 0.01, neurons=1).v != 0).any(-1).sum())
        1

    Source: A. Mishkin, M. Pilanci, Optimal Sets and Solution Paths of ReLU Networks, 2023, algorithms 1 and 2.
    """
    if neurons < 0:
        raise ValueError(f"neurons: expected at least 0, got {neurons}")
    if score not in get_args(Score):
        raise ValueError(f"score: expected one of {', '.join(get_args(Score))}, got {score!r}")
    network = OneNetwork.of(solution, X, y, beta, sample_weight, loss)
    p = network.p
    if int(network.active.sum()) > neurons:
        M = network.M[:, network.gates] * network.signs
        p = prune(network.X[None], M[None], network.s[None] > 0, p[None])[0]
    while int((p != 0).any(-1).sum()) > neurons:
        p = _drop(network, p, score, correct)
    return network.report(p)


def _drop(network: OneNetwork, p: Tensor, score: Score, correct: bool) -> Tensor:
    """One neuron less."""
    on = (p != 0).any(-1).nonzero().squeeze(-1)
    Z = network.columns(p[on], on) * network.s.sqrt().unsqueeze(-1)
    j = int(_scores(network, p, on, Z, score).argmin())
    rest = torch.cat([on[:j], on[j + 1 :]])
    new = torch.zeros_like(p)
    if not correct or not len(rest):
        new[rest] = p[rest]
        return new
    others = torch.cat([Z[:, :j], Z[:, j + 1 :]], 1)
    c = torch.linalg.lstsq(others, Z[:, j : j + 1], driver="gelsd").solution.squeeze(-1)
    scaled = (1 + c).unsqueeze(-1) * p[rest]
    if not network.constrained:
        new[rest] = scaled
        return new
    # a ReLU neuron cannot leave its cell: the sign moves to the output
    half = len(p) // 2
    place = torch.where(c < -1, (rest + half) % len(p), rest)
    return new.index_add(0, place, torch.where((c < -1).unsqueeze(-1), -scaled, scaled))


def _scores(network: OneNetwork, p: Tensor, on: Tensor, Z: Tensor, score: Score) -> Tensor:
    """``(a)``, with contributions in the norm of the sample weights."""
    if score == "norm":
        return torch.linalg.vector_norm(p[on], dim=-1)
    if score == "fit":
        return torch.linalg.vector_norm(Z, dim=0)
    if score == "gradient":
        return (network.pull(p)[on] * p[on]).sum(-1).abs()
    # columns are independent: rows of the pseudo-inverse are as long as one over the distances
    return 1 / torch.linalg.vector_norm(torch.linalg.pinv(Z), dim=-1)
