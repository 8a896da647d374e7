"""Data consistency as a module, with the parameters of an operator that is one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from difflayers._solution import OnFailure, check_policy

from ._data_consistency import Operator, data_consistency


class DataConsistency(nn.Module):
    r"""Data consistency as a layer, between the denoising steps of a sampler or of an unrolled network.

    Args:
        operator: Linear map: a function, or a module, whose parameters are then differentiated.
        adjoint: Its transpose, a function or a module; None: a vector-Jacobian product.
        weight: Of the misfit, above 0.
        max_steps: None: to the tolerance, with the derivative of the solution. A number: exactly so many steps of
            conjugate gradients, with the derivative of that iterate. See :func:`data_consistency`.
        learn_weight: Learn it, as the exponential of a parameter.
        event_ndim: Trailing dimensions of one unknown: 3 for images with channels.
        rtol: As in :func:`data_consistency`.
        on_failure: As in :func:`data_consistency`.
        device: Of the learned weight; None: torch's default.
        dtype: Of the learned weight; None: torch's default.

    Shape:
        ``layer(x, measurement)`` with x ``(*batch, event...)`` and a measurement that broadcasts to ``operator(x)``;
        the result is shaped like x.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from difflayers.proximal import DataConsistency
        >>> blur = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        >>> layer = DataConsistency(blur, weight=10.0, max_steps=5, event_ndim=3)
        >>> image = torch.rand(2, 1, 8, 8)
        >>> layer(torch.zeros_like(image), blur(image)).shape
        torch.Size([2, 1, 8, 8])

    Source: H. Chung, S. Lee, J. C. Ye, Decomposed diffusion sampler, 2024 (there 5 steps at weight 1).
    """

    def __init__(
        self,
        operator: Operator,
        adjoint: Operator | None = None,
        weight: float = 1.0,
        max_steps: int | None = None,
        *,
        learn_weight: bool = False,
        event_ndim: int = 1,
        rtol: float | None = None,
        on_failure: OnFailure = "raise",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_policy(on_failure)
        if not weight > 0:
            raise ValueError(f"weight: expected more than 0, got {weight}")
        self.operator, self.adjoint, self.weight = operator, adjoint, weight
        self.options: dict[str, Any] = {"event_ndim": event_ndim, "max_steps": max_steps, "rtol": rtol}
        self.on_failure: OnFailure = on_failure
        log = torch.tensor(math.log(weight), device=device, dtype=dtype)
        self.log_weight = nn.Parameter(log) if learn_weight else None

    def extra_repr(self) -> str:
        """The options."""
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"weight={self.weight}, learn_weight={self.log_weight is not None}{options}"

    def forward(self, x: Tensor, measurement: Tensor) -> Tensor:
        """The nearest point that explains the measurement."""
        weight = self.weight if self.log_weight is None else self.log_weight.exp()
        named = {
            (role, name): p
            for role in ("operator", "adjoint")
            if isinstance(getattr(self, role), nn.Module)
            for name, p in getattr(self, role).named_parameters()
        }

        def call(role: str) -> Operator:
            function = getattr(self, role)
            if not isinstance(function, nn.Module):
                return lambda z, *_: function(z)
            return lambda z, *params: functional_call(
                function, {name: p for (r, name), p in zip(named, params, strict=True) if r == role}, (z,)
            )

        return data_consistency(
            call("operator"),
            x,
            measurement,
            weight,
            adjoint=None if self.adjoint is None else call("adjoint"),
            params=tuple(named.values()),
            on_failure=self.on_failure,
            **self.options,
        )
