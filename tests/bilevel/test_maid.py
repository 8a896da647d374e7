r"""MAID: certified decrease, updates by hand, known optima, any start of its accuracies, resume, failures.

Oracles, written before the code: the true upper objective by closed form (T4) or by Newton to rounding (logistic
regression) in numpy; gradient descent with Armijo's rule in numpy, which MAID is where accuracies are tight; one
iteration of the scalar problem f = (y - x)^2 / 2, F = (y - 1)^2 / 2 on paper; the normal equations of T4 and BFGS on
the closed form of ridge regression for the optima.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.optimize import minimize as bfgs
from torch import nn

from difflayers import SolveError
from difflayers.bilevel import MAID, Bilevel, Smoothness, minimize
from difflayers.implicit import LBFGS
from difflayers.linalg import CG
from tests.bilevel.maid_toys import Logistic, quadratic_smoothness, quadratic_value
from tests.bilevel.method_toys import STARTS, Quadratic, start, tensor
from tests.bilevel.ridge import TV, XV, ridge, ridge_oracle

Q = Quadratic.random()
EXACT = {"epsilon": 1e-9, "delta": 1e-9, "relax": 1.0}


def run(algo, steps):
    stats = []
    while len(stats) < steps and (not stats or stats[-1].outcome == "moved"):
        stats.append(algo.step())
    return stats


# ----------------------------------------------------------------------------------------------------- by hand


def test_one_iteration_on_paper():
    """f = (y - x)^2 / 2, F = (y - 1)^2 / 2 from x = 0, y = 0.001; H = 1, J = -1, all constants known.

    y is 0.001 from its solution. The adjoint starts from 0, which will do while delta >= 0.999; then p = 0, and both
    accuracies are halved from 10 four times, to 0.625. Now q = y - 1 exactly, p = -0.999, and omega = L_F |J| / mu *
    0.001 = 0.001, which is the error. The linear model allows a decrease of 0.1 * 0.999 * 1 = 0.0999 where two slacks
    of 0.999 e + e^2 / 2, e = 0.001 and epsilon, twice, are to fit: epsilon <= 0.0479, so 0.625 / 16. The trial x+ =
    0.0999 has y+ within that, which decreases F for certain: by at least 0.0195.
    """
    problem = Bilevel(lambda x, y, b: (y - 1).square() / 2, lambda x, y, b: (y - x).square() / 2)
    known = Smoothness(strong_convexity=1.0, upper=1.0, upper_in_x=0.0, hessian=0.0, cross=0.0, cross_norm=1.0)
    algo = MAID(problem, tensor(0.0), tensor(0.001), smoothness=known, epsilon=10.0, delta=10.0)
    stats = algo.step()
    assert (stats.outcome, stats.trials, stats.length) == ("moved", 1, 0.1)
    assert (stats.epsilon, stats.delta) == (0.625 / 16, 0.625)
    assert stats.error == pytest.approx(0.001) and float(stats.infeasibility) == pytest.approx(0.001)
    assert float(stats.stationarity) == pytest.approx(0.999) and float(stats.upper) == pytest.approx(0.999**2 / 2)
    assert float(algo.x) == pytest.approx(0.0999) and abs(float(algo.y) - 0.0999) <= 0.625 / 16
    assert float(algo.adjoint) == pytest.approx(-0.999)
    assert algo.plain["epsilon"] == pytest.approx(1.05 * 0.625 / 16) and algo.plain["delta"] == 1.05 * 0.625
    assert algo.plain["step"] == pytest.approx(1 / 9)


@dataclass(frozen=True, kw_only=True)
class Short(LBFGS):
    """Its first trial ends 0.7 before the solution of (y - x)^2 / 2."""

    def start(self, function, z):
        state = super().start(function, z)
        return state._replace(t=1 - 0.7 / state.g.abs().squeeze(-1))


def test_a_decrease_that_is_not_certain_is_not_accepted():
    """The same from epsilon = 0.78 with step 2.2, whose x+ = 2.1978 is worse than x: 1.1978 from 1.

    A lower solution 0.7 short of it, y+ = 1.4978, makes F fall from 0.499 to 0.124; but F(y+) + 0.4978 * 0.7 + 0.49 / 2
    is (0.4978 + 0.7)^2 / 2 = 0.717. Half of the step is certain: x+ = 1.0989.
    """
    problem = Bilevel(lambda x, y, b: (y - 1).square() / 2, lambda x, y, b: (y - x).square() / 2)
    known = Smoothness(strong_convexity=1.0, upper=1.0, upper_in_x=0.0, hessian=0.0, cross=0.0, cross_norm=1.0)
    options = {"smoothness": known, "epsilon": 0.78, "delta": 0.5, "step": 2.2, "solver": Short()}
    algo = MAID(problem, tensor(0.0), tensor(0.001), **options)
    stats = algo.step()
    assert (stats.outcome, stats.trials, stats.length, stats.epsilon) == ("moved", 2, 1.1, 0.78)
    assert float(algo.x) == pytest.approx(1.0989)


@pytest.mark.parametrize("first", [0.1, 40.0])
def test_with_tight_accuracies_it_is_armijo_descent_written_by_hand(first):
    algo = MAID(Q.problem(), *start(0, 3, 4), step=first, smoothness=quadratic_smoothness(Q), decrease=9e-5, **EXACT)
    x, beta = start(0, 3, 4)[0].numpy(), first
    for _ in range(12):
        p, i = Q.hypergradient(x), 0
        while quadratic_value(Q, x - beta * 0.5**i * p) - quadratic_value(Q, x) > -9e-5 * beta * 0.5**i * (p @ p):
            i += 1
        x, beta = x - beta * 0.5**i * p, beta * 0.5**i
        stats = algo.step()
        assert (stats.outcome, stats.trials) == ("moved", i + 1)
        assert stats.length == pytest.approx(beta, rel=1e-12)
        np.testing.assert_allclose(stats.stationarity, np.linalg.norm(p), rtol=1e-6)
        np.testing.assert_allclose(algo.x, x, atol=1e-7)
        beta *= 10 / 9


def test_the_projected_step_takes_the_place_of_the_gradient():
    problem = Q.problem(project_upper=lambda x: x.clamp(-0.3, 0.3))
    algo = MAID(problem, *start(0, 3, 4), smoothness=quadratic_smoothness(Q), tol=1e-6)
    run(algo, 200)
    assert algo.step().outcome == "stationary"
    x = algo.x.numpy()
    for _ in range(2000):  # projected gradients in numpy, to rest
        x = np.clip(x - 0.2 * Q.hypergradient(x), -0.3, 0.3)
    np.testing.assert_allclose(algo.x, x, atol=1e-5)
    assert np.abs(x).max() == 0.3


# ------------------------------------------------------------------------------------------------ certificates


@pytest.mark.parametrize("seed", STARTS)
@pytest.mark.parametrize("accuracy", [1e-1, 1e2])
def test_every_accepted_step_decreases_the_true_objective(seed, accuracy):
    toy = Logistic(seed)
    x, y = start(seed, 5, 5, scale=0.5)
    algo = MAID(toy.problem(), x, y, smoothness=toy.smoothness(), epsilon=accuracy, delta=accuracy, step=10.0)
    value = toy.upper_value(toy.solution(algo.x.numpy()))
    for _ in range(15):
        before = algo.x.numpy()
        stats = algo.step()
        assert stats.outcome == "moved"
        exact, moved = toy.hypergradient(before), algo.x.numpy() - before
        p = -moved / stats.length
        assert np.linalg.norm(p - exact) <= stats.error * (1 + 1e-9)
        assert stats.error <= (1 - 1e-4) * np.linalg.norm(p) * (1 + 1e-12)
        new = toy.upper_value(toy.solution(algo.x.numpy()))
        assert new <= value - 1e-8 * stats.length * (p @ p)
        # y is as near as it says, and so is the value that comes with it: F is Lipschitz by the mean of |b_i|
        steepest = np.linalg.norm(toy.b, axis=1).mean()
        assert abs(float(stats.upper) - value) <= steepest * float(stats.infeasibility) + 1e-12
        value = new


@pytest.mark.parametrize("seed", STARTS)
def test_estimated_constants_do_as_well_here(seed):
    """No theorem: what the heuristics have to show on problems whose constants are known."""
    toy = Logistic(seed)
    algo = MAID(toy.problem(), *start(seed, 5, 5, scale=0.5), epsilon=10.0, delta=10.0, step=10.0)
    value = toy.upper_value(toy.solution(algo.x.numpy()))
    for _ in range(8):
        before = algo.x.numpy()
        stats = algo.step()
        p = (before - algo.x.numpy()) / stats.length
        assert np.linalg.norm(p - toy.hypergradient(before)) <= stats.error
        old, value = value, toy.upper_value(toy.solution(algo.x.numpy()))
        assert value < old


def test_stationary_is_true():
    algo = MAID(Q.problem(), *start(0, 3, 4), smoothness=quadratic_smoothness(Q), tol=1e-4)
    stats = run(algo, 300)[-1]
    assert stats.outcome == "stationary" and stats.length == 0 and stats.trials == 0
    assert float(stats.stationarity) + stats.error <= 1e-4
    assert np.linalg.norm(Q.hypergradient(algo.x.numpy())) <= 1e-4
    x, counts = algo.x, algo.counts.copy()
    assert algo.step().outcome == "stationary" and torch.equal(algo.x, x)
    assert algo.counts["lower"] - counts["lower"] <= 2  # nothing is left to do


# ------------------------------------------------------------------------------------------------------ optima


@pytest.mark.parametrize("seed", STARTS)
def test_quadratic_optimum_with_estimated_constants(seed):
    algo = MAID(Q.problem(), *start(seed, 3, 4), tol=1e-5)
    assert run(algo, 300)[-1].outcome == "stationary"
    np.testing.assert_allclose(algo.x, Q.optimum[0], atol=3e-5)
    np.testing.assert_allclose(algo.y, Q.optimum[1], atol=3e-5)


def ridge_with_prior():
    p = ridge()
    return Bilevel(lambda x, y, b: p.upper(x, y, b) + 0.1 * x.square().sum(), p.lower)


def ridge_value(x):
    y, grad = ridge_oracle(tensor(x))
    return float((XV @ y - TV).square().sum() / 2) + 0.1 * x @ x, grad.numpy() + 0.2 * x


@pytest.mark.parametrize("seed", STARTS)
def test_ridge_optimum_from_any_accuracy(seed):
    x, y = start(seed, 7, 7, scale=1.0)
    best = bfgs(ridge_value, x.numpy(), jac=True, tol=1e-10)
    found = []
    for accuracy in (1e-1, 1.0, 1e1, 1e2) if seed == 0 else (1e-1, 1e2):
        algo = MAID(ridge_with_prior(), x, y, epsilon=accuracy, delta=accuracy, step=1.0, tol=3e-4)
        stats = run(algo, 300)
        assert stats[-1].outcome == "stationary"
        assert ridge_value(algo.x.numpy())[0] <= best.fun + 1e-6
        np.testing.assert_allclose(algo.x, best.x, atol=2e-3)
        found.append(float(stats[-1].upper))
    assert max(found) - min(found) < 1e-6


def test_it_needs_less_than_tight_accuracies_from_the_start():
    work, best = [], bfgs(ridge_value, start(0, 7, 7)[0].numpy(), jac=True).fun
    for options in ({}, EXACT):
        algo = MAID(
            ridge_with_prior(), *start(0, 7, 7), step=1.0, tol=0.0, smoothness=Smoothness(hessian=0.0), **options
        )
        while float(algo.step().upper) > best + 1e-2:
            pass
        work.append(algo.counts["lower"] + algo.counts["hvp"])
    assert work[0] < 0.9 * work[1]


# ---------------------------------------------------------------------------------------------- state, failures


def test_resumed_anywhere_it_is_the_same_run_to_the_last_bit():
    toy = Logistic(0)
    x, y = start(0, 5, 5)
    whole = MAID(toy.problem(), x, y)
    wanted = [whole.step() for _ in range(5)]
    for stop in range(5):
        first = MAID(toy.problem(), x, y)
        for _ in range(stop):
            first.step()
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = MAID(toy.problem(), *start(9, 5, 5))
        second.load_state_dict(torch.load(file, weights_only=True))
        for k in range(stop, 5):
            assert second.step() == wanted[k]
        assert all(torch.equal(value, second.state[name]) for name, value in whole.state.items())
        assert second.plain == whole.plain and second.counts == whole.counts


def snapshot(algo):
    d = algo.state_dict()
    return {k: v.numpy().tobytes() for k, v in d["state"].items()}, d["plain"], d["counts"], d["steps"]


def test_a_failed_lower_solve_says_so_and_changes_nothing():
    problem = Bilevel(
        lambda x, y, b: (y - 1).square().sum(), lambda x, y, b: ((y - x).square() / 2 - 0.3 * b * y**4).sum()
    )
    algo = MAID(problem, *start(0, 3, 3, scale=0.1))
    algo.step(None, 0.0)
    before = snapshot(algo)
    with pytest.raises(SolveError, match=r"MAID: the lower (problem was not solved|Hessian is not positive definite)"):
        algo.step(None, 1e3)
    assert snapshot(algo) == before
    algo.step(None, 0.0)
    with pytest.raises(SolveError, match="NaN in the data"):
        algo.step(None, float("nan"))
    known = Smoothness(strong_convexity=1e-3)
    algo = MAID(problem, *start(0, 3, 3), solver=LBFGS(max_steps=1), smoothness=known, epsilon=1e-9)
    before = snapshot(algo)
    with pytest.raises(SolveError, match=r"not solved at step 1 \(MAX_STEPS after 1 steps.*max_steps") as caught:
        algo.step(None, 0.0)
    assert snapshot(algo) == before and caught.value.solution.value.shape == (3,)


def test_an_indefinite_hessian_is_refused():
    problem = Bilevel(lambda x, y, b: (y - 1).square().sum(), lambda x, y, b: y[0] ** 2 - y[1] ** 2 + x * y.sum())
    with pytest.raises(SolveError, match="lower Hessian is not positive definite"):
        MAID(problem, tensor(1.0), tensor([1.0, 2.0])).step()
    known = Smoothness(strong_convexity=1.0)
    with pytest.raises(SolveError, match="MAID: the lower"):
        MAID(problem, tensor(1.0), tensor([1.0, 2.0]), smoothness=known).step()


def test_a_failed_line_search_keeps_the_variables_and_starts_shorter():
    """F grows along the direction that its gradient claims: the sign of the gradient is wrong.

    No trial falls, so each one rules out its length, until the linear model has nothing to offer at shorter ones.
    """

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, g):
            return -g

    problem = Bilevel(lambda x, y, b: (Wrong.apply(y) - 1).square().sum(), lambda x, y, b: (y - x).square().sum())
    known = Smoothness(strong_convexity=2.0, upper=2.0, upper_in_x=0.0, hessian=0.0, cross=0.0, cross_norm=2.0)
    x, y = start(0, 2, 2)
    algo = MAID(problem, x, y, smoothness=known)
    stats = algo.step()
    assert (stats.outcome, stats.length) == ("line search failed", 0.0) and stats.trials >= 6
    assert torch.equal(algo.x, x)
    np.testing.assert_allclose(algo.y, x, atol=0.1)  # a lower solution to the accuracy reached
    assert algo.plain["step"] == 0.1 * 0.5**stats.trials


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_rounding_level_it_ends_and_says_so(dtype):
    x, y = (t.to(dtype) for t in start(0, 3, 4))
    H, B, A, t = (tensor(a).to(dtype) for a in (Q.H, Q.B, Q.A, Q.t))
    problem = Bilevel(
        lambda x, y, b: (A @ y - t).square().sum() / 2 + Q.rho * x.square().sum() / 2,
        lambda x, y, b: y @ H @ y / 2 - y @ B @ x,
    )
    algo = MAID(problem, x, y, tol=0.0)
    stats = run(algo, 200)
    assert stats[-1].outcome in ("line search failed", "exhausted") and len(stats) < 200
    limit = 30 * torch.finfo(dtype).eps ** 0.5  # of a minimum whose values are compared
    np.testing.assert_allclose(algo.x, Q.optimum[0], atol=limit)
    assert all(value.dtype == dtype for value in algo.state.values())


def test_upper_objective_without_a_slope_is_stationary_at_once():
    algo = MAID(
        Bilevel(lambda x, y, b: 0 * y.sum() + 0 * x, lambda x, y, b: (y - x).square()), *map(tensor, (1.0, 3.0))
    )
    stats = algo.step()
    assert stats.outcome == "stationary" and float(algo.x) == 1.0


class Weights(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.first, self.rest = nn.Parameter(value[:1].clone()), nn.Parameter(value[1:].clone())

    def forward(self):
        return torch.cat([self.first, self.rest])


def test_modules_and_pytrees_run_as_tensors_do():
    p, (x, y) = Q.problem(), start(0, 3, 4)
    plain = MAID(p, x, y)
    x_module, y_module = Weights(x), Weights(y)
    modules = MAID(
        Bilevel(lambda x, y, b: p.upper(x(), y(), b), lambda x, y, b: p.lower(x(), y(), b)), x_module, y_module
    )
    trees = MAID(
        Bilevel(lambda x, y, b: p.upper(x["x"], torch.cat(y), b), lambda x, y, b: p.lower(x["x"], torch.cat(y), b)),
        {"x": x}, (y[:1], y[1:]),
        smoothness=Smoothness(upper_in_x=lambda x, y: x["x"].abs().sum() * y[0].sum() * 0),
    )  # fmt: skip
    for _ in range(5):
        with torch.no_grad():
            upper = plain.step().upper
        assert abs(upper - modules.step().upper) < 1e-9 and abs(upper - trees.step().upper) < 1e-9
    assert modules.x is x_module and x_module.first.grad is None
    np.testing.assert_allclose(x_module().detach(), plain.x, rtol=1e-9)
    np.testing.assert_allclose(torch.cat(trees.y), plain.y, rtol=1e-9)
    assert torch.equal(x, start(0, 3, 4)[0]) and torch.equal(y, start(0, 3, 4)[1])


def test_the_loop_of_the_library_runs_it_and_counts_are_complete():
    calls = {"lower": 0, "upper": 0}
    p = Q.problem()

    def counted(name, function):
        def call(x, y, batch):
            calls[name] += 1
            return function(x, y, batch)

        return call

    problem = Bilevel(counted("upper", p.upper), counted("lower", p.lower))
    algo = MAID(problem, *start(0, 3, 4))
    MAID(problem, *start(0, 3, 4)).step()  # the first evaluation of all looks for captured tensors
    calls.update(lower=0, upper=0)
    history = minimize(algo, 10, progress=False)
    assert [s.outcome for s in history.stats] == ["moved"] * 10
    assert (algo.counts["lower"], algo.counts["upper"]) == (calls["lower"], calls["upper"])
    assert history.stats[-1].gradients == sum(calls.values())


def test_bad_input_is_named():
    p, (x, y) = Q.problem(), start(0, 3, 4)
    for options, match in (
        ({"epsilon": 0.0}, "epsilon: expected a number"), ({"delta": -1}, "delta: expected"),
        ({"step": float("inf")}, "step: expected"), ({"tighten": 1.0}, "tighten: expected"),
        ({"relax": 0.9}, "relax: expected"), ({"backtrack": 0}, "backtrack: expected"),
        ({"angle": 1}, "angle: expected"), ({"decrease": 1e-3}, "decrease: expected a number"),
        ({"tol": -1.0}, "tol: expected"), ({"tol": True}, "tol: expected"),
        ({"solver": CG()}, r"solver: expected LBFGS"), ({"linear_solver": LBFGS()}, "linear_solver: expected CG"),
        ({"smoothness": 1.0}, "smoothness: expected Smoothness"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            MAID(p, x, y, **options)
    with pytest.raises(ValueError, match="prox_lower: expected None for MAID"):
        MAID(Q.problem(prox_lower=lambda v, x, step: v), x, y)
    with pytest.raises(ValueError, match="constraint: expected None for MAID"):
        MAID(Q.problem(constraint=lambda x, y: y, equality=True), x, y)
