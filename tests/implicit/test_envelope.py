"""The envelope: first order without a solve, second order through the map. Oracle: the closed form of the value."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, vmap

import difflayers
from difflayers.implicit import argmin, envelope

F64 = torch.float64


def energy(z, a, W):
    return ((z - a).square() / 2).sum(-1) + ((W @ z[..., None])[..., 0].square() / 2).sum(-1)


def value(a, W):
    """min_z 1/2||z - a||^2 + 1/2||W z||^2 by the layer."""
    return envelope(energy, argmin(energy, torch.zeros_like(a), (a, W)), (a, W))


def closed_form(a, W):
    M = torch.eye(a.shape[-1], dtype=a.dtype) + W.mT @ W
    return ((a * a).sum(-1) - (a * torch.linalg.solve(M, a[..., None])[..., 0]).sum(-1)) / 2


def inputs():
    return torch.randn(3, 2, dtype=F64, requires_grad=True), torch.randn(2, 2, dtype=F64, requires_grad=True)


def test_value_and_derivatives_equal_the_closed_form():
    a, W = inputs()
    torch.testing.assert_close(value(a, W), closed_form(a, W))
    assert gradcheck(value, (a, W), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(value, (a, W))
    a, W = a.detach(), W.detach()
    want = torch.stack([hessian(closed_form)(x, W) for x in a])
    torch.testing.assert_close(vmap(hessian(value), in_dims=(0, None))(a, W), want)
    torch.testing.assert_close(vmap(jacfwd(grad(value)), in_dims=(0, None))(a, W), want)


def test_first_order_solves_nothing_and_second_order_does():
    a, W = inputs()
    with difflayers.trace() as solves:
        (g,) = torch.autograd.grad(value(a, W).sum(), a, create_graph=True)
        assert [s.phase for s in solves] == ["forward"]
        torch.autograd.grad(g.sum(), a)
        assert "adjoint" in [s.phase for s in solves]


def test_bad_input_is_named():
    a, W = inputs()
    with pytest.raises(ValueError, match="value: expected a tensor"):
        envelope(energy, 1.0, (a, W))
    with pytest.raises(ValueError, match="captures"):
        envelope(lambda z, a: energy(z, a, W), a.detach(), (a,))
