"""geomloss: a cloud shared by two calls of `ot.solve_sample` gets twice the sum of its gradients."""

import torch
from geomloss import ot

torch.manual_seed(0)
x, y = torch.rand(2, 5, 2, dtype=torch.float64)
other = torch.rand(5, 2, dtype=torch.float64)


def total(y):
    return sum(ot.solve_sample(points, y, reg=0.3, debias=True, max_iter=1000).value for points in (x, other))


h, step = 1e-4, torch.zeros_like(y)
step[0, 0] = h
print("expected", ((total(y + step) - total(y - step)) / (2 * h)).item(), "(differences)")
y.requires_grad_()
print("got     ", torch.autograd.grad(total(y), y)[0][0, 0].item())
