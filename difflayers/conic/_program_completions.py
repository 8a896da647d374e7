r"""Completions with curvature, and the one that asks a solver.

.. math:: \min_x \tfrac12 x^T Q x + r^T x = -\tfrac12 r^T Q^{-1} r, \qquad
    \tfrac12 x^T Q x \ge w^T Q x - \tfrac12 w^T Q w

The inequality, the tangent at w, makes the objective linear, so that a box completes it for any w. M. Tanneau, P. Van
Hentenryck, Dual Lagrangian Learning for Conic Optimization, NeurIPS 2024, section 3.2 and appendix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from difflayers._checks import compute_dtype
from difflayers._solution import Info, OnFailure
from difflayers.implicit import envelope
from difflayers.linalg import Cholesky, linear_solve, linear_solve_ex
from difflayers.linalg._autodiff import physical
from difflayers.linalg._system import times
from difflayers.proximal._operands import Number, check_that

from ._completion import Completed, Completion, check_entries, check_matrix, dot, spoil
from ._completions import check_box, check_square, over_box


@dataclass(frozen=True, eq=False)
class QuadraticCompletion(Completion):
    r"""A quadratic objective, ``1/2 x^T Q x + c^T x``, with nothing else to bound x.

    .. math:: L(y) = b^T y - \tfrac12 r^T Q^{-1} r, \qquad x = -Q^{-1} r

    There are no multipliers z: ``(*batch, 0)``. The bound's first derivative needs no linear solve, its second one
    reuses the factor.

    Args:
        Q: ``(*batch, n, n)`` positive definite; of a matrix that is not symmetric the symmetric part counts. A singular
            one fails.

    Example:
        >>> import torch
        >>> from difflayers.conic import dual_bound
        >>> y, A, b = torch.tensor([1.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([2.0])
        >>> dual_bound(y, A, b, torch.tensor([0.0, 0.0]), QuadraticCompletion(torch.eye(2))).bound
        tensor(1.)

    Source: M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024.
    """

    Q: Tensor

    solves: ClassVar[bool] = True
    event_ndims: ClassVar[Mapping[str, int]] = {"Q": 2}

    def __post_init__(self) -> None:
        check_matrix("Q", self.Q)

    def _check(self, event: tuple[int, ...]) -> None:
        check_square("Q", self.Q, event[-1])

    def _complete(self, r: Tensor, w: Tensor | None, on_failure: OnFailure | None) -> Completed:
        Q = (self.Q + self.Q.mT) / 2
        info = None
        if on_failure is None:
            solution = linear_solve_ex(Q, -r, solver=Cholesky())
            x, info = solution.value, Info(solution.status, solution.steps, solution.residual)
        else:
            x = linear_solve(Q, -r, solver=Cholesky(), on_failure=on_failure)
        failed = torch.isnan(x.detach()).any(-1, keepdim=True)
        value = envelope(_energy, torch.where(failed, 0, x), (Q, r))
        value = spoil(value, failed.squeeze(-1))
        return Completed(value, x, r.new_zeros((*x.shape[:-1], 0)), info)


def _energy(x: Tensor, Q: Tensor, r: Tensor) -> Tensor:
    return dot(x, times(Q, x)) / 2 + dot(r, x)


@dataclass(frozen=True, eq=False)
class BoxQuadraticCompletion(Completion):
    r"""A quadratic objective, ``1/2 x^T Q x + c^T x``, and bounds on every variable.

    With a point w, given to :func:`dual_bound` as ``w=`` (a network predicts it beside y):

    .. math:: L(y, w) = b^T y - \tfrac12 w^T Q w + l^T r_+ - u^T r_-, \qquad r = c + Q w - A^T y

    It is a bound for every w, concave in (y, w), and the best w is the minimiser of the Lagrangian over the box. The
    multipliers z are laid out as for :class:`BoxCompletion`, ``(*batch, 2 n)``, with the same derivative at a kink.

    Args:
        Q: ``(*batch, n, n)`` positive semidefinite; of a matrix that is not symmetric the symmetric part counts.
        lower: A number or ``(*batch, n)``; ``-inf`` where there is none.
        upper: A number or ``(*batch, n)``, at least `lower`; ``inf`` where there is none.

    Raises:
        ValueError: For a `Q` that is not positive semidefinite: nothing would be certified.

    Example:
        >>> import torch
        >>> from difflayers.conic import dual_bound
        >>> y, A, b = torch.tensor([1.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([2.0])
        >>> completion = BoxQuadraticCompletion(torch.eye(2), 0.0, 1.0)
        >>> dual_bound(y, A, b, torch.zeros(2), completion, w=torch.ones(2)).bound
        tensor(1.)

    Source: M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024. Departure: w has the
    opposite sign, which makes it an estimate of x.
    """

    Q: Tensor
    lower: Number
    upper: Number

    event_ndims: ClassVar[Mapping[str, int]] = {"Q": 2, "lower": 1, "upper": 1}

    def __post_init__(self) -> None:
        check_matrix("Q", self.Q)
        check_box(self.lower, self.upper)
        if self.Q.shape[-1] != self.Q.shape[-2]:
            raise ValueError(f"Q: expected square matrices, got shape {tuple(self.Q.shape)}")
        check_that(_is_semidefinite(self.Q), lambda: "Q: expected a positive semidefinite matrix, got another")

    def predicted(self, n: int) -> int:
        """`w`: n numbers."""
        return n

    def _check(self, event: tuple[int, ...]) -> None:
        check_square("Q", self.Q, event[-1])
        check_entries("lower", self.lower, event[-1])
        check_entries("upper", self.upper, event[-1])

    def _complete(self, r: Tensor, w: Tensor | None, on_failure: OnFailure | None) -> Completed:
        assert w is not None
        gradient = times((self.Q + self.Q.mT) / 2, w)
        value, x, z = over_box(r + gradient, self.lower, self.upper)
        return Completed(value - dot(w, gradient) / 2, x, z)


def _is_semidefinite(Q: Tensor) -> bool | Tensor:
    """Up to rounding; reads data."""
    if torch.compiler.is_compiling() or Q.is_meta or not Q.numel():
        return True
    Q = physical(Q)
    values = torch.linalg.eigvalsh(((Q + Q.mT) / 2).nan_to_num().to(compute_dtype(Q.dtype)))
    noise = Q.shape[-1] * torch.finfo(values.dtype).eps ** 0.75 * values.abs().amax(-1)
    return values[..., 0] >= -noise
