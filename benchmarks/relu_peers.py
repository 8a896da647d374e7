"""scnn, the library of the papers on gated and convex ReLU networks, on our problems. It comes by `pip install pyscnn`.

scnn minimises `1/(2 n) ||f - y||^2 + lambda R`, so that lambda is beta / n, on data scaled to columns of unit length
unless told otherwise, and drops and reorders gates: what it returns is read with the gates that it returns.
"""

import logging
from importlib import util

import numpy as np
import torch
from torch import Tensor

PACKAGE = "pyscnn"
SOURCE = "scnn"  # the module's name
TOLERANCES = [10.0**-k for k in range(6, 15, 2)]  # of the squared norm of a subgradient; 1e-6 is scnn's default


def available() -> bool:
    """Whether scnn can be used; says so where it cannot."""
    if util.find_spec(SOURCE) is None:
        print(f"scnn: left out, {PACKAGE} is not installed")
        return False
    return True


def scnn_gated(X: Tensor, y: Tensor, beta: float, vectors: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """R-FISTA: neurons `(P, d)` and their gates `(P, d)`."""
    from scnn.models import ConvexGatedReLU
    from scnn.solvers import RFISTA

    model = ConvexGatedReLU(_gates(vectors))
    found = _train(model, RFISTA(model, tol=tol), X, y, beta)
    return _rows(found.parameters[0], X), _rows(found.G.T, X)


def scnn_relu(X: Tensor, y: Tensor, beta: float, vectors: Tensor, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """The augmented Lagrangian: positive neurons, negative neurons, both `(P, d)`, and their gates `(P, d)`.

    The constraints hold up to about the root of the tolerance.
    """
    from scnn.models import ConvexReLU
    from scnn.solvers import AL

    model = ConvexReLU(_gates(vectors))
    found = _train(model, AL(model, tol=tol, constraint_tol=tol), X, y, beta)
    return _rows(found.parameters[0], X), _rows(found.parameters[1], X), _rows(found.G.T, X)


def _train(model, solver, X: Tensor, y: Tensor, beta: float):
    from scnn.metrics import Metrics
    from scnn.optimize import optimize_model
    from scnn.regularizers import NeuronGL1

    logging.getLogger("scnn").setLevel(logging.ERROR)  # that an iteration ended early is seen in its result
    found, _ = optimize_model(
        model,
        solver,
        Metrics(),
        X.numpy(),
        y.unsqueeze(-1).numpy(),
        regularizer=NeuronGL1(beta / len(y)),
        return_convex=True,
        unitize_data=False,
        dtype="float64",
    )
    return found


def _gates(vectors: Tensor) -> np.ndarray:
    return np.ascontiguousarray(vectors.T.numpy())


def _rows(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float64)).reshape(-1, like.shape[-1])
