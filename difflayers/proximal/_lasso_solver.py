r"""Solving a batch of Lasso problems: FISTA comes near, an active-set method finishes exactly.

.. math:: \min_z \tfrac12 z^T G z - q^T z + \sum_j \lambda_j |z_j|, \qquad G = D^T D + \mu I, \quad q = D^T y + \mu c

Atoms and signals are scaled to length one first, so that tolerances mean the same at any scale.

1. FISTA with restart, for each element until its signs have stopped changing (A. Beck, M. Teboulle, 2009; restart by
   the gradient: B. O'Donoghue, E. Candes, 2015).
2. From there steps on the face of the current signs: to its minimiser, or to where the first entries reach zero,
   whichever lies lower; at a minimiser the atom that violates its condition most comes in (feature-sign search: H. Lee,
   A. Battle, R. Raina, A. Ng, Efficient sparse coding algorithms, 2006). Each step lowers the objective and there are
   finitely many faces, so this ends, however slowly FISTA converges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from difflayers._solution import Info, Status
from difflayers.linalg._system import norm, times

Factors = tuple[Tensor, ...]
# the violation that is aimed at without `rtol`, and the one that is accepted, in rounding units: an atom that should
# have entered changes a code much more than the optimality conditions; steps beyond the latter are few, or in vain
GOAL_DIGITS, LEAST_DIGITS, MOST_POLISHING = 4, 256, 50
# what a pivot of a Gram matrix must exceed, in rounding units: along the way a slope hardly tells smaller ones from
# zero; of a solution less is asked, as its solves are refined with the atoms themselves
PATH_DIGITS, SINGULAR_DIGITS = 256, 16
LARGEST_PENALTY = 2.0  # no atom of length one enters at this penalty, when the signal has length one


@dataclass(frozen=True)
class FISTA:
    """Fast proximal gradient steps with restart, finished by exact solves on the support.

    Args:
        rtol: Largest violation of an optimality condition, relative to the lengths of atoms and signal. None: 4
            rounding units of the dtype, which solves on the support reach at little cost, and 256 where they do not.
        max_steps: Largest number of steps of an element, solves on the support included.
        proximal_steps: Largest number of proximal gradient steps among them.
        check_every: Proximal gradient steps between two looks at the signs.
    """

    rtol: float | None = None
    max_steps: int = 5000
    proximal_steps: int = 300
    check_every: int = 10

    def __post_init__(self) -> None:
        if self.rtol is not None and not self.rtol > 0:
            raise ValueError(f"rtol: expected more than 0, got {self.rtol}")
        for name in ("max_steps", "proximal_steps", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def tolerance(self, dtype: torch.dtype) -> float:
        """`rtol`, or what is accepted without it."""
        return LEAST_DIGITS * torch.finfo(dtype).eps if self.rtol is None else self.rtol

    def goal(self, dtype: torch.dtype) -> float:
        """`rtol`, or what is aimed at without it."""
        return GOAL_DIGITS * torch.finfo(dtype).eps if self.rtol is None else self.rtol


@dataclass(frozen=True)
class Quadratic:
    """The scaled problems of B elements; atoms and Gram matrix are one for all, or one for each element.

    Attributes:
        atoms: ``(n, p)``, for products, where there are more than 2 n of them; else None.
        gram: ``(p, p)`` without the ridge, or None where it would be dear.
        ridge: ``(B, p)``, on the diagonal of the Gram matrix.
        diagonal: ``(B, p)``, the diagonal with it.
        q: ``(B, p)``.
        lam: ``(B, p)``.
        step: ``(B, 1)``, of FISTA.
    """

    atoms: Tensor | None
    gram: Tensor | None
    ridge: Tensor
    diagonal: Tensor
    q: Tensor
    lam: Tensor
    step: Tensor

    def map(self, change: Callable[[Tensor, bool], Tensor]) -> Quadratic:
        """`change` applied to every tensor; its second argument says whether all elements share the tensor."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        each = {name: change(t, t.ndim == 2 and name in ("atoms", "gram")) for name, t in named if t is not None}
        return replace(self, **each)

    def take(self, rows: Tensor) -> Quadratic:
        """The problems of some elements."""
        return self.map(lambda t, shared: t if shared else t[rows])

    def active(self, z: Tensor) -> Tensor:
        """The support; an atom without penalty always belongs to it."""
        return (z != 0) | (self.lam == 0)

    def slope(self, z: Tensor) -> Tensor:
        """``G z - q``."""
        if self.atoms is not None:
            product = times(self.atoms.mT, times(self.atoms, z))
        else:
            assert self.gram is not None
            product = times(self.gram, z)
        return torch.addcmul(product, self.ridge, z).sub_(self.q)

    def block(self, index: Tensor, used: Tensor) -> Tensor:
        """``G`` on the atoms `index`, identity where an index is not used: ``(B, k, k)``."""
        count, k = index.shape
        each = torch.arange(count, device=index.device).unsqueeze(-1)
        if self.gram is not None:
            p = self.gram.shape[-1]
            row = index if self.gram.ndim == 2 else index + each * p
            flat = (row * p).unsqueeze(-1) + index.unsqueeze(-2)
            block = self.gram.flatten().index_select(0, flat.flatten()).reshape(count, k, k)
        else:
            assert self.atoms is not None
            atoms = self.atoms.mT[index] if self.atoms.ndim == 2 else self.atoms.mT[each, index]  # (B, k, n)
            block = atoms @ atoms.mT
        mask = used.to(block.dtype)
        block.mul_(mask.unsqueeze(-1)).mul_(mask.unsqueeze(-2))
        block.diagonal(dim1=-2, dim2=-1).add_(torch.where(used, self.ridge.gather(-1, index), 1))
        return block

    def violation(self, z: Tensor) -> Tensor:
        """The largest violation of an optimality condition, relative to the numbers that a slope is made of."""
        slope = self.slope(z)
        on, off = (slope + self.lam * z.sign()).abs(), (slope.abs() - self.lam).clamp_min(0)
        return torch.where(self.active(z), on, off).amax(-1) / (1 + z.abs().sum(-1))


def scaled(D: Tensor, y: Tensor, lam: Tensor, mu: Tensor, c: Tensor) -> tuple[Quadratic, Tensor, Tensor]:
    """The problem with atoms and signals of length one: also their lengths. ``z = scaled z * signal / atom``."""
    n, p = D.shape[-2:]
    most = mu if D.ndim == 3 else mu.amax() if mu.numel() else mu.new_zeros(())
    length = norm(D.mT)
    atom = torch.hypot(length, most.sqrt().unsqueeze(-1))
    atom = torch.where(atom > 0, atom, 1)
    root = mu.sqrt().unsqueeze(-1)
    signal = torch.hypot(norm(y, keepdim=True), norm(root * c, keepdim=True))
    signal = torch.where(signal > 0, signal, 1)
    root = root / atom
    ridge = root * root
    q = times(D.mT, y / signal) / atom + root * (root * (c * atom / signal))
    lam = (lam / atom / signal).clamp_max(LARGEST_PENALTY)
    atoms = gram = None
    if p <= max(2 * n, len(y) if D.ndim == 2 else 0):
        gram = (D.mT @ D) / atom.unsqueeze(-1) / atom.unsqueeze(-2)
    if p > 2 * n:
        atoms = D / atom.unsqueeze(-2)
    small = gram if atoms is None else atoms @ atoms.mT
    largest = torch.linalg.eigvalsh(small)[..., -1] + ridge.amax(-1)
    # a little more than the largest eigenvalue, which is rounded
    step = 1 / (1.0001 * largest).clamp_min(torch.finfo(D.dtype).tiny).unsqueeze(-1)
    return Quadratic(atoms, gram, ridge, ridge + (length / atom) ** 2, q, lam, step), atom, signal


# -------------------------------------------------------------------------------------------------------- the support


def support_index(active: Tensor) -> tuple[Tensor, Tensor]:
    """The active entries of every row in order, padded to the longest: indices and which are used, ``(B, k)``."""
    place = active.cumsum(-1)
    count = place[:, -1:]
    k = int(count.max()) if count.numel() else 0
    row, column = active.nonzero(as_tuple=True)
    index = torch.zeros(len(active), k, dtype=torch.int64, device=active.device)
    index[row, place[row, column] - 1] = column
    return index, torch.arange(k, device=active.device) < count


def factorise(block: Tensor, digits: float) -> tuple[Tensor, Tensor]:
    """Cholesky factors, and which blocks have a pivot of less than `digits` rounding units; these get a small ridge."""
    unit, k = torch.finfo(block.dtype).eps, block.shape[-1]
    factor, info = torch.linalg.cholesky_ex(block)
    pivots, diagonal = factor.diagonal(dim1=-2, dim2=-1) ** 2, block.diagonal(dim1=-2, dim2=-1)
    poor = (info != 0) | ~(pivots > digits * k**0.5 * unit * diagonal).all(-1)
    if bool(poor.any()):
        eased = block[poor]
        eased.diagonal(dim1=-2, dim2=-1).add_(1000 * k**0.5 * unit)  # rounding then takes a thousandth of a step
        factor[poor] = torch.linalg.cholesky_ex(eased)[0]
    return factor, poor


def on_face(P: Quadratic, z: Tensor) -> tuple[Tensor, Tensor]:
    """One step on the face of the signs of `z`; also, which elements reached its minimiser."""
    index, used = support_index(P.active(z))
    block = P.block(index, used)
    factor, _ = factorise(block, PATH_DIGITS)
    lam = torch.where(used, P.lam.gather(-1, index), 0)
    here = torch.where(used, z.gather(-1, index), 0)
    smooth = torch.where(used, P.slope(z).gather(-1, index), 0)
    move = -torch.cholesky_solve((smooth + lam * here.sign()).unsqueeze(-1), factor).squeeze(-1)
    there = here + move
    crossed = (there.sign() != here.sign()) & (lam > 0)
    reach = torch.where(crossed, here / (here - there), 1)  # the part of the way after which an entry is zero
    first = reach.amin(-1, keepdim=True) if index.shape[-1] else reach
    near = torch.where(crossed & (reach <= first), 0, here + first * move)
    far = torch.where(crossed, 0, there)

    def change(new: Tensor) -> Tensor:
        delta = new - here
        bent = (block @ delta.unsqueeze(-1)).squeeze(-1)
        return (delta * (smooth + bent / 2) + lam * (new.abs() - here.abs())).sum(-1, keepdim=True)

    by_far, by_near = change(far), change(near)
    best = torch.where(by_far <= by_near, far, near)
    best = torch.where(torch.minimum(by_far, by_near) < 0, best, here)
    return z.scatter_add(-1, index, best - here), ~crossed.any(-1)  # unused entries add zero


def admit(P: Quadratic, z: Tensor) -> Tensor:
    """Lets in the atom that violates its condition most, to the minimum along its axis."""
    slope = P.slope(z)
    over = torch.where(z == 0, slope.abs() - P.lam, 0)
    worst, j = over.max(-1, keepdim=True)
    entry = -slope.gather(-1, j).sign() * worst / P.diagonal.gather(-1, j)
    return z.scatter_add(-1, j, torch.where(worst > 0, entry, 0))


# ---------------------------------------------------------------------------------------------------------- the phases


def minimise(P: Quadratic, solver: FISTA) -> tuple[Tensor, Info]:
    """The minimisers, exactly zero off their support, and how each solve went."""
    z = torch.zeros_like(P.q)
    rtol, goal = solver.tolerance(z.dtype), solver.goal(z.dtype)
    steps = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    rest = (P.violation(z) > goal).nonzero().squeeze(-1)
    # single precision does for finding the way to the support
    near, steps[rest] = _approach(P.take(rest).map(lambda t, _: t.float()), solver)
    z[rest] = near.to(z.dtype)
    error = P.violation(z)
    _finish(P, z, steps, error, rtol, goal, solver.max_steps)
    status = torch.where(error <= rtol, int(Status.CONVERGED), int(Status.MAX_STEPS))
    return z, Info(status, steps, error)


def _approach(P: Quadratic, solver: FISTA) -> tuple[Tensor, Tensor]:
    """FISTA from zero, for each element until its signs stay: points and steps."""
    z, steps = torch.zeros_like(P.q), torch.zeros(len(P.q), dtype=torch.int64, device=P.q.device)
    rest, taken = torch.arange(len(z), device=z.device), 0
    x, v, t = z, z, z.new_ones(len(z), 1)
    limit = min(solver.max_steps, solver.proximal_steps)
    while len(rest) and taken < limit:
        before, bound = x.sign(), P.lam * P.step
        block = min(solver.check_every, limit - taken)
        for _ in range(block):
            u = torch.addcmul(v, P.step, P.slope(v), value=-1)
            new = u - u.clamp(-bound, bound)
            uphill = ((v - new) * (new - x)).sum(-1, keepdim=True) > 0
            t = torch.where(uphill, 1, t)
            grown = (1 + (1 + 4 * t * t).sqrt()) / 2
            v = torch.addcmul(new, (t - 1) / grown, new - x)
            x, t = new, grown
        taken += block
        z[rest], steps[rest] = x, taken
        moving = (x.sign() != before).any(-1).nonzero().squeeze(-1)
        if len(moving) < len(rest):
            rest, P, x, v, t = rest[moving], P.take(moving), x[moving], v[moving], t[moving]
    return z, steps


def _finish(P: Quadratic, z: Tensor, steps: Tensor, error: Tensor, rtol: float, goal: float, max_steps: int) -> None:
    """Active-set steps, in place, until every element is solved."""
    wanting = ((error > goal) & (steps < max_steps)).nonzero().squeeze(-1)
    rest, P, x = wanting, P.take(wanting), z[wanting]
    left = torch.full_like(steps, MOST_POLISHING)
    while len(rest):
        before = x
        x, at_minimiser = on_face(P, x)
        steps[rest] += 1
        z[rest], error[rest] = x, P.violation(x)
        x = torch.where(at_minimiser.unsqueeze(-1), admit(P, x), x)
        stuck = (x == before).all(-1)  # no progress left in this precision
        left[rest] -= (error[rest] <= rtol).to(left.dtype)
        going = (error[rest] > goal) & (steps[rest] < max_steps) & (left[rest] > 0) & ~stuck
        wanting = going.nonzero().squeeze(-1)
        if len(wanting) < len(rest):
            rest, P, x = rest[wanting], P.take(wanting), x[wanting]


def refine(P: Quadratic, z: Tensor, slope: Tensor, rtol: float) -> tuple[Tensor, Factors]:
    """One Newton step on the support with a `slope` computed from the atoms, not from their Gram matrix.

    Returns:
        The refined point, and what a solve on the support needs: indices, which are used, Cholesky factors, which are
        singular.
    """
    index, used = support_index(P.active(z))
    factor, singular = factorise(P.block(index, used), SINGULAR_DIGITS)
    wrong = torch.where(used, (slope + P.lam * z.sign()).gather(-1, index), 0)
    move = torch.cholesky_solve(wrong.unsqueeze(-1), factor).squeeze(-1)
    new = z.scatter_add(-1, index, torch.where(used, -move, 0))
    kept = ((new.sign() == z.sign()) | (P.lam == 0)).all(-1)
    better = ~singular & kept & (P.violation(z) <= rtol) & (P.violation(new) <= rtol)
    return torch.where(better.unsqueeze(-1), new, z), (index, used, factor, singular)
