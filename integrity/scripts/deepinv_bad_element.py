"""deepinv: a batch element that is NaN, and not part of the loss, makes the gradient of what is shared NaN."""

import torch

try:
    import deepinv
except RuntimeError:  # a torchvision for CUDA beside a torch without it lacks these
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import deepinv

torch.manual_seed(0)
A, y, z = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 6), (3, 5), (3, 6)))
physics = deepinv.physics.LinearPhysics(A=lambda x, **_: x @ A.T, A_adjoint=lambda y, **_: y @ A)
solve = deepinv.optim.linear.least_squares_implicit_backward


def gradient():
    gamma = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = solve(physics, y, z=z, gamma=gamma, tol=1e-14, max_iter=100, eps=1e-30)
    return torch.autograd.grad(x[[0, 2]].square().sum(), gamma)[0].item()


print("expected", gradient())
y[1, 0] = torch.nan
print("got     ", gradient())
