r"""Newton's method on the active set: the last digits of neurons and multipliers, with kinks exactly on their points.

With the zero blocks and the kinks :math:`\mathcal T = \{(i, k): x_k^T p_i = 0\}` fixed, neurons move within the null
spaces of their kinks. In orthonormal bases :math:`N_i` of those, stationarity :math:`N_i^T (\beta h_i - \sigma_i Z_i^T
\nu) = 0`, :math:`\nu = -S\, l'(F p)`, has few unknowns, in minimal networks no more than points, and the Newton matrix
:math:`N^T (F^T S\, l'' F + \beta\, \mathrm{blkdiag}((I - h_i h_i^T) / \|p_i\|)) N`; a damping along the neurons keeps
it regular where the network is not minimal. A. Mishkin, M. Pilanci, Optimal Sets and Solution Paths of ReLU Networks,
2023, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._cone_certificate import optimality_error
from ._cone_newton import factor, solve_factor
from ._cone_problem import ConeProblem, or_one

_ROUNDS, _STEPS, _ENOUGH, _DAMPING, _RANK = 4, 3, 1e-12, 1e-9, 1e-10


def polish(unit: ConeProblem, p: Tensor, rho: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Neurons, multipliers and their error, per element: polished where that is less than `error`, or those that came.

    `p` has exact zeros; everything is in units of one. A round in which rows of the set prove wrong, by a multiplier
    below 0 or a point on the wrong side, is followed by another without or with them.
    """
    length = or_one(torch.linalg.vector_norm(unit.X, dim=-1))[..., None, :]
    rows = unit.X / length.mT
    norm = torch.linalg.vector_norm(p, dim=-1)
    active, binding = (norm > 0)[..., None], unit.side != 0
    # the room at a point and its multiplier, both of order one or of order of the error
    kinks = (
        active
        & binding
        & (unit.cones(p) / length / or_one(norm)[..., None] < rho * length / unit.beta[..., None, None])
    )
    best, q = (p, rho, error), p
    for _ in range(_ROUNDS):
        q, raw = _round(unit, rows, q, torch.where(active, torch.where(kinks, rho, 0), rho), kinks, active)
        multipliers = raw.clamp(min=0)
        new = optimality_error(unit, q, multipliers)
        better = new < best[2]
        wide = better[..., None, None]
        best = torch.where(wide, q, best[0]), torch.where(wide, multipliers, best[1]), torch.where(better, new, best[2])
        if not bool((best[2] > _ENOUGH).any()):
            break
        outside = unit.cones(q) / length < -_RANK * torch.linalg.vector_norm(q, dim=-1, keepdim=True)
        kinks = active & binding & torch.where(kinks, raw > 0, outside)
    return best


def _round(
    unit: ConeProblem, rows: Tensor, p: Tensor, rho: Tensor, kinks: Tensor, active: Tensor
) -> tuple[Tensor, Tensor]:
    """Newton's method on one active set: neurons, and multipliers of any sign, the nearest to those given."""
    marked, length = kinks.to(p.dtype), or_one(torch.linalg.vector_norm(unit.X, dim=-1))[..., None, :]
    inner = (marked[..., None, :] * rows.mT[..., None, :, :]) @ rows[..., None, :, :]
    lost = ~torch.isfinite(inner).all(-1).all(-1)[..., None, None]
    values, vectors = torch.linalg.eigh(torch.where(lost, 0, inner))
    free = values <= _RANK * values[..., -1:].clamp(min=1)
    pseudo = (vectors * torch.where(free, 0, 1 / torch.where(free, 1, values))[..., None, :]) @ vectors.mT
    basis = _Basis(unit, vectors, free & active)
    q = basis.project(p)
    for _ in range(_STEPS):
        q = basis.step(q)
    gradient = unit.beta[..., None, None] * _direction(q) + unit.fit_adjoint(unit.s * unit.slope(q))
    rest = torch.where(active, gradient - unit.cones_adjoint(rho), 0)
    change = unit.side * ((pseudo @ rest[..., None]).squeeze(-1) @ rows.mT) * marked / length
    return q, rho + change


def _direction(p: Tensor) -> Tensor:
    return p / or_one(torch.linalg.vector_norm(p, dim=-1, keepdim=True))


class _Basis:
    """Orthonormal directions in which neurons may move, all blocks' in one list, padded to the longest of the batch.

    Args:
        unit: The problem.
        vectors: An orthonormal basis of every block, in columns, ``(*B, 2P, d, d)``.
        chosen: Which of them are directions, ``(*B, 2P, d)``.
    """

    def __init__(self, unit: ConeProblem, vectors: Tensor, chosen: Tensor) -> None:
        self.unit, d = unit, vectors.shape[-1]
        flat = chosen.flatten(-2)
        count = int(flat.sum(-1).max()) if flat.numel() else 0
        index = flat.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :count]
        self.real = flat.gather(-1, index)
        self.block = index // max(d, 1)  # (*B, r)
        self.b = vectors.mT.flatten(-3, -2).gather(-2, _wide(index, d)) * self.real[..., None].to(vectors.dtype)
        gates = unit.signed_gate.gather(-2, _wide(self.block, unit.X.shape[-2]))
        self.fits = gates * (self.b @ unit.X.mT)  # (*B, r, n)
        self.gram = None if unit.loss.curved else self._weighted(unit.s)
        self.same = self.block[..., :, None] == self.block[..., None, :]

    def _weighted(self, weight: Tensor) -> Tensor:
        R = self.fits * weight.sqrt()[..., None, :]
        return R @ R.mT

    def inner(self, p: Tensor) -> Tensor:
        """Coordinates, ``(*B, r)``."""
        return (self.b * p.gather(-2, _wide(self.block, p.shape[-1]))).sum(-1)

    def outer(self, c: Tensor) -> Tensor:
        """The neurons with these coordinates."""
        zero = self.b.new_zeros(self.unit.side.shape[:-1] + self.b.shape[-1:])
        return zero.scatter_add(-2, _wide(self.block, self.b.shape[-1]), c[..., None] * self.b)

    def project(self, p: Tensor) -> Tensor:
        """Where neurons leave the span, the nearest that do not."""
        return self.outer(self.inner(p))

    def step(self, p: Tensor) -> Tensor:
        """One Newton step; none where it is not finite."""
        unit, beta = self.unit, self.unit.beta[..., None]
        h = _direction(p)
        f = unit.fit(p)
        gradient = self.inner(beta[..., None] * h + unit.fit_adjoint(unit.s * unit.loss.slope(f, unit.y)))
        gram = self._weighted(unit.s * unit.loss.curvature(f, unit.y)) if self.gram is None else self.gram
        norm = torch.linalg.vector_norm(p, dim=-1).gather(-1, self.block)
        root = (beta / or_one(norm)).sqrt()
        along = root * self.inner(h)
        curvature = torch.where(self.same, along[..., :, None] * along[..., None, :] * (_DAMPING - 1), 0)
        matrix = gram + curvature + torch.diag_embed(torch.where(self.real, root * root, 1))
        step = self.outer(solve_factor(factor(matrix), torch.where(self.real, gradient, 0)))
        return torch.where(torch.isfinite(step).all(-1).all(-1)[..., None, None], p - step, p)


def _wide(index: Tensor, size: int) -> Tensor:
    return index[..., None].expand(*index.shape, size)
