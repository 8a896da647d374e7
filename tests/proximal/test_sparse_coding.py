"""Dictionary learning: objectives and gradients, learned dictionaries against known ones, encoders, classifiers."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from difflayers.proximal import PredictiveSparseDecomposition, SparseCoding, SupervisedDictionary, lasso

F64 = torch.float64


def close(got, want, tol=1e-9):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def sparse_signals(n, p, active, count, seed=0):
    """Signals made of a few atoms each of a known dictionary."""
    generator = torch.Generator().manual_seed(seed)
    D = torch.nn.functional.normalize(torch.randn(n, p, generator=generator, dtype=F64), dim=0)
    chosen = torch.rand(count, p, generator=generator).argsort(-1) < active
    size = 1 + torch.rand(count, p, generator=generator, dtype=F64)
    sign = torch.randn(count, p, generator=generator, dtype=F64).sign()
    return D, (chosen * size * sign) @ D.mT


# -------------------------------------------------------------------------------------------------------- SparseCoding


def test_atoms_have_length_one_and_codes_are_those_of_the_lasso():
    layer = SparseCoding(5, 8, 0.3, dtype=F64)
    with torch.no_grad():
        layer.weight.mul_(7)
    close(layer.dictionary.norm(dim=0), torch.ones(8, dtype=F64))
    y = torch.randn(2, 3, 5, dtype=F64)
    close(layer(y), lasso(layer.dictionary, y, 0.3))
    close(layer.reconstruct(layer(y)), layer(y) @ layer.dictionary.mT)


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_objective_is_the_minimum_with_its_gradient(ridge):
    layer = SparseCoding(5, 8, 0.3, learn_penalty=True, ridge=ridge, dtype=F64)
    y = torch.randn(4, 5, dtype=F64)
    value = layer.objective(y)
    z, lam = layer(y), layer.penalty
    plain = (y - layer.reconstruct(z)).square().sum(-1) / 2 + lam * z.abs().sum(-1) + ridge / 2 * z.square().sum(-1)
    close(value, plain)
    nearby = z + 0.01 * torch.randn_like(z)
    worse = (y - layer.reconstruct(nearby)).square().sum(-1) / 2 + lam * nearby.abs().sum(-1)
    assert (worse + ridge / 2 * nearby.square().sum(-1) > value).all()
    parameters = list(layer.parameters())
    for got, want in zip(
        torch.autograd.grad(value.sum(), parameters), torch.autograd.grad(plain.sum(), parameters), strict=True
    ):
        close(got, want)


def test_a_known_dictionary_is_found():
    D, y = sparse_signals(16, 16, 2, 400)
    torch.manual_seed(1)
    layer = SparseCoding(16, 16, 0.3, dtype=F64)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 100)
    for _ in range(100):
        optimiser.zero_grad()
        layer.objective(y).mean().backward()
        optimiser.step()
        schedule.step()
    assert ((D.mT @ layer.dictionary).abs().amax(-1) > 0.99).all()


def test_learned_penalty_moves():
    layer = SparseCoding(4, 6, 0.5, learn_penalty=True)
    y = torch.randn(20, 4)
    layer(y).abs().sum().backward()
    assert layer.log_penalty.grad < 0  # a larger penalty makes codes smaller
    assert "learn_penalty=True" in repr(layer)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SparseCoding(0, 3), "n_features: expected at least 1"),
        (lambda: SparseCoding(3, 3, penalty=0.0), "penalty: expected more than 0"),
        (lambda: SparseCoding(3, 3, ridge=-1.0), "ridge: expected at least 0"),
        (lambda: PredictiveSparseDecomposition(3, 3, consistency=0.0), "consistency: expected more than 0"),
        (lambda: SupervisedDictionary(3, 4), "n_atoms: expected at most 3"),
        (lambda: SupervisedDictionary(3, 2).fit(torch.randn(5, 3), torch.full((5,), 2)), r"labels: expected 0\.\.1"),
    ],
)
def test_bad_options(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# ---------------------------------------------------------------------------------------------------------------- PSD


def test_codes_minimise_the_papers_objective():
    torch.manual_seed(0)
    model = PredictiveSparseDecomposition(5, 7, penalty=0.4, consistency=0.8, dtype=F64)
    y = torch.randn(3, 5, dtype=F64)

    def objective(z):
        fit, miss = (y - model.reconstruct(z)).square().sum(-1), (z - model(y)).square().sum(-1)
        return fit + 0.4 * z.abs().sum(-1) + 0.8 * miss

    z = model.codes(y)
    close(model.objective(y), objective(z))
    assert (z == 0).any() and (z != 0).any()
    for scale in (1e-1, 1e-3):
        assert (objective(z + scale * torch.randn_like(z)) > objective(z)).all()
    parameters = [p for _, p in model.named_parameters()]
    found = torch.autograd.grad(model.objective(y).sum(), parameters)
    for got, want in zip(found, torch.autograd.grad(objective(z).sum(), parameters), strict=True):
        close(got, want)


def test_derivatives_of_the_codes_are_the_published_ones():
    """With w = (B_A^T B_A + alpha I)^-1 v_A: B w for the signal, alpha w for the prediction."""
    B = torch.randn(4, 6, dtype=F64)
    y, predicted = torch.randn(4, dtype=F64).requires_grad_(), torch.randn(6, dtype=F64).requires_grad_()
    z = lasso(B, y, 0.2, ridge=0.8, center=predicted)
    v = torch.randn(6, dtype=F64)
    A = z != 0
    w = torch.zeros(6, dtype=F64)
    w[A] = torch.linalg.solve(B[:, A].mT @ B[:, A] + 0.8 * torch.eye(int(A.sum()), dtype=F64), v[A])
    for got, want in zip(torch.autograd.grad(z, (y, predicted), v), (B @ w, 0.8 * w), strict=True):
        close(got, want)


def test_encoder_learns_to_predict():
    _, y = sparse_signals(8, 12, 2, 500)
    torch.manual_seed(0)
    model = PredictiveSparseDecomposition(8, 12, penalty=0.3, dtype=F64)

    @torch.no_grad()
    def miss():
        z = model.codes(y)
        return float((model(y) - z).square().mean() / z.square().mean())

    before, optimiser = miss(), torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(100):
        optimiser.zero_grad()
        model.objective(y).mean().backward()
        optimiser.step()
    assert miss() < 0.2 * before and miss() < 0.2


# ------------------------------------------------------------------------------------------------ SupervisedDictionary


def breast_cancer():
    datasets = pytest.importorskip("sklearn.datasets")
    x, labels = datasets.load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    learn = order[:400]
    x = (x - x[learn].mean(0)) / x[learn].std(0)
    split = lambda t: (torch.tensor(t[learn]), torch.tensor(t[order[400:]]))  # noqa: E731
    return *split(x), *split(labels)


def test_supervised_atoms_beat_principal_components():
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    x, test, labels, test_labels = breast_cancer()
    pca = PCA(2).fit(x)
    baseline = LogisticRegression().fit(pca.transform(x), labels).score(pca.transform(test), test_labels)
    torch.manual_seed(0)
    model = SupervisedDictionary(30, 2, reconstruction=0.05, dtype=F64)
    losses = model.fit(x, labels)
    accuracy = (model(test).argmax(-1) == test_labels).double().mean()
    assert accuracy > baseline + 0.01
    assert all(b <= a + 1e-12 for a, b in pairwise(losses))
    miss = (test - model.reconstruct(model.encode(test))).square().sum() / test.square().sum()
    assert miss < 0.5  # and still explain the signals
    close(model.dictionary.mT @ model.dictionary, torch.eye(2, dtype=F64))


def test_heavy_reconstruction_gives_principal_components():
    x, _, labels, _ = breast_cancer()
    model = SupervisedDictionary(30, 3, reconstruction=100.0, dtype=F64)
    model.fit(x, labels, rtol=1e-12)
    V = torch.linalg.svd(x, full_matrices=False)[2][:3]
    close(torch.linalg.svdvals(V @ model.dictionary), torch.ones(3, dtype=F64), 1e-3)  # the same subspace


def test_covariates_enter_the_classifier():
    x = torch.randn(300, 4, dtype=F64)
    c = torch.randn(300, 2, dtype=F64)
    labels = (c[:, 0] > 0).long()
    model = SupervisedDictionary(4, 1, n_covariates=2, dtype=F64)
    model.fit(x, labels, c)
    assert (model(x, c).argmax(-1) == labels).double().mean() > 0.95
    assert (model(x).argmax(-1) == labels).double().mean() < 0.7


@pytest.mark.parametrize("steps", [1, 3])
def test_the_last_loss_is_that_of_the_parameters(steps):
    torch.manual_seed(0)
    x = torch.randn(40, 5, dtype=F64)
    labels = (x[:, 0] > 0).long()
    model = SupervisedDictionary(5, 2, reconstruction=1e-12, dtype=F64)
    losses = model.fit(x, labels, max_steps=steps)
    assert len(losses) == steps + 1
    close(torch.nn.functional.cross_entropy(model(x), labels).detach(), torch.tensor(losses[-1], dtype=F64))
