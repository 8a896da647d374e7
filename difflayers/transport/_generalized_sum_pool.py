r"""Generalized sum pooling: an average over the positions that resemble learned prototypes, the others left out.

.. math:: x = \frac1{n \mu} \sum_j \sigma_j f_j, \qquad z_i = \frac1\mu \sum_j \pi_{ij}

for features :math:`f_j` at n positions, where the plan :math:`\pi` of :func:`gsp_coupling` moves the share
:math:`\mu` of their mass to prototypes :math:`w_i` at the cost :math:`\|\nu(w_i) - \nu(f_j)\|`,
:math:`\nu(x) = x / \max(1, \|x\|)`, and :math:`\sigma_j = n \sum_i \pi_{ij}` is the share of position j. The histogram
z over the prototypes is the attribute vector of the paper. Y. Z. Gurbuz, O. Sener, A. A. Alatan, Generalized Sum
Pooling for Metric Learning, 2023.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from difflayers._checks import check_finite, check_tensor, compute_dtype
from difflayers.linalg._autodiff import autocast_off

from ._costs import confined
from ._gsp_coupling import checked, log_sums, shares


class SumPooling(NamedTuple):
    """What :meth:`GeneralizedSumPool.detailed` returns.

    Attributes:
        pooled: The pooled features, as of the module itself.
        attributes: ``(B, m)`` which share of what is pooled goes to each prototype; sums to 1.
        weights: ``(B, H, W)`` or ``(B, n)`` the weight of every position in the average; sums to 1.
    """

    pooled: Tensor
    attributes: Tensor
    weights: Tensor


class GeneralizedSumPool(nn.Module):
    r"""Pools the positions of a feature map that are near to learned prototypes: in the place of average pooling.

    With a ratio of 1 it is average pooling, to the last bit.

    Args:
        channels: Channels C of the features.
        n_prototypes: How many prototypes m to learn.
        ratio: Share of the mass of the positions that is pooled, above 0 and at most 1.
        gamma: Inverse temperature, above 0: large, and positions are in or out; small, and all weigh alike.
        learnable: Makes ratio (which then is below 1) and gamma parameters; the logit of the one and the logarithm of
            the other are learned.
        keepdim: Keeps pooled dimensions with size 1, as ``nn.AdaptiveAvgPool2d(1)`` does.
        device: Of the parameters; None: torch's default.
        dtype: Of the parameters; None: torch's default.

    Shape:
        Images ``(B, C, H, W)`` to ``(B, C)``, or ``(B, C, 1, 1)`` with `keepdim`; tokens ``(B, n, C)`` or ``(n, C)`` to
        ``(B, C)`` or ``(C)``, or ``(B, 1, C)`` and ``(1, C)``. Three dimensions always are tokens.

    Differentiable in the features, the prototypes, and the ratio and gamma where they are learned, to any order, except
    where a feature meets a prototype: there the derivative of their distance counts as zero.

    The prototypes start from random numbers. Before training, :meth:`initialise_` puts them on features that are far
    from each other.

    Example:
        >>> import torch
        >>> from difflayers.transport import GeneralizedSumPool
        >>> pool = GeneralizedSumPool(128, 64, ratio=0.3)
        >>> maps = torch.randn(8, 128, 7, 7)
        >>> pool.initialise_(maps)
        GeneralizedSumPool(128, 64, ratio=0.3, gamma=20)
        >>> pool(maps).shape, pool.detailed(maps).attributes.shape
        (torch.Size([8, 128]), torch.Size([8, 64]))

    Source: Y. Z. Gurbuz, O. Sener, A. A. Alatan, Generalized Sum Pooling for Metric Learning, 2023, sections 4.1, 4.2.

    Departure: the exact plan in the place of 100 iterations, and an initialisation that keeps the parameter. The
    published one puts a new parameter in its place during the first forward pass, where an optimiser that was built
    before does not see it.
    """

    def __init__(
        self,
        channels: int,
        n_prototypes: int = 64,
        ratio: float = 0.5,
        gamma: float = 20.0,
        *,
        learnable: bool = False,
        keepdim: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("channels", channels), ("n_prototypes", n_prototypes)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {size!r}")
        settings: tuple[tuple[str, Any], ...] = (("ratio", ratio), ("gamma", gamma))
        for name, value in settings:
            if isinstance(value, Tensor):
                raise ValueError(f"{name}: expected a number, which learnable=True makes a parameter, got a tensor")
        checked(ratio, gamma, [])
        if learnable and ratio == 1:
            raise ValueError(f"ratio: expected less than 1 where it is learnable, got {ratio}")
        self.channels, self.n_prototypes, self.keepdim, self.learnable = channels, n_prototypes, keepdim, learnable
        start = torch.randn(n_prototypes, channels, device=device, dtype=dtype) / math.sqrt(channels)
        self.prototypes = nn.Parameter(start)
        self.initial_ratio, self.initial_gamma = float(ratio), float(gamma)
        logit = math.log(ratio) - math.log1p(-ratio) if learnable else 0.0
        self.logit_ratio = nn.Parameter(start.new_full((), logit)) if learnable else None
        self.log_gamma = nn.Parameter(start.new_full((), math.log(gamma))) if learnable else None

    @property
    def ratio(self) -> float | Tensor:
        """The share that is pooled, a tensor where it is learned."""
        return self.initial_ratio if self.logit_ratio is None else self.logit_ratio.sigmoid()

    @property
    def gamma(self) -> float | Tensor:
        """The inverse temperature, a tensor where it is learned."""
        return self.initial_gamma if self.log_gamma is None else self.log_gamma.exp()

    def forward(self, features: Tensor) -> Tensor:
        """The pooled features.

        Args:
            features: ``(B, C, H, W)``, ``(B, n, C)`` or ``(n, C)``.

        Returns:
            ``(B, C)``, or as `keepdim` says.
        """
        columns = self._columns(features)
        with autocast_off(features):
            if isinstance(self.ratio, float) and self.ratio == 1:
                return self._shaped(_mean(features.to(columns.dtype)), features)
            columns, mark = confined(columns, 2)
            share, ratio, _ = self._shares(columns)
            return self._shaped(_average(columns, share, ratio) + mark.unsqueeze(-1), features)

    def detailed(self, features: Tensor) -> SumPooling:
        """The pooled features with the attributes, for :func:`zero_shot_loss`, and the weights of all positions.

        Args:
            features: ``(B, C, H, W)``, ``(B, n, C)`` or ``(n, C)``.

        Returns:
            ``(pooled, attributes, weights)``.
        """
        columns = self._columns(features)
        with autocast_off(features):
            columns, mark = confined(columns, 2)
            share, ratio, logs = self._shares(columns)
            whole = isinstance(self.ratio, float) and self.ratio == 1
            weights, mark = share / (ratio * share.shape[-1]), mark.unsqueeze(-1)
            attributes = (logs.softmax(-2) @ weights.unsqueeze(-1)).squeeze(-1) + mark
            pooled = _mean(features.to(columns.dtype)) if whole else _average(columns, share, ratio) + mark
            weights = weights + mark
            spread = weights.unflatten(-1, features.shape[-2:]) if features.ndim == 4 else weights
            dtype = features.dtype
            return SumPooling(self._shaped(pooled, features), attributes.to(dtype), spread.to(dtype))

    @torch.no_grad()
    def initialise_(self, features: Tensor) -> GeneralizedSumPool:
        """Moves the prototypes, in place, to features that are far from each other.

        The first is the one farthest from the mean; each other one the farthest from all before.

        Args:
            features: As for the module, from some typical inputs; at least `n_prototypes` positions in all.

        Returns:
            The module.

        Raises:
            ValueError: For features of too few positions, or with NaN or Inf.
        """
        columns = self._columns(features)
        check_finite([("features", features)])
        points = _in_ball(columns.movedim(-2, -1).reshape(-1, self.channels))
        if len(points) < self.n_prototypes:
            raise ValueError(f"features: expected at least {self.n_prototypes} positions in all, got {len(points)}")
        nearest = (points - points.mean(0)).square().sum(-1)  # squared distance to the mean, then to those picked
        picked = [points.index_select(0, nearest.argmax(0, keepdim=True))]
        nearest = torch.full_like(nearest, math.inf)
        while len(picked) < self.n_prototypes:
            nearest = torch.minimum(nearest, (points - picked[-1]).square().sum(-1))
            picked.append(points.index_select(0, nearest.argmax(0, keepdim=True)))
        self.prototypes.copy_(torch.cat(picked))
        return self

    def extra_repr(self) -> str:
        """Settings."""
        with torch.no_grad():
            ratio, gamma = float(self.ratio), float(self.gamma)
        options = ", learnable=True" * self.learnable + ", keepdim=True" * self.keepdim
        return f"{self.channels}, {self.n_prototypes}, ratio={ratio:.4g}, gamma={gamma:.4g}{options}"

    def _columns(self, features: Tensor) -> Tensor:
        """``(*batch, C, n)`` in the dtype to compute in."""
        check_tensor("features", features, min_ndim=2)
        if features.ndim > 4:
            raise ValueError(f"features: expected (B, C, H, W) or (B, n, C), got shape {tuple(features.shape)}")
        columns = features.flatten(2) if features.ndim == 4 else features.mT
        if columns.shape[-2] != self.channels:
            where = "(B, C, H, W)" if features.ndim == 4 else "(B, n, C) tokens"
            raise ValueError(
                f"features: expected C = {self.channels} channels in {where}, got shape {tuple(features.shape)}"
            )
        if columns.shape[-1] == 0:
            raise ValueError(f"features: expected at least one position, got shape {tuple(features.shape)}")
        own, work = self.prototypes, compute_dtype(features.dtype)
        if features.device != own.device:
            raise ValueError(f"features: expected device {own.device} as of the prototypes, got {features.device}")
        if work != compute_dtype(own.dtype):
            raise ValueError(f"features: expected dtype {own.dtype} as of the prototypes, got {features.dtype}")
        return columns.to(work)

    def _shares(self, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shares of the positions, the ratio, and the logarithms of the kernel."""
        ratio, gamma = self.ratio, self.gamma
        mu = ratio.to(columns.dtype) if isinstance(ratio, Tensor) else columns.new_full((), ratio)
        minus_gamma = -gamma.to(columns.dtype) if isinstance(gamma, Tensor) else -gamma
        logs = prototype_distances(self.prototypes.to(columns.dtype), columns) * minus_gamma
        return shares(log_sums(logs), mu)[0], mu, logs

    def _shaped(self, pooled: Tensor, features: Tensor) -> Tensor:
        pooled = pooled.to(features.dtype)
        if not self.keepdim:
            return pooled
        return pooled[..., None, None] if features.ndim == 4 else pooled.unsqueeze(-2)


def prototype_distances(prototypes: Tensor, columns: Tensor) -> Tensor:
    """Distances ``(*batch, m, n)`` of prototypes ``(m, C)`` and columns ``(*batch, C, n)``, moved into the unit ball.

    By inner products, without storing differences. Points that rounding does not tell apart count as equal: distance
    and derivative are zero.
    """
    w, f = _in_ball(prototypes), _in_ball(columns, -2)
    w_square, f_square = w.square().sum(-1, keepdim=True), f.square().sum(-2, keepdim=True)
    square = torch.add(w_square + f_square, w @ f, alpha=-2)
    apart = ~(square <= 8 * torch.finfo(w.dtype).eps * w_square.detach())  # true for NaN
    return torch.where(apart, torch.where(apart, square, 1).sqrt(), 0)


def _in_ball(x: Tensor, dim: int = -1) -> Tensor:
    """``x / max(1, |x|)``."""
    return x * x.square().sum(dim, keepdim=True).clamp_min(1).rsqrt()


def _average(columns: Tensor, share: Tensor, ratio: Tensor) -> Tensor:
    return (columns @ (share / (ratio * share.shape[-1])).unsqueeze(-1)).squeeze(-1)


def _mean(features: Tensor) -> Tensor:
    """Average pooling."""
    return features.mean((-2, -1)) if features.ndim == 4 else features.mean(-2)
