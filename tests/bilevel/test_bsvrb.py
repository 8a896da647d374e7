"""BSVRB: the estimators, one update by hand, its stationary error from the exact second moment.

Oracles, written down before the code:

- **MSVR**. With e = h - g(w_old), D = g(w) - g(w_old), p = I / m: a sampled block is off by (1 - a) e + c D,
  c = gamma - (1 - a), after the step, another by e - D. Mean square: [p (1 - a)^2 + 1 - p] |e|^2
  + [p c^2 + 1 - p] |D|^2 + 2 <e, D> [p (1 - a) c - (1 - p)], whose last bracket is zero for c = (1 - p) / (p (1 - a))
  alone. Evaluated over all samples of the blocks, without Monte Carlo;
- **noise of batches** n with g(w; b) = g(w) + n(b) cancels in D: at rest h = (1 - a) h + a n, of variance
  a / (2 - a) var n;
- T4 per block, f_i = y'H_i y / 2 - y'B_i x, F_i = |A_i y - t_i|^2 / 2 + rho |x|^2 / 2, S_i = A_i H_i^{-1} B_i: the
  optimum solves (mean S_i'S_i + rho) x = mean S_i't_i;
- **all blocks**: every estimator is exact, so it is SOBA on the sum of the lower and the mean of the upper objectives
  (with q = v / m), and converges linearly: by the norm of a power of the matrix below, times where it was;
- **some blocks**: an update is affine in s = (all that is carried along, 1), s+ = M_I s, with a matrix for every sample
  I of the blocks (the update below, by hand, applied to unit vectors). So E ss' obeys a linear recursion, whose fixed
  point is found: the stationary E|x - x*|^2, to many digits. It exists if the recursion is stable, and a run has to be
  at that distance: at 4 times its root at most at the end (Chebyshev: but for one run in 16 at worst), and the mean of
  450 squares of three runs within a factor of 4, if the memory of a run, 1 / (1 - |second eigenvalue| of E M), is at
  most 40 steps: they are then worth 11 independent ones of two components, known to sqrt(2 / 22) = 0.3.
"""

from __future__ import annotations

import io
from itertools import combinations

import numpy as np
import pytest
import torch

from difflayers.bilevel import BSVRB, SOBA, Bilevel, Power
from difflayers.bilevel._bsvrb import msvr
from tests.bilevel.method_toys import STARTS, Quadratic, start, tensor

N, D, M = 2, 2, 3


def blocks(seed=0, m=M):
    parts = [Quadratic.random(seed + i, N, D) for i in range(m)]
    t = np.random.default_rng(seed).normal(size=(m, D))
    for part, shift in zip(parts, t, strict=True):
        part.t = shift
    return parts


PARTS = blocks()


def optimum(parts):
    S = [p.A @ np.linalg.solve(p.H, p.B) for p in parts]
    n = parts[0].B.shape[1]
    lhs = sum(s.T @ s for s in S) / len(parts) + parts[0].rho * np.eye(n)
    x = np.linalg.solve(lhs, sum(s.T @ p.t for s, p in zip(S, parts, strict=True)) / len(parts))
    return x, np.stack([np.linalg.solve(p.H, p.B @ x) for p in parts])


def problem(parts, **options):
    """Batches are the matrices of the blocks that a step sees (and noise), so nothing is captured but rho."""
    rho = parts[0].rho

    def upper(x, y, b):
        r = (b["A"] @ y.unsqueeze(-1)).squeeze(-1) - b["t"]
        return 0.5 * r.square().sum(-1) + 0.5 * rho * x.square().sum()

    def lower(x, y, b):
        return (y * ((b["H"] @ y.unsqueeze(-1)).squeeze(-1) / 2 - b["B"] @ x)).sum(-1)

    return Bilevel(upper, lower, blocks=len(parts), **options)


def batch(parts, index, noise=None):
    found = {name: tensor(np.stack([getattr(parts[i], name) for i in index])) for name in "HBAt"}
    if noise is not None:
        found["t"] = found["t"] + tensor(noise)
    return found


def directions(p, x, y, v, noise=0.0):
    return p.H @ y - p.B @ x, p.H @ v - p.A.T @ (p.A @ y - p.t - noise), p.rho * x + p.B.T @ v


def by_hand(parts, s, index, options, k, noise=None):
    """One update of the dict of arrays `s`; `noise` by block."""
    m, size = len(parts), len(index)
    eta, tau, tau_v, a, b = (options[key](k) for key in ("step", "step_lower", "step_adjoint", "rate", "rate_upper"))
    gamma = (m - size) / (size * (1 - a)) + 1 - a
    new = {key: value.copy() for key, value in s.items()}
    z_now, z_last = np.zeros(len(s["x"])), np.zeros(len(s["x"]))
    for i in index:
        shift = 0.0 if noise is None else noise[i]
        g, r, d = directions(parts[i], s["x"], s["y"][i], s["v"][i], shift)
        g0, r0, d0 = directions(parts[i], s["x_last"], s["y_last"][i], s["v_last"][i], shift)
        z_now, z_last = z_now + d / size, z_last + d0 / size
        if s["visited"][i]:
            new["h"][i] = (1 - a) * s["h"][i] + a * g + gamma * (g - g0)
            new["u"][i] = (1 - a) * s["u"][i] + a * r + gamma * (r - r0)
        else:
            new["h"][i], new["u"][i], new["visited"][i] = g, r, 1
        new["y"][i] = s["y"][i] - tau * new["h"][i]
        new["v"][i] = s["v"][i] - tau_v * new["u"][i]
    new["z"] = z_now if k == 0 else (1 - b) * (s["z"] - z_last) + z_now
    new["x"] = s["x"] - eta * new["z"]
    new["x_last"], new["y_last"], new["v_last"] = s["x"], s["y"], s["v"]
    return new


CONSTANT = {"step": 0.1, "step_lower": 0.25, "step_adjoint": 0.25, "rate": 0.3, "rate_upper": 0.2}


def schedules(**options):
    return {key: value if callable(value) else lambda k, value=value: value for key, value in options.items()}


def test_updates_are_those_written_by_hand():
    options = schedules(
        step=Power(0.2, -0.5), step_lower=Power(0.3, -0.2), step_adjoint=0.25, rate=Power(0.4, -0.1), rate_upper=0.3
    )
    x, y = start(0, N)[0], tensor(np.random.default_rng(3).normal(size=(M, D)))
    algo = BSVRB(problem(PARTS), x, y, **options)
    s = {key: value.numpy().copy() for key, value in algo.state.items()}
    r = np.random.default_rng(1)
    for k, index in enumerate(([1], [0, 1], [1, 0], [0], [2, 0], [0, 1, 2], [2])):
        noise, before = r.normal(size=(M, D)), {key: value.clone() for key, value in algo.state.items()}
        s = by_hand(PARTS, s, index, options, k, noise)
        data = batch(PARTS, index, noise[index])
        stats = algo.step(data, data, blocks=index)
        for key, value in s.items():
            np.testing.assert_allclose(
                algo.state[key], value.reshape(algo.state[key].shape), rtol=1e-11, atol=1e-12, err_msg=f"{key} {k}"
            )
        for i in set(range(M)) - set(index):
            for key in ("y", "v", "h", "u", "visited"):
                assert torch.equal(algo.state[key][i], before[key][i])
        calls = 2 if k == 0 else 4 * k + 2
        assert (stats.gradients, stats.products) == (calls, calls)
    assert torch.equal(x, start(0, N)[0]) and algo.y.shape == (M, D) and algo.adjoint.shape == (M, D)


@pytest.mark.parametrize("m, size", [(3, 1), (5, 2), (4, 3), (3, 3)])
@pytest.mark.parametrize("a", [0.1, 0.7])
def test_msvr_has_the_mean_square_without_the_product(m, size, a):
    r = np.random.default_rng(0)
    old, new, h = r.normal(size=(3, m, 4))
    samples = list(combinations(range(m), size))
    square = np.zeros(m)
    for index in samples:
        after = h.copy()
        rows = list(index)
        after[rows] = msvr(tensor(h[rows]), tensor(new[rows]), tensor(old[rows]), a, size / m).numpy()
        square += ((after - new) ** 2).sum(1) / len(samples)
    e, change, p = ((h - old) ** 2).sum(1), ((new - old) ** 2).sum(1), size / m
    c = (1 - p) / (p * (1 - a))
    wanted = (p * (1 - a) ** 2 + 1 - p) * e + (p * c**2 + 1 - p) * change
    np.testing.assert_allclose(square, wanted, rtol=1e-12)


def test_noise_of_batches_is_reduced_as_much_as_its_rate_says():
    """4000 blocks at rest, lower f_i = y^2 / 2 - y b: h has variance a / (2 - a), known to sqrt(2 / 4000) = 2 %."""
    m, a = 4000, 0.2
    algo = BSVRB(
        Bilevel(lambda x, y, b: y.square(), lambda x, y, b: y.square() / 2 - y * b + 0 * x, blocks=m),
        tensor(0.0), tensor(np.zeros(m)), rate=a, step=1e-12, step_lower=1e-12, step_adjoint=1e-12,
    )  # fmt: skip
    r = np.random.default_rng(0)
    for _ in range(60):  # 0.8^60 of the start is left
        algo.step(None, tensor(r.normal(size=m)))
    assert float(algo.state["h"].var()) == pytest.approx(a / (2 - a), rel=4 * (2 / m) ** 0.5)


def test_unsampled_blocks_and_what_is_not_at_hand():
    """Blocks that no step ever saw are as they came."""
    x, y = start(1, N)[0], tensor(np.random.default_rng(3).normal(size=(M, D)))
    algo = BSVRB(problem(PARTS), x, y, **CONSTANT)
    for k in range(5):
        data = batch(PARTS, [k % 2])
        algo.step(data, data, blocks=[k % 2])
    assert torch.equal(algo.y[2], y[2]) and algo.adjoint[2].abs().max() == 0
    assert not torch.equal(algo.y[:2], y[:2])


@pytest.mark.parametrize("seed", STARTS)
def test_with_all_blocks_it_is_soba_and_converges(seed):
    x, y = start(seed, N)[0], tensor(np.random.default_rng(seed).normal(size=(M, D)))
    data = batch(PARTS, range(M))
    p = problem(PARTS)
    options = {**CONSTANT, "step_lower": 0.6, "step_adjoint": 0.6}
    algo = BSVRB(p, x, y, **options)
    soba = SOBA(
        Bilevel(lambda x, y, b: p.upper(x, y, b).mean(), lambda x, y, b: p.lower(x, y, b).sum()), x, y,
        step=0.1, step_lower=0.6,
    )  # fmt: skip
    for _ in range(20):
        algo.step(data, data)
        soba.step(data, data)
    np.testing.assert_allclose(algo.x, soba.x, rtol=1e-10)
    np.testing.assert_allclose(algo.y, soba.y, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(algo.adjoint, M * soba.adjoint, rtol=1e-10, atol=1e-12)
    origin, ((matrix, shift),) = maps(PARTS, M, options)
    np.testing.assert_allclose(shift, 0, atol=1e-12)

    def error():
        return np.linalg.norm(np.concatenate([algo.state[key].numpy().reshape(-1) for key in KEYS]) - origin)

    allowed = np.linalg.norm(np.linalg.matrix_power(matrix, 200), 2) * error()
    for _ in range(200):
        algo.step(data, data)
    assert error() <= allowed < 1e-3 * np.linalg.norm(origin)


KEYS = ("x", "y", "v", "h", "u", "z", "x_last", "y_last", "v_last")


def maps(parts, size, options):
    """The rest (x, y, v, h = 0, ...) as a vector, and the affine map of what is beside it for every sample."""
    m, d = len(parts[0].H), len(parts)
    shapes = {key: (N,) if key[0] in "xz" else (d, m) for key in KEYS}
    x, y = optimum(parts)
    v = np.stack([np.linalg.solve(p.H, p.A.T @ (p.A @ w - p.t)) for p, w in zip(parts, y, strict=True)])
    rest = {key: np.zeros(shape) for key, shape in shapes.items()}
    rest.update(x=x, y=y, v=v, x_last=x, y_last=y, v_last=v)
    origin = np.concatenate([rest[key].reshape(-1) for key in KEYS])

    def apply(vector, index):
        s, at = {"visited": np.ones(d)}, 0
        for key, shape in shapes.items():
            s[key] = (origin + vector)[at : at + np.prod(shape)].reshape(shape)
            at += int(np.prod(shape))
        new = by_hand(parts, s, index, schedules(**options), 1)
        return np.concatenate([new[key].reshape(-1) for key in KEYS]) - origin

    n, found = len(origin), []
    for index in combinations(range(d), size):
        shift = apply(np.zeros(n), index)
        found.append((np.stack([apply(e, index) - shift for e in np.eye(n)], axis=1), shift))
    return origin, found


def second_moment(parts, size, options):
    """Stationary E|x - x*|^2 of samples of `size` blocks, and the longest memory in steps."""
    origin, found = maps(parts, size, options)
    n = len(origin)
    mean_map, mean_shift = (sum(part) / len(found) for part in zip(*found, strict=True))
    mean = np.linalg.solve(np.eye(n) - mean_map, mean_shift)
    C = np.zeros((n, n))
    for _ in range(100000):
        new = sum(
            A @ C @ A.T + np.outer(A @ mean, b) + np.outer(b, A @ mean) + np.outer(b, b) for A, b in found
        ) / len(found)  # fmt: skip
        done = np.abs(new - C).max() < 1e-10 * np.abs(new).max()
        C = new
        if done:
            break
    assert done, "the recursion is not stable"
    return np.trace(C[:N, :N]), 1 / (1 - np.abs(np.linalg.eigvals(mean_map)).max())


@pytest.mark.parametrize("size", [1, 2])
def test_distance_from_the_optimum_is_that_of_the_second_moment(size):
    expected, memory = second_moment(PARTS, size, CONSTANT)
    assert memory < 40
    x_best, _ = optimum(PARTS)
    data, squares = {index: batch(PARTS, index) for index in combinations(range(M), size)}, []
    for seed in STARTS:
        r = np.random.default_rng(seed)
        algo = BSVRB(problem(PARTS), start(seed, N)[0], tensor(r.normal(size=(M, D))), **CONSTANT)
        for k in range(350):
            index = tuple(sorted(r.choice(M, size, replace=False)))
            algo.step(data[index], data[index], blocks=index)
            if k >= 200:
                squares.append(np.sum((algo.x.numpy() - x_best) ** 2))
        assert squares[-1] <= 16 * expected
    assert 1 / 4 <= np.mean(squares) / expected <= 4


def test_resumed_anywhere_it_is_the_same_run_to_the_last_bit():
    r = np.random.default_rng(0)
    runs = [(list(r.permutation(M)[: 1 + k % 2]), r.normal(size=(M, D))) for k in range(7)]

    def take(algo, k):
        index, noise = runs[k]
        data = batch(PARTS, index, noise[index])
        return algo.step(data, data, blocks=index)

    def make(seed):
        y = np.random.default_rng(seed).normal(size=(M, D))
        return BSVRB(problem(PARTS), start(seed, N)[0], (tensor(y[:, :1]), tensor(y[:, 1:])), **CONSTANT)

    def make_tree(seed):
        algo = make(seed)
        p = problem(PARTS)
        tree = Bilevel(
            lambda x, y, b: p.upper(x, torch.cat(y, -1), b), lambda x, y, b: p.lower(x, torch.cat(y, -1), b), blocks=M
        )
        return BSVRB(tree, algo.x, algo.y, **CONSTANT)

    whole = make_tree(0)
    wanted = [take(whole, k) for k in range(7)]
    for stop in range(7):
        first, second, file = make_tree(0), make_tree(9), io.BytesIO()
        for k in range(stop):
            take(first, k)
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        for k in range(stop, 7):
            assert take(second, k) == wanted[k]
        assert all(torch.equal(value, second.state[key]) for key, value in whole.state.items())
        assert second.counts == whole.counts
    assert whole.y[0].shape == (M, 1)


def test_ball_of_the_adjoint():
    data = batch(PARTS, range(M))
    algo = BSVRB(problem(PARTS), *(start(0, N)[0], tensor(np.ones((M, D)))), radius=0.05, step_adjoint=0.5)
    algo.step(data, data)
    np.testing.assert_allclose(algo.adjoint.norm(dim=-1), 0.05, rtol=1e-12)


def test_bad_input_is_named():
    p, x, y = problem(PARTS), start(0, N)[0], tensor(np.ones((M, D)))
    for name in ("rate", "rate_upper"):
        for value in (0.0, 1.0):
            with pytest.raises(ValueError, match=f"{name}: expected a number in \\(0, 1\\)"):
                BSVRB(p, x, y, **{name: value})
    with pytest.raises(ValueError, match="radius: expected"):
        BSVRB(p, x, y, radius=0.0)
    with pytest.raises(ValueError, match="blocks: expected a number of blocks for BSVRB, got None"):
        BSVRB(Bilevel(p.upper, p.lower), x, y)
    with pytest.raises(ValueError, match=r"y: expected shape \(3, \.\.\.\)"):
        BSVRB(p, x, y[:2])
    algo = BSVRB(p, x, y)
    for index in ([0, 0], [3], [0.5]):
        with pytest.raises(ValueError, match="blocks: expected"):
            algo.step(batch(PARTS, [0]), batch(PARTS, [0]), blocks=index)


@pytest.mark.parametrize(("level", "name"), [(0, "adjoint direction"), (1, "lower gradient in y")])
def test_nan_in_a_batch_is_refused_and_leaves_no_trace(level, name):
    algo, twin = (BSVRB(problem(PARTS), start(0, N)[0], tensor(np.ones((M, D)))) for _ in range(2))
    index = [0, 2]
    good = [batch(PARTS, index), batch(PARTS, index)]
    for _ in range(2):
        bad = list(good)
        bad[level] = {key: t * torch.nan if t.is_floating_point() else t for key, t in good[level].items()}
        with pytest.raises(ValueError, match=f"{name}: expected finite numbers"):
            algo.step(*bad, blocks=index)
        assert algo.step(*good, blocks=index) == twin.step(*good, blocks=index)
    assert all(torch.equal(value, twin.state[key]) for key, value in algo.state.items())
