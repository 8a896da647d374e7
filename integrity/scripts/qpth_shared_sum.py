"""qpth: the gradient of a matrix that the batch shares is the mean of the elements' gradients, not their sum."""

import torch
from qpth.qp import QPFunction

F64 = torch.float64
Q = torch.eye(2, dtype=F64)
p = -torch.tensor([[2.0, 1.0], [3.0, 1.0], [1.0, 4.0]], dtype=F64)
G, h = torch.tensor([[1.0, 1.0]], dtype=F64, requires_grad=True), torch.ones(1, dtype=F64)
none = torch.tensor([], dtype=F64)

x = QPFunction(verbose=0)(Q, p, G, h, none, none)
(got,) = torch.autograd.grad(x.square().sum(), G)

y = -p - (-p @ G.mT - h) * G / G.square().sum()  # the projections of -p on Gx = h, which holds at all three
(expected,) = torch.autograd.grad(y.square().sum(), G)
print("expected", expected)
print("got     ", got)
