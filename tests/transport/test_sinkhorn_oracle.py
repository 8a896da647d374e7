"""Every output of entropic transport, with first and second derivatives in every argument, against 100 digits.

Oracle: `tests/transport/_oracle.py`, written from the docstrings before the code was read. It solves the dual in
mpmath and differentiates by one-sided differences whose own error is below 1e-19, so the bounds below measure the
layer alone: they are some ten times what its rounding comes to.
"""

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mpf

from difflayers.transport import KernelSinkhorn, LogSinkhorn, sinkhorn, sinkhorn_divergence, sinkhorn_ex, sinkhorn_value
from tests.transport import _oracle as oracle

TIGHT = KernelSinkhorn(rtol=1e-15)
# shape, eps, rho_a, rho_b, rows without mass, columns without mass, forbidden entries, total of a
PROBLEMS = {
    "balanced": ((3, 4), 0.3, None, None, [], [], [], 1.0),
    "balanced, mass 1.7, little entropy": ((4, 3), 0.05, None, None, [], [], [], 1.7),
    "balanced, zero masses": ((3, 4), 0.3, None, None, [1], [0], [], 1.0),
    "balanced, forbidden": ((3, 3), 0.3, None, None, [], [], [(0, 1), (2, 0)], 1.0),
    "unbalanced": ((3, 4), 0.3, 1.1, 0.7, [], [], [], 1.0),
    "unbalanced, zero masses": ((3, 3), 0.3, 0.9, 0.6, [1], [0], [], 1.0),
    "rows constrained": ((3, 3), 0.3, None, 0.6, [1], [2], [], 1.0),
    "columns constrained": ((4, 2), 0.3, 0.5, None, [], [], [], 2.0),
    "one row": ((1, 3), 0.3, None, None, [], [], [], 1.0),
}


@pytest.fixture(autouse=True)
def digits():
    with mpmath.workdps(oracle.DIGITS):
        yield


def problem(name):
    """The arguments, by name, as numpy arrays."""
    shape, eps, rho_a, rho_b, rows, columns, forbidden, mass = PROBLEMS[name]
    rng = np.random.default_rng(list(PROBLEMS).index(name))
    cost, a, b = rng.uniform(-1, 2, shape), rng.uniform(0.2, 1, shape[0]), rng.uniform(0.2, 1, shape[1])
    for entry in forbidden:
        cost[entry] = np.inf
    a[rows], b[columns] = 0, 0
    a *= mass / a.sum()
    b *= (mass if rho_a is None and rho_b is None else 1.3 * mass) / b.sum()
    arguments = {"cost": cost, "a": a, "b": b, "eps": eps, "rho_a": rho_a, "rho_b": rho_b}
    return {key: np.array(x) for key, x in arguments.items() if x is not None}


def solved(names, x, start=None):
    """The oracle's outputs at a list of mpmath arrays."""
    return oracle.solve(**{key: v if v.ndim else v[()] for key, v in zip(names, x, strict=True)}, start=start)


def direction(arguments, rng):
    """A change of all arguments that keeps masses of zero nonnegative and forbidden entries as they are."""
    out = []
    for x in arguments.values():
        d = 0.3 * rng.standard_normal(x.shape)
        out.append(np.where(x == 0, np.abs(d), np.where(np.isfinite(x), d, 0.0)))
    return out


def near(actual, expected, tol):
    """Largest error, relative to the largest entry, with an absolute floor where all are zero."""
    actual, expected = actual.detach().numpy(), np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol * max(np.abs(expected).max(), 1e-2))


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_oracle_proves_itself(name):
    arguments = {key: oracle.numbers(x) for key, x in problem(name).items()}
    gap, error = oracle.gap(**{key: x if x.ndim else x[()] for key, x in arguments.items()})
    assert max(abs(gap), error) < mpf("1e-80")


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("solver", [TIGHT, LogSinkhorn(rtol=1e-15)], ids=["kernel", "log"])
def test_outputs(name, solver):
    arguments = problem(name)
    plan, f, g, value = solved(arguments, [oracle.numbers(x) for x in arguments.values()])
    tensors = {key: torch.tensor(x) for key, x in arguments.items()}
    solution = sinkhorn_ex(**tensors, solver=solver)
    assert bool(solution.converged)
    for actual, expected in zip(solution.value, (plan, f, g), strict=True):
        near(actual, expected, 2e-14)
    near(sinkhorn(**tensors, solver=solver), plan, 2e-14)
    near(sinkhorn_value(**tensors, solver=solver), value, 2e-14)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("outputs", ["coupling", "value"])
def test_derivatives(name, outputs):
    """First derivatives, and the Hessian times a direction of all arguments at once, of a linear form of outputs."""
    arguments = problem(name)
    rng = np.random.default_rng(100 + list(PROBLEMS).index(name))
    x = [oracle.numbers(part) for part in arguments.values()]
    base = solved(arguments, x)
    weights = [rng.standard_normal(np.shape(part)) for part in (base[:3] if outputs == "coupling" else base[3:])]

    def form(x):
        parts = solved(arguments, x, start=base[1:3])
        parts = parts[:3] if outputs == "coupling" else parts[3:]
        return sum(np.sum(oracle.numbers(w) * part) for w, part in zip(weights, parts, strict=True))

    tensors = {key: torch.tensor(part, requires_grad=True) for key, part in arguments.items()}
    if outputs == "coupling":
        parts = sinkhorn_ex(**tensors, solver=TIGHT).value
    else:
        parts = (sinkhorn_value(**tensors, solver=TIGHT),)
    total = sum((torch.tensor(w) * part).sum() for w, part in zip(weights, parts, strict=True))
    first = torch.autograd.grad(total, list(tensors.values()), create_graph=True)
    for actual, expected in zip(first, oracle.gradient(form, x), strict=True):
        near(actual, expected, 2e-13)

    v = direction(arguments, rng)
    along = sum((d * torch.tensor(w)).sum() for d, w in zip(first, v, strict=True))
    second = torch.autograd.grad(along, list(tensors.values()))
    for actual, expected in zip(second, oracle.product(form, x, [oracle.numbers(w) for w in v]), strict=True):
        near(actual, expected, 2e-12)


@pytest.mark.parametrize("rho", [None, 0.8])
def test_divergence(rho):
    """Value, gradient and Hessian times a direction, in points, masses, eps and the penalty."""
    rng = np.random.default_rng(7)
    arguments = {"x": rng.standard_normal((2, 1)), "y": rng.standard_normal((3, 1))}
    arguments |= {"a": rng.uniform(0.2, 1, 2), "b": rng.uniform(0.2, 1, 3), "eps": np.array(0.4)}
    arguments["a"] /= arguments["a"].sum()
    arguments["b"] *= (1.0 if rho is None else 1.4) / arguments["b"].sum()
    if rho is not None:
        arguments["rho"] = np.array(rho)

    def form(x):
        return oracle.divergence(*(part if part.ndim else part[()] for part in x))

    x = [oracle.numbers(part) for part in arguments.values()]
    tensors = {key: torch.tensor(part, requires_grad=True) for key, part in arguments.items()}
    value = sinkhorn_divergence(**tensors, solver=TIGHT)
    near(value, form(x), 2e-14)
    first = torch.autograd.grad(value, list(tensors.values()), create_graph=True)
    for actual, expected in zip(first, oracle.gradient(form, x), strict=True):
        near(actual, expected, 2e-13)
    v = direction(arguments, rng)
    along = sum((d * torch.tensor(w)).sum() for d, w in zip(first, v, strict=True))
    second = torch.autograd.grad(along, list(tensors.values()))
    for actual, expected in zip(second, oracle.product(form, x, [oracle.numbers(w) for w in v]), strict=True):
        near(actual, expected, 2e-12)


@pytest.mark.parametrize("solver", [KernelSinkhorn(), LogSinkhorn()], ids=["kernel", "log"])
@pytest.mark.parametrize("side", ["rho_a", "rho_b"])
def test_a_strong_penalty_on_one_side_and_other_totals_on_the_other(side, solver):
    """The potentials are far away then, by a constant that plain iterations reach in rho / eps steps."""
    arguments = problem("unbalanced")
    rho = {"rho_a": None, "rho_b": None} | {side: np.array(3e3)}
    arguments = {key: x for key, x in (arguments | rho).items() if x is not None}
    tensors = {key: torch.tensor(x) for key, x in arguments.items()}
    solution = sinkhorn_ex(**tensors, solver=solver)
    assert bool(solution.converged)
    assert int(solution.steps) < 200
    plan, f, g, _ = solved(arguments, [oracle.numbers(x) for x in arguments.values()])
    for actual, expected in zip(solution.value, (plan, f, g), strict=True):
        near(actual, expected, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("solver", [KernelSinkhorn(), LogSinkhorn()], ids=["kernel", "log"])
def test_a_row_without_mass_beside_a_column_that_is_out_of_reach(solver, dtype):
    """``0 exp(-f / rho)`` is 0 where the exponential overflows. Oracle: the problem without that row."""
    C = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]], dtype=dtype)
    a, b = (torch.tensor(v, dtype=dtype) for v in ([0.0, 0.3, 0.4], [0.3, 0.3, 0.4]))
    options = {"eps": 1e-4, "rho_a": 5e-4, "rho_b": 3e-4, "solver": solver}
    plan, value = sinkhorn(C, a, b, **options), sinkhorn_value(C, a, b, **options)
    torch.testing.assert_close(plan[1:], sinkhorn(C[1:], a[1:], b, **options), rtol=1e-4, atol=0)
    assert not plan[0].any()
    torch.testing.assert_close(value, sinkhorn_value(C[1:], a[1:], b, **options), rtol=1e-4, atol=0)
