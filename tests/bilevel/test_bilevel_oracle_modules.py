"""Hypergradients where the lower variable is a module: networks, dropout, batch normalisation, shared weights."""

from __future__ import annotations

import copy
import gc
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from difflayers.bilevel import ArgminLayer, Bilevel, hypergradient
from tests.bilevel import oracle_dense as dense
from tests.bilevel.oracle_cases import ADJOINTS, AT, F64, RIDGE, far, problem
from tests.bilevel.oracle_closed import tensor


def mlp() -> tuple[nn.Sequential, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return (net, *(torch.randn(s, dtype=F64) for s in ((12, 2), (12, 1), (6, 2), (6, 1))))


def decay(x: Tensor, parameters: Any) -> Tensor:
    return 0.5 * (x.exp() * torch.cat([p.reshape(-1) for p in parameters]) ** 2).sum()


def test_network() -> None:
    """A network with one decay a weight: the dense theorem at its optimum, and differences of re-solved training."""
    net, A, b, C, c = mlp()
    names = [name for name, _ in net.named_parameters()]
    start, back = dense.flat([p.detach() for p in net.parameters()])
    x = torch.linspace(-2, -1, start.numel(), dtype=F64)

    def call(v: Tensor, inputs: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, back(v), strict=True)), (inputs,))

    def lower(x: Tensor, v: Tensor) -> Tensor:
        return ((call(v, A) - b) ** 2).mean() + 0.5 * (x.exp() * v**2).sum()

    def upper(x: Tensor, v: Tensor) -> Tensor:
        return ((call(v, C) - c) ** 2).mean()

    for _ in range(300):
        start = start - 0.3 * torch.autograd.functional.jacobian(lambda v: lower(x, v), start)
    v = dense.solve(lower, x, start)
    assert torch.linalg.eigvalsh(torch.autograd.functional.hessian(lambda v: lower(x, v), v))[0] > 1e-3
    with torch.no_grad():
        for p, value in zip(net.parameters(), back(v), strict=True):
            p.copy_(value)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    made = Bilevel(
        lambda x, m, batch: ((m(batch[0]) - batch[1]) ** 2).mean(),
        lambda x, m, batch: ((m(batch[0]) - batch[1]) ** 2).mean() + decay(x, m.parameters()),
    )
    found = hypergradient(made, x, net, ((C, c), (A, b)))
    wanted, q = dense.gradient(upper, lower, x, v)
    assert list(found.adjoint) == names
    assert far(found.grad, wanted) < 1e-8
    assert far(dense.flat(list(found.adjoint.values()))[0], q) < 1e-8
    assert far(found.grad, dense.sixth(dense.resolved(upper, lower, v), x, 3e-2)) < 1e-6
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
    assert all(p.grad is None and isinstance(p, nn.Parameter) for p in net.parameters())


@pytest.mark.parametrize("adjoint", ["default", "minres", "lu"])
def test_dropout_uses_one_mask(adjoint: str) -> None:
    """Six inputs, 64 masks: every product sees the same one, so the result is that of one of 64 dense problems."""
    r = np.random.default_rng(7)
    A, b, t, at = r.normal(size=(3, 2)), r.normal(size=3), r.normal(size=2), np.array([0.2, -0.4])
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1, bias=False)).double()
    w = net[1].weight.detach().numpy()[0].copy()
    made = Bilevel(
        lambda x, m, batch: 0.5 * ((m[1].weight[0] - tensor(t)) ** 2).sum(),
        lambda x, m, batch: (
            0.5 * ((m(tensor(A))[:, 0] - tensor(b)) ** 2).sum() + 0.5 * (x.exp() * m[1].weight ** 2).sum()
        ),
    )
    wanted = []
    for mask in itertools.product((0.0, 2.0), repeat=6):
        B = np.reshape(mask, (3, 2)) * A
        q = np.linalg.solve(B.T @ B + np.diag(np.exp(at)), w - t)
        wanted.append((-np.exp(at) * w * q, np.linalg.norm(B.T @ (B @ w - b) + np.exp(at) * w)))
    for seed in range(8):
        torch.manual_seed(seed)
        found = hypergradient(made, tensor(at), net, adjoint=ADJOINTS[adjoint])
        off = [far(found.grad, g) + abs(float(found.stationarity) - s) for g, s in wanted]
        assert min(off) < 1e-7, (seed, min(off))
        torch.manual_seed(seed)
        assert torch.equal(hypergradient(made, tensor(at), net, adjoint=ADJOINTS[adjoint]).grad, found.grad)


@pytest.mark.parametrize("training", [True, False])
def test_batch_normalisation(training: bool) -> None:
    """Statistics of the batch in training, stored ones in evaluation; buffers stay as they were, to the last bit."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double()
    A, b, c = torch.randn(10, 2, dtype=F64), torch.randn(10, 1, dtype=F64), torch.randn(10, 1, dtype=F64)
    net(3 * A + 1)
    net.train(training)
    twin = copy.deepcopy(net)
    names = [name for name, _ in net.named_parameters()]
    v, back = dense.flat([p.detach() for p in net.parameters()])
    x = torch.full_like(v, 1.0)

    def call(v: Tensor) -> Tensor:
        return torch.func.functional_call(copy.deepcopy(twin), dict(zip(names, back(v), strict=True)), (A,))

    made = Bilevel(
        lambda x, m, batch: ((m(A) - c) ** 2).mean(),
        lambda x, m, batch: ((m(A) - b) ** 2).mean() + decay(x, m.parameters()),
    )
    found = hypergradient(made, x, net)
    wanted, q = dense.gradient(
        lambda x, v: ((call(v) - c) ** 2).mean(), lambda x, v: ((call(v) - b) ** 2).mean() + decay(x, [v]), x, v
    )
    assert far(found.grad, wanted) < 1e-8 and far(dense.flat(list(found.adjoint.values()))[0], q) < 1e-8
    state = twin.state_dict()
    assert all(torch.equal(p, state[name]) for name, p in net.state_dict().items())
    assert net.training == training


def test_module_above_and_below() -> None:
    """x the weights of a feature map, y a ridge head: closed form of the head, differences of order six through it."""
    torch.manual_seed(4)
    features = nn.Sequential(nn.Linear(2, 3), nn.Tanh()).double()
    head = nn.Linear(3, 1, bias=False).double()
    A, b, C, c = (torch.randn(s, dtype=F64) for s in ((9, 2), (9, 1), (5, 2), (5, 1)))
    names = [name for name, _ in features.named_parameters()]
    u, back = dense.flat([p.detach() for p in features.parameters()])

    def embed(u: Tensor, inputs: Tensor) -> Tensor:
        return torch.func.functional_call(features, dict(zip(names, back(u), strict=True)), (inputs,))

    def optimum(u: Tensor) -> Tensor:
        Z = embed(u, A)
        return torch.linalg.solve(Z.T @ Z + 0.3 * torch.eye(3, dtype=F64), Z.T @ b)

    with torch.no_grad():
        head.weight.copy_(optimum(u).T)
    made = Bilevel(
        lambda x, y, batch: 0.5 * ((y(x(batch[0])) - batch[1]) ** 2).sum(),
        lambda x, y, batch: 0.5 * ((y(x(batch[0])) - batch[1]) ** 2).sum() + 0.15 * (y.weight**2).sum(),
    )
    found = hypergradient(made, features, head, ((C, c), (A, b)))
    wanted = dense.sixth(lambda u: 0.5 * ((embed(u, C) @ optimum(u) - c) ** 2).sum(), u)
    assert list(found.grad) == names and list(found.adjoint) == ["weight"]
    assert far(dense.flat(list(found.grad.values()))[0], wanted) < 1e-8
    assert all(p.grad is None for p in [*features.parameters(), *head.parameters()])


def test_frozen_and_shared_weights() -> None:
    """A frozen weight is a constant; one weight used in two places is one unknown."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 2, bias=False)).double()
    net[2].weight = net[0].weight
    A, b = torch.randn(8, 2, dtype=F64), torch.randn(8, 2, dtype=F64)
    made = Bilevel(
        lambda x, m, batch: (m(A) ** 2).sum(),
        lambda x, m, batch: ((m(A) - b) ** 2).mean() + 0.5 * (x.exp() * m[0].weight ** 2).sum(),
    )
    v, x = net[0].weight.detach().reshape(-1).clone(), torch.ones(2, 2, dtype=F64)

    def call(v: Tensor) -> Tensor:
        return torch.tanh(A @ v.view(2, 2).T) @ v.view(2, 2).T

    wanted, q = dense.gradient(
        lambda x, v: (call(v) ** 2).sum(),
        lambda x, v: ((call(v) - b) ** 2).mean() + 0.5 * (x.exp() * v**2).sum(),
        x.reshape(-1),
        v,
    )
    found = hypergradient(made, x, net)
    assert far(found.grad.reshape(-1), wanted) < 1e-8
    assert list(found.adjoint) == ["0.weight"] and far(found.adjoint["0.weight"].reshape(-1), q) < 1e-8
    net[2].weight = nn.Parameter(torch.randn(2, 2, dtype=F64), requires_grad=False)
    frozen = net[2].weight.detach().clone()

    def partly(v: Tensor) -> Tensor:
        return torch.tanh(A @ v.view(2, 2).T) @ frozen.T

    wanted, q = dense.gradient(
        lambda x, v: (partly(v) ** 2).sum(),
        lambda x, v: ((partly(v) - b) ** 2).mean() + 0.5 * (x.exp() * v**2).sum(),
        x.reshape(-1),
        v,
    )
    found = hypergradient(made, x, net)
    assert list(found.adjoint) == ["0.weight"] and far(found.grad.reshape(-1), wanted) < 1e-8
    assert torch.equal(net[2].weight, frozen) and not net[2].weight.requires_grad


def test_captured_tensors() -> None:
    """What is computed from x outside of the function: an error or the right gradient, never a silent zero."""
    x = tensor(AT["ridge"]).requires_grad_()
    e, exact = x.exp(), RIDGE.exact(AT["ridge"])
    A, b = tensor(RIDGE.A), tensor(RIDGE.b)
    hidden = Bilevel(RIDGE.upper, lambda x, y, batch: 0.5 * ((A @ y - b) ** 2).sum() + 0.5 * (e * y**2).sum())
    try:
        found = hypergradient(hidden, x, tensor(exact.y))
    except ValueError as error:
        assert "lower" in str(error)
        return
    assert far(found.grad, exact.gradient) < 1e-8


def test_nothing_is_kept() -> None:
    """Two hundred hypergradients leave no tensor behind."""
    P, made, at = problem("ridge")
    x, y = tensor(at).requires_grad_(), tensor(P.exact(at).y)
    previous = None

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(one), Tensor) for one in gc.get_objects())

    counts = []
    for step in range(201):
        previous = hypergradient(made, x, y, init=previous).adjoint
        if step % 100 == 0:
            counts.append(alive())
    assert counts[1] == counts[2], counts


def test_attention_has_second_derivatives() -> None:
    """Fused attention cannot be differentiated twice: the plain one instead, or an error that says so."""
    torch.manual_seed(6)
    net = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True, dropout=0.0).double()
    A, target = torch.randn(2, 3, 4, dtype=F64), torch.randn(2, 3, 4, dtype=F64)
    x = torch.tensor(3.0, dtype=F64)
    made = Bilevel(
        lambda x, m, batch: ((m(A) - target) ** 2).mean(),
        lambda x, m, batch: ((m(A) + target) ** 2).mean() + 0.5 * x * sum((p**2).sum() for p in m.parameters()),
    )
    names = [name for name, _ in net.named_parameters()]
    v, back = dense.flat([p.detach() for p in net.parameters()])

    def call(v: Tensor) -> Tensor:
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(net, dict(zip(names, back(v), strict=True)), (A,))

    try:
        found = hypergradient(made, x, net)
    except (RuntimeError, ValueError) as error:
        assert "sdpa_kernel" in str(error) or "MATH" in str(error), error
        return
    wanted, _ = dense.gradient(
        lambda x, v: ((call(v) - target) ** 2).mean(),
        lambda x, v: ((call(v) + target) ** 2).mean() + 0.5 * x[0] * (v**2).sum(),
        x[None],
        v,
    )
    assert far(found.grad[None], wanted) < 1e-8


def test_layer_with_dropout() -> None:
    """One mask for the solve and its derivative, also when generator and mode of the module moved on in between."""
    r = np.random.default_rng(8)
    A, b, at = r.normal(size=(3, 2)), r.normal(size=3), np.array([0.2, -0.4])
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1, bias=False)).double()
    made = Bilevel(
        lambda x, m, batch: m[1].weight.sum(),
        lambda x, m, batch: (
            0.5 * ((m(tensor(A))[:, 0] - tensor(b)) ** 2).sum() + 0.5 * (x.exp() * m[1].weight ** 2).sum()
        ),
    )
    solve = ArgminLayer(made, init=net)
    wanted = []
    for mask in itertools.product((0.0, 2.0), repeat=6):
        B = np.reshape(mask, (3, 2)) * A
        inverse = np.linalg.inv(B.T @ B + np.diag(np.exp(at)))
        wanted.append((inverse @ B.T @ b, -inverse * (np.exp(at) * (inverse @ B.T @ b))))
    seen = set()
    for seed in range(6):
        torch.manual_seed(seed)
        x = tensor(at).requires_grad_()
        y = solve(x)["1.weight"][0]
        torch.randn(100)
        net.eval()
        J = torch.stack([torch.autograd.grad(one, x, retain_graph=True)[0] for one in y])
        assert not net.training and not net[0].training
        net.train()
        off = [far(y, w) + far(J, j) for w, j in wanted]
        assert min(off) < 1e-8, (seed, min(off))
        seen.add(off.index(min(off)))
    assert len(seen) > 1


def test_layer_with_batch_normalisation() -> None:
    """Stationary by batch statistics, derivative as by differences of order six of dense solves, buffers untouched."""
    torch.manual_seed(9)
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Linear(2, 1)).double()
    A, b = torch.randn(9, 2, dtype=F64), torch.randn(9, 1, dtype=F64)
    made = Bilevel(
        lambda x, m, batch: m(A).sum(), lambda x, m, batch: ((m(A) - b) ** 2).mean() + decay(x, m.parameters())
    )
    twin = copy.deepcopy(net)
    names = [name for name, _ in net.named_parameters()]
    _, back = dense.flat([p.detach() for p in net.parameters()])

    def lower(x: Tensor, v: Tensor) -> Tensor:
        out = torch.func.functional_call(copy.deepcopy(twin), dict(zip(names, back(v), strict=True)), (A,))
        return ((out - b) ** 2).mean() + decay(x, [v])

    x = torch.tensor([-1.5], dtype=F64, requires_grad=True)
    y = torch.cat([p.reshape(-1) for p in ArgminLayer(made, init=net)(x).values()])
    at = y.detach()
    assert torch.autograd.functional.jacobian(lambda v: lower(x.detach(), v), at).norm() < 1e-7
    (g,) = torch.autograd.grad((y**3).sum(), x)
    value = dense.resolved(lambda x, v: (v**3).sum(), lower, dense.solve(lower, x.detach(), at))
    assert far(g, dense.sixth(value, x.detach())) < 1e-6
    state = twin.state_dict()
    assert all(torch.equal(p, state[name]) for name, p in net.state_dict().items())


def test_layer_with_a_module_above() -> None:
    """backward() reaches the weights of a feature map, and the data, through the closed form of a ridge head."""
    torch.manual_seed(4)
    features = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh()).double()
    head, twin = nn.Linear(3, 1, bias=False).double(), copy.deepcopy(features)
    A, b = torch.randn(9, 2, dtype=F64, requires_grad=True), torch.randn(9, 1, dtype=F64)
    u = [p.detach().clone().requires_grad_() for p in features.parameters()]
    Z = torch.func.functional_call(twin, dict(zip(dict(twin.named_parameters()), u, strict=True)), (A,))
    w = torch.linalg.solve(Z.T @ Z + 0.3 * torch.eye(3, dtype=F64), Z.T @ b)
    wanted = torch.autograd.grad((w**3).sum(), [*u, A])
    made = Bilevel(
        lambda x, y, batch: y.weight.sum(),
        lambda x, y, batch: 0.5 * ((y(x(batch[0])) - batch[1]) ** 2).sum() + 0.15 * (y.weight**2).sum(),
    )
    found = ArgminLayer(made, init=head)(features, (A, b))["weight"]
    assert far(found.T, w) < 1e-9
    (found**3).sum().backward()
    for p, one in zip([*features.parameters(), A], wanted, strict=True):
        assert p.grad is not None and float((p.grad - one).abs().max()) < 1e-8
    assert head.weight.grad is None
