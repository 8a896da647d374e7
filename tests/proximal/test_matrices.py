"""Operators on singular values and eigenvalues: against conic solvers, and where autograd through an SVD fails."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacrev, jvp

from difflayers.proximal import (
    project_nuclear_ball,
    project_spectral_box,
    project_stiefel,
    prox_nuclear,
    prox_spectral_l2,
)

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def orthonormal(m: int, n: int, seed: int = 7) -> Tensor:
    return torch.linalg.qr(normal(m, n, seed=seed)).Q


def with_values(values: list[float], m: int, n: int) -> Tensor:
    """A matrix with these singular values."""
    k = min(m, n)
    return orthonormal(m, k) @ torch.diag(torch.tensor(values, dtype=F64)) @ orthonormal(n, k, seed=8).mT


def check(f, *inputs: Tensor) -> None:
    """First and second derivatives against finite differences."""
    x = tuple(t.clone().requires_grad_() for t in inputs)
    assert gradcheck(f, x, check_forward_ad=True)
    assert gradgradcheck(f, x, check_fwd_over_rev=True, fast_mode=True)


SHAPES = [(4, 4), (5, 3), (3, 5), (1, 1), (6, 1), (1, 4), (2, 4, 3)]


# --------------------------------------------------------------------------------------------------------------- values


def conic(name: str, x: Tensor, t: float) -> Tensor:
    import cvxpy as cp

    z = cp.Variable(x.shape)
    distance = cp.sum_squares(z - x.numpy()) / 2
    problem = {
        "prox_nuclear": lambda: cp.Problem(cp.Minimize(t * cp.normNuc(z) + distance)),
        "prox_spectral_l2": lambda: cp.Problem(cp.Minimize(t * cp.sigma_max(z) + distance)),
        "project_nuclear_ball": lambda: cp.Problem(cp.Minimize(distance), [cp.normNuc(z) <= t]),
    }[name]()
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)
    return torch.from_numpy(z.value).reshape(x.shape)


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")  # by its own tolerance, which is 1e-13
@pytest.mark.parametrize("shape", [(4, 3), (2, 4)])
@pytest.mark.parametrize("f", [prox_nuclear, prox_spectral_l2, project_nuclear_ball], ids=lambda f: f.__name__)
def test_equals_conic_solver(f, shape):
    x = normal(*shape, seed=3)
    torch.testing.assert_close(f(x, 0.7), conic(f.__name__, x, 0.7), atol=1e-7, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_those_of_the_vector_operator(shape):
    x, s = normal(*shape), torch.linalg.svdvals(normal(*shape))
    torch.testing.assert_close(torch.linalg.svdvals(prox_nuclear(x, 0.6)), (s - 0.6).clamp_min(0))
    radius = 0.5 * s.sum(-1)
    torch.testing.assert_close(torch.linalg.svdvals(project_nuclear_ball(x, radius)).sum(-1), radius)
    assert torch.equal(project_nuclear_ball(x, 3 * radius), x)
    torch.testing.assert_close(prox_spectral_l2(x, 3 * radius), 0 * x)
    torch.testing.assert_close(prox_nuclear(x, 0.0), x)


def test_eigenvalues_are_clipped_and_only_the_symmetric_part_counts():
    x = normal(3, 5, 5)
    values = torch.linalg.eigvalsh((x + x.mT) / 2)
    z = project_spectral_box(x, -0.3, 0.8)
    torch.testing.assert_close(torch.linalg.eigvalsh(z), values.clamp(-0.3, 0.8))
    torch.testing.assert_close(z, project_spectral_box(x.mT, -0.3, 0.8))
    torch.testing.assert_close(project_spectral_box(x, -math.inf, math.inf), (x + x.mT) / 2)


def test_bounds_of_each_element_may_be_infinite():
    x = normal(3, 4, 4).requires_grad_()
    lower = torch.tensor([0.0, -math.inf, -0.5], dtype=F64, requires_grad=True)
    upper = torch.tensor([math.inf, 0.5, 0.5], dtype=F64, requires_grad=True)
    z = project_spectral_box(x, lower, upper)
    one_by_one = [project_spectral_box(*a) for a in ((x[0], 0.0), (x[1], -math.inf, 0.5), (x[2], -0.5, 0.5))]
    torch.testing.assert_close(z, torch.stack(one_by_one))
    found = torch.autograd.grad(z.square().sum(), (x, lower, upper), create_graph=True)
    assert all(torch.isfinite(g).all() for g in found)
    assert found[1][1] == 0 and found[2][0] == 0
    second = torch.autograd.grad(sum(g.sin().sum() for g in found), (x, lower, upper))
    assert all(torch.isfinite(g).all() for g in second)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_every_operator_scales(scale):
    x, y = normal(4, 3), normal(4, 4)
    for f in (prox_nuclear, prox_spectral_l2, project_nuclear_ball):
        torch.testing.assert_close(f(scale * x, 0.7 * scale) / scale, f(x, 0.7))
    torch.testing.assert_close(
        project_spectral_box(scale * y, -0.1 * scale, scale) / scale, project_spectral_box(y, -0.1, 1)
    )
    torch.testing.assert_close(project_stiefel(scale * x), project_stiefel(x))


def test_narrow_box_of_a_large_matrix_loses_nothing():
    x = 1e9 * normal(6, 6)
    z = project_spectral_box(x, 0.25, 0.75)
    torch.testing.assert_close(
        torch.linalg.eigvalsh(z).unique_consecutive().aminmax(), (z.new_tensor(0.25), z.new_tensor(0.75))
    )


# ---------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("shape", SHAPES)
def test_derivatives(shape):
    x, t = normal(*shape, seed=11), torch.full(shape[:-2], 0.6, dtype=F64)
    check(prox_nuclear, x, t)
    check(project_nuclear_ball, x, t)
    check(prox_spectral_l2, x, t)
    if shape[-2] >= shape[-1]:
        check(project_stiefel, x)
    if shape[-2] == shape[-1]:
        check(project_spectral_box, x, t - 0.9, t)


REPEATED = [([2.0, 2.0, 2.0], 3, 3), ([2.0, 2.0, 0.3], 5, 3), ([2.0, 0.1, 0.1], 3, 4), ([0.0, 0.0, 0.0], 3, 3)]


@pytest.mark.parametrize(("values", "m", "n"), REPEATED)
def test_derivatives_at_repeated_singular_values(values, m, n):
    x, t = with_values(values, m, n), torch.tensor(1.0, dtype=F64)
    check(prox_nuclear, x, t)
    if values[0] > 0:
        check(project_nuclear_ball, x, t)
        check(prox_spectral_l2, x, t)
    if values[1] != 2.0:
        return
    leaf = x.clone().requires_grad_()
    u, s, v = torch.linalg.svd(leaf, full_matrices=False)
    w = normal(m, n, seed=5)
    plain = torch.autograd.grad((w * ((u * (s - 1).clamp_min(0)) @ v)).sum(), leaf)[0]
    right = torch.autograd.grad((w * prox_nuclear(leaf, 1.0)).sum(), leaf)[0]
    assert torch.isfinite(right).all() and not torch.allclose(plain, right), "the test no longer shows what it is for"


def test_derivatives_at_repeated_eigenvalues():
    basis = orthonormal(4, 4)
    x = basis @ torch.diag(torch.tensor([2.0, 2.0, -1.0, -1.0], dtype=F64)) @ basis.mT
    check(project_spectral_box, x)
    check(lambda x: project_spectral_box(x, -0.5, 1.0), x)
    check(lambda x: project_spectral_box(x, -math.inf, 3.0), x)
    check(project_stiefel, 2 * basis)
    check(project_stiefel, with_values([1.5, 1.5, 0.5], 5, 3))


@pytest.mark.parametrize("gap", [1e-6, 1e-10, 1e-13])
def test_derivative_is_exact_at_nearly_equal_values(gap):
    """On one side of the step soft thresholding of the values is the polar factor less a multiple of the matrix."""
    x = with_values([2.0 + gap, 2.0, 2.0 - gap], 3, 3)
    w = normal(3, 3, seed=5)
    found = jvp(lambda x: prox_nuclear(x, 0.5), (x,), (w,))[1]
    polar = jvp(project_stiefel, (x,), (w,))[1]
    torch.testing.assert_close(found, w - 0.5 * polar, atol=1e-12, rtol=0)
    low = with_values([2.0, gap, gap / 2], 3, 3)
    found = jvp(lambda x: prox_nuclear(x, 1.0), (low,), (w,))[1]
    limit = jvp(lambda x: prox_nuclear(x, 1.0), (with_values([2.0, 0, 0], 3, 3),), (w,))[1]
    torch.testing.assert_close(found, limit, atol=10 * gap, rtol=0)
    definite = jvp(project_spectral_box, (low @ low.mT + gap * torch.eye(3, dtype=F64),), (w + w.mT,))[1]
    torch.testing.assert_close(definite, w + w.mT, atol=1e-12, rtol=0)


def test_second_derivatives_are_zero_on_one_piece():
    """Where all eigenvalues lie on one side the cone's projection is linear, however close to zero they are."""
    basis = orthonormal(3, 3)
    for values in ([1.0, 1e-9, 1e-12], [-1.0, -1e-9, -1e-12]):
        x = (basis @ torch.diag(torch.tensor(values, dtype=F64)) @ basis.mT).requires_grad_()
        first = torch.autograd.grad((normal(3, 3) * project_spectral_box(x)).sum(), x, create_graph=True)[0]
        second = torch.autograd.grad((normal(3, 3, seed=1) * first).sum(), x)[0]
        assert torch.equal(second, torch.zeros_like(second))


def test_zero_branch_counts_at_a_kink():
    x, w = 2 * orthonormal(3, 3), normal(3, 3)
    assert torch.equal(jvp(lambda x: prox_nuclear(x, 2.0), (x,), (w,))[1], 0 * x)
    flat = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=F64))
    moved = jvp(project_spectral_box, (flat,), (w + w.mT,))[1]
    assert torch.equal(moved[1:, 1:], torch.zeros(2, 2, dtype=F64))
    torch.testing.assert_close(moved[0], (w + w.mT)[0])
    t = torch.tensor(2.0, dtype=F64, requires_grad=True)
    assert torch.autograd.grad(prox_nuclear(x, t).sum(), t)[0] == 0


def test_jacobians_are_symmetric_and_nonexpansive():
    x, y = normal(4, 3), normal(3, 3)
    calls = [
        (lambda x: prox_nuclear(x, 0.7), x),
        (lambda x: project_nuclear_ball(x, 1.0), x),
        (lambda x: prox_spectral_l2(x, 1.0), x),
        (lambda x: project_spectral_box(x, -0.2, 0.5), y),
    ]
    for f, at in calls:
        J = jacrev(f)(at).reshape(at.numel(), at.numel())
        torch.testing.assert_close(J, J.mT)
        values = torch.linalg.eigvalsh(J)
        assert values.min() > -1e-12 and values.max() < 1 + 1e-12


def test_derivative_in_the_radius_is_the_mean_direction():
    x = with_values([3.0, 2.0, 0.1], 5, 3)
    radius = torch.tensor(2.0, dtype=F64, requires_grad=True)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    found = jacrev(lambda r: project_nuclear_ball(x, r))(radius.detach())
    torch.testing.assert_close(found, (u[:, :2] @ v[:2]) / 2)


def test_third_derivative_is_refused():
    x = normal(3, 3).requires_grad_()
    for f in (lambda x: prox_nuclear(x, 0.5), project_spectral_box, project_stiefel):
        g = f(x).square().sum()
        for _ in range(2):
            g = torch.autograd.grad(g, x, create_graph=True)[0].square().sum()
        with pytest.raises(RuntimeError, match="not of third"):
            torch.autograd.grad(g, x)


def test_rank_deficient_polar_factor_has_finite_derivatives():
    x = with_values([2.0, 1.0, 0.0], 5, 3).requires_grad_()
    z = project_stiefel(x)
    torch.testing.assert_close(z.mT @ z, torch.eye(3, dtype=F64))
    g = torch.autograd.grad((normal(5, 3) * z).sum(), x, create_graph=True)[0]
    assert torch.isfinite(g).all()
    assert torch.isfinite(torch.autograd.grad(g.square().sum(), x)[0]).all()


# ---------------------------------------------------------------------------------------------------- hostile, batches


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_element_stays_alone(bad):
    x, y = normal(3, 4, 4), normal(3, 4, 4)
    y[1, 2, 0] = bad
    y[0], y[2] = x[0], x[2]
    for f in (
        lambda x: prox_nuclear(x, 0.5),
        lambda x: project_nuclear_ball(x, 0.5),
        lambda x: prox_spectral_l2(x, 0.5),
        project_spectral_box,
        project_stiefel,
    ):
        results = []
        for at in (x, y):
            leaf = at.clone().requires_grad_()
            z = f(leaf)
            results.append((z.detach(), torch.autograd.grad(z[[0, 2]].square().sum(), leaf)[0]))
        (z, g), (spoilt, h) = results
        assert torch.equal(z[[0, 2]], spoilt[[0, 2]]) and torch.equal(g[[0, 2]], h[[0, 2]])
        assert spoilt[1].isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 3), (2, 3, 0), (0, 0)])
def test_empty(shape):
    x = torch.zeros(shape, dtype=F64, requires_grad=True)
    calls = [lambda x: prox_nuclear(x, 0.5), lambda x: project_nuclear_ball(x, 0.5), lambda x: prox_spectral_l2(x, 0.5)]
    calls += [project_stiefel] if shape[-2] >= shape[-1] else []
    calls += [project_spectral_box] if shape[-2] == shape[-1] else []
    for f in calls:
        z = f(x)
        assert z.shape == x.shape
        assert torch.autograd.grad(z.sum(), x)[0].shape == x.shape


def test_bounds_are_checked():
    x = normal(3, 3)
    for lower, upper in ((1.0, 0.0), (math.nan, 1.0), (math.inf, math.inf), (-math.inf, -math.inf)):
        with pytest.raises(ValueError, match="lower: expected bounds with lower <= upper"):
            project_spectral_box(x, lower, upper)
    with pytest.raises(ValueError, match="lower: expected bounds"):
        project_spectral_box(normal(2, 3, 3), torch.tensor([0.0, 2.0], dtype=F64), 1.0)
    with pytest.raises(ValueError, match="upper: expected a number or a tensor, got str"):
        project_spectral_box(x, 0.0, "1")  # type: ignore[arg-type]


def test_mixed_second_derivative_of_the_ball_under_vmap_with_a_shared_radius():
    from torch.func import jacfwd, jacrev, vmap

    torch.manual_seed(0)
    x, radius = torch.randn(3, 2, 3, 3, dtype=torch.float64), torch.tensor([0.7, 1.5], dtype=torch.float64)
    mixed = jacfwd(jacrev(lambda x, r: project_nuclear_ball(x, r).sin().sum()), argnums=1)
    expected = torch.stack([mixed(each, radius) for each in x])
    torch.testing.assert_close(vmap(mixed, in_dims=(0, None))(x, radius), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_spoils_no_other(bad):
    x = torch.eye(3).expand(2, 3, 3).clone()
    x[0, 1, 2] = bad
    for f in (project_nuclear_ball, project_stiefel, project_spectral_box, lambda x: prox_nuclear(x, 0.5)):
        z = f(x)
        assert z[0].isnan().all()
        torch.testing.assert_close(z[1], f(x[1]))
