r"""L-BFGS: :math:`z \leftarrow z - t\,H_k \nabla f(z)` with an inverse Hessian from the last steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from difflayers._checks import default_rtol
from difflayers._solution import Info, Status
from difflayers.linalg._autodiff import pullback

from ._iterate import Function, IterativeSolver, Step, iterate, size
from ._newton import polish


class _State(NamedTuple):
    f: Tensor
    g: Tensor
    p: Tensor  # search direction
    t: Tensor  # trial length, bracketed by lower and upper
    lower: Tensor
    upper: Tensor
    S: Tensor  # (*batch, history, n) steps, newest last
    Y: Tensor  # (*batch, history, n) changes of the gradient
    rho: Tensor  # (*batch, history) 1 / <s, y>; 0 for an empty slot
    stiffness: Tensor  # ||y|| / ||s|| of the newest pair, or of a short trial
    moved: Tensor  # ||s|| of the newest pair
    travel: Tensor  # largest ||z|| and ||s|| seen


def value_and_gradient(objective: Function, z: Tensor) -> tuple[Tensor, Tensor]:
    """The objective of every element and its gradient in `z`."""
    f, pull = pullback(objective, z)
    return f, pull(torch.ones_like(f))[0]


def gradient_of(objective: Function) -> Function:
    """The gradient as a function."""
    return lambda z: value_and_gradient(objective, z)[1]


@dataclass(frozen=True, kw_only=True)
class LBFGS(IterativeSolver):
    """Limited-memory BFGS with a weak-Wolfe bisection search; the default for :func:`argmin`.

    Every element runs its own line search: one step is one trial, so no element waits for another. Stops at
    ``||grad|| <= atol + rtol * curvature * ||z||``, the curvature being that along the last step, if it was short.
    Events up to 64 numbers end with at most two Newton steps, kept where they reduce the gradient.

    Args:
        history: Number of remembered steps.

    Source: J. Nocedal, Updating quasi-Newton matrices with limited storage, 1980; line search: A. Lewis, M. Overton,
    Nonsmooth optimization via quasi-Newton methods, 2013, algorithm 2.6.
    Departure: near the rounding level of the objective the sufficient decrease is judged by slopes (W. Hager, H. Zhang,
    2005).
    """

    max_steps: int = 500
    history: int = 8

    finds: ClassVar[str] = "minimum"
    floors: ClassVar[bool] = False  # the gradient at a steep start says nothing of the one at the minimum

    def start(self, function: Function, z: Tensor) -> Any:
        """Steepest descent with a first trial as long as the point is far from zero."""
        f, g = value_and_gradient(function, z)
        memory = z.new_zeros(*z.shape[:-1], self.history, z.shape[-1])
        norm = size(g.detach())
        first = size(z).clamp_min(1.0) / torch.where(norm > 0, norm, 1)
        zero = torch.zeros_like(f)
        return _State(
            f, g, -g, first, zero, zero + math.inf, memory, memory, memory[..., 0], zero, zero + math.inf, size(z)
        )  # fmt: skip

    def step(self, function: Function, z: Tensor, state: Any, k: int) -> Step:
        """One trial of the line search, and a new direction where it is accepted."""
        s: _State = state
        trial = z + s.t.unsqueeze(-1) * s.p
        f, g = value_and_gradient(function, trial)
        slope, slope_trial = (s.g * s.p).sum(-1), (g * s.p).sum(-1)
        # f may be the small difference of large terms, whose rounding it does not show; slopes decide below
        curved = torch.where(torch.isfinite(s.stiffness), s.stiffness, 0) * size(z.detach()).square()
        noise = torch.finfo(z.dtype).eps ** 0.5 * torch.maximum(s.f.abs(), curved)
        decrease = (f <= s.f + 1e-4 * s.t * slope) | ((f <= s.f + noise) & (slope_trial <= -0.9998 * slope))
        accept = decrease & (slope_trial >= 0.9 * slope)
        upper = torch.where(decrease, s.upper, s.t)
        lower = torch.where(decrease & ~accept, s.t, s.lower)
        # while it goes down without an end, ever faster: an objective without a bottom reaches minus infinity in time
        longer = s.t * torch.where(s.lower > 0, 10.0, 2.0).to(z.dtype)
        # before any curvature is known a trial may be too long by many orders: then where the slopes at its ends aim
        between = s.t * (slope / (slope - slope_trial)).detach()
        visible = 16 * torch.finfo(z.dtype).eps * size(z.detach()) / size(s.p.detach())  # not lost in rounding
        between = torch.maximum(between, visible)
        aimed = (s.rho == 0).all(-1) & (slope_trial > 0) & (between > lower) & (between < (lower + upper) / 2)
        retry = torch.where(torch.isinf(upper), longer, torch.where(aimed, between, (lower + upper) / 2))

        pair_s, pair_y = s.t.unsqueeze(-1) * s.p, g - s.g
        product = (pair_s * pair_y).sum(-1)
        usable = accept & (product > 0)
        S, Y = _push(s.S, pair_s, usable), _push(s.Y, pair_y, usable)
        inverse = 1 / torch.where(usable, product, 1)
        rho = _push(s.rho.unsqueeze(-1), inverse.unsqueeze(-1), usable).squeeze(-1)
        length = size(pair_s.detach())
        # curvature is that of the neighbourhood only where the pair is: an accepted step, or a short rejected one
        local = usable | (torch.isfinite(f) & (length <= 0.01 * size(z.detach())))
        stiffness = torch.where(local, size(pair_y.detach()) / torch.where(length > 0, length, 1), s.stiffness)
        moved = torch.where(local, length, torch.where(accept, length, s.moved))
        keep = accept.unsqueeze(-1)
        z_next, g_next, f_next = torch.where(keep, trial, z), torch.where(keep, g, s.g), torch.where(accept, f, s.f)
        p = torch.where(keep, -_two_loops(g_next, S, Y, rho), s.p)
        p = torch.where(((p * g_next).sum(-1) < 0).unsqueeze(-1), p, -g_next)
        travel = torch.maximum(s.travel, torch.maximum(size(z_next.detach()), torch.where(usable, length, 0)))
        # a long step says nothing of the curvature where it ended; rounding is that of the numbers passed on the way
        short = moved <= 0.01 * travel
        here = torch.where(short, stiffness, 0)
        rounding = 4 * torch.finfo(z.dtype).eps / (default_rtol(self.rtol, z.dtype) or 1)
        scale = here * (size(z_next.detach()) + rounding * travel)
        stuck = ~accept & (trial == z).all(-1)
        # down all the way to where numbers end
        far = s.t * size(s.p.detach()) > torch.finfo(z.dtype).max ** 0.4
        unbounded = torch.isneginf(f) | (torch.isnan(f) & torch.isinf(s.upper) & far)
        status = torch.where(stuck, int(Status.MAX_STEPS), torch.where(unbounded, int(Status.UNBOUNDED), 0))
        new = _State(
            f_next, g_next, p,
            torch.where(accept, 1.0, retry), torch.where(accept, 0.0, lower), torch.where(accept, math.inf, upper),
            S, Y, rho, stiffness, moved, travel,
        )  # fmt: skip
        # a quasi-Newton step below the rounding of the numbers on the way: nothing is left to do
        rounded = short & (size(p.detach()) <= 8 * torch.finfo(z.dtype).eps * travel)
        error = torch.where(rounded, 0, size(g_next.detach()))
        return Step(z_next, new, z_next, error, scale, status)

    def solve(self, function: Function, z: Tensor) -> tuple[Tensor, Info]:
        """Runs to the tolerance, then sharpens small events."""
        z, info = iterate(self, function, z)
        if self.check_every is None:
            return z, info
        return polish(gradient_of(function), z, info, default_rtol(self.rtol, z.dtype))


def _push(memory: Tensor, new: Tensor, where: Tensor) -> Tensor:
    """The memory with a new last row, for the elements in `where`."""
    shifted = torch.cat([memory[..., 1:, :], new.unsqueeze(-2)], -2)
    return torch.where(where[..., None, None], shifted, memory)


def _two_loops(g: Tensor, S: Tensor, Y: Tensor, rho: Tensor) -> Tensor:
    """``H g`` (Nocedal 1980); empty slots have rho = 0 and drop out."""
    q, alphas = g, []
    for i in reversed(range(S.shape[-2])):
        alpha = rho[..., i] * (S[..., i, :] * q).sum(-1)
        q = q - alpha.unsqueeze(-1) * Y[..., i, :]
        alphas.append(alpha)
    newest = (Y[..., -1, :] ** 2).sum(-1) * rho[..., -1]
    q = q / torch.where(newest > 0, newest, 1).unsqueeze(-1)
    for i, alpha in enumerate(reversed(alphas)):
        beta = rho[..., i] * (Y[..., i, :] * q).sum(-1)
        q = q + (alpha - beta).unsqueeze(-1) * S[..., i, :]
    return q
