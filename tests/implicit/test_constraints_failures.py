"""``argmin`` under equalities and inequalities: what can go wrong.

Oracles: problems whose status is known by looking at them, and for the derivative at a saddle of the objective the
solution on the line by hand. The projection onto a ball is checked in ``test_constraints.py``.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.func import grad

from difflayers import SolveError, SolveWarning, Status
from difflayers.implicit import (
    Equality,
    Implicit,
    Inequality,
    InteriorPoint,
    Neumann,
    OneStep,
    Projection,
    Unrolled,
    argmin,
    argmin_ex,
)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _square(z):
    return z.square().sum(-1)


def distance(z, x, *_):
    return (z - x).square().sum(-1) / 2


def ball(z, x, r):
    return (z.square().sum(-1) - r * r) / 2


def _rosenbrock(z):
    return 100 * (z[..., 1] - z[..., 0] ** 2) ** 2 + (1 - z[..., 0]) ** 2


DISC = Inequality(lambda z: _square(z) - 1)
X = numbers(0.3, -0.2, 0.1, 1.0, 2.0, -2.0, -0.5, 1.5, 0.5).reshape(3, 3)
R = numbers(1.2)[0]


# ---------------------------------------------------------------------------------------------------- honest failures


@pytest.mark.parametrize(
    ("f", "constraint", "status"),
    [
        (_square, Inequality(lambda z: torch.stack([z[..., 0] - 1, 2 - z[..., 0]], -1)), "INFEASIBLE"),
        (_square, Equality(lambda z: _square(z) + 1), "INFEASIBLE"),
        (_square, (Inequality(lambda z: _square(z) - 1), Equality(lambda z: z.sum(-1) - 5)), "INFEASIBLE"),
        (lambda z: z.sum(-1), Inequality(lambda z: z[..., 0] - 1), "UNBOUNDED"),
        (lambda z: -z.square().sum(-1), Inequality(lambda z: z[..., 0] - 1), "UNBOUNDED"),
        (lambda z: z.sum(-1) * math.nan, Inequality(lambda z: z[..., 0] - 1), "DIVERGED"),
    ],
)  # fmt: skip
def test_status(f, constraint, status):
    start = numbers(0.3, 0.6)
    found = argmin_ex(f, start, constraint=constraint)
    assert Status(int(found.status)).name == status
    with pytest.raises(SolveError, match=status):
        argmin(f, start, constraint=constraint)


def test_dependent_constraints_have_a_value_and_no_derivative():
    up = numbers(1.0)[0].requires_grad_()
    twice = Inequality(lambda z, up: torch.stack([z.sum(-1) - up] * 2, -1))
    z = argmin(lambda z, up: (z - 1).square().sum(-1), numbers(0.0, 0.0), (up,), constraint=twice)
    assert (z - 0.5).abs().max() < 1e-9
    with pytest.raises(SolveError, match="SINGULAR"):
        z.sum().backward()


def test_a_saddle_along_the_constraint_has_no_derivative():
    """The start is stationary: on the line ``z_0 = 0`` the objective has its maximum there."""
    c = numbers(0.0)[0].requires_grad_()
    f = lambda z, c: z[..., 0] ** 2 - z[..., 1] ** 2 + c * z[..., 1]  # noqa: E731
    z = argmin(f, numbers(0.0, 0.0), (c,), constraint=Equality(lambda z, c: z[..., 0]))
    with pytest.raises(SolveError, match="SINGULAR"):
        z.sum().backward()


def test_an_indefinite_hessian_that_the_constraint_makes_definite():
    """``z_0^2 - z_1^2`` on ``z_1 = c z_0``, shifted: 2 (1 - c^2) z_0 = b on the line, by hand."""
    c = numbers(0.5)[0].requires_grad_()
    f = lambda z, c: z[..., 0] ** 2 - z[..., 1] ** 2 - z[..., 0]  # noqa: E731
    z = argmin(f, numbers(3.0, -1.0), (c,), constraint=Equality(lambda z, c: z[..., 1] - c * z[..., 0]))
    want = 1 / (2 * (1 - c**2))
    assert (z[0] - want).abs() < 1e-12
    got, want = torch.autograd.grad(z[0], c)[0], torch.autograd.grad(want, c)[0]
    assert (got - want).abs() < 1e-10


def test_weakly_active_counts_as_absent():
    x = numbers(1.0, 0.5).requires_grad_()
    found = argmin_ex(distance, numbers(0.0, 0.0), (x,), constraint=Inequality(lambda z, x: z - 1))
    assert (found.value - x).abs().max() < 1e-9 and found.multipliers.tolist() == [0.0, 0.0]
    assert torch.autograd.grad(found.value[0], x)[0].tolist() == [1.0, 0.0]


def test_starved_warns():
    with pytest.warns(SolveWarning, match="argmin .forward."):
        argmin(_rosenbrock, numbers(-1.2, 1.0), constraint=DISC, solver=InteriorPoint(max_steps=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        argmin(_rosenbrock, numbers(-1.2, 1.0), constraint=DISC)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("constraint", "match"),
    [
        (lambda z, x: z, "constraint: expected Projection, Prox, Equality or Inequality"),
        (Inequality(3), "constraint: expected a callable in Inequality, got int"),
        ((), "constraint: expected at least one"),
        ((Equality(distance), Projection(distance)), "constraint: expected one Projection or Prox alone"),
        (Equality(lambda z, x: z.sum()), r"constraint output: expected shape \(3,\) or \(3, 'm'\), got \(\)"),
        (Equality(lambda z, x: 1.0), "constraint output: expected a tensor, got float"),
        (Equality(lambda z, x: z.float()), "constraint output: expected torch.float64"),
        (Inequality(lambda z, x: z.mean(0) + 0 * z - 10), "expected batch elements that do not see each other"),
    ],
)
def test_bad_constraint(constraint, match):
    with pytest.raises(ValueError, match=match):
        argmin(distance, torch.zeros(3, 3).double(), (X,), constraint=constraint)


@pytest.mark.parametrize("adjoint", [Neumann(3), OneStep(), Unrolled(3), Implicit(damping=1.0)])
def test_bad_adjoint(adjoint):
    with pytest.raises(ValueError, match="adjoint: expected Implicit without damping"):
        argmin(distance, torch.zeros(3, 3).double(), (X, R), constraint=Inequality(ball), adjoint=adjoint)


def test_captured_in_a_constraint():
    r = R.clone().requires_grad_()
    captured = Inequality(lambda z, x: ball(z, x, r))
    with pytest.raises(ValueError, match="constraint: expected a function of its arguments alone"):
        argmin(distance, torch.zeros(3, 3).double(), (X,), constraint=captured)
    with pytest.raises(ValueError, match="captures"):
        grad(lambda r: argmin(distance, X, (X,), constraint=Inequality(lambda z, x: ball(z, x, r))).sum())(R)
    with torch.no_grad():
        argmin(distance, torch.zeros(3, 3).double(), (X,), constraint=captured)
