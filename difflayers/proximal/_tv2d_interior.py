r"""Isotropic total variation of an image: an interior-point method comes near, Newton's method on the pieces finishes.

.. math:: \min_z \tfrac12 \|z - x\|^2 + \sum_i b_i \tau_i \quad \text{s.t.} \quad \tau_i \ge \|(Dz)_i\|

is a problem over one small second-order cone a pixel, with the dual cone vectors :math:`(b_i, -p_i)`, where the flow p
gives :math:`z = x - D^T p`. Every step of the interior-point method is one linear system on the pixel grid.

Its iterates tell the flat pixels, :math:`(Dz)_i = 0`, from the others, and with these known the rest is smooth, see
:mod:`difflayers.proximal._tv2d_pieces`.

L. Vandenberghe, The CVXOPT linear and quadratic cone program solvers, 2010 (steps 1 to 6 of section 7, Nesterov-Todd
scaling of section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._solution import Info, Status

from ._grid_system import GridSystem, difference, divergence
from ._tv2d_pieces import Candidate, existing, finish, length, times

NEAR = 1e-6  # duality gap, relative to the energy of x, at which flat pixels are told from the others first
AGAIN = 1e-3  # by how much the gap has to fall for another attempt
END = 1e-15  # where the gap is rounding


@dataclass(frozen=True)
class TV2DInteriorPoint:
    """An interior-point method, finished by Newton's method on the pieces.

    Args:
        rtol: Distance to the solution, relative to the distance of x from its mean, that is proved to be left. None: as
            little as rounding allows; then up to 1e-6 (float32: 1e-4) count as converged.
        max_steps: Largest number of interior-point steps; between 5 and 40 are needed.
    """

    rtol: float | None = None
    max_steps: int = 60

    def __post_init__(self) -> None:
        if self.rtol is not None and not self.rtol > 0:
            raise ValueError(f"rtol: expected more than 0, got {self.rtol}")
        if self.max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1, got {self.max_steps}")


# ------------------------------------------------------------------------------------------------ the cone of a pixel


class Cone(NamedTuple):
    """A vector ``(first, rest)`` for every pixel with ``first = |rest| + slack``; the slack is kept, not computed."""

    rest: Tensor
    slack: Tensor

    @property
    def vector(self) -> Tensor:
        """``(B, 3, H, W)``."""
        return torch.cat([(length(self.rest) + self.slack).unsqueeze(1), self.rest], 1)

    @property
    def det(self) -> Tensor:
        """``first^2 - |rest|^2``."""
        return self.slack * (self.slack + 2 * length(self.rest))

    def moved(self, move: Tensor) -> Cone:
        """Along ``(B, 3, H, W)``."""
        first, rest = move[:, 0], move[:, 1:]
        then = self.rest + rest
        total = length(self.rest) + length(then)
        longer = ((2 * self.rest + rest) * rest).sum(1) / torch.where(total > 0, total, 1)
        return Cone(then, self.slack + first - longer)

    def reach(self, move: Tensor) -> Tensor:
        """The longest part of a move, up to 1, that keeps every pixel of an element in its cone: ``(B, 1, 1, 1)``."""
        u, c = self.vector, self.det
        a = move[:, 0].square() - move[:, 1:].square().sum(1)
        b = u[:, 0] * move[:, 0] - (u[:, 1:] * move[:, 1:]).sum(1)
        root = (b * b - a * c).clamp_min(0).sqrt()
        # the smallest positive root of a s^2 + 2 b s + c, without cancellation
        part = torch.where(b < 0, c / (root - b), torch.where(a < 0, (-b - root) / a, torch.inf))
        return part.amin((-1, -2), keepdim=True).clamp_max(1).unsqueeze(1)


def inner(s: Cone, y: Cone) -> Tensor:
    """``s^T y`` of every pixel, which is small where both are near the border of their cones."""
    r, q = length(s.rest), length(y.rest)
    unit_s, unit_y = (c.rest / torch.where(n > 0, n, 1).unsqueeze(1) for c, n in ((s, r), (y, q)))
    angle = r * q * (unit_s + unit_y).square().sum(1) / 2
    return s.slack * y.slack + s.slack * q + r * y.slack + angle


def _product(u: Tensor, v: Tensor) -> Tensor:
    """The Jordan product."""
    return torch.cat([(u * v).sum(1, keepdim=True), u[:, :1] * v[:, 1:] + v[:, :1] * u[:, 1:]], 1)


class _Scaling:
    """The Nesterov-Todd scaling W of the cone vectors s and y: symmetric, ``W y = W^-1 s = scaled``."""

    def __init__(self, s: Cone, y: Cone) -> None:
        det_s, det_y = s.det.unsqueeze(1), y.det.unsqueeze(1)
        unit_s, unit_y = s.vector / det_s.sqrt(), y.vector / det_y.sqrt()
        self.det = (det_s * det_y).sqrt()
        gamma = ((1 + inner(s, y).unsqueeze(1) / self.det) / 2).sqrt()
        self.w = (unit_s + torch.cat([unit_y[:, :1], -unit_y[:, 1:]], 1)) / (2 * gamma)
        self.eta2 = (det_s / det_y).sqrt()
        (s0, s1), (y0, y1) = ((u[:, :1], u[:, 1:]) for u in (unit_s, unit_y))
        rest = ((gamma + y0) * s1 + (gamma + s0) * y1) / (s0 + y0 + 2 * gamma)
        self.scaled = self.det.sqrt() * torch.cat([gamma, rest], 1)

    def apply(self, u: Tensor, sign: float = 1.0) -> Tensor:
        """``W u``, or ``W^-1 u`` for sign -1."""
        w0, w1 = self.w[:, :1], self.w[:, 1:]
        inner = (w1 * u[:, 1:]).sum(1, keepdim=True)
        out = torch.cat([w0 * u[:, :1] + sign * inner, sign * u[:, :1] * w1 + u[:, 1:] + w1 * inner / (1 + w0)], 1)
        eta = self.eta2.sqrt()
        return out * eta if sign > 0 else out / eta

    def divide(self, r: Tensor) -> Tensor:
        """The vector v with ``scaled o v = r``."""
        u = self.scaled
        first = (u[:, :1] * r[:, :1] - (u[:, 1:] * r[:, 1:]).sum(1, keepdim=True)) / self.det
        return torch.cat([first, (r[:, 1:] - first * u[:, 1:]) / u[:, :1]], 1)

    def corner(self) -> tuple[Tensor, Tensor]:
        """Of ``H = W^-2``: the entry (0, 0), and the column below it."""
        w0, w1 = self.w[:, :1], self.w[:, 1:]
        return (2 * w0 * w0 - 1) / self.eta2, -2 * w0 * w1 / self.eta2

    def reduced(self) -> Tensor:
        """``H_11 - H_10 H_01 / H_00``, entries as :class:`GridSystem` takes them."""
        w0, (a, b) = self.w[:, 0], self.w[:, 1:].unbind(1)
        k = 2 / (2 * w0 * w0 - 1)
        return torch.stack([1 - k * a * a, 1 - k * b * b, -k * a * b], 1) / self.eta2


# ------------------------------------------------------------------------------------------------------- the method


def minimise(x: Tensor, bound: Tensor, goal: Tensor, accepted: Tensor, max_steps: int) -> tuple[Tensor, Info]:
    """The solution for images ``(B, H, W)``, and the report of every element.

    Args:
        x: Images.
        bound: ``(B, H, W)``, above 0.
        goal: ``(B)`` distance to the solution to aim at.
        accepted: ``(B)`` distance that counts as converged, where rounding does not allow more.
        max_steps: Largest number of interior-point steps.
    """
    spread = x - x.mean((-1, -2), keepdim=True)
    energy = spread.square().sum((-1, -2))
    busy = energy.sqrt() > goal
    unit = torch.where(busy, spread.abs().amax((-1, -2)), 1)[:, None, None]
    # no flow is larger than all that there is to move
    b = torch.minimum(bound, 2 * spread.abs().sum((-1, -2), keepdim=True).clamp_min(unit))
    z, d = x, difference(x)
    s, y = Cone(d, unit.expand_as(x)), Cone(torch.zeros_like(d), b)
    best = Candidate(x - spread, torch.where(busy, torch.inf, energy.sqrt()))
    steps = torch.zeros_like(busy, dtype=torch.int64)
    attempt, before = NEAR * energy, torch.full_like(energy, torch.inf)
    for step in range(1, max_steps + 1):
        if not bool(busy.any()):
            break
        new_z, *new = _step(x, z, s, y)
        sound = busy & torch.stack([(c.slack > 0).flatten(1).all(-1) for c in new]).all(0)
        steps = steps + busy
        z = _where(sound, new_z, z)
        s, y = (
            Cone(*(_where(sound, *pair) for pair in zip(*cones, strict=True)))
            for cones in zip(new, (s, y), strict=True)
        )
        gap = inner(s, y).sum((-1, -2))
        last = ~sound | (gap > 0.95 * before) | (gap <= END * energy) | (step == max_steps)
        before = gap
        now = busy & (last | (gap <= attempt))
        if not bool(now.any()):
            continue
        candidate = _attempt(x, b, z, s, y, unit, goal)
        better = now & (candidate.error < best.error)
        best = Candidate(*(_where(better, a, b) for a, b in zip(candidate, best, strict=True)))
        attempt = torch.where(now, AGAIN * gap, attempt)
        busy = busy & (best.error > goal) & ~last
    status = torch.where(best.error > accepted, int(Status.MAX_STEPS), int(Status.CONVERGED))
    return best.z, Info(status, steps, best.error)


def _attempt(x: Tensor, b: Tensor, z: Tensor, s: Cone, y: Cone, unit: Tensor, goal: Tensor) -> Candidate:
    """Tells flat pixels by what is larger, the room of the flow or the jump, and finishes."""
    candidate = finish(x, b, z, -y.rest, y.slack, y.slack / b > length(s.rest) / unit, goal)
    d = difference(z)
    rounding = 4 * torch.finfo(x.dtype).eps * (b * length(d))
    gap = (b * length(d) + (y.rest * d).sum(1) + rounding + (x - z + divergence(y.rest)).square() / 2).sum((-1, -2))
    # at worst as far as the interior point can be, and from there to it
    around = torch.linalg.vector_norm(candidate.z - z, dim=(-1, -2)) + (2 * gap).clamp_min(0).sqrt()
    return Candidate(candidate.z, torch.minimum(candidate.error, around))


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """For each element."""
    return torch.where(mask[(...,) + (None,) * (a.ndim - 1)], a, b)


def _step(x: Tensor, z: Tensor, s: Cone, y: Cone) -> tuple[Tensor, Cone, Cone]:
    """Predictor and corrector: image, differences and flow after one step."""
    scaling = _Scaling(s, y)
    M = existing(scaling.reduced())
    system = GridSystem(M)
    top, column = scaling.corner()
    off = x - z + divergence(y.rest)

    def solve(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The moves of z, s and y for which ``dy + H ds = r`` and the image goes with the flow."""
        rest = column * r[:, :1] / top - r[:, 1:]
        dz = system.solve(off - divergence(rest))
        d = difference(dz)
        first = (r[:, :1] - (column * d).sum(1, keepdim=True)) / top
        dp = times(M, d) + rest
        return dz, torch.cat([first, d], 1), torch.cat([torch.zeros_like(first), -dp], 1)

    _, ds, dy = solve(-y.vector)
    reach = torch.minimum(s.reach(ds), y.reach(dy))
    target = -_product(scaling.scaled, scaling.scaled) - _product(scaling.apply(ds, -1), scaling.apply(dy))
    target[:, :1] += (1 - reach).pow(3) * inner(s, y).unsqueeze(1).mean((-1, -2), keepdim=True)
    dz, ds, dy = solve(scaling.apply(scaling.divide(target), -1))
    reach = 0.99 * torch.minimum(s.reach(ds), y.reach(dy))
    return z + reach.squeeze(1) * dz, s.moved(reach * ds), y.moved(reach * dy)
