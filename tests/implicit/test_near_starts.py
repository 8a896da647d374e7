"""LBFGS from where it will end: a warm start must not cost more than a cold one.

Oracle: none is needed for counts; a start closer to the solution takes fewer steps. Before a first trial aimed at where
the slopes say zero lies, logistic regression took 26 steps from the optimum + 1e-6 and 11 from zero.
"""

from __future__ import annotations

import pytest
import torch

from difflayers import Status
from difflayers.implicit import LBFGS, argmin_ex

generator = torch.Generator().manual_seed(0)
A = torch.randn(30, 4, dtype=torch.float64, generator=generator)
Y = torch.randn(30, dtype=torch.float64, generator=generator).sign()
Q = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64, generator=generator))[0]
H = Q @ torch.diag(torch.logspace(0, 1, 10, dtype=torch.float64)) @ Q.mT
C = torch.randn(10, dtype=torch.float64, generator=generator)

PROBLEMS = {
    "logistic": (4, lambda z: torch.nn.functional.softplus(-Y * (z @ A.mT)).sum(-1) + 0.05 * z.square().sum(-1)),
    "quadratic": (10, lambda z: ((z @ H) * z).sum(-1) / 2 - (C * z).sum(-1)),
    "quartic": (10, lambda z: (z**4 / 4 - C * z).sum(-1) + z.square().sum(-1) / 2),
    "in millions": (10, lambda z: (z - 1e6 * C).square().sum(-1) + (z[..., :1] - z).square().sum(-1)),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_nearer_start_takes_fewer_steps(name):
    n, f = PROBLEMS[name]
    zero = torch.zeros(n, dtype=torch.float64)
    cold = argmin_ex(f, zero)
    away = torch.linspace(-1.0, 1.3, n, dtype=torch.float64) * cold.value.abs().max()
    warm = [argmin_ex(f, cold.value + eps * away) for eps in (1e-9, 1e-6, 1e-3)]
    for one in (cold, *warm):
        assert one.status == Status.CONVERGED
        assert (one.value - cold.value).abs().max() <= 1e-9 * cold.value.abs().max()
    steps = [int(one.steps) for one in warm]
    assert steps[1] <= 0.75 * int(cold.steps) and steps[2] <= int(cold.steps) and steps[0] <= steps[1]
    assert int(argmin_ex(f, cold.value).steps) <= 3


def test_cold_starts_are_as_before():
    counts = [int(argmin_ex(f, torch.zeros(n).double(), solver=LBFGS()).steps) for n, f in PROBLEMS.values()]
    assert counts[0] <= 12 and counts[1] <= 35 and counts[2] <= 25 and counts[3] <= 20
