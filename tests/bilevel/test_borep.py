"""BO-REP: updates by hand, the radius of its orbit, upper objectives without a Lipschitz gradient.

Oracles, written down before the code:

- the update table in numpy on T4 with gradients by hand;
- **radius**. Phi of T4 is quadratic with Hessian P = S'S + rho. A step has length eta exactly, so of two points in a
  row one is at least eta / 2 from the optimum: a constant step does not converge. It comes as near as this. With
  |m - grad Phi| <= d, Phi(x+) <= Phi(x) - eta |grad Phi| + 2 eta d + |P| eta^2 / 2, so Phi falls wherever
  |grad Phi| > G = 2 d + |P| eta / 2, and where |grad Phi| >= 2 G by eta |grad Phi| / 2 at least, sqrt(Phi - Phi*) by
  eta sqrt(2 h) / 4, h the least eigenvalue of P. After that Phi - Phi* <= (2 G)^2 / 2 h + 2 G eta + |P| eta^2 / 2 for
  ever, and |x - x*|^2 <= 2 (Phi - Phi*) / h. The error d of the direction: momentum lags by |P| eta beta / (1 - beta).
  With w = |H^-1 B| eta, the way of y* in a step, and c = |1 - alpha H|, y is off by c^N I w / (1 - c^N) after its
  refinement at every I-th step, and by (I - 1) w more between: E. With L = |H^-1 A'A| and c' = |1 - nu H|, q lags
  behind H^-1 A'(A y - t) by c' L (2 E + w) / (1 - c'), which is off by L E: times |B|, this is in d too. All of it is
  proportional to eta (`radius` below, numpy alone). For a falling schedule the same holds from any point on with the
  step it has there, if what is left of the sum of steps is enough for the way;
- |grad^2 Phi| = |Phi| + 1 for cosh, an upper objective under relaxed smoothness alone. Plain steps of length gamma from
  x0 overshoot where gamma sinh(x0) > 2 x0, and grow from there: each is longer than the last.
"""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
import torch

from difflayers.bilevel import BOREP, SOBA, Bilevel, Power, minimize
from tests.bilevel.method_toys import STARTS, Quadratic, start, tensor

Q = Quadratic.random()
OPTIONS = {"step_lower": 1.0, "step_adjoint": 1.0, "momentum": 0.5, "period": 2, "inner_steps": 4}


def well_conditioned():
    """T4 where the constants are small: H within 0.1 of the identity, |B| = 1/2, |A| = 1, P between 1 and 1.3."""
    r = np.random.default_rng(4)
    u, v, a = (np.linalg.qr(r.normal(size=(4, 4)))[0] for _ in range(3))
    return Quadratic(u @ np.diag([0.9, 0.95, 1.05, 1.1]) @ u.T, 0.5 * v[:, :3], a, 3 * r.normal(size=4), 1.0)


W = well_conditioned()


def size(matrix):
    return np.linalg.norm(matrix, 2)


def radius(q, eta, alpha=1.0, nu=1.0, beta=0.5, period=2, inner=4):
    """The distance from the optimum that the docstring above allows, and the way it takes to get there, times eta."""
    eye, inverse = np.eye(len(q.H)), np.linalg.inv(q.H)
    S = q.A @ inverse @ q.B
    P = S.T @ S + q.rho * np.eye(S.shape[1])
    h, c, c_q = np.linalg.eigvalsh(P)[0], size(eye - alpha * q.H) ** inner, size(eye - nu * q.H)
    w, L = size(inverse @ q.B) * eta, size(inverse @ q.A.T @ q.A)
    E = c * period * w / (1 - c) + (period - 1) * w
    d = size(P) * eta * beta / (1 - beta) + size(q.B) * (c_q * L * (2 * E + w) / (1 - c_q) + L * E)
    G = 2 * d + size(P) * eta / 2
    gap = (2 * G) ** 2 / (2 * h) + 2 * G * eta + size(P) * eta**2 / 2
    return np.sqrt(2 * gap / h), lambda phi: 4 * np.sqrt(phi) / np.sqrt(2 * h)


def phi(q, x):
    return q.upper_value(x, np.linalg.solve(q.H, q.B @ x))


@pytest.mark.parametrize("seed", STARTS)
@pytest.mark.parametrize("eta", [0.05, 0.01])
def test_a_constant_step_orbits_the_optimum_at_its_length(seed, eta):
    x, _ = W.optimum
    allowed, way = radius(W, eta)
    algo = BOREP(W.problem(), *start(seed, 3, 4), step=eta, **OPTIONS)
    needed = int(way(phi(W, algo.x.numpy()) - phi(W, x)) / eta) + 50  # which includes those of q from zero
    minimize(algo, needed, progress=False, record_every=needed)
    distances = []
    for _ in range(20):
        algo.step()
        distances.append(np.linalg.norm(algo.x.numpy() - x))
    assert max(distances) <= allowed < 12 * eta
    assert min(max(pair) for pair in pairwise(distances)) >= eta / 2 * (1 - 1e-9)


@pytest.mark.parametrize("seed", STARTS)
def test_the_radius_falls_with_the_schedule(seed):
    x, _ = W.optimum
    steps, schedule = 1000, Power(0.4, -0.5)
    algo = BOREP(W.problem(), *start(seed, 3, 4), step=schedule, **OPTIONS)
    minimize(algo, steps // 2, progress=False, record_every=steps)
    allowed, way = radius(W, schedule(steps // 2 - 50))  # 50 steps: beta^50 and c^50 are forgotten
    assert sum(map(schedule, range(steps // 2, steps))) >= way(phi(W, algo.x.numpy()) - phi(W, x))
    minimize(algo, steps // 2, progress=False, record_every=steps)
    assert np.linalg.norm(algo.x.numpy() - x) <= allowed < schedule(0) / 2  # where the first step would never come


def test_updates_are_those_written_by_hand():
    algo = BOREP(
        Q.problem(), *start(0, 3, 4), step=Power(0.3, -0.5), step_lower=Power(0.5, -0.1), step_adjoint=0.4,
        momentum=0.6, period=3, inner_steps=2, epochs=2,
    )  # fmt: skip
    x, y = (algo.state[name].numpy() for name in "xy")
    q, m, gradients = np.zeros(4), np.zeros(3), 0
    for k in range(8):
        alpha, eta = 0.5 * (k + 1) ** -0.1, 0.3 * (k + 1) ** -0.5
        if k == 0:
            points = []
            for length, count in ((alpha, 2), (alpha / 2, 4)):
                points = []
                for _ in range(count):
                    y = y - length * Q.lower_y(x, y)
                    points.append(y)
                y = np.mean(points, axis=0)
            gradients += 6
        elif k in (3, 6):
            for _ in range(2):
                y = y - alpha * Q.lower_y(x, y)
            gradients += 2
        gradients += 2
        q = q - 0.4 * (Q.H @ q - Q.upper_y(x, y))
        m = 0.6 * m + 0.4 * (Q.upper_x(x, y) + Q.B.T @ q)  # J = -B'
        stats = algo.step()
        np.testing.assert_allclose(stats.upper, Q.upper_value(x, y), rtol=1e-12)
        np.testing.assert_allclose(stats.infeasibility, np.linalg.norm(Q.lower_y(x, y)), rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(stats.stationarity, np.linalg.norm(m), rtol=1e-10)
        x = x - eta * m / np.linalg.norm(m)
        for name, value in (("x", x), ("y", y), ("q", q), ("m", m)):
            np.testing.assert_allclose(algo.state[name], value, rtol=1e-11, atol=1e-12, err_msg=name)
        assert (stats.gradients, stats.products) == (gradients, 2 * (k + 1))


def test_refine_takes_a_new_batch_for_every_step():
    """f = |y - b|^2 / 2 with step 1/2, two steps on 0 and 4 from y = 0: 0, 2, in the mean 1."""
    problem = Bilevel(lambda x, y, b: x * y, lambda x, y, b: (y - b).square() / 2 + 0 * x)
    algo = BOREP(problem, tensor(1.0), tensor(0.0), step_lower=0.5, inner_steps=2, epochs=0)
    assert float(algo.refine([tensor(0.0), tensor(4.0)], epochs=1)) == 1.0
    assert algo.counts["lower"] == 2 and algo.counts["upper"] == 0 and algo.steps == 0
    algo.step(None, tensor(0.0))
    assert float(algo.y) == 1.0  # no refinement of its own
    with pytest.raises(ValueError, match="lower_batches: expected at least one"):
        algo.refine([])


def cosh_problem():
    return Bilevel(lambda x, y, b: y.cosh().sum(), lambda x, y, b: (y - x).square().sum() / 2)


@pytest.mark.parametrize("x0", [6.0, 10.0, -15.0])
def test_relaxed_smoothness_alone(x0):
    gamma = 0.1
    assert gamma * np.sinh(abs(x0)) > 2 * abs(x0)  # the very first plain step overshoots
    plain = SOBA(cosh_problem(), tensor([x0]), tensor([x0]), step=gamma, step_lower=1.0)
    with pytest.raises(FloatingPointError, match="not finite"):
        minimize(plain, 50, progress=False)
    n = int((abs(x0) + 1) ** 2)  # the first n steps add up to 2 sqrt(n) - 2 at least: all the way, and as much back
    algo = BOREP(cosh_problem(), tensor([x0]), tensor([x0]), step=Power(1.0, -0.5), momentum=0.5)
    history = minimize(algo, n, progress=False)
    assert abs(float(algo.x)) < 1 < abs(x0) and history.upper.isfinite().all()


def test_at_rest_it_stays():
    algo = BOREP(cosh_problem(), tensor([0.0]), tensor([0.0]))
    for _ in range(3):
        stats = algo.step()
    assert float(algo.x) == 0 and stats.stationarity == 0


def test_projected():
    """min (x - 3)^2 over x <= 1 with y = x: x = 1, where the step is projected to nothing."""
    problem = Bilevel(
        lambda x, y, b: (y - 3).square().sum(), lambda x, y, b: (y - x).square().sum() / 2,
        project_upper=lambda x: x.clamp(max=1),
    )  # fmt: skip
    algo = BOREP(problem, tensor([-1.0]), tensor([0.0]))
    stats = [algo.step() for _ in range(200)][-1]
    assert float(algo.x) == 1 and stats.stationarity == 0


def test_resumed_anywhere_it_is_the_same_run_to_the_last_bit():
    p = Q.problem()
    noisy = Bilevel(
        lambda x, y, b: p.upper(x, y, None) + 0.1 * (y * b).sum(),
        lambda x, y, b: p.lower(x, y, None) + 0.1 * (y * b).sum() * x.sum(),
    )
    batches = [start(50 + k, 4, 4) for k in range(7)]
    whole = BOREP(noisy, *start(0, 3, 4))
    wanted = [whole.step(*pair) for pair in batches]
    for stop in range(7):
        first, second, file = BOREP(noisy, *start(0, 3, 4)), BOREP(noisy, *start(9, 3, 4)), io.BytesIO()
        for pair in batches[:stop]:
            first.step(*pair)
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        for k in range(stop, 7):
            assert second.step(*batches[k]) == wanted[k]
        assert all(torch.equal(value, second.state[key]) for key, value in whole.state.items())
        assert second.counts == whole.counts


def test_bad_input_is_named():
    p, (x, y) = Q.problem(), start(0, 3, 4)
    for name, value in (("momentum", 1.0), ("period", 0), ("inner_steps", 0), ("epochs", -1), ("step", "long")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            BOREP(p, x, y, **{name: value})
    with pytest.raises(ValueError, match="constraint: expected None for BOREP"):
        BOREP(Q.problem(constraint=lambda x, y: y, equality=True), x, y)


def test_nan_in_a_batch_is_refused_and_leaves_no_trace():
    p = Bilevel(lambda x, y, b: Q.problem().upper(x, y, None) * b, lambda x, y, b: Q.problem().lower(x, y, None) * b)
    algo, twin = (BOREP(p, *start(0, 3, 4)) for _ in range(2))
    one, nan = torch.ones((), dtype=torch.float64), torch.tensor(torch.nan, dtype=torch.float64)
    for batches, name in (((nan, one), "adjoint"), ((one, nan), "lower gradient in y")):
        for _ in range(2):
            with pytest.raises(ValueError, match=f"{name}: expected finite numbers"):
                algo.step(*batches)
        assert algo.step(one, one) == twin.step(one, one)
        assert all(torch.equal(value, twin.state[key]) for key, value in algo.state.items())
