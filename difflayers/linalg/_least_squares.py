r"""Linear least squares as a layer, with weights, a ridge and linear equalities.

.. math:: \min_w \tfrac12\|S(Aw - y)\|^2 + \tfrac\lambda2\|w - w_0\|^2 \quad\text{s.t.}\quad Cw = d, \quad S =
\mathrm{diag}(s)

With :math:`H = A^T S^2 A + \lambda I`, the multiplier :math:`\nu` of the equalities and :math:`r = y - Aw`, the adjoint
:math:`(z, \mu)` solves the same KKT system with right-hand side :math:`(\bar w, \bar\nu)`, and

.. math::
    \bar A = S^2(r z^T - (Az) w^T),\quad \bar y = S^2 A z,\quad \bar s_i = 2 s_i r_i (Az)_i,\quad
    \bar\lambda = -z^T(w - w_0),\quad \bar w_0 = \lambda z,\quad \bar C = -(\nu z^T + \mu w^T),\quad \bar d = \mu .

One factor ``R`` with ``R^T R = Z^T H Z`` (``Z`` an orthonormal basis of the null space of C) serves the forward pass
and every derivative, and nothing is ever larger than A.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflayers._checks import (
    broadcast_batch,
    check_finite,
    check_same,
    check_shape,
    check_tensor,
    compute_dtype,
)
from difflayers._solution import (
    Info,
    OnFailure,
    Solution,
    Status,
    check_policy,
    current_listeners,
    listening,
    settle,
    timed,
)

from ._autodiff import (
    alive,
    autocast_off,
    forward_mode,
    jvp_where,
    lifted_under_autocast,
    opaque,
    plain_forward,
    primal,
    quick_apply,
)
from ._grads_batched import batched_backward
from ._kkt import (
    FACTOR_NDIMS,
    NAMES,
    NDIMS,
    Data,
    KKTSystem,
    NullSpaceSolver,
    padded,
    solve_forward,
    stationarity,
    times,
)
from ._system import Params, SystemSolve, align, expand_mask, factor_dims, harmless, mask_failed, unless_all_failed


@quick_apply
class LeastSquaresMap(torch.autograd.Function):
    """``(A, y, s, lam, w0, C, d) -> (x, status, steps, residual, *factors)`` by the formulas above."""

    @staticmethod
    def forward(on_failure: OnFailure, *data: Tensor | None) -> tuple[Tensor, ...]:
        tensors = [(n, t) for n, t in zip(NAMES, data, strict=True) if t is not None]

        def solve() -> tuple[Any, Info]:
            x, info, factors = solve_forward(*data)
            return (x, factors), info

        with plain_forward(tensors[0][1]):
            (x, factors), info = timed("least_squares", "forward", solve)
        x = settle(x, info, on_failure, name="least_squares", diagnose=lambda: _diagnose(tensors))
        return (x, *info, *factors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.on_failure, *data = inputs
        ctx.listeners = current_listeners()
        ctx.present = [t is not None for t in data]
        ctx.factor_count = len(output) - 4
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no cotangent, no adjoint solve
        saved = (*output[:2], *output[4:], *(t for t in data if t is not None))
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def unpack(
        ctx: Any, read: Any = alive
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Params, Data, KKTSystem, Params]:
        """Solution, (failed elements, their output), factors, data, the derivative's system: all harmless."""
        x, status, *rest = map(read, ctx.saved_tensors)
        factors, tensors = tuple(rest[: ctx.factor_count]), rest[ctx.factor_count :]
        masked = None
        if ctx.on_failure == "nan":
            failed = status > Status.MAX_STEPS
            masked = (failed, x)
            factors = tuple(harmless(factors, FACTOR_NDIMS[: len(factors)], failed))
            ndims = [k for k, here in zip(NDIMS, ctx.present, strict=True) if here]
            x, *tensors = harmless([x, *tensors], (1, *ndims), failed)
        queue = iter(tensors)
        data: Data = tuple(next(queue) if here else None for here in ctx.present)  # type: ignore[assignment]
        A, _, s, lam, _, C, _ = data
        params = tuple(t for t in (A, s, lam, C) if t is not None)
        system = KKTSystem(
            NullSpaceSolver(),
            tuple(k for k, t in zip((2, 1, 0, 2), (A, s, lam, C), strict=True) if t is not None),
            factor_ndims=FACTOR_NDIMS[: len(factors)],
            on_failure=ctx.on_failure,
            name="least_squares",
            symmetric=True,
            weighted=s is not None,
            ridged=lam is not None,
            rows=0 if C is None else C.shape[-2],
        )
        return x, masked, factors, data, system, params

    @staticmethod
    @batched_backward
    def backward(ctx: Any, g: Tensor, *_status: Any) -> tuple[Any, ...]:
        x, masked, factors, data, system, params = LeastSquaresMap.unpack(ctx)
        A, y, s, lam, w0, C, _d = data
        wanted = dict(zip(NAMES, ctx.needs_input_grad[1:], strict=True))
        with listening(ctx.listeners), autocast_off(x):
            rhs = g if masked is None else torch.where(expand_mask(masked[0], 1), 0, g)
            v = SystemSolve.apply(system, True, "adjoint", None, rhs, *factors, *params)[0]
            if masked is not None:
                v = mask_failed(v, g, masked[0], masked[1], 1)
            K = A.shape[-1]
            w, nu, z, mu = x[..., :K], x[..., K:], v[..., :K], v[..., K:]
            Az = times(A, z)
            r = y - times(A, w)
            s2_Az, s2_r = (Az, r) if s is None else (s * s * Az, s * s * r)
            weights: Any = s
            ridge: Any = lam  # the rules below run only where the argument is present
            grads: dict[str, Any] = {
                "A": lambda: _rank_two(s2_r, z, -s2_Az, w, A),
                "y": lambda: s2_Az,
                "weights": lambda: weights * (2 * r * Az),
                "ridge": lambda: -(z * (w if w0 is None else w - w0)).sum(-1),
                "center": lambda: ridge.unsqueeze(-1) * z,
                "C": lambda: _rank_two(-nu, z, -mu, w, C),  # type: ignore[arg-type]
                "d": lambda: mu,
            }
            out = [
                _summed(grads[name](), t) if wanted[name] and t is not None else None
                for name, t in zip(NAMES, data, strict=True)
            ]
            if masked is not None:
                out = unless_all_failed(out, g, masked[0], 1)
        return (None, *out)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        with forward_mode(), listening(ctx.listeners), autocast_off(next(t for t in tangents if t is not None)):
            x, masked, factors, data, system, params = LeastSquaresMap.unpack(ctx, primal)
            moved = jvp_where(lambda *data: stationarity(x, *data), data, [primal(t) for t in tangents])
            rhs = torch.zeros_like(x) if moved is None else -moved.expand_as(x)
            clean = rhs if masked is None else torch.where(expand_mask(masked[0], 1), 0, rhs)
            x_t = SystemSolve.apply(system, False, "adjoint", None, clean, *factors, *params)[0]
            if masked is not None:
                x_t = mask_failed(x_t, rhs, masked[0], masked[1], 1)
        return (x_t, *([None] * (3 + len(factors))))

    @staticmethod
    def vmap(info: Any, in_dims: Any, on_failure: OnFailure, *data: Tensor | None) -> Any:
        present = [(t, d, k) for t, d, k in zip(data, in_dims[1:], NDIMS, strict=True) if t is not None]
        aligned = iter(align(*zip(*present, strict=True)))
        out = LeastSquaresMap.apply(on_failure, *(None if t is None else next(aligned) for t in data))
        return out, (0, 0, 0, 0, *factor_dims(out[4:], FACTOR_NDIMS[: len(out) - 4], out[0].ndim - 1))


def _diagnose(tensors: list[tuple[str, Tensor]]) -> None:
    """A clearer error than that of the solver, where the input is bad."""
    check_finite(tensors)
    ridge = dict(tensors).get("ridge")
    if ridge is not None and bool((ridge < 0).any()):
        raise ValueError(f"ridge: expected at least 0, got {float(ridge.min())}")


def _summed(g: Tensor, like: Tensor) -> Tensor:
    """A cotangent summed over the batch dimensions that `like` does not have."""
    return g if g.shape == like.shape else g.sum_to_size(like.shape)


def _rank_two(a: Tensor, b: Tensor, c: Tensor, d: Tensor, like: Tensor) -> Tensor:
    """``a b^T + c d^T`` in one pass over the result, summed over batch dimensions that `like` does not have."""
    left, right = torch.stack(torch.broadcast_tensors(a, c), -1), torch.stack(torch.broadcast_tensors(b, d), -2)
    if like.ndim == 2 and left.ndim > 2:
        return left.movedim(-2, 0).flatten(1) @ right.flatten(0, -2)
    return left @ right


def _check(
    A: Any, y: Any, weights: Any, ridge: Any, center: Any, equality: Any
) -> tuple[list[tuple[str, Tensor | None]], torch.dtype]:
    A, y = check_tensor("A", A, min_ndim=2), check_tensor("y", y, min_ndim=1)
    N, K = A.shape[-2:]
    check_shape("y", y.shape[-1:], (N,), " in its last dimension as A has rows")
    if K == 0:
        raise ValueError(f"A: expected at least one column, got shape {tuple(A.shape)}")
    if weights is not None:
        check_shape("weights", check_tensor("weights", weights, min_ndim=1).shape[-1:], (N,), " in its last dimension")
    if center is not None:
        check_shape("center", check_tensor("center", center, min_ndim=1).shape[-1:], (K,), " in its last dimension")
    if not isinstance(ridge, Tensor):
        if ridge < 0:
            raise ValueError(f"ridge: expected at least 0, got {ridge}")
        ridge = None if ridge == 0 else torch.full((), float(ridge), dtype=A.dtype, device=A.device)
    else:
        check_tensor("ridge", ridge)
    if center is not None and ridge is None:
        raise ValueError("center: expected None without a ridge (it would have no effect), got a tensor")
    C = d = None
    if equality is not None:
        if not isinstance(equality, tuple | list) or len(equality) != 2:
            raise ValueError(f"equality: expected a pair (C, d), got {type(equality).__name__}")
        C, d = check_tensor("C", equality[0], min_ndim=2), check_tensor("d", equality[1], min_ndim=1)
        p = C.shape[-2]
        check_shape("C", C.shape[-2:], (p, K), " in its last two dimensions as A has columns")
        check_shape("d", d.shape[-1:], (p,), " in its last dimension as C has rows")
        if not 0 < p < K:
            raise ValueError(f"C: expected between 1 and {K - 1} rows for {K} unknowns, got {p}")
    named = list(zip(NAMES, (A, y, weights, ridge, center, C, d), strict=True))
    present = [(n, t) for n, t in named if t is not None]
    check_same(present)
    broadcast_batch((n, tuple(t.shape[: t.ndim - NDIMS[NAMES.index(n)]])) for n, t in present)
    return named, A.dtype


@opaque
def _solve(
    A: Any, y: Any, weights: Any, ridge: Any, center: Any, equality: Any, on_failure: OnFailure
) -> Solution[Tensor]:
    check_policy(on_failure)
    lift = lifted_under_autocast
    equality = tuple(map(lift, equality)) if isinstance(equality, tuple | list) else equality
    named, _ = _check(lift(A), lift(y), lift(weights), lift(ridge), lift(center), equality)
    dtype = check_tensor("y", y).dtype
    work = compute_dtype(dtype)
    data = [None if t is None else t.to(work) for _, t in named]
    x, status, steps, residual = LeastSquaresMap.apply(on_failure, *data)[:4]
    return Solution(x[..., : A.shape[-1]].to(dtype), status, steps, residual)


def least_squares(
    A: Tensor,
    y: Tensor,
    *,
    weights: Tensor | None = None,
    ridge: float | Tensor = 0.0,
    center: Tensor | None = None,
    equality: tuple[Tensor, Tensor] | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    r"""Minimises :math:`\frac12\|s(Aw - y)\|^2 + \frac\lambda2\|w - w_0\|^2` over w, subject to :math:`Cw = d`.

    Args:
        A: ``(*batch, N, K)`` matrix; batch dimensions of all arguments broadcast.
        y: ``(*batch, N)`` targets.
        weights: ``(*batch, N)`` factors s of the rows; a row of weight 0 does not count.
        ridge: Strength :math:`\lambda \ge 0`, a number or a tensor ``(*batch)``. Needed where A has dependent columns
            or fewer rows than columns.
        center: ``(*batch, K)`` point :math:`w_0` the ridge pulls to; zero if None.
        equality: ``(C, d)`` of shapes ``(*batch, p, K)`` and ``(*batch, p)``, with independent rows and p < K.
        on_failure: ``"raise"``, ``"nan"`` (NaN for rank-deficient elements alone) or ``"ignore"``.

    Returns:
        ``(*batch, K)`` minimiser.

    Raises:
        ValueError: For a wrong shape, dtype, device, NaN or Inf, naming the argument.
        SolveError: For an element whose minimiser is not unique.

    Differentiable in every tensor argument, to any order, forward and reverse. A backward pass costs one solve with the
    stored factor and one pass over A. The ridge is differentiable at values above 0.

    Example:
        >>> import torch
        >>> from difflayers.linalg import least_squares
        >>> A = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
        >>> y = torch.tensor([1.0, 3.0, 5.0], requires_grad=True)
        >>> w = least_squares(A, y)
        >>> w.detach()
        tensor([1., 2.])
        >>> torch.autograd.grad(w[1], y)
        (tensor([-0.5000,  0.0000,  0.5000]),)

    Source: implicit differentiation of the KKT conditions; A. Bjorck, Numerical Methods for Least Squares Problems,
    1996 (corrected semi-normal equations, section 6.6.5; null-space method, section 5.1.3).
    Departure: the Cholesky factor of the scaled normal equations is used where its pivots show that one refinement
    makes it as accurate as QR; Householder QR elsewhere, per element.
    """
    return _solve(A, y, weights, ridge, center, equality, on_failure).value


def least_squares_ex(
    A: Tensor,
    y: Tensor,
    *,
    weights: Tensor | None = None,
    ridge: float | Tensor = 0.0,
    center: Tensor | None = None,
    equality: tuple[Tensor, Tensor] | None = None,
) -> Solution[Tensor]:
    """As :func:`least_squares`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        A: Matrix.
        y: Targets.
        weights: Row factors.
        ridge: Ridge strength.
        center: Point the ridge pulls to.
        equality: ``(C, d)``.

    Returns:
        The minimiser with the status of every element; its residual is the norm of the KKT conditions.
    """
    solution = _solve(A, y, weights, ridge, center, equality, "ignore")
    with torch.no_grad(), autocast_off(A):
        r = y - times(A, solution.value)
        g = times(A.mT, r if weights is None else weights * weights * r)
        if isinstance(ridge, Tensor) or ridge > 0:
            lam = ridge.unsqueeze(-1) if isinstance(ridge, Tensor) else ridge
            g = g - lam * (solution.value if center is None else solution.value - center)
        if equality is not None:  # the multiplier takes the part of the gradient that C spans
            C, d = equality
            Q, _ = torch.linalg.qr(C.mT)
            g = torch.cat(padded(g - times(Q, times(Q.mT, g)), times(C, solution.value) - d), -1)
    return Solution(solution.value, solution.status, solution.steps, torch.linalg.vector_norm(g, dim=-1))
