r"""Isotropic total variation with the flat pixels known: a smooth problem, solved by Newton's method and proved.

.. math:: \min_z \tfrac12 \|z - x\|^2 + \sum_i b_i \|(Dz)_i\| \quad \text{s.t.} \quad (Dz)_i = 0 \text{ where i is flat}

Its second derivative on the images that are constant where they must be is :math:`I + D^T M D` with
:math:`M_i = b_i (I - \hat d_i \hat d_i^T) / \|d_i\|` for :math:`d = Dz`, a direct solve away. That the flat pixels were
the right ones is proved by a flow, see :mod:`difflayers.proximal._flow_solver`: :math:`b_i \hat d_i` where pixels are
not flat, and of length at most :math:`b_i` where they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._flow_solver import Edges
from ._grid_system import GridSystem, difference, divergence
from ._partition import block_means

STIFF = 1e6  # what ties flat pixels together in the factorised system; conjugate gradients do the rest
NEWTON_STEPS = 10
HALVINGS = 30
ROUNDING = 1e-14  # relative change of the objective that counts as none
SLACK = 1e-7  # smallest weight of a flat pixel's room, relative to its bound


class Candidate(NamedTuple):
    """An image that is right if its flat pixels are, and how far from the solution it can be."""

    z: Tensor
    error: Tensor


def pixel_edges(height: int, width: int, device: torch.device) -> Edges:
    """The edges of the pixel grid: all to the right, then all down."""
    index = torch.arange(height * width, device=device).reshape(height, width)
    tail = torch.cat([index[:, :-1].flatten(), index[:-1].flatten()])
    head = torch.cat([index[:, 1:].flatten(), index[1:].flatten()])
    return Edges(tail, head, height * width)


def length(v: Tensor) -> Tensor:
    """Of the vector at every pixel."""
    return v.square().sum(-3).sqrt()


def times(M: Tensor, v: Tensor) -> Tensor:
    """The matrix of every pixel times its vector."""
    (right, down, both), (a, b) = M.unbind(1), v.unbind(1)
    return torch.stack([right * a + both * b, both * a + down * b], 1)


def existing(M: Tensor) -> Tensor:
    """Without the differences that do not exist."""
    M = M.clone()
    M[:, 0::2, :, -1] = 0
    M[:, 1:, -1, :] = 0
    return M


class Pieces:
    """Images that are constant on blocks of pixels.

    Args:
        blocks: ``(B, H, W)`` numbers of blocks.
    """

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks
        self.flat = ~(difference(blocks) != 0).any(1)

    @staticmethod
    def joined_by(flat: Tensor) -> Pieces:
        """The blocks that flat pixels ``(B, H, W)`` join; a pixel whose neighbours are joined elsewhere is flat too."""
        edges = pixel_edges(flat.shape[-2], flat.shape[-1], flat.device)
        open = torch.cat([flat[..., :-1].flatten(1), flat[:, :-1].flatten(1)], -1)
        return Pieces(edges.components(open).reshape(flat.shape))

    def mean(self, v: Tensor) -> Tensor:
        """The orthogonal projection."""
        return block_means(v.flatten(-2), self.blocks.flatten(-2)).reshape(v.shape)


def pull(b: Tensor, d: Tensor, flat: Tensor) -> Tensor:
    """``b d / |d|`` where pixels are not flat, plain torch with all derivatives."""
    d = torch.where(flat.unsqueeze(-3), 1, d)
    return torch.where(flat.unsqueeze(-3), 0, (torch.where(flat, 0, b) / length(d)).unsqueeze(-3) * d)


def curvature(b: Tensor, d: Tensor, flat: Tensor) -> Tensor:
    """The matrices M, entries as :class:`GridSystem` takes them; zero where pixels are flat."""
    r = torch.where(flat, 1, length(d))
    right, down = (d / r.unsqueeze(1)).unbind(1)
    M = torch.stack([1 - right * right, 1 - down * down, -right * down], 1) * (b / r).unsqueeze(1)
    return existing(torch.where(flat.unsqueeze(1), 0, M))


def solve_on_pieces(pieces: Pieces, M: Tensor, r: Tensor, max_steps: int = 50) -> Tensor:
    """``u`` constant on the pieces with ``mean(u + D^T M D u) = mean(r)``.

    Conjugate gradients, preconditioned by the system in which flat pixels are tied together as by stiff springs: a few
    steps.
    """
    tied = torch.zeros_like(M)
    tied[:, :2] = STIFF
    system = GridSystem(existing(torch.where(pieces.flat.unsqueeze(1), tied, M)))
    r = pieces.mean(r)
    u = torch.zeros_like(r)
    enough = 1e-28 * _square(r)
    towards = pieces.mean(system.solve(r))
    direction, product = towards, (r * towards).sum((-1, -2), keepdim=True)
    for _ in range(max_steps):
        busy = (_square(r) > enough) & (product > 0)
        if not bool(busy.any()):
            break
        image = pieces.mean(direction + divergence(times(M, difference(direction))))
        step = torch.where(busy, product / (direction * image).sum((-1, -2), keepdim=True), 0)
        u, r = u + step * direction, r - step * image
        towards = pieces.mean(system.solve(r))
        after = (r * towards).sum((-1, -2), keepdim=True)
        direction = torch.where(busy, towards + after / product * direction, direction)
        product = torch.where(busy, after, product)
    return u


def _square(v: Tensor) -> Tensor:
    return v.square().sum((-1, -2), keepdim=True)


def finish(x: Tensor, b: Tensor, z: Tensor, p: Tensor, room: Tensor, flat: Tensor, goal: Tensor) -> Candidate:
    """Newton's method with the `flat` pixels fixed, and a flow that proves how good the result is.

    Args:
        x: ``(B, H, W)`` images.
        b: ``(B, H, W)`` bounds.
        z: ``(B, H, W)`` near the solution.
        p: ``(B, 2, H, W)`` an admissible flow near that of the solution.
        room: ``(B, H, W)`` what is left of the bounds, ``b - |p|``.
        flat: ``(B, H, W)`` pixels taken to be flat.
        goal: ``(B)`` distance to the solution that is good enough.
    """
    pieces = Pieces.joined_by(flat)
    flat = pieces.flat
    z = _newton(x, b, pieces.mean(z), pieces, goal)
    d = difference(z)
    gap = _square(x - z - divergence(p)) / 2 + (b * length(d) - (p * d).sum(1)).sum((-1, -2), keepdim=True)
    # what the pieces need, mostly through pixels with room for it
    flow = torch.where(flat.unsqueeze(1), p, pull(b, d, flat))
    room = torch.where(flat, (room / b).clamp_min(SLACK), 0)
    loose = existing(torch.stack([room, room, torch.zeros_like(room)], 1))
    system = GridSystem(loose, 1e-3 * SLACK)
    for _ in range(3):
        flow = flow + times(loose, difference(system.solve(x - z - divergence(flow))))
    flow = flow / (length(flow) / b).clamp_min(1).unsqueeze(1)
    proved = _square(x - z - divergence(flow))
    return Candidate(z, torch.minimum(proved, (2 * gap).clamp_min(0)).sqrt().flatten())


def _newton(x: Tensor, b: Tensor, z: Tensor, pieces: Pieces, goal: Tensor) -> Tensor:
    flat = pieces.flat

    def objective(z: Tensor) -> Tensor:
        return (_square(z - x) / 2) + (b * length(difference(z))).sum((-1, -2), keepdim=True)

    now, enough = objective(z), goal[:, None, None] / 100
    before = torch.full_like(now, torch.inf)
    active = torch.ones_like(now, dtype=torch.bool)
    for _ in range(NEWTON_STEPS):
        d = difference(z)
        move = solve_on_pieces(pieces, curvature(b, d, flat), x - z - divergence(pull(b, d, flat)))
        for _ in range(HALVINGS):
            then = objective(z + move)
            worse = ~(then <= now + ROUNDING * now.abs())
            if not bool(worse.any()):
                break
            move = torch.where(worse, move / 2, move)
        takes = active & ~worse
        z, now = torch.where(takes, z + move, z), torch.where(takes, then, now)
        moved = _square(move).sqrt()
        # where steps do not shrink, the flat pixels are wrong ones, and it is no use to go on
        active = takes & (moved > enough) & (moved < before)
        if not bool(active.any()):
            break
        before = moved / 2
    return z
