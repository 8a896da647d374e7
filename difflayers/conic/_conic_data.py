"""The data of a conic program, scaled by powers of two for each element to numbers around 1.

``x = beta x', s = gamma beta s', y = (alpha / gamma) y'`` with the numbers of :class:`Scales`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from difflayers.linalg._system import harmless, times

VANISHED = 1e-2  # of a scaled program: what terms of an equation are at least, when its residual is judged


class Scales(NamedTuple):
    """Of the matrix, of the unknown, of the objective: one number an element."""

    gamma: Tensor
    beta: Tensor
    alpha: Tensor


def scales(q: Tensor, A: Tensor, b: Tensor, P: Tensor | None) -> Scales:
    """Those of a program with dense matrices."""
    diagonal = q.new_zeros(0) if P is None else P.diagonal(dim1=-2, dim2=-1)
    return sizes(q.detach(), A.detach().flatten(-2), b.detach(), diagonal.detach())


def sizes(q: Tensor, A: Tensor, b: Tensor, P: Tensor) -> Scales:
    """Powers of two that bring typical entries near 1; exactly 1 where they are not far from it.

    Args:
        q: ``(*batch, n)`` linear part.
        A: ``(*batch, entries)`` of the rows.
        b: ``(*batch, m)`` right-hand sides.
        P: ``(*batch, n)`` diagonal of the quadratic part.
    """
    gamma, size, curvature, slope = (_typical(v) for v in (A, b, P, q))
    # what the right-hand sides say of the size of a solution, and what the objective says: either may be off
    gamma = _power(gamma)
    bound = size / gamma
    free = torch.where((slope > 0) & (curvature > 0), slope / torch.where(curvature > 0, curvature, 1), bound)
    bound = torch.where(bound > 0, bound, free)
    beta = _power((bound * free).sqrt())
    return Scales(gamma, beta, _power(torch.where(slope > 0, slope, beta * curvature)))


def _typical(v: Tensor) -> Tensor:
    """Geometric mean of the entries that are not zero; 0 where there are none."""
    there = v != 0
    count = there.sum(-1)
    mean = torch.where(there, v, 1).abs().log().sum(-1) / count.clamp_min(1)
    return torch.where(count > 0, mean.exp(), 0)


def _power(size: Tensor) -> Tensor:
    near = (size > 1 / 64) & (size < 64) | (size == 0) | ~torch.isfinite(size)
    return torch.where(near, 1, torch.exp2(torch.round(torch.log2(torch.where(near, 1, size)))))


class Data(NamedTuple):
    """The scaled program; its quadratic part is ``ratio * P``, so that a P that all elements share stays one matrix."""

    q: Tensor
    A: Tensor
    b: Tensor
    P: Tensor | None
    ratio: Tensor

    @staticmethod
    def of(args: tuple[Tensor, ...]) -> Data:
        q, A, b, *rest = args
        gamma, beta, alpha = rest[-3:]
        b = b / (gamma * beta).unsqueeze(-1)
        return Data(q / alpha.unsqueeze(-1), A / gamma[..., None, None], b, rest[0] if rest[3:] else None, beta / alpha)

    def hessian(self, x: Tensor) -> Tensor:
        """The quadratic part times x."""
        return torch.zeros_like(x) if self.P is None else times(self.P, x) * self.ratio.unsqueeze(-1)

    def quadratic(self) -> Tensor:
        """The quadratic part; one matrix where it is the same for all elements. Reads data."""
        if self.P is None:
            return self.q.new_zeros(self.q.shape[-1], self.q.shape[-1])
        ratio = self.ratio[..., None, None]
        return self.P * (ratio[0] if self.P.ndim == 2 and len(ratio) and bool((ratio == ratio[0]).all()) else ratio)

    def pick(self, index: Tensor) -> Data:
        """Some elements of a batch of one dimension."""
        A, P = (M if M is None or M.ndim == 2 else M[index] for M in (self.A, self.P))
        assert A is not None
        return Data(self.q[index], A, self.b[index], P, self.ratio[index])


def flat(data: Data, batch: torch.Size) -> Data:
    """One batch dimension; none for matrices that all elements share."""

    def one(t: Tensor, ndim: int) -> Tensor:
        event = t.shape[t.ndim - ndim :]
        if ndim == 2 and all(size == 1 for size in t.shape[:-2]):
            return t.reshape(event)
        return t.expand((*batch, *event)).reshape((batch.numel(), *event))

    P = None if data.P is None else one(data.P, 2)
    return Data(one(data.q, 1), one(data.A, 2), one(data.b, 1), P, one(data.ratio, 0))


def sound(data: Data) -> tuple[Data, Tensor]:
    """``(B)`` elements without NaN and Inf; in the place of the others, one of them.

    A batch that keeps its shape keeps the bits of its results: the rounding of a product depends on its size.
    """
    ok = torch.isfinite(data.q).all(-1) & torch.isfinite(data.b).all(-1)
    for M in (data.A, data.P):
        if M is not None:
            ok = ok & torch.isfinite(M).flatten(-2).all(-1)
    if not bool(ok.all()):
        given = {name: t for name, t in data._asdict().items() if t is not None}
        ndims = [{"q": 1, "A": 2, "b": 1, "P": 2, "ratio": 0}[name] for name in given]
        data = data._replace(**dict(zip(given, harmless([*given.values()], ndims, ~ok), strict=True)))
    return data, ok
