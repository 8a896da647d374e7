"""Small models around layers of different families, for tests of what other tools do with them.

Every model takes ``(batch, 4)`` numbers, returns a tensor whose first dimension is the batch, holds parameters in front
of the layer, and treats the elements of its batch alike, so that a mean loss may be divided among processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from difflayers.bilevel import ArgminLayer, Bilevel
from difflayers.conic import QuadraticProgram
from difflayers.equilibrium import ConvergentGraphSolver
from difflayers.implicit import Anderson, FixedPoint
from difflayers.pde import Heat, PDEConstraint
from difflayers.proximal import SparseCoding
from difflayers.relu import ConvexReLUHead
from difflayers.transport import Sinkhorn

F64 = torch.float64


class Cell(nn.Module):
    """An update for :class:`FixedPoint`."""

    def __init__(self, size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(size, size), nn.Dropout(dropout)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.linear(self.dropout(z)) + x)


class Graph(nn.Module):
    """Four numbers are the features of the four nodes of a ring."""

    edge_index: Tensor
    edges: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.solver = ConvergentGraphSolver(1, 2, 1, hidden=6, heads=2)
        self.register_buffer("edge_index", torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3], [1, 3, 2, 0, 3, 1, 0, 2]]))
        self.register_buffer("edges", torch.randn(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        edges = self.edges.expand(*x.shape[:-1], 8, 2)
        return self.solver(x.unsqueeze(-1), edges, self.edge_index).squeeze(-1)


class Head(nn.Module):
    """A network that is trained on a support set inside the forward pass, on learned features."""

    support: Tensor
    labels: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(4, 3)
        self.head = ConvexReLUHead(0.1, torch.randn(4, 3))
        self.register_buffer("support", torch.randn(8, 4))
        self.register_buffer("labels", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(self.support), self.labels, self.features(x))


class Field(nn.Module):
    """A heat equation with a network as basis, read at points that the first two numbers say."""

    def __init__(self) -> None:
        super().__init__()
        self.basis = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6))
        self.layer = PDEConstraint(Heat(c=0.5), ridge=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        field = self.layer(self.basis, values={"u0": lambda points: points[:, 1].sin()})
        return field(x[:, :2].sigmoid() * x.new_tensor([1.0, 2 * math.pi]))


def ridge(penalty: Tensor, weights: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The lower problem of :class:`Tuned`."""
    X, y = batch
    return (X @ weights - y).square().sum() + (penalty.exp() * weights.square()).sum()


class Tuned(nn.Module):
    """Ridge regression whose penalties are learned."""

    support: Tensor
    labels: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.penalty = nn.Parameter(torch.zeros(4))
        self.layer = ArgminLayer(Bilevel(upper=ridge, lower=ridge))
        self.register_buffer("support", torch.randn(8, 4))
        self.register_buffer("labels", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        start = torch.zeros_like(self.penalty)
        return x @ self.layer(self.penalty, (self.support, self.labels), init=start)


def program() -> nn.Module:
    """A quadratic program on the simplex."""
    simplex = {"G": -torch.eye(3), "h": torch.zeros(3), "A": torch.ones(1, 3), "b": torch.ones(1)}
    return nn.Sequential(nn.Linear(4, 3), QuadraticProgram(factor=nn.Parameter(torch.eye(3)), **simplex))


def transport() -> nn.Module:
    """A plan between two and three masses."""
    return nn.Sequential(nn.Linear(4, 6), nn.Unflatten(-1, (2, 3)), Sinkhorn(0.5, learnable=True), nn.Flatten(-2))


def code() -> nn.Module:
    """A sparse code."""
    return nn.Sequential(nn.Linear(4, 5), SparseCoding(5, 6, 0.3))


def equilibrium() -> nn.Module:
    """A fixed point."""
    return nn.Sequential(nn.Linear(4, 3), FixedPoint(Cell(3), solver=Anderson(rtol=1e-13)))


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "QuadraticProgram": program,
    "Sinkhorn": transport,
    "SparseCoding": code,
    "FixedPoint": equilibrium,
    "ConvergentGraphSolver": Graph,
    "ConvexReLUHead": Head,
    "PDEConstraint": Field,
    "ArgminLayer": Tuned,
}
NAMES = tuple(MAKERS)


def built(name: str, dtype: torch.dtype = F64) -> tuple[nn.Module, Tensor]:
    """The model, always with the same parameters, and its batch of six."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = MAKERS[name]().to(dtype)
        return model, torch.randn(6, 4, dtype=dtype)


def loss_of(out: Tensor) -> Tensor:
    """A mean over the batch, so that halves of it may be averaged; no entry counts like another."""
    flat = out.reshape(len(out), -1)
    weights = torch.arange(1, flat.shape[1] + 1, dtype=flat.dtype).sin()
    return (flat * weights).sum(-1).square().mean()


def numbers(model: Callable[[Tensor], Tensor], parameters: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """The value, and the gradients of its loss in the batch and in all parameters."""
    x = x.detach().clone().requires_grad_()
    value = model(x)
    grads = torch.autograd.grad(loss_of(value), [x, *parameters.values()])
    return {"value": value.detach(), **dict(zip(["batch", *parameters], grads, strict=True))}


def plain(name: str, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    """What plain use of the model gives."""
    model, x = built(name, dtype)
    return numbers(model, dict(model.named_parameters()), x)


def same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Fails unless all numbers agree; to the last bit by default."""
    assert got.keys() == want.keys()
    for key, expected in want.items():
        size = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got[key], expected, rtol=0, atol=tolerance * size, msg=lambda m, k=key: f"{k}: {m}")
