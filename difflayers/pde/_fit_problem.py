r"""The constrained nonlinear least-squares problem as the engine sees it.

The unknown is :math:`x = (w, \nu)` with the multipliers of the equalities, the residual the gradient of the Lagrangian,

.. math:: \sum_n s_n^2 B_n^T F_n r_n + A^T S_A^2 (A w - y) + \lambda (w - w_0) + C^T \nu = 0, \qquad C w = d,

with :math:`F_n = \partial F / \partial T` at :math:`T_n = T_n^0 + B_n w`, and its Jacobian the exact Hessian: that of
Gauss and Newton leaves :math:`\sum s_n^2 r_n F_n''` out, which is wrong wherever the residual is not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from difflayers._checks import check_finite
from difflayers._solution import Info, Status
from difflayers.implicit import ImplicitProblem, LevenbergMarquardt
from difflayers.linalg._autodiff import autocast_off, gradients, push_forward, vjp_where
from difflayers.linalg._direct import direct_info
from difflayers.linalg._kkt import padded
from difflayers.linalg._kkt import stationarity as linear_stationarity
from difflayers.linalg._system import times

from ._equality_rows import EqualityRows, is_row
from ._heavy_rows import minimise_with_rows
from ._levenberg_marquardt import Fit, Found, gram_solve
from ._pointwise import Pointwise

NAMES = ("basis_terms", "offset", "weights", "A", "y", "row_weights", "ridge", "center", "C", "d", "init")
NDIMS = (3, 2, 1, 2, 1, 1, 0, 1, 2, 1, 1)
FACTOR_NDIMS = (2, 0, 0, 2, 2)
Args = tuple[Tensor, ...]


@dataclass(frozen=True)
class FitProblem:
    """What a call asks for, without its tensors.

    Attributes:
        F: The pointwise residual.
        present: Which of `NAMES` are given.
        param_ndims: Event dimensions of the parameters.
        param_names: Their names in messages.
        solver: Options of the iteration.
        biased: Gauss-Newton in the adjoint.
    """

    F: Pointwise
    present: tuple[bool, ...]
    param_ndims: tuple[int, ...]
    param_names: tuple[str, ...]
    solver: LevenbergMarquardt
    biased: bool

    def implicit(self, name: str) -> ImplicitProblem:
        """The problem for the engine."""
        ndims = tuple(k for k, here in zip(NDIMS, self.present, strict=True) if here)
        names = tuple(n for n, here in zip(NAMES, self.present, strict=True) if here)
        constrained = self.present[NAMES.index("C")]
        return ImplicitProblem(
            solve=self.solve,
            residual=self.stationarity,
            linear_solve=self.linear_solve,
            cotangents=self.cotangents,
            value_ndim=1,
            arg_ndims=(*ndims, *self.param_ndims),
            factor_ndims=FACTOR_NDIMS if constrained else FACTOR_NDIMS[:3],
            symmetric=True,
            jacobian_product=self.gauss_newton_product if self.biased else None,
            name=name,
            arg_names=(*names, *self.param_names),
            diagnose=_diagnose,
        )

    def unpack(self, args: Args) -> tuple[dict[str, Tensor | None], Args]:
        """The given arguments by name, None for the others, and the parameters."""
        queue = iter(args)
        named = {n: next(queue) if here else None for n, here in zip(NAMES, self.present, strict=True)}
        return named, tuple(queue)

    # --------------------------------------------------------------------------------------------------- the problem

    def terms(self, w: Tensor, data: dict[str, Tensor | None]) -> Tensor:
        """``T0 + B w``."""
        B, T0 = data["basis_terms"], data["offset"]
        assert B is not None
        T = times(B.flatten(-3, -2), w).unflatten(-1, B.shape[-3:-1])
        return T if T0 is None else T + T0

    def stationarity(self, x: Tensor, *args: Tensor) -> Tensor:
        """The gradient of the Lagrangian by w and the equalities."""
        data, params = self.unpack(args)
        B, s = data["basis_terms"], data["weights"]
        assert B is not None
        with autocast_off(x):
            w = x[..., : B.shape[-1]]
            r, pull = self.F.pull(self.terms(w, data), params)
            h = pull(r if s is None else (s * s).unsqueeze(-1) * r)[0]
            top = times(B.flatten(-3, -2).mT, h.flatten(-2))
            rest = self.quadratic_part(x, data)
            return rest + torch.nn.functional.pad(top, (0, rest.shape[-1] - top.shape[-1]))

    @staticmethod
    def quadratic_part(x: Tensor, data: dict[str, Tensor | None]) -> Tensor:
        """What rows, ridge and equalities add to the gradient."""
        A, y, B = data["A"], data["y"], data["basis_terms"]
        assert B is not None
        if A is None or y is None:
            A, y = B.new_zeros(0, B.shape[-1]), B.new_zeros(0)
        s, ridge, center, C, d = (data[n] for n in ("row_weights", "ridge", "center", "C", "d"))
        if C is None or d is None:
            return linear_stationarity(x, A, y, s, ridge, center, None, None)
        # a row of zeros is none: its multiplier is zero, and nothing depends on its entries
        real = is_row(C)
        C, d = torch.where(real.unsqueeze(-1), C, 0), torch.where(real, d, 0)
        out = linear_stationarity(x, A, y, s, ridge, center, C, d)
        K = B.shape[-1]
        return out + torch.nn.functional.pad(torch.where(real, 0, x[..., K:]), (K, 0))

    def lagrangian(self, x: Tensor, *args: Tensor) -> Tensor:
        """``(*batch)`` objective plus multipliers times equalities, which are zero at the solution."""
        with autocast_off(x):
            return self._lagrangian(x, *args)

    def _lagrangian(self, x: Tensor, *args: Tensor) -> Tensor:
        data, params = self.unpack(args)
        B, A, y, ridge, C, d = (data[n] for n in ("basis_terms", "A", "y", "ridge", "C", "d"))
        assert B is not None
        w, nu = x[..., : B.shape[-1]], x[..., B.shape[-1] :]
        r = self.F(self.terms(w, data), params)
        s, row_weights, center = data["weights"], data["row_weights"], data["center"]
        out = (r if s is None else s.unsqueeze(-1) * r).square().sum((-2, -1)) / 2
        if A is not None and y is not None:
            e = times(A, w) - y
            out = out + (e if row_weights is None else row_weights * e).square().sum(-1) / 2
        if ridge is not None:
            out = out + ridge * (w if center is None else w - center).square().sum(-1) / 2
        return out if C is None or d is None else out + (nu * (times(C, w) - d)).sum(-1)

    # ------------------------------------------------------------------------------------------------------- forward

    def solve(self, *args: Tensor) -> tuple[Tensor, Info, Args]:
        """The minimiser and its multipliers, by restriction to the solutions of the equalities."""
        x, found, factors = self.find(*args)
        return x, Info(found.status, found.steps, found.residual), factors

    def fit(self, data: dict[str, Tensor | None], params: Args) -> Fit:
        """The problem without equalities, the weights of the rows in them."""
        B, A, y, weights = (data[n] for n in ("basis_terms", "A", "y", "row_weights"))
        assert B is not None
        A, y = (B.new_zeros(0, B.shape[-1]), B.new_zeros(0)) if A is None or y is None else (A, y)
        if weights is not None:
            A, y = weights.unsqueeze(-1) * A, weights * y
        return Fit(self.F, params, B, data["offset"], data["weights"], A, y, data["ridge"], data["center"])

    def find(self, *args: Tensor) -> tuple[Tensor, Found, Args]:
        """The same with all there is to tell."""
        data, params = self.unpack(args)
        B, s, ridge, center, C, d = (data[n] for n in ("basis_terms", "weights", "ridge", "center", "C", "d"))
        assert B is not None
        ndims = [k for k, here in zip(NDIMS, self.present, strict=True) if here] + list(self.param_ndims)
        batch = torch.broadcast_shapes(*(a.shape[: a.ndim - k] for a, k in zip(args, ndims, strict=True)))
        K = B.shape[-1]
        fit = self.fit(data, params)
        A, y = fit.A, fit.y
        start = data["init"] if data["init"] is not None else center
        start = B.new_zeros(K) if start is None else start
        # a start that is not finite is none; an element with such data fails by itself
        start = torch.where(torch.isfinite(start), start, 0).expand(*batch, K)
        if C is None or d is None:
            found = minimise_with_rows(fit, start, self.solver, self.biased)
            return found.v, self.judged(found, ridge), (found.R, found.singular, is_rough(found))
        Q, Rc, dependent, free = EqualityRows.factorise(C)
        split = EqualityRows.of(C, Q, Rc, free)
        Z, w0 = split.Z, split.particular(d)
        T = self.terms(w0, data)
        BZ = (B.flatten(-3, -2) @ Z).unflatten(-2, B.shape[-3:-1])
        inner = None if center is None else times(Z.mT, center)
        A, y = A @ Z, y - times(A, w0)
        if free > Z.shape[-2] - C.shape[-2]:
            idle = split.idle()
            A, y = _stacked(A, idle, 2), _stacked(y, idle[..., 0] * 0, 1)
        fit = Fit(self.F, params, BZ, T, s, A, y, ridge, inner)
        found = minimise_with_rows(fit, times(Z.mT, start), self.solver, self.biased)
        bad = dependent | (~is_row(C) & (d != 0)).any(-1)  # nothing solves 0 w = 1
        singular = found.singular | bad
        status = torch.where(bad, int(Status.SINGULAR), found.status)
        found = self.judged(found._replace(status=status, singular=singular), ridge)
        w = w0 + times(Z, found.v)
        x = torch.cat(padded(w, torch.zeros_like(d)), -1)
        gradient = self.stationarity(x, *args)[..., :K]
        x = torch.cat(padded(w, split.multipliers(-gradient)), -1)
        return x, found, (found.R, singular, is_rough(found), Q, Rc)

    @staticmethod
    def judged(found: Found, ridge: Tensor | None) -> Found:
        """A negative ridge is an error of the caller, whatever came out."""
        if ridge is None:
            return found
        return found._replace(status=torch.where(ridge < 0, int(Status.SINGULAR), found.status))

    # ------------------------------------------------------------------------------------------------------- adjoint

    def gauss_newton_product(self, x: Tensor, args: Args, v: Tensor, transpose: bool) -> Tensor:
        """The Jacobian without the curvature of F."""
        data, params = self.unpack(args)
        B, s = data["basis_terms"], data["weights"]
        assert B is not None
        K = B.shape[-1]
        T = self.terms(x[..., :K], data)
        moved = times(B.flatten(-3, -2), v[..., :K]).unflatten(-1, B.shape[-3:-1])
        r = push_forward(lambda T: self.F(T, params), [T], [moved])
        h = self.F.pull(T, params)[1](r if s is None else (s * s).unsqueeze(-1) * r)[0]
        top = times(B.flatten(-3, -2).mT, h.flatten(-2))
        rest = push_forward(lambda x: self.quadratic_part(x, data), [x], [v])
        return rest + torch.nn.functional.pad(top, (0, rest.shape[-1] - top.shape[-1]))

    def linear_solve(self, x: Tensor, args: Args, factors: Args, rhs: Tensor, transpose: bool) -> tuple[Tensor, Info]:
        """The KKT system with the factor of the Hessian on the null space of the equalities."""
        R, singular, rough, *equalities = factors
        batch = torch.broadcast_shapes(rhs.shape[:-1], singular.shape)
        data, params = self.unpack(args)
        fit = self.fit(data, params)
        refine = rough.is_meta or bool(rough.any())
        if not equalities and not refine:
            out = gram_solve(R, rhs)
            return out, direct_info(singular.expand(batch), out, 1)
        K = fit.B.shape[-1]
        with autocast_off(x):
            point = fit.at(x[..., :K])
            P = None if self.biased else fit.curved(point)
        hessian = partial(fit.hessian_product, point, P)
        if not equalities:
            out = refined(R, hessian, rhs, rough)
            return out, direct_info(singular.expand(batch), out, 1)
        Q, Rc = equalities
        C = data["C"]
        assert C is not None
        split = EqualityRows.of(C, Q, Rc, R.shape[-1])
        Z = split.Z
        g, h = rhs[..., :K], rhs[..., K:]
        w = split.particular(h)
        # most cotangents ask for w alone: then there is nothing to move
        top = g - hessian(w) if w.is_meta or bool((w != 0).any()) else g
        top = times(Z.mT, top)
        inner = lambda v: times(Z.mT, hessian(times(Z, v)))  # noqa: E731
        w = w + times(Z, refined(R, inner, top, rough) if refine else gram_solve(R, top))
        nu = split.multipliers(g - hessian(w), h)
        out = torch.cat(padded(w, nu), -1)
        return out, direct_info(singular.expand(batch), out, 1)

    def cotangents(self, x: Tensor, args: Args, u: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """``(dG/darg)^T u`` for a plain backward pass: two products with B and one matrix of rank two like it."""
        data, params = self.unpack(args)
        names = [n for n, here in zip(NAMES, self.present, strict=True) if here]
        want = dict(zip(names, wanted, strict=False))
        want_params = list(wanted[len(names) :])
        B, s = data["basis_terms"], data["weights"]
        assert B is not None
        K = B.shape[-1]
        w, q = x[..., :K], u[..., :K]
        Bq = times(B.flatten(-3, -2), q).unflatten(-1, B.shape[-3:-1])
        T = self.terms(w, data)

        def pairing(T: Tensor, s: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
            r, pull = self.F.pull(T, params)
            h = pull((s * s).unsqueeze(-1) * r)[0]
            return (h * Bq).sum(), h

        with torch.enable_grad():
            leaves = [t.detach() for t in (T, T.new_ones(T.shape[-2]) if s is None else s, *params)]
            asked = [True, want.get("weights", False), *want_params]
            for leaf, ask in zip(leaves, asked, strict=True):
                leaf.requires_grad_(ask)
            value, h = pairing(leaves[0], leaves[1], *leaves[2:])
            picked = [leaf for leaf, ask in zip(leaves, asked, strict=True) if ask]
            if value.requires_grad:
                got = iter(gradients(value, picked))
            else:
                got = iter([torch.zeros_like(leaf) for leaf in picked])
            T_bar, s_bar, *params_bar = (next(got) if ask else None for ask in asked)
        assert T_bar is not None
        h = h.detach()
        out: dict[str, Tensor | None] = {"offset": T_bar, "weights": s_bar}
        if want["basis_terms"]:
            left = torch.stack([h.flatten(-2), T_bar.flatten(-2)], -1)
            out["basis_terms"] = _summed_product(left, torch.stack([q, w], -2), B)
        rest = [n for n in names if want[n] and n not in ("basis_terms", "offset", "weights", "init")]
        if rest:
            given: list[Tensor] = [data[n] for n in rest]  # type: ignore[misc]
            part = lambda *some: self.quadratic_part(x, data | dict(zip(rest, some, strict=True)))  # noqa: E731
            out |= dict(zip(rest, vjp_where(part, given, [True] * len(rest), u), strict=True))
        full = [(out.get(n) if want[n] else None) for n in names] + params_bar
        return [None if t is None else t.sum_to_size(a.shape) for t, a in zip(full, args, strict=True)]


def is_rough(found: Found) -> Tensor:
    """The elements whose Hessian was formed and is so far from orthogonal that solves with it are refined.

    Linear problems that are ill-conditioned have their factor from Householder QR.
    """
    pivots = found.R.diagonal(dim1=-2, dim2=-1).abs() / torch.linalg.vector_norm(found.R, dim=-2)
    return ~found.linear & ~(pivots.square() > torch.finfo(pivots.dtype).eps ** 0.25).all(-1)


def refined(R: Tensor, product: Callable[[Tensor], Tensor], rhs: Tensor, rough: Tensor) -> Tensor:
    """``(R^T R)^-1 rhs``, for the `rough` elements after two steps of iterative refinement, where they contract.

    The Hessian squares the condition number of the basis. Applied in factors it does not, and so the error falls to
    what the data allow.
    """
    z = gram_solve(R, rhs)
    size = torch.linalg.vector_norm(times(R, z), dim=-1, keepdim=True)
    for _ in range(2):
        more = gram_solve(R, rhs - product(z))
        length = torch.linalg.vector_norm(times(R, more), dim=-1, keepdim=True)
        z, size = torch.where(rough.unsqueeze(-1) & (length <= size / 2), z + more, z), length
    return z


def _summed_product(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """``left @ right`` in the shape of `like`, summed over batch dimensions that it does not have."""
    if like.ndim == 3 and left.ndim > 2:
        out = left.movedim(-2, 0).flatten(1) @ right.flatten(0, -2)
    else:
        out = (left @ right).sum_to_size(*like.shape[:-3], left.shape[-2], like.shape[-1])
    return out.reshape(like.shape)


def _stacked(top: Tensor, bottom: Tensor, event_ndim: int) -> Tensor:
    """Rows below rows, for the batch of both."""
    batch = torch.broadcast_shapes(top.shape[: top.ndim - event_ndim], bottom.shape[: bottom.ndim - event_ndim])
    parts = [t.expand(*batch, *t.shape[t.ndim - event_ndim :]) for t in (top, bottom)]
    return torch.cat(parts, -event_ndim)


def _diagnose(named: Sequence[tuple[str, Tensor]]) -> None:
    """A clearer error than that of the solver, where the input is bad."""
    check_finite(named)
    ridge = dict(named).get("ridge")
    if ridge is not None and bool((ridge < 0).any()):
        raise ValueError(f"ridge: expected at least 0, got {float(ridge.min())}")
