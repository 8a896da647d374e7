"""Lasso: scikit-learn on the diabetes data, derivatives against differences of LARS, and what unrolling cannot do."""

import warnings

import numpy as np
import pytest
import torch
from torch.func import hessian, jacfwd, jacrev, vmap

from difflayers import SolveError, SolveWarning
from difflayers.proximal import FISTA, lasso, lasso_ex
from difflayers.testing import saved_bytes

linear_model = pytest.importorskip("sklearn.linear_model")
datasets = pytest.importorskip("sklearn.datasets")

F64 = torch.float64


def close(got, want, tol):
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=tol, atol=tol)


def diabetes(copies=1):
    """Centred data, each row `copies` times with a little noise of its own."""
    X, y = datasets.load_diabetes(return_X_y=True)
    rng = np.random.default_rng(0)
    X, y = np.tile(X, (copies, 1)), np.tile(y - y.mean(), copies)
    if copies > 1:
        X, y = X + 1e-3 * rng.standard_normal(X.shape), y + 5 * rng.standard_normal(y.shape)
    return X, y


def lars(X, y, penalty):
    """The exact path: another algorithm, by another author."""
    rounding = np.finfo(np.float64).eps
    return linear_model.lars_path(X, y, method="lasso", alpha_min=penalty / len(y), eps=rounding)[2][:, -1]


# ------------------------------------------------------------------------------------------------------ scikit-learn


@pytest.mark.parametrize("copies", [1, 23], ids=["442 rows", "10166 rows"])
@pytest.mark.parametrize("alpha", [1.0, 0.1, 0.01])
def test_diabetes_equals_scikit_learn(alpha, copies):
    X, y = diabetes(copies)
    model = linear_model.Lasso(alpha=alpha, fit_intercept=False, tol=1e-13, max_iter=100_000).fit(X, y)
    z = lasso(torch.tensor(X), torch.tensor(y), alpha * len(y))
    assert (z != 0).tolist() == (model.coef_ != 0).tolist()
    assert bool((z != 0).any())
    close(z / np.abs(model.coef_).max(), model.coef_ / np.abs(model.coef_).max(), 1e-6)


@pytest.mark.parametrize("copies", [1, 23], ids=["442 rows", "10166 rows"])
@pytest.mark.parametrize("alpha", [1.0, 0.1, 0.01])
def test_diabetes_derivative_in_the_penalty(alpha, copies):
    X, y = diabetes(copies)
    penalty = alpha * len(y)
    found = jacfwd(lambda p: lasso(torch.tensor(X), torch.tensor(y), p))(torch.tensor(penalty, dtype=F64))
    step = 1e-3 * penalty  # the path is linear in the penalty, so only rounding limits the difference
    wanted = (lars(X, y, penalty + step) - lars(X, y, penalty - step)) / (2 * step)
    close(found / np.abs(wanted).max(), wanted / np.abs(wanted).max(), 1e-6)


def test_derivatives_in_everything_at_10000_rows():
    generator = torch.Generator().manual_seed(0)
    D = torch.randn(10_000, 30, generator=generator, dtype=F64)
    y = D @ (torch.randn(30, generator=generator, dtype=F64) * (torch.arange(30) % 3 == 0)) / 10
    args = (D, y + 0.1 * torch.randn(10_000, generator=generator, dtype=F64), torch.tensor(100.0, dtype=F64))
    leaves = [a.requires_grad_() for a in args]
    g = torch.randn(30, generator=generator, dtype=F64)
    found = torch.autograd.grad(lasso(*leaves), leaves, g)
    for i, move in enumerate(torch.randn(a.shape, generator=generator, dtype=F64) for a in args):
        along = lambda h, i=i, m=move: [a.detach() + h * m if k == i else a.detach() for k, a in enumerate(args)]  # noqa: E731
        up, down = (lars(D.numpy(), y.numpy(), float(p)) for D, y, p in (along(1e-5), along(-1e-5)))
        wanted = float(g @ torch.tensor(up - down)) / 2e-5
        assert float((found[i] * move).sum()) == pytest.approx(wanted, rel=1e-5, abs=1e-9)


# ---------------------------------------------------------------------------------------------------- against unrolling


def unrolled(D, y, penalty, steps):
    """Plain FISTA under autograd."""
    length = torch.linalg.matrix_norm(D.detach(), 2) ** 2
    z = v = y.new_zeros(*y.shape[:-1], D.shape[1])
    t = 1.0
    for _ in range(steps):
        u = v - ((v @ D.mT - y) @ D) / length
        new = u.sign() * (u.abs() - penalty / length).clamp_min(0)
        grown = (1 + (1 + 4 * t * t) ** 0.5) / 2
        z, v, t = new, new + (t - 1) / grown * (new - z), grown
    return z


def batch(count=256, n=64, p=256, dtype=F64, seed=0):
    """Noisy signals of sparse codes in a random dictionary."""
    generator = torch.Generator().manual_seed(seed)
    D = torch.nn.functional.normalize(torch.randn(n, p, generator=generator, dtype=F64), dim=0)
    codes = torch.randn(count, p, generator=generator, dtype=F64)
    codes = codes * (torch.rand(count, p, generator=generator) < 0.05)
    y = codes @ D.mT + 0.05 * torch.randn(count, n, generator=generator, dtype=F64)
    return D.to(dtype), y.to(dtype)


def test_memory_does_not_depend_on_the_steps():
    D, y = batch(32)
    D.requires_grad_()
    few = saved_bytes(lambda: lasso(D, y, 0.1, solver=FISTA(proximal_steps=50)))[1]
    many = saved_bytes(lambda: lasso(D, y, 0.1, solver=FISTA(proximal_steps=1000, check_every=500)))[1]
    assert few == many
    loops = [saved_bytes(lambda k=k: unrolled(D, y, 0.1, k))[1] for k in (50, 200)]
    assert loops[1] > 3 * loops[0] > 3 * few


def test_batch_equals_coordinate_descent():
    D, y = batch(16)
    model = linear_model.Lasso(alpha=0.1 / 64, fit_intercept=False, tol=1e-14, max_iter=100_000)
    wanted = np.stack([model.fit(D.numpy(), one.numpy()).coef_.copy() for one in y])
    close(lasso(D, y, 0.1), wanted, 1e-6)


def test_unrolled_derivatives_where_enough_steps_converge():
    D, y = batch(4, 8, 12)
    D.requires_grad_(), y.requires_grad_()
    penalty = torch.tensor(0.1, dtype=F64, requires_grad=True)
    args = (D, y, penalty)
    g = torch.randn(4, 12, dtype=F64)
    found = torch.autograd.grad(lasso(*args), args, g)
    for got, want in zip(found, torch.autograd.grad(unrolled(*args, 4000), args, g), strict=True):
        close(got, want, 1e-8)


# ------------------------------------------------------------------------------------------------------- hard problems


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_coherent_atoms(penalty, dtype):
    """Neighbouring bumps overlap almost wholly: proximal steps alone would need millions."""
    position, centre = torch.linspace(0, 1, 64, dtype=dtype), torch.linspace(0, 1, 200, dtype=dtype)
    D = torch.exp(-(((position[:, None] - centre) / 0.05) ** 2))
    y = torch.randn(8, 200, dtype=dtype) @ D.mT
    solution = lasso_ex(D, y, penalty)
    assert solution.converged.all()
    r = y - solution.value @ D.mT
    slope, z = r @ D, solution.value
    miss = torch.where(z == 0, (slope.abs() - penalty).clamp_min(0), slope - penalty * z.sign())
    assert miss.abs().max() < 1e4 * torch.finfo(dtype).eps * y.norm(dim=-1).max()


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (3, 40), (40, 3)])
def test_any_shape(shape):
    D, y = torch.randn(6, *shape, dtype=F64), torch.randn(6, shape[0], dtype=F64)
    largest = (D.mT @ y[..., None]).abs().amax((-1, -2))
    z = lasso(D, y, 0.3 * largest)
    for one, d, s, p in zip(z, D, y, 0.3 * largest, strict=True):
        fit = linear_model.Lasso(alpha=float(p) / len(s), fit_intercept=False, tol=1e-14, max_iter=100_000)
        close(one, fit.fit(d.numpy(), s.numpy()).coef_, 1e-6)


def test_no_penalty_is_least_squares():
    D, y = torch.randn(3, 9, 4, dtype=F64), torch.randn(3, 9, dtype=F64)
    D.requires_grad_()
    z, wanted = lasso(D, y, 0.0), torch.linalg.solve(D.mT @ D, D.mT @ y[..., None])[..., 0]
    close(z, wanted, 1e-10)
    g = torch.randn(3, 4, dtype=F64)
    close(torch.autograd.grad(z, D, g)[0], torch.autograd.grad(wanted, D, g)[0], 1e-9)


def test_above_the_largest_penalty_all_is_zero():
    D, y = batch(3, 8, 12)
    leaves = [t.requires_grad_() for t in (D, y, (y @ D).abs().amax(-1).detach())]
    z = lasso(*leaves)
    assert (z == 0).all()
    assert all((t == 0).all() for t in torch.autograd.grad(z.sum(), leaves))


def test_dependent_atoms_have_a_fit_but_no_derivative():
    D, y = batch(3, 8, 5)
    D = torch.cat([D, D[:, :1], D[:, 1:2] + D[:, 2:3]], -1).requires_grad_()
    z = lasso(D, y, 0.01)
    close((z @ D.mT).detach(), (lasso(D.detach(), y, 0.01, ridge=1e-9) @ D.mT).detach(), 1e-6)
    with pytest.raises(SolveError, match="SINGULAR"):
        torch.autograd.grad(z.sum(), D)
    with pytest.raises(SolveError, match="SINGULAR"):
        jacfwd(lambda p: lasso(D.detach(), y, p))(torch.tensor(0.01, dtype=F64))
    tolerant = torch.autograd.grad(lasso(D, y, 0.01, on_failure="nan").sum(), D)[0]
    assert torch.isnan(tolerant).any()
    ridge = torch.autograd.grad(lasso(D, y, 0.01, ridge=1e-3).sum(), D)[0]
    assert torch.isfinite(ridge).all() and ridge.abs().max() < 1e4


def test_nearly_dependent_atoms_keep_their_digits():
    """The Gram matrix of these atoms has lost eleven digits; the refined solve has not."""
    generator = torch.Generator().manual_seed(1)
    D = torch.randn(20, 3, generator=generator, dtype=F64)
    D[:, 1] = D[:, 0] + 3e-6 * D[:, 1]
    y = D[:, 0] + 2 * D[:, 1]
    support = lasso(D, y, 1e-9) != 0
    found = jacrev(lambda y: lasso(D, y, 1e-9))(y)[support]
    wanted = np.linalg.pinv(D[:, support].numpy())
    assert support[:2].all() and np.abs(wanted).max() > 1e4
    assert np.abs(found.numpy() - wanted).max() < 1e-8 * np.abs(wanted).max()


def test_starved_solver_warns_and_failing_elements_stay_alone():
    D, y = batch(3, 8, 12)
    with pytest.warns(SolveWarning, match="lasso"):
        lasso(D, y, 0.1, solver=FISTA(max_steps=1))
    y[1, 0] = torch.nan
    with pytest.raises(ValueError, match="signal: expected finite"):
        lasso(D, y, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z = lasso(D, y, 0.1, on_failure="nan")
    assert torch.isnan(z).any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("option", ["rtol", "max_steps", "proximal_steps", "check_every"])
def test_options_are_checked(option):
    with pytest.raises(ValueError, match=f"{option}: expected"):
        FISTA(**{option: 0})


# -------------------------------------------------------------------------------------------------------- other orders


def test_second_derivatives_against_the_closed_form():
    D, y = batch(2, 4, 6)
    support = (lasso(D, y, 0.1) != 0)[0]
    signs = lasso(D, y, 0.1)[0].sign()[support]

    def closed(D):
        A = D[:, support]
        return torch.linalg.solve(A.mT @ A, A.mT @ y[0] - 0.1 * signs)

    weights = torch.arange(1.0, 1 + int(support.sum()), dtype=F64)
    loss = lambda z: (weights * z**2).sum()  # noqa: E731
    found = hessian(lambda D: loss(lasso(D, y[0], 0.1)[support]))(D)
    close(found, torch.autograd.functional.hessian(lambda D: loss(closed(D)), D), 1e-9)


def test_vmap_over_dictionaries_and_penalties():
    D, y = torch.randn(3, 5, 7, dtype=F64), torch.randn(4, 5, dtype=F64)
    penalty = torch.tensor([0.3, 0.5, 0.7], dtype=F64)
    found = vmap(lasso, in_dims=(0, None, 0))(D, y, penalty)
    close(found, torch.stack([lasso(d, y, p) for d, p in zip(D, penalty, strict=True)]), 1e-12)
    close(lasso(D[:, None], y, penalty[:, None]), found, 1e-12)


def test_single_precision_finds_the_support():
    D, y = (t.float() for t in batch(count=50))
    penalty = 0.1 * (y @ D).abs().amax(-1)
    solution = lasso_ex(D, y, penalty)
    want = lasso(D.double(), y.double(), penalty.double())
    assert solution.converged.all()
    torch.testing.assert_close(solution.value.double(), want, rtol=0, atol=1e-4)


def test_ridge_of_another_element_changes_nothing():
    D, y = (t.float() for t in batch(count=2, n=20, p=8))
    ridge = torch.tensor([0.0, 1e12])
    torch.testing.assert_close(lasso(D, y, 0.5, ridge=ridge)[0], lasso(D, y[0], 0.5), rtol=1e-5, atol=1e-6)


def test_overflow_fails_honestly_and_alone():
    D, y = batch(count=3, n=10, p=20)
    D.requires_grad_()
    y[1] *= 1e200
    assert lasso_ex(D, y, 0.5).failed.tolist() == [False, True, False]
    codes = lasso(D, y, 0.5, on_failure="nan")
    assert torch.isfinite(torch.autograd.grad(codes[[0, 2]].sum(), D)[0]).all()


def test_a_number_beside_half_precision_is_not_rounded():
    D, y = (t.to(torch.bfloat16) for t in batch(4))
    exact = lasso(D.float(), y.float(), 0.1)
    assert torch.equal(lasso(D, y, 0.1), exact.to(torch.bfloat16))
    rounded = lasso(D.float(), y.float(), float(torch.tensor(0.1).to(torch.bfloat16)))
    assert not torch.equal(rounded.to(torch.bfloat16), exact.to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"penalty: expected dtype torch.bfloat16"):
        lasso(D, y, torch.tensor(0.1))
