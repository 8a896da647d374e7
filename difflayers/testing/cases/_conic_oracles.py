"""Projections on cones, one point at a time: those with curved surfaces in 40 digits, by nothing but the definition.

The boundary of each cone with a curved surface is a curve of rays and some flat faces. The nearest point is the nearest
among the point itself (if it is inside), the nearest points of the faces, and those of the rays: a search over one
number. Dual cones have rays of their own, so nothing here knows Moreau's decomposition.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

Point = list[Any]
Solve = Callable[..., np.ndarray]


def _precise(compute: Callable[..., Point]) -> Callable[..., np.ndarray]:
    """Runs in 40 digits, and rounds the result; ``__wrapped__(mpmath, ...)`` does not."""

    @functools.wraps(compute)
    def run(*args: Any) -> np.ndarray:
        import mpmath  # type: ignore[import-untyped]

        with mpmath.workdps(40):
            return np.array([float(c) for c in compute(mpmath, *args)])

    return run


def _bisect(f: Callable[[Any], Any], low: Any, high: Any, steps: int = 115) -> Any:
    """The point between where `f` turns from true to false."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) else (low, middle)
    return (low + high) / 2


def _dot(a: Point, b: Point) -> Any:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _on_rays(mp: Any, v: Point, ray: Callable[[Any], tuple[Point, Point]], knots: list[Any]) -> list[Point]:
    """Projections of v on the rays where the distance has a local minimum; `ray` gives direction and derivative."""

    def rises(w: Any) -> bool:
        d, slope = ray(w)
        return bool(_dot(v, slope) * _dot(d, d) > _dot(v, d) * _dot(d, slope))

    grid = [mp.sinh(mp.mpf(k) / 2) for k in range(-24, 25)]
    near = [k + s * mp.mpf(10) ** -e for k in knots for s in (-1, 1) for e in range(0, 18, 3)]
    grid = sorted([*grid, *near])
    up = [rises(w) for w in grid]
    found = []
    for a, b, left, right in zip(grid, grid[1:], up, up[1:], strict=False):
        if left and not right:
            d, _ = ray(_bisect(rises, a, b))
            found.append([max(_dot(v, d), 0) / _dot(d, d) * c for c in d])
    return found


def _nearest(v: Point, candidates: list[Point]) -> Point:
    return min(candidates, key=lambda c: sum((a - b) ** 2 for a, b in zip(v, c, strict=True)))


# ------------------------------------------------------------------------------------------------- exponential cones


def _in_exponential(mp: Any, v: Point) -> bool:
    x, y, z = v
    return bool(y * mp.exp(x / y) <= z) if y > 0 else bool(x <= 0 and y == 0 and z >= 0)


def in_dual_exponential(mp: Any, v: Point) -> bool:
    """Whether ``-u exp(v / u - 1) <= w``."""
    x, y, z = v
    return bool(-x * mp.exp(y / x - 1) <= z) if x < 0 else bool(x == 0 and y >= 0 and z >= 0)


@_precise
def exponential(mp: Any, v: np.ndarray) -> Point:
    """The nearest point with ``y exp(x / y) <= z``."""
    x, y, z = p = [mp.mpf(c) for c in v]

    def ray(w: Any) -> tuple[Point, Point]:
        e = mp.exp(w)
        return [w, 1, e], [1, 0, e]

    knots = [x / y if y else 0, 1 - y / x if x else 0]
    faces = [[min(x, 0), mp.mpf(0), max(z, 0)]] + ([p] if _in_exponential(mp, p) else [])
    return _nearest(p, faces + _on_rays(mp, p, ray, knots))


@_precise
def dual_exponential(mp: Any, v: np.ndarray) -> Point:
    """The nearest point with ``-u exp(v / u - 1) <= w``."""
    x, y, z = p = [mp.mpf(c) for c in v]

    def ray(w: Any) -> tuple[Point, Point]:
        e = mp.exp(-w)
        return [-1, w - 1, e], [0, 1, -e]

    knots = [x / y if y else 0, 1 - y / x if x else 0]
    faces = [[mp.mpf(0), max(y, 0), max(z, 0)]] + ([p] if in_dual_exponential(mp, p) else [])
    return _nearest(p, faces + _on_rays(mp, p, ray, knots))


# ------------------------------------------------------------------------------------------------------- power cones


def _in_power(mp: Any, v: Point, alpha: Any) -> bool:
    x, y, z = v
    return bool(x >= 0 and y >= 0 and x**alpha * y ** (1 - alpha) >= abs(z))


@_precise
def power(mp: Any, v: np.ndarray, alpha: float, dual: bool = False) -> Point:
    """The nearest point with ``x^alpha y^(1 - alpha) >= |z|``, or of the dual cone."""
    a = mp.mpf(alpha)
    x, y, z = p = [mp.mpf(c) for c in v]
    b, c = (a, 1 - a) if dual else (mp.mpf(1), mp.mpf(1))
    sign = -1 if z < 0 else 1

    def ray(w: Any) -> tuple[Point, Point]:
        dx, dy = b * mp.exp((1 - a) * w), c * mp.exp(-a * w)
        return [dx, dy, sign], [(1 - a) * dx, -a * dy, 0]

    zero = mp.mpf(0)
    faces = [[max(x, 0), zero, zero], [zero, max(y, 0), zero]]
    if _in_power(mp, [x / b, y / c, z], a):
        faces.append(p)
    return _nearest(p, faces + (_on_rays(mp, p, ray, []) if z else [[max(x, 0), max(y, 0), zero]]))


# -------------------------------------------------------------------------------------------------- radial projections


@_precise
def along(mp: Any, inside: Callable[[Any, Point], bool], v: np.ndarray, direction: np.ndarray) -> Point:
    """The first point of a cone on the way from v along `direction`, by bisection."""
    p, d = ([mp.mpf(c) for c in q] for q in (v, direction))
    at = lambda t: [a + t * b for a, b in zip(p, d, strict=True)]  # noqa: E731
    if inside(mp, p):
        return p
    far = mp.mpf(1)
    while not inside(mp, at(far)):
        far *= 2
    return at(_bisect(lambda t: not inside(mp, at(t)), mp.mpf(0), far))


def exponential_along(v: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The radial projection on the exponential cone."""
    return along(_in_exponential, v, direction)


def power_along(v: np.ndarray, direction: np.ndarray, alpha: float) -> np.ndarray:
    """The radial projection on the power cone."""
    return along(lambda mp, p: _in_power(mp, p, mp.mpf(alpha)), v, direction)


# ------------------------------------------------------------------------------------------- cones with closed forms


def second_order(x: np.ndarray) -> np.ndarray:
    """Branch by branch."""
    t, n = x[0], math.sqrt((x[1:] ** 2).sum())
    if n <= -t:
        return 0 * x
    return x if n <= t else (n + t) / 2 * np.concatenate([[1.0], x[1:] / n])


def turned(x: np.ndarray) -> np.ndarray:
    """Rotated by 45 degrees in the plane of the first two coordinates."""
    return np.concatenate([[(x[0] + x[1]) / math.sqrt(2), (x[0] - x[1]) / math.sqrt(2)], x[2:]])


def semidefinite(x: np.ndarray) -> np.ndarray:
    """By eigenvalues."""
    values, Q = np.linalg.eigh((x + x.T) / 2)
    return (Q * np.maximum(values, 0)) @ Q.T


def by_bisection(inside: Callable[[np.ndarray], bool]) -> Solve:
    """Radial projection by the definition."""
    return lambda v, d: along(lambda mp, p: inside(np.array(p)), v, d)


def in_second_order(p: np.ndarray) -> bool:
    """Whether ``||x|| <= t``."""
    return bool(p[0] >= 0 and p[0] ** 2 >= (p[1:] ** 2).sum())


def in_rotated(p: np.ndarray) -> bool:
    """Whether ``2 u v >= ||w||^2``."""
    return bool(p[0] >= 0 and p[1] >= 0 and 2 * p[0] * p[1] >= (p[2:] ** 2).sum())


def relative_eigenvalue(x: np.ndarray, d: np.ndarray) -> np.ndarray:
    """By the eigenvalues of ``d^-1 x``, of which nothing is symmetric."""
    x, d = (x + x.T) / 2, (d + d.T) / 2
    least = np.linalg.eigvals(np.linalg.solve(d, x)).real.min()
    return x + max(-least, 0) * d
