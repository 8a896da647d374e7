"""geomloss: second derivatives of `SamplesLoss` hold the potentials of the other cloud fixed."""

import torch
from geomloss import SamplesLoss

torch.manual_seed(0)
x, y = torch.rand(2, 5, 2, dtype=torch.float64)
loss = SamplesLoss("sinkhorn", p=2, blur=0.4, scaling=0.999, backend="tensorized")


def slope(x, create_graph=False):
    x = x.clone().requires_grad_() if not x.requires_grad else x
    return torch.autograd.grad(loss(x, y), x, create_graph=create_graph)[0]


h, step = 1e-4, torch.zeros_like(x)
step[0, 0] = h
print("expected", ((slope(x + step) - slope(x - step))[0, 0] / (2 * h)).item(), "(differences of its own gradient)")
x.requires_grad_()
print("got     ", torch.autograd.grad(slope(x, True)[0, 0], x)[0][0, 0].item())
