"""Adjoints that are inexact on purpose, warm starts, early stops, single precision, bad input: against the page.

Neumann(K) equal to K unrolled gradient steps from the optimum, M-FAC to the dense inverse, the error of an early stop
within the bound of the error analysis (constants by hand for ridge regression).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from difflayers import SolveError, SolveWarning
from difflayers.bilevel import MFAC, ArgminLayer, Bilevel, FiniteDifference, hypergradient
from difflayers.implicit import Implicit, Neumann, OneStep, Unrolled
from difflayers.linalg import CG, LU
from tests.bilevel.oracle_cases import AT, F64, RIDGE, TIGHT, far, problem
from tests.bilevel.oracle_closed import Ridge, bound, neumann, tensor, unrolled


@pytest.mark.parametrize("terms", [1, 2, 7, 40])
def test_neumann_is_unrolling(terms: int) -> None:
    exact = RIDGE.exact(AT["ridge"])
    H = RIDGE.hessian_yy(AT["ridge"])
    alpha = 1 / np.linalg.eigvalsh(H)[-1]
    x, y = tensor(AT["ridge"]), tensor(exact.y)
    found = hypergradient(Bilevel(RIDGE.upper, RIDGE.lower), x, y, adjoint=Neumann(terms, step=alpha))
    assert far(found.grad, unrolled(RIDGE, AT["ridge"], exact.y, alpha, terms)) < 1e-12
    q = neumann(H, RIDGE.C.T @ (RIDGE.C @ exact.y - RIDGE.c), alpha, terms)
    assert far(found.adjoint, q) < 1e-12
    assert found.products <= terms + 1


@pytest.mark.parametrize("step", [None, "estimated"])
def test_neumann_estimates_its_step(step: Any) -> None:
    """With any step below 2 / lambda_max the series converges; with many terms it is the closed form."""
    P, made, at = problem("ridge")
    exact = P.exact(at)
    found = hypergradient(made, tensor(at), tensor(exact.y), adjoint=Neumann(800, step=step))
    assert far(found.grad, exact.gradient) < 1e-8


@pytest.mark.parametrize("factor", [2.2, 5.0, 100.0])
@pytest.mark.parametrize("terms", [3, 20, 400])
def test_neumann_diverges_loudly(factor: float, terms: int) -> None:
    P, made, at = problem("ridge")
    alpha = factor / np.linalg.eigvalsh(P.hessian_yy(at))[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((SolveWarning, SolveError)):
            hypergradient(made, tensor(at), tensor(P.exact(at).y), adjoint=Neumann(terms, step=alpha))


def test_one_step_drops_the_inverse() -> None:
    P, made, at = problem("ridge")
    y = P.exact(at).y
    g = P.C.T @ (P.C @ y - P.c)
    found = hypergradient(made, tensor(at), tensor(y), adjoint=OneStep())
    alpha = float(found.adjoint @ tensor(g)) / float(g @ g)  # the step of the one gradient step: stable, not tiny
    assert 0.5 <= alpha * np.linalg.eigvalsh(P.hessian_yy(at))[-1] < 2
    assert far(found.adjoint, alpha * g) < 1e-13
    assert far(found.grad, P.rho * at - alpha * np.exp(at) * y * g) < 1e-13


def test_unrolled_belongs_to_the_layer() -> None:
    P, made, at = problem("ridge")
    with pytest.raises(ValueError, match="ArgminLayer"):
        hypergradient(made, tensor(at), tensor(P.exact(at).y), adjoint=Unrolled(10))


@pytest.mark.parametrize("name", ["ridge", "logistic"])
def test_finite_differences(name: str) -> None:
    """Ridge is quadratic in y: central differences of its gradients are exact up to rounding and the loose CG."""
    P, made, at = problem(name)
    exact = P.exact(at)
    x, y = tensor(at), tensor(exact.y)
    tight = FiniteDifference(adjoint=Implicit(CG(rtol=1e-10 if name == "ridge" else 1e-6)), radius=1e-3)
    assert far(hypergradient(made, x, y, adjoint=tight).grad, exact.gradient) < (1e-9 if name == "ridge" else 1e-5)
    dense_solve = FiniteDifference(adjoint=Implicit(LU()), radius=1e-3)
    assert far(hypergradient(made, x, y, adjoint=dense_solve).grad, exact.gradient) < (
        1e-9 if name == "ridge" else 1e-5
    )
    assert far(hypergradient(made, x, y, adjoint=FiniteDifference()).grad, exact.gradient) < 1e-3


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_mfac_is_the_dense_inverse(rows: int) -> None:
    """The last `rank` gradients only, in any mixture of single rows and blocks."""
    r = np.random.default_rng(rows)
    G, v, damping = r.normal(size=(rows, 6)), r.normal(size=6), 1e-2
    kept = G[-4:]
    F = damping * np.eye(6) + kept.T @ kept / len(kept)
    single, block = MFAC(4, damping=damping), MFAC(4, damping=damping)
    for g in G:
        single.update(tensor(g))
    block.update(tensor(G))
    for mfac in (single, block):
        assert far(mfac.solve(tensor(v)), np.linalg.solve(F, v)) < 1e-11
    P, made, at = problem("ridge")
    mfac = MFAC(4, damping=damping)
    mfac.update(tensor(G[:, :5]))
    y = P.exact(at).y
    kept = kept[:, :5]
    F = damping * np.eye(5) + kept.T @ kept / len(kept)
    q = np.linalg.solve(F, P.C.T @ (P.C @ y - P.c))
    found = hypergradient(made, tensor(at), tensor(y), adjoint=mfac)
    solve = ArgminLayer(made, init=torch.zeros(5, dtype=F64), adjoint=mfac)
    assert far(torch.func.jacrev(solve)(tensor(at)), -np.linalg.inv(F) * (np.exp(at) * y)) < 1e-8
    assert far(found.adjoint, q) < 1e-11 and far(found.grad, P.rho * at - np.exp(at) * y * q) < 1e-11


def test_mfac_refuses() -> None:
    for rank in (0, -1, 2.5, True, None):
        with pytest.raises((ValueError, TypeError), match="rank"):
            MFAC(rank)  # type: ignore[arg-type]
    for damping in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="damping"):
            MFAC(2, damping=damping)
    mfac = MFAC(2, damping=0.1)
    mfac.update(torch.ones(3, 4))
    with pytest.raises(ValueError, match="gradients"):
        mfac.update(torch.ones(3, 5))
    with pytest.raises(ValueError, match="v"):
        mfac.solve(torch.ones(5))


def test_mfac_without_a_gradient() -> None:
    """No rows: v / damping, or a clear error; not garbage."""
    v = torch.arange(3, dtype=F64)
    try:
        assert far(MFAC(4, damping=0.1).solve(v), v / 0.1) < 1e-14
    except (ValueError, RuntimeError) as error:
        assert "update" in str(error) or "gradient" in str(error)


def test_mfac_small_damping() -> None:
    """Condition 1e10: the m x m system still gives six digits, also for gradients in float32."""
    r = np.random.default_rng(0)
    G, v = r.normal(size=(8, 20)), r.normal(size=20)
    for dtype, tol in ((F64, 1e-6), (torch.float32, 1e-2)):
        mfac = MFAC(8, damping=1e-5)
        mfac.update(tensor(G, dtype))
        kept = np.asarray(tensor(G, dtype), dtype=np.float64)
        F = 1e-5 * np.eye(20) + kept.T @ kept / 8
        found = mfac.solve(tensor(v, dtype))
        assert found.dtype == dtype
        assert far(found, np.linalg.solve(F, np.asarray(tensor(v, dtype), dtype=np.float64))) < tol


# ----------------------------------------------------------------------------------------- inexact y, warm start, float


@pytest.mark.parametrize("name", ["ridge", "logistic", "net", "equal"])
def test_warm_start(name: str) -> None:
    """The same result; nothing to do from the answer; fewer steps from a neighbour's answer."""
    P, made, at = problem(name)
    x, y = tensor(at), tensor(P.exact(at).y)
    cold = hypergradient(made, x, y)
    again = hypergradient(made, x, y, init=cold.adjoint)
    assert far(again.grad, cold.grad) < 1e-8 and int(again.steps) <= 1
    near = at + 1e-5
    moved = hypergradient(made, tensor(near), tensor(P.exact(near).y), init=cold.adjoint)
    assert far(moved.grad, P.exact(near).gradient) < 1e-8
    wrong = hypergradient(made, x, y, init=100 * torch.ones_like(cold.adjoint))
    assert far(wrong.grad, cold.grad) < 1e-7


def test_warm_start_saves_steps() -> None:
    """Forty unknowns, condition 1e4, x moved by 1e-6: at most half of the steps."""
    r = np.random.default_rng(4)
    P = Ridge(
        np.linalg.qr(r.normal(size=(40, 40)))[0] * np.logspace(-1, 1, 40), *(r.normal(size=s) for s in (40, (7, 40), 7))
    )
    at = np.full(40, -8.0)
    made = Bilevel(P.upper, P.lower)
    cold = hypergradient(made, tensor(at), tensor(P.exact(at).y), adjoint=Implicit(CG(rtol=1e-6)))
    near = at + 1e-6
    y = tensor(P.exact(near).y)
    moved = hypergradient(made, tensor(near), y, adjoint=Implicit(CG(rtol=1e-6)), init=cold.adjoint)
    assert int(moved.steps) * 2 <= int(cold.steps), (int(moved.steps), int(cold.steps))


@pytest.mark.parametrize("error", [1e-1, 1e-3, 1e-6])
def test_error_bound_of_an_early_stop(error: float) -> None:
    """The bound of the page holds, the reported stationarity is its certificate, and it is not vacuous."""
    P, made, at = problem("ridge")
    exact = P.exact(at)
    for seed in range(5):
        step = np.random.default_rng(seed).normal(size=5)
        y = exact.y + error * step / np.linalg.norm(step)
        found = hypergradient(made, tensor(at), tensor(y), adjoint=Implicit(CG(rtol=TIGHT)))
        gradient = np.linalg.norm(P.hessian_yy(at) @ y - P.A.T @ P.b)
        assert abs(float(found.stationarity) - gradient) < 1e-10 * (1 + gradient)
        off = np.linalg.norm(found.grad.numpy() - exact.gradient)
        assert off <= bound(P, at, y, float(found.stationarity), float(found.residual)) + 1e-12
        assert off > 1e-4 * error


@pytest.mark.parametrize("name", ["ridge", "logistic", "net", "equal"])
def test_float32(name: str) -> None:
    P, made, at = problem(name)
    exact = P.exact(at)
    found = hypergradient(made, tensor(at, torch.float32), tensor(exact.y, torch.float32))
    assert found.grad.dtype == found.adjoint.dtype == torch.float32
    assert far(found.grad, exact.gradient) < 1e-3


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_scale_of_the_upper_objective(scale: float) -> None:
    P, _, at = problem("ridge")
    exact = P.exact(at)
    made = Bilevel(lambda x, y, b: scale * P.upper(x, y), P.lower)
    assert far(hypergradient(made, tensor(at), tensor(exact.y)).grad, scale * exact.gradient) < 1e-8
    made = Bilevel(P.upper, lambda x, y, b: scale * P.lower(x, y))
    assert far(hypergradient(made, tensor(at), tensor(exact.y)).grad, exact.gradient) < 1e-8


# --------------------------------------------------------------------------------------------------------- bad input


def test_not_scalar() -> None:
    P, _, at = problem("ridge")
    x, y = tensor(at), tensor(P.exact(at).y)
    wrong: list[tuple[Callable[..., Any], str]] = [
        (lambda x, y, b: y**2, "vector"),
        (lambda x, y, b: (y**2).sum()[None], "one entry"),
        (lambda x, y, b: 1.0, "a float"),
        (lambda x, y, b: None, "nothing"),
        (lambda x, y, b: y.sum().to(torch.complex128), "complex"),
        (lambda x, y, b: y.sum().long(), "integer"),
    ]
    for function, _ in wrong:
        with pytest.raises((ValueError, TypeError), match="lower"):
            hypergradient(Bilevel(P.upper, function), x, y)
        with pytest.raises((ValueError, TypeError), match="upper"):
            hypergradient(Bilevel(function, P.lower), x, y)


def test_nan_is_reported() -> None:
    P, made, at = problem("ridge")
    x, y = tensor(at), tensor(P.exact(at).y)
    bad = y.clone()
    bad[1] = torch.nan
    with pytest.raises((SolveError, ValueError), match="y"):
        hypergradient(made, x, bad)
    found = hypergradient(made, x, bad, on_failure="ignore")
    assert bool(found.failed)
    stationary = y.clone()
    hessian = Bilevel(P.upper, lambda x, y, b: P.lower(x, y) + (y - stationary).abs().sqrt().sum())
    with pytest.raises((SolveError, ValueError)):
        hypergradient(hessian, x, y)


def test_leaves_its_arguments_alone() -> None:
    """No .grad, no graph, no in-place edit, works under no_grad and inference data, requires_grad as before."""
    P, made, at = problem("ridge")
    exact = P.exact(at)
    x, y = tensor(at).clone().requires_grad_(), tensor(exact.y).clone().requires_grad_()
    with torch.no_grad():
        quiet = hypergradient(made, x, y)
    found = hypergradient(made, x, y)
    assert far(quiet.grad, exact.gradient) < 1e-8 and far(found.grad, exact.gradient) < 1e-8
    assert x.grad is None and y.grad is None and x.requires_grad and y.requires_grad
    assert torch.equal(x, tensor(at)) and torch.equal(y, tensor(exact.y))
    assert not found.grad.requires_grad and not found.adjoint.requires_grad


def test_same_tensor_in_both_places() -> None:
    """x and y that are one object, a leaf of x twice: each place counts on its own."""
    one = torch.tensor([1.0, 2.0], dtype=F64)
    made = Bilevel(lambda x, y, b: (y**2).sum() / 2, lambda x, y, b: ((y - x[0] * x[1]) ** 2).sum() / 2)
    root = torch.tensor([2.0, 3.0], dtype=F64)
    found = hypergradient(made, [root, root], root**2)
    assert far(found.grad[0], root**3) < 1e-12 and far(found.grad[1], root**3) < 1e-12
    same = Bilevel(lambda x, y, b: (y**2).sum(), lambda x, y, b: 0.5 * ((y - x) ** 2).sum())
    assert far(hypergradient(same, one, one).grad, 2 * one) < 1e-14


def test_inference_mode() -> None:
    """Tensors made in inference mode record nothing: the right gradient, or an error, but no zeros."""
    P, made, at = problem("ridge")
    exact = P.exact(at)
    with torch.inference_mode():
        x, y = tensor(at).clone(), tensor(exact.y).clone()
        try:
            found = hypergradient(made, x, y).grad.numpy()
        except (RuntimeError, ValueError) as error:
            assert "inference" in str(error)
            return
    assert far(found, exact.gradient) < 1e-8


def test_mfac_and_nan() -> None:
    """A gradient that is NaN is refused by name, or gives NaN; the linear algebra below does not speak."""
    mfac = MFAC(3, damping=0.1)
    try:
        mfac.update(torch.full((4,), torch.nan))
        assert torch.isnan(mfac.solve(torch.ones(4))).any()
    except (ValueError, SolveError) as error:
        assert "gradient" in str(error)
