"""Dual bounds against the optimum of the whole program.

Oracles: the optimum and its multipliers by cvxpy with Clarabel, or HiGHS for linear programs; the paper's formulas for
its two experiments; bisection for production planning; a Python loop over instances.
"""

import itertools
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from difflayers.conic import (
    BoxCompletion,
    BoxQuadraticCompletion,
    Free,
    HyperbolicCompletion,
    NonNegative,
    Product,
    QuadraticCompletion,
    SecondOrder,
    SpectraplexCompletion,
    Zero,
    dual_bound,
    dual_bound_ex,
    sample_knapsack,
    sample_production_planning,
)
from tests.conic.dual_blocks import BLOCKS, LOWER, UPPER, Block, D, K, N, costs, numbers, rand

CONE = Product([(NonNegative(), 2), (SecondOrder(), 3), (Zero(), 1)])
blocks = pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)


def program(block: Block, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, b, c with a strictly feasible point: a mean of extreme points of the block."""
    k = block.completion.ndim
    event = (N,) if k == 1 else (K, K)
    A = rand(seed, 6, *event)
    A = (A + A.mT) / 2 if k == 2 else A
    if block.positive:
        A[:, 2:] = 0  # so that costs of t stay positive
        A[:, :2] = -A[:, :2].abs()
    none = torch.zeros(0, dtype=torch.float64)
    many = costs(block, seed + 1, 20)
    x = dual_bound(none, rand(0, 0, *event), none, many, block.completion).x.mean(0)
    inside = numbers([0.3, 0.1, 1.0, 0.2, -0.3, 0.0])
    b = (A * x).flatten(1).sum(-1) - inside
    return A, b, costs(block, seed + 2, 1)[0]


def optimum(block: Block, A: Tensor, b: Tensor, c: Tensor) -> tuple[float, Tensor]:
    """By Clarabel, with the multipliers of ``Ax - b in K``."""
    x = cp.Variable(c.shape, symmetric=c.ndim == 2)
    rows = [cp.sum(cp.multiply(a, x)) - v for a, v in zip(A.numpy(), b.numpy(), strict=True)]
    in_cone = [rows[0] >= 0, rows[1] >= 0, cp.SOC(rows[2], cp.hstack(rows[3:5])), rows[5] == 0]
    problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(c.numpy(), x))), [*in_cone, *block.constraints(x)])
    tolerances = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-10)
    value = float(problem.solve(solver=cp.CLARABEL, **tolerances))
    t, v = in_cone[2].dual_value
    y = [*(float(row.dual_value) for row in in_cone[:2]), *np.ravel(t), *np.ravel(v), -float(in_cone[3].dual_value)]
    return value, numbers(y)


# ------------------------------------------------------------------------------------------------------- weak duality


@blocks
def test_bounds_are_below_the_optimum_and_meet_it_at_the_multipliers(block: Block):
    A, b, c = program(block, 60)
    value, y = optimum(block, A, b, c)
    at_best = dual_bound(CONE.project_dual(y), A, b, c, block.completion).bound
    assert abs(float(at_best) - value) <= 1e-6 * max(1, abs(value))
    scale = 10 ** torch.linspace(-3, 1, 400, dtype=torch.float64).unsqueeze(-1)
    many = CONE.project_dual(torch.cat([scale * rand(61, 400, 6), y + 0.1 * scale * rand(62, 400, 6)]))
    bounds = dual_bound(many, A, b, c, block.completion).bound
    assert float(bounds.max()) <= value + 1e-9 * max(1, abs(value))
    assert float(bounds.max()) > value - 0.1 * max(1, abs(value))  # and some are close


def test_outside_of_the_dual_cone_it_is_no_bound():
    """min -x s.t. x >= 1/2, |x| <= 1 is -1, but y = -1 gives -1/2: the tests above can fail."""
    one = numbers([1.0])
    bound = dual_bound(-one, one[None], one / 2, -one, BoxCompletion(-1.0, 1.0)).bound
    assert bound.item() == -0.5


def test_quadratic_bounds_are_below_the_optimum_and_meet_it():
    Q, A, c = D @ D.T, rand(75, 2, N), rand(76, N)
    b = A @ ((LOWER + UPPER) / 2) - 0.1
    x = cp.Variable(N)
    rows, objective = A.numpy() @ x >= b.numpy(), cp.Minimize(cp.quad_form(x, Q.numpy()) / 2 + c.numpy() @ x)
    y = 2 * rand(77, 300, 2).abs()
    for box in ([], [x >= LOWER.numpy(), x <= UPPER.numpy()]):
        value = float(cp.Problem(objective, [rows, *box]).solve(solver=cp.CLARABEL))
        completion = BoxQuadraticCompletion(Q, LOWER, UPPER) if box else QuadraticCompletion(Q)
        best, at = torch.from_numpy(rows.dual_value), torch.from_numpy(x.value)
        w = at + rand(78, 300, N) if box else None
        assert float(dual_bound(y, A, b, c, completion, w=w).bound.max()) <= value + 1e-7
        met = dual_bound(best, A, b, c, completion, w=at if box else None).bound
        assert float(met) == pytest.approx(value, abs=1e-6)


@blocks
def test_supergradient_inequality(block: Block):
    A, b, c = program(block, 64)
    y = CONE.project_dual(rand(65, 50, 6)).requires_grad_()
    bound = dual_bound(y, A, b, c, block.completion).bound
    slope = torch.autograd.grad(bound.sum(), y)[0]
    other = CONE.project_dual(3 * rand(66, 50, 6))
    above = bound.unsqueeze(-1) + ((other - y.unsqueeze(1)) * slope.unsqueeze(1)).sum(-1)
    holds = dual_bound(other, A, b, c, block.completion).bound <= above + 1e-10
    assert bool(holds[torch.isfinite(bound)].all()) and bool(torch.isfinite(bound).sum() > 10)


@blocks
def test_gradients_are_the_tables(block: Block):
    A, b, c = program(block, 67)
    inputs = [t.clone().requires_grad_() for t in (CONE.project_dual(rand(68, 6)), A, b, c)]
    point = dual_bound(*inputs, block.completion)
    y, A, b, c = inputs
    x = point.x.detach()
    of_y, of_A, of_b, of_c = torch.autograd.grad(point.bound, inputs)
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(of_y, b - (A * x).flatten(1).sum(-1), **close)
    torch.testing.assert_close(of_b, y, **close)
    torch.testing.assert_close(of_c, x, **close)
    torch.testing.assert_close(of_A, -torch.tensordot(y.unsqueeze(-1), x.unsqueeze(0), 1), **close)


# ---------------------------------------------------------------------------------------- the paper's two experiments


def test_knapsack_is_the_papers_formula_and_meets_highs():
    instances = sample_knapsack(4, constraints=5, items=20, generator=torch.Generator().manual_seed(1))
    p, W, v = (t.double() for t in instances)
    of = instances._replace(prices=p, weights=W, capacity=v)
    y = rand(69, 4, 5).abs()
    bound = dual_bound(y, of.A, of.b, of.c, of.completion).bound
    papers = -(v * y).sum(-1) - torch.relu(p - torch.einsum("bmn,bm->bn", W, y)).sum(-1)
    torch.testing.assert_close(bound, papers)
    for i in range(4):
        found = linprog(-p[i].numpy(), W[i].numpy(), v[i].numpy(), bounds=(0, 1), method="highs")
        best = dual_bound(torch.from_numpy(-found.ineqlin.marginals), of.A[i], of.b[i], of.c[i], of.completion).bound
        assert float(best) == pytest.approx(found.fun, rel=1e-10)
        assert float(bound[i]) <= found.fun


def test_planning_is_the_papers_formula_and_meets_bisection_and_clarabel():
    of = sample_production_planning(3, items=7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    d, e, rho, v = of
    y = rand(70, 3, 1).abs()
    point = dual_bound(y, of.A, of.b, of.c, of.completion)
    torch.testing.assert_close(point.bound, -v * y.squeeze(-1) + 2 * (e * (d + rho * y)).sqrt().sum(-1))
    torch.testing.assert_close(point.x[:, :7], (e / (d + rho * y)).sqrt())
    for i in range(3):
        slope = lambda y: float((rho[i] * (e[i] / (d[i] + rho[i] * y)).sqrt()).sum() - v[i])  # noqa: B023, E731
        low, high = 0.0, 1.0
        while slope(high) > 0:
            high *= 2
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if slope(middle) > 0 else (low, middle)
        best = dual_bound(numbers([high if slope(0.0) > 0 else 0.0]), of.A[i], of.b[i], of.c[i], of.completion).bound
        x = cp.Variable(7)
        objective = cp.Minimize(d[i].numpy() @ x + e[i].numpy() @ cp.inv_pos(x))
        value = cp.Problem(objective, [rho[i].numpy() @ x <= float(v[i])]).solve(solver=cp.CLARABEL)
        assert float(best) == pytest.approx(value, rel=1e-7)
        assert float(point.bound[i]) <= value * (1 + 1e-9)


def test_matrix_programs_take_rows_of_matrices():
    """The same numbers as with vectors of entries, by hand."""
    S, A, y, b = rand(71, 3, 3), rand(72, 2, 3, 3), rand(73, 5, 2), rand(74, 2)
    bound = dual_bound(y, A, b, S, SpectraplexCompletion()).bound
    for i in range(5):
        M = (S - y[i, 0] * A[0] - y[i, 1] * A[1]).numpy()
        expected = float(b @ y[i]) + np.linalg.eigvals((M + M.T) / 2).real.min()
        assert float(bound[i]) == pytest.approx(expected, abs=1e-12)


# ----------------------------------------------------------------------------------------------------- batch and dtype


@pytest.mark.parametrize(
    "mask", list(itertools.product([False, True], repeat=6)), ids=lambda m: "".join("sb"[v] for v in m)
)
def test_any_subset_may_be_shared(mask):
    """Against a loop over instances; the gradient of what is shared is the sum."""
    events = [(2,), (2, 3), (2,), (3,), (3,), (3,)]
    inputs = [rand(80 + i, *((4,) if b else ()), *event) for i, (b, event) in enumerate(zip(mask, events, strict=True))]
    inputs[5] = inputs[5].abs() + 3
    inputs[4] = inputs[4] - 3
    leaves = [t.clone().requires_grad_() for t in inputs]
    weights = numbers([1.0, -0.5, 2.0, 0.3])

    def bound(y, A, b, c, lower, upper):
        return dual_bound(y, A, b, c, BoxCompletion(lower, upper)).bound

    value = bound(*leaves)
    batched = any(mask)
    found = torch.autograd.grad((value * weights).sum() if batched else value, leaves)
    loop = [t.clone().requires_grad_() for t in inputs]
    ones = [bound(*(t[i] if b else t for t, b in zip(loop, mask, strict=True))) for i in range(4 if batched else 1)]
    expected = torch.autograd.grad(
        sum(w * v for w, v in zip(weights.tolist() if batched else [1.0], ones, strict=True)), loop
    )
    torch.testing.assert_close(value, torch.stack(ones) if batched else ones[0])
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_point_has_the_batch_of_all_arguments():
    point = dual_bound(rand(1, 2), rand(2, 2, 3), rand(3, 5, 1, 2), rand(4, 3), BoxCompletion(numbers([0.0]), 1.0))
    assert point.bound.shape == (5, 1) and point.x.shape == (5, 1, 3) and point.z.shape == (5, 1, 6)


def test_empty_batches_and_no_rows():
    point = dual_bound(rand(1, 0, 2), rand(2, 2, 3), rand(3, 2), rand(4, 3), BoxCompletion(0.0, 1.0))
    assert point.bound.shape == (0,) and point.x.shape == (0, 3)
    c = numbers([1.0, -2.0])
    assert dual_bound(rand(1, 0), rand(2, 0, 2), rand(3, 0), c, BoxCompletion(0.0, 1.0)).bound.item() == -2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype):
    y, A, b, c = (t.to(dtype) for t in (rand(1, 2), rand(2, 2, N), rand(3, 2), rand(4, N)))
    completion = BoxCompletion(LOWER, UPPER)
    point = dual_bound(y, A, b, c, completion.to(dtype))
    wide = dual_bound(*(t.double() for t in (y, A, b, c)), completion.to(dtype).to(torch.float64))
    for got, expected in zip(point, wide, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_autocast_does_not_reach_the_bound():
    data = (rand(1, 2).float(), rand(2, 2, 3).float(), rand(3, 2).float(), rand(4, 3).float(), BoxCompletion(0.0, 1.0))
    expected = dual_bound(*data).bound
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dual_bound(*data).bound, expected)


def test_nan_stays_in_its_element():
    y = rand(90, 3, 6)
    y[1, 0] = math.nan
    for block in BLOCKS:
        A, b, c = program(block, 91)
        bound = dual_bound(y, A, b, c, block.completion, on_failure="nan").bound
        alone = dual_bound(y[[0, 2]], A, b, c, block.completion).bound
        assert torch.isnan(bound).tolist() == [False, True, False], block.name
        assert torch.equal(bound[[0, 2]], alone), block.name


def test_ex_reports_each_element():
    y, A, b = numbers([[1.0], [1.0]]), numbers([[1.0, 1.0]]), numbers([1.0])
    found = dual_bound_ex(y, A, b, numbers([[2.0, 2.0], [0.0, 2.0]]), HyperbolicCompletion())
    assert found.converged.tolist() == [True, False]
    assert found.value.bound.tolist() == [3.0, -math.inf]
    assert found.steps.shape == found.residual.shape == (2,)


# ----------------------------------------------------------------------------------------------------------- bad input


def _good():
    return {
        "y": rand(1, 5, 2),
        "A": rand(2, 2, 3),
        "b": rand(3, 2),
        "c": rand(4, 3),
        "completion": BoxCompletion(0.0, 1.0),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": [1.0]}, "y: expected a tensor, got list"),
        ({"y": rand(1, 5, 3)}, r"A: expected shape \(3, 3\) in its last dimensions as of y and c, got \(2, 3\)"),
        ({"c": rand(1, 4)}, r"A: expected shape \(2, 4\)"),
        ({"A": rand(2, 2, 2, 3)[:, 0]}, None),
        ({"A": rand(2, 4, 2, 3)}, "A: expected batch dimensions that broadcast with"),
        ({"b": rand(3, 3)}, r"b: expected shape \(2,\) in its last dimension as of y"),
        ({"b": rand(3, 2).float()}, "b: expected dtype torch.float64 as of y, got torch.float32"),
        ({"c": torch.zeros(3, dtype=torch.int64)}, "c: expected a floating-point tensor"),
        ({"completion": None}, "completion: expected a Completion, got NoneType"),
        ({"w": rand(3, 3)}, "w: expected None for BoxCompletion, got a tensor"),
        (
            {"completion": BoxQuadraticCompletion(torch.eye(3).double(), 0.0, 1.0)},
            "w: expected a tensor for BoxQuadratic",
        ),
        ({"on_failure": "explode"}, 'on_failure: expected "raise", "nan" or "ignore"'),
        ({"completion": SpectraplexCompletion()}, "A: expected at least 3 dimensions"),
        (
            {"c": math.nan * rand(4, 3), "completion": QuadraticCompletion(D[:3, :3] @ D[:3, :3].T)},
            "c: expected finite",
        ),
    ],
)
def test_bad_input_is_refused(change, message):
    call = _good() | change
    args = [call.pop(name) for name in ("y", "A", "b", "c", "completion")]
    if message is None:
        dual_bound(*args, **call)
        return
    with pytest.raises(ValueError, match=message):
        dual_bound(*args, **call)


def test_free_rows_have_no_multipliers():
    """A row of a free cone says nothing: its dual is the point zero."""
    assert torch.equal(Product([(Free(), 2)]).project_dual(rand(1, 2)), torch.zeros(2).double())
