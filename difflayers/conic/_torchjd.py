"""A plug-in for TorchJD: its aggregators on our projections, batched, on the device of the Gramian, without numpy.

TorchJD asks its projector for the weights of several vectors with one Gramian. It switches gradients off around every
aggregator; who wants to differentiate through one calls :class:`~difflayers.conic.UPGrad`.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from difflayers.proximal._operands import Operand, check_range

from ._dual_cone import BlockPivoting
from ._upgrad import dual_cone_weights


def torchjd_projector(*, ridge: float = 0.0, solver: BlockPivoting | None = None) -> Any:
    """A ``DualConeProjector`` for the aggregators of TorchJD (0.18 or newer), in the place of its call of quadprog.

    Args:
        ridge: As in :func:`dual_cone_weights`; 1e-4 does as TorchJD does. A Gramian whose trace is small is not taken
            for zero here.
        solver: As in :func:`dual_cone_weights`.

    Returns:
        An object for ``torchjd.aggregation.UPGrad(projector=...)`` and ``DualProj(projector=...)``.

    Raises:
        ImportError: Where TorchJD is not installed.
        ValueError: For a negative `ridge`.

    Example:
        >>> import torch
        >>> from difflayers.conic import torchjd_projector
        >>> from torchjd.aggregation import UPGrad
        >>> UPGrad(projector=torchjd_projector())(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([0.2924, 1.9006, 1.9006])

    Source: P. Quinton, V. Rey, Jacobian Descent For Multi-Objective Optimization, 2024, proposition 1.
    """
    check_range(Operand("ridge", ridge, 0, at_least=0))
    return _projector_class()(ridge, solver)


@functools.cache
def _projector_class() -> type:
    """The subclass, made when it is asked for: TorchJD is optional."""
    try:
        from torchjd.linalg import DualConeProjector
    except ImportError as error:
        raise ImportError("torchjd_projector needs TorchJD 0.18 or newer: pip install torchjd") from error

    class BlockPivotingProjector(DualConeProjector):
        """TorchJD's interface to :func:`dual_cone_weights`."""

        def __init__(self, ridge: float, solver: BlockPivoting | None) -> None:
            super().__init__()
            self.ridge, self.solver = ridge, solver

        def __call__(self, U: Tensor, G: Tensor) -> Tensor:
            """The weights, shaped like `U` ``(..., m)``, for the Gramian `G` ``(m, m)``."""
            return dual_cone_weights(U, G, ridge=self.ridge, solver=self.solver)

        def __repr__(self) -> str:
            return f"torchjd_projector(ridge={self.ridge}, solver={self.solver})"

        def __reduce__(self) -> tuple[Any, ...]:
            return functools.partial(torchjd_projector, ridge=self.ridge, solver=self.solver), ()

    return BlockPivotingProjector
