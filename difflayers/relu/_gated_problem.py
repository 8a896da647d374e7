r"""The gated problem as the engine sees it.

On the active blocks :math:`A = \{u_i \ne 0\}` the solution is smooth:

.. math:: Z_A^T S\, l'(f, y) + \beta h = 0, \qquad h_i = u_i / \|u_i\|, \quad u_i = 0 \text{ off } A,

so every derivative is a solve with the Hessian on A (``_block_hessian.py``). With :math:`H q = g` for the cotangent g
of u, :math:`t = \sum_A Z_i q_i` and :math:`\Lambda = \mathrm{diag}(s_k l''_k)`,

.. math:: \bar y = -s \circ t \circ \partial_y l', \quad \bar s = -l' \circ t, \quad \bar\beta = -\sum q_i^T h_i, \quad
    \bar X_k = -s_k l'_k \sum_i d_{ki} q_i - \Lambda_{kk} t_k \sum_i d_{ki} u_i .
"""

from __future__ import annotations

import math
from functools import lru_cache, partial

import torch
from torch import Tensor

from difflayers._solution import Info, Status
from difflayers.implicit import ImplicitProblem
from difflayers.linalg._direct import direct_info

from . import _block_hessian as hessian
from ._gated_solver import FISTA, active_blocks, minimise
from ._gated_task import GatedTask
from ._losses import Loss
from ._training_call import for_solver

NAMES = ("X", "y", "sample_weight", "beta", "gates", "warm_start")
NDIMS = (2, 1, 1, 0, 2, 2)
Args = tuple[Tensor, ...]


@lru_cache(maxsize=64)
def gated_problem(loss: Loss, solver: FISTA, warm: bool) -> ImplicitProblem:
    """The problem in ``(X, y, s, beta, M)``, with M the patterns, and a starting point if `warm`."""
    count = 6 if warm else 5
    return ImplicitProblem(
        solve=partial(_solve, loss, solver),
        residual=partial(_residual, loss),
        linear_solve=partial(_linear_solve, loss),
        value_ndim=2,
        arg_ndims=NDIMS[:count],
        factor_ndims=(1, 1, *hessian.FACTOR_NDIMS),
        symmetric=True,
        name="convex_gated_relu",
        arg_names=NAMES[:count],
    )


def as_task(loss: Loss, X: Tensor, y: Tensor, s: Tensor, beta: Tensor, M: Tensor) -> GatedTask:
    """The task, with patterns as numbers."""
    return GatedTask(X, M.to(X.dtype), y, s, beta, loss)


def _residual(loss: Loss, u: Tensor, *args: Tensor) -> Tensor:
    return as_task(loss, *args[:5]).residual(u)


def _solve(loss: Loss, solver: FISTA, *args: Tensor) -> tuple[Tensor, Info, Args]:
    dtype = args[0].dtype
    batch, sound, flat = for_solver(args, NDIMS)
    X, y, s, beta, M = flat[:5]
    task = as_task(loss, X, y, s, beta, without_repetitions(M, s > 0))
    init = torch.zeros_like(task.M.mT @ task.X) if len(flat) == 5 else torch.where(torch.isfinite(flat[5]), flat[5], 0)
    u, info = minimise(task, init, solver)
    index, used = active_blocks(u)
    found = _blocks(task, u, index, used).factorise()
    factors = [t.to(dtype) if t.is_floating_point() else t for t in found]
    u, info = u.to(dtype), info._replace(residual=info.residual.to(dtype))
    info = info._replace(status=torch.where(sound, info.status, int(Status.DIVERGED)))
    u = torch.where(sound[:, None, None], u, math.nan)
    back = [t.reshape((*batch, *t.shape[1:])) for t in (u, index, used, *factors)]
    return back[0], Info(*(t.reshape(batch) for t in info)), tuple(back[1:])


def without_repetitions(M: Tensor, counts: Tensor) -> Tensor:
    """Patterns that equal an earlier one, on samples that count, are cleared: of equal gates the first is used."""
    signs = (2 * M.to(torch.float32) - 1) * counts.unsqueeze(-1)
    equal = signs.mT @ signs == counts.sum(-1)[..., None, None]
    return M & ~equal.triu(1).any(-2, keepdim=True)


def _blocks(task: GatedTask, u: Tensor, index: Tensor, used: Tensor) -> hessian.Blocks:
    return hessian.Blocks.of(task.X, task.M, u, task.beta, task.curvature(task.fit(u)), index, used)


def _linear_solve(
    loss: Loss, u: Tensor, args: Args, factors: Args, rhs: Tensor, transpose: bool
) -> tuple[Tensor, Info]:
    """H on the active blocks, identity off them."""
    index, used, *rest = factors
    cholesky = hessian.Factors(*rest)
    full = torch.broadcast_shapes(rhs.shape[:-2], index.shape[:-1])
    rhs = rhs.expand((*full, *rhs.shape[-2:]))
    blocks = _blocks(as_task(loss, *args[:5]), u, index, used)
    at = index.unsqueeze(-1)
    picked = torch.where(used.unsqueeze(-1), hessian.take_along(rhs, at, -2), 0)
    q = blocks.solve(cholesky, picked, refinements=2)
    q = torch.where(used.unsqueeze(-1), q, hessian.take_along(rhs, at, -2))
    x = rhs.scatter(-2, at.expand_as(q), q)
    return x, direct_info(cholesky.singular.expand(full), x, 2)
