"""Mirror Sinkhorn and rounding to the transport polytope.

Oracles, written down before the code: scipy's linprog and linear_sum_assignment for linear objectives, cvxpy with
Clarabel for quadratic ones; the iteration on the plan itself, without logarithms, as the paper has it; the bound of
Altschuler et al. for rounding; for the regularised problem differences of a solution by Newton's method.
"""

import math

import cvxpy
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor
from torch.func import vmap

from difflayers import SolveError, Status
from difflayers.implicit import root_find
from difflayers.transport import mirror_sinkhorn, mirror_sinkhorn_ex, round_to_polytope, sinkhorn

D = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def unit(*shape: int, seed: int = 0) -> Tensor:
    t = rand(*shape, seed=seed) + 0.1
    return t / t.sum(-1, keepdim=True)


def off(P: Tensor, a: Tensor, b: Tensor) -> float:
    return float(torch.cat([(P.sum(-1) - a).abs(), (P.sum(-2) - b).abs()], -1).max())


def linear_optimum(C: Tensor, a: Tensor, b: Tensor) -> float:
    n, m = C.shape
    rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    found = linprog(C.flatten().numpy(), A_eq=np.vstack([rows, columns]), b_eq=torch.cat([a, b]).numpy())
    return found.fun


def quadratic_optimum(Q: Tensor, T: Tensor, a: Tensor, b: Tensor) -> tuple[float, np.ndarray]:
    """Of ``1/2 sum Q (P - T)^2``, with numbers of order 1 for the solver."""
    size = float(T.numel())
    P = cvxpy.Variable(T.shape, nonneg=True)
    F = cvxpy.sum(cvxpy.multiply(Q.numpy() / size, cvxpy.square(P - size * T.numpy()))) / 2
    problem = cvxpy.Problem(
        cvxpy.Minimize(F), [cvxpy.sum(P, 1) == size * a.numpy(), cvxpy.sum(P, 0) == size * b.numpy()]
    )
    problem.solve(cvxpy.CLARABEL)
    return problem.value / size, P.value / size


# ------------------------------------------------------------------------------------------------------- convergence

STEPS = tuple(100 * 2**k for k in range(6))


def slope(gaps: list[float]) -> float:
    """Of the gap against the number of steps, both in the logarithm."""
    return float(np.polyfit(np.log(STEPS), np.log(gaps), 1)[0])


def noisy(gradient, noise: float, seed: int = 5):
    generator = torch.Generator().manual_seed(seed)
    return lambda P, t: gradient(P) + noise * torch.randn(P.shape, generator=generator, dtype=D)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_linear_objective(noise):
    """The gap falls like 1 / sqrt(steps) or faster; n = 50 and costs in [0, 1]."""
    n = 50
    C, a = rand(n, n), torch.full((n,), 1 / n, dtype=D)
    best = float(C[linear_sum_assignment(C.numpy())].mean())
    gaps = []
    for steps in STEPS:
        P = mirror_sinkhorn(noisy(lambda _: C, noise), a, a, steps=steps, step_size=3.0)
        assert off(P, a, a) < 1e-15 and bool((P >= 0).all())
        gaps.append(float((C * P).sum()) - best)
    assert min(gaps) > -1e-15
    assert slope(gaps) < -0.5
    assert gaps[-1] < 0.1 * gaps[0] + 1e-3


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_quadratic_objective(noise):
    n = 50
    Q, T, a, b = n**2 * rand(n, n), 2 * rand(n, n, seed=1) / n**2, unit(n, seed=2), unit(n, seed=3)
    best, _ = quadratic_optimum(Q, T, a, b)
    gaps = []
    for steps in STEPS:
        P = mirror_sinkhorn(noisy(lambda P: Q * (P - T), noise), a, b, steps=steps, step_size=3.0)
        gaps.append(float((Q * (P - T).square()).sum() / 2) - best)
    assert min(gaps) > -1e-8
    assert slope(gaps) < -0.5
    assert gaps[-1] < 0.1 * gaps[0]


def test_small_problems_with_unequal_masses():
    C, a, b = rand(6, 4), 1.7 * unit(6, seed=1), 1.7 * unit(4, seed=2)
    P = mirror_sinkhorn(lambda P, t: C, a, b, steps=4000, step_size=5.0)
    best = linear_optimum(C, a, b)
    assert -1e-12 < float((C * P).sum()) - best < 1e-2 * best
    Q, T = 24 * (0.5 + rand(6, 4, seed=3)), unit(24, seed=4).view(6, 4)
    _, expected = quadratic_optimum(Q, T, a, b)
    P = mirror_sinkhorn(lambda P, t: Q * (P - T), a, b, steps=4000, step_size=1.0)
    assert float((P - torch.from_numpy(expected)).abs().max()) < 2e-2 * expected.max()


# --------------------------------------------------------------------------------------------------------- the paper


@pytest.mark.parametrize("averaging", [0.0, 1.0])
def test_iterates_are_those_of_the_paper(averaging):
    """On the plan itself; step sizes by number and by function."""
    C, a, b = rand(5, 3), unit(5, seed=1), unit(3, seed=2)
    P, total, weights = a[:, None] * b, 0.0, 0.0
    seen = []
    for t in range(37):
        seen.append(P)
        P = P * torch.exp(-2 / math.sqrt(t + 1) * (C + P))
        P = P * (a / P.sum(1))[:, None] if t % 2 == 0 else P * (b / P.sum(0))
        total, weights = total + (t + 1) ** averaging * P, weights + (t + 1) ** averaging
    mean, passed = total / weights, []

    def gradient(P: Tensor, t: int) -> Tensor:
        passed.append((P, t))
        return C + P

    options = {"steps": 37, "averaging": averaging}
    found = mirror_sinkhorn_ex(gradient, a, b, step_size=2.0, **options)
    assert torch.allclose(found.value, round_to_polytope(mean, a, b), atol=1e-14)
    assert abs(float(found.residual) - float((mean.sum(1) - a).abs().sum() + (mean.sum(0) - b).abs().sum())) < 1e-14
    assert int(found.steps) == 37 and int(found.status) == Status.CONVERGED
    assert [t for _, t in passed] == list(range(37))
    assert max(float((P - Q).abs().max()) for (P, _), Q in zip(passed, seen, strict=True)) < 1e-14
    same = mirror_sinkhorn(gradient, a, b, step_size=lambda t: 2 / math.sqrt(t + 1), **options)
    assert torch.equal(same, found.value)


# ------------------------------------------------------------------------------------------------------------ batches


def test_elements_of_a_batch_are_alone():
    C, a, b = rand(3, 4, 5), unit(3, 4, seed=1), unit(5, seed=2)
    sizes = torch.tensor([0.5, 2.0, 8.0], dtype=D)
    found = mirror_sinkhorn(lambda P, t: C + P, a, b, steps=50, step_size=sizes)
    mapped = vmap(lambda C, a, s: mirror_sinkhorn(lambda P, t: C + P, a, b, steps=50, step_size=s))(C, a, sizes)
    for k in range(3):
        alone = mirror_sinkhorn(lambda P, t, k=k: C[k] + P, a[k], b, steps=50, step_size=float(sizes[k]))
        assert torch.allclose(found[k], alone, atol=1e-15) and torch.allclose(mapped[k], alone, atol=1e-15)
    shared = mirror_sinkhorn(lambda P, t: C, a[0], b, steps=50, step_size=1.0)  # costs alone make the batch
    assert shared.shape == (3, 4, 5) and off(shared, a[0], b) < 1e-15
    empty = mirror_sinkhorn(lambda P, t: P, a[:0], b, steps=3, step_size=1.0)
    assert empty.shape == (0, 4, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step_size", [1e-8, 1e3, 1e8])
def test_no_step_is_too_long(dtype, step_size):
    C, a, b = rand(6, 5).to(dtype), unit(6, seed=1).to(dtype), unit(5, seed=2).to(dtype)
    P = mirror_sinkhorn(lambda P, t: C, a, b, steps=100, step_size=step_size)
    assert P.dtype == dtype and bool(torch.isfinite(P).all()) and bool((P >= 0).all())
    assert off(P, a, b) < 10 * torch.finfo(dtype).eps


def test_half_precision_is_lifted():
    C, a = rand(4, 4).bfloat16(), torch.full((4,), 0.25).bfloat16()
    P = mirror_sinkhorn(lambda P, t: C + P, a, a, steps=200, step_size=2.0)
    exact = mirror_sinkhorn(lambda P, t: C.double() + P, a.double(), a.double(), steps=200, step_size=2.0)
    assert P.dtype == torch.bfloat16 and float((P.double() - exact).abs().max()) < 4e-3


def test_zero_masses_and_forbidden_entries():
    C = rand(4, 3)
    a, b = torch.tensor([0.5, 0, 0.3, 0.2], dtype=D), torch.tensor([0.6, 0.4, 0], dtype=D)
    forbidden = C.clone()
    forbidden[0, 0] = torch.inf
    P = mirror_sinkhorn(lambda P, t: forbidden, a, b, steps=400, step_size=2.0)
    assert bool((P[1] == 0).all() and (P[:, 2] == 0).all()) and off(P, a, b) < 1e-15
    rest = forbidden[[0, 2, 3]][:, :2]
    alone = mirror_sinkhorn(lambda P, t: rest, a[[0, 2, 3]], b[:2], steps=400, step_size=2.0)
    assert torch.allclose(P[[0, 2, 3]][:, :2], alone, atol=1e-15)
    entropic = mirror_sinkhorn(lambda P, t: C + 0.1 * P.log(), a, b, steps=50, step_size=1.0)  # -inf where P is zero
    assert off(entropic, a, b) < 1e-15
    nothing = mirror_sinkhorn(lambda P, t: C, a * 0, b * 0, steps=5, step_size=1.0)
    assert bool((nothing == 0).all())
    # in a full polytope rounding may put a little where it is forbidden
    a, b = unit(4, seed=3), unit(3, seed=4)
    found = mirror_sinkhorn_ex(lambda P, t: forbidden, a, b, steps=200, step_size=10.0)
    assert 0 <= found.value[0, 0] <= found.residual


def test_failures():
    C, a = rand(2, 3, 3), torch.full((3,), 1 / 3, dtype=D)
    C[1, 0, 0] = torch.nan
    with pytest.raises(SolveError, match="mirror_sinkhorn") as failure:
        mirror_sinkhorn(lambda P, t: C, a, a, steps=3, step_size=1.0)
    assert failure.value.solution.status.tolist() == [Status.CONVERGED, Status.DIVERGED]
    P = mirror_sinkhorn(lambda P, t: C, a, a, steps=3, step_size=1.0, on_failure="nan")
    assert bool(torch.isnan(P[1]).all())
    assert torch.equal(P[0], mirror_sinkhorn(lambda P, t: C[0], a, a, steps=3, step_size=1.0))
    assert mirror_sinkhorn_ex(lambda P, t: C, a, a, steps=3, step_size=1.0).failed.tolist() == [False, True]
    C[1, 0] = torch.inf  # a whole row
    with pytest.raises(SolveError):
        mirror_sinkhorn(lambda P, t: C, a, a, steps=3, step_size=1.0)


def test_nothing_is_differentiated_and_the_gradient_may_use_autograd():
    target, a = rand(3, 3).requires_grad_(), torch.full((3,), 1 / 3, dtype=D, requires_grad=True)

    def by_hand(P: Tensor, t: int) -> Tensor:
        return P - target

    def by_autograd(P: Tensor, t: int) -> Tensor:
        P.requires_grad_()
        return torch.autograd.grad(((P - target) ** 2).sum() / 2, P)[0]

    P, Q = (mirror_sinkhorn(f, a, a, steps=20, step_size=1.0) for f in (by_hand, by_autograd))
    assert not P.requires_grad and not Q.requires_grad
    assert torch.allclose(P, Q, atol=1e-15)

    def spoiling(P: Tensor, t: int) -> Tensor:
        G = by_hand(P, t).detach()
        P.zero_()  # what is handed over may be changed
        return G

    assert torch.equal(mirror_sinkhorn(spoiling, a, a, steps=20, step_size=1.0), P)


def test_regularised_problem_is_differentiated_through_its_gradient():
    """What the docstring says. The oracle: the derived linear system of the regularised problem, dense."""
    n, m, eps, k = 4, 3, 0.2, 3.0
    a, b, T = unit(n, seed=1), unit(m, seed=2), unit(n * m, seed=3).view(n, m).requires_grad_()
    weights = rand(n, m, seed=4)

    def optimality(G: Tensor, T: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return G - k * (sinkhorn(G, a, b, eps=eps) - T)

    G = root_find(optimality, torch.zeros(n, m, dtype=D), (T, a, b), event_ndim=2, arg_ndims=(2, 1, 1))
    P = sinkhorn(G, a, b, eps=eps)
    mirror = mirror_sinkhorn(
        lambda P, t: k * (P - T) + eps * (P / (a[:, None] * b)).log(), a, b, steps=2000, step_size=1.0
    )
    assert float((P - mirror).detach().abs().max()) < 1e-3
    (found,) = torch.autograd.grad((weights * P).sum(), T)
    # eps X / P + k X + alpha (+) beta = weights, X 1 = 0, X^T 1 = 0; the derivative in T is k X
    rows = torch.kron(torch.eye(n, dtype=D), torch.ones(1, m, dtype=D))
    columns = torch.kron(torch.ones(1, n, dtype=D), torch.eye(m, dtype=D))
    A = torch.cat([rows, columns])
    H = torch.diag(eps / P.detach().flatten() + k)
    system = torch.cat([torch.cat([H, A.T], 1), torch.cat([A, torch.zeros(n + m, n + m, dtype=D)], 1)])
    right = torch.cat([weights.flatten(), torch.zeros(n + m, dtype=D)])
    X = torch.linalg.lstsq(system, right, driver="gelsd").solution[: n * m].view(n, m)
    assert float((found - k * X).abs().max()) < 1e-8


# ----------------------------------------------------------------------------------------------------------- rounding


def test_rounding_is_near_and_exact():
    """Within twice the error of the sums, in L1 (Altschuler et al., lemma 7), and never negative."""
    for seed, scale in enumerate((0.1, 0.9, 1.0, 1.1, 10.0)):
        a, b = unit(7, 8, seed=seed), unit(7, 5, seed=seed + 50)
        P = scale * unit(7, 40, seed=seed + 99).view(7, 8, 5)
        R = round_to_polytope(P, a, b)
        error = (P.sum(-1) - a).abs().sum(-1) + (P.sum(-2) - b).abs().sum(-1)
        assert bool(((R - P).abs().sum((-2, -1)) <= 2 * error + 1e-14).all())
        assert off(R, a, b) < 1e-15 and bool((R >= 0).all())
        assert torch.allclose(round_to_polytope(R, a, b), R, atol=1e-15)


def test_rounding_in_single_precision_and_of_what_is_nearly_right():
    a, b = unit(300, seed=1).float(), unit(200, seed=2).float()
    P = sinkhorn(rand(300, 200).float(), a, b, eps=0.05)
    R = round_to_polytope(P, a, b)
    assert R.dtype == torch.float32 and off(R, a, b) < 1e-8 and float((R - P).abs().max()) < 1e-7
    negative = P.clone()
    negative[0, 0] = -1e-9
    assert float(round_to_polytope(negative, a, b).min()) >= 0


def test_rounding_spoils_no_other_element():
    P, a, b = rand(3, 4, 5), unit(4, seed=1).requires_grad_(), unit(5, seed=2)
    P[1, 0, 0] = torch.nan
    R = round_to_polytope(P, a, b)
    assert torch.isnan(R).flatten(1).all(1).tolist() == [False, True, False]
    (found,) = torch.autograd.grad(R[0].square().sum() + R[2].square().sum(), a)
    good = P[[0, 2]]
    (expected,) = torch.autograd.grad(round_to_polytope(good, a, b).square().sum(), a)
    assert torch.allclose(found, expected, atol=1e-15)


# -------------------------------------------------------------------------------------------------------- wrong calls

HALF = torch.tensor([0.5, 0.5], dtype=D)


def run(gradient=lambda P, t: P, a=HALF, b=HALF, **options):
    return mirror_sinkhorn(gradient, a, b, **({"steps": 3, "step_size": 1.0} | options))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: run(gradient=3), "gradient: expected a function"),
        (lambda: run(lambda P, t: 1.0), "gradient: expected a floating-point tensor, got float"),
        (lambda: run(lambda P, t: P[0]), "gradient: expected at least 2 dimensions"),
        (lambda: run(lambda P, t: P[:1]), r"gradient: expected shape \(2, 2\)"),
        (lambda: run(steps=0), "steps: expected an integer of at least 1, got 0"),
        (lambda: run(steps=2.5), "steps: expected an integer"),
        (lambda: run(step_size=0.0), "step_size: expected a finite number above 0"),
        (lambda: run(step_size="1"), "step_size: expected a finite number above 0"),
        (lambda: run(step_size=torch.tensor(-1.0, dtype=D)), "step_size: expected more than 0, got -1"),
        (lambda: run(step_size=torch.tensor([1.0, torch.nan], dtype=D)), "step_size: expected finite numbers"),
        (lambda: run(step_size=lambda t: None), "step_size: expected a function that returns numbers"),
        (lambda: run(lambda P, t: rand(2, 2, 2), step_size=torch.ones(3)), "step_size: expected batch dimensions"),
        (lambda: run(averaging=-1.0), "averaging: expected a finite number of at least 0"),
        (lambda: run(on_failure="what"), "on_failure: expected"),
        (lambda: run(a=HALF * 2), "a, b: expected equal totals"),
        (lambda: run(b=torch.tensor([1.5, -0.5], dtype=D)), "b: expected masses of at least 0"),
        (lambda: run(b=HALF.float()), "b: expected dtype"),
        (lambda: run(a=[0.5, 0.5]), "a: expected a tensor"),
        (lambda: run(a=HALF[:0], b=HALF[:0]), "a: expected at least one mass"),
        (lambda: round_to_polytope(HALF, HALF, HALF), "plan: expected at least 2 dimensions"),
        (lambda: round_to_polytope(rand(2, 3), HALF, HALF), r"b: expected shape \(3,\) as plan has columns"),
        (lambda: round_to_polytope(rand(2, 2), HALF, HALF * 2), "a, b: expected equal totals"),
    ],
)
def test_wrong_calls(call, match):
    with pytest.raises(ValueError, match=match):
        call()
