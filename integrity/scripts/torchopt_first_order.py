"""torchopt: ten terms of Neumann's series, its default number, are documented as approximate; they are."""

import warnings

import torch

warnings.simplefilter("ignore", FutureWarning)
import torchopt  # noqa: E402

torch.manual_seed(0)
A, target = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
closed_form = lambda p: torch.linalg.solve(A.T @ A + p.exp().diag(), A.T @ target)  # noqa: E731
slope = lambda w, p: A.T @ (A @ w - target) + p.exp() * w  # noqa: E731
linear_solve = torchopt.linear_solve.solve_inv(ns=True, alpha=0.1)
root = torchopt.diff.implicit.custom_root(slope, argnums=1, solve=linear_solve)(lambda w, p: closed_form(p.detach()))
p = torch.zeros(4, dtype=torch.float64, requires_grad=True)
(expected,) = torch.autograd.grad(closed_form(p).sum(), p)
(got,) = torch.autograd.grad(root(torch.zeros_like(p), p).sum(), p)
print("expected", [round(v, 6) for v in expected.tolist()])
print("got     ", [round(v, 6) for v in got.tolist()])
