"""What the examples on dual bounds stand on: exact optima, the baseline's correction, networks without units.

Oracles: the greedy rule for a knapsack with one constraint, scipy's linprog for more; a scalar search for the price in
production planning, and Clarabel; one step of the correction written out by hand; weak duality.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from difflayers.conic import Knapsack, ProductionPlanning, dual_bound, sample_knapsack, sample_production_planning

pytest.importorskip("matplotlib")
pytest.importorskip("highspy")
pytest.importorskip("clarabel")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The examples are scripts: they see their own folder, and nobody sees it afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in [n for n in sys.modules if n.partition(".")[0] in ("dual_lagrangian", "plot_dual_knapsack")]:
        del sys.modules[name]
    sys.modules.pop("plot_dual_production_planning", None)


def knapsacks(count: int, m: int, n: int, seed: int = 0) -> Knapsack:
    generator = torch.Generator().manual_seed(seed)
    return sample_knapsack(count, constraints=m, items=n, generator=generator, dtype=torch.float64)


def plans(count: int, n: int, seed: int = 0) -> ProductionPlanning:
    generator = torch.Generator().manual_seed(seed)
    return sample_production_planning(count, items=n, generator=generator, dtype=torch.float64)


def certified(k, y):
    return dual_bound(y, k.A, k.b, k.c, k.completion).bound


# ------------------------------------------------------------------------------------------------------------ examples


def test_knapsack_example(tmp_path, capsys):
    import plot_dual_knapsack as example

    folder = example.main(["--quick", "--seconds", "0.5", "--out", str(tmp_path)])
    found = json.loads((folder / "results.json").read_text())
    assert (folder / "knapsack.png").stat().st_size > 10_000
    assert min(found["smallest gap"].values()) > -1e-9
    assert found["mean gap"]["graph network"] < 0.02
    assert "times" in capsys.readouterr().out


def test_production_planning_example(tmp_path, capsys):
    import plot_dual_production_planning as example

    folder = example.main(["--quick", "--seconds", "1.0", "--out", str(tmp_path)])
    found = json.loads((folder / "results.json").read_text())
    assert (folder / "planning_10.png").stat().st_size > 10_000
    for size in found.values():
        assert min(size["smallest gap"].values()) > -1e-9
        assert size["mean gap"]["graph network"] < 1e-3
    assert "Clarabel" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- optima


def test_optimum_of_one_constraint_is_greedy():
    from dual_lagrangian.optima import solve_knapsacks

    k = knapsacks(6, 1, 30)
    p, w, v = k.prices, k.weights.squeeze(-2), k.capacity
    order = (p / w.clamp(min=1e-12)).argsort(-1, descending=True)
    p, w = p.gather(-1, order), w.gather(-1, order)
    room = (v - w.cumsum(-1) + w).clamp(min=0)
    value = (p * (room / w.clamp(min=1e-12)).clamp(max=1)).sum(-1)
    for solver in ("choose", "ipm"):
        torch.testing.assert_close(solve_knapsacks(k, solver=solver, progress=False).values, -value, rtol=1e-7, atol=0)


def test_optimum_of_several_constraints():
    from dual_lagrangian.optima import solve_knapsacks
    from scipy.optimize import linprog

    k = knapsacks(4, 3, 20)
    expected = [linprog(-p, W, v, bounds=(0, 1)).fun for p, W, v in zip(*(t.numpy() for t in k), strict=True)]
    found = solve_knapsacks(k, progress=False).values
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("scarce", [True, False])
def test_optimum_of_plans(scarce):
    from dual_lagrangian.optima import exact_plans, solve_plans
    from scipy.optimize import minimize_scalar

    k = plans(5, 8)
    if not scarce:  # so much that the resource has no price
        k = k._replace(capacity=1e4 * k.capacity)
    exact = exact_plans(k)
    torch.testing.assert_close(solve_plans(k, progress=False).values, exact, rtol=1e-5, atol=0)
    for i in range(5):
        one = ProductionPlanning(*(t[i] for t in k))

        def loss(y, one=one):
            return -float(certified(one, torch.tensor([y], dtype=torch.float64)))

        searched = minimize_scalar(loss, bounds=(0.0, 2e4), method="bounded", options={"xatol": 1e-9})
        found = -min(loss(0.0), searched.fun)
        assert exact[i] >= found * (1 - 1e-13)
        assert found == pytest.approx(float(exact[i]), rel=1e-8)


# ----------------------------------------------------------------------------------------------------------------- DC3


def test_knapsack_equalities_hold_and_a_feasible_point_is_a_bound():
    from dual_lagrangian.dc3 import KnapsackDual, violation

    k = knapsacks(4, 3, 12)
    dual = KnapsackDual(k)
    free = torch.randn(4, 15, dtype=torch.float64)
    y, upper, lower = dual.complete(free).slacks.split((3, 12, 12), -1)
    r = k.c - (k.A.mT @ dual.multipliers(y).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(dual.value.unsqueeze(-1) * (lower - upper), r)
    y = torch.rand(4, 3, dtype=torch.float64)
    best = dual.complete(torch.cat([y, dual.margin(y).relu()], -1))
    assert violation(best).max() == 0
    torch.testing.assert_close(dual.value * best.objective, certified(k, dual.multipliers(best.free)))


def test_planning_cones_are_tight_at_the_completed_point():
    from dual_lagrangian.dc3 import PlanningDual, violation

    k = plans(4, 6)
    dual = PlanningDual(k)
    y = torch.rand(4, 1, dtype=torch.float64)
    best = dual.complete(torch.cat([y, (dual.free_part + y).sqrt()], -1))
    assert violation(best).max() == 0
    torch.testing.assert_close(dual.value * best.objective, certified(k, dual.multipliers(best.free)))
    above = dual.complete(torch.cat([y, 1.1 * (dual.free_part + y).sqrt()], -1))
    torch.testing.assert_close(violation(above)[..., -6:], 0.1 * (dual.free_part + y).sqrt())


def test_correction_is_gradient_descent_on_half_the_squared_violation():
    from dual_lagrangian.dc3 import KnapsackDual, correct, violation

    dual = KnapsackDual(knapsacks(4, 3, 12))
    free = torch.randn(4, 15, dtype=torch.float64)
    y, upper, lower = violation(dual.complete(free)).split((3, 12, 12), -1)
    expected = free + 1e-2 * torch.cat([y + (dual.N @ lower.unsqueeze(-1)).squeeze(-1), upper + lower], -1)
    torch.testing.assert_close(correct(dual, free, steps=1, step=1e-2).free, expected)
    before, after = (violation(correct(dual, free, steps, 1e-2)).square().sum(-1) for steps in (0, 50))
    assert (after < 0.3 * before).all()
    with torch.no_grad():  # also where nothing is recorded
        torch.testing.assert_close(correct(dual, free, steps=1, step=1e-2).free, expected)
    y = torch.rand(4, 3, dtype=torch.float64)
    inside = torch.cat([y, dual.margin(y).relu()], -1)
    torch.testing.assert_close(correct(dual, inside).free, inside, rtol=0, atol=0)


def test_dc3_learns_and_is_judged():
    from dual_lagrangian.dc3 import DC3, PENALTY, judge, train_dc3, violation
    from dual_lagrangian.networks import Flat, PlanningPrice
    from dual_lagrangian.optima import exact_plans

    data = plans(256, 6)
    optima = exact_plans(data)
    small = ProductionPlanning(*(t.float() for t in data))

    def loss(model):
        point = model(small)
        return float((PENALTY * violation(point).square().sum(-1) - point.objective).mean().detach())

    for prices in (PlanningPrice(1, 8), Flat(data.features, 7, 32, torch.ones(7))):
        model = DC3(prices)
        before = loss(model)
        train_dc3(model, data, 1.0, steps=60, batch=64, progress=False)
        assert loss(model) < before - 0.02
        found = judge(model, data, optima)
        assert found.completed >= 0
        assert found.above > 0.1 and found.violation > 0.005  # the soft penalty lets it claim too much
        assert abs(found.claimed) < 0.1


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("newton", [False, True])
def test_knapsack_prices_have_the_units_of_the_data(newton):
    from dual_lagrangian.networks import KnapsackPrices

    network = KnapsackPrices(newton=newton).double()
    torch.nn.init.normal_(network.head[-1].weight)
    k = knapsacks(3, 4, 25)
    y = network(k)
    rows, items = torch.randperm(4), torch.randperm(25)
    shuffled = Knapsack(k.prices[:, items], k.weights[:, rows][..., items], k.capacity[:, rows])
    units = torch.tensor([1.0, 10.0, 0.1, 3.0], dtype=torch.float64)
    scaled = Knapsack(5 * k.prices, units.unsqueeze(-1) * k.weights, units * k.capacity)
    with torch.no_grad():
        torch.testing.assert_close(network(shuffled), y[:, rows], rtol=1e-9, atol=0)
        torch.testing.assert_close(network(scaled), 5 * y / units, rtol=1e-9, atol=0)


def test_planning_price_has_the_units_of_the_data():
    from dual_lagrangian.networks import PlanningPrice

    network = PlanningPrice().double()
    torch.nn.init.normal_(network.head[-1].weight)
    k = plans(3, 25)
    items = torch.randperm(25)
    d, e, rho = (t[:, items] for t in k[:3])
    other = ProductionPlanning(7 * d, 7 * e, 3 * rho, 3 * k.capacity)
    torch.testing.assert_close(network(other), 7 / 3 * network(k), rtol=1e-9, atol=0)


def test_recipe_tells_whether_it_came_to_its_end():
    from dual_lagrangian.networks import PlanningPrice
    from dual_lagrangian.optima import exact_plans
    from dual_lagrangian.training import proxy_of, train

    data = plans(64, 4)
    optima = exact_plans(data)
    for epochs, expected in ((3, False), (2000, True)):
        proxy = proxy_of(PlanningPrice(1, 4), data)
        record, curve, ended = train(
            proxy, data, data, optima, patience=1, batch_size=64, epochs=epochs, progress=False
        )
        assert ended is expected
        assert len(curve) == len(record.losses)
        bound = proxy(data, data.A, data.b, data.c).bound.detach()
    assert min(gap for _, gap in curve) == pytest.approx(float(((optima - bound) / optima).mean()), rel=1e-6)
