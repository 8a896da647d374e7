r"""What is zero at a lower solution, where it is not the gradient alone.

With a prox, of the step s: :math:`y - \mathrm{prox}_{s g}(y - s \nabla_y f)`; on the support of a sparse solution its
Jacobian is s H, off it the identity, so that nothing flows through coordinates that rest at a kink. With equalities:
the gradient of the Lagrangian :math:`f + \nu^T h` and h itself, in :math:`(y, \nu)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from ._oracles import Oracles, Recorded, _gradient, _joined
from ._variables import Variables

_PRODUCTS = 12  # of the power iteration: the step need not be sharp, any positive one has the same solutions


def like_y(argument: str, variables: Variables, tree: Any) -> Tensor:
    """The result of a prox as a vector, its graph kept."""
    if variables.module is not None:
        leaves = [tree[name] for name in variables.names]
    else:
        leaves, spec = optree.tree_flatten(tree)
        if spec != variables.spec:
            raise ValueError(f"{argument} output: expected the structure of y, {variables.spec}, got {spec}")
    for leaf, shape in zip(leaves, variables.shapes, strict=True):
        if not isinstance(leaf, Tensor) or leaf.shape != shape:
            got = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(f"{argument} output: expected shape {tuple(shape)} as y has, got {got}")
    return variables.join(leaves)


def step_length(product: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """0.9 over the largest eigenvalue of a Hessian, by power iteration; 1 where the Hessian is zero."""
    ramp = torch.arange(1, like.numel() + 1, dtype=like.dtype, device=like.device)
    v = ramp * 0.7548776662466927 % 1 - 0.5  # a fixed low-discrepancy start: the same result every run
    size = torch.linalg.vector_norm(v)
    for _ in range(_PRODUCTS):
        v = product(v / torch.where(size > 0, size, 1))
        size = torch.linalg.vector_norm(v)
    return 0.9 / torch.where(size > 0, size, 0.9)


def _damped(oracles: Oracles, damping: float) -> Tensor:
    """The slope of ``f + damping/2 ||y - y0||^2`` at y = y0: the same value, the Hessian shifted."""
    slope = oracles.slope().value
    if not damping:
        return slope
    y = oracles.y_variables.join(oracles.y)
    return slope + damping * (y - y.detach())


def prox_residual(oracles: Oracles, prox: Callable[..., Any], damping: float) -> Recorded:
    """``y - prox(y - s grad f)``, differentiable in y and x."""
    slope, y = oracles.slope(), oracles.y_variables
    step = step_length(slope.pull, slope.value)
    x_tree = oracles.x_variables.tree(oracles.x)
    with torch.enable_grad():
        here = y.join(oracles.y)
        moved = like_y("prox_lower", y, prox(y.present(here - step * _damped(oracles, damping)), x_tree, step))
        return Recorded(here - moved, oracles.y, oracles.x, False, oracles.counts)


def kkt_residual(oracles: Oracles, constraint: Callable[..., Any], damping: float) -> Recorded:
    """``(grad_y (f + nu h), h)`` at the multipliers that fit best, differentiable in (y, nu) and x."""
    slope = oracles.slope()
    with torch.enable_grad():
        h = oracles.objective_of_constraint(constraint)(oracles.x, oracles.y).reshape(-1)
        rows = [_joined(_gradient(hi, oracles.y, create_graph=True)) for hi in h]
        A = torch.stack(rows) if rows else slope.value.new_zeros(0, slope.value.numel())
        nu = multipliers(A.detach(), -slope.value.detach()).requires_grad_()
        value = torch.cat([_damped(oracles, damping) + A.mT @ nu, h])
        return Recorded(value, [*oracles.y, nu], oracles.x, True, oracles.counts, A.detach())


def multipliers(A: Tensor, slope: Tensor) -> Tensor:
    """The nu whose ``A^T nu`` is nearest to `slope`."""
    return torch.linalg.pinv(A.mT) @ slope
