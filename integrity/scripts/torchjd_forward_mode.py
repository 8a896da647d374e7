"""torchjd: UPGrad is documented as not differentiable, yet a tangent comes back; it leaves out that of the weights."""

import torch
from torch.autograd import forward_ad
from torchjd.aggregation import UPGrad
from torchjd.linalg import QuadprogProjector

aggregate = UPGrad(projector=QuadprogProjector(norm_eps=0.0, reg_eps=0.0))
J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
direction = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
with forward_ad.dual_level():
    got = forward_ad.unpack_dual(aggregate(forward_ad.make_dual(J, direction))).tangent
step = 1e-6
print("expected", (aggregate(J + step * direction) - aggregate(J - step * direction)) / (2 * step), "or an error")
print("got     ", got)
