r"""How the adjoint system :math:`(\partial F/\partial z)^T v = g` is solved, or avoided."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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
            else GMRES (CG where the Jacobian is a Hessian). Where it is none ``Cholesky()`` is refused; CG and MINRES
            say that they have not converged.
        damping: Multiple of the identity that is added to the Jacobian: makes a singular or indefinite Hessian
            definite, and the derivative biased.
    """

    linear_solver: LinearSolver | None = None
    damping: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.damping, bool) or not 0 <= self.damping < math.inf:
            raise ValueError(f"damping: expected a number of at least 0, got {self.damping!r}")

    def solver(self, n: int, symmetric: bool) -> LinearSolver:
        """The linear solver for events of `n` numbers."""
        solver = self.linear_solver or default_solver(n, dense=False, positive_definite=symmetric)
        return Damped(solver, self.damping) if self.damping else solver


@dataclass(frozen=True)
class Neumann:
    r"""A truncated Neumann series for the inverse, :math:`s \sum_{k<K} (I - s A)^k`: biased, cheap, no inner solve.

    Where the series diverges (or stagnates) a :class:`~difflayers.SolveWarning` says so.

    Args:
        terms: Number of terms K.
        step: The factor s. None or ``"estimated"``: 1 over an estimate of the largest singular value of A by power
            iteration.
    """

    terms: int
    step: float | Literal["estimated"] | None = None

    def __post_init__(self) -> None:
        if self.terms < 1:
            raise ValueError(f"terms: expected at least 1, got {self.terms}")
        if isinstance(self.step, str) and self.step != "estimated":
            raise ValueError(f'step: expected a number, None or "estimated", got {self.step!r}')

    def solver(self, n: int, symmetric: bool) -> LinearSolver:
        """The series as a linear solver."""
        return NeumannSeries(self.terms, None if isinstance(self.step, str) else self.step)


@dataclass(frozen=True)
class OneStep:
    """The Jacobian replaced by the identity: differentiates one update at the solution and nothing before it.

    For fixed points: :func:`fixed_point`, and :func:`argmin` with a projection or a prox. Biased by the contraction
    factor of the update, and named so that nobody takes it for the gradient.

    Source: J. Bolte, E. Pauwels, S. Vaiter, One-step differentiation of iterative algorithms, 2023.
    """

    def solver(self, n: int, symmetric: bool) -> LinearSolver:
        """One term of the Neumann series."""
        return NeumannSeries(1, 1.0)


@dataclass(frozen=True)
class Unrolled:
    """Autograd through exactly `max_steps` masked solver steps; memory grows with them, or with their square root.

    The derivative of the iterate that was returned, not of the solution, with step lengths held constant. Finished
    elements stop changing.

    Args:
        max_steps: Number of steps.
        checkpoint: Steps of a segment that is recomputed in the backward pass, of which only the start is kept. True:
            about the square root of `max_steps`, which keeps the least. False: every step is kept. The gradient is the
            same. Under transforms of ``torch.func`` and in forward mode every step is kept.
    """

    max_steps: int
    checkpoint: bool | int = False

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1, got {self.max_steps}")
        if not isinstance(self.checkpoint, bool | int) or self.checkpoint < 0 or self.segment == 0:
            raise ValueError(f"checkpoint: expected a bool or a number of steps of at least 1, got {self.checkpoint!r}")

    @property
    def segment(self) -> int | None:
        """Steps of a segment; None where nothing is recomputed."""
        if isinstance(self.checkpoint, bool):
            return math.isqrt(self.max_steps - 1) + 1 if self.checkpoint else None
        return self.checkpoint


Adjoint = Implicit | Neumann | OneStep | Unrolled


_LOOK = 6  # residuals of a series from which its step is judged


def _too_long(residuals: list[Tensor], step: float | Tensor) -> Tensor:
    """Whether ``step * A`` has an eigenvalue above 2 on the span of successive residuals ``(I - step A)^k b``.

    The largest Ritz value is a lower bound of the largest eigenvalue: there are no false alarms.
    """
    if len(residuals) < 2:  # nothing was seen
        return torch.zeros_like(residuals[0][..., 0], dtype=torch.bool)
    R = torch.stack(residuals, -1)
    norms = torch.linalg.vector_norm(R[..., :-1], dim=-2, keepdim=True)
    scale = 1 / torch.where((norms > 0) & torch.isfinite(norms), norms, 1)
    V, W = R[..., :-1] * scale, (R[..., :-1] - R[..., 1:]) * scale  # W = step * A V
    W = torch.where(torch.isfinite(W), W, 0)
    V = torch.where(torch.isfinite(V), V, 0)
    weights, Z = torch.linalg.eigh(V.mT @ V)
    seen = weights > V.shape[-1] * torch.finfo(V.dtype).eps ** 0.5
    B = Z * torch.where(seen, weights, 1).rsqrt().mul(seen).unsqueeze(-2)  # V B is orthonormal, apart from zeros
    T = B.mT @ (V.mT @ W) @ B
    return torch.linalg.eigvalsh((T + T.mT) / 2)[..., -1] > 2 + 1e-3


@dataclass(frozen=True)
class NeumannSeries(LinearSolver):
    """See :class:`Neumann`."""

    terms: int
    step: float | None = None

    @property
    def remedy(self) -> str:  # type: ignore[override]
        """Names the step, and what it must be."""
        if self.step is None:
            return (
                "the series moves away from the solution with the step it estimated (step=None): the Jacobian is not "
                "positive definite, or its symmetric part is not; use adjoint=Implicit()."
            )
        return (
            f"the series moves away from the solution with step={self.step:g}: expected less than 2 over the largest "
            "eigenvalue of a positive definite Jacobian; step=None estimates it."
        )

    def solve(
        self, system: LinearSystem, params: Params, factors: Params, rhs: Tensor, transpose: bool, init: Tensor | None
    ) -> tuple[Tensor, Info]:
        product = system.operator(params, rhs, transpose)
        step = self._estimate(system, params, rhs) if self.step is None else self.step
        term = step * rhs
        x, first = term, [rhs]
        for k in range(self.terms - 1):
            term = term - step * product(term)
            x = x + term
            if k < _LOOK - 1:
                first.append(term / step)
        left = rhs - product(x)
        residual = torch.linalg.vector_norm(left, dim=-1)
        # a residual that did not shrink: the series moves away from the solution, or never approached it
        size = torch.linalg.vector_norm(rhs, dim=-1)
        diverges = residual > size
        if system.symmetric:
            # successive residuals grow by a ratio that itself only grows: the last one tells, above rounding
            small = torch.finfo(rhs.dtype).eps ** 0.5
            before = torch.linalg.vector_norm(term / step, dim=-1)
            diverges = diverges | ((residual > (1 + small) * before) & (residual > small * size))
            if self.step is not None:  # few terms may still shrink: then what they have seen of A tells
                diverges = diverges | _too_long([*first, left] if len(first) == self.terms else first, step)
        status = torch.where(diverges, int(Status.MAX_STEPS), int(Status.CONVERGED))
        status = torch.where(torch.isfinite(residual), status, int(Status.DIVERGED))
        return x, Info(status, torch.full_like(status, self.terms), residual)

    def _estimate(self, system: LinearSystem, params: Params, rhs: Tensor) -> Tensor:
        """One over the largest singular value, by power iteration on A^T A; 5 % short, to stay on the stable side."""
        there = system.operator(params, rhs, system.symmetric)  # of a symmetric map the transpose is dearer by nothing
        back = (lambda w: w) if system.symmetric else system.operator(params, rhs, True)
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


@dataclass(frozen=True, eq=False)
class _DampedSystem(LinearSystem):
    """``A + damping * I``."""

    inner: LinearSystem = None  # type: ignore[assignment]
    damping: float = 0.0

    def apply(self, params: Params, v: Tensor, transpose: bool) -> Tensor:
        return self.inner.apply(params, v, transpose) + self.damping * v

    def operator(self, params: Params, like: Tensor, transpose: bool) -> Callable[[Tensor], Tensor]:
        product = self.inner.operator(params, like, transpose)
        return lambda v: torch.add(product(v), v, alpha=self.damping)

    def matrix(self, params: Params, like: Tensor) -> Tensor:
        A = self.inner.matrix(params, like)
        return A + self.damping * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)


@dataclass(frozen=True)
class Damped(LinearSolver):
    """A solver of ``A + damping * I``; the derivative of its solution is that of the damped system, too."""

    inner: LinearSolver
    damping: float

    @property
    def factor_ndims(self) -> tuple[int, ...]:  # type: ignore[override]
        """Those of the solver inside."""
        return self.inner.factor_ndims

    @property
    def remedy(self) -> str:  # type: ignore[override]
        """That of the solver inside."""
        return self.inner.remedy

    def _damped(self, system: LinearSystem) -> LinearSystem:
        return _DampedSystem(
            self.inner, system.param_ndims, system.vector_ndim, self.factor_ndims, system.on_failure, system.name,
            system.param_names, system.symmetric, inner=system, damping=self.damping,
        )  # fmt: skip

    def factor(self, system: LinearSystem, params: Params, like: Tensor) -> Params:
        return self.inner.factor(self._damped(system), params, like)

    def solve(
        self, system: LinearSystem, params: Params, factors: Params, rhs: Tensor, transpose: bool, init: Tensor | None
    ) -> tuple[Tensor, Info]:
        return self.inner.solve(self._damped(system), params, factors, rhs, transpose, init)
