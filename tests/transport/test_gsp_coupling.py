"""The coupling of generalized sum pooling.

Oracles, written down before the code: an interior-point method on the exponential cone for the whole problem; the
masses that the constraints prescribe; the multiplier to a hundred digits where doubles cannot tell shares from 0 and
1; the closed formulas of the derivative; differences of fourth order.
"""

from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor
from torch.func import grad

import difflayers
from difflayers.transport import gsp_coupling

D = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


@pytest.mark.parametrize(
    ("m", "n", "ratio", "gamma"), [(3, 5, 0.35, 4.0), (2, 4, 0.5, 15.0), (4, 3, 0.9, 1.0), (1, 6, 0.05, 8.0)]
)
def test_the_coupling_solves_the_conic_program(m, n, ratio, gamma):
    import cvxpy as cp

    cost, stay = rand(m, n), rand(n, seed=1)
    residual, plan = cp.Variable(n), cp.Variable((m, n))  # in units of 1 / n, where the solver is at its best
    spread = cp.sum(-cp.entr(residual) - residual) + cp.sum(-cp.entr(plan) - plan)
    energy = gamma * (stay.numpy() @ residual + cp.sum(cp.multiply(cost.numpy(), plan))) + spread
    constraints = [residual + cp.sum(plan, axis=0) == 1, cp.sum(plan) == n * ratio]
    problem = cp.Problem(cp.Minimize(energy), constraints)
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    ours = gsp_coupling(cost, ratio, gamma, residual_cost=stay)
    assert (ours.residual - torch.from_numpy(residual.value) / n).abs().max() < 1e-8
    assert (ours.plan - torch.from_numpy(plan.value) / n).abs().max() < 1e-8


RATIOS = (1e-6, 1e-3, 1 / 49, 0.1, 10 / 49, 0.3, 0.5, 0.9, 48 / 49, 1 - 1e-6, 1 - 1e-9, 1.0)


@pytest.mark.parametrize("gamma", [0.1, 1.0, 20.0, 1e3, 1e4])
def test_masses_hold_to_rounding(gamma):
    cost = rand(4, 8, 49) * torch.tensor([0.01, 0.1, 1.0, 2.0], dtype=D)[:, None, None]
    with difflayers.trace() as solves:
        for ratio in RATIOS:
            residual, plan = gsp_coupling(cost, ratio, gamma)
            assert (plan.sum((-2, -1)) / ratio - 1).abs().max() < 1e-10
            assert (residual.sum(-1) - (1 - ratio)).abs().max() < 1e-14
            assert (residual + plan.sum(-2) - 1 / 49).abs().max() < 1e-15
            assert plan.min() >= 0
            assert residual.min() >= 0
    assert max(int(solve.steps.max()) for solve in solves) <= 12  # the root is found, not approached


@pytest.mark.parametrize("gamma", [0.1, 20.0, 1e3, 1e4])
@pytest.mark.parametrize("ratio", [1e-6, 0.3, 0.5, 10 / 49, 1 - 1e-6, 1.0])
def test_single_precision_is_finite_and_right(gamma, ratio):
    cost = rand(4, 8, 49).float().requires_grad_()
    strength = torch.tensor(gamma, requires_grad=True)
    share = torch.tensor(ratio, requires_grad=True)
    residual, plan = gsp_coupling(cost, share, strength)
    assert plan.dtype == residual.dtype == torch.float32
    # the layer gets the rounded cost, and so does its double-precision twin
    exact = gsp_coupling(cost.detach().double(), share.detach().double(), gamma)
    assert (plan.detach().sum((-2, -1)) / ratio - 1).abs().max() < 1e-5
    assert (plan.detach() - exact.plan).abs().max() < 1e-6 * gamma * plan.detach().max() + 1e-7
    weights = rand(*plan.shape, seed=2).float()
    slopes = torch.autograd.grad((weights * plan).sum() + residual.square().sum(), (cost, strength, share))
    assert all(torch.isfinite(t).all() for t in slopes)


def multiplier(k: list[float], total: Decimal) -> list[Decimal]:
    """Derivatives of the shares at the root of ``sum_j sigma(s + k_j) = total``, to 100 digits."""
    with localcontext() as context:
        context.prec = 100
        numbers = [Decimal(x) for x in k]
        low, high = Decimal(-300), Decimal(300)
        for _ in range(330):
            middle = (low + high) / 2
            above = sum(1 / (1 + (-middle - x).exp()) for x in numbers) > total
            low, high = (low, middle) if above else (middle, high)
        each = [1 / (2 + (low + x).exp() + (-low - x).exp()) for x in numbers]
        return [x / sum(each) for x in each]


@pytest.mark.parametrize("gap", [0.5, 40.0, 90.0])
def test_the_ratio_has_a_derivative_where_shares_are_whole(gap):
    k = [0.0, 1.25, 1.0 + gap, 2.5 + gap]  # two of four positions, and a step of any size between them
    ratio = torch.tensor(0.5, dtype=D, requires_grad=True)
    plan = gsp_coupling(-torch.tensor([k], dtype=D), ratio, 1.0).plan.squeeze(0)
    slopes = torch.stack([torch.autograd.grad(p, ratio, retain_graph=True)[0] for p in plan])
    expected = torch.tensor([float(x) for x in multiplier(k, Decimal(2))], dtype=D)
    assert (slopes - expected).abs().max() < 1e-12
    assert (slopes.sum() - 1).abs() < 1e-12


def coupling(cost: Tensor, stay: Tensor, ratio: Tensor, gamma: Tensor) -> Tensor:
    residual, plan = gsp_coupling(cost, ratio, gamma, residual_cost=stay)
    return torch.cat([residual.unsqueeze(-2), plan], -2)


def inputs() -> tuple[Tensor, ...]:
    return rand(3, 5), rand(5, seed=1), torch.tensor(0.35, dtype=D), torch.tensor(6.0, dtype=D)


def test_the_gradient_is_that_of_the_closed_formulas():
    x = [t.requires_grad_() for t in inputs()]
    cost, stay, ratio, gamma = x
    value, G = coupling(*x), rand(4, 5, seed=3) - 0.5
    slopes = torch.autograd.grad(value, x, G)
    n, (rho, pi), (G_rho, G_pi) = 5, value.detach().split([1, 3]), G.split([1, 3])
    rho, G_rho = rho.squeeze(0), G_rho.squeeze(0)
    v, t, w = rho * G_rho + (pi * G_pi).sum(0), pi.sum(0), (pi * G_pi).sum()
    beta = (w - n * (t * v).sum()) / (ratio - n * t.square().sum())
    alpha = n * (v - t * beta)
    cost_bar, stay_bar = -gamma * pi * (G_pi - alpha - beta), -gamma * rho * (G_rho - alpha)
    gamma_bar = ((cost_bar * cost).sum() + (stay_bar * stay).sum()) / gamma
    for got, expected in zip(slopes, (cost_bar, stay_bar, beta, gamma_bar), strict=True):
        assert (got - expected).abs().max() < 1e-12


@pytest.mark.parametrize("order", [1, 2, 3])
def test_derivatives_of_three_orders_are_those_of_differences(order):
    x = inputs()
    moves = [rand(*t.shape, seed=10 + i) - 0.5 for i, t in enumerate(x)]
    moves[2] = moves[2] * 0.3
    weights = rand(4, 5, seed=3) - 0.5

    def along(t: Tensor) -> Tensor:
        value = coupling(*(p + t * d for p, d in zip(x, moves, strict=True)))
        return (weights * value + weights.square() * value.square()).sum()

    lower = along
    for _ in range(order - 1):
        lower = grad(lower)
    zero, step = torch.zeros((), dtype=D), 1e-3
    steps = ((1, 8), (-1, -8), (2, -1), (-2, 1))
    expected = sum(w * float(lower(zero + k * step)) for k, w in steps) / (12 * step)
    assert abs(float(grad(lower)(zero)) - expected) < 1e-8 * max(1, abs(expected))


def test_an_element_does_not_feel_the_others():
    cost = rand(6, 4, 9) * torch.tensor([1e-3, 0.1, 1.0, 5.0, 50.0, 1e3], dtype=D)[:, None, None]
    ratio = torch.tensor([0.1, 0.9, 1 / 3, 0.5, 1.0, 1e-5], dtype=D)
    together = gsp_coupling(cost, ratio, 7.0)
    spoiled = cost.clone()
    spoiled[2] = torch.nan
    beside = gsp_coupling(spoiled, ratio, 7.0)
    for i in range(6):
        alone = gsp_coupling(cost[i], ratio[i], 7.0)
        assert (together.plan[i] - alone.plan).abs().max() < 1e-15
        assert (together.residual[i] - alone.residual).abs().max() < 1e-15
        assert i == 2 or torch.equal(beside.plan[i], together.plan[i])
    assert beside.plan[2].isnan().all()


def test_batch_dimensions_of_all_arguments_broadcast():
    cost, stay, ratio, gamma = rand(2, 1, 3, 4), rand(5, 4, seed=1), rand(2, 5, seed=2), 1 + rand(1, 5, seed=3)
    value = coupling(cost, stay, ratio, gamma)
    assert value.shape == (2, 5, 4, 4)
    for i in range(2):
        for j in range(5):
            alone = coupling(cost[i, 0], stay[j], ratio[i, j], gamma[0, j])
            assert (value[i, j] - alone).abs().max() < 1e-15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0.0}, "ratio: expected more than 0, got 0"),
        ({"ratio": 1.5}, "ratio: expected at most 1, got 1.5"),
        ({"ratio": float("nan")}, "ratio: expected more than 0, got nan"),
        ({"ratio": torch.tensor([0.5, 2.0], dtype=D)}, "ratio: expected at most 1, got 0.5 to 2"),
        ({"ratio": torch.tensor(0.5)}, "ratio: expected dtype torch.float64 as of cost"),
        ({"ratio": None}, "ratio: expected a number or a tensor, got None"),
        ({"gamma": None}, "gamma: expected a number or a tensor, got None"),
        ({"ratio": "half"}, "ratio: expected a number or a tensor, got str"),
        ({"gamma": -1.0}, "gamma: expected more than 0, got -1"),
        ({"gamma": float("inf")}, "gamma: expected a finite number, got inf"),
        ({"cost": torch.ones(3, dtype=D)}, "cost: expected at least 2 dimensions"),
        ({"cost": torch.ones(0, 3, dtype=D)}, "cost: expected at least one row and one column"),
        ({"cost": torch.ones(2, 3, dtype=torch.int64)}, "cost: expected a floating-point tensor"),
        ({"residual_cost": torch.ones(2, dtype=D)}, r"residual_cost: expected shape \(3,\)"),
    ],
)
def test_wrong_input_is_refused(change, message):
    arguments = {"cost": torch.ones(2, 3, dtype=D), "ratio": 0.5, "gamma": 1.0} | change
    cost, ratio, gamma = (arguments.pop(name) for name in ("cost", "ratio", "gamma"))
    with pytest.raises(ValueError, match=message):
        gsp_coupling(cost, ratio, gamma, **arguments)
