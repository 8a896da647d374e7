"""cvxpylayers with solver="MOREAU": an infeasible element comes back as a number, with a gradient and no word."""

import cvxpy as cp
import torch
from cvxpylayers.torch import CvxpyLayer

x, v, r = cp.Variable(3), cp.Parameter(3), cp.Parameter()
problem = cp.Problem(cp.Minimize(cp.sum_squares(x - v)), [cp.norm(x) <= r])
layer = CvxpyLayer(problem, parameters=[v, r], variables=[x], solver="MOREAU")
data = torch.tensor([[3.0, -1.0, 2.0], [3.0, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
(solution,) = layer(data, torch.tensor([1.0, -1.0], dtype=torch.float64))
print("expected", "an error, or NaN for the second element, whose radius is -1")
print("got     ", solution[1].detach(), "with the gradient", torch.autograd.grad(solution[1].sum(), data)[0][1])
