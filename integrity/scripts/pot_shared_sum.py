"""POT: the gradient in shared masses with `ot.batch.solve_batch` and its default `grad="envelope"` is zero."""

import ot
import torch

torch.manual_seed(0)
cost = torch.rand(3, 5, 4, dtype=torch.float64)
logits = torch.rand(5, dtype=torch.float64, requires_grad=True)
b = torch.full((3, 4), 0.25, dtype=torch.float64)


def total(grad):
    a = logits.softmax(0).expand(3, 5)
    return ot.batch.solve_batch(cost, 0.3, a, b, max_iter=10_000, tol=1e-14, reg_type="kl", grad=grad).value.sum()


(expected,) = torch.autograd.grad(total("autodiff"), logits)
(got,) = torch.autograd.grad(total("envelope"), logits)
print("expected", [round(v, 6) for v in expected.tolist()], "(through all iterations)")
print("got     ", [round(v, 6) for v in got.tolist()])
