"""geomloss: with a quick `scaling` the loss is inexact, and no residual or warning says how much."""

import torch
from geomloss import SamplesLoss

torch.manual_seed(0)
x, y = torch.rand(2, 5, 2, dtype=torch.float64)

exact = SamplesLoss("sinkhorn", p=2, blur=0.4, scaling=0.9999, backend="tensorized")(x, y)
found = SamplesLoss("sinkhorn", p=2, blur=0.4, scaling=0.1, backend="tensorized")(x, y)
print("expected", exact.item(), "or a warning")
print("got     ", found.item())
