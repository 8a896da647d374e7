r"""How the adjoint system :math:`(\partial F/\partial z)^T v = g` is solved, or avoided."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._solution import Info, Status
from difflayers.linalg import LinearSolver
from difflayers.linalg._linear_solve import default_solver
from difflayers.linalg._system import LinearSystem, Params


@dataclass(frozen=True)
class Implicit:
    """The implicit function theorem: one linear solve with the Jacobian, exact at the solution.

    Args:
        linear_solver: A solver of :mod:`difflayers.linalg`. None: a dense factorisation for events up to 64 numbers,
            else GMRES (CG where the Jacobian is a Hessian).
    """

    linear_solver: LinearSolver | None = None

    def solver(self, n: int, symmetric: bool) -> LinearSolver:
        """The linear solver for events of `n` numbers."""
        return self.linear_solver or default_solver(n, dense=False, positive_definite=symmetric)


@dataclass(frozen=True)
class Neumann:
    r"""A truncated Neumann series for the inverse, :math:`s \sum_{k<K} (I - s A)^k`: biased, cheap, no inner solve.

    Where the series diverges (or stagnates) a :class:`~difflayers.SolveWarning` says so.

    Args:
        terms: Number of terms K.
        step: The factor s. None: 1 over an estimate of the largest singular value of A by power iteration.
    """

    terms: int
    step: float | None = None

    def __post_init__(self) -> None:
        if self.terms < 1:
            raise ValueError(f"terms: expected at least 1, got {self.terms}")

    def solver(self, n: int, symmetric: bool) -> LinearSolver:
        """The series as a linear solver."""
        return NeumannSeries(self.terms, self.step)


@dataclass(frozen=True)
class OneStep:
    """The Jacobian replaced by the identity: differentiates one update at the solution and nothing before it.

    For :func:`fixed_point` only. Biased by the contraction factor of the update, and named so that nobody takes it for
    the gradient.

    Source: J. Bolte, E. Pauwels, S. Vaiter, One-step differentiation of iterative algorithms, 2023.
    """

    def solver(self, n: int, symmetric: bool) -> LinearSolver:
        """One term of the Neumann series."""
        return NeumannSeries(1, 1.0)


@dataclass(frozen=True)
class Unrolled:
    """Autograd through exactly `max_steps` masked solver steps; memory grows with them.

    The derivative of the iterate that was returned, not of the solution, with step lengths held constant. Finished
    elements stop changing.

    Args:
        max_steps: Number of steps.
    """

    max_steps: int

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1, got {self.max_steps}")


Adjoint = Implicit | Neumann | OneStep | Unrolled


@dataclass(frozen=True)
class NeumannSeries(LinearSolver):
    """See :class:`Neumann`."""

    terms: int
    step: float | None = None

    def solve(
        self, system: LinearSystem, params: Params, factors: Params, rhs: Tensor, transpose: bool, init: Tensor | None
    ) -> tuple[Tensor, Info]:
        product = system.operator(params, rhs, transpose)
        step = self._estimate(system, params, rhs) if self.step is None else self.step
        term = step * rhs
        x = term
        for _ in range(self.terms - 1):
            term = term - step * product(term)
            x = x + term
        residual = torch.linalg.vector_norm(rhs - product(x), dim=-1)
        # a residual that did not shrink: the series moves away from the solution, or never approached it
        diverges = residual > torch.linalg.vector_norm(rhs, dim=-1)
        status = torch.where(diverges, int(Status.MAX_STEPS), int(Status.CONVERGED))
        status = torch.where(torch.isfinite(residual), status, int(Status.DIVERGED))
        return x, Info(status, torch.full_like(status, self.terms), residual)

    def _estimate(self, system: LinearSystem, params: Params, rhs: Tensor) -> Tensor:
        """One over the largest singular value, by power iteration on A^T A; 5 % short, to stay on the stable side."""
        there, back = system.operator(params, rhs, False), system.operator(params, rhs, True)
        n = rhs.shape[-1]
        ramp = torch.arange(1, n + 1, dtype=rhs.dtype, device=rhs.device)
        v = (ramp * 0.7548776662466927 % 1 - 0.5).expand_as(rhs)  # fixed low-discrepancy start: same result every run
        scale = rhs.new_ones(())
        for _ in range(20):
            v = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)
            w = there(v)
            scale = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
            v = back(w)
        return 0.95 / torch.where(scale > 0, scale, 1)
