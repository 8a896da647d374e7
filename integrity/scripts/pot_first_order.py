"""POT: with `grad="envelope"` the gradient in the masses is not that of the default `reg_type="KL"`."""

import ot
import torch

torch.manual_seed(0)
cost = torch.rand(5, 4, dtype=torch.float64)
logits = torch.rand(5, dtype=torch.float64, requires_grad=True)
b = torch.full((4,), 0.25, dtype=torch.float64)


def value(logits, grad):
    a = logits.softmax(0)
    return ot.solve(cost, a, b, reg=0.3, max_iter=10_000, tol=1e-14, grad=grad).value


def difference(i, h=1e-5):
    step = h * torch.eye(5, dtype=torch.float64)[i]
    with torch.no_grad():
        return ((value(logits + step, "detach") - value(logits - step, "detach")) / (2 * h)).item()


print("expected", [round(difference(i), 6) for i in range(5)])
(got,) = torch.autograd.grad(value(logits, "envelope"), logits)
print("got     ", [round(g, 6) for g in got.tolist()])
