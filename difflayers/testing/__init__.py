"""The contract: what every layer of this library promises, as tests that run on any layer.

>>> import torch
>>> from difflayers.testing import LayerCase, check_layer
>>> def ridge(y, w):
...     return y / (1 + w.square())
>>> y, w = torch.ones(2, 3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
>>> case = LayerCase("ridge", ridge, (y, w), event_ndims=(1, 1))
>>> {result.outcome for result in check_layer(case)} <= {"passed", "absent"}
True
"""

# Files of clauses are imported for what they register, in the order in which their clauses run.
# isort: off
from ._case import Hostile, LayerCase, Wrong
from ._clauses import CLAUSES, Clause, Result, check_layer, run_clause
from . import _derivatives as _derivatives
from . import _transforms as _transforms
from . import _shapes as _shapes
from . import _hostile as _hostile
from . import _modules as _modules
from ._gradient import GradientReport, check_gradient
from ._memory import saved_bytes
# isort: on

__all__ = [
    "CLAUSES",
    "Clause",
    "GradientReport",
    "Hostile",
    "LayerCase",
    "Result",
    "Wrong",
    "check_gradient",
    "check_layer",
    "run_clause",
    "saved_bytes",
]
