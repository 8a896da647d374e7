r"""Conic programs as layers.

.. math:: \min_x \tfrac12 x^T P x + q^T x \quad \text{s.t.} \quad A x + s = b, \; s \in K

with multipliers :math:`y \in K^*`. A. Agrawal, B. Amos, S. Barratt, S. Boyd, S. Diamond, J. Z. Kolter, Differentiable
Convex Optimization Layers, 2019, section 4; E. Busseti, W. Moursi, S. Boyd, Solution refinement at regular points of
conic problems, 2019, is the Newton step that takes a solver's point to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_same, check_tensor
from difflayers._solution import OnFailure, Solution
from difflayers.implicit import solution_map, solution_map_ex
from difflayers.linalg._autodiff import opaque

from ._cones import Cone, Product
from ._conic_data import scales
from ._conic_layout import Isometry, Layout, of_cones, project
from ._conic_problem import conic_problem
from ._conic_solvers import ConicSolver, check_solver
from ._moreau import Moreau

Cones = Product | Sequence[tuple[Cone, int]]


class ConicPoint(NamedTuple):
    """A point of a conic program.

    Attributes:
        x: ``(*batch, n)`` variables.
        y: ``(*batch, m)`` multipliers, in the dual cone.
        s: ``(*batch, m)`` slacks ``b - A x``, in the cone.
    """

    x: Tensor
    y: Tensor
    s: Tensor


def conic_program(
    q: Tensor,
    A: Tensor,
    b: Tensor,
    cones: Cones,
    P: Tensor | None = None,
    *,
    solver: Moreau | ConicSolver | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The minimiser of a linear or convex quadratic function over an intersection of cones.

    Solves ``argmin_x 1/2 x^T P x + q^T x s.t. A x + s = b, s in K``. Every tensor is shared by the batch or has one
    entry for each of its elements.

    Args:
        q: ``(*batch, n)``.
        A: ``(*batch, m, n)``, the rows of each cone in the order of `cones`.
        b: ``(*batch, m)``.
        cones: A :class:`Product`, or its pairs ``(cone, dim)``: the cone, and how many rows belong to it. A block of
            ``PositiveSemidefinite`` has ``k * k`` rows, those of a matrix of side k one after the other; of that matrix
            only the symmetric part counts, so entry (i, j) may stand in either row, or half in each.
        P: ``(*batch, n, n)`` positive semidefinite, of which the symmetric part counts; None: a linear objective.
        solver: :class:`Moreau` or :class:`Clarabel`. None: the first, and the second for elements that it leaves.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        ``(*batch, n)`` minimisers, in the dtype of `q`; all computations are in float64.

    Raises:
        ValueError: For shapes that do not fit, NaN or Inf, naming the argument.
        SolveError: For elements that are infeasible or unbounded; in backward, where the solution is not unique.

    Differentiable in every tensor, forward and reverse, to any order (with ``PositiveSemidefinite`` to second);
    gradients of shared tensors are sums over the batch. At a kink, which is a solution without strict complementarity,
    the derivative is that of the projection in its class, except that non-negative rows with zero slack and zero
    multiplier count as absent. Where multipliers are not unique (dependent constraints) and the minimiser is, its
    derivative in `q` and `P` is right, and that in `A` and `b` one of several. One dense factorisation of n + m rows an
    element: meant for up to some hundreds.

    Example:
        >>> import torch
        >>> from difflayers.conic import SecondOrder, conic_program
        >>> A = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [0.0, -1.0]])
        >>> q = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> x = conic_program(q, A, torch.tensor([1.0, 0.0, 0.0]), [(SecondOrder(), 3)])  # on the unit ball
        >>> x.round(decimals=4)
        tensor([-0.6000, -0.8000], grad_fn=<RoundBackward1>)
        >>> torch.autograd.grad(x[0], q)[0].round(decimals=4)
        tensor([-0.1280,  0.0960])

    Source: A. Agrawal et al., Differentiable Convex Optimization Layers, 2019, section 4.
    Departure: differentiates the optimality conditions in (x, s - y), with a pivoted factorisation, instead of the
    homogeneous embedding by LSQR: exact, and smaller.
    """
    check_solver(solver)
    problem = of_data(q, A, b, cones, P)
    point = solution_map(conic_problem(problem.layout, P is not None, solver), problem.args, on_failure=on_failure)
    return problem.x(point)


def conic_program_ex(
    q: Tensor,
    A: Tensor,
    b: Tensor,
    cones: Cones,
    P: Tensor | None = None,
    *,
    solver: Moreau | ConicSolver | None = None,
) -> Solution[ConicPoint]:
    """As :func:`conic_program`, with multipliers and slacks, as an unchecked :class:`~difflayers.Solution`.

    Args:
        q: Linear part.
        A: Rows.
        b: Right-hand sides.
        cones: Cones of the rows.
        P: Quadratic part.
        solver: Solver.

    Returns:
        A :class:`ConicPoint`, all of it differentiable, with status, steps and the largest relative residual of the
        optimality conditions. Multipliers and slacks of a matrix are full and symmetric, as its rows are.
    """
    check_solver(solver)
    problem = of_data(q, A, b, cones, P)
    found = solution_map_ex(conic_problem(problem.layout, P is not None, solver), problem.args)
    return Solution(problem.point(found.value), found.status, found.steps, found.residual)


class Program:
    """Data in float64 with rows in the layout of the solver, scaled; and the way back, to `dtype`."""

    def __init__(
        self,
        q: Tensor,
        A: Tensor,
        b: Tensor,
        P: Tensor | None,
        layout: Layout,
        back: Isometry | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.layout, self.back, self.n, self.dtype = layout, back, q.shape[-1], dtype
        self.scales = scales(q, A, b, P)
        self.args = (q, A, b, *(() if P is None else (P,)), *self.scales)

    def x(self, point: Tensor) -> Tensor:
        """Variables."""
        return (point[..., : self.n] * self.scales.beta.unsqueeze(-1)).to(self.dtype)

    def point(self, point: Tensor) -> ConicPoint:
        """Variables, multipliers and slacks."""
        gamma, beta, alpha = (t.unsqueeze(-1) for t in self.scales)
        v = point[..., self.n :]
        y, s = project(self.layout, -v, dual=True) * (alpha / gamma), project(self.layout, v) * (gamma * beta)
        if self.back is not None:
            y, s = self.back.apply(y, -1), self.back.apply(s, -1)
        return ConicPoint(self.x(point), y.to(self.dtype), s.to(self.dtype))


def of_data(q: Tensor, A: Tensor, b: Tensor, cones: Cones, P: Tensor | None) -> Program:
    """A program of the user's tensors, which are checked."""
    given = [("q", q, 1), ("A", A, 2), ("b", b, 1), *([] if P is None else [("P", P, 2)])]
    for name, t, ndim in given:
        check_tensor(name, t, min_ndim=ndim)
    check_same((name, t) for name, t, _ in given)
    n, dtype = q.shape[-1], q.dtype
    if not n:
        raise ValueError(f"q: expected at least 1 variable, got shape {tuple(q.shape)}")
    if P is not None and P.shape[-2:] != (n, n):
        raise ValueError(f"P: expected shape (..., {n}, {n}) as of q, got {tuple(P.shape)}")
    if A.shape[-1] != n:
        raise ValueError(f"A: expected {n} columns as of q, got {tuple(A.shape)}")
    cone = cones if isinstance(cones, Product) else _product(cones)
    m = sum(dim for _, dim in cone.parts)
    if A.shape[-2] != m:
        raise ValueError(f"A: expected {m} rows, those of {len(cone.parts)} cones, got {tuple(A.shape)}")
    if b.shape[-1] != m:
        raise ValueError(f"b: expected {m} entries, one per row of A, got {tuple(b.shape)}")
    broadcast_batch((name, tuple(t.shape[: t.ndim - ndim])) for name, t, ndim in given)
    layout, there, back = _layout(cone)
    q, A, b = q.double(), A.double(), b.double()
    if there is not None:
        A, b = there.apply(A, -2), there.apply(b, -1)
    if P is not None:
        P = P.double()
        P = (P + P.mT) / 2
    return Program(q, A, b, P, layout, back, dtype)


def _product(cones: Sequence[tuple[Cone, int]]) -> Product:
    try:
        return Product(cones)
    except (ValueError, TypeError) as error:
        raise ValueError(f"cones: expected a Product or pairs (cone, dim): {error}") from None


@opaque
@functools.lru_cache(maxsize=64)
def _layout(cone: Product) -> tuple[Layout, Isometry | None, Isometry | None]:
    return of_cones(cone.parts)
