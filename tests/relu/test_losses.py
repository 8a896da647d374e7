"""Logistic, Huber and hinge losses, with and without cones.

Oracles, written before the code: Clarabel at a tolerance of 1e-10 for the optimal value, from which gaps follow;
central differences of re-solved problems for derivatives; one point and one feature by hand; sampled conjugates.
"""

import math
import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

from difflayers import Status
from difflayers.relu import (
    FISTA,
    Hinge,
    Huber,
    Logistic,
    Squared,
    beta_max,
    convex_gated_relu,
    convex_gated_relu_ex,
    enumerate_gates,
    predict,
)
from difflayers.relu._cone_admm import ADMM
from difflayers.relu._cone_certificate import lower_bound
from difflayers.relu._cone_interior_point import InteriorPoint
from difflayers.relu._cone_lagrangian import AugmentedLagrangian
from difflayers.relu._cone_problem import ConeProblem
from difflayers.relu._gated_task import GatedTask
from difflayers.relu._hinge_problem import at_kink, minimise, split

LOSSES = [Logistic(), Huber(0.4), Hinge()]
NAMES = ["logistic", "Huber", "hinge"]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def training_set(loss, seed: int, n: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Data with a bend, labels (with outliers, or signs), weights."""
    X, noise = normal(seed, n, d), normal(seed + 1, n)
    y = torch.sin(2 * X[:, 0]) + X[:, -1].abs() + 0.3 * noise
    if isinstance(loss, Logistic | Hinge):
        y = (y - y.mean()).sign()
    else:
        y = y + 5 * (noise > 1)
    return X, y, 0.5 + normal(seed + 3, n).abs()


def patterns(X: Tensor, count: int | None, seed: int) -> Tensor:
    if count is None:
        return enumerate_gates(X).patterns.double()
    return torch.unique((X @ normal(seed, X.shape[1], count) >= 0).double(), dim=1)


def with_share(problem: ConeProblem, fraction: float) -> ConeProblem:
    """With beta a fraction of the largest useful one."""
    slope = problem.loss.slope(0 * problem.y, problem.y)
    top = problem.fit_adjoint(problem.s * slope).norm(dim=-1).amax()
    return ConeProblem(problem.X, problem.y, problem.s, fraction * top, problem.M, problem.loss)


def clarabel(problem: ConeProblem, cones: bool) -> float:
    X, y, s, M = (t.numpy() for t in (problem.X, problem.y, problem.s, problem.M))
    v, w = (cp.Variable((X.shape[1], M.shape[1])) for _ in range(2))
    f = cp.sum(cp.multiply(M, X @ (v - w)), axis=1)
    each = {
        Squared: lambda loss: cp.square(f - y) / 2,
        Logistic: lambda loss: cp.logistic(-cp.multiply(y, f)),
        Huber: lambda loss: cp.huber(f - y, loss.delta) / 2,
        Hinge: lambda loss: cp.pos(1 - cp.multiply(y, f)),
    }[type(problem.loss)](problem.loss)
    inside = [cp.multiply(2 * M - 1, X @ p) >= 0 for p in (v, w)] if cones else []
    norms = cp.sum(cp.norm(v, 2, axis=0)) + cp.sum(cp.norm(w, 2, axis=0))
    program = cp.Problem(cp.Minimize(s @ each + float(problem.beta) * norms), inside)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    if cones:
        return float(program.value)
    # without constraints any point tells an upper bound, which the reported value is only to some digits
    return float(problem.objective(torch.from_numpy(np.concatenate([v.value.T, w.value.T]))))


# ----------------------------------------------------------------------------------------------------------- one sample


@pytest.mark.parametrize("loss", [Squared(), *LOSSES], ids=["squared", *NAMES])
def test_a_loss_is_consistent(loss):
    """Slope and curvature by differences, the conjugate by its definition on a fine grid, units by scaling."""
    y = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    f = torch.tensor([0.3, 0.7, 1.9], dtype=torch.float64)
    h = 1e-6
    slope = (loss.value(f + h, y) - loss.value(f - h, y)) / (2 * h)
    torch.testing.assert_close(loss.slope(f, y), slope, rtol=1e-8, atol=1e-9)
    curvature = (loss.slope(f + h, y) - loss.slope(f - h, y)) / (2 * h)
    torch.testing.assert_close(loss.curvature(f, y), curvature, rtol=1e-6, atol=1e-8)
    assert (loss.curvature(f, y) <= loss.largest_curvature(y)).all()
    grid = torch.linspace(-20, 20, 80_001, dtype=torch.float64)[:, None]
    for c in (0.0, 0.3, 0.9):
        t = c * loss.slope(f, y)
        expected = (t * grid - loss.value(grid, y)).amax(0)
        torch.testing.assert_close(loss.conjugate(t, y), expected, rtol=1e-6, atol=1e-7)
    weight = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    unit, size = loss.in_units(weight, y)
    if isinstance(loss, Squared | Huber):
        torch.testing.assert_close(unit.value(f / size, y / size) * size**2, loss.value(f, y))
    else:
        assert unit == loss
        assert size == 1


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # minimise l(2 u, 1) + 0.5 |u|: the slope of the loss is -1/4 at the optimum
        (Squared(), 0.75),
        (Huber(0.5), 0.75),
        (Huber(0.2), 0.0),  # its slope is never as large
        (Logistic(), math.log(3)),
        (Hinge(), 1.0),
    ],
)
def test_one_point_and_one_feature_by_hand(loss, expected):
    X, y = torch.tensor([[2.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    found = convex_gated_relu(X, y, 0.5, X, loss=loss)
    assert float(predict(found, X)) == pytest.approx(expected, abs=1e-9)
    value = {0.75: 1 / 32 + 0.1875, 0.0: 0.2 - 0.02, math.log(3): math.log(4 / 3) + math.log(3) / 4, 1.0: 0.25}
    assert float(found.objective) == pytest.approx(value[expected], abs=1e-9)
    assert float(found.gap) < 1e-9
    cone = InteriorPoint().solve(ConeProblem(X, y, y, 0.5 * y[0], y[:, None], loss))
    assert float(cone.objective) == pytest.approx(value[expected], rel=1e-7)


def test_bad_arguments():
    for delta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="delta: expected a number more than 0, got"):
            Huber(delta)
    X, y, _ = training_set(Hinge(), 0, 8, 2)
    with pytest.raises(ValueError, match="y: expected labels -1 and 1 for the hinge loss, got"):
        convex_gated_relu(X, (y > 0).double(), 0.1, X, loss=Hinge())
    hinge = with_share(ConeProblem(X, y, 0 * y + 1, y[0], patterns(X, 3, 0), Hinge()), 0.5)
    for solver in (ADMM(), AugmentedLagrangian()):
        with pytest.raises(ValueError, match="solver: expected InteriorPoint"):
            solver.solve(hinge)


# ----------------------------------------------------------------------------------------------------------- with cones


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
@pytest.mark.parametrize(
    ("d", "count", "fraction"),
    [(2, None, 0.1), (3, 10, 1e-3), (3, 10, 0.9), (3, 4, 0.1)],
    ids=["all", "small beta", "large beta", "few"],
)
def test_the_constrained_optimum_is_that_of_clarabel(loss, d, count, fraction):
    X, y, s = training_set(loss, 7, 20, d)
    problem = with_share(ConeProblem(X, y, s, s[0], patterns(X, count, 2), loss), fraction)
    found, expected = InteriorPoint().solve(problem), clarabel(problem, cones=True)
    assert found.status == Status.CONVERGED
    assert float(found.objective) == pytest.approx(expected, rel=1e-7)
    assert found.violation <= 1e-8
    assert -1e-12 <= found.gap / found.objective < 1e-7
    assert float(found.objective - found.gap) <= expected * (1 + 1e-8)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_a_small_regularisation_takes_some_more_steps(loss):
    X, y, s = training_set(loss, 3, 30, 4)
    problem = with_share(ConeProblem(X, y, s, s[0], patterns(X, 4, 2), loss), 1e-6)
    found = InteriorPoint().solve(problem)
    assert found.status == Status.CONVERGED
    assert found.steps < 60
    assert found.gap / found.objective < 1e-8


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_the_bound_holds_for_any_network_and_any_multipliers(loss):
    X, y, s = training_set(loss, 5, 20, 2)
    problem = with_share(ConeProblem(X, y, s, s[0], patterns(X, None, 0), loss), 0.2)
    expected = clarabel(problem, cones=True)
    found = InteriorPoint().solve(problem)
    p, rho = torch.cat([found.v, found.w]), torch.cat([found.rho_v, found.rho_w])
    for k, size in enumerate((0.0, 1e-3, 1.0, 100.0)):
        bound = lower_bound(problem, p + size * normal(k, *p.shape), rho + size * normal(k + 9, *rho.shape).abs())
        assert float(bound) <= expected * (1 + 1e-8)
    exact = lower_bound(problem, p, rho, found.slope)
    assert float(exact) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_knee_of_huber_scales_with_the_labels(scale):
    X, y, s = training_set(Huber(), 5, 20, 3)
    M = patterns(X, 8, 1)
    plain = InteriorPoint().solve(with_share(ConeProblem(X, y, s, s[0], M, Huber(0.4)), 0.1))
    scaled = InteriorPoint().solve(with_share(ConeProblem(X, y * scale, s, s[0], M, Huber(0.4 * scale)), 0.1))
    torch.testing.assert_close(scaled.v / scale, plain.v, rtol=0, atol=1e-6)
    assert scaled.status == Status.CONVERGED


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_elements_of_a_batch_and_samples_without_weight(loss):
    X, y, s = training_set(loss, 5, 20, 3)
    M, s = patterns(X, 6, 1), s * (torch.arange(20) % 5 > 0)
    alone = [with_share(ConeProblem(X, y, s, s[1], M, loss), share) for share in (0.02, 0.5, 2.0)]
    stack = lambda t: t.expand(4, *t.shape).clone()  # noqa: E731
    bad = stack(y)
    bad[3, 2] = torch.nan
    beta = torch.stack([p.beta for p in alone] + [alone[0].beta])
    got = InteriorPoint().solve(ConeProblem(stack(X), bad, stack(s), beta, stack(M), loss))
    assert got.status.tolist() == [Status.CONVERGED] * 3 + [Status.DIVERGED]
    assert not got.v[2].any()
    kept = s > 0
    for i, problem in enumerate(alone):
        fewer = ConeProblem(X[kept], y[kept], s[kept], problem.beta, M[kept], loss)
        if loss.smooth and i < 2:
            # cones of samples without weight stay: only the value without them is lower
            assert InteriorPoint().solve(fewer).objective <= got.objective[i] * (1 + 1e-8)
        assert float(got.objective[i]) == pytest.approx(float(InteriorPoint().solve(problem).objective), rel=1e-8)


# -------------------------------------------------------------------------------------------------------- without cones


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
@pytest.mark.parametrize(
    ("n", "d", "count", "fraction"), [(20, 2, 30, 0.1), (30, 4, 40, 0.01), (30, 4, 40, 0.6), (60, 3, 8, 0.01)]
)
def test_the_gated_optimum_is_that_of_clarabel(loss, n, d, count, fraction):
    X, y, s = training_set(loss, n, n, d)
    gates = normal(n + 2, count, d)
    beta = fraction * float(beta_max(X, y, gates, sample_weight=s, loss=loss))
    found = convex_gated_relu(X, y, beta, gates, sample_weight=s, loss=loss)
    M = (X @ gates.mT >= 0).double()
    expected = clarabel(ConeProblem(X, y, s, torch.tensor(beta, dtype=torch.float64), M, loss), cones=False)
    assert float(found.objective) == pytest.approx(expected, rel=1e-7)
    assert 0 <= float(found.gap) <= 1e-8 * expected
    assert float(found.objective - found.gap) <= expected * (1 + 1e-9)


@pytest.mark.parametrize("fraction", [1e-4, 1e-3, 1e-2])
def test_logistic_networks_at_small_regularisation_are_certified(fraction):
    X, y, s = training_set(Logistic(), 11, 30, 3)
    gates = normal(2, 40, 3)
    beta = fraction * float(beta_max(X, y, gates, sample_weight=s, loss=Logistic()))
    found = convex_gated_relu_ex(X, y, beta, gates, sample_weight=s, loss=Logistic()).value
    assert float(found.gap) <= 1e-7 * float(found.objective)


@pytest.mark.parametrize("loss", [Huber(0.4), Hinge()], ids=["Huber", "hinge"])
@pytest.mark.parametrize(("n", "d", "count", "seed"), [(8, 2, 6, 81), (30, 2, 5, 301), (6, 4, 12, 62)])
def test_derivatives_are_those_of_solving_again(loss, n, d, count, seed):
    X, y, s = training_set(loss, seed, n, d)
    gates = normal(seed + 2, count, d)
    beta = 0.3 * beta_max(X, y, gates, sample_weight=s, loss=loss)
    query, coefficients = normal(9, 5, d), torch.arange(1.0, 6.0, dtype=torch.float64)
    data = [t.clone().requires_grad_() for t in (X, y, s, beta)]

    def run(X: Tensor, y: Tensor, s: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        found = convex_gated_relu(X, y, beta, gates, sample_weight=s, loss=loss)
        return (predict(found, query) * coefficients).sum(), found.objective

    for which in (0, 1):
        found = torch.autograd.grad(run(*data)[which], data)
        assert found[0].any()
        for i, (t, g) in enumerate(zip(data, found, strict=True)):
            way, h = normal(20 + i, *t.shape), 1e-6
            ends = [[x + sign * h * way if x is t else x for x in data] for sign in (1, -1)]
            with torch.no_grad():
                difference = (run(*ends[0])[which] - run(*ends[1])[which]) / (2 * h)
            assert torch.isclose((g * way).sum(), difference, rtol=1e-6, atol=1e-6), (which, i)


def test_the_value_of_the_hinge_loss_answers_to_multipliers_at_kinks():
    """On the kink the derivative by a weight is zero and that by a label is ``-nu / y^2``, as differences confirm."""
    X, y, s = training_set(Hinge(), 81, 8, 2)
    gates = normal(83, 6, 2)
    beta = 0.3 * beta_max(X, y, gates, sample_weight=s, loss=Hinge())
    M = (X @ gates.mT >= 0).double()
    task = GatedTask(X[None], M[None], y[None], s[None], beta[None], Hinge())
    value, exact, _ = minimise(task, FISTA())
    assert exact
    kink = at_kink(split(value, 8, 2)[1], task.y, task.s)[0]
    assert 0 < int(kink.sum()) < 8
    s.requires_grad_(), y.requires_grad_()
    objective = convex_gated_relu(X, y, beta, gates, sample_weight=s, loss=Hinge()).objective
    by_weight, by_label = torch.autograd.grad(objective, (s, y))
    assert not by_weight[kink].any()
    torch.testing.assert_close(by_label[kink], -split(value, 8, 2)[1][0][kink])


@pytest.mark.parametrize("seed", [302, 305, 307])
def test_hinge_networks_with_gates_that_differ_beyond_the_margin_alone(seed: int):
    """Such gates share their neurons in many ways; the minimal choice has a derivative."""
    X, y, s = training_set(Hinge(), seed, 30, 2)
    gates, weights = normal(seed + 2, 5, 2), normal(seed + 9, 30)
    beta = 0.3 * beta_max(X, y, gates, sample_weight=s, loss=Hinge())
    data = [t.clone().requires_grad_() for t in (X, y, s, beta)]

    def trained(X: Tensor, y: Tensor, s: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        found = convex_gated_relu(X, y, beta, gates, sample_weight=s, loss=Hinge())
        return predict(found, data[0].detach()) @ weights, found.objective

    for which, output in enumerate(trained(*data)):
        slopes = torch.autograd.grad(output, data, retain_graph=True)
        for i, (t, g) in enumerate(zip(data, slopes, strict=True)):
            way, h = normal(20 + i, *t.shape), 1e-6
            ends = [[x.detach() + sign * h * way if x is t else x.detach() for x in data] for sign in (1, -1)]
            up, down = (trained(*end)[which] for end in ends)
            assert torch.isclose((g * way).sum(), (up - down) / (2 * h), rtol=1e-6, atol=1e-6)


def test_huber_is_the_square_within_the_knee():
    X, y, s = training_set(Squared(), 4, 12, 2)
    gates = normal(1, 6, 2)
    wide = convex_gated_relu(X, y, 0.2, gates, sample_weight=s, loss=Huber(100.0))
    square = convex_gated_relu(X, y, 0.2, gates, sample_weight=s)
    torch.testing.assert_close(wide.v, square.v, rtol=0, atol=1e-10)


def test_an_outlier_moves_huber_less():
    X, y, _ = training_set(Squared(), 4, 30, 2)
    gates = normal(1, 6, 2)
    spoilt = y.clone()
    spoilt[0] += 1000
    moved = {}
    for loss in (Squared(), Huber(0.5)):
        f, g = (predict(convex_gated_relu(X, t, 0.2, gates, loss=loss), X) for t in (y, spoilt))
        moved[type(loss)] = float((f - g).norm())
    assert moved[Huber] < 0.01 * moved[Squared]


@pytest.mark.parametrize("loss", [Huber(0.4), Hinge()], ids=["Huber", "hinge"])
def test_single_precision(loss):
    X, y, s = training_set(loss, 8, 30, 3)
    gates = normal(2, 12, 3)
    exact = convex_gated_relu(X, y, 1.0, gates, sample_weight=s, loss=loss)
    X, y, s, gates = (t.float() for t in (X, y, s, gates))
    found = convex_gated_relu_ex(X, y, 1.0, gates, sample_weight=s, loss=loss)
    assert found.converged
    assert found.value.v.dtype == torch.float32
    assert torch.isclose(found.value.objective.double(), exact.objective, rtol=1e-5)


def test_a_starved_hinge_solve_says_so():
    X, y, s = training_set(Hinge(), 8, 30, 3)
    gates = normal(2, 12, 3)
    found = convex_gated_relu_ex(X, y, 0.1, gates, sample_weight=s, loss=Hinge(), solver=FISTA(max_steps=2))
    assert found.status == Status.MAX_STEPS
    best = convex_gated_relu(X, y, 0.1, gates, sample_weight=s, loss=Hinge()).objective
    assert float(found.value.objective - found.value.gap) <= float(best) <= float(found.value.objective)


def test_hinge_forgets_samples_without_weight():
    generator = torch.Generator().manual_seed(3)
    for _ in range(10):
        X = torch.randn(12, 2, generator=generator, dtype=torch.float64)
        y = torch.randn(12, generator=generator, dtype=torch.float64).sign()
        gates = torch.randn(6, 2, generator=generator, dtype=torch.float64)
        s = (torch.arange(12) % 3 > 0).to(X.dtype)
        there = s > 0
        found = convex_gated_relu(X, y, 0.1, gates, sample_weight=s, loss=Hinge())
        without = convex_gated_relu(X[there], y[there], 0.1, gates, loss=Hinge())
        assert torch.isclose(found.objective, without.objective, rtol=1e-8)
        assert float(found.gap) <= 1e-6


@pytest.mark.parametrize("delta", [0.0, -1.0, "1", None, torch.tensor([0.5, 1.0])])
def test_huber_takes_one_distance(delta):
    with pytest.raises(ValueError, match="delta: expected a number more than 0, got"):
        Huber(delta)
