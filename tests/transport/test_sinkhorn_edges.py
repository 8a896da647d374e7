"""What breaks transport solvers: empty things, zero mass, NaN, forbidden entries, extreme scales, bad input.

Oracles: the same problem in a benign form (shifted, scaled, cut to the entries that count), and batches without the bad
element, which must be equal to the bit.
"""

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor

from difflayers import SolveError, SolveWarning, Status
from difflayers.linalg import LU
from difflayers.transport import KernelSinkhorn, LogSinkhorn, Sinkhorn, sinkhorn, sinkhorn_ex, sinkhorn_value

D = torch.float64
INF, NAN = float("inf"), float("nan")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def unit(*shape: int, seed: int = 0) -> Tensor:
    t = rand(*shape, seed=seed) + 0.1
    return t / t.sum(-1, keepdim=True)


COST, A, B = rand(3, 4, 3), unit(3, 4, seed=1), unit(3, seed=2)


def close(got: Tensor, expected: Tensor, tol: float) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tol)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_unit_of_the_cost_does_not_matter(scale, dtype):
    cost, a, b = (t.to(dtype) for t in (COST, A, B))
    expected = sinkhorn(cost, a, b, eps=0.01, rho_a=0.5)
    close(sinkhorn(cost * scale, a, b, eps=0.01 * scale, rho_a=0.5 * scale), expected, 1e-12 if dtype == D else 1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_unit_of_the_mass_does_not_matter(scale):
    close(sinkhorn(COST, A * scale, B * scale, eps=0.01) / scale, sinkhorn(COST, A, B, eps=0.01), 1e-12)


@pytest.mark.parametrize("rho", [{}, {"rho_a": 0.5}, {"rho_b": 0.5}])
def test_shift_of_the_cost_moves_potentials_and_value_alone(rho):
    cost = (COST * 2**20).round() / 2**20  # so that the shift is exact
    for dtype, tol in ((D, 1e-11), (torch.float32, 2e-5)):
        c, a, b = (t.to(dtype) for t in (((cost * 2**10).round() / 2**10), A, B))
        plain, moved = (sinkhorn_ex(x, a, b, eps=0.01, **rho).value for x in (c, c + 1e4))
        close(moved.plan, plain.plan, tol)
        total = moved.f.unsqueeze(-1) + moved.g.unsqueeze(-2) - plain.f.unsqueeze(-1) - plain.g.unsqueeze(-2)
        close(total, torch.full_like(total, 1e4), 1e4 * tol)
        values = [sinkhorn_value(x, a, b, eps=0.01, **rho) for x in (c, c + 1e4)]
        close(values[1] - values[0], torch.full_like(values[0], 1e4), 1e4 * tol)


def test_eps_far_above_the_range_gives_the_product_of_the_masses():
    close(sinkhorn(COST, A, B, eps=1e9), A.unsqueeze(-1) * B, 1e-9)


@pytest.mark.parametrize("shape", [(1, 3), (4, 1), (1, 1)])
def test_one_row_or_one_column_leaves_no_choice(shape):
    n, m = shape
    cost, a, b = rand(2, n, m).requires_grad_(), unit(2, n, seed=1), unit(m, seed=2)
    plan = sinkhorn(cost, a, b, eps=0.1)
    close(plan, a.unsqueeze(-1) * b, 1e-14)
    assert float(torch.autograd.grad(plan.square().sum(), cost)[0].abs().max()) < 1e-14


def test_batches_empty_and_of_several_dimensions():
    empty = sinkhorn_ex(COST[:0].requires_grad_(), A[:0], B, eps=0.1)
    assert empty.value.plan.shape == (0, 4, 3)
    assert empty.status.shape == (0,)
    assert torch.autograd.grad(empty.value.plan.sum(), empty.value.plan)[0].shape == (0, 4, 3)
    cost, a, eps = rand(2, 1, 4, 3), unit(5, 4), rand(2, 5) + 0.05
    plan = sinkhorn(cost, a, B, eps=eps)
    for i in range(2):
        for j in range(5):
            close(plan[i, j], sinkhorn(cost[i, 0], a[j], B, eps=eps[i, j]), 1e-12)


@pytest.mark.parametrize("rho", [{}, {"rho_a": 0.5, "rho_b": 0.7}])
def test_elements_without_mass_are_zero_and_disturb_nobody(rho):
    a, b = A.clone(), B.expand(3, 3).clone()
    a[1], b[1] = 0, 0
    x = [t.requires_grad_() for t in (COST.clone(), a, b)]
    plan = sinkhorn(*x, eps=0.05, **rho)
    value = sinkhorn_value(*x, eps=0.05, **rho)
    assert bool((plan[1] == 0).all())
    assert float(value[1].detach()) == 0
    close(plan[[0, 2]], sinkhorn(COST, A, B, eps=0.05, **rho)[[0, 2]], 1e-12)
    for slope in torch.autograd.grad(plan.square().sum() + value.sum(), x):
        assert bool(torch.isfinite(slope).all())
    assert bool((sinkhorn(COST, a, b * 0, eps=0.05, rho_a=0.5, rho_b=0.7) == 0).all())


@pytest.mark.parametrize("solver", [KernelSinkhorn(), LogSinkhorn(), KernelSinkhorn(newton_steps=0)])
def test_a_bad_element_is_bad_alone(solver):
    for bad in (NAN, -INF):
        spoilt = COST.clone()
        spoilt[1, 0, 0] = bad
        good = sinkhorn(COST, A, B, eps=0.01, solver=solver)
        got = sinkhorn(spoilt, A, B, eps=0.01, solver=solver, on_failure="nan")
        close(got[[0, 2]], good[[0, 2]], 1e-14)
        assert bool(torch.isnan(got[1]).all())
        found = sinkhorn_ex(spoilt, A, B, eps=0.01, solver=solver)
        assert found.status.tolist() == [0, int(Status.DIVERGED), 0]
        with pytest.raises(ValueError, match=r"cost: expected finite numbers, got (1 NaN of 36|an infinite one)"):
            sinkhorn(spoilt, A, B, eps=0.01, solver=solver)


def test_an_element_does_not_feel_how_hard_the_others_are():
    cost = torch.stack([rand(12, 12), rand(12, 12, seed=1), rand(12, 12, seed=2)])
    eps = torch.tensor([0.1, 1e-4, 0.02], dtype=D)
    found = sinkhorn_ex(cost, eps=eps)
    for i in range(3):
        alone = sinkhorn_ex(cost[i], eps=eps[i])
        assert int(alone.steps) == int(found.steps[i])
        close(found.value.plan[i], alone.value.plan, 1e-13)


def test_infinite_cost_forbids_an_entry():
    """As a cost so large that nothing is left of the entry; gradients there are zero, and right elsewhere."""
    forbidden, large = COST.clone(), COST.clone()
    forbidden[:, 0, 0], large[:, 0, 0] = INF, 40.0
    weights = rand(3, 4, 3, seed=4)
    results = []
    for cost in (forbidden, large):
        x = [t.clone().requires_grad_() for t in (cost, A, torch.tensor(0.05, dtype=D))]
        plan = sinkhorn(x[0], x[1], B, eps=x[2])
        first = torch.autograd.grad((plan * weights).sum(), x, create_graph=True)
        second = torch.autograd.grad(first[2] + first[1].square().sum(), x)
        results.append((plan, *first, *second, sinkhorn_value(x[0], A, B, eps=0.05)))
    assert bool((results[0][0][:, 0, 0] == 0).all() and (results[0][1][:, 0, 0] == 0).all())
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_forbidden_entries_without_a_plan_are_reported():
    row = COST.clone()
    row[1, 0] = INF
    with pytest.raises(
        ValueError, match="cost: expected an entry below inf in every row and column, got none in row 0"
    ):
        sinkhorn(row, A, B, eps=0.1)
    assert sinkhorn_ex(row, A, B, eps=0.1).status.tolist() == [0, int(Status.DIVERGED), 0]
    pattern = rand(4, 4)
    pattern[:2, :3] = INF  # two rows that only share one column
    with pytest.raises(SolveError, match="INFEASIBLE"):
        sinkhorn(pattern, eps=0.1, solver=KernelSinkhorn(max_steps=600))
    others = torch.stack([pattern, rand(4, 4)])
    assert sinkhorn_ex(others, eps=0.1).status.tolist() == [int(Status.INFEASIBLE), 0]


@pytest.mark.parametrize(("dtype", "large"), [(torch.float64, 1e15), (torch.float64, 1e20), (torch.float32, 1e9)])
def test_large_costs_are_as_good_as_forbidden_entries(dtype: torch.dtype, large: float):
    """A mask of large numbers, and numbers without a meaning in rows and columns without mass, change no plan."""
    cost, mask = rand(12, 10).to(dtype), rand(12, 10) < 0.5
    mask[torch.arange(10), torch.arange(10)] = False
    tol = 1e-8 if dtype == torch.float64 else 1e-5
    for eps in (0.1, 0.01):
        masked = sinkhorn_ex(torch.where(mask, large, cost), eps=eps)
        assert int(masked.status) == 0 and float(masked.residual) < tol
        close(masked.value.plan, sinkhorn(torch.where(mask, INF, cost), eps=eps), tol)
    for padding in (large, -large):
        padded = torch.nn.functional.pad(cost, (0, 3, 0, 2), value=padding)
        a, b = cost.new_full((14,), 1 / 12), cost.new_full((13,), 1 / 10)
        a[12:], b[10:] = 0, 0
        close(sinkhorn(padded, a, b, eps=0.1)[:12, :10], sinkhorn(cost, eps=0.1), tol)


def test_rows_out_of_reach_of_a_penalty_have_gradients():
    """Their masses are too small for a number; everything else has the derivatives that it has without them."""
    for dtype, far, tol in ((torch.float32, 300.0, 1e-4), (torch.float64, 5000.0, 1e-7)):
        cost = torch.tensor([[0, 1], [1, 0], [far, far]], dtype=dtype, requires_grad=True)
        near = cost.detach()[:2].clone().requires_grad_()
        for rho_b in (0.5, None):
            a, b = cost.new_full((3,), 0.5), cost.new_full((2,), 0.5)
            plan = sinkhorn(cost, a, b, eps=1.0, rho_a=0.5, rho_b=rho_b)
            plain = sinkhorn(near, a[:2], b, eps=1.0, rho_a=0.5, rho_b=rho_b)
            close(plan[:2], plain, tol)
            first = torch.autograd.grad(plan.square().sum(), cost, create_graph=True)[0]
            expected = torch.autograd.grad(plain.square().sum(), near, create_graph=True)[0]
            close(first[:2], expected, tol)
            second = torch.autograd.grad(first.square().sum(), cost)[0]
            close(second[:2], torch.autograd.grad(expected.square().sum(), near)[0], tol)
            assert bool((first[2] == 0).all() and (second[2] == 0).all())
            found = sinkhorn_ex(cost, a, b, eps=1.0, rho_a=0.5, rho_b=rho_b).value
            slope = torch.autograd.grad(found.f[2], cost)[0][2]
            close(slope, torch.softmax(-cost.detach()[2] + found.g.detach(), -1) / 3, tol)  # of a soft minimum


def test_out_of_reach_is_said():
    """A tolerance below rounding is rounding; too few steps are reported; float32 at a tiny eps is honest."""
    assert bool(sinkhorn_ex(COST, A, B, eps=0.01, solver=KernelSinkhorn(rtol=0.0)).converged.all())
    few = KernelSinkhorn(max_steps=10, newton_steps=0)
    found = sinkhorn_ex(COST, A, B, eps=0.001, solver=few)
    assert found.status.tolist() == [int(Status.MAX_STEPS)] * 3
    sums = (found.value.plan.sum(-1) - A).abs().sum(-1) + (found.value.plan.sum(-2) - B).abs().sum(-1)
    close(found.residual, sums, 1e-12)
    with pytest.warns(SolveWarning, match="3 of 3 batch elements"):
        sinkhorn(COST, A, B, eps=0.001, solver=few)
    tiny = sinkhorn_ex(COST.float(), eps=1e-6)
    assert float((found.value.plan.sum((-2, -1)) - 1).abs().max()) < 1e-12
    reached = (tiny.value.plan.sum(-1) - 0.25).abs().sum(-1) + (tiny.value.plan.sum(-2) - 1 / 3).abs().sum(-1)
    assert bool((tiny.residual >= 0.5 * reached).all())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"cost": COST.long()}, "cost: expected a floating-point tensor"),
        ({"cost": [[1.0]]}, "cost: expected a tensor"),
        ({"cost": COST[:, :0]}, "cost: expected at least one row"),
        ({"a": A[:, :3]}, r"a: expected shape \(4,\) as cost has rows, got \(3,\)"),
        ({"b": B.float()}, "b: expected dtype"),
        ({"a": A[:2]}, "a: expected batch dimensions"),
        ({"a": -A}, "a: expected masses of at least 0"),
        ({"b": torch.tensor([1.1, -0.1, 0.0], dtype=D)}, "b: expected masses of at least 0, got others in element 0"),
        ({"a": A * 1.001}, "a, b: expected equal totals, or a penalty rho_a or rho_b, got 1.001 and 1 in element 0"),
        ({"a": A * 0}, "a, b: expected equal totals, or a penalty"),
        ({"b": B * NAN}, "b: expected finite"),
        ({"eps": 0}, "eps: expected a number above 0, got 0"),
        ({"eps": NAN}, "eps: expected a number above 0"),
        ({"eps": None}, "eps: expected a number or a tensor, got NoneType"),
        ({"eps": "1"}, "eps: expected a number or a tensor, got str"),
        ({"eps": torch.tensor([1.0, 0.0, 1.0], dtype=D)}, "eps: expected numbers above 0, got others in element 1"),
        ({"rho_a": -1.0}, "rho_a: expected a number above 0"),
        ({"rho_b": torch.tensor(0.0, dtype=D)}, "rho_b: expected numbers above 0"),
        ({"solver": "log"}, "solver: expected KernelSinkhorn"),
        ({"adjoint": LU()}, r"adjoint: expected Cholesky\(\), CG\(\) or None"),
        ({"warm_start": 3}, "warm_start: expected a Solution of sinkhorn_ex"),
        ({"warm_start": sinkhorn_ex(COST[:, :3], eps=1.0)}, "warm_start: expected potentials of 4 rows and 3 columns"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_bad_input_is_named(change, match, turned):
    data = {"cost": COST, "a": A, "b": B, "eps": 0.1} | change
    if turned and isinstance(data["cost"], Tensor) and not set(change) & {"a", "b", "rho_a", "rho_b", "warm_start"}:
        data |= {"cost": data["cost"].mT, "a": B, "b": A}
    with pytest.raises(ValueError, match=match):
        sinkhorn(**data)


def test_bad_options_are_named():
    for options, match in (
        ({"rtol": -1.0}, "rtol: expected"),
        ({"max_steps": 0}, "max_steps: expected"),
        ({"check_every": 0}, "check_every: expected"),
        ({"newton_steps": -1}, "newton_steps: expected"),
    ):
        with pytest.raises(ValueError, match=match):
            KernelSinkhorn(**options)
    with pytest.raises(ValueError, match="eps: expected a finite number above 0"):
        Sinkhorn(0.0)
    with pytest.raises(ValueError, match="on_failure"):
        Sinkhorn(1.0, on_failure="x")


def test_a_side_that_must_move_what_is_not_there_is_an_error():
    with pytest.raises((SolveError, ValueError)):
        sinkhorn(COST, A * 0, B, eps=0.1, rho_a=1.0)


def test_module_is_the_function_and_learns():
    layer = Sinkhorn(0.1, rho_a=0.5)
    close(layer(COST, A, B), sinkhorn(COST, A, B, eps=0.1, rho_a=0.5), 0)
    assert not list(layer.parameters())
    learned = Sinkhorn(0.1, rho_b=0.5, learnable=True, solver=LogSinkhorn()).double()
    for twin in (copy.deepcopy(learned), pickle.loads(pickle.dumps(learned))):
        assert (
            repr(twin)
            == repr(learned)
            == (
                "Sinkhorn(eps=0.1, rho_b=0.5, learnable=True, solver=LogSinkhorn(rtol=None, max_steps=10000, "
                "check_every=10, scaling=True, newton_steps=100))"
            )
        )
    assert set(learned.state_dict()) == {"log_eps", "log_rho_b"}
    learned(COST).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad != 0) for p in learned.parameters())


def test_nothing_is_changed_in_place_and_no_warning_is_given():
    data = [t.clone() for t in (COST, A, B)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkhorn(data[0].expand(2, 3, 4, 3), data[1], data[2], eps=1e-3)
    for got, before in zip(data, (COST, A, B), strict=True):
        assert torch.equal(got, before)
