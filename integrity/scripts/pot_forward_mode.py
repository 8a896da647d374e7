"""POT: forward mode through `grad="last_step"` is that of the last iteration, as documented, and wrong for the plan."""

import ot
import torch
from torch.autograd import forward_ad

torch.manual_seed(0)
cost, direction = torch.rand(2, 5, 4, dtype=torch.float64)
b = torch.full((4,), 0.25, dtype=torch.float64)
a = torch.full((5,), 0.2, dtype=torch.float64)


def plan(cost, grad):
    return ot.solve(cost, a, b, reg=0.3, max_iter=10_000, tol=1e-14, grad=grad).plan


h = 1e-5
expected = (plan(cost + h * direction, "detach") - plan(cost - h * direction, "detach")) / (2 * h)
with forward_ad.dual_level():
    got = forward_ad.unpack_dual(plan(forward_ad.make_dual(cost, direction), "last_step")).tangent
print("expected", [round(v, 6) for v in expected[0].tolist()], "(first row)")
print("got     ", [round(v, 6) for v in got[0].tolist()])
