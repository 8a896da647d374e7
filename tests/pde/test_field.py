"""The field that a constraint returns: values on a grid, transforms, and the objective.

Oracles: products of basis and coefficients by hand; plain autograd; finite differences.
"""

import math

import torch
from torch import Tensor

from difflayers.pde import Box, Burgers, Dirichlet, Grid, Initial, PDEConstraint, Poisson, Sobol, Spectral

F64 = torch.float64


def test_the_objective_has_the_derivative_of_the_envelope():
    pde = Burgers(conditions=(Initial("u0"), Dirichlet("x")))
    layer = PDEConstraint(pde, sampler=Sobol(points=20, boundary=4), ridge=1e-2).double()

    def value(a: Tensor, nu: Tensor, start: Tensor) -> Tensor:
        basis = lambda p: torch.sin(a * p[1] + p[0] * torch.arange(3, dtype=F64))  # noqa: E731
        return layer(basis, {"nu": nu}, {"u0": start}).objective

    inputs = [torch.tensor(t, dtype=F64, requires_grad=True) for t in ([1.0, 2.0, 3.5], [[0.1], [0.3]], [0.4])]
    assert value(*inputs).shape == (2,)
    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradgradcheck(value, inputs, atol=1e-5)


def test_values_on_a_grid_have_the_batch_in_front():
    square = Box(x=(0.0, 1.0), y=(0.0, 2.0))
    grid = Grid(square, spacing="chebyshev", x=6, y=5)
    basis = torch.randn(6, 6, 5, 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    field = PDEConstraint(Poisson(domain=square), derivatives=Spectral(grid), ridge=1e-2).double()(basis)
    assert field().shape == (6, 6, 5)
    torch.testing.assert_close(field()[4, 2, 3], basis[4, 2, 3] @ field.value[4])
    torch.testing.assert_close(field(), field.terms["u"].unflatten(-1, grid.shape))


def test_transforms_of_a_layer_with_sobol_points():
    pde = Burgers(nu=0.2)
    layer = PDEConstraint(pde, ridge=1e-4, sampler=Sobol(points=20, boundary=4)).double()
    basis = lambda p: torch.stack([p[1], p[0] * p[1], p[1] ** 3])  # noqa: E731
    value = lambda nu: layer(basis, {"nu": nu}, {"u0": lambda p: -torch.sin(math.pi * p[:, 1])}).value.sum()  # noqa: E731
    nu = torch.tensor([0.2], dtype=F64, requires_grad=True)
    slope = torch.autograd.grad(value(nu), nu)[0]
    torch.testing.assert_close(torch.func.grad(value)(nu.detach()), slope, rtol=1e-10, atol=0)
    both = torch.func.vmap(torch.func.grad(value))(nu.detach().expand(2, 1))
    torch.testing.assert_close(both, slope.expand(2, 1), rtol=1e-10, atol=0)
