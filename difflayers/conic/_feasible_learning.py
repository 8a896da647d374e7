r"""Feasible learning: every sample's loss at most a tolerance, instead of a small mean.

.. math:: \text{find } \theta: \; \ell_i(\theta) \le \epsilon \text{ for all } i, \qquad
    \text{or} \quad \min_{\theta, u \ge 0} \frac{a}{2} \|u\|^2 \; \text{s.t.} \; \ell_i(\theta) \le \epsilon + u_i .

Gradient descent on the Lagrangian in :math:`\theta`, projected ascent in one multiplier for each sample:

.. math:: \lambda_i \leftarrow [\lambda_i + \eta (\ell_i - \epsilon - \lambda_i / a)]_+ , \qquad
    \text{then a step along } \nabla_\theta \textstyle\sum_i \lambda_i \ell_i .

The dual step comes first: multipliers start at zero, where the primal gradient is zero too. In the resilient form,
the second, :math:`u = \lambda / a`: multipliers stay bounded where the constraints cannot all hold; without it they
grow for ever. J. Ramirez, I. Hounie, J. Elenter, J. Gallego-Posada, M. Hashemizadeh, A. Ribeiro, S. Lacoste-Julien,
Feasible Learning, 2025.

Symbols: ``lambda`` multipliers, ``eta`` dual learning rate, ``a`` price of slack.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from difflayers._checks import check_shape, check_tensor
from difflayers.linalg._autodiff import physical
from difflayers.proximal._partition import block_means, number

Reduction = Literal["sum", "mean", "none"]


class FeasibleLearning(nn.Module):
    """Weighs the losses of a batch by multipliers that grow while a sample's loss is above a tolerance.

    Solves ``find theta: loss_i(theta) <= tolerance`` for all samples, with resilience a ``min a/2 ||u||^2 s.t.
    loss_i(theta) <= tolerance + u_i``, by gradient descent-ascent. Call it with the losses of a batch and take a step
    on what it returns: it first updates the batch's multipliers, once a call in training mode and not at all in
    evaluation mode.

    Args:
        n_samples: Number of samples in the data set.
        tolerance: What no loss should exceed; for cross-entropy ``log(1 / p)`` asks for a probability of at least p.
        dual_lr: Step of the multipliers, more than 0.
        resilience: More than 0: the price of slack; slack is ``multipliers / resilience``, and `dual_lr` must be less
            than 2 times it. None: no slack; then multipliers diverge if the losses cannot all be below the tolerance.
        reduction: ``"sum"``, ``"mean"`` or ``"none"`` over the batch.

    Attributes:
        multipliers: ``(n_samples)``, a buffer: it is part of ``state_dict`` and moves with the module.

    Raises:
        ValueError: For numbers out of range; when called, for indices out of range or shapes that do not match.

    Differentiable in the losses; multipliers are constants. Multipliers of a sample that occurs several times in a
    batch take one step, with the mean of its losses. A loss that is not finite does not move its multiplier.

    Example:
        >>> import torch
        >>> from difflayers.conic import FeasibleLearning
        >>> constraints = FeasibleLearning(100, tolerance=0.5, dual_lr=0.1)
        >>> losses = torch.tensor([0.2, 2.5], requires_grad=True)
        >>> loss = constraints(losses, torch.tensor([3, 7]))
        >>> torch.autograd.grad(loss, losses)
        (tensor([0.0000, 0.2000]),)
        >>> constraints.multipliers[7]
        tensor(0.2000)

    Source: J. Ramirez et al., Feasible Learning, 2025.
    Departure: the resilient form is the default, since the other has no solution where the data cannot be fitted.
    """

    multipliers: Tensor

    def __init__(
        self,
        n_samples: int,
        *,
        tolerance: float,
        dual_lr: float = 0.01,
        resilience: float | None = 1.0,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__()
        if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 1:
            raise ValueError(f"n_samples: expected an integer of at least 1, got {n_samples}")
        if not math.isfinite(tolerance):
            raise ValueError(f"tolerance: expected a finite number, got {tolerance}")
        if not 0 < dual_lr < math.inf:
            raise ValueError(f"dual_lr: expected a finite number, more than 0, got {dual_lr}")
        if resilience is not None and not resilience > dual_lr / 2:
            raise ValueError(
                f"resilience: expected None or more than half of dual_lr = {dual_lr}, without which the multipliers "
                f"oscillate, got {resilience}"
            )
        if reduction not in ("sum", "mean", "none"):
            raise ValueError(f'reduction: expected "sum", "mean" or "none", got {reduction!r}')
        self.n_samples, self.tolerance, self.dual_lr = n_samples, tolerance, dual_lr
        self.resilience, self.reduction = resilience, reduction
        self.register_buffer("multipliers", torch.zeros(n_samples, device=torch.get_default_device()))

    def forward(self, losses: Tensor, index: Tensor) -> Tensor:
        """The losses of a batch, weighted by the multipliers of its samples.

        Args:
            losses: ``(batch)``, or any other shape.
            index: Which sample each loss belongs to: integers below `n_samples`, shaped like `losses`.

        Returns:
            The sum or mean of the weighted losses, or all of them, shaped like `losses`.
        """
        self._check(losses, index)
        if self.training and losses.numel():
            self._ascend(losses.detach(), index)
        weighted = self.multipliers[index].to(losses.dtype) * losses
        return weighted if self.reduction == "none" else weighted.mean() if self.reduction == "mean" else weighted.sum()

    @property
    def slack(self) -> Tensor:
        """``(n_samples)`` by how much each loss may exceed the tolerance: zeros without resilience."""
        return torch.zeros_like(self.multipliers) if self.resilience is None else self.multipliers / self.resilience

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"{self.n_samples}, tolerance={self.tolerance}, dual_lr={self.dual_lr}, resilience={self.resilience}, "
            f"reduction={self.reduction!r}"
        )

    @torch.no_grad()
    def _ascend(self, losses: Tensor, index: Tensor) -> None:
        """One step of the multipliers in `index`, in place."""
        order = index.flatten().argsort(stable=True)
        index = index.flatten()[order]
        losses = losses.flatten()[order].to(self.multipliers.dtype)
        # all occurrences of a sample get the mean of its losses, so it does not matter which one is written last
        losses = block_means(losses, number(torch.nn.functional.pad(index.diff() > 0, (1, 0), value=True)))
        before = self.multipliers[index]
        slack = 0.0 if self.resilience is None else before / self.resilience
        after = torch.relu(before + self.dual_lr * (losses - self.tolerance - slack))
        self.multipliers[index] = torch.where(torch.isfinite(losses), after, before)

    def _check(self, losses: Tensor, index: Tensor) -> None:
        check_tensor("losses", losses)
        if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise ValueError(f"index: expected a tensor of integers, got {got}")
        check_shape("index", index.shape, tuple(losses.shape), " as of losses")
        for name, t in (("losses", losses), ("index", index)):
            if t.device != self.multipliers.device:
                raise ValueError(f"{name}: expected device {self.multipliers.device} as of the module, got {t.device}")
        if torch.compiler.is_compiling() or not index.numel() or index.is_meta:
            return
        low, high = (int(i) for i in physical(index).aminmax())
        if low < 0 or high >= self.n_samples:
            raise ValueError(f"index: expected numbers from 0 to {self.n_samples - 1}, got {low} to {high}")
