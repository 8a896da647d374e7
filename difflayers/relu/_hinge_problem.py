r"""Gated networks trained with the hinge loss, as the engine sees them.

At the optimum some samples :math:`\mathcal K` lie exactly on the kink of the loss, :math:`y_k f_k = 1`, with a slope
between those of both sides; the others have constant slopes. The unknowns are the neurons and the multipliers
:math:`\nu_k \in [0, s_k y_k]` of all samples, minus the weighted slopes:

.. math:: \beta h_i - Z_i^T \nu = 0 \quad (u_i \ne 0), \qquad f_k = 1 / y_k \quad (k \in \mathcal K), \qquad
    \nu_k = s_k y_k \text{ within the margin}, \quad \nu_k = 0 \text{ beyond it}.

An interior-point method finds both sets, Newton's method on them finishes, and the derivative is a solve with the same
matrix.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial

import torch
from torch import Tensor

from difflayers._checks import default_rtol
from difflayers._solution import Info, Status
from difflayers.implicit import ImplicitProblem
from difflayers.linalg._direct import direct_info

from ._block_hessian import take_along
from ._cone_interior_point import InteriorPoint
from ._cone_problem import ConeProblem
from ._gated_solver import FISTA, NOISE, active_blocks, prune
from ._gated_task import GatedTask, directions, gated_fit, lengths
from ._losses import Loss
from ._training_call import for_solver, wide_dtype

NAMES = ("X", "y", "sample_weight", "beta", "gates", "warm_start")
NDIMS = (2, 1, 1, 0, 2, 2)
ROUNDS, NEWTON_STEPS = 6, 4
DEPENDENT = 1e-7  # columns: the least singular value over the largest
PIVOT = 1e-13  # of an equilibrated matrix: less is singular
Args = tuple[Tensor, ...]


@lru_cache(maxsize=64)
def hinge_problem(loss: Loss, solver: FISTA, warm: bool) -> ImplicitProblem:
    """The problem in ``(X, y, s, beta, M)``; an interior point has no use for a point to start from."""
    count = 6 if warm else 5
    return ImplicitProblem(
        solve=partial(_solve, loss, solver),
        residual=_residual,
        linear_solve=_linear_solve,
        value_ndim=1,
        arg_ndims=NDIMS[:count],
        factor_ndims=(0,),
        name="convex_gated_relu",
        arg_names=NAMES[:count],
    )


def split(value: Tensor, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Neurons ``(*batch, P, d)`` and multipliers ``(*batch, n)`` of a value of the engine."""
    return value[..., :-n].unflatten(-1, (-1, d)), value[..., -n:]


def _joined(u: Tensor, nu: Tensor) -> Tensor:
    return torch.cat([u.flatten(-2), nu], -1)


def at_kink(nu: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Samples whose multiplier lies between its ends."""
    return (nu != 0) & (nu != s * y) & (s * y != 0)


def lagrangian(loss: Loss, value: Tensor, X: Tensor, y: Tensor, s: Tensor, beta: Tensor, M: Tensor) -> Tensor:
    """The objective, with multipliers instead of the loss of samples on the kink: stationary in the value."""
    u, nu = split(value, *X.shape[-2:])
    f, kink = gated_fit(u, X, M.to(X.dtype)), at_kink(nu, y, s).detach()
    on = torch.where(kink, nu, 0) * (1 / torch.where(y == 0, 1, y) - f)
    off = s * loss.value(torch.where(kink, 0, f), y)
    return torch.where(kink, on, off).sum(-1) + beta * lengths(u).sum(-1)


def _residual(value: Tensor, *args: Tensor) -> Tensor:
    X, y, s, beta, M = args[:5]
    u, nu = split(value, *X.shape[-2:])
    gate, kink = M.to(X.dtype), at_kink(nu, y, s)
    stationary = beta[..., None, None] * directions(u) - (gate * nu.unsqueeze(-1)).mT @ X
    samples = torch.where(kink, gated_fit(u, X, gate) - 1 / torch.where(y == 0, 1, y), nu - _end(nu, y, s))
    return _joined(torch.where((u != 0).any(-1, keepdim=True), stationary, u), samples)


def _end(nu: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """What the multiplier of a sample off the kink is."""
    return torch.where(nu != 0, s * y, 0)


# ---------------------------------------------------------------------------------------------------------------- solve


def _solve(loss: Loss, solver: FISTA, *args: Tensor) -> tuple[Tensor, Info, Args]:
    from ._gated_problem import without_repetitions  # it imports this module's caller

    dtype = args[0].dtype
    batch, sound, flat = for_solver(args[:5], NDIMS)
    X, y, s, beta, M = flat[:5]
    task = GatedTask(X, without_repetitions(M, s > 0).to(X.dtype), y, s, beta, loss)
    value, exact, info = minimise(task, solver)
    u, nu = split(value, *X.shape[-2:])
    # ends of multipliers are those of the data as they came
    y, s = y.to(dtype), s.to(dtype)
    share = nu / torch.where(y * s == 0, 1, y * s)
    nu = torch.where((share == 0) | (share == 1), share.to(dtype) * (s * y), nu.to(dtype))
    value = torch.where(sound[:, None], _joined(u.to(dtype), nu), math.nan)
    info = Info(torch.where(sound, info.status, int(Status.DIVERGED)), info.steps, info.residual.to(dtype))
    return value.reshape((*batch, value.shape[-1])), Info(*(t.reshape(batch) for t in info)), (exact.reshape(batch),)


def minimise(task: GatedTask, solver: FISTA) -> tuple[Tensor, Tensor, Info]:
    """Neurons and multipliers of every element, whether they are exact, and the report."""
    asked = default_rtol(solver.rtol, task.X.dtype)
    problem = ConeProblem(task.X, task.y, task.s, task.beta, task.M, task.loss, gated=True)
    found = InteriorPoint(rtol=min(asked, 1e-11), max_steps=min(solver.max_steps, 200)).solve(problem)
    assert found.slope is not None
    finite = torch.isfinite(found.v).all(-1).all(-1) & torch.isfinite(found.slope).all(-1)
    u, most = torch.where(finite[:, None, None], found.v - found.w, 0), task.s * task.y
    nu = torch.where(finite[:, None], -task.s * found.slope, most)
    # of a neuron and of what it lacks to being active the smaller goes to zero; so for samples and kinks below
    beta, size = task.beta[:, None], lengths(u)
    lacks = beta - torch.linalg.vector_norm(task.pull(nu), dim=-1)
    u = torch.where((size * beta > lacks * size.amax(-1, keepdim=True))[..., None], u, 0)
    room = 1 - task.y * task.fit(u)
    share = nu / torch.where(most == 0, 1, most)
    kink = (torch.minimum(share, 1 - share) > room.abs()) & (most != 0)
    # a point that cannot be settled is handed out as it came
    u = prune(task.X, task.M, task.s > 0, u)
    came = _joined(u, torch.where(kink, nu, _ends(share, most)))
    u = _minimal(task, u, kink, share)
    best = _joined(u, nu)
    # the slope of a neuron, and that of a sample, cannot be known better than this
    noise = NOISE * torch.finfo(u.dtype).eps * (most.abs() * torch.linalg.vector_norm(task.X, dim=-1)).sum(-1)
    allowed = torch.maximum(torch.full_like(noise, asked), noise / task.beta)
    least, steps = torch.full_like(task.beta, torch.inf), found.steps.clone()
    going = finite & (steps < solver.max_steps)
    for _ in range(ROUNDS):
        value = _joined(u, torch.where(kink, torch.where(_inside(nu, most), nu, most / 2), _ends(share, most)))
        for _ in range(NEWTON_STEPS):
            value = _newton_step(task, value)
        steps = steps + NEWTON_STEPS * going
        error = _error(task, value)
        better = going & (error < least)
        best, least = torch.where(better[:, None], value, best), torch.where(better, error, least)
        going = going & ~(error <= allowed)
        if not bool(going.any()):
            break
        # multipliers that left their interval leave the kink, samples on the wrong side come to it
        u, nu = split(value, *task.X.shape[-2:])
        share, room = nu / torch.where(most == 0, 1, most), 1 - task.y * task.fit(u)
        wrong = torch.where(share > 0.5, -room, room) > 1e-9
        kink = torch.where(kink, (share > 0) & (share < 1), wrong & (most != 0))
    exact = least <= allowed
    best = torch.where(exact[:, None], best, came)
    status = torch.where(exact & (found.status <= Status.MAX_STEPS), int(Status.CONVERGED), found.status)
    # what came may be worse than the interior point it was made from
    worse = (
        task.objective(split(came, *task.X.shape[-2:])[0]) > found.objective + max(asked, 1e-8) * found.objective.abs()
    )
    status = torch.where(~exact & worse, status.clamp(min=int(Status.MAX_STEPS)), status)
    return best, exact, Info(status, steps, torch.where(exact, least, found.residual))


def _minimal(task: GatedTask, u: Tensor, kink: Tensor, share: Tensor) -> Tensor:
    """A solution whose ``Z_i u_i`` are independent on the kink alone, of the same objective.

    Gates that differ on samples beyond the margin only make solutions that are not unique: along a null vector of the
    columns on the kink the objective is constant until a block vanishes, or another sample comes to the kink.
    """
    counts = (task.s * task.y != 0) & ~kink
    going = torch.ones_like(task.beta, dtype=torch.bool)
    for _ in range(u.shape[-2]):
        index, used = active_blocks(u)
        p = torch.take_along_dim(u, index.unsqueeze(-1), -2)
        columns = torch.take_along_dim(task.M, index.unsqueeze(-2), -1) * (task.X @ p.mT)
        columns = torch.where(used.unsqueeze(-2) & kink.unsqueeze(-1), columns, 0)
        size = torch.linalg.vector_norm(columns, dim=-2)
        size = torch.where(size > 0, size, 1)
        padded = torch.cat([columns / size.unsqueeze(-2), torch.diag_embed((~used).to(u.dtype))], -2)
        _, values, null = torch.linalg.svd(torch.where(torch.isfinite(padded), padded, 0), full_matrices=True)
        least = values[..., -1] if values.shape[-1] == padded.shape[-1] else torch.zeros_like(task.beta)
        going = going & (least <= DEPENDENT * values[..., 0]) & used.any(-1)
        if not bool(going.any()):
            break
        c = torch.where(used, null[..., -1, :], 0) / size
        moved, fine = torch.zeros_like(going), torch.zeros_like(going)
        for sign in (1, -1):
            j = (sign * c).argmax(-1, keepdim=True)
            top = c.gather(-1, j)
            factor = (1 - c / torch.where(top == 0, 1, top)).scatter(-1, j, 0).clamp_min(0)
            new = u.scatter(-2, index.unsqueeze(-1).expand_as(p), p * factor.unsqueeze(-1))
            room = 1 - task.y * task.fit(new)
            fine = ((torch.where(share > 0.5, room, -room) > 0) | ~counts).all(-1) & (sign * top.squeeze(-1) > 0)
            fine = fine & going & ~moved
            u, moved = torch.where(fine[:, None, None], new, u), moved | fine
        going = going & moved
    return u


def _inside(nu: Tensor, most: Tensor) -> Tensor:
    return (nu != 0) & (nu != most)


def _ends(share: Tensor, most: Tensor) -> Tensor:
    return torch.where(share > 0.5, most, 0)


def _newton_step(task: GatedTask, value: Tensor) -> Tensor:
    args = task.X, task.y, task.s, task.beta, task.M
    kink = at_kink(split(value, *task.X.shape[-2:])[1], task.y, task.s)
    exact = torch.ones_like(task.beta, dtype=torch.bool)
    step, _ = _linear_solve(value, args, (exact,), -_residual(value, *args), False)
    step = torch.where(torch.isfinite(step).all(-1, keepdim=True), step, 0)
    u, nu = split(value + step, *task.X.shape[-2:])
    # a multiplier that happens on an end would change the equations
    most = task.s * task.y
    nudged = torch.where(_inside(nu, most), nu, nu + 1e-30 + 1e-15 * most)
    # rounding must not bring the others to the kink
    return _joined(u, torch.where(kink, nudged, split(value, *task.X.shape[-2:])[1]))


def _error(task: GatedTask, value: Tensor) -> Tensor:
    """The largest violation of optimality: of neurons relative to beta, of margins, of multipliers' intervals."""
    u, nu = split(value, *task.X.shape[-2:])
    most, room = task.s * task.y, 1 - task.y * task.fit(u)
    share = nu / torch.where(most == 0, 1, most)
    kink = _inside(nu, most)
    off = torch.where(share > 0.5, -room, room).clamp(min=0)
    samples = torch.where(kink, torch.maximum(room.abs(), torch.maximum(-share, share - 1).clamp(min=0)), off)
    samples = torch.where(most != 0, samples, 0).amax(-1)
    return torch.maximum(task.violation(u, -task.pull(nu)) / task.beta, samples)


# --------------------------------------------------------------------------------------------------------------- derive


def _linear_solve(value: Tensor, args: Args, factors: Args, rhs: Tensor, transpose: bool) -> tuple[Tensor, Info]:
    """LU of the conditions on active neurons and on samples; identity on the other neurons."""
    n, d = args[0].shape[-2:]
    full = torch.broadcast_shapes(value.shape[:-1], *(t.shape[: t.ndim - k] for t, k in zip(args, NDIMS, strict=False)))
    full = torch.broadcast_shapes(full, rhs.shape[:-1])
    X, y, s, beta, M = (
        t.expand((*full, *t.shape[t.ndim - k :])).reshape((-1, *t.shape[t.ndim - k :]))
        for t, k in zip(args[:5], NDIMS, strict=False)
    )
    at, b = (t.expand((*full, t.shape[-1])).reshape((-1, t.shape[-1])) for t in (value, rhs))
    u, nu = split(at, n, d)
    kink = at_kink(nu, y, s)
    wide = wide_dtype(X)
    X, beta, u, b = (t.to(wide) for t in (X, beta, u, b))
    index, used = active_blocks(u)
    J = _matrix(X, beta, M.to(wide), u, kink, index, used)
    rows = J.abs().amax(-1, keepdim=True)
    rows = torch.where(rows > 0, rows, 1)
    columns = (J / rows).abs().amax(-2, keepdim=True)
    columns = torch.where(columns > 0, columns, 1)
    LU, pivots, bad = torch.linalg.lu_factor_ex(J / rows / columns)
    singular = (bad != 0) | ~(LU.diagonal(dim1=-2, dim2=-1).abs().amin(-1) > PIVOT)
    given, samples = split(b, n, d)
    picked = take_along(given, index.unsqueeze(-1), -2)
    side = _joined(torch.where(used.unsqueeze(-1), picked, 0), samples)
    before, after = (columns, rows) if transpose else (rows, columns)
    before, after = before.reshape(side.shape), after.reshape(side.shape)
    x = torch.linalg.lu_solve(LU, pivots, (side / before).unsqueeze(-1), adjoint=transpose).squeeze(-1) / after
    q, m = split(x, n, d)
    q = torch.where(used.unsqueeze(-1), q, picked)
    out = (
        _joined(given.scatter(-2, index.unsqueeze(-1).expand_as(q), q), m).to(rhs.dtype).reshape((*full, rhs.shape[-1]))
    )
    return out, direct_info(singular.reshape(full) | ~factors[0], out, 1)


def _matrix(X: Tensor, beta: Tensor, M: Tensor, u: Tensor, kink: Tensor, index: Tensor, used: Tensor) -> Tensor:
    """The Jacobian of the residual on active neurons and samples, ``(E, a d + n, a d + n)``."""
    p = take_along(u, index.unsqueeze(-1), -2)
    length = torch.where(used, torch.linalg.vector_norm(p, dim=-1), 1)[..., None]
    h = torch.where(used.unsqueeze(-1), p / length, 0)
    (a, d), n = h.shape[-2:], X.shape[-2]
    eye = torch.eye(d, dtype=X.dtype, device=X.device)
    size = torch.where(used, beta.unsqueeze(-1), 1)[..., None, None] / length[..., None]
    bends = size * (eye - h.unsqueeze(-1) * h.unsqueeze(-2))
    gates = take_along(M, index.unsqueeze(-2), -1) * used.unsqueeze(-2)
    Z = (gates.unsqueeze(-1) * X.unsqueeze(-2)).flatten(-2)
    J = X.new_zeros((*X.shape[:-2], a * d + n, a * d + n))
    corner = J[..., : a * d, : a * d].unflatten(-1, (a, d)).unflatten(-3, (a, d))
    at = torch.arange(a, device=X.device)
    corner.movedim(-2, -3)[..., at, at, :, :] = bends
    J[..., : a * d, a * d :] = -Z.mT
    J[..., a * d :, : a * d] = Z * kink.unsqueeze(-1)
    J[..., a * d :, a * d :] = torch.diag_embed((~kink).to(J.dtype))
    return J
