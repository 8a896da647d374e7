"""Inner optimisation problems as PyTorch layers, with first and second derivatives that are right or raise.

The engine, :mod:`difflayers.implicit` and :mod:`difflayers.linalg`, is imported at once; a family of layers when its
name is first used.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from . import implicit, linalg
from ._cite import cite
from ._solution import Info, Record, Solution, SolveError, SolveWarning, Status, trace

if TYPE_CHECKING:
    from . import bilevel, conic, equilibrium, pde, proximal, relu, transport

__version__ = "0.1.0"

__all__ = [
    "Info",
    "Record",
    "Solution",
    "SolveError",
    "SolveWarning",
    "Status",
    "bilevel",
    "cite",
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

_FAMILIES = ("bilevel", "conic", "equilibrium", "pde", "proximal", "relu", "transport")


def __getattr__(name: str) -> ModuleType:
    if name in _FAMILIES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
