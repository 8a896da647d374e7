r"""Proximal matching: a loss whose minimiser is the prox of the negative log density, without knowing the density.

.. math:: \mathbb E\, m\big(\|f(y) - x\|\big), \quad m(e) = 1 - e^{-e^2 / \gamma^2}, \quad y = x + \sigma n

As gamma goes to zero, the best f(y) goes from the mean of p(x | y) to its mode, which is the prox of
:math:`-\sigma^2 \log p` at y. Far away the loss is flat, so training starts with an l1 loss (the median).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from difflayers._checks import check_shape, check_tensor


def proximal_matching_loss(output: Tensor, target: Tensor, gamma: float, *, event_ndim: int | None = None) -> Tensor:
    r"""The mean over samples of ``1 - exp(-||output - target||^2 / gamma^2)``.

    Args:
        output: Denoised samples ``(*batch, event...)``.
        target: Clean samples of the same shape.
        gamma: Width, positive. The distance is that of a whole sample: for samples of n numbers widths go with sqrt(n).
        event_ndim: Trailing dimensions of one sample. None: all but the first.

    Returns:
        One number, between 0 and 1.

    Raises:
        ValueError: For a width that is not positive, or shapes that differ.

    Differentiable in `output` and `target`, to any order, also where they are equal.

    Example:
        >>> import torch
        >>> proximal_matching_loss(torch.zeros(2, 1), torch.tensor([[0.0], [100.0]]), 0.5)
        tensor(0.5000)

    Source: Z. Fang, S. Buchanan, J. Sulam, What's in a Prior? Learned Proximal Networks for Inverse Problems, ICLR
    2024, equation for proximal matching (without its constant factor).

    Departure: the published code takes the square of a square root, which has a NaN gradient at distance zero.
    """
    check_tensor("output", output)
    check_shape("target", check_tensor("target", target).shape, output.shape, " as of output")
    if isinstance(gamma, bool) or not 0 < gamma < math.inf:
        raise ValueError(f"gamma: expected a positive number, got {gamma}")
    ndim = max(output.ndim - 1, 0) if event_ndim is None else event_ndim
    if not 0 <= ndim <= output.ndim:
        raise ValueError(f"event_ndim: expected a number from 0 to {output.ndim}, got {event_ndim}")
    scaled = ((output - target) / gamma).square()  # divided first: squares of small numbers vanish in half precision
    squared = scaled.flatten(output.ndim - ndim).sum(-1) if ndim else scaled
    return -torch.expm1(-squared).mean()
