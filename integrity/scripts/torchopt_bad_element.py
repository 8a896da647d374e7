"""torchopt: a batch element that is NaN, and not part of the loss, makes the gradient of what is shared NaN."""

import warnings

import torch

warnings.simplefilter("ignore", FutureWarning)
import torchopt  # noqa: E402

torch.manual_seed(0)
A, target = torch.randn(8, 4, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
closed_form = lambda p: torch.linalg.solve(A.T @ A + p.exp().diag(), (target @ A).T).T  # noqa: E731
slope = lambda w, p: (w @ A.T - target) @ A + p.exp() * w  # noqa: E731
linear_solve = torchopt.linear_solve.solve_normal_cg(rtol=1e-14, maxiter=1000)
root = torchopt.diff.implicit.custom_root(slope, argnums=1, solve=linear_solve)(lambda w, p: closed_form(p.detach()))
p = torch.zeros(4, dtype=torch.float64, requires_grad=True)


def gradient():
    w = root(torch.zeros(3, 4, dtype=torch.float64), p)
    return torch.autograd.grad(w[[0, 2]].square().sum(), p)[0].tolist()


print("expected", gradient())
target[1] = torch.nan
print("got     ", gradient())
