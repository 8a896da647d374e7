"""torchdeq: a batch element that is NaN, and not part of the loss, makes the gradient of what is shared NaN."""

import torch
from torchdeq import get_deq

torch.manual_seed(0)
x, W = torch.randn(3, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
W = (0.6 * W / torch.linalg.matrix_norm(W, 2)).requires_grad_()
deq = get_deq(ift=True, f_tol=1e-14, b_tol=1e-14, f_max_iter=500, b_max_iter=500)


def layer(W):
    return deq(lambda z: torch.tanh(z @ W.T + x), torch.zeros_like(x))[0][-1]


def gradient():
    return torch.autograd.grad(layer(W)[[0, 2]].sum(), W)[0][0].tolist()


print("expected", gradient(), "(first row)")
x[1, 0] = torch.nan
print("got     ", gradient())
