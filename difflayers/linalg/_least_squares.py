r"""Linear least squares as a layer, with weights, a ridge and linear equalities.

.. math:: \min_w \tfrac12\|S(Aw - y)\|^2 + \tfrac\lambda2\|w - w_0\|^2 \quad\text{s.t.}\quad Cw = d, \qquad S = \mathrm{diag}(s)

With :math:`H = A^T S^2 A + \lambda I`, the multiplier :math:`\nu` of the equalities and :math:`r = y - Aw`, the adjoint
:math:`(z, \mu)` solves the same KKT system with right-hand side :math:`(\bar w, \bar\nu)`, and

.. math::
    \bar A = S^2(r z^T - (Az) w^T),\quad \bar y = S^2 A z,\quad \bar s_i = 2 s_i r_i (Az)_i,\quad
    \bar\lambda = -z^T(w - w_0),\quad \bar w_0 = \lambda z,\quad \bar C = -(\nu z^T + \mu w^T),\quad \bar d = \mu .

One factor ``R`` with ``R^T R = Z^T H Z`` (``Z`` an orthonormal basis of the null space of C) serves the forward pass and
every derivative, and nothing is ever larger than A.
"""

from __future__ import annotations

from dataclasses import dataclass
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

from ._autodiff import alive, autocast_off, forward_mode, jvp_where, opaque, plain_forward, primal, quick_apply
from ._direct import direct_info, solve_columns, tiny_pivots
from ._grads_batched import batched_backward
from ._system import (
    LinearSolver,
    LinearSystem,
    Params,
    SystemSolve,
    align,
    expand_mask,
    factor_dims,
    harmless,
    mask_failed,
)

NAMES = ("A", "y", "weights", "ridge", "center", "C", "d")
NDIMS = (2, 1, 1, 0, 1, 2, 1)
FACTOR_NDIMS = (2, 0, 2, 2)
Data = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _times(M: Tensor, v: Tensor) -> Tensor:
    return (M @ v.unsqueeze(-1)).squeeze(-1)


def _gram_times(A: Tensor, s: Tensor | None, lam: Tensor | None, w: Tensor) -> Tensor:
    """``H w``."""
    t = _times(A, w)
    out = _times(A.mT, t if s is None else s * s * t)
    return out if lam is None else out + lam.unsqueeze(-1) * w


def stationarity(x: Tensor, *data: Tensor | None) -> Tensor:
    """The KKT residual at ``x = (w, nu)``: zero at the solution."""
    A, y, s, lam, w0, C, d = data
    assert A is not None and y is not None
    w = x[..., : A.shape[-1]]
    t = _times(A, w) - y
    top = _times(A.mT, t if s is None else s * s * t)
    if lam is not None:
        top = top + lam.unsqueeze(-1) * (w if w0 is None else w - w0)
    if C is None or d is None:
        return top
    nu = x[..., A.shape[-1] :]
    return torch.cat(_padded(top + _times(C.mT, nu), _times(C, w) - d), -1)


def _padded(top: Tensor, bottom: Tensor) -> tuple[Tensor, Tensor]:
    batch = torch.broadcast_shapes(top.shape[:-1], bottom.shape[:-1])
    return top.expand(*batch, top.shape[-1]), bottom.expand(*batch, bottom.shape[-1])


@dataclass(frozen=True, eq=False)
class KKTSystem(LinearSystem):
    """``(w, nu) -> (H w + C^T nu, C w)`` with ``params = (A, weights?, ridge?, C?)``."""

    weighted: bool = False
    ridged: bool = False
    rows: int = 0

    def unpack(self, params: Params) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """``A, s, lam, C``, None where absent."""
        A, *rest = params
        s = rest.pop(0) if self.weighted else None
        lam = rest.pop(0) if self.ridged else None
        return A, s, lam, rest.pop(0) if self.rows else None

    def apply(self, params: Params, v: Tensor, transpose: bool) -> Tensor:
        A, s, lam, C = self.unpack(params)
        w, nu = v[..., : A.shape[-1]], v[..., A.shape[-1] :]
        top = _gram_times(A, s, lam, w)
        return top if C is None else torch.cat(_padded(top + _times(C.mT, nu), _times(C, w)), -1)


@dataclass(frozen=True)
class NullSpaceSolver(LinearSolver):
    """Solves the KKT system with ``factors = (R, singular)`` or ``(R, singular, Q, Rc)`` where there are equalities."""

    def solve(
        self, system: LinearSystem, params: Params, factors: Params, rhs: Tensor, transpose: bool, init: Tensor | None
    ) -> tuple[Tensor, Info]:
        assert isinstance(system, KKTSystem)
        A, s, lam, _ = system.unpack(params)
        R, singular, *equalities = factors
        K, p = A.shape[-1], system.rows
        if not equalities:
            x = _gram_solve(R, rhs)
        else:
            Q, Rc = equalities
            Q1, Z = Q[..., :p], Q[..., p:]
            g, h = rhs[..., :K], rhs[..., K:]
            w = _times(Q1, _lower_solve(Rc, h))
            w = w + _times(Z, _gram_solve(R, _times(Z.mT, g - _gram_times(A, s, lam, w))))
            nu = _upper_solve(Rc, _times(Q1.mT, g - _gram_times(A, s, lam, w)))
            x = torch.cat(_padded(w, nu), -1)
        return x, direct_info(singular, x, 1)


def _gram_solve(R: Tensor, v: Tensor) -> Tensor:
    """``(R^T R)^-1 v``."""
    if not R.shape[-1]:
        return v
    return solve_columns(lambda R, b: torch.cholesky_solve(b, R, upper=True), (R,), (2,), v)


def _upper_solve(R: Tensor, v: Tensor) -> Tensor:
    return solve_columns(lambda R, b: torch.linalg.solve_triangular(R, b, upper=True), (R,), (2,), v)


def _lower_solve(R: Tensor, v: Tensor) -> Tensor:
    return solve_columns(lambda R, b: torch.linalg.solve_triangular(R.mT, b, upper=False), (R,), (2,), v)


def factorise(A: Tensor, s: Tensor | None, lam: Tensor | None, C: Tensor | None) -> tuple[Params, Tensor, Tensor]:
    """Factors, the weighted matrix restricted to the null space of C, and the elements that needed Householder QR.

    Sound elements take the Cholesky factor of the column-scaled normal equations: a third of the time of QR, and with
    one step of refinement as accurate. Elements where its pivots warn of a condition number beyond that take QR.
    """
    M = A if s is None else s.unsqueeze(-1) * A
    equalities: Params = ()
    bad_rows = torch.zeros((), dtype=torch.bool, device=A.device)
    if C is not None:
        p = C.shape[-2]
        Q, Rc = torch.linalg.qr(C.mT, mode="complete")
        Rc = Rc[..., :p, :]
        bad_rows = tiny_pivots(Rc.diagonal(dim1=-2, dim2=-1), torch.linalg.vector_norm(C, dim=-1))
        equalities = (Q, Rc)
        M = M @ Q[..., p:]
    G = M.mT @ M
    if lam is not None:
        G = G + lam[..., None, None] * torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    scale = G.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(scale > 0, scale, 1).sqrt()
    L, info = torch.linalg.cholesky_ex(G / scale.unsqueeze(-1) / scale.unsqueeze(-2))
    R = L.mT * scale.unsqueeze(-2)
    pivots = L.diagonal(dim1=-2, dim2=-1)
    if not pivots.shape[-1]:
        singular = bad_rows.expand(R.shape[:-2])
        return (R, singular, *equalities), M, torch.zeros_like(singular)
    poor = (info != 0) | ~(pivots.amin(-1) ** 2 > 100 * torch.finfo(A.dtype).eps ** 0.5)
    singular = torch.zeros_like(poor)
    if not poor.is_meta and bool(poor.any()):
        rows = _with_ridge(M.expand(*poor.shape, *M.shape[-2:])[poor], _pick(lam, poor))
        _, sharp = torch.linalg.qr(_tall(rows), mode="r")
        R, singular = R.clone(), singular.clone()
        R[poor] = sharp
        noise = torch.linalg.vector_norm(rows, dim=-2) * max(rows.shape[-2] / rows.shape[-1], 1.0)
        singular[poor] = tiny_pivots(sharp.diagonal(dim1=-2, dim2=-1), noise)
    return (R, singular | bad_rows, *equalities), M, poor


def _pick(t: Tensor | None, where: Tensor) -> Tensor | None:
    return None if t is None else t.expand(where.shape)[where]


def _with_ridge(M: Tensor, lam: Tensor | None) -> Tensor:
    """The rows of the ridge below the matrix."""
    if lam is None:
        return M
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    return torch.cat([M, lam.sqrt()[..., None, None] * eye], -2)


def _tall(M: Tensor) -> Tensor:
    """At least as many rows as columns, so that R is square (and shows zero pivots)."""
    missing = M.shape[-1] - M.shape[-2]
    return M if missing <= 0 else torch.cat([M, M.new_zeros(*M.shape[:-2], missing, M.shape[-1])], -2)


def solve_forward(*data: Tensor | None) -> tuple[Tensor, Info, Params]:
    """``(w, nu)``, the report and the factors, on plain tensors."""
    A, y, s, lam, w0, C, d = data
    assert A is not None and y is not None
    factors, M, poor = factorise(A, s, lam, C)
    R, singular, *equalities = factors
    K = A.shape[-1]
    batch = torch.broadcast_shapes(*(t.shape[: t.ndim - k] for t, k in zip(data, NDIMS, strict=True) if t is not None))
    Z = None
    w = y.new_zeros(*batch, K)
    if equalities and C is not None and d is not None:
        Q, Rc = equalities
        Q1, Z = Q[..., : C.shape[-2]], Q[..., C.shape[-2] :]
        w = w + _times(Q1, _lower_solve(Rc, d))

    def misfit(w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weighted residual, and the ridge's, in the null space of C."""
        b = y - _times(A, w)
        b = b if s is None else s * b
        if lam is None:
            return b, None
        e = -w if w0 is None else w0 - w
        return b, e if Z is None else _times(Z.mT, e)

    def correct(w: Tensor, u: Tensor) -> Tensor:
        return w + (u if Z is None else _times(Z, u))

    start, b, e = w, *misfit(w)
    for again in (True, False):  # semi-normal equations, and one refinement
        g = _times(M.mT, b)
        w = correct(w, _gram_solve(R, g if e is None or lam is None else g + lam.unsqueeze(-1) * e))
        if again:
            b, e = misfit(w)
    if not poor.is_meta and bool(poor.any()):
        w = torch.where(poor.unsqueeze(-1), correct(start, _householder(M, lam, *misfit(start), poor)), w)
    if C is not None and equalities:
        r = y - _times(A, w)
        t = _times(A.mT, r if s is None else s * s * r)
        if lam is not None:
            t = t - lam.unsqueeze(-1) * (w if w0 is None else w - w0)
        w = torch.cat(_padded(w, _upper_solve(Rc, _times(Q1.mT, t))), -1)
    if lam is not None:
        singular = singular | (lam < 0)
    return w, direct_info(singular, w, 1), factors


def _householder(M: Tensor, lam: Tensor | None, b: Tensor, e: Tensor | None, poor: Tensor) -> Tensor:
    """``argmin ||M u - b||^2 + lam ||u - e||^2`` by QR, for the poor elements; zero for the others."""
    batch = torch.broadcast_shapes(poor.shape, b.shape[:-1])
    n = M.shape[-1]
    out = b.new_zeros(*batch, n)
    where = poor.expand(batch)
    rows = _with_ridge(M.expand(*batch, *M.shape[-2:])[where], _pick(lam, where))
    target = b.expand(*batch, b.shape[-1])[where]
    if e is not None and lam is not None:
        target = torch.cat([target, (lam.sqrt().unsqueeze(-1) * e).expand(*batch, n)[where]], -1)
    rows = _tall(rows)
    target = torch.cat([target, target.new_zeros(*target.shape[:-1], rows.shape[-2] - target.shape[-1])], -1)
    Q, R = torch.linalg.qr(rows)
    out[where] = _upper_solve(R, _times(Q.mT, target))
    return out


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
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
        x, masked, factors, data, system, params = LeastSquaresMap.unpack(ctx)
        A, y, s, lam, w0, C, _ = data
        wanted = dict(zip(NAMES, ctx.needs_input_grad[1:], strict=True))
        with listening(ctx.listeners), autocast_off(x):
            rhs = g if masked is None else torch.where(expand_mask(masked[0], 1), 0, g)
            v = SystemSolve.apply(system, True, "adjoint", None, rhs, *factors, *params)[0]
            if masked is not None:
                v = mask_failed(v, g, *masked, 1)
            K = A.shape[-1]
            w, nu, z, mu = x[..., :K], x[..., K:], v[..., :K], v[..., K:]
            Az = _times(A, z)
            r = y - _times(A, w)
            s2_Az, s2_r = (Az, r) if s is None else (s * s * Az, s * s * r)
            grads = {
                "A": lambda: _rank_two(s2_r, z, -s2_Az, w, A),
                "y": lambda: s2_Az,
                "weights": lambda: 2 * s * r * Az,
                "ridge": lambda: -(z * (w if w0 is None else w - w0)).sum(-1),
                "center": lambda: lam.unsqueeze(-1) * z,  # type: ignore[union-attr]
                "C": lambda: _rank_two(-nu, z, -mu, w, C),  # type: ignore[arg-type]
                "d": lambda: mu,
            }
            out = [
                _summed(grads[name](), t) if wanted[name] and t is not None else None
                for name, t in zip(NAMES, data, strict=True)
            ]
        return (None, *out)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        with forward_mode(), listening(ctx.listeners), autocast_off(next(t for t in tangents if t is not None)):
            x, masked, factors, data, system, params = LeastSquaresMap.unpack(ctx, primal)
            moved = jvp_where(lambda *data: stationarity(x, *data), data, [primal(t) for t in tangents])  # type: ignore[arg-type]
            rhs = torch.zeros_like(x) if moved is None else -moved.expand_as(x)
            clean = rhs if masked is None else torch.where(expand_mask(masked[0], 1), 0, rhs)
            x_t = SystemSolve.apply(system, False, "adjoint", None, clean, *factors, *params)[0]
            if masked is not None:
                x_t = mask_failed(x_t, rhs, *masked, 1)
        return (x_t, *([None] * (3 + len(factors))))

    @staticmethod
    def vmap(info: Any, in_dims: Any, on_failure: OnFailure, *data: Tensor | None) -> Any:
        present = [(t, d, k) for t, d, k in zip(data, in_dims[1:], NDIMS, strict=True) if t is not None]
        aligned = iter(align(*zip(*present, strict=True)))  # type: ignore[arg-type]
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
    named, dtype = _check(A, y, weights, ridge, center, equality)
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

    Source: implicit differentiation of the KKT conditions; A. Bjorck, Numerical Methods for Least Squares Problems, 1996
    (corrected semi-normal equations, section 6.6.5; null-space method, section 5.1.3).
    Departure: the Cholesky factor of the scaled normal equations is used where its pivots show that one refinement makes
    it as accurate as QR; Householder QR elsewhere, per element.
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
    with torch.no_grad():
        r = y - _times(A, solution.value)
        g = _times(A.mT, r if weights is None else weights * weights * r)
        if isinstance(ridge, Tensor) or ridge > 0:
            lam = ridge.unsqueeze(-1) if isinstance(ridge, Tensor) else ridge
            g = g - lam * (solution.value if center is None else solution.value - center)
        if equality is not None:  # the multiplier takes the part of the gradient that C spans
            C, d = equality
            Q, _ = torch.linalg.qr(C.mT)
            g = torch.cat(_padded(g - _times(Q, _times(Q.mT, g)), _times(C, solution.value) - d), -1)
    return Solution(solution.value, solution.status, solution.steps, torch.linalg.vector_norm(g, dim=-1))
