"""Proximal layers: the prox of a function, the projection on a set, and what is built from such steps.

The inner problem is `argmin_z 1/2 ||z - x||^2 + t * g(z)`, or a composite of such steps: proximal operators and
projections, networks that are the prox of a learned prior, Moreau envelopes, and sparse coding.

>>> import torch
>>> from difflayers.proximal import project_simplex
>>> x = torch.tensor([1.0, 0.5, -1.0], requires_grad=True)
>>> z = project_simplex(x)
>>> z
tensor([0.7500, 0.2500, 0.0000], grad_fn=<WhereBackward0>)
>>> torch.autograd.grad(z[0], x)
(tensor([ 0.5000, -0.5000,  0.0000]),)
"""

from ._simplex import project_l1_ball, project_simplex
from ._soft_threshold import prox_l1

__all__ = [
    "project_l1_ball",
    "project_simplex",
    "prox_l1",
]
