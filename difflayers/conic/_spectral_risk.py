r"""Spectral risk: the worst mean of the losses over all reweightings that a spectrum allows.

.. math:: R(\ell) = \max_{q \in P(\sigma)} q^T \ell - \nu D(q), \qquad
    P(\sigma) = \operatorname{conv} \{ \text{permutations of } \sigma \}

Without a penalty the largest loss gets the largest weight, and so on. With one, sorted losses less what their weights
cost must not fall: where they do, isotonic regression makes a block, inside which the weights follow the losses and
have the sum of the block's entries of :math:`\sigma`. R. Mehta, V. Roulet, K. Pillutla, Z. Harchaoui, Distributionally
Robust Optimization with Bias and Variance Reduction, 2024.

The blocks carry no derivative; given them, risk and weights are closed formulas, whose derivatives of all orders are
those of the risk: the gradient is q, the Hessian is block diagonal. Blocks are found from the *gaps* between sorted
losses, each cut where it is so wide that no block can cross it: so nothing is lost to rounding for losses of 1e9 or
penalties of 1e-300.

Symbols: ``l`` losses, ``q`` weights, ``w`` mean of sigma in an entry's block, ``n`` number of losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_same, check_tensor, compute_dtype
from difflayers.linalg._autodiff import autocast_off, transforms_active
from difflayers.proximal._identify import identify
from difflayers.proximal._operands import check_range, per_element

from ._divergences import Divergence, NoPenalty, Sorted, locate
from ._spectra import Spectrum, weights_of


def spectral_risk(losses: Tensor, spectrum: Spectrum | Tensor, *, penalty: Divergence | None = None) -> Tensor:
    """The worst mean of the losses over the weights that a spectrum allows, less what these cost.

    Solves ``max_q q^T losses - penalty(q)`` over the permutahedron of the spectrum's weights, the convex hull of their
    permutations. Without a penalty this is ``sum_i sigma_i losses_(i)``, from the smallest loss to the largest: a
    superquantile, extremile or exponential spectral risk.

    Args:
        losses: ``(*batch, n)``.
        spectrum: :func:`superquantile`, :func:`extremile`, :func:`esrm`, or ``(*batch, n)`` weights sigma, at least 0,
            not falling, with sum 1.
        penalty: :class:`ChiSquare` or :class:`KL`; None: no penalty.

    Returns:
        ``(*batch)`` risks; NaN where a loss is.

    Raises:
        ValueError: For shapes that do not fit, weights that are no spectrum, or a negative strength.

    Differentiable in `losses`, a tensor of weights and a tensor of strengths, to any order. The gradient in `losses` is
    :func:`spectral_risk_weights`. At a kink of that (blocks that just touch) the second derivative is that of one joint
    block. Without a penalty equal losses share their weights equally, and the second derivative is zero.

    Example:
        >>> import torch
        >>> from difflayers.conic import ChiSquare, spectral_risk, superquantile
        >>> losses = torch.tensor([1.0, 4.0, 2.0, 3.0], requires_grad=True)
        >>> risk = spectral_risk(losses, superquantile(0.5), penalty=ChiSquare(0.5))
        >>> risk
        tensor(3.0625, grad_fn=<SumBackward1>)
        >>> torch.autograd.grad(risk, losses)
        (tensor([0.0000, 0.5000, 0.1250, 0.3750]),)

    Source: R. Mehta, V. Roulet, K. Pillutla, Z. Harchaoui, Distributionally Robust Optimization with Bias and Variance
    Reduction, 2024, the regularised spectral risk.
    Departure: pooling sees gaps between losses, cut where no block can cross them, so that no scale is too small; for
    the Kullback-Leibler penalty it works with logarithms, so that spectra may have zeros.
    """
    return _evaluate(lambda d, at: d._risk(at).sum(-1), losses, spectrum, penalty)


def spectral_risk_weights(losses: Tensor, spectrum: Spectrum | Tensor, *, penalty: Divergence | None = None) -> Tensor:
    """The weights q that attain :func:`spectral_risk`, in the order of the losses; its gradient.

    Args:
        losses: ``(*batch, n)``.
        spectrum: As for :func:`spectral_risk`.
        penalty: As for :func:`spectral_risk`.

    Returns:
        ``(*batch, n)`` weights, whose sum is that of the spectrum.

    Raises:
        ValueError: As :func:`spectral_risk`.

    Differentiable in `losses`, a tensor of weights and a tensor of strengths, to any order; detach them to weigh losses
    by hand.

    Example:
        >>> import torch
        >>> from difflayers.conic import KL, esrm, spectral_risk_weights
        >>> spectral_risk_weights(torch.tensor([1.0, 4.0, 2.0, 3.0]), esrm(2.0), penalty=KL(1.0))
        tensor([0.1015, 0.4551, 0.1674, 0.2760])

    Source: R. Mehta, V. Roulet, K. Pillutla, Z. Harchaoui, Distributionally Robust Optimization with Bias and Variance
    Reduction, 2024, where isotonic regression finds them.
    """
    return _evaluate(lambda d, at: d._weights(at), losses, spectrum, penalty)


def _evaluate(
    formula: Callable[[Divergence, Sorted], Tensor],
    losses: Tensor,
    spectrum: Spectrum | Tensor,
    penalty: Divergence | None,
) -> Tensor:
    """A formula at the sorted losses, in the dtype of the losses."""
    check_tensor("losses", losses, min_ndim=1)
    n, dtype = losses.shape[-1], compute_dtype(losses.dtype)
    if n < 1:
        raise ValueError(f"losses: expected at least one loss, got shape {tuple(losses.shape)}")
    if penalty is not None and not isinstance(penalty, Divergence):
        raise ValueError(f"penalty: expected ChiSquare, KL or None, got {type(penalty).__name__}")
    divergence = penalty or NoPenalty()
    sigma, strength = weights_of(spectrum, losses), _strength_of(divergence, losses)
    named = (("losses", losses), ("strength", strength), ("spectrum", sigma))
    batch = broadcast_batch([(name, tuple(t.shape[:-1])) for name, t in named])
    with autocast_off(losses):
        x, scale = losses.to(dtype).expand(*batch, n), divergence._scale(strength, n)
        rank, blocks, size, anchor, mean = identify(
            partial(locate, divergence), x, sigma, scale, ndims=(1, 1, 1), found_ndims=(1,) * 5
        )
        at = Sorted(x, blocks, size, anchor, mean, scale)
        if sigma.requires_grad or transforms_active():
            at = at._replace(mean=mean + at.mean_of(sigma.expand_as(x).gather(-1, rank) - mean))
        return formula(divergence, at).to(losses.dtype)


def _strength_of(divergence: Divergence, losses: Tensor) -> Tensor:
    """The strength as ``(*batch, 1)`` in the dtype of the computation."""
    strength, dtype = divergence.strength, compute_dtype(losses.dtype)
    check_range(per_element("strength", strength, at_least=0))
    if isinstance(strength, Tensor):
        check_tensor("strength", strength)
        check_same([("losses", losses), ("strength", strength)])
        return strength.to(dtype).unsqueeze(-1)
    if strength == math.inf:
        raise ValueError("strength: expected a finite number, got inf")
    return torch.full((1,), strength, dtype=dtype, device=losses.device)
