r"""Net-Trim as the engine sees it.

On the weights that are not zero, with signs s, and the silent responses with a positive multiplier, the solution is
smooth. With :math:`R` the misses of the responses to be kept,

.. math:: s + \mu R^T X + \kappa^T X = 0, \qquad \tfrac12 (\|R\|^2 - \epsilon^2) = 0, \qquad (X U^T)_\kappa = 0,

and the unknown of the engine is :math:`(U, \mu, \kappa)`, in one vector.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial

import torch
from torch import Tensor

from difflayers._solution import Info, Status
from difflayers.implicit import ImplicitProblem
from difflayers.linalg._direct import direct_info

from ._net_trim_solver import places, trim

NDIMS = (2, 2, 0)
_DAMPING = 1e-9
Args = tuple[Tensor, ...]


@lru_cache(maxsize=64)
def trimming(relu: bool, free: int, rtol: float, max_steps: int) -> ImplicitProblem:
    """The problem in ``(X, Y, radius)``; the last `free` columns cost nothing."""
    return ImplicitProblem(
        solve=partial(_solve, relu, free, rtol, max_steps),
        residual=partial(_residual, relu, free),
        linear_solve=partial(_linear_solve, relu),
        value_ndim=1,
        arg_ndims=NDIMS,
        symmetric=True,
        name="net_trim",
        arg_names=("X", "Y", "tolerance"),
    )


def unpack(z: Tensor, N: int, d: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights ``(m, d)``, the multiplier of the ball, those of the silent responses ``(N, m)``."""
    return z[..., : m * d].unflatten(-1, (m, d)), z[..., m * d], z[..., m * d + 1 :].unflatten(-1, (N, m))


def kept(relu: bool, Y: Tensor) -> Tensor:
    """The responses to be kept; the others may be anything up to zero."""
    return Y.detach() > 0 if relu else torch.ones_like(Y, dtype=torch.bool)


def _pack(U: Tensor, mu: Tensor, kappa: Tensor) -> Tensor:
    return torch.cat([U.flatten(-2), mu.unsqueeze(-1), kappa.flatten(-2)], -1)


def _residual(relu: bool, free: int, z: Tensor, X: Tensor, Y: Tensor, radius: Tensor) -> Tensor:
    U, mu, kappa = unpack(z, X.shape[-2], X.shape[-1], Y.shape[-1])
    alive, tight, tied = U.detach() != 0, kappa.detach() > 0, mu.detach() > 0
    # what is zero acts on itself alone, so that the Jacobian falls into two blocks
    weights = torch.where(alive, U, 0)
    V = X @ weights.mT
    R = torch.where(kept(relu, Y), V - Y, 0)
    cost = torch.arange(X.shape[-1], device=z.device) < X.shape[-1] - free
    pulled = mu[..., None, None] * R + torch.where(tight, kappa, 0)
    slope = U.detach().sign() * cost + pulled.mT @ X
    ball = (R.square().sum((-2, -1)) - radius.square()) / 2
    return _pack(torch.where(alive, slope, U), torch.where(tied, ball, mu), torch.where(tight, V, kappa))


def _solve(
    relu: bool, free: int, rtol: float, max_steps: int, X: Tensor, Y: Tensor, radius: Tensor
) -> tuple[Tensor, Info, Args]:
    batch = torch.broadcast_shapes(X.shape[:-2], Y.shape[:-2], radius.shape)
    dtype = X.dtype
    wide = torch.float64 if X.device.type != "mps" else dtype
    X, Y, radius = (_flat(t, batch, k).to(wide) for t, k in zip((X, Y, radius), NDIMS, strict=True))
    sound = torch.isfinite(X).flatten(1).all(-1) & torch.isfinite(Y).flatten(1).all(-1) & torch.isfinite(radius)
    # failed elements are computed from zeros
    X, Y = (torch.where(sound[:, None, None], t, 0) for t in (X, Y))
    radius = torch.where(sound, radius, 0)
    found = trim(X, Y, kept(relu, Y), radius, free, rtol, max_steps)
    z = _pack(found.U, found.mu, found.kappa)
    sound = sound & torch.isfinite(z).all(-1)
    z = torch.where(sound.unsqueeze(-1), z, math.nan).to(dtype)
    status = torch.where(sound, found.info.status, int(Status.DIVERGED))
    info = Info(status, found.info.steps, found.info.residual.to(dtype))
    return z.reshape(*batch, z.shape[-1]), Info(*(t.reshape(batch) for t in info)), ()


def _linear_solve(
    relu: bool, z: Tensor, args: Args, factors: Args, rhs: Tensor, transpose: bool
) -> tuple[Tensor, Info]:
    """LU of the conditions on what is not zero; identity on what is."""
    X, Y, radius = args
    weights = X.shape[-1] * Y.shape[-1]
    full = torch.broadcast_shapes(z.shape[:-1], X.shape[:-2], Y.shape[:-2], radius.shape, rhs.shape[:-1])
    wide = torch.float64 if X.device.type != "mps" else X.dtype
    X, Y, radius = (_flat(t, full, k).to(wide) for t, k in zip(args, NDIMS, strict=True))
    at, b = _flat(z, full, 1).to(wide), _flat(rhs, full, 1).to(wide)
    K, index, used = _matrix(at, X, Y, kept(relu, Y))
    size = K.abs().amax(-1)
    scale = torch.where(size > 0, size, 1).rsqrt()
    K = K * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    # tight responses of equal samples, or of a neuron without weights, say the same: any of their multipliers will do
    damped = K - torch.diag_embed(_DAMPING * (used & (index > weights)))
    LU, pivots, info = torch.linalg.lu_factor_ex(damped)
    least = LU.diagonal(dim1=-2, dim2=-1).abs().amin(-1)
    # with tolerance zero the conditions are those of a linear program, at a vertex or not unique
    singular = (info != 0) | (least < 1e-3 * _DAMPING) | ((radius == 0) & (at[:, :weights] != 0).any(-1))
    # a ball that only rounding makes tight holds nothing: there the weights are not unique
    force = at[:, weights] * radius * torch.linalg.vector_norm(X, dim=(-2, -1))
    singular = singular | ((force > 0) & (force < 1e-9))
    wanted = (torch.where(used, b.gather(-1, index), 0) * scale).unsqueeze(-1)
    x = torch.linalg.lu_solve(LU, pivots, wanted)
    for _ in range(2):
        x = x + torch.linalg.lu_solve(LU, pivots, wanted - K @ x)
    x = x.squeeze(-1) * scale
    out = b.scatter(-1, index, torch.where(used, x, b.gather(-1, index)))
    out = out.reshape(*full, out.shape[-1]).to(rhs.dtype)
    return out, direct_info(singular.reshape(full), out, 1)


def _flat(t: Tensor, batch: torch.Size, ndim: int) -> Tensor:
    """One batch dimension."""
    event = t.shape[t.ndim - ndim :]
    return t.expand((*batch, *event)).reshape((batch.numel(), *event))


def _matrix(z: Tensor, X: Tensor, Y: Tensor, on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Jacobian (E, S, S) on the unknowns that are not zero, their indices, and which of these are any."""
    (E, N, d), m = X.shape, Y.shape[-1]
    U, mu, kappa = unpack(z, N, d, m)
    weight, alive = places(U.flatten(1) != 0)
    row, tight = places(kappa.flatten(1) > 0)
    neuron, column = weight // d, weight % d
    sample, silent = row // m, row % m
    wide = lambda t: t.unsqueeze(1).expand(-1, N, -1)  # noqa: E731
    A = X.gather(2, wide(column)) * on.gather(2, wide(neuron)) * alive.unsqueeze(1)
    R = torch.where(on, X @ U.mT - Y, 0)
    layer = torch.arange(E, device=z.device)[:, None, None]
    B = X[layer, sample.unsqueeze(-1), column.unsqueeze(-2)] * (silent.unsqueeze(-1) == neuron.unsqueeze(-2))
    B = B * tight.unsqueeze(-1) * alive.unsqueeze(-2)
    H = mu[:, None, None] * (A.mT @ A) * (neuron.unsqueeze(-1) == neuron.unsqueeze(-2))
    ball = (A * R.gather(2, wide(neuron))).sum(1) * (mu > 0).unsqueeze(-1)
    middle = m * d + torch.zeros_like(row[:, :0].sum(-1, keepdim=True))
    index, used = torch.cat([weight, middle, m * d + 1 + row], -1), torch.cat([alive, mu.unsqueeze(-1) > 0, tight], -1)
    k = weight.shape[-1]
    K = torch.diag_embed((~used).to(z.dtype))
    K[:, :k, :k] += H
    K[:, k, :k] = K[:, :k, k] = ball
    K[:, k + 1 :, :k], K[:, :k, k + 1 :] = B, B.mT
    return K, index, used
