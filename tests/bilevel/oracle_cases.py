"""The problems of the oracle tests, and how far two results are apart."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from difflayers.bilevel import Bilevel
from difflayers.implicit import Implicit
from difflayers.linalg import CG, GMRES, LU, MINRES, Cholesky
from tests.bilevel.oracle_closed import ElasticNet, Equality, Logistic, Ridge

F64 = torch.float64
RIDGE, LOGISTIC, NET, EQUAL = Ridge.random(), Logistic.random(), ElasticNet.random(), Equality.random()
AT = {
    "ridge": np.linspace(-1, 1, 5),
    "logistic": np.linspace(-4, -2, 4),
    "net": np.array([0.0, 0.0, 0.5, 1.0, 1.0, 1.0, -1.0]),
    "equal": np.linspace(-1, 1, 5),
}
TIGHT = 1e-13


def problem(name: str) -> tuple[Any, Bilevel, np.ndarray]:
    P = {"ridge": RIDGE, "logistic": LOGISTIC, "net": NET, "equal": EQUAL}[name]
    if name == "net":
        made = Bilevel(NET.upper, NET.lower, prox_lower=NET.soft)
    elif name == "equal":
        made = Bilevel(EQUAL.upper, EQUAL.lower, constraint=EQUAL.constraint, equality=True)
    else:
        made = Bilevel(P.upper, P.lower)
    return P, made, AT[name]


def far(got: Any, wanted: Any) -> float:
    """Largest deviation, relative to the largest entry of what is wanted."""
    a, b = torch.as_tensor(got).detach(), torch.as_tensor(wanted).detach()
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.to(F64) - b.to(F64)).abs().max() / b.abs().max().clamp(min=1e-30)) if b.numel() else 0.0


ADJOINTS = {
    "default": None,
    "cg": Implicit(CG(rtol=TIGHT)),
    "minres": Implicit(MINRES(rtol=TIGHT)),
    "gmres": Implicit(GMRES(rtol=TIGHT)),
    "lu": Implicit(LU()),
    "cholesky": Implicit(Cholesky()),
}


# A fixed point with a prox is not symmetric, an optimality system with multipliers not definite.
SOUND = [
    *itertools.product(["ridge", "logistic"], ADJOINTS),
    *itertools.product(["net"], ["default", "gmres", "lu"]),
    *itertools.product(["equal"], ["default", "minres", "gmres", "lu"]),
]
