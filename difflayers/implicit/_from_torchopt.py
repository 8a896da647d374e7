"""Optimisers of torchopt as solvers of inner problems."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from difflayers._checks import default_rtol
from difflayers._solution import Info, Status

from ._iterate import Function, IterativeSolver, Step, iterate, size
from ._lbfgs import gradient_of, value_and_gradient
from ._newton import polish


class _State(NamedTuple):
    inner: Any
    z: Tensor  # the point and gradient before: their differences give the curvature
    g: Tensor
    stiffness: Tensor


@dataclass(frozen=True)
class FromTorchOpt(IterativeSolver):
    """A torchopt optimiser as a minimiser: for :func:`argmin`, and differentiable by ``Unrolled``.

    Stops at ``||grad|| <= atol + rtol * curvature * ||z||``, the curvature being that along the last step; a starved
    element returns the best iterate it saw. With a constant learning rate most optimisers do not reach the default
    `rtol`: give one, or a schedule. Events up to 64 numbers end with at most two Newton steps, kept where they reduce
    the gradient. What mixes entries (clipping by a global norm) mixes batch elements, too: give it one element.

    Args:
        optimizer: A functional optimiser such as ``torchopt.adam(lr=0.1)``, or a chain of transformations.
        rtol: Relative tolerance. None: 1e-10 in float64, 1e-5 in float32.
        atol: Absolute tolerance, added.
        max_steps: Largest number of steps.
        check_every: Steps between read-backs of the stopping flag. None: exactly `max_steps` steps and no read-back.

    Example:
        >>> import torch, torchopt
        >>> from difflayers.implicit import FromTorchOpt, argmin
        >>> x = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
        >>> adam = FromTorchOpt(torchopt.adam(lr=0.1), rtol=1e-4)
        >>> z = argmin(lambda z, x: (z - x).square().sum(-1), torch.zeros(2).double(), (x,), solver=adam)
        >>> torch.autograd.grad(z.sum(), x)
        (tensor([1., 1.], dtype=torch.float64),)

    Source: J. Ren et al., TorchOpt: an efficient library for differentiable optimization, 2023.
    """

    optimizer: Any
    max_steps: int = field(default=10_000, kw_only=True)

    finds: ClassVar[str] = "minimum"
    floors: ClassVar[bool] = False  # the gradient at a steep start says nothing of the one at the minimum
    keeps_best: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(getattr(self.optimizer, "init", None)) or not callable(getattr(self.optimizer, "update", None)):
            raise ValueError(
                "optimizer: expected a functional optimiser of torchopt, such as torchopt.adam(lr=0.1), got "
                f"{type(self.optimizer).__name__}"
            )

    def start(self, function: Function, z: Tensor) -> Any:
        """The optimiser's own state."""
        zero = torch.zeros_like(z)
        return _State(self.optimizer.init(z), zero, zero, zero[..., 0])

    def step(self, function: Function, z: Tensor, state: Any, k: int) -> Step:
        """One update."""
        s: _State = state
        f, g = value_and_gradient(function, z)
        updates, inner = self.optimizer.update(g, s.inner, params=z, inplace=False)
        stiffness = s.stiffness
        if k:
            moved = size((z - s.z).detach())
            stiffness = torch.where(moved > 0, size((g - s.g).detach()) / torch.where(moved > 0, moved, 1), stiffness)
        return Step(
            z=z + updates,
            state=_State(inner, z.detach(), g.detach(), stiffness),
            final=z,
            error=size(g.detach()),
            scale=stiffness * size(z.detach()),
            status=torch.where(torch.isneginf(f.detach()), int(Status.UNBOUNDED), 0),
        )

    def solve(self, function: Function, z: Tensor) -> tuple[Tensor, Info]:
        """Runs to the tolerance, then sharpens small events."""
        z, info = iterate(self, function, z)
        if self.check_every is None or z.numel() == 0:
            return z, info
        return polish(gradient_of(function), z, info, default_rtol(self.rtol, z.dtype))
