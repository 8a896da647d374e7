"""POT: second derivatives of the value with `grad="envelope"` have no part of the solution in them."""

import ot
import torch

torch.manual_seed(0)
cost = torch.rand(5, 4, dtype=torch.float64)
logits = torch.rand(5, dtype=torch.float64, requires_grad=True)
b = torch.full((4,), 0.25, dtype=torch.float64)


def value(logits, grad):
    a = logits.softmax(0)
    return ot.solve(cost, a, b, reg=0.3, max_iter=10_000, tol=1e-14, grad=grad).value


def curvature(grad):
    (first,) = torch.autograd.grad(value(logits, grad), logits, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), logits)
    return [round(s, 6) for s in second.tolist()]


print("expected", curvature("autodiff"), "(through all iterations)")
print("got     ", curvature("envelope"))
