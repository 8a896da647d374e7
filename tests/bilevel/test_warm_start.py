"""The adjoint of the last outer step starts the next one: CG steps along an outer run, cold and warm.

Oracle: counts. Two runs of the same gradient descent on log-penalties, one per feature, lower solutions exact (a linear
solve; Newton's method by hand), adjoint to the tolerance of an outer run (1e-3); the cold run solves the same systems
from zero. The bound is that of the task: at least twice as many. Measured, 40 outer steps: 1074 against 375 for ridge
regression, 574 against 176 for logistic regression. At the tolerance 1e-10 there is less to gain, the digits that a
start brings are few of those asked for (a fifth of the steps); that is a property of CG, not tested.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softplus

from difflayers.bilevel import Bilevel, hypergradient
from difflayers.implicit import Implicit
from difflayers.linalg import CG
from tests.bilevel.ridge import F64, randn

n, d = 200, 60
SCALE = torch.logspace(0, -1.5, d, dtype=F64)
X, XV, W = randn(n, d, seed=1) * SCALE, randn(100, d, seed=3) * SCALE, randn(d, seed=2)
T, TV = X @ W + randn(n, seed=4), XV @ W


def ridge():
    def solve(x, y):
        return torch.linalg.solve(X.mT @ X / n + torch.diag(x.exp()), X.mT @ T / n)

    return solve, Bilevel(
        lambda x, y, b: (XV @ y - TV).square().mean() / 2,
        lambda x, y, b: (X @ y - T).square().mean() / 2 + (x.exp() * y * y).sum() / 2,
    )


def logistic():
    t, tv = T.sign(), TV.sign()

    def solve(x, y):
        for _ in range(8):  # Newton's method, warm
            p = torch.sigmoid(-t * (X @ y))
            slope = -X.mT @ (t * p) / n + x.exp() * y
            y = y - torch.linalg.solve((X.mT * (p * (1 - p))) @ X / n + torch.diag(x.exp()), slope)
        assert slope.norm() < 1e-10
        return y

    return solve, Bilevel(
        lambda x, y, b: softplus(-tv * (XV @ y)).mean(),
        lambda x, y, b: softplus(-t * (X @ y)).mean() + (x.exp() * y * y).sum() / 2,
    )


@pytest.mark.parametrize("case", [ridge, logistic], ids=lambda case: case.__name__)
def test_warm_starts_halve_the_steps_of_an_outer_run(case):
    solve, problem = case()
    steps, values = {}, {}
    for warm in (False, True):
        x, y, q = torch.full((d,), -5.0, dtype=F64), torch.zeros(d, dtype=F64), None
        steps[warm], values[warm] = 0, []
        for _ in range(40):
            y = solve(x, y)
            found = hypergradient(problem, x, y, adjoint=Implicit(CG(rtol=1e-3)), init=q if warm else None)
            assert found.converged
            x, q = x - 3 * found.grad, found.adjoint
            steps[warm] += int(found.steps)
            values[warm].append(float(found.value))
    print(f"{case.__name__}: {steps[False]} steps cold, {steps[True]} warm")
    assert 2 * steps[True] <= steps[False]
    assert values[True][-1] == pytest.approx(values[False][-1], rel=1e-3) and values[True][-1] < 0.9 * values[True][0]
