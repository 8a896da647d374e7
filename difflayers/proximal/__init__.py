"""Proximal layers: the prox of a function, the projection on a set, and what is built from such steps.

The inner problem is `argmin_z 1/2 ||z - x||^2 + t * g(z)`, or a composite of such steps: proximal operators and
projections, networks that are the prox of a learned prior, Moreau envelopes, and sparse coding.

>>> import torch
>>> from difflayers.proximal import project_simplex
>>> x = torch.tensor([1.0, 0.5, -1.0], requires_grad=True)
>>> z = project_simplex(x)
>>> z
tensor([0.7500, 0.2500, 0.0000], grad_fn=<ReluBackward0>)
>>> torch.autograd.grad(z[0], x)
(tensor([ 0.5000, -0.5000,  0.0000]),)
"""

from ._boxes import project_box, project_linf_ball, project_nonnegative
from ._complete_matrix import AlternatingMinimisation, complete_matrix, complete_matrix_ex
from ._conjugate import conjugate_prox
from ._data_consistency import data_consistency, data_consistency_ex
from ._data_consistency_module import DataConsistency
from ._flow_solver import DualGradient
from ._graph_tv import prox_graph_tv, prox_graph_tv_ex
from ._input_convex_network import InputConvexNetwork
from ._isotonic import project_isotonic
from ._jacobian_nuclear_norm import (
    Denoising,
    ExactJacobian,
    Hutchinson,
    jacobian_nuclear_norm,
    jacobian_nuclear_penalty,
)
from ._lasso import lasso, lasso_ex
from ._lasso_solver import FISTA
from ._learned_proximal import LearnedProximal
from ._linear_sets import project_affine, project_affine_ex, project_halfspace, project_hyperplane
from ._moreau_envelope import MoreauPoint, moreau_envelope, moreau_envelope_ex, prox_of, prox_of_ex
from ._moreau_grad import MoreauGrad
from ._moreau_problem import L1, GroupL2
from ._nonconvex import prox_l0, prox_log, prox_mcp, prox_scad
from ._norms import project_l2_ball, prox_group_l2, prox_l2, prox_linf
from ._nuclear import project_nuclear_ball, prox_nuclear, prox_spectral_l2
from ._predictive_sparse_decomposition import PredictiveSparseDecomposition
from ._proximal_matching import proximal_matching_loss
from ._quadratic import prox_quadratic, prox_quadratic_ex
from ._restoration_solvers import ADMM, HQS, ProximalGradient
from ._restore import Restoration, restore
from ._scalar_roots import prox_entropy, prox_logistic, prox_poisson
from ._simplex import project_capped_simplex, project_l1_ball, project_simplex, soft_topk
from ._slope import prox_slope
from ._soft_threshold import prox_elastic_net, prox_hinge, prox_huber, prox_l1, prox_nonnegative_l1, prox_squared_l2
from ._sparse_coding import SparseCoding
from ._spectral_box import project_spectral_box
from ._stiefel import project_stiefel
from ._supervised_dictionary import SupervisedDictionary
from ._train_proximal import MatchingSchedule, MatchingStage, TrainingRecord, train_proximal
from ._transport_polytope import project_transport, project_transport_ex
from ._tv1d import prox_tv1d
from ._tv2d import prox_tv2d, prox_tv2d_ex
from ._tv2d_interior import TV2DInteriorPoint

__all__ = [
    "ADMM",
    "FISTA",
    "HQS",
    "L1",
    "AlternatingMinimisation",
    "DataConsistency",
    "Denoising",
    "DualGradient",
    "ExactJacobian",
    "GroupL2",
    "Hutchinson",
    "InputConvexNetwork",
    "LearnedProximal",
    "MatchingSchedule",
    "MatchingStage",
    "MoreauGrad",
    "MoreauPoint",
    "PredictiveSparseDecomposition",
    "ProximalGradient",
    "Restoration",
    "SparseCoding",
    "SupervisedDictionary",
    "TV2DInteriorPoint",
    "TrainingRecord",
    "complete_matrix",
    "complete_matrix_ex",
    "conjugate_prox",
    "data_consistency",
    "data_consistency_ex",
    "jacobian_nuclear_norm",
    "jacobian_nuclear_penalty",
    "lasso",
    "lasso_ex",
    "moreau_envelope",
    "moreau_envelope_ex",
    "project_affine",
    "project_affine_ex",
    "project_box",
    "project_capped_simplex",
    "project_halfspace",
    "project_hyperplane",
    "project_isotonic",
    "project_l1_ball",
    "project_l2_ball",
    "project_linf_ball",
    "project_nonnegative",
    "project_nuclear_ball",
    "project_simplex",
    "project_spectral_box",
    "project_stiefel",
    "project_transport",
    "project_transport_ex",
    "prox_elastic_net",
    "prox_entropy",
    "prox_graph_tv",
    "prox_graph_tv_ex",
    "prox_group_l2",
    "prox_hinge",
    "prox_huber",
    "prox_l0",
    "prox_l1",
    "prox_l2",
    "prox_linf",
    "prox_log",
    "prox_logistic",
    "prox_mcp",
    "prox_nonnegative_l1",
    "prox_nuclear",
    "prox_of",
    "prox_of_ex",
    "prox_poisson",
    "prox_quadratic",
    "prox_quadratic_ex",
    "prox_scad",
    "prox_slope",
    "prox_spectral_l2",
    "prox_squared_l2",
    "prox_tv1d",
    "prox_tv2d",
    "prox_tv2d_ex",
    "proximal_matching_loss",
    "restore",
    "soft_topk",
    "train_proximal",
]
