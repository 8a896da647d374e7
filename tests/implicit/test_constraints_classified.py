"""Which inequalities hold, where multipliers are very different, cancel, or do not exist.

Oracles, written down first: separable quadratics and one-dimensional problems solved on paper. Where no multipliers
exist (a cusp) nothing may be called converged, since the derivative would be that of another problem.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from difflayers import SolveWarning, Status
from difflayers.implicit import Inequality, argmin_ex

F64 = torch.float64


def distance(z, c):
    return (z - c).square().sum(-1) / 2


@pytest.mark.parametrize("k", [1e4, 1e6, 1e8, 1e10])
def test_a_small_multiplier_beside_a_large_one(k):
    """z = 1 in all coordinates, multipliers 0.02 and 2 k; only the first coordinate follows c."""
    weights = torch.tensor([1.0, 1.0, k], dtype=F64)
    c = torch.tensor([[1.0, 1.01, 2.0]], dtype=F64, requires_grad=True)
    found = argmin_ex(
        lambda z, c: (weights * (z - c).square()).sum(-1),
        torch.zeros(1, 3, dtype=F64),
        (c,),
        constraint=Inequality(lambda z, c: z[..., 1:] - 1),
    )
    assert int(found.status) == Status.CONVERGED
    torch.testing.assert_close(found.value, torch.ones(1, 3, dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.multipliers, torch.tensor([[0.02, 2 * k]], dtype=F64), rtol=1e-10, atol=0)
    (slope,) = torch.autograd.grad(found.value.sum(), c)
    torch.testing.assert_close(slope, torch.tensor([[1.0, 0.0, 0.0]], dtype=F64), rtol=0, atol=1e-12)


def test_multipliers_of_opposite_rows_do_not_cancel():
    """z0 = 1 by two rows; z1 = 2 is held with multiplier 1, however large the others could be."""
    c = torch.tensor([[3.0, 3.0, 0.5]], dtype=F64)
    rows = Inequality(lambda z, c: torch.stack([z[..., 0] - 1, 1 - z[..., 0], z[..., 1] - 2], -1))
    found = argmin_ex(distance, torch.zeros(1, 3, dtype=F64), (c,), constraint=rows)
    assert int(found.status) == Status.CONVERGED
    torch.testing.assert_close(found.value, torch.tensor([[1.0, 2.0, 0.5]], dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.multipliers, torch.tensor([[2.0, 0.0, 1.0]], dtype=F64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("c", [(-1.0, 0.0), (-1.0, 0.3)])
def test_a_cusp_has_no_multipliers(c):
    c = torch.tensor([c], dtype=F64, requires_grad=True)
    cusp = Inequality(lambda z, c: z[..., 1] ** 2 - z[..., 0] ** 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolveWarning)
        found = argmin_ex(distance, torch.ones(1, 2, dtype=F64), (c,), constraint=cusp)
    assert int(found.status) == Status.MAX_STEPS
    assert float(found.value.detach().norm()) < 1e-4


def test_a_bound_at_infinity_is_none():
    c = torch.tensor([[2.0, 2.0]], dtype=F64, requires_grad=True)
    bounds = Inequality(lambda z, c: z - torch.tensor([1.0, torch.inf], dtype=F64))
    found = argmin_ex(distance, torch.zeros(1, 2, dtype=F64), (c,), constraint=bounds)
    assert int(found.status) == Status.CONVERGED
    torch.testing.assert_close(found.value, torch.tensor([[1.0, 2.0]], dtype=F64), rtol=0, atol=1e-10)
    (slope,) = torch.autograd.grad(found.value.sum(), c)
    torch.testing.assert_close(slope, torch.tensor([[0.0, 1.0]], dtype=F64), rtol=0, atol=1e-12)


def test_linearised_rows_that_contradict_each_other_prove_nothing():
    """Rows (1 - z^2, z - 1/2) at 0.6: feasible for z <= -1 alone. It ends at a minimum of the violation, zero or not,

    each row in units of its slope at the start, 1.2 and 1.
    """
    rows = Inequality(lambda z, c: torch.cat([1 - z.square(), z - 0.5], -1))
    found = argmin_ex(distance, torch.full((1, 1), 0.6, dtype=F64), (torch.zeros(1, 1, dtype=F64),), constraint=rows)
    z = float(found.value)
    if int(found.status) == Status.INFEASIBLE:
        violated = [max(1 - z**2, 0.0), max(z - 0.5, 0.0)]
        assert violated[0] * -2 * z / 1.2**2 + violated[1] == pytest.approx(0, abs=1e-4)
    else:
        assert int(found.status) == Status.CONVERGED and z == pytest.approx(-1)
