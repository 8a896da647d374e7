"""geomloss: the derivative of the value of `ot.solve_sample` by dual numbers is twice what it should be."""

import torch
from geomloss import ot

torch.manual_seed(0)
x, y = torch.rand(2, 5, 2, dtype=torch.float64)


def value(x):
    return ot.solve_sample(x, y, reg=0.3, debias=True, max_iter=1000).value


h, step = 1e-4, torch.zeros_like(x)
step[0, 0] = 1
print("expected", ((value(x + h * step) - value(x - h * step)) / (2 * h)).item(), "(differences)")
with torch.autograd.forward_ad.dual_level():
    dual = value(torch.autograd.forward_ad.make_dual(x, step))
    print("got     ", torch.autograd.forward_ad.unpack_dual(dual).tangent.item())
