"""Cases of :func:`~difflayers.implicit.argmin` with a constraint or a prox."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import SolveError
from difflayers.implicit import (
    AcceleratedProximalGradient,
    Anderson,
    Equality,
    Inequality,
    InteriorPoint,
    Projection,
    Prox,
    argmin,
    argmin_ex,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import numbers, per_element
from ._functions import function_case

ARGMIN = (argmin, argmin_ex)


def distance(z: Tensor, x: Tensor, *_: Tensor) -> Tensor:
    """Half the squared distance."""
    return (z - x).square().sum(-1) / 2


# ---------------------------------------------------------------------------------- nearest point of a disc in a plane

DISC = (
    Equality(lambda z, *args: (args[-3] * z).sum(-1) - args[-2]),
    Inequality(lambda z, *args: (z.square().sum(-1) * args[-1].reciprocal().square() - 1) / 2),
)
NEAREST = (numbers([[1.0, 2.0, -1.0], [0.5, 0.1, 0.3]]), numbers([1.0, -0.5, 0.3]), numbers(0.4), numbers(1.1))


def nearest(x: Tensor, a: Tensor, b: Tensor, r: Tensor) -> Tensor:
    """In closed form: onto the plane, then towards the middle of the disc."""
    a, b, r = a, b.unsqueeze(-1), r.unsqueeze(-1)
    square = a.square().sum(-1, keepdim=True)
    middle = a * b / square
    inside = x - a * ((a * x).sum(-1, keepdim=True) - b) / square - middle
    far = inside.square().sum(-1, keepdim=True)
    room = r.square() - middle.square().sum(-1, keepdim=True)
    outside = far > room
    return middle + torch.where(outside, (room / torch.where(outside, far, 1)).sqrt(), 1) * inside


def feasible(z: Tensor, x: Tensor, a: Tensor, b: Tensor, r: Tensor) -> Tensor:
    """Zero where both constraints hold."""
    return torch.stack([(a * z).sum(-1) - b, (z.square().sum(-1) - r.square()).relu()], -1)


def _disc(name: str, solver: Any, starved: Any, **fields: Any) -> LayerCase:
    options = {"constraint": DISC, **fields.pop("options", {})}
    common: dict[str, Any] = {
        "oracle": nearest,
        "invariants": (feasible,),
        "unrolled": nearest,
        "source": "A. Fiacco, Sensitivity analysis for nonlinear programming using penalty methods, 1976",
    }
    return function_case(
        name, ARGMIN, distance, NEAREST, ndims=(1, 1, 0, 0), event=(3,), solver=solver, starved=starved,
        options=options, **(common | fields),
    )  # fmt: skip


def _touching(x: Tensor, a: Tensor, b: Tensor, r: Tensor) -> Tensor:
    """Two equal rows: the point is known, its derivative is not."""
    x = x.detach().clone().requires_grad_()
    twice = Equality(lambda z, x, a, b: torch.stack([(a * z).sum(-1) - b] * 2, -1))
    z = argmin(distance, torch.zeros_like(x), (x, a, b), constraint=twice)
    return torch.autograd.grad(z.sum(), x)[0]


def _bottomless(x: Tensor, a: Tensor, b: Tensor, r: Tensor) -> Tensor:
    half = Inequality(lambda z, a: (a * z).sum(-1))
    return argmin(lambda z, a: (a * z).sum(-1), torch.zeros_like(x), (a,), constraint=half)


def _mixed(x: Tensor, *_: Tensor) -> Tensor:
    both = (Projection(lambda z, x: z), Equality(lambda z, x: z))
    return argmin(distance, torch.zeros_like(x), (x,), constraint=both)


def _wide(x: Tensor, *_: Tensor) -> Tensor:
    return argmin(distance, torch.zeros_like(x), (x,), constraint=Equality(lambda z, x: z.sum(0)))


DISCS = (
    _disc(
        "argmin InteriorPoint",
        InteriorPoint(),
        InteriorPoint(max_steps=1),
        representative=True,
        hostile=(
            Hostile("inside", (0.1 * NEAREST[0], *NEAREST[1:])),
            Hostile("large", (1e6 * NEAREST[0], *NEAREST[1:])),
            Hostile("in millions", (1e6 * NEAREST[0], NEAREST[1], 1e6 * NEAREST[2], 1e6 * NEAREST[3])),
            Hostile("in millionths", (1e-6 * NEAREST[0], NEAREST[1], 1e-6 * NEAREST[2], 1e-6 * NEAREST[3])),
            Hostile("through the origin", (*NEAREST[:2], 0 * NEAREST[2], NEAREST[3])),
            Hostile("the middle of the disc", (0 * NEAREST[0] + 0.3, *NEAREST[1:])),
            Hostile("a disc of one point", (*NEAREST[:3], NEAREST[2] / NEAREST[1].norm()), may_fail=True),
            Hostile("plane and ball apart", (*NEAREST[:2], numbers(9.0), NEAREST[3]), SolveError, "INFEASIBLE"),
            Hostile("dependent constraints", NEAREST, SolveError, "SINGULAR", _touching),
            Hostile("unbounded below", NEAREST, SolveError, "UNBOUNDED", _bottomless),
        ),
        wrong=(
            Wrong("a projection among others", NEAREST, "constraint: expected one Projection or Prox alone", _mixed),
            Wrong("no entry for each element", NEAREST, "constraint output: expected shape", _wide),
        ),
    ),
    _disc("argmin InteriorPoint, undeclared", InteriorPoint(), InteriorPoint(max_steps=1), declared=False),
)

# ----------------------------------------------------------------------------------------------- a lasso of one feature


def pulled(z: Tensor, x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    """Distance to x and the square of one product, so that coordinates see each other."""
    return distance(z, x) + (w * z).sum(-1).square() / 2


def shrink(z: Tensor, step: Tensor, *args: Tensor) -> Tensor:
    """Soft thresholding by ``step * t``."""
    level = (step * args[-1]).unsqueeze(-1)
    return z.sign() * (z.abs() - level).relu()


SPARSE = (numbers([[1.0, 2.0, -1.2], [0.5, -1.6, 0.2]]), numbers([0.6, -0.4, 0.8]), numbers(0.5))


def _signs(x: np.ndarray, w: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The minimiser with the smallest objective over all sign patterns: each is a linear system."""
    best, least = np.zeros(3), np.inf
    for signs in itertools.product((-1, 0, 1), repeat=3):
        s = np.array(signs, dtype=float)
        S = s != 0
        z = np.zeros(3)
        if S.any():
            z[S] = np.linalg.solve(np.eye(S.sum()) + np.outer(w[S], w[S]), x[S] - t * s[S])
        value = ((z - x) ** 2).sum() / 2 + (w @ z) ** 2 / 2 + t * np.abs(z).sum()
        if value < least:
            best, least = z, value
    return best


def _on_support(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    """The linear system of the support, which the oracle finds."""
    s = per_element(_signs, (1, 1, 0))(x, w, t).sign()
    held = s != 0
    eye = torch.eye(3, dtype=x.dtype, device=x.device)
    M = torch.where(held.unsqueeze(-1) & held.unsqueeze(-2), eye + w.unsqueeze(-1) * w.unsqueeze(-2), eye)
    return torch.linalg.solve(M, torch.where(held, x - t.unsqueeze(-1) * s, 0))


def _sparse(name: str, solver: Any, starved: Any, **fields: Any) -> LayerCase:
    options = {"constraint": Prox(shrink), **fields.pop("options", {})}
    common: dict[str, Any] = {"oracle": per_element(_signs, (1, 1, 0)), "unrolled": _on_support}
    return function_case(
        name, ARGMIN, pulled, SPARSE, ndims=(1, 1, 0), event=(3,), solver=solver, starved=starved, options=options,
        **(common | fields),
    )  # fmt: skip


PROXES = (
    _sparse(
        "argmin AcceleratedProximalGradient",
        AcceleratedProximalGradient(),
        AcceleratedProximalGradient(max_steps=1),
        representative=True,
        source="A. Beck, M. Teboulle, A fast iterative shrinkage-thresholding algorithm, 2009",
        hostile=(
            Hostile("all at zero", (SPARSE[0], SPARSE[1], numbers(50.0))),
            Hostile("no threshold", (SPARSE[0], SPARSE[1], numbers(0.0))),
            Hostile("in millions", (1e6 * SPARSE[0], SPARSE[1], 1e6 * SPARSE[2])),
            Hostile("in millionths", (1e-6 * SPARSE[0], SPARSE[1], 1e-6 * SPARSE[2])),
            Hostile("stiff", (SPARSE[0], 1e3 * SPARSE[1], SPARSE[2])),
            Hostile("zero", (0 * SPARSE[0], SPARSE[1], SPARSE[2])),
        ),
    ),
    _sparse("argmin AcceleratedProximalGradient, undeclared", AcceleratedProximalGradient(), None, declared=False),
    _sparse("argmin Prox by Anderson", Anderson(), Anderson(max_steps=1)),
)

CONSTRAINED: tuple[LayerCase, ...] = (*DISCS, *PROXES)
