r"""The cone-constrained problem as the engine sees it.

With the active neurons :math:`A = \{p_i \ne 0\}` and the kinks :math:`\mathcal T = \{(i, k): \rho_{ik} > 0\}`, points
of the data on which an active neuron changes from one to the other side, the solution is smooth in the data:

.. math:: \sigma_i Z_i^T S\, l'(f, y) + \beta h_i - C_i^T \rho_i = 0, \quad C_i p_i = 0 \quad (i \in A), \qquad
    p_i = 0 \text{ off } A,

with rows :math:`C_i` of :math:`K_i` at its kinks. The unknown of the engine is :math:`(p, \rho)`, a row of d + n
numbers for each neuron; neurons of positive output come first, those of negative output follow. Multipliers of inactive
neurons are there for the certificate alone: they count as constant. A derivative is the solution of

.. math:: \begin{bmatrix} H & -C^T \\ -C & 0 \end{bmatrix} \begin{bmatrix} q \\ m \end{bmatrix} =
    \begin{bmatrix} g \\ c \end{bmatrix}, \qquad q = -C^+ c + q_\perp, \quad m = (C^T)^+ (H q - g),

where :math:`q_\perp` comes from H restricted to the null space of C (``_block_hessian.py``); that is nonsingular
exactly where the network is minimal. The pseudo-inverses share the multiplier of points that coincide.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._solution import Info, Status
from difflayers.implicit import ImplicitProblem
from difflayers.linalg._direct import direct_info

from . import _block_hessian as hessian
from ._cone_certificate import duality_gap
from ._cone_problem import ConeProblem, ConeSolution, ConeSolver, or_one
from ._gated_problem import without_repetitions
from ._gated_solver import active_blocks
from ._gated_task import directions, gated_fit, lengths
from ._losses import Loss
from ._relu_active_set import SETTLED, cells_of, settle, solve_closely
from ._training_call import for_solver, wide_dtype

NAMES = ("X", "y", "sample_weight", "beta", "gates", "warm_start")
NDIMS = (2, 1, 1, 0, 2, 2)
RANK = 1e-10  # of points on one neuron's kink: what counts as dependent
Args = tuple[Tensor, ...]


@lru_cache(maxsize=64)
def relu_problem(loss: Loss, solver: ConeSolver, warm: bool) -> ImplicitProblem:
    """The problem in ``(X, y, s, beta, M)``, with M the patterns, and neurons to start from if `warm`."""
    count = 6 if warm else 5
    return ImplicitProblem(
        solve=partial(_solve, loss, solver),
        residual=partial(_residual, loss),
        linear_solve=partial(_linear_solve, loss),
        value_ndim=2,
        arg_ndims=NDIMS[:count],
        factor_ndims=(1, 1, 3, *hessian.FACTOR_NDIMS),
        symmetric=True,
        name="convex_relu",
        arg_names=NAMES[:count],
    )


class Neurons(NamedTuple):
    """The two parts of the unknown."""

    p: Tensor  # (*batch, 2P, d)
    rho: Tensor  # (*batch, 2P, n)

    @staticmethod
    def of(value: Tensor, d: int) -> Neurons:
        """Of a value of the engine."""
        return Neurons(value[..., :d], value[..., d:])

    @property
    def active(self) -> Tensor:
        """``(*batch, 2P)``."""
        return (self.p != 0).any(-1)

    @property
    def kinks(self) -> Tensor:
        """``(*batch, 2P, n)``."""
        return self.active.unsqueeze(-1) & (self.rho != 0)

    def signed(self) -> Tensor:
        """``(*batch, P, d)``: what the neurons of a pattern are together, where the pattern is on."""
        v, w = self.p.chunk(2, -2)
        return v - w


def lagrangian(loss: Loss, value: Tensor, X: Tensor, y: Tensor, s: Tensor, beta: Tensor, M: Tensor) -> Tensor:
    """The objective less the kinks' multipliers times what is zero there: stationary in neurons and multipliers."""
    u = Neurons.of(value, X.shape[-1])
    f = gated_fit(u.signed(), X, M.to(X.dtype))
    kinks = torch.where(u.kinks, u.rho * _sides(M, X.dtype), 0) * (u.p @ X.mT)
    value = (s * loss.value(f, y)).sum(-1) + beta * lengths(u.p).sum(-1)
    return value - (kinks - kinks.detach()).sum((-2, -1))  # of an early stop the objective is what it is


def _sides(M: Tensor, dtype: torch.dtype) -> Tensor:
    """``(*batch, 2P, n)``: on which side of a point the cell of a neuron lies."""
    side = 2 * M.mT.to(dtype) - 1
    return torch.cat([side, side], -2)


def _residual(loss: Loss, value: Tensor, *args: Tensor) -> Tensor:
    X, y, s, beta, M = args[:5]
    u, side = Neurons.of(value, X.shape[-1]), _sides(M, X.dtype)
    gate = M.to(X.dtype)
    slope = s * loss.slope(gated_fit(u.signed(), X, gate), y)
    pulled = (gate * slope.unsqueeze(-1)).mT @ X
    kinks = u.kinks
    stationary = torch.cat([pulled, -pulled], -2) + beta[..., None, None] * directions(u.p)
    stationary = stationary - (side * torch.where(kinks, u.rho, 0)) @ X
    on_kinks = torch.where(kinks, -side * (u.p @ X.mT), u.rho)
    return torch.cat([torch.where(u.active.unsqueeze(-1), stationary, u.p), on_kinks], -1)


# ---------------------------------------------------------------------------------------------------------------- solve


def _solve(loss: Loss, solver: ConeSolver, *args: Tensor) -> tuple[Tensor, Info, Args]:
    batch, sound, flat = for_solver(args, NDIMS)
    dtype = args[0].dtype
    X, y, s, beta, M = flat[:5]
    problem = ConeProblem(X, y, s, beta, without_repetitions(M, torch.ones_like(s)).to(X.dtype), loss)
    found = solve_closely(solver, problem, _start(problem, flat[5]) if len(flat) == 6 else None)
    p, rho, error, right = settle(problem, found)
    # what a first-order solver only came near, Newton's method on its active set may have brought home
    home = (error <= SETTLED) & (found.status == Status.MAX_STEPS)
    found = found._replace(
        status=torch.where(home, int(Status.CONVERGED), found.status),
        residual=torch.where(right, torch.fmin(error, found.residual), found.residual),
    )
    value = torch.cat([p, rho], -1).to(dtype)
    value = torch.where((sound & (found.status <= Status.MAX_STEPS))[:, None, None], value, math.nan)
    index, used = active_blocks(p)
    held, factors = _factorise(loss, Neurons(p, rho), problem, index, used)
    factors = factors._replace(singular=factors.singular | ~right)
    # factors stay in double precision: with a small beta, what they factor has few digits to spare
    info = Info(torch.where(sound, found.status, int(Status.DIVERGED)), found.steps, found.residual.to(dtype))
    back = [t.reshape((*batch, *t.shape[1:])) for t in (value, index, used, held, *factors)]
    return back[0], Info(*(t.reshape(batch) for t in info)), tuple(back[1:])


def _start(problem: ConeProblem, p: Tensor) -> ConeSolution:
    """A point to start from, without multipliers."""
    v, w = torch.where(torch.isfinite(p), p, 0).chunk(2, -2)
    rho, zero = torch.zeros_like(problem.gate), torch.zeros_like(problem.beta)
    return ConeSolution(v, w, rho, rho, zero, zero, zero, zero.long(), zero.long(), zero)


def _factorise(
    loss: Loss, u: Neurons, problem: ConeProblem, index: Tensor, used: Tensor
) -> tuple[Tensor, hessian.Factors]:
    """Pseudo-inverses of ``C_i^T C_i`` for rows of unit length, and the factors of H on the null space of C."""
    inner = _gram(problem.X, _kinks_at(u.kinks, index, used, problem.X.dtype))
    values, vectors = torch.linalg.eigh(inner)
    held = values > RANK * values[..., -1:].clamp(min=1)
    inverse = torch.where(held, 1 / torch.where(held, values, 1), 0)
    pseudo = (vectors * inverse.unsqueeze(-2)) @ vectors.mT
    args = (problem.X, problem.y, problem.s, problem.beta, problem.M)
    return pseudo, _blocks(loss, u, args, index, used, pseudo).factorise()


def _kinks_at(kinks: Tensor, index: Tensor, used: Tensor, dtype: torch.dtype) -> Tensor:
    """``(*batch, a, n)``: kinks of the blocks in the list, as numbers."""
    return hessian.take_along(kinks, index.unsqueeze(-1), -2).to(dtype) * used.unsqueeze(-1)


def _gram(X: Tensor, kinks: Tensor) -> Tensor:
    """``C_i^T C_i``, of rows of unit length."""
    rows = X / or_one(torch.linalg.vector_norm(X, dim=-1, keepdim=True))
    return (kinks.unsqueeze(-1) * rows.unsqueeze(-3)).mT @ rows.unsqueeze(-3)


def _blocks(loss: Loss, u: Neurons, args: Args, index: Tensor, used: Tensor, pseudo: Tensor) -> hessian.Blocks:
    X, y, s, beta, M = args[:5]
    gate = M.to(X.dtype)
    curvature = s * loss.curvature(gated_fit(u.signed(), X, gate), y)
    held = pseudo @ _gram(X, _kinks_at(u.kinks, index, used, X.dtype))
    return hessian.Blocks.of(X, torch.cat([gate, -gate], -1), u.p, beta, curvature, index, used, held)


# --------------------------------------------------------------------------------------------------------------- derive


def _linear_solve(
    loss: Loss, value: Tensor, args: Args, factors: Args, rhs: Tensor, transpose: bool
) -> tuple[Tensor, Info]:
    """The KKT matrix on active neurons and their kinks, the identity elsewhere; it is its own transpose."""
    index, used, pseudo, *rest = factors
    dtype = rhs.dtype
    value, rhs, *wide = (t.to(wide_dtype(t)) for t in (value, rhs, *args))
    X, M = wide[0], wide[4]
    cholesky = hessian.Factors(*rest)
    u = Neurons.of(value, X.shape[-1])
    full = torch.broadcast_shapes(rhs.shape[:-2], index.shape[:-1])
    rhs = rhs.expand((*full, *rhs.shape[-2:]))
    blocks = _blocks(loss, u, tuple(wide), index, used, pseudo)
    at, on = index.unsqueeze(-1), used.unsqueeze(-1)
    kinks = _kinks_at(u.kinks, index, used, X.dtype)
    length = or_one(torch.linalg.vector_norm(X, dim=-1, keepdim=True))
    rows = X / length
    C = kinks * hessian.take_along(_sides(M, X.dtype), at, -2)  # signs of the rows of C_i
    given = hessian.take_along(rhs, at, -2)
    g, c = Neurons.of(torch.where(on, given, 0), X.shape[-1])
    across = -((C * (c / length.mT)) @ rows)
    q = (pseudo @ across.unsqueeze(-1)).squeeze(-1)
    q = q + blocks.solve(cholesky, g - blocks.times(q), refinements=2)
    m = C * ((pseudo @ (blocks.times(q) - g).unsqueeze(-1)).squeeze(-1) @ rows.mT) / length.mT
    m = torch.where(kinks != 0, m, c)
    found = torch.where(on, torch.cat([q, m], -1), given)
    x = rhs.scatter(-2, at.expand_as(found), found).to(dtype)
    return x, direct_info(cholesky.singular.expand(full), x, 2)


def certificate(loss: Loss, value: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """The gap and the margin of inactive neurons, of numbers."""
    X, y, s, beta, M = (t.to(wide_dtype(t)) for t in args[:5])
    u = Neurons.of(value.to(X.dtype), X.shape[-1])
    batch = u.p.shape[:-2]
    gate = without_repetitions(M, torch.ones_like(s)).to(X.dtype)
    X, gate = (t.expand(*batch, *t.shape[-2:]) for t in (X, gate))
    y, s = (t.expand(*batch, t.shape[-1]) for t in (y, s))
    problem = ConeProblem(X, y, s, beta.expand(batch), gate, loss)
    return duality_gap(problem, u.p, u.rho), _margin(problem, u)


def _margin(problem: ConeProblem, u: Neurons) -> Tensor:
    """The least distance from a change of the active set: of an inactive neuron from growing, of a kink from moving."""
    slope = problem.s * problem.loss.slope(problem.fit(u.p), problem.y)
    pull = torch.linalg.vector_norm(problem.cones_adjoint(u.rho) - problem.fit_adjoint(slope), dim=-1)
    room = 1 - pull / problem.beta.unsqueeze(-1)
    # an active neuron with kinks belongs to the cells on either side: they are no other neurons
    twins = [(cells_of(problem, q) & (q != 0).any(-1).unsqueeze(-2)).any(-1) for q in u.p.chunk(2, -2)]
    twin = torch.cat(twins, -1)
    room = torch.where(u.active | twin, 1, room).amin(-1)
    share = u.rho / or_one(slope.abs()).unsqueeze(-2)  # at most 1 where the cell beyond the point is there too
    stays = torch.where(u.kinks, torch.minimum(share, (1 - share).abs()), 1).amin((-2, -1))
    return torch.minimum(room, stays).clamp_min(0)
