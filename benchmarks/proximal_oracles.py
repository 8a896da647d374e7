"""What proximal operators should return, in float64 and by other means, for a few rows.

An oracle is a function `(x, v) -> (z, Jv)` of NumPy arrays, batch first. The Jacobian of a prox is symmetric, so the
cotangent of `x` for a cotangent `v` of `z` is the directional derivative `Jv`. Most oracles are a solver that is exact
to rounding (a grid with bisection, a bracketing root finder, an SVD), differentiated by differences. Where only an
interior point method is at hand, it tells the active set, and value and derivative follow from that.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

Array = NDArray[np.float64]
Solver = Callable[[Array], Array]
Oracle = Callable[[Array, Array], tuple[Array, Array]]
STEP = 1e-6
TIGHT = {"solver": "CLARABEL", "tol_gap_abs": 1e-13, "tol_gap_rel": 1e-13, "tol_feas": 1e-13}
GRID = 4001


def by_differences(solve: Solver) -> Oracle:
    def oracle(x: Array, v: Array) -> tuple[Array, Array]:
        return solve(x), (solve(x + STEP * v) - solve(x - STEP * v)) / (2 * STEP)

    return oracle


def by_rows(solve: Solver) -> Oracle:
    """A solver for one vector or matrix."""
    return by_differences(lambda x: np.stack([solve(row) for row in x]))


def solve(objective: Any, constraints: Sequence[Any] = ()) -> None:
    """An interior point method, to rounding: it says so when it cannot get as far as it is told."""
    import cvxpy

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Solution may be inaccurate")
        cvxpy.Problem(cvxpy.Minimize(objective), list(constraints)).solve(**TIGHT)


# ------------------------------------------------------------------------------------------------------------- entries


def by_grid(g: Solver, slope: Solver, t: float, reach: float = 12.0, lowest: float = -np.inf) -> Oracle:
    """Every entry for itself: the best cell of a grid around it, then bisection on the slope of the objective.

    `g` and `slope` take arrays; a kink of `g` is a jump of `slope`, which bisection finds as well. `lowest` ends the
    domain of `g`.
    """

    def solve(x: Array) -> Array:
        grid = np.linspace(-reach, reach, GRID).reshape(-1, *[1] * x.ndim)
        z = np.maximum(x + grid, lowest)
        with np.errstate(all="ignore"):
            objective = t * g(z) + (z - x) ** 2 / 2
        objective = np.where(np.isnan(objective), np.inf, objective)
        best = np.take_along_axis(z, objective.argmin(0)[None], 0)[0]
        cell = 2 * reach / (GRID - 1)
        low, high = np.maximum(best - cell, lowest), best + cell
        for _ in range(100):
            middle = (low + high) / 2
            with np.errstate(all="ignore"):
                rising = t * slope(middle) + middle - x > 0
            low, high = np.where(rising, low, middle), np.where(rising, middle, high)
        zero = np.maximum(np.zeros_like(x), lowest)  # where `g` may jump
        with np.errstate(all="ignore"):
            at_zero, at_best = (t * g(z) + (z - x) ** 2 / 2 for z in (zero, high))
        return np.where(at_zero <= at_best, zero, high)

    return by_differences(solve)


# ------------------------------------------------------------------------------------------------------------- vectors


def level(f: Callable[[float], float], low: float, high: float) -> float:
    """The root of a decreasing function."""
    return optimize.brentq(f, low, high, xtol=1e-15, rtol=1e-14)


def simplex(x: Array, radius: float) -> Array:
    tau = level(lambda tau: np.maximum(x - tau, 0).sum() - radius, x.min() - radius, x.max())
    return np.maximum(x - tau, 0)


def l1_ball(x: Array, radius: float) -> Array:
    return x if np.abs(x).sum() <= radius else np.sign(x) * simplex(np.abs(x), radius)


def linf(x: Array, t: float) -> Array:
    """The largest magnitudes sink to a common level, by `t` in all."""
    a = np.abs(x)
    if a.sum() <= t:
        return np.zeros_like(x)
    top = level(lambda top: np.maximum(a - top, 0).sum() - t, 0.0, a.max())
    return np.clip(x, -top, top)


def box_section(x: Array, total: float) -> Array:
    """Onto `0 <= z <= 1` with a given sum."""
    tau = level(lambda tau: np.clip(x - tau, 0, 1).sum() - total, x.min() - 1, x.max())
    return np.clip(x - tau, 0, 1)


def l2(x: Array, t: float) -> Array:
    size = np.linalg.norm(x)
    return np.zeros_like(x) if size <= t else x - t * x / size


def l2_ball(x: Array, radius: float) -> Array:
    return x - l2(x, radius)  # Moreau's identity


def halfspace(x: Array, c: Array, b: float) -> Array:
    return x - max(c @ x - b, 0.0) / (c @ c) * c


def isotonic(x: Array) -> Array:
    from sklearn.isotonic import isotonic_regression

    return isotonic_regression(x)


def slope(x: Array, t: float, weights: Array) -> Array:
    order = np.argsort(-np.abs(x))
    z = np.empty_like(x)
    z[order] = np.maximum(-isotonic(t * weights - np.abs(x)[order]), 0)
    return np.sign(x) * z


# ------------------------------------------------------------------------------------------------------------ matrices


def on_singular_values(shrink: Solver) -> Solver:
    def solve(x: Array) -> Array:
        U, s, Vh = np.linalg.svd(x, full_matrices=False)
        return (U * shrink(s)) @ Vh

    return solve


def on_eigenvalues(shrink: Solver) -> Solver:
    """Of the symmetric part."""

    def solve(x: Array) -> Array:
        values, Q = np.linalg.eigh((x + x.T) / 2)
        return (Q * shrink(values)) @ Q.T

    return solve


def affine(A: Array, b: Array) -> Solver:
    """Through the pseudo-inverse."""
    return lambda x: x - np.linalg.pinv(A) @ (A @ x - b)


def doubly_stochastic(x: Array, v: Array) -> tuple[Array, Array]:
    """An interior point method finds the zeros; the rest lies in an affine set."""
    import cvxpy

    n = x.shape[-1]
    rows = np.concatenate([np.kron(np.eye(n), np.ones(n)), np.kron(np.ones(n), np.eye(n))])
    values, slopes = [], []
    for point, direction in zip(x, v, strict=True):
        z = cvxpy.Variable((n, n))
        sums = [cvxpy.sum(z, axis=k) == 1 for k in (0, 1)]
        solve(cvxpy.sum_squares(z - point), [z >= 0, *sums])
        free = (z.value > 1e-6).ravel()
        inverse = np.linalg.pinv(rows[:, free])
        flat, slope_ = np.zeros(n * n), np.zeros(n * n)
        flat[free] = point.ravel()[free] - inverse @ (rows[:, free] @ point.ravel()[free] - 1)
        slope_[free] = direction.ravel()[free] - inverse @ (rows[:, free] @ direction.ravel()[free])
        values.append(flat.reshape(n, n))
        slopes.append(slope_.reshape(n, n))
    return np.stack(values), np.stack(slopes)


# ----------------------------------------------------------------------------------------------------- total variation


def total_variation(t: float, edges: NDArray[np.int64]) -> Oracle:
    """An interior point method finds the constant pieces; each is the mean of its input, moved by its neighbours."""
    import cvxpy

    tail, head = edges.T

    def oracle(x: Array, v: Array) -> tuple[Array, Array]:
        values, slopes = [], []
        for point, direction in zip(x, v, strict=True):
            n = len(point)
            z = cvxpy.Variable(n)
            jumps = cvxpy.norm1(z[head] - z[tail])
            solve(cvxpy.sum_squares(z - point) / 2 + t * jumps)
            jump = np.where(np.abs(z.value[head] - z.value[tail]) > 1e-5, np.sign(z.value[head] - z.value[tail]), 0)
            flat = jump == 0
            graph = sparse.coo_array((np.ones(flat.sum()), (tail[flat], head[flat])), shape=(n, n))
            _, piece = sparse.csgraph.connected_components(graph, directed=False)
            pull = np.zeros(n)
            np.add.at(pull, head, -t * jump)
            np.add.at(pull, tail, t * jump)
            size = np.bincount(piece)
            values.append((np.bincount(piece, point + pull) / size)[piece])
            slopes.append((np.bincount(piece, direction) / size)[piece])
        return np.stack(values), np.stack(slopes)

    return oracle


def image_total_variation(t: float) -> Oracle:
    """The isotropic kind. An interior point method finds the flat pixels; Newton's method finishes on what can move."""
    import cvxpy

    def oracle(x: Array, v: Array) -> tuple[Array, Array]:
        rows, columns = x.shape[1:]
        n = rows * columns
        pixel = np.arange(n).reshape(rows, columns)
        D = np.zeros((2, n, n))  # differences to the pixel below and to the right; none beyond the border
        for differ, start, end in zip(D, (pixel[:-1], pixel[:, :-1]), (pixel[1:], pixel[:, 1:]), strict=True):
            differ[start, start], differ[start, end] = -1, 1
        values, slopes = [], []
        for point, direction in zip(x.reshape(-1, n), v.reshape(-1, n), strict=True):
            z = cvxpy.Variable(n)
            size = cvxpy.norm(cvxpy.vstack([D[0] @ z, D[1] @ z]), axis=0)
            solve(cvxpy.sum_squares(z - point) / 2 + t * cvxpy.sum(size))
            d = D @ z.value
            flat = np.hypot(*d) < 1e-5
            edges = np.abs(D[:, flat]).reshape(-1, n)
            graph = sparse.csr_array(edges.T @ edges)
            count, piece = sparse.csgraph.connected_components(graph, directed=False)
            E = np.zeros((n, count))
            E[np.arange(n), piece] = 1
            c, steep = E.T @ z.value / E.sum(0), D[:, ~flat] @ E
            for _ in range(5):
                d = steep @ c
                r = np.hypot(*d)
                slope = E.T @ (E @ c - point) + t * np.einsum("kij,ki->j", steep, d / r)
                unit = np.einsum("kij,ki->ij", steep, d / r)
                bend = np.einsum("kij,i,kil->jl", steep, 1 / r, steep) - unit.T @ (unit / r[:, None])
                H = E.T @ E + t * bend
                c = c - np.linalg.solve(H, slope)
            values.append(E @ c)
            slopes.append(E @ np.linalg.solve(H, E.T @ direction))
        return np.reshape(values, x.shape), np.reshape(slopes, x.shape)

    return oracle
