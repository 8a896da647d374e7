"""Modules as variables of either level, against dense algebra on flat vectors; buffers, ties, one dropout mask."""

import pytest
import torch
from torch import Tensor, nn

from difflayers.bilevel import Bilevel, FiniteDifference, hypergradient
from difflayers.implicit import Implicit, Neumann
from difflayers.linalg import CG, LU
from tests.bilevel.ridge import F64, HYPER, TV, XV, T, X, randn, ridge

# -------------------------------------------------------------------------------------------------------------- modules


def logistic_batch(n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    return randn(n, d, seed=seed), (randn(n, seed=seed + 1) > 0).long()


def decayed(x, net, batch):
    inputs, labels = batch
    penalty = sum((x[name.replace(".", "_")].exp() * p.square()).sum() for name, p in net.named_parameters())
    return nn.functional.cross_entropy(net(inputs), labels) + 0.1 * penalty


def plain(x, net, batch):
    inputs, labels = batch
    return nn.functional.cross_entropy(net(inputs), labels)


def dense_oracle(lower, upper, x: Tensor, y: Tensor) -> Tensor:
    """From dense Hessians of functions of plain vectors."""
    H = torch.func.hessian(lower, 1)(x, y)
    J = torch.func.jacrev(torch.func.grad(lower, 1), 0)(x, y)
    fx, fy = torch.func.grad(upper, (0, 1))(x, y)
    return fx - J.mT @ torch.linalg.solve(H, fy)


def test_a_module_as_lower_variables():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = {name.replace(".", "_"): torch.zeros_like(p) for name, p in net.named_parameters()}
    train, valid = logistic_batch(30, 4, 70), logistic_batch(20, 4, 72)
    before = {name: p.clone() for name, p in net.named_parameters()}
    result = hypergradient(Bilevel(plain, decayed), x, net, (valid, train), adjoint=Implicit(LU(), damping=0.1))
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None
    assert list(result.adjoint) == list(before) and list(result.grad) == list(x)

    sizes = [p.numel() for p in before.values()]
    flat_y = torch.cat([p.detach().flatten() for p in before.values()])

    def split(v):
        return {n: part.reshape(p.shape) for part, (n, p) in zip(v.split(sizes), before.items(), strict=True)}

    def lower(x, y):
        loss = nn.functional.cross_entropy(torch.func.functional_call(net, split(y), (train[0],)), train[1])
        return loss + 0.1 * (x.exp() * y.square()).sum() + 0.05 * (y - flat_y).square().sum()  # the damping

    def upper(x, y):
        return nn.functional.cross_entropy(torch.func.functional_call(net, split(y), (valid[0],)), valid[1])

    expected = dense_oracle(lower, upper, torch.zeros_like(flat_y), flat_y)
    got = torch.cat([g.flatten() for g in result.grad.values()])
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)
    again = hypergradient(
        Bilevel(plain, decayed), x, net, (valid, train), adjoint=Implicit(CG(), damping=0.1), init=result.adjoint
    )
    assert again.steps <= 1


def test_a_module_as_upper_variables():
    """A linear map learns the target of a quadratic lower problem: dF/dW = y inputs'."""
    teacher = nn.Linear(3, 2, bias=False).double()
    inputs = randn(3, seed=80)
    problem = Bilevel(lambda x, y, batch: y.square().sum() / 2, lambda x, y, batch: (y - x(inputs)).square().sum())
    y = teacher(inputs).detach()
    grad = hypergradient(problem, teacher, y).grad
    torch.testing.assert_close(grad["weight"], torch.outer(y, inputs))


def test_tied_and_frozen_parameters():
    """One parameter in two places is one variable; a frozen one is a constant."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.second.weight = self.first.weight
            self.shift = nn.Parameter(torch.ones(2), requires_grad=False)

        def forward(self) -> Tensor:
            return self.first.weight + self.second.weight + self.shift

    net = Tied().double()
    problem = Bilevel(lambda x, y, batch: y().sum(), lambda x, y, batch: (y() - x).square().sum())
    x = randn(2, 2, seed=81)
    with torch.no_grad():
        net.first.weight.copy_((x - 1) / 2)
    result = hypergradient(problem, x, net)
    assert list(result.adjoint) == ["first.weight"]
    torch.testing.assert_close(result.grad, torch.ones(2, 2, dtype=F64))


def evaluate(net: nn.Module, y: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """What a loss may call: the module is out of its sight."""
    return torch.func.functional_call(net, y, (inputs,))


@pytest.mark.parametrize("captured", [False, True])
def test_batch_norm_in_training_mode_keeps_its_buffers(captured):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    before = {name: b.clone() for name, b in net.named_buffers()}
    inputs, target = randn(9, 3, seed=82), randn(9, 1, seed=83)
    y = dict(net.named_parameters())

    def through(y):
        return evaluate(net, y, inputs)

    def loss(x, y, batch):
        out = through(y) if captured else y(inputs)
        weights = y.values() if captured else y.parameters()
        return (out - target).square().mean() + sum((x.exp() * p.square()).sum() for p in weights)

    x = torch.tensor(0.0, dtype=F64)
    result = hypergradient(Bilevel(loss, loss), x, y if captured else net, adjoint=Implicit(damping=1.0))
    assert result.converged and result.grad != 0
    for name, b in net.named_buffers():
        assert torch.equal(b, before[name]), name
    assert net.training


@pytest.mark.parametrize("adjoint", [Implicit(CG()), Implicit(), Neumann(2000), FiniteDifference()], ids=str)
def test_one_dropout_mask_for_all_products(adjoint):
    """The mask of the one evaluation is read off; with it, the problem is a ridge regression with masked inputs."""
    masks = []
    drop = nn.Dropout(0.5)

    def lower(x, y, batch):
        masked = drop(X)
        masks.append(masked.detach().clone())
        return (masked @ y - T).square().sum() / 2 + (x.exp() * y.square()).sum() / 2

    problem = Bilevel(ridge().upper, lower)
    torch.manual_seed(3)
    y = randn(7, seed=84)
    got = hypergradient(problem, HYPER, y, adjoint=adjoint).grad
    after = torch.rand(())
    assert all(torch.equal(m, masks[0]) for m in masks)
    H = masks[0].mT @ masks[0] + torch.diag(HYPER.exp())
    expected = -HYPER.exp() * y * torch.linalg.solve(H, XV.mT @ (XV @ y - TV))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    # the random state advanced by one mask, so the next call draws another
    torch.manual_seed(3)
    drop(X)
    assert torch.equal(torch.rand(()), after)
