r"""Entropic transport as the engine sees it: what makes potentials optimal, and the linear system of its derivative.

Potentials of a plan :math:`P_{ij} = a_i b_j \exp((f_i + g_j - C_{ij}) / \epsilon)` are optimal where

.. math:: (1 + \epsilon / \rho_a) f_i + \epsilon \log \sum_j b_j e^{(g_j - C_{ij}) / \epsilon} = 0, \qquad
    (1 + \epsilon / \rho_b) g_j + \epsilon \log \sum_i a_i e^{(f_i - C_{ij}) / \epsilon} = 0 .

In this form rows and columns without mass have potentials and derivatives like all others. The Jacobian is
:math:`\begin{pmatrix} k_a I & Q \\ Q' & k_b I \end{pmatrix}` with the plan divided by its row sums, Q, and by its
column sums, Q', and :math:`k = 1 + \epsilon / \rho`. Penalties enter by their inverses, zero for a constraint.

G. Peyre, M. Cuturi, Computational Optimal Transport, 2019, sections 4.4 and 10.2; M. Eisenberger et al., A Unified
Framework for Implicit Sinkhorn Differentiation, 2022 (the plan's derivative).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._solution import Info, Status
from difflayers.implicit import ImplicitProblem
from difflayers.linalg import CG

from . import _schur as schur
from ._iteration import largest_log, times

ARGS = ("cost", "a", "b", "eps", "rho_a", "rho_b")
NDIMS = (2, 1, 1, 0, 0, 0)
PATIENT = CG(max_steps=300, check_every=5)  # by default, for large sides; a factorisation follows where it is possible


def log_ratio(z: Tensor, cost: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    """``log(P / (a b))`` at potentials ``z = (f, g)``.

    It is bounded by the smaller mass, but for a row and a column that both have none, where it is multiplied by zero.
    A forbidden entry is as good as -inf, without derivatives ``0 * inf``.
    """
    n = cost.shape[-2]
    moved = z[..., :n].unsqueeze(-1) + z[..., n:].unsqueeze(-2) - cost
    lowest = -1e60 if cost.dtype == torch.float64 else -1e18
    return (moved.clamp(min=lowest) / eps[..., None, None]).clamp(max=largest_log(cost.dtype))


def plan_of(z: Tensor, cost: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    """The plan of potentials."""
    return log_ratio(z, cost, a, b, eps).exp() * a.unsqueeze(-1) * b.unsqueeze(-2)


def optimality(
    z: Tensor, cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, soft_a: Tensor, soft_b: Tensor, *_: Tensor
) -> Tensor:
    """The two equations above, in units of the cost.

    At a solution ``log_ratio`` is bounded, so that the sums need no further care.
    """
    n = cost.shape[-2]
    f, g = z[..., :n], z[..., n:]
    ratio, e = log_ratio(z, cost, a, b, eps).exp(), eps.unsqueeze(-1)
    rows = e * (times(ratio, b).log() + f * soft_a.unsqueeze(-1))
    columns = e * (times(ratio.mT, a).log() + g * soft_b.unsqueeze(-1))
    batch = torch.broadcast_shapes(rows.shape[:-1], columns.shape[:-1])
    return torch.cat([rows.expand(*batch, n), columns.expand(*batch, g.shape[-1])], -1)


def sinkhorn_problem(
    solve: Callable[..., tuple[Tensor, Info, tuple[Tensor, ...]]],
    iterated: CG | None,
    names: tuple[str, ...],
    name: str,
) -> ImplicitProblem:
    """The inner problem with a way to find its solution.

    Args:
        solve: ``(cost, a, b, eps, soft_a, soft_b) -> (potentials, Info, factors)``, with :func:`factors_at` or none.
        iterated: Solves the linear system of the derivative; None: the factors do.
        names: Of the arguments, for messages.
        name: Of the layer, for messages and traces.
    """

    def linear_solve(
        z: Tensor, args: tuple[Tensor, ...], factors: tuple[Tensor, ...], rhs: Tensor, transpose: bool
    ) -> tuple[Tensor, Info]:
        return solve_linear(z, args, factors, rhs, transpose, iterated)

    return ImplicitProblem(
        solve=solve,
        residual=optimality,
        linear_solve=linear_solve,
        cotangents=cotangents,
        value_ndim=1,
        arg_ndims=NDIMS,
        factor_ndims=() if iterated else (2, 0),
        name=name,
        arg_names=names,
    )


class _Point(NamedTuple):
    """What the derivatives are made of: ``Q = ratio b / rows``, ``Q' = (a ratio / columns)^T``."""

    ratio: Tensor
    rows: Tensor
    columns: Tensor
    a: Tensor
    b: Tensor
    ka: Tensor
    kb: Tensor
    hard: Tensor

    @staticmethod
    def at(z: Tensor, args: Sequence[Tensor]) -> _Point:
        """On plain tensors, in place: exp(-inf) is 0, which is all that is needed here."""
        cost, a, b, eps, soft_a, soft_b = args[:6]
        n = cost.shape[-2]
        ratio = z[..., :n].unsqueeze(-1) + z[..., n:].unsqueeze(-2) - cost
        if ratio.ndim < eps.ndim + 2 or ratio.shape[:-2] != torch.broadcast_shapes(ratio.shape[:-2], eps.shape):
            ratio = ratio.expand(*torch.broadcast_shapes(ratio.shape[:-2], eps.shape), *ratio.shape[-2:]).clone()
        ratio = ratio.div_(eps[..., None, None]).clamp_(max=largest_log(cost.dtype)).exp_()
        ka, kb = 1 + (eps * soft_a).unsqueeze(-1), 1 + (eps * soft_b).unsqueeze(-1)
        return _Point(ratio, times(ratio, b), times(ratio.mT, a), a, b, ka, kb, (soft_a == 0) & (soft_b == 0))

    @property
    def scaled(self) -> Tensor:
        """``sqrt(Q Q'^T / (k_a k_b))``."""
        left = (self.a / (self.rows * self.ka)).sqrt().unsqueeze(-1)
        return self.ratio * left * (self.b / (self.columns * self.kb)).sqrt().unsqueeze(-2)

    @property
    def null_vector(self) -> Tensor:
        return torch.where(self.hard.unsqueeze(-1), schur.null_vector(self.b * self.columns), 0)


def factors_at(z: Tensor, args: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What :func:`solve_linear` needs at any order: the Cholesky factor, and which elements have none."""
    point = _Point.at(z, args)
    return schur.factorise(point.scaled, point.null_vector)


def solve_linear(
    z: Tensor, args: tuple[Tensor, ...], factors: tuple[Tensor, ...], rhs: Tensor, transpose: bool, iterated: CG | None
) -> tuple[Tensor, Info]:
    """The Jacobian of :func:`optimality`, or its transpose.

    What a row or a column without mass adds is triangular, and is solved apart. Of constants ``(1, -1)``, which change
    no plan, none is left in a solution.
    """
    at = _Point.at(z, args)
    n, (ratio, rows, columns, a, b, ka, kb, _) = args[0].shape[-2], at
    p, q = rhs[..., :n], rhs[..., n:]
    c = b * columns
    root, inverse, empty = c.sqrt(), schur.inverse_sqrt(c), c == 0
    info: Info | None = None

    def shorter(right: Tensor) -> Tensor:
        nonlocal info
        if iterated is None:
            return schur.solve_factorised(factors[0], right / kb)
        A, w, right = at.scaled, at.null_vector, right / kb
        x, info = schur.solve_iterated(A, w, right, iterated)
        early = info.status != Status.CONVERGED
        if iterated is PATIENT and right.shape[-1] <= schur.DENSE_LIMIT and bool(early.any()):
            L, ill = schur.factorise(A, w)
            x = torch.where(early.unsqueeze(-1), schur.solve_factorised(L, right), x)
            info = info._replace(status=torch.where(early, int(Status.SINGULAR) * ill, info.status))
        return x

    if transpose:
        y_empty = torch.where(empty, q / kb, 0)
        p = (p - a * times(ratio, y_empty / columns)) / ka
        y = root * shorter(inverse * (q - b * times(ratio.mT, p / rows))) + y_empty
        x = p - a * times(ratio, (y - y_empty) / columns) / ka
    else:
        y = inverse * shorter(root * (q - times(ratio.mT, a * p / ka) / columns))
        x = (p - times(ratio, b * y) / rows) / ka
        y = torch.where(empty, (q - times(ratio.mT, a * x) / columns) / kb, y)
    solution = torch.cat([x, y], -1)
    bad = ~torch.isfinite(solution).all(-1)
    if info is None:
        status = torch.where(bad | factors[1], int(Status.SINGULAR), int(Status.CONVERGED))
        return solution, Info(status, torch.zeros_like(status), torch.zeros_like(solution[..., 0]))
    return solution, info._replace(status=torch.where(bad, int(Status.SINGULAR), info.status))


def cotangents(z: Tensor, args: tuple[Tensor, ...], w: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Those of the arguments at the cotangent `w` of :func:`optimality`, written out."""
    eps, soft_a, soft_b = args[3:6]
    at = _Point.at(z, args)
    n, e = args[0].shape[-2], eps.unsqueeze(-1)
    f, g, p, q = z[..., :n], z[..., n:], w[..., :n], w[..., n:]
    u, v = p / at.rows, q / at.columns

    def of_eps() -> Tensor:
        logs = (p * (at.rows.log() + f * soft_a.unsqueeze(-1))).sum(-1)
        logs = logs + (q * (at.columns.log() + g * soft_b.unsqueeze(-1))).sum(-1)
        moved = torch.special.xlogy(at.ratio, at.ratio)
        return logs - (u * times(moved, at.b) + at.a * times(moved, v)).sum(-1)

    def of_cost() -> Tensor:
        parts = torch.addcmul(u.unsqueeze(-1) * at.b.unsqueeze(-2), at.a.unsqueeze(-1), v.unsqueeze(-2))
        return -at.ratio * parts

    rules = (
        of_cost,
        lambda: e * times(at.ratio, v),
        lambda: e * times(at.ratio.mT, u),
        of_eps,
        lambda: (p * f).sum(-1) * eps,
        lambda: (q * g).sum(-1) * eps,
    )
    found = [
        rule().sum_to_size(t.shape) if asked else None for rule, t, asked in zip(rules, args, wanted, strict=False)
    ]
    return found + [None] * (len(args) - len(found))
