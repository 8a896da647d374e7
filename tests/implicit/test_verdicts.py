"""A verdict is as good as its scale: steep starts, tiny numbers, hard systems, functions that write into inputs."""

import pytest
import torch

from difflayers import Status
from difflayers.implicit import (
    LBFGS,
    Bisection,
    LevenbergMarquardt,
    Newton,
    Unrolled,
    argmin,
    argmin_ex,
    fixed_point,
    fixed_point_ex,
    nonlinear_least_squares,
    nonlinear_least_squares_ex,
    root_find,
    root_find_ex,
)
from difflayers.linalg import CG, GMRES, LU, QR, least_squares, linear_solve_ex

F64 = torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("start", [3.0, 100.0, 1e4])
def test_lbfgs_from_a_steep_start(dtype, start):
    a = torch.ones((), dtype=dtype)
    quartic = lambda z, a: (z - a) ** 4 + (z - a) ** 2  # noqa: E731
    s = argmin_ex(quartic, torch.full((), start, dtype=dtype), (a,), event_ndim=0)
    assert s.converged.all()
    torch.testing.assert_close(s.value, a)


def test_lbfgs_never_calls_a_far_point_a_minimum():
    for _ in range(20):
        A, y = torch.randn(8, 5, dtype=F64), torch.randn(8, dtype=F64)
        f = lambda z, y, A=A: torch.cosh(z @ A.mT - y).sum(-1)  # noqa: E731
        far, near = argmin_ex(f, torch.randn(5, dtype=F64) * 10, (y,)), argmin_ex(f, torch.zeros(5, dtype=F64), (y,))
        assert near.converged.all()
        if far.converged.all():
            torch.testing.assert_close(far.value, near.value, rtol=1e-6, atol=1e-8)


def test_tiny_numbers_do_not_vanish_in_norms():
    a = torch.tensor([[1.0, 2.0]]) * 1e-23
    want = a / 2
    zero = torch.zeros(1, 2)
    for got in (
        root_find_ex(lambda z, a: 2 * z - a, zero, (a,)),
        fixed_point_ex(lambda z, a: 0.5 * z + a / 4, zero, (a,)),
        linear_solve_ex(2 * torch.eye(2), a, solver=CG()),
        linear_solve_ex(2 * torch.eye(2), a, solver=GMRES()),
    ):
        assert got.converged.all()
        torch.testing.assert_close(got.value, want, rtol=1e-4, atol=0)
    A, w = torch.randn(8, 3), torch.tensor([1.0, 2.0, 3.0])
    for scale in (1e-22, 1e-12, 1.0, 1e12, 1e19):
        torch.testing.assert_close(least_squares(A * scale, A @ w * scale), w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("solver", [LU(), QR()], ids=["LU", "QR"])
def test_no_rank_deficient_matrix_passes(dtype, solver):
    for n in (5, 20, 64):
        A = torch.randn(100, n, n - 1, dtype=dtype) @ torch.randn(100, n - 1, n, dtype=dtype)
        assert (linear_solve_ex(A, torch.randn(100, n, dtype=dtype), solver=solver).status == Status.SINGULAR).all()


def test_an_ordinary_float32_system_is_not_called_singular():
    n = 600
    poisson = 2 * torch.eye(n) - torch.diag(torch.ones(n - 1), 1) - torch.diag(torch.ones(n - 1), -1)
    assert linear_solve_ex(poisson, torch.ones(n)).converged.all()


def test_gmres_does_not_give_up_on_a_hard_system():
    U, V = (torch.linalg.qr(torch.randn(100, 100, dtype=F64))[0] for _ in range(2))
    A = U @ torch.diag(torch.logspace(0, -2, 100, dtype=F64)) @ V
    assert linear_solve_ex(A, torch.ones(100, dtype=F64), solver=GMRES()).converged.all()


def test_the_plain_corrections_of_one_element_cost_no_other_its_steps():
    n = 40
    hard = 3 * (torch.eye(n, dtype=F64) + 0.5 * torch.randn(n, n, dtype=F64) / n**0.5)
    b = torch.randn(2, n, dtype=F64)
    alone = linear_solve_ex(hard, b[0], solver=GMRES(max_steps=35))
    beside = linear_solve_ex(torch.stack([hard, 1.5 * torch.eye(n, dtype=F64)]), b, solver=GMRES(max_steps=35))
    assert alone.converged and beside.converged[0]


@pytest.mark.parametrize("solve", [root_find, fixed_point])
def test_functions_that_write_into_what_they_are_given_are_refused(solve):
    a = torch.ones(3, dtype=F64)
    with pytest.raises(ValueError, match=r"expected a function that leaves its arguments alone, got"):
        solve(lambda z, a: z.mul_(0.5).add_(a), torch.zeros(3, dtype=F64), (a,))
    with pytest.raises(ValueError, match=r"expected a function that leaves its arguments alone, got"):
        solve(lambda z, a: z * 0.5 + a.mul_(0.5), torch.zeros(3, dtype=F64), (a.clone(),))


def test_a_saddle_found_by_newton_has_a_derivative_above_the_dense_limit():
    n = 70
    s = torch.ones(n, dtype=F64)
    s[0] = -1
    a = torch.randn(n, dtype=F64, requires_grad=True)
    z = argmin(lambda z, a: (s * (z - a) ** 2).sum(-1), torch.zeros(n, dtype=F64), (a,), solver=Newton())
    torch.testing.assert_close(torch.autograd.grad(z.sum(), a)[0], torch.ones(n, dtype=F64))


def test_unrolled_where_it_has_a_derivative_and_where_it_has_none():
    cubic = lambda z, a: z**3 + z - a  # noqa: E731
    a = torch.full((1, 70), 2.0, dtype=F64, requires_grad=True)
    z = root_find(cubic, torch.zeros(1, 70, dtype=F64), (a,), adjoint=Unrolled(30))
    torch.testing.assert_close(torch.autograd.grad(z.sum(), a)[0], torch.full((1, 70), 0.25, dtype=F64))
    with pytest.raises(ValueError, match=r"adjoint: expected Implicit or Neumann for Bisection, got Unrolled"):
        root_find(cubic, torch.zeros(2, 1, dtype=F64), (a[:, :1],), solver=Bisection(), adjoint=Unrolled(9))
    y = torch.randn(4, dtype=F64, requires_grad=True)
    fit = lambda z, y: torch.cat([z, z**2, z - 1, torch.sin(z)], -1) - y  # noqa: E731
    start = torch.zeros(1, dtype=F64)
    (g,) = torch.autograd.grad(nonlinear_least_squares(fit, start, (y,), adjoint=Unrolled(60)).sum(), y)
    (want,) = torch.autograd.grad(nonlinear_least_squares(fit, start, (y,)).sum(), y)
    torch.testing.assert_close(g, want, rtol=1e-6, atol=1e-8)


def test_polish_leaves_starved_elements_alone():
    s = nonlinear_least_squares_ex(
        lambda z, a: z**2 - a, torch.full((1,), 0.3, dtype=F64), (torch.full((1,), 2.0, dtype=F64),),
        solver=LevenbergMarquardt(max_steps=1),
    )  # fmt: skip
    assert not s.converged.any() and s.value.abs().item() > 0.1


def test_lbfgs_does_not_stagnate_on_a_small_difference_of_large_terms():
    """The rounding of such an objective does not show in its value: slopes have to decide near the minimum."""
    generator = torch.Generator().manual_seed(0)
    W, b, c, x = (torch.randn(shape, generator=generator, dtype=F64) for shape in ((8, 18), (8,), (8,), (2000, 18)))

    def energy(z, x):
        return 0.7 * (torch.tanh(z @ W.mT / 18**0.5 + b) * c).sum(-1) + (z - x).square().sum(-1) / 2

    found = argmin_ex(energy, x, (x,), solver=LBFGS())
    assert bool(found.converged.all()), found.status.bincount()
