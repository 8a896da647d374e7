"""Conservation: the posterior of a Gaussian under linear equations.

Oracles, none of which forms the inner matrix ``noise I + G S G^T`` as the layer does: the posterior in 50 digits
by information form (mpmath, ``(S^-1 + G^T G / noise)^-1``) or, for exact rows, by a basis of their null space; the
cotangents of the paper's formulas as they stand in the derivation; scipy's density; quadrature of known integrals.
"""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from difflayers import SolveError, Status
from difflayers.pde import Conservation, conservation_operator, conserve, conserve_ex, conserved_log_likelihood

N, M = 6, 2


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64, device="cpu")


def problem(full: bool, seed: int = 0, n: int = N, m: int = M) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    A = normal(seed, n, n)
    S = A @ A.mT + 0.2 * torch.eye(n, dtype=A.dtype)
    covariance = S if full else S.diagonal().clone()
    return normal(seed + 1, n), covariance, normal(seed + 2, m), normal(seed + 3, m, n)


def dense(covariance: Tensor) -> Tensor:
    return covariance if covariance.ndim == 2 else torch.diag(covariance)


def exactly(mean: Tensor, covariance: Tensor, b: Tensor, G: Tensor, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """The posterior in 50 digits."""
    with mpmath.workdps(50):
        mu, S, rhs, rows = (mpmath.matrix(t.tolist()) for t in (mean, dense(covariance), b, G))
        prior = S**-1
        if noise:
            left = (prior + rows.T * rows / mpmath.mpf(noise)) ** -1
            found = left * (prior * mu + rows.T * rhs / mpmath.mpf(noise))
        else:
            n, m = rows.cols, rows.rows
            Q, _ = mpmath.qr(rows.T)
            Z = Q[:, m:n]
            start = rows.T * ((rows * rows.T) ** -1 * rhs)
            left = Z * (Z.T * prior * Z) ** -1 * Z.T
            found = start + left * (prior * (mu - start))
        return np.array(found.tolist(), dtype=float)[:, 0], np.array(left.tolist(), dtype=float)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 2.0])
def test_the_posterior_in_closed_form(full, noise, device):
    args = problem(full)
    mean, covariance = (t.cpu() for t in conserve(*(t.to(device) for t in args), noise))
    right, left = exactly(*args, noise)
    left = left if full else left.diagonal()
    assert np.abs(mean.numpy() - right).max() <= 1e-12 * np.abs(right).max()
    assert np.abs(covariance.numpy() - left).max() <= 1e-12 * np.abs(dense(args[1]).numpy()).max()


def test_identities_of_exact_rows(device):
    mean, S, b, G = (t.to(device) for t in problem(full=True))
    found, left = conserve(mean, S, b, G)
    size = float(S.abs().max())
    assert float((G @ found - b).abs().max()) < 1e-13
    assert float((G @ left).abs().max()) < 1e-12 * size
    assert torch.equal(left, left.mT)
    values = torch.linalg.eigvalsh(left)
    assert float(values.min()) > -1e-13 * size and int((values > 1e-10 * size).sum()) == N - M
    # what already holds is left alone (the prior must not be singular along the rows for that, so the mean alone)
    again, _ = conserve(found, S, b, G)
    assert float((again - found).abs().max()) < 1e-13 * size
    # and a prior that knows the integrals hardly moves under noisy ones
    soft, softer = conserve(found, left, b, G, 1.0)
    assert float((soft - found).abs().max()) < 1e-12 * size
    assert float((softer - left).abs().max()) < 1e-12 * size


def test_the_exact_update_is_the_limit_of_small_noise():
    args = problem(full=True)
    exact, left = conserve(*args)
    errors = []
    for noise in (1e-2, 1e-4, 1e-6):
        mean, covariance = conserve(*args, noise)
        errors.append(max(float((mean - exact).abs().max()), float((covariance - left).abs().max())))
    assert errors[0] < 1 and errors[2] == pytest.approx(errors[1] / 100, rel=0.01)


def test_a_diagonal_is_the_diagonal_of_the_matrix():
    mean, variance, b, G = problem(full=False)
    for noise in (0.0, 0.5):
        found, left = conserve(mean, variance, b, G, noise)
        wide, matrix = conserve(mean, torch.diag(variance), b, G, noise)
        assert torch.allclose(found, wide, atol=1e-13)
        assert torch.allclose(left, matrix.diagonal(), atol=1e-13)


def test_the_correction_goes_where_the_variance_is():
    variance = torch.tensor([0.0, 1e-3, 1.0, 0.0], dtype=torch.float64)
    mean, left = conserve(torch.zeros(4).double(), variance, torch.ones(1).double(), torch.ones(1, 4).double())
    assert mean[0] == mean[3] == 0 == left[0] == left[3]
    assert mean.tolist()[2] == pytest.approx(1 / 1.001)


def test_an_entry_that_the_rows_fix_has_no_variance_and_no_nan_in_its_root():
    args = (normal(0, 200, 3), normal(1, 200, 3).square(), normal(2, 200, 3), normal(3, 200, 3, 3))
    mean, variance = conserve(*args)
    assert float(variance.min()) >= 0
    assert torch.allclose(mean, torch.linalg.solve(args[3], args[2]), rtol=1e-6, atol=1e-8)


# --------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_cotangents_of_the_mean(noise):
    mean, S, b, G = (t.requires_grad_() for t in problem(full=True))
    sigma = torch.tensor(noise, dtype=torch.float64, requires_grad=True)
    found, _ = conserve(mean, S, b, G, sigma)
    g = normal(9, N)
    got = torch.autograd.grad(found, (mean, S, b, G, sigma), g)
    with torch.no_grad():
        P = noise * torch.eye(M).double() + G @ S @ G.mT
        ell, q = torch.linalg.inv(P) @ (G @ mean - b), torch.linalg.inv(P) @ G @ S @ g
        to_mean = g - G.mT @ q
        to_S = -torch.outer(to_mean, G.mT @ ell)
        to_G = -torch.outer(ell, S @ to_mean) - torch.outer(q, found)
        expected = (to_mean, (to_S + to_S.mT) / 2, q, to_G, q @ ell)
    for a, e in zip(got, expected, strict=True):
        assert float((a - e).abs().max()) < 1e-11 * max(1, float(e.abs().max()))


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_cotangents_of_the_covariance(noise):
    mean, S, b, G = (t.requires_grad_() for t in problem(full=True))
    sigma = torch.tensor(noise, dtype=torch.float64, requires_grad=True)
    _, left = conserve(mean, S, b, G, sigma)
    V = normal(9, N, N)
    V = V + V.mT
    got = torch.autograd.grad(left, (S, G, sigma), V)
    with torch.no_grad():
        K = torch.linalg.inv(noise * torch.eye(M).double() + G @ S @ G.mT) @ G @ S
        T = torch.eye(N).double() - K.mT @ G
        expected = (T.mT @ V @ T, -2 * K @ V @ left, (V * (K.mT @ K)).sum())
    for a, e in zip(got, expected, strict=True):
        assert float((a - e).abs().max()) < 1e-11 * max(1, float(e.abs().max()))


def test_the_variance_has_the_cotangents_of_the_matrix():
    mean, variance, b, G = (t.requires_grad_() for t in problem(full=False))
    g, h = normal(8, N), normal(9, N)
    two = conserve(mean, variance, b, G, 0.1)
    wide = conserve(mean, torch.diag(variance), b, G, 0.1)
    got = torch.autograd.grad(two, (mean, variance, b, G), (g, h))
    expected = torch.autograd.grad(wide, (mean, variance, b, G), (g, torch.diag(h)))
    for a, e in zip(got, expected, strict=True):
        assert torch.allclose(a, e, rtol=1e-11, atol=1e-11)


def test_hessian_of_a_loss_over_time_slices():
    """Two functions of the same parameters: by hand in plain torch, and through the layer."""
    grid = torch.tensor([0.0, 0.1, 0.4, 0.5, 0.9, 1.0], dtype=torch.float64)
    G, target = conservation_operator(grid), normal(5, 3, N)

    def loss(flat: Tensor, plain: bool) -> Tensor:
        mean, variance = flat[: 3 * N].view(3, N), flat[3 * N :].view(3, N).exp()
        b = target @ G[0]
        if plain:
            weighted = variance * G[0]
            gain = weighted / (weighted @ G[0]).unsqueeze(-1)
            found, left = mean - gain * (mean @ G[0] - b).unsqueeze(-1), variance - gain * weighted
        else:
            found, left = conserve(mean, variance, b.unsqueeze(-1), G)
        return ((found - target).square() / (left + 0.1) + (left + 0.1).log()).sum()

    flat = normal(6, 6 * N)
    got, expected = (torch.func.hessian(lambda f, p=p: loss(f, p))(flat) for p in (False, True))
    assert float((got - expected).abs().max()) < 1e-9 * float(expected.abs().max())


def test_hessian_with_a_full_covariance():
    mean, S, b, G = problem(full=True, n=4)
    root = torch.linalg.cholesky(S)

    def loss(flat: Tensor, plain: bool) -> Tensor:
        mu, L = flat[:4], flat[4:].view(4, 4)
        covariance = L @ L.mT
        if plain:
            P = torch.linalg.inv(0.2 * torch.eye(M, dtype=mu.dtype) + G @ covariance @ G.mT)
            found, left = mu - covariance @ G.mT @ P @ (G @ mu - b), covariance - covariance @ G.mT @ P @ G @ covariance
        else:
            found, left = conserve(mu, covariance, b, G, 0.2)
        return found.square().square().sum() + (left.square() * torch.arange(16.0).view(4, 4)).sum()

    flat = torch.cat([mean, root.flatten()])
    expected = torch.func.hessian(lambda f: loss(f, True))(flat)
    for transform in (torch.func.jacfwd(torch.func.jacrev(loss)), torch.func.jacrev(torch.func.jacrev(loss))):
        assert float((transform(flat, False) - expected).abs().max()) < 1e-10 * float(expected.abs().max())


# ------------------------------------------------------------------------------------------------------------ operator


def test_mass_is_conserved_on_grids_of_any_spacing():
    generator = torch.Generator().manual_seed(0)
    grid = torch.rand(40, 201, generator=generator, dtype=torch.float64).cumsum(-1)
    mean, variance = normal(0, 40, 201), 10.0 ** (4 * normal(1, 40, 201))
    b = 50 + normal(2, 40, 1)
    found, _ = conserve(mean, variance, b, conservation_operator(grid))
    assert float((torch.trapezoid(found, grid) - b[:, 0]).abs().max()) < 1e-10


# ---------------------------------------------------------------------------------------------------------- likelihood


def test_the_likelihood_is_that_of_the_posterior():
    mean, S, b, G = problem(full=True)
    found, left = conserve(mean, S, b, G, 0.3)
    u = normal(7, N)
    expected = multivariate_normal(found.numpy(), left.numpy()).logpdf(u.numpy())
    assert float(conserved_log_likelihood(u, mean, S, b, G, 0.3)) == pytest.approx(expected, rel=1e-10)
    variance = S.diagonal()
    matrix = conserved_log_likelihood(u, mean, torch.diag(variance), b, G, 0.3)
    assert float(conserved_log_likelihood(u, mean, variance, b, G, 0.3)) == pytest.approx(float(matrix), rel=1e-12)


def test_the_exact_likelihood_is_a_density_on_the_fields_that_conserve():
    """Its integral over the plane u_1 + 2 u_2 + 2 u_3 = b, in units of area over |G| = 3, is one."""
    mean, S, _, _ = problem(full=True, n=3, m=1)
    G, b = torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    basis = torch.linalg.svd(G, full_matrices=True)[2][1:]
    middle, left = conserve(mean, S, b, G)
    axes = torch.linalg.cholesky(basis @ left @ basis.mT)
    t = torch.linspace(-9, 9, 181, dtype=torch.float64)
    points = torch.cartesian_prod(t, t) @ axes.mT @ basis + middle
    density = conserved_log_likelihood(points, mean, S, b, G).exp()
    area = float(density.sum()) * 0.1**2 * float(axes.diagonal().prod())
    assert area / 3 == pytest.approx(1.0, abs=1e-9)


# ------------------------------------------------------------------------------------------------------------- refusal


def test_dependent_rows_are_named_and_spoil_nothing_else():
    mean, variance, _, G = problem(full=False)
    rows = torch.stack([G, torch.stack([G[0], 3 * G[0]]), G])
    means, variances, b = mean.expand(3, N), variance.expand(3, N), normal(2, 3, M)
    with pytest.raises(SolveError, match=r"conserve .*1 of 3 .*elements 1\).*SINGULAR"):
        conserve(means, variances, b, rows)
    found, left = conserve(means, variances, b, rows, on_failure="nan")
    assert torch.isnan(found[1]).all() and torch.isnan(left[1]).all()
    assert torch.equal(found[::2], conserve(means[::2], variances[::2], b[::2], rows[::2])[0])
    status = conserve_ex(means, variances, b, rows).status
    assert status.tolist() == [Status.CONVERGED, Status.SINGULAR, Status.CONVERGED]
    soft, _ = conserve(means, variances, b, rows, 1e-3)
    assert bool(torch.isfinite(soft).all())


def test_rows_that_depend_on_each_other_up_to_rounding():
    two = normal(0, 40, 2, N)
    rows = torch.cat([two, (normal(1, 40, 1, 2) @ two)], -2)
    found = conserve_ex(normal(2, 40, N), normal(3, 40, N).exp(), normal(4, 40, 3), rows)
    assert bool((found.status == Status.SINGULAR).all())
    # rows that merely look alike are not refused
    close = torch.cat([two, two[:, :1] + 1e-5 * normal(5, 40, 1, N)], -2)
    assert bool(conserve_ex(normal(2, 40, N), normal(3, 40, N).exp(), normal(4, 40, 3), close).converged.all())


def test_a_matrix_that_is_no_covariance():
    """Its update has a negative variance, which must not pass for one that rounding made."""
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    both = torch.stack([indefinite, torch.eye(2, dtype=torch.float64)])
    mean, b, G = torch.zeros(2, 2).double(), torch.ones(2, 1).double(), torch.ones(1, 2).double()
    with pytest.raises(SolveError, match=r"conserve .*elements 0\).*SINGULAR"):
        conserve(mean, both, b, G)
    found, left = conserve(mean, both, b, G, on_failure="nan")
    assert torch.isnan(found[0]).all() and torch.isnan(left[0]).all()
    assert found[1].tolist() == [0.5, 0.5] and left[1].tolist() == [[0.5, -0.5], [-0.5, 0.5]]
    variances = torch.tensor([[1.0, -0.1], [1.0, 0.1]], dtype=torch.float64)
    assert conserve_ex(mean, variances, b, G).status.tolist() == [Status.SINGULAR, Status.CONVERGED]
    assert conserve_ex(mean, variances.abs(), b, G, torch.tensor([0.1, -0.1]).double()).status.tolist() == [
        Status.CONVERGED,
        Status.SINGULAR,
    ]


def test_integrals_that_are_known_already():
    """Nothing but rounding is left of ``G covariance G^T``: no answer is better than one divided by it."""
    mean, S, b, G = problem(full=True)
    found, left = conserve(mean, S, b, G)
    for rows, sums in ((G, b + 1), (G[:1], b[:1] + 1), (normal(8, 1, M) @ G, b[:1])):
        assert conserve_ex(found, left, sums, rows).status == Status.SINGULAR
        assert conserve_ex(found, left, sums, rows, 1e-3).converged
    # one integral after the other is as good as all at once
    one = conserve(*conserve(mean, S, b[:1], G[:1]), b[1:], G[1:])
    for a, e in zip(one, (found, left), strict=True):
        assert float((a - e).abs().max()) < 1e-12 * float(S.abs().max())


@pytest.mark.parametrize("full", [False, True])
def test_a_covariance_without_an_inverse_has_no_density(full):
    mean, covariance, b, G = problem(full)
    covariance = torch.stack([covariance, covariance])
    if full:
        covariance[1, :2, :2] = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    else:
        covariance[1, 3] = 0
    means, u = mean.expand(2, N), normal(7, 2, N)
    with pytest.raises(SolveError, match=r"conserved_log_likelihood .*1 of 2 .*elements 1\).*SINGULAR"):
        conserved_log_likelihood(u, means, covariance, b.expand(2, M), G, 0.1)
    with pytest.raises(SolveError, match=r"conserved_log_likelihood .*2 of 2 .*SINGULAR"):
        conserved_log_likelihood(u, means, covariance[:1], b.expand(2, M), torch.stack([G[0], 3 * G[0]]))
    with pytest.raises(ValueError, match="u: expected finite numbers"):
        conserved_log_likelihood(u * math.nan, means, covariance[:1], b.expand(2, M), G, 0.1)


@pytest.mark.parametrize("full", [False, True])
def test_no_rows_and_no_entries(full):
    mean, covariance, b, G = problem(full)
    args = [t.expand(2, *t.shape).clone().requires_grad_() for t in (mean, covariance, b[:0], G[:0])]
    found = conserve(*args)
    assert torch.equal(found[0], args[0]) and torch.allclose(found[1], args[1], atol=0, rtol=1e-15)
    grads = torch.autograd.grad(found[0].sum() + found[1].sum(), args)
    assert bool((grads[0] == 1).all()) and bool((grads[1] == 1).all())
    u = normal(7, N)
    expected = multivariate_normal(mean.numpy(), dense(covariance).numpy()).logpdf(u.numpy())
    assert conserved_log_likelihood(u.expand(2, N), *args)[0].item() == pytest.approx(expected, rel=1e-12)
    nothing = conserve(mean[:0], covariance[:0, :0] if full else covariance[:0], b[:0], G[:0, :0])
    assert [t.numel() for t in nothing] == [0, 0]


def test_the_likelihood_is_that_of_the_prediction_less_that_of_its_integrals():
    """What the training of a network through the layer does not see is the mass of its prediction."""
    mean, S, _, G = problem(full=True)
    u = normal(7, N)
    whole = multivariate_normal(mean.numpy(), S.numpy()).logpdf(u.numpy())
    integrals = multivariate_normal((G @ mean).numpy(), (G @ S @ G.mT).numpy()).logpdf((G @ u).numpy())
    assert float(conserved_log_likelihood(u, mean, S, G @ u, G)) == pytest.approx(whole - integrals, rel=1e-10)
    moved = mean + S @ G.mT @ normal(8, M)  # along the correction
    assert float(conserved_log_likelihood(u, moved, S, G @ u, G)) == pytest.approx(whole - integrals, rel=1e-10)


def test_shapes_that_do_not_fit():
    mean, variance, b, G = problem(full=False)
    with pytest.raises(ValueError, match=r"covariance: expected shape \(2, 6\) \(a diagonal\) or \(2, 6, 6\)"):
        conserve(mean.expand(2, N), normal(0, 2, 2, N, N), b, G)
    with pytest.raises(ValueError, match=r"G: expected shape \(2, 6\).*got \(1, 6\)"):
        conserve(mean, variance, b, G[:1])
    with pytest.raises(ValueError, match="noise: expected a tensor or a number of at least 0, got -1"):
        conserve(mean, variance, b, G, -1.0)
    with pytest.raises(ValueError, match="noise: expected a number of at least 0, got nan"):
        Conservation(G, math.nan)
    with pytest.raises(ValueError, match="noise: expected the number 0, or a tensor above 0"):
        conserved_log_likelihood(mean, mean, variance, b, G, torch.zeros((), dtype=torch.float64))
    assert conserve(mean.expand(4, N), variance, b, G)[1].shape == (4, N)


def test_module():
    G = conservation_operator(torch.linspace(0, 1, 5, dtype=torch.float64))
    layer = Conservation(G, 0.5)
    mean, variance, b = normal(0, 3, 5), normal(1, 3, 5).square(), normal(2, 3, 1)
    for a, e in zip(layer(mean, variance, b), conserve(mean, variance, b, G, 0.5), strict=True):
        assert torch.equal(a, e)
    assert repr(layer) == "Conservation(1, 5, noise=0.5)"
    assert list(layer.state_dict()) == ["G"] and not list(layer.parameters())
