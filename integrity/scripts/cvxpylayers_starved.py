"""cvxpylayers with solver="MOREAU": too few iterations, and no error, warning or status."""

import cvxpy as cp
import torch
from cvxpylayers.torch import CvxpyLayer

x, v = cp.Variable(3), cp.Parameter(3)
problem = cp.Problem(cp.Minimize(cp.sum_squares(x - v)), [cp.norm(x) <= 1])
data = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
layer = CvxpyLayer(problem, parameters=[v], variables=[x], solver="MOREAU")
(few,) = layer(data, solver_args={"max_iter": 3})
print("expected", (data / data.norm()).detach(), "or an error")
print("got     ", few.detach(), "with the gradient", torch.autograd.grad(few[0], data)[0])
