"""Total variation of images: against a conic solver, alternating directions, the signal case, and by its own proof."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from difflayers import SolveWarning, Status
from difflayers.proximal import (
    DualGradient,
    TV2DInteriorPoint,
    prox_graph_tv,
    prox_tv1d,
    prox_tv2d,
    prox_tv2d_ex,
)
from difflayers.proximal._grid_system import GridSystem, difference, divergence
from difflayers.testing.cases._proximal_variation import _grid, _tv2d


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def square(n: int, noise: float = 0.1) -> Tensor:
    image = torch.zeros(n, n, dtype=torch.float64)
    image[n // 4 : n // 2 + 2, n // 3 :] = 1
    return image + noise * normal(n, n)


def conic(x: Tensor, t: float, *, isotropic: bool) -> Tensor:
    import cvxpy as cp

    z = cp.Variable(x.shape)
    right = cp.hstack([z[:, 1:] - z[:, :-1], np.zeros((x.shape[0], 1))])
    down = cp.vstack([z[1:] - z[:-1], np.zeros((1, x.shape[1]))])
    both = cp.vstack([cp.vec(right, order="C"), cp.vec(down, order="C")])
    variation = cp.sum(cp.norm(both, 2, axis=0)) if isotropic else cp.sum(cp.abs(both))
    problem = cp.Problem(cp.Minimize(t * variation + cp.sum_squares(z - x.numpy()) / 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is asked for all it can do, and says that it did no more
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-15, tol_gap_rel=1e-15, tol_feas=1e-15)
    return torch.from_numpy(z.value)


@pytest.mark.parametrize("isotropic", [True, False])
@pytest.mark.parametrize("t", [0.05, 0.3, 1.0])
def test_equals_conic_solver(t: float, isotropic: bool):
    x = normal(6, 7)
    z = prox_tv2d(x, t, isotropic=isotropic)
    torch.testing.assert_close(z, conic(x, t, isotropic=isotropic), atol=1e-7, rtol=0)


@pytest.mark.parametrize("t", [0.1, 0.4, 1.5])
def test_equals_alternating_directions(t: float):
    x = normal(5, 4, seed=1)
    expected = torch.from_numpy(_tv2d(x.numpy(), np.array(t)))
    torch.testing.assert_close(prox_tv2d(x, t), expected, atol=1e-10, rtol=0)


def test_derivatives_are_those_of_alternating_directions():
    x, t, g, d = normal(5, 4, seed=1), 0.3, normal(5, 4, seed=2), normal(5, 4, seed=3)
    leaf, step = x.clone().requires_grad_(), torch.tensor(t, dtype=torch.float64, requires_grad=True)
    by_x, by_t = torch.autograd.grad(prox_tv2d(leaf, step), (leaf, step), g)
    h = 1e-5
    ends = [_tv2d((x + s * h * d).numpy(), np.array(t)) for s in (1, -1)]
    assert (by_x * d).sum().item() == pytest.approx(((ends[0] - ends[1]) * g.numpy()).sum() / (2 * h), abs=1e-6)
    ends = [_tv2d(x.numpy(), np.array(t + s * h)) for s in (1, -1)]
    assert by_t.item() == pytest.approx(((ends[0] - ends[1]) * g.numpy()).sum() / (2 * h), abs=1e-6)


@pytest.mark.parametrize("isotropic", [True, False])
def test_derivative_of_a_larger_image_is_that_of_its_own_differences(isotropic: bool):
    x, g, d = square(24), normal(24, 24, seed=2), normal(24, 24, seed=3)
    t = torch.tensor(0.15, dtype=torch.float64)
    leaves = x.clone().requires_grad_(), t.clone().requires_grad_()
    by_x, by_t = torch.autograd.grad(prox_tv2d(*leaves, isotropic=isotropic), leaves, g)
    h = 1e-7
    f = lambda x, t: (prox_tv2d(x, t, isotropic=isotropic) * g).sum().item()  # noqa: E731
    assert (by_x * d).sum().item() == pytest.approx((f(x + h * d, t) - f(x - h * d, t)) / (2 * h), abs=1e-4)
    assert by_t.item() == pytest.approx((f(x, t + h) - f(x, t - h)) / (2 * h), abs=1e-4)


def test_the_jacobian_is_symmetric_and_shrinks():
    J = torch.autograd.functional.jacobian(lambda x: prox_tv2d(x, 0.4), normal(4, 5)).reshape(20, 20)
    torch.testing.assert_close(J, J.T, atol=1e-10, rtol=0)
    values = torch.linalg.eigvalsh(J)
    assert values.min() > -1e-10
    assert values.max() < 1 + 1e-10


@pytest.mark.parametrize("isotropic", [True, False])
def test_an_image_of_equal_rows_is_a_signal(isotropic: bool):
    row = normal(30).cumsum(-1)
    z = prox_tv2d(row.expand(5, 30), 0.7, isotropic=isotropic)
    torch.testing.assert_close(z, prox_tv1d(row, 0.7).expand(5, 30), atol=1e-9, rtol=0)
    torch.testing.assert_close(prox_tv2d(row.expand(5, 30).T, 0.7, isotropic=isotropic), z.T, atol=1e-9, rtol=0)
    one = prox_tv2d(row[None], 0.7, isotropic=isotropic)
    torch.testing.assert_close(one, prox_tv1d(row, 0.7)[None], atol=1e-9, rtol=0)


def test_anisotropic_is_the_graph_of_pixels():
    x = normal(2, 6, 5)
    edges = torch.from_numpy(_grid(6, 5))
    z = prox_tv2d(x, 0.3, isotropic=False)
    torch.testing.assert_close(z.flatten(1), prox_graph_tv(x.flatten(1), 0.3, edges), atol=1e-12, rtol=0)


def test_solvers_agree_within_what_they_prove():
    x = square(32)
    exact = prox_tv2d_ex(x, 0.2, solver=TV2DInteriorPoint())
    assert exact.status == Status.CONVERGED
    assert exact.residual < 1e-5
    for rtol in (1e-1, 1e-2, 1e-3):
        near = prox_tv2d_ex(x, 0.2, solver=DualGradient(rtol=rtol))
        assert near.status == Status.CONVERGED
        assert torch.linalg.vector_norm(near.value - exact.value) <= near.residual + exact.residual
        assert near.residual < 2 * rtol * torch.linalg.vector_norm(x - x.mean())
    rough = prox_tv2d_ex(x, 0.2, solver=TV2DInteriorPoint(rtol=1e-2))
    assert rough.steps < exact.steps
    assert torch.linalg.vector_norm(rough.value - exact.value) <= rough.residual + exact.residual


def test_large_images_go_by_gradients():
    x = square(80).requires_grad_()
    solution = prox_tv2d_ex(x, 0.1)
    assert solution.status == Status.CONVERGED
    assert solution.residual < 2e-3 * torch.linalg.vector_norm(x - x.mean())
    (found,) = torch.autograd.grad(solution.value.square().sum(), x)
    assert found.isfinite().all()


@pytest.mark.parametrize("scale", [1e-9, 1e9])
@pytest.mark.parametrize("isotropic", [True, False])
def test_scales(scale: float, isotropic: bool):
    x = square(12)
    z = prox_tv2d(scale * x, 0.1 * scale, isotropic=isotropic) / scale
    torch.testing.assert_close(z, prox_tv2d(x, 0.1, isotropic=isotropic), atol=1e-9, rtol=0)


@pytest.mark.parametrize("isotropic", [True, False])
def test_no_step_and_an_endless_one(isotropic: bool):
    x = normal(2, 5, 6).round(decimals=1)
    t = torch.tensor([0.0, math.inf], dtype=torch.float64, requires_grad=True)
    leaf = x.clone().requires_grad_()
    z = prox_tv2d(leaf, t, isotropic=isotropic)
    assert (z[0] == x[0]).all()
    torch.testing.assert_close(z[1], x[1].mean().expand(5, 6), atol=1e-12, rtol=0)
    g = normal(2, 5, 6, seed=1)
    by_x, by_t = torch.autograd.grad(z, (leaf, t), g)
    torch.testing.assert_close(by_x[0], g[0])
    torch.testing.assert_close(by_x[1], g[1].mean().expand(5, 6))
    assert by_t.isfinite().all()
    if isotropic:  # the first-order term where nothing is flat
        flow = difference(x[0]) / difference(x[0]).norm(dim=0).clamp_min(1e-300)
        assert by_t[0].item() == pytest.approx(-(divergence(flow) * g[0]).sum().item())


def test_batches_are_single_images():
    x, t = normal(2, 3, 4, 5), torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    z = prox_tv2d(x, t)
    for i in range(2):
        for k in range(3):
            torch.testing.assert_close(z[i, k], prox_tv2d(x[i, k], t[k].item()), atol=1e-9, rtol=0)
    assert prox_tv2d(x[:0], t).shape == (0, 3, 4, 5)


@pytest.mark.parametrize("isotropic", [True, False])
def test_single_precision(isotropic: bool):
    x = square(16)
    leaf = x.float().requires_grad_()
    z = prox_tv2d(leaf, 0.1, isotropic=isotropic)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.detach().double(), prox_tv2d(x, 0.1, isotropic=isotropic), atol=1e-4, rtol=0)
    assert torch.autograd.grad(z.square().sum(), leaf)[0].isfinite().all()


def test_failures_are_told():
    x = normal(2, 6, 6)
    with pytest.warns(SolveWarning, match="prox_tv2d"):
        prox_tv2d(x, 0.4, solver=TV2DInteriorPoint(max_steps=1))
    with pytest.warns(SolveWarning, match="prox_tv2d"):
        prox_tv2d(x, 0.4, solver=DualGradient(rtol=1e-9, max_steps=20))
    x[1, 2, 3] = math.nan
    with pytest.raises(ValueError, match="x: expected finite numbers"):
        prox_tv2d(x, 0.4)
    z = prox_tv2d(x, 0.4, on_failure="nan")
    assert z[0].isfinite().all()
    assert z[1].isnan().all()


@pytest.mark.parametrize("options", [{"rtol": 0.0}, {"max_steps": 0}])
def test_bad_options_are_refused(options: dict[str, float]):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        TV2DInteriorPoint(**options)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (5, 1), (2, 2), (4, 7), (8, 3), (9, 9)])
def test_grid_systems_are_solved(shape: tuple[int, int]):
    L = normal(2, *shape, 2, 2)
    S = L @ L.mT
    M = torch.stack([S[..., 0, 0], S[..., 1, 1], S[..., 0, 1]], 1)
    M[:, [0, 2], :, -1] = 0
    M[:, [1, 2], -1] = 0
    r = normal(2, *shape, seed=1)
    z = GridSystem(M, 0.5).solve(r)
    (right, down, both), (a, b) = M.unbind(1), difference(z).unbind(1)
    image = 0.5 * z + divergence(torch.stack([right * a + both * b, both * a + down * b], 1))
    torch.testing.assert_close(image, r, atol=1e-11, rtol=0)
