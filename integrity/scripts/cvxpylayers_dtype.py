"""cvxpylayers: float32 goes in and float64 comes out; the numbers are right."""

import cvxpy as cp
import torch
from cvxpylayers.torch import CvxpyLayer

x, v = cp.Variable(2), cp.Parameter(2)
layer = CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - v)), [x >= 0]), parameters=[v], variables=[x])
(solution,) = layer(torch.tensor([1.0, -1.0], dtype=torch.float32))
print("expected", torch.float32)
print("got     ", solution.dtype)
