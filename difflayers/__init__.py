"""Inner optimisation problems as PyTorch layers, with first and second derivatives that are right or raise."""

from . import bilevel, conic, equilibrium, implicit, linalg, pde, proximal, relu, transport
from ._solution import Info, Record, Solution, SolveError, SolveWarning, Status, trace

__version__ = "0.1.0"

__all__ = [
    "Info",
    "Record",
    "Solution",
    "SolveError",
    "SolveWarning",
    "Status",
    "bilevel",
    "conic",
    "equilibrium",
    "implicit",
    "linalg",
    "pde",
    "proximal",
    "relu",
    "trace",
    "transport",
]
