"""Costs between points and the Sinkhorn divergence.

Oracles, written down before the code: double loops over the points; the three entropic values of POT; differences;
closed forms (a translation at small eps, Dirac masses); for unbalanced ones the sign and the zero.
"""

import math

import numpy as np
import ot
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from difflayers.transport import Cosine, Euclidean, KernelSinkhorn, SquaredEuclidean, sinkhorn_divergence

D = torch.float64
TIGHT = KernelSinkhorn(rtol=1e-14)  # differences of second derivatives would show 1e-10
NAN = float("nan")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


X, Y = normal(2, 4, 3), normal(5, 3, seed=1)
PAIRS = {
    SquaredEuclidean(): lambda p, q: sum((s - t) ** 2 for s, t in zip(p, q, strict=True)),
    Euclidean(): math.dist,
    Cosine(): lambda p, q: 1 - sum(s * t for s, t in zip(p, q, strict=True)) / math.hypot(*p) / math.hypot(*q),
}


@pytest.mark.parametrize("cost", PAIRS, ids=repr)
def test_costs_are_those_of_a_double_loop(cost):
    got = cost(X, Y)
    for k in range(2):
        for i in range(4):
            for j in range(5):
                assert abs(float(got[k, i, j]) - PAIRS[cost](X[k, i].tolist(), Y[j].tolist())) < 1e-13
    x = [t.clone().requires_grad_() for t in (X, Y)]
    assert gradcheck(cost, x, check_forward_ad=True)
    assert gradgradcheck(cost, x)


@pytest.mark.parametrize("cost", PAIRS, ids=repr)
def test_derivatives_at_coincident_points_and_at_the_origin(cost):
    """Zero where the cost has its minimum; finite, with a zero, where cosine and distance have a kink."""
    x = torch.cat([X[0], torch.zeros(1, 3, dtype=D)]).requires_grad_()
    slope = torch.autograd.grad(cost(x, x.detach()).diagonal().sum(), x, create_graph=True)[0]
    assert float(slope.detach().abs().max()) < 1e-14
    (second,) = torch.autograd.grad(slope.sum(), x)
    assert bool(torch.isfinite(second).all())
    if cost == SquaredEuclidean():
        torch.testing.assert_close(second, torch.full_like(second, 2))


@pytest.mark.parametrize("cost", PAIRS, ids=repr)
@pytest.mark.parametrize("scale", [1e-150, 1e-9, 1e9, 1e150])
def test_costs_at_extreme_scales(cost, scale):
    power = {SquaredEuclidean(): 2, Euclidean(): 1, Cosine(): 0}[cost]
    unit = scale**power
    if not 0 < unit < math.inf:
        return
    torch.testing.assert_close(cost(X * scale, Y * scale) / unit, cost(X, Y), rtol=1e-12, atol=1e-12)


def test_squares_far_from_the_origin_keep_their_digits():
    far = SquaredEuclidean()(X.float() + 1000, Y.float() + 1000)
    expected = ((X.float() + 1000).double().unsqueeze(-2) - (Y.float() + 1000).double()).square().sum(-1)
    torch.testing.assert_close(far.double(), expected, rtol=0, atol=1e-4)


def test_costs_refuse_what_does_not_fit():
    for cost in PAIRS:
        with pytest.raises(ValueError, match="x: expected at least 2 dimensions"):
            cost(X[0, 0], Y)
        with pytest.raises(ValueError, match=r"y: expected shape \(3,\)"):
            cost(X, Y[:, :2])
        with pytest.raises(ValueError, match="y: expected dtype"):
            cost(X, Y.float())


def pot(x: Tensor, y: Tensor, a: Tensor, b: Tensor, eps: float) -> float:
    """The divergence of three `value`s of ot.solve."""

    def value(p: Tensor, q: Tensor, s: Tensor, t: Tensor) -> float:
        cost = ot.dist(p.numpy(), q.numpy())
        return float(ot.solve(cost, s.numpy(), t.numpy(), reg=eps, reg_type="KL", tol=1e-13, max_iter=200_000).value)

    return value(x, y, a, b) - value(x, x, a, a) / 2 - value(y, y, b, b) / 2


def test_divergence_is_that_of_three_values_of_pot():
    a, b = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=D), torch.tensor([0.3, 0.1, 0.2, 0.2, 0.2], dtype=D)
    got = sinkhorn_divergence(X / 2, Y / 2, a, b, eps=0.5)
    for k in range(2):
        assert abs(float(got[k]) - pot(X[k] / 2, Y / 2, a, b, 0.5)) < 1e-8


def test_empirical_divergence_of_pot_is_another_number():
    """It combines <C, P>; the docstring says so."""
    points = X[0].numpy(), Y.numpy()
    other = float(ot.bregman.empirical_sinkhorn_divergence(*points, 2.0, stopThr=1e-12, numIterMax=100_000))
    linear = []
    for p, q in ((X[0], Y), (X[0], X[0]), (Y, Y)):
        cost = ot.dist(p.numpy(), q.numpy())
        n, m = cost.shape
        plan = ot.sinkhorn(np.full(n, 1 / n), np.full(m, 1 / m), cost, 2.0, "sinkhorn_log", 100_000, 1e-13)
        linear.append((plan * cost).sum())
    assert abs(other - (linear[0] - linear[1] / 2 - linear[2] / 2)) < 1e-6
    assert abs(other - float(sinkhorn_divergence(X[0], Y, eps=2.0))) > 1e-3


def test_translation_costs_its_square_and_dirac_masses_their_cost():
    shift = torch.tensor([0.3, -0.4, 1.2], dtype=D)
    for eps in (1e-2, 1.0, 100.0):  # exact at every eps: the cross terms are separable
        torch.testing.assert_close(sinkhorn_divergence(X, X + shift, eps=eps), shift.square().sum().expand(2))
    p, q = X[0, :1], Y[:1]
    torch.testing.assert_close(sinkhorn_divergence(p, q, eps=0.3, cost=Euclidean()), (p - q).norm())
    torch.testing.assert_close(sinkhorn_divergence(p, q, eps=0.3, cost=Cosine()), Cosine()(p, q)[0, 0])


@pytest.mark.parametrize("rho", [None, 0.5])
def test_zero_with_zero_gradient_at_equal_measures_and_positive_elsewhere(rho):
    a = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=D)
    order = torch.tensor([2, 0, 3, 1])
    x = X.clone().requires_grad_()
    same = sinkhorn_divergence(x, X[:, order], a, a[order], eps=0.2, rho=rho)
    assert float(same.detach().abs().max()) < 1e-12
    assert float(torch.autograd.grad(same.sum(), x)[0].abs().max()) < 1e-9
    near = X + 1e-3 * normal(2, 4, 3, seed=3)
    assert bool((sinkhorn_divergence(X, near, a, a, eps=0.2, rho=rho) > 1e-9).all())
    if rho is not None:
        assert bool((sinkhorn_divergence(X, X, a, 1.5 * a, eps=0.2, rho=rho) > 1e-3).all())
        half = sinkhorn_divergence(X, X, a, torch.cat([a[:2], a[2:] * 0]), eps=0.2, rho=rho)
        assert bool((half > 1e-3).all() and torch.isfinite(half).all())


@pytest.mark.parametrize("cost", PAIRS, ids=repr)
@pytest.mark.parametrize("rho", [None, 0.5])
def test_derivatives_of_both_orders(cost, rho):
    a, b = torch.tensor([0.3, 0.7], dtype=D), torch.tensor([0.2, 0.5, 0.3], dtype=D)
    strengths = [torch.tensor(v, dtype=D, requires_grad=True) for v in (0.4, rho) if v is not None]
    x = [t.clone().requires_grad_() for t in (X[:, :2, :2] / 2, Y[:3, :2] / 2, a, b)]

    def number(x: Tensor, y: Tensor, a: Tensor, b: Tensor, eps: Tensor, *rho: Tensor) -> Tensor:
        if not rho:
            a, b = a / a.sum(), b / b.sum()
        return sinkhorn_divergence(x, y, a, b, eps=eps, rho=rho[0] if rho else None, cost=cost, solver=TIGHT)

    assert gradcheck(number, (*x, *strengths), check_forward_ad=True)
    assert gradgradcheck(number, (*x, *strengths))


def test_bad_points_are_refused_or_bad_alone():
    spoilt = X.clone()
    spoilt[1, 0, 0] = NAN
    with pytest.raises(ValueError, match="finite"):
        sinkhorn_divergence(spoilt, Y, eps=0.2)
    y = Y.clone().requires_grad_()
    got = sinkhorn_divergence(spoilt, y, eps=0.2, on_failure="nan")
    assert bool(torch.isnan(got[1]))
    (slope,) = torch.autograd.grad(got[0], y)
    z = Y.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sinkhorn_divergence(X[:1], z, eps=0.2).sum(), z)
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="y: expected shape"):
        sinkhorn_divergence(X, Y[:, :2], eps=0.2)
    with pytest.raises(ValueError, match="cost: expected SquaredEuclidean"):
        sinkhorn_divergence(X, Y, eps=0.2, cost=2)
    with pytest.raises(ValueError, match="a, b: expected equal totals"):
        sinkhorn_divergence(X, Y, torch.ones(4, dtype=D), eps=0.2)
