"""Single-loop methods reach the optimum of problems that are solved on paper, from three starting points.

Oracles: closed forms in method_toys.py. With a constant penalty each method has to converge linearly to the optimum of
the *penalised* problem, known exactly; its distance to the true optimum, the bias, is compared with the known one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from difflayers.bilevel import BOME, F2SA, GPBGD, MEHA, VPBGD, Bilevel, PenaltyMethod, Power, minimize
from tests.bilevel.method_toys import (
    STARTS,
    Quadratic,
    Sine,
    convex_not_strongly,
    gradient_penalty_optimum,
    moreau_optimum,
    start,
    tensor,
)


def run(algo, steps):
    return minimize(algo, steps, record_every=steps, progress=False)


def distance(algo, point):
    return np.linalg.norm(np.concatenate([algo.x.numpy(), algo.y.numpy()]) - np.concatenate(point))


PENALISED = {
    "F2SA": (
        lambda p, x, y: F2SA(p, x, y, step=0.03, step_lower=0.6, multiplier=20.0, ratio=5.0, inner_steps=2),
        lambda q: q.penalised_optimum(20.0),
    ),
    "PenaltyMethod": (
        lambda p, x, y: PenaltyMethod(p, x, y, weight=0.05, step=0.15, step_lower=0.6, inner_steps=2),
        lambda q: q.penalised_optimum(20.0),
    ),
    "VPBGD": (
        lambda p, x, y: VPBGD(p, x, y, penalty=5.0, step=0.4, step_lower=0.6),
        lambda q: q.penalised_optimum(5.0),
    ),
    "GPBGD": (
        lambda p, x, y: GPBGD(p, x, y, penalty=5.0, step=0.3),
        lambda q: gradient_penalty_optimum(q, 5.0),
    ),
    "MEHA": (
        lambda p, x, y: MEHA(p, x, y, penalty=5.0, step=0.4, step_lower=0.4, step_theta=0.4, proximal=2.0),
        lambda q: moreau_optimum(q, 5.0, 2.0),
    ),
}


@pytest.mark.parametrize("seed", STARTS)
@pytest.mark.parametrize("name", PENALISED)
def test_constant_penalty_ends_at_the_penalised_optimum(name, seed):
    make, optimum = PENALISED[name]
    q = Quadratic.random()
    algo = make(q.problem(), *start(seed, 3, 4))
    before = distance(algo, optimum(q))
    history = run(algo, 600)
    assert distance(algo, optimum(q)) < 1e-5 * before
    assert history.stationarity[-1] < 1e-4
    assert distance(algo, optimum(q)) < 0.01 * np.linalg.norm(np.concatenate(q.optimum) - np.concatenate(optimum(q)))


@pytest.mark.parametrize("seed", STARTS)
def test_growing_penalty_reaches_the_optimum_at_the_rate_of_the_bias(seed):
    q = Quadratic.random()
    x, _ = q.optimum
    for make, penalty in (
        (F2SA, lambda k: k ** (1 / 3)),  # gamma / (2 alpha) with the defaults
        (PenaltyMethod, lambda k: k ** (1 / 5)),
    ):
        algo = make(q.problem(), *start(seed, 3, 4))
        for steps in (400, 300):
            run(algo, steps)
            lam = penalty(algo.steps)
            bias = np.linalg.norm(q.penalised_optimum(lam)[0] - x)
            assert abs(np.linalg.norm(algo.x.numpy() - x) / bias - 1) < 0.05
            assert bias * lam < 0.45


def test_error_of_the_penalised_hypergradient_times_lambda_tends_to_a_constant():
    # x frozen by a tiny ratio; then the direction that F2SA takes, against the closed form of the bias
    q = Quadratic.random()
    x, y = np.array([1.0, -0.5, 0.8]), np.zeros(4)
    S = q.A @ np.linalg.solve(q.H, q.B)
    scaled = []
    for lam in (1e2, 1e3, 1e4):
        options = {"step": 1 / lam, "step_lower": 1.0, "multiplier": lam}
        still = F2SA(q.problem(), tensor(x), tensor(y), ratio=1e-18, **options)
        run(still, 60)
        algo = F2SA(q.problem(), tensor(x), tensor(y), ratio=lam, **options)  # a step of 1
        algo.load_state_dict(still.state_dict())
        algo.step()
        direction = still.x.numpy() - algo.x.numpy()
        np.testing.assert_allclose(direction, q.penalised_gradient(x, lam), rtol=1e-7)
        scaled.append(lam * np.linalg.norm(direction - q.hypergradient(x)))
    # lam (y_lam - y*) = -(H + A'A / lam)^{-1} r with r = A'(A y* - t): expanded, - H^{-1} r + H^{-1} A'A H^{-1} r / lam
    r = q.A.T @ (S @ x - q.t)
    H = np.linalg.inv(q.H)
    limit = np.linalg.norm(q.B.T @ H @ q.A.T @ q.A @ H @ r)
    assert abs(scaled[-1] / limit - 1) < 1e-3
    assert abs(scaled[0] / limit - 1) < 0.05


def test_upper_value_below_the_optimum_is_what_infeasibility_tells():
    q = Quadratic.random()
    best = q.upper_value(*q.optimum)
    algo = VPBGD(q.problem(), *start(0, 3, 4), penalty=5.0, step=0.4, step_lower=0.6)
    stats = run(algo, 600).stats[-1]
    assert stats.upper < best and stats.infeasibility > 1e-3
    algo.polish()
    np.testing.assert_allclose(algo.y, np.linalg.solve(q.H, q.B @ algo.x.numpy()), rtol=1e-7)
    assert q.upper_value(algo.x.numpy(), algo.y.numpy()) >= best


def isotropic():
    """T4 with H = h I and B / b orthogonal, where what follows can be computed; one step of 1 / h solves for y."""
    r = np.random.default_rng(6)
    h, b = 1.25, 0.5
    Q1, A = (np.linalg.qr(r.normal(size=(4, 4)))[0] for _ in range(2))
    return Quadratic(h * np.eye(4), b * Q1, A, r.normal(size=4), 0.3)


@pytest.mark.parametrize("seed", STARTS)
@pytest.mark.parametrize("xi", [0.04, 0.01])
def test_bome_has_no_bias_but_that_of_its_step(seed, xi):
    """The distance from the optimum that the theory allows at a constant step xi: a multiple of sqrt(xi).

    On T4 with y' = y*(x), let v = H y - B x, R = (-H^-1 B, I), M = R R', nu = M^-1 R grad F. Then grad q = R'v, and
    whatever lambda is, v+ = v - xi H M (nu + lambda v). Here H M = c I. With lambda from the step's rule, nu + lambda v
    is eta v and the part of nu orthogonal to v (or lambda = 0 and <v, nu> >= eta |v|^2): |v+|^2 <= (1 - xi eta c)^2
    |v|^2 + (xi c |nu|)^2, so in the end |v| <= k sup |nu|, k = xi c / sqrt(1 - (1 - xi eta c)^2).

    x+ = x - xi (rho x - B'H^-1 lambda v), and lambda v = - nu + (v - v+) / (xi c). So for z = x + Z v, Z = B'H^-1 / c:
    z+ = z - xi (rho x + B'H^-1 nu), where the bracket is P (x - x*) + K v, linear. In the end |z - x*| <= |P Z - K| / p
    sup |v|, p the least eigenvalue of P, and |x - x*| <= (|P Z - K| / p + |Z|) sup |v|. At last nu is nu* and linear in
    x - x* and v. The number of steps forgets the start to a hundredth of this.
    """
    q, eta = isotropic(), 0.5
    n, size = 4, lambda matrix: np.linalg.norm(matrix, 2)
    h = q.H[0, 0]
    R = np.hstack([-q.B / h, np.eye(n)])
    M = R @ R.T
    c = h * M[0, 0]
    np.testing.assert_allclose(q.H @ M, c * np.eye(n), atol=1e-12)

    def nu(x, v):
        y = (q.B @ x + v) / h
        return np.linalg.solve(M, R @ np.concatenate([q.upper_x(x, y), q.upper_y(x, y)]))

    def drift(x, v):
        return q.rho * x + q.B.T @ nu(x, v) / h

    x_best, zero, units = q.optimum[0], np.zeros(n), np.eye(n)
    np.testing.assert_allclose(drift(x_best, zero), 0, atol=1e-12)
    P = np.stack([drift(x_best + e, zero) for e in units], axis=1)
    K = np.stack([drift(x_best, e) for e in units], axis=1)
    nu_x = np.stack([nu(x_best + e, zero) - nu(x_best, zero) for e in units], axis=1)
    nu_v = np.stack([nu(x_best, e) - nu(x_best, zero) for e in units], axis=1)
    Z, p = q.B.T / (h * c), np.linalg.eigvalsh((P + P.T) / 2)[0]
    factor = size(P @ Z - K) / p + size(Z)
    k = xi * c / np.sqrt(1 - (1 - xi * eta * c) ** 2)
    share = k * (size(nu_x) * factor + size(nu_v))
    assert share < 1 and size(P) * xi < 1
    allowed_v = k * np.linalg.norm(nu(x_best, zero)) / (1 - share)
    allowed = 1.01 * factor * allowed_v
    steps = int(np.log(1e-2 * allowed / 50) / np.log(1 - xi * min(p, eta * c / 2)))
    algo = BOME(q.problem(), *start(seed, n, n), step=xi, step_lower=1 / h, inner_steps=1, control=eta)
    run(algo, steps)
    assert np.linalg.norm(algo.x.numpy() - x_best) <= allowed
    assert np.linalg.norm(q.lower_y(algo.x.numpy(), algo.y.numpy())) <= 1.01 * allowed_v


@pytest.mark.parametrize("inner", [1, 3])
def test_bome_with_few_inner_steps_is_biased_as_its_docstring_says(inner):
    """One lower variable: f = h y^2 / 2 - y b'x, F = (a y - t)^2 / 2 + rho |x|^2 / 2, r = (1 - alpha h)^T left of y.

    With w = y - b'x / h = R (x, y), grad q = w m, m = (-(1 - r) b, h). It rests where w = 0 and grad F is along m,
    which is rho h x + (1 - r) b a (a y - t) = 0: the optimum with (1 - r) in place of 1. How near it is follows from w
    alone, whatever lambda does: w+ = w - xi (R grad F + lambda w R m) gives lambda w, and for z = x + Z w,
    Z = (1 - r) b / R m, z+ = z - xi (rho x + Z R grad F), where the bracket is P (x - x_rest) + K w. So after n steps
    |z - x_rest| is at most |I - xi P|^n of what it was and |P Z - K| / p times the largest |w| of these steps, p the
    least eigenvalue of P.
    """
    r = np.random.default_rng(2)
    h, a, t, rho, b, alpha, xi, n = 1.2, 0.9, 2.0, 0.4, r.normal(size=3), 0.3, 0.02, 400
    left = (1 - alpha * h) ** inner

    def rest(share):
        x = np.linalg.solve(rho * h * np.eye(3) + share * a * a * np.outer(b, b) / h, share * a * t * b)
        return x, np.atleast_1d(b @ x / h)

    q = Quadratic(np.array([[h]]), b[None], np.array([[a]]), np.array([t]), rho)
    np.testing.assert_allclose(rest(1)[0], q.optimum[0])
    Rm = (1 - left) * b @ b / h + h
    Z = (1 - left) * b / Rm
    P = rho * np.eye(3) + np.outer(Z, (a * a - rho) * b / h)
    K, p = Z * a * a, np.linalg.eigvalsh((P + P.T) / 2)[0]
    for seed in STARTS:
        algo = BOME(q.problem(), *start(seed, 3, 1), step=xi, step_lower=alpha, inner_steps=inner, control=0.5)
        run(algo, 200)
        w, z = [], []
        for _ in range(n + 1):
            w.append(float(algo.y) - b @ algo.x.numpy() / h)
            z.append(algo.x.numpy() + Z * w[-1] - rest(1 - left)[0])
            algo.step()
        forgotten = np.linalg.norm(np.eye(3) - xi * P, 2) ** n
        allowed = forgotten * np.linalg.norm(z[0]) + np.linalg.norm(P @ Z - K) / p * np.abs(w).max()
        assert np.linalg.norm(z[-1]) <= allowed
        assert allowed < 0.5 * np.linalg.norm(rest(1 - left)[0] - rest(1)[0])


@pytest.mark.parametrize("seed", STARTS)
@pytest.mark.parametrize(
    "make",
    [
        BOME,
        MEHA,
        lambda p, x, y: BOME(p, x, y, by_value=True, step=0.1),
    ],
    ids=["BOME", "MEHA", "BOME by value"],
)
def test_lower_problem_with_many_solutions(make, seed):
    x, y1, y2 = start(seed, 5, 5, 5)
    algo = make(convex_not_strongly(5), x, (y1, y2))
    run(algo, 900)
    for found in (algo.x, *algo.y):
        np.testing.assert_allclose(found, np.ones(5), atol=1e-4)


@pytest.mark.parametrize("seed", STARTS)
def test_lower_problem_that_is_not_convex(seed):
    toy = Sine(2.0, np.array([2.0]))
    x, y = toy.optimum
    r = np.random.default_rng(seed)
    algo = MEHA(
        toy.problem(), tensor(x + 0.5 * r.normal()), tensor(y + 0.5 * r.normal(size=1)),
        step=0.05, step_lower=0.05, step_theta=0.05, proximal=0.4, penalty=Power(5.0, 0.45),
    )  # fmt: skip
    run(algo, 1500)
    bias = 1.0 / (5 * 1500**0.45)
    assert abs(float(algo.x) - x) < 3 * bias
    np.testing.assert_allclose(algo.y, y, atol=3 * bias)


def test_projected_lower_problem_of_the_penalty_methods():
    """y*(x) = min(2 x, 1), F = (y - 3)^2 / 2 + x^2 / 2: least where the bound begins, x = 1/2, with F = 2.125.

    The penalised y is 1 for x near 1/2. With z = min(2 x, 1) the slope in x of F + lam (f(x, 1) - f(x, z)) is x above
    1/2; below, where f(x, 2 x) = 0, it is x - 2 lam (1 - 2 x): zero at x = 2 lam / (1 + 4 lam).
    """
    problem = Bilevel(
        lambda x, y, batch: (y - 3).square().sum() / 2 + x.square().sum() / 2,
        lambda x, y, batch: (y - 2 * x).square().sum() / 2,
        prox_lower=lambda v, x, step: v.clamp(max=1),
    )
    for x0 in (-1.0, 0.2, 2.0):
        for algo in (
            PenaltyMethod(problem, tensor([x0]), tensor([0.0]), weight=0.1, step=0.02),
            VPBGD(problem, tensor([x0]), tensor([0.0]), penalty=10.0, step=0.1, step_lower=0.5),
        ):
            run(algo, 500)
            np.testing.assert_allclose(algo.x, [20 / 41], atol=1e-6)
            np.testing.assert_allclose(algo.y, [1.0], atol=0)


@pytest.mark.parametrize("x0, y0", [(0.2, 0.5), (1.5, -1.0), (2.9, -2.5)])
def test_vpbgd_on_the_problem_of_its_paper(x0, y0):
    """F = cos(4y + 2) / (1 + e^{2 - 4x}) + ln((4x - 2)^2 + 1) / 2 on [0, 3], f = (x + y)^2, so y* = -x.

    Oracle: local minima of F(x, -x) by a grid and a bracketing search, and F + gamma (x + y)^2 differentiated by hand
    (the derivative of 1 / (1 + e^{2 - 4x}) is 4 e^{2 - 4x} / (1 + e^{2 - 4x})^2).
    """

    def phi(x):
        return np.cos(2 - 4 * x) / (1 + np.exp(2 - 4 * x)) + 0.5 * np.log((4 * x - 2) ** 2 + 1)

    grid = np.linspace(0, 3, 3001)
    low = [i for i in range(1, 3000) if phi(grid[i]) <= min(phi(grid[i - 1]), phi(grid[i + 1]))]
    minima = [minimize_scalar(phi, bounds=(grid[i - 1], grid[i + 1]), method="bounded").x for i in low]

    def upper(x, y, batch):
        return torch.cos(4 * y + 2) / (1 + torch.exp(2 - 4 * x)) + 0.5 * torch.log((4 * x - 2) ** 2 + 1)

    gamma = 50.0
    algo = VPBGD(
        Bilevel(upper, lambda x, y, batch: (x + y) ** 2, project_upper=lambda x: x.clamp(0, 3)),
        tensor(x0), tensor(y0), penalty=gamma, step=0.2, step_lower=0.2,
    )  # fmt: skip
    run(algo, 1500)
    x, y = float(algo.x), float(algo.y)
    e = np.exp(2 - 4 * x)
    in_x = np.cos(4 * y + 2) * 4 * e / (1 + e) ** 2 + 4 * (4 * x - 2) / ((4 * x - 2) ** 2 + 1) + 2 * gamma * (x + y)
    in_y = -4 * np.sin(4 * y + 2) / (1 + e) + 2 * gamma * (x + y)
    assert 0 < x < 3 and abs(in_x) < 1e-5 and abs(in_y) < 1e-5
    assert min(abs(x - m) for m in minima) < 2 / gamma


def test_polish_of_a_module_and_of_a_lower_problem_with_a_prox():
    """argmin (y - 2 x)^2 / 2 + |y| / 2 = 2 x - 1/2 for x > 1/4."""
    module = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    problem = Bilevel(
        lambda x, y, b: (y.weight - 3).square().sum(),
        lambda x, y, b: (y.weight - 2 * x).square().sum() / 2,
        prox_lower=lambda v, x, s: {"weight": v["weight"].sign() * (v["weight"].abs() - s / 2).clamp_min(0)},
    )
    algo = MEHA(problem, tensor([1.5]), module)
    assert algo.polish() is module
    np.testing.assert_allclose(module.weight.detach(), [[2.5]], rtol=1e-7)
    algo.step()
    assert algo.y is module and algo.x.shape == (1,)
