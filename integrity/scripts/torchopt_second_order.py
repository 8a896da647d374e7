"""torchopt: `custom_root` detaches the solution, so second derivatives lack a part."""

import warnings

import torch

warnings.simplefilter("ignore", FutureWarning)
import torchopt  # noqa: E402

torch.manual_seed(0)
A, target = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
closed_form = lambda p: torch.linalg.solve(A.T @ A + p.exp().diag(), A.T @ target)  # noqa: E731
slope = lambda w, p: A.T @ (A @ w - target) + p.exp() * w  # noqa: E731
linear_solve = torchopt.linear_solve.solve_normal_cg(rtol=1e-14, maxiter=1000)
root = torchopt.diff.implicit.custom_root(slope, argnums=1, solve=linear_solve)(lambda w, p: closed_form(p.detach()))
p = torch.zeros(4, dtype=torch.float64, requires_grad=True)


def curvature(w):
    (first,) = torch.autograd.grad(w.square().sum(), p, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), p)
    return [round(v, 6) for v in second.tolist()]


print("expected", curvature(closed_form(p)))
print("got     ", curvature(root(torch.zeros_like(p), p)))
