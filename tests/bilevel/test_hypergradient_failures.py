"""Bad input, failures, warm start, cost and memory of hypergradients, on ridge regression with a closed form."""

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor, nn

from difflayers import SolveError, Status, trace
from difflayers.bilevel import Bilevel, hypergradient
from difflayers.implicit import Implicit, Neumann, Unrolled
from difflayers.linalg import CG, MINRES, Cholesky
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
    torch.testing.assert_close(hypergradient(problem, x, x / -D, adjoint=Implicit(MINRES())).grad, -1 / D)


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
