"""Cases of :func:`~difflayers.implicit.argmin` and :func:`~difflayers.implicit.nonlinear_least_squares`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import SolveError
from difflayers.implicit import (
    LBFGS,
    GaussNewton,
    Implicit,
    LevenbergMarquardt,
    Newton,
    argmin,
    argmin_ex,
    nonlinear_least_squares,
    nonlinear_least_squares_ex,
)
from difflayers.linalg import CG, GMRES
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element, unrolled_newton
from ._functions import DERIVATIVES, fsolve, function_case, zeros


def quartic(z: Tensor, x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """A strictly convex objective with a full Hessian that is not constant."""
    return (
        (z - x).square().sum(-1) / 2
        + c * z.square().square().sum(-1) / 4
        + torch.nn.functional.softplus((w * z).sum(-1))
    )


def quartic_gradient(z: Tensor, x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """Its gradient, by hand."""
    return z - x + c.unsqueeze(-1) * z**3 + w * torch.sigmoid((w * z).sum(-1, keepdim=True))


ARGMIN = (argmin, argmin_ex)
MINIMUM = (normal(14, 2, 3), normal(15, 3), numbers(0.7))


def _minimum(name: str, solver: Any, starved: Any, **fields: Any) -> LayerCase:
    ndims = (1, 1, 0)
    common: dict[str, Any] = {
        "oracle": per_element(fsolve(quartic_gradient, 3), ndims),
        "invariants": (quartic_gradient,),
        "unrolled": unrolled_newton(quartic_gradient, 3, ndims),
    }
    return function_case(
        name, ARGMIN, quartic, MINIMUM, ndims=ndims, event=(3,), solver=solver, starved=starved, **(common | fields)
    )


def _wrong_objective() -> tuple[Wrong, ...]:
    whole = lambda a: argmin(lambda z, a: (z - a).square(), torch.zeros_like(a), (a,))  # noqa: E731
    return (Wrong("an objective without a sum", (normal(1, 3),), "objective output: expected shape .* got", whole),)


def _downhill(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    return argmin(lambda z, x: -(z - x).square().sum(-1), torch.ones_like(x), (x,))


def _valley(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """A minimiser that is not unique: any value is fine, a derivative does not exist."""
    x = x.detach().clone().requires_grad_()
    z = argmin(lambda z, x: (z - x).sum(-1).square(), torch.zeros_like(x), (x,))
    return torch.autograd.grad(z.sum(), x)[0]


MINIMA = (
    _minimum(
        "argmin LBFGS",
        LBFGS(),
        LBFGS(max_steps=1),
        representative=True,
        wrong=_wrong_objective(),
        hostile=(
            Hostile("tiny", tuple(1e-60 * t for t in MINIMUM)),
            Hostile("zero", tuple(0 * t for t in MINIMUM)),
            Hostile("large", (1e6 * MINIMUM[0], MINIMUM[1], MINIMUM[2])),
            Hostile("unbounded below", MINIMUM, SolveError, "UNBOUNDED", _downhill),
            Hostile("a valley", MINIMUM, SolveError, "SINGULAR", _valley),
        ),
    ),
    _minimum("argmin LBFGS, undeclared", LBFGS(), LBFGS(max_steps=1), declared=False),
    _minimum("argmin LBFGS, CG adjoint", LBFGS(), None, options={"adjoint": Implicit(CG())}),
    _minimum(
        "argmin LBFGS, CG adjoint, undeclared", LBFGS(), None, declared=False, options={"adjoint": Implicit(CG())}
    ),
    _minimum("argmin LBFGS, GMRES adjoint", LBFGS(), None, options={"adjoint": Implicit(GMRES())}),
    _minimum("argmin Newton", Newton(), Newton(max_steps=1)),
)


# ------------------------------------------------------------------------------------------ nonlinear least squares


def fit(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """A weighted fit of ``z0 exp(z1 t)`` at four times; its residual does not vanish."""
    t = torch.arange(4, dtype=z.dtype, device=z.device) / 3
    return w * (z[..., :1] * torch.exp(z[..., 1:] * t) - y)


def fit_gradient(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """``J^T r``, by hand."""
    t = torch.arange(4, dtype=z.dtype, device=z.device) / 3
    wave = torch.exp(z[..., 1:] * t)
    r = w.square() * (z[..., :1] * wave - y)
    return torch.stack([(wave * r).sum(-1), (z[..., :1] * t * wave * r).sum(-1)], -1)


def _scipy_fit(y: np.ndarray, w: np.ndarray) -> np.ndarray:
    from scipy import optimize

    r = lambda z: fit(torch.from_numpy(z), torch.from_numpy(y), torch.from_numpy(w)).numpy()  # noqa: E731
    z = optimize.least_squares(r, np.ones(2), xtol=1e-15, ftol=1e-15, gtol=1e-15).x
    # the last digits, which a solver of least squares cannot see in its objective
    f = lambda z: fit_gradient(torch.from_numpy(z), torch.from_numpy(y), torch.from_numpy(w)).numpy()  # noqa: E731
    return optimize.root(f, z, tol=1e-14).x


SQUARES = (nonlinear_least_squares, nonlinear_least_squares_ex)
DATA = (numbers([[1.0, 1.6, 1.9, 3.1], [2.0, 1.9, 1.2, 1.1], [1.0, 1.1, 1.7, 1.8]]), numbers([1.0, 0.8, 1.2, 0.9]))
GAUSS_NEWTON = "drops the curvature of the residual: biased where the residual is not zero"


def _fit(name: str, solver: Any, starved: Any, **fields: Any) -> LayerCase:
    common: dict[str, Any] = {
        "oracle": per_element(_scipy_fit, (1, 1)),
        "invariants": (fit_gradient,),
        "unrolled": _fit_unrolled,
    }
    return function_case(
        name,
        SQUARES,
        fit,
        DATA,
        ndims=(1, 1),
        event=(2,),
        start=1.0,
        solver=solver,
        starved=starved,
        **(common | fields),
    )


def _fit_unrolled(y: Tensor, w: Tensor) -> Tensor:
    """Newton on ``J^T r`` from the solution: three steps carry derivatives of any order that is asked for."""
    z = nonlinear_least_squares(fit, zeros((y, w), (1, 1), (2,), 1.0), (y.detach(), w.detach())).requires_grad_()
    with torch.enable_grad():
        for _ in range(3):
            r = fit_gradient(z, y, w)
            rows = [torch.autograd.grad(r[..., i].sum(), z, create_graph=True)[0] for i in range(2)]
            z = z - torch.linalg.solve(torch.stack(rows, -2), r)
    return z


FITS = (
    _fit(
        "nonlinear_least_squares LevenbergMarquardt",
        LevenbergMarquardt(),
        LevenbergMarquardt(max_steps=1),
        representative=True,
        hostile=(
            Hostile("residual zero", (2 * torch.exp(numbers([[0.0, 0.1, 0.2, 0.3]])), DATA[1])),
            Hostile("ten times as large", (10 * DATA[0], DATA[1])),
            Hostile("small", (1e-6 * DATA[0], DATA[1])),
            Hostile("a weight of zero", (DATA[0], DATA[1] * numbers([1.0, 1.0, 0.0, 1.0]))),
            Hostile(
                "rank deficient",
                DATA,
                SolveError,
                "SINGULAR",
                lambda y, w: _flat_fit(y),
            ),
        ),
    ),
    _fit("nonlinear_least_squares undeclared", LevenbergMarquardt(), LevenbergMarquardt(max_steps=1), declared=False),
    _fit("nonlinear_least_squares CG adjoint", LevenbergMarquardt(), None, options={"adjoint": Implicit(CG())}),
    _fit(
        "nonlinear_least_squares GaussNewton",
        LevenbergMarquardt(),
        None,
        options={"curvature": GaussNewton()},
        exempt=dict.fromkeys(DERIVATIVES, GAUSS_NEWTON),
    ),
)


def _flat_fit(y: Tensor) -> Tensor:
    """Two unknowns of which only the sum matters: a value, but no derivative."""
    y = y.detach().clone().requires_grad_()
    start = y.new_ones(*y.shape[:-1], 2)
    z = nonlinear_least_squares(lambda z, y: z.sum(-1, keepdim=True) - y, start, (y,))
    return torch.autograd.grad(z.sum(), y)[0]
