"""Certified bounds of networks, and the instances they learn from.

Oracles: the optimum by Clarabel or HiGHS, which no bound may exceed; finite differences of the composition by hand; the
recipe of the instances.
"""

import copy
import math

import cvxpy as cp
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from difflayers.conic import (
    BoxCompletion,
    BoxQuadraticCompletion,
    DualInstances,
    DualProxy,
    Euclidean,
    Exponential,
    NonNegative,
    PositiveSemidefinite,
    Power,
    Product,
    Radial,
    RotatedSecondOrder,
    SecondOrder,
    SimplexCompletion,
    dual_bound,
    sample_knapsack,
    sample_production_planning,
)
from tests.conic.dual_blocks import network, rand

N = 5
CONES = Product(
    [
        (NonNegative(), 2),
        (SecondOrder(), 3),
        (RotatedSecondOrder(), 3),
        (PositiveSemidefinite(), 4),
        (Exponential(), 3),
        (Power(0.3), 3),
    ]
)
M = 18


def conic_program(seed: int):
    """``Ax - b`` in the product of all cones, strictly feasible at a point of the box; with the optimum."""
    A, c, x0 = rand(seed, M, N), rand(seed + 1, N), 0.5 * rand(seed + 2, N).clamp(-1, 1)
    for i, j in ((9, 10),):  # a symmetric block
        A[i] = A[j]
    inside = torch.tensor([1, 1, 2, 0.1, 0.2, 1, 1, 0.3, 1, 0, 0, 1, 0, 1, 2, 1, 1, 0.1]).double()
    b = A @ x0 - inside
    x = cp.Variable(N)
    r = A.numpy() @ x - b.numpy()
    half = math.sqrt(2)
    cones = [
        r[:2] >= 0,
        cp.SOC(r[2], r[3:5]),
        cp.SOC((r[5] + r[6]) / half, cp.hstack([(r[5] - r[6]) / half, r[7]])),
        cp.bmat([[r[8], r[9]], [r[10], r[11]]]) >> 0,
        cp.ExpCone(r[12], r[13], r[14]),
        cp.PowCone3D(r[15], r[16], r[17], 0.3),
    ]
    problem = cp.Problem(cp.Minimize(c.numpy() @ x), [*cones, x >= -1, x <= 1])
    value = float(problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10))
    return A, b, c, value


# -------------------------------------------------------------------------------------------------------- certificates


@pytest.mark.parametrize("projection", [Euclidean(), Radial()], ids=repr)
def test_every_network_gives_a_bound(projection):
    """Random networks in float32, of outputs small and large, on a product of all cones."""
    A, b, c, value = conic_program(100)
    best = -math.inf
    for seed in range(30):
        proxy = DualProxy(
            network(3, M, seed, 10 ** (seed / 10 - 1.5)), CONES, BoxCompletion(-1.0, 1.0), projection=projection
        )
        with torch.no_grad():
            point = proxy(rand(seed, 64, 3).float(), A, b, c)
        assert point.bound.dtype == point.x.dtype == torch.float64
        best = max(best, float(point.bound.max()))
    assert best <= value + 1e-9 * abs(value)
    assert best > value - 10 * (1 + abs(value))


def test_knapsack_bounds_are_certified_next_to_the_optimum():
    """Multipliers that are optimal up to float32: every one of many perturbed bounds stays below."""
    of = sample_knapsack(3, constraints=5, items=30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    class Nearly(nn.Module):
        def __init__(self, y):
            super().__init__()
            self.y = nn.Parameter(y.float())

        def forward(self, noise):
            return self.y * (1 + 1e-6 * noise)

    for i in range(3):
        p, W, v = (t[i].numpy() for t in of)
        found = linprog(-p, W, v, bounds=(0, 1), method="highs")
        proxy = DualProxy(Nearly(torch.from_numpy(-found.ineqlin.marginals)), NonNegative(), of.completion)
        bounds = proxy(rand(4, 2000, 5).float(), of.A[i], of.b[i], of.c[i]).bound.detach()
        over = float((bounds.max() - found.fun) / abs(found.fun))
        assert -1e-6 < over <= 1e-12


def test_multipliers_lie_in_the_dual_cone():
    raw = 3 * rand(5, 200, M)
    for projection in (Euclidean(), Radial()):
        y, w = DualProxy(nn.Identity(), CONES, projection=projection).multipliers(raw, M)
        assert w is None and y.dtype == torch.float64
        assert bool((CONES.dual().violation(y) < 1e-9).all())
        again, _ = DualProxy(nn.Identity(), CONES, projection=projection).multipliers(y, M)
        torch.testing.assert_close(again, y, rtol=1e-7, atol=1e-7)


def test_nothing_but_the_network_is_in_single_precision():
    A, b, c = rand(1, 4, N), rand(2, 4), rand(3, N)
    net = network(3, 4)
    proxy = DualProxy(net, NonNegative(), BoxCompletion(torch.zeros(N), torch.ones(N)))
    features = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    expected = dual_bound(torch.relu(net(features).double()), A, b, c, BoxCompletion(0.0, 1.0)).bound
    assert torch.equal(proxy(features, A, b, c).bound, expected)
    single = proxy(features, A.float(), b.float(), c.float()).bound
    assert single.dtype == torch.float64 and not torch.equal(single, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = proxy(features, A, b, c).bound
    assert half.dtype == torch.float64
    torch.testing.assert_close(half, expected, rtol=0.1, atol=0.1)


def test_gradient_reaches_the_network():
    """By finite differences in the weights, in float64."""
    A, b, c = rand(1, M, N), rand(2, M), rand(3, N)
    proxy = DualProxy(network(3, M).double(), CONES, SimplexCompletion())
    features = rand(4, 3)
    proxy(features, A, b, c).bound.backward()
    weight = proxy.network[2].weight
    direction = rand(5, *weight.shape)
    values = []
    for step in (1e-6, -1e-6):
        moved = copy.deepcopy(proxy)
        with torch.no_grad():
            moved.network[2].weight += step * direction
            values.append(float(moved(features, A, b, c).bound))
    assert float((weight.grad * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)
    single = DualProxy(network(3, M), CONES, SimplexCompletion())
    single(features.float(), A, b, c).bound.backward()
    assert single.network[2].weight.grad.dtype == torch.float32


def test_a_cone_of_matrices_takes_flat_multipliers():
    A, b, c = rand(1, 4, N), rand(2, 4), rand(3, N)
    raw = rand(4, 7, 4)
    alone = DualProxy(nn.Identity(), PositiveSemidefinite(), BoxCompletion(-1.0, 1.0))(raw, A, b, c)
    wrapped = DualProxy(nn.Identity(), Product([(PositiveSemidefinite(), 4)]), BoxCompletion(-1.0, 1.0))(raw, A, b, c)
    assert torch.equal(alone.bound, wrapped.bound)


def test_network_predicts_w_behind_the_multipliers():
    A, b, c, Q = rand(1, 2, N), rand(2, 2), rand(3, N), torch.eye(N)
    raw = rand(4, 7, 2 + N).float()
    completion = BoxQuadraticCompletion(Q, -1.0, 1.0)
    point = DualProxy(nn.Identity(), NonNegative(), completion)(raw, A, b, c)
    y, w = raw.double().split((2, N), -1)
    expected = dual_bound(torch.relu(y), A, b, c, completion.to(torch.float64), w=w)
    assert torch.equal(point.bound, expected.bound)


def test_completion_may_come_with_the_call():
    A, b, c = rand(1, 2, N), rand(2, 2), rand(3, N)
    proxy = DualProxy(nn.Identity(), NonNegative())
    raw = rand(4, 7, 2)
    upper = rand(5, 7, N).abs()
    of_each = proxy(raw, A, b, c, completion=BoxCompletion(0.0, upper)).bound
    one = [proxy(raw[i], A, b, c, completion=BoxCompletion(0.0, upper[i])).bound for i in range(7)]
    torch.testing.assert_close(of_each, torch.stack(one))
    with pytest.raises(ValueError, match="completion: expected one in this call or in the module"):
        proxy(raw, A, b, c)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DualProxy(nn.Identity(), "R+"), "cone: expected a Cone, got str"),
        (lambda: DualProxy(nn.Identity(), NonNegative(), 3), "completion: expected a Completion or None, got int"),
        (lambda: DualProxy(nn.Identity(), NonNegative(), on_failure="no"), "on_failure: expected"),
        (lambda: DualProxy(nn.Identity(), NonNegative(), projection="radial"), r"projection: expected Euclidean\(\)"),
        (
            lambda: DualProxy(nn.Identity(), NonNegative(), BoxCompletion(0, 1))(
                torch.zeros(3), torch.zeros(2, 4), torch.zeros(2), torch.zeros(4)
            ),
            r"network output: expected 2 entries in the last dimension, got \(3,\)",
        ),
    ],
)
def test_bad_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ----------------------------------------------------------------------------------------------------------- instances


def test_knapsacks_follow_the_recipe():
    of = sample_knapsack(400, constraints=4, items=50, generator=torch.Generator().manual_seed(0))
    prices, weights, capacity = of
    assert weights.dtype == torch.float32 and weights.shape == (400, 4, 50)
    assert torch.equal(weights, weights.round()) and weights.min() == 0 and weights.max() == 1000
    assert weights.mean().item() == pytest.approx(500, rel=0.01)
    assert torch.equal(capacity, (weights.double().sum(-1) / 4).round().float())
    extra = prices - weights.mean(-2)
    assert -0.51 <= extra.min() < 1 and 99 < extra.max() <= 100.51
    assert extra.mean().item() == pytest.approx(50, rel=0.02)
    again = sample_knapsack(
        400, constraints=4, items=50, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    assert all(torch.equal(a, b.float()) for a, b in zip(of, again, strict=True))
    assert of.features.shape == (400, 50 + 4 + 200)
    zero = dual_bound(torch.zeros(400, 4), of.A, of.b, of.c, of.completion)
    torch.testing.assert_close(zero.bound, -prices.sum(-1))


def test_plannings_follow_the_recipe():
    of = sample_production_planning(500, items=20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cost = of.resources.new_tensor([0.1 * 1, 2 * 10])
    assert cost[0] <= of.resources.min() and of.resources.max() <= cost[1]
    share = of.capacity / of.resources.sum(-1)
    assert share.min() >= 0.25 and share.min() < 0.26 and share.max() > 0.74 and share.max() <= 0.75
    assert of.holding.min() >= 0.025 and of.holding.max() <= 10
    assert of.ordering.min() >= 0.1 and of.ordering.max() <= 1500
    assert of.ordering.mean().item() == pytest.approx(0.8 * 5.5 * 50.5, rel=0.05)
    assert of.A.shape == (500, 1, 40) and of.b.shape == (500, 1) and of.c.shape == (500, 40)
    assert of.features.shape == (500, 61)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_knapsack(-1, constraints=1, items=1), "count: expected at least 0, got -1"),
        (lambda: sample_knapsack(1, constraints=0, items=1), "constraints: expected at least 1, got 0"),
        (lambda: sample_production_planning(1, items=0), "items: expected at least 1, got 0"),
    ],
)
def test_generators_refuse_sizes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_instances_pick_and_share():
    of = DualInstances(rand(1, 6, 3), rand(2, 2, 4), rand(3, 6, 2), rand(4, 4), BoxCompletion(0.0, rand(5, 6, 4).abs()))
    some = of[torch.tensor([4, 1])]
    assert len(some) == 2 and torch.equal(some.b, of.b[[4, 1]]) and some.A is of.A and some.c is of.c
    assert torch.equal(some.completion.upper, of.completion.upper[[4, 1]])
    with pytest.raises(ValueError, match="b: expected 1 dimensions, or 6 instances before"):
        DualInstances(rand(1, 6, 3), rand(2, 2, 4), rand(3, 5, 2), rand(4, 4))
    with pytest.raises(ValueError, match="scale: expected shape"):
        DualInstances(rand(1, 6, 3), rand(2, 2, 4), rand(3, 6, 2), rand(4, 4), scale=torch.ones(5))
