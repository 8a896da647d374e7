"""Bad input, failures, warm start, cost and memory of hypergradients, on ridge regression with a closed form."""

import gc
import math
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from difflayers import SolveError, SolveWarning, Status, trace
from difflayers.bilevel import Bilevel, FiniteDifference, hypergradient
from difflayers.implicit import Implicit, Neumann, OneStep, Unrolled
from difflayers.linalg import CG, GMRES, LU, MINRES, Cholesky
from tests.bilevel.ridge import F64, HYPER, randn, ridge, ridge_oracle

# ----------------------------------------------------------------------------------------------------- failures, input


@pytest.mark.parametrize("adjoint", [None, Implicit(), Implicit(Cholesky())], ids=str)
def test_indefinite_hessian_says_so_and_names_damping(adjoint):
    D = torch.tensor([1.0, -1.0, 2.0], dtype=F64)
    problem = Bilevel(lambda x, y, batch: y.sum(), lambda x, y, batch: (D * y * y).sum() / 2 + (x * y).sum())
    x = -D.clone()
    with pytest.raises(SolveError, match="damping") as error:
        hypergradient(problem, x, torch.ones(3, dtype=F64), adjoint=adjoint)
    assert error.value.solution.status == Status.SINGULAR
    result = hypergradient(problem, x, torch.ones(3, dtype=F64), adjoint=adjoint, on_failure="ignore")
    assert result.status == Status.SINGULAR and result.failed
    masked = hypergradient(problem, x, torch.ones(3, dtype=F64), adjoint=adjoint, on_failure="nan")
    assert masked.grad.isnan().all()
    damped = hypergradient(problem, x, torch.ones(3, dtype=F64), adjoint=Implicit(CG(), damping=2.0))
    torch.testing.assert_close(damped.grad, -1 / (D + 2))
    stationary = hypergradient(problem, x, x / -D, adjoint=Implicit(MINRES()), on_failure="ignore")
    torch.testing.assert_close(stationary.grad, -1 / D)
    assert stationary.status == Status.SINGULAR


@pytest.mark.parametrize(
    "adjoint", [Implicit(MINRES()), Implicit(GMRES()), Neumann(3), Neumann(3, 0.1), OneStep()], ids=str
)
def test_solvers_that_end_well_on_a_saddle_say_what_they_met(adjoint):
    """The Krylov space of three directions is everything, so that an eigenvalue of -1 beside 1 and 2 shows."""
    D = torch.tensor([1.0, -1.0, 2.0], dtype=F64)
    w = torch.tensor([1.0, 0.6, -0.7], dtype=F64)
    problem = Bilevel(lambda x, y, batch: w @ y, lambda x, y, batch: (D * y * y).sum() / 2 + (x * y).sum())
    if isinstance(adjoint, Implicit):
        with pytest.raises(SolveError, match=r"not positive definite.*damping"):
            hypergradient(problem, -D, torch.ones(3, dtype=F64), adjoint=adjoint)
    else:
        with pytest.warns(SolveWarning):
            hypergradient(problem, -D, torch.ones(3, dtype=F64), adjoint=adjoint)
    positive = Bilevel(problem.upper, lambda x, y, batch: (D.abs() * y * y).sum() / 2 + (x * y).sum())
    assert hypergradient(positive, -D, D.sign(), adjoint=adjoint).converged
    if isinstance(adjoint, Implicit):  # damping that makes it definite silences it, and a singular one is no saddle
        assert hypergradient(problem, -D, torch.ones(3, dtype=F64), adjoint=replace(adjoint, damping=1.5)).converged
        flat = Bilevel(problem.upper, lambda x, y, batch: (w @ y).square() / 2 + (x * y).sum())
        assert hypergradient(flat, 0 * D, 0 * D, adjoint=adjoint).converged


def test_a_maximiser_of_the_smooth_part_on_the_support_is_no_solution():
    """x y^2 / 2 - 3 y + |y|: y = 2 / x for x > 0, whose derivative is -2 / x^2; for x = -1, y = -4 is a maximiser."""
    problem = Bilevel(
        lambda x, y, batch: y,
        lambda x, y, batch: x * y**2 / 2 - 3 * y,
        prox_lower=lambda v, x, step: v.sign() * (v.abs() - step).clamp_min(0),
    )
    at = hypergradient(problem, torch.tensor(2.0, dtype=F64), torch.tensor(1.0, dtype=F64))
    torch.testing.assert_close(at.grad, torch.tensor(-0.5, dtype=F64))
    with pytest.raises(SolveError, match="bends downwards on the support"):
        hypergradient(problem, torch.tensor(-1.0, dtype=F64), torch.tensor(-4.0, dtype=F64))
    # the same curvature off the support is none: y = 0 minimises -y^2 / 2 + |y| locally
    both = Bilevel(
        lambda x, y, batch: y.sum(),
        lambda x, y, batch: (x * torch.tensor([1.0, -1.0], dtype=F64) * y**2).sum() / 2 - 3 * y[0],
        prox_lower=problem.prox_lower,
    )
    at = hypergradient(both, torch.tensor(2.0, dtype=F64), torch.tensor([1.0, 0.0], dtype=F64))
    torch.testing.assert_close(at.grad, torch.tensor(-0.5, dtype=F64))


def test_the_curvature_of_the_prox_counts():
    """-c y^2 / 2 - x y with the prox of y^2: a minimum at y = x / (2 - c) for c = 1, none for c = 3."""
    for c, fails in ((1.0, False), (3.0, True)):
        problem = Bilevel(
            lambda x, y, batch: y.sum(),
            lambda x, y, batch, c=c: (-c * y**2 / 2 - x * y).sum(),
            prox_lower=lambda v, x, step: v / (1 + 2 * step),
        )
        x = torch.tensor([1.0, -2.0], dtype=F64)
        if fails:
            with pytest.raises(SolveError, match="bends downwards"):
                hypergradient(problem, x, x / (2 - c))
        else:
            torch.testing.assert_close(hypergradient(problem, x, x / (2 - c)).grad, torch.ones(2, dtype=F64))


def test_a_saddle_along_the_constraint():
    """y0^2 / 2 - c y1^2 / 2 on y0 = y1 + x bends as 1 - c, whatever the signs of the whole Hessian are."""
    x, one = torch.tensor(1.0, dtype=F64), torch.ones(2, dtype=F64)
    for c, fails in ((0.5, False), (2.0, True)):
        problem = Bilevel(
            lambda x, y, batch: one @ y,
            lambda x, y, batch, c=c: y[0] ** 2 / 2 - c * y[1] ** 2 / 2,
            constraint=lambda x, y: y[0] - y[1] - x,
            equality=True,
        )
        y = torch.tensor([-c, -1.0], dtype=F64) / (1 - c)  # y0 = c y1, y1 = -x / (1 - c)
        for adjoint in (None, Implicit(LU()), Implicit(GMRES())):
            if fails:
                with pytest.raises(SolveError, match="bends downwards"):
                    hypergradient(problem, x, y, adjoint=adjoint)
            else:
                got = hypergradient(problem, x, y, adjoint=adjoint).grad
                torch.testing.assert_close(got, torch.tensor((-c - 1) / (1 - c), dtype=F64))


def test_levels_without_a_graph_are_refused():
    good, y, x = ridge(), torch.zeros(7, dtype=F64), HYPER

    def frozen(function):
        return lambda x, y, batch: function(x, y, batch).detach()

    with pytest.raises(ValueError, match="upper: expected a differentiable function"):
        hypergradient(Bilevel(frozen(good.upper), good.lower), x, y)
    with pytest.raises(ValueError, match="lower: expected a differentiable function"):
        hypergradient(Bilevel(good.upper, frozen(good.lower)), x, y)
    only_x = Bilevel(lambda x, y, batch: x.sum(), good.lower)  # uses one of both
    torch.testing.assert_close(hypergradient(only_x, x, y).grad, torch.ones_like(x))


@pytest.mark.parametrize("scale", [1e-200, 1e-120, 1.0, 1e120, 1e200])
def test_upper_levels_of_any_size(scale):
    good = ridge()
    problem = Bilevel(lambda x, y, batch: scale * good.upper(x, y, batch), good.lower)
    y, expected = ridge_oracle(HYPER)
    torch.testing.assert_close(hypergradient(problem, HYPER, y).grad / scale, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_meets_its_own_tolerance(dtype):
    """Hessian diag(1, 2, 4): q = 1 / D, gradient 1 / D; exact in every format, products with J and H rounded."""
    D = torch.tensor([1.0, 2.0, 4.0], dtype=dtype)
    problem = Bilevel(lambda x, y, batch: y.sum(), lambda x, y, batch: (D * y * y).sum() / 2 - (x * y).sum())
    adjoints = [None, FiniteDifference()] if dtype == torch.float32 else [None, Implicit(Cholesky())]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for adjoint in adjoints:
            found = hypergradient(problem, D.clone(), torch.ones_like(D), adjoint=adjoint)
            assert found.grad.dtype == dtype and found.converged
            tolerance = 1e-3 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(found.grad, 1 / D, rtol=tolerance, atol=0)


def test_inside_of_transforms_it_says_what_to_do():
    good, y = ridge(), torch.zeros(2, 7, dtype=F64)
    with pytest.raises(ValueError, match=r"outside of torch.func transforms.*blocks"):
        torch.func.vmap(lambda y: hypergradient(good, HYPER, y).grad)(y)


def test_embedding_with_sparse_gradients():
    table = nn.Embedding(4, 2, sparse=True, dtype=F64)
    dense = nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False)
    index = torch.tensor([0, 2, 2])
    found = []
    for y in (table, dense):
        problem = Bilevel(
            lambda x, y, batch: y(index).pow(3).sum(),
            lambda x, y, batch: (y(index) - x).square().sum() + y.weight.square().sum(),
        )
        found.append(hypergradient(problem, torch.tensor([0.5, -1.0], dtype=F64), y).grad)
    torch.testing.assert_close(*found)
    assert table.sparse


def test_singular_but_consistent_hessian_has_the_shortest_adjoint():
    """Two copies of each coordinate: only their sum is determined, and the upper level sees only the sum."""
    problem = Bilevel(
        lambda x, y, batch: ((y[:2] + y[2:]) ** 3).sum(), lambda x, y, batch: (y[:2] + y[2:] - x).square().sum()
    )
    x = randn(2)
    torch.testing.assert_close(hypergradient(problem, x, torch.cat([x, 0 * x])).grad, 3 * x**2)


def test_bad_input_is_named():
    good, y, x = ridge(), torch.zeros(7, dtype=F64), HYPER
    vector = Bilevel(good.upper, lambda x, y, batch: y)
    with pytest.raises(ValueError, match=r"lower output: expected shape \(\), one number .* got \(7,\)"):
        hypergradient(vector, x, y)
    with pytest.raises(ValueError, match=r"upper output: expected shape \(\)"):
        hypergradient(Bilevel(vector.lower, good.lower), x, y)
    with pytest.raises(ValueError, match=r"upper output: expected a tensor, got float"):
        hypergradient(Bilevel(lambda x, y, batch: 1.0, good.lower), x, y)
    with pytest.raises(ValueError, match="batch: expected None or a pair"):
        hypergradient(good, x, y, (1, 2, 3))
    with pytest.raises(ValueError, match="problem: expected a Bilevel"):
        hypergradient(good.upper, x, y)
    with pytest.raises(ValueError, match="lower: expected a callable"):
        Bilevel(good.upper, 3)
    with pytest.raises(ValueError, match="x: expected a floating-point tensor"):
        hypergradient(good, torch.arange(7), y)
    with pytest.raises(ValueError, match="got Unrolled"):
        hypergradient(good, x, y, adjoint=Unrolled(3))
    with pytest.raises(ValueError, match="init: expected shape"):
        hypergradient(good, x, y, init=torch.zeros(3, dtype=F64))
    with pytest.raises(ValueError, match="y: expected finite numbers, got 1 NaN"):
        hypergradient(good, x, torch.full((7,), math.nan, dtype=F64).clamp(0).index_fill(0, torch.arange(6), 0.0))


def test_captured_tensors_are_refused():
    weight = torch.ones(7, dtype=F64, requires_grad=True)
    captured = Bilevel(ridge().upper, lambda x, y, batch: ((y - x) * weight).square().sum())
    with pytest.raises(ValueError, match="lower: expected a function of its arguments alone"):
        hypergradient(captured, HYPER, HYPER)
    holder = nn.Linear(7, 1).double()
    with pytest.raises(ValueError, match="upper: expected a function of its arguments alone"):
        hypergradient(Bilevel(lambda x, y, batch: holder(y).sum(), ridge().lower), HYPER, HYPER)
    holder.requires_grad_(False)
    y, _ = ridge_oracle(HYPER)
    hypergradient(Bilevel(lambda x, y, batch: holder(y).sum(), ridge().lower), HYPER, y)


# --------------------------------------------------------------------------------------------- warm start, cost, memory


def test_warm_start_at_least_halves_the_steps_of_an_outer_run():
    A, B = randn(80, 40, seed=60), randn(60, 40, seed=61)
    t, v = randn(80, seed=62), randn(60, seed=63)
    problem = Bilevel(
        lambda x, y, batch: (B @ y - v).square().sum() / 2,
        lambda x, y, batch: (A @ y - t).square().sum() / 2 + (x.exp() * y.square()).sum() / 2,
    )

    def run(warm: bool) -> int:
        x, q, total = torch.zeros(40, dtype=F64), None, 0
        for _ in range(20):
            y = torch.linalg.solve(A.mT @ A + torch.diag(x.exp()), A.mT @ t)
            result = hypergradient(problem, x, y, adjoint=Implicit(CG(rtol=1e-4)), init=q)
            q, total, x = result.adjoint if warm else None, total + int(result.steps), x - 2e-3 * result.grad
        return total

    cold, warm = run(False), run(True)
    assert 2 * warm <= cold, (warm, cold)


def test_one_evaluation_of_each_level_and_one_graph():
    calls = {"upper": 0, "lower": 0}
    problem = ridge()

    def upper(x, y, batch):
        calls["upper"] += 1
        return problem.upper(x, y, batch)

    def lower(x, y, batch):
        calls["lower"] += 1
        return problem.lower(x, y, batch)

    counted = Bilevel(upper, lower)
    y, _ = ridge_oracle(HYPER)
    hypergradient(counted, HYPER, y)  # looks once for captured tensors
    calls.update(upper=0, lower=0)
    result = hypergradient(counted, HYPER, y)
    assert calls == {"upper": 1, "lower": 1}
    assert result.products == int(result.steps) + 1  # one more to measure the residual


def test_adjoint_solves_are_traced():
    with trace() as solves:
        hypergradient(ridge(), HYPER, ridge_oracle(HYPER)[0])
    assert [(s.name, s.phase) for s in solves] == [("hypergradient", "adjoint")]


def saved_bytes(adjoint) -> int:
    """Bytes that autograd keeps at a time while products are taken."""
    alive, most = [0], [0]

    class Kept:
        def __init__(self, t: Tensor) -> None:
            self.t, self.bytes = t, t.numel() * t.element_size()
            alive[0] += self.bytes
            most[0] = max(most[0], alive[0])

        def __del__(self) -> None:
            alive[0] -= self.bytes

    y, _ = ridge_oracle(HYPER)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.t):
        hypergradient(ridge(), HYPER, y, adjoint=adjoint)
    return most[0]


@pytest.mark.filterwarnings("ignore::difflayers.SolveWarning")
def test_memory_does_not_depend_on_the_number_of_terms():
    few, many = saved_bytes(Neumann(2)), saved_bytes(Neumann(300))
    assert few == many > 0
    few, many = saved_bytes(Implicit(CG(max_steps=1))), saved_bytes(Implicit(CG(max_steps=7)))
    assert few == many


def test_a_thousand_steps_leak_nothing():
    problem, x = Bilevel(lambda x, y, b: y.square().sum(), lambda x, y, b: (y - x).square().sum()), randn(3)
    gone = []

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    for _ in range(3):
        hypergradient(problem, x, x)
    before = count()
    for i in range(1000):
        result = hypergradient(problem, x, x)
        if i == 500:
            gone.append(weakref.ref(result.adjoint))
    del result
    assert count() <= before and gone[0]() is None
