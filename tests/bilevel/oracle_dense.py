"""Hypergradients by brute force: plain objectives, dense Hessians from torch.autograd.functional, re-solved problems.

Nothing here uses the library. `solve` minimises by Newton with the dense Hessian until the step is rounding, `gradient`
applies the implicit function theorem with a dense factorisation, and `sixth` / `sixth_jacobian` difference re-solved
problems with the seven-point stencil of order six.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian
from torch.utils import _pytree

Objective = Callable[[Tensor, Tensor], Tensor]
STENCIL = ((1, 45 / 60), (2, -9 / 60), (3, 1 / 60))


def solve(lower: Objective, x: Tensor, start: Tensor, steps: int = 60) -> Tensor:
    """Newton with halving on the dense Hessian, on vectors; start near the wanted minimiser."""
    y = start.clone()
    for _ in range(steps):
        g = jacobian(lambda v: lower(x, v), y)
        move = torch.linalg.solve(hessian(lambda v: lower(x, v), y), g)
        t = 1.0
        while lower(x, y - t * move) > lower(x, y) + 1e-13 * (1 + lower(x, y).abs()) and t > 1e-4:
            t /= 2
        y = y - t * move
        if move.norm() <= 1e-15 * (1 + y.norm()):
            break
    return y


def gradient(upper: Objective, lower: Objective, x: Tensor, y: Tensor, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    """Hypergradient and q at (x, y), from dense second derivatives: least squares, so also for a singular Hessian."""
    d = y.numel()
    full = hessian(lambda z: lower(z[d:], z[:d]), torch.cat([y, x]))
    H, J = full[:d, :d] + damping * torch.eye(d, dtype=y.dtype), full[d:, :d]
    b = jacobian(lambda v: upper(x, v), y)
    q = torch.linalg.pinv(H, hermitian=True, rtol=1e-12) @ b
    return jacobian(lambda u: upper(u, y), x) - J @ q, q


def sixth(function: Callable[[Tensor], Any], x: Tensor, h: float = 1e-2) -> Tensor:
    """Derivative of a function of the vector x by differences of order six: (*out, n)."""
    columns = []
    for i in range(x.numel()):
        e = torch.zeros_like(x)
        e[i] = h
        columns.append(sum(w * (function(x + k * e) - function(x - k * e)) for k, w in STENCIL) / h)
    return torch.stack(columns, -1)


def resolved(upper: Objective, lower: Objective, start: Tensor) -> Callable[[Tensor], Tensor]:
    """Phi(x) = F(x, argmin f), solved anew at every x."""

    def value(x: Tensor) -> Tensor:
        return upper(x, solve(lower, x, start))

    return value


def curvature(upper: Objective, lower: Objective, x: Tensor, start: Tensor, h: float = 1e-2) -> Tensor:
    """Hessian of Phi: differences of order six of the dense hypergradient of re-solved problems."""
    return sixth(lambda u: gradient(upper, lower, u, solve(lower, u, start))[0], x, h)


def flat(tree: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """A pytree as one vector, and the way back."""
    leaves, spec = _pytree.tree_flatten(tree)
    sizes = [leaf.numel() for leaf in leaves]

    def back(v: Tensor) -> Any:
        parts = torch.split(v, sizes)
        return _pytree.tree_unflatten([p.reshape(leaf.shape) for p, leaf in zip(parts, leaves, strict=True)], spec)

    return torch.cat([leaf.detach().reshape(-1) for leaf in leaves]), back


def on_vectors(function: Callable[[Any, Any], Tensor], x: Any, y: Any) -> Objective:
    """An objective of two pytrees as one of two vectors."""
    into_x, into_y = flat(x)[1], flat(y)[1]
    return lambda u, v: function(into_x(u), into_y(v))
