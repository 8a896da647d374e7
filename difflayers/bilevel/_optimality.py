r"""What is zero at a lower solution, where it is not the gradient alone.

With a prox (or a projection), of the step s: :math:`y - \mathrm{prox}_{s g}(y - s \nabla_y f)`; on the support of a
sparse solution its Jacobian is s H, off it the identity, so that nothing flows through coordinates that rest at a kink.
With equalities, or inequalities that are active: the gradient of the Lagrangian :math:`f + \nu^T h` and h itself, in
:math:`(y, \nu)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from difflayers.linalg._autodiff import gradients

from ._active_set import active_rows, length_of, reach
from ._curvature import Curvature
from ._oracles import Oracles, Recorded, _gradient, _joined

_PRODUCTS = 12  # of the power iteration: the step need not be sharp, any positive one has the same solutions
_CHUNK = 256  # rows of a constraint that are differentiated at a time


def step_length(product: Callable[[Tensor], Tensor], like: Tensor, products: int = _PRODUCTS) -> Tensor:
    """0.9 over the largest eigenvalue of a Hessian, by power iteration; 1 where the Hessian is zero.

    One step for all blocks, that of the most curved one whose numbers are finite.
    """
    v = ramp(like)
    size = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    for _ in range(products):
        v = product(v / torch.where(size > 0, size, 1))
        size = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    size = size.squeeze(-1)
    if size.ndim:
        size = torch.where(torch.isfinite(size), size, 0).amax()
    return 0.9 / torch.where(size > 0, size, 0.9)


def ramp(like: Tensor) -> Tensor:
    """A fixed low-discrepancy vector (the same result every run)."""
    count = torch.arange(1, like.shape[-1] + 1, dtype=like.dtype, device=like.device)
    return (count * 0.7548776662466927 % 1 - 0.5).expand_as(like)


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
    if oracles.group is not None and y.blocks is not None:
        step = oracles.group.smallest(step)
    x_tree = oracles.x_variables.tree(oracles.x_of_blocks())
    name = "prox_lower" if oracles.problem.project_lower is None else "project_lower"
    rows = y.blocks

    def moved(point: Tensor) -> Tensor:
        return y.returned(name, prox(y.present(point), x_tree, step), rows)

    def curvature() -> Curvature:
        """Of f + g, on the support."""
        point = y.join(oracles.y) - step * slope.value
        return support_curvature(lambda v: slope.pull(v) + damping * v, moved, point, step)

    def refuse_outside() -> None:
        point = y.join(oracles.y).detach()
        with torch.no_grad():
            away = torch.linalg.vector_norm(point - moved(point), dim=-1)
        if bool((away > reach(point.dtype) * torch.linalg.vector_norm(point, dim=-1).clamp_min(1)).any()):
            raise ValueError(
                f"y: expected a point of the set that project_lower projects onto, got one {float(away.max()):.3g} away"
            )

    if name == "project_lower":
        if oracles.group is not None and rows is not None:
            oracles.group.together(refuse_outside, slope.value.device)
        else:
            refuse_outside()
    with torch.enable_grad():
        here = y.join(oracles.y)
        value = here - moved(here - step * _damped(oracles, damping))
        return Recorded(value, oracles.y, oracles.x, False, oracles.counts, curvature=curvature, count=slope.count)


def support_curvature(
    product: Callable[[Tensor], Tensor], prox: Callable[[Tensor], Tensor], point: Tensor, step: Tensor
) -> Curvature:
    """Of f + g on the range of the derivative P of the prox: ``v^T H v + (w - v)^T v / step`` with ``v = P w``.

    At a minimum of f + g, ``H + (P^+ - I) / step`` is positive semidefinite there, for any step.
    """
    seen = Curvature()
    with torch.enable_grad():
        point = point.detach().requires_grad_()
        there = prox(point)
    w = ramp(point.detach())
    for _ in range(seen.keep if there.requires_grad else 0):
        v = gradients(there, point, w, retain_graph=True)[0]
        bent = product(v)
        seen.add(v, bent + (w - v) / step)
        w = v - step * bent
    return seen


def kkt_residual(oracles: Oracles, constraint: Callable[..., Any], damping: float) -> Recorded:
    """``(grad_y (f + nu h), h)`` at the multipliers that fit best, differentiable in (y, nu) and x."""
    slope, y = oracles.slope(), oracles.y_variables
    with torch.enable_grad():
        h = oracles.objective_of_constraint(constraint)(oracles.x, oracles.y).reshape(-1)
        at = y.join(oracles.y).detach()
        size = torch.linalg.vector_norm(at)
        bend = torch.linalg.vector_norm(slope.pull(torch.where(size > 0, at / size, ramp(at))))  # of the size of H
        if oracles.problem.equality:
            _, A = _rows(oracles, h)
        else:
            length = length_of(at, slope.value.detach(), bend)
            index, A = _rows(oracles, h, reach(h.dtype) * length)
            active = active_rows(h.detach()[index], A, slope.value.detach(), length, bend, index)
            h, A = h[index[active]], A[active]
        # rows as large as H, whatever the units of the constraint: iterations see the condition of the whole
        lengths, bend = torch.linalg.vector_norm(A, dim=-1), torch.where(bend > 0, bend, 1)
        balance = torch.where(lengths > 0, bend / torch.where(lengths > 0, lengths, 1), 1)
        own, h, A = h.detach(), balance * h, balance.unsqueeze(-1) * A
        nu = multipliers(A, -slope.value.detach()).requires_grad_()
        pulled = _joined(_gradient((nu * h).sum(), oracles.y, create_graph=True))
        value = torch.cat([_damped(oracles, damping) + pulled, h])

    def curvature() -> Curvature:
        """Of the Lagrangian along the constraints."""
        seen, back = Curvature(), torch.linalg.pinv(A)
        v = ramp(slope.value)
        for _ in range(seen.keep):
            v = v - back @ (A @ v)
            size = torch.linalg.vector_norm(v)
            v = v / torch.where(size > 0, size, 1)
            bent = recorded.pull(torch.cat([v, v.new_zeros(len(A))]))[: len(v)]
            seen.add(v, bent)
            v = bent
        return seen

    recorded = Recorded(value, [*oracles.y, nu], oracles.x, True, oracles.counts, A, curvature)
    recorded.gap = torch.linalg.vector_norm(torch.cat([value.detach()[: len(at)], own]))
    return recorded


def _rows(oracles: Oracles, h: Tensor, near: float | Tensor = math.inf) -> tuple[Tensor, Tensor]:
    """Indices and gradients in y, ``(k, n)``, of rows of a constraint that are above ``-near`` times their length."""
    n, m = oracles.y_variables.size, len(h)
    # processes talk in a backward pass, one row at a time
    chunk = 1 if oracles.group is not None or m < 4 else _CHUNK
    parts, kept = [h.new_zeros(0, n)], []
    for first in range(0, m, chunk):
        index = torch.arange(first, min(first + chunk, m), device=h.device)
        rows = h.new_zeros(len(index), n)
        if h.requires_grad:
            unit = torch.nn.functional.one_hot(index, m).to(h)
            one = chunk == 1
            grads = gradients(
                h, oracles.y, unit[0] if one else unit, retain_graph=True, rows=None if one else len(index)
            )
            rows = torch.cat([g.reshape(len(index), -1) for g in grads], -1)
        close = h.detach()[index] >= -near * torch.linalg.vector_norm(rows, dim=-1)
        parts.append(rows[close])
        kept.append(index[close])
    return torch.cat(kept) if kept else h.new_zeros(0, dtype=torch.int64), torch.cat(parts)


def multipliers(A: Tensor, slope: Tensor) -> Tensor:
    """The nu whose ``A^T nu`` is nearest to `slope`."""
    return torch.linalg.pinv(A.mT) @ slope
