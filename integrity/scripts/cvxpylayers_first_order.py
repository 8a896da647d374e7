"""cvxpylayers with solver="MOREAU": a projection on the simplex, and another point comes back."""

import cvxpy as cp
import torch
from cvxpylayers.torch import CvxpyLayer

x, v, total = cp.Variable(5), cp.Parameter(5), cp.Parameter()
problem = cp.Problem(cp.Minimize(cp.sum_squares(x - v) / 2), [x >= 0, cp.sum(x) == total])
data = torch.tensor([0.3, -0.9, 1.2, 0.1, -0.4], dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
for solver in (None, "MOREAU"):
    layer = CvxpyLayer(problem, parameters=[v, total], variables=[x], solver=solver)
    print("expected", torch.tensor([0.05, 0.0, 0.95, 0.0, 0.0], dtype=torch.float64))
    print("got     ", layer(*data)[0].round(decimals=3), "with solver", solver)
