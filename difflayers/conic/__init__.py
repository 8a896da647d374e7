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

from ._cones import Cone, Free, NonNegative, Product, Zero
from ._exponential import DualExponential, Exponential
from ._interior_point import InteriorPoint
from ._moreau import Moreau
from ._positive_semidefinite import PositiveSemidefinite
from ._power import DualPower, Power
from ._program_problem import ProgramSolver
from ._quadratic_program import (
    ProgramPoint,
    project_polyhedron,
    quadratic_program,
    quadratic_program_ex,
)
from ._second_order import RotatedSecondOrder, SecondOrder

__all__ = [
    "Cone",
    "DualExponential",
    "DualPower",
    "Exponential",
    "Free",
    "InteriorPoint",
    "Moreau",
    "NonNegative",
    "PositiveSemidefinite",
    "Power",
    "Product",
    "ProgramPoint",
    "ProgramSolver",
    "RotatedSecondOrder",
    "SecondOrder",
    "Zero",
    "project_polyhedron",
    "quadratic_program",
    "quadratic_program_ex",
]
