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

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._checks import check_finite, check_not_nan
from difflayers._solution import Info, Status
from difflayers.implicit import ImplicitProblem
from difflayers.linalg import CG

from . import _schur as schur
from ._iteration import exp_, largest_log, times

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

    At a solution the sums below are 1: those of a penalised side, which may be too small for a number, are compared
    with what they must be before the exponential.
    """
    n = cost.shape[-2]
    f, g = z[..., :n], z[..., n:]
    logs, e = log_ratio(z, cost, a, b, eps), eps.unsqueeze(-1)
    rows = e * times((logs + (f * soft_a.unsqueeze(-1)).unsqueeze(-1)).exp(), b).log()
    columns = e * times((logs + (g * soft_b.unsqueeze(-1)).unsqueeze(-2)).exp().mT, a).log()
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
        diagnose=_diagnose,
    )


def _diagnose(named: Sequence[tuple[str, Tensor]]) -> None:
    """Infinite costs forbid entries, but not all of a row or a column; zero is the inverse of an infinite penalty."""
    check_not_nan(named)
    cost = dict(named)["cost"]
    for what, closed in (("row", torch.isposinf(cost).all(-1)), ("column", torch.isposinf(cost).all(-2))):
        if bool(closed.any()):
            first = closed.nonzero()[0].tolist()
            where = f"{what} {first[-1]}" + (f" of element {tuple(first[:-1])}" if first[:-1] else "")
            raise ValueError(f"cost: expected an entry below inf in every row and column, got none in {where}")
    check_finite([(name, t) for name, t in named if name != "cost"])
    if bool(torch.isneginf(cost).any()):
        raise ValueError("cost: expected finite numbers, got an infinite one that allows an entry at any price")


class _Point(NamedTuple):
    """What the derivatives are made of: ``Q = by_row b / rows``, ``Q' = (a by_column / columns)^T``.

    Both are the ratio of the plan to ``a b``, with its sums, but for sums that are too small for a number: a row that
    hardly takes part, since a penalty allows it to, is known up to a factor, of which Q is free.
    """

    by_row: Tensor
    rows: Tensor
    lost_rows: Tensor
    by_column: Tensor
    columns: Tensor
    lost_columns: Tensor
    a: Tensor
    b: Tensor
    ka: Tensor
    kb: Tensor
    hard: Tensor

    @staticmethod
    def at(z: Tensor, args: Sequence[Tensor]) -> _Point:
        """On plain tensors, in place."""
        cost, a, b, eps, soft_a, soft_b = args[:6]
        n = cost.shape[-2]
        ratio = z[..., :n].unsqueeze(-1) + z[..., n:].unsqueeze(-2) - cost
        if ratio.ndim < eps.ndim + 2 or ratio.shape[:-2] != torch.broadcast_shapes(ratio.shape[:-2], eps.shape):
            ratio = ratio.expand(*torch.broadcast_shapes(ratio.shape[:-2], eps.shape), *ratio.shape[-2:]).clone()
        ratio = exp_(ratio.div_(eps[..., None, None]))
        rows, columns = times(ratio, b), times(ratio.mT, a)
        lost_rows, lost_columns = too_small(rows), too_small(columns)
        by_row = by_column = ratio
        if bool(lost_rows.any()) or bool(lost_columns.any()):
            logs = (z[..., :n].unsqueeze(-1) + z[..., n:].unsqueeze(-2) - cost) / eps[..., None, None]
            by_row = _regained(logs, ratio, b.unsqueeze(-2), lost_rows.unsqueeze(-1), -1)
            by_column = _regained(logs, ratio, a.unsqueeze(-1), lost_columns.unsqueeze(-2), -2)
            rows, columns = times(by_row, b), times(by_column.mT, a)
        ka, kb = 1 + (eps * soft_a).unsqueeze(-1), 1 + (eps * soft_b).unsqueeze(-1)
        hard = (soft_a == 0) & (soft_b == 0)
        return _Point(by_row, rows, lost_rows, by_column, columns, lost_columns, a, b, ka, kb, hard)

    @property
    def scaled(self) -> Tensor:
        """``sqrt(Q Q'^T / (k_a k_b))``."""
        left = torch.where(self.lost_rows, 0, self.a / (self.rows * self.ka)).sqrt().unsqueeze(-1)
        right = torch.where(self.lost_columns, 0, self.b / (self.columns * self.kb)).sqrt().unsqueeze(-2)
        return self.by_row * left * right

    @property
    def null_vector(self) -> Tensor:
        return torch.where(self.hard.unsqueeze(-1), schur.null_vector(self.b * self.columns), 0)


def too_small(sums: Tensor) -> Tensor:
    """Sums of which the smallest numbers that are kept may make up a part."""
    return sums < math.exp(-largest_log(sums.dtype)) / torch.finfo(sums.dtype).eps


def _regained(logs: Tensor, ratio: Tensor, mass: Tensor, lost: Tensor, dim: int) -> Tensor:
    """Lost rows (or columns) from their logarithms, up to a factor."""
    top = torch.where(mass > 0, logs, -torch.inf).amax(dim, keepdim=True)
    return torch.where(lost, (logs - top).clamp(max=largest_log(logs.dtype)).exp(), ratio)


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
    n, (by_row, rows, _, by_column, columns, lost, a, b, ka, kb, _) = args[0].shape[-2], at
    p, q = rhs[..., :n], rhs[..., n:]
    c = torch.where(lost, 0, b * columns)
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
        p = (p - a * times(by_column, y_empty / columns)) / ka
        y = root * shorter(inverse * (q - b * times(by_row.mT, p / rows))) + y_empty
        x = p - a * times(by_column, (y - y_empty) / columns) / ka
    else:
        y = inverse * shorter(root * (q - times(by_column.mT, a * p / ka) / columns))
        x = (p - times(by_row, b * y) / rows) / ka
        y = torch.where(empty, (q - times(by_column.mT, a * x) / columns) / kb, y)
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
        moved = torch.special.xlogy(at.by_row, at.by_row)
        logs = logs - (u * times(moved, at.b)).sum(-1)
        moved = moved if at.by_column is at.by_row else torch.special.xlogy(at.by_column, at.by_column)
        return logs - (at.a * times(moved, v)).sum(-1)

    def of_cost() -> Tensor:
        right, left = at.b.unsqueeze(-2), at.a.unsqueeze(-1)
        if at.by_column is at.by_row:
            return -at.by_row * torch.addcmul(u.unsqueeze(-1) * right, left, v.unsqueeze(-2))
        return -at.by_row * u.unsqueeze(-1) * right - at.by_column * left * v.unsqueeze(-2)

    rules = (
        of_cost,
        lambda: e * times(at.by_column, v),
        lambda: e * times(at.by_row.mT, u),
        of_eps,
        lambda: (p * f).sum(-1) * eps,
        lambda: (q * g).sum(-1) * eps,
    )
    found = [
        rule().sum_to_size(t.shape) if asked else None for rule, t, asked in zip(rules, args, wanted, strict=False)
    ]
    return found + [None] * (len(args) - len(found))
