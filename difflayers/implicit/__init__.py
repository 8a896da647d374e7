"""The engine: roots, fixed points and minimisers as layers, differentiated by the implicit function theorem.

>>> import torch
>>> from difflayers.implicit import Anderson, fixed_point
>>> W = torch.tensor([[0.5, 0.2], [-0.1, 0.4]], requires_grad=True)
>>> x = torch.tensor([1.0, 2.0])
>>> z = fixed_point(lambda z, W, x: torch.tanh(W @ z + x), torch.zeros(2), (W, x), solver=Anderson(rtol=1e-6))
>>> z.sum().backward()
>>> W.grad.shape
torch.Size([2, 2])
"""

from difflayers._solution import Info, Status

from ._accelerated_proximal_gradient import AcceleratedProximalGradient
from ._adjoints import Implicit, Neumann, OneStep, Unrolled
from ._anderson import Anderson
from ._argmin import argmin, argmin_ex
from ._bisection import Bisection
from ._constraints import ConstrainedSolution, Equality, Inequality, Projection, Prox
from ._engine import solution_map, solution_map_ex
from ._envelope import envelope
from ._fixed_point import fixed_point, fixed_point_ex
from ._fixed_point_module import FixedPoint
from ._from_torchopt import FromTorchOpt
from ._implicit_problem import ImplicitProblem
from ._interior_point import InteriorPoint
from ._iterate import IterativeSolver, Step
from ._lbfgs import LBFGS
from ._levenberg_marquardt import LevenbergMarquardt
from ._newton import Newton
from ._nonlinear_least_squares import Exact, GaussNewton, nonlinear_least_squares, nonlinear_least_squares_ex
from ._picard import Picard
from ._root_find import root_find, root_find_ex
from ._warm_start import WarmStart

__all__ = [
    "LBFGS",
    "AcceleratedProximalGradient",
    "Anderson",
    "Bisection",
    "ConstrainedSolution",
    "Equality",
    "Exact",
    "FixedPoint",
    "FromTorchOpt",
    "GaussNewton",
    "Implicit",
    "ImplicitProblem",
    "Inequality",
    "Info",
    "InteriorPoint",
    "IterativeSolver",
    "LevenbergMarquardt",
    "Neumann",
    "Newton",
    "OneStep",
    "Picard",
    "Projection",
    "Prox",
    "Status",
    "Step",
    "Unrolled",
    "WarmStart",
    "argmin",
    "argmin_ex",
    "envelope",
    "fixed_point",
    "fixed_point_ex",
    "nonlinear_least_squares",
    "nonlinear_least_squares_ex",
    "root_find",
    "root_find_ex",
    "solution_map",
    "solution_map_ex",
]
