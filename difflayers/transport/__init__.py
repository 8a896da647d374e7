"""Transport layers: couplings with given marginals.

The inner problem chooses a nonnegative matrix under constraints on its row and column sums, usually with an entropic
term: optimal transport plans, soft assignments, pooling, distillation and clustering. A solver finds the potentials;
every derivative is one linear solve at the plan, however it was found.

>>> import torch
>>> from difflayers.transport import sinkhorn
>>> cost = torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 1.0]], requires_grad=True)
>>> plan = sinkhorn(cost, eps=0.5)
>>> plan.sum(-1), plan.sum(-2)
(tensor([0.5000, 0.5000], grad_fn=<...>), tensor([0.3333, 0.3333, 0.3333], grad_fn=<...>))
>>> (plan * cost.detach()).sum().backward()  # through the plan, not through the iteration
>>> cost.grad.shape
torch.Size([2, 3])
"""

from ._costs import Cosine, Cost, Euclidean, SquaredEuclidean
from ._coupling import Coupling
from ._sinkhorn import sinkhorn, sinkhorn_ex
from ._sinkhorn_divergence import sinkhorn_divergence
from ._sinkhorn_module import Sinkhorn
from ._sinkhorn_value import sinkhorn_value
from ._solvers import KernelSinkhorn, LogSinkhorn, TransportSolver

__all__ = [
    "Cosine",
    "Cost",
    "Coupling",
    "Euclidean",
    "KernelSinkhorn",
    "LogSinkhorn",
    "Sinkhorn",
    "SquaredEuclidean",
    "TransportSolver",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_ex",
    "sinkhorn_value",
]
