"""geomloss: the gradient of the value of `ot.solve_sample` is twice what it should be."""

import torch
from geomloss import ot

torch.manual_seed(0)
x, y = torch.rand(2, 5, 2, dtype=torch.float64)


def value(x):
    return ot.solve_sample(x, y, reg=0.3, debias=True, max_iter=1000).value


h, step = 1e-4, torch.zeros_like(x)
step[0, 0] = h
print("expected", ((value(x + step) - value(x - step)) / (2 * h)).item(), "(differences)")
x.requires_grad_()
print("got     ", torch.autograd.grad(value(x), x)[0][0, 0].item())
