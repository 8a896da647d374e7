"""torchdeq: with `hook_ift=True` dual numbers pass through one step of the update alone."""

import torch
from torchdeq import get_deq

torch.manual_seed(0)
x, W = torch.randn(3, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
W = 0.6 * W / torch.linalg.matrix_norm(W, 2)
deq = get_deq(hook_ift=True, f_tol=1e-14, b_tol=1e-14, f_max_iter=500, b_max_iter=500)


def layer(W):
    return deq(lambda z: torch.tanh(z @ W.T + x), torch.zeros_like(x))[0][-1]


def unrolled(W):
    z = torch.zeros_like(x)
    for _ in range(100):
        z = torch.tanh(z @ W.T + x)
    return z


def tangent(solve):
    with torch.autograd.forward_ad.dual_level():
        z = solve(torch.autograd.forward_ad.make_dual(W, torch.ones_like(W)))
        return torch.autograd.forward_ad.unpack_dual(z).tangent[0].tolist()


print("expected", tangent(unrolled))
print("got     ", tangent(layer))
