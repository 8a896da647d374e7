r"""Conditioning a Gaussian on linear equations, as the engine sees it.

The unknowns are posterior mean and covariance with the multipliers of the equations,

.. math:: \tilde\mu = \mu - \Sigma G^T \ell, \quad G \tilde\mu - \sigma^2 \ell = b, \qquad
    \tilde\Sigma = \Sigma - \Sigma G^T K, \quad G \tilde\Sigma - \sigma^2 K = 0.

Every column of :math:`[\tilde\mu, \tilde\Sigma]` solves the same system, and one Cholesky factor of
:math:`P = \sigma^2 I + G \Sigma G^T` serves the solve and its derivatives of all orders. Of a diagonal covariance the
diagonal alone is kept, so that nothing has n x n entries.

The density of the posterior needs no solver, and is plain torch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._checks import check_finite
from difflayers._solution import Info, Status, settle
from difflayers.implicit import ImplicitProblem
from difflayers.linalg._autodiff import opaque, physical
from difflayers.linalg._system import times

Args = tuple[Tensor, ...]
NAMES = ("mean", "covariance", "b", "G", "noise")


def inner_matrix(G: Tensor, cross: Tensor, noise: Tensor) -> Tensor:
    """``P = noise I + G cross``, with ``cross = covariance G^T``."""
    eye = torch.eye(G.shape[-2], dtype=G.dtype, device=G.device)
    return noise[..., None, None] * eye + G @ cross


def _factor(P: Tensor, rounding: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The Cholesky factor, whether `P` is singular to rounding, and its smallest pivot, scaled to a unit diagonal.

    Args:
        P: Inner matrix.
        rounding: ``(*batch, m)`` error of its diagonal, which has to be larger. None: sums without cancellation.
    """
    m, diagonal = P.shape[-1], P.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.clamp_min(0).sqrt()
    sound = torch.isfinite(P).all(-1).all(-1) & (scale > 0).all(-1)
    if rounding is not None:
        sound = sound & (diagonal > rounding).all(-1)
    scale = torch.where(sound.unsqueeze(-1), scale, 1)
    unit = P / scale.unsqueeze(-1) / scale.unsqueeze(-2)
    eye = torch.eye(m, dtype=P.dtype, device=P.device)
    L, broken = torch.linalg.cholesky_ex(torch.where(sound[..., None, None], unit, eye))
    least = 10 * max(m, 1) * torch.finfo(P.dtype).eps
    pivots = L.diagonal(dim1=-2, dim2=-1).square()
    singular = ~sound | (broken > 0) | ~(pivots > least).all(-1)
    L = torch.where(singular[..., None, None], eye, L * scale.unsqueeze(-1))
    worst = pivots.amin(-1) if m else torch.ones_like(singular, dtype=P.dtype)
    return L, singular, torch.where(singular, 1, worst)


def _solved(L: Tensor, V: Tensor) -> Tensor:
    """``P^{-1} V`` from the factor of P; torch's batched solves want one batch dimension."""
    batch = torch.broadcast_shapes(L.shape[:-2], V.shape[:-2])
    if not batch:
        return torch.cholesky_solve(V, L)
    wide, factor = (t.expand((*batch, *t.shape[-2:])).reshape((batch.numel(), *t.shape[-2:])) for t in (V, L))
    return torch.cholesky_solve(wide, factor).reshape((*batch, *V.shape[-2:]))


def _solved_vector(L: Tensor, v: Tensor) -> Tensor:
    return _solved(L, v.unsqueeze(-1)).squeeze(-1)


def _corrected(L: Tensor, P: Tensor, V: Tensor) -> Tensor:
    """``P^{-1} V`` with one step of refinement: the equations then hold to rounding."""
    X = _solved(L, V)
    return X + _solved(L, V - P @ X)


def _info(singular: Tensor, value: Tensor, event_ndim: int, residual: Tensor) -> Info:
    finite = torch.isfinite(value.flatten(value.ndim - event_ndim)).all(-1)
    status = torch.where(singular, int(Status.SINGULAR), int(Status.CONVERGED))
    status = torch.where(finite, status, int(Status.DIVERGED))
    return Info(status, torch.ones_like(status), residual)


def _no_steps(x: Tensor, event_ndim: int) -> Info:
    status = torch.zeros(x.shape[: x.ndim - event_ndim], dtype=torch.int64, device=x.device)
    return Info(status, torch.ones_like(status), torch.zeros_like(status, dtype=x.dtype))


def _joined(*parts: Tensor, event_ndim: int, dim: int) -> Tensor:
    """Side by side, batch dimensions broadcast."""
    batch = torch.broadcast_shapes(*(p.shape[: p.ndim - event_ndim] for p in parts))
    return torch.cat([p.expand((*batch, *p.shape[p.ndim - event_ndim :])) for p in parts], dim)


# ---------------------------------------------------------------------------------------------------- full covariance


def _start(mean: Tensor, covariance: Tensor) -> Tensor:
    return _joined(mean.unsqueeze(-1), covariance, event_ndim=2, dim=-1)


def _full_residual(value: Tensor, mean: Tensor, covariance: Tensor, b: Tensor, G: Tensor, noise: Tensor) -> Tensor:
    n = mean.shape[-1]
    X, multipliers = value[..., :n, :], value[..., n:, :]
    rows = G @ X - noise[..., None, None] * multipliers
    target = torch.nn.functional.pad(b.unsqueeze(-1), (0, n))
    moved = X - _start(mean, covariance) + covariance @ (G.mT @ multipliers)
    return _joined(moved, rows - target, event_ndim=2, dim=-2)


def _solve_full(mean: Tensor, covariance: Tensor, b: Tensor, G: Tensor, noise: Tensor) -> tuple[Tensor, Info, Args]:
    cross = covariance @ G.mT
    P = inner_matrix(G, cross, noise)
    eps, n = torch.finfo(G.dtype).eps, G.shape[-1]
    prior = covariance.diagonal(dim1=-2, dim2=-1)
    # of a covariance that knows the integrals already, rounding alone is left in P; |S_jk| is at most sqrt(S_jj S_kk)
    L, singular, pivot = _factor(P, 10 * n**0.5 * eps * times(G.abs(), prior.clamp_min(0).sqrt()).square())
    gap = times(G, mean) - b
    multiplier = _corrected(L, P, gap.unsqueeze(-1)).squeeze(-1)
    K = _corrected(L, P, cross.mT)
    posterior = covariance - cross @ K
    posterior = (posterior + posterior.mT) / 2
    # what rounding makes negative is zero; what is below that had no covariance to begin with
    left = posterior.diagonal(dim1=-2, dim2=-1)
    slack = 100 * n * eps / pivot.unsqueeze(-1)
    singular = singular | (prior < 0).any(-1) | (left < -slack * prior).any(-1) | (noise < 0)
    left.clamp_min_(0)
    moved = mean - times(cross, multiplier)
    value = _joined(
        _joined(moved.unsqueeze(-1), posterior, event_ndim=2, dim=-1),
        _joined(multiplier.unsqueeze(-1), K, event_ndim=2, dim=-1),
        event_ndim=2,
        dim=-2,
    )
    miss = torch.linalg.vector_norm(times(G, moved) - b - noise.unsqueeze(-1) * multiplier, dim=-1)
    batch = value.shape[:-2]
    return value, _info(singular.expand(batch), value, 2, miss.expand(batch)), (L,)


def _full_derivative(value: Tensor, args: Args, factors: Args, rhs: Tensor, transpose: bool) -> tuple[Tensor, Info]:
    _, covariance, _, G, _ = args
    n = G.shape[-1]
    p, q = rhs[..., :n, :], rhs[..., n:, :]
    w = _solved(factors[0], G @ (covariance @ p if transpose else p) - q)
    v = p - (G.mT @ w if transpose else covariance @ (G.mT @ w))
    x = _joined(v, w, event_ndim=2, dim=-2)
    return x, _no_steps(x, 2)


# ------------------------------------------------------------------------------------------------ diagonal covariance


def _parts(value: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, its multiplier, variance, and the multipliers of the covariance as ``(m, n)``."""
    mean, multiplier, variance, K = value.split([n, m, n, m * n], -1)
    return mean, multiplier, variance, K.unflatten(-1, (m, n))


def _flat(mean: Tensor, multiplier: Tensor, variance: Tensor, K: Tensor) -> Tensor:
    return _joined(mean, multiplier, variance, K.flatten(-2), event_ndim=1, dim=-1)


def _diagonal_residual(value: Tensor, mean: Tensor, variance: Tensor, b: Tensor, G: Tensor, noise: Tensor) -> Tensor:
    x, multiplier, left, K = _parts(value, mean.shape[-1], b.shape[-1])
    weighted = G * variance.unsqueeze(-2)
    return _flat(
        x - mean + variance * times(G.mT, multiplier),
        times(G, x) - b - noise.unsqueeze(-1) * multiplier,
        left - variance + variance * (G * K).sum(-2),
        noise[..., None, None] * K + (weighted @ G.mT) @ K - weighted,  # nothing is n x n
    )


def _solve_diagonal(mean: Tensor, variance: Tensor, b: Tensor, G: Tensor, noise: Tensor) -> tuple[Tensor, Info, Args]:
    cross = G.mT * variance.unsqueeze(-1)
    P = inner_matrix(G, cross, noise)
    L, singular, _ = _factor(P)
    singular = singular | (variance < 0).any(-1) | (noise < 0)
    multiplier = _corrected(L, P, (times(G, mean) - b).unsqueeze(-1)).squeeze(-1)
    K = _corrected(L, P, cross.mT)
    left = (variance * (1 - (G * K).sum(-2))).clamp_min(0)  # what rounding makes negative is zero
    moved = mean - variance * times(G.mT, multiplier)
    value = _flat(moved, multiplier, left, K)
    miss = torch.linalg.vector_norm(times(G, moved) - b - noise.unsqueeze(-1) * multiplier, dim=-1)
    batch = value.shape[:-1]
    return value, _info(singular.expand(batch), value, 1, miss.expand(batch)), (L,)


def _diagonal_derivative(value: Tensor, args: Args, factors: Args, rhs: Tensor, transpose: bool) -> tuple[Tensor, Info]:
    _, variance, _, G, _ = args
    (L,) = factors
    p, q, u, V = _parts(rhs, G.shape[-1], G.shape[-2])
    if transpose:
        w = _solved_vector(L, times(G, variance * p) - q)
        v = p - times(G.mT, w)
        K = _solved(L, V - G * (variance * u).unsqueeze(-2))
        left = u
    else:
        w = _solved_vector(L, times(G, p) - q)
        v = p - variance * times(G.mT, w)
        K = _solved(L, V)
        left = u - variance * (G * K).sum(-2)
    x = _flat(v, w, left, K)
    return x, _no_steps(x, 1)


FULL = ImplicitProblem(
    solve=_solve_full,
    residual=_full_residual,
    linear_solve=_full_derivative,
    value_ndim=2,
    arg_ndims=(1, 2, 1, 2, 0),
    factor_ndims=(2,),
    name="conserve",
    arg_names=NAMES,
)
DIAGONAL = ImplicitProblem(
    solve=_solve_diagonal,
    residual=_diagonal_residual,
    linear_solve=_diagonal_derivative,
    value_ndim=1,
    arg_ndims=(1, 1, 1, 2, 0),
    factor_ndims=(2,),
    name="conserve",
    arg_names=NAMES,
)


# ------------------------------------------------------------------------------------------------------------ density


class _Densities(NamedTuple):
    """A quadratic form, the logarithm of the determinant of its matrix, and whether it has one."""

    form: Tensor
    log_det: Tensor
    sound: Tensor


@opaque
def log_likelihood(
    u: Tensor, mean: Tensor, covariance: Tensor, b: Tensor, G: Tensor, noise: Tensor, diagonal: bool, noisy: bool
) -> Tensor:
    """The log-density of the corrected prediction at `u`: see :func:`~difflayers.pde.conserved_log_likelihood`."""
    args = (mean, covariance, b, G, noise)
    far, gap, n, m = u - mean, times(G, mean) - b, u.shape[-1], b.shape[-1]
    if diagonal:
        plain = _Densities((far.square() / covariance).sum(-1), covariance.log().sum(-1), (covariance > 0).all(-1))
        cross = G.mT * covariance.unsqueeze(-1)
    else:
        plain = _densities(covariance, far)
        cross = covariance @ G.mT
    P = inner_matrix(G, cross, noise)
    marginal = _densities((P + P.mT) / 2, gap)
    twice = marginal.form + marginal.log_det - plain.form - plain.log_det - (n - m) * math.log(2 * math.pi)
    if noisy:
        miss = (times(G, u) - b).square().sum(-1)
        twice = twice - miss / noise - m * (noise.log() + math.log(2 * math.pi))
    plainly = physical(twice)
    status = torch.where(torch.isfinite(plainly), int(Status.CONVERGED), int(Status.DIVERGED))
    status = torch.where(physical(plain.sound & marginal.sound), status, int(Status.SINGULAR))
    settle(
        plainly / 2,
        Info(status, torch.ones_like(status), torch.zeros_like(plainly)),
        "raise",
        name="conserved_log_likelihood",
        diagnose=lambda: check_finite((k, physical(t)) for k, t in zip(("u", *NAMES), (u, *args), strict=True)),
    )
    return twice / 2


def _densities(M: Tensor, v: Tensor) -> _Densities:
    """``v^T M^{-1} v`` and ``log det M`` of a symmetric matrix, and whether it is positive definite beyond rounding."""
    L, broken = torch.linalg.cholesky_ex(M)
    diagonal = L.diagonal(dim1=-2, dim2=-1)
    least = 10 * max(M.shape[-1], 1) * torch.finfo(M.dtype).eps
    sound = (broken == 0) & (diagonal.detach().square() > least * M.detach().diagonal(dim1=-2, dim2=-1)).all(-1)
    form = torch.linalg.solve_triangular(L, v.unsqueeze(-1), upper=False).square().sum((-2, -1))
    return _Densities(form, diagonal.log().sum(-1) * 2, sound)
