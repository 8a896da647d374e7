"""Hypergradients against closed forms in numpy-style dense algebra.

Oracles, none of which uses the library's products or solvers:

- ridge with one hyperparameter per feature: y = (X'X + D)^-1 X't with D = diag(e^x); with q = (X'X + D)^-1 grad F the
  hypergradient is -e^x y q, by a dense solve;
- a quadratic lower problem with curved upper one: central differences of F(y*(x)) in mpmath-free float64;
- lasso: the closed form on the support; equality constraint: elimination by a basis of the null space;
- Neumann: autograd through that many plain gradient steps that start at the optimum;
- MFAC: ``torch.linalg.inv`` of damping I + G'G / m.
"""

import pytest
import torch
from torch import Tensor

from difflayers import SolveError, SolveWarning, Status
from difflayers.bilevel import MFAC, Bilevel, FiniteDifference, hypergradient
from difflayers.implicit import Implicit, Neumann, OneStep
from difflayers.linalg import CG, GMRES, LU, MINRES, Cholesky
from tests.bilevel.ridge import F64, HYPER, TV, XV, T, X, hessian_scale, randn, ridge, ridge_oracle


@pytest.mark.parametrize(
    "adjoint",
    [None, *map(Implicit, (None, CG(), CG(rtol=1e-12), MINRES(), GMRES(), LU(), Cholesky())), FiniteDifference()],
    ids=str,
)
def test_ridge_with_one_hyperparameter_per_feature(adjoint):
    y, expected = ridge_oracle(HYPER)
    result = hypergradient(ridge(), HYPER, y, adjoint=adjoint)
    close = 1e-6 if isinstance(adjoint, FiniteDifference) else 1e-8
    assert torch.linalg.vector_norm(result.grad - expected) <= close * torch.linalg.vector_norm(expected)
    assert result.converged and not result.failed
    assert result.residual <= 1e-5 and result.stationarity < 1e-12
    torch.testing.assert_close(result.value, (XV @ y - TV).square().sum() / 2)
    assert not result.grad.requires_grad and result.grad.dtype == F64


def test_float32_stays_float32():
    problem = Bilevel(lambda x, y, batch: y.square().sum(), lambda x, y, batch: (y - 3 * x).square().sum())
    x = torch.tensor([1.0, 2.0])
    result = hypergradient(problem, x, 3 * x)
    assert result.grad.dtype == torch.float32
    torch.testing.assert_close(result.grad, 18 * x)


def test_explicit_dependence_and_finite_differences_of_the_resolved_objective():
    """Curved in everything: Newton in plain torch solves the lower problem, differences of it are the oracle."""
    A = randn(4, 4, seed=7)

    def lower(x, y, batch):
        return torch.cosh(y - x.sin()).sum() + (A @ y).square().sum() / 2 + (x * y).sum() * 0.3

    def upper(x, y, batch):
        return (y - 0.5).pow(4).sum() + x.square().sum() + (x * y.exp()).sum()

    def solve(x: Tensor) -> Tensor:
        y = torch.zeros(4, dtype=F64)
        for _ in range(30):
            g = torch.func.grad(lower, 1)(x, y, None)
            y = y - torch.linalg.solve(torch.func.hessian(lower, 1)(x, y, None), g)
        return y

    x = randn(4, seed=8)
    step = 1e-5
    expected = torch.stack(
        [
            (upper(x + e, solve(x + e), None) - upper(x - e, solve(x - e), None)) / (2 * step)
            for e in step * torch.eye(4)
        ]
    )
    got = hypergradient(Bilevel(upper, lower), x, solve(x)).grad
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)
    rough = hypergradient(Bilevel(upper, lower), x, solve(x), adjoint=FiniteDifference()).grad
    torch.testing.assert_close(rough, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adjoint", [None, Implicit(), Implicit(LU()), Neumann(200), FiniteDifference()], ids=str)
def test_numbers_without_dimensions(adjoint):
    """min_y (y - a)^2 / 2 + e^x y^2 / 2: y = a / (1 + e^x), dF/dx = -(y - 1) y e^x / (1 + e^x)."""
    problem = Bilevel(lambda x, y, batch: (y - 1) ** 2 / 2, lambda x, y, batch: (y - 3) ** 2 / 2 + x.exp() * y**2 / 2)
    x = torch.tensor(0.3, dtype=F64)
    y = 3 / (1 + x.exp())
    result = hypergradient(problem, x, y, adjoint=adjoint)
    assert result.grad.shape == () == result.adjoint.shape
    torch.testing.assert_close(result.grad, -(y - 1) * y * x.exp() / (1 + x.exp()), rtol=1e-8, atol=0)


@pytest.mark.parametrize("adjoint", [None, Implicit(), Implicit(MINRES()), Neumann(1, step=1.0), OneStep()], ids=str)
def test_identity_hessian(adjoint):
    """Where peers drop the last (the only) iterate: y = x, so the hypergradient is the upper gradient."""
    problem = Bilevel(lambda x, y, batch: (y**3).sum(), lambda x, y, batch: (y - x).square().sum() / 2)
    x = randn(5, seed=9)
    scale = 0.95 if isinstance(adjoint, OneStep) else 1.0  # one step of the estimated length, 5 % short
    torch.testing.assert_close(hypergradient(problem, x, x, adjoint=adjoint).grad, scale * 3 * x**2)


def test_zero_right_hand_side_takes_no_step():
    y, _ = ridge_oracle(HYPER)
    problem = Bilevel(lambda x, y, batch: x.square().sum(), ridge().lower)
    for adjoint in (None, Implicit(), Neumann(5), FiniteDifference()):
        result = hypergradient(problem, HYPER, y, adjoint=adjoint)
        assert torch.equal(result.grad, 2 * HYPER) and not result.adjoint.any()
    assert hypergradient(problem, HYPER, y).steps == 0


def test_unused_variables_have_zero_gradients():
    problem = Bilevel(lambda x, y, batch: y.square().sum(), lambda x, y, batch: (y - 1).square().sum())
    grad = hypergradient(problem, {"a": randn(2), "b": randn(3)}, torch.ones(3, dtype=F64)).grad
    assert not grad["a"].any() and not grad["b"].any() and grad["b"].shape == (3,)


def test_pytrees():
    y, expected = ridge_oracle(HYPER)
    problem = Bilevel(
        lambda x, y, batch: (XV @ torch.cat([y["w"][0], y["b"]]) - TV).square().sum() / 2,
        lambda x, y, batch: ridge().lower(torch.cat(x), torch.cat([y["w"][0], y["b"]]), None),
    )
    result = hypergradient(problem, [HYPER[:3], HYPER[3:]], {"w": (y[:5],), "b": y[5:]})
    torch.testing.assert_close(torch.cat(result.grad), expected, rtol=1e-8, atol=0)
    assert result.adjoint["b"].shape == (2,)


def test_batches_reach_their_level():
    seen = []

    def upper(x, y, batch):
        seen.append(("upper", batch))
        return (y * x).sum()

    def lower(x, y, batch):
        seen.append(("lower", batch))
        return (y - x).square().sum()

    x = randn(2)
    hypergradient(Bilevel(upper, lower), x, x, ("valid", "train"))
    assert set(seen) == {("upper", "valid"), ("lower", "train")}


# --------------------------------------------------------------------------------------------------- Neumann and others


@pytest.mark.parametrize("terms", [1, 2, 7, 30])
def test_neumann_is_unrolled_gradient_descent_from_the_optimum(terms):
    step = 1.2 / hessian_scale()
    x = HYPER.clone().requires_grad_()
    y = ridge_oracle(HYPER)[0]
    for _ in range(terms):
        y = y - step * (X.mT @ (X @ y - T) + x.exp() * y)
    (expected,) = torch.autograd.grad((XV @ y - TV).square().sum() / 2, x)
    got = hypergradient(ridge(), HYPER, ridge_oracle(HYPER)[0], adjoint=Neumann(terms, step=step)).grad
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("factor", [2.05, 2.5, 10.0])
def test_neumann_beyond_the_longest_step_warns(factor):
    y, _ = ridge_oracle(HYPER)
    with pytest.warns(SolveWarning, match="hypergradient"):
        result = hypergradient(ridge(), HYPER, y, adjoint=Neumann(60, step=factor / hessian_scale()))
    assert result.status == Status.MAX_STEPS


def test_neumann_far_beyond_raises():
    y, _ = ridge_oracle(HYPER)
    with pytest.raises(SolveError):
        hypergradient(ridge(), HYPER, y, adjoint=Neumann(400, step=1e3))


@pytest.mark.filterwarnings("error::difflayers.SolveWarning")
@pytest.mark.parametrize("step", [None, "estimated"])
def test_neumann_estimates_its_step(step):
    y, expected = ridge_oracle(HYPER)
    got = hypergradient(ridge(), HYPER, y, adjoint=Neumann(3000, step=step)).grad
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def test_mfac_is_the_dense_inverse():
    for rows in (1, 3, 8, 13):
        G, v = randn(rows, 6, seed=rows), randn(6, seed=20)
        mfac = MFAC(rank=8, damping=0.1)
        mfac.update(G[: rows // 2]) if rows > 1 else None
        for g in G[rows // 2 :]:
            mfac.update((g[:2], {"rest": g[2:].reshape(2, 2)}))
        kept = G[-8:]
        dense = torch.linalg.inv(0.1 * torch.eye(6, dtype=F64) + kept.mT @ kept / len(kept))
        torch.testing.assert_close(mfac.solve(v), dense @ v)
        torch.testing.assert_close(mfac.solve(torch.stack([v, 2 * v])), torch.stack([dense @ v, 2 * dense @ v]))


def test_mfac_as_adjoint():
    y, _ = ridge_oracle(HYPER)
    mfac = MFAC(rank=16, damping=0.5)
    G = randn(10, 7, seed=33)
    mfac.update(G)
    inverse = torch.linalg.inv(0.5 * torch.eye(7, dtype=F64) + G.mT @ G / 10)
    q = inverse @ (XV.mT @ (XV @ y - TV))
    result = hypergradient(ridge(), HYPER, y, adjoint=mfac)
    torch.testing.assert_close(result.grad, -HYPER.exp() * y * q)
    H = X.mT @ X + torch.diag(HYPER.exp())
    torch.testing.assert_close(result.residual, torch.linalg.vector_norm(H @ q - XV.mT @ (XV @ y - TV)))
    with pytest.raises(ValueError, match="MFAC: expected gradients"):
        hypergradient(ridge(), HYPER, y, adjoint=MFAC(rank=2))
    with pytest.raises(ValueError, match="gradients: expected 7 numbers, got 3"):
        mfac.update(torch.zeros(3, dtype=F64))


def test_damping_is_a_ridge_on_the_hessian():
    y, _ = ridge_oracle(HYPER)
    H = X.mT @ X + torch.diag(HYPER.exp()) + 0.7 * torch.eye(7, dtype=F64)
    expected = -HYPER.exp() * y * torch.linalg.solve(H, XV.mT @ (XV @ y - TV))
    for solver in (None, CG(), MINRES(), GMRES(), LU()):
        got = hypergradient(ridge(), HYPER, y, adjoint=Implicit(solver, damping=0.7)).grad
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=0)
    with pytest.raises(ValueError, match="damping: expected"):
        Implicit(damping=-1.0)


# ----------------------------------------------------------------------------------------------- prox and constraints


def soft(v: Tensor, t: Tensor) -> Tensor:
    return v - v.clamp(-t, t)


@pytest.mark.parametrize("adjoint", [None, Implicit(GMRES()), Implicit(LU()), Implicit()], ids=str)
def test_lasso_on_its_support(adjoint):
    """One penalty for all: on the support S, H_SS dy = -signs; nothing off it."""
    w = randn(7, seed=40)

    def F(y):
        return (XV @ y - TV).square().sum() / 2 + (w * y).sum()  # pulls at coordinates off the support as well

    problem = Bilevel(
        upper=lambda x, y, batch: F(y),
        lower=lambda x, y, batch: (X @ y - T).square().sum() / 2,
        prox_lower=lambda v, x, step: soft(v, step * x),
    )
    x, y = torch.tensor(6.0, dtype=F64), torch.zeros(7, dtype=F64)
    s = 1 / torch.linalg.eigvalsh(X.mT @ X)[-1]
    for _ in range(20000):
        y = soft(y - s * X.mT @ (X @ y - T), s * x)
    S = y != 0
    assert 0 < int(S.sum()) < 7
    slope = (XV.mT @ (XV @ y - TV) + w)[S]
    expected = -(torch.linalg.solve((X.mT @ X)[S][:, S], slope) * y[S].sign()).sum()
    result = hypergradient(problem, x, y, adjoint=adjoint)
    torch.testing.assert_close(result.grad, expected, rtol=1e-8, atol=1e-10)
    # weighted: one penalty per coordinate, zero off the support to the bit
    weighted = Bilevel(problem.upper, problem.lower, prox_lower=lambda v, x, step: soft(v, step * x))
    grad = hypergradient(weighted, x.expand(7), y, adjoint=adjoint).grad
    assert not grad[~S].any() and grad[S].all()
    for refused in (CG(), MINRES(), Cholesky()):
        with pytest.raises(ValueError, match="adjoint: expected GMRES"):
            hypergradient(problem, x, y, adjoint=Implicit(refused))


@pytest.mark.parametrize("adjoint", [None, Implicit(MINRES()), Implicit(GMRES()), Implicit(LU()), Implicit()], ids=str)
def test_equality_constrained_ridge(adjoint):
    """C y = x: y = y0 + Z u by elimination, u unconstrained; the dense derivative of that is the oracle."""
    C = randn(2, 7, seed=50)
    x = randn(2, seed=51)
    problem = Bilevel(
        upper=lambda x, y, batch: (XV @ y - TV).square().sum() / 2 + x.square().sum(),
        lower=lambda x, y, batch: (X @ y - T).square().sum() / 2 + (y**4).sum() / 4,
        constraint=lambda x, y: C @ y - x,
        equality=True,
    )
    Z = torch.linalg.svd(C).Vh[2:].mT

    def solve(x: Tensor) -> Tensor:
        y0, u = torch.linalg.pinv(C) @ x, torch.zeros(5, dtype=F64)
        f = lambda u: problem.lower(x, y0 + Z @ u, None)  # noqa: E731
        for _ in range(40):
            u = u - torch.linalg.solve(torch.func.hessian(f)(u), torch.func.grad(f)(u))
        return y0 + Z @ u

    step = 1e-5
    expected = torch.stack(
        [
            (problem.upper(x + e, solve(x + e), None) - problem.upper(x - e, solve(x - e), None)) / (2 * step)
            for e in step * torch.eye(2, dtype=F64)
        ]
    )
    result = hypergradient(problem, x, solve(x), adjoint=adjoint)
    torch.testing.assert_close(result.grad, expected, rtol=1e-7, atol=1e-8)
    assert result.stationarity < 1e-8
    with pytest.raises(ValueError, match="adjoint: expected MINRES"):
        hypergradient(problem, x, solve(x), adjoint=Implicit(CG()))


def test_damping_next_to_a_prox_is_added_to_the_hessian():
    y = torch.tensor([1.0, 0.0, -2.0, 0.0, 0.0, 3.0, 0.0], dtype=F64)  # a solution: the slope is what the penalty needs
    S, x = y != 0, torch.tensor(0.5, dtype=F64)
    c = X.mT @ X @ y + 0.5 * y.sign()
    problem = Bilevel(
        upper=lambda x, y, batch: (HYPER * y).sum(),
        lower=lambda x, y, batch: (X @ y).square().sum() / 2 - c @ y,
        prox_lower=lambda v, x, step: soft(v, step * x),
    )
    H = (X.mT @ X)[S][:, S] + 0.7 * torch.eye(3, dtype=F64)
    for solver in (None, GMRES(), LU()):
        got = hypergradient(problem, x, y, adjoint=Implicit(solver, damping=0.7)).grad
        torch.testing.assert_close(got, -(torch.linalg.solve(H, HYPER[S]) * y[S].sign()).sum(), rtol=1e-8, atol=1e-10)
