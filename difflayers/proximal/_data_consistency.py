r"""Data consistency: the prox of a least-squares data term, by conjugate gradients that see products alone.

.. math:: \operatorname{prox}(x) = \arg\min_z \tfrac12\|z - x\|^2 + \tfrac\gamma2\|Az - b\|^2, \qquad
    (I + \gamma A^T A) z = x + \gamma A^T b

H. Chung, S. Lee, J. C. Ye, Decomposed diffusion sampler for accelerating large-scale inverse problems, 2024, take a few
steps of conjugate gradients from x. Both derivatives are offered, and they differ: that of the solution, and that of
the iterate after so many steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from difflayers._checks import check_finite, check_same, check_tensor, compute_dtype, default_rtol, fits
from difflayers._solution import Info, OnFailure, Solution, Status, check_policy, settle
from difflayers.linalg import CG, LinearOperator, Tag, linear_solve, linear_solve_ex
from difflayers.linalg._autodiff import (
    autocast_off,
    lifted_under_autocast,
    opaque,
    physical,
    pullback,
    transforms_active,
)

from ._lasso import not_negative
from ._operands import Number

Operator = Callable[..., Tensor]


def data_consistency(
    operator: Operator,
    x: Tensor,
    measurement: Tensor,
    weight: Number = 1.0,
    *,
    adjoint: Operator | None = None,
    params: Sequence[Tensor] = (),
    event_ndim: int = 1,
    max_steps: int | None = None,
    rtol: float | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    r"""The nearest point to `x` that explains a measurement, weighing distance against misfit.

    Solves ``argmin_z 1/2 ||z - x||^2 + weight/2 ||operator(z) - measurement||^2``, each batch element alone.

    Args:
        operator: Linear map, called as ``operator(z, *params)`` on ``(*batch, event...)``; its result may have any
            shape, and may be complex. Batch elements must not see each other.
        x: ``(*batch, event...)``.
        measurement: Broadcasts to the shape of ``operator(x)``.
        weight: At least 0: a number, or a tensor that broadcasts to the batch.
        adjoint: ``adjoint(y, *params)``, the transpose of the operator. None: a vector-Jacobian product.
        params: Tensors that operator and adjoint depend on; gradients flow to them.
        event_ndim: Trailing dimensions of `x` that make one unknown.
        max_steps: None: conjugate gradients to the tolerance, and the derivative of the solution (implicit, memory
            independent of the steps). A number: exactly so many steps from `x`, as samplers take them, and the
            derivative of *that iterate* (recorded, memory grows with the steps). Where the steps have not converged,
            the two derivatives differ as the two values do; an element that meets the default tolerance before the
            last step has the derivative of the solution.
        rtol: Residual of the normal equations relative to their right-hand side, with ``max_steps=None``; None picks it
            by dtype.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        ``(*batch, event...)``.

    Raises:
        ValueError: For a negative weight, a map that is not linear, an `adjoint` that is not its transpose (both seen
            on the data at hand), a wrong shape or dtype, NaN or Inf, naming the argument.
        SolveError: For an element that diverged.

    Differentiable in `x`, `measurement`, `weight` and `params`, to any order, forward and reverse.

    Example:
        >>> import torch
        >>> from difflayers.proximal import data_consistency
        >>> every_second = lambda z: z[..., ::2]
        >>> data_consistency(every_second, torch.zeros(4), torch.tensor([1.0, 2.0]), 3.0)
        tensor([0.7500, 0.0000, 1.5000, 0.0000])

    Source: H. Chung, S. Lee, J. C. Ye, Decomposed diffusion sampler for accelerating large-scale inverse problems,
    2024, algorithm 1.

    Departure: batch elements have their own step lengths, and stop on their own.
    """
    check_policy(on_failure)
    return _value(max_steps, rtol, on_failure, operator, x, measurement, weight, adjoint, params, event_ndim)


def data_consistency_ex(
    operator: Operator,
    x: Tensor,
    measurement: Tensor,
    weight: Number = 1.0,
    *,
    adjoint: Operator | None = None,
    params: Sequence[Tensor] = (),
    event_ndim: int = 1,
    max_steps: int | None = None,
    rtol: float | None = None,
) -> Solution[Tensor]:
    """As :func:`data_consistency`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        operator: Linear map.
        x: Point.
        measurement: What the operator should give.
        weight: Of the misfit.
        adjoint: Transpose of the operator.
        params: Tensors of both.
        event_ndim: Dimensions of one unknown.
        max_steps: None or a number of steps.
        rtol: Tolerance.

    Returns:
        The point with status, steps and the residual of the normal equations for every element; with `max_steps`,
        status ``MAX_STEPS`` says that so many steps do not meet the tolerance.
    """
    return _solution(max_steps, rtol, operator, x, measurement, weight, adjoint, params, event_ndim)


@opaque
def _value(max_steps: int | None, rtol: float | None, on_failure: OnFailure, *given: Any) -> Tensor:
    problem = _Problem(*given, on_failure=on_failure)
    if max_steps is not None:
        z, info = problem.recorded_steps(max_steps, rtol)
        status = physical(info.status)
        status = torch.where(status == Status.MAX_STEPS, int(Status.CONVERGED), status)  # as many as were asked for
        if on_failure == "raise":  # "nan": failed elements are NaN by now
            info = Info(status, physical(info.steps), physical(info.residual))
            settle(physical(z), info, on_failure, name="data_consistency", diagnose=problem.check_finite)
        return problem.unflatten(z)
    try:
        z = linear_solve(*problem.system, solver=CG(rtol=rtol), init=problem.start, on_failure=on_failure)
    except ValueError:
        problem.check_finite()  # name what the caller passed
        raise
    return problem.unflatten(z)


@opaque
def _solution(max_steps: int | None, rtol: float | None, *given: Any) -> Solution[Tensor]:
    problem = _Problem(*given, on_failure="ignore")
    if max_steps is not None:
        z, info = problem.recorded_steps(max_steps, rtol)
        return Solution(problem.unflatten(z), *info)
    solution = linear_solve_ex(*problem.system, solver=CG(rtol=rtol), init=problem.start)
    return replace(solution, value=problem.unflatten(solution.value))


class _Problem:
    """Checked arguments, and the normal equations on flattened events."""

    def __init__(
        self,
        operator: Operator,
        x: Any,
        measurement: Any,
        weight: Any,
        adjoint: Operator | None,
        params: Sequence[Tensor],
        event_ndim: int,
        *,
        on_failure: OnFailure,
    ) -> None:
        if event_ndim < 1:
            raise ValueError(f"event_ndim: expected at least 1, got {event_ndim}")
        x, b = lifted_under_autocast(check_tensor("x", x, min_ndim=event_ndim)), lifted_under_autocast(measurement)
        if not isinstance(b, Tensor) or not (b.is_floating_point() or b.is_complex()):
            kind = b.dtype if isinstance(b, Tensor) else type(b).__name__
            raise ValueError(f"measurement: expected a floating-point or complex tensor, got {kind}")
        batch = x.shape[: x.ndim - event_ndim]
        same = [("x", x), *([("measurement", b)] if b.is_floating_point() else [])]
        if isinstance(weight, Tensor):
            same.append(("weight", lifted_under_autocast(weight)))
        weight = lifted_under_autocast(not_negative("weight", weight, x))
        check_same(same)
        if not fits(weight.shape, batch):
            raise ValueError(
                f"weight: expected a number or a shape that broadcasts to the batch {tuple(batch)} of x, "
                f"got {tuple(weight.shape)}"
            )
        self.dtype, self.shape, self.operator, self.adjoint = x.dtype, x.shape, operator, adjoint
        self.given = [("x", x), ("measurement", b), ("weight", weight)]
        x, b, weight, *lifted = (_lift(t) for t in (x, b, weight, *params))
        self.vector = (*batch, x.shape[len(batch) :].numel())
        with autocast_off(x):
            seen = operator(x, *lifted)
            if not fits(b.shape, seen.shape):
                raise ValueError(
                    f"measurement: expected a shape that broadcasts to {tuple(seen.shape)} as of operator(x), "
                    f"got {tuple(b.shape)}"
                )
            b = b.expand(seen.shape)
            if on_failure == "nan" and seen.shape[: len(batch)] == batch:
                # 0 * NaN would reach shared parameters: failed elements are marked in x alone
                sound = torch.isfinite(weight) & torch.isfinite(b.unsqueeze(-1).flatten(len(batch))).all(-1)
                x, b, weight = (
                    torch.where(sound.reshape((*batch, *[1] * (t.ndim - len(batch)))), t, bad)
                    for t, bad in ((x, math.nan), (b, 0), (weight.expand(batch), 0))
                )
            # the solve is real, and would take the derivative in complex numbers for that in their real parts
            self.complex = [t.is_complex() for t in lifted]
            self.lifted = lifted
            self.params = (weight, *(torch.view_as_real(t) if t.is_complex() else t for t in lifted))
            back = self.transpose(b, lifted)
            if on_failure != "ignore" and not transforms_active() and not x.is_meta:
                self.check(x, seen, b, back)
            self.rhs = x.reshape(self.vector) + weight.unsqueeze(-1) * back.reshape(self.vector)
        self.start = x.reshape(self.vector)

    @torch.no_grad()
    def check(self, x: Tensor, seen: Tensor, b: Tensor, back: Tensor) -> None:
        """Is the map linear, is the adjoint its transpose: as far as the numbers at hand tell."""
        if bool((self.operator(torch.zeros_like(x), *self.lifted) != 0).any()):
            raise ValueError("operator: expected a linear map, got one that does not map zero to zero")
        # x is often zero, which tells nothing
        for name, z, Az in (("x", x, seen), ("adjoint(measurement)", back, self.operator(back, *self.lifted))):
            there, again = torch.vdot(b.flatten(), Az.flatten()).real, torch.dot(z.flatten(), back.flatten())
            if bool((there - again).abs() > 0.01 * Az.norm() * b.norm()):
                raise ValueError(
                    f"adjoint: expected the transpose of operator, got <operator({name}), measurement> = "
                    f"{float(there):.4g} and <{name}, adjoint(measurement)> = {float(again):.4g}"
                )

    def check_finite(self) -> None:
        """Refuses NaN and Inf in what the caller passed, by its name."""
        check_finite((name, physical(t)) for name, t in self.given)

    def transpose(self, y: Tensor, params: Sequence[Tensor], record: bool | None = None) -> Tensor:
        """``A^T y``; `record` as in :func:`pullback`."""
        if self.adjoint is not None:
            return self.adjoint(y, *params)
        zero = torch.zeros(self.shape, dtype=self.params[0].dtype, device=y.device)
        return pullback(lambda z: self.operator(z, *params), zero, record=record)[1](y)[0]

    def normal(self, params: tuple[Tensor, ...], v: Tensor) -> Tensor:
        """``(I + weight A^T A) v``."""
        weight = params[0]
        rest = [torch.view_as_complex(t) if c else t for t, c in zip(params[1:], self.complex, strict=True)]
        seen = self.operator(v.reshape(self.shape), *rest)
        # a product of constants must come out as one: linear_solve looks for gradients that it would lose
        back = self.transpose(seen, rest, record=any(t.requires_grad for t in (seen, *rest)))
        return v + weight.unsqueeze(-1) * back.reshape(v.shape)

    @property
    def system(self) -> tuple[LinearOperator, Tensor]:
        """The normal equations."""
        return LinearOperator(self.normal, self.params, Tag.POSITIVE_DEFINITE), self.rhs

    def recorded_steps(self, steps: int, rtol: float | None) -> tuple[Tensor, Info]:
        """Conjugate gradients in plain torch, with the graph; an element that is solved to rounding stays."""
        if steps < 1:
            raise ValueError(f"max_steps: expected at least 1, got {steps}")
        with autocast_off(self.rhs):
            sound = (torch.isfinite(self.rhs) & torch.isfinite(self.start)).all(-1, keepdim=True)
            # 0 * NaN would reach shared parameters
            z, rhs = torch.where(sound, self.start, 0), torch.where(sound, self.rhs, 0)
            r = rhs - self.normal(self.params, z)
            p, size = r, torch.linalg.vecdot(r, r)
            floor = (torch.finfo(r.dtype).eps * _norm(rhs)) ** 2
            limit = (default_rtol(None, r.dtype) * _norm(rhs)) ** 2
            done = torch.zeros_like(size, dtype=torch.bool)
            for _ in range(steps):
                going, done = size.detach() > floor, size.detach() <= limit
                Ap = self.normal(self.params, p)
                curvature = torch.where(going, torch.linalg.vecdot(p, Ap), 1)
                alpha = torch.where(going, size / curvature, 0).unsqueeze(-1)
                z, r = z + alpha * p, r - alpha * Ap
                before, size = torch.where(going, size, 1), torch.linalg.vecdot(r, r)
                p = r + torch.where(going, size / before, 0).unsqueeze(-1) * p
            z = torch.where(sound, self.solved(z, rhs, done), math.nan)
            miss = _norm(self.rhs - self.normal(self.params, z))
        met = miss <= default_rtol(rtol, r.dtype) * _norm(self.rhs)
        status = torch.where(met, int(Status.CONVERGED), int(Status.MAX_STEPS))
        status = torch.where(torch.isfinite(miss), status, int(Status.DIVERGED))
        return z, Info(status, torch.full_like(status, steps), miss)

    def solved(self, z: Tensor, rhs: Tensor, done: Tensor) -> Tensor:
        """`z`, with the derivative of the solution where it is one: that of steps amid rounding would be noise."""
        if not bool(physical(done).any()):
            return z
        done = done.unsqueeze(-1)
        init, rhs = torch.where(done, z.detach(), 0), torch.where(done, rhs, 0)
        solution = linear_solve(self.system[0], rhs, init=init, solver=CG(), on_failure="ignore")
        return torch.where(done, solution, z)

    def unflatten(self, z: Tensor) -> Tensor:
        """Vectors as events, in the dtype that came."""
        return z.reshape(self.shape).to(self.dtype)


def _norm(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t.detach(), dim=-1)


def _lift(t: Tensor) -> Tensor:
    return t.to(compute_dtype(t.dtype)) if t.is_floating_point() else t
