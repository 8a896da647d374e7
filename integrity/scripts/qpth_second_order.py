"""qpth: the second derivative comes without an error and leaves out terms."""

import torch
from qpth.qp import QPFunction

F64 = torch.float64
Q, p = torch.eye(2, dtype=F64), -torch.tensor([2.0, 1.0], dtype=F64)
G, h = torch.tensor([[1.0, 2.0]], dtype=F64, requires_grad=True), torch.ones(1, dtype=F64)
none = torch.tensor([], dtype=F64)


def twice(x: torch.Tensor) -> torch.Tensor:
    (first,) = torch.autograd.grad(x.sum(), G, create_graph=True)
    return torch.autograd.grad(first.sum(), G)[0]


got = twice(QPFunction(verbose=0)(Q, p, G, h, none, none))
expected = twice(-p - (-p @ G.mT - h) * G / G.square().sum())  # the projection of -p on Gx = h, which holds
print("expected", expected)
print("got     ", got)
