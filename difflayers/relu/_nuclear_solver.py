r"""Solving gated problems with vector outputs: FISTA comes near, a proximal point method closes in, Newton finishes.

1. FISTA with restarts and an adaptive step (A. Mishkin, A. Sahiner, M. Pilanci, Fast Convex Optimization for Two-Layer
   ReLU Networks, 2022, section 4), the prox a soft threshold of singular values.
2. Proximal point steps with growing length :math:`\sigma`, each the smooth dual problem

   .. math:: \min_N \tfrac12 \|N\|^2 - \langle R Y, N \rangle + \tfrac1{2\sigma} \sum_i
       \|\operatorname{prox}_{\sigma\beta}(U_i + \sigma Z_i^T R N)\|^2, \qquad R = S^{1/2},

   by Newton's method with line search: global, whatever the gates (X. Li, D. Sun, K.-C. Toh, A highly efficient
   semismooth Newton augmented Lagrangian method for solving Lasso problems, 2018; K. Jiang, D. Sun, K.-C. Toh, A
   partial proximal point algorithm for nuclear norm regularized matrix least squares problems, 2014).
3. Pruning: while there are symmetric :math:`Q_i` with :math:`\sum_i Z_i A_i Q_i B_i^T = 0` for :math:`U_i = A_i
   \Sigma_i B_i^T`, they say how to lower the rank of one block without a change of fit and objective; at most
   :math:`\sum_i r_i (r_i + 1) / 2 \le n c` is left. (A. Barvinok, Problems of distance geometry and convex
   positioning, 1995, for semidefinite programs; for rank one this is the pruning of scalar outputs.)
4. Newton's method on the fixed point of a proximal step with the ranks held. The derivative is that of the fixed point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers._checks import default_rtol
from difflayers._solution import Info, Status

from ._block_hessian import take_along
from ._gated_solver import FISTA
from ._nuclear_task import (
    NuclearTask,
    Spectrum,
    Tangent,
    completed,
    factorise,
    first_true,
    ranks,
    solve_curved,
    spectrum,
    step_length,
)

NEAR = 1e-9  # violation, relative to beta, at which the proximal point method hands over
FIRST, GROWTH = 100.0, 4.0  # length of the first proximal point step, in steps of FISTA, and its growth
LONGEST = 1e8, 1e6, 1e4  # the longest; shorter ones where rounding got the better of Newton's method
IDLE = 20  # Newton steps without gain after which that is so
SETTLED = 4  # checks without a change of ranks after which FISTA has done its part
FINISH = 10  # Newton steps with ranks held
HALVINGS = 12
NOISE = 32  # rounding units that are accepted where the tolerance asks for more
RIDGE = 1e-14  # keeps the last Newton steps finite where a network is not minimal


def minimise(task: NuclearTask, U: Tensor, solver: FISTA) -> tuple[Tensor, Info]:
    """The minimal network and the report of every element, from the start `U`."""
    U, eta, steps = _fista(task, U, solver)
    violation, lost = torch.full_like(task.beta, torch.inf), torch.arange(len(U), device=U.device)
    for longest in (0.0, *LONGEST):  # FISTA may have come near enough for the finish
        some, V = task.take(lost), U[lost]
        if longest:
            V, more = _proximal_point(some, V, eta[lost], longest, solver.max_steps - steps[lost])
            steps[lost] += more
        V = prune(some, _without_dust(V))
        V, reached, more = _finish(some, V, (solver.max_steps - steps[lost]).clamp(0, FINISH), solver)
        steps[lost] += more
        good = _accepted(some, V, reached, solver)
        better = ~(reached >= violation[lost]) & (good | (longest > 0) | (steps[lost] >= solver.max_steps))
        U[lost] = torch.where(_each(better), V, U[lost])
        violation[lost] = torch.where(better, reached, violation[lost])
        lost = lost[~good & (steps[lost] < solver.max_steps)]
        if not len(lost):
            break
    status = torch.where(_accepted(task, U, violation, solver), int(Status.CONVERGED), int(Status.MAX_STEPS))
    sound = torch.isfinite(U).flatten(1).all(-1) & torch.isfinite(violation)
    return U, Info(torch.where(sound, status, int(Status.DIVERGED)), steps, violation / task.beta)


def _accepted(task: NuclearTask, U: Tensor, violation: Tensor, solver: FISTA) -> Tensor:
    asked = default_rtol(solver.rtol, U.dtype) * task.beta
    rounding = torch.minimum(NOISE * task.noise(U), torch.finfo(U.dtype).eps ** 0.3 * task.beta)
    return violation <= torch.maximum(asked, rounding)


def _each(t: Tensor) -> Tensor:
    return t[:, None, None, None]


# ---------------------------------------------------------------------------------------------------------------- FISTA


def _fista(task: NuclearTask, W: Tensor, solver: FISTA) -> tuple[Tensor, Tensor, Tensor]:
    """Near a solution: the point, a step length that works there, the steps taken."""
    eta, beta, slack = _first_step(task), task.beta, 8 * torch.finfo(W.dtype).eps
    t, steps = torch.ones_like(beta), torch.zeros_like(beta, dtype=torch.long)
    V, F, settled = W, task.fit(W), steps.clone()
    FV, going, before = F, torch.ones_like(beta, dtype=torch.bool), None
    for k in range(min(solver.proximal_steps, solver.max_steps)):
        slope = task.slope(FV)
        new, rank = _shrink(V - _each(eta) * slope, eta * beta)
        Fn, move = task.fit(new), new - V
        square = move.square().sum((-3, -2, -1))
        bend = (task.s * (Fn - FV).square().sum(-1)).sum(-1) / 2
        fits = bend <= square / (2 * eta) + slack * task.data_term(FV)
        longer = fits & (square > 10 * eta * bend)
        back = ((new - W) * move).sum((-3, -2, -1)) < 0  # the step goes against the last one: restart
        grown = (1 + (1 + 4 * t * t).sqrt()) / 2
        carry = torch.where(back, 0, (t - 1) / grown)
        take = fits & going
        V = torch.where(_each(take), new + _each(carry) * (new - W), V)
        FV = torch.where(take[:, None, None], Fn + carry[:, None, None] * (Fn - F), FV)
        W, F = torch.where(_each(take), new, W), torch.where(take[:, None, None], Fn, F)
        t = torch.where(take, torch.where(back, 1, grown), t)
        eta = torch.where(going, torch.where(longer, 1.25 * eta, torch.where(fits, eta, 0.8 * eta)), eta)
        steps += going
        if (k + 1) % solver.check_every == 0:
            if before is not None:
                still = square <= torch.finfo(W.dtype).eps * new.square().sum((-3, -2, -1))
                settled = torch.where((rank == before).all(-1) & rank.any(-1), settled + 1, 0)
                going = going & (settled < SETTLED) & ~still
                if not bool(going.any()):
                    break
            before = rank
    return W, eta, steps


def _first_step(task: NuclearTask) -> Tensor:
    """One over the largest curvature of the loss, by a few power iterations."""
    U = task.pull(torch.ones_like(task.Y[..., :1]) * task.s.unsqueeze(-1))
    U = torch.where(_each((U == 0).flatten(1).all(-1)), 1, U)
    largest = torch.zeros_like(task.beta)
    for _ in range(6):
        size = U.flatten(1).norm(dim=-1)
        U = task.hessian(U / _each(torch.where(size > 0, size, 1)))
        largest = U.flatten(1).norm(dim=-1)
    return 1 / torch.where(largest > 0, largest, 1)


def _shrink(V: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """The prox and its ranks, by the eigenvalues of the smaller Gram matrix: quicker than an SVD, and good enough."""
    if V.shape[-1] > V.shape[-2]:
        found, rank = _shrink(V.mT, threshold)
        return found.mT, rank
    threshold = threshold[:, None, None]
    values, Q = torch.linalg.eigh(V.mT @ V)
    s = values.clamp_min(0).sqrt()
    above = s > threshold
    factor = torch.where(above, 1 - threshold / torch.where(above, s, 1), 0)
    return V @ ((Q * factor.unsqueeze(-2)) @ Q.mT), above.sum(-1)


# ------------------------------------------------------------------------------------------------------ proximal points


class _Dual:
    """One proximal point step seen from its dual: value, slope and what goes with them at N."""

    def __init__(self, task: NuclearTask, U: Tensor, N: Tensor, sigma: Tensor) -> None:
        root = task.s.sqrt().unsqueeze(-1)
        self.spec: Spectrum = spectrum(U + _each(sigma) * task.pull(root * N), (sigma * task.beta).unsqueeze(-1))
        self.p = self.spec.shrunk()
        self.F = task.fit(self.p)
        self.slope = N - root * (task.Y - self.F)
        smooth = self.spec.z.square().sum((-2, -1)) / (2 * sigma)
        parts = N.square().sum((-2, -1)) / 2, (root * task.Y * N).sum((-2, -1)), smooth
        self.value = parts[0] - parts[1] + parts[2]
        self.size = parts[0] + parts[1].abs() + parts[2]


def _proximal_point(task: NuclearTask, U: Tensor, eta: Tensor, longest: float, left: Tensor) -> tuple[Tensor, Tensor]:
    """The last proximal points, and the steps taken. Elements that are done leave the batch."""
    steps, rows, out = torch.zeros_like(left), torch.arange(len(U), device=U.device), U.clone()
    N = task.s.sqrt().unsqueeze(-1) * (task.Y - task.fit(U))
    sigma, most = FIRST * eta, longest * eta
    least = torch.full_like(task.beta, torch.inf)
    idle = torch.zeros_like(steps)
    while len(rows):
        at = _Dual(task, U, N, sigma)
        root = task.s.sqrt().unsqueeze(-1)
        inner = task.pull(root * at.slope)  # with `outer`, a subgradient at p
        outer = (U - at.p) / _each(sigma)
        errors = [t.flatten(-2).norm(dim=-1).amax(-1) for t in (inner, outer, inner - outer)]
        noise = NOISE * task.noise(at.p)
        done = errors[2] <= torch.maximum(NEAR * task.beta, noise)
        solved = errors[0] <= torch.maximum(0.2 * errors[1], noise)
        idle = torch.where(errors[2] < 0.9 * least, 0, idle + 1)
        least = torch.minimum(least, errors[2])
        out[rows] = torch.where(_each(solved | done), at.p, out[rows])
        going = ~done & (steps[rows] < left[rows]) & torch.isfinite(errors[2]) & (idle < IDLE)
        keep = going.nonzero().squeeze(-1)
        if not len(keep):
            break
        steps[rows] += going
        U, sigma = torch.where(_each(solved), at.p, U), torch.where(solved, torch.minimum(GROWTH * sigma, most), sigma)
        N = _newton_step(task, U, N, sigma, at, solved)
        if len(keep) < len(rows):
            task, U, N, sigma, most, least, idle, rows = (
                task.take(keep),
                *(t[keep] for t in (U, N, sigma, most, least, idle, rows)),
            )
    return out, steps


def _newton_step(task: NuclearTask, U: Tensor, N: Tensor, sigma: Tensor, at: _Dual, skip: Tensor) -> Tensor:
    """Along Newton's direction as far as the value falls; elements to `skip` have a new problem and stay."""
    tangent = Tangent.of(at.spec)
    root = task.s.sqrt().unsqueeze(-1)
    weight = (sigma.unsqueeze(-1) * tangent.delta).sqrt() * tangent.used
    B = tangent.columns(task.X, task.M) * root.expand_as(task.Y).flatten(-2).unsqueeze(-2) * weight.unsqueeze(-1)
    g = -at.slope.flatten(-2).unsqueeze(-1)
    few = B.shape[-2] <= B.shape[-1]
    K = B @ B.mT if few else B.mT @ B
    K.diagonal(dim1=-2, dim2=-1).add_(1)
    factor, _ = torch.linalg.cholesky_ex(K)
    move = g - B.mT @ torch.cholesky_solve(B @ g, factor) if few else torch.cholesky_solve(g, factor)
    move = move.squeeze(-1).unflatten(-1, N.shape[-2:])
    move = torch.where(torch.isfinite(move) & ~skip[:, None, None], move, 0)
    fall = (at.slope * move).sum((-2, -1))
    slack = 8 * torch.finfo(N.dtype).eps * at.size
    length = torch.ones_like(sigma)
    for _ in range(HALVINGS):
        tried = N + length[:, None, None] * move
        short = _Dual(task, U, tried, sigma).value > at.value + 1e-4 * length * fall + slack
        short = short & ~skip
        if not bool(short.any()):
            break
        length = torch.where(short, length / 2, length)
    return tried


# -------------------------------------------------------------------------------------------------------------- pruning


def _without_dust(U: Tensor) -> Tensor:
    """Singular values that are rounding noise beside others are zero."""
    rank = ranks(U)
    if bool((rank == min(U.shape[-2:])).all()):
        return U
    left, s, right = torch.linalg.svd(U, full_matrices=False)
    kept = torch.arange(s.shape[-1], device=s.device) < rank.unsqueeze(-1)
    return (left * torch.where(kept, s, 0).unsqueeze(-2)) @ right


def prune(task: NuclearTask, U: Tensor) -> Tensor:
    """A network with independent ``Z_i A_i Q_i B_i^T`` and the same fit; of the same penalty if `U` is optimal."""
    tol = torch.finfo(U.dtype).eps ** 0.45
    weights = task.s.sqrt().unsqueeze(-1).expand_as(task.Y).flatten(-2).unsqueeze(-2)
    for _ in range(U.shape[-3] * min(U.shape[-2:])):
        tangent, root = _symmetric(U)
        columns = tangent.columns(task.X, task.M) * weights
        _, a, b = places = tangent.places()
        columns = columns * (_entry(root, places[0], a) * _entry(root, places[0], b)).unsqueeze(-1)
        size = torch.linalg.vector_norm(columns, dim=-1)
        size = torch.where(size > 0, size, 1)
        # places that are not in use get a unit column of their own
        padded = torch.cat([columns / size.unsqueeze(-1), torch.diag_embed((~tangent.used).to(U.dtype))], -1)
        null, values, _ = torch.linalg.svd(torch.where(torch.isfinite(padded), padded, 0), full_matrices=False)
        dependent = values[..., -1] <= tol * values[..., 0]
        if not bool(dependent.any()):
            break
        null = torch.where(tangent.used, null[..., -1] / size, 0)
        Q = tangent.square(null)
        # the direction in which the penalty falls: at a solution neither does, before it this is progress
        Q = (
            Q
            * torch.where((Q.diagonal(dim1=-2, dim2=-1) * root.square()).sum((-2, -1)) > 0, -1, 1)[:, None, None, None]
        )
        values, W = torch.linalg.eigh(Q)
        lowest = values.amin((-2, -1), keepdim=True)
        factor = (1 - values / torch.where(lowest < 0, lowest, 1)).clamp_min(0)
        half = root.unsqueeze(-1) * W
        inner = (half * factor.unsqueeze(-2)) @ half.mT
        p = root.shape[-1]
        new = tangent.left[..., :p] @ inner @ tangent.right[..., :p].mT
        at = tangent.blocks[..., None, None].expand_as(new)
        U = torch.where(_each(dependent), U.scatter(-3, at, new), U)
    return _without_dust(U)


def _symmetric(U: Tensor) -> tuple[Tangent, Tensor]:
    """The directions ``A_i Q_i B_i^T`` with symmetric Q, and roots of the singular values, zero beyond the rank."""
    rank = ranks(U)
    index, there = first_true(rank > 0)
    rank = rank.gather(-1, index) * there
    left, s, right = torch.linalg.svd(take_along(U, index[..., None, None], -3), full_matrices=False)
    i = torch.arange(s.shape[-1], device=s.device)
    s = torch.where(i < rank.unsqueeze(-1), s, 0)
    pairs = (i.unsqueeze(-1) <= i) & (i < rank[..., None, None])
    pairs = torch.nn.functional.pad(pairs, (0, U.shape[-1] - len(i), 0, U.shape[-2] - len(i)))
    pick, used = first_true(pairs.flatten(-3))
    one = torch.ones_like(used, dtype=s.dtype)
    return Tangent(index, completed(left), completed(right.mT), pick, used, one, 0 * one), s.sqrt()


def _entry(t: Tensor, block: Tensor, a: Tensor) -> Tensor:
    """Entries of ``(B, a, p)``."""
    p = t.shape[-1]
    return t.flatten(-2).gather(-1, block * p + a.clamp_max(p - 1))


# --------------------------------------------------------------------------------------------------------------- Newton


def _finish(task: NuclearTask, U: Tensor, left: Tensor, solver: FISTA) -> tuple[Tensor, Tensor, Tensor]:
    """The best proximal point by its violation, that violation, the steps taken; all with the ranks of `U`."""
    rank, rows = ranks(U), torch.arange(len(U), device=U.device)
    best, least = U.clone(), torch.full_like(task.beta, torch.inf)
    steps, t = torch.zeros_like(left), step_length(U, task.X, task.s, task.beta)
    t = torch.where(rank.any(-1), t, _first_step(task))
    idle = torch.zeros_like(left)
    while len(rows):
        slope = task.slope(task.fit(U))
        V, threshold = U - _each(t) * slope, (t * task.beta).unsqueeze(-1)
        spec = spectrum(V, threshold, rank)
        p = spec.shrunk()
        # a subgradient at p, but for singular values that the rank leaves out and those that would have to be negative
        rest = task.slope(task.fit(p)) - slope + (U - p) / _each(t)
        wrong = (spec.s - threshold.unsqueeze(-1) - spec.z + spec.n).abs().amax((-2, -1)) / t
        violation = rest.flatten(-2).norm(dim=-1).amax(-1) + wrong
        better = violation < least[rows]
        idle = torch.where(violation < 0.5 * least[rows], 0, idle + 1)
        best[rows] = torch.where(_each(better), p, best[rows])
        least[rows] = torch.where(better, violation, least[rows])
        noise = task.noise(p) / 4
        goal = noise if solver.rtol is None else torch.maximum(solver.rtol * task.beta, noise)
        going = (least[rows] > goal) & (steps[rows] < left[rows]) & torch.isfinite(violation) & (idle < 3)
        keep = going.nonzero().squeeze(-1)
        if not len(keep):
            break
        steps[rows] += going
        tangent = Tangent.of(spec)
        g = p - U
        wanted = tangent.into(g - _each(t) * task.hessian(g)) / t.unsqueeze(-1)
        q = solve_curved(task, tangent, factorise(task, tangent, t, RIDGE), t, wanted, refinements=1)
        U = U + g + tangent.outof(q, U.shape[-3])
        if len(keep) < len(rows):
            task, U, t, rank, idle, rows = task.take(keep), *(x[keep] for x in (U, t, rank, idle, rows))
    return best, least, steps
