r"""Input-convex networks: potentials that are convex in their input, whatever the parameters.

.. math:: z_1 = \varphi(H_1 y + b_1), \quad z_k = \varphi(W_k z_{k-1} + H_k y + b_k), \quad
    \psi(y) = w^T z_K + h^T y + \tfrac{\mu}{2} \|y\|^2

with :math:`W_k, w \ge 0` and the convex, increasing, smooth :math:`\varphi(t) = \log(1 + e^{\beta t}) / \beta`. Sums
with non-negative weights and increasing convex functions of convex functions are convex.

Z. Fang, S. Buchanan, J. Sulam, What's in a Prior? Learned Proximal Networks for Inverse Problems, ICLR 2024, section 3;
B. Amos, L. Xu, J. Z. Kolter, Input Convex Neural Networks, ICML 2017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from difflayers._checks import check_shape, check_tensor

_LINEAR_BEYOND = 40.0  # where log(1 + e^t) equals t to the last bit of float64; torch's own 20 costs half of the digits


class InputConvexNetwork(nn.Module):
    r"""A potential :math:`\psi(y)`, smooth and convex in `y` from the very first forward pass on.

    Constrained weights are ``softplus(free) / fan_in`` of free parameters, so that no step of any optimiser can make
    one negative. With an image shape, layers are 3x3 convolutions of which every second one halves the resolution, and
    the last one is summed over the image: weights do not depend on height and width, so images of any other size may be
    passed too.

    Args:
        shape: An integer n for vectors ``(*batch, n)`` (fully connected), or ``(channels, height, width)`` for images
            ``(*batch, channels, height, width)`` (convolutional).
        hidden: Width of every layer, at least 1.
        layers: Number of layers that read a layer before them, at least 0; there is one more that reads `y` alone.
        beta: Sharpness of the softplus activations; larger is closer to ReLU.
        strong_convexity: The number mu of ``mu/2 ||y||^2``, at least 0. Where it is positive the gradient of the
            potential maps onto the whole space and can be inverted everywhere, and plug-and-play iterations converge.
            The published code writes ``alpha ||y||^2``, so its alpha is ``mu/2``.

    Shape:
        Output ``(*batch)``: one number for each element.

    Raises:
        ValueError: For a size that is not positive, or, when called, an input of another shape.

    Differentiable in the input and in every parameter, to any order.

    Example:
        >>> import torch
        >>> from difflayers.proximal import InputConvexNetwork
        >>> InputConvexNetwork(2)(torch.randn(5, 2)).shape
        torch.Size([5])
        >>> InputConvexNetwork((1, 28, 28), hidden=8)(torch.randn(5, 1, 28, 28)).shape
        torch.Size([5])

    Source: Z. Fang, S. Buchanan, J. Sulam, What's in a Prior? Learned Proximal Networks for Inverse Problems, ICLR
    2024, section 3 and appendix.

    Departure: weights are non-negative by parametrisation (the published code clamps them after each step, so that the
    potential is not convex before the first one); the image network ends in a sum over the image instead of a dense
    layer of one fixed size; biases sit on the skips only, and a constant, which changes neither the prox nor its prior,
    is left out.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        hidden: int = 64,
        layers: int = 3,
        beta: float = 10.0,
        strong_convexity: float = 0.01,
    ) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if len(self.shape) not in (1, 3) or any(isinstance(s, bool) or not isinstance(s, int) for s in self.shape):
            raise ValueError(f"shape: expected an integer or (channels, height, width), got {shape}")
        for name, value, least in (("shape", min(self.shape), 1), ("hidden", hidden, 1), ("layers", layers, 0)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if not 0 < beta < math.inf:
            raise ValueError(f"beta: expected a positive number, got {beta}")
        if not 0 <= strong_convexity < math.inf:
            raise ValueError(f"strong_convexity: expected a number of at least 0, got {strong_convexity}")
        self.hidden, self.layers = hidden, layers
        self.beta, self.strong_convexity = beta, strong_convexity
        channels, image = self.shape[0], self.event_ndim == 3
        self.skips = nn.ModuleList(
            nn.Conv2d(channels, hidden, 3, padding=1) if image else nn.Linear(channels, hidden)
            for _ in range(layers + 1)
        )
        like: Tensor = self.skips[0].weight  # type: ignore[assignment]  # of torch's default device and dtype
        self.hidden_to_hidden = nn.ModuleList(
            _PositiveConvolution(like.new_empty(hidden, hidden, 3, 3), stride=1 + k % 2)
            if image
            else _PositiveLinear(like.new_empty(hidden, hidden))
            for k in range(1, layers + 1)
        )
        self.readout = _PositiveLinear(like.new_empty(1, hidden))
        self.linear = nn.Parameter(like.new_zeros(channels))

    @property
    def event_ndim(self) -> int:
        """Trailing dimensions that form one element, 1 for vectors and 3 for images."""
        return len(self.shape)

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"shape={self.shape}, hidden={self.hidden}, layers={self.layers}, beta={self.beta}, "
            f"strong_convexity={self.strong_convexity}"
        )

    def forward(self, y: Tensor) -> Tensor:
        """The potential of every element."""
        check_tensor("y", y, min_ndim=self.event_ndim)
        if self.event_ndim == 1:
            check_shape("y", y.shape[-1:], self.shape, " in its last dimension")
            return self._vectors(y)
        check_shape("y", y.shape[-3:-2], self.shape[:1], " of channels in its third last dimension")
        batch = y.shape[:-3]
        return self._images(y.reshape(-1, *y.shape[-3:])).reshape(batch)

    def _vectors(self, y: Tensor) -> Tensor:
        z = self._activation(self.skips[0](y))
        for skip, layer in zip(list(self.skips)[1:], self.hidden_to_hidden, strict=True):
            z = self._activation(layer(z) + skip(y))
        return self.readout(z).squeeze(-1) + (y * (self.linear + self.strong_convexity / 2 * y)).sum(-1)

    def _images(self, y: Tensor) -> Tensor:
        small = y
        z = self._activation(self.skips[0](y))
        for skip, layer in zip(list(self.skips)[1:], self.hidden_to_hidden, strict=True):
            assert isinstance(layer, _PositiveConvolution)
            if layer.stride == 2:  # rounds odd sizes up, as the convolution does
                small = F.avg_pool2d(small, 2, ceil_mode=True)
            z = self._activation(layer(z) + skip(small))
        linear = self.linear[:, None, None]
        return self.readout(z.sum((-2, -1))).squeeze(-1) + (y * (linear + self.strong_convexity / 2 * y)).sum((1, 2, 3))

    def _activation(self, t: Tensor) -> Tensor:
        return F.softplus(t, self.beta, _LINEAR_BEYOND)


class _PositiveLinear(nn.Module):
    """A linear map with positive weights, ``softplus(free) / fan_in``: about 0.8 / fan_in at the start."""

    def __init__(self, free: Tensor) -> None:
        super().__init__()
        self.free = nn.Parameter(nn.init.normal_(free.detach()))

    @property
    def weight(self) -> Tensor:
        """The weights."""
        return F.softplus(self.free) / self.free[0].numel()

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(z, self.weight)


class _PositiveConvolution(_PositiveLinear):
    """A 3x3 convolution with positive weights."""

    def __init__(self, free: Tensor, *, stride: int) -> None:
        super().__init__(free)
        self.stride = stride

    def extra_repr(self) -> str:
        return f"stride={self.stride}"

    def forward(self, z: Tensor) -> Tensor:
        return F.conv2d(z, self.weight, stride=self.stride, padding=1)
