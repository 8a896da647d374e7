"""Bilevel layers: hyperparameters, data and weights that are chosen by what training makes of them.

The inner problem is a lower-level training problem; the upper-level objective is differentiated through its solution
by an implicit hypergradient, or the solution is a layer of its own.

>>> import torch
>>> from difflayers.bilevel import Bilevel, hypergradient
>>> X, t = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0, 1.0])
>>> ridge = Bilevel(
...     upper=lambda x, y, batch: (y - 1).square().sum(),
...     lower=lambda x, y, batch: (X @ y - t).square().sum() + (x.exp() * y.square()).sum(),
... )
>>> x = torch.zeros(2)
>>> y = torch.linalg.solve(X.mT @ X + torch.eye(2), X.mT @ t)
>>> hypergradient(ridge, x, y).grad
tensor([0.2500, 0.0960])
"""

from ._argmin_layer import ArgminLayer
from ._bamm import BAMM
from ._bilevel_pruning import BilevelPruning
from ._bloop import Bloop, BloopStats
from ._bome import BOME
from ._borep import BOREP
from ._bsvrb import BSVRB
from ._dataset_distillation import DatasetDistillation
from ._error_bound import Smoothness
from ._f2sa import F2SA
from ._finite_difference import FiniteDifference
from ._hoag import HOAG
from ._hypergradient import Hypergradient, hypergradient
from ._implicit_sgd import ImplicitSGD
from ._lvhba import LVHBA
from ._maid import MAID, MAIDStats
from ._meha import MEHA
from ._method import Method, StepStats
from ._mfac import MFAC
from ._minimize import MethodHistory, minimize
from ._penalty_method import PenaltyMethod
from ._problem import Bilevel
from ._schedules import Constant, Exponential, Linear, Power
from ._self_tuning import Hyperparameter, SelfTuning
from ._soba import SABA, SOBA
from ._vpbgd import GPBGD, VPBGD

__all__ = [
    "BAMM",
    "BOME",
    "BOREP",
    "BSVRB",
    "F2SA",
    "GPBGD",
    "HOAG",
    "LVHBA",
    "MAID",
    "MEHA",
    "MFAC",
    "SABA",
    "SOBA",
    "VPBGD",
    "ArgminLayer",
    "Bilevel",
    "BilevelPruning",
    "Bloop",
    "BloopStats",
    "Constant",
    "DatasetDistillation",
    "Exponential",
    "FiniteDifference",
    "Hypergradient",
    "Hyperparameter",
    "ImplicitSGD",
    "Linear",
    "MAIDStats",
    "Method",
    "MethodHistory",
    "PenaltyMethod",
    "Power",
    "SelfTuning",
    "Smoothness",
    "StepStats",
    "hypergradient",
    "minimize",
]
