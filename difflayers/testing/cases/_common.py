"""What the case files share: seeded numbers, and Newton in plain torch as the differentiable twin of a solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Residual = Callable[..., Tensor]


def normal(seed: int, *shape: int) -> Tensor:
    """Seeded standard normal numbers in float64."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def numbers(values: object) -> Tensor:
    """A float64 tensor of nested lists."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def batch_shape(args: Sequence[Tensor], ndims: Sequence[int]) -> torch.Size:
    """The common batch dimensions of arguments with known event dimensions."""
    return torch.broadcast_shapes(*(a.shape[: a.ndim - k] for a, k in zip(args, ndims, strict=True)))


def unrolled_newton(residual: Residual, n: int, ndims: Sequence[int], start: float = 0.0, steps: int = 25) -> Residual:
    """Newton under autograd on ``residual(z, *args)``, no library code: exact at convergence, at every order."""

    def solve(*args: Tensor) -> Tensor:
        z = args[0].new_full((*batch_shape(args, ndims), n), start).requires_grad_()
        with torch.enable_grad():
            for _ in range(steps):
                r = residual(z, *args)
                rows = [torch.autograd.grad(r[..., i].sum(), z, create_graph=True)[0] for i in range(n)]
                z = z - torch.linalg.solve(torch.stack(rows, -2), r)
        return z

    return solve


def per_element(solve: Callable[..., np.ndarray], ndims: Sequence[int]) -> Callable[..., Tensor]:
    """An oracle that works on one element in numpy, applied to every element of a batch."""

    def oracle(*args: Tensor) -> Tensor:
        batch = batch_shape(args, ndims)
        wide = [
            a.expand(batch + a.shape[a.ndim - k :]).detach().cpu().numpy() for a, k in zip(args, ndims, strict=True)
        ]
        found = np.empty(tuple(batch), dtype=object)
        for index in np.ndindex(*batch):
            found[index] = solve(*(w[index] for w in wide))
        flat = np.array([np.asarray(f) for f in found.ravel()])
        return torch.from_numpy(flat.reshape(*batch, *flat.shape[1:])).to(args[0])

    return oracle
