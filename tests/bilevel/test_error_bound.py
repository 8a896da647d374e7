r"""The error bound of an inexact hypergradient, and what its constants are estimated from.

Oracles: the true hypergradient by a dense solve at a lower solution that is exact to rounding (numpy, maid_toys.py and
method_toys.py), constants derived on paper; the bound as it stands in the paper,
``(L_F |J| / mu + L_H |g| |J| / mu^2 + L_J |g| / mu) eps + |J| delta / mu + L_J L_F eps^2 / mu``; a problem in which it
is attained: f = mu |y - x|^2 / 2, F = |y|^2 / 2, errors of y and q along y.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from difflayers.bilevel import MAID, Bilevel
from difflayers.bilevel._error_bound import (
    Constants,
    Estimates,
    Smoothness,
    error_bound,
    largest_singular_value,
    smallest_eigenvalue,
    spread,
)
from tests.bilevel.maid_toys import Logistic, quadratic_smoothness
from tests.bilevel.method_toys import Quadratic, start, tensor


def of_the_paper(c, epsilon, delta, slope):
    mu, J = c.strong_convexity, c.cross_norm
    factor = c.upper * J / mu + c.hessian * slope * J / mu**2 + c.cross * slope / mu
    return (factor + c.upper_in_x) * epsilon + J * delta / mu + c.cross * c.upper * epsilon**2 / mu


def directions(r, H, d):
    """Random ones, and those in which H is weakest and strongest."""
    vectors = np.linalg.eigh(H)[1]
    return [*r.normal(size=(6, d)), vectors[:, 0], -vectors[:, 0], vectors[:, -1]]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_holds_on_logistic_regression_and_says_something(seed):
    toy, r = Logistic(seed), np.random.default_rng(seed)
    for x in 0.3 * r.normal(size=(4, 5)):  # mu about a half: its powers are in the bound
        y_true, exact = toy.solution(x), toy.hypergradient(x)
        for radius in (1e-4, 1e-2, 1.0):
            for share in (0.0, 1.0):
                ratios = []
                for u in directions(r, toy.hessian(x, y_true), 5):
                    y = y_true + radius * u / np.linalg.norm(u)
                    H, g = toy.hessian(x, y), toy.upper_y(y)
                    for w in directions(r, H, 5):
                        delta = share * 0.1 * radius
                        q = np.linalg.solve(H, g + delta * w / np.linalg.norm(w))
                        c = Constants(**toy.constants(x, y))
                        bound = error_bound(c, radius, delta, np.linalg.norm(q), np.linalg.norm(g))
                        error = np.linalg.norm(-toy.cross(x, y) @ q - exact)
                        assert error <= bound * (1 + 1e-9) + 1e-13
                        assert bound <= of_the_paper(c, radius, delta, np.linalg.norm(g)) * (1 + 1e-12)
                        # what MAID uses: the distance certified by the lower gradient
                        certified = np.linalg.norm(toy.slope(x, y)) / c.strong_convexity
                        assert certified >= radius * (1 - 1e-9)
                        ratios.append(error / bound)
                assert max(ratios) > 0.02  # not vacuous: within a factor of 50 where the errors are unkind


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_holds_on_quadratic_problems_within_a_small_factor(seed):
    toy, r = Quadratic.random(seed), np.random.default_rng(seed)
    c = Constants(**{name: float(getattr(quadratic_smoothness(toy), name)) for name in Constants._fields})
    x = r.normal(size=3)
    y_true, ratios = np.linalg.solve(toy.H, toy.B @ x), []
    for epsilon, delta in ((1.0, 0.0), (0.0, 1.0), (0.1, 0.01)):
        for u in directions(r, toy.H, 4):
            for w in directions(r, toy.H, 4):
                y = y_true + epsilon * u / np.linalg.norm(u)
                q = np.linalg.solve(toy.H, toy.upper_y(x, y) + delta * w / np.linalg.norm(w))
                error = np.linalg.norm(toy.upper_x(x, y) + toy.B.T @ q - toy.hypergradient(x))
                bound = error_bound(c, epsilon, delta, np.linalg.norm(q), np.linalg.norm(toy.upper_y(x, y)))
                assert error <= bound * (1 + 1e-9) + 1e-13
                ratios.append(error / bound)
    assert max(ratios) > 0.5


@pytest.mark.parametrize("mu", [0.25, 4.0])
def test_it_is_attained_where_all_errors_point_one_way(mu):
    """H = mu, J = -mu: p = q mu with q = (y + delta) / mu at y = x + epsilon, so that p - x = epsilon + delta."""
    epsilon, delta, x = 0.3, 0.2, 2.0
    c = Constants(strong_convexity=mu, upper=1.0, upper_in_x=0.0, hessian=0.0, cross=0.0, cross_norm=mu)
    y = x + epsilon
    assert error_bound(c, epsilon, delta, (y + delta) / mu, y) == pytest.approx(epsilon + delta)


def test_an_upper_objective_of_both_variables_adds_its_own_part():
    """F = x'y, f = |y - x|^2 / 2: q = grad_y F = x has no error, grad_x F = y has that of y."""
    c = Constants(strong_convexity=1.0, upper=0.0, upper_in_x=1.0, hessian=0.0, cross=0.0, cross_norm=1.0)
    assert error_bound(c, 0.1, 0.0, 2.0, 2.0) == pytest.approx(0.1)


# --------------------------------------------------------------------------------------------------- estimates


def test_smallest_eigenvalue_by_lanczos():
    r = np.random.default_rng(0)
    q, _ = np.linalg.qr(r.normal(size=(40, 40)))
    M = tensor(q @ np.diag(np.linspace(0.5, 30, 40)) @ q.T)
    v = spread(40, M)
    values = []
    for _ in range(8):
        value, v = smallest_eigenvalue(lambda w: M @ w, v, 8)
        values.append(value)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values))  # from above, warm starts help
    assert values[-1] == pytest.approx(0.5, rel=1e-2) and values[-1] >= 0.5 - 1e-12
    small = tensor(np.diag([3.0, 1.0, 2.0]))
    assert smallest_eigenvalue(lambda w: small @ w, spread(3, small), 20)[0] == pytest.approx(1)
    assert smallest_eigenvalue(lambda w: 2 * w, spread(3, small), 20)[0] == pytest.approx(2)
    assert math.isnan(smallest_eigenvalue(lambda w: w * math.nan, spread(3, small), 20)[0])


def test_largest_singular_value_by_power_iteration():
    M = tensor(np.random.default_rng(1).normal(size=(4, 6)))
    value, v = largest_singular_value(lambda u: M @ u, lambda v: M.mT @ v, spread(4, M), 60)
    assert value == pytest.approx(float(torch.linalg.matrix_norm(M, 2)), rel=1e-6)
    assert largest_singular_value(lambda u: 0 * (M @ u), lambda v: 0 * (M.mT @ v), v, 5)[0] == 0


def test_what_is_not_given_is_estimated_at_the_point():
    """On T4 the estimates are the constants, mu with its margin of a half; on logistic regression local ones."""
    toy = Quadratic.random(4)
    algo = MAID(toy.problem(), *start(0, 3, 4))
    seen = spy(algo)
    algo.step()
    given = quadratic_smoothness(toy)
    last = seen[-1]
    assert last.strong_convexity == pytest.approx(given.strong_convexity / 2, rel=1e-6)
    assert last.cross_norm == pytest.approx(given.cross_norm, rel=1e-9)
    assert last.upper == pytest.approx(given.upper, rel=1e-6)
    assert max(last.hessian, last.cross, last.upper_in_x) < 1e-6
    logistic = Logistic(0)
    x, y = start(1, 5, 5, scale=1.0)
    algo = MAID(logistic.problem(), x, y)
    seen = spy(algo)
    algo.step()
    true = logistic.constants(x.numpy(), y.numpy())
    for name in ("hessian", "cross", "upper"):
        assert 0.01 * true[name] < getattr(seen[0], name) <= true[name] * (1 + 1e-6)


def spy(algo):
    seen, estimate = [], algo.estimates

    class Spy(Estimates):
        def __call__(self, *args):
            seen.append(super().__call__(*args))
            return seen[-1]

    algo.estimates = Spy(estimate.given)
    return seen


def test_mixed_derivative_of_the_upper_objective_and_many_upper_variables():
    M = tensor(np.random.default_rng(2).normal(size=(20, 3)))
    problem = Bilevel(
        lambda x, y, b: x @ M @ y + y.square().sum() * 1.5, lambda x, y, b: (y - x @ M).square().sum() / 2
    )
    algo = MAID(problem, *start(0, 20, 3))
    seen = spy(algo)
    for _ in range(12):
        algo.step()
    top = float(torch.linalg.matrix_norm(M, 2))
    assert seen[-1].cross_norm == pytest.approx(top, rel=1e-3)  # by power iteration, warm
    assert 0.2 * top < seen[-1].upper_in_x <= top * (1 + 1e-9)
    assert seen[-1].upper == pytest.approx(3)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan, "much", True])
def test_bad_constants_are_named(value):
    with pytest.raises(ValueError, match="hessian: expected"):
        Smoothness(hessian=value)
    with pytest.raises(ValueError, match="strong_convexity: expected a finite number above 0"):
        Smoothness(strong_convexity=0.0)
    bad = Smoothness(strong_convexity=lambda x, y: -1.0)
    with pytest.raises(ValueError, match="strong_convexity: expected a finite number above 0, got -1"):
        MAID(Quadratic.random(0).problem(), *start(0, 3, 4), smoothness=bad).step()
    assert not bad.certified and quadratic_smoothness(Quadratic.random(0)).certified
