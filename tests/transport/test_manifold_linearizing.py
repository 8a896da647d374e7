"""Rate reduction, and its loss with a doubly stochastic membership.

Oracles, written down before the code: the formula in numpy, group by group, by eigenvalues; its closed form for
orthogonal clusters; differences.
"""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from difflayers.transport import Cosine, Euclidean, ManifoldLinearizing, doubly_stochastic, rate_reduction

D = torch.float64


def data(n: int, d: int, m: int, seed: int = 0, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    Z = F.normalize(torch.randn(*batch, n, d, generator=g, dtype=D), dim=-1)
    return Z, torch.rand(*batch, m, n, generator=g, dtype=D)


def formula(Z: np.ndarray, shares: np.ndarray, distortion: float) -> float:
    """By the squared singular values of the weighted features."""
    n, d = Z.shape

    def rate(weights: np.ndarray) -> float:
        s = np.linalg.svd(np.sqrt(weights)[:, None] * Z, compute_uv=False)
        return float(np.log1p(d / distortion**2 * s**2).sum() / 2)

    return rate(np.full(n, 1 / n)) - sum(w.sum() / n * rate(w / w.sum()) for w in shares)


@pytest.mark.parametrize(("n", "d", "m"), [(12, 4, 12), (4, 12, 4), (6, 6, 2), (1, 3, 1), (5, 1, 3)])
@pytest.mark.parametrize("distortion", [0.1, 0.5, 3.0])
def test_formula(n, d, m, distortion):
    Z, shares = data(n, d, m, batch=(2,))
    found = rate_reduction(Z, shares, distortion=distortion)
    expected = [formula(z.numpy(), p.numpy(), distortion) for z, p in zip(Z, shares, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=D), rtol=1e-10, atol=1e-12)


def test_orthogonal_clusters():
    # k clusters of n / k equal features on different axes: each group has one direction with all of its features
    k, n, d = 3, 12, 5
    Z = torch.eye(d, dtype=D)[:k].repeat_interleave(n // k, 0)
    shares = torch.eye(k, dtype=D).repeat_interleave(n // k, 1)
    alpha = d / 0.25
    expected = k / 2 * math.log(1 + alpha / k) - math.log(1 + alpha) / 2
    assert abs(float(rate_reduction(Z, shares)) - expected) < 1e-12
    around = torch.block_diag(*[torch.full((n // k, n // k), k / n, dtype=D)] * k)
    assert abs(float(rate_reduction(Z, around)) - expected) < 1e-12


@pytest.mark.parametrize(("n", "d"), [(6, 3), (3, 6)])
def test_derivatives(n, d):
    inputs = tuple(t.requires_grad_() for t in data(n, d, 4, 1))
    assert torch.autograd.gradcheck(rate_reduction, inputs)
    assert torch.autograd.gradgradcheck(rate_reduction, inputs)


@pytest.mark.parametrize(("n", "d"), [(6, 3), (3, 6)])
def test_derivatives_at_shares_of_zero(n, d):
    Z, shares = data(n, d, 3, 2)
    shares[0, 1] = 0
    shares[2] = 0
    Z.requires_grad_()
    shares.requires_grad_()
    slopes = torch.autograd.grad(rate_reduction(Z, shares), (Z, shares))
    assert all(bool(torch.isfinite(s).all()) for s in slopes)
    assert bool((slopes[1][2] == 0).all())
    h, moved = 1e-6, shares.detach().clone()
    moved[0, 1] = h
    difference = (rate_reduction(Z.detach(), moved) - rate_reduction(Z.detach(), shares.detach())) / h
    assert abs(float(difference) - float(slopes[1][0, 1])) < 1e-4


@pytest.mark.parametrize(("n", "d"), [(6, 3), (3, 6)])
def test_negative_shares_without_a_rate_are_nan_alone(n, d):
    Z, shares = data(n, d, 2, 3, (3,))
    expected = rate_reduction(Z, shares)
    shares[1, 0, 0] = -shares[1, 0, 1:].sum() * 0.99  # a size above zero, and a direction of negative weight
    found = rate_reduction(Z, shares)
    assert torch.isnan(found).tolist() == [False, True, False]
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])


def test_loss_is_its_parts():
    Z, C = data(9, 4, 4, 4)[0], data(9, 5, 5, 5)[0]
    loss = ManifoldLinearizing(gamma=0.2, distortion=0.4)
    P = doubly_stochastic(C @ C.T, 0.2)
    torch.testing.assert_close(loss.membership(3 * C), P, rtol=0, atol=1e-9)
    expected = -formula(Z.numpy(), P.numpy(), 0.4)
    assert abs(float(loss(2 * Z, 3 * C)) - expected) < 1e-9
    inputs = Z.requires_grad_(), C.requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_training_finds_the_subspaces():
    g = torch.Generator().manual_seed(6)
    bases = torch.linalg.qr(torch.randn(3, 10, 2, generator=g, dtype=D))[0]
    x = torch.cat([torch.randn(12, 2, generator=g, dtype=D) @ B.T for B in bases])
    x = F.normalize(x + 0.05 * torch.randn(36, 10, generator=g, dtype=D), dim=-1)
    same = torch.block_diag(*[torch.ones(12, 12)] * 3).bool()
    heads = [(torch.randn(10, 10, generator=g, dtype=D) / 10 + torch.eye(10)).requires_grad_() for _ in range(2)]
    loss = ManifoldLinearizing(gamma=0.2)
    optimizer = torch.optim.Adam(heads, 0.02)

    def inside() -> float:
        P = loss.membership((x @ heads[1]).detach())
        return float(P[same].sum() / P.sum())

    before, values = inside(), []
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(x @ heads[0], x @ heads[1])
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < values[0] - 0.1
    assert inside() > before


def test_module():
    loss = ManifoldLinearizing(gamma=0.2, distortion=0.4)
    assert repr(copy.deepcopy(loss)) == "ManifoldLinearizing(gamma=0.2, distortion=0.4)"
    assert loss(torch.rand(2, 5, 3), torch.rand(2, 5, 4)).shape == (2,)
    for call, message in (
        (lambda: ManifoldLinearizing(gamma=0.0), "gamma: expected a finite number above 0"),
        (lambda: ManifoldLinearizing(gamma=1.0, distortion=0.0), "distortion: expected a finite number above 0"),
        (lambda: loss(torch.rand(5, 3), torch.rand(5, 3, dtype=D)), "clustering: expected dtype"),
        (lambda: rate_reduction(torch.rand(0, 3), torch.rand(1, 0)), "features: expected at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_units_do_not_matter():
    Z, shares = data(5, 3, 4, 7)
    expected = rate_reduction(Z, shares)
    for unit in (1e-20, 1e-9, 1e9):
        found = rate_reduction((Z * unit).float(), shares.float(), distortion=0.5 * unit)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_nan_is_not_taken_for_a_point_at_the_origin():
    Z, _ = data(5, 3, 4, 8, (2,))
    holes = Z.clone()
    holes[1, 2, 0] = math.nan
    layer = ManifoldLinearizing(gamma=0.2, on_failure="nan")
    for features, clustering in ((holes, Z), (Z, holes)):
        loss = layer(features, clustering)
        assert torch.isnan(loss).tolist() == [False, True]
        torch.testing.assert_close(loss[0], layer(Z, Z)[0], rtol=0, atol=0)
    for cost in (Cosine(), Euclidean()):
        assert bool(torch.isnan(cost(holes[1], Z[1])[2]).all())
    with pytest.raises(ValueError, match="solver: expected SymmetricNewton"):
        ManifoldLinearizing(gamma=0.2, solver=3)
