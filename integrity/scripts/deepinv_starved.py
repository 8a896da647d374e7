"""deepinv: `TVPrior.prox` says nothing when it runs out of iterations."""

import torch

try:
    from deepinv.optim import TVPrior
except RuntimeError:  # a torchvision for CUDA beside a torch without it lacks these
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from deepinv.optim import TVPrior

image = torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0, 0.5, 0.5], dtype=torch.float64).view(1, 1, 9, 1)
# three pieces of 3, 4 and 2 pixels, moved towards each other by 0.3 at every jump
expected = image.flatten() + torch.tensor([0.1] * 3 + [-0.15] * 4 + [0.15] * 2)
few = TVPrior(def_crit=1e-10, n_it_max=5).prox(image, gamma=0.3)
print("expected", [round(v, 4) for v in expected.tolist()], "or a warning")
print("got     ", [round(v, 4) for v in few.flatten().tolist()])
