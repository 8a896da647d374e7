"""Entropic plans and values against solvers that are not ours.

Oracles, written down before the code: the exponential-cone program of a tight interior-point solver; log-domain plans
of POT; the quadratic equation of a 2 x 2 plan; for penalties the optimality condition that the plan itself must meet.
"""

import cvxpy as cp
import numpy as np
import ot
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from difflayers.linalg import CG, Cholesky
from difflayers.transport import (
    KernelSinkhorn,
    LogSinkhorn,
    sinkhorn,
    sinkhorn_ex,
    sinkhorn_value,
)

D = torch.float64


def problem(n: int, m: int, seed: int = 0, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    cost = torch.rand(*batch, n, m, generator=g, dtype=D) - 0.2
    a, b = (torch.rand(*batch, k, generator=g, dtype=D) + 0.1 for k in (n, m))
    return cost, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def cone_program(cost: Tensor, a: Tensor, b: Tensor, eps: float, rho_a: float | None, rho_b: float | None):
    P = cp.Variable(cost.shape)
    kl = lambda p, q: cp.sum(cp.kl_div(p, q))  # noqa: E731  # kl_div is p log(p/q) - p + q
    objective = cp.sum(cp.multiply(cost.numpy(), P)) + eps * kl(P, np.outer(a, b))
    rows, columns = cp.sum(P, axis=1), cp.sum(P, axis=0)
    constraints = []
    for sums, mass, rho in ((rows, a.numpy(), rho_a), (columns, b.numpy(), rho_b)):
        if rho is None:
            constraints.append(sums == mass)
        else:
            objective = objective + rho * kl(sums, mass)
    solved = cp.Problem(cp.Minimize(objective), constraints)
    solved.solve(cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    return torch.from_numpy(P.value), solved.value


@pytest.mark.parametrize("penalties", [(None, None), (0.4, None), (None, 0.3), (0.5, 1.5)])
def test_plan_and_value_are_those_of_the_cone_program(penalties):
    cost, a, b = problem(4, 3)
    rho = dict(zip(("rho_a", "rho_b"), penalties, strict=True))
    plan, value = cone_program(cost, a, b, 0.1, *penalties)
    # a gap of 1e-11 leaves its square root, divided by eps, in the plan
    torch.testing.assert_close(sinkhorn(cost, a, b, eps=0.1, **rho), plan, rtol=0, atol=2e-6)
    assert abs(float(sinkhorn_value(cost, a, b, eps=0.1, **rho)) - value) < 1e-9


@pytest.mark.parametrize(("rho_a", "rho_b"), [(0.4, 0.4), (0.4, None), (None, 0.3), (0.5, 1.5)])
def test_penalised_plan_is_that_of_pot(rho_a, rho_b):
    cost, a, b = problem(6, 5, seed=8)
    penalties = tuple(np.inf if rho is None else rho for rho in (rho_a, rho_b))
    data = a.numpy(), (b if None in (rho_a, rho_b) else 1.7 * b).numpy(), cost.numpy()
    options = {"reg_type": "kl", "numItermax": 100_000, "stopThr": 1e-15}
    expected = ot.unbalanced.sinkhorn_unbalanced(*data, 0.1, penalties, **options)
    plan = sinkhorn(cost, a, torch.from_numpy(data[1]), eps=0.1, rho_a=rho_a, rho_b=rho_b)
    torch.testing.assert_close(plan, torch.from_numpy(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("eps", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_plan_is_that_of_pot_in_the_log_domain(eps, shape):
    cost, a, b = problem(*shape, seed=1)
    expected = ot.sinkhorn(a.numpy(), b.numpy(), cost.numpy(), eps, "sinkhorn_log", 200_000, 1e-14)
    torch.testing.assert_close(sinkhorn(cost, a, b, eps=eps), torch.from_numpy(expected), rtol=0, atol=1e-10)


def test_values_of_pot_by_their_conventions():
    """As the docstring says: `value` with KL is ours, with "entropy" it lacks the entropies, sinkhorn2 is <C, P>."""
    cost, a, b = problem(6, 5, seed=2)
    tight = {"reg": 0.1, "tol": 1e-13, "max_iter": 100_000}
    data = cost.numpy(), a.numpy(), b.numpy()
    value, plan = float(sinkhorn_value(cost, a, b, eps=0.1)), sinkhorn(cost, a, b, eps=0.1)
    assert abs(ot.solve(*data, reg_type="KL", **tight).value - value) < 1e-9
    entropies = -float((a * a.log()).sum() + (b * b.log()).sum())
    assert abs(ot.solve(*data, reg_type="entropy", **tight).value - (value - 0.1 * entropies)) < 1e-9
    linear = ot.sinkhorn2(a.numpy(), b.numpy(), cost.numpy(), 0.1, stopThr=1e-13, numItermax=100_000)
    assert abs(linear - float((cost * plan).sum())) < 1e-9


def two_by_two(cost: Tensor, p: Tensor, q: Tensor, eps: Tensor) -> Tensor:
    """``x (1 - p - q + x) = K (p - x) (q - x)`` with K the ratio of the kernel's diagonals, for ``x = P[0, 0]``."""
    K = ((cost[0, 1] + cost[1, 0] - cost[0, 0] - cost[1, 1]) / eps).exp()
    A, B, C = 1 - K, 1 - p - q + K * (p + q), -K * p * q
    return 2 * -C / (B + (B * B - 4 * A * C).sqrt())


def test_closed_form_of_two_by_two_and_its_derivatives_of_second_order():
    cost = torch.tensor([[0.1, 0.9], [0.6, 0.3]], dtype=D, requires_grad=True)
    p, q, eps = (torch.tensor(v, dtype=D, requires_grad=True) for v in (0.3, 0.45, 0.25))

    def ours(cost: Tensor, p: Tensor, q: Tensor, eps: Tensor) -> Tensor:
        return sinkhorn(cost, torch.stack([p, 1 - p]), torch.stack([q, 1 - q]), eps=eps)[0, 0]

    x = (cost, p, q, eps)
    results = []
    for fn in (ours, two_by_two):
        value = fn(*x)
        first = torch.autograd.grad(value, x, create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), x)
        results.append((value, *first, *second))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", [KernelSinkhorn(), LogSinkhorn(), KernelSinkhorn(newton_steps=0)])
@pytest.mark.parametrize("rho", [{}, {"rho_a": 0.5}, {"rho_a": 0.5, "rho_b": 2.0}])
@pytest.mark.parametrize("eps", [10.0, 0.1, 0.005])
def test_solvers_agree_and_the_plan_is_optimal(solver, rho, eps):
    cost, a, b = problem(6, 8, seed=3, batch=(2,))
    found = sinkhorn_ex(cost, a, b, eps=eps, solver=solver, **rho)
    assert bool(found.converged.all())
    plan, f, g = found.value
    expected = a.unsqueeze(-1) * b.unsqueeze(-2) * ((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / eps).exp()
    torch.testing.assert_close(plan, expected, rtol=1e-9, atol=1e-15)
    rows = a * (-f / rho["rho_a"]).exp() if "rho_a" in rho else a
    columns = b * (-g / rho["rho_b"]).exp() if "rho_b" in rho else b
    assert float((plan.sum(-1) - rows).abs().sum(-1).max()) < 1e-9
    assert float((plan.sum(-2) - columns).abs().sum(-1).max()) < 1e-9
    if not rho:
        means = (f * a).sum(-1), (g * b).sum(-1)
        torch.testing.assert_close(*means, rtol=0, atol=1e-12)


def hard_costs(kind: str) -> Tensor:
    g = torch.Generator().manual_seed(1)
    x, y = (torch.rand(4, 40, 2, generator=g, dtype=D) for _ in range(2))
    if kind == "random":
        return torch.rand(4, 40, 40, generator=g, dtype=D)
    if kind == "clusters":
        far = (torch.arange(40) % 4).to(D).unsqueeze(-1)
        x, y = x / 50 + far, y / 50 + far
    if kind == "duplicates":
        x = x[:, torch.arange(40) % 20]
        y = x
    cost = torch.cdist(x, y) ** (1 if kind == "distances" else 2)
    return cost / cost.amax((-2, -1), keepdim=True)


@pytest.mark.parametrize("kind", ["random", "clusters", "duplicates", "distances"])
@pytest.mark.parametrize(("dtype", "eps"), [(D, 1e-2), (D, 1e-4), (torch.float32, 1e-3)])
def test_small_eps_and_parts_that_hardly_exchange_mass(kind, dtype, eps):
    """Masses over six orders of magnitude, eps down to 1e-4 of the range (float32: 1e-3): converged, derivative too."""
    g = torch.Generator().manual_seed(2)
    a, b = (torch.rand(4, 40, generator=g, dtype=D) ** 4 + 1e-6 for _ in range(2))
    a, b = ((t / t.sum(-1, keepdim=True)).to(dtype) for t in (a, b))
    cost = hard_costs(kind).to(dtype).requires_grad_()
    found = sinkhorn_ex(cost, a, b, eps=eps)
    plan = found.value.plan
    sums = plan.detach()
    assert bool(found.converged.all())
    tol = 1e-9 if dtype == D else 1e-4
    error = (sums.sum(-1) - a).abs().sum(-1) + (sums.sum(-2) - b).abs().sum(-1)
    assert float(error.max()) < tol
    weights = torch.randn(plan.shape, generator=g, dtype=dtype)
    (slope,) = torch.autograd.grad(plan, cost, weights)
    assert bool(torch.isfinite(slope).all())
    # the derivative of the plan's sums is zero
    assert float(slope.sum(-1).abs().max()) < tol / eps * float(weights.abs().max())


def test_large_sides_use_no_factor_and_agree_with_the_factor(monkeypatch):
    """The way of sides above 1024, taken for small ones: Newton's steps and derivatives by conjugate gradients."""
    from difflayers.transport import _schur, _sinkhorn_solve, _solvers

    cost, a, b = problem(30, 20, seed=4, batch=(2,))
    weights = torch.randn(cost.shape, generator=torch.Generator().manual_seed(0), dtype=D)

    def run(**options):
        x = [t.clone().requires_grad_() for t in (cost, a, b)]
        plan = sinkhorn(*x, eps=0.02, **options)
        first = torch.autograd.grad(plan, x, weights, create_graph=True)
        return plan, *first, *torch.autograd.grad(sum(t.square().sum() for t in first), x)

    expected = run(adjoint=Cholesky())
    monkeypatch.setattr(_sinkhorn_solve, "EAGER_LIMIT", 8)
    for got, want in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)
    for module in (_schur, _solvers):
        monkeypatch.setattr(module, "DENSE_LIMIT", 8)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", None)
    for options in ({}, {"adjoint": CG(rtol=1e-12)}):
        for got, want in zip(run(**options), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


def test_conjugate_gradients_that_do_not_end_are_followed_by_a_factorisation(monkeypatch):
    """Nearly separate parts at a tiny eps: the eigenvalues of the complement go down to rounding."""
    from difflayers.transport import _sinkhorn_solve

    cost = hard_costs("clusters").requires_grad_()
    weights = torch.randn(cost.shape, generator=torch.Generator().manual_seed(0), dtype=D)
    (expected,) = torch.autograd.grad(sinkhorn(cost, eps=1e-3), cost, weights)
    monkeypatch.setattr(_sinkhorn_solve, "EAGER_LIMIT", 8)
    (slope,) = torch.autograd.grad(sinkhorn(cost, eps=1e-3), cost, weights)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-8)


def test_warm_start_changes_the_steps_alone():
    cost, a, b = problem(9, 6, seed=5, batch=(3,))
    for rho in ({}, {"rho_a": 0.3}, {"rho_b": 0.3}, {"rho_a": 1.0, "rho_b": 0.2}):
        cold = sinkhorn_ex(cost + 3, a, b, eps=0.02, **rho)
        warm = sinkhorn_ex(cost + 3, a, b, eps=0.02, warm_start=cold, **rho)
        near = sinkhorn_ex(cost + 3, a, b, eps=0.019, warm_start=cold.value, **rho)
        torch.testing.assert_close(warm.value, cold.value, rtol=1e-8, atol=1e-10)
        assert int(warm.steps.max()) == 0
        assert int(near.steps.max()) < int(cold.steps.min())
        assert bool(near.converged.all())
    useless = cold.value._replace(f=torch.full_like(cold.value.f, torch.nan))
    again = sinkhorn_ex(cost + 3, a, b, eps=0.02, warm_start=useless, **rho)
    torch.testing.assert_close(again.value, cold.value, rtol=1e-8, atol=1e-10)


def test_penalties_between_constraint_and_nothing():
    cost, a, b = problem(5, 4, seed=6)
    hard = sinkhorn(cost, a, b, eps=0.1)
    torch.testing.assert_close(sinkhorn(cost, a, b, eps=0.1, rho_a=1e9, rho_b=1e9), hard, rtol=0, atol=1e-8)
    infinite = sinkhorn(cost, a, b, eps=0.1, rho_a=float("inf"))
    torch.testing.assert_close(infinite, hard, rtol=0, atol=1e-9)
    free = sinkhorn(cost, a, 2 * b, eps=0.1, rho_a=1e-9, rho_b=1e-9)
    torch.testing.assert_close(free, 2 * a.unsqueeze(-1) * b * (-cost / 0.1).exp(), rtol=1e-6, atol=0)


def test_kernel_falls_back_to_the_logarithm():
    """A warm start far away makes the first kernel useless: zeros and overflow, and the plan is right all the same."""
    cost, a, b = problem(6, 5, seed=7, batch=(2,))
    solver = KernelSinkhorn(newton_steps=0, max_steps=100_000)
    expected = sinkhorn_ex(cost, a, b, eps=0.05, solver=solver).value
    spoilt = expected.f.clone()
    spoilt[1, 0], spoilt[1, 1] = -1e4, 1e4
    found = sinkhorn_ex(cost, a, b, eps=0.05, solver=solver, warm_start=expected._replace(f=spoilt))
    assert bool(found.converged.all())
    torch.testing.assert_close(found.value.plan, expected.plan, rtol=0, atol=1e-9)


def test_the_iteration_alone_goes_on_where_its_error_rises():
    """Nothing takes over: neither solver may end before its steps do, or its tolerance is met."""
    images = torch.tensor(load_digits().images.reshape(-1, 64)[:2])
    a, b = images / images.amax(-1, keepdim=True) + 1e-3
    grid = torch.cartesian_prod(*(torch.arange(8, dtype=torch.float64) / 7,) * 2)
    for solver in (KernelSinkhorn, LogSinkhorn):
        alone = solver(rtol=1e-12, newton_steps=0, scaling=False, max_steps=6000)
        found = sinkhorn_ex(torch.cdist(grid, grid, p=1) / 2, a / a.sum(), b / b.sum(), eps=1 / 1200, solver=alone)
        assert int(found.steps) == 6000 or bool(found.converged)
