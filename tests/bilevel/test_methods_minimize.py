"""Running methods with :func:`difflayers.bilevel.minimize`, and schedules.

Oracles: the order of the batches, counts worked out from the update table, closed formulas of the schedules.
"""

from __future__ import annotations

import pytest
import torch

from difflayers.bilevel import (
    BOME,
    F2SA,
    VPBGD,
    ArgminLayer,
    Bilevel,
    Constant,
    Exponential,
    Linear,
    Power,
    minimize,
)
from tests.bilevel.method_toys import Quadratic, start, tensor

Q = Quadratic.random(3)


def test_multiplier_of_f2sa_grows_as_its_exponents_say():
    # a published code adds k^(-1/7) at every step, which is k^(6/7) in all; lambda = gamma / (2 alpha) is k^(1/7)
    algo = F2SA(Q.problem(), *start(0, 3, 4), step=Power(0.1, -5 / 7), step_lower=Power(0.5, -4 / 7))
    ratio = [algo.gamma(k) / (2 * algo.alpha(k)) for k in (127, 128 * 128 - 1)]
    assert ratio[1] / ratio[0] == pytest.approx(2.0)


def test_schedules():
    assert Power(2.0, -0.5, 4.0)(5) == pytest.approx(2 / 3)
    assert [Linear(1.0, 3.0, 2)(k) for k in range(4)] == [1.0, 2.0, 3.0, 3.0]
    assert Exponential(1.0, 0.1, 1e-2)(5) == 1e-2 and Constant(3.0)(7) == 3.0
    for bad in (lambda: Power(1.0, 1.0, 0.0), lambda: Linear(0.0, 1.0, 0)):
        with pytest.raises(ValueError, match="expected"):
            bad()


def test_minimize_cycles_batches_and_keeps_a_history():
    loader = torch.utils.data.DataLoader(torch.arange(8.0).reshape(4, 2), batch_size=2)
    seen = []
    problem = Bilevel(
        lambda x, y, b: (seen.append(b[0, 0].item()), (y - b.mean()).square().sum())[1],
        lambda x, y, b: (y - x).square().sum(),
    )
    algo = VPBGD(problem, tensor([1.0]), tensor([1.0]))
    algo.step(torch.zeros(2, 2))
    seen.clear()
    history = minimize(algo, 5, upper_batches=loader, record_every=2, progress=False)
    assert seen == [0, 4, 0, 4, 0]
    assert history.step == [3, 5, 6] and history.gradients == [12, 20, 24] and history.products == [0, 0, 0]
    assert history.upper.shape == history.infeasibility.shape == (3,)
    assert minimize(algo, 0, progress=False).upper.shape == (0,)


def test_minimize_shows_a_bar(capsys):
    minimize(BOME(Q.problem(), *start(0, 3, 4)), 3)
    assert "BOME" in capsys.readouterr().err


def test_minimize_names_divergence_and_bad_batches():
    algo = F2SA(Q.problem(), *start(0, 3, 4), step=50.0)
    with pytest.raises(FloatingPointError, match=r"F2SA: x, y.*not finite.*steps too long"):
        minimize(algo, 1000, progress=False)
    assert algo.steps < 1000
    algo = F2SA(Q.problem(), *start(0, 3, 4))
    for bad in (torch.zeros(3), iter(())):
        with pytest.raises(ValueError, match="upper_batches: expected an iterable"):
            minimize(algo, 2, upper_batches=bad, progress=False)
    with pytest.raises(ValueError, match="steps: expected"):
        minimize(algo, -1, progress=False)
    with pytest.raises(ValueError, match="algo: expected"):
        minimize(ArgminLayer(Q.problem()), 1, progress=False)
