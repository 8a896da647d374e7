"""The lower solution as a layer.

Oracles: ridge by the normal equations under autograd (value, first and second derivatives); lasso by coordinate descent
in numpy and the closed form on the support; gradcheck and gradgradcheck; for modules, dense algebra on flat vectors.
"""

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from difflayers import SolveError, Status, trace
from difflayers.bilevel import MFAC, ArgminLayer, Bilevel, FiniteDifference, hypergradient
from difflayers.implicit import LBFGS, Implicit, Neumann, Newton, OneStep, Unrolled
from difflayers.linalg import CG, LU

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, T = randn(20, 5, seed=1), randn(20, seed=2)
ZERO = torch.zeros(5, dtype=F64)


def squares(x: Tensor, y: Tensor, batch) -> Tensor:
    return (X @ y - T).square().sum() / 2 + (x.exp() * y.square()).sum() / 2


def anything(x, y, batch) -> Tensor:
    return y.sum()


RIDGE = Bilevel(anything, squares)


def closed(x: Tensor) -> Tensor:
    return torch.linalg.solve(X.mT @ X + torch.diag(x.exp()), X.mT @ T)


@pytest.mark.parametrize("adjoint", [None, Implicit(CG(rtol=1e-13)), Implicit(LU()), Neumann(300)], ids=str)
def test_ridge_to_second_order(adjoint):
    layer = ArgminLayer(RIDGE, adjoint=adjoint, init=ZERO)
    x = randn(5, seed=3).requires_grad_()
    torch.testing.assert_close(layer(x), closed(x), rtol=1e-8, atol=1e-10)
    for f in (torch.func.grad, torch.func.hessian):
        got, expected = (f(lambda x: (s(x) ** 3).sum())(x.detach()) for s in (layer, closed))  # noqa: B023
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)
    assert torch.autograd.gradgradcheck(layer, x)


def test_damping_is_that_of_the_adjoint_alone():
    layer = ArgminLayer(RIDGE, adjoint=Implicit(CG(), damping=2.0), init=ZERO)
    x, g = randn(5, seed=3).requires_grad_(), randn(5, seed=4)
    y = layer(x)
    torch.testing.assert_close(y, closed(x), rtol=1e-8, atol=1e-10)
    H = X.mT @ X + torch.diag(x.exp()) + 2 * torch.eye(5, dtype=F64)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], -x.exp() * y * torch.linalg.solve(H, g))


def test_agrees_with_the_hypergradient():
    V = randn(9, 5, seed=5)
    problem = Bilevel(lambda x, y, batch: (V @ y).pow(4).sum() + x.square().sum(), squares)
    x = randn(5, seed=6).requires_grad_()
    y = ArgminLayer(problem)(x, init=ZERO)
    (through,) = torch.autograd.grad(problem.upper(x, y, None), x)
    torch.testing.assert_close(hypergradient(problem, x, y).grad, through, rtol=1e-7, atol=1e-9)


def test_mfac_replaces_the_hessian():
    G, g = randn(6, 5, seed=7), randn(5, seed=8)
    mfac = MFAC(rank=6, damping=0.3)
    mfac.update(G)
    x = randn(5, seed=3).requires_grad_()
    y = ArgminLayer(RIDGE, adjoint=mfac, init=ZERO)(x)
    q = torch.linalg.solve(0.3 * torch.eye(5, dtype=F64) + G.mT @ G / 6, g)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], -x.exp() * y * q)


def test_unrolled():
    layer = ArgminLayer(RIDGE, adjoint=Unrolled(60), init=ZERO)
    x, g = randn(5, seed=3).requires_grad_(), randn(5, seed=4)
    expected = torch.autograd.grad(closed(x), x, g)[0]
    torch.testing.assert_close(torch.autograd.grad(layer(x), x, g)[0], expected, rtol=1e-4, atol=1e-6)


def soft(v: Tensor, t: Tensor) -> Tensor:
    return v - torch.maximum(torch.minimum(v, t), -t)


@pytest.mark.parametrize("adjoint", [None, Implicit(LU())], ids=str)
def test_lasso_with_one_penalty_per_coordinate(adjoint):
    x = torch.tensor([2.0, 9.0, 1.0, 4.0, 30.0], dtype=F64, requires_grad=True)
    y = np.zeros(5)
    D, t = X.numpy(), T.numpy()
    for _ in range(3000):
        for j in range(5):
            c = D[:, j] @ (t - D @ y + D[:, j] * y[j])
            y[j] = np.sign(c) * max(abs(c) - x.detach().numpy()[j], 0) / (D[:, j] @ D[:, j])
    S = torch.from_numpy(y != 0)
    assert 0 < int(S.sum()) < 5
    problem = Bilevel(
        anything, lambda x, y, batch: (X @ y - T).square().sum() / 2, prox_lower=lambda v, x, s: soft(v, s * x)
    )
    found = ArgminLayer(problem, adjoint=adjoint, init=ZERO)(x)
    torch.testing.assert_close(found, torch.from_numpy(y), rtol=1e-8, atol=1e-10)
    assert not found[~S].any()
    g = randn(5, seed=9)
    (grad,) = torch.autograd.grad(found, x, g)
    expected = torch.zeros(5, dtype=F64)
    expected[S] = -torch.linalg.solve((X.mT @ X)[S][:, S], g[S]) * found[S].sign()
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-10)
    assert not grad[~S].any()  # to the bit


def test_one_step_needs_a_fixed_point():
    with pytest.raises(ValueError, match="got OneStep"):
        ArgminLayer(RIDGE, adjoint=OneStep(), init=ZERO)(ZERO)


def test_warm_start_takes_fewer_steps():
    x = randn(5, seed=3)
    layer = ArgminLayer(RIDGE, init=ZERO)
    cold = layer.forward_ex(x)
    warm = layer.forward_ex(x, init=cold.value)
    assert cold.converged and warm.converged and int(warm.steps) < int(cold.steps)
    assert not layer(x, init=ZERO.clone().requires_grad_()).requires_grad  # the start carries no gradient


def test_module_as_unknown_and_as_hyperparameter():
    """y a linear layer fitted to what x, another one, makes of the inputs: y = x, and dy/dx the identity."""
    teacher, student = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    inputs = randn(12, 3, seed=10)
    before = [p.clone() for p in student.parameters()]
    problem = Bilevel(anything, lambda x, y, batch: (y(batch) - x(batch)).square().mean())
    layer = ArgminLayer(problem, solver=LBFGS(rtol=1e-12), init=student)
    y = layer(teacher, inputs)
    assert list(y) == ["weight", "bias"] and not list(layer.parameters())
    torch.testing.assert_close(y["weight"], teacher.weight, rtol=1e-7, atol=1e-8)
    g = randn(2, 3, seed=11)
    grads = torch.autograd.grad(y["weight"], [teacher.weight, teacher.bias], g, retain_graph=True)
    torch.testing.assert_close(grads[0], g, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grads[1], torch.zeros(2, dtype=F64), rtol=0, atol=1e-7)
    assert all(torch.equal(p, q) for p, q in zip(before, student.parameters(), strict=True))
    torch.func.functional_call(student, y, (inputs,)).sum().backward()
    assert teacher.weight.grad is not None and student.weight.grad is None
    again = layer(teacher, inputs, init=student)
    assert torch.equal(again["bias"], y["bias"])


def test_batch_norm_and_dropout():
    """Both active: buffers stay, one mask a call (backward after eval() included), the next call draws another."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Dropout(0.5), nn.Linear(3, 1)).double()
    inputs, target = randn(40, 3, seed=12), randn(40, 1, seed=13)
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    problem = Bilevel(
        anything,
        lambda x, y, b: (y(inputs) - target).square().mean() + x.exp() * sum(p.square().sum() for p in y.parameters()),
    )
    layer, x = ArgminLayer(problem, solver=Newton(), init=net), torch.tensor(-2.0, dtype=F64, requires_grad=True)
    torch.manual_seed(5)
    y = layer(x)
    other = layer(x)
    assert not torch.allclose(other["2.weight"], y["2.weight"], rtol=1e-3)
    net.eval()
    (got,) = torch.autograd.grad(y["2.weight"].sum(), x)
    assert not net.training

    def at(value: float) -> float:
        torch.manual_seed(5)
        net.train()
        return float(layer(torch.tensor(value, dtype=F64))["2.weight"].sum())

    assert abs(float(got) - (at(-2 + 1e-5) - at(-2 - 1e-5)) / 2e-5) < 1e-6 * (1 + abs(float(got)))
    for name, b in net.named_buffers():
        assert torch.equal(b, buffers[name])


def test_copies_and_pickles():
    layer = ArgminLayer(RIDGE, solver=Newton(), adjoint=Implicit(LU()), init=ZERO)
    x = randn(5, seed=3)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    assert "LU" in repr(layer) and layer.state_dict() == {}


def test_solves_are_traced():
    x = randn(5, seed=3).requires_grad_()
    with trace() as solves:
        ArgminLayer(RIDGE, init=ZERO)(x).sum().backward()
    assert [(s.name, s.phase) for s in solves] == [("ArgminLayer", "forward"), ("ArgminLayer", "adjoint")]


def test_failures():
    saddle = Bilevel(anything, lambda x, y, batch: (y.square() * x).sum())
    layer = ArgminLayer(saddle, init=ZERO + 1)
    with pytest.raises(SolveError):
        layer(ZERO - 1)
    assert layer.forward_ex(ZERO - 1).status == Status.UNBOUNDED
    assert ArgminLayer(saddle, init=ZERO + 1, on_failure="nan")(ZERO - 1).isnan().all()
    equal = Bilevel(anything, squares, constraint=lambda x, y: y.sum() - 1, equality=True)
    with pytest.raises(ValueError, match="adjoint: expected damping=0"):
        ArgminLayer(equal, adjoint=Implicit(damping=1.0))
    weight = ZERO.clone().requires_grad_()
    with pytest.raises(ValueError, match="lower: expected a function of its arguments alone"):
        ArgminLayer(Bilevel(anything, lambda x, y, b: (y - weight).square().sum()), init=ZERO)(ZERO)
    with pytest.raises(ValueError, match="adjoint: expected Implicit, Neumann, Unrolled, MFAC or"):
        ArgminLayer(RIDGE, adjoint=FiniteDifference())
    with pytest.raises(ValueError, match="init: expected a tensor"):
        ArgminLayer(RIDGE)(ZERO)
    with pytest.raises(ValueError, match="x: expected a floating-point tensor"):
        ArgminLayer(RIDGE, init=ZERO)(torch.arange(5))


def test_nothing_is_kept():
    layer, x = ArgminLayer(RIDGE, init=ZERO), randn(5, seed=3).requires_grad_()

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    def step() -> None:
        torch.autograd.grad(layer(x).sum(), x)

    step()
    before = count()
    for _ in range(30):
        step()
    assert count() <= before
