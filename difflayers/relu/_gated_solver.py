r"""Solving gated problems: FISTA finds the active blocks, Newton's method on them finishes, pruning makes them minimal.

1. FISTA with restarts and an adaptive step, for each element until its active blocks have stopped changing (A. Mishkin,
   A. Sahiner, M. Pilanci, Fast Convex Optimization for Two-Layer ReLU Networks, 2022, section 4).
2. A proximal gradient step, which may open or close blocks, and a Newton step with line search on the open ones, in
   turn: monotone, and quadratic once the blocks are right.
3. Optimal pruning: while the columns :math:`z_i = Z_i u_i` of active blocks depend on each other, their null vector c
   says how to shrink one block to zero without a change of fit and objective (A. Mishkin, M. Pilanci, Optimal Sets and
   Solution Paths of ReLU Networks, 2023, algorithm 1). The derivative exists only at a minimal network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._checks import default_rtol
from difflayers._solution import Info, Status

from ._block_hessian import Blocks
from ._gated_interior import rescue, rescue_without_parabolas
from ._gated_task import GatedTask, lengths

RIDGE = 1e-10  # keeps Newton steps finite where a network is not minimal yet
STEPS = tuple(0.5**k for k in range(12))  # tried along a Newton direction
NEWTON_STEPS = 15
PATIENCE = 3  # Newton steps without gain after which rounding is blamed
NOISE = 32  # rounding units that are accepted where the tolerance asks for more


@dataclass(frozen=True)
class FISTA:
    """Fast proximal gradient steps with restarts and an adaptive step, finished by Newton steps on the active neurons.

    Args:
        rtol: Largest norm of a neuron's shortest subgradient, relative to beta. None: 1e-10 in float64, 1e-5 in
            float32. Newton steps reach rounding, mostly, since they cost little.
        max_steps: Largest number of steps of an element, Newton steps included.
        proximal_steps: Largest number of FISTA steps among them.
        check_every: FISTA steps between two looks at the active neurons.
    """

    rtol: float | None = None
    max_steps: int = 1000
    proximal_steps: int = 300
    check_every: int = 10

    def __post_init__(self) -> None:
        if self.rtol is not None and not self.rtol > 0:
            raise ValueError(f"rtol: expected more than 0, got {self.rtol}")
        for name in ("max_steps", "proximal_steps", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


def minimise(task: GatedTask, u: Tensor, solver: FISTA) -> tuple[Tensor, Info]:
    """The minimal network and the report of every element, from the start `u`."""
    u, eta, steps = _fista(task, u, solver)
    u, more = _newton(task, u, eta, (solver.max_steps - steps).clamp_max(NEWTON_STEPS), solver, proximal=True)
    steps = steps + more
    for method in (rescue, rescue_without_parabolas):
        lost = (~_accepted(task, u, solver) & (steps < solver.max_steps)).nonzero().squeeze(-1)
        if not len(lost):
            break
        some = task.take(lost)
        v, more = method(some, u[lost])
        v = prune(some.X, some.M, some.s > 0, v)
        steps[lost] += more
        for proximal in (False, True, False):  # a block that is hardly active may have been misjudged
            left = torch.where(_accepted(some, v, solver), 0, solver.max_steps - steps[lost])
            v, left = prune(some.X, some.M, some.s > 0, v), left.clamp(0, NEWTON_STEPS)
            v, more = _newton(some, v, eta[lost], left, solver, proximal=proximal)
            steps[lost] += more
        closer = _violation(some, v) < _violation(some, u[lost])
        u[lost] = torch.where(closer[:, None, None], v, u[lost])
    u = prune(task.X, task.M, task.s > 0, _without_dust(u))
    u, more = _newton(task, u, eta, (solver.max_steps - steps).clamp_max(8), solver, proximal=False)
    steps = steps + more
    violation = _violation(task, u)
    status = torch.where(_accepted(task, u, solver), int(Status.CONVERGED), int(Status.MAX_STEPS))
    sound = torch.isfinite(u).all(-1).all(-1) & torch.isfinite(violation)
    status = torch.where(sound, status, int(Status.DIVERGED))
    return u, Info(status, steps, violation / task.beta)


def _accepted(task: GatedTask, u: Tensor, solver: FISTA) -> Tensor:
    f = task.fit(u)
    asked = default_rtol(solver.rtol, u.dtype) * task.beta
    rounding = torch.minimum(NOISE * task.noise(u, f), torch.finfo(u.dtype).eps ** 0.3 * task.beta)
    return task.violation(u, task.slope(f)) <= torch.maximum(asked, rounding)


def _violation(task: GatedTask, u: Tensor) -> Tensor:
    return task.violation(u, task.slope(task.fit(u)))


# ---------------------------------------------------------------------------------------------------------------- FISTA


def _fista(task: GatedTask, w: Tensor, solver: FISTA) -> tuple[Tensor, Tensor, Tensor]:
    """Near a solution: the point, a step length that works there, the steps taken."""
    eta, beta, slack = _first_step(task), task.beta, 8 * torch.finfo(w.dtype).eps
    t, steps = torch.ones_like(beta), torch.zeros_like(beta, dtype=torch.long)
    v, f = w, task.fit(w)
    fv, going, support = f, torch.ones_like(beta, dtype=torch.bool), None
    each = lambda mask: mask[:, None, None]  # noqa: E731
    for k in range(min(solver.proximal_steps, solver.max_steps)):
        slope = task.slope(fv)
        new = shrink(v - each(eta) * slope, eta * beta)
        fn, move = task.fit(new), new - v
        square = move.square().sum((-2, -1))
        bend, size = task.bend(fv, fn), task.data_term(fv).abs()
        fits = bend <= square / (2 * eta) + slack * size
        longer = fits & (square > 10 * eta * bend.clamp_min(0))
        back = ((new - w) * move).sum((-2, -1)) < 0  # the step goes against the last one: restart
        grown = (1 + (1 + 4 * t * t).sqrt()) / 2
        carry = torch.where(back, 0, (t - 1) / grown)
        take = fits & going
        v = torch.where(each(take), new + each(carry) * (new - w), v)
        fv = torch.where(take[:, None], fn + carry[:, None] * (fn - f), fv)
        w, f = torch.where(each(take), new, w), torch.where(take[:, None], fn, f)
        t = torch.where(take, torch.where(back, 1, grown), t)
        eta = torch.where(going, torch.where(longer, 1.25 * eta, torch.where(fits, eta, 0.8 * eta)), eta)
        steps += going
        if (k + 1) % solver.check_every == 0:
            now = (w != 0).any(-1)
            if support is not None:
                same = (now == support).all(-1) & now.any(-1)
                exact = task.violation(w, task.slope(f)) <= 1e-14 * beta
                going = going & ~(same | exact)
                if not bool(going.any()):
                    break
            support = now
    return w, eta, steps


def _first_step(task: GatedTask) -> Tensor:
    """One over the largest curvature of the loss at zero, by a few power iterations."""
    flat = task.s * task.loss.largest_curvature(task.y)
    u = task.pull(torch.ones_like(task.y) * flat)
    u = torch.where((u == 0).all(-1).all(-1)[:, None, None], 1, u)
    largest = torch.zeros_like(task.beta)
    for _ in range(6):
        size = u.flatten(1).norm(dim=-1)
        u = u / torch.where(size > 0, size, 1)[:, None, None]
        u = task.pull(flat * task.fit(u))
        largest = u.flatten(1).norm(dim=-1)
    return 1 / torch.where(largest > 0, largest, 1)


def shrink(z: Tensor, threshold: Tensor) -> Tensor:
    """The prox of the sum of norms: every block shortened by the threshold of its element."""
    size = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    threshold = threshold[..., None, None]
    return torch.where(size > threshold, z * (1 - threshold / torch.where(size > threshold, size, 1)), 0)


# --------------------------------------------------------------------------------------------------------------- Newton


def _newton(
    task: GatedTask, u: Tensor, eta: Tensor, left: Tensor, solver: FISTA, *, proximal: bool
) -> tuple[Tensor, Tensor]:
    """The best point, by the violation, of Newton steps on the active blocks; the steps taken.

    Elements that are done, or gain nothing, leave the batch.
    """
    best, least = u.clone(), torch.full_like(task.beta, torch.inf)
    steps, rows = torch.zeros_like(left), torch.arange(len(u), device=u.device)
    idle = torch.zeros_like(steps)
    for _ in range(int(left.max()) + 1 if len(left) else 0):
        f = task.fit(u)
        slope = task.slope(f)
        violation, noise = task.violation(u, slope), task.noise(u, f)
        better = violation < least[rows]
        halved = violation < 0.5 * least[rows]
        best[rows] = torch.where(better[:, None, None], u, best[rows])
        least[rows] = torch.where(better, violation, least[rows])
        idle[rows] = torch.where(halved, 0, idle[rows] + 1)
        accepted = least[rows] <= torch.maximum(default_rtol(solver.rtol, u.dtype) * task.beta, NOISE * noise)
        goal = noise / 4 if solver.rtol is None else torch.maximum(solver.rtol * task.beta, noise / 4)
        tired = (idle[rows] >= PATIENCE) & accepted
        going = ~((least[rows] <= goal) | tired) & (steps[rows] < left[rows]) & torch.isfinite(violation)
        keep = going.nonzero().squeeze(-1)
        if not len(keep):
            break
        if len(keep) < len(rows):
            task, u, f, slope, eta, rows = task.take(keep), u[keep], f[keep], slope[keep], eta[keep], rows[keep]
        steps[rows] += 1
        if proximal:
            u, f, eta = _proximal_step(task, u, f, slope, eta)
            slope = task.slope(f)
        u = _newton_step(task, u, f, slope, RIDGE if proximal else 4 * torch.finfo(u.dtype).eps)
    return best, steps


def _proximal_step(task: GatedTask, u: Tensor, f: Tensor, slope: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step that may open and close blocks; refused, with a shorter step for the next, where it is too long."""
    new = shrink(u - eta[:, None, None] * slope, eta * task.beta)
    fn = task.fit(new)
    bend, size = task.bend(f, fn), task.data_term(f).abs()
    fits = bend <= (new - u).square().sum((-2, -1)) / (2 * eta) + 8 * torch.finfo(u.dtype).eps * size
    return (
        torch.where(fits[:, None, None], new, u),
        torch.where(fits[:, None], fn, f),
        torch.where(fits, eta, eta / 2),
    )


def _newton_step(task: GatedTask, u: Tensor, f: Tensor, slope: Tensor, ridge: float) -> Tensor:
    """Along the Newton direction of the active blocks to the lowest of some points."""
    index, used = active_blocks(u)
    blocks = Blocks.of(task.X, task.M, u, task.beta, task.curvature(f), index, used)
    wanted = torch.take_along_dim(slope, index.unsqueeze(-1), -2) + task.beta[:, None, None] * blocks.h
    wanted = torch.where(used.unsqueeze(-1), wanted, 0)
    move = -blocks.solve(blocks.factorise(ridge), wanted)
    move = torch.where(torch.isfinite(move), move, 0)
    p = torch.take_along_dim(u, index.unsqueeze(-1), -2) * used.unsqueeze(-1)
    df = blocks.fit(move)
    t = torch.tensor(STEPS, dtype=u.dtype, device=u.device)
    moved = p.unsqueeze(1) + t[:, None, None] * move.unsqueeze(1)  # (B, T, a, d)
    fit = f.unsqueeze(1) + t[:, None] * df.unsqueeze(1)
    # a block that the full step takes past zero may want to be zero
    past = ((p + move) * p).sum(-1) <= 0
    clipped = torch.where(past.unsqueeze(-1), 0, p + move)
    moved = torch.cat([moved, clipped.unsqueeze(1)], 1)
    fit = torch.cat([fit, (f + blocks.fit(clipped - p)).unsqueeze(1)], 1)
    y, s = task.y.unsqueeze(1), task.s.unsqueeze(1)
    change = (s * (task.loss.value(fit, y) - task.loss.value(f.unsqueeze(1), y))).sum(-1)
    length, before = torch.linalg.vector_norm(moved, dim=-1), torch.linalg.vector_norm(p, dim=-1).unsqueeze(1)
    gain = (moved - p.unsqueeze(1)) * (moved + p.unsqueeze(1))  # no cancellation of norms
    total = length + before
    change = change + task.beta.unsqueeze(-1) * (gain.sum(-1) / torch.where(total > 0, total, 1)).sum(-1)
    size = task.data_term(f).abs() + task.beta * before.squeeze(1).sum(-1)

    def put(block: Tensor) -> Tensor:
        kept = torch.take_along_dim(u, index.unsqueeze(-1), -2)
        return u.scatter(-2, index.unsqueeze(-1).expand_as(p), torch.where(used.unsqueeze(-1), block, kept))

    # where rounding hides a descent the full step is judged by what it leaves of the violation
    full = put(p + move)
    closer = task.violation(full, task.slope(task.fit(full))) < 0.5 * task.violation(u, slope)
    closer = closer & (change[:, 0] <= torch.finfo(u.dtype).eps ** 0.7 * size)
    lowest, at = change.nan_to_num(nan=torch.inf).min(-1)
    found = put(torch.take_along_dim(moved, at[:, None, None, None], 1).squeeze(1))
    return torch.where(closer[:, None, None], full, torch.where((lowest < 0)[:, None, None], found, u))


def active_blocks(u: Tensor) -> tuple[Tensor, Tensor]:
    """Indices ``(*batch, a)`` of the blocks that are not zero, first, padded by others, at least one; those in use."""
    active = (u != 0).any(-1)
    most = max(int(active.sum(-1).max()), 1) if active.numel() else 1
    index = torch.argsort(active.to(torch.int8), stable=True, dim=-1, descending=True)[..., :most]
    return index, active.gather(-1, index)


def _without_dust(u: Tensor) -> Tensor:
    """Blocks that are rounding noise beside others are zero."""
    size = lengths(u)
    dust = size <= torch.finfo(u.dtype).eps ** 0.7 * size.amax(-1, keepdim=True)
    return torch.where(dust.unsqueeze(-1), 0, u)


# -------------------------------------------------------------------------------------------------------------- pruning


def prune(X: Tensor, M: Tensor, counts: Tensor, u: Tensor) -> Tensor:
    """A network with independent ``Z_i u_i`` and the same fit; of the same penalty where `u` is optimal, else less."""
    tol = torch.finfo(u.dtype).eps ** 0.45
    for _ in range(u.shape[-2]):
        index, used = active_blocks(u)
        p = torch.take_along_dim(u, index.unsqueeze(-1), -2)
        columns = torch.take_along_dim(M, index.unsqueeze(-2), -1) * (X @ p.mT)
        columns = torch.where(used.unsqueeze(-2) & counts.unsqueeze(-1), columns, 0)
        size = torch.linalg.vector_norm(columns, dim=-2)
        size = torch.where(size > 0, size, 1)
        # places that are not in use get a unit column of their own
        padded = torch.cat([columns / size.unsqueeze(-2), torch.diag_embed((~used).to(u.dtype))], -2)
        padded = torch.where(torch.isfinite(padded), padded, 0)
        _, values, null = torch.linalg.svd(padded, full_matrices=False)
        dependent = values[..., -1] <= tol * values[..., 0]
        if not bool(dependent.any()):
            break
        c = torch.where(used, null[..., -1, :], 0) / size
        # the direction in which the penalty falls: at a solution neither does, before it this is progress
        c = torch.where((c * lengths(p)).sum(-1, keepdim=True) < 0, -c, c)
        j = c.argmax(-1, keepdim=True)
        factor = 1 - c / c.gather(-1, j)
        # of neurons that reach zero together, as in symmetric data, only j is there exactly
        factor = torch.where(factor <= torch.finfo(u.dtype).eps ** 0.7, 0, factor).scatter(-1, j, 0)
        p = torch.where(dependent[:, None, None], p * factor.unsqueeze(-1), p)
        u = u.scatter(-2, index.unsqueeze(-1).expand_as(p), p)
    return u
