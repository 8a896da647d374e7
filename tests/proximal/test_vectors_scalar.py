"""Operators entry by entry: values against brute force on a grid, derivatives against its differences."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from difflayers.proximal import (
    conjugate_prox,
    prox_elastic_net,
    prox_entropy,
    prox_hinge,
    prox_huber,
    prox_l0,
    prox_l1,
    prox_log,
    prox_logistic,
    prox_mcp,
    prox_nonnegative_l1,
    prox_poisson,
    prox_scad,
    prox_squared_l2,
)

F64 = torch.float64
X = np.linspace(-3.31, 3.72, 29)  # not on a kink of any penalty
T = 0.65


def scad(z, lam, a):
    z = abs(z)
    middle = (2 * a * lam * z - z**2 - lam**2) / (2 * (a - 1))
    return np.where(z <= lam, lam * z, np.where(z <= a * lam, middle, lam**2 * (a + 1) / 2))


def mcp(z, lam, gamma):
    z = abs(z)
    return np.where(z <= gamma * lam, lam * z - z**2 / (2 * gamma), gamma * lam**2 / 2)


def x_log_x(z):
    return np.where(z > 0, z * np.log(np.where(z > 0, z, 1)), 0)


# name: (operator, penalty, parameters, smallest z)
PENALTIES: dict[str, tuple[Callable[..., Tensor], Callable[..., np.ndarray], dict[str, float], float]] = {
    "l1": (prox_l1, lambda z, weights: weights * abs(z), {"weights": 1.3}, -np.inf),
    "nonnegative_l1": (prox_nonnegative_l1, lambda z: z, {}, 0.0),
    "squared_l2": (prox_squared_l2, lambda z: z**2 / 2, {}, -np.inf),
    "elastic_net": (prox_elastic_net, lambda z, l1, l2: l1 * abs(z) + l2 / 2 * z**2, {"l1": 0.7, "l2": 1.9}, -np.inf),
    "huber": (
        prox_huber,
        lambda z, delta: np.where(abs(z) <= delta, z**2 / (2 * delta), abs(z) - delta / 2),
        {"delta": 0.8},
        -np.inf,
    ),
    "hinge": (prox_hinge, lambda z, labels: np.maximum(0, 1 - labels * z), {"labels": -0.9}, -np.inf),
    "l0": (prox_l0, lambda z: (abs(z) > 1e-7) * 1.0, {}, -np.inf),
    "log, a kink": (prox_log, lambda z, eps: np.log(eps + abs(z)), {"eps": 1.1}, -np.inf),
    "log, a jump": (prox_log, lambda z, eps: np.log(eps + abs(z)), {"eps": 0.2}, -np.inf),
    "scad": (prox_scad, scad, {"lam": 0.8, "a": 3.2}, -np.inf),
    "mcp": (prox_mcp, mcp, {"lam": 0.8, "gamma": 2.4}, -np.inf),
    "entropy": (prox_entropy, x_log_x, {}, 0.0),
    "poisson": (prox_poisson, lambda z, counts: z - counts * np.log(z), {"counts": 1.7}, 1e-12),
    "logistic": (prox_logistic, lambda z, labels: np.logaddexp(0, -labels * z), {"labels": -1.4}, -np.inf),
}
EACH = pytest.mark.parametrize("name", PENALTIES)


def brute_force(penalty, x, t, params, smallest):
    """The best point of a grid, then of ever finer grids around it."""
    x = np.asarray(x, dtype=np.longdouble)[:, None]
    low, high = np.maximum(-9 + 0 * x, smallest), 9 + 0 * x
    for points in (3001, 301, 301, 301, 301, 301):
        z = low + (high - low) * np.linspace(0, 1, points, dtype=np.longdouble)
        z = np.concatenate([z, np.clip(0 * x, smallest, None)], 1)  # a minimum may sit at zero alone
        best = np.take_along_axis(z, (t * penalty(z, **params) + (z - x) ** 2 / 2).argmin(1)[:, None], 1)
        width = (high - low) / 100
        low, high = np.maximum(best - width, smallest), best + width
    return best[:, 0].astype(float)


def call(operator, x, t, params):
    at = {k: v if isinstance(v, Tensor) else torch.full((), v, dtype=F64) for k, v in params.items()}
    return operator(x, t, **at)


@EACH
def test_value(name):
    operator, penalty, params, smallest = PENALTIES[name]
    found = call(operator, torch.from_numpy(X), T, params)
    np.testing.assert_allclose(found, brute_force(penalty, X, T, params, smallest), atol=1e-7)


def slope(f, h=2e-3):
    """Differences of fourth order, and whether they agree with coarser ones: no kink nearby."""

    def at(h):
        return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)

    fine, coarse = at(h), at(2 * h)
    return fine, abs(fine - coarse) < 1e-5


@EACH
def test_derivative_in_every_parameter(name):
    operator, penalty, params, smallest = PENALTIES[name]
    for moving in ("x", "t", *params):

        def moved(h, moving=moving):
            values = params | ({moving: params[moving] + h} if moving in params else {})
            return brute_force(penalty, X + h * (moving == "x"), T + h * (moving == "t"), values, smallest)

        def ours(h, moving=moving):
            values = {k: torch.full((), v, dtype=F64) + (h if k == moving else 0) for k, v in params.items()}
            x, t = torch.from_numpy(X), torch.full((), T, dtype=F64)
            return operator(x + h * (moving == "x"), t + h * (moving == "t"), **values)

        found = torch.func.jvp(ours, (torch.zeros((), dtype=F64),), (torch.ones((), dtype=F64),))[1]
        expected, smooth = slope(moved)
        assert smooth.mean() > 0.75
        np.testing.assert_allclose(found[smooth], expected[smooth], atol=1e-6, err_msg=f"derivative in {moving}")


# ---------------------------------------------------------------------------------------------------------- conjugates


CONVEX = pytest.mark.parametrize("name", [n for n in PENALTIES if n.split(",")[0] not in ("l0", "log", "scad", "mcp")])


@CONVEX
@pytest.mark.parametrize("t", [0.65, 8.0])
def test_conjugate(name, t):
    """By a bisection of its own optimality condition, ``x - p`` in ``t`` times the maximiser of ``<p, y> - g(y)``."""
    operator, penalty, params, smallest = PENALTIES[name]
    z = brute_force(penalty, X / t, 1 / t, params, smallest)
    at = {k: torch.full((), v, dtype=F64) for k, v in params.items()}
    found = conjugate_prox(operator, torch.from_numpy(X), t, **at)
    np.testing.assert_allclose(found, X - t * z, atol=2e-7 * t)


@CONVEX
def test_conjugate_of_the_conjugate(name):
    """Moreau's decomposition, at scales at which the sum of both parts would show a lost digit of either."""
    operator, _, params, _ = PENALTIES[name]
    at = {k: torch.full((), v, dtype=F64) for k, v in params.items()}
    x = torch.from_numpy(X)
    for t in (1e-9, 1e-3, 1.0, 1e3, 1e9):
        parts = conjugate_prox(operator, x, t, **at) + t * operator(x / t, 1 / t, **at)
        torch.testing.assert_close(parts, x, rtol=1e-9, atol=1e-13)


def exact(x, t):
    """Conjugate of the entropy, ``p + t exp(p - 1) = x``, by bisection in 80 bits."""
    low, high = np.longdouble(x) - 1e4 - abs(x), np.longdouble(x)
    for _ in range(300):
        mid = (low + high) / 2
        low, high = (low, mid) if mid + t * np.exp(mid - 1) > x else (mid, high)
    return float(low)


@pytest.mark.parametrize("t", [1e-9, 1e-3, 1e3, 1e9])
def test_conjugate_keeps_its_digits_at_every_step(t):
    x = torch.tensor([-1e4, -30.0, 0.3, 5.0, 1e4], dtype=F64)
    expected = torch.tensor([exact(float(v), t) for v in x], dtype=F64)
    torch.testing.assert_close(conjugate_prox(prox_entropy, x, t), expected, rtol=1e-13, atol=1e-13)
    labels = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=F64)
    loss = torch.sigmoid(-labels * prox_logistic(x / t, 1 / t, labels)) * -labels
    torch.testing.assert_close(conjugate_prox(prox_logistic, x, t, labels=labels), loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(conjugate_prox(prox_l1, x, t), x.clamp(-1, 1), rtol=0, atol=0)
    torch.testing.assert_close(conjugate_prox(prox_huber, x, t), (x / (1 + t)).clamp(-1, 1), rtol=1e-13, atol=0)


def test_conjugate_by_the_identity_for_an_operator_of_the_user():
    def ridge(x, t, *, weight=1.0, dim=-1):
        step = t.unsqueeze(dim) if isinstance(t, Tensor) and t.ndim else t
        return x / (1 + step * weight)

    x, t = torch.randn(3, 4, dtype=F64), torch.tensor([0.5, 2.0, 7.0], dtype=F64)
    expected = x / (1 + t[:, None] / 2)
    torch.testing.assert_close(conjugate_prox(ridge, x, t, weight=2.0), expected)
    torch.testing.assert_close(conjugate_prox(ridge, x.mT, t, weight=2.0, dim=0), expected.mT)
    assert conjugate_prox(ridge, x.half(), 2.0).dtype == torch.float16


def test_conjugate_sees_through_a_partial():
    from functools import partial

    x = torch.from_numpy(X)
    expected = conjugate_prox(prox_huber, x, 2.0, delta=0.5)
    torch.testing.assert_close(conjugate_prox(partial(prox_huber, delta=0.5), x, 2.0), expected)
    with pytest.raises(ValueError, match=r"prox: expected the prox of a convex function, got prox_mcp"):
        conjugate_prox(partial(prox_mcp, gamma=9.0), x, 2.0)
