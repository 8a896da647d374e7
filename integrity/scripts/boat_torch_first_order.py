"""BOAT: conjugate gradients drop the last iterate; where one step is enough, nothing is left."""

import torch
from boat_torch.boat_opt import higher
from boat_torch.na_ol.cg import CG

H = torch.tensor([1.0, 1.0])


def lower(feed, above, below, params=None):  # its minimiser is x / H
    return (H * params[0].square() / 2 - above.weight * params[0]).sum()


def upper(feed, above, below, params=None):
    return params[0].sum() + 0 * above.weight.sum()


above, below = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
below.weight.data = above.weight.data / H
sgd = torch.optim.SGD(below.parameters(), lr=1.0)
config = {"gm_op": "NGD", "lower_level_opt": sgd, "CG": {"tolerance": 1e-6, "k": 100}}
config["GDA"] = {"alpha_init": 0.0, "alpha_decay": 1.0}
solver = CG(lower, upper, below, above, list(below.parameters()), list(above.parameters()), config)
with higher.innerloop_ctx(below, sgd) as (model, _):
    solver.compute_gradients({}, {}, model)
print("expected", (1 / H).tolist())
print("got     ", above.weight.grad[0].tolist())
