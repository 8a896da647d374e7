"""Plug-and-play restoration: against known minimisers, its descent inequality, its conditions, its derivatives."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

from difflayers import SolveError, SolveWarning, Status, trace
from difflayers.linalg import CG, LU
from difflayers.proximal import ADMM, HQS, InputConvexNetwork, LearnedProximal, ProximalGradient, prox_l1, restore

F64 = torch.float64
N, M, COUNT = 6, 4, 3
SOLVERS = [ProximalGradient(max_steps=5000), ADMM(max_steps=5000), HQS(max_steps=5000)]
EVERY = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)


class Matrix(nn.Module):
    """A linear operator with parameters."""

    def __init__(self, rows: int = M) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(rows, N, dtype=F64) / 2)

    def forward(self, x):
        return x @ self.A.mT


def network(shape=N, mu: float = 0.2, scale: float = 2.0, **options) -> LearnedProximal:
    options = {"hidden": 8, "layers": 1, "strong_convexity": mu} | options
    prox = LearnedProximal(InputConvexNetwork(shape, **options)).double()
    with torch.no_grad():  # an untrained network is almost constant
        for p in prox.parameters():
            p.mul_(scale)
    return prox


def soft(x):
    return prox_l1(x, 0.1)


def setup() -> dict:
    return {"init": torch.zeros(COUNT, N, dtype=F64)}


# ------------------------------------------------------------------------------------------------------ known solutions


@pytest.mark.parametrize(
    "solver", [ProximalGradient(rtol=1e-9, max_steps=20_000), ADMM(rtol=1e-9, max_steps=20_000)], ids=["pgd", "admm"]
)
def test_lasso_against_scikit_learn(solver):
    from sklearn.linear_model import Lasso

    operator, b = Matrix(30), torch.randn(COUNT, 30, dtype=F64)
    with torch.no_grad():
        found = restore(b, operator, soft, solver=solver, **setup())
    assert bool(found.converged.all())
    A, weight = operator.A.detach().numpy(), 0.1 / float(found.eta[0])
    for x, y in zip(found.value.numpy(), b.numpy(), strict=True):
        expected = Lasso(alpha=weight / 30, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(A, y).coef_
        np.testing.assert_allclose(x, expected, atol=1e-6)


def test_half_quadratic_splitting_solves_its_smoothed_problem():
    operator, b = Matrix(), torch.randn(COUNT, M, dtype=F64)
    with torch.no_grad():
        z = restore(b, operator, soft, solver=HQS(penalty=0.7, max_steps=5000), **setup()).value
        A = operator.A
        x = torch.linalg.solve(A.mT @ A + 0.7 * torch.eye(N, dtype=F64), (b @ A + 0.7 * z).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(z, soft(x), rtol=1e-7, atol=1e-9)


def test_proximal_gradients_and_admm_agree_where_step_and_penalty_do():
    operator, prox, b = Matrix(), network(), torch.randn(COUNT, M, dtype=F64)
    norm = float(torch.linalg.matrix_norm(operator.A.detach(), 2) ** 2)
    with torch.no_grad():
        one = restore(b, operator, prox, solver=ProximalGradient(step=0.5 / norm, max_steps=5000), **setup())
        two = restore(b, operator, prox, solver=ADMM(penalty=2 * norm, max_steps=5000), **setup())
        dense = ADMM(penalty=2 * norm, linear_solver=LU(), max_steps=5000)
        three = restore(b, operator, prox, solver=dense, **setup())
    torch.testing.assert_close(two.value, one.value, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(three.value, one.value, rtol=1e-7, atol=1e-8)


# ----------------------------------------------------------------------------------------------- the paper's conditions


def test_descent_inequality():
    operator, prox, b = Matrix(), network(), 3 * torch.randn(COUNT, M, dtype=F64)
    norm = torch.linalg.matrix_norm(operator.A.detach(), 2) ** 2
    for step in (0.2, 0.95):
        eta = step / float(norm)
        with torch.no_grad():
            found = restore(b, operator, prox, solver=ProximalGradient(step=eta, max_steps=5000), **setup())
        F_k, move = found.objectives, found.residuals
        slack = F_k[:-1] - (1 - step) / 2 * move[1:].square() - F_k[1:]
        assert float(slack.min()) >= -1e-12
        assert bool((F_k.diff(dim=0) <= 1e-12).all())
        with torch.no_grad():
            expected = eta / 2 * (operator(found.value) - b).square().sum(-1) + prox.prior(found.value)
        torch.testing.assert_close(F_k[-1], expected)


def test_residual_falls_monotonically_with_a_nonexpansive_prox():
    operator, b = Matrix(), 3 * torch.randn(COUNT, M, dtype=F64)
    with torch.no_grad():
        found = restore(b, operator, soft, solver=SOLVERS[0], **setup())
    assert bool((found.residuals.diff(dim=0) <= 1e-12).all())
    assert float(found.residuals[-1].max()) <= 1e-9


def test_every_objective_falls():
    operator, prox, b = Matrix(), network(), 3 * torch.randn(COUNT, M, dtype=F64)
    for solver in SOLVERS:
        with torch.no_grad():
            found = restore(b, operator, prox, solver=solver, **setup())
        assert found.objectives.shape == found.residuals.shape == (int(found.steps.max()), COUNT)
        assert bool((found.objectives.diff(dim=0) <= 1e-9).all()), type(solver).__name__
    prior = lambda x: 0.1 * x.abs().sum(-1)  # noqa: E731
    assert restore(b, operator.requires_grad_(False), soft, solver=SOLVERS[0], **setup()).objectives is None
    found = restore(b, operator, soft, prior=prior, solver=SOLVERS[0], **setup())
    torch.testing.assert_close(
        found.objectives[-1], found.eta / 2 * (operator(found.value) - b).square().sum(-1) + prior(found.value)
    )


def test_norm_is_found_for_every_element():
    scale = torch.tensor([1.0, 3.0, 0.0], dtype=F64)
    found = restore(torch.randn(3, N, dtype=F64), lambda x: scale[:, None] * x, soft)
    torch.testing.assert_close(found.norm, scale.square(), rtol=1e-2, atol=0)
    torch.testing.assert_close(found.eta[:2], 0.9 / found.norm[:2])
    operator = Matrix(30).requires_grad_(False)
    found = restore(torch.randn(30, dtype=F64), operator, soft, init=torch.zeros(N, dtype=F64))
    torch.testing.assert_close(found.norm, torch.linalg.matrix_norm(operator.A, 2) ** 2, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("solver", "match"),
    [
        (ProximalGradient(step=1.2), r"step=1\.2: expected less than 1 / \|\|A\^T A\|\|, got .* = 1 in 3 of 3"),
        (ADMM(penalty=0.5), r"penalty=0\.5: expected more than \|\|A\^T A\|\|"),
    ],
)
def test_a_step_that_breaks_the_condition_warns(solver, match):
    b = torch.randn(COUNT, N, dtype=F64)
    with pytest.warns(SolveWarning, match=match):
        restore(b, lambda x: 1.0 * x, soft, solver=solver)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore(b, lambda x: 1.0 * x, soft, solver=solver, on_failure="ignore")
        restore(b, lambda x: 1.0 * x, soft, solver=type(solver)())


def test_a_step_that_is_much_too_long_diverges_and_says_so():
    b = torch.randn(COUNT, N, dtype=F64)
    with pytest.warns(SolveWarning), pytest.raises(SolveError, match="3 of 3 batch elements failed"):
        restore(b, lambda x: 2.0 * x, lambda x: x, solver=ProximalGradient(step=2.0), init=0 * b)
    with pytest.warns(SolveWarning, match="stopped after 2 steps"):
        found = restore(b, lambda x: 2.0 * x, soft, solver=ProximalGradient(max_steps=2))
    assert found.status.tolist() == [Status.MAX_STEPS] * 3


# -------------------------------------------------------------------------------------------------------------- batches


@EVERY
def test_elements_do_not_see_each_other(solver):
    operator, prox, b = Matrix(), network(), torch.randn(COUNT, M, dtype=F64)
    b[1] *= 100  # takes another number of steps
    with torch.no_grad():
        together = restore(b, operator, prox, solver=solver, **setup())
        for i in range(COUNT):
            alone = restore(b[i], operator, prox, solver=solver, init=torch.zeros(N, dtype=F64))
            assert int(alone.steps) == int(together.steps[i])
            torch.testing.assert_close(alone.value, together.value[i], rtol=1e-12, atol=1e-13)
        spoilt = b.clone()
        spoilt[1, 0] = torch.nan
        found = restore(spoilt, operator, prox, solver=solver, on_failure="nan", **setup())
    assert bool(found.value[1].isnan().all()) and found.status[1] == Status.DIVERGED
    torch.testing.assert_close(found.value[::2], together.value[::2], rtol=0, atol=0)
    with pytest.raises(ValueError, match="observation: expected finite numbers, got 1 NaN"):
        restore(spoilt, operator, prox, solver=solver, **setup())


def test_images_with_one_mask_for_each_and_further_batch_dimensions():
    prox = network((1, 6, 5), hidden=4)
    mask = (torch.rand(2, 1, 6, 5, dtype=F64) < 0.7).double()
    b = mask * torch.randn(2, 1, 6, 5, dtype=F64)
    with torch.no_grad():
        found = restore(b, lambda x: mask * x, prox).value
        mapped = vmap(lambda b: restore(b, lambda x: mask * x, prox).value)(torch.stack([b, 2 * b]))
    torch.testing.assert_close(mapped[0], found, rtol=1e-9, atol=1e-10)
    wide = b.expand(3, *b.shape)
    torch.testing.assert_close(restore(wide, lambda x: mask * x, prox.requires_grad_(False)).value[1], found)
    assert restore(b[:0], lambda x: x, prox).value.shape == (0, 1, 6, 5)
    kernel = torch.ones(1, 1, 3, 3, dtype=F64) / 9
    blurred = restore(b, lambda x: F.conv2d(x, kernel, padding=1), prox)
    assert bool(blurred.converged.all())


# ---------------------------------------------------------------------------------------------------------- derivatives


@EVERY
def test_derivative_in_observation_operator_and_prox(solver):
    operator, prox, b = Matrix(), network(scale=1.0), torch.randn(COUNT, M, dtype=F64).requires_grad_()
    step = 0.5 / float(torch.linalg.matrix_norm(operator.A.detach(), 2) ** 2)
    fixed = {"step": step} if isinstance(solver, ProximalGradient) else {"penalty": 1 / step}
    solver = type(solver)(max_steps=5000, **fixed)
    bias = prox.potential.skips[0].bias

    def value(*_):
        return restore(b, operator, prox, solver=solver, **setup()).value

    assert torch.autograd.gradcheck(value, (b, operator.A, bias), fast_mode=True, atol=1e-6)
    assert torch.autograd.gradgradcheck(value, (b, operator.A, bias), fast_mode=True, atol=1e-5)


def test_derivative_costs_one_adjoint_solve_and_no_steps():
    operator, prox, b = Matrix(), network(), torch.randn(COUNT, M, dtype=F64)
    with trace() as solves:
        restore(b, operator, prox, **setup()).value.sum().backward()
    assert [s.phase for s in solves] == ["forward", "adjoint"]
    assert all(p.grad is not None for p in (*operator.parameters(), *prox.parameters()))


def test_given_adjoint_is_used_and_checked():
    operator, prox, b = Matrix(), network(), torch.randn(COUNT, M, dtype=F64)
    A = operator.A.detach()
    with torch.no_grad():
        expected = restore(b, operator, prox, **setup())
        found = restore(b, operator, prox, adjoint=lambda r: r @ A)  # its result has the shape of the start
        torch.testing.assert_close(found.value, expected.value, rtol=1e-7, atol=1e-8)
        with pytest.raises(ValueError, match=r"adjoint: expected the adjoint of the operator, got one with <A v, A v>"):
            restore(b, operator, prox, adjoint=lambda r: 2 * r @ A)


def test_captured_tensors_are_refused():
    operator, prox, b = Matrix(), network(), torch.randn(COUNT, M, dtype=F64)
    weight = torch.tensor(0.1, dtype=F64, requires_grad=True)
    with pytest.raises(ValueError, match=r"operator: .*captures"):
        restore(b, lambda x: operator(x), prox, **setup())
    with pytest.raises(ValueError, match=r"prox: .*captures"):
        restore(b, operator, lambda x: prox_l1(x, weight), **setup())
    with torch.no_grad():
        restore(b, lambda x: operator(x), lambda x: prox_l1(x, weight), **setup())


# ------------------------------------------------------------------------------------------------------------ bad input


def test_bad_input_is_refused():
    b, x = torch.randn(COUNT, N), torch.randn(COUNT, N)
    identity = lambda x: 1.0 * x  # noqa: E731
    for options, match in [
        ({"operator": lambda x: x + 1}, "operator: expected a linear map, got one that maps zero to something else"),
        ({"operator": lambda x: x[:, :2]}, "init: expected a start, since the operator changes the shape"),
        ({"operator": None}, "operator: expected a callable, got NoneType"),
        ({"prox": None}, "prox: expected a callable"),
        ({"prox": lambda x: x[:, :2]}, "prox output: expected shape"),
        ({"init": x.double()}, r"init: expected dtype torch\.float32"),
        ({"init": x[:2]}, "observation: expected shape"),
        ({"event_ndim": 3}, "event_ndim: expected at most the 2 dimensions"),
        ({"solver": CG()}, "solver: expected ProximalGradient, ADMM or HQS, got CG"),
        ({"on_failure": "maybe"}, "on_failure"),
        ({"observation": b.long()}, "observation: expected a floating-point tensor"),
    ]:
        with pytest.raises(ValueError, match=match):
            restore(**({"observation": b, "operator": identity, "prox": soft} | options))
    for kind, options in [
        (ProximalGradient, {"step": 0.0}),
        (ADMM, {"penalty": -1.0}),
        (HQS, {"penalty": float("nan")}),
        (ADMM, {"rtol": -1.0}),
        (ADMM, {"max_steps": 0}),
    ]:
        with pytest.raises(ValueError, match=rf"{next(iter(options))}: expected"):
            kind(**options)


def test_float32_and_bfloat16_keep_their_dtype():
    prox, b = network(mu=0.3).float(), torch.randn(COUNT, N)
    single = restore(b, lambda x: 0.5 * x, prox)
    assert single.value.dtype == torch.float32 and bool(single.converged.all())
    half = restore(b.bfloat16(), lambda x: 0.5 * x, prox)
    assert half.value.dtype == torch.bfloat16
    torch.testing.assert_close(half.value.float(), single.value, rtol=0.02, atol=0.02)


class OneStrongEntry(nn.Module):
    """A diagonal operator; the start of the power iteration has little of its largest mode."""

    def __init__(self, n, strong):
        super().__init__()
        self.register_buffer("scale", torch.ones(n, dtype=F64))
        self.scale[n // 3] = strong**0.5

    def forward(self, x):
        return self.scale * x


def test_norm_of_an_operator_with_one_strong_entry():
    operator, b = OneStrongEntry(4096, 2.5), torch.randn(1, 4096, dtype=F64)
    found = restore(b, operator, lambda x: prox_l1(x, 0.01))
    torch.testing.assert_close(found.norm, torch.tensor([2.5], dtype=F64), rtol=1e-3, atol=0)
    with pytest.warns(SolveWarning, match="step=0.6"):
        restore(b, operator, lambda x: prox_l1(x, 0.01), solver=ProximalGradient(step=0.6))


def test_norm_of_one_element_does_not_depend_on_another():
    masks = torch.stack([torch.rand(12, dtype=F64) + 0.2, torch.linspace(1, 1.02, 12, dtype=F64)])
    b = torch.randn(2, 12, dtype=F64)
    both = restore(b, lambda x: masks * x, lambda x: prox_l1(x, 0.1))
    for i in range(2):
        alone = restore(b[i], lambda x, i=i: masks[i] * x, lambda x: prox_l1(x, 0.1), event_ndim=1)
        assert both.norm[i] == alone.norm
        torch.testing.assert_close(both.value[i], alone.value, rtol=1e-12, atol=1e-12)


def test_blur_that_is_not_flipped_is_no_adjoint():
    kernel = torch.tensor([[[0.7, 0.2, 0.1]]], dtype=F64)

    def blur(x):
        return nn.functional.conv1d(x[:, None], kernel, padding=1)[:, 0]

    with pytest.raises(ValueError, match="adjoint"):
        restore(torch.randn(2, 64, dtype=F64), blur, lambda x: prox_l1(x, 0.05), adjoint=blur)
