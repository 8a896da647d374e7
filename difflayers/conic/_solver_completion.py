r"""The completion of any block, by a solver.

.. math:: \ell(x, z) = r^T x + h^T z - z^T H x

is the value at a minimiser x with multipliers z, and stationary there: an error of the solver enters squared, and the
first derivative :math:`(\bar r, \bar h, \bar H) = (x, z, -z x^T)` needs no linear solve. M. Tanneau, P. Van Hentenryck,
Dual Lagrangian Learning for Conic Optimization, NeurIPS 2024, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from difflayers._checks import check_tensor
from difflayers._solution import Info, OnFailure
from difflayers.implicit import envelope, solution_map, solution_map_ex
from difflayers.linalg._system import times

from ._completion import Completed, Completion, check_matrix, dot, spoil
from ._cones import Cone, Free, NonNegative, Product, Zero
from ._conic_data import sizes
from ._conic_problem import conic_problem
from ._conic_program import of_data
from ._program_problem import program_problem
from ._quadratic_program import _prepare, default_solver


@dataclass(frozen=True, eq=False)
class SolverCompletion(Completion):
    r"""Any block ``Hx - h in cone``, completed by a solver.

    .. math:: L(y) = b^T y + \min_x \{r^T x : Hx - h \in C\}

    The multipliers z are those of ``Hx - h in C``, one for each row: ``(*batch, rows)``. The bound's first derivative
    needs no linear solve; second derivatives, and those of x and z, are the solver's. The minimum exists for every y
    where the block is bounded and has a strictly feasible point (any feasible one for linear rows).

    Args:
        H: ``(*batch, rows, n)``.
        h: ``(*batch, rows)``; ``-inf`` in rows of ``NonNegative`` that say nothing.
        cone: C: one cone for all rows, or a :class:`Product`. A block of ``PositiveSemidefinite`` has ``k * k`` rows.
        solver: As for :func:`quadratic_program` where the rows are linear, else as for :func:`conic_program`.
            None: theirs.

    Example:
        >>> import torch
        >>> from difflayers.conic import dual_bound
        >>> y, A, b = torch.tensor([1.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([1.0])
        >>> H, h = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]), torch.tensor([0.0, 0.0, -1.0])
        >>> dual_bound(y, A, b, torch.tensor([3.0, -1.0]), SolverCompletion(H, h, NonNegative())).bound
        tensor(-1.)

    Source: M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024, section 3.1.
    """

    H: Tensor
    h: Tensor
    cone: Cone
    solver: Any = None

    solves: ClassVar[bool] = True
    event_ndims: ClassVar[Mapping[str, int]] = {"H": 2, "h": 1}

    def __post_init__(self) -> None:
        check_matrix("H", self.H)
        check_tensor("h", self.h, min_ndim=1)
        if self.h.shape[-1] != self.H.shape[-2]:
            raise ValueError(
                f"h: expected {self.H.shape[-2]} entries, one per row of H, got shape {tuple(self.h.shape)}"
            )
        if not isinstance(self.cone, Cone):
            raise ValueError(f"cone: expected a Cone, got {type(self.cone).__name__}")
        rows = self.H.shape[-2]
        if isinstance(self.cone, Product) and sum(dim for _, dim in self.cone.parts) != rows:
            raise ValueError(f"cone: expected {rows} rows as of H, got {sum(dim for _, dim in self.cone.parts)}")

    def _check(self, event: tuple[int, ...]) -> None:
        if self.H.shape[-1] != event[-1]:
            raise ValueError(f"H: expected {event[-1]} columns as c has entries, got shape {tuple(self.H.shape)}")

    def _complete(self, r: Tensor, w: Tensor | None, on_failure: OnFailure | None) -> Completed:
        x, z, info = _solve(r, self.H, self.h, self.cone, self.solver, on_failure)
        failed = torch.isnan(x.detach()).any(-1, keepdim=True)
        point = torch.where(failed, 0, x), torch.where(failed, 0, z)
        value = envelope(_lagrangian, point, (r, self.H, torch.where(torch.isinf(self.h), 0, self.h)))
        return Completed(spoil(value, failed.squeeze(-1)), x, z, info)


def _lagrangian(point: tuple[Tensor, Tensor], r: Tensor, H: Tensor, h: Tensor) -> Tensor:
    x, z = point
    return dot(r, x) + dot(h - times(H, x), z)


def _solve(
    r: Tensor, H: Tensor, h: Tensor, cone: Cone, solver: Any, on_failure: OnFailure | None
) -> tuple[Tensor, Tensor, Info | None]:
    """Minimiser and multipliers."""
    if set(_kinds(cone, 1)) <= {NonNegative, Zero, Free}:
        return _linear(r, H, h, cone, solver, on_failure)
    parts = cone if isinstance(cone, Product) else Product([(cone, H.shape[-2])])
    problem = of_data(r, -H, -h, parts, None)
    value, info = _mapped(conic_problem(problem.layout, False, solver), problem.args, on_failure)
    point = problem.point(value)
    return point.x, point.y, info


def _linear(
    r: Tensor, H: Tensor, h: Tensor, cone: Cone, solver: Any, on_failure: OnFailure | None
) -> tuple[Tensor, Tensor, Info | None]:
    """Linear rows alone: of these the solvers of quadratic programs know the exact active set."""
    kinds = _kinds(cone, H.shape[-2])
    below = [i for i, kind in enumerate(kinds) if kind is NonNegative]
    equal = [i for i, kind in enumerate(kinds) if kind is Zero]
    # near 1, since the tolerances of a solver are absolute
    bounds = torch.where(torch.isinf(h), 0, h)
    units = sizes(r.detach(), H.detach().flatten(-2), bounds.detach(), r.new_zeros(0))
    gamma, beta, alpha = (t.unsqueeze(-1) for t in units)
    r, H, h = r / alpha, H / gamma.unsqueeze(-1), h / (gamma * beta)
    rows = (-H[..., below, :], -h[..., below]) if below else (None, None)
    equations = (-H[..., equal, :], -h[..., equal]) if equal else (None, None)
    parts, args = _prepare(torch.zeros(r.shape[-1], r.shape[-1], dtype=r.dtype, device=r.device), r, *rows, *equations)
    value, info = _mapped(program_problem(parts, solver or default_solver(r)), args, on_failure)
    x, y, u = value.split((r.shape[-1], len(equal), len(below)), -1)
    z = torch.cat([u, y, torch.zeros_like(value[..., :1])], -1)  # and none for rows of a free cone
    place = {row: i for i, row in enumerate(below + equal)}
    z = z[..., [place.get(i, -1) for i in range(len(kinds))]]
    return x * beta, z * (alpha / gamma), info


def _mapped(problem: Any, args: Any, on_failure: OnFailure | None) -> tuple[Tensor, Info | None]:
    """The solution under a policy, or with a report."""
    if on_failure is not None:
        return solution_map(problem, args, on_failure=on_failure), None
    found = solution_map_ex(problem, args)
    return found.value, Info(found.status, found.steps, found.residual)


def _kinds(cone: Cone, rows: int) -> list[type[Cone]]:
    """The cone of each row."""
    parts = cone.parts if isinstance(cone, Product) else [(cone, rows)]
    return [type(part) for part, dim in parts for _ in range(dim)]
