"""ReLU layers: two-layer ReLU networks trained to global optimality inside a model.

The inner problem is the training of a two-layer ReLU network with weight decay, written as the equivalent convex
program over activation patterns, so that the trained network is a function of its training set that can be
differentiated.

>>> import torch
>>> from difflayers.relu import convex_gated_relu, enumerate_gates, predict
>>> X = torch.tensor([[-2.0, 1.0], [-1.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
>>> y = torch.tensor([2.0, 1.0, 1.0, 2.0], requires_grad=True)
>>> network = convex_gated_relu(X, y, 0.01, enumerate_gates(X))
>>> predict(network, torch.tensor([[3.0, 1.0]])).round(decimals=1)
tensor([3.], grad_fn=<RoundBackward1>)
>>> torch.autograd.grad(network.objective, y)[0].shape
torch.Size([4])
"""

from ._approximate_pruning import prune_network
from ._beta_max import beta_max
from ._cone_admm import ADMM
from ._cone_decomposition import ConeDecomposition, cone_decomposition
from ._cone_interior_point import InteriorPoint
from ._cone_lagrangian import AugmentedLagrangian
from ._convex_relu import convex_relu, convex_relu_ex
from ._gate_search import GateSearch, grow_gates
from ._gated_relu import convex_gated_relu, convex_gated_relu_ex
from ._gated_solver import FISTA
from ._gates import Gates, enumerate_gates, sample_gates
from ._losses import Hinge, Huber, Logistic, Loss, Squared
from ._net_trim import TrimmedLayer, net_trim, net_trim_weights, net_trim_weights_ex
from ._network import GatedReLU, TwoLayerReLU, from_network, minimal_network, to_network
from ._nuclear_relu import (
    VectorGatedReLU,
    VectorReLUSolution,
    beta_max_vector,
    convex_gated_relu_vector,
    convex_gated_relu_vector_ex,
    predict_vector,
    to_network_vector,
)
from ._optimal_set import OptimalSet, optimal_set
from ._regularization_path import PathPoint, RegularizationPath, follow_path, regularization_path
from ._relu_head import ConvexReLUHead
from ._relu_solution import ConvexReLUSolution, predict
from ._robust_relu import ClarabelSolver, robust_convex_relu, robust_convex_relu_ex
from ._robustness import L2, LInf, Robustness, certified_margin, narrow_gates
from ._sampled_program import sample_directions, sampled_convex_program, sampled_convex_program_ex
from ._sensitivity import Sensitivity, sensitivity

__all__ = [
    "ADMM",
    "FISTA",
    "L2",
    "AugmentedLagrangian",
    "ClarabelSolver",
    "ConeDecomposition",
    "ConvexReLUHead",
    "ConvexReLUSolution",
    "GateSearch",
    "GatedReLU",
    "Gates",
    "Hinge",
    "Huber",
    "InteriorPoint",
    "LInf",
    "Logistic",
    "Loss",
    "OptimalSet",
    "PathPoint",
    "RegularizationPath",
    "Robustness",
    "Sensitivity",
    "Squared",
    "TrimmedLayer",
    "TwoLayerReLU",
    "VectorGatedReLU",
    "VectorReLUSolution",
    "beta_max",
    "beta_max_vector",
    "certified_margin",
    "cone_decomposition",
    "convex_gated_relu",
    "convex_gated_relu_ex",
    "convex_gated_relu_vector",
    "convex_gated_relu_vector_ex",
    "convex_relu",
    "convex_relu_ex",
    "enumerate_gates",
    "follow_path",
    "from_network",
    "grow_gates",
    "minimal_network",
    "narrow_gates",
    "net_trim",
    "net_trim_weights",
    "net_trim_weights_ex",
    "optimal_set",
    "predict",
    "predict_vector",
    "prune_network",
    "regularization_path",
    "robust_convex_relu",
    "robust_convex_relu_ex",
    "sample_directions",
    "sample_gates",
    "sampled_convex_program",
    "sampled_convex_program_ex",
    "sensitivity",
    "to_network",
    "to_network_vector",
]
