r"""Low-rank matrix completion: the missing entries of a matrix that is known to have few independent columns.

.. math:: \min_{U, V} \tfrac12\|P_\Omega(U V^T - M)\|_F^2 + \tfrac\mu2 (\|U\|_F^2 + \|V\|_F^2)

The factors turn freely (:math:`UQ, VQ` for orthogonal Q), so only :math:`UV^T` has a derivative. Two terms that vanish
at the solution make the system of that derivative regular without changing it: one balances the factors
(:math:`U^T U = V^T V`), one holds their rotation fixed.

Y. Gu, Z. Song, J. Yin, L. Zhang, Low rank matrix completion via robust alternating minimization in nearly linear time,
2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_same, check_shape, check_tensor, compute_dtype, default_rtol
from difflayers._solution import Info, OnFailure, Solution, Status
from difflayers.implicit import ImplicitProblem, solution_map, solution_map_ex
from difflayers.linalg._autodiff import autocast_off, lifted_under_autocast, opaque

from ._lasso import not_negative
from ._operands import Number

# an extra ridge that fades in the first rounds: factors that grow without bound in rows of few entries never return
RELIEF, RELIEF_ENDS = 0.7, 1e-3


@dataclass(frozen=True)
class AlternatingMinimisation:
    """Least squares for the rows of one factor, then of the other, from the singular vectors of the known entries.

    Args:
        rtol: An element is done when the gradient is that small relative to the size of its terms; None picks it by
            dtype.
        max_steps: Largest number of rounds.
        check_every: Rounds between two looks at the gradient.
    """

    rtol: float | None = None
    max_steps: int = 2000
    check_every: int = 5

    def __post_init__(self) -> None:
        for name in ("max_steps", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


def complete_matrix(
    observed: Tensor,
    mask: Tensor,
    rank: int,
    *,
    ridge: Number = 0.0,
    solver: AlternatingMinimisation | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The matrix of low rank that fits the known entries best.

    Solves ``argmin_X 1/2 ||mask * (X - observed)||^2 + ridge * ||X||_*`` over matrices of the given rank, where
    ``||X||_*`` is the nuclear norm, in the form ``X = U V^T``.

    Args:
        observed: ``(*batch, m, n)``; what stands in unknown entries does not matter, NaN included.
        mask: ``(m, n)`` or ``(*batch, m, n)`` booleans: the known entries.
        rank: Between 1 and ``min(m, n)``.
        ridge: At least 0: a number or a tensor ``(*batch)``.
        solver: :class:`AlternatingMinimisation` with its tolerance and limits.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        ``(*batch, m, n)`` of rank at most `rank`: known entries are fitted, not copied.

    Raises:
        ValueError: For a wrong shape or dtype, a negative ridge, NaN or Inf among known entries, naming the argument.
        SolveError: In backward, where the completion is not unique: too few entries known in a row or column, or a
            matrix of lower rank than `rank`.

    Differentiable in `observed` (its known entries) and `ridge`, to any order, forward and reverse. The problem is not
    convex: the solution is that near the singular vectors of the known entries, the global one for incoherent matrices
    with enough entries known.

    Example:
        >>> import torch
        >>> from difflayers.proximal import complete_matrix
        >>> M = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, torch.nan], [3.0, 6.0, 9.0]])
        >>> complete_matrix(M, ~M.isnan(), 1)[1, 2]
        tensor(6.0000)

    Source: Y. Gu, Z. Song, J. Yin, L. Zhang, Low rank matrix completion via robust alternating minimization in nearly
    linear time, 2023, algorithm 1.

    Departure: exact row-wise solves; all known entries are used in every round, instead of a fresh sample.
    """
    return _value(on_failure, observed, mask, rank, ridge, solver)


def complete_matrix_ex(
    observed: Tensor,
    mask: Tensor,
    rank: int,
    *,
    ridge: Number = 0.0,
    solver: AlternatingMinimisation | None = None,
) -> Solution[Tensor]:
    """As :func:`complete_matrix`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        observed: Matrix with known and unknown entries.
        mask: Which are known.
        rank: Of the result.
        ridge: Weight of the nuclear norm.
        solver: Solver.

    Returns:
        The completed matrix with status and rounds of every element. The residual is the norm of the gradient relative
        to the size of its terms.
    """
    return _solution(observed, mask, rank, ridge, solver)


@opaque
def _value(on_failure: OnFailure, *given: Any) -> Tensor:
    problem, args, dtype = _prepare(*given)
    Z = solution_map(problem, args, on_failure=on_failure)
    # outside the map 0 * NaN would reach gradients: failed elements are multiplied as zeros, and hand their cotangent
    # to the map alone, which answers with zero to zero and with NaN to everything else
    failed = torch.isnan(Z).flatten(-2).any(-1)[..., None, None]
    X = _product(torch.where(failed, 0, Z), args[0].shape[-2])
    return torch.where(failed, Z.sum((-1, -2), keepdim=True), X).to(dtype)


@opaque
def _solution(*given: Any) -> Solution[Tensor]:
    problem, args, dtype = _prepare(*given)
    solution = solution_map_ex(problem, args)
    X = _product(solution.value, args[0].shape[-2]).to(dtype)
    return Solution(X, solution.status, solution.steps, solution.residual)


def _product(Z: Tensor, m: int) -> Tensor:
    with autocast_off(Z):
        return Z[..., :m, :] @ Z[..., m:, :].mT


def _prepare(
    observed: Any, mask: Any, rank: int, ridge: Any, solver: AlternatingMinimisation | None
) -> tuple[ImplicitProblem, tuple[Tensor, Tensor, Tensor], torch.dtype]:
    M = lifted_under_autocast(check_tensor("observed", observed, min_ndim=2))
    m, n = M.shape[-2:]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: expected a tensor of booleans, got {kind}")
    check_shape("mask", mask.shape[-2:], (m, n), " in its last two dimensions as of observed")
    if mask.device != M.device:
        raise ValueError(f"mask: expected device {M.device} as of observed, got {mask.device}")
    broadcast_batch([("observed", tuple(M.shape[:-2])), ("mask", tuple(mask.shape[:-2]))])
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank: expected between 1 and {min(m, n)} for {m} x {n} entries, got {rank}")
    work = compute_dtype(M.dtype)
    mu = lifted_under_autocast(not_negative("ridge", ridge, M))
    if isinstance(ridge, Tensor):
        check_same([("observed", M), ("ridge", mu)])
    problem = ImplicitProblem(
        solve=partial(_alternate, solver or AlternatingMinimisation(), rank),
        residual=stationarity,
        value_ndim=2,
        arg_ndims=(2, 2, 0),
        symmetric=True,
        name="complete_matrix",
        arg_names=("observed", "mask", "ridge"),
    )
    return problem, (torch.where(mask, M.to(work), 0), mask, mu.to(work)), observed.dtype


def stationarity(Z: Tensor, M: Tensor, mask: Tensor, mu: Tensor) -> Tensor:
    """The gradient in the stacked factors, with the two terms that make its derivative regular."""
    m = M.shape[-2]
    U, V, fixed = Z[..., :m, :], Z[..., m:, :], Z.detach()
    R = torch.where(mask, U @ V.mT - M, 0)
    uneven = U.mT @ U - V.mT @ V
    uneven = uneven - uneven.detach()  # zero but for rounding, which would make a row without entries look regular
    top, bottom = R @ V + U @ uneven, R.mT @ U - V @ uneven
    turned = fixed.mT @ Z - Z.mT @ fixed
    return torch.cat([top, bottom], -2) + mu[..., None, None] * Z + fixed @ turned


def _alternate(
    solver: AlternatingMinimisation, rank: int, M: Tensor, mask: Tensor, mu: Tensor
) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    batch = torch.broadcast_shapes(M.shape[:-2], mask.shape[:-2], mu.shape)
    M, mask, mu = M.expand((*batch, *M.shape[-2:])), mask.expand((*batch, *M.shape[-2:])), mu.expand(batch)
    sound = torch.isfinite(M).flatten(-2).all(-1) & torch.isfinite(mu)
    length = torch.linalg.vector_norm(torch.where(sound[..., None, None], M, 0), dim=(-1, -2))
    length = torch.where(length > 0, length, 1)[..., None, None]
    M, mu = torch.where(sound[..., None, None], M / length, 0), torch.where(sound, mu / length[..., 0, 0], 0)
    tol = default_rtol(solver.rtol, M.dtype)
    known = mask.to(M.dtype)
    _, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    relief = sigma[..., 0]
    Z = torch.cat([M.new_zeros((*batch, M.shape[-2], rank)), Vh[..., :rank, :].mT], -2)
    active, error = sound.clone(), torch.full_like(mu, torch.inf)
    steps = torch.zeros(batch, dtype=torch.int64, device=M.device)
    taken = 0
    while taken < solver.max_steps:
        V = Z[..., M.shape[-2] :, :]
        block = min(solver.check_every, solver.max_steps - taken)
        for _ in range(block):
            U = _rows(V, M, known, mu + relief)
            V = _rows(U, M.mT, known.mT, mu + relief)
            relief = torch.where(relief > RELIEF_ENDS, RELIEF * relief, 0)
        taken += block
        Z = torch.where(active[..., None, None], _balanced(U, V), Z)
        steps = steps + block * active
        error = torch.linalg.vector_norm(stationarity(Z, M, mask, mu), dim=(-1, -2))
        error = error / torch.linalg.vector_norm(Z, dim=(-1, -2)).clamp_min(torch.finfo(M.dtype).tiny)
        active = active & (error > tol)
        if not bool(active.any()):
            break
    status = torch.where(error <= tol, int(Status.CONVERGED), int(Status.MAX_STEPS))
    status = torch.where(sound & torch.isfinite(error), status, int(Status.DIVERGED))
    Z = torch.where(sound[..., None, None], Z * length.sqrt(), torch.nan)
    return Z, Info(status, steps, error), ()


def _rows(V: Tensor, M: Tensor, known: Tensor, mu: Tensor) -> Tensor:
    """The best rows of the other factor: one small least-squares problem each, all at once."""
    n, r = V.shape[-2:]
    pairs = (V.unsqueeze(-1) * V.unsqueeze(-2)).reshape((*V.shape[:-2], n, r * r))
    G = (known @ pairs).reshape((*known.shape[:-1], r, r))
    eye = torch.eye(r, dtype=V.dtype, device=V.device)
    # rounding stands in for a ridge where too few entries are known
    least = (torch.finfo(V.dtype).eps * V.square().sum((-1, -2))).clamp_min(torch.finfo(V.dtype).tiny)
    L, _ = torch.linalg.cholesky_ex(G + (mu + least)[..., None, None, None] * eye)
    return torch.cholesky_solve(((known * M) @ V).unsqueeze(-1), L).squeeze(-1)


def _balanced(U: Tensor, V: Tensor) -> Tensor:
    """Stacked factors of the same product with equal Gram matrices."""
    (Qu, Ru), (Qv, Rv) = torch.linalg.qr(U), torch.linalg.qr(V)
    A, s, Bh = torch.linalg.svd(Ru @ Rv.mT)
    root = s.sqrt().unsqueeze(-2)
    return torch.cat([Qu @ (A * root), Qv @ (Bh.mT * root)], -2)
