"""Conic layers: cones, quadratic and conic programs as layers, and bounds from their duals.

The inner problem is a convex program over cones. A solution is differentiated through its optimality conditions; an
optimal value, or a bound from dual completion, by the envelope theorem.

>>> import torch
>>> from difflayers.conic import Exponential, Product, SecondOrder
>>> cone = Product([(SecondOrder(), 3), (Exponential(), 3)])
>>> x = torch.tensor([1.0, 3.0, 4.0, 1.0, 1.0, 1.0])
>>> cone.project(x)
tensor([3.0000, 1.8000, 2.4000, 0.4263, 0.7517, 1.3254])
>>> cone.violation(cone.project(x)) < 1e-6
tensor(True)
"""

from difflayers.linalg._sparse_matrix import SparseMatrix

from ._completion import Completion
from ._completions import BallCompletion, BoxCompletion, EllipsoidCompletion, HyperbolicCompletion
from ._cones import Cone, Free, NonNegative, Product, Zero
from ._conic_program import ConicPoint, conic_program, conic_program_ex
from ._conic_solvers import Clarabel, ConicSolver
from ._cvxpy_layer import CvxpyLayer
from ._divergences import KL, ChiSquare, Divergence
from ._dual_bound import DualPoint, dual_bound, dual_bound_ex
from ._dual_cone import BlockPivoting
from ._dual_proxy import DualProjection, DualProxy, Euclidean, Radial
from ._exponential import DualExponential, Exponential
from ._feasible_learning import FeasibleLearning
from ._hull_completions import PolytopeCompletion, SimplexCompletion, SpectraplexCompletion
from ._interior_point import InteriorPoint
from ._knapsack import Knapsack, sample_knapsack
from ._label_robust import LabelRobustLoss, label_robust_loss
from ._moreau import Moreau
from ._positive_semidefinite import PositiveSemidefinite
from ._power import DualPower, Power
from ._production_planning import ProductionPlanning, sample_production_planning
from ._program_completions import BoxQuadraticCompletion, QuadraticCompletion
from ._program_problem import ProgramSolver
from ._quadratic_program import (
    ProgramPoint,
    project_polyhedron,
    quadratic_program,
    quadratic_program_ex,
)
from ._quadratic_program_module import QuadraticProgram
from ._second_order import RotatedSecondOrder, SecondOrder
from ._solver_completion import SolverCompletion
from ._spectra import Spectrum, esrm, extremile, superquantile
from ._spectral_risk import spectral_risk, spectral_risk_weights
from ._torchjd import torchjd_projector
from ._train_dual_proxy import DualInstances, DualTrainingRecord, InstanceSet, train_dual_proxy
from ._upgrad import UPGrad, dual_cone_weights, dual_cone_weights_ex, upgrad_weights, upgrad_weights_ex

__all__ = [
    "KL",
    "BallCompletion",
    "BlockPivoting",
    "BoxCompletion",
    "BoxQuadraticCompletion",
    "ChiSquare",
    "Clarabel",
    "Completion",
    "Cone",
    "ConicPoint",
    "ConicSolver",
    "CvxpyLayer",
    "Divergence",
    "DualExponential",
    "DualInstances",
    "DualPoint",
    "DualPower",
    "DualProjection",
    "DualProxy",
    "DualTrainingRecord",
    "EllipsoidCompletion",
    "Euclidean",
    "Exponential",
    "FeasibleLearning",
    "Free",
    "HyperbolicCompletion",
    "InstanceSet",
    "InteriorPoint",
    "Knapsack",
    "LabelRobustLoss",
    "Moreau",
    "NonNegative",
    "PolytopeCompletion",
    "PositiveSemidefinite",
    "Power",
    "Product",
    "ProductionPlanning",
    "ProgramPoint",
    "ProgramSolver",
    "QuadraticCompletion",
    "QuadraticProgram",
    "Radial",
    "RotatedSecondOrder",
    "SecondOrder",
    "SimplexCompletion",
    "SolverCompletion",
    "SparseMatrix",
    "SpectraplexCompletion",
    "Spectrum",
    "UPGrad",
    "Zero",
    "conic_program",
    "conic_program_ex",
    "dual_bound",
    "dual_bound_ex",
    "dual_cone_weights",
    "dual_cone_weights_ex",
    "esrm",
    "extremile",
    "label_robust_loss",
    "project_polyhedron",
    "quadratic_program",
    "quadratic_program_ex",
    "sample_knapsack",
    "sample_production_planning",
    "spectral_risk",
    "spectral_risk_weights",
    "superquantile",
    "torchjd_projector",
    "train_dual_proxy",
    "upgrad_weights",
    "upgrad_weights_ex",
]
