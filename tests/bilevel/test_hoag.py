"""HOAG against its rules written out in numpy, optima found without it, and what may go wrong in between.

Oracles, written down before the code:

- On T4 (method_toys.Quadratic) with exact solvers the tolerances enter the step rule alone: ``by_hand`` is the whole
  outer iteration in numpy, every branch of it (longer, kept, shorter, rejected, the box, no gradient).
- Inexact solves: the residuals of both solves at the point that was left, by hand, against the tolerances.
- Optima: T4 in closed form, T2 on the branch of the lower solution, and the ridge of a logistic regression by
  ``scipy.optimize.minimize_scalar`` over a Newton solve in numpy.
- Dearness: gradients and products to one accuracy, the exact variant next to the three schedules.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from difflayers import SolveError
from difflayers.bilevel import HOAG, Bilevel, Constant, Exponential, Power, minimize
from difflayers.implicit import Implicit, Newton
from difflayers.linalg import CG, Cholesky
from tests.bilevel.method_toys import STARTS, Quadratic, Sine, coupled, start, tensor

Q = Quadratic.random(3)
EXACT = {"solver": Newton(), "adjoint": Implicit(Cholesky()), "scale": 1e-12}  # no lower solution passes unsolved


def by_hand(q, x, tolerances, steps, *, published=False, lipschitz=None, box=np.inf):
    """The outer iteration with exact lower and adjoint solutions: a list of (x, L, what happened)."""
    L, halvings, last, unit, in_a_row, seen = lipschitz, 0, None, None, 0, []
    x = np.asarray(x)
    for k in range(steps):
        eps = max(tolerances(k) * 0.5**halvings, 1e-12)
        y = np.linalg.solve(q.H, q.B @ x)
        adjoint = np.linalg.solve(q.H, q.upper_y(x, y))
        p = q.upper_x(x, y) + q.B.T @ adjoint  # J = -B^T
        F = q.upper_value(x, y)
        unit = F if unit is None else unit
        size = np.linalg.norm(p)
        if L is None:
            L = size / np.sqrt(x.size) if size > 1e-3 * unit else unit
        what, factor = "first", 0.95
        if last is not None and np.array_equal(last["x"], x):
            what, factor = "again", 1.0
        elif last is not None:
            step = x - last["x"]
            rise, square = F - last["F"], step @ step
            if published:
                slack = unit * (eps / 4 + 5 / 4 * last["eps"] * square**0.5)
                what, factor = "kept", 1.0
                if rise <= slack - L * square:
                    what, factor = "longer", 0.95
                elif 1.2 * last["F"] <= F and rise > slack:
                    what, factor = "rejected", 2.0
            else:
                slack = unit * eps**2 / 4 + 5 / 4 * last["eps"] * np.linalg.norm(last["p"]) * square**0.5
                slack += 16 * 2.0**-52 * F
                bend = (p - last["p"]) @ step / square / L
                what, factor = ("shorter", 1.25) if bend > 1 else ("longer", 0.95) if bend > 0.5 else ("far", 0.7)
                if rise > slack and (p @ step > 0 or 1.2 * last["F"] <= F):
                    what, factor = "rejected", np.clip(1.25 * bend, 2, 10)
        L *= factor
        third = False
        if what == "rejected":
            in_a_row += 1
            third = in_a_row % 3 == 0
            halvings += published or third
        else:
            last, in_a_row = {"x": x, "p": p, "F": F, "eps": eps}, 0
        x = last["x"] if third else np.clip(last["x"] - last["p"] / L, -box, box)
        seen.append((x, L, what))
    return seen


SCENES = {
    "default": ({}, {"first", "longer", "shorter"}),
    "a power": ({"tolerances": Power(0.1, -2.0)}, {"longer", "shorter"}),
    "first steps too short": ({"lipschitz": 100.0}, {"far"}),
    "too long": ({"lipschitz": 0.05}, {"rejected"}),
    "far too long": ({"lipschitz": 0.001}, {"rejected", "again"}),
    "published": ({"rule": "published", "tolerances": Power(0.1, -1.0)}, {"longer", "kept", "rejected"}),
    "published, too long": ({"rule": "published", "lipschitz": 0.01}, {"kept", "rejected", "again"}),
    "box": ({"box": 0.3}, {"first"}),
}


@pytest.mark.parametrize("scene", SCENES)
def test_outer_steps_are_those_written_by_hand(scene):
    options, expected = SCENES[scene]
    options = {"tolerances": Exponential(1e-3, 0.9), **options}
    x, y = start(0, 3, 4)
    rule, box = options.pop("rule", "corrected"), options.pop("box", np.inf)
    wanted = by_hand(Q, x.numpy(), steps=25, published=rule == "published", box=box, **options)
    problem = Q.problem(**({} if box == np.inf else {"project_upper": lambda x: x.clamp(-box, box)}))
    algo = HOAG(problem, x, y, rule=rule, **options, **EXACT)
    for k, (x_next, L, what) in enumerate(wanted):
        before, rejected = algo.x.numpy(), algo.counts["rejected"]
        stats = algo.step()
        assert (algo.counts["rejected"] > rejected) == (what == "rejected"), k
        np.testing.assert_allclose(algo.x, x_next, rtol=1e-9, atol=1e-11, err_msg=f"{k}: {what}")
        np.testing.assert_allclose(algo.lipschitz, L, rtol=1e-8)
        at = np.linalg.solve(Q.H, Q.B @ before)
        np.testing.assert_allclose(stats.upper, Q.upper_value(before, at), rtol=1e-9)
        np.testing.assert_allclose(stats.lower, Q.lower_value(before, at), rtol=1e-9)
        base, _ = algo.accepted
        np.testing.assert_allclose(stats.stationarity, L * np.linalg.norm(base.numpy() - x_next), rtol=1e-7, atol=1e-11)
    assert expected <= {what for _, _, what in wanted}, {what for _, _, what in wanted}


def test_a_rejection_goes_back_to_the_point_before():
    x, y = start(0, 3, 4)
    algo = HOAG(Q.problem(), x, y, lipschitz=0.05, **EXACT)
    algo.step()
    (x_0, y_0), q_0, trial = algo.accepted, algo.adjoint, algo.x
    algo.step()
    assert algo.counts["rejected"] == 1
    assert torch.equal(algo.accepted[0], x_0) and torch.equal(algo.y, y_0) and torch.equal(algo.adjoint, q_0)
    assert torch.equal(x_0, x)
    # the next trial lies on the same ray, a tenth to a half as far
    ratio = (algo.x - x) / (trial - x)
    assert ratio.std() < 1e-12 and 0.1 <= ratio[0] <= 0.5
    published = HOAG(Q.problem(), x, y, lipschitz=0.05, rule="published", **EXACT)
    published.step(), published.step()
    np.testing.assert_allclose(published.x - x, (trial - x) / 2, rtol=1e-12)
    assert published.tolerance == pytest.approx(1e-3 * 0.9**2 / 2)


def test_no_gradient_means_no_step_and_a_tighter_tolerance():
    # with y = 0 taken as solved to the first tolerance, grad_y F is zero: the second one sees the problem
    problem = Bilevel(lambda x, y, b: y.square().sum() + 1, lambda x, y, b: (y - x).square().sum() / 2)
    algo = HOAG(
        problem,
        tensor([0.5]),
        tensor([0.0]),
        tolerances=Exponential(1.0, 1e-6),
        lipschitz=4.0,
        **{**EXACT, "scale": None},
    )
    algo.step()
    assert algo.x == 0.5 and algo.y == 0.0
    algo.step()  # where F is larger by a quarter, at the same x: no reason to reject
    assert 0 < float(algo.x) < 0.5 and algo.counts["rejected"] == 0


def test_a_base_that_was_solved_too_coarsely_does_not_stop_the_run():
    """y = 0 passes as the solution y = x to the first tolerance: F = 1 there in place of 1 + 9."""
    problem = Bilevel(lambda x, y, b: y.square().sum() + 0.01 * x.sum() + 1, lambda x, y, b: (y - x).square().sum() / 2)
    algo = HOAG(
        problem,
        tensor([3.0]),
        tensor([0.0]),
        tolerances=Exponential(1.0, 1e-3),
        lipschitz=2.0,
        **{**EXACT, "scale": None},
    )
    algo.step()
    assert algo.accepted[1] == 0  # taken for a solution
    minimize(algo, 60, progress=False)
    assert float(algo.x) == pytest.approx(-0.005, abs=1e-6)


def test_solves_meet_the_tolerance_of_their_step_and_loose_ones_are_cheap():
    x, y = start(1, 3, 4)
    first = np.linalg.norm(Q.lower_y(x.numpy(), y.numpy()))
    spent = {}
    for rate in (0.5, 0.99):
        algo = HOAG(Q.problem(), x, y, tolerances=Exponential(0.1, rate))
        for k in range(12):
            algo.step()
            base, y_hat = (v.numpy() for v in algo.accepted)
            if algo.counts["rejected"]:  # what is accepted is that of an earlier step
                break
            assert np.linalg.norm(Q.lower_y(base, y_hat)) <= 1.001 * 0.1 * rate**k * first
            rhs = Q.upper_y(base, y_hat)
            assert np.linalg.norm(Q.H @ algo.adjoint.numpy() - rhs) <= 1.001 * 0.1 * rate**k * np.linalg.norm(rhs)
        assert k > 5
        spent[rate] = algo.step().gradients
    assert spent[0.99] < spent[0.5]


def test_convexity_scales_the_tolerance_of_the_lower_solve():
    """f = e^x |y - a|^2 / 2 is e^x convex: with that said the distance of y, not its gradient, meets the tolerance."""
    a = tensor([1.0, 2.0])
    problem = Bilevel(lambda x, y, b: (y - 1).square().sum(), lambda x, y, b: x.exp() * (y - a).square().sum() / 2)
    for said in (False, True):
        options = {"convexity": lambda x: x.exp()} if said else {}
        algo = HOAG(problem, tensor(0.0), tensor([0.0, 0.0]), tolerances=Constant(0.1), **options)
        algo.step()  # x = 0: solved to a tenth of |a|
        with_x = {**algo.state_dict()["state"], "x": tensor([-8.0]), "y": tensor([0.0, 0.0])}
        algo.load_state_dict({**algo.state_dict(), "state": with_x})
        algo.step()  # the gradient at y = 0 is below the tolerance there, the distance is not
        distance = float((algo.y - a).norm() / a.norm())
        assert (distance <= 0.1) if said else (distance == 1.0)


def test_values_are_compared_exact_to_second_order():
    """On T4 with a coarse y, F - <q, grad_y f> is Phi but for |A H^{-1} grad_y f|^2 / 2 and the adjoint's residual."""
    x, y = start(0, 3, 4)
    for rule in ("corrected", "published"):
        algo = HOAG(Q.problem(), x, y, tolerances=Constant(0.3), adjoint=Implicit(Cholesky()), rule=rule)
        raw = float(algo.step().upper)
        error = np.linalg.solve(Q.H, Q.lower_y(x.numpy(), algo.y.numpy()))
        phi = Q.upper_value(x.numpy(), np.linalg.solve(Q.H, Q.B @ x.numpy()))
        assert abs(raw - phi) > 0.01
        second = phi - np.sum((Q.A @ error) ** 2) / 2
        assert algo.state_dict()["plain"]["value"] == pytest.approx(second if rule == "corrected" else raw, rel=1e-12)


SCHEDULES = [Exponential(0.1, 0.9), Power(0.1, -2.0), Power(0.1, -3.0)]


@pytest.mark.parametrize("seed", STARTS)
@pytest.mark.parametrize("tolerances", SCHEDULES)
def test_reaches_the_optimum_of_the_quadratic_from_three_starts(tolerances, seed):
    q = Quadratic.random()
    algo = HOAG(q.problem(), *start(seed, 3, 4), tolerances=tolerances)
    history = minimize(algo, 150, progress=False)
    x, _ = q.optimum
    # the error of a gradient is a multiple of the tolerance, that of x one of both
    assert np.linalg.norm(algo.x.numpy() - x) < max(1e-6, 10 * tolerances(149))
    assert history.stationarity[-1] < max(1e-6, 10 * tolerances(149))


@pytest.mark.parametrize("seed", STARTS)
def test_lower_problem_convex_around_its_solution_alone(seed):
    """T2: the upper optimum on the branch that the lower solver is on."""
    toy = Sine(a=1.0, c=np.array([0.3, -0.2]))
    x, y = start(seed, 1, 2)
    algo = HOAG(toy.problem(), x[0], y)
    minimize(algo, 80, progress=False)
    C = algo.y.numpy() - toy.c + float(algo.x)  # of the branch, which may be another one for every component
    np.testing.assert_allclose((C + np.pi / 2) / (2 * np.pi) % 1 % (1 - 1e-6), 0, atol=1e-6)
    assert float(algo.x) == pytest.approx((toy.a + (C - toy.a).sum()) / 3, abs=1e-5)


def logistic(seed=0, n=60, d=5):
    r = np.random.default_rng(seed)
    w = r.normal(size=d)
    A, B = r.normal(size=(n, d)), r.normal(size=(n, d))
    a, b = (np.where(M @ w + 1.5 * r.normal(size=n) > 0, 1.0, -1.0) for M in (A, B))
    return A, a, B, b


def test_ridge_of_a_logistic_regression_against_a_scalar_minimiser():
    A, a, B, b = logistic()

    def outer(x):
        w = np.zeros(A.shape[1])
        for _ in range(50):  # Newton
            p = 1 / (1 + np.exp(a * (A @ w)))
            w -= np.linalg.solve(
                (A * (p * (1 - p))[:, None]).T @ A + np.exp(x) * np.eye(w.size), np.exp(x) * w - A.T @ (a * p)
            )
        return np.logaddexp(0, -b * (B @ w)).mean()

    best = minimize_scalar(outer, bounds=(-6, 6), method="bounded", options={"xatol": 1e-9})
    A, a, B, b = (tensor(v) for v in (A, a, B, b))
    problem = Bilevel(
        lambda x, w, _: torch.nn.functional.softplus(-b * (B @ w)).mean(),
        lambda x, w, _: torch.nn.functional.softplus(-a * (A @ w)).sum() + x.exp() * w.square().sum() / 2,
        project_upper=lambda x: x.clamp(-6, 6),
    )
    for x_0 in (-4.0, 0.0, 4.0):
        algo = HOAG(problem, tensor(x_0), torch.zeros(5, dtype=torch.float64), convexity=lambda x: x.exp())
        history = minimize(algo, 120, progress=False)
        assert float(algo.x) == pytest.approx(best.x, abs=1e-3)
        assert float(history.upper[-1]) == pytest.approx(best.fun, rel=1e-7)


def test_decreasing_tolerances_are_cheaper_than_exact_solves_at_equal_accuracy():
    q = Quadratic.random(seed=5, n=6, d=40)
    best = q.upper_value(*q.optimum)
    spent = {}
    for name, tolerances in {"exact": Constant(1e-12), **{str(s): s for s in SCHEDULES}}.items():
        algo = HOAG(q.problem(), *start(0, 6, 40), tolerances=tolerances)
        for _ in range(200):
            stats = algo.step()
            x = algo.accepted[0].numpy()
            if q.upper_value(x, np.linalg.solve(q.H, q.B @ x)) - best < 1e-6 * best:
                break
        spent[name] = stats.gradients + stats.products
    exact = spent.pop("exact")
    assert all(1.3 * cost < exact for cost in spent.values()), (exact, spent)


def test_adjoint_and_lower_solves_start_from_the_last_ones():
    q = Quadratic.random(seed=5, n=6, d=40)
    spent = {}
    for warm in (True, False):
        algo = HOAG(q.problem(), *start(0, 6, 40), tolerances=Constant(1e-4))
        for _ in range(25):
            if not warm:
                algo.state["q"] = torch.zeros_like(algo.state["q"])
            stats = algo.step()
        spent[warm] = stats.products
    assert 1.5 * spent[True] < spent[False], spent
    assert stats.gradients < 25 * 8


def test_scale_of_the_upper_objective_does_not_matter():
    p = Q.problem()
    plain = HOAG(p, *start(0, 3, 4), **EXACT)
    scaled = HOAG(Bilevel(lambda x, y, b: 2.0**40 * p.upper(x, y, b), p.lower), *start(0, 3, 4), **EXACT)
    for _ in range(10):
        plain.step(), scaled.step()
    np.testing.assert_allclose(scaled.x, plain.x, rtol=1e-9)


def test_resumed_anywhere_it_is_the_same_run_to_the_last_bit():
    x, y = start(0, 3, 4)

    def fresh():
        return HOAG(Q.problem(), x, y, lipschitz=0.05)

    whole = fresh()
    wanted, rejected = [], []
    for _ in range(9):
        before = whole.counts["rejected"]
        wanted.append(whole.step())
        rejected.append(whole.counts["rejected"] > before)
    assert any(rejected) and not all(rejected)
    for stop in range(9):
        first = fresh()
        for _ in range(stop):
            first.step()
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = HOAG(Q.problem(), *start(7, 3, 4), lipschitz=3.0)
        second.load_state_dict(torch.load(file, weights_only=True))
        assert [second.step() for _ in range(stop, 9)] == wanted[stop:]
        assert torch.equal(second.x, whole.x) and torch.equal(second.y, whole.y) and second.counts == whole.counts


def failing(upper=None, lower=None):
    p = Q.problem()
    return Bilevel(
        lambda x, y, b: p.upper(x, y, None) + (upper(x, y) if b == "bad" else 0),
        lambda x, y, b: p.lower(x, y, None) + (lower(x, y) if b == "bad" else 0),
    )


FAILURES = {
    "NaN below": ((None, lambda x, y: torch.nan * y.sum()), ValueError, "lower: gradient in y"),
    "NaN above": ((lambda x, y: torch.nan * y.sum(), None), ValueError, "upper"),
    "no minimum": ((None, lambda x, y: -5 * y.square().sum()), SolveError, "lower"),
    "saddle": ((None, lambda x, y: -0.75 * y.square().sum() + y.pow(4).sum() / 4), SolveError, "adjoint"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_step_leaves_the_state_as_it_was(failure):
    (upper, lower), error, message = FAILURES[failure]
    batches = ("bad" if upper else None, "bad" if lower else None)
    x, y = start(0, 3, 4)
    if failure == "saddle":  # at y = 0 the gradient is zero where x is, so that no solver leaves it
        x, y = 0 * x, 0 * y
    algo, twin = (HOAG(failing(upper, lower), x, y) for _ in range(2))
    if failure != "saddle":
        algo.step(), twin.step()
    before = algo.state_dict()
    with pytest.raises(error, match=message):
        algo.step(*batches)
    after = algo.state_dict()
    assert {k: v for k, v in after.items() if k != "state"} == {k: v for k, v in before.items() if k != "state"}
    assert all(torch.equal(after["state"][name], value) for name, value in before["state"].items())
    assert algo.step() == twin.step()


def test_options_that_do_not_fit_are_named():
    p, (x, y) = Q.problem(), start(0, 3, 4)
    for options, message in (
        ({"tolerances": "tight"}, "tolerances: expected a number or a schedule"),
        ({"lipschitz": 0.0}, "lipschitz: expected"),
        ({"rule": "new"}, "rule: expected"),
        ({"solver": CG()}, "solver: expected"),
        ({"adjoint": CG()}, "adjoint: expected Implicit"),
        ({"convexity": 3.0}, "convexity: expected"),
        ({"scale": 0.0}, "scale: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            HOAG(p, x, y, **options)
    with pytest.raises(ValueError, match="constraint"):
        HOAG(coupled(2), tensor([0.0, 0.0]), (tensor([0.0, 0.0]), tensor([0.0, 0.0])))
    with pytest.raises(ValueError, match="prox_lower: expected None"):
        HOAG(Q.problem(prox_lower=lambda v, x, step: v), x, y)
    with pytest.raises(ValueError, match="convexity output: expected a positive number"):
        HOAG(p, x, y, convexity=lambda x: -1.0).step()
