"""``FromTorchOpt``.

Oracles: ridge regression by a linear solve, differentiated by autograd; for an unrolled run torchopt's own functional
loop, written out and differentiated by autograd.
"""

from __future__ import annotations

import pytest
import torch
import torchopt

from difflayers import SolveError, SolveWarning, Status
from difflayers.implicit import FromTorchOpt, Unrolled, argmin, argmin_ex

generator = torch.Generator().manual_seed(2)
A = torch.randn(12, 4, dtype=torch.float64, generator=generator)
B = torch.randn(3, 12, dtype=torch.float64, generator=generator)
RIDGE = torch.tensor(0.7, dtype=torch.float64)


def objective(z, b, ridge):
    return (z @ A.to(z).mT - b).square().sum(-1) / 2 + ridge * z.square().sum(-1) / 2


def closed(b, ridge):
    return torch.linalg.solve(A.mT @ A + ridge * torch.eye(4).double(), A.mT @ b.mT).mT


OPTIMISERS = {
    "sgd": torchopt.sgd(lr=0.03, momentum=0.8),
    "adam": torchopt.adam(lr=torchopt.schedule.polynomial_schedule(0.1, 1e-3, 1, 400)),
    "chain": torchopt.combine.chain(torchopt.transform.scale_by_adam(), torchopt.transform.scale(-0.05)),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_ridge(name):
    b, ridge = B.clone().requires_grad_(), RIDGE.clone().requires_grad_()
    solver = FromTorchOpt(OPTIMISERS[name], rtol=1e-6)
    got, want = argmin(objective, torch.zeros(3, 4).double(), (b, ridge), solver=solver), closed(b, ridge)
    assert (got - want).abs().max() < 1e-10  # two Newton steps behind the tolerance
    for g, w in zip(*(torch.autograd.grad(v.square().sum(), (b, ridge)) for v in (got, want)), strict=True):
        assert (g - w).abs().max() < 1e-9


@pytest.mark.filterwarnings("ignore::difflayers.SolveWarning")
def test_unrolled_is_torchopts_own_loop():
    ridge = RIDGE.clone().requires_grad_()
    optimiser = torchopt.adam(lr=0.1, moment_requires_grad=True)
    z = argmin(objective, torch.zeros(3, 4).double(), (B, ridge), solver=FromTorchOpt(optimiser), adjoint=Unrolled(7))
    w = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    state = optimiser.init(w)
    for _ in range(6):  # the seventh step returns the point it starts from
        (g,) = torch.autograd.grad(objective(w, B, ridge).sum(), w, create_graph=True)
        updates, state = optimiser.update(g, state, params=w, inplace=False)
        w = torchopt.apply_updates(w, updates, inplace=False)
    assert torch.equal(z, w)
    got, want = (torch.autograd.grad(v.sum(), ridge)[0] for v in (z, w))
    assert (got - want).abs() < 1e-12


def test_statuses():
    start = torch.zeros(3, 4).double()
    starved = FromTorchOpt(torchopt.sgd(lr=1e-3), max_steps=3)
    with pytest.warns(SolveWarning):
        argmin(objective, start, (B, RIDGE), solver=starved)
    found = argmin_ex(objective, start, (B, RIDGE), solver=starved)
    assert (found.status == Status.MAX_STEPS).all() and found.steps.tolist() == [3, 3, 3]
    with pytest.raises(SolveError, match=r"DIVERGED|UNBOUNDED"):
        argmin(objective, start, (B, RIDGE), solver=FromTorchOpt(torchopt.sgd(lr=10.0)))
    b = B.clone()
    b[1] = torch.nan
    solver = FromTorchOpt(torchopt.sgd(lr=0.03, momentum=0.8), rtol=1e-6)
    healthy, spoilt = (argmin_ex(objective, start, (t, RIDGE), solver=solver) for t in (B, b))
    assert spoilt.failed.tolist() == [False, True, False]
    assert torch.equal(spoilt.value[[0, 2]], healthy.value[[0, 2]])


def test_transforms_and_float32():
    solver = FromTorchOpt(torchopt.sgd(lr=0.03, momentum=0.8), rtol=1e-5)
    layer = lambda b, ridge: argmin(objective, b.new_zeros(4), (b, ridge), solver=solver)  # noqa: E731
    got = torch.func.vmap(torch.func.jacrev(layer, 1), (0, None))(B, RIDGE)
    assert (got - torch.func.jacrev(closed, 1)(B, RIDGE)).abs().max() < 1e-8
    assert layer(B[0].float(), RIDGE.float()).dtype == torch.float32


def test_what_is_no_optimiser():
    for wrong in ("adam", torchopt.adam, torchopt.Adam([torch.zeros(1, requires_grad=True)], lr=0.1)):
        with pytest.raises(ValueError, match=r"optimizer: expected a functional optimiser of torchopt, such as"):
            FromTorchOpt(wrong)
