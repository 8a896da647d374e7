r"""Spectra: how much each loss counts, from the smallest to the largest.

.. math:: \sigma_i = H(i/n) - H((i-1)/n), \qquad 0 \le \sigma_1 \le \dots \le \sigma_n,
    \qquad \textstyle\sum_i \sigma_i = 1

for a convex function H with H(0) = 0 and H(1) = 1. The differences are written out, so that small weights are not what
two large numbers leave. R. Mehta, V. Roulet, K. Pillutla, Z. Harchaoui, Distributionally Robust Optimization with Bias
and Variance Reduction, 2024; C. Acerbi, Spectral measures of risk, 2002.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._checks import check_same, check_tensor, compute_dtype
from difflayers.linalg._autodiff import physical
from difflayers.proximal._operands import check_range, check_that, per_entry, shown

TOTAL = 0.05  # by how much weights may miss a sum of 1: rounding of bfloat16, finite differences


@dataclass(frozen=True)
class Spectrum:
    """Weights of sorted losses for any number of them; made by :func:`superquantile`, :func:`extremile`, :func:`esrm`.

    Attributes:
        formula: ``(i, n, parameter) -> weights`` of the ranks ``i = 1 ... n``, a float64 tensor: at least 0, not
            falling, with sum 1. A function at module level, so that the spectrum can be pickled.
        parameter: What the formula depends on besides.

    Example:
        >>> import torch
        >>> from difflayers.conic import superquantile
        >>> superquantile(0.5).weights(4)
        tensor([0.0000, 0.0000, 0.5000, 0.5000])
    """

    formula: Callable[[Tensor, int, float], Tensor]
    parameter: float

    def __repr__(self) -> str:
        return f"{self.formula.__name__.strip('_')}({self.parameter:g})"

    def weights(self, n: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """The weights of n losses, that of the smallest first, ``(n,)``."""
        if n < 1:
            raise ValueError(f"n: expected at least 1, got {n}")
        ranks = torch.arange(1, n + 1, dtype=torch.float64, device=device)
        return self.formula(ranks, n, self.parameter).to(dtype or torch.get_default_dtype())


def superquantile(alpha: float) -> Spectrum:
    """The mean of the largest losses, a share ``1 - alpha`` of them (conditional value at risk, expected shortfall).

    Args:
        alpha: From 0 (the mean) to below 1; from ``1 - 1/n`` on the largest loss alone counts.

    Returns:
        The spectrum.

    Raises:
        ValueError: For a number out of range.

    Example:
        >>> import torch
        >>> from difflayers.conic import spectral_risk, superquantile
        >>> spectral_risk(torch.tensor([1.0, 4.0, 2.0, 3.0]), superquantile(0.5))
        tensor(3.5000)

    Source: R. T. Rockafellar, S. Uryasev, Optimization of conditional value-at-risk, 2000.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha: expected at least 0 and less than 1, got {alpha}")
    return Spectrum(_superquantile, float(alpha))


def extremile(r: float) -> Spectrum:
    """The expected largest of r losses drawn with replacement; between integers its continuation.

    Args:
        r: At least 1 (the mean).

    Returns:
        The spectrum, with ``H(u) = u^r``.

    Raises:
        ValueError: For a number out of range.

    Example:
        >>> from difflayers.conic import extremile
        >>> extremile(2.0).weights(4)
        tensor([0.0625, 0.1875, 0.3125, 0.4375])

    Source: A. Daouia, I. Gijbels, G. Stupfler, Extremiles: a new perspective on asymmetric least squares, 2019.
    """
    if not 1 <= r < math.inf:
        raise ValueError(f"r: expected at least 1 and finite, got {r}")
    return Spectrum(_extremile, float(r))


def esrm(R: float) -> Spectrum:
    """The exponential spectral risk measure: weights that grow by the same factor from one loss to the next.

    Args:
        R: Aversion to risk, at least 0 (the mean); the largest loss counts ``e^(R (1 - 1/n))`` times the smallest.

    Returns:
        The spectrum, with ``H(u) = (e^(R u) - 1) / (e^R - 1)``.

    Raises:
        ValueError: For a number out of range.

    Example:
        >>> from difflayers.conic import esrm
        >>> esrm(2.0).weights(4)
        tensor([0.1015, 0.1674, 0.2760, 0.4551])

    Source: J. Cotter, K. Dowd, Extreme spectral risk measures, 2006.
    """
    if not 0 <= R < math.inf:
        raise ValueError(f"R: expected at least 0 and finite, got {R}")
    return Spectrum(_esrm, float(R))


def _superquantile(i: Tensor, n: int, alpha: float) -> Tensor:
    return (i - n * alpha).clamp(0, 1) / (n - n * alpha)


def _extremile(i: Tensor, n: int, r: float) -> Tensor:
    return -((i / n) ** r) * torch.expm1(r * torch.log1p(-1 / i))


def _esrm(i: Tensor, n: int, R: float) -> Tensor:
    if R == 0:
        return torch.full_like(i, 1 / n)
    return torch.exp(R / n * (i - n)) * (math.expm1(-R / n) / math.expm1(-R))


# --------------------------------------------------------------------------------------------- what a layer makes of it


def weights_of(spectrum: Spectrum | Tensor, losses: Tensor) -> Tensor:
    """The weights beside `losses`, ``(n,)`` or ``(*batch, n)``, checked and in the dtype of the computation."""
    n, dtype = losses.shape[-1], compute_dtype(losses.dtype)
    if isinstance(spectrum, Spectrum):
        return spectrum.weights(n, dtype=dtype, device=losses.device)
    if not isinstance(spectrum, Tensor):
        raise ValueError(
            f"spectrum: expected a Spectrum, such as superquantile(0.5), or a tensor of weights, got "
            f"{type(spectrum).__name__}"
        )
    check_tensor("spectrum", spectrum, min_ndim=1)
    if spectrum.shape[-1] != n:
        raise ValueError(f"spectrum: expected {n} weights, one for each loss, got shape {tuple(spectrum.shape)}")
    check_same([("losses", losses), ("spectrum", spectrum)])
    check_range(per_entry("spectrum", spectrum, at_least=0))
    if not torch.compiler.is_compiling() and spectrum.numel() and not spectrum.is_meta:
        plain = physical(spectrum)
        slack = 8 * torch.finfo(plain.dtype).eps * plain.abs().amax()
        falls = physical(spectrum.detach().diff(dim=-1)) < -slack
        check_that(
            not bool(falls.any()),
            lambda: f"spectrum: expected weights that do not fall, got {int(falls.sum())} smaller than the one before",
        )
        total = spectrum.detach().to(dtype).sum(-1)
        check_that(
            (total - 1).abs() <= TOTAL, lambda: f"spectrum: expected weights that sum to 1, got a sum of {shown(total)}"
        )
    return spectrum.to(dtype)
