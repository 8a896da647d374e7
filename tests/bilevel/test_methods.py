"""The interface of the single-loop methods: one update written out by hand in numpy, resume, structure, refusals.

Oracles: the formulas of the papers in numpy with gradients by hand (method_toys.Quadratic), schedules that change from
step to step, so that an exponent that is not used would show.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import nn

from difflayers.bilevel import (
    BOME,
    F2SA,
    GPBGD,
    MEHA,
    VPBGD,
    Bilevel,
    Linear,
    PenaltyMethod,
    Power,
    minimize,
)
from tests.bilevel.method_toys import Quadratic, start, tensor

METHODS = [F2SA, PenaltyMethod, VPBGD, GPBGD, BOME, MEHA]
Q = Quadratic.random(3)
F, G = "upper", "lower"


def one_by_hand(name, q, s, k):
    """One update of the variables in the dict `s`, from the update table of the papers."""
    x, y = s["x"], s["y"]
    if name in ("F2SA", "PenaltyMethod"):
        z = s["z"]
        if name == "F2SA":
            alpha, gamma = 0.2 * (k + 1) ** -0.5, 0.4 * (k + 2) ** -0.1
            lam, x_step = gamma / (2 * alpha), 0.7 * alpha
        else:
            sigma, gamma = 0.8 * (k + 1) ** -0.3, 0.4 * (k + 2) ** -0.1
            lam, alpha, x_step = 1 / sigma, gamma * sigma, 0.15 * (k + 1) ** -0.2
        for _ in range(2):
            z = z - gamma * q.lower_y(x, z)
            y = y - alpha * (q.upper_y(x, y) + lam * q.lower_y(x, y))
        x = x - x_step * (q.upper_x(x, y) + lam * (q.lower_x(x, y) - q.lower_x(x, z)))
        return {"x": x, "y": y, "z": z}
    if name == "VPBGD":
        omega, gamma = s["omega"], 0.5 + 0.5 * k
        for _ in range(2):
            omega = omega - 0.3 * q.lower_y(x, omega)
        step = 0.1 * min(1 / gamma, 1)
        in_x = q.upper_x(x, y) + gamma * (q.lower_x(x, y) - q.lower_x(x, omega))
        in_y = q.upper_y(x, y) + gamma * q.lower_y(x, y)
        return {"x": x - 0.6 * step * in_x, "y": y - step * in_y, "omega": omega}
    if name == "GPBGD":
        gamma, r = 0.5 + 0.5 * k, q.lower_y(x, y)
        step = 0.1 * min(1 / gamma, 1)
        in_x, in_y = q.upper_x(x, y) - 2 * gamma * q.B.T @ r, q.upper_y(x, y) + 2 * gamma * q.H @ r
        return {"x": x - 0.8 * step * in_x, "y": y - step * in_y}
    if name == "BOME":
        y_hat = y
        for _ in range(3):
            y_hat = y_hat - 0.4 * q.lower_y(x, y_hat)
        root = 0.7**0.5  # in the variable x / root, whose gradients are root times as large
        grad = np.concatenate([root * q.upper_x(x, y), q.upper_y(x, y)])
        rest = np.concatenate([root * (q.lower_x(x, y) - q.lower_x(x, y_hat)), q.lower_y(x, y)])
        lam = max(0.0, (0.3 * rest @ rest - grad @ rest) / (rest @ rest))
        xy = np.concatenate([x / root, y]) - 0.1 * (k + 1) ** -0.5 * (grad + lam * rest)
        return {"x": root * xy[: x.size], "y": xy[x.size :]}
    theta, c, gamma = s["theta"], 2 * (k + 1) ** 0.4, 1.5
    theta = theta - 0.2 * (q.lower_y(x, theta) + (theta - y) / gamma)
    x = x - 0.3 * (q.upper_x(x, y) / c + q.lower_x(x, y) - q.lower_x(x, theta))
    y = y - 0.25 * (q.upper_y(x, y) / c + q.lower_y(x, y) - (y - theta) / gamma)
    return {"x": x, "y": y, "theta": theta}


BY_HAND = {
    F2SA: {"step": Power(0.2, -0.5), "step_lower": Power(0.4, -0.1, 2.0), "ratio": 0.7, "inner_steps": 2},
    PenaltyMethod: {
        "weight": Power(0.8, -0.3), "step": Power(0.15, -0.2), "step_lower": Power(0.4, -0.1, 2.0), "inner_steps": 2
    },
    VPBGD: {"penalty": Linear(0.5, 50.5, 100), "step": 0.1, "step_lower": 0.3, "ratio": 0.6, "inner_steps": 2},
    GPBGD: {"penalty": Linear(0.5, 50.5, 100), "step": 0.1, "ratio": 0.8},
    BOME: {"step": Power(0.1, -0.5), "step_lower": 0.4, "inner_steps": 3, "control": 0.3, "ratio": 0.7},
    MEHA: {"step": 0.3, "step_lower": 0.25, "step_theta": 0.2, "proximal": 1.5, "penalty": Power(2.0, 0.4)},
}  # fmt: skip
GRADIENTS = {F2SA: 3 + 6, PenaltyMethod: 3 + 6, VPBGD: 2 + 3, GPBGD: 2, BOME: 1 + 4, MEHA: 2 + 4}


@pytest.mark.parametrize("method", METHODS)
def test_updates_are_those_written_by_hand(method):
    x, y = start(0, 3, 4)
    algo = method(Q.problem(), x, y, **BY_HAND[method])
    s = {name: value.numpy() for name, value in algo.state.items()}
    for k in range(4):
        before = s
        s = one_by_hand(method.__name__, Q, s, k)
        stats = algo.step()
        assert set(s) == set(algo.state)
        for name, value in s.items():
            np.testing.assert_allclose(algo.state[name], value, rtol=1e-12, atol=1e-13, err_msg=name)
        at = s["y"] if "z" in s else before["y"]
        np.testing.assert_allclose(stats.upper, Q.upper_value(before["x"], at), rtol=1e-12)
        np.testing.assert_allclose(stats.lower, Q.lower_value(before["x"], at), rtol=1e-12)
        assert stats.gradients == GRADIENTS[method] * (k + 1)
        assert stats.products == (2 * (k + 1) if method is GPBGD else 0)
    np.testing.assert_array_equal(algo.x, algo.state["x"])
    assert torch.equal(x, start(0, 3, 4)[0]) and torch.equal(y, start(0, 3, 4)[1])  # ours are copies


def test_momentum_is_storm_written_by_hand():
    """m_t = g_t(w_t) + (1 - a)(m_{t-1} - g_t(w_{t-1})) with the sample of step t in both."""
    noise = [np.random.default_rng(k).normal(size=4) for k in range(4)]
    problem = Q.problem()
    noisy = Bilevel(
        lambda x, y, b: problem.upper(x, y, None) + 0.1 * (y * b).sum() * x.sum(),
        lambda x, y, b: problem.lower(x, y, None) - 0.2 * (y * b).sum() * x.sum(),
    )
    algo = F2SA(noisy, *start(1, 3, 4), step=0.1, step_lower=0.3, multiplier=2.0, momentum=Power(0.5, -1.0))
    x, y, z = (algo.state[name].numpy() for name in "xyz")
    last = {}
    for k, b in enumerate(noise):
        a = 0.5 / (k + 1)

        def lower_y(x, y, b=b):
            return Q.lower_y(x, y) - 0.2 * b * x.sum()

        def penalised_y(x, y, b=b):
            return Q.upper_y(x, y) + 0.1 * b * x.sum() + 2.0 * (Q.lower_y(x, y) - 0.2 * b * x.sum())

        def penalised_x(x, y, z, b=b):
            upper = Q.upper_x(x, y) + 0.1 * (y @ b)
            return upper + 2.0 * (Q.lower_x(x, y) - 0.2 * (y @ b) - Q.lower_x(x, z) + 0.2 * (z @ b))

        def storm(name, f, *w, k=k, a=a):
            m = f(*w) if k == 0 else f(*w) + (1 - a) * (last[name][0] - f(*last[name][1]))
            last[name] = (m, w)
            return m

        z = z - 0.3 * storm("z", lower_y, x, z)
        y = y - 0.1 * storm("y", penalised_y, x, y)
        x = x - 0.1 * storm("x", penalised_x, x, y, z)
        algo.step(tensor(b), tensor(b))
        for name, value in (("x", x), ("y", y), ("z", z)):
            np.testing.assert_allclose(algo.state[name], value, rtol=1e-12, atol=1e-13)


def noisy_problem():
    p = Q.problem()
    return Bilevel(
        lambda x, y, b: p.upper(x, y, None) + 0.1 * (y * b).sum(),
        lambda x, y, b: p.lower(x, y, None) + 0.1 * (y * b).sum() * x.sum(),
    )


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_resumed_anywhere_it_is_the_same_run_to_the_last_bit(method, momentum):
    options = dict(BY_HAND[method])
    if momentum:
        if method not in (F2SA, PenaltyMethod):
            return
        options.update(momentum=0.3, inner_steps=1)
    batches = [start(50 + k, 4, 4) for k in range(7)]
    whole = method(noisy_problem(), *start(0, 3, 4), **options)
    wanted = [whole.step(*pair) for pair in batches]
    for stop in range(7):
        first = method(noisy_problem(), *start(0, 3, 4), **options)
        for pair in batches[:stop]:
            first.step(*pair)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = method(noisy_problem(), *start(9, 3, 4), **options)
        second.load_state_dict(torch.load(file, weights_only=True))
        for k in range(stop, 7):
            assert second.step(*batches[k]) == wanted[k]
        assert all(torch.equal(value, second.state[name]) for name, value in whole.state.items())
        assert second.counts == whole.counts


class Weights(nn.Module):
    def __init__(self, *values):
        super().__init__()
        self.first, self.rest = (nn.Parameter(v) for v in (values[0][:1].clone(), values[0][1:].clone()))

    def forward(self):
        return torch.cat([self.first, self.rest])


@pytest.mark.parametrize("method", METHODS)
def test_modules_and_pytrees_run_as_tensors_do(method):
    p, (x, y) = Q.problem(), start(0, 3, 4)
    plain = method(p, x, y, **BY_HAND[method])
    x_module, y_module = Weights(x), Weights(y)
    modules = method(
        Bilevel(lambda x, y, b: p.upper(x(), y(), b), lambda x, y, b: p.lower(x(), y(), b)),
        x_module, y_module, **BY_HAND[method],
    )  # fmt: skip
    trees = method(
        Bilevel(
            lambda x, y, b: p.upper(x["x"], torch.cat(y), b), lambda x, y, b: p.lower(x["x"], torch.cat(y), b)
        ),
        {"x": x}, (y[:1], y[1:]), **BY_HAND[method],
    )  # fmt: skip
    for _ in range(3):
        a, b, c = plain.step(), modules.step(), trees.step()
        assert abs(a.upper - b.upper) < 1e-12 and abs(a.upper - c.upper) < 1e-12
    assert modules.x is x_module and modules.y is y_module
    np.testing.assert_allclose(x_module().detach(), plain.x, rtol=1e-12)
    np.testing.assert_allclose(y_module().detach(), plain.y, rtol=1e-12)
    np.testing.assert_allclose(trees.x["x"], plain.x, rtol=1e-12)
    np.testing.assert_allclose(torch.cat(trees.y), plain.y, rtol=1e-12)
    assert x_module.first.grad is None and not any(value.requires_grad for value in modules.state.values())
    with torch.no_grad():
        x_module.first.fill_(5.0)  # whoever changes a parameter between two steps is heard
    modules.step()
    assert abs(float(x_module.first.detach()) - 5) < 3


def test_module_of_the_upper_level_with_a_prox_that_reads_it():
    """g = |x| |y|_1 with x in a module: the prox of y has to see the x after its step."""
    module = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight.fill_(0.5)

    def shrink(v, x, step):
        return v.sign() * (v.abs() - step * x.weight.abs().sum()).clamp_min(0)

    problem = Bilevel(
        lambda x, y, b: y.sum() ** 2 / 2 + x.weight.square().sum(),
        lambda x, y, b: (y - 2).square().sum() / 2,
        prox_lower=shrink,
    )
    algo = MEHA(
        problem, module, tensor([1.0]), step=0.1, step_lower=0.2, step_theta=0.3, proximal=2.0, penalty=4.0,
        nonsmooth=lambda x, y: x.weight.abs().sum() * y.abs().sum(),
    )  # fmt: skip
    algo.step()
    x, y = 0.5, 1.0
    theta = 1.0 - 0.3 * (1.0 - 2)
    theta = max(theta - 0.3 * x, 0)
    x = x - 0.1 * (2 * x / 4 + y - theta)
    y = y - 0.2 * (y / 4 + (y - 2) - (y - theta) / 2)
    y = max(y - 0.2 * x, 0)
    np.testing.assert_allclose(algo.state["theta"], [theta])
    np.testing.assert_allclose(module.weight.detach(), [[x]])
    np.testing.assert_allclose(algo.y, [y])


@pytest.mark.parametrize("method", METHODS)
def test_dtype_projection_and_no_gradient_mode(method):
    x, y = (t.float() for t in start(0, 3, 4))

    def upper(x, y, batch):
        return (y - 1).square().sum() + x.square().sum()

    def lower(x, y, batch):
        return (y[:3] - x).square().sum() + y[3] ** 2

    algo = method(Bilevel(upper, lower, project_upper=lambda x: x.clamp(-0.1, 0.1)), x, y)
    with torch.no_grad():
        stats = [algo.step() for _ in range(3)][-1]
    assert all(value.dtype == torch.float32 for value in algo.state.values())
    assert stats.stationarity.dtype == torch.float32 and stats.upper.shape == ()
    assert algo.x.abs().max() <= 0.1
    assert (stats.upper.requires_grad, algo.x.requires_grad) == (False, False)


def test_bome_without_a_lower_gradient_takes_no_multiplier():
    algo = BOME(Bilevel(lambda x, y, b: (x - y).square(), lambda x, y, b: 0 * y + 0 * x), tensor(1.0), tensor(3.0))
    algo.step()
    assert float(algo.x) == pytest.approx(1 + 0.05 * 4) and float(algo.y) == pytest.approx(3 - 0.05 * 4)


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_is_named(method):
    p, (x, y) = Q.problem(), start(0, 3, 4)
    name = method.__name__
    with pytest.raises(ValueError, match="problem: expected a Bilevel"):
        method(p.upper, x, y)
    with pytest.raises(ValueError, match=f"constraint: expected None for {name}"):
        method(Q.problem(constraint=lambda x, y: y), x, y)
    with pytest.raises(ValueError, match="y: expected dtype"):
        method(p, x, y.float())
    with pytest.raises(ValueError, match="project_upper: expected a callable"):
        Q.problem(project_upper=3)
    with pytest.raises(ValueError, match="step: expected a number or a schedule"):
        method(p, x, y, step="fast")
    with pytest.raises(ValueError, match="project_upper output: expected shape"):
        method(Q.problem(project_upper=lambda x: x[:1]), x, y).step()
    with pytest.raises(ValueError, match="lower output: expected shape"):
        method(Bilevel(p.upper, lambda x, y, b: y), x, y).step()
    w = tensor(1.0).requires_grad_()
    with pytest.raises(ValueError, match="lower"):
        method(Bilevel(p.upper, lambda x, y, b: w * y.square().sum()), x, y).step()
    if method not in (PenaltyMethod, VPBGD, MEHA):
        with pytest.raises(ValueError, match="prox_lower: expected None"):
            method(Q.problem(prox_lower=lambda v, x, step: v), x, y)
    algo = method(p, x, y)
    with pytest.raises(ValueError, match=f"state_dict: expected the state of {name}"):
        algo.load_state_dict({**algo.state_dict(), "method": "SGD"})
    with pytest.raises(ValueError, match="state_dict\\['x'\\]: expected shape"):
        algo.load_state_dict(method(Bilevel(p.upper, p.lower), x[:2], y).state_dict())


def test_options_of_one_method_are_checked():
    p, (x, y) = Q.problem(), start(0, 3, 4)
    with pytest.raises(ValueError, match="inner_steps: expected 1 with momentum"):
        F2SA(p, x, y, momentum=0.1, inner_steps=2)
    with pytest.raises(ValueError, match="inner_steps: expected an integer"):
        BOME(p, x, y, inner_steps=0)
    for method in (F2SA, BOME, VPBGD, GPBGD):
        with pytest.raises(ValueError, match="ratio: expected"):
            method(p, x, y, ratio=0.0)
    with pytest.raises(ValueError, match="proximal: expected"):
        MEHA(p, x, y, proximal=0.0)
    with pytest.raises(ValueError, match="nonsmooth: expected None"):
        MEHA(p, x, y, nonsmooth=lambda x, y: y.sum())


def test_x_that_the_lower_problem_does_not_use():
    algo = F2SA(
        Bilevel(lambda x, y, b: (x - 3).square() + (y - 1).square(), lambda x, y, b: y.square()),
        tensor(0.0), tensor(1.0),
    )  # fmt: skip
    minimize(algo, 200, progress=False)
    assert float(algo.x) == pytest.approx(3.0, abs=1e-3)


def test_one_dropout_mask_in_one_step():
    """F2SA subtracts two gradients of f that have to see the same mask: with y = z their difference is zero."""
    torch.manual_seed(0)

    def lower(x, y, batch):
        return (nn.functional.dropout(y, 0.5) * x).sum()

    algo = PenaltyMethod(Bilevel(lambda x, y, b: 0 * y.sum(), lower), tensor(np.ones(50)), tensor(np.ones(50)))
    algo.step()
    assert torch.equal(algo.x, tensor(np.ones(50)))
    first = algo.y
    algo.step()
    assert not torch.equal(algo.y - first, first - 1)  # another mask in the next


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", ["upper", "lower"])
def test_interrupted_inside_a_step_it_is_as_if_it_had_not_begun(method, level):
    p = Q.problem()
    calls = {"left": 10**9}

    def stopping(function):
        def run(x, y, batch):
            calls["left"] -= 1
            if calls["left"] < 0:
                raise KeyboardInterrupt
            return function(x, y, batch)

        return run

    functions = {"upper": p.upper, "lower": p.lower}
    functions[level] = stopping(functions[level])
    algo = method(Bilevel(**functions), *start(0, 3, 4), **BY_HAND[method])
    twin = method(p, *start(0, 3, 4), **BY_HAND[method])
    wanted = [twin.step() for _ in range(4)]
    algo.step()
    for k, left in enumerate((0, 1, 2), start=1):
        calls["left"] = left
        try:
            algo.step()
        except KeyboardInterrupt:
            calls["left"] = 10**9
            assert algo.step() == wanted[k]
        calls["left"] = 10**9
