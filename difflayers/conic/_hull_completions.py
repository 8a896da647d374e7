r"""Completions on convex hulls: the simplex, polytopes by their vertices, and the spectraplex.

A linear function on a hull is smallest at a generator. M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for
Conic Optimization, NeurIPS 2024, section 3.2; the spectraplex is the hull of :math:`v v^T` with unit vectors v.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from difflayers._solution import OnFailure
from difflayers.linalg._system import times
from difflayers.proximal._identify import identify
from difflayers.proximal._operands import Number, check_range, per_element
from difflayers.proximal._spectral import operate

from ._completion import Completed, Completion, check_matrix, column, dot, least
from ._positive_semidefinite import _LEAST, LeastProjector, _spectrum, _symmetric


@dataclass(frozen=True, eq=False)
class SimplexCompletion(Completion):
    r"""Non-negative variables with a given sum, ``x >= 0, sum(x) = total``.

    .. math:: L(y) = b^T y + R \min_j r_j, \qquad z = (r - \min_j r_j, \min_j r_j)

    The multipliers z are those of ``x >= 0``, then that of the sum: ``(*batch, n + 1)``. At a kink, where several
    entries of r are the smallest, these share x evenly.

    Args:
        total: At least 0: a number or ``(*batch)``.

    Example:
        >>> import torch
        >>> from difflayers.conic import dual_bound
        >>> y, A, b = torch.tensor([1.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([1.0])
        >>> dual_bound(y, A, b, torch.tensor([3.0, -1.0]), SimplexCompletion()).bound
        tensor(-1.)

    Source: M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024.
    """

    total: Number = 1.0

    event_ndims: ClassVar[Mapping[str, int]] = {"total": 0}

    def __post_init__(self) -> None:
        check_range(per_element("total", self.total, at_least=0))

    def _check(self, event: tuple[int, ...]) -> None:
        if not event[-1]:
            raise ValueError("c: expected at least 1 variable, got none")

    def _complete(self, r: Tensor, w: Tensor | None, on_failure: OnFailure | None) -> Completed:
        weights = least(r)
        smallest = dot(r, weights).unsqueeze(-1)
        R = column(self.total, r)
        return Completed((R * smallest).squeeze(-1), R * weights, _reduced(r, smallest))


def _reduced(costs: Tensor, smallest: Tensor) -> Tensor:
    """Multipliers of the weights of a hull: of their signs, then of their sum."""
    return torch.cat([torch.relu(costs - smallest), smallest], -1)  # a mean of equal numbers may be off by a rounding


@dataclass(frozen=True, eq=False)
class PolytopeCompletion(Completion):
    r"""The convex hull of given points, ``x = V^T a`` with weights ``a >= 0, sum(a) = 1``.

    .. math:: L(y) = b^T y + \min_k r^T v_k, \qquad z = (V r - \min_k r^T v_k, \min_k r^T v_k)

    The multipliers z are those of ``a >= 0``, then that of their sum: ``(*batch, k + 1)``. At a kink, where several
    points are the smallest, x is their mean.

    Args:
        vertices: ``(*batch, k, n)`` points, the rows of V.

    Example:
        >>> import torch
        >>> from difflayers.conic import dual_bound
        >>> y, A, b = torch.tensor([1.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([1.0])
        >>> vertices = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> dual_bound(y, A, b, torch.tensor([3.0, -1.0]), PolytopeCompletion(vertices)).bound
        tensor(-1.)

    Source: M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024.
    """

    vertices: Tensor

    event_ndims: ClassVar[Mapping[str, int]] = {"vertices": 2}

    def __post_init__(self) -> None:
        check_matrix("vertices", self.vertices)
        if not self.vertices.shape[-2]:
            raise ValueError(f"vertices: expected at least 1, got shape {tuple(self.vertices.shape)}")

    def _check(self, event: tuple[int, ...]) -> None:
        if self.vertices.shape[-1] != event[-1]:
            raise ValueError(
                f"vertices: expected points with {event[-1]} entries as c has, got shape {tuple(self.vertices.shape)}"
            )

    def _complete(self, r: Tensor, w: Tensor | None, on_failure: OnFailure | None) -> Completed:
        costs = times(self.vertices, r)
        weights = least(costs)
        x = times(self.vertices.mT, weights)
        smallest = dot(costs, weights).unsqueeze(-1)
        return Completed(smallest.squeeze(-1), x, _reduced(costs, smallest))


@dataclass(frozen=True, eq=False)
class SpectraplexCompletion(Completion):
    r"""Positive semidefinite matrices with a given trace, ``X >= 0, trace(X) = trace``.

    The variable is a matrix: costs are ``c`` of shape ``(*batch, k, k)`` and rows ``A`` of shape ``(*batch, m, k, k)``,
    with inner products ``<A_i, X>``. Of all of them only the symmetric parts count.

    .. math:: L(y) = b^T y + R \lambda_{\min}(S), \qquad S = C - \sum_i y_i A_i, \qquad
              z = (S - \lambda_{\min} I, \lambda_{\min})

    The multipliers z are that of ``X >= 0``, its rows one after the other, then that of the trace: ``(*batch, k^2 +
    1)``. Differentiable to second order. At a kink, where the smallest eigenvalue is a multiple one, its eigenvectors
    share X evenly.

    Args:
        trace: At least 0: a number or ``(*batch)``.

    Example:
        >>> import torch
        >>> from difflayers.conic import dual_bound
        >>> y, A, b = torch.tensor([1.0]), torch.eye(2).unsqueeze(0), torch.tensor([1.0])
        >>> dual_bound(y, A, b, torch.tensor([[3.0, 0.0], [0.0, -1.0]]), SpectraplexCompletion()).bound
        tensor(-1.)

    Source: M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024.
    """

    trace: Number = 1.0

    ndim: ClassVar[int] = 2
    event_ndims: ClassVar[Mapping[str, int]] = {"trace": 0}

    def __post_init__(self) -> None:
        check_range(per_element("trace", self.trace, at_least=0))

    def _check(self, event: tuple[int, ...]) -> None:
        if event[0] != event[1] or not event[0]:
            raise ValueError(f"c: expected square matrices, got {event[0]} x {event[1]}")

    def _complete(self, r: Tensor, w: Tensor | None, on_failure: OnFailure | None) -> Completed:
        S = _symmetric(r)
        projector = operate(_LEAST, S, identify(_spectrum, S, ndims=(2,), found_ndims=LeastProjector.ndims))
        smallest = (projector * S).sum((-2, -1))
        eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        shifted = S - smallest[..., None, None] * eye
        R = self.trace if isinstance(self.trace, Tensor) else S.new_full((), self.trace)
        z = torch.cat([shifted.flatten(-2), smallest.unsqueeze(-1)], -1)
        return Completed(R * smallest, R[..., None, None] * projector, z)
