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

from ._gated_relu import beta_max, convex_gated_relu, convex_gated_relu_ex
from ._gated_solver import FISTA
from ._gates import Gates, enumerate_gates, sample_gates
from ._losses import Logistic, Loss, Squared
from ._network import GatedReLU, TwoLayerReLU, from_network, minimal_network, to_network
from ._relu_head import ConvexReLUHead
from ._relu_solution import ConvexReLUSolution, predict

__all__ = [
    "FISTA",
    "ConvexReLUHead",
    "ConvexReLUSolution",
    "GatedReLU",
    "Gates",
    "Logistic",
    "Loss",
    "Squared",
    "TwoLayerReLU",
    "beta_max",
    "convex_gated_relu",
    "convex_gated_relu_ex",
    "enumerate_gates",
    "from_network",
    "minimal_network",
    "predict",
    "sample_gates",
    "to_network",
]
