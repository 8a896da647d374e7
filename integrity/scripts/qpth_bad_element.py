"""qpth: an infeasible element comes back as a number, no word; a NaN in one makes a gradient of all others NaN."""

import torch
from qpth.qp import QPFunction

F64 = torch.float64
Q, none = torch.eye(1, dtype=F64), torch.tensor([], dtype=F64)
G = torch.tensor([[1.0], [-1.0]], dtype=F64)  # x <= h0 and x >= -h1
p, good, bad = torch.zeros(2, 1, dtype=F64), torch.tensor([-1.0, 3.0], dtype=F64), torch.tensor([-0.4, 0.1], dtype=F64)
print("expected", "NaN or a warning, for x <= -0.4 and x >= -0.1; and -1")
print("got     ", QPFunction(verbose=0)(Q, p, G, torch.stack([bad, good]), none, none).flatten())

shared = good.clone().requires_grad_()
spoiled = torch.tensor([[torch.nan], [0.0]], dtype=F64)
x = QPFunction(verbose=0)(Q, spoiled, G, shared.expand(2, 2), none, none)
print("expected", torch.tensor([1.0, 0.0], dtype=F64), "of the second element, which is", x[1, 0].item())
print("got     ", torch.autograd.grad(x[1, 0], shared)[0])
