r"""The polytope :math:`\{a \ge 0 : A a = A a_0\}`: its hull, its centre, its corners, nearest and random points.

Entries that are zero everywhere in it are found by one linear program; without them a point is :math:`c + N t` with the
analytic centre c and an orthonormal basis N of the null space of A.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_POSITIVE = 1e-9  # of the sum of all entries
_LIFT = 1e7  # how thin the polytope may be beside its size
_TIES = 1e-6  # weight of the norm where nearest points are not unique


class _Hull(NamedTuple):
    used: Tensor  # (m), entries that are positive in some member
    rows: Tensor  # (r, u) orthonormal, of the equations
    null: Tensor  # (u, k) orthonormal
    centre: Tensor  # (u), in units of the scale


@dataclass(frozen=True, eq=False)
class Polytope:
    """Bounded, in double precision on the CPU.

    Args:
        columns: A, ``(n, m)``.
        point: A member ``a_0``, ``(m)``.
        rank_tol: What counts as dependent, for columns of length one.
    """

    columns: Tensor
    point: Tensor
    rank_tol: float

    @cached_property
    def scale(self) -> float:
        """The size of members."""
        return float(self.point.sum()) or 1.0

    @cached_property
    def _hull(self) -> _Hull:
        used, start = torch.ones_like(self.point, dtype=torch.bool), self.point / self.scale
        rows, null = self._bases(used)
        if null.shape[1]:
            inner = _interior(rows, start)
            used = (inner > 0) | (start > 0)
            rows, null = self._bases(used)
        else:
            used, inner = start > 0, start
            rows, null = self._bases(used)
        start, inner = start[used], inner[used]
        if null.shape[1]:
            start = _analytic_centre(start + null @ (null.mT @ (inner - start)), null)
        return _Hull(used, rows, null, start)

    def _bases(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Orthonormal bases of the row space and of the null space of some columns."""
        A = self.columns[:, kept]
        length = torch.linalg.vector_norm(A, dim=0)
        length = torch.where(length > 0, length, 1)
        _, values, right = torch.linalg.svd(A / length, full_matrices=True)
        rank = int((values > self.rank_tol * values[:1]).sum())
        rows, _ = torch.linalg.qr(right[:rank].mT * length.unsqueeze(-1))
        null, _ = torch.linalg.qr(right[rank:].mT / length.unsqueeze(-1))
        return rows.mT, null

    @property
    def dimension(self) -> int:
        """Zero if the point is the only one."""
        return self._hull.null.shape[1]

    @property
    def centre(self) -> Tensor:
        """The analytic centre: all used entries are positive."""
        return self._back(self._hull.centre)

    def _back(self, a: Tensor) -> Tensor:
        return torch.zeros_like(self.point).masked_scatter(self._hull.used, self.scale * a.clamp_min(0))

    def corner(self, cost: Tensor) -> Tensor:
        """The member with the least ``cost^T a``."""
        return self._linear(cost, None)

    def flattest(self, weights: Tensor) -> Tensor:
        """The member with the least ``max_i weights_i a_i``, over entries that are not always zero."""
        return self._linear(weights, weights)

    def _linear(self, cost: Tensor, weights: Tensor | None) -> Tensor:
        used, rows, null, centre = self._hull
        if not null.shape[1]:
            return self.point
        m, extra = len(centre), 0 if weights is None else 1
        objective = cost[used].numpy()
        equal = np.hstack([rows.numpy(), np.zeros((len(rows), extra))])
        options: dict[str, Any] = {"A_eq": equal, "b_eq": (rows @ centre).numpy()}
        if weights is not None:
            objective = np.concatenate([np.zeros(m), [1.0]])
            options |= {"A_ub": np.hstack([np.diag(weights[used].numpy()), -np.ones((m, 1))]), "b_ub": np.zeros(m)}
        found = _linear_program(objective, bounds=[(0, None)] * m + [(None, None)] * extra, **options)
        return self._back(self._settled(torch.as_tensor(found[:m], device="cpu")))

    def nearest(self, E: Tensor, target: Tensor) -> Tensor:
        """The member with the least ``||E a - target||``; E is ``(r, m)``, and ties end at the least norm."""
        used, rows, null, centre = self._hull
        if not null.shape[1]:
            return self.point
        E, target = E[:, used], target / self.scale
        size = torch.linalg.matrix_norm(E)
        size = torch.where(size > 0, size, 1)
        ties = _TIES * torch.eye(len(centre), dtype=E.dtype, device="cpu")
        E, target = torch.cat([E / size, ties]), torch.cat([target / size, torch.zeros_like(centre)])
        Q, R = torch.linalg.qr(E @ null)
        free = Q.mT @ (target - E @ centre)
        G = torch.linalg.solve_triangular(R, null, upper=True, left=False)
        z, at_zero = _least_distance(G, -(centre + G @ free))
        rough = centre + G @ (free + z)
        # with the entries that are zero known, what is left is least squares with equations
        on = ~at_zero
        A = rows[:, on]
        a = torch.zeros_like(centre)
        a[on] = torch.linalg.lstsq(A, (rows @ centre).unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
        _, values, right = torch.linalg.svd(A, full_matrices=True)
        free_ways = right[int((values > 1e-12).sum()) :].mT
        rest = (target - E @ a).unsqueeze(-1)
        a[on] += (free_ways @ torch.linalg.lstsq(E[:, on] @ free_ways, rest, driver="gelsd").solution).squeeze(-1)
        right_to_rounding = bool((rows @ (a - centre)).abs().amax() <= 1e-11) and bool((a >= -1e-11).all())
        return self._back(a if right_to_rounding else self._settled(rough))

    def random(self, count: int, steps: int, draw: Callable[[int, int], tuple[Tensor, Tensor]]) -> Tensor:
        """``(count, m)`` members by hit and run, with ``draw(count, k)`` normal directions and heights in [0, 1]."""
        _, _, null, centre = self._hull
        k = null.shape[1]
        if not k:
            return self.point.expand(count, -1)
        # directions from the Dikin ellipsoid at the centre: the polytope is about as long in each of them
        _, R = torch.linalg.qr(null / centre.unsqueeze(-1))
        round_ = torch.linalg.solve_triangular(R, null, upper=True, left=False)
        a = centre.expand(count, -1)
        for _ in range(steps):
            normal, height = draw(count, k)
            move = normal @ round_.mT
            end = -a / torch.where(move == 0, 1, move)
            high = torch.where(move < 0, end, torch.inf).amin(-1)
            low = torch.where(move > 0, end, -torch.inf).amax(-1)
            a = (a + (low + (high - low) * height).unsqueeze(-1) * move).clamp_min(0)
        # rounding has added up over the steps
        return torch.stack([self._back(centre + null @ (null.mT @ (one - centre))) for one in a])

    def _settled(self, a: Tensor) -> Tensor:
        """Entries that a solver left near zero as exact zeros, and the equations right to rounding."""
        _, rows, _, centre = self._hull
        on = a > _POSITIVE
        A, b = rows[:, on], rows @ centre
        fine = torch.zeros_like(a)
        fine[on] = a[on] + torch.linalg.lstsq(A, (b - A @ a[on]).unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
        right = bool((rows @ fine - b).abs().amax() <= 1e-11) and bool((fine >= 0).all())
        return fine if right else a


def _linear_program(cost: np.ndarray, **problem: Any) -> np.ndarray:
    """By HiGHS, as exactly as it can: what it leaves of an equation is made good afterwards."""
    from scipy.optimize import linprog

    exact = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    message = ""
    for method, options in (("highs", exact), ("highs", {}), ("highs-ipm", {})):
        found = linprog(cost, method=method, options=options, **problem)
        if found.status == 0:
            return found.x
        message = found.message
    raise RuntimeError(f"HiGHS did not solve a linear program over the optimal set: {message}")


def _interior(rows: Tensor, start: Tensor) -> Tensor:
    """A member with all entries positive that can be.

    Of all ``(a, t, l)`` with ``A a = l A a_0``, ``a >= t``, ``0 <= t <= 1`` and ``l >= 1`` the one with the largest sum
    of t has t = 1 for these entries, and t = 0 for the others.
    """
    r, m = rows.shape
    equal = np.hstack([rows.numpy(), np.zeros((r, m)), -(rows @ start).numpy()[:, None]])
    above = np.hstack([-np.eye(m), np.eye(m), np.zeros((m, 1))])
    bounds = [(0, None)] * m + [(0, 1)] * m + [(1, _LIFT)]
    cost = np.concatenate([np.zeros(m), -np.ones(m), [0.0]])
    found = _linear_program(cost, A_eq=equal, b_eq=np.zeros(r), A_ub=above, b_ub=np.zeros(m), bounds=bounds)
    inner = np.where(found[m : 2 * m] > 1e-3, found[:m] / found[-1], 0.0)
    return torch.as_tensor(inner, device="cpu")


def _analytic_centre(a: Tensor, null: Tensor) -> Tensor:
    """Where the product of the entries is largest, by damped Newton steps from a point with positive entries."""
    for _ in range(200):
        weighted = null / a.unsqueeze(-1)
        Q, R = torch.linalg.qr(weighted)
        slope = Q.mT @ torch.ones_like(a)
        decrement = float(torch.linalg.vector_norm(slope))
        step = torch.linalg.solve_triangular(R, slope.unsqueeze(-1), upper=True).squeeze(-1)
        new = a + null @ step / (1 + decrement)
        if not bool((new > 0).all()):
            break
        a = new
        if decrement < 1e-6:
            break
    return a


def _least_distance(G: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The shortest z with ``G z >= h``, and which rows hold it back.

    C. Lawson, R. Hanson, Solving Least Squares Problems, 1974, algorithm LDP.
    """
    from scipy.optimize import nnls

    E = np.vstack([G.mT.numpy(), h.numpy()])
    last = np.zeros(len(E))
    last[-1] = 1.0
    u, _ = nnls(E, last, maxiter=30 * E.shape[1])
    r = E @ u - last
    return torch.as_tensor(-r[:-1] / r[-1], device="cpu"), torch.as_tensor(u > 0, device="cpu")
