r"""Euclidean projection on transport plans: non-negative matrices with given sums of rows and columns.

.. math:: \min_P \tfrac12 \|P - X\|_F^2 \quad \text{s.t.} \quad P \ge 0,\; P 1 = a,\; P^T 1 = b;
    \qquad P = (X - f 1^T - 1 g^T)_+

The support M of the plan is found by a primal-dual interior-point method, whose Newton steps need one Cholesky factor
of a matrix of order m each, and whose number of steps hardly depends on the scale of X (for large X the problem is that
of linear optimal transport). Given M everything is linear: the potentials solve

.. math:: L \begin{pmatrix} f \\ g \end{pmatrix} = \begin{pmatrix} (M \circ X) 1 - a \\ (M \circ X)^T 1 - b
    \end{pmatrix}, \qquad L = \begin{pmatrix} \mathrm{diag}(M 1) & M \\ M^T & \mathrm{diag}(M^T 1) \end{pmatrix},

the Laplacian (without signs) of the bipartite graph with edges M. It has one null vector for each connected component,
which does not change P; its pseudo-inverse, made once, serves the last step of the solve and every derivative.

S. Mehrotra, On the implementation of a primal-dual interior point method, 1992; M. Blondel, V. Seguy, A. Rolet, Smooth
and sparse optimal transport, 2018 (the dual with squared 2-norm).

Symbols: ``X`` matrix, ``P`` plan, ``Z`` multiplier of ``P >= 0``, ``f``, ``g`` potentials, ``M`` support.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from difflayers._checks import check_same, check_shape, check_tensor, compute_dtype
from difflayers._solution import Info, OnFailure, Solution, SolveError, Status
from difflayers.implicit import ImplicitProblem, solution_map, solution_map_ex

from ._transport_interior_point import Pair, interior_point, margins, outer_sum


def project_transport(
    x: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    max_steps: int = 100,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The nearest non-negative matrix with row sums `a` and column sums `b`.

    Solves ``argmin_P 1/2 ||P - x||^2 s.t. P >= 0, P 1 = a, P^T 1 = b``. Without `a` and `b` all sums are 1: the nearest
    doubly stochastic matrix (the Birkhoff polytope), for square `x` only.

    Args:
        x: ``(*batch, n, m)``.
        a: ``(*batch, n)`` row sums, at least 0; batch dimensions of all arguments broadcast.
        b: ``(*batch, m)`` column sums, at least 0, with the same total as `a`.
        max_steps: Of the interior-point method. Between 10 and 40 are needed.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        ``(*batch, n, m)`` projection, with exact zeros outside its support.

    Raises:
        ValueError: For a wrong or empty shape, a wrong dtype, NaN or Inf, one of `a` and `b` without the other, or
            neither of them for a matrix that is not square.
        SolveError: For elements where the set is empty: a negative sum, or different totals (``Status.INFEASIBLE``).

    Differentiable in `x`, `a` and `b`, to any order, forward and reverse. Directions in which the totals of a connected
    part of the plan would come to differ count as zero, since no plan follows them. At a kink, an entry that just
    reaches zero, the derivative is that of the zero branch.

    Example:
        >>> import torch
        >>> project_transport(torch.tensor([[2.0, 1.0], [0.5, 0.0]]))
        tensor([[0.6250, 0.3750],
                [0.3750, 0.6250]])

    Source: M. Blondel, V. Seguy, A. Rolet, Smooth and sparse optimal transport, 2018, section 4.
    Departure: an interior-point method and a last step on the support, instead of L-BFGS on the dual; the derivative.
    """
    args, problem = _arguments(x, a, b), _problem(x, max_steps)
    try:
        value = solution_map(problem, args, on_failure=on_failure)
    except SolveError as error:
        raise SolveError(str(error), _plan(error.solution, x)) from None
    return _parts(value, *x.shape[-2:])[0].to(x.dtype)


def project_transport_ex(
    x: Tensor, a: Tensor | None = None, b: Tensor | None = None, *, max_steps: int = 100
) -> Solution[Tensor]:
    """As :func:`project_transport`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        x: Matrix.
        a: Row sums.
        b: Column sums.
        max_steps: Of the interior-point method.

    Returns:
        The projection with the status of every element; its residual is the largest entry of ``P - (x - f - g)_+`` and
        of the error of the sums.
    """
    return _plan(solution_map_ex(_problem(x, max_steps), _arguments(x, a, b)), x)


def _plan(solution: Solution[Tensor], x: Tensor) -> Solution[Tensor]:
    return replace(solution, value=_parts(solution.value, *x.shape[-2:])[0].to(x.dtype))


def _arguments(x: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    n, m = check_tensor("x", x, min_ndim=2).shape[-2:]
    if n == 0 or m == 0:
        raise ValueError(f"x: expected at least one row and one column, got shape {tuple(x.shape)}")
    if (a is None) != (b is None):
        given, missing = ("b", "a") if a is None else ("a", "b")
        raise ValueError(f"{missing}: expected a tensor where {given} is one, got None")
    if a is None or b is None:
        if n != m:
            raise ValueError(f"a: expected row sums for a matrix that is not square, {n} x {m}, got None")
        a, b = x.new_ones(n), x.new_ones(m)
    for name, t, size, what in (("a", a, n, "rows"), ("b", b, m, "columns")):
        check_shape(
            name, check_tensor(name, t, min_ndim=1).shape[-1:], (size,), f" in its last dimension as x has {what}"
        )
    work = compute_dtype(x.dtype)
    args = tuple(t.to(compute_dtype(t.dtype)) if compute_dtype(t.dtype) == work else t for t in (x, a, b))
    check_same(zip(("x", "a", "b"), args, strict=True))
    return args  # type: ignore[return-value]


def _problem(x: Tensor, max_steps: int) -> ImplicitProblem:
    eps = torch.finfo(x.dtype).eps
    slack = math.sqrt(eps) if compute_dtype(x.dtype) == x.dtype else 4 * eps
    return ImplicitProblem(
        solve=lambda X, a, b: _solve(X, a, b, slack, max_steps),
        residual=_optimality,
        linear_solve=_adjoint,
        value_ndim=1,
        arg_ndims=(2, 1, 1),
        factor_ndims=(2, 2),
        symmetric=True,
        name="project_transport",
        arg_names=("x", "a", "b"),
    )


# ------------------------------------------------------------------------------------------------- given the support


def _joined(P: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """Plan and potentials as one vector."""
    return torch.cat([P.flatten(-2), f, g], -1)


def _parts(v: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    P, f, g = v.split((n * m, n, m), -1)
    return P.unflatten(-1, (n, m)), f, g


def _optimality(value: Tensor, X: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The optimality conditions on the support, which is where the plan is positive; they are linear."""
    return _optimality_on(_parts(value, *X.shape[-2:])[0] > 0, value, X, a, b)


def _optimality_on(support: Tensor, value: Tensor, X: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The optimality conditions for a support that need not be where the plan is positive."""
    P, f, g = _parts(value, *X.shape[-2:])
    rows, columns = margins(torch.where(support, P, 0))
    return _joined(torch.where(support, P - X + outer_sum(f, g), P), rows - a, columns - b)


def _adjoint(
    value: Tensor, args: tuple[Tensor, ...], factors: tuple[Tensor, ...], rhs: Tensor, transpose: bool
) -> tuple[Tensor, Info]:
    M, inverse = factors
    x = _invert(M, inverse, rhs)
    batch = x.shape[:-1]
    status = torch.where(torch.isfinite(x).all(-1), int(Status.CONVERGED), int(Status.SINGULAR))
    return x, Info(status, torch.zeros(batch, dtype=torch.int64, device=x.device), x.new_zeros(batch))


def _invert(M: Tensor, pseudo_inverse: Tensor, rhs: Tensor) -> Tensor:
    """Solves with the derivative of :func:`_optimality`, which is symmetric; null vectors are left out."""
    R, rows, columns = _parts(rhs, *M.shape[-2:])
    sums = torch.cat(margins(M * R), -1) - torch.cat([rows, columns], -1)
    potentials = (pseudo_inverse @ sums.unsqueeze(-1)).squeeze(-1)
    f, g = potentials.split((M.shape[-2], M.shape[-1]), -1)
    return _joined(R - M * outer_sum(f, g), f, g)


def _pseudo_inverse(M: Tensor) -> Tensor:
    """Of the bipartite Laplacian of M: with a projector on its null vectors added, it is definite."""
    n, m = M.shape[-2:]
    eye = torch.eye(n + m, dtype=M.dtype, device=M.device)
    linked = (M.mT @ M + eye[:m, :m] > 0).to(M.dtype)
    for _ in range(math.ceil(math.log2(max(m, 2)))):  # columns that paths of twice the length connect
        linked = (linked @ linked > 0).to(M.dtype)
    across = (M @ linked > 0).to(M.dtype)
    among = (across @ M.mT > 0).to(M.dtype).maximum(eye[:n, :n])
    null = torch.cat([torch.cat([among, -across], -1), torch.cat([-across.mT, linked], -1)], -2)
    null = null / null.abs().sum(-1, keepdim=True)
    degrees = torch.diag_embed(torch.cat(margins(M), -1))
    degrees[..., :n, n:] = M
    degrees[..., n:, :n] = M.mT
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(degrees + null).L) - null


# ---------------------------------------------------------------------------------------------------- the support


def _solve(X: Tensor, a: Tensor, b: Tensor, slack: float, max_steps: int) -> tuple[Tensor, Info, Pair]:
    """The plan and its potentials, the report, and support and pseudo-inverse for the derivatives.

    The totals may differ by rounding, `slack` times their size; the difference is shared.
    """
    batch = torch.broadcast_shapes(X.shape[:-2], a.shape[:-1], b.shape[:-1])
    dtype = X.dtype
    wide = torch.float64 if X.device.type != "mps" else dtype  # float32 cannot tell the support of a large X
    X, a, b = (t.to(wide).expand(*batch, *t.shape[t.ndim - k :]) for t, k in ((X, 2), (a, 1), (b, 1)))
    sums, totals = torch.cat([a, b], -1), torch.stack([a.sum(-1), b.sum(-1)])
    finite = torch.isfinite(X).flatten(-2).all(-1) & torch.isfinite(sums).all(-1)
    feasible = ((totals[0] - totals[1]).abs() <= slack * totals[0]) & (sums >= 0).all(-1)
    sound = finite & feasible
    # the others are solved for numbers that do no harm, and their result is not used
    X = torch.where(sound[..., None, None], X, 0)
    shares = torch.where(totals > 0, totals.mean(0) / totals, 0).unsqueeze(-1)
    a = torch.where(sound.unsqueeze(-1), a * shares[0], X.shape[-1])
    b = torch.where(sound.unsqueeze(-1), b * shares[1], X.shape[-2])
    live = (a > 0).unsqueeze(-1) & (b > 0).unsqueeze(-2)
    P, Z, f, g, steps = interior_point(X, a, b, live, max_steps)
    value, M, inverse, error, exact = _on_support(X, a, b, live, _joined(P, f, g), P > Z)
    if not bool(exact.all()):  # stopped early: the plan of the last step, all of it positive
        cell = exact[..., None, None]
        M = torch.where(cell, M, (P > 0).to(M.dtype))
        value = torch.where(exact.unsqueeze(-1), value, _joined(P, f, g))
        inverse = torch.where(cell, inverse, _pseudo_inverse(M))
        error = torch.where(exact, error, torch.maximum(*_errors(P, X, a, b, f, g, live)))
    status = torch.where(exact, int(Status.CONVERGED), int(Status.MAX_STEPS))
    status = torch.where(feasible, status, int(Status.INFEASIBLE))
    status = torch.where(finite & ~torch.isnan(error), status, int(Status.DIVERGED))
    value, error = torch.where(sound.unsqueeze(-1), value, math.nan), torch.where(sound, error, math.inf)
    return value.to(dtype), Info(status, steps, error.to(dtype)), (M.to(dtype), inverse.to(dtype))


def _errors(P: Tensor, X: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, live: Tensor) -> Pair:
    """The largest entry of ``P - (X - f - g)_+``, and of the error of the sums."""
    rows, columns = margins(P)
    W = torch.where(live, X - outer_sum(f, g), 0)
    sums = torch.cat([rows - a, columns - b], -1).abs().amax(-1)
    return (P - W.clamp_min(0)).abs().amax((-1, -2)), sums


def _on_support(
    X: Tensor, a: Tensor, b: Tensor, live: Tensor, start: Tensor, support: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The solution on its support: value, support and pseudo-inverse, error, and whether it is one."""
    eps, (n, m) = torch.finfo(X.dtype).eps, X.shape[-2:]
    P, f, g = _parts(start, n, m)
    size = torch.maximum(a.amax(-1), b.amax(-1))
    scale = (X.abs() + outer_sum(f.abs(), g.abs())).amax((-1, -2)) + size
    tiny, unsure = 16 * eps * size, 16 * eps * scale
    active = torch.ones_like(size, dtype=torch.bool)
    value, M, inverse = start, torch.zeros_like(X), torch.zeros_like(X[..., :1, :1])
    for _ in range(8):  # seldom more than one
        cell = active[..., None, None]
        M = torch.where(cell, support.to(X.dtype), M)
        inverse = torch.where(cell, _pseudo_inverse(M), inverse)
        guess = _joined(M * P, f, g)
        better = guess - _invert(M, inverse, _optimality_on(support, guess, X, a, b))
        rows, columns = margins(_parts(better, n, m)[0])  # once more for the sums, if X is large beside them
        better = better - _invert(M, inverse, _joined(torch.zeros_like(M), rows - a, columns - b))
        value = torch.where(active.unsqueeze(-1), better, value)
        Q, *potentials = _parts(value, n, m)
        W = torch.where(live, X - outer_sum(*potentials), -math.inf)
        inside = live & torch.where(support, Q - tiny[..., None, None], W - unsure[..., None, None]).gt(0)
        for dim in (-1, -2):  # a row or column with a positive sum needs an entry
            inside = inside | live & ~inside.any(dim, keepdim=True) & W.ge(W.amax(dim, keepdim=True))
        active = active & (inside != support).flatten(-2).any(-1)
        support = torch.where(active[..., None, None], inside, support)
        if not bool(active.any()):
            break
    Q, f, g = _parts(value, n, m)
    plan, sums = _errors(Q, X, a, b, f, g, live)
    exact = ~active & (plan <= 16 * unsure) & (sums <= 16 * tiny)
    return value, M, inverse, torch.maximum(plan, sums), exact
