r"""Linear systems on a pixel grid, solved directly: odd-even reduction of the rows of pixels.

.. math:: (\rho I + D^T M D) z = r, \qquad (Dz)_{ij} = (z_{i,j+1} - z_{ij}, \; z_{i+1,j} - z_{ij})

with a symmetric 2 x 2 matrix for each pixel. In rows of pixels the matrix is block tridiagonal. Every second row is
eliminated, all at once, which leaves a system of the same kind with half the rows; after log2 of their number one is
left. That is Cholesky's method in another order, as stable, and a few large batched products: G. Golub, C. Van Loan,
Matrix Computations, 4th edition, 2013, section 4.5.4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

SMALL = 64  # pixels of an image that is one row


def difference(z: Tensor) -> Tensor:
    """``D z`` of an image ``(..., H, W)``: ``(..., 2, H, W)``, zero where there is no neighbour."""
    return torch.stack([pad(z.diff(dim=-1), (0, 1)), pad(z.diff(dim=-2), (0, 0, 0, 1))], -3)


def divergence(p: Tensor) -> Tensor:
    """``D^T p``, of ``(..., 2, H, W)`` that is zero where there is no neighbour: ``(..., H, W)``."""
    right, down = p.unbind(-3)
    right, down = right[..., :-1], down[..., :-1, :]
    return pad(right, (1, 0)) - pad(right, (0, 1)) + pad(down, (0, 0, 1, 0)) - pad(down, (0, 0, 0, 1))


class Elimination(NamedTuple):
    """One round: the Cholesky factors of the rows that go, and what couples them to the rows above and below."""

    factor: Tensor
    above: Tensor
    below: Tensor


class GridSystem:
    """The system factorised.

    Args:
        M: ``(B, 3, H, W)``: entries (right, right), (down, down), (right, down) of the matrix of each pixel. Those of
            differences that do not exist must be zero.
        rho: More than 0.
    """

    def __init__(self, M: Tensor, rho: float = 1.0) -> None:
        self.transposed = M.shape[-1] > M.shape[-2]  # the blocks are those of the shorter side
        if self.transposed:
            M = M[:, [1, 0, 2]].mT
        if M.shape[-2:].numel() <= SMALL:
            blocks, below = _dense(M, rho).unsqueeze(1), M.new_empty(0)
        else:
            blocks, below = _rows(M, rho)
        self.rounds, self.last = _factorise(blocks, below)

    def solve(self, r: Tensor) -> Tensor:
        """The solution for an image ``(B, H, W)``."""
        r = r.mT if self.transposed else r
        z = _solve(self.rounds, self.last, r.reshape(r.shape[0], -1, self.last.shape[-1], 1)).reshape(r.shape)
        return z.mT if self.transposed else z


def _dense(M: Tensor, rho: float) -> Tensor:
    """The matrix of a small image, ``(B, HW, HW)``."""
    height, width = M.shape[-2:]
    eye = torch.eye(height * width, dtype=M.dtype, device=M.device)
    right, down = difference(eye.reshape(-1, height, width)).flatten(-2).unbind(1)  # D, transposed
    a, b, c = M.flatten(-2).unsqueeze(-2).unbind(1)
    return rho * eye + (right * a + down * c) @ right.mT + (right * c + down * b) @ down.mT


def _rows(M: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """The blocks on the diagonal ``(B, H, W, W)`` and to the right of it ``(B, H - 1, W, W)``."""
    right, down, both = M.unbind(1)
    diagonal = rho + right + down + 2 * both
    diagonal = diagonal + pad(right[..., :-1], (1, 0)) + pad(down[..., :-1, :], (0, 0, 1, 0))
    beside = torch.diag_embed(-(right + both)[..., :-1], 1)
    blocks = torch.diag_embed(diagonal) + beside + beside.mT
    below = torch.diag_embed(-(down + both)[:, :-1]) + torch.diag_embed(both[:, :-1, :-1], -1)
    return blocks, below


def _factorise(blocks: Tensor, below: Tensor) -> tuple[list[Elimination], Tensor]:
    rounds = []
    while blocks.shape[1] > 1:
        keep = (blocks.shape[1] + 1) // 2
        factor = torch.linalg.cholesky_ex(blocks[:, 1::2]).L
        above, beneath = below[:, 0::2].mT, below[:, 1::2]
        beneath = _rows_to(beneath, factor.shape[1])  # the last row may have none beneath
        above, beneath = torch.linalg.solve_triangular(factor, torch.cat([above, beneath], -1), upper=False).chunk(
            2, -1
        )
        rounds.append(Elimination(factor, above, beneath))
        blocks = blocks[:, 0::2] - _next_to(above.mT @ above, beneath.mT @ beneath, keep)
        below = -(above.mT @ beneath)[:, : keep - 1]
    return rounds, torch.linalg.cholesky_ex(blocks).L


def _solve(rounds: list[Elimination], last: Tensor, r: Tensor) -> Tensor:
    gone = []
    for factor, above, beneath in rounds:
        y = torch.linalg.solve_triangular(factor, r[:, 1::2], upper=False)
        gone.append(y)
        r = r[:, 0::2]
        r = r - _next_to(above.mT @ y, beneath.mT @ y, r.shape[1])
    z = torch.cholesky_solve(r, last)
    for (factor, above, beneath), y in zip(reversed(rounds), reversed(gone), strict=True):
        k = y.shape[1]
        y = y - above @ z[:, :k] - beneath @ _rows_to(z[:, 1:], k)
        y = torch.linalg.solve_triangular(factor.mT, y, upper=True)
        both = torch.stack([z[:, :k], y], 2).flatten(1, 2)
        z = torch.cat([both, z[:, k:]], 1)
    return z


def _rows_to(t: Tensor, k: int) -> Tensor:
    """Filled up to k rows with zeros."""
    return pad(t, (0, 0, 0, 0, 0, k - t.shape[1]))


def _next_to(to_above: Tensor, to_beneath: Tensor, keep: int) -> Tensor:
    """What the rows that go add to the `keep` rows that stay: each to the one above and the one beneath."""
    return _rows_to(to_above, keep) + pad(to_beneath, (0, 0, 0, 0, 1, 0))[:, :keep]
