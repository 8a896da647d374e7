"""SOBA, SABA, BAMM and LVHBA: closed-form optima, updates by hand, resume to the last bit.

Oracles: method_toys.py (normal equations and KKT systems in numpy) and the update table of the papers in numpy.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from difflayers.bilevel import BAMM, LVHBA, SABA, SOBA, Bilevel, Power, hypergradient, minimize
from tests.bilevel.method_toys import (
    STARTS,
    Quadratic,
    convex_not_strongly,
    coupled,
    coupled_penalised,
    mixed_optimum,
    start,
    tensor,
)

Q = Quadratic.random()


def run(algo, steps, **batches):
    return minimize(algo, steps, record_every=steps, progress=False, **batches)


# ------------------------------------------------------------------------------------------------------- optima


@pytest.mark.parametrize("seed", STARTS)
def test_soba_has_no_bias(seed):
    algo = SOBA(Q.problem(), *start(seed, 3, 4), step=0.08, step_lower=0.8)
    history = run(algo, 600)
    x, y = Q.optimum
    np.testing.assert_allclose(algo.x, x, atol=1e-6)
    np.testing.assert_allclose(algo.y, y, atol=1e-6)
    np.testing.assert_allclose(algo.adjoint, np.linalg.solve(Q.H, Q.upper_y(x, y)), atol=1e-6)
    assert history.stationarity[-1] < 1e-6 and history.infeasibility[-1] < 1e-6
    exact = hypergradient(Q.problem(), algo.x, algo.y, init=algo.adjoint)
    assert exact.grad.norm() < 1e-5


@pytest.mark.parametrize("seed", STARTS)
def test_soba_with_the_steps_of_its_paper(seed):
    """Both steps fall as k^{-1/2}, so an update of T4 is s+ - s* = (I - k^{-1/2} G) (s - s*), s = (x, y, q).

    After K steps the error is the product of these matrices times that of the start: its norm is the tolerance, of the
    order exp(-2 sqrt(K) g) with g the least real part of an eigenvalue of G.
    """
    gamma, rho, n, d = 0.2, 1.0, 3, 4
    G = np.block(
        [
            [gamma * Q.rho * np.eye(n), np.zeros((n, d)), gamma * Q.B.T],
            [-rho * Q.B, rho * Q.H, np.zeros((d, d))],
            [np.zeros((d, n)), -rho * Q.A.T @ Q.A, rho * Q.H],
        ]
    )
    x, y = Q.optimum
    best = np.concatenate([x, y, np.linalg.solve(Q.H, Q.upper_y(x, y))])
    algo = SOBA(Q.problem(), *start(seed, n, d), step=Power(gamma, -0.5), step_lower=Power(rho, -0.5))
    first = np.concatenate([algo.state[name].numpy() for name in "xyq"]) - best
    power, least = np.eye(n + 2 * d), np.linalg.eigvals(G).real.min()
    for k in range(1, 1001):
        power = power - k**-0.5 * G @ power
        if k in (500, 1000):
            run(algo, 500)
            error = np.concatenate([algo.state[name].numpy() for name in "xyq"]) - best
            allowed = np.linalg.norm(power, 2) * np.linalg.norm(first)
            assert np.linalg.norm(error) <= allowed
            assert allowed < 20 * np.exp(-2 * k**0.5 * least) * np.linalg.norm(first)
    np.testing.assert_allclose(error, power @ first, rtol=1e-6, atol=1e-12)


class Blocks:
    """T4 in pieces: data of every block shifted, so that the mean of t and of b are those of the whole."""

    def __init__(self, blocks):
        r = np.random.default_rng(5)
        self.t, self.b = r.normal(size=(blocks, 4)), r.normal(size=(blocks, 4))
        self.b -= self.b.mean(0)
        self.q = Quadratic(Q.H, Q.B, Q.A, Q.t + self.t.mean(0), Q.rho)
        p = Q.problem()
        A, t = tensor(Q.A), tensor(Q.t)
        self.problem = Bilevel(
            lambda x, y, s: 0.5 * (A @ y - t - s).square().sum() + 0.5 * Q.rho * x.square().sum(),
            lambda x, y, s: p.lower(x, y, None) - s @ y * (1 + 0.3 * x.sum()),
        )
        self.upper = [(i, tensor(s)) for i, s in enumerate(self.t)]
        self.lower = [(i, tensor(s)) for i, s in enumerate(self.b)]


@pytest.mark.parametrize("seed", STARTS)
def test_saba_leaves_no_noise_where_soba_does(seed):
    blocks = Blocks(5)
    order = np.random.default_rng(seed).integers(5, size=(1200, 2))
    x, _ = blocks.q.optimum
    errors = {}
    for method, options in ((SOBA, {}), (SABA, {"upper_blocks": 5, "lower_blocks": 5})):
        algo = method(blocks.problem, *start(seed, 3, 4), step=0.03, step_lower=0.3, **options)
        for i, j in order:
            pair = blocks.upper[i], blocks.lower[j]
            algo.step(*(pair if method is SABA else [batch for _, batch in pair]))
        errors[method] = np.linalg.norm(algo.x.numpy() - x)
    assert errors[SABA] < 1e-5 and errors[SOBA] > 100 * errors[SABA]


@pytest.mark.parametrize("seed", STARTS)
def test_bamm_at_constant_mixing_ends_at_the_mixed_optimum(seed):
    algo = BAMM(Q.problem(), *start(seed, 3, 4), mixing=0.1, step=0.3)
    run(algo, 400)
    for found, wanted in zip((algo.x, algo.y), mixed_optimum(Q, 0.1), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("seed", STARTS)
def test_bamm_with_falling_mixing_approaches_the_optimum_at_its_rate(seed):
    algo = BAMM(Q.problem(), *start(seed, 3, 4), step=0.2)
    x, _ = Q.optimum
    for steps in (200, 300):
        run(algo, steps)
        mu = 0.5 * algo.steps**-0.25
        assert np.linalg.norm(algo.x.numpy() - x) / np.linalg.norm(mixed_optimum(Q, mu)[0] - x) == pytest.approx(
            1, abs=0.05
        )


@pytest.mark.parametrize("seed", STARTS)
def test_bamm_where_lower_solutions_are_many(seed):
    x, y1, y2 = start(seed, 5, 5, 5)
    algo = BAMM(convex_not_strongly(5), x, (y1, y2))
    run(algo, 500)
    for found in (algo.x, *algo.y):
        np.testing.assert_allclose(found, np.ones(5), atol=1e-3)


@pytest.mark.parametrize("factor", [1.0, 100.0, -0.01])
@pytest.mark.parametrize("seed", STARTS)
def test_lvhba_at_constant_penalty_ends_at_the_penalised_optimum(seed, factor):
    x, y1, y2 = start(seed, 5, 5, 5)
    algo = LVHBA(coupled(5, factor), x, (y1, y2), step=0.4, step_inner=0.4, penalty=3.0)
    run(algo, 500)
    wanted = coupled_penalised(3.0, 1.0)
    for found, value in zip((algo.x, *algo.y), wanted[:3], strict=True):
        np.testing.assert_allclose(found, np.full(5, value), atol=1e-5)
    np.testing.assert_allclose(algo.multipliers * factor, wanted[5], atol=1e-5)
    assert abs(algo.x.sum() + algo.y[0].sum() + algo.y[1].sum()) < 1e-12


def test_lvhba_bias_falls_as_its_penalty_grows():
    true = np.array([-0.3, 0.7, -0.4])
    bias = [c * np.abs(coupled_penalised(c, 1.0)[:3] - true).max() for c in (1e2, 1e3, 1e4)]
    assert abs(bias[2] / bias[1] - 1) < 0.01 and bias[2] < 1  # the error times c tends to a constant
    for seed in STARTS:
        x, y1, y2 = start(seed, 5, 5, 5)
        algo = LVHBA(coupled(5), x, (y1, y2), step=0.4, step_inner=0.4)
        run(algo, 800)
        c = 800**0.3
        for found, value in zip((algo.x, *algo.y), true, strict=True):
            np.testing.assert_allclose(found, np.full(5, value), atol=1.3 * bias[2] / c)
        assert algo.multipliers == pytest.approx(-1, abs=2 / c)


def test_lvhba_with_inequalities_and_a_projection_of_its_own():
    """min (y - 2)^2 / 2 + (x - 1)^2 / 2 where y minimises (y - 3)^2 / 2 subject to y <= x: y = min(x, 3).

    So y = x, least of (x - 2)^2 + (x - 1)^2: x = 3/2 with lower multiplier 3 - 3/2. In the half plane y <= x the
    orthogonal projection moves both by half of the violation. No bias: theta = x = y is stationary at any penalty.
    """

    def onto(x, y):
        over = (y - x).clamp_min(0) / 2
        return x + over, y - over

    problem = Bilevel(
        lambda x, y, b: ((y - 2).square() + (x - 1).square()).sum() / 2,
        lambda x, y, b: (y - 3).square().sum() / 2,
        constraint=lambda x, y: y - x,
        project_joint=onto,
    )
    for x0, y0 in ((0.0, 2.0), (3.0, 0.0), (-1.0, -2.0)):
        algo = LVHBA(problem, tensor([x0]), tensor([y0]), step=0.1, step_inner=0.2, penalty=2.0)
        assert float(algo.y - algo.x) <= 1e-12
        for _ in range(600):
            stats = algo.step()
            assert float(algo.y - algo.x) <= 1e-12
        np.testing.assert_allclose([float(algo.x), float(algo.y), float(algo.multipliers)], 1.5, atol=1e-6)
        assert stats.infeasibility < 1e-6
        assert float(algo.state["lambda"].min()) >= 0


def test_lvhba_at_its_default_steps_where_the_lower_problem_is_flat():
    """By hand, f flat along y: the gap y - theta becomes (1 + step)(1 - step_inner) times itself at every step."""
    problem = Bilevel(
        lambda x, y, b: x.square().sum(),
        lambda x, y, b: 0 * (x.sum() + y.sum()),
        constraint=lambda x, y: x - 1,
        equality=True,
    )
    algo = LVHBA(problem, tensor([1.0]), tensor([0.0]))
    algo.state["theta"] = algo.state["theta"] + 1
    for _ in range(320):
        algo.step()
    np.testing.assert_allclose(algo.y - algo.state["theta"], -((1.05 * 0.9) ** 320), rtol=1e-6)


def test_lvhba_on_many_variables():
    """At n = 100 the published toy diverges at its shipped steps; rows of norm one do not know the dimension."""
    x, y1, y2 = start(0, 100, 100, 100)
    algo = LVHBA(coupled(100), x, (y1, y2), step=0.4, step_inner=0.4, penalty=3.0)
    run(algo, 500)
    np.testing.assert_allclose(algo.x, np.full(100, coupled_penalised(3.0, 1.0)[0]), atol=1e-5)
    algo.polish()  # y1 = x + 1, sum y2 = - sum x - sum y1
    np.testing.assert_allclose(algo.y[0], algo.x + 1, atol=1e-7)
    assert abs(algo.x.sum() + algo.y[0].sum() + algo.y[1].sum()) < 1e-9


# ----------------------------------------------------------------------------------------------------- by hand


def test_soba_by_hand():
    algo = SOBA(Q.problem(), *start(0, 3, 4), step=Power(0.2, -0.5), step_lower=Power(0.3, -0.25))
    x, y, q = (algo.state[name].numpy() for name in "xyq")
    for k in range(4):
        rho, gamma = 0.3 * (k + 1) ** -0.25, 0.2 * (k + 1) ** -0.5
        x, y, q = (
            x - gamma * (Q.upper_x(x, y) + Q.B.T @ q),  # J = -B'
            y - rho * Q.lower_y(x, y),
            q - rho * (Q.H @ q - Q.upper_y(x, y)),
        )
        stats = algo.step()
        for name, value in (("x", x), ("y", y), ("q", q)):
            np.testing.assert_allclose(algo.state[name], value, rtol=1e-12, atol=1e-13)
        assert (stats.gradients, stats.products) == (2 * (k + 1), 2 * (k + 1))


def test_saba_by_hand():
    blocks = Blocks(3)
    algo = SABA(blocks.problem, *start(0, 3, 4), upper_blocks=3, lower_blocks=3, step=0.2, step_lower=0.3)
    x, y, q = (algo.state[name].numpy() for name in "xyq")
    upper_table, lower_table = np.zeros((3, 7)), np.zeros((3, 11))
    for i, j in ((0, 1), (2, 1), (0, 0), (2, 2), (0, 1)):
        s, u = blocks.t[i], blocks.b[j]
        new_upper = np.concatenate([Q.rho * x, Q.A.T @ (Q.A @ y - Q.t - s)])
        new_lower = np.concatenate(
            [Q.H @ y - Q.B @ x - u * (1 + 0.3 * x.sum()), Q.H @ q, -Q.B.T @ q - 0.3 * (u @ q) * np.ones(3)]
        )
        up = new_upper - upper_table[i] + upper_table.mean(0)
        low = new_lower - lower_table[j] + lower_table.mean(0)
        upper_table[i], lower_table[j] = new_upper, new_lower
        x = x - 0.2 * (up[:3] - low[8:])
        y = y - 0.3 * low[:4]
        q = q - 0.3 * (low[4:8] - up[3:])
        algo.step(blocks.upper[i], blocks.lower[j])
        for name, value in (("x", x), ("y", y), ("q", q)):
            np.testing.assert_allclose(algo.state[name], value, rtol=1e-11, atol=1e-12)


def test_bamm_by_hand():
    algo = BAMM(
        Q.problem(),
        *start(0, 3, 4),
        mixing=Power(1.0, -0.3),
        step=0.2,
        step_lower=0.3,
        step_adjoint=Power(0.25, -0.2),
        radius=0.5,
    )
    x, y, v = (algo.state[name].numpy() for name in "xyv")
    inside = []
    for k in range(5):
        mu = (k + 1) ** -0.3
        y = y - 0.3 * (mu * Q.upper_y(x, y) + (1 - mu) * Q.lower_y(x, y))
        v = v - 0.25 * (k + 1) ** -0.2 * ((mu * Q.A.T @ Q.A + (1 - mu) * Q.H) @ v - Q.upper_y(x, y))
        inside.append(np.linalg.norm(v) < 0.5)
        v = v * min(1, 0.5 / np.linalg.norm(v))
        stats_y = Q.lower_y(x, y)
        x = x - 0.2 * (Q.upper_x(x, y) + (1 - mu) * Q.B.T @ v)
        stats = algo.step()
        for name, value in (("x", x), ("y", y), ("v", v)):
            np.testing.assert_allclose(algo.state[name], value, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(stats.infeasibility, np.linalg.norm(stats_y), rtol=1e-10)
        assert (stats.gradients, stats.products) == (4 * (k + 1), 2 * (k + 1))
    assert not all(inside)


def constrained():
    """T4 with C x + D y = e, two rows of different size."""
    r = np.random.default_rng(8)
    C, D, e = r.normal(size=(2, 3)), r.normal(size=(2, 4)) * np.array([[1.0], [5.0]]), r.normal(size=2)
    c, d, f = tensor(C), tensor(D), tensor(e)
    return C, D, e, Q.problem(constraint=lambda x, y: c @ x + d @ y - f, equality=True)


LVHBA_OPTIONS = {
    "step": 0.1, "step_inner": Power(0.2, -0.1), "step_multiplier": 0.3, "proximal": (1.5, 0.8),
    "penalty": Power(2.0, 0.4), "bound": 0.9,
}  # fmt: skip


def test_lvhba_by_hand():
    C, D, e, problem = constrained()
    size = np.linalg.norm(np.hstack([C, D]), axis=1, keepdims=True)
    C, D, e = C / size, D / size, e / size[:, 0]
    rows = np.hstack([C, D])

    def onto(x, y):
        w = np.concatenate([x, y])
        w = w - rows.T @ np.linalg.solve(rows @ rows.T, rows @ w - e)
        return w[:3], w[3:]

    x0, y0 = start(0, 3, 4)
    algo = LVHBA(problem, x0, y0, **LVHBA_OPTIONS)
    x, y = onto(x0.numpy(), y0.numpy())
    theta, z, lam = y, np.zeros(2), np.zeros(2)
    for k in range(5):
        eta, c = 0.2 * (k + 1) ** -0.1, 2 * (k + 1) ** 0.4
        theta, lam = (
            theta - eta * (Q.lower_y(x, theta) + D.T @ lam + (theta - y) / 1.5),
            np.clip(lam + eta * (C @ x + D @ theta - e - (lam - z) / 0.8), -0.9, 0.9),
        )
        d_x = Q.upper_x(x, y) / c + Q.lower_x(x, y) - Q.lower_x(x, theta) - C.T @ lam
        d_y = Q.upper_y(x, y) / c + Q.lower_y(x, y) - (y - theta) / 1.5
        x, y = onto(x - 0.1 * d_x, y - 0.1 * d_y)
        z = np.clip(z + 0.3 * (lam - z) / 0.8, -0.9, 0.9)
        algo.step()
        for name, value in (("x", x), ("y", y), ("theta", theta), ("z", z), ("lambda", lam)):
            np.testing.assert_allclose(algo.state[name], value, rtol=1e-11, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(algo.multipliers, lam / size[:, 0], rtol=1e-10)


# -------------------------------------------------------------------------------------------- resume, refusals

BLOCKS = Blocks(3)
RUNS = {
    "SOBA": lambda seed: SOBA(BLOCKS.problem, *start(seed, 3, 4)),
    "SABA": lambda seed: SABA(BLOCKS.problem, *start(seed, 3, 4), upper_blocks=3, lower_blocks=3),
    "BAMM": lambda seed: BAMM(BLOCKS.problem, *start(seed, 3, 4)),
    "LVHBA": lambda seed: LVHBA(constrained()[3], *start(seed, 3, 4), **LVHBA_OPTIONS),
}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_anywhere_it_is_the_same_run_to_the_last_bit(name):
    def batches(k):
        pair = BLOCKS.upper[k % 3], BLOCKS.lower[k * 2 % 3]
        return pair if name == "SABA" else [batch for _, batch in pair]

    whole = RUNS[name](0)
    wanted = [whole.step(*batches(k)) for k in range(7)]
    for stop in range(7):
        first = RUNS[name](0)
        for k in range(stop):
            first.step(*batches(k))
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = RUNS[name](9)
        second.load_state_dict(torch.load(file, weights_only=True))
        for k in range(stop, 7):
            assert second.step(*batches(k)) == wanted[k]
        assert all(torch.equal(value, second.state[key]) for key, value in whole.state.items())
        assert second.counts == whole.counts


def test_bad_input_is_named():
    p, (x, y) = Q.problem(), start(0, 3, 4)
    for method, options in ((SOBA, {}), (BAMM, {}), (SABA, {"upper_blocks": 1, "lower_blocks": 1})):
        with pytest.raises(ValueError, match=f"constraint: expected None for {method.__name__}"):
            method(constrained()[3], x, y, **options)
        with pytest.raises(ValueError, match="prox_lower: expected None"):
            method(Q.problem(prox_lower=lambda v, x, s: v), x, y, **options)
    with pytest.raises(ValueError, match="constraint: expected a function for LVHBA"):
        LVHBA(p, x, y)
    nonlinear = Q.problem(constraint=lambda x, y: y.square().sum() - 1, equality=True)
    one_sided = Q.problem(constraint=lambda x, y: y.sum() - 1)
    for problem in (nonlinear, one_sided):
        with pytest.raises(ValueError, match="project_joint: expected a projection"):
            LVHBA(problem, x, y)
    with pytest.raises(ValueError, match="constraint: expected a function of x and y"):
        LVHBA(Q.problem(constraint=lambda x, y: torch.ones(2)), x, y)
    with pytest.raises(ValueError, match="proximal: expected a pair"):
        LVHBA(constrained()[3], x, y, proximal=1.0)
    with pytest.raises(ValueError, match="bound: expected"):
        LVHBA(constrained()[3], x, y, bound=0.0)
    with pytest.raises(ValueError, match="radius: expected"):
        BAMM(p, x, y, radius=0.0)
    algo = SABA(p, x, y, upper_blocks=2, lower_blocks=3)
    with pytest.raises(ValueError, match="upper_batch: expected a pair"):
        algo.step(None, (0, None))
    with pytest.raises(ValueError, match="lower_batch: expected a block from 0 to 2, got 3"):
        algo.step((1, None), (3, None))
    with pytest.raises(ValueError, match="lower_blocks: expected an integer"):
        SABA(p, x, y, upper_blocks=2, lower_blocks=0)
