r"""A smooth objective with a prox or a projection: :math:`z = \mathrm{prox}_{s g}(z - s \nabla f(z))` at a minimiser.

The step s stands behind the unknown in the value of the map, as a constant: any positive one has the same solutions and
the same derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from difflayers._solution import Info
from difflayers.linalg._autodiff import pullback

from ._iterate import Function, IterativeSolver, size
from ._lbfgs import gradient_of, value_and_gradient

_PRODUCTS = 12  # of the power iteration: the step need not be sharp


@dataclass(frozen=True, eq=False)
class Composite:
    """``f + g``: f as a function, g by its prox ``(v, step, *tensors)``, both flat."""

    objective: Callable[..., Tensor]
    prox: Callable[..., Tensor]

    def __call__(self, z: Tensor, *tensors: Tensor) -> Tensor:
        """The smooth part alone."""
        return self.objective(z, *tensors)

    def bind(self, tensors: Sequence[Tensor]) -> Composite:
        """Both at given arguments."""
        return Composite(lambda z: self.objective(z, *tensors), lambda v, step: self.prox(v, step, *tensors))

    def lift(self, in_dims: tuple[int | None, ...]) -> Composite:
        """Both under one more ``vmap``."""
        return Composite(vmap(self.objective, in_dims=(0, *in_dims)), vmap(self.prox, in_dims=(0, 0, *in_dims)))

    def move(self, z: Tensor, step: Tensor, *tensors: Tensor) -> Tensor:
        """One step of the proximal gradient method; `step` has the shape of the batch."""
        slope = value_and_gradient(lambda z: self.objective(z, *tensors), z)[1]
        return self.prox(z - step.unsqueeze(-1) * slope, step, *tensors)


def step_length(objective: Function, z: Tensor) -> Tensor:
    """0.9 over the largest curvature of each element, by power iteration; 1 where there is none or no number."""
    z = z.detach()
    if not z.numel():
        return z.new_ones(z.shape[:-1])
    pull = pullback(gradient_of(objective), z, record=False)[1]
    ramp = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    v = (ramp * 0.7548776662466927 % 1 - 0.5).expand_as(z)  # a fixed low-discrepancy start: the same result every run
    length = size(v)
    for _ in range(_PRODUCTS):
        v = pull(v / torch.where(length > 0, length, 1).unsqueeze(-1))[0].detach()
        length = size(v)
    step = 0.9 / torch.where(length > 0, length, 0.9)
    return torch.where(torch.isfinite(step) & (step > 0), step, 1)


def fixed_point_map(composite: Composite) -> Function:
    """The proximal gradient step as an update, its step length from where it is first evaluated."""
    step: Tensor | None = None

    def update(z: Tensor) -> Tensor:
        nonlocal step
        if step is None:
            step = step_length(composite.objective, z)
        return composite.move(z, step)

    return update


def _root(composite: Composite) -> Function:
    update = fixed_point_map(composite)
    return lambda z: z - update(z)


def _residual(function: Any) -> Callable[..., Tensor]:
    def residual(value: Tensor, *tensors: Tensor) -> Tensor:
        z, step = value[..., :-1], value[..., -1:]
        constant = step.detach()
        return torch.cat([z - function.move(z, constant.squeeze(-1), *tensors), step - constant], -1)

    return residual


def _run(solver: IterativeSolver, adapt: Callable[[Any], Any], at: Composite, init: Tensor) -> tuple[Tensor, Info]:
    z, info = solver.solve(adapt(at), init)
    return torch.cat([z, step_length(at.objective, z).unsqueeze(-1)], -1), info


def composite_kind(kind: Any, default: IterativeSolver) -> Any:
    """`kind` with a prox: what its solution is, and which solvers find one."""
    return replace(
        kind,
        residual=_residual,
        adapt={"composite": lambda at: at, "fixed_point": fixed_point_map, "root": _root},
        scalar=True,
        symmetric=False,
        one_step=True,
        run=_run,
        default=default,
    )
