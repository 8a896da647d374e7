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
from ._doubly_stochastic import SymmetricNewton, doubly_stochastic, doubly_stochastic_ex
from ._generalized_sum_pool import GeneralizedSumPool, SumPooling
from ._gsp_coupling import GSPCoupling, gsp_coupling
from ._laplacian_clustering import (
    BoundOptimizer,
    laplacian_clustering,
    laplacian_clustering_ex,
    transductive_clustering,
    transductive_clustering_ex,
)
from ._loss_free_balancer import AuxLossFreeBalancer
from ._manhattan import Manhattan
from ._manifold_linearizing import ManifoldLinearizing
from ._mirror_sinkhorn import mirror_sinkhorn, mirror_sinkhorn_ex
from ._point_cloud import PointCloud, PointCoupling
from ._rate_reduction import rate_reduction
from ._rounding import round_to_polytope
from ._routing import Routing
from ._self_label import SelfLabels, self_label, self_label_ex
from ._self_label_stream import SelfLabelState, SemiDualNewton
from ._sinkhorn import sinkhorn, sinkhorn_ex
from ._sinkhorn_distillation import SinkhornDistillation, sinkhorn_distillation
from ._sinkhorn_divergence import sinkhorn_divergence
from ._sinkhorn_module import Sinkhorn
from ._sinkhorn_router import SinkhornRouter, sinkhorn_routing
from ._sinkhorn_value import sinkhorn_value
from ._solvers import KernelSinkhorn, LogSinkhorn, TransportSolver
from ._sparse_newton import SparseNewton
from ._zero_shot_loss import zero_shot_loss

__all__ = [
    "AuxLossFreeBalancer",
    "BoundOptimizer",
    "Cosine",
    "Cost",
    "Coupling",
    "Euclidean",
    "GSPCoupling",
    "GeneralizedSumPool",
    "KernelSinkhorn",
    "LogSinkhorn",
    "Manhattan",
    "ManifoldLinearizing",
    "PointCloud",
    "PointCoupling",
    "Routing",
    "SelfLabelState",
    "SelfLabels",
    "SemiDualNewton",
    "Sinkhorn",
    "SinkhornDistillation",
    "SinkhornRouter",
    "SparseNewton",
    "SquaredEuclidean",
    "SumPooling",
    "SymmetricNewton",
    "TransportSolver",
    "doubly_stochastic",
    "doubly_stochastic_ex",
    "gsp_coupling",
    "laplacian_clustering",
    "laplacian_clustering_ex",
    "mirror_sinkhorn",
    "mirror_sinkhorn_ex",
    "rate_reduction",
    "round_to_polytope",
    "self_label",
    "self_label_ex",
    "sinkhorn",
    "sinkhorn_distillation",
    "sinkhorn_divergence",
    "sinkhorn_ex",
    "sinkhorn_routing",
    "sinkhorn_value",
    "transductive_clustering",
    "transductive_clustering_ex",
    "zero_shot_loss",
]
