"""torchdeq: implicit differentiation takes the solution for a constant, so second derivatives lack a part."""

import torch
from torchdeq import get_deq

torch.manual_seed(0)
x, W = torch.randn(3, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
W = (0.6 * W / torch.linalg.matrix_norm(W, 2)).requires_grad_()
deq = get_deq(ift=True, f_tol=1e-14, b_tol=1e-14, f_max_iter=500, b_max_iter=500)


def layer(W):
    return deq(lambda z: torch.tanh(z @ W.T + x), torch.zeros_like(x))[0][-1]


def unrolled(W):
    z = torch.zeros_like(x)
    for _ in range(100):
        z = torch.tanh(z @ W.T + x)
    return z


def twice(solve):
    (first,) = torch.autograd.grad(solve(W).square().sum(), W, create_graph=True)
    return torch.autograd.grad(first.sum(), W)[0][0].tolist()


print("expected", twice(unrolled))
print("got     ", twice(layer))
