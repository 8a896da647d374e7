"""Darcy flow. Oracles: a manufactured solution, closed forms of layered media, finer grids, dense solves by SciPy."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.sparse import linalg as scipy_linalg

from difflayers.linalg import CG
from difflayers.pde import Box, Darcy, Dirichlet, Grid, PDEConstraint, darcy_reference

F64 = torch.float64
LINE = Box(x=(0.0, 1.0))


def centres(n, low=0.0, high=1.0):
    return low + (torch.arange(n, dtype=F64) + 0.5) / n * (high - low)


def smooth(x, y):
    return torch.exp(0.8 * torch.cos(3 * x) * torch.sin(2 * y + 0.3))


def wave(x, y):
    """A field that vanishes on the boundary of the unit square."""
    return torch.sin(math.pi * x) * torch.sin(2 * math.pi * y)


def source_of(u, a):
    """``-div(a grad u)`` by autograd, at any points."""

    def source(x, y):
        x, y = (t.clone().requires_grad_() for t in torch.broadcast_tensors(x, y))
        slopes = torch.autograd.grad(u(x, y).sum(), (x, y), create_graph=True)
        flux = [a(x, y) * slope for slope in slopes]
        out = sum(torch.autograd.grad(q.sum(), t, retain_graph=True)[0] for q, t in zip(flux, (x, y), strict=True))
        return -out.detach()

    return source


def wave_basis(count):
    """Products of sines: zero on the boundary, whatever the coefficients."""

    def basis(point):
        k = torch.arange(1, count + 1, dtype=point.dtype) * math.pi
        return (torch.sin(k * point[0])[:, None] * torch.sin(k * point[1])).flatten()

    return basis


def bubble_basis(count):
    """Powers times a polynomial that is zero on the boundary."""

    def basis(point):
        k = torch.arange(count, dtype=point.dtype)
        x, y = ((2 * point - 1)[:, None] ** k).unbind()
        return ((point * (1 - point)).prod() * x[:, None] * y).flatten()

    return basis


def test_manufactured_solution_to_second_order():
    errors = []
    for n in (16, 32, 64):
        x, y = centres(n)[:, None], centres(n)
        u = darcy_reference(smooth(x, y), source_of(wave, smooth)(x, y))
        errors.append(float((u - wave(x, y)).abs().max()))
    assert errors[-1] < 2e-3
    assert all(3.5 < coarse / fine < 4.5 for coarse, fine in pairwise(errors))


def test_converges_to_itself():
    """Means of 2 x 2 cells against the coarser grid, for a source without a formula."""
    found = {}
    for n in (16, 32, 64, 128):
        x, y = centres(n)[:, None], centres(n)
        found[n] = darcy_reference(smooth(x, y), torch.exp(x - y))
    coarse = lambda u: torch.nn.functional.avg_pool2d(u[None], 2)[0]  # noqa: E731
    gaps = [float((coarse(found[2 * n]) - found[n]).abs().max()) for n in (16, 32, 64)]
    assert gaps[-1] < 2e-3 * float(found[128].max()) and all(3.4 < a / b < 4.6 for a, b in pairwise(gaps))


@pytest.mark.parametrize("contrast", [1e-4, 5.0, 1e6])
def test_layers_of_different_permeability(contrast):
    """-(a u')' = 1 with a jump of a in the middle: harmonic means keep the order, arithmetic ones do not."""

    def exact(x):
        top = (0.125 + 0.375 / contrast) / (0.5 + 0.5 / contrast)  # where the flux vanishes
        left = top * x - x**2 / 2
        right = (top * (x - 1) - (x**2 - 1) / 2) / contrast
        return torch.where(x < 0.5, left, right)

    errors = []
    for n in (10, 40):
        x = centres(n)
        u = darcy_reference(torch.where(x < 0.5, torch.ones_like(x), contrast), 1.0, domain=LINE)
        errors.append(float((u - exact(x)).abs().max() / exact(x).abs().max()))
    assert errors[0] < 0.05 and errors[1] < errors[0] / 12


def test_the_matrix_is_the_textbooks():
    """Five points with faces computed here one by one, on cells that are not square."""
    rng = np.random.default_rng(0)
    a, f = rng.uniform(0.2, 3.0, (4, 3)), rng.standard_normal((4, 3))
    h = (2.0 / 4, 0.6 / 3)
    A = sparse.lil_array((12, 12))
    for i in range(4):
        for j in range(3):
            for k, (p, q) in enumerate(((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1))):
                inside = 0 <= p < 4 and 0 <= q < 3
                width = h[k // 2]
                face = (2 / (1 / a[i, j] + 1 / a[p, q]) if inside else 2 * a[i, j]) / width**2
                A[3 * i + j, 3 * i + j] += face
                if inside:
                    A[3 * i + j, 3 * p + q] -= face
    want = scipy_linalg.spsolve(A.tocsc(), f.ravel()).reshape(4, 3)
    got = darcy_reference(torch.tensor(a), torch.tensor(f), domain=Box(x=(-1.0, 1.0), y=(0.0, 0.6)))
    np.testing.assert_allclose(got, want, rtol=1e-11)


def test_three_dimensions_and_batches():
    box = Box(x=(0.0, 1.0), y=(0.0, 1.0), z=(0.0, 1.0))
    a = torch.tensor(np.random.default_rng(1).uniform(0.5, 2.0, (2, 3, 5, 4, 3)))
    f = torch.tensor(np.random.default_rng(2).standard_normal((3, 5, 4, 3)))
    u = darcy_reference(a, f, domain=box)
    assert u.shape == a.shape
    torch.testing.assert_close(u[1, 2], darcy_reference(a[1, 2], f[2], domain=box))
    torch.testing.assert_close(u, darcy_reference(a, f, domain=box, solver=CG(rtol=1e-12)), rtol=1e-8, atol=1e-10)
    n = 24
    x = centres(n)
    wide = torch.ones(n, n, n, dtype=F64)
    s = torch.sin(math.pi * x)
    wave3 = s[:, None, None] * s[:, None] * s
    eigen = 3 * (2 * n * math.sin(math.pi / 2 / n)) ** 2  # discrete, exactly
    torch.testing.assert_close(darcy_reference(wide, wave3, domain=box, solver=CG()), wave3 / eigen, rtol=1e-7, atol=0)


def test_derivatives_of_the_reference():
    a = torch.tensor(np.random.default_rng(3).uniform(0.5, 2.0, (2, 3, 3)), requires_grad=True)
    f = torch.tensor(np.random.default_rng(4).standard_normal((3, 3)), requires_grad=True)
    assert torch.autograd.gradcheck(darcy_reference, (a, f), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(darcy_reference, (a, f))
    got = torch.func.vmap(torch.func.grad(lambda a: darcy_reference(a, f.detach()).sum()))(a.detach())
    want = torch.autograd.grad(darcy_reference(a, f).sum(), a)[0]
    torch.testing.assert_close(got, want)
    assert darcy_reference(a.float(), f.float()).dtype == torch.float32


def test_the_layer_finds_the_reference():
    """A basis that can nearly represent the field; the coefficient is a function, its gradient is found."""
    n = 96
    x, y = centres(n)[:, None], centres(n)
    layer = PDEConstraint(Darcy(a=lambda p: smooth(p[:, 0], p[:, 1]), f=2.0)).double()
    field = layer(bubble_basis(8))
    points = torch.stack([t.flatten() for t in torch.broadcast_tensors(x, y)], -1)
    reference = darcy_reference(smooth(x, y), 2.0)
    error = (field(points).reshape(n, n) - reference).norm() / reference.norm()
    assert bool(field.converged) and bool(field.linear)
    assert error < 1e-3, error


def test_the_layer_reproduces_a_manufactured_solution():
    """Exactly: the solution is among the basis functions. Without the gradient of a it would not be."""
    source = source_of(wave, smooth)
    pde = Darcy(a=lambda p: smooth(p[:, 0], p[:, 1]), f=lambda p: source(p[:, 0], p[:, 1]))
    field = PDEConstraint(pde).double()(wave_basis(3))
    want = torch.zeros(9, dtype=F64)
    want[1] = 1.0
    torch.testing.assert_close(field.weights, want, rtol=0, atol=1e-9)


def test_another_coefficient_in_a_call_brings_its_gradient():
    pde = Darcy(a=None)
    layer = PDEConstraint(pde).double()
    with pytest.raises(ValueError, match=r"a\(x\)"):
        layer(wave_basis(3))
    with pytest.raises(ValueError, match=r"params: expected names of .* got 'a'"):
        layer(wave_basis(3), {"a": 2.0})
    smooth_a = lambda p: smooth(p[:, 0], p[:, 1])  # noqa: E731
    given = layer(wave_basis(4), pde.coefficient(smooth_a)).weights
    torch.testing.assert_close(given, PDEConstraint(Darcy(a=smooth_a)).double()(wave_basis(4)).weights)
    half = layer(wave_basis(4), pde.coefficient(2.0)).weights
    torch.testing.assert_close(2 * half, PDEConstraint(Darcy()).double()(wave_basis(4)).weights)


def test_gradient_in_the_coefficient_agrees_with_the_references():
    """Of the mean pressure, in the parameters of a network that is the permeability; and with finite differences."""
    theta = torch.tensor([0.4, -0.3], dtype=F64, requires_grad=True)
    pde = Darcy(a=None)
    layer, n = PDEConstraint(pde, sampler=Grid(pde.domain, x=24, y=24)).double(), 48
    x, y = centres(n)[:, None], centres(n)
    points = torch.stack([t.flatten() for t in torch.broadcast_tensors(x, y)], -1)

    def of_layer(theta):
        a = lambda p: torch.exp(theta[0] * torch.sin(3 * p[:, 0]) + theta[1] * p[:, 0] * p[:, 1])  # noqa: E731
        return layer(bubble_basis(6), pde.coefficient(a))(points).mean()

    def of_cells(theta):
        return darcy_reference(torch.exp(theta[0] * torch.sin(3 * x) + theta[1] * x * y), 1.0).mean()

    assert torch.autograd.gradcheck(of_layer, theta)
    (mine,), (cells,) = torch.autograd.grad(of_layer(theta), theta), torch.autograd.grad(of_cells(theta), theta)
    torch.testing.assert_close(mine, cells, rtol=5e-3, atol=0)
    forward = torch.func.jacfwd(of_layer)(theta.detach())
    torch.testing.assert_close(forward, mine)


def test_batch_of_constants_and_one_dimension():
    a = torch.tensor([[1.0], [4.0]], dtype=F64)
    layer = PDEConstraint(Darcy(domain=LINE, a=a)).double()
    field = layer(lambda point: point ** torch.arange(4, dtype=F64))
    x = torch.linspace(0, 1, 5, dtype=F64)[:, None]
    torch.testing.assert_close(field(x), (x * (1 - x) / 2).T / a)


def test_refusals():
    with pytest.raises(ValueError, match=r"a: expected a number, a tensor .* or a function"):
        Darcy(a=torch.ones(5))
    assert Darcy(conditions=(Dirichlet("x"),)).blocks[0].axis == 0
    a = torch.ones(4, 4)
    for bad in (-a, a * float("nan"), a * 0):
        with pytest.raises(ValueError, match="a: "):
            darcy_reference(bad, 1.0)
    with pytest.raises(ValueError, match="f: "):
        darcy_reference(a, torch.ones(4, 3))
    with pytest.raises(ValueError, match="f: "):
        darcy_reference(a, a.double())
    with pytest.raises(ValueError, match="f: "):
        darcy_reference(a, a[0])
    with pytest.raises(ValueError, match="a: expected at least 2 dim"):
        darcy_reference(a[0], 1.0)
    with pytest.raises(ValueError, match="a: expected at least one cell"):
        darcy_reference(a[:, :0], 1.0)
