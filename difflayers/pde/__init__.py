r"""PDE layers: fields that satisfy a differential equation by construction.

A network proposes basis functions; the layer finds the coefficients for which the equation, its boundary values and its
initial values hold, exactly or in the least-squares sense, and differentiates them in everything that was given. Here a
cubic satisfies ``u'' = -1`` with ``u(0) = u(1) = 0``, and its middle follows the right-hand side:

>>> import torch
>>> from difflayers.pde import residual_least_squares
>>> x = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None]
>>> basis = {"u": torch.cat([x**0, x, x**2, x**3], 1), "u_xx": torch.cat([0 * x, 0 * x, 2 * x**0, 6 * x], 1)}
>>> ends = basis["u"][[0, -1]], torch.zeros(2, dtype=torch.float64)
>>> source = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
>>> w = residual_least_squares(basis, lambda u, f: u["u_xx"] + f, source, equality=ends)
>>> middle = basis["u"][4] @ w
>>> print(f"{middle.item():.4f}")
0.1250
>>> torch.autograd.grad(middle, source)
(tensor(0.1250, dtype=torch.float64),)
"""

from ._conditions import Dirichlet, Initial, Neumann, Periodic, Robin
from ._conservation import (
    Conservation,
    conservation_operator,
    conserve,
    conserve_ex,
    conserved_log_likelihood,
)
from ._constraint import PDEConstraint
from ._darcy import Darcy, darcy_reference
from ._declaration import PDE, Box
from ._derivatives import FiniteDifference, Jvp, Spectral
from ._equations import (
    Advection,
    Burgers,
    DiffusionSorption,
    GeneralizedPorousMedium,
    Heat,
    Helmholtz,
    NavierStokes2D,
    Poisson,
    safe_power,
)
from ._exact_solutions import (
    advection_solution,
    barenblatt_solution,
    heat_solution,
    inviscid_burgers_solution,
    porous_medium_mass,
    porous_medium_solution,
    stefan_mass,
    stefan_solution,
    viscous_burgers_solution,
)
from ._experts import DomainExperts
from ._field import ConstrainedField, ExpertField
from ._figures import plot_field
from ._gates import HardBoxes, PartitionOfUnity, Seam
from ._interface import Continuity
from ._reference_solvers import (
    cached_reference,
    diffusion_sorption_reference,
    gaussian_random_field,
    navier_stokes_reference,
)
from ._residual_least_squares import (
    ResidualSolution,
    residual_least_squares,
    residual_least_squares_ex,
    residual_least_squares_value,
)
from ._samplers import Fixed, Grid, Sobol
from ._training import TrainingHistory, train

__all__ = [
    "PDE",
    "Advection",
    "Box",
    "Burgers",
    "Conservation",
    "ConstrainedField",
    "Continuity",
    "Darcy",
    "DiffusionSorption",
    "Dirichlet",
    "DomainExperts",
    "ExpertField",
    "FiniteDifference",
    "Fixed",
    "GeneralizedPorousMedium",
    "Grid",
    "HardBoxes",
    "Heat",
    "Helmholtz",
    "Initial",
    "Jvp",
    "NavierStokes2D",
    "Neumann",
    "PDEConstraint",
    "PartitionOfUnity",
    "Periodic",
    "Poisson",
    "ResidualSolution",
    "Robin",
    "Seam",
    "Sobol",
    "Spectral",
    "TrainingHistory",
    "advection_solution",
    "barenblatt_solution",
    "cached_reference",
    "conservation_operator",
    "conserve",
    "conserve_ex",
    "conserved_log_likelihood",
    "darcy_reference",
    "diffusion_sorption_reference",
    "gaussian_random_field",
    "heat_solution",
    "inviscid_burgers_solution",
    "navier_stokes_reference",
    "plot_field",
    "porous_medium_mass",
    "porous_medium_solution",
    "residual_least_squares",
    "residual_least_squares_ex",
    "residual_least_squares_value",
    "safe_power",
    "stefan_mass",
    "stefan_solution",
    "train",
    "viscous_burgers_solution",
]
