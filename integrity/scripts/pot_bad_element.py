"""POT: a batch element that is NaN, and not part of the loss, makes the gradient of what is shared NaN."""

import ot
import torch

torch.manual_seed(0)
cost = torch.rand(3, 5, 4, dtype=torch.float64)


def gradient(cost):
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    found = ot.batch.solve_batch(scale * cost, 0.3, max_iter=10_000, tol=1e-14, grad="autodiff")
    return torch.autograd.grad(found.plan[[0, 2]].square().sum(), scale)[0].item()


print("expected", gradient(cost))
cost[1, 0, 0] = torch.nan
print("got     ", gradient(cost))
