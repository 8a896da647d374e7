r"""First-order conditions of a constrained minimiser, and the linear system of its derivative.

With multipliers :math:`\nu` of :math:`h(z) = 0` and :math:`\lambda` of :math:`g(z) \le 0`, and the active set
:math:`A = \{i : \lambda_i > 0\}`,

.. math:: \nabla f + \nu^T \nabla h + \lambda_A^T \nabla g_A = 0, \quad h = 0, \quad g_A = 0, \quad
    \lambda_{\bar A} = 0,

whose Jacobian in :math:`(z, \nu, \lambda)` is the reduced KKT matrix, with ones for inactive multipliers. The value of
the map is :math:`(z, \nu, \lambda)` in one vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from difflayers._solution import Info
from difflayers.linalg import LU, LinearSolver
from difflayers.linalg._autodiff import pullback
from difflayers.linalg._system import LinearSystem, Params

from ._constraints import Layout
from ._iterate import Function, IterativeSolver


@dataclass(frozen=True, eq=False)
class Parts:
    """``z -> (f, h, g)`` of an element in one vector, and what the entries mean."""

    function: Function
    layout: Layout


def kkt_residual(parts: Callable[..., Tensor], layout: Layout) -> Callable[..., Tensor]:
    """The conditions above, as a function of ``(z, nu, lambda)`` and the arguments."""
    n, p = layout.n, layout.p

    def residual(value: Tensor, *tensors: Tensor) -> Tensor:
        z, nu, lam = value[..., :n], value[..., n : n + p], value[..., n + p :]
        active = lam > 0
        out, pull = pullback(lambda z: parts(z, *tensors), z)
        one = torch.ones_like(out[..., :1])
        slope = pull(_joined(one, nu, torch.where(active, lam, 0)))[0]
        return _joined(slope, out[..., 1 : 1 + p], torch.where(active, out[..., 1 + p :], lam))

    return residual


def _joined(*vectors: Tensor) -> Tensor:
    """One vector of several; torch trips over parts of no entries under ``vmap`` over no elements."""
    some = [v for v in vectors if v.shape[-1]]
    return torch.cat(some, -1) if len(some) > 1 else some[0]


def rows(function: Function, z: Tensor) -> tuple[Tensor, Tensor]:
    """``r`` of shape ``(*batch, k)`` and its Jacobian ``(*batch, k, n)``, row by row in one batched pass."""
    r, pull = pullback(function, z, record=False)
    eye = torch.eye(r.shape[-1], dtype=z.dtype, device=z.device)
    if not r.shape[-1]:
        return r, z.new_zeros(*r.shape, z.shape[-1])
    # out_dims=-2 brings torch down where the result does not depend on e
    return r, vmap(lambda e: pull(e.expand_as(r))[0])(eye).movedim(0, -2)


def derivatives(parts: Parts, z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(f, h, g)``, its Jacobian, and the Hessian of ``<weights, (f, h, g)>``."""
    out, J = rows(parts.function, z)
    _, H = rows(lambda z: pullback(parts.function, z, record=True)[1](weights)[0], z)
    return out, J, (H + H.mT) / 2


def balanced(K: Tensor) -> tuple[Tensor, Tensor]:
    """``D K D`` with largest entries near one in every row, and the diagonal of D: a symmetric matrix stays one."""
    scale = torch.ones_like(K[..., 0])
    for _ in range(3):
        size = torch.linalg.vector_norm(K, math.inf, dim=-1)
        step = torch.where((size > 0) & torch.isfinite(size), size, 1).rsqrt()
        K = K * step.unsqueeze(-1) * step.unsqueeze(-2)
        scale = scale * step
    return K, scale


class Symmetric(NamedTuple):
    """A factorised symmetric matrix ``D^-1 (L B L^T) D^-1``."""

    matrix: Tensor
    scale: Tensor
    factor: Tensor
    pivots: Tensor
    finite: Tensor  # (*batch)
    negative: Tensor  # (*batch) number of negative eigenvalues
    zero: Tensor  # (*batch) a pivot is exactly zero

    @staticmethod
    def of(K: Tensor) -> Symmetric:
        """The Bunch-Kaufman factorisation of each matrix; one with NaN or Inf counts as the identity."""
        finite = torch.isfinite(K).flatten(-2).all(-1)
        eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
        K = torch.where(finite[..., None, None], K, eye)  # LAPACK would follow pivots that are none
        B, scale = balanced(K)
        factor, pivots, info = torch.linalg.ldl_factor_ex(B)
        # a negative eigenvalue for each negative 1 x 1 block, and for each 2 x 2 block
        single = pivots > 0
        negative = (single & (factor.diagonal(dim1=-2, dim2=-1) < 0)).sum(-1) + (~single).sum(-1) // 2
        return Symmetric(K, scale, factor, pivots, finite, negative, info != 0)

    def solve(self, b: Tensor) -> Tensor:
        """The solution for vectors, once refined; NaN where the matrix is."""

        def once(b: Tensor) -> Tensor:
            column = (self.scale * b).unsqueeze(-1)
            return self.scale * torch.linalg.ldl_solve(self.factor, self.pivots, column).squeeze(-1)

        x = once(b)
        x = x + once(b - (self.matrix @ x.unsqueeze(-1)).squeeze(-1))
        return torch.where(self.finite.unsqueeze(-1), x, math.nan)


@dataclass(frozen=True)
class KKTFactorisation(LinearSolver):
    """LU of the reduced KKT matrix; ``SINGULAR`` too where it has not as many negative eigenvalues as constraints hold.

    A matrix with more belongs to a saddle or a maximiser: the Hessian is not positive definite along the constraints.

    Args:
        n: Unknowns.
        p: Equalities.
    """

    n: int
    p: int

    factor_ndims = LU.factor_ndims

    def factor(self, system: LinearSystem, params: Params, like: Tensor) -> Params:
        K = system.matrix(params, like)
        known: Any = _Known(K)
        factors = LU().factor(known, params, like)
        active = (params[0][..., self.n + self.p :] > 0).sum(-1)
        saddle = Symmetric.of(K).negative != self.p + active
        return (*factors[:-1], factors[-1] | saddle)

    def solve(
        self, system: LinearSystem, params: Params, factors: Params, rhs: Tensor, transpose: bool, init: Tensor | None
    ) -> tuple[Tensor, Info]:
        return LU().solve(system, params, factors, rhs, transpose, init)


class _Known(NamedTuple):
    """As much of a system as a factorisation asks for: its matrix."""

    K: Tensor

    def matrix(self, params: Params, like: Tensor) -> Tensor:
        return self.K


def kkt_kind(kind: Any, layout: Layout, default: IterativeSolver) -> Any:
    """`kind` under equalities and inequalities: what its solution is, and which solvers find one."""

    def run(solver: IterativeSolver, adapt: Callable[[Any], Any], at: Function, init: Tensor) -> tuple[Tensor, Info]:
        if solver.finds == "constrained":
            return solver.solve(adapt(at), init)
        value, info = solver.solve(adapt(at), torch.cat([init, init.new_zeros(*init.shape[:-1], layout.p)], -1))
        return value, info

    adapt: dict[str, Callable[[Any], Any]] = {"constrained": lambda at: Parts(at, layout)}
    if not layout.m:
        adapt["root"] = lambda at: kkt_residual(at, layout)
    return replace(
        kind,
        argument=f"{kind.argument} or constraint",
        residual=lambda parts: kkt_residual(parts, layout),
        adapt=adapt,
        scalar=False,
        like_unknown=False,
        symmetric=True,
        run=run,
        default=default,
    )
