"""Nuclear norm of a Jacobian: singular value thresholding as the oracle of training, estimators against exact norms."""

import pytest
import torch
from torch import nn
from torch.func import hessian

from difflayers.proximal import (
    Denoising,
    ExactJacobian,
    Hutchinson,
    jacobian_nuclear_norm,
    jacobian_nuclear_penalty,
)

F64 = torch.float64


def close(got, want, tol=1e-9):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh()).double()


def test_equals_singular_values_of_the_jacobian():
    f, x = network(), torch.randn(5, 4, dtype=F64)
    wanted = torch.stack([torch.linalg.svdvals(torch.autograd.functional.jacobian(f, one)).sum() for one in x])
    close(jacobian_nuclear_norm(f, x), wanted)
    decoder = nn.Sequential(nn.Linear(2, 7), nn.Tanh()).double()  # more outputs than inputs
    z = torch.randn(2, 3, 2, dtype=F64)
    wanted = [[torch.linalg.svdvals(torch.autograd.functional.jacobian(decoder, b)).sum() for b in a] for a in z]
    close(jacobian_nuclear_norm(decoder, z), torch.tensor(wanted, dtype=F64))


def test_gradient_reaches_the_parameters():
    f, x = network(), torch.randn(3, 4, dtype=F64)
    found = torch.autograd.grad(jacobian_nuclear_norm(f, x).sum(), list(f.parameters()), allow_unused=True)
    J = torch.stack([torch.autograd.functional.jacobian(f, one, create_graph=True) for one in x])
    wanted = torch.autograd.grad(torch.linalg.svdvals(J).sum(), list(f.parameters()), allow_unused=True)
    for got, want in zip(found, wanted, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            close(got, want)


def test_images_are_flattened():
    conv = nn.Conv2d(2, 3, 3, padding=1).double()
    x = torch.randn(4, 2, 5, 5, dtype=F64)
    value = jacobian_nuclear_norm(conv, x, event_ndim=3)
    J = torch.autograd.functional.jacobian(conv, x[0]).reshape(75, 50)
    close(value, torch.linalg.svdvals(J).sum().expand(4))


def test_repeated_singular_values_have_their_derivatives():
    """At 2 Q, Q orthogonal, autograd through the SVD gives NaN; the polar factor and its derivative do not."""
    Q = torch.linalg.qr(torch.randn(3, 3, dtype=F64))[0]
    norm = lambda A: jacobian_nuclear_norm(lambda x: x @ A.mT, torch.zeros(3, dtype=F64))  # noqa: E731
    A = (2 * Q).requires_grad_()
    close(torch.autograd.grad(norm(A), A)[0], Q)
    U, _, Vh = torch.linalg.svd(A)
    g = torch.autograd.grad(((U * torch.randn(3, dtype=F64)) @ Vh).sum(), A)[0]
    assert not torch.isfinite(g).all()
    H = torch.randn(3, 3, dtype=F64)
    K = Q.mT @ H
    wanted = Q @ (K - K.mT) / 4  # the polar factor turns with the antisymmetric part alone
    close(torch.einsum("ijkl,kl->ij", hessian(norm)(2 * Q), H), wanted)


def test_zero_singular_values_give_the_least_subgradient():
    U, V = torch.randn(4, 2, dtype=F64), torch.randn(2, 3, dtype=F64)
    A = (U @ V).requires_grad_()
    found = torch.autograd.grad(jacobian_nuclear_norm(lambda x: x @ A.mT, torch.zeros(3, dtype=F64)), A)[0]
    P, _, Qh = torch.linalg.svd(A.detach(), full_matrices=False)
    close(found, P[:, :2] @ Qh[:2])


@pytest.mark.parametrize("estimator", [ExactJacobian(), Hutchinson(20_000), Denoising(1e-3, 20_000)])
def test_estimators_agree_with_the_frobenius_norms(estimator):
    inner, outer = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    wanted = (inner.weight.square().sum() + outer.weight.square().sum()) / 2
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found = jacobian_nuclear_penalty(
            outer, inner, torch.zeros(2, 3, dtype=F64), estimator=estimator, generator=generator
        )
    close(found, wanted.detach().expand(2), 1e-12 if isinstance(estimator, ExactJacobian) else 0.05)
    J = outer.weight @ inner.weight
    assert (found > torch.linalg.svdvals(J).sum() - 0.1).all()


def test_penalty_is_differentiable_in_all_estimators():
    inner, outer = network(), nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double()
    x = torch.randn(2, 4, dtype=F64)
    weights = [inner[0].weight, outer[0].weight]
    exact = torch.autograd.grad(jacobian_nuclear_penalty(outer, inner, x, estimator=ExactJacobian()).sum(), weights)
    for estimator in (Hutchinson(3000), Denoising(1e-3, 3000)):
        generator = torch.Generator().manual_seed(0)
        value = jacobian_nuclear_penalty(outer, inner, x, estimator=estimator, generator=generator).sum()
        for got, want in zip(torch.autograd.grad(value, weights), exact, strict=True):
            assert (got - want).norm() < 0.1 * want.norm()


def test_training_with_the_denoising_penalty_thresholds_singular_values():
    """For linear maps min 1/2 ||G H - M||^2 + eta ||G H||_* is known: M with its singular values soft-thresholded."""
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(4, 4, generator=generator, dtype=F64)
    U, s, Vh = torch.linalg.svd(M)
    eta = float(s[1:3].mean())
    inner, outer = nn.Linear(4, 4, bias=False).double(), nn.Linear(4, 4, bias=False).double()
    optimiser = torch.optim.LBFGS([inner.weight, outer.weight], max_iter=100, line_search_fn="strong_wolfe")
    x = torch.zeros(1, 4, dtype=F64)

    def closure():
        optimiser.zero_grad()
        noise = torch.Generator().manual_seed(1)  # the same in every evaluation
        penalty = jacobian_nuclear_penalty(outer, inner, x, estimator=Denoising(0.1, 4000), generator=noise).sum()
        loss = (outer.weight @ inner.weight - M).square().sum() / 2 + eta * penalty
        loss.backward()
        return loss

    optimiser.step(closure)
    wanted = (U * (s - eta).clamp_min(0)) @ Vh
    found = (outer.weight @ inner.weight).detach()
    assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_bad_input():
    with pytest.raises(ValueError, match="x: expected a floating-point tensor"):
        jacobian_nuclear_norm(torch.sin, torch.arange(3))
    with pytest.raises(ValueError, match="event_ndim: expected at least 1"):
        jacobian_nuclear_norm(torch.sin, torch.zeros(3), event_ndim=0)
    with pytest.raises(ValueError, match="finite"):
        jacobian_nuclear_norm(torch.sqrt, torch.zeros(3))


@pytest.mark.parametrize("bad", [lambda: Hutchinson(0), lambda: Denoising(samples=0), lambda: Denoising(sigma=0.0)])
def test_estimators_refuse_what_gives_no_number(bad):
    with pytest.raises(ValueError, match="expected"):
        bad()


def test_one_bad_input_leaves_the_gradient_of_the_network_alone():
    f, x = network(), torch.randn(3, 4, dtype=F64)
    x[1, 2] = torch.nan
    found = jacobian_nuclear_norm(f, x, on_failure="nan")
    assert found.isnan().tolist() == [False, True, False]
    got = torch.autograd.grad(found[[0, 2]].sum(), f[0].weight)[0]
    close(got, torch.autograd.grad(jacobian_nuclear_norm(f, x[[0, 2]]).sum(), f[0].weight)[0])
