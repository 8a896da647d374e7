"""Newton's method with sparse Hessians against the assignment problem, the default solver, and a fixed cut.

Oracles, written down before the code: scipy's linear_sum_assignment, to whose permutation the plan tends at small eps,
and whose dual bounds what the plan may lose; the plans and derivatives of KernelSinkhorn, another iteration for the
same plan; the marginals, which need no solver at all. Claims: on uniform costs at eps = 1 / 1200 at most 60 iterations
in all to rounding, where Sinkhorn's iteration needs more than 10,000; a cut to the 2n largest entries stagnates.
"""

import math
import subprocess
import sys

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from difflayers import SolveWarning, trace
from difflayers._solution import Status
from difflayers.transport import KernelSinkhorn, SparseNewton, _sparse_steps, sinkhorn, sinkhorn_ex
from difflayers.transport._iteration import Problem, start
from difflayers.transport._kernel_sinkhorn import kernel_sinkhorn
from difflayers.transport._sinkhorn_solve import default_solver

D = torch.float64
EPS = 1 / 1200
ALONE = SparseNewton(rtol=1e-12, scaling=False, fallback=False)


def uniform(n: int, m: int | None = None, seed: int = 0, batch: tuple[int, ...] = ()) -> Tensor:
    return torch.rand(*batch, n, m or n, generator=torch.Generator().manual_seed(seed), dtype=D)


def masses(*shape: int, seed: int = 0) -> Tensor:
    a = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=D) + 0.1
    return a / a.sum(-1, keepdim=True)


def sums_error(plan: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    n, m = plan.shape[-2:]
    rows, columns = 1 / n if a is None else a, 1 / m if b is None else b
    return (plan.sum(-1) - rows).abs().sum(-1) + (plan.sum(-2) - columns).abs().sum(-1)


@pytest.fixture
def sparse_only(monkeypatch):
    """Sizes at which all entries would be kept by right are treated as larger ones are; nothing is factorised."""
    monkeypatch.setattr(_sparse_steps, "CROWDED", math.inf)
    monkeypatch.setattr(_sparse_steps, "SMALL", 0)
    monkeypatch.setattr(_sparse_steps.schur, "DENSE_LIMIT", 0)
    monkeypatch.setattr(_sparse_steps, "_MOST", 2000)


# --------------------------------------------------------------------------------------------------------- assignments


@pytest.mark.parametrize(("n", "seed"), [(500, 0), (500, 1), (200, 0), (200, 1), (200, 2), (200, 3)])
def test_assignment_in_sixty_iterations_where_sinkhorn_takes_ten_thousand(n, seed):
    cost = uniform(n, seed=seed)
    found = sinkhorn_ex(cost, eps=EPS, solver=ALONE)
    assert bool(found.converged)
    assert int(found.steps) <= 60
    plan = found.value.plan
    assert float(sums_error(plan)) < 1e-12
    if (n, seed) == (200, 0):  # the example shows it for 500
        plain = KernelSinkhorn(rtol=1e-12, newton_steps=0, scaling=False, max_steps=10_000, check_every=1000)
        slow = sinkhorn_ex(cost, eps=EPS, solver=plain)
        assert int(slow.steps) == 10_000
        assert float(slow.residual) > 1e-8
    torch.testing.assert_close(plan, sinkhorn(cost, eps=EPS, solver=KernelSinkhorn(rtol=1e-13)), rtol=0, atol=1e-10)
    rows, columns = linear_sum_assignment(cost.numpy())
    best = float(cost[rows, columns].mean())
    # <C, P> + eps KL is smallest at the plan, and KL is between 0 and log n
    assert best - 1e-12 <= float((cost * plan).sum()) <= best + EPS * math.log(n)


def test_plan_tends_to_the_permutation():
    cost = uniform(40, seed=4)
    rows, columns = linear_sum_assignment(cost.numpy())
    permutation = torch.zeros(40, 40, dtype=D)
    permutation[rows, columns] = 1 / 40
    cost[rows, columns] -= 0.01  # the best by a margin
    errors = [
        float((sinkhorn(cost, eps=eps, solver=SparseNewton()) - permutation).abs().sum()) for eps in (1e-2, 1e-3, 1e-4)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-12


def from_sinkhorn(cost: Tensor, steps: int = 20) -> tuple[Problem, Tensor, Tensor, Tensor]:
    """A problem with uniform masses after few of Sinkhorn's steps, and the tolerance."""
    cost = cost.reshape(-1, *cost.shape[-2:])
    B, n, m = cost.shape
    zero = cost.new_zeros(B)
    problem = Problem(cost, cost.new_full((B, n), 1 / n), cost.new_full((B, m), 1 / m), zero + EPS, zero, zero)
    tol = zero + 1e-12
    f, g = kernel_sinkhorn(problem, *start(problem), tol, max_steps=steps, check_every=steps, scaling=False)[:2]
    return problem, f, g, tol


def two_a_row(plan: Tensor, _: Tensor, cut: _sparse_steps._Cut) -> tuple[Tensor, _sparse_steps._Cut]:
    """The published rule: the 2n largest entries."""
    flat = plan.flatten(1)
    largest = flat.topk(2 * plan.shape[-1], dim=-1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter(-1, largest, True).view_as(plan), cut


@pytest.mark.parametrize("seed", [1, 3])
def test_a_fixed_cut_stagnates_and_ours_does_not(sparse_only, monkeypatch, seed):
    data = from_sinkhorn(uniform(200, seed=seed))
    assert float(_sparse_steps.sparse_newton(*data, max_steps=25)[2]) < 1e-12
    monkeypatch.setattr(_sparse_steps, "_kept", two_a_row)
    assert float(_sparse_steps.sparse_newton(*data, max_steps=25)[2]) > 1e-7


def test_the_cut_widens_where_the_error_does_not_halve(sparse_only, monkeypatch):
    """A threshold that leaves far too little at first: doubling alone must find what is needed."""
    data = from_sinkhorn(uniform(200, seed=1))
    monkeypatch.setattr(_sparse_steps, "LEAST", 1)
    monkeypatch.setattr(_sparse_steps, "_kept", only_least)
    counts.clear()
    error = _sparse_steps.sparse_newton(*data, max_steps=100)[2]
    assert float(error) < 1e-12
    assert counts[0] == 200
    assert counts[-1] > 400  # which stagnates


counts: list[int] = []


def only_least(plan: Tensor, _: Tensor, cut: _sparse_steps._Cut) -> tuple[Tensor, _sparse_steps._Cut]:
    flat, k = plan.flatten(1), int(cut.least)
    counts.append(k)
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, flat.topk(k, dim=-1).indices, True).view_as(plan)
    return kept, cut._replace(taken=cut.least)


def test_products_are_sparse(monkeypatch):
    """What is multiplied has few entries; the dense system is not asked."""
    seen = []
    inside = _sparse_steps._conjugate_gradients

    def counted(A, *rest):
        seen.append(A.matrix.values().numel() / A.matrix.shape[0])
        assert A.matrix.layout == A.transpose.layout == torch.sparse_csr
        return inside(A, *rest)

    monkeypatch.setattr(_sparse_steps, "_conjugate_gradients", counted)
    monkeypatch.setattr(_sparse_steps, "direction", None)
    assert bool(sinkhorn_ex(uniform(500), eps=EPS, solver=ALONE).converged)
    assert min(seen) >= 4
    assert max(seen) < 20


# --------------------------------------------------------------------------------------------------- the same plans


PENALTIES = [{}, {"rho_a": 0.5}, {"rho_b": 0.3}, {"rho_a": 0.5, "rho_b": 2.0}]


@pytest.mark.parametrize("rho", PENALTIES)
@pytest.mark.parametrize("eps", [1.0, 0.05, 0.003, 1e-3])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_plans_are_those_of_the_default(sparse_only, rho, eps, shape):
    cost = uniform(*shape, seed=2, batch=(3,)) - 0.3
    a, b = masses(3, shape[0], seed=1), masses(3, shape[1], seed=2)
    cost[0, 3, 4:9] = torch.inf
    a[1, 2] = 0
    a[1] /= a[1].sum()
    # the staged steps that need no factor, and nothing behind them
    found = sinkhorn_ex(cost, a, b, eps=eps, solver=SparseNewton(fallback=False, rtol=1e-11), **rho)
    expected = sinkhorn_ex(cost, a, b, eps=eps, solver=KernelSinkhorn(rtol=1e-11), **rho)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.value.plan, expected.value.plan, rtol=0, atol=1e-10)
    if not rho:
        assert float(sums_error(found.value.plan, a, b).max()) < 1e-10


@pytest.mark.parametrize("rho", PENALTIES)
def test_derivatives_are_those_of_the_default(rho):
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(2, 24, 20, generator=generator, dtype=D)
    results = []
    for solver in (SparseNewton(rtol=1e-13), KernelSinkhorn(rtol=1e-13)):
        x = [uniform(24, 20, seed=3, batch=(2,)), masses(2, 24), masses(2, 20, seed=1), torch.tensor(0.02, dtype=D)]
        x = [t.requires_grad_() for t in x]
        plan = sinkhorn(*x[:3], eps=x[3], solver=solver, **rho)
        first = torch.autograd.grad(plan, x, weights, create_graph=True)
        results.append((plan, *first, *torch.autograd.grad(sum(t.square().sum() for t in first), x)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------- batches


def test_results_do_not_depend_on_companions():
    """Easy, hard, forbidden and hopeless elements together and alone."""
    cost = torch.stack([uniform(200, seed=k) for k in range(5)])
    cost[1] *= 0.01
    cost[2, :, 7:] += 3
    cost[3, 0, 0] = torch.nan
    cost[4, ::2, ::3] = torch.inf
    together = sinkhorn_ex(cost, eps=EPS, solver=SparseNewton())
    assert together.status.tolist() == [0, 0, 0, int(Status.DIVERGED), 0]
    for k in (0, 1, 2, 4):
        alone = sinkhorn_ex(cost[k], eps=EPS, solver=SparseNewton())
        assert int(alone.status) == int(together.status[k])
        assert int(alone.steps) == int(together.steps[k])
        torch.testing.assert_close(alone.value.plan, together.value.plan[k], rtol=1e-9, atol=1e-14)


def test_eps_may_differ_between_elements():
    cost = uniform(60, seed=5).expand(3, 60, 60)
    eps = torch.tensor([1e-3, 0.1, 1e-4], dtype=D)
    found = sinkhorn_ex(cost, eps=eps, solver=SparseNewton(fallback=False))
    assert bool(found.converged.all())
    torch.testing.assert_close(found.value.plan, sinkhorn(cost, eps=eps), rtol=0, atol=1e-9)


@pytest.mark.parametrize("batch", [(0,), (2, 0), (2, 1, 2)])
def test_batch_dimensions(batch):
    cost = uniform(7, 9, batch=batch)
    plan = sinkhorn(cost, eps=0.01, solver=SparseNewton())
    torch.testing.assert_close(plan, sinkhorn(cost, eps=0.01), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1)])
def test_one_row_or_column(shape):
    a, b = masses(shape[0]), masses(shape[1], seed=1)
    plan = sinkhorn(uniform(*shape), a, b, eps=1e-3, solver=SparseNewton())
    torch.testing.assert_close(plan, a.unsqueeze(-1) * b, rtol=1e-9, atol=0)


# ------------------------------------------------------------------------------------------------------- hard inputs


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_scale_of_cost_and_mass(scale):
    cost, a, b = uniform(60, seed=6), masses(60), masses(60, seed=1)
    plan = sinkhorn(cost, a, b, eps=2e-3, solver=SparseNewton())
    again = sinkhorn(cost * scale, a / scale, b / scale, eps=2e-3 * scale, solver=SparseNewton())
    torch.testing.assert_close(again * scale, plan, rtol=0, atol=1e-10)


def test_single_precision():
    cost = uniform(200, seed=1).float()
    found = sinkhorn_ex(cost, eps=1e-3, solver=SparseNewton(fallback=False))
    assert found.value.plan.dtype == torch.float32
    assert bool(found.converged)
    assert float(sums_error(found.value.plan.double())) < 1e-4
    double, other = sinkhorn(cost.double(), eps=1e-3), sinkhorn(cost, eps=1e-3)
    ours, default = (float((plan.double() - double).abs().sum()) for plan in (found.value.plan, other))
    assert ours < 2 * default + 1e-3  # the plan has a mass of 1


@pytest.mark.parametrize("kind", ["clusters", "duplicates", "distances"])
@pytest.mark.parametrize("eps", [1e-2, 1e-3, 1e-4])
def test_parts_that_hardly_exchange_mass(kind, eps):
    """Masses over six orders of magnitude; without another solver behind."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand(4, 60, 2, generator=generator, dtype=D) for _ in range(2))
    if kind == "clusters":
        far = (torch.arange(60) % 4).to(D).unsqueeze(-1)
        x, y = x / 50 + far, y / 50 + far
    if kind == "duplicates":
        x = y = x[:, torch.arange(60) % 20]
    a, b = (torch.rand(4, 60, generator=generator, dtype=D) ** 4 + 1e-6 for _ in range(2))
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    cost = torch.cdist(x, y) ** (1 if kind == "distances" else 2)
    found = sinkhorn_ex(cost / cost.amax((-2, -1), keepdim=True), a, b, eps=eps, solver=SparseNewton(fallback=False))
    assert bool(found.converged.all())
    assert float(sums_error(found.value.plan, a, b).max()) < 1e-9


def test_warm_start_changes_the_steps_alone():
    cost = uniform(100, seed=7, batch=(3,))
    solver = SparseNewton()
    cold = sinkhorn_ex(cost, eps=2e-3, solver=solver)
    again = sinkhorn_ex(cost, eps=2e-3, solver=solver, warm_start=cold)
    near = sinkhorn_ex(cost, eps=1.9e-3, solver=solver, warm_start=cold)
    assert int(again.steps.max()) == 0
    assert int(near.steps.max()) < 20
    assert bool(near.converged.all())
    torch.testing.assert_close(near.value.plan, sinkhorn(cost, eps=1.9e-3), rtol=0, atol=1e-9)
    f = cold.value.f.clone()
    f[1] = torch.nan
    f[2, 0] = -1e4
    spoilt = sinkhorn_ex(cost, eps=2e-3, solver=solver, warm_start=cold.value._replace(f=f))
    assert bool(spoilt.converged.all())
    torch.testing.assert_close(spoilt.value.plan, cold.value.plan, rtol=0, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------- options


def test_what_fails_goes_to_the_default():
    """One step of each kind is not enough; the default does the rest, to the tolerance that was asked for."""
    cost = uniform(80, seed=8)
    few = {"max_steps": 1, "sinkhorn_steps": 1, "scaling": False}
    with pytest.warns(SolveWarning):
        sinkhorn(cost, eps=EPS, solver=SparseNewton(fallback=False, **few))
    found = sinkhorn_ex(cost, eps=EPS, solver=SparseNewton(rtol=1e-12, **few))
    assert bool(found.converged)
    assert float(sums_error(found.value.plan)) < 1e-12


def test_no_number_is_said():
    cost = uniform(5)
    cost[2] = torch.nan
    with pytest.raises(ValueError, match="cost: expected finite numbers"):
        sinkhorn(cost, eps=0.1, solver=SparseNewton())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rtol": -1.0}, "rtol: expected"), ({"max_steps": 0}, "max_steps: "), ({"sinkhorn_steps": -1}, "sinkhorn_steps")],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        SparseNewton(**options)


def test_it_is_the_default_of_large_sides():
    assert [type(default_solver(side)) for side in (1, 1024, 1025)] == [KernelSinkhorn, KernelSinkhorn, SparseNewton]
    with trace() as solves:
        plan = sinkhorn(uniform(1030, 1040), eps=0.02)
    assert "SparseNewton" in solves[0].name
    assert float(sums_error(plan)) < 1e-9


def test_no_sinkhorn_steps_at_all():
    cost = uniform(50, seed=9)
    plan = sinkhorn(cost, eps=0.02, solver=SparseNewton(sinkhorn_steps=0, fallback=False))
    torch.testing.assert_close(plan, sinkhorn(cost, eps=0.02), rtol=0, atol=1e-10)


def test_warnings_of_torch_are_taken_once():
    """In a process of its own: torch gives them once."""
    code = (
        "import warnings; warnings.simplefilter('error'); import torch; from difflayers.transport import *\n"
        "cost = torch.rand(200, 200, dtype=torch.float64)\n"
        "for _ in range(2): assert int(sinkhorn_ex(cost, eps=1e-3, solver=SparseNewton()).status) == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
