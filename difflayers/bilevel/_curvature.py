"""Whether a symmetric operator was seen to bend downwards, from products that were formed anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers._checks import compute_dtype


class Curvature:
    """The quadratic form of a symmetric operator on the span of the first few directions it was applied to.

    The smallest Ritz value is an upper bound of the smallest eigenvalue: no false alarms, but what these directions do
    not show is not seen. One operator an element: vectors are ``(*batch, n)``.

    Args:
        keep: Number of directions; two vectors are held for each.
    """

    def __init__(self, keep: int = 6) -> None:
        self.keep = keep
        self.directions: list[Tensor] = []
        self.images: list[Tensor] = []

    def add(self, v: Tensor, image: Tensor) -> None:
        """Takes in a direction and its image; of a direction almost in the span of the others nothing is kept."""
        if len(self.directions) >= self.keep:
            return
        size = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        usable = (size > 0) & torch.isfinite(size) & torch.isfinite(image).all(-1, keepdim=True)
        size = torch.where(usable, size, 1)
        v, image = torch.where(usable, v / size, 0), torch.where(usable, image / size, 0)
        for q, p in zip(self.directions, self.images, strict=True):
            along = (q * v).sum(-1, keepdim=True)
            v, image = v - along * q, image - along * p
        left = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        new = left > 0.01  # else rounding is what is left
        left = torch.where(new, left, 1)
        self.directions.append(torch.where(new, v / left, 0))
        self.images.append(torch.where(new, image / left, 0))

    def negative(self, shift: float = 0.0, noise: float = 1.0) -> Tensor | None:
        """``(*batch)``: whether ``operator + shift`` has an eigenvalue below zero; None where nothing was seen.

        Below zero by more than the square root of the rounding unit times `noise`, relative to the largest Ritz value.
        """
        if not self.directions:
            return None
        V, W = (torch.stack(t, -1) for t in (self.directions, self.images))
        V, W = V.to(compute_dtype(V.dtype)), W.to(compute_dtype(W.dtype))
        T = V.mT @ W
        found = torch.linalg.eigvalsh((T + T.mT) / 2) + shift
        tolerance = noise * torch.finfo(self.directions[0].dtype).eps ** 0.5
        return found[..., 0] < -tolerance * found.abs().amax(-1)
