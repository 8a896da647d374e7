"""Which neighbours are pooled so that the values of blocks do not fall: isotonic regression on plain tensors.

All rows are merged at once by divide and conquer, as in :mod:`difflayers.proximal._isotonic`; but on a CPU a few long
rows are done by the compiled routine of scipy, which takes a few microseconds for each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from difflayers.proximal._isotonic import RangeSums, merge, pools
from difflayers.proximal._partition import number

WIDEST = 600.0  # e^WIDEST and its reciprocal are numbers that can be added up


def blocks_of_means(v: Tensor) -> Tensor:
    """Blocks whose value is the mean of v, ``(*batch, n)``, finite, in float64."""
    return _one_by_one(v, None) if _compiled(v) else pools(v)[1]


def blocks_of_log_ratios(u: Tensor, sigma: Tensor) -> Tensor:
    """Blocks whose value is ``log sum exp(u) - log sum sigma``, for u and sigma that do not fall.

    That is the logarithm of a weighted mean. A sigma of 0 makes a value of infinity: zeros, which come first, are
    always pooled with a positive weight.
    """
    if not _compiled(u):
        return _log_pools(u, sigma)
    # the reciprocal is a mean of sigma / exp(u), with weights that are not zero unless u spans hundreds
    below = u - u[..., -1:]
    narrow = below[..., :1] >= -WIDEST
    weights = torch.where(narrow, below, 0).exp()
    blocks = _one_by_one(-sigma / weights, weights)
    wide = ~narrow.squeeze(-1)
    if bool(wide.any()):
        blocks[wide] = _log_pools(u[wide], sigma[wide])
    return blocks


def _compiled(v: Tensor) -> bool:
    n = v.shape[-1]
    return v.device.type == "cpu" and v.numel() <= n * n


def _one_by_one(v: Tensor, weights: Tensor | None) -> Tensor:
    """Pool adjacent violators by scipy: rows that are few beside their length."""
    from scipy.optimize import isotonic_regression

    n = v.shape[-1]
    first = torch.zeros(v.shape, dtype=torch.bool, device=v.device)
    rows = v.reshape(-1, n).numpy()
    masses = [None] * len(rows) if weights is None else weights.reshape(-1, n).numpy()
    for mark, row, mass in zip(first.view(-1, n).numpy(), rows, masses, strict=True):
        mark[isotonic_regression(row, weights=mass).blocks[:-1]] = True
    return number(first)


def _log_pools(u: Tensor, sigma: Tensor) -> Tensor:
    """The pooling of isotonic regression with other range sums."""
    if not u.numel():
        return torch.zeros_like(u, dtype=torch.int64)
    batch, n = u.shape[:-1], u.shape[-1]
    size = 1 << (n - 1).bit_length()
    # entries of infinite value at the top, which are never pooled, fill up to a power of 2
    z = pad(u - sigma.log(), (0, size - n), value=math.inf).reshape(-1, size)
    sums = _LogSums(pad(u, (0, size - n)).reshape(-1, size), pad(sigma, (0, size - n)).reshape(-1, size))
    half = 1
    while half < size:
        z = merge(z, sums, half)
        half *= 2
    z = z[:, :n].reshape(*batch, n)
    return number(pad(z[..., 1:] != z[..., :-1], (1, 0), value=True))


class _LogSums(RangeSums):
    """Values of ranges of entries, from prefix sums.

    The entries rise, so that the last ones of a prefix are its largest: a difference of two prefixes loses no more than
    the digits of their length.
    """

    def __init__(self, u: Tensor, sigma: Tensor) -> None:
        self.log_sums = pad(u.logcumsumexp(-1), (1, 0), value=-math.inf)
        self.sigma = pad(sigma.cumsum(-1), (1, 0))

    def over(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """The value of ``start <= i < end`` and a weight of 1; minus infinity for no entry."""
        before, upto = self.log_sums.gather(-1, start), self.log_sums.gather(-1, end)
        log_sum = upto + torch.log1p(-(before - upto).exp())
        total = self.sigma.gather(-1, end) - self.sigma.gather(-1, start)
        return torch.where(start < end, log_sum - total.log(), -math.inf), torch.ones_like(total)
