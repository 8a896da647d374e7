"""Gated problems with vector outputs as the engine sees them: the fixed point of a proximal step, with ranks held."""

from __future__ import annotations

import math
from functools import lru_cache, partial

import torch
from torch import Tensor

from difflayers._solution import Info, Status
from difflayers.implicit import ImplicitProblem
from difflayers.linalg._direct import direct_info
from difflayers.proximal._identify import identify

from ._gated_problem import without_repetitions
from ._gated_solver import FISTA
from ._nuclear_solver import minimise
from ._nuclear_task import (
    Curved,
    Tangent,
    as_task,
    factorise,
    ranks,
    shrunk_with_norm,
    solve_curved,
    spectrum,
    step_length,
)
from ._training_call import for_solver

NAMES, NDIMS = ("X", "Y", "sample_weight", "beta", "gates", "warm_start"), (2, 2, 1, 0, 2, 3)


@lru_cache(maxsize=64)
def nuclear_problem(solver: FISTA, warm: bool) -> ImplicitProblem:
    """The problem in ``(X, Y, s, beta, M)``, with M the patterns, and a starting point if `warm`."""
    count = 6 if warm else 5
    return ImplicitProblem(
        solve=partial(_solve, solver),
        residual=_residual,
        linear_solve=_linear_solve,
        value_ndim=3,
        arg_ndims=NDIMS[:count],
        factor_ndims=(0, 1, 3, 3, 1, 1, 1, 1, 2, 1, 0),
        name="convex_gated_relu_vector",
        arg_names=NAMES[:count],
    )


def _residual(U: Tensor, *args: Tensor) -> Tensor:
    """How far a proximal step, of any length, moves U: its ranks are held."""
    task = as_task(*args[:5])
    lengths = (U, task.X, task.s, task.beta)
    (t,) = identify(lambda *given: (step_length(*given),), *lengths, ndims=(3, 2, 1, 0), found_ndims=(0,))
    (rank,) = identify(lambda U: (ranks(U),), U, ndims=(3,), found_ndims=(1,))
    V = U - t[..., None, None, None] * task.slope(task.fit(U))
    return U - shrunk_with_norm(V, (t * task.beta).unsqueeze(-1), rank)[0]


def _solve(solver: FISTA, *args: Tensor) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    batch, sound, flat = for_solver(args, NDIMS)
    X, Y, s, beta, M = flat[:5]
    task = as_task(X, Y, s, beta, without_repetitions(M, s > 0))
    init = torch.zeros_like(task.pull(Y)) if len(flat) == 5 else torch.where(torch.isfinite(flat[5]), flat[5], 0)
    U, info = minimise(task, init, solver)
    t = step_length(U, X, s, beta)
    V = U - t[..., None, None, None] * task.slope(task.fit(U))
    tangent = Tangent.of(spectrum(V, (t * beta).unsqueeze(-1), ranks(U)))
    factors = (t, *tangent, *factorise(task, tangent, t))
    info = info._replace(status=torch.where(sound, info.status, int(Status.DIVERGED)))
    U = torch.where(sound[..., None, None, None], U, math.nan)
    back = [t.reshape((*batch, *t.shape[1:])) for t in (U, *factors)]
    return back[0], Info(*(x.reshape(batch) for x in info)), tuple(back[1:])


def _linear_solve(
    U: Tensor, args: tuple[Tensor, ...], factors: tuple[Tensor, ...], rhs: Tensor, transpose: bool
) -> tuple[Tensor, Info]:
    """See the head of ``_nuclear_task.py``."""
    task, t = as_task(*args[:5]), factors[0]
    tangent, curved = Tangent(*factors[1:8]), Curved(*factors[8:])
    full = torch.broadcast_shapes(rhs.shape[:-3], t.shape)
    rhs = rhs.expand((*full, *rhs.shape[-3:]))
    step = t[..., None, None, None]

    def solve(g: Tensor) -> Tensor:
        return tangent.outof(solve_curved(task, tangent, curved, t, tangent.into(g)), rhs.shape[-3]) / step

    if transpose:
        w = solve(rhs)
        x = rhs + w - step * task.hessian(w)
    else:
        x = rhs + solve(rhs - step * task.hessian(rhs))
    return x, direct_info(curved.singular.expand(full), x, 3)
