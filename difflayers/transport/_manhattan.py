"""The L1 distance between the points of two clouds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ._costs import check_points


@dataclass(frozen=True)
class Manhattan:
    """``|x - y|_1``; where coordinates agree its derivative in them counts as zero, the middle of the subdifferential.

    Between probabilities it is twice the total variation, from 0 to 2. Keeps the differences of all pairs,
    ``(*batch, n, m, d)``, for the derivative.

    Example:
        >>> import torch
        >>> from difflayers.transport import Manhattan
        >>> Manhattan()(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, -4.0]]))
        tensor([[0., 7.]])
    """

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The cost of every pair.

        Args:
            x: ``(*batch, n, d)``.
            y: ``(*batch, m, d)``.

        Returns:
            ``(*batch, n, m)``.
        """
        check_points(x, y)
        return (x.unsqueeze(-2) - y.unsqueeze(-3)).abs().sum(-1)
