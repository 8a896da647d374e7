"""Fixed-point layers of papers: the update is part of the layer, its solution is the output.

>>> import torch
>>> from difflayers.equilibrium import edge_softmax, graph_equilibrium
>>> edge_index = torch.tensor([[0, 0, 1, 2], [1, 2, 2, 0]])  # node 0 reads 1 and 2, 1 reads 2, 2 reads 0
>>> logits = torch.zeros(4, requires_grad=True)
>>> weights = edge_softmax(logits, edge_index, 3)
>>> H = graph_equilibrium(weights, edge_index, torch.tensor([[1.0], [0.0], [0.0]]), 0.9)
>>> H.squeeze(-1).detach()
tensor([4.3384, 3.5141, 3.9046])
>>> H.sum().backward()
>>> logits.grad.shape
torch.Size([4])
"""

from ._convergent_graph_solver import (
    ConvergentGraphSolver,
    disjoint_union,
    edge_sigmoid,
    edge_softmax,
    graph_equilibrium,
    graph_equilibrium_ex,
)

__all__ = [
    "ConvergentGraphSolver",
    "disjoint_union",
    "edge_sigmoid",
    "edge_softmax",
    "graph_equilibrium",
    "graph_equilibrium_ex",
]
