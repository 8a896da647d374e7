"""Spectral risk against conic and linear programs over the permutahedron, and against its definition.

Oracles: cvxpy with Clarabel at tight tolerances, the permutahedron written as bounds on sums of the k largest weights;
without a penalty scipy's linear program over doubly stochastic matrices; spectra from differences of their distortion
functions in exact arithmetic; derivatives from finite differences.
"""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from difflayers.conic import (
    KL,
    ChiSquare,
    _pooling,
    esrm,
    extremile,
    spectral_risk,
    spectral_risk_weights,
    superquantile,
)

F64 = torch.float64
SPECTRA = {"superquantile": superquantile(0.45), "extremile": extremile(2.5), "esrm": esrm(3.0)}
DIVERGENCES = [ChiSquare, KL]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def penalty_of(q: np.ndarray, kind: type, strength: float) -> float:
    n = len(q)
    if kind is ChiSquare:
        return strength * n * ((q - 1 / n) ** 2).sum()
    return strength * sum(p * np.log(n * p) for p in q if p > 0)


def conic_oracle(losses: np.ndarray, sigma: np.ndarray, kind: type, strength: float) -> tuple[float, np.ndarray]:
    """The optimum over the permutahedron: the k largest weights have at most the sum of the k largest of sigma."""
    import cvxpy as cp

    n = len(losses)
    q = cp.Variable(n)
    rows = [cp.sum(q) == sigma.sum(), q >= sigma[0]]
    rows += [cp.sum_largest(q, k) <= sigma[n - k :].sum() for k in range(1, n)]
    cost = n * cp.sum_squares(q - 1 / n) if kind is ChiSquare else -cp.sum(cp.entr(q)) + np.log(n) * cp.sum(q)
    problem = cp.Problem(cp.Maximize(losses @ q - strength * cost), rows)
    tol = 1e-12 if kind is ChiSquare else 1e-10
    value = problem.solve(solver=cp.CLARABEL, tol_gap_abs=tol, tol_gap_rel=tol, tol_feas=tol)
    return value, q.value


def assert_allowed(q: torch.Tensor, sigma: torch.Tensor, tol: float = 1e-12) -> None:
    """In the permutahedron: sorted sums are at most those of sigma, and equal in total."""
    q, sigma = q.double(), sigma.double()
    excess = q.sort(-1, descending=True)[0].cumsum(-1) - sigma.flip(-1).cumsum(-1)
    assert float(excess.max()) <= tol and float(excess[..., -1].abs().max()) <= tol
    assert float(q.min()) >= -tol * float(sigma.max())


@pytest.mark.parametrize("strength", [0.02, 0.3, 5.0])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_equals_a_conic_program(kind, spectrum, strength):
    losses, sigma = normal(0, 2, 7), SPECTRA[spectrum].weights(7, dtype=F64)
    risk = spectral_risk(losses, SPECTRA[spectrum], penalty=kind(strength))
    q = spectral_risk_weights(losses, SPECTRA[spectrum], penalty=kind(strength))
    assert_allowed(q, sigma)
    for i in range(2):
        value, expected = conic_oracle(losses[i].numpy(), sigma.numpy(), kind, strength)
        np.testing.assert_allclose(float(risk[i]), value, atol=1e-9)
        np.testing.assert_allclose(q[i].numpy(), expected, atol=2e-6)
        attained = float(losses[i] @ q[i]) - penalty_of(q[i].numpy(), kind, strength)
        np.testing.assert_allclose(attained, float(risk[i]), atol=1e-13)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_without_a_penalty_it_is_a_linear_program(spectrum):
    from scipy.optimize import linprog

    n, losses = 6, normal(1, 6)
    sigma = SPECTRA[spectrum].weights(n, dtype=F64)
    rows = np.concatenate([np.kron(np.eye(n), np.ones((1, n))), np.kron(np.ones((1, n)), np.eye(n))])
    found = linprog(-np.outer(losses, sigma).ravel(), A_eq=rows, b_eq=np.ones(2 * n))
    for penalty in (None, ChiSquare(0.0), KL(0.0)):
        risk = spectral_risk(losses, SPECTRA[spectrum], penalty=penalty)
        np.testing.assert_allclose(float(risk), -found.fun, atol=1e-9)
        q = spectral_risk_weights(losses, SPECTRA[spectrum], penalty=penalty)
        np.testing.assert_allclose(q, found.x.reshape(n, n) @ sigma.numpy(), atol=1e-9)


def slow_risk_weights(losses: torch.Tensor, sigma: torch.Tensor, kind: type, strength: float) -> torch.Tensor:
    """Pool adjacent violators, one block after the other, on logarithms that cannot overflow."""
    n, order = len(losses), losses.argsort(stable=True)
    x, s = losses[order].tolist(), sigma.tolist()
    scale = 2 * n * strength if kind is ChiSquare else strength

    def value(block: list[int]) -> float:
        total = sum(s[i] for i in block)
        if kind is ChiSquare:
            return sum(x[i] for i in block) / scale / len(block) - total / len(block)
        top = max(x[i] for i in block)
        log_sum = top / scale + np.log(sum(np.exp((x[i] - top) / scale) for i in block))
        return log_sum - np.log(total) if total > 0 else np.inf

    blocks: list[list[int]] = []
    for i in range(n):
        blocks.append([i])
        while len(blocks) > 1 and value(blocks[-2]) > value(blocks[-1]):
            last = blocks.pop()
            blocks[-1] = blocks[-1] + last
    q = torch.empty(n, dtype=F64)
    for block in blocks:
        here, total = losses[order[block]], sum(s[i] for i in block)
        if kind is ChiSquare:
            q[order[block]] = total / len(block) + (here - here.mean()) / scale
        else:
            q[order[block]] = total * torch.softmax(here / scale, -1)
    return q


@pytest.fixture(params=["row by row", "all rows at once"])
def pooling(request, monkeypatch):
    """What a CPU does, and what other devices do."""
    if request.param == "all rows at once":
        monkeypatch.setattr(_pooling, "_compiled", lambda v: False)
    return request.param


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 33, 100])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_equals_pooling_one_block_after_the_other(kind, n, pooling):
    """Many sizes, spectra with zeros and ties, losses with ties."""
    losses = normal(2, 3, n)
    losses[1] = losses[1].round(decimals=0)
    for spectrum, strength in itertools.product(SPECTRA.values(), (1e-3, 0.1, 10.0)):
        sigma = spectrum.weights(n, dtype=F64)
        q = spectral_risk_weights(losses, spectrum, penalty=kind(strength))
        assert_allowed(q, sigma)
        for i in range(3):
            expected = slow_risk_weights(losses[i], sigma, kind, strength)
            torch.testing.assert_close(q[i], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_derivatives(kind, spectrum):
    """Gradient equal to the weights, first and second derivatives equal to differences, in all that has one."""
    losses, strength = normal(3, 2, 6).requires_grad_(), torch.tensor([0.05, 0.4], dtype=F64, requires_grad=True)
    risk = lambda x, s: spectral_risk(x, SPECTRA[spectrum], penalty=kind(s))  # noqa: E731
    q = spectral_risk_weights(losses, SPECTRA[spectrum], penalty=kind(strength))
    (slope,) = torch.autograd.grad(risk(losses, strength).sum(), losses)
    torch.testing.assert_close(slope, q, rtol=1e-12, atol=1e-14)
    assert gradcheck(risk, (losses, strength), check_forward_ad=True)
    assert gradgradcheck(risk, (losses, strength))
    weights = lambda x, s: spectral_risk_weights(x, SPECTRA[spectrum], penalty=kind(s))  # noqa: E731
    assert gradcheck(weights, (losses, strength), check_forward_ad=True)
    assert gradgradcheck(weights, (losses, strength))
    sigma = esrm(2.0).weights(6, dtype=F64).requires_grad_()
    assert gradcheck(lambda s, w: spectral_risk(losses.detach(), w, penalty=kind(s)), (strength, sigma))
    assert gradgradcheck(lambda x, s, w: spectral_risk(x, w, penalty=kind(s)), (losses, strength, sigma))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_hessian_is_block_diagonal_with_the_known_blocks(kind):
    losses, sigma, strength, n = normal(4, 8), superquantile(0.5).weights(8, dtype=F64), 0.2, 8
    found = torch.autograd.functional.hessian(lambda x: spectral_risk(x, sigma, penalty=kind(strength)), losses)
    q = slow_risk_weights(losses, sigma, kind, strength)
    scale = 2 * n * strength if kind is ChiSquare else strength
    # entries are in a block if their weights move together: recovered from the oracle by differences
    moves = torch.stack([slow_risk_weights(losses + 1e-6 * e, sigma, kind, strength) - q for e in torch.eye(n)]) / 1e-6
    torch.testing.assert_close(found, moves, atol=1e-4, rtol=1e-4)
    block = moves[int(moves.diagonal().argmax())].abs() > 1e-6
    m = int(block.sum())
    assert m > 1
    if kind is ChiSquare:
        expected = (torch.eye(m, dtype=F64) - 1 / m) / scale
    else:
        expected = (torch.diag(q[block]) - torch.outer(q[block], q[block]) / q[block].sum()) / scale
    torch.testing.assert_close(found[block][:, block], expected)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_equal_weights_of_equal_losses_are_no_kink(kind):
    """Two losses that tie inside a flat stretch of the spectrum: their weights do not move, so no second derivative."""
    losses, sigma = torch.tensor([0.0, 5.0, 5.0, 1.0], dtype=F64), torch.tensor([0.1, 0.1, 0.4, 0.4], dtype=F64)
    hessian = torch.autograd.functional.hessian(lambda x: spectral_risk(x, sigma, penalty=kind(0.1)), losses)
    assert bool((hessian[1:3] == 0).all())
    q = spectral_risk_weights(losses, sigma, penalty=kind(0.1))
    assert q[1] == q[2] == 0.4


def test_equal_losses_share_their_weights_without_a_penalty():
    losses = torch.tensor([2.0, 1.0, 2.0, 2.0], dtype=F64, requires_grad=True)
    for penalty in (None, ChiSquare(0.0), KL(0.0)):
        (q,) = torch.autograd.grad(spectral_risk(losses, extremile(2.0), penalty=penalty), losses)
        expected = torch.tensor([5.0, 1.0, 5.0, 5.0], dtype=F64) / 16
        torch.testing.assert_close(q, expected)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_scales(scale, kind, dtype, pooling):
    """Risk of scaled losses at a scaled strength; weights stay allowed."""
    losses = normal(5, 4, 40).to(dtype)
    q = spectral_risk_weights(losses, esrm(4.0), penalty=kind(0.02))
    scaled = spectral_risk_weights(losses * scale, esrm(4.0), penalty=kind(0.02 * scale))
    tol = 1e-12 if dtype == F64 else 3e-5
    torch.testing.assert_close(scaled, q, rtol=tol, atol=tol)
    assert_allowed(scaled, esrm(4.0).weights(40, dtype=dtype), tol)
    risks = [spectral_risk(losses * c, esrm(4.0), penalty=kind(0.02 * c)) / c for c in (1.0, scale)]
    torch.testing.assert_close(risks[0], risks[1], rtol=tol, atol=tol)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("strength", [0.0, 1e-300, 1e-30, 1e-16, 1e-12, 1e9])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_tiny_and_huge_strengths_stay_allowed(offset, strength, kind, dtype, pooling):
    """Neighbours that differ by one rounding unit, and ties: sorted order or a shared block, never a weight between."""
    base = torch.full((5,), 1.0 + offset, dtype=dtype)
    near = base.nextafter(torch.full_like(base, torch.inf))
    losses = torch.cat([base, near, near.nextafter(torch.full_like(base, torch.inf)), base - 0.5])
    for spectrum in (*SPECTRA.values(), superquantile(0.99)):
        sigma = spectrum.weights(20, dtype=dtype)
        leaf = losses.clone().requires_grad_()
        risk = spectral_risk(leaf, spectrum, penalty=kind(strength))
        q = spectral_risk_weights(losses, spectrum, penalty=kind(strength))
        assert_allowed(q, sigma, 1e-14 if dtype == F64 else 1e-6)
        torch.testing.assert_close(torch.autograd.grad(risk, leaf)[0], q, atol=1e-6, rtol=1e-6)
        assert bool((q.reshape(4, 5).std(-1) < 1e-6).all())
        if strength <= 1e-30:
            shared = spectral_risk_weights(losses, spectrum)
            torch.testing.assert_close(q, shared, atol=1e-6, rtol=1e-6)


def test_strengths_differ_by_element_and_may_be_zero():
    losses, strength = normal(6, 3, 5), torch.tensor([0.0, 0.1, 2.0], dtype=F64, requires_grad=True)
    for kind in DIVERGENCES:
        risk = spectral_risk(losses, esrm(2.0), penalty=kind(strength))
        alone = [spectral_risk(losses[i], esrm(2.0), penalty=kind(strength[i].item())) for i in range(3)]
        torch.testing.assert_close(risk, torch.stack(alone))
        (slope,) = torch.autograd.grad(risk.sum(), strength)
        q = spectral_risk_weights(losses, esrm(2.0), penalty=kind(strength)).detach().numpy()
        expected = [-penalty_of(row, kind, 1.0) for row in q]
        torch.testing.assert_close(slope, torch.tensor(expected, dtype=F64))


def test_losses_hundreds_of_strengths_apart(pooling):
    """Where exponentials under- and overflow, in a batch with an element where they do not."""
    losses = torch.stack([torch.linspace(0, 3000, 12, dtype=F64), normal(8, 12)])
    losses[0, 5:9] = losses[0, 5] + torch.arange(4, dtype=F64) / 10
    sigma = superquantile(0.6).weights(12, dtype=F64)
    q = spectral_risk_weights(losses, sigma, penalty=KL(1.0))
    for i in range(2):
        torch.testing.assert_close(q[i], slow_risk_weights(losses[i], sigma, KL, 1.0), rtol=1e-9, atol=1e-12)


def test_one_loss():
    for penalty in (None, ChiSquare(0.3), KL(0.3)):
        loss = torch.tensor([[2.5], [-1.0]], requires_grad=True)
        risk = spectral_risk(loss, superquantile(0.7), penalty=penalty)
        assert risk.tolist() == [2.5, -1.0]
        assert torch.autograd.grad(risk.sum(), loss)[0].tolist() == [[1.0], [1.0]]


def test_nan_stays_in_its_element():
    losses = normal(7, 3, 5)
    losses[1, 2] = torch.nan
    for penalty in (None, ChiSquare(0.1), KL(0.1)):
        risk = spectral_risk(losses, esrm(1.0), penalty=penalty)
        assert torch.isnan(risk).tolist() == [False, True, False]
        assert torch.equal(risk[[0, 2]], spectral_risk(losses[[0, 2]], esrm(1.0), penalty=penalty))


# -------------------------------------------------------------------------------------------------------------- spectra


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_spectra_are_differences_of_a_distortion(n):
    def differences(distortion):
        return [float(distortion(Fraction(i + 1, n)) - distortion(Fraction(i, n))) for i in range(n)]

    tail = Fraction(3, 8)
    exact = {
        superquantile(3 / 8): differences(lambda u: max(u - tail, Fraction(0)) / (1 - tail)),
        extremile(3.0): differences(lambda u: u**3),
        extremile(1.0): differences(lambda u: u),
        esrm(0.0): differences(lambda u: u),
    }
    for spectrum, expected in exact.items():
        np.testing.assert_allclose(spectrum.weights(n, dtype=F64), expected, rtol=2e-14, atol=1e-18)
    found = esrm(2.0).weights(n, dtype=F64).numpy()
    np.testing.assert_allclose(found, np.diff(np.expm1(2.0 * np.arange(n + 1) / n)) / np.expm1(2.0), rtol=1e-10)


@pytest.mark.parametrize("spectrum", [*SPECTRA.values(), esrm(1e-12), esrm(1e4), extremile(1e3), superquantile(0.9999)])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_spectra_are_allowed(spectrum, dtype):
    """Weights of at least 0 that do not fall and sum to 1, without a NaN at extreme parameters."""
    weights = spectrum.weights(1000, dtype=dtype)
    assert weights.dtype == dtype
    assert bool((weights >= 0).all()) and bool((weights.diff() >= 0).all())
    torch.testing.assert_close(float(weights.double().sum()), 1.0, atol=1e-6, rtol=0)
    torch.testing.assert_close(spectral_risk(torch.ones(1000, dtype=dtype), spectrum), torch.ones((), dtype=dtype))


def test_spectra_compare_pickle_and_say_what_they_are():
    import pickle

    assert superquantile(0.5) == superquantile(0.5) != superquantile(0.6)
    assert pickle.loads(pickle.dumps(esrm(1.0))) == esrm(1.0)
    assert repr(superquantile(0.5)) == "superquantile(0.5)"


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: superquantile(1.0), "alpha: expected at least 0 and less than 1, got 1.0"),
        (lambda: extremile(0.5), "r: expected at least 1"),
        (lambda: esrm(float("nan")), "R: expected at least 0"),
        (lambda: superquantile(0.5).weights(0), "n: expected at least 1"),
        (lambda: spectral_risk(torch.ones(3, 0), esrm(1.0)), "losses: expected at least one loss"),
        (lambda: spectral_risk(torch.ones(()), esrm(1.0)), "losses: expected at least 1 dimension"),
        (lambda: spectral_risk(torch.ones(3), 0.5), "spectrum: expected a Spectrum, .* got float"),
        (lambda: spectral_risk(torch.ones(3), torch.ones(2) / 2), "spectrum: expected 3 weights"),
        (lambda: spectral_risk(torch.ones(3), torch.ones(3)), "spectrum: expected weights that sum to 1, got .* 3"),
        (lambda: spectral_risk(torch.ones(2), torch.tensor([0.7, 0.3])), "spectrum: expected weights that do not fall"),
        (lambda: spectral_risk(torch.ones(2), torch.tensor([-0.5, 1.5])), "spectrum: expected at least 0, got -0.5"),
        (lambda: spectral_risk(torch.ones(3), esrm(1.0), penalty=KL(-1.0)), "strength: expected at least 0, got -1"),
        (lambda: spectral_risk(torch.ones(3), esrm(1.0), penalty=KL(float("inf"))), "strength: expected a finite"),
        (lambda: spectral_risk(torch.ones(3), esrm(1.0), penalty=0.5), "penalty: expected ChiSquare, KL or None"),
        (lambda: spectral_risk(torch.ones(3), esrm(1.0), penalty=KL("1")), "strength: expected a number or a tensor"),
        (lambda: spectral_risk(torch.ones(3).long(), esrm(1.0)), "losses: expected a floating-point tensor"),
        (lambda: spectral_risk(torch.ones(2, 3), esrm(1.0), penalty=KL(torch.ones(3))), "strength: expected batch"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()
