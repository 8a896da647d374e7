"""POT: `ot.batch.solve_batch` says nothing when it runs out of iterations."""

import ot
import torch

torch.manual_seed(0)
cost = torch.rand(3, 5, 4, dtype=torch.float64)

exact = ot.batch.solve_batch(cost, 0.01, max_iter=100_000, tol=1e-12)
found = ot.batch.solve_batch(cost, 0.01, max_iter=2, tol=1e-12)
print("expected a warning or a status; sums of the first rows", exact.plan[0].sum(1).tolist())
print("got      status", found.status, "and sums", [round(v, 3) for v in found.plan[0].sum(1).tolist()])
