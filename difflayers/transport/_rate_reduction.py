r"""Coding rates: how many nats it takes to write features down to a given distortion, at once and group by group.

.. math:: R(Z) = \tfrac12 \log\det\Big(I + \frac{d}{\epsilon^2 n} Z^T Z\Big), \qquad
    R_c(Z, \Pi) = \sum_i \frac{w_i}{2 n} \log\det\Big(I + \frac{d}{\epsilon^2 w_i} Z^T \mathrm{diag}(\Pi_i) Z\Big)

for n features of dimension d in the rows of Z, groups in the rows of :math:`\Pi` and their sizes :math:`w = \Pi 1`; for
a doubly stochastic membership all sizes are 1.

Y. Yu et al., Learning Diverse and Discriminative Representations via the Principle of Maximal Coding Rate Reduction,
2020, equations 7 and 8; T. Ding et al., Unsupervised Manifold Linearizing and Clustering, 2023, equation 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_same, check_shape, check_tensor, compute_dtype
from difflayers.linalg._autodiff import autocast_off


def rate_reduction(features: Tensor, membership: Tensor, *, distortion: float = 0.5) -> Tensor:
    """The rate of all features together less the rate of the groups.

    Large where the features of each group span few directions, and those of different groups different ones.

    Args:
        features: ``(*batch, n, d)``, best of unit length.
        membership: ``(*batch, m, n)`` share of each feature in each group, at least 0: a doubly stochastic matrix with
            one group around every feature, or m classes whose shares sum to 1 for every feature.
        distortion: Root mean square error to which features are written down, above 0.

    Returns:
        ``(*batch)`` nats for each feature; NaN where a group with negative shares has no rate.

    Raises:
        ValueError: For shapes that do not fit or a distortion that is not positive, naming the argument.

    Differentiable in `features` and `membership`, to any order, forward and reverse. A group without members counts
    as zero, with zero for its derivative, which does not exist there.

    Example:
        >>> import torch
        >>> from difflayers.transport import rate_reduction
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> right = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
        >>> wrong = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
        >>> rate_reduction(features, right), rate_reduction(features, wrong)
        (tensor(0.5108), tensor(0.))

    Source: Y. Yu et al., Maximal Coding Rate Reduction, 2020, equation 9; T. Ding et al., Unsupervised Manifold
    Linearizing and Clustering, 2023, equation 4.
    """
    n, d = check_tensor("features", features, min_ndim=2).shape[-2:]
    check_tensor("membership", membership, min_ndim=2)
    check_same([("features", features), ("membership", membership)])
    check_shape("membership", membership.shape[-1:], (n,), " in its last dimension as there are features")
    broadcast_batch([("features", tuple(features.shape[:-2])), ("membership", tuple(membership.shape[:-2]))])
    check_distortion(distortion)
    if n == 0 or d == 0:
        raise ValueError(f"features: expected at least one of at least one dimension, got {tuple(features.shape)}")
    with autocast_off(features):
        work = compute_dtype(features.dtype)
        Z, shares, scale = features.to(work) / distortion, membership.to(work), float(d)
        sizes = shares.sum(-1)
        some = (sizes > 0).unsqueeze(-1)
        weights = torch.where(some, shares * (scale / torch.where(some, sizes.unsqueeze(-1), 1)), 0)
        every = Z.new_full((1, n), scale / n)
        rate = _log_det(Z, every).squeeze(-1)
        return ((rate - (sizes / n * _log_det(Z, weights)).sum(-1)) / 2).to(features.dtype)


def check_distortion(distortion: float) -> None:
    """Refuses what is no positive number."""
    if not isinstance(distortion, int | float) or isinstance(distortion, bool) or not 0 < distortion < math.inf:
        raise ValueError(f"distortion: expected a finite number above 0, got {distortion}")


def _log_det(Z: Tensor, weights: Tensor) -> Tensor:
    """``(*batch, m)`` ``log det(I + Z^T diag(w_i) Z)`` for every row of weights, by its smaller equal."""
    n, d = Z.shape[-2:]
    if d <= n:  # all groups in one product with the outer squares of the features
        squares = (Z.unsqueeze(-1) * Z.unsqueeze(-2)).flatten(-2)
        grams = (weights @ squares).unflatten(-1, (d, d))
        L, info = torch.linalg.cholesky_ex(grams + torch.eye(d, dtype=Z.dtype, device=Z.device))
        diagonal = L.diagonal(dim1=-2, dim2=-1)
        sound = (info == 0).unsqueeze(-1)
        return torch.where(sound, torch.where(sound, diagonal, 1).log(), math.nan).sum(-1) * 2
    # the square roots of the weights would make this one symmetric, and derivatives infinite at zero; by the factors of
    # LU, since twice forward through torch.linalg.slogdet is wrong in torch 2.13
    grams = weights.unsqueeze(-1) * (Z @ Z.mT).unsqueeze(-3)
    LU, pivots, _ = torch.linalg.lu_factor_ex(grams + torch.eye(n, dtype=Z.dtype, device=Z.device))
    diagonal = LU.diagonal(dim1=-2, dim2=-1)
    swaps = (pivots != torch.arange(1, n + 1, device=Z.device)).sum(-1)
    odd = ((diagonal < 0).sum(-1) + swaps) % 2 == 1
    sound = ((diagonal != 0).all(-1) & ~odd).unsqueeze(-1)
    return torch.where(sound, torch.where(sound, diagonal.abs(), 1).log(), math.nan).sum(-1)
