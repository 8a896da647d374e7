"""Norms and sets: values against cvxpy, derivatives against differences of closed forms, and the claims of each."""

import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

from difflayers import SolveError, Status
from difflayers.proximal import (
    project_affine,
    project_affine_ex,
    project_box,
    project_capped_simplex,
    project_halfspace,
    project_hyperplane,
    project_l1_ball,
    project_l2_ball,
    project_linf_ball,
    project_simplex,
    prox_group_l2,
    prox_l2,
    prox_linf,
    prox_quadratic,
    prox_quadratic_ex,
    soft_topk,
)

F64 = torch.float64
N = 7
RNG = np.random.default_rng(0)
X, C, U = 2 * RNG.standard_normal(N), RNG.standard_normal(N), RNG.uniform(0.2, 1.5, N)
A, B = RNG.standard_normal((3, N)), RNG.standard_normal(3)
Q = (lambda R: R @ R.T)(RNG.standard_normal((N, 3)))
LABELS = np.array([0, 2, 1, 1, 0, 2, 2])
W = np.array([0.8, 0.3, 1.1])


def group_norms(z):
    return sum(w * cp.norm(z[g == LABELS]) for g, w in enumerate(W))


# name: (operator, inputs that are differentiated, what cvxpy minimises beside the distance, its constraints)
PROBLEMS = {
    "l2": (prox_l2, {"t": 1.3}, lambda z, t: t * cp.norm(z), lambda z, t: []),
    "l2 to zero": (prox_l2, {"t": 50.0}, lambda z, t: t * cp.norm(z), lambda z, t: []),
    "linf": (prox_linf, {"t": 2.1}, lambda z, t: t * cp.norm(z, "inf"), lambda z, t: []),
    "group_l2": (
        lambda x, t, weights: prox_group_l2(x, t, torch.from_numpy(LABELS), weights=weights),
        {"t": 0.9, "weights": W},
        lambda z, t, weights: t * group_norms(z),
        lambda z, t, weights: [],
    ),
    "quadratic": (
        prox_quadratic,
        {"t": 0.6, "Q": Q, "q": C},
        lambda z, t, Q, q: t * (cp.quad_form(z, cp.psd_wrap(Q)) / 2 + q @ z),
        lambda z, t, Q, q: [],
    ),
    "simplex": (project_simplex, {"radius": 1.7}, None, lambda z, radius: [z >= 0, cp.sum(z) == radius]),
    "capped_simplex": (
        lambda x, total, upper: project_capped_simplex(x, total, upper=upper),
        {"total": 2.2, "upper": U},
        None,
        lambda z, total, upper: [z >= 0, z <= upper, cp.sum(z) == total],
    ),
    "soft_topk": (soft_topk, {"k": 2.3}, None, lambda z, k: [z >= 0, z <= 1, cp.sum(z) == k]),
    "l1_ball": (project_l1_ball, {"radius": 2.1}, None, lambda z, radius: [cp.norm1(z) <= radius]),
    "l2_ball": (
        lambda x, radius, center: project_l2_ball(x, radius, center=center),
        {"radius": 1.4, "center": C},
        None,
        lambda z, radius, center: [cp.norm(z - center) <= radius],
    ),
    "linf_ball": (project_linf_ball, {"radius": 0.8}, None, lambda z, radius: [cp.abs(z) <= radius]),
    "box": (project_box, {"lower": C - 0.5, "upper": C + U}, None, lambda z, lower, upper: [z >= lower, z <= upper]),
    "halfspace": (project_halfspace, {"normal": C, "offset": -1.1}, None, lambda z, c, b: [c @ z <= b]),
    "hyperplane": (project_hyperplane, {"normal": C, "offset": -1.1}, None, lambda z, c, b: [c @ z == b]),
    "affine": (project_affine, {"A": A, "b": B}, None, lambda z, A, b: [A @ z == b]),
}
EACH = pytest.mark.parametrize("name", PROBLEMS)


def by_cvxpy(name, x, params):
    _, _, penalty, constraints = PROBLEMS[name]
    z = cp.Variable(len(x))
    cost = cp.sum_squares(z - x) / 2 + (penalty(z, **params) if penalty else 0)
    problem = cp.Problem(cp.Minimize(cost), constraints(z, *params.values()))
    tight = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-13)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "may be inaccurate" where it misses 1e-13
        problem.solve(cp.CLARABEL, **tight)
    return z.value


def tensors(params):
    return {k: torch.as_tensor(v, dtype=F64) for k, v in params.items()}


@EACH
def test_value(name):
    operator, params, *_ = PROBLEMS[name]
    found = operator(torch.from_numpy(X), *tensors(params).values())
    np.testing.assert_allclose(found, by_cvxpy(name, X, params), atol=1e-7)


@EACH
def test_derivative_in_every_input(name):
    """Along a random direction in all inputs at once, and each alone; differences of the operator, whose value the
    solver vouches for, at two steps."""
    operator, params, *_ = PROBLEMS[name]
    inputs = {"x": torch.from_numpy(X), **tensors(params)}
    for moving in inputs:
        move = torch.randn(inputs[moving].shape, dtype=F64)

        def moved(h, moving=moving, move=move):
            at = {k: v + h * move if k == moving else v for k, v in inputs.items()}
            return operator(*at.values())

        found = torch.func.jvp(moved, (torch.zeros((), dtype=F64),), (torch.ones((), dtype=F64),))[1]
        h = 1e-4
        expected = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8, msg=f"derivative in {moving}")


@pytest.mark.parametrize("name", ["quadratic", "affine"])
def test_derivative_of_a_matrix_by_differences_of_the_solver(name):
    operator, params, *_ = PROBLEMS[name]
    at = tensors(params)
    key = "Q" if name == "quadratic" else "A"
    move = np.random.default_rng(2).standard_normal(params[key].shape)
    move = move + move.T if name == "quadratic" else move
    h = 1e-4
    found = torch.func.jvp(
        lambda M: operator(torch.from_numpy(X), *(at | {key: M}).values()), (at[key],), (torch.from_numpy(move),)
    )[1]
    ahead, behind = (closed_form(name, params | {key: params[key] + s * h * move}) for s in (1, -1))
    np.testing.assert_allclose(found, (ahead - behind) / (2 * h), atol=1e-6)


def closed_form(name, params):
    if name == "quadratic":
        return np.linalg.solve(np.eye(N) + params["t"] * params["Q"], X - params["t"] * params["q"])
    return X - np.linalg.pinv(params["A"]) @ (params["A"] @ X - params["b"])


# -------------------------------------------------------------------------------------------------- simplex and friends


def by_sorting(x: Tensor, radius: float) -> Tensor:
    s = x.sort(-1, descending=True).values
    means = (s.cumsum(-1) - radius) / torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    count = (s > means).sum(-1, keepdim=True).clamp_min(1)
    return torch.relu(x - means.gather(-1, count - 1))


@pytest.mark.parametrize("radius", [1e-9, 1.0, 1e3, 1e9])
@pytest.mark.parametrize("spread", [1e-9, 1.0, 1e9])
def test_simplex_at_any_scale(radius, spread):
    x = spread * torch.randn(50, 33, dtype=F64)
    z = project_simplex(x, radius)
    torch.testing.assert_close(z.sum(-1), torch.full((50,), radius, dtype=F64), rtol=1e-12, atol=0)
    assert z.min() >= 0
    torch.testing.assert_close(z, by_sorting(x, radius), rtol=0, atol=1e-12 * max(radius, spread))
    # in float32 the sum is right too, where the entries are a billion times the radius
    assert project_simplex(x.float(), radius).sum(-1).sub(radius).abs().max() < 1e-5 * radius


@pytest.mark.parametrize("total", [0.0, 1e-9, 0.5, 1.0, 7.0, 16.4, 31.5, 32.0, 33.0])
@pytest.mark.parametrize("spread", [1e-9, 0.1, 1.0, 1e9])
def test_capped_simplex_is_optimal(total, spread):
    """Feasible, and the multiplier of the sum is the same for all entries between their bounds."""
    x = spread * torch.randn(1000, 33, dtype=F64)
    z = project_capped_simplex(x, total)
    slack = 1e-12 * max(1, spread)
    assert z.min() >= 0
    assert z.max() <= 1
    torch.testing.assert_close(z.sum(-1), torch.full((1000,), total, dtype=F64), rtol=1e-9, atol=slack)
    level = x - z
    free_low = torch.where(z < 1, level, -torch.inf).amax(-1)  # entries that could still grow
    free_high = torch.where(z > 0, level, torch.inf).amin(-1)  # entries that could shrink
    assert (free_low <= free_high + slack).all()


def test_ties_of_all_kinds():
    x = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [2, 2, -2, -2], [1, 0, 0, -1]], dtype=F64)
    expected = torch.tensor([[0.25] * 4, [0.25] * 4, [0.5, 0.5, 0, 0], [1, 0, 0, 0]], dtype=F64)
    torch.testing.assert_close(project_simplex(x), expected)
    torch.testing.assert_close(project_capped_simplex(x, 1.0), expected)
    J = torch.func.jacrev(project_simplex)(x[3])
    torch.testing.assert_close(J, torch.zeros(4, 4, dtype=F64))  # the two zeros stay at zero
    J = torch.func.jacrev(lambda x: project_capped_simplex(x, 2.0))(torch.tensor([1.0, 0, 0.4, 0.6], dtype=F64))
    expected = torch.zeros(4, 4, dtype=F64)
    expected[2:, 2:] = torch.tensor([[0.5, -0.5], [-0.5, 0.5]])
    torch.testing.assert_close(J, expected)


def test_clusters_do_not_slow_the_search():
    """Breakpoints a few units of the last digit apart, at places of very different size."""
    x = torch.cat([1 + 1e-15 * torch.arange(100), 1e-12 * torch.arange(100), -1e6 * torch.arange(100)]).double()[None]
    for total in (0.5, 5.0, 99.5, 150.0):
        z = project_capped_simplex(x, total)
        assert abs(float(z.sum()) - total) < 1e-9
    torch.testing.assert_close(project_simplex(x, 2.0), by_sorting(x, 2.0), rtol=0, atol=1e-14)


def test_masked_entries_and_bad_elements():
    x = torch.randn(4, 6, dtype=F64)
    masked = x.masked_fill(torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.bool), -torch.inf).requires_grad_()
    kept = [0, 2, 3, 5]
    for f in (project_simplex, lambda x: soft_topk(x, 2.5), lambda x: project_capped_simplex(x, 1.5)):
        z = f(masked)
        torch.testing.assert_close(z[:, kept], f(x[:, kept]))
        assert (z[:, [1, 4]] == 0).all()
        (slope,) = torch.autograd.grad(z.square().sum(), masked)
        assert torch.isfinite(slope).all()
    x[1, 2] = torch.nan
    for f in (project_simplex, project_l1_ball, lambda x: soft_topk(x, 2.5), lambda x: prox_linf(x, 1.0)):
        z = f(x)
        assert torch.isnan(z[1]).any()
        torch.testing.assert_close(z[[0, 2, 3]], f(x[[0, 2, 3]]), rtol=0, atol=0)


def test_soft_topk_marks_the_largest_where_the_temperature_is_low():
    x = torch.randn(20, 9, dtype=F64)
    hard = torch.zeros_like(x).scatter(-1, x.topk(3).indices, 1.0)
    torch.testing.assert_close(soft_topk(x, 3, temperature=1e-9), hard)
    assert (soft_topk(x, 3, temperature=1e9) - 1 / 3).abs().max() < 1e-8


# --------------------------------------------------------------------------------------------- quadratics and equations


def test_dependent_and_contradictory_equations():
    a = torch.from_numpy(A)
    twice, x = torch.cat([a, a[:1]]), torch.from_numpy(X).expand(2, N)
    b = torch.cat([torch.from_numpy(B), torch.tensor([B[0]])])
    torch.testing.assert_close(project_affine(x, twice, b), project_affine(x, a, torch.from_numpy(B)))
    J = torch.func.jacrev(lambda x: project_affine(x, twice, b))(x[0])
    torch.testing.assert_close(J, torch.eye(N, dtype=F64) - torch.linalg.pinv(a) @ a)
    wrong = torch.stack([b, b + torch.tensor([0, 0, 0, 1.0])])
    with pytest.raises(SolveError, match=r"1 of 2 .*INFEASIBLE"):
        project_affine(x, twice, wrong)
    solution = project_affine_ex(x, twice, wrong)
    assert solution.status.tolist() == [Status.CONVERGED, Status.INFEASIBLE]
    z = project_affine(x, twice, wrong, on_failure="nan")
    assert torch.isnan(z[1]).all()
    assert torch.isfinite(z[0]).all()


def test_a_long_vector_with_few_equations_needs_no_square_matrix():
    n = 50_000
    a, x = torch.randn(2, n, dtype=F64), torch.randn(3, n, dtype=F64)
    z = project_affine(x, a, torch.ones(2, dtype=F64))
    assert (z @ a.mT - 1).abs().max() < 1e-9


def test_ill_conditioned_equations():
    a = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0 + 1e-7, 0.0]], dtype=F64)
    z = project_affine(torch.tensor([1.0, 2.0, 3.0], dtype=F64), a, torch.tensor([1.0, 1.0], dtype=F64))
    torch.testing.assert_close(z, torch.tensor([1.0, 0.0, 3.0], dtype=F64), rtol=0, atol=1e-7)


def test_quadratic_without_minimiser():
    x, t = torch.ones(2, 3, dtype=F64), torch.tensor([0.5, 2.0], dtype=F64)
    concave = -torch.eye(3, dtype=F64)
    with pytest.raises(SolveError, match=r"1 of 2 .*SINGULAR"):
        prox_quadratic(x, t, concave)
    solution = prox_quadratic_ex(x, t, concave)
    assert solution.status.tolist() == [Status.CONVERGED, Status.SINGULAR]
    assert solution.residual[0] < 1e-12
    z = prox_quadratic(x, t, concave, on_failure="nan")
    torch.testing.assert_close(z[0], 2 * x[0])
    assert torch.isnan(z[1]).all()


def test_quadratic_takes_the_symmetric_part():
    M = torch.randn(N, N, dtype=F64) * 0.1 + 2 * torch.eye(N, dtype=F64)
    x = torch.randn(4, N, dtype=F64)
    torch.testing.assert_close(prox_quadratic(x, 0.7, M), prox_quadratic(x, 0.7, (M + M.mT) / 2))
