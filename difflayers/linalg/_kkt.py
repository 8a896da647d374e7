r"""Solving the KKT system of linear least squares: one triangular factor for the solution and all its derivatives.

.. math:: \begin{pmatrix} H & C^T \\ C & 0 \end{pmatrix} \begin{pmatrix} w \\ \nu \end{pmatrix} =
    \begin{pmatrix} A^T S^2 y + \lambda w_0 \\ d \end{pmatrix}, \qquad H = A^T S^2 A + \lambda I

The factor is ``R`` with ``R^T R = Z^T H Z``, ``Z`` an orthonormal basis of the null space of C (A. Bjorck, Numerical
Methods for Least Squares Problems, 1996, section 5.1.3). Nothing here is ever larger than A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._solution import Info, Status

from ._direct import direct_info, solve_columns, tiny_pivots
from ._system import LinearSolver, LinearSystem, Params, times

NAMES = ("A", "y", "weights", "ridge", "center", "C", "d")
NDIMS = (2, 1, 1, 0, 1, 2, 1)
FACTOR_NDIMS = (2, 0, 2, 2)
Data = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _gram_times(A: Tensor, s: Tensor | None, lam: Tensor | None, w: Tensor) -> Tensor:
    """``H w``."""
    t = times(A, w)
    out = times(A.mT, t if s is None else s * s * t)
    return out if lam is None else out + lam.unsqueeze(-1) * w


def stationarity(x: Tensor, *data: Tensor | None) -> Tensor:
    """The KKT residual at ``x = (w, nu)``: zero at the solution."""
    A, y, s, lam, w0, C, d = data
    assert A is not None and y is not None
    w = x[..., : A.shape[-1]]
    t = times(A, w) - y
    top = times(A.mT, t if s is None else s * s * t)
    if lam is not None:
        top = top + lam.unsqueeze(-1) * (w if w0 is None else w - w0)
    if C is None or d is None:
        return top
    nu = x[..., A.shape[-1] :]
    return torch.cat(padded(top + times(C.mT, nu), times(C, w) - d), -1)


def padded(top: Tensor, bottom: Tensor) -> tuple[Tensor, Tensor]:
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
        return top if C is None else torch.cat(padded(top + times(C.mT, nu), times(C, w)), -1)


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
            w = times(Q1, _lower_solve(Rc, h))
            w = w + times(Z, _gram_solve(R, times(Z.mT, g - _gram_times(A, s, lam, w))))
            nu = _upper_solve(Rc, times(Q1.mT, g - _gram_times(A, s, lam, w)))
            x = torch.cat(padded(w, nu), -1)
        return x, direct_info(singular, x, 1)


def _gram_solve(R: Tensor, v: Tensor) -> Tensor:
    """``(R^T R)^-1 v``."""
    if not R.shape[-1]:
        return v
    # cholesky_solve copies its factor, which takes longer than the solve where that is large
    solve = lambda R, b: torch.linalg.solve_triangular(  # noqa: E731
        R, torch.linalg.solve_triangular(R.mT, b, upper=False), upper=True
    )
    return solve_columns(solve, (R,), (2,), v)


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
    """``(w, nu)``, the report and the factors, on plain tensors.

    The problem is solved for A and y of order one, so that no product of small or large numbers leaves the range.
    """
    A, y, s, lam, w0, C, d = data
    assert A is not None and y is not None
    p, q = _power_of_two(A, 2), _power_of_two(y, 1)
    if not p.is_meta and not bool(((p.log2().abs() > _SAFE) | (q.log2().abs() > _SAFE)).any()):
        return _solve_scaled(*data)  # scaling by powers of two changes no digit, so it is left out where it can be
    column = lambda t: t.unsqueeze(-1)  # noqa: E731
    x, info, (R, *rest) = _solve_scaled(
        A / column(column(p)),
        y / column(q),
        s,
        None if lam is None else lam / p**2,
        None if w0 is None else w0 * column(p / q),
        C,
        None if d is None else d * column(p / q),
    )
    K = A.shape[-1]
    x = torch.cat([x[..., :K] * column(q / p), x[..., K:] * column(q * p)], -1)
    return x, direct_info(rest[0] | (info.status == Status.SINGULAR), x, 1), (R * column(column(p)), *rest)


_SAFE = 20  # squares of numbers up to 2**20, and of their rounding, are far from both ends of float32


def _power_of_two(t: Tensor, event_ndim: int) -> Tensor:
    """A power of two near the largest magnitude of each element: scaling by it is exact. 1 for zeros."""
    largest = torch.linalg.vector_norm(t.flatten(t.ndim - event_ndim), math.inf, dim=-1)
    exponent = torch.frexp(torch.where((largest > 0) & torch.isfinite(largest), largest, 1))[1]
    return torch.ldexp(torch.ones_like(largest), exponent)


def _solve_scaled(*data: Tensor | None) -> tuple[Tensor, Info, Params]:
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
        w = w + times(Q1, _lower_solve(Rc, d))

    def misfit(w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weighted residual, and the ridge's, in the null space of C."""
        b = y - times(A, w)
        b = b if s is None else s * b
        if lam is None:
            return b, None
        e = -w if w0 is None else w0 - w
        return b, e if Z is None else times(Z.mT, e)

    def correct(w: Tensor, u: Tensor) -> Tensor:
        return w + (u if Z is None else times(Z, u))

    start, b, e = w, *misfit(w)
    for again in (True, False):  # semi-normal equations, and one refinement
        g = times(M.mT, b)
        w = correct(w, _gram_solve(R, g if e is None or lam is None else g + lam.unsqueeze(-1) * e))
        if again:
            b, e = misfit(w)
    if not poor.is_meta and bool(poor.any()):
        w = torch.where(poor.unsqueeze(-1), correct(start, _householder(M, lam, *misfit(start), poor)), w)
    if C is not None and equalities:
        r = y - times(A, w)
        t = times(A.mT, r if s is None else s * s * r)
        if lam is not None:
            t = t - lam.unsqueeze(-1) * (w if w0 is None else w - w0)
        w = torch.cat(padded(w, _upper_solve(Rc, times(Q1.mT, t))), -1)
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
    out[where] = _upper_solve(R, times(Q.mT, target))
    return out
