"""cvxpylayers with solver="MOREAU": another point comes back, and with it another gradient of what a batch shares."""

import cvxpy as cp
import torch
from cvxpylayers.torch import CvxpyLayer

x, v, total = cp.Variable(5), cp.Parameter(5), cp.Parameter()
problem = cp.Problem(cp.Minimize(cp.sum_squares(x - v) / 2), [x >= 0, cp.sum(x) == total])
points = torch.tensor([[0.3, -0.9, 1.2, 0.1, -0.4], [0.1, 0.2, 0.4, -3.0, -2.0]], dtype=torch.float64)
for solver in (None, "MOREAU"):
    t = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    (solution,) = CvxpyLayer(problem, parameters=[v, total], variables=[x], solver=solver)(points, t)
    y = torch.stack([torch.stack([(t - 0.9) / 2, (t + 0.9) / 2]), torch.stack([(t - 0.5) / 3, (t + 0.7) / 3])])
    support = y.square().sum() + ((t - 0.2) / 3).square()  # the closed form: 2 and 3 entries are positive
    print("expected", torch.autograd.grad(support, t)[0])
    print("got     ", torch.autograd.grad(solution.square().sum(), t)[0], "with solver", solver)
