r"""Entropic transport between points as the engine sees it: the problem of :mod:`._sinkhorn_problem` without a matrix.

Every product with the kernel recomputes it by blocks of rows; the linear system of the derivative is solved by
conjugate gradients on the Schur complement.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_same, check_shape, check_tensor, compute_dtype
from difflayers._solution import Info, Solution, Status
from difflayers.implicit import ImplicitProblem
from difflayers.linalg import CG, LinearSolver
from difflayers.linalg._autodiff import opaque

from . import _schur as schur
from ._costs import Cost
from ._coupling import _TOTALS, Prepared, _number, balanced, penalty_of_zero
from ._iteration import Problem
from ._point_cloud import PointCloud
from ._point_kernel import Kernel, batch_of, block_rows, matrix, products
from ._point_solver import Points, Solver, complement_solved
from ._sinkhorn_problem import too_small
from ._sinkhorn_solve import _flat, _looked_at
from ._solvers import KernelSinkhorn, LogSinkhorn, TransportSolver

ARGS = ("x", "y", "a", "b", "eps", "rho_a", "rho_b")
NDIMS = (2, 2, 1, 1, 0, 0, 0)
PATIENT = CG(max_steps=2000)  # one read of a flag is nothing against a pass over all pairs


class PreparedPoints(NamedTuple):
    """What the problem gets, and the way back to what was asked.

    Attributes:
        base: As of a matrix, with `x` in the place of the cost and nothing exchanged or shifted.
        y: ``(*batch, m, d)``.
        cost: Of points.
        rows: Of a block; None: by the size of the problem.
        penalised: Whether there are penalties in the place of a constraint.
    """

    base: Prepared
    y: Tensor
    cost: Cost
    rows: int | None
    penalised: bool

    @property
    def args(self) -> tuple[Tensor, ...]:
        """Of the problem."""
        x, *rest = self.base.args
        return (x, self.y, *rest)


def prepare_points(
    cloud: PointCloud,
    a: Tensor | None,
    b: Tensor | None,
    eps: Any,
    rho_a: Any,
    rho_b: Any,
    dtype: torch.dtype | None = None,
) -> PreparedPoints:
    """As :func:`._coupling.prepare`."""
    x, y = cloud.x, cloud.y
    for name, t, size in (("a", a, x.shape[-2]), ("b", b, y.shape[-2])):
        if t is not None:
            check_shape(
                name,
                check_tensor(name, t, min_ndim=1).shape[-1:],
                (size,),
                f" as {'x' if name == 'a' else 'y'} has points",
            )
    penalised = not (rho_a is None and rho_b is None)
    numbers = [_number(name, t, x) for name, t in (("eps", eps), ("rho_a", rho_a), ("rho_b", rho_b))]
    given = [(n, t, k) for n, t, k in zip(ARGS, (x, y, a, b, *numbers), NDIMS, strict=True) if t is not None]
    check_same((n, t) for n, t, _ in given)
    broadcast_batch((n, tuple(t.shape[: t.ndim - k])) for n, t, k in given)
    close, work = _TOTALS.get(dtype or x.dtype, 1e-4), compute_dtype(x.dtype)
    x, y, eps, rho_a, rho_b = (t.to(work) for t in (x, y, *numbers))
    a = x.new_full((x.shape[-2],), 1 / x.shape[-2]) if a is None else a.to(work)
    b = y.new_full((y.shape[-2],), 1 / y.shape[-2]) if b is None else b.to(work)
    soft_a, soft_b = 1 / rho_a, 1 / rho_b
    idle = penalty_of_zero(a, soft_a) + penalty_of_zero(b, soft_b)
    args, empty = balanced((x, a, b, eps, soft_a, soft_b), close)
    base = Prepared(args, False, x.new_zeros(()), empty, idle)
    return PreparedPoints(base, y, cloud.cost, cloud.rows, penalised)


def point_problem(
    data: PreparedPoints, solver: TransportSolver | None, adjoint: LinearSolver | None, warm_start: Any = None
) -> tuple[ImplicitProblem, tuple[Tensor, ...]]:
    """The problem and its arguments; an earlier solution is one more, on which the new one does not depend."""
    solver = LogSinkhorn() if solver is None else solver
    if not isinstance(solver, LogSinkhorn | KernelSinkhorn):
        raise ValueError(f"solver: expected LogSinkhorn(), KernelSinkhorn() or None for a PointCloud, got {solver!r}")
    if not (adjoint is None or isinstance(adjoint, CG)):
        raise ValueError(f"adjoint: expected CG() or None for a PointCloud, got {adjoint!r}")
    equations = Equations(data.cost, data.rows, data.penalised)
    problem = _problem(equations, solver, PATIENT if adjoint is None else adjoint, warm_start is not None)
    return problem, (data.args if warm_start is None else (*data.args, _earlier(warm_start, data)))


def _earlier(warm_start: Any, data: PreparedPoints) -> Tensor:
    """The potentials of an earlier coupling as one constant."""
    coupling = warm_start.value if isinstance(warm_start, Solution) else warm_start
    f, g = getattr(coupling, "f", None), getattr(coupling, "g", None)
    if not isinstance(f, Tensor) or not isinstance(g, Tensor):
        raise ValueError(
            f"warm_start: expected a Solution of sinkhorn_ex or its coupling, got {type(coupling).__name__}"
        )
    x, y = data.args[:2]
    if (f.shape[-1], g.shape[-1]) != (x.shape[-2], y.shape[-2]):
        raise ValueError(
            f"warm_start: expected potentials of {x.shape[-2]} rows and {y.shape[-2]} columns, got shapes "
            f"{tuple(f.shape)}, {tuple(g.shape)}"
        )
    f, g = (t.detach().to(x.device, x.dtype) for t in (f, g))
    return joined(f, g)


@opaque
@functools.lru_cache(maxsize=64)
def _problem(equations: Equations, solver: KernelSinkhorn | LogSinkhorn, iterated: CG, warm: bool) -> ImplicitProblem:
    def linear_solve(
        z: Tensor, args: tuple[Tensor, ...], _: tuple[Tensor, ...], rhs: Tensor, transpose: bool
    ) -> tuple[Tensor, Info]:
        return equations.solve_linear(z, args, rhs, transpose, iterated)

    return ImplicitProblem(
        solve=functools.partial(_solve, cost=equations.cost, rows=equations.rows, solver=solver),
        residual=equations.optimality,
        linear_solve=linear_solve,
        value_ndim=1,
        arg_ndims=(*NDIMS, 1) if warm else NDIMS,
        name=f"sinkhorn[PointCloud, {solver!r}]",
        arg_names=(*ARGS, "warm_start") if warm else ARGS,
    )


def _solve(
    *tensors: Tensor, cost: Cost, rows: int | None, solver: KernelSinkhorn | LogSinkhorn
) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    ndims = (*NDIMS, 1)[: len(tensors)]
    batch = torch.broadcast_shapes(*(t.shape[: t.ndim - k] for t, k in zip(tensors, ndims, strict=True)))
    flat = [_flat(t, batch, k) for t, k in zip(tensors, ndims, strict=True)]
    p, n = Points(*flat[: len(NDIMS)]), flat[0].shape[-2]
    holes = _looked_at(Problem(p.x, *p[2:]), ("x", *ARGS[2:]))
    work = Solver(cost, rows or block_rows(cost, p.x, p.y, batch), solver)
    init = None if len(tensors) == len(NDIMS) else (flat[-1][:, :n], flat[-1][:, n:])
    f, g, info = work.solve(p, init)
    if holes:  # the sums say nothing of the potentials there
        f = torch.where(p.a > 0, f, work.soft_rows(p, g, p.eps))
        g = torch.where(p.b > 0, g, work.soft_columns(p, f, p.eps))
    z = torch.cat([f, g], -1)
    return z.reshape((*batch, z.shape[-1])), Info(*(t.reshape(batch) for t in info)), ()


@dataclasses.dataclass(frozen=True)
class Equations:
    """What makes potentials optimal, its linear system, and what follows from potentials.

    Args:
        cost: Of points.
        rows: Of a block; None: by the size of the problem.
        penalised: Sums may then be too small for a number; rows and columns take a kernel each, in which they are not.
    """

    cost: Cost
    rows: int | None
    penalised: bool = False

    def size(self, x: Tensor, y: Tensor, z: Tensor, eps: Tensor) -> int:
        """Rows of a block."""
        return self.rows or block_rows(self.cost, x, y, batch_of(x, y, z, z, eps))

    def products(self, z: Tensor, x: Tensor, y: Tensor, eps: Tensor, **vectors: Tensor) -> list[Tensor]:
        """With the kernel, differentiable."""
        n = x.shape[-2]
        return products(self.cost, self.size(x, y, z, eps), x, y, z[..., :n], z[..., n:], eps, **vectors)

    def kernel(self, z: Tensor, x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        """As a matrix, differentiable."""
        n = x.shape[-2]
        return matrix(self.cost, self.size(x, y, z, eps), x, y, z[..., :n], z[..., n:], eps)

    def optimality(
        self,
        z: Tensor,
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        eps: Tensor,
        soft_a: Tensor,
        soft_b: Tensor,
        *_: Tensor,
    ) -> Tensor:
        """As :func:`._sinkhorn_problem.optimality`."""
        n = x.shape[-2]
        e, f, g = eps.unsqueeze(-1), z[..., :n], z[..., n:]
        right, left = {"right": b.unsqueeze(-1)}, {"left": a.unsqueeze(-1)}
        if self.penalised:
            up_f, up_g = f * (1 + e * soft_a.unsqueeze(-1)), g * (1 + e * soft_b.unsqueeze(-1))
            rows = self.products(joined(up_f, g), x, y, eps, **right)[0]
            columns = self.products(joined(f, up_g), x, y, eps, **left)[0]
        else:
            rows, columns = self.products(z, x, y, eps, **right, **left)
        top, bottom = e * rows.squeeze(-1).log(), e * columns.squeeze(-1).log()
        return joined(top, bottom)

    def solve_linear(
        self, z: Tensor, args: tuple[Tensor, ...], rhs: Tensor, transpose: bool, iterated: CG
    ) -> tuple[Tensor, Info]:
        """As :func:`._sinkhorn_problem.solve_linear`."""
        x, y, a, b, eps, soft_a, soft_b = args[: len(NDIMS)]
        n = x.shape[-2]
        f, g, size = z[..., :n], z[..., n:], self.size(x, y, z, eps)
        ka, kb = 1 + (eps * soft_a).unsqueeze(-1), 1 + (eps * soft_b).unsqueeze(-1)
        K = by_row = by_column = Kernel(self.cost, x, y, f, g, eps, size)
        rows, columns = K.sums(a, b)
        lost_rows, lost_columns = too_small(rows), too_small(columns)
        c = torch.where(lost_columns, 0, b * columns)
        left = torch.where(lost_rows, 0, a / (rows * ka))
        right = torch.where(lost_columns, 0, b / (columns * kb)).sqrt()
        if self.penalised:
            by_row, by_column = (Kernel(self.cost, x, y, *u, eps, size) for u in ((f * ka, g), (f, g * kb)))
            rows, columns = by_row.there(b), by_column.back(a)
        hard = ((soft_a == 0) & (soft_b == 0)).unsqueeze(-1)
        p, q = rhs[..., :n], rhs[..., n:]
        root, inverse, empty = c.sqrt(), schur.inverse_sqrt(c), c == 0
        w = torch.where(hard, schur.null_vector(c), 0)

        def shorter(r: Tensor) -> tuple[Tensor, Info]:
            r = r / kb
            found, info = complement_solved(K, left, right, w, r, iterated)
            early = info.status != Status.CONVERGED
            if K.only is not None and c.shape[-1] <= schur.DENSE_LIMIT and bool(early.any()):
                L, ill = schur.factorise(left.sqrt().unsqueeze(-1) * K.only * right.unsqueeze(-2), w)
                found = torch.where(early.unsqueeze(-1), schur.solve_factorised(L, r), found)
                info = info._replace(status=torch.where(early, int(Status.SINGULAR) * ill, info.status))
            return found, info

        if transpose:

            def moved(at: slice, t: Tensor) -> tuple[Tensor, Tensor]:
                reduced = (p[..., at] - a[..., at] * t) / ka
                return reduced, reduced / rows[..., at]

            y_empty = torch.where(empty, q / kb, 0)
            p, back = there_and_back(by_column, by_row, y_empty / columns, moved)
            full, info = shorter(inverse * (q - b * back))
            full = root * full
            x = p - a * by_column.there(full / columns) / ka
            full = full + y_empty
        else:
            full, info = shorter(root * (q - by_column.back(a * p / ka) / columns))
            full = inverse * full

            def solved(at: slice, t: Tensor) -> tuple[Tensor, Tensor]:
                found = (p[..., at] - t / rows[..., at]) / ka
                return found, a[..., at] * found

            x, back = there_and_back(by_row, by_column, b * full, solved)
            full = torch.where(empty, (q - back / columns) / kb, full)
        solution = torch.cat([x, full], -1)
        bad = ~torch.isfinite(solution).all(-1)
        return solution, info._replace(status=torch.where(bad, int(Status.SINGULAR), info.status))


def joined(f: Tensor, g: Tensor) -> Tensor:
    """Both, one behind the other."""
    batch = torch.broadcast_shapes(f.shape[:-1], g.shape[:-1])
    return torch.cat([f.expand(*batch, f.shape[-1]), g.expand(*batch, g.shape[-1])], -1)


def there_and_back(
    there: Kernel, back: Kernel, v: Tensor, turn: Callable[[slice, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """As :meth:`Kernel.there_and_back`, also with two kernels."""
    if there is back:
        return there.there_and_back(v, turn)
    kept, sent = turn(slice(None), there.there(v))
    return kept, back.back(sent)
