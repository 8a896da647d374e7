r"""The inner problem of :class:`~difflayers.proximal.MoreauGrad`: penalties, the score, and the search for a support.

Events are flat here. Symbols: ``d`` the move, ``t`` lambda, ``eta`` weight of the penalty, ``g`` gradient of the score,
``tau`` step length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from difflayers._solution import Info, OnFailure, Status, settle
from difflayers.implicit import IterativeSolver
from difflayers.implicit._fixed_point_module import _Update
from difflayers.implicit._lbfgs import value_and_gradient
from difflayers.linalg._autodiff import plain
from difflayers.linalg._system import norm

from ._identify import identify
from ._operands import Number

NAME = "MoreauGrad"


@dataclass(frozen=True)
class L1:
    """The sum of absolute values: single entries of the map are zero.

    Args:
        weight: At least 0.
    """

    weight: Number = 5e-3

    def groups(self, event: torch.Size, device: torch.device) -> None:
        """Every entry is a group of its own."""
        return


@dataclass(frozen=True)
class GroupL2:
    """The sum of Euclidean norms over patches, all channels together: whole patches of the map are zero.

    Args:
        weight: At least 0.
        patch: Height and width of a patch, or one number for both; patches at the lower and right border are cut.
    """

    weight: Number = 5e-2
    patch: int | tuple[int, int] = 14

    def __post_init__(self) -> None:
        if min(self.sides) < 1:
            raise ValueError(f"patch: expected at least 1, got {self.patch}")

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width."""
        return (self.patch, self.patch) if isinstance(self.patch, int) else self.patch

    def groups(self, event: torch.Size, device: torch.device) -> tuple[Tensor, int]:
        """The patch of every entry of a flattened event, and how many there are."""
        index, count = torch.zeros((), dtype=torch.int64, device=device), 1
        for size, side in zip(event[-2:], self.sides[-len(event) :], strict=True):
            patches = -(-size // side)
            index = index.unsqueeze(-1) * patches + torch.arange(size, device=device) // side
            count *= patches
        # the search runs outside of transforms, where what was computed inside cannot be used
        return plain("patch", index.expand(event).flatten()), count


class Inputs(NamedTuple):
    """What the inner problem is solved for; the model's tensors follow."""

    x: Tensor  # (*batch, event...)
    spread: Tensor  # (*batch) standard deviation of the noise
    noise: Tensor  # (samples, event...)
    choice: Tensor  # (*batch, classes) one at the class of the score; (*batch, 0) where the model returns the score
    t: Tensor  # (*batch) or one number
    eta: Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """The inner problem of one call; tensors come in as arguments."""

    update: _Update
    names: tuple[str, ...]
    event: torch.Size
    penalty: L1 | GroupL2 | None
    groups: tuple[Tensor, int] | None

    def model(self, images: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """What the model returns, with the batch dimensions of the images."""
        batch = images.shape[: images.ndim - len(self.event)]
        # a model may refuse an empty batch
        count = math.prod(batch)
        flat = images.reshape((count, *self.event)) if count else images.new_zeros(1, *self.event)
        out = self.update(flat, dict(zip(self.names, tensors, strict=True)), {}, {}, ())
        if not isinstance(out, Tensor) or out.ndim not in (1, 2) or len(out) != len(flat):
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"model output: expected shape ({len(flat)}, classes) or ({len(flat)},), got {got}")
        return out[:count].reshape((*batch, *out.shape[1:]))

    def score(self, d: Tensor, inputs: Inputs, tensors: Sequence[Tensor]) -> Tensor:
        """The mean score of noisy copies of ``x + d``, one number per image."""
        x, spread, noise, choice, *_ = inputs
        batch = d.shape[:-1]
        at = x + d.reshape((*batch, *self.event))
        spread = spread.reshape((*spread.shape, *[1] * len(self.event)))
        copies = at + spread * noise.reshape(len(noise), *[1] * len(batch), *self.event)
        scores = self.model(copies, tensors)
        return (scores if scores.ndim == 1 + len(batch) else (scores * choice).sum(-1)).mean(0)

    def smooth(self, d: Tensor, mask: Tensor, inputs: Any, tensors: Any) -> Tensor:
        """The objective times t for entries in `mask`, where the penalty is smooth; half the square of the others."""
        given = Inputs(*inputs)
        on = torch.where(mask, d, 0)
        penalty = 0 if self.penalty is None else given.eta * self.size(on).sum(-1)
        return given.t * (self.score(on, given, tuple(tensors)) + penalty) + d.square().sum(-1) / 2

    def size(self, d: Tensor) -> Tensor:
        """Magnitude of every entry, or norm of every group."""
        if self.groups is None:
            return d.abs()
        labels, count = self.groups
        squares = d.new_zeros(*d.shape[:-1], count).index_add(-1, labels, d.square())
        zero = squares == 0
        return torch.where(zero, 0, torch.where(zero, 1, squares).sqrt())

    def each(self, sizes: Tensor) -> Tensor:
        """Sizes of groups, given to their entries."""
        return sizes if self.groups is None else sizes[..., self.groups[0]]

    def shrink(self, v: Tensor, by: Tensor) -> Tensor:
        """The prox of the penalty with step `by`."""
        if self.penalty is None:
            return v
        sizes = self.size(v)
        factor = torch.where(sizes > by, 1 - by / torch.where(sizes > by, sizes, 1), 0)
        return v * self.each(factor)

    def search(
        self, inputs: Inputs, tensors: Sequence[Tensor], rtol: float, max_steps: int, on_failure: OnFailure
    ) -> tuple[Tensor, Tensor, Info]:
        """The solution and its support by proximal gradient steps."""
        k = len(self.event)
        ndims = (k, 0, k + 1, 1, 0, 0, *(p.ndim for p in tensors))

        def find(*given: Tensor) -> tuple[Tensor, ...]:
            batch = torch.broadcast_shapes(*(v.shape[: v.ndim - m] for v, m in zip(given, ndims, strict=True)))
            start = given[0].new_zeros(*batch, self.event.numel())
            t, eta = given[4].unsqueeze(-1), given[5].unsqueeze(-1)
            d, info = proximal_gradient(self._at(given, ndims, batch), self.shrink, start, t, eta, rtol, max_steps)
            starved = info.status == Status.MAX_STEPS  # failures are told with the derivative
            settle(d, info._replace(status=starved * int(Status.MAX_STEPS)), on_failure, name=NAME)
            active = self.each(self.size(d)) > 0
            return d, active | (eta == 0) | (info.status > Status.MAX_STEPS).unsqueeze(-1), *info

        d, mask, *info = identify(find, *inputs, *tensors, ndims=ndims, found_ndims=(1, 1, 0, 0, 0))
        return d, mask, Info(*info)

    def _at(self, given: Sequence[Tensor], ndims: Sequence[int], batch: torch.Size) -> Callable[[Tensor], Tensor]:
        """The score of d alone."""
        if all(v.ndim == m for v, m in zip(given[6:], ndims[6:], strict=True)) and given[2].ndim == ndims[2]:
            return lambda d: self.score(d, Inputs(*given[:6]), given[6:])
        # vmap over the noise or the model's tensors: every image has its own
        flat = [v.expand(*batch, *v.shape[v.ndim - m :]) for v, m in zip(given, ndims, strict=True)]
        flat = [v.reshape((batch.numel(), *v.shape[len(batch) :])) for v in flat]
        one = vmap(lambda d, *own: self.score(d, Inputs(*own[:6]), own[6:]))
        return lambda d: one(d.reshape(batch.numel(), d.shape[-1]), *flat).reshape(batch)


def proximal_gradient(
    score: Callable[[Tensor], Tensor],
    shrink: Callable[[Tensor, Tensor], Tensor],
    d: Tensor,
    t: Tensor,
    eta: Tensor,
    rtol: float,
    max_steps: int,
) -> tuple[Tensor, Info]:
    """Steps of the length of Barzilai and Borwein, shortened until the score stays below its quadratic bound.

    S. Wright, R. Nowak, M. Figueiredo, Sparse reconstruction by separable approximation, 2009. Every element has its
    own step length; a step that was too long is repeated from the same point.
    """
    eps = torch.finfo(d.dtype).eps
    f, g = value_and_gradient(score, d)
    steps = torch.zeros(d.shape[:-1], dtype=torch.int64, device=d.device)
    tau = t.expand(*d.shape[:-1], 1)

    def judge(d: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The error of the fixed-point equation, and whether it is too large; False for NaN."""
        error = norm(d + t * shrink(g, eta))
        return error, error > rtol * norm(d) + 4 * eps * norm(t * g)

    residual, active = judge(d, g)
    for _ in range(max_steps):
        if not bool(active.any()):
            break
        trial = shrink(d - tau * (g + d / t), tau * eta)
        move = trial - d
        square = move.square().sum(-1, keepdim=True)
        f_trial, g_trial = value_and_gradient(score, trial)
        bound = f + (g * move).sum(-1) + (square * (1 / tau - 1 / t) / 2).squeeze(-1)
        bend = (move * (g_trial - g + move / t)).sum(-1, keepdim=True)
        # near the solution scores differ by rounding alone, and slopes tell what is left
        near = (f_trial - f).abs() <= math.sqrt(eps) * (f.abs() + f_trial.abs())
        flat = near & (bend <= square / tau).squeeze(-1)
        accept = (active & (flat | ~(f_trial > bound))).unsqueeze(-1)  # with NaN too, which ends the element
        longer = torch.where(bend > 0, square / torch.where(bend > 0, bend, 1), 4 * tau)
        longer = torch.minimum(torch.maximum(longer, tau / 10), 10 * t)
        tau = torch.where(accept, longer, torch.where(active.unsqueeze(-1), tau / 2, tau))
        d, g, f = (
            torch.where(accept, trial, d),
            torch.where(accept, g_trial, g),
            torch.where(accept[..., 0], f_trial, f),
        )
        steps = steps + active
        residual, wrong = judge(d, g)
        active = active & wrong
    status = torch.where(active, int(Status.MAX_STEPS), int(Status.CONVERGED))
    lost = ~torch.isfinite(residual)
    status = torch.where(lost, int(Status.DIVERGED), status)
    return torch.where(lost.unsqueeze(-1), math.nan, d), Info(status, steps, residual)


class Found(IterativeSolver):
    """Takes the start, which the search has found, for the minimiser; what is NaN has failed."""

    finds: ClassVar[str] = "minimum"

    def solve(self, function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Info]:
        """One evaluation."""
        f, g = value_and_gradient(function, z)
        residual = norm(g)
        sound = torch.isfinite(f) & torch.isfinite(residual)
        status = torch.where(sound, int(Status.CONVERGED), int(Status.DIVERGED))
        return z, Info(status, torch.zeros_like(status), residual)
